"""Correlations with intervals, and what a locator's scores are worth.

References:
    [1] Fisher, Metron 1 (1921): the z transformation.
    [2] Bonett & Wright, Psychometrika 65 (2000): its standard error for Spearman's rho.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
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
    _check(method, confidence)
    first, second = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if first.shape != second.shape or first.ndim != 1:
        raise SettingsError(f"correlation needs two vectors of one length, but found shapes {first.shape} "
                            f"and {second.shape}.")
    keep = ~(np.isnan(first) | np.isnan(second))
    both = np.column_stack([first[keep], second[keep]])
    n = len(both)
    reason = _too_few(n) if n < 3 else (_unusable(both[:, 0], "the first quantity")
                                        or _unusable(both[:, 1], "the second quantity"))
    if reason:
        raise UndefinedMetricError(reason)
    r, low, high, p = (float(square[0, 1]) for square in _squares(both, method, confidence))
    return Correlation(r, low, high, p, n)


def _check(method: str, confidence: float) -> None:
    check_confidence(confidence)
    if method not in ("pearson", "spearman"):
        raise SettingsError(f"correlation method {method!r} is neither 'pearson' nor 'spearman'.")


def _too_few(n: int) -> str:
    return f"a correlation needs at least 3 points, but {n} are defined in both."


def _unusable(values: FloatArray, name: str) -> str:
    """Why values (n,) have no correlation; empty where they have one."""
    try:
        vector(values, name)
    except UndefinedMetricError as error:
        return str(error)
    flat = float(np.ptp(values)) <= 1e-12 * float(np.abs(values).max())
    return f"{name} is constant over its {values.size} points." if flat else ""


def _squares(columns: FloatArray, method: Method, confidence: float
             ) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray]:
    """r, low, high and p of every pair of columns (n, q) without gaps, none of them constant, n >= 3; each (q, q)."""
    n = len(columns)
    x = scipy_stats.rankdata(columns, axis=0) if method == "spearman" else columns
    centred = x - x.mean(axis=0)
    unit = centred / np.linalg.norm(centred, axis=0)
    r = np.clip(unit.T @ unit, -1.0, 1.0)
    if method == "pearson":  # of normal samples without correlation r is distributed so
        p = 2 * scipy_stats.beta(n / 2 - 1, n / 2 - 1, loc=-1, scale=2).sf(np.abs(r))
    elif n <= _EXACT_UP_TO:
        p = _exact_spearman_p(centred)
    else:
        with np.errstate(divide="ignore"):
            t = r * np.sqrt((n - 2) / ((r + 1.0) * (1.0 - r)))
        p = 2 * scipy_stats.t.sf(np.abs(t), n - 2)
    r = np.where(np.abs(r) > 1 - 1e-12, np.copysign(1.0, r), r)  # rounding must not hide a perfect order
    low, high = _fisher_bounds(r, n, method, confidence)
    return r, low, high, np.minimum(p, 1.0)


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


def _exact_spearman_p(centred: FloatArray) -> FloatArray:
    """Share of all orders of one side's ranks whose covariance is no smaller, for every pair of columns (n, q)."""
    orders = _orders(len(centred))
    observed = np.abs(centred.T @ centred)
    found = [(np.abs(side[orders] @ centred) >= own - 1e-9).mean(axis=0) for side, own in
             zip(centred.T, observed, strict=True)]
    return np.array(found)


def _fisher_bounds(r: FloatArray, n: int, method: Method, confidence: float) -> tuple[FloatArray, FloatArray]:
    if n < 4:
        return np.full_like(r, math.nan), np.full_like(r, math.nan)
    scale = 1 + r * r / 2 if method == "spearman" else np.ones_like(r)
    half = float(scipy_stats.norm.ppf(0.5 + confidence / 2)) * np.sqrt(scale / (n - 3))
    with np.errstate(divide="ignore"):
        z = np.arctanh(r)  # infinite at 1, where the interval has no width
    return np.tanh(z - half), np.tanh(z + half)


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
    _check(method, confidence)
    columns = frame_wide.to_numpy(dtype=np.float64, na_value=math.nan)
    there = ~np.isnan(columns)
    patterns: dict[bytes, list[int]] = {}  # columns with the same gaps are correlated together
    for j in range(len(names)):
        patterns.setdefault(there[:, j].tobytes(), []).append(j)
    rows: dict[tuple[int, int], dict[str, object]] = {}
    groups = list(patterns.values())
    for one, other in itertools.combinations_with_replacement(groups, 2):
        own = sorted({*one, *other})
        keep = there[:, one[0]] & there[:, other[0]]
        found = _rows_of(columns[np.ix_(keep, own)], [names[j] for j in own], method, confidence)
        within = one is other
        for (a, i), (b, j) in itertools.combinations(enumerate(own), 2):
            if within or (i in one) != (j in one):
                rows[i, j] = found(a, b)
    result = pd.DataFrame([rows[pair] for pair in itertools.combinations(range(len(names)), 2)])
    result["p_holm"] = holm(result["p"].to_numpy(dtype=np.float64))
    return result[list(CORRELATION_COLUMNS)]


def _rows_of(columns: FloatArray, names: list[str], method: Method, confidence: float
             ) -> Callable[[int, int], dict[str, object]]:
    """What gives the row of two of the columns (n, q), which have no gaps."""
    n = len(columns)
    undefined = {"r": math.nan, "low": math.nan, "high": math.nan, "n": n, "p": math.nan}
    usable = np.zeros(len(names), dtype=bool)
    squares = [np.full((len(names), len(names)), math.nan) for _ in range(4)]
    reasons = [_too_few(n)] * len(names)
    if n >= 3:
        reasons = [_unusable(column, repr(name)) for name, column in zip(names, columns.T, strict=True)]
        usable = np.array([not reason for reason in reasons])
        if usable.any():
            for square, found in zip(squares, _squares(columns[:, usable], method, confidence), strict=True):
                square[np.ix_(usable, usable)] = found

    def row(a: int, b: int) -> dict[str, object]:
        told: dict[str, object] = {"a": names[a], "b": names[b], "method": method}
        if not (usable[a] and usable[b]):
            return {**told, **undefined, "reason": reasons[a] or reasons[b]}
        r, low, high, p = (float(square[a, b]) for square in squares)
        return {**told, "r": r, "low": low, "high": high, "n": n, "p": p, "reason": ""}
    return row


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
