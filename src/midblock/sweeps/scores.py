"""Scores of a sweep's runs as arrays: arm by seed by item, the chosen learning rates, intervals of arms."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from midblock.errors import DataError
from midblock.results import Estimate
from midblock.segments import depth, zone
from midblock.stats import arm_intervals, share_of_gain, wilson_interval
from midblock.sweeps.arms import BASE, Arm
from midblock.sweeps.records import RunRecord

__all__ = ["SHARES", "ArmInfo", "TaskMatrix", "arm_estimates", "choose_rates", "infos_of", "score_rows",
           "task_matrices"]

FloatArray = npt.NDArray[np.float64]
SHARES = ("share", "share_low", "share_high")
"""Share of the baseline's gain that an arm reaches, with its interval."""
Role = Literal["evaluation", "retention"]
Region = Literal["early", "middle", "late"]


@dataclass(frozen=True)
class ArmInfo:
    """What the statistics need to know of an arm."""

    name: str
    method: str
    mask: str | None
    blocks: tuple[int, ...]
    num_blocks: int
    params: int
    is_baseline: bool = False
    is_random: bool = False
    work: float = math.nan
    """Operations of its training, estimated (`midblock.tuning.estimate`)."""

    @property
    def depth(self) -> float:
        """Mean relative depth of the trained blocks, 0..1."""
        return sum(depth(b, self.num_blocks) for b in self.blocks) / len(self.blocks)

    @property
    def region(self) -> Region | None:
        """Part of the depth that the arm tunes, where it is one part alone.

        The zone of its mean depth; a middle arm leaves out the first and the last block, so that all layers and
        both ends together are of no region. Random blocks are of none.
        """
        if self.is_random:
            return None
        centre = zone(self.depth)
        at_an_end = self.blocks[0] == 0 or self.blocks[-1] == self.num_blocks - 1
        return None if centre == "middle" and at_an_end else centre

    @property
    def segment(self) -> tuple[str, int, int] | None:
        """(method, K, index) of one segment of K >= 2 alone."""
        if self.mask is None or len(self.mask) < 2 or self.mask.count("1") != 1:
            return None
        return self.method, len(self.mask), self.mask.index("1")


def infos_of(arms: Sequence[Arm], work: Mapping[str, float]) -> dict[str, ArmInfo]:
    """The arms as the statistics see them, by name."""
    return {a.name: ArmInfo(a.name, a.method, a.plan.mask, a.plan.blocks, a.plan.num_blocks, a.plan.params,
                            a.is_baseline, a.is_random, work.get(a.name, math.nan)) for a in arms}


@dataclass
class TaskMatrix:
    """Scores of one task: arm -> (seeds, items); a seed that failed is a row of NaN.

    Perplexities are held as log perplexity: each item's mean loss weighted by its share of the
    tokens, so that the mean over items is the mean over tokens.
    """

    task: str
    role: Role
    metric: str
    higher_is_better: bool
    items: tuple[str, ...]
    scores: dict[str, FloatArray]

    @property
    def binary(self) -> bool:
        """Right or wrong."""
        return self.metric == "accuracy"

    @property
    def sign(self) -> float:
        """1 where a larger score is better, else -1."""
        return 1.0 if self.higher_is_better else -1.0

    @property
    def trained(self) -> dict[str, FloatArray]:
        """Without the untuned model, and without arms of which every seed failed."""
        return {a: s for a, s in self.scores.items() if a != BASE and not np.isnan(s).all()}

    def seeds(self, arm: str) -> int:
        """Seeds of an arm with scores."""
        return int((~np.isnan(self.scores[arm]).any(axis=1)).sum())


def choose_rates(records: Iterable[RunRecord], arms: Iterable[str], searching: Collection[int]) -> dict[str, float]:
    """The learning rate of each arm: the lowest mean validation loss over seeds; the only one without a grid.

    A rate of which a seed failed is chosen only if the others failed as often.

    Args:
        records: The runs.
        arms: Names of the arms.
        searching: Seeds that were trained with every rate.
    """
    by_arm: dict[str, dict[float, list[RunRecord]]] = {arm: {} for arm in arms}
    for record in records:
        if record.arm in by_arm and record.learning_rate is not None and record.seed in searching:
            by_arm[record.arm].setdefault(record.learning_rate, []).append(record)
    return {arm: min(by_rate, key=lambda rate, runs=by_rate: _cost(runs[rate]))  # type: ignore[misc]
            for arm, by_rate in by_arm.items() if by_rate}


def _cost(runs: Sequence[RunRecord]) -> tuple[int, float]:
    """Failed runs and mean validation loss of one learning rate."""
    failed = sum(r.status == "failed" for r in runs)
    losses = [r.validation_loss for r in runs if r.status == "done" and r.validation_loss is not None]
    return failed, float(np.mean(losses)) if losses else math.inf


def task_matrices(records: Sequence[RunRecord], arms: Sequence[str], seeds: Sequence[int], *,
                  evaluation: Sequence[str], retention: Sequence[str],
                  rates: Mapping[str, float]) -> dict[str, TaskMatrix]:
    """Scores of every task by arm, seed and item.

    Raises:
        DataError: two runs were scored on different items.
    """
    by_key = {(r.arm, r.seed, r.learning_rate): r for r in records if r.status == "done"}
    found: dict[str, TaskMatrix] = {}
    for task in (*evaluation, *retention):
        done = [r.tasks[task] for r in by_key.values() if task in r.tasks]
        if not done:
            continue
        first = done[0]
        if any(t.items != first.items for t in done):
            raise DataError(f"{task}: the runs were scored on different items; they cannot be compared. Start the "
                            "sweep again in a new folder.")
        scores = {}
        if (BASE, None, None) in by_key:
            scores[BASE] = np.repeat(_row(by_key[BASE, None, None], task, len(first.items))[None, :], len(seeds),
                                     axis=0)
        for arm in arms:
            scores[arm] = np.stack([_row(by_key.get((arm, s, rates.get(arm))), task, len(first.items))
                                    for s in seeds])
        found[task] = TaskMatrix(task, "evaluation" if task in evaluation else "retention", first.metric,
                                 first.higher_is_better, tuple(first.items), scores)
    return found


def _row(record: RunRecord | None, task: str, size: int) -> FloatArray:
    """Scores of one run, (items,); NaN where it has none."""
    if record is None or task not in record.tasks:
        return np.full(size, np.nan)
    scored = record.tasks[task]
    values = np.asarray(scored.scores, dtype=np.float64)
    if scored.metric != "perplexity":
        return values
    tokens = np.asarray(scored.tokens, dtype=np.float64)
    return np.asarray(values * tokens / tokens.mean(), dtype=np.float64)


def arm_estimates(matrix: TaskMatrix, confidence: float) -> dict[str, Estimate]:
    """Mean of every arm over seeds and items (`stats.arm_intervals`); the untuned model has items alone.

    Where all scores are equal (nothing right, say) nothing varies, and an interval would claim certainty:
    right/wrong scores then get Wilson's interval over items.
    """
    limits = (0.0, 1.0) if matrix.binary else None
    found = arm_intervals({arm: s for arm, s in matrix.scores.items() if arm != BASE}, confidence, limits=limits)
    if BASE in matrix.scores:  # no seeds: its rows are copies
        found |= arm_intervals({BASE: matrix.scores[BASE][:1]}, confidence, limits=limits)
    for arm, scores in matrix.scores.items():
        there = scores[~np.isnan(scores).any(axis=1)]
        if matrix.binary and there.size and bool((there == there[0, 0]).all()):
            found[arm] = wilson_interval(int(there[0].sum()), there.shape[1], confidence)
    return found


def score_rows(matrix: TaskMatrix, confidence: float, full: str | None = None) -> list[dict[str, Any]]:
    """One row per arm: its score with interval, perplexities in their own unit.

    Rows of an evaluation also say which share of the gain of the arm ``full`` over the untuned model it reaches
    (``share``, ``share_low``, ``share_high``: `stats.share_of_gain` over the seeds that both have).
    """
    rows = []
    estimates = arm_estimates(matrix, confidence)
    shares = matrix.role == "evaluation" and {full, BASE} <= set(matrix.scores)
    for arm in matrix.scores:
        e = estimates[arm]
        values = [math.exp(v) if matrix.metric == "perplexity" else v for v in (e.value, e.low, e.high)]
        rows.append({"role": matrix.role, "task": matrix.task, "metric": matrix.metric, "arm": arm,
                     "value": values[0], "low": values[1], "high": values[2], "n": len(matrix.items),
                     "n_seeds": 0 if arm == BASE else matrix.seeds(arm)})
        if shares and arm not in (full, BASE):
            kept = ~np.isnan(matrix.scores[arm]).any(axis=1) & ~np.isnan(matrix.scores[str(full)]).any(axis=1)
            share = (share_of_gain(matrix.scores[arm][kept], matrix.scores[str(full)][kept], matrix.scores[BASE][0],
                                   confidence=confidence) if kept.any() else Estimate(math.nan))
            rows[-1] |= dict(zip(SHARES, (share.value, share.low, share.high), strict=True))
    return rows
