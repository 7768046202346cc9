"""Correlations with intervals, and what a locator's scores are worth.

References:
    [1] Fisher, Metron 1 (1921): the z transformation.
    [2] Bonett & Wright, Psychometrika 65 (2000): its standard error for Spearman's rho.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import stats as scipy_stats

from midblock.errors import SettingsError, UndefinedMetricError
from midblock.stats._arrays import FloatArray, check_confidence, vector
from midblock.stats.hypothesis_tests import holm

__all__ = ["CORRELATION_COLUMNS", "Correlation", "Method", "correlate", "correlation", "regret", "spearman"]

Method = Literal["pearson", "spearman"]
CORRELATION_COLUMNS = ("a", "b", "method", "r", "low", "high", "n", "p", "p_holm", "reason")
_EXACT_UP_TO = 8  # 8! = 40320 orders; above, scipy's t approximation is good


@dataclass(frozen=True, slots=True)
class Correlation:
    """A correlation -1..1 with its interval, two-sided p and number of points."""

    r: float
    low: float
    high: float
    p: float
    n: int


def correlation(x: npt.ArrayLike, y: npt.ArrayLike, method: Method = "pearson",
                confidence: float = 0.95) -> Correlation:
    """Correlation of two vectors; points in which either is NaN are dropped.

    The interval is Fisher's z [1] (Spearman: Bonett and Wright's error [2]), absent for n < 4
    and of width 0 at r = 1 or -1. Spearman's p is exact over all orders for n <= 8.

    Layers of one model are neighbours, not independent points: p and interval of a correlation
    over depth are too optimistic and describe rather than prove.

    Raises:
        UndefinedMetricError: fewer than 3 points, or one side is constant.
        SettingsError: lengths differ, or another method.
    """
    check_confidence(confidence)
    if method not in ("pearson", "spearman"):
        raise SettingsError(f"correlation method {method!r} is neither 'pearson' nor 'spearman'.")
    first, second = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if first.shape != second.shape or first.ndim != 1:
        raise SettingsError(f"correlation needs two vectors of one length, but found shapes {first.shape} "
                            f"and {second.shape}.")
    keep = ~(np.isnan(first) | np.isnan(second))
    first, second = vector(first[keep], "x"), vector(second[keep], "y")
    n = int(first.size)
    if n < 3:
        raise UndefinedMetricError(f"a correlation needs at least 3 points, but {n} are defined in both.")
    for values, name in ((first, "the first"), (second, "the second")):
        if float(np.ptp(values)) <= 1e-12 * float(np.abs(values).max()):
            raise UndefinedMetricError(f"{name} quantity is constant over its {n} points.")
    if method == "pearson":
        result = scipy_stats.pearsonr(first, second)
        r, p = float(result.statistic), float(result.pvalue)
    else:
        rank_x, rank_y = scipy_stats.rankdata(first), scipy_stats.rankdata(second)
        r = float(np.corrcoef(rank_x, rank_y)[0, 1])
        p = (_exact_spearman_p(rank_x, rank_y) if n <= _EXACT_UP_TO
             else float(scipy_stats.spearmanr(first, second).pvalue))
    if abs(r) > 1 - 1e-12:  # rounding must not hide a perfect order
        r = math.copysign(1.0, r)
    low, high = _fisher_bounds(r, n, method, confidence)
    return Correlation(r, low, high, p, n)


def spearman(x: npt.ArrayLike, y: npt.ArrayLike, confidence: float = 0.95) -> Correlation:
    """Spearman's rank correlation with interval and p; see `correlation`.

    Example:
        >>> s = spearman([1, 2, 3, 4, 5], [1, 3, 2, 4, 5])
        >>> round(s.r, 2), round(s.p, 4), s.n
        (0.9, 0.0833, 5)
    """
    return correlation(x, y, "spearman", confidence)


@lru_cache(maxsize=_EXACT_UP_TO)
def _orders(n: int) -> npt.NDArray[np.int8]:
    return np.array(list(itertools.permutations(range(n))), dtype=np.int8)


def _exact_spearman_p(rank_x: FloatArray, rank_y: FloatArray) -> float:
    centred = rank_y - rank_y.mean()
    products = centred[_orders(rank_y.size)] @ (rank_x - rank_x.mean())
    observed = abs(float(centred @ (rank_x - rank_x.mean())))
    return float((np.abs(products) >= observed - 1e-9).mean())


def _fisher_bounds(r: float, n: int, method: Method, confidence: float) -> tuple[float, float]:
    if n < 4:
        return math.nan, math.nan
    if abs(r) == 1.0:
        return r, r
    scale = 1 + r * r / 2 if method == "spearman" else 1.0
    half = float(scipy_stats.norm.ppf(0.5 + confidence / 2)) * math.sqrt(scale / (n - 3))
    return math.tanh(math.atanh(r) - half), math.tanh(math.atanh(r) + half)


def correlate(frame_wide: pd.DataFrame, method: Method = "pearson",
              confidence: float = 0.95) -> pd.DataFrame:
    """Correlations of all pairs of columns.

    Args:
        frame_wide: One row per layer (or sample), one numeric column per quantity. NaN cells
            are left out pair by pair.

    Returns:
        One row per pair of columns, `CORRELATION_COLUMNS`; Holm over all defined pairs. An
        undefined pair has NaN and its ``reason`` (else an empty string).

    Raises:
        SettingsError: fewer than two columns, or a column that is not numeric.
    """
    names = [str(c) for c in frame_wide.columns]
    if len(names) < 2:
        raise SettingsError(f"correlations need at least two quantities, but found {len(names)}.")
    textual = [name for name, kind in zip(names, frame_wide.dtypes, strict=True)
               if not pd.api.types.is_numeric_dtype(kind)]
    if textual:
        raise SettingsError(f"correlations need numbers, but column {textual[0]!r} holds other values.")
    columns = frame_wide.to_numpy(dtype=np.float64, na_value=math.nan)
    rows: list[dict[str, object]] = []
    for i, j in itertools.combinations(range(len(names)), 2):
        row: dict[str, object] = {"a": names[i], "b": names[j], "method": method}
        try:
            found = correlation(columns[:, i], columns[:, j], method, confidence)
            row |= {"r": found.r, "low": found.low, "high": found.high, "n": found.n, "p": found.p,
                    "reason": ""}
        except UndefinedMetricError as error:
            both = ~np.isnan(columns[:, i]) & ~np.isnan(columns[:, j])
            reason = str(error).replace("the first quantity", repr(names[i])).replace(
                "the second quantity", repr(names[j]))
            row |= {"r": math.nan, "low": math.nan, "high": math.nan, "n": int(both.sum()),
                    "p": math.nan, "reason": reason}
        rows.append(row)
    result = pd.DataFrame(rows)
    result["p_holm"] = holm(result["p"].to_numpy(dtype=np.float64))
    return result[list(CORRELATION_COLUMNS)]


def regret(predicted: npt.ArrayLike, gains: npt.ArrayLike) -> float:
    """What the choice of the highest predicted arm loses against the best arm.

    max(gains) - gains[argmax(predicted)]; tied predictions count as a random choice among
    them, so constant predictions give the expected regret of choosing at random.

    Args:
        predicted: (n,) scores of the arms by a locator; ``gains``: (n,) what each brought.

    Returns:
        0 or more, in the unit of ``gains``.

    Raises:
        SettingsError: lengths differ.
        UndefinedMetricError: no arms, or non-finite entries.

    Example:
        >>> regret([0.1, 0.9, 0.2], [1.0, 2.0, 5.0]), regret([1, 1], [0.0, 4.0])
        (3.0, 2.0)
    """
    scores, measured = vector(predicted, "predicted scores"), vector(gains, "gains")
    if scores.shape != measured.shape:
        raise SettingsError(f"{scores.size} predictions do not match {measured.size} gains.")
    if scores.size == 0:
        raise UndefinedMetricError("the regret over 0 arms has no value.")
    chosen = scores == scores.max()
    return float(measured.max() - measured[chosen].mean())
