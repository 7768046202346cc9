"""A sweep's configuration: one YAML file is the experiment.

Every key is checked before anything is loaded, unknown keys are refused, and all faults are
reported at once with the path of each key.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from midblock.errors import MidblockError, SettingsError
from midblock.reading import parse_yaml, printable, read_yaml, shortened, user_path
from midblock.segments import validate_mask

if TYPE_CHECKING:
    from midblock.settings import TrainSettings

__all__ = ["ArmsConfig", "DataConfig", "ExplicitArm", "RandomArms", "StatisticsConfig", "SweepConfig",
           "TaskConfig", "TrainingConfig", "dump_config", "load_config", "parse_config"]


MAX_SEGMENTS = 1000


def _mask(value: Any) -> Any:
    """A mask, also where YAML read it as a number (11111, 100)."""
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value) if 0 <= value < 10**MAX_SEGMENTS else "a number"
    if isinstance(value, str):
        if len(value) > MAX_SEGMENTS:
            raise ValueError(f"a mask of {len(value):,} digits is longer than any model is deep")
        try:
            return validate_mask(value)
        except MidblockError as error:
            raise ValueError(str(error)) from None
    return value


Mask = Annotated[str, BeforeValidator(_mask)]
Positive = Annotated[int, Field(ge=1, le=10**12)]
Rate = Annotated[float, Field(gt=0, lt=10)]
NAME = r"[A-Za-z0-9][A-Za-z0-9_.@+-]{0,199}"
"""Pattern of an arm's name, which is part of file names."""
Name = Annotated[str, Field(pattern=f"^{NAME}$", max_length=80)]
Method = Literal["lora", "dora", "full"]
Scale = Literal["fixed-ratio", "rslora", "fixed-alpha"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class DataConfig(_Strict):
    """Rows: a data spec and how many of them."""

    data: str
    """Registry name, file, ``hf:`` name or built in."""
    samples: Positive | None = None
    """Rows drawn; unset takes all."""
    split: str = "train"
    max_length: Annotated[int, Field(ge=2)] = 512
    """Rows are cut to this many tokens (counted in the result)."""
    loss: Literal["answers", "all"] = "answers"
    """Tokens that the training loss counts: the answers' where rows have one, or all of them."""
    chat: bool = False
    """Train in the tokenizer's chat format."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of the draw: the same rows in every arm."""
    validation: Annotated[int, Field(ge=0)] = 0
    """Further rows of the same split, never trained on, whose answer loss chooses among learning rates."""


class TrainingConfig(_Strict):
    """What every arm shares."""

    epochs: Annotated[float, Field(gt=0)] | None = None
    steps: Positive | None = None
    """Optimizer steps, instead of epochs."""
    batch_size: Positive = 8
    accumulate: Positive = 1
    """Forwards in one optimizer step."""
    learning_rates: Annotated[list[Rate], Field(min_length=1)] = [5e-4]
    """The same grid for every LoRA arm."""
    full_learning_rates: Annotated[list[Rate], Field(min_length=1)] = [5e-5]
    """The grid of the full-rank arms, whose best rates are about a tenth of LoRA's."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Share of the steps over which the rate rises from 0."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Of the LoRA input."""
    gradient_checkpointing: bool = False
    order: Literal["length", "random"] = "length"
    """Rows of a batch: of like length, or drawn at random."""

    @model_validator(mode="after")
    def _one_length(self) -> TrainingConfig:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give exactly one of epochs and steps")
        return self

    def settings(self, learning_rate: float, seed: int) -> TrainSettings:
        """The trainer's settings for one run."""
        from midblock.settings import TrainSettings

        return TrainSettings(
            epochs=self.epochs if self.epochs is not None else 1.0, steps=self.steps, learning_rate=learning_rate,
            batch_size=self.batch_size, accumulate=self.accumulate, warmup=self.warmup, schedule=self.schedule,
            weight_decay=self.weight_decay, max_grad_norm=self.max_grad_norm,
            gradient_checkpointing=self.gradient_checkpointing, seed=seed, order=self.order)


class RandomArms(_Strict):
    """Random block sets, drawn with seeds 0, 1, ..."""

    blocks: Positive
    draws: Annotated[int, Field(ge=1, le=1000)] = 1


class ExplicitArm(_Strict):
    """One arm in full; what is unset is the sweep's."""

    name: Name
    mask: Mask | None = None
    blocks: str | None = None
    method: Method = "lora"
    rank: Positive | None = None
    budget: int | str | None = None
    learning_rate: Rate | None = None
    scale: Scale | None = None
    target_modules: list[str] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> ExplicitArm:
        faults = []
        if (self.mask is None) == (self.blocks is None):
            faults.append("give exactly one of mask and blocks")
        if self.rank is not None and self.budget is not None:
            faults.append("a budget solves the rank: give one of rank and budget")
        if self.method == "full" and (self.rank is not None or self.budget is not None):
            faults.append("a full-rank update has neither rank nor budget")
        if faults:
            raise ValueError("; ".join(faults))
        return self


class ArmsConfig(_Strict):
    """Which configurations are compared; equal arms are trained once."""

    baseline: Mask = "11111"
    """All other arms are compared with this one; it is trained too."""
    masks: list[Mask] = []
    singles: list[Positive] | Positive | None = None
    """K (or several): each of K segments alone."""
    pairs: list[Positive] | Positive | None = None
    """K: each two neighbouring segments."""
    triples: list[Positive] | Positive | None = None
    """K: each three neighbouring segments."""
    random: list[RandomArms] | RandomArms = []
    full: list[Mask] = []
    """Full-rank updates of these masks."""
    full_random: list[RandomArms] | RandomArms = []
    """Full-rank updates of random block sets."""
    full_equal: list[Mask] = []
    """Full-rank updates of as many matrices of these masks as the LoRA arms' budget takes."""
    full_equal_random: list[RandomArms] | RandomArms = []
    """The same of random block sets."""
    plans: list[str] = []
    """Plan files, such as ``midblock importance`` writes."""
    explicit: list[ExplicitArm] = []


class TaskConfig(_Strict):
    """One task that every arm is scored on, with options as for ``midblock evaluate``."""

    task: str
    data: str | None = None
    samples: Positive | None = None
    seed: Annotated[int, Field(ge=0)] = 0
    batch_size: Positive | None = None
    max_new_tokens: Positive | None = None
    max_length: Annotated[int, Field(ge=2)] | None = None
    shots: Annotated[int, Field(ge=0)] = 0
    chat: bool = False
    allow_code_execution: bool = False
    allow_unsandboxed_code: bool = False
    name: Name | None = None
    """Name in tables; needed where a task occurs twice."""

    @model_validator(mode="after")
    def _known(self) -> TaskConfig:
        from midblock.evaluation import check_options, find_task

        try:
            spec = find_task(self.task)
            check_options(self.task, batch_size=self.batch_size, max_new_tokens=self.max_new_tokens,
                          max_length=self.max_length, shots=self.shots,
                          allow_code_execution=self.allow_code_execution,
                          allow_unsandboxed_code=self.allow_unsandboxed_code)
        except MidblockError as error:
            raise ValueError(str(error)) from None
        if spec.data is None and self.data is None:
            raise ValueError(f"task {self.task} has no data of its own; name some with data:")
        return self

    @property
    def label(self) -> str:
        """Name in tables."""
        return self.name or self.task


class Margins(_Strict):
    """Largest loss that still counts as "no worse", by metric."""

    accuracy: Annotated[float, Field(gt=0, lt=1)] = 0.02
    """Share of the items: 0.02 is two points."""
    loss: Annotated[float, Field(gt=0)] = 0.02
    """Nats per token."""
    perplexity: Annotated[float, Field(gt=0)] = 0.01
    """Of its logarithm: 0.01 is one percent."""

    def of(self, metric: str) -> float:
        """The margin of a metric."""
        return float(getattr(self, metric))


class StatisticsConfig(_Strict):
    """How arms are compared."""

    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    alpha: Annotated[float, Field(gt=0, lt=0.5)] = 0.05
    """Holm-adjusted p values below it count as found."""
    power: Annotated[float, Field(gt=0, lt=1)] = 0.8
    replicates: Annotated[int, Field(ge=100)] = 2000
    comparisons: list[Annotated[list[str], Field(min_length=2, max_length=2)]] | None = None
    """Pairs of arms, in place of the default ones (see docs/sweeps.md)."""
    margins: Margins = Margins()
    expected_accuracy: Annotated[float, Field(gt=0, lt=1)] = 0.3
    """Guess of the arms' accuracy, for the smallest detectable difference before the run."""


class SweepConfig(_Strict):
    """One sweep."""

    name: Name = "sweep"
    model: str
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str = "auto"
    train: DataConfig
    training: TrainingConfig
    arms: ArmsConfig
    budget: int | str | None = None
    """Trainable parameters of every LoRA arm: a number, ``900k``, ``match:11111@16``; unset: rank 16 on all
    blocks."""
    target_modules: Annotated[list[str], Field(min_length=1)] = ["q", "k", "v", "o"]
    scale: Scale = "fixed-ratio"
    alpha_over_rank: Annotated[float, Field(gt=0)] = 2.0
    seeds: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] = [0]
    evaluation: Annotated[list[TaskConfig], Field(min_length=1)]
    retention: list[TaskConfig] = []
    statistics: StatisticsConfig = StatisticsConfig()
    cache: str = "memory"
    """Of the frozen prefix: ``none``, ``memory`` or ``disk:DIR``."""
    cache_limit: int | str | None = None


def _faults_across(config: SweepConfig) -> list[str]:
    """Faults that only show between keys."""
    faults = []
    for key, values in (("seeds", config.seeds),
                        ("training.learning_rates", config.training.learning_rates),
                        ("training.full_learning_rates", config.training.full_learning_rates)):
        if len(set(values)) < len(values):
            faults.append(f"{key}: {values} names one value twice")
    labels = [t.label for t in (*config.evaluation, *config.retention)]
    for label in sorted({x for x in labels if labels.count(x) > 1}):
        faults.append(f"evaluation, retention: two tasks are called {label!r}; give one of them a name:")
    from midblock.evaluation import find_task

    for i, task in enumerate(config.retention):
        if find_task(task.task).kind not in ("perplexity", "answer_loss"):
            faults.append(f"retention.{i}.task: {task.task} is no perplexity or loss task; retention is measured "
                          "as a change of the log perplexity (pydocs, wikitext, ifeval_prompts, mt_bench)")
    if max(len(config.training.learning_rates), len(config.training.full_learning_rates)) > 1 \
            and not config.train.validation:
        faults.append("train.validation: a grid of learning rates needs validation rows to choose by; choosing "
                      "by the evaluation items would favour the arms with luck")
    from midblock.tuning.cache import PrefixCache

    try:
        PrefixCache.from_spec(config.cache, limit_bytes=config.cache_limit)
    except MidblockError as error:
        faults.append(f"cache: {error}")
    for i, path in enumerate(config.arms.plans):
        if not Path(path).expanduser().is_file():
            faults.append(f"arms.plans.{i}: there is no file {path}")
    names = [a.name for a in config.arms.explicit]
    for name in sorted({n for n in names if names.count(n) > 1}):
        faults.append(f"arms.explicit: two arms are called {name!r}")
    if "base" in names:
        faults.append("arms.explicit: the name 'base' belongs to the untuned model")
    return faults


def _ignore(note: str) -> None:
    """Nobody listens."""


def parse_config(values: Mapping[str, Any], *, where: str = "the sweep's configuration",
                 note: Callable[[str], None] = _ignore) -> SweepConfig:
    """Validate a configuration.

    Args:
        values: As read from YAML.
        where: Name of the source in messages.
        note: Told of keys that mean nothing any more.

    Raises:
        SettingsError: with every fault, one a line, each with the path of its key.
    """
    values = dict(values)
    if values.get("engine") == "local":
        note(f"{where}: the key 'engine' is not needed any more; leave it out.")
        del values["engine"]
    try:
        config = SweepConfig.model_validate(values)
    except ValidationError as error:
        raise _refusal(where, _lines_of(error)) from None
    if faults := _faults_across(config):
        raise _refusal(where, faults)
    return config


def _refusal(where: str, faults: list[str]) -> SettingsError:
    count = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
    return SettingsError(f"{where} has {count}:\n" + "\n".join(f"  {f}" for f in faults))


def _lines_of(error: ValidationError) -> list[str]:
    lines: dict[str, None] = {}
    for fault in error.errors():
        # unions name the branch that was tried; a reader knows only the keys
        path = ".".join(str(p) for p in fault["loc"]
                        if not (isinstance(p, str) and re.search(r"[\[\(]|^(int|str|RandomArms|none)$", p)))
        if fault["type"] == "extra_forbidden":
            text = "unknown key"
        elif fault["type"] == "missing":
            text = "is missing"
        else:
            text = fault["msg"].removeprefix("Value error, ")
            shown = repr(fault["input"])
            if not isinstance(fault["input"], dict | list) and len(shown) <= 60 and shown not in text:
                text = f"{text} (found {shown})"
        lines[f"{shortened(path) or 'the file'}: {printable(text)}"] = None
    return list(lines)


def load_config(path: Path | str, overrides: Sequence[str] = (), *,
                note: Callable[[str], None] = _ignore) -> SweepConfig:
    """A configuration file with ``KEY=VALUE`` overrides (``training.epochs=1``, ``evaluation.0.samples=20``).

    Args:
        path: The YAML file.
        overrides: Keys to set.
        note: Told of keys that mean nothing any more.

    Raises:
        SettingsError: no such file, not YAML, or any fault in it (all are listed).
    """
    path = user_path(path, error=SettingsError)
    values = read_yaml(path, error=SettingsError)
    if not isinstance(values, dict):
        raise SettingsError(f"configuration {path} holds no keys; start from a file in recipes/.")
    faults = [fault for text in overrides if (fault := _override(values, text))]
    if faults:
        raise _refusal(f"--set for {path}", faults)
    return parse_config(values, where=str(path), note=note)


def _override(values: dict[str, Any], text: str) -> str | None:
    key, equals, raw = text.partition("=")
    if not equals or not key.strip():
        return f"{text!r} is not KEY=VALUE, such as training.epochs=1"
    try:
        value = parse_yaml(raw, where=key, error=SettingsError)
    except SettingsError as error:
        return str(error)
    place: Any = values
    *parents, last = key.strip().split(".")
    for i, part in enumerate([*parents, last]):
        at_end = i == len(parents)
        if isinstance(place, list):
            if not re.fullmatch(r"[0-9]{1,6}", part) or int(part) >= len(place):
                return f"{key}: {'.'.join(parents[:i])} has entries 0 to {len(place) - 1}, not {part!r}"
            if at_end:
                place[int(part)] = value
            else:
                place = place[int(part)]
        elif isinstance(place, dict):
            if at_end:
                place[part] = value
            else:
                if place.get(part) is None:
                    place[part] = {}
                place = place[part]
        else:
            return f"{key}: {'.'.join(parents[:i])} holds {place!r}, which has no keys"
    return None


def dump_config(config: SweepConfig) -> str:
    """The resolved configuration as YAML that `load_config` reads back."""
    class Dumper(yaml.SafeDumper):
        pass

    def text(dumper: yaml.SafeDumper, value: str) -> yaml.Node:
        style = "'" if re.fullmatch(r"[-+0-9.eE_]+", value) else None
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)

    Dumper.add_representer(str, text)
    return str(yaml.dump(config.model_dump(mode="json"), Dumper=Dumper, sort_keys=False, width=100))
