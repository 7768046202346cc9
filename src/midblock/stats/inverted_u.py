"""Is a score an inverted U over depth (the middle beats both ends)?

A significant negative square term alone does not show it: the curve may flatten without ever
falling. The test must find a rise on the left AND a fall on the right.

References:
    [1] Simonsohn, AMPPS 1 (2018): "Two lines".
    [2] Lind & Mehlum, Oxford Bulletin of Economics and Statistics 72 (2010): "With or without U?"
    [3] Fieller, JRSS B 16 (1954): interval of a ratio (the peak).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats as scipy_stats

from midblock.errors import SettingsError, UndefinedMetricError
from midblock.results import Interval
from midblock.stats._arrays import FloatArray, check_confidence, vector

__all__ = ["InvertedU", "inverted_u_test"]


@dataclass(frozen=True, slots=True)
class InvertedU:
    """Result of `inverted_u_test`; slopes are in score per unit of depth."""

    p: float
    """Two lines: the larger one-sided p of "rises up to ``break_at``" and "falls after it"."""
    p_parabola: float
    """Lind-Mehlum: the same of the parabola's slopes at both ends; believes in the parabola."""
    coefficients: tuple[float, float, float]
    """Constant, depth, depth squared."""
    peak: Interval
    """Depth of the extremum of the fitted parabola; NaN bounds where Fieller's set is unbounded."""
    slope_left: Interval
    """Slope of the parabola at the smallest depth, ``slope_right`` at the largest."""
    slope_right: Interval
    break_at: float
    """Depth shared by the two lines; NaN where the parabola has no inner peak."""
    line_slopes: tuple[float, float]
    """Slopes of the lines up to and from ``break_at``; NaN where there is no inner peak."""
    n: int
    error: str
    """Where the standard errors come from: ``replicates`` or ``residuals``."""


def inverted_u_test(depth: npt.ArrayLike, score: npt.ArrayLike, *, weights: npt.ArrayLike | None = None,
                    replicates: npt.ArrayLike | None = None, confidence: float = 0.95) -> InvertedU:
    """Test whether a score rises and then falls over depth.

    Two lines [1]: a line through the depths up to the break must rise and a line through those
    from the break on must fall. The break is the inner depth nearest the peak of the fitted
    parabola and belongs to both lines (Simonsohn moves it further by a spline, which a handful
    of depths does not carry). p is the larger of the two one-sided p values: an
    intersection-union test, which needs no correction. Where the parabola has no inner peak, p
    is ``p_parabola`` (then at least one half).

    Lind and Mehlum [2] ask the same of the parabola's slopes at both ends. That p is valid only if
    the truth is a parabola: on a curve that rises and then stays level its false alarms
    reach 20 to 100% (tests/stats), the two lines' stay near 5%. It is given to compare with papers.

    Args:
        depth: (n,) distinct positions, such as segment centres in 0..1.
        score: (n,) the score at each.
        weights: (n,) positive, such as inverse variances. Default: equal.
        replicates: (B, n) paired bootstrap replicates of the scores (columns as ``depth``).
            Given, errors are those of measurement, normal, from the replicates' covariance:
            the fit then describes these very depths, and five points can suffice. Otherwise
            errors come from the residuals with t and n - 3 (two lines: n - 4) degrees of
            freedom, and depths count as independent.

    Raises:
        SettingsError: lengths differ, or weights that are not positive.
        UndefinedMetricError: fewer than 5 distinct depths (3 with ``replicates``).

    Example:
        >>> x = np.linspace(0, 1, 9)
        >>> noise = np.array([1, -1, 1, -1, 0, 1, -1, 1, -1]) * 0.01
        >>> found = inverted_u_test(x, 4 * x * (1 - x) + noise)
        >>> found.p < 0.001, round(found.peak.value, 2)
        (True, 0.5)
    """
    check_confidence(confidence)
    x, y = vector(depth, "depth"), vector(score, "score")
    if x.shape != y.shape:
        raise SettingsError(f"{x.size} depths do not match {y.size} scores.")
    w = np.ones_like(x) if weights is None else vector(weights, "weights")
    if w.shape != x.shape or not (w > 0).all():
        raise SettingsError("weights must be positive, one per depth.")
    draws: FloatArray | None = None
    if replicates is not None:
        draws = np.asarray(replicates, dtype=np.float64)
        if draws.ndim != 2 or draws.shape[1] != x.size or draws.shape[0] < 20:
            raise SettingsError(f"replicates must have shape (at least 20, {x.size}), "
                                f"but have {draws.shape}.")
        if not np.isfinite(draws).all():
            raise UndefinedMetricError("replicates hold non-finite values.")
    needed = 5 if draws is None else 3
    if np.unique(x).size < needed:
        raise UndefinedMetricError(f"an inverted-U test needs at least {needed} distinct depths, "
                                   f"but found {np.unique(x).size}.")
    left, right = float(x.min()), float(x.max())
    design = np.stack([np.ones_like(x), x, x * x], axis=1)
    b, cov, df = _fit(design, y, w, draws)
    at_left, at_right = np.array([0.0, 1.0, 2 * left]), np.array([0.0, 1.0, 2 * right])
    slope_left, p_left = _slope(at_left, b, cov, df, x.size, confidence, rising=True)
    slope_right, p_right = _slope(at_right, b, cov, df, x.size, confidence, rising=False)
    peak = _peak(b, cov, df, x.size, confidence)
    p_parabola = max(p_left, p_right)
    p, at, lines = p_parabola, math.nan, (math.nan, math.nan)
    if b[2] < 0 and left < peak.value < right:
        inner = np.unique(x)[1:-1]
        at = float(inner[np.argmin(np.abs(inner - peak.value))])
        p, lines = _two_lines(x, y, w, draws, at)
    return InvertedU(p=p, p_parabola=p_parabola,
                     coefficients=(float(b[0]), float(b[1]), float(b[2])), peak=peak,
                     slope_left=slope_left, slope_right=slope_right, break_at=at, line_slopes=lines,
                     n=int(x.size), error="residuals" if draws is None else "replicates")


def _fit(design: FloatArray, y: FloatArray, w: FloatArray,
         draws: FloatArray | None) -> tuple[FloatArray, FloatArray, float]:
    """Weighted least squares: coefficients, their covariance and degrees of freedom."""
    root = np.sqrt(w)[:, None]
    projector = np.linalg.pinv(design * root) * root.T
    b = projector @ y
    if draws is not None:
        cov = projector @ np.cov(draws, rowvar=False) @ projector.T
        return b, np.asarray(cov), math.inf
    df = float(y.size - np.linalg.matrix_rank(design))
    if df <= 0:
        return b, np.full((b.size, b.size), np.nan), df
    residual = y - design @ b
    variance = float((w * residual**2).sum()) / df
    cov = variance * np.linalg.pinv((design * root).T @ (design * root))
    return b, np.asarray(cov, dtype=np.float64), df


def _one_sided(value: float, error: float, df: float, *, rising: bool) -> float:
    signed = value if rising else -value
    if math.isnan(error):
        return math.nan
    if error == 0.0:
        return 0.0 if signed > 0 else 1.0
    return float(scipy_stats.t.sf(signed / error, df))


def _slope(direction: FloatArray, b: FloatArray, cov: FloatArray, df: float, n: int, confidence: float, *,
           rising: bool) -> tuple[Interval, float]:
    value = float(direction @ b)
    error = math.sqrt(max(float(direction @ cov @ direction), 0.0))
    half = float(scipy_stats.t.ppf(0.5 + confidence / 2, df)) * error
    return Interval(value, value - half, value + half, n), _one_sided(value, error, df, rising=rising)


def _peak(b: FloatArray, cov: FloatArray, df: float, n: int, confidence: float) -> Interval:
    """-b1 / (2 b2) with Fieller's interval: all x at which the slope b1 + 2 b2 x may be 0."""
    if b[2] == 0.0:
        return Interval(math.nan, n=n)
    value = float(-b[1] / (2 * b[2]))
    t2 = float(scipy_stats.t.ppf(0.5 + confidence / 2, df)) ** 2
    square = 4 * (b[2] ** 2 - t2 * cov[2, 2])
    linear = 4 * (b[1] * b[2] - t2 * cov[1, 2])
    constant = b[1] ** 2 - t2 * cov[1, 1]
    root = linear**2 - 4 * square * constant
    if not square > 0 or root < 0:  # the curvature's sign is unsure: the set is not an interval
        return Interval(value, n=n)
    ends = sorted(((-linear - math.sqrt(root)) / (2 * square), (-linear + math.sqrt(root)) / (2 * square)))
    return Interval(value, float(ends[0]), float(ends[1]), n)


def _two_lines(x: FloatArray, y: FloatArray, w: FloatArray, draws: FloatArray | None,
               at: float) -> tuple[float, tuple[float, float]]:
    """Interrupted regression [1], twice: the break's depth counted to the left, then to the right."""
    ps, slopes = [], []
    for is_left, column, rising in ((x <= at, 2, True), (x < at, 3, False)):
        design = np.stack([is_left, ~is_left, np.where(is_left, x - at, 0.0),
                           np.where(is_left, 0.0, x - at)], axis=1).astype(np.float64)
        b, cov, df = _fit(design, y, w, draws)
        slopes.append(float(b[column]))
        error = math.sqrt(max(float(cov[column, column]), 0.0))
        ps.append(_one_sided(slopes[-1], error, df, rising=rising))
    return max(ps), (slopes[0], slopes[1])
