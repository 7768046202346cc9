"""Tests between arms on the same items: exact McNemar, permutation, t, crossed over seeds.

References:
    [1] McNemar, Psychometrika 12 (1947); the exact form is the sign test of the discordant items.
    [2] Holm, Scandinavian Journal of Statistics 6 (1979).
    [3] Cohen, Statistical Power Analysis for the Behavioral Sciences, 1988 (d, h).
    [4] Phipson & Smyth, SAGMB 9 (2010): a permutation p value is never 0.
    [5] Clark, JVLVB 12 (1973): tests that hold for new items as well as new subjects (here seeds).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import stats as scipy_stats

from midblock.errors import SettingsError, UndefinedMetricError
from midblock.results import Estimate
from midblock.stats._arrays import (
    FloatArray,
    binary_vector,
    check_confidence,
    check_paired,
    matrix,
    vector,
)
from midblock.stats.intervals import (
    crossed_mean,
    mean_interval,
    mean_squares,
    paired_bootstrap,
    paired_proportion_interval,
)

__all__ = ["ARM_COLUMNS", "McNemar", "TTest", "cohens_d_paired", "cohens_h", "compare_arms", "holm",
           "mcnemar_exact", "one_sample_t", "paired_permutation", "rank_arms"]

ARM_COLUMNS = ("a", "b", "difference", "low", "high", "p", "p_holm", "effect_size", "effect", "test",
               "n_items", "n_seeds")


@dataclass(frozen=True, slots=True)
class McNemar:
    """Two-sided exact p and the items that only one side got right."""

    p: float
    a_only: int
    b_only: int
    n: int


@dataclass(frozen=True, slots=True)
class TTest:
    """A mean with its interval, t, degrees of freedom and two-sided p."""

    interval: Estimate
    t: float
    df: int
    p: float


def mcnemar_exact(a_correct: npt.ArrayLike, b_correct: npt.ArrayLike) -> McNemar:
    """Exact McNemar test of two systems' right/wrong on the same items [1].

    For one seed per arm. Answers of several seeds to one item are not independent items: do
    not concatenate them; `compare_arms` tests them with seeds and items crossed.

    Args:
        a_correct: (n,) of 0/1 or bool; ``b_correct``: the same items.

    Returns:
        p = 1 where the two sides never disagree.

    Example:
        >>> mcnemar_exact([1, 1, 1, 1, 1, 1, 0], [0, 0, 0, 0, 0, 0, 0])
        McNemar(p=0.03125, a_only=6, b_only=0, n=7)
    """
    a, b = binary_vector(a_correct, "a_correct"), binary_vector(b_correct, "b_correct")
    check_paired(a, b)
    a_only, b_only = int((a > b).sum()), int((a < b).sum())
    discordant = a_only + b_only
    p = float(scipy_stats.binomtest(a_only, discordant, 0.5).pvalue) if discordant else 1.0
    return McNemar(p, a_only, b_only, int(a.size))


def paired_permutation(a: npt.ArrayLike, b: npt.ArrayLike, replicates: int = 10_000,
                       seed: int = 0) -> float:
    """Two-sided p of the mean of a - b under random signs of the differences.

    Exact (all 2^n signs) where 2^n <= ``replicates``; otherwise (1 + hits) / (1 + replicates) [4].

    Example:
        >>> paired_permutation([1.0, 2.0, 3.0], [0.0, 0.0, 0.0])
        0.25
    """
    first, second = vector(a, "a"), vector(b, "b")
    check_paired(first, second)
    difference = first - second
    n = difference.size
    # sums that differ only by rounding must count as equal to the observed one
    observed = abs(float(difference.sum())) - 1e-12 * float(np.abs(difference).sum())
    if n < 63 and 2**n <= replicates:
        signs = 1.0 - 2.0 * ((np.arange(2**n)[:, None] >> np.arange(n)[None, :]) & 1)
        return float((np.abs(signs @ difference) >= observed).mean())
    rng = np.random.default_rng(seed)
    hits, step = 0, max(1, 4_000_000 // n)
    for start in range(0, replicates, step):
        rows = min(step, replicates - start)
        signs = rng.integers(0, 2, (rows, n), dtype=np.int8) * 2.0 - 1.0
        hits += int((np.abs(signs @ difference) >= observed).sum())
    return (1 + hits) / (1 + replicates)


def one_sample_t(values: npt.ArrayLike, mean: float = 0.0, confidence: float = 0.95) -> TTest:
    """Student's t test of a mean; NaN values are dropped.

    p is 1 where every value equals ``mean`` (a model against itself shows no change), and NaN
    where nothing varies otherwise or n < 2: without variation there is no test.

    Example:
        >>> round(one_sample_t([1.0, 2.0, 3.0]).p, 4)
        0.0742
    """
    array = vector(values, "values", drop_nan=True)
    interval = mean_interval(array, confidence)
    n = int(array.size)
    if n and bool((array == mean).all()):
        return TTest(interval, 0.0, n - 1, 1.0)
    if n < 2 or float(array.std()) <= 1e-14 * float(np.abs(array).max()):
        return TTest(interval, math.nan, max(n - 1, 0), math.nan)
    result = scipy_stats.ttest_1samp(array, mean)
    return TTest(interval, float(result.statistic), n - 1, float(result.pvalue))


def holm(pvalues: npt.ArrayLike) -> FloatArray:
    """Holm's step-down adjustment of p values [2]; NaN stay NaN and do not count as tests.

    Example:
        >>> holm([0.01, 0.04, float("nan")]).tolist()
        [0.02, 0.04, nan]
    """
    array = np.asarray(pvalues, dtype=np.float64)
    adjusted = np.full(array.shape, np.nan)
    defined = ~np.isnan(array)
    # statsmodels' multipletests gives the same but collects garbage on each call (0.1 s and more)
    p = array[defined]
    order = np.argsort(p, kind="stable")
    steps = np.minimum(1.0, np.maximum.accumulate(p[order] * np.arange(p.size, 0, -1)))
    ordered = np.empty_like(p)
    ordered[order] = steps
    adjusted[defined] = ordered
    return adjusted


def cohens_d_paired(a: npt.ArrayLike, b: npt.ArrayLike) -> float:
    """Mean of a - b over its standard deviation (d_z), unitless; 0 where a equals b throughout [3].

    Raises:
        UndefinedMetricError: fewer than two items, or a constant difference other than 0.

    Example:
        >>> cohens_d_paired([1.0, 2.0, 3.0], [0.0, 0.0, 0.0])
        2.0
    """
    first, second = vector(a, "a"), vector(b, "b")
    check_paired(first, second)
    difference = first - second
    if not difference.any():
        return 0.0
    if difference.size < 2 or float(difference.std(ddof=1)) <= 1e-14 * float(np.abs(difference).max()):
        raise UndefinedMetricError("Cohen's d of differences that do not vary has no value.")
    return float(difference.mean() / difference.std(ddof=1))


def cohens_h(p1: float, p2: float) -> float:
    """Effect size of two shares: 2 asin sqrt(p1) - 2 asin sqrt(p2), in radians [3].

    Raises:
        SettingsError: a share outside 0..1.

    Example:
        >>> round(cohens_h(0.375, 0.28), 3)
        0.203
    """
    for p in (p1, p2):
        if not 0.0 <= p <= 1.0:
            raise SettingsError(f"{p!r} is not a share between 0 and 1.")
    return 2 * math.asin(math.sqrt(p1)) - 2 * math.asin(math.sqrt(p2))


def compare_arms(scores: Mapping[str, npt.ArrayLike], *, baseline: str | None = None,
                 pairs: Sequence[tuple[str, str]] | None = None, binary: bool,
                 confidence: float = 0.95, replicates: int = 10_000, seed: int = 0,
                 pool_seeds: bool = True) -> pd.DataFrame:
    """Paired comparisons between arms that were scored on the same items.

    ==========================  ================================  ================================
    scores                      test (``test``)                   interval
    ==========================  ================================  ================================
    right/wrong, one seed       exact McNemar                     adjusted Wald, paired shares
    other scores, one seed      sign-flip permutation             paired bootstrap over items
    several seeds               crossed t: seeds and items both   the same
                                random (`crossed_mean`, [5])
    ==========================  ================================  ================================

    Right/wrong scores whose difference is the same for every item and seed are tested as one
    seed. A test on one seed speaks about new items only, not about new seeds. Two or three seeds show
    the variance between seeds badly, so with three or more arms the ratio of the seeds' to the
    residual mean square is averaged over all pairs of arms, and a comparison uses the larger of
    it and its own. By simulation (docs/statistics.md) the 5% test then has at most 5% false alarms also
    at two seeds, unless the two arms compared have several times the seed variance of the others
    (15% at three times the standard deviation): then use ``pool_seeds=False`` and more seeds.

    Args:
        scores: Arm -> (seeds, items), or (items,) for one seed; higher or lower better. Seed k
            of every arm is the same seed. A seed that failed for an arm is a row of NaN and is
            left out of that arm's comparisons.
        baseline: Compare every other arm with this one (a - baseline).
        pairs: Or compare these (a, b). Neither: all pairs in the order given.
        binary: Scores are right (1) or wrong (0).
        replicates: Of the permutation and the bootstrap.
        pool_seeds: See above.

    Returns:
        One row per comparison, columns `ARM_COLUMNS`: ``difference`` = mean(a) - mean(b) in the
        unit of the scores with its interval at ``confidence`` (not adjusted), ``p`` two-sided,
        ``p_holm`` over all rows, ``effect_size`` (``effect`` names it: Cohen's h of the shares,
        or d of the items' mean differences; NaN where undefined), and the items and seeds used.

    Raises:
        SettingsError: unknown arms, arms of different shape, both ``baseline`` and ``pairs``,
            scores other than 0 and 1 with ``binary``, or no seed in common.
    """
    check_confidence(confidence)
    arrays = {arm: matrix(s, f"scores of arm {arm!r}", missing_seeds=True) for arm, s in scores.items()}
    if len({a.shape for a in arrays.values()}) > 1:
        raise SettingsError("arms must be scored on the same seeds and items, but their shapes differ: "
                            + ", ".join(f"{arm} {a.shape}" for arm, a in arrays.items()) + ".")
    if binary:
        for arm, array in arrays.items():
            binary_vector(array[~np.isnan(array)], f"scores of arm {arm!r}")
    chosen = _pairs(list(arrays), baseline, pairs)
    ratio, ratio_df = _pooled_seed_ratio(arrays) if pool_seeds else (None, 0.0)
    rows = [_compare(a, b, arrays[a], arrays[b], binary=binary, confidence=confidence,
                     replicates=replicates, seed=seed, ratio=ratio, ratio_df=ratio_df)
            for a, b in chosen]
    frame = pd.DataFrame(rows, columns=list(ARM_COLUMNS))
    frame["p_holm"] = holm(frame["p"].to_numpy(dtype=np.float64))
    return frame


def _pairs(arms: list[str], baseline: str | None,
           pairs: Sequence[tuple[str, str]] | None) -> list[tuple[str, str]]:
    if baseline is not None and pairs is not None:
        raise SettingsError("give a baseline or pairs of arms, not both.")
    if baseline is not None:
        chosen = [(arm, baseline) for arm in arms if arm != baseline]
    elif pairs is not None:
        chosen = list(pairs)
    else:
        chosen = list(itertools.combinations(arms, 2))
    named = {arm for pair in chosen for arm in pair} | ({baseline} if baseline is not None else set())
    unknown = sorted(named - set(arms))
    if unknown:
        raise SettingsError(f"no scores for arm {', '.join(map(repr, unknown))}; there are: "
                            f"{', '.join(arms) or 'none'}.")
    for a, b in chosen:
        if a == b:
            raise SettingsError(f"arm {a!r} cannot be compared with itself.")
    return chosen


def _common(a: FloatArray, b: FloatArray) -> tuple[FloatArray, FloatArray]:
    """The seeds that both arms have."""
    keep = ~np.isnan(a[:, 0]) & ~np.isnan(b[:, 0])
    return a[keep], b[keep]


def _pooled_seed_ratio(arrays: Mapping[str, FloatArray]) -> tuple[float | None, float]:
    """Mean over pairs of arms of MS_seed / MS_residual of their difference, and its df.

    Each ratio is scaled by its own residual, because an arm near 0 or 1 right has little of it.
    """
    ratios = []
    for a, b in itertools.combinations(arrays.values(), 2):
        first, second = _common(a, b)
        if first.shape[0] < 2 or first.shape[1] < 2:
            continue
        ms_seed, _, ms_residual = mean_squares(first - second)
        if ms_residual > 0:
            ratios.append((ms_seed / ms_residual, first.shape[0]))
    if len(ratios) < 2:  # nothing to pool
        return None, 0.0
    seeds = min(s for _, s in ratios)
    # pairs = arms * (arms - 1) / 2 ratios share (arms - 1) * (seeds - 1) degrees of freedom
    arms = (1 + math.sqrt(1 + 8 * len(ratios))) / 2
    return float(np.mean([r for r, _ in ratios])), (arms - 1) * (seeds - 1)


def _compare(name_a: str, name_b: str, a: FloatArray, b: FloatArray, *, binary: bool, confidence: float,
             replicates: int, seed: int, ratio: float | None, ratio_df: float) -> dict[str, object]:
    a, b = _common(a, b)
    seeds, items = a.shape
    if seeds == 0:
        raise SettingsError(f"arms {name_a!r} and {name_b!r} have no seed in common; leave out the "
                            "arms that failed.")
    constant = bool((a - b == (a - b)[0, 0]).all())
    if seeds > 1 and not (binary and constant):
        mean = crossed_mean(a - b, seed_ratio=ratio, seed_ratio_df=ratio_df)
        p, test, interval = mean.p, "crossed t", mean.interval(confidence)
    elif binary:  # also where all items and seeds differ alike: a t test needs variation
        p, test = mcnemar_exact(a[0], b[0]).p, "exact McNemar"
        interval = paired_proportion_interval(a[0], b[0], confidence)
    else:
        p, test = paired_permutation(a[0], b[0], replicates, seed), "permutation"
        interval = paired_bootstrap(a[0], b[0], replicates=replicates, seed=seed, confidence=confidence)
    try:
        effect_size = (cohens_h(float(a.mean()), float(b.mean())) if binary
                       else cohens_d_paired(a.mean(axis=0), b.mean(axis=0)))
    except UndefinedMetricError:
        effect_size = math.nan
    return {"a": name_a, "b": name_b, "difference": interval.value, "low": interval.low,
            "high": interval.high, "p": p, "p_holm": math.nan, "effect_size": effect_size,
            "effect": "cohens_h" if binary else "cohens_d", "test": test, "n_items": items,
            "n_seeds": seeds}


def rank_arms(replicates: Mapping[str, npt.ArrayLike], *, confidence: float = 0.95,
              larger_is_better: bool = True) -> pd.DataFrame:
    """How sure the ranking of the arms is, from paired bootstrap replicates.

    Args:
        replicates: Arm -> (B,), as `hierarchical_arms_bootstrap` gives (same draws in each arm).

    Returns:
        One row per arm, best expected rank first: ``arm``, ``best`` (share of the replicates in
        which it is best; ties share the win), ``expected_rank`` (1 is best), ``rank_low`` and
        ``rank_high`` (percentile interval of the rank).

    Example:
        >>> rank_arms({"x": [3.0, 3.0], "y": [1.0, 3.0]})[["arm", "best", "expected_rank"]].values.tolist()
        [['x', 0.75, 1.25], ['y', 0.25, 1.75]]
    """
    check_confidence(confidence)
    if not replicates:
        raise SettingsError("no arms were given to rank.")
    columns = {arm: vector(r, f"replicates of arm {arm!r}") for arm, r in replicates.items()}
    if len({c.size for c in columns.values()}) > 1:
        raise SettingsError("arms must have the same number of replicates, from the same draws.")
    values = np.stack(list(columns.values()), axis=1) * (1.0 if larger_is_better else -1.0)
    ranks = scipy_stats.rankdata(-values, axis=1, method="average")
    winners = values == values.max(axis=1, keepdims=True)
    tail = (1 - confidence) / 2
    low, high = np.quantile(ranks, [tail, 1 - tail], axis=0)
    frame = pd.DataFrame({"arm": list(columns),
                          "best": (winners / winners.sum(axis=1, keepdims=True)).mean(axis=0),
                          "expected_rank": ranks.mean(axis=0), "rank_low": low, "rank_high": high})
    return frame.sort_values("expected_rank", kind="stable", ignore_index=True)
