"""The share of a gain that an arm reaches: "98% of full performance", with its interval.

References:
    [1] Fieller, JRSS B 16 (1954): interval of a ratio of means, by inverting its test.
"""

from __future__ import annotations

import math

import numpy.typing as npt
from scipy import optimize

from midblock.errors import SettingsError
from midblock.results import Estimate
from midblock.stats._arrays import check_confidence, matrix
from midblock.stats.intervals import crossed_mean

__all__ = ["share_of_gain"]


def share_of_gain(arm: npt.ArrayLike, full: npt.ArrayLike, base: npt.ArrayLike, *, confidence: float = 0.95
                  ) -> Estimate:
    """What share of the gain of ``full`` over ``base`` does ``arm`` reach? (arm - base) / (full - base).

    "98% of full performance" is 0.98. Fieller's interval [1]: all shares r for which the mean of
    arm - base - r (full - base) does not differ from 0, seeds and items random as in `arm_intervals`; two seeds give
    wide intervals, or none. The sign of the scores does not matter.

    Args:
        arm: (seeds, items), or (items,) for one seed.
        full: The same seeds and items.
        base: (items,), the untuned model; or (seeds, items).
        confidence: Coverage.

    Returns:
        The share; no bounds where the full gain is not surely different from 0 (the set is then unbounded), and no
        value where it is 0. ``n`` counts items.

    Raises:
        SettingsError: arrays of different shape.
        UndefinedMetricError: non-finite scores.

    Example:
        >>> import numpy as np
        >>> rng = np.random.default_rng(0)
        >>> base, noise = rng.normal(0, 1, 400), lambda: rng.normal(0, 0.1, (3, 400))
        >>> found = share_of_gain(base + 0.9 + noise(), base + 1.0 + noise(), base)
        >>> round(found.value, 1), found.low < 0.9 < found.high
        (0.9, True)
    """
    check_confidence(confidence)
    first, whole, start = matrix(arm, "arm"), matrix(full, "full"), matrix(base, "base")
    if first.shape != whole.shape or start.shape[1] != first.shape[1] or start.shape[0] not in (1, first.shape[0]):
        raise SettingsError(f"a share of the gain needs the same seeds and items, but found {first.shape}, "
                            f"{whole.shape} and {start.shape}.")
    gained, possible = first - start, whole - start
    n = first.shape[1]
    denominator = float(possible.mean())
    if denominator == 0.0:
        return Estimate(math.nan, n=n)
    share = float(gained.mean()) / denominator

    def excess(r: float) -> float:
        """Above 0 where r is outside."""
        mean = crossed_mean(gained - r * possible)
        half = mean.half_width(confidence)
        return -1.0 if math.isnan(half) else abs(mean.value) - half

    ends = []
    for way in (-1.0, 1.0):
        step = 0.01 * max(1.0, abs(share))
        while step < 1e4 * max(1.0, abs(share)) and excess(share + way * step) <= 0:
            step *= 1.5
        if excess(share + way * step) <= 0:
            return Estimate(share, n=n)
        ends.append(float(optimize.brentq(excess, share, share + way * step, xtol=1e-9)) if excess(share) < 0 else
        share)
    return Estimate(share, ends[0], ends[1], n)
