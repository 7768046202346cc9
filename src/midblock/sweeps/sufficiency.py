"""Whether a sweep is large enough to judge: seeds, items, room on both sides of the score, training that has settled.

A test at 5% keeps its promise only where its assumptions hold. One seed says nothing about other seeds, a handful of
items nothing about other items, scores at the floor or the ceiling nothing about the arms, and a training that stopped
while its loss still fell steeply compares how fast arms learn, not how good they get. A sweep that lacks one of these
says so, and concludes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from midblock.sweeps.arms import BASE
from midblock.sweeps.records import RunRecord
from midblock.sweeps.scores import FloatArray, TaskMatrix

__all__ = ["MIN_EVENTS", "MIN_ITEMS", "MIN_SEEDS", "MIN_STEPS", "STEEP", "missing_of", "still_falling"]

MIN_SEEDS = 2
"""With one seed nothing separates an arm from its luck; three and more show the variance between seeds well."""
MIN_ITEMS = 30
"""Below it the intervals of shares and the normal approximations do not hold."""
MIN_STEPS = 10
"""Optimizer steps; fewer are a check that everything runs."""
MIN_EVENTS = 5
"""Right (and wrong) answers that some arm must have per seed for the task to have room on that side."""
STEEP = 0.1
"""Share of the whole fall of the training loss that may lie in the last quarter of the steps."""


def missing_of(matrices: Mapping[str, TaskMatrix], records: Sequence[RunRecord],
               rates: Mapping[str, float]) -> dict[tuple[str, str], str]:
    """(task, arm) -> what is missing before the arm's scores can be judged; only what is missing is listed.

    What holds for a whole task (items, room) is listed for each of its arms, the untuned model too.
    """
    training = {arm: reason for arm, rate in rates.items()
                if (reason := _training(records, arm, rate))}
    found = {}
    for task, matrix in matrices.items():
        general = _items(matrix)
        for arm in matrix.scores:
            own = [] if arm == BASE else [*_seeds(matrix, arm), *([training[arm]] if arm in training else [])]
            if reasons := [*own, *general]:
                found[task, arm] = "; ".join(reasons)
    return found


def _seeds(matrix: TaskMatrix, arm: str) -> list[str]:
    seeds = matrix.seeds(arm)
    return [f"seeds (has {seeds}, needs {MIN_SEEDS} or better 3)"] if seeds < MIN_SEEDS else []


def _items(matrix: TaskMatrix) -> list[str]:
    items = len(matrix.items)
    if items < MIN_ITEMS:
        return [f"items of {matrix.task} (has {items}, needs {MIN_ITEMS})"]
    if not matrix.binary or not matrix.trained:
        return []
    scores = [s[~np.isnan(s).any(axis=1)] for s in matrix.trained.values()]
    if max(float(s.sum()) / len(s) for s in scores) < MIN_EVENTS:
        return [f"an easier task than {matrix.task} (no arm answers {MIN_EVENTS} of {items} items)"]
    if max(float((1 - s).sum()) / len(s) for s in scores) < MIN_EVENTS:
        return [f"a harder task than {matrix.task} (every arm answers all but {MIN_EVENTS - 1} of {items} items)"]
    return []


def _training(records: Sequence[RunRecord], arm: str, rate: float) -> str:
    curves = [np.asarray(r.training["losses"], dtype=np.float64) for r in records
              if r.arm == arm and r.status == "done" and r.learning_rate == rate and r.training.get("losses")]
    if not curves:
        return ""
    steps = min(len(c) for c in curves)
    if steps < MIN_STEPS:
        return f"training steps (has {steps}, needs {MIN_STEPS})"
    if still_falling(np.mean([c[:steps] for c in curves], axis=0)):
        return f"training (the loss of {arm} still falls steeply when it ends)"
    return ""


def still_falling(losses: FloatArray) -> bool:
    """Whether a training loss still falls steeply at its end.

    The fall from the third to the last quarter of the steps is more than `STEEP` of the whole fall (first to last
    quarter) and more than twice its own standard error.

    Args:
        losses: (steps,) one loss per step, averaged over seeds.

    Example:
        >>> steps = np.linspace(0, 1, 100)
        >>> still_falling(2 - steps), still_falling(np.exp(-8 * steps))
        (True, False)
    """
    quarters = np.array_split(np.asarray(losses, dtype=np.float64), 4)
    if min(q.size for q in quarters) < 2:
        return True
    first, _, third, last = (float(q.mean()) for q in quarters)
    error = math.sqrt(sum(_residual_variance(q) / q.size for q in quarters[2:]))
    fall = third - last
    return fall > STEEP * (first - last) and fall > 2 * error and first > last


def _residual_variance(values: FloatArray) -> float:
    """Variance about a straight line, so that the fall within a quarter does not count as noise."""
    steps = np.arange(values.size, dtype=np.float64)
    if values.size < 4:
        return float(np.diff(values).var(ddof=0) / 2)
    fitted = np.polyval(np.polyfit(steps, values, 1), steps)
    return float(((values - fitted) ** 2).sum() / (values.size - 2))
