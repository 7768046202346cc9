"""Before spending: the smallest difference that items x seeds can detect.

References:
    [1] Fleiss, Levin & Paik, Statistical Methods for Rates and Proportions, 3rd ed., ch. 4 and 13.
    [2] Connor, Biometrics 43 (1987): sample size of McNemar's test.
"""

from __future__ import annotations

import math

from scipy import optimize
from scipy import stats as scipy_stats

from midblock.errors import SettingsError

__all__ = ["minimum_detectable_difference"]


def minimum_detectable_difference(n_items: int, n_seeds: int = 1, base_rate: float = 0.3, *,
                                  paired: bool = True, binary: bool = True, sd: float = 1.0,
                                  correlation: float = 0.5, seed_correlation: float | None = None,
                                  discordance: float | None = None, seed_sd: float = 0.0,
                                  alpha: float = 0.05, power: float = 0.8,
                                  comparisons: int = 1) -> float:
    """Smallest true difference of two arms' means that a two-sided test finds with ``power``.

    Solves delta = z(1 - alpha/2m) SE_0 + z(power) SE_1(delta), the normal approximation [1, 2].
    With S seeds per arm and N items, an item's score having variance v, correlation rho_s
    between two seeds of one arm and rho between two arms,

        SE^2 = v/N * 2 * ((1 + (S-1) rho_s)/S - rho [paired]) + 2 seed_sd^2 / S,

    v = p(1-p) for right/wrong (SE_0 at the mean of both rates, SE_1 at each arm's own). With
    ``power=0.5`` it is about the half width of the 95% interval of the difference: for 200
    items, unpaired, 9.0 points where both rates are 0.3 (1.96 sqrt(2 * 0.21 / 200)), 9.3 where one
    is that much above; power 0.8 asks for about 1.43 times that. Exact McNemar needs slightly more.

    Args:
        n_items: N, scored in every arm.
        n_seeds: S, trained per arm.
        base_rate: The lower arm's share of right answers (binary only).
        paired: The arms share their items.
        binary: Right/wrong scores; otherwise ``sd`` is the scores' standard deviation over items.
        correlation: rho. 0.5 is a guess that suits fine-tuned variants of one model; put in
            what a pilot shows.
        seed_correlation: rho_s, default ``correlation``.
        discordance: Share of items on which the two arms disagree where they are equally good;
            replaces ``correlation`` through discordance = 2 p (1-p) (1 - rho) (binary, paired).
        seed_sd: Standard deviation of an arm's true mean between seeds, in the scores' unit.
        comparisons: m; alpha/m is the first, hardest step of Holm's procedure.

    Returns:
        The difference in the scores' unit (share of items for right/wrong); infinity where not
        even an arm that is always right would be found.

    Raises:
        SettingsError: a number outside its range.

    Example:
        >>> f = minimum_detectable_difference
        >>> round(f(200, paired=False, power=0.5), 3), round(f(200, paired=False), 3)
        (0.093, 0.135)
        >>> round(f(200, paired=True), 3)
        0.094
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
    if not -1.0 <= correlation < 1.0:
        raise SettingsError(f"correlation {correlation!r} must lie in -1..1 and below 1.")
    z_alpha = float(scipy_stats.norm.ppf(1 - alpha / (2 * comparisons)))
    z_power = float(scipy_stats.norm.ppf(power))
    own = (1 + (n_seeds - 1) * rho_seed) / n_seeds
    shared = correlation if paired else 0.0
    if own - shared <= 0:
        raise SettingsError(f"arms cannot be more alike (correlation {correlation:.2f}) than seeds of one "
                            f"arm (seed correlation {rho_seed:.2f}).")
    between = 2 * seed_sd**2 / n_seeds

    if not binary:
        error = math.sqrt(sd**2 / n_items * 2 * (own - shared) + between)
        return (z_alpha + z_power) * error

    def shortfall(delta: float) -> float:
        low, high = base_rate, base_rate + delta
        mean = (low + high) / 2
        v0 = 2 * mean * (1 - mean)
        v_low, v_high = low * (1 - low), high * (1 - high)
        se0 = math.sqrt(v0 / n_items * (own - shared) + between)
        var1 = ((v_low + v_high) * own - 2 * shared * math.sqrt(max(v_low * v_high, 0.0))) / n_items
        return delta - z_alpha * se0 - z_power * math.sqrt(max(var1, 0.0) + between)

    top = 1.0 - base_rate
    if shortfall(top) <= 0:
        return math.inf
    return float(optimize.brentq(shortfall, 0.0, top))


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
