"""Is a score an inverted U over depth (the middle beats both ends)?

A significant negative square term alone does not show it: the curve may flatten without ever falling. The test must
find a rise on the left AND a fall on the right. Arms are trained with several seeds and scored on the same items, so
both are random: the error of a slope is made of the seeds' own variance (pooled over the arms, which few seeds need)
and the items'.

References:
    [1] Simonsohn, AMPPS 1 (2018): "Two lines".
    [2] Clark, JVLVB 12 (1973): seeds and items both random; Satterthwaite, Biometrics Bulletin 2 (1946).
    [3] Fieller, JRSS B 16 (1954): interval of a ratio (the peak).
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import special
from scipy import stats as scipy_stats

from midblock.errors import SettingsError, UndefinedMetricError
from midblock.results import Estimate
from midblock.stats._arrays import FloatArray, check_confidence, vector

__all__ = ["InvertedU", "inverted_u_test"]


@dataclass(frozen=True, slots=True)
class InvertedU:
    """Result of `inverted_u_test`; slopes are in score per unit of depth, ``n`` of estimates counts items."""

    p: float
    """Of "rises up to some inner depth and falls after it", adjusted for the choice of that depth."""
    break_at: float
    """The inner depth at which both lines together are surest."""
    left: Estimate
    """Slope of the line up to ``break_at``."""
    right: Estimate
    """Slope of the line from ``break_at`` on."""
    peak: Estimate
    """Depth of the extremum of the fitted parabola; no bounds where Fieller's set is unbounded."""
    n_seeds: int


def inverted_u_test(depth: npt.ArrayLike, scores: npt.ArrayLike, *, confidence: float = 0.95) -> InvertedU:
    """Test whether a score rises and then falls over depth, seeds and items both random.

    Two lines [1]: for an inner depth, a line through the depths up to it must rise and a line through those from it on
    must fall (the depth belongs to both); its p is the larger of the two one-sided ones. Every inner depth is tried,
    and the smallest p is multiplied by their number (Bonferroni): choosing the break where the data peak, as Simonsohn
    does, makes the fall after it look steeper than it is. A slope is a contrast of the arms' means. Its variance is

        (sum c^2 (MS_seed - MS_residual) + MS_item) / (seeds * items),

    MS_seed the mean square of seeds x depths, MS_item that of the items' own contrasts, with t and Satterthwaite's
    degrees of freedom [2]. By simulation (docs/statistics.md) the 5% test has at most 5% false alarms on shapes that
    are flat, rise and stay, stay and fall, or only rise, at two to five seeds.

    Args:
        depth: (D,) distinct positions, such as segment centres in 0..1.
        scores: (seeds, items, D); higher is better. Seed k of all arms is the same seed.
        confidence: Of the intervals.

    Raises:
        SettingsError: shapes that do not fit.
        UndefinedMetricError: fewer than 3 depths, non-finite scores, or one seed: what chance between trainings does to
            an arm cannot be told from what its depth does.

    Example:
        >>> x, items = np.linspace(0, 1, 5), np.random.default_rng(0).normal(0, 0.1, (2, 50, 5))
        >>> found = inverted_u_test(x, 4 * x * (1 - x) + items)
        >>> found.p < 0.001, found.break_at, round(found.peak.value, 1)
        (True, 0.5, 0.5)
    """
    check_confidence(confidence)
    x, y = vector(depth, "depth"), np.asarray(scores, dtype=np.float64)
    if y.ndim != 3 or y.shape[2] != x.size:
        raise SettingsError(f"scores must have shape (seeds, items, {x.size}), but have {y.shape}.")
    order = np.argsort(x)
    x, y = x[order], y[:, :, order]
    if np.unique(x).size < 3 or np.unique(x).size < x.size:
        raise UndefinedMetricError("an inverted-U test needs at least 3 distinct depths, but found "
                                   f"{np.unique(x).size} among {x.size}.")
    if not np.isfinite(y).all():
        raise UndefinedMetricError("scores hold non-finite values; leave out seeds that failed.")
    if y.shape[0] < 2 or y.shape[1] < 2:
        raise UndefinedMetricError(f"an inverted-U test needs at least 2 seeds and 2 items, but found {y.shape[0]} and "
                                   f"{y.shape[1]}: with one seed, chance between trainings cannot be told from depth.")
    table = _Table(y)
    ways = []
    for at in x[1:-1]:
        sides = [table.contrast(_line(tuple(x), float(at), left)) for left in (True, False)]
        ways.append((max(_one_sided(sides[0]), _one_sided((-sides[1][0], *sides[1][1:]))), at, sides))
    p, at, (left_side, right_side) = min(ways, key=lambda way: way[0])
    return InvertedU(p=min(1.0, p * len(ways)), break_at=float(at),
                     left=_estimate(left_side, confidence, y.shape[1]),
                     right=_estimate(right_side, confidence, y.shape[1]),
                     peak=_peak(x, table, confidence, y.shape[1]), n_seeds=y.shape[0])


_Slope = tuple[float, float, float]
"""Value, standard error, degrees of freedom."""


class _Table:
    """Mean squares of scores (seeds, items, depths), and the error of contrasts of the depths' means."""

    def __init__(self, y: FloatArray) -> None:
        seeds, items, depths = y.shape
        self.means = y.mean(axis=(0, 1))
        self._by_item = y.mean(axis=0)
        of_seed = y.mean(axis=1)
        apart = of_seed - of_seed.mean(axis=1, keepdims=True) - self.means + y.mean()
        self._df_seed = (seeds - 1) * (depths - 1)
        self.ms_seed = float(items * (apart**2).sum() / self._df_seed)
        residual = (y - y.mean(axis=2, keepdims=True) - of_seed[:, None, :] - self._by_item
                    + of_seed.mean(axis=1)[:, None, None] + self._by_item.mean(axis=1)[None, :, None]
                    + self.means - y.mean())
        self._df_residual = (seeds - 1) * (items - 1) * (depths - 1)
        self.ms_residual = float((residual**2).sum() / self._df_residual)
        self._seeds, self._items = seeds, items

    def contrast(self, weights: FloatArray) -> _Slope:
        """sum_d weights_d mean_d; the weights sum to 0, so that what all arms share cancels."""
        square = float((weights**2).sum())
        own = self._by_item @ weights
        item = self._seeds * float(own.var(ddof=1))
        seed, rest = square * self.ms_seed, square * self.ms_residual
        total = max(seed + item - rest, seed, item)
        value = float(self.means @ weights)
        if total <= 0.0:
            return value, 0.0, math.inf
        spread = seed**2 / self._df_seed + item**2 / (self._items - 1) + rest**2 / self._df_residual
        df = max(total**2 / spread, min(self._df_seed, self._items - 1))
        return value, math.sqrt(total / (self._seeds * self._items)), df

    def covariance(self) -> FloatArray:
        """Of the depths' means (D, D), up to what they share."""
        own = np.cov(self._by_item, rowvar=False) * self._seeds
        more = max(self.ms_seed - self.ms_residual, 0.0) * np.eye(self.means.size)
        return np.asarray((own + more) / (self._seeds * self._items), dtype=np.float64)


@functools.lru_cache(maxsize=256)
def _line(depths: tuple[float, ...], at: float, left: bool) -> FloatArray:
    """Weights of the arms' means in the slope of one of the two lines: interrupted regression [1]."""
    x = np.array(depths)
    before = x <= at if left else x < at
    design = np.stack([before, ~before, np.where(before, x - at, 0.0), np.where(before, 0.0, x - at)], axis=1)
    return np.asarray(np.linalg.pinv(design.astype(np.float64))[2 if left else 3], dtype=np.float64)


def _one_sided(slope: _Slope) -> float:
    value, error, df = slope
    if error == 0.0:
        return 0.0 if value > 0 else 1.0
    return float(special.stdtr(df, -value / error))


def _estimate(slope: _Slope, confidence: float, n: int) -> Estimate:
    value, error, df = slope
    half = float(scipy_stats.t.ppf(0.5 + confidence / 2, df)) * error
    return Estimate(value, value - half, value + half, n)


def _peak(x: FloatArray, table: _Table, confidence: float, n: int) -> Estimate:
    """-b1 / (2 b2) of the parabola, with Fieller's interval: all x at which the slope b1 + 2 b2 x may be 0."""
    fit = np.linalg.pinv(np.stack([np.ones_like(x), x, x * x], axis=1))
    _, b1, b2 = fit @ table.means
    if b2 == 0.0:
        return Estimate(math.nan, n=n)
    cov = fit @ table.covariance() @ fit.T
    t2 = float(scipy_stats.t.ppf(0.5 + confidence / 2, table.contrast(fit[2])[2])) ** 2
    square = 4 * (b2**2 - t2 * cov[2, 2])
    linear = 4 * (b1 * b2 - t2 * cov[1, 2])
    constant = b1**2 - t2 * cov[1, 1]
    root = linear**2 - 4 * square * constant
    value = float(-b1 / (2 * b2))
    if not square > 0 or root < 0:  # the curvature's sign is unsure: the set is not an interval
        return Estimate(value, n=n)
    ends = sorted(((-linear - math.sqrt(root)) / (2 * square), (-linear + math.sqrt(root)) / (2 * square)))
    return Estimate(value, float(ends[0]), float(ends[1]), n)
