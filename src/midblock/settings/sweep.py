"""Settings of `midblock sweep`: the keys of its YAML file."""

from __future__ import annotations

import copy
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from midblock.errors import BlockRangeError
from midblock.segments import validate_mask
from midblock.settings import sampling
from midblock.settings.base import Settings, name_of, setting
from midblock.settings.evaluate import EvaluateSettings, ScoringSettings
from midblock.settings.load import PlaceSettings
from midblock.settings.tune import (
    LEARNING_RATES,
    Init,
    LoopSettings,
    PlanSettings,
    Ranks,
    RowSettings,
    Scale,
    StartSettings,
    TrainSettings,
    TuneSettings,
)

__all__ = ["ENGINE_FIELDS", "NAME", "ArmsConfig", "DataConfig", "ExplicitArm", "Margins", "RandomArms",
           "StatisticsConfig", "SweepConfig", "TaskConfig", "TrainingConfig"]

MAX_SEGMENTS = 1000
"""Digits of a mask; no model is that deep."""
NAME = r"[A-Za-z0-9][A-Za-z0-9_.@+-]{0,199}"
"""Pattern of an arm's name, which is part of file names."""


def _mask(value: Any) -> Any:
    """A mask, also where YAML read it as a number (11111, 100)."""
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value) if 0 <= value < 10**MAX_SEGMENTS else "a number"
    if isinstance(value, str):
        if len(value) > MAX_SEGMENTS:
            raise ValueError(f"a mask of {len(value):,} digits is longer than any model is deep")
        try:
            return validate_mask(value)
        except BlockRangeError as error:
            raise ValueError(str(error)) from None
    return value


def _listed(value: Any) -> Any:
    """One value where a list may stand."""
    return value if isinstance(value, list | tuple) or value is None else [value]


Mask = Annotated[str, BeforeValidator(_mask)]
Masks = Annotated[list[Mask], BeforeValidator(_listed)]
Count = Annotated[int, Field(ge=1, le=10**12)]
Counts = Annotated[list[Count], BeforeValidator(_listed)]
Rate = Annotated[float, Field(gt=0, lt=10)]
Rates = Annotated[list[Rate], Field(min_length=1), BeforeValidator(_listed)]
Name = Annotated[str, Field(pattern=f"^{NAME}$", max_length=80)]
Seeds = Annotated[list[Annotated[int, Field(ge=0, lt=2**32)]], Field(min_length=1), BeforeValidator(_listed)]
Pair = Annotated[list[str], Field(min_length=2, max_length=2)]


def declared(model: type[Settings], name: str) -> Any:
    """A setting as another model declares it: its default, bounds and help."""
    return copy.copy(model.model_fields[name])


class DataConfig(RowSettings):
    """Rows that every arm is trained on."""

    data: str = setting(help="Registry name, file, hf: name or built in.")
    split: str = setting("train", help="Split of it.")
    seed: int = sampling.seed("Of the draw: the same rows in every arm.")
    validation: int = setting(0, ge=0, le=10**9, help=(
        "Further rows of the same split, never trained on, whose answer loss chooses among learning rates."))


class TrainingConfig(LoopSettings):
    """How every arm is trained, `tune`'s settings but for the learning rate, which is a grid."""

    learning_rates: Rates = setting([LEARNING_RATES["lora"]], help="The same grid for every LoRA arm.")
    full_learning_rates: Rates = setting([LEARNING_RATES["full"]], help=(
        "The grid of the full-rank arms, whose best rates are about a tenth of LoRA's."))
    rate_seeds: int = setting(0, ge=0, le=10**6, help=(
        "The first so many seeds are trained with every rate of a grid, and the others with the rate that these "
        "choose; 0: all seeds with every rate."))
    dropout: float = declared(TuneSettings, "dropout")
    init: Init = declared(StartSettings, "init")

    def settings(self, learning_rate: float, seed: int) -> TrainSettings:
        """The trainer's settings for one run."""
        shared = {name: value for name, value in self.given().items() if name in TrainSettings.model_fields}
        return TrainSettings(**shared, learning_rate=learning_rate, seed=seed)


class RandomArms(Settings):
    """Random block sets, drawn with seeds 0, 1, ..."""

    blocks: Count = setting(help="Blocks in each.")
    draws: int = setting(1, ge=1, le=1000, help="How many sets.")


Draws = Annotated[list[RandomArms], BeforeValidator(_listed)]


class ExplicitArm(PlanSettings):
    """One arm in full; what is unset is the sweep's."""

    name: Name = setting(help="Name of the arm.")
    mask: Mask | None = setting(None, help="Depth segments to train.")
    ranks: Ranks = declared(StartSettings, "ranks")
    learning_rate: Rate | None = setting(None, help="In place of the grid.")

    @model_validator(mode="after")
    def _somewhere(self) -> Self:
        if not self.ways:
            raise ValueError("say where to train: a mask (01100) or blocks (8:16)")
        return self


class ArmsConfig(Settings):
    """Which configurations are compared; equal arms are trained once."""

    baseline: Mask = setting("11111", help="All other arms are compared with this one; it is trained too.")
    masks: Masks = setting([], help="Masks.")
    singles: Counts = setting([], help="K (or several): each of K segments alone.")
    pairs: Counts = setting([], help="K: each two neighbouring segments.")
    triples: Counts = setting([], help="K: each three neighbouring segments.")
    random: Draws = setting([], help="LoRA on random block sets.")
    eva: Masks = setting([], help=(
        "LoRA of these masks with EVA's ranks: the same parameters, spread by what each matrix reads of the rows."))
    full: Masks = setting([], help="Full-rank updates of these masks.")
    full_random: Draws = setting([], help="Full-rank updates of random block sets.")
    full_equal: Masks = setting([], help=(
        "Full-rank updates of as many matrices of these masks as the LoRA arms' budget takes."))
    full_equal_random: Draws = setting([], help="The same of random block sets.")
    plans: list[str] = setting([], help="Plan files, such as `midblock importance` writes.")
    explicit: list[ExplicitArm] = setting([], help="Arms in full.")


class TaskConfig(ScoringSettings):
    """One task that every arm is scored on, with the options of `midblock evaluate`."""

    task: str = setting(help="Name of the task.")
    data: str | None = declared(EvaluateSettings, "data")
    name: Name | None = setting(None, help="Name in tables; needed where a task occurs twice.")

    @property
    def label(self) -> str:
        """Name in tables."""
        return self.name or self.task

    @property
    def scoring(self) -> ScoringSettings:
        """How it is scored."""
        return ScoringSettings(**{n: v for n, v in self.given().items() if n in ScoringSettings.model_fields})


class Margins(Settings):
    """Largest loss that still counts as "no worse", by metric."""

    accuracy: float = setting(0.02, gt=0, lt=1, help="Share of the items: 0.02 is two points.")
    loss: float = setting(0.02, gt=0, help="Nats per token.")
    perplexity: float = setting(0.01, gt=0, help="Of its logarithm: 0.01 is one percent.")

    def for_metric(self, metric: str) -> float:
        """The margin of a metric."""
        return float(getattr(self, metric))


class StatisticsConfig(Settings):
    """How arms are compared."""

    confidence: float = setting(0.95, gt=0.5, lt=1, help="Of the intervals.")
    alpha: float = setting(0.05, gt=0, lt=0.5, help="Holm-adjusted p values below it count as found.")
    power: float = setting(0.8, gt=0, lt=1, help="Chance with which a detectable difference is found.")
    replicates: int = setting(2000, ge=100, le=10**6, help="Of bootstraps and permutations.")
    comparisons: list[Pair] | None = setting(None, help="Pairs of arms, in place of the default ones.")
    margins: Margins = setting(Margins(), help="Largest loss that still counts as \"no worse\", by metric.")
    expected_accuracy: float = setting(0.3, gt=0, lt=1, help=(
        "Guess of the arms' accuracy, for the smallest detectable difference before the run."))
    expected_correlation: float = setting(0.5, gt=-1, lt=1, help=(
        "Guess of the correlation of two arms' scores over items, for the same; put in what a pilot shows."))
    expected_seed_correlation: float = setting(0.6, gt=-1, le=1, help="The same of two seeds of one arm.")
    expected_seed_sd: float = setting(0.03, ge=0, lt=10, help=(
        "Guess of how an arm's mean varies from seed to seed, in standard deviations of its items' scores."))

    @model_validator(mode="after")
    def _seeds_more_alike(self) -> Self:
        if self.expected_seed_correlation < self.expected_correlation:
            raise ValueError(f"{name_of('expected_seed_correlation')} {self.expected_seed_correlation:g} is below "
                             f"{name_of('expected_correlation')} {self.expected_correlation:g}; seeds of one arm are "
                             "no less alike than two arms")
        return self


class SweepConfig(PlaceSettings):
    """One sweep."""

    name: Name = setting("sweep", help="Name of the sweep.")
    model: str = setting(help="A MODEL spec.")
    train: DataConfig = setting(help="Rows.")
    training: TrainingConfig = setting(help="How every arm is trained.")
    arms: ArmsConfig = setting(help="What is compared.")
    budget: int | str | None = declared(PlanSettings, "budget")
    target_modules: list[str] = declared(PlanSettings, "target_modules")
    scale: Scale = declared(PlanSettings, "scale")
    alpha_over_rank: float = declared(PlanSettings, "alpha_over_rank")
    seeds: Seeds = setting([0], help="Of the adapters' start and the data order; the same in every arm.")
    evaluation: list[TaskConfig] = setting(min_length=1, help="Tasks that arms are compared on.")
    retention: list[TaskConfig] = setting([], help="Perplexity or loss tasks that show what is forgotten.")
    statistics: StatisticsConfig = setting(StatisticsConfig(), help="How arms are compared.")
    cache: str = setting("memory", metavar="none|memory|disk:DIR", help="Where the frozen prefix's output is kept.")
    cache_limit: int | str | None = declared(TuneSettings, "cache_limit")
    report_to: str | None = setting(None, metavar="NAME", help=(
        "A tracker of every run, as for transformers (tensorboard, trackio, wandb, ...)."))
    engine: Literal["local", "processes", "ray", "slurm"] = setting("local", help=(
        "local: one run after another in this process; processes: several workers on this machine; ray: workers on a "
        "Ray cluster; slurm: workers as Slurm's jobs."))
    workers: int = setting(0, ge=0, le=1024, help=(
        "Workers of the other engines; 0: one per GPU, or one for every two cores that memory holds (processes), as "
        "many as fit (ray), one (slurm)."))
    cores: int = setting(0, ge=0, le=4096, help=(
        "Cores of a worker of ray and slurm; 0: as many as this process uses, which makes results equal to local."))
    address: str | None = setting(None, metavar="HOST:PORT", help=(
        "Engine ray: address of a running cluster (or auto); unset: one is started on this machine."))
    slurm: dict[str, str | int | float | bool] = setting({}, help=(
        "Engine slurm: what sbatch is told, in submitit's names (slurm_partition, slurm_account, timeout_min, mem_gb); "
        "cluster: local runs the workers on this machine."))

    @property
    def searching(self) -> list[int]:
        """Seeds that choose among the rates of a grid."""
        return self.seeds[:self.training.rate_seeds or None]


ENGINE_FIELDS = ("engine", "workers", "cores", "address", "slurm")
"""What changes no result: a sweep may be resumed with others."""
