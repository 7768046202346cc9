"""Paired comparisons between the arms of a sweep, and what each of them allows to be said.

Every comparison belongs to one **family**, and every family is corrected by Holm over all of its rows and tasks:

=============  ==========================================  =====================================================
family         pairs                                       the claims that rest on it
=============  ==========================================  =====================================================
``evaluation`` arm against arm, all evaluation tasks       one arm beats another; the middle beats all layers
``gain``       arm against the untuned model, all          an arm learned the task at all
               evaluation tasks
``retention``  arm against the untuned model and against   an arm forgets; an arm forgets less than all layers
               the baseline, all retention tasks
=============  ==========================================  =====================================================

"As good as" and "no worse than" rest on the same families: an arm is no worse than another within a margin where the
one-sided interval of their difference, at level alpha / m for the m comparisons of the family (Bonferroni, so that all
of them hold together and the arm may be chosen after looking), lies above minus the margin; as good where the other
bound lies below it as well. Both bounds together are the two one-sided tests (TOST) of Schuirmann (1987).
A sentence never mixes families.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import pandas as pd
from scipy import stats as scipy_stats

from midblock.settings.sweep import StatisticsConfig
from midblock.stats import compare_arms, holm
from midblock.sweeps.arms import BASE
from midblock.sweeps.scores import ArmInfo, FloatArray, TaskMatrix

__all__ = ["COLUMNS", "Conclusion", "all_comparisons", "conclude", "default_pairs", "detectable_after"]

Conclusion = Literal["better", "worse", "as good", "no worse", "open", "too small"]
"""What may be said of arm ``a`` against arm ``b``: a difference was found, it is at most the margin either way, it is
at most the margin to the worse side, nothing of these, or the run is too small to say anything."""

COLUMNS = ("family", "task", "metric", "a", "b", "conclusion", "difference", "low", "high", "p", "p_holm", "better",
           "margin", "worst", "best", "effect_size", "effect", "test", "n_items", "n_seeds", "missing")


def default_pairs(infos: Mapping[str, ArmInfo]) -> list[tuple[str, str]]:
    """The comparisons made unless the configuration names others.

    Every arm against the baseline; for each method and K with single segments, the middle one (two
    for an even K) against the first and the last; and the middle one against every random block set
    of the same method.
    """
    baseline = baseline_of(infos)
    pairs = [(name, baseline) for name in infos if baseline is not None and name != baseline]
    groups: dict[tuple[str, int], dict[int, str]] = {}
    for name, info in infos.items():
        if info.segment is not None:
            method, k, index = info.segment
            groups.setdefault((method, k), {})[index] = name
    for (method, k), by_index in groups.items():
        if k < 3:
            continue
        middles = [by_index[i] for i in dict.fromkeys(((k - 1) // 2, k // 2)) if i in by_index]
        ends = [by_index[i] for i in (0, k - 1) if i in by_index]
        rivals = [n for n, a in infos.items() if a.is_random and a.method == method]
        pairs += [(m, other) for m in middles for other in (*ends, *rivals)]
    return list(dict.fromkeys(pairs))


def baseline_of(infos: Mapping[str, ArmInfo]) -> str | None:
    """Name of the baseline; None where it is not among the arms."""
    return next((n for n, a in infos.items() if a.is_baseline), None)


def all_comparisons(matrices: Mapping[str, TaskMatrix], infos: Mapping[str, ArmInfo], wanted: StatisticsConfig,
                    missing: Mapping[tuple[str, str], str], undefined: list[str]) -> pd.DataFrame:
    """Every comparison of a sweep with its conclusion, columns `COLUMNS`.

    ``difference`` with ``low`` and ``high`` is of one comparison, not corrected. ``worst`` is the most by which ``a``
    can be worse than ``b``, ``best`` the most by which it can be better, both at once for all of the family.

    Args:
        matrices: Scores by task.
        infos: The arms by name.
        wanted: The configuration's statistics.
        missing: (task, arm) -> what its results are too small or too early for; the arm's comparisons
            then conclude nothing.
        undefined: Pairs without a seed in common are told here.
    """
    pairs = [(a, b) for a, b in wanted.comparisons] if wanted.comparisons is not None else default_pairs(infos)
    usable: dict[str, list[tuple[TaskMatrix, list[tuple[str, str]]]]] = {}
    for matrix in matrices.values():
        for family, chosen in _families(matrix, infos, pairs).items():
            usable.setdefault(family, []).append((matrix, _usable(matrix, chosen, undefined)))
    frames = []
    for family, members in usable.items():
        tests = sum(len(chosen) for _, chosen in members)
        frames += [_compare(matrix, chosen, wanted, tests).assign(family=family, task=matrix.task,
                                                                  metric=matrix.metric)
                   for matrix, chosen in members if chosen]
    if not frames:
        return pd.DataFrame(columns=list(COLUMNS))
    joined = pd.concat(frames, ignore_index=True)
    for family in joined["family"].unique():
        rows = joined["family"] == family
        joined.loc[rows, "p_holm"] = holm(joined.loc[rows, "p"].to_numpy(dtype=np.float64))
    joined["missing"] = ["; ".join(dict.fromkeys(m for arm in (a, b) if (m := missing.get((task, arm)))))
                         for task, a, b in zip(joined["task"], joined["a"], joined["b"], strict=True)]
    joined["conclusion"] = [conclude(row, wanted.alpha) for _, row in joined.iterrows()]
    return joined[list(COLUMNS)]


def conclude(row: pd.Series, alpha: float) -> Conclusion:
    """What one comparison allows to be said, at level ``alpha`` after Holm's correction."""
    if row["missing"]:
        return "too small"
    if row["p_holm"] < alpha and row["better"] != 0:
        return "better" if row["better"] > 0 else "worse"
    if not row["worst"] <= row["margin"]:  # NaN as well
        return "open"
    return "as good" if row["best"] <= row["margin"] else "no worse"


def _families(matrix: TaskMatrix, infos: Mapping[str, ArmInfo],
              pairs: Sequence[tuple[str, str]]) -> dict[str, list[tuple[str, str]]]:
    against_base = [(arm, BASE) for arm in infos]
    if matrix.role == "evaluation":
        return {"evaluation": list(pairs), "gain": against_base}
    baseline = baseline_of(infos)
    return {"retention": against_base + [(a, baseline) for a in infos if baseline is not None and a != baseline]}


def _arrays(matrix: TaskMatrix) -> dict[str, FloatArray]:
    return {**({BASE: matrix.scores[BASE]} if BASE in matrix.scores else {}), **matrix.trained}


def _usable(matrix: TaskMatrix, pairs: Sequence[tuple[str, str]], undefined: list[str]) -> list[tuple[str, str]]:
    """Pairs with a seed that both have scores of; the others are told."""
    seeds = {arm: ~np.isnan(scores).any(axis=1) for arm, scores in _arrays(matrix).items()}
    usable = [(a, b) for a, b in pairs if a in seeds and b in seeds and (seeds[a] & seeds[b]).any()]
    if left_out := [f"{a} against {b}" for a, b in pairs if (a, b) not in usable]:
        undefined.append(f"{matrix.task}: no seed in which both have scores: {', '.join(left_out)}")
    return usable


def _compare(matrix: TaskMatrix, pairs: Sequence[tuple[str, str]], wanted: StatisticsConfig,
             tests: int) -> pd.DataFrame:
    arrays = {arm: scores for arm, scores in _arrays(matrix).items() if arm != BASE or any(BASE in p for p in pairs)}

    def compared(confidence: float) -> pd.DataFrame:
        return compare_arms(arrays, pairs=pairs, binary=matrix.binary, confidence=confidence,
                            replicates=wanted.replicates)

    frame, together = compared(wanted.confidence), compared(1 - 2 * wanted.alpha / tests)
    bounds = (together[["low", "high"]] * matrix.sign).to_numpy(dtype=np.float64)
    return frame.assign(better=np.sign(frame["difference"].to_numpy(dtype=np.float64) * matrix.sign),
                        margin=wanted.margins.for_metric(matrix.metric), worst=-bounds.min(axis=1),
                        best=bounds.max(axis=1))


def detectable_after(comparisons: pd.DataFrame, *, family: str, task: str, confidence: float, alpha: float,
                     power: float) -> float:
    """Smallest true difference that this sweep would have found, from the errors that it had.

    (z(1 - alpha/2m) + z(power)) times the median standard error of the task's comparisons, m the number of
    comparisons of the family (Holm's first step); the error is half the interval's width over its
    normal quantile, a little too large at few seeds. NaN without comparisons.
    """
    rows = comparisons[comparisons["family"] == family]
    own = rows[rows["task"] == task]
    half = (own["high"] - own["low"]).to_numpy(dtype=np.float64) / 2
    half = half[np.isfinite(half)]
    if not half.size:
        return math.nan
    error = float(np.median(half)) / float(scipy_stats.norm.ppf(0.5 + confidence / 2))
    tests = max(int(rows["p"].notna().sum()), 1)
    return error * float(scipy_stats.norm.ppf(1 - alpha / (2 * tests)) + scipy_stats.norm.ppf(power))
