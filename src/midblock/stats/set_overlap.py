"""How much two selections have in common, and how much two random ones would.

Two random shares p of the same units have a Jaccard index of about p / (2 - p): 0.60 at p = 0.75. An
overlap says something only beside that figure.

References:
    [1] Jaccard, New Phytologist 11 (1912). [2] Hubert & Arabie, J. Classification 2 (1985): index
    corrected for chance, (index - expected) / (1 - expected).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats as scipy_stats

from midblock.errors import SettingsError, UndefinedMetricError
from midblock.stats._arrays import check_confidence

__all__ = ["SetOverlap", "chance_corrected", "expected_jaccard", "jaccard", "random_share_jaccard", "set_overlap"]


@dataclass(frozen=True, slots=True)
class SetOverlap:
    """Overlap of two selections A and B of the same n units, beside what chance gives."""

    jaccard: float
    """|A and B| / |A or B|, 0..1."""
    shared: float
    """|A and B| / min(|A|, |B|), 0..1; by chance the larger of the two shares."""
    expected: float
    """Mean Jaccard index of two random selections of these sizes."""
    corrected: float
    """(jaccard - expected) / (1 - expected): 0 by chance, 1 for equal selections; NaN where expected is 1."""
    p: float
    """Probability that random selections share at least as many units (hypergeometric, one-sided)."""
    chance_low: float
    """Lower end of the central range of the Jaccard index under chance."""
    chance_high: float
    """Upper end of that range."""
    n: int
    """Units to select from."""


def random_share_jaccard(share: float) -> float:
    """Jaccard index of two random shares p of very many units: p / (2 - p).

    Raises:
        SettingsError: the share is not in 0..1.

    Example:
        >>> random_share_jaccard(0.75)
        0.6
    """
    if not 0 <= share <= 1:
        raise SettingsError(f"a share of {share} was asked for; use 0 to 1.")
    return share / (2 - share)


def _flags(a: npt.ArrayLike, b: npt.ArrayLike) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    first, second = np.asarray(a), np.asarray(b)
    if first.dtype != np.bool_ or second.dtype != np.bool_ or first.shape != second.shape or first.ndim != 1:
        raise SettingsError("an overlap compares two boolean vectors over the same units; found "
                            f"{first.dtype} {first.shape} and {second.dtype} {second.shape}.")
    return first, second


def jaccard(a: npt.ArrayLike, b: npt.ArrayLike) -> float:
    """|A and B| / |A or B| of two boolean vectors (n,).

    Raises:
        UndefinedMetricError: both selections are empty.

    Example:
        >>> jaccard([True, True, False], [True, False, False])
        0.5
    """
    first, second = _flags(a, b)
    union = int((first | second).sum())
    if union == 0:
        raise UndefinedMetricError("the overlap of two empty selections has no value.")
    return int((first & second).sum()) / union


def _chance(n: int, size_a: int, size_b: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Possible Jaccard values, ascending, and their probabilities under chance."""
    if not (0 <= size_a <= n and 0 <= size_b <= n and size_a + size_b > 0):
        raise SettingsError(f"selections of {size_a} and {size_b} of {n} units are not possible.")
    common = np.arange(max(0, size_a + size_b - n), min(size_a, size_b) + 1)
    weights = scipy_stats.hypergeom.pmf(common, n, size_a, size_b)
    return common / (size_a + size_b - common), np.asarray(weights, dtype=np.float64)


def expected_jaccard(n: int, size_a: int, size_b: int) -> float:
    """Exact mean Jaccard index of random selections of ``size_a`` and ``size_b`` of ``n`` units.

    Near `random_share_jaccard` for many units.

    Raises:
        SettingsError: sizes that do not fit.

    Example:
        >>> round(expected_jaccard(2, 1, 1), 6), round(expected_jaccard(4000, 3000, 3000), 3)
        (0.5, 0.6)
    """
    values, weights = _chance(n, size_a, size_b)
    return float(values @ weights)


def chance_corrected(index: float, expected: float) -> float:
    """(index - expected) / (1 - expected); NaN where chance alone gives 1.

    Example:
        >>> round(chance_corrected(0.9, 0.6), 2)
        0.75
    """
    return (index - expected) / (1 - expected) if expected < 1 else math.nan


def set_overlap(a: npt.ArrayLike, b: npt.ArrayLike, confidence: float = 0.95) -> SetOverlap:
    """Overlap of two selections of the same units, with what random selections of their sizes give.

    Args:
        a: (n,) boolean, True where selected; ``b`` likewise.
        confidence: Of the range under chance.

    Raises:
        SettingsError: not boolean vectors of one length.
        UndefinedMetricError: both are empty.

    Example:
        >>> o = set_overlap([True, True, False, False], [True, True, False, False])
        >>> o.jaccard, round(o.expected, 3), o.corrected, round(o.p, 3)
        (1.0, 0.389, 1.0, 0.167)
    """
    check_confidence(confidence)
    first, second = _flags(a, b)
    index = jaccard(first, second)
    n, size_a, size_b = int(first.size), int(first.sum()), int(second.sum())
    common = int((first & second).sum())
    values, weights = _chance(n, size_a, size_b)
    expected = float(values @ weights)
    below = np.cumsum(weights)
    tail = (1 - confidence) / 2
    low = values[min(int(np.searchsorted(below, tail)), values.size - 1)]
    high = values[min(int(np.searchsorted(below, 1 - tail)), values.size - 1)]
    smaller = min(size_a, size_b)
    return SetOverlap(
        jaccard=index, shared=common / smaller if smaller else math.nan, expected=expected,
        corrected=chance_corrected(index, expected),
        p=min(1.0, float(scipy_stats.hypergeom.sf(common - 1, n, size_a, size_b))),
        chance_low=float(low), chance_high=float(high), n=n)
