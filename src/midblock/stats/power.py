"""Before spending: the smallest difference, and the smallest margin, that items x seeds can show.

References:
    [1] Fleiss, Levin & Paik, Statistical Methods for Rates and Proportions, 3rd ed., ch. 4 and 13.
    [2] Connor, Biometrics 43 (1987): sample size of McNemar's test.
    [3] Schuirmann, J. Pharmacokinetics and Biopharmaceutics 15 (1987): two one-sided tests.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import numpy.typing as npt
from scipy import optimize
from scipy import stats as scipy_stats

from midblock.errors import SettingsError
from midblock.stats.intervals import crossed_parts

__all__ = ["equivalence_margin", "minimum_detectable_difference"]

FloatArray = npt.NDArray[np.float64]


def minimum_detectable_difference(n_items: int, n_seeds: int = 1, base_rate: float = 0.3, *,
                                  paired: bool = True, binary: bool = True, sd: float = 1.0,
                                  correlation: float = 0.5, seed_correlation: float | None = None,
                                  discordance: float | None = None, seed_sd: float = 0.0, arms: int = 2,
                                  alpha: float = 0.05, power: float = 0.8,
                                  comparisons: int = 1) -> float:
    """Smallest true difference of two arms' means that the test of `compare_arms` finds with ``power``.

    The test's interval is that of `crossed_mean`, so it has the t quantiles of few seeds. Its mean squares and the
    observed difference are drawn (quasi-random, always the same draws) from

        mean squares of seeds, items, residual: (r + N s, r + S a, r) times chi squared / df,
        variance of the difference: r / SN + a / N + s / S,
        r = 2 v (1 - rho_s), a = 2 v (rho_s - rho [paired]), s = 2 seed_sd^2,

    with S seeds per arm and N items, an item's score having variance v, correlation rho_s between two seeds of one arm
    and rho between two arms; v = p(1-p) for right/wrong, at the mean of both rates [1, 2]. The answer is the ``power``
    quantile of half width minus chance difference. With ``power=0.5`` it is about the half width of the 95% interval:
    for 200 items, one seed, unpaired, 9 points where both rates are 0.3; power 0.8 asks for about 1.43 times that.

    Args:
        n_items: N, scored in every arm.
        n_seeds: S, trained per arm.
        base_rate: The lower arm's share of right answers (binary only).
        paired: The arms share their items.
        binary: Right/wrong scores; otherwise ``sd`` is the scores' standard deviation over items.
        sd: See there.
        correlation: rho. 0.5 is a guess that suits fine-tuned variants of one model; put in
            what a pilot shows.
        seed_correlation: rho_s, default ``correlation``: then nothing but chance tells two arms' items apart, and
            every seed counts like new items.
        discordance: Share of items on which the two arms disagree where they are equally good;
            replaces ``correlation`` through discordance = 2 p (1-p) (1 - rho) (binary, paired).
        seed_sd: Standard deviation of an arm's true mean between seeds, in the scores' unit.
        arms: Of the sweep; from three on they share what is known of the seeds' variance.
        alpha: Level, two-sided.
        power: Chance of finding the difference.
        comparisons: m; alpha/m is the first, hardest step of Holm's procedure.

    Returns:
        The difference in the scores' unit (share of items for right/wrong); infinity where not
        even an arm that is always right would be found.

    Raises:
        SettingsError: a number outside its range.

    Example:
        >>> f = minimum_detectable_difference
        >>> round(f(200, paired=False, power=0.5), 3), round(f(200, paired=False), 3)
        (0.094, 0.136)
        >>> round(f(200, paired=True), 3)
        0.095
    """
    rho_seed = correlation if seed_correlation is None else seed_correlation
    _check(n_items, n_seeds, base_rate, binary, sd, rho_seed, seed_sd, alpha, power, comparisons)
    if discordance is not None:
        if not (binary and paired):
            raise SettingsError("discordance describes paired right/wrong scores; give correlation instead.")
        pure = 2 * base_rate * (1 - base_rate)
        if not 0.0 < discordance <= 1.0:
            raise SettingsError(f"discordance {discordance!r} must lie in 0..1 and above 0.")
        correlation = 1 - discordance / pure
        if correlation < -1.0:
            raise SettingsError(f"two arms that are right at {base_rate:g} cannot disagree on "
                                f"{discordance:g} of the items; at most {2 * pure:g}.")
        rho_seed = correlation if seed_correlation is None else seed_correlation
    shared = _shared(correlation, rho_seed, n_seeds, paired=paired)

    def needed(variance: float) -> float:
        chance, half = _drawn(n_items, n_seeds, variance, shared, rho_seed, seed_sd, arms, alpha / comparisons)
        return float(np.quantile(half - chance, power))

    if not binary:
        return needed(sd**2)

    def shortfall(delta: float) -> float:
        mean = base_rate + delta / 2
        return delta - needed(mean * (1 - mean))

    top = 1.0 - base_rate
    if shortfall(top) <= 0:
        return math.inf
    return float(optimize.brentq(shortfall, 0.0, top, xtol=1e-6))


def equivalence_margin(n_items: int, n_seeds: int = 1, base_rate: float = 0.3, *, binary: bool = True,
                       sd: float = 1.0, correlation: float = 0.5, seed_correlation: float | None = None,
                       seed_sd: float = 0.0, arms: int = 2, alpha: float = 0.05, power: float = 0.8,
                       comparisons: int = 1) -> float:
    """Smallest margin within which two equally good arms are shown to be as good with ``power``.

    Both one-sided tests at alpha/m succeed where the interval at confidence 1 - 2 alpha/m lies within the margin [3]:
    the answer is the ``power`` quantile of its farther end, drawn as for `minimum_detectable_difference`, which has
    the arguments.

    Raises:
        SettingsError: a number outside its range.

    Example:
        >>> round(equivalence_margin(200, base_rate=0.3), 3)
        0.095
    """
    rho_seed = correlation if seed_correlation is None else seed_correlation
    _check(n_items, n_seeds, base_rate, binary, sd, rho_seed, seed_sd, alpha, power, comparisons)
    variance = base_rate * (1 - base_rate) if binary else sd**2
    shared = _shared(correlation, rho_seed, n_seeds, paired=True)
    chance, half = _drawn(n_items, n_seeds, variance, shared, rho_seed, seed_sd, arms, 2 * alpha / comparisons)
    return float(np.quantile(half + np.abs(chance), power))


def _drawn(items: int, seeds: int, variance: float, shared: float, rho_seed: float, seed_sd: float, arms: int,
           level: float) -> tuple[FloatArray, FloatArray]:
    """Chance differences of two equal arms and half widths of their intervals at confidence 1 - ``level``."""
    residual, own = 2 * variance * (1 - rho_seed), 2 * variance * (rho_seed - shared)
    between = 2 * seed_sd**2
    normal, *chi = _points(items, seeds, arms)
    error = math.sqrt(max((residual / seeds + own) / items, 0.0) + between / seeds)
    critical = functools.partial(scipy_stats.t.ppf, 1 - level / 2)
    if seeds == 1:
        return error * normal, critical(max(items - 1, 1)) * np.sqrt((residual + own) * chi[0] / items)
    ms_residual = residual * chi[0]
    ms_item = np.maximum(residual + seeds * own, 0.0) * chi[1]
    ms_seed = (residual + items * between) * chi[2]
    df = float(seeds - 1)
    if arms > 2:
        others = (residual + items * between) * chi[3]
        pooled = (ms_seed + (arms - 2) * others) / (arms - 1)
        ms_seed, df = np.maximum(ms_seed, pooled), df * (arms - 1)
    of_items, of_seeds = crossed_parts(ms_seed, ms_item, ms_residual, df)
    half = np.sqrt((of_items * critical(max(items - 1, 1)) ** 2 + of_seeds * critical(df) ** 2) / (seeds * items))
    return error * normal, half


@functools.lru_cache(maxsize=64)
def _points(items: int, seeds: int, arms: int) -> tuple[FloatArray, ...]:
    """A normal, and chi squared / df of residual, items, seeds and the other arms' seeds: 8,192 quasi-random points."""
    df = [max((seeds - 1) * (items - 1), 1), max(items - 1, 1), max(seeds - 1, 1), max((arms - 2) * (seeds - 1), 1)]
    if seeds == 1:
        df = df[1:2]
    u = scipy_stats.qmc.Sobol(1 + len(df), rng=0).random(8192)
    return (scipy_stats.norm.ppf(u[:, 0]), *(scipy_stats.chi2.ppf(u[:, 1 + i], d) / d for i, d in enumerate(df)))


def _shared(correlation: float, rho_seed: float, seeds: int, *, paired: bool) -> float:
    """The correlation that pairing takes away."""
    if not -1.0 <= correlation < 1.0:
        raise SettingsError(f"correlation {correlation!r} must lie in -1..1 and below 1.")
    shared = correlation if paired else 0.0
    if (1 + (seeds - 1) * rho_seed) / seeds - shared <= 0:
        raise SettingsError(f"arms cannot be more alike (correlation {correlation:.2f}) than seeds of one "
                            f"arm (seed correlation {rho_seed:.2f}).")
    return shared


def _check(n_items: int, n_seeds: int, base_rate: float, binary: bool, sd: float, rho_seed: float,
           seed_sd: float, alpha: float, power: float, comparisons: int) -> None:
    faults = []
    if n_items < 1 or n_seeds < 1 or comparisons < 1:
        faults.append(f"items {n_items}, seeds {n_seeds} and comparisons {comparisons} must be at least 1")
    if binary and not 0.0 < base_rate < 1.0:
        faults.append(f"base_rate {base_rate!r} must lie between 0 and 1")
    if not binary and not sd > 0:
        faults.append(f"sd {sd!r} must be positive")
    if not -1.0 <= rho_seed <= 1.0:
        faults.append(f"seed_correlation {rho_seed!r} must lie in -1..1")
    if not seed_sd >= 0:
        faults.append(f"seed_sd {seed_sd!r} must not be negative")
    if not 0.0 < alpha < 1.0 or not 0.0 < power < 1.0:
        faults.append(f"alpha {alpha!r} and power {power!r} must lie between 0 and 1")
    if faults:
        raise SettingsError("; ".join(faults) + ".")
