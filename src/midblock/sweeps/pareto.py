"""Gain against what it costs: forgetting, parameters, training work. Arms that no other arm beats on both."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd

from midblock.sweeps.arms import BASE
from midblock.sweeps.scores import ArmInfo, FloatArray, TaskMatrix

__all__ = ["COSTS", "forgetting", "pareto", "unbeaten"]

COSTS = {"forgetting": "retention", "params": "parameters", "work": "training work"}
"""Columns of cost -> their names for people; a lower one is better."""


def pareto(matrices: Mapping[str, TaskMatrix], infos: Mapping[str, ArmInfo]) -> pd.DataFrame:
    """One row per evaluation task and arm: gain over the untuned model, costs, and the views in which it is unbeaten.

    Column ``front_COST`` is true where no other arm has at least the gain at no higher cost, and one of both better;
    ``front_all`` looks at all costs together.
    """
    lost = forgetting(matrices, list(infos))
    rows = []
    for matrix in matrices.values():
        if matrix.role != "evaluation":
            continue
        base = float(np.nanmean(matrix.scores[BASE])) if BASE in matrix.scores else 0.0
        rows += [{"task": matrix.task, "arm": arm, "gain": (float(np.nanmean(scores)) - base) * matrix.sign,
                  "forgetting": lost.get(arm, math.nan), "params": infos[arm].params, "work": infos[arm].work}
                 for arm, scores in matrix.trained.items()]
    frame = pd.DataFrame(rows)
    if frame.empty:
        return frame
    for task in frame["task"].unique():
        part = frame["task"] == task
        for cost in COSTS:
            frame.loc[part, f"front_{cost}"] = _front(frame.loc[part], [cost])
        frame.loc[part, "front_all"] = _front(frame.loc[part], [c for c in COSTS if frame.loc[part, c].notna().any()])
    return frame


def forgetting(matrices: Mapping[str, TaskMatrix], arms: Sequence[str]) -> dict[str, float]:
    """Mean rise of the log perplexity (or loss) over the retention tasks by arm, in nats."""
    kept = [m for m in matrices.values() if m.role == "retention" and BASE in m.scores]
    rises = {arm: [float(np.nanmean(m.scores[arm]) - np.nanmean(m.scores[BASE])) for m in kept if arm in m.trained]
             for arm in arms}
    return {arm: float(np.mean(values)) for arm, values in rises.items() if values}


def _front(rows: pd.DataFrame, costs: Sequence[str]) -> npt.NDArray[np.bool_]:
    signs = np.array([1.0] + [-1.0] * len(costs))
    return unbeaten(rows[["gain", *costs]].to_numpy(dtype=np.float64) * signs)


def unbeaten(values: FloatArray) -> npt.NDArray[np.bool_]:
    """Rows that no other row equals or beats throughout and beats somewhere; NaN rows are never on the front.

    Args:
        values: (rows, views), higher is better.
    """
    there = ~np.isnan(values).any(axis=1)
    at_least = np.all(values[None] >= values[:, None], axis=2)
    better = np.any(values[None] > values[:, None], axis=2)
    return np.asarray(there & ~np.any(at_least & better, axis=1), dtype=np.bool_)
