"""What a sweep's scores show: everything computed from its records, in one direction.

records -> chosen learning rates -> scores as arrays -> what is missing -> comparisons with their conclusions, ranks,
inverted U, Pareto view. Pure functions of frames and arrays; the methods are those of `midblock.stats`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from midblock.errors import SettingsError, UndefinedMetricError
from midblock.settings.sweep import SweepConfig
from midblock.stats import hierarchical_arms_bootstrap, holm, inverted_u_test, rank_arms
from midblock.sweeps.comparisons import all_comparisons, baseline_of
from midblock.sweeps.pareto import pareto
from midblock.sweeps.records import RunRecord
from midblock.sweeps.scores import SHARES, ArmInfo, FloatArray, TaskMatrix, choose_rates, score_rows, task_matrices
from midblock.sweeps.sufficiency import missing_of

__all__ = ["SweepStatistics", "analyse"]

_SCORES = ("role", "task", "metric", "arm", "value", "low", "high", "n", "n_seeds", *SHARES)


@dataclass
class SweepStatistics:
    """Results of `analyse`.

    Attributes:
        scores: One row per task and arm: ``role``, ``task``, ``metric``, ``arm``, ``value``, ``low``, ``high``,
            ``n`` (items), ``n_seeds``, and the share of the baseline's gain that the arm reaches (``share``,
            ``share_low``, ``share_high``). Perplexities in their own unit.
        comparisons: Rows of `midblock.sweeps.comparisons.COLUMNS`: differences (perplexities as differences of
            log perplexity), ``better`` (+1: ``a`` is better, -1: worse, 0: equal), ``p_holm`` over the
            family, and the ``conclusion``.
        ranking: Rows of `midblock.stats.rank_arms` with ``task``.
        inverted_u: One row per task, method and K; ``p_holm`` over all of them.
        pareto: Rows of `midblock.sweeps.pareto.pareto`.
        matrices: Scores by task.
        rates: Chosen learning rate per arm.
        missing: (task, arm) -> what is missing before its scores can be judged.
        undefined: What could not be computed, and why.
    """

    scores: pd.DataFrame
    comparisons: pd.DataFrame
    ranking: pd.DataFrame
    inverted_u: pd.DataFrame
    pareto: pd.DataFrame
    matrices: dict[str, TaskMatrix]
    rates: dict[str, float]
    missing: dict[tuple[str, str], str] = field(default_factory=dict)
    undefined: list[str] = field(default_factory=list)

    def family(self, name: str, task: str | None = None) -> pd.DataFrame:
        """The comparisons of one family, of all tasks or one."""
        rows = self.comparisons[self.comparisons["family"] == name]
        return rows if task is None else rows[rows["task"] == task]


def analyse(records: Sequence[RunRecord], infos: Mapping[str, ArmInfo], config: SweepConfig) -> SweepStatistics:
    """All statistics of a sweep from its records.

    Arms of which every seed failed are left out; the outcome names them.
    """
    wanted = config.statistics
    rates = choose_rates(records, infos, config.searching)
    matrices = task_matrices(records, list(infos), config.seeds, evaluation=[t.label for t in config.evaluation],
                             retention=[t.label for t in config.retention], rates=rates)
    missing = missing_of(matrices, records, rates)
    undefined: list[str] = []
    ranks, shapes = [], []
    for matrix in matrices.values():
        if matrix.role == "evaluation" and (draws := _paired_draws(matrix, wanted.replicates, undefined)):
            ranks.append(rank_arms(draws, confidence=wanted.confidence,
                                   larger_is_better=matrix.higher_is_better).assign(task=matrix.task))
            shapes += _inverted_u(matrix, infos, draws, wanted.confidence, undefined)
    curves = pd.DataFrame(shapes, columns=None if shapes else ["task", "p"])
    curves["p_holm"] = holm(curves["p"].to_numpy(dtype=np.float64))
    rows = [r for m in matrices.values() for r in score_rows(m, wanted.confidence, baseline_of(infos))]
    return SweepStatistics(
        scores=pd.DataFrame(rows, columns=list(_SCORES)),
        comparisons=all_comparisons(matrices, infos, wanted, missing, undefined),
        ranking=pd.concat(ranks, ignore_index=True) if ranks else pd.DataFrame(columns=["arm", "best", "task"]),
        inverted_u=curves, pareto=pareto(matrices, infos),
        matrices=matrices, rates=rates, missing=missing, undefined=undefined)


def _paired_draws(matrix: TaskMatrix, replicates: int, undefined: list[str]) -> dict[str, FloatArray]:
    arms = matrix.trained
    if not arms:
        return {}
    try:
        return hierarchical_arms_bootstrap(arms, replicates)
    except SettingsError as error:
        undefined.append(f"{matrix.task}: ranking and inverted U: {error}")
        return {}


def _inverted_u(matrix: TaskMatrix, infos: Mapping[str, ArmInfo], draws: Mapping[str, FloatArray],
                confidence: float, undefined: list[str]) -> list[dict[str, Any]]:
    groups: dict[tuple[str, int], list[ArmInfo]] = {}
    for name in draws:
        if (segment := infos[name].segment) is not None:
            groups.setdefault(segment[:2], []).append(infos[name])
    rows = []
    for (method, k), members in groups.items():
        if k < 3 or len(members) < k:
            continue
        ordered = sorted(members, key=lambda a: a.depth)
        values = np.array([matrix.sign * np.nanmean(matrix.scores[a.name]) for a in ordered])
        scores = matrix.sign * np.stack([matrix.scores[a.name] for a in ordered], axis=2)
        everywhere = scores[~np.isnan(scores).any(axis=(1, 2))]  # a seed that failed for one arm is left out
        try:
            found = inverted_u_test([a.depth for a in ordered], everywhere, confidence=confidence)
        except (UndefinedMetricError, SettingsError) as error:
            undefined.append(f"{matrix.task}: inverted U over {k} segments ({method}): {error}")
            continue
        rows.append({"task": matrix.task, "method": method, "segments": k, "p": found.p,
                     "peak": found.peak.value, "peak_low": found.peak.low, "peak_high": found.peak.high,
                     "slope_left": found.left.value, "slope_right": found.right.value,
                     "break_at": found.break_at, "best": ordered[int(np.argmax(values))].name})
    return rows
