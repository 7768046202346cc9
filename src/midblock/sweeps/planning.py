"""Before anything is spent: what every arm trains, how long and how much memory it takes, and the
smallest difference that the chosen items and seeds can show.

Times are estimates. The work is counted in floating point operations of the blocks that must run
(2 per parameter and token forward; as many again for the gradient of activations, and of trained
full matrices), the frozen prefix once per group of arms that share it, the head on labelled tokens.
The rate is a matrix product timed on this machine, of which `EFFICIENCY` is reached in training and
`DECODING` of it in generation, one token at a time. Expect them to be right within a factor of two.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch

from midblock.evaluation import find_task
from midblock.models import Anatomy, find_anatomy
from midblock.stats import minimum_detectable_difference
from midblock.sweeps.arms import Arm, Job, expand_arms, jobs_of
from midblock.sweeps.config import SweepConfig
from midblock.sweeps.statistics import default_pairs, infos_of

if TYPE_CHECKING:
    from midblock.models import LoadedModel
    from midblock.sweeps.engine import SweepData

__all__ = ["SweepPlan", "model_outline", "plan_sweep"]

EFFICIENCY = 0.45
"""Share of a plain matrix product's rate that training and scoring reach (small matrices, norms, attention)."""
DECODING = 0.15
"""The same for generation, which reads all weights for one token of each row."""
ACTIVATIONS = 24
"""Numbers of width d kept for the backward pass per token and block."""


@dataclass(frozen=True)
class Outline:
    """What estimates need of a model; no weights."""

    anatomy: Anatomy
    tokenizer: Any
    dtype: torch.dtype
    device: torch.device
    params: int


def model_outline(config: SweepConfig, *, trust_remote_code: bool = False, allow_pickle: bool = False) -> Outline:
    """Anatomy and tokenizer of the sweep's model without reading its weights."""
    from midblock.models.load import load_tokenizer, resolve_device, resolve_dtype
    from midblock.models.summary import model_skeleton

    model, stored, folder = model_skeleton(config.model, trust_remote_code=trust_remote_code,
                                           allow_pickle=allow_pickle)
    device = resolve_device(config.device)
    return Outline(find_anatomy(model), load_tokenizer(folder, spec=config.model),
                   resolve_dtype(config.dtype, stored, device), device,
                   sum(p.numel() for p in model.parameters()))


def outline_of(loaded: LoadedModel) -> Outline:
    """The same of a model that is loaded already."""
    return Outline(loaded.anatomy, loaded.tokenizer, loaded.dtype, loaded.device,
                   sum(p.numel() for p in loaded.model.parameters()))


@dataclass
class SweepPlan:
    """What a sweep would do.

    Attributes:
        arms: The arms.
        jobs: Every run in order.
        frame: One row per arm and learning rate: blocks, rank, parameters, mismatch to the budget,
            steps, estimated seconds per run and peak bytes.
        detectable: One row per evaluation task: the smallest difference of two arms found with the
            configured power, paired and unpaired, for one comparison and after Holm's first step.
        seconds: Estimated time of all runs by key.
        comparisons: Number of comparisons between arms over all evaluation tasks.
    """

    arms: list[Arm]
    jobs: list[Job]
    frame: pd.DataFrame
    detectable: pd.DataFrame
    seconds: dict[str, float]
    comparisons: int

    @property
    def total_seconds(self) -> float:
        """Estimated time of the whole sweep."""
        return sum(self.seconds.values())

    def summary(self) -> str:
        """A few lines for people."""
        peak = self.frame["peak_bytes"].max() / 1e9 if len(self.frame) else 0.0
        return (f"{len(self.arms)} arms, {len(self.jobs)} runs, about {clock(self.total_seconds)} and {peak:.1f} GB "
                f"(estimates); {self.comparisons} comparisons between arms.")


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


def flops_per_second(dtype: torch.dtype, device: torch.device, width: int) -> float:
    """Rate of a matrix product (256, d) x (d, 4d) on this machine; a tenth of a second."""
    width = min(width, 4096)
    a = torch.randn(256, width, device=device).to(dtype)
    b = torch.randn(width, 4 * width, device=device).to(dtype)
    best = math.inf
    a @ b
    for _ in range(5):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
    return 2 * 256 * width * 4 * width / best


def plan_sweep(config: SweepConfig, outline: Outline, data: SweepData) -> SweepPlan:
    """Arms, costs and detectable differences.

    Raises:
        SettingsError: arms that do not fit the model (all are listed).
        DataError: the training rows cannot be tokenised.
    """
    from midblock.sweeps.engine import token_rows

    arms = expand_arms(config, outline.anatomy)
    jobs = jobs_of(arms, config.seeds)
    rows = token_rows(data.train, outline.tokenizer, config.train)
    tokens = rows.num_tokens
    labelled = sum(sum(b - a for a, b in r.supervised) or len(r) for r in rows)
    rate = flops_per_second(outline.dtype, outline.device, outline.anatomy.hidden_size)
    costs = _Costs(config, outline, tokens, labelled, len(rows), rate, _scoring_flops(config, outline, data))
    seconds: dict[str, float] = {}
    seen: set[int] = set()
    for job in jobs:
        if job.arm is None:
            seconds[job.key] = costs.scoring_seconds(0)
            continue
        first = job.arm.plan.first_block
        seconds[job.key] = costs.run_seconds(job.arm, prefix_known=first in seen and config.cache != "none")
        seen.add(first)
    table = []
    for arm in arms:
        for lr in arm.learning_rates:
            own = [seconds[j.key] for j in jobs if j.arm is arm and j.learning_rate == lr]
            plan = arm.plan
            table.append({
                "arm": arm.name, "method": plan.method, "map": plan.depth_map(), "rank": plan.rank,
                "scaling": plan.scaling, "learning_rate": lr, "params": plan.params, "mismatch": plan.mismatch,
                "steps": costs.steps, "seconds": sum(own) / len(own), "peak_bytes": costs.peak_bytes(arm)})
    return SweepPlan(arms, jobs, pd.DataFrame(table), *_power(config, arms, data, seconds))


def _power(config: SweepConfig, arms: Sequence[Arm], data: SweepData, seconds: dict[str, float]
           ) -> tuple[pd.DataFrame, dict[str, float], int]:
    pairs = config.statistics.comparisons or default_pairs(infos_of(arms))
    tests = max(1, len(pairs) * len(config.evaluation))
    wanted = config.statistics
    rows = []
    for task in config.evaluation:
        binary = find_task(task.task).metric == "accuracy"
        row: dict[str, Any] = {"task": task.label, "items": len(data.items[task.label]), "seeds": len(config.seeds),
                               "unit": "share" if binary else "sd of the items' scores"}
        for paired in (True, False):
            for m, name in ((1, "one test"), (tests, f"Holm over {tests}")):
                row[f"{'paired' if paired else 'unpaired'}, {name}"] = minimum_detectable_difference(
                    row["items"], len(config.seeds), wanted.expected_accuracy, paired=paired, binary=binary,
                    alpha=wanted.alpha, power=wanted.power, comparisons=m)
        rows.append(row)
    return pd.DataFrame(rows), seconds, tests


def _scoring_flops(config: SweepConfig, outline: Outline, data: SweepData) -> dict[str, tuple[float, float]]:
    """Per task: operations that all blocks and the head take when scoring (whole, per block)."""
    found = {}
    block = _block_params(outline.anatomy)
    head = outline.anatomy.hidden_size * outline.anatomy.vocab_size
    for label, task in data.tasks.items():
        spec = find_task(task.task)
        items = data.items[label]
        texts = [e.text for e in items.examples[:50]]
        mean = sum(len(outline.tokenizer(t)["input_ids"]) for t in texts) / max(1, len(texts))
        if spec.kind in ("perplexity", "answer_loss"):
            tokens = len(items) * min(mean, task.max_length or 1024)
            found[label] = (tokens * 2 * head, tokens * 2 * block)
        else:
            new = (task.max_new_tokens or spec.max_new_tokens or 0) * len(items) / DECODING * EFFICIENCY
            found[label] = (new * 2 * head, (new + len(items) * mean) * 2 * block)
    return found


def _block_params(anatomy: Anatomy) -> float:
    return sum(sum(p.numel() for p in b.parameters()) for b in anatomy.blocks) / anatomy.num_blocks


@dataclass
class _Costs:
    config: SweepConfig
    outline: Outline
    tokens: int
    labelled: int
    rows: int
    rate: float
    scoring: Mapping[str, tuple[float, float]]

    @property
    def steps(self) -> int:
        return self.config.training.settings(1e-4, 0).num_steps(self.rows)

    @property
    def epochs(self) -> float:
        training = self.config.training
        return self.steps * training.batch_size * training.accumulate / self.rows

    def run_seconds(self, arm: Arm, *, prefix_known: bool) -> float:
        anatomy = self.outline.anatomy
        block, first = _block_params(anatomy), arm.plan.first_block
        behind = anatomy.num_blocks - first
        passes = 0.0 if prefix_known else self.epochs if self.config.cache == "none" else min(1.0, self.epochs)
        prefix = 2 * self.tokens * block * first * passes
        suffix = 4 * self.tokens * block * behind * self.epochs
        weights = (2 if arm.plan.method == "full" else 6) * self.tokens * arm.plan.params * self.epochs
        head = 4 * self.labelled * anatomy.hidden_size * anatomy.vocab_size * self.epochs
        return (prefix + suffix + weights + head) / (self.rate * EFFICIENCY) + self.scoring_seconds(
            first if prefix_known else 0)

    def scoring_seconds(self, first: int) -> float:
        blocks = self.outline.anatomy.num_blocks
        total = 0.0
        for label, (head, block) in self.scoring.items():
            task = next(t for t in (*self.config.evaluation, *self.config.retention) if t.label == label)
            shared = first if find_task(task.task).kind in ("perplexity", "answer_loss") else 0
            total += head + block * (blocks - shared)
        return total / (self.rate * EFFICIENCY)

    def peak_bytes(self, arm: Arm) -> int:
        anatomy, training = self.outline.anatomy, self.config.training
        size = torch.finfo(self.outline.dtype).bits // 8
        longest = min(self.config.train.max_length, max(1, round(2 * self.tokens / self.rows)))
        tokens = training.batch_size * longest
        behind = 1 if training.gradient_checkpointing else anatomy.num_blocks - arm.plan.first_block
        activations = tokens * anatomy.hidden_size * ACTIVATIONS * size * behind
        optimizer = arm.plan.params * 4 * 4  # float32 weight, gradient and two moments
        kept = arm.plan.first_block and self.config.cache == "memory"
        cache = self.tokens * anatomy.hidden_size * size if kept else 0
        logits = (1 << 23) * 4 * 2
        return int(self.outline.params * size + optimizer + activations + cache + logits)

