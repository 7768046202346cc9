"""Before anything is spent: what every arm trains, how long and how much memory it takes, and the
smallest difference that the chosen items and seeds can show.

Costs of training are those of `midblock.tuning.estimate`, which `midblock tune --dry-run` prints too; here the frozen
prefix counts once per group of arms that share it, and scoring is added. A generated token reads all weights for one
token of each row, so that generation reaches only `DECODING` of a product's rate.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import pandas as pd

from midblock.errors import SettingsError
from midblock.evaluation import find_task
from midblock.settings.sweep import SweepConfig
from midblock.stats import equivalence_margin, minimum_detectable_difference
from midblock.sweeps.arms import Arm, Job, expand_arms, jobs_of
from midblock.sweeps.comparisons import default_pairs
from midblock.sweeps.data import SweepData, token_rows
from midblock.sweeps.records import RunRecord
from midblock.sweeps.scores import choose_rates, infos_of
from midblock.tuning.estimate import EFFICIENCY, Cost, Outline, estimate, process_bytes, training_rate
from midblock.tuning.eva import eva_ranks, start_batches
from midblock.tuning.initial import require_start

if TYPE_CHECKING:
    from midblock.models import LoadedModel

__all__ = ["SweepPlan", "clock", "outline_of", "plan_sweep"]

DECODING = 0.15
"""The same for generation."""


def outline_of(loaded: LoadedModel) -> Outline:
    """The same of a model that is loaded already."""
    bits = {"4bit": 4, "8bit": 8}.get(loaded.quantized or "")
    return Outline(loaded.anatomy, loaded.tokenizer, loaded.dtype, loaded.device, bits)


@dataclass
class SweepPlan:
    """What a sweep would do.

    Attributes:
        arms: The arms.
        seeds: The seeds.
        searching: Those of them that are trained with every rate of a grid.
        rates: What they chose, for the arms of which that is known.
        frame: One row per arm and learning rate: blocks, rank, parameters, mismatch to the budget,
            steps, estimated seconds per run and peak bytes.
        detectable: One row per evaluation task: the smallest difference of two arms found with the
            configured power, paired and unpaired, for one comparison and after Holm's first step; and the
            smallest margin within which equally good arms are shown to be as good.
        seconds: Estimated time of every run that there may be, by key.
        work: Estimated operations of each arm's training alone, its prefix included.
        comparisons: Number of comparisons between arms over all evaluation tasks.
    """

    arms: list[Arm]
    seeds: list[int]
    searching: list[int]
    frame: pd.DataFrame
    detectable: pd.DataFrame
    seconds: dict[str, float]
    work: dict[str, float]
    comparisons: int
    rates: Mapping[str, float] = field(default_factory=dict)

    @functools.cached_property
    def jobs(self) -> list[Job]:
        """Every run in order; where the rate of an arm is not chosen yet, the first of its grid stands for it."""
        return jobs_of(self.arms, self.seeds, self.searching, self.rates)

    @property
    def total_seconds(self) -> float:
        """Estimated time of the whole sweep."""
        return sum(self.seconds[job.key] for job in self.jobs)

    def is_settled(self, job: Job) -> bool:
        """Whether a run is known to be wanted: its rate does not hang on runs to come."""
        return job.arm is None or len(job.arm.learning_rates) == 1 or job.seed in self.searching \
            or job.name in self.rates

    def decided(self, records: Mapping[str, RunRecord]) -> SweepPlan:
        """The plan with the rate of every arm whose search is over.

        Args:
            records: The runs so far, by key.
        """
        waiting = {job.name for job in self.jobs if job.seed in self.searching and job.key not in records}
        done = [arm.name for arm in self.arms if arm.name not in waiting]
        return replace(self, rates=choose_rates(records.values(), done, self.searching))

    def summary(self) -> str:
        """A few lines for people."""
        peak = self.frame["peak_bytes"].max() / 1e9 if len(self.frame) else 0.0
        lines = [f"{len(self.arms)} arms, {len(self.jobs)} runs, about {clock(self.total_seconds)} and {peak:.1f} GB "
                 f"(estimates); {self.comparisons} comparisons between arms."]
        lines += [f"Arm {a.name} does not reach all it names: {gaps}." for a in self.arms
                  if (gaps := a.plan.not_reached())]
        if open_ := [a.name for a in self.arms if a.rank == "by EVA"]:
            lines.append(f"EVA's ranks ({', '.join(open_)}) follow from weights and rows when the sweep begins, at the "
                         "same parameters.")
        return "\n".join(lines)


def clock(seconds: float) -> str:
    """Seconds as people read them.

    Example:
        >>> clock(42), clock(125), clock(7380)
        ('42 s', '2 min 5 s', '2 h 3 min')
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 90:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def plan_sweep(config: SweepConfig, outline: Outline, data: SweepData, loaded: LoadedModel | None = None) -> SweepPlan:
    """Arms, costs and detectable differences.

    Args:
        config: The sweep.
        outline: Of the base.
        data: Its rows.
        loaded: The base, from which EVA's ranks are solved; without it these arms have one rank.

    Raises:
        SettingsError: arms that do not fit the model (all are listed), or how they begin.
        BudgetError: too few training tokens for EVA's ranks.
        DataError: the training rows cannot be tokenised.
    """
    arms = expand_arms(config, outline.anatomy)
    if (config.load_4bit or config.load_8bit) and (full := [a.name for a in arms if a.plan.method == "full"]):
        raise SettingsError(f"full-rank arms ({', '.join(full)}) change the weights themselves, which load_4bit and "
                            "load_8bit quantise; leave one or the other out.")
    for arm in arms:
        if arm.plan.method != "full":
            require_start(config.training.init, arm.plan, outline.anatomy.causal_lm)
    rows = token_rows(data.train, outline.tokenizer, config.train)
    if loaded is not None and any(a.ranks == "eva" for a in arms):
        read = start_batches(rows, loaded, config.training.batch_size)
        arms = [replace(a, plan=eva_ranks(a.plan, loaded, read)) if a.ranks == "eva" else a for a in arms]
    jobs = jobs_of(arms, config.seeds)  # all that there may be
    steps, epochs = config.training.num_steps(len(rows)), config.training.num_epochs(len(rows))
    costs = {arm.name: estimate(arm.plan, outline.anatomy, rows.rows, config.training, dtype=outline.dtype,
                                cached=config.cache != "none", bits=outline.bits) for arm in arms}
    rate = training_rate(outline.anatomy, outline.device, outline.dtype)
    besides = process_bytes(outline.device)
    seconds = _seconds(config, jobs, costs, epochs, _scoring(outline, data), rate)
    table = []
    for arm in arms:
        for lr in arm.learning_rates:
            own = [seconds[j.key] for j in jobs if j.arm is arm and j.learning_rate == lr]
            plan = arm.plan
            table.append({
                "arm": arm.name, "method": arm.method, "map": plan.depth_map(), "rank": arm.rank,
                "scaling": plan.scaling, "learning_rate": lr, "params": plan.params, "mismatch": plan.mismatch,
                "steps": steps, "seconds": sum(own) / len(own), "peak_bytes": costs[arm.name].memory_bytes + besides,
                "not_reached": plan.not_reached()})
    pairs = config.statistics.comparisons or default_pairs(infos_of(arms, {}))
    tests = max(1, len(pairs) * len(config.evaluation))
    return SweepPlan(arms, config.seeds, config.searching, pd.DataFrame(table),
                     _detectable(config, data, tests, len(arms)), seconds,
                     {name: cost.total_flops(epochs) for name, cost in costs.items()}, tests)


def _seconds(config: SweepConfig, jobs: Sequence[Job], costs: dict[str, Cost], epochs: float,
             scoring: Sequence[tuple[float, float, bool, int]], rate: float) -> dict[str, float]:
    """Estimated time of every run; a prefix that an earlier run cached costs nothing."""
    found: dict[str, float] = {}
    cached: set[int] = set()
    for job in jobs:
        first = 0 if job.arm is None else job.arm.plan.first_block
        known = first in cached and config.cache != "none"
        training = 0.0
        if job.arm is not None:
            cost = costs[job.name]
            training = cost.epoch_flops * epochs if known else cost.total_flops(epochs)
            cached.add(first)
        found[job.key] = (training + sum(head + block * (blocks - (first if known and resumes else 0))
                                         for head, block, resumes, blocks in scoring)) / rate
    return found


def _scoring(outline: Outline, data: SweepData) -> list[tuple[float, float, bool, int]]:
    """Per task: operations of the head, of one block, whether scoring resumes behind a shared prefix, and blocks."""
    anatomy = outline.anatomy
    block = sum(p.numel() for b in anatomy.blocks for p in b.parameters()) / anatomy.num_blocks
    head = anatomy.hidden_size * anatomy.vocab_size
    found = []
    for label, task in data.tasks.items():
        spec, items = find_task(task.task), data.items[label]
        texts = [e.text for e in items.examples[:50]]
        mean = sum(len(outline.tokenizer(t)["input_ids"]) for t in texts) / max(1, len(texts))
        scored = spec.kind in ("perplexity", "answer_loss")
        read = len(items) * (min(mean, task.max_length or 1024) if scored else mean)
        new = 0.0 if scored else (task.max_new_tokens or spec.max_new_tokens or 0) * len(items) * EFFICIENCY / DECODING
        found.append((2 * head * (read if scored else new), 2 * block * (read + new), scored, anatomy.num_blocks))
    return found


def _detectable(config: SweepConfig, data: SweepData, tests: int, arms: int) -> pd.DataFrame:
    wanted = config.statistics
    rows = []
    for task in config.evaluation:
        binary = find_task(task.task).metric == "accuracy"
        row: dict[str, Any] = {"task": task.label, "items": len(data.items[task.label]), "seeds": len(config.seeds),
                               "unit": "share" if binary else "sd of the items' scores"}
        p = wanted.expected_accuracy
        guess: dict[str, Any] = {
            "base_rate": p, "binary": binary, "correlation": wanted.expected_correlation, "arms": arms,
            "seed_correlation": wanted.expected_seed_correlation, "alpha": wanted.alpha, "power": wanted.power,
            "seed_sd": wanted.expected_seed_sd * (math.sqrt(p * (1 - p)) if binary else 1.0)}
        for paired in (True, False):
            for m, name in ((1, "one test"), (tests, f"Holm over {tests}")):
                row[f"{'paired' if paired else 'unpaired'}, {name}"] = minimum_detectable_difference(
                    row["items"], row["seeds"], paired=paired, comparisons=m, **guess)
        row["as good within"] = equivalence_margin(row["items"], row["seeds"], comparisons=tests, **guess)
        rows.append(row)
    return pd.DataFrame(rows)
