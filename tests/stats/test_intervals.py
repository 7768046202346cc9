"""Intervals: against scipy, closed forms and simulated coverage (seeded)."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats as scipy_stats
from statsmodels.stats.proportion import proportion_confint

from midblock.errors import SettingsError, UndefinedMetricError
from midblock.stats import (
    arm_intervals,
    bootstrap_weights,
    crossed_mean,
    hierarchical_arms_bootstrap,
    jackknife_interval,
    mean_interval,
    paired_bootstrap,
    paired_proportion_interval,
    percentile_interval,
    ratio_interval,
    wilson_interval,
)

NAN = float("nan")


def covered(interval, truth):
    return interval.low <= truth <= interval.high


def test_mean_interval_equals_scipy_and_counts_what_is_left():
    x = np.random.default_rng(0).normal(3, 2, 17)
    ours = mean_interval(np.append(x, [NAN, NAN]), 0.9)
    low, high = scipy_stats.t.interval(0.9, 16, loc=x.mean(), scale=scipy_stats.sem(x))
    assert (ours.value, ours.low, ours.high) == pytest.approx((x.mean(), low, high))
    assert ours.n == 17


def test_mean_interval_of_too_few_values():
    assert math.isnan(mean_interval([]).value)
    assert mean_interval([NAN]).n == 0
    one = mean_interval([2.0, NAN])
    assert one.value == 2.0
    assert math.isnan(one.low)
    assert math.isnan(one.high)


@pytest.mark.parametrize("bad", [[1.0, math.inf], [-math.inf]])
def test_mean_interval_refuses_infinity(bad):
    with pytest.raises(UndefinedMetricError, match="1 non-finite"):
        mean_interval(bad)


@pytest.mark.parametrize("confidence", [0.0, 1.0, 95])
def test_confidence_is_a_share(confidence):
    with pytest.raises(SettingsError, match="between 0 and 1"):
        mean_interval([1.0, 2.0], confidence)


@pytest.mark.parametrize(("k", "n"), [(0, 20), (20, 20), (7, 50), (75, 200)])
def test_wilson_equals_statsmodels(k, n):
    ours = wilson_interval(k, n, 0.95)
    assert (ours.low, ours.high) == pytest.approx(proportion_confint(k, n, 0.05, method="wilson"), abs=1e-12)
    assert 0 <= ours.low <= ours.value <= ours.high <= 1


def test_wilson_bad_counts():
    assert math.isnan(wilson_interval(0, 0).value)
    with pytest.raises(SettingsError, match="5 successes of 4"):
        wilson_interval(5, 4)


@pytest.mark.parametrize("kind", ["multinomial", "dirichlet"])
def test_bootstrap_weights_give_the_standard_error_of_the_mean(kind):
    x = np.random.default_rng(1).exponential(size=40)
    weights = bootstrap_weights(40, 20_000, seed=3, kind=kind)
    assert weights.shape == (20_000, 40)
    assert np.allclose(weights.sum(axis=1), 40)
    assert (weights >= 0).all()
    means = weights @ x / 40
    expected = x.std() / math.sqrt(40 if kind == "multinomial" else 41)  # exact for each kind
    assert means.mean() == pytest.approx(x.mean(), abs=4 * expected / math.sqrt(20_000))
    assert means.std() == pytest.approx(expected, rel=0.03)
    assert np.array_equal(weights, bootstrap_weights(40, 20_000, seed=3, kind=kind))
    assert not np.array_equal(weights, bootstrap_weights(40, 20_000, seed=4, kind=kind))


def test_bootstrap_weights_kind_and_size():
    with pytest.raises(SettingsError, match="neither"):
        bootstrap_weights(4, 2, 0, kind="poisson")  # type: ignore[arg-type]
    with pytest.raises(SettingsError, match="at least 1"):
        bootstrap_weights(0, 2, 0)


def test_percentile_interval_is_the_quantiles_and_notes_undefined_replicates():
    replicates = np.arange(1001.0)
    found = percentile_interval(500.0, replicates, 0.9, n=12)
    assert (found.value, found.low, found.high, found.n) == pytest.approx((500.0, 50.0, 950.0, 12))
    few_undefined = np.where(replicates < 20, NAN, replicates)
    assert not math.isnan(percentile_interval(500.0, few_undefined).low)
    many_undefined = np.where(replicates < 100, NAN, replicates)
    assert math.isnan(percentile_interval(500.0, many_undefined).low)


def test_expanded_percentile_is_wider_and_covers_at_small_n():
    rng = np.random.default_rng(5)
    hits = {True: 0, False: 0}
    weights = bootstrap_weights(8, 1500, seed=0)
    for _ in range(1200):
        x = rng.normal(size=8)
        draws = weights @ x / 8
        for expanded in hits:
            hits[expanded] += covered(percentile_interval(x.mean(), draws, n=8, expanded=expanded), 0.0)
    assert hits[True] / 1200 == pytest.approx(0.95, abs=0.02)
    assert hits[False] / 1200 < 0.92


def test_jackknife_of_a_ratio_agrees_with_the_delta_method():
    rng = np.random.default_rng(6)
    x, y = rng.normal(5, 1, 400), rng.normal(10, 1, 400)
    deleted = (x.sum() - x) / (y.sum() - y)
    ratio = x.mean() / y.mean()
    found = jackknife_interval(ratio, deleted)
    delta = (x - ratio * y).std(ddof=1) / y.mean() / math.sqrt(400)
    assert (found.high - found.low) / 2 == pytest.approx(scipy_stats.t.ppf(0.975, 399) * delta, rel=0.01)


def test_paired_bootstrap_uses_the_pairing():
    rng = np.random.default_rng(7)
    item = rng.normal(0, 10, 300)
    a, b = item + 0.5 + rng.normal(0, 0.5, 300), item + rng.normal(0, 0.5, 300)
    found = paired_bootstrap(a, b)
    reference = mean_interval(a - b)
    assert found.value == pytest.approx(reference.value)
    assert found.low == pytest.approx(reference.low, abs=0.02)
    assert found.high == pytest.approx(reference.high, abs=0.02)
    shuffled = paired_bootstrap(a, rng.permutation(b))
    assert shuffled.high - shuffled.low > 10 * (found.high - found.low)
    median = paired_bootstrap(a, b, "median")
    assert median.value == pytest.approx(np.median(a - b))
    assert median.low < median.value < median.high
    with pytest.raises(SettingsError, match="same items"):
        paired_bootstrap(a, b[:5])


def test_paired_proportion_interval_covers_also_where_disagreement_is_rare():
    rng = np.random.default_rng(8)
    for up, down, n in ((0.03, 0.03, 60), (0.2, 0.1, 60), (0.0, 0.01, 100)):
        u = rng.random((2000, n))
        a, b = (u < up).astype(float), ((u >= up) & (u < up + down)).astype(float)
        hits = np.mean([covered(paired_proportion_interval(x, y), up - down)
                        for x, y in zip(a, b, strict=True)])
        assert hits > 0.93, (up, down, hits)
    never = paired_proportion_interval(np.ones(50), np.ones(50))
    assert never.low < 0 == never.value < never.high


def test_crossed_interval_one_seed_is_the_t_interval_over_items():
    x = np.random.default_rng(9).normal(size=30)
    assert crossed_mean(x).interval().high == pytest.approx(mean_interval(x).high)
    assert crossed_mean(x[:, None]).interval().low == pytest.approx(mean_interval(x).low)


def test_parts_of_a_crossed_mean_are_those_of_an_anova_table():
    import pandas as pd
    import statsmodels.formula.api as smf
    from statsmodels.stats.anova import anova_lm

    table = np.random.default_rng(10).normal(size=(3, 12)) + np.arange(3)[:, None] + np.arange(12) / 3
    long = pd.DataFrame([(s, i, table[s, i]) for s in range(3) for i in range(12)],
                        columns=["seed", "item", "y"])
    anova = anova_lm(smf.ols("y ~ C(seed) + C(item)", long).fit())
    seed, item, residual = (anova["mean_sq"][name] for name in ("C(seed)", "C(item)", "Residual"))
    found = crossed_mean(table)
    of_items = item - residual
    of_seeds = seed * (seed / (seed + of_items / (8 * 2**0.5))) ** 2
    assert found.parts == (pytest.approx((of_items / 36, 11)), pytest.approx((of_seeds / 36, 2)))
    assert found.half_width(0.9) ** 2 == pytest.approx(of_items / 36 * scipy_stats.t.ppf(0.95, 11) ** 2
                                                       + of_seeds / 36 * scipy_stats.t.ppf(0.95, 2) ** 2)
    pooled = crossed_mean(table, seed_ratio=2 * seed / residual, seed_ratio_df=10)
    weight = 2 * seed / (2 * seed + of_items / (8 * 10**0.5))
    assert pooled.parts[1] == pytest.approx((2 * seed * weight**2 / 36, 10))


@pytest.mark.parametrize("shift", [0.0, 0.03, 0.2, 0.5, 3.0, 400.0])
def test_p_is_where_the_interval_ends_at_zero(shift):
    rng = np.random.default_rng(21)
    table = shift + rng.normal(size=(3, 40)) + 0.2 * rng.normal(size=(3, 1)) + rng.normal(size=40)
    found = crossed_mean(table)
    for level in (0.5, 0.1, 0.01, 1e-6):
        assert (found.p < level) == (not covered(found.interval(1 - level), 0.0))
    assert 0 <= found.p <= 1
    one = crossed_mean(table[0])
    assert one.p == pytest.approx(scipy_stats.ttest_1samp(table[0], 0).pvalue)


def test_p_where_nothing_varies():
    assert crossed_mean(np.zeros((2, 5))).p == 1
    assert math.isnan(crossed_mean(np.ones((2, 5))).p)
    assert crossed_mean(np.ones((2, 5))).interval().low == 1
    assert math.isnan(crossed_mean([[3.0]]).p)
    assert math.isnan(crossed_mean([[3.0]]).interval().low)


@pytest.mark.parametrize(("seeds", "item_sd", "seed_sd"), [(2, 1.0, 0.0), (2, 1.0, 0.15), (2, 0.3, 0.5),
                                                         (3, 1.0, 0.0), (3, 1.0, 0.15), (5, 0.5, 0.3), (4, 0.0, 0.5)])
def test_crossed_interval_covers_with_item_and_seed_variability(seeds, item_sd, seed_sd):
    rng = np.random.default_rng(11)
    rounds, items = 1500, 50
    scores = (rng.normal(size=(rounds, seeds, items)) + item_sd * rng.normal(size=(rounds, 1, items))
              + seed_sd * rng.normal(size=(rounds, seeds, 1)))
    hits = np.mean([covered(crossed_mean(s).interval(), 0.0) for s in scores])
    assert 0.93 < hits < 0.975


def test_ignoring_the_seeds_would_not_cover():
    """The negative control: the same data, answers of all seeds taken as independent items."""
    rng = np.random.default_rng(12)
    scores = rng.normal(size=(500, 3, 50)) + 0.5 * rng.normal(size=(500, 3, 1))
    assert np.mean([covered(mean_interval(s.ravel()), 0.0) for s in scores]) < 0.6


def test_hierarchical_bootstrap_variance_has_both_sources():
    rng = np.random.default_rng(13)
    items_only = np.repeat(rng.normal(size=(1, 200)), 2, axis=0)
    expected = items_only[0].std(ddof=1) / math.sqrt(200)
    assert hierarchical_arms_bootstrap({"arm": items_only}, 8000, 1)["arm"].std() == pytest.approx(expected, rel=0.04)
    seeds_only = np.repeat(np.array([[0.0], [1.0]]), 200, axis=1)
    draws = hierarchical_arms_bootstrap({"arm": seeds_only}, 8000, 1)["arm"]
    # two seeds at 0 and 1: unbiased variance of their mean 0.5 / 2
    assert draws.var() == pytest.approx(0.25, rel=0.02)
    one_seed = hierarchical_arms_bootstrap({"arm": items_only[0]}, 8000, 1)["arm"]
    assert one_seed.std() == pytest.approx(expected, rel=0.04)


def test_arms_bootstrap_shares_its_draws():
    rng = np.random.default_rng(14)
    base = rng.normal(size=(3, 100))
    draws = hierarchical_arms_bootstrap({"a": base, "b": base + 0.25, "c": rng.normal(size=(3, 100))}, 500, 2)
    assert np.allclose(draws["b"] - draws["a"], 0.25)
    assert (draws["c"] - draws["a"]).std() > 0.05
    assert np.array_equal(draws["a"], hierarchical_arms_bootstrap({"arm": base}, 500, 2)["arm"])


def test_arms_bootstrap_leaves_out_a_failed_seed_for_all_arms():
    rng = np.random.default_rng(15)
    a, b = rng.normal(size=(3, 40)), rng.normal(size=(3, 40))
    b[1] = NAN
    draws = hierarchical_arms_bootstrap({"a": a, "b": b}, 300, 0)
    expected = hierarchical_arms_bootstrap({"a": a[[0, 2]], "b": b[[0, 2]]}, 300, 0)
    assert all(np.array_equal(draws[k], expected[k]) for k in draws)
    partly = b.copy()
    partly[0, 3] = NAN
    with pytest.raises(SettingsError, match="seed 0 lacks"):
        hierarchical_arms_bootstrap({"a": a, "b": partly})
    with pytest.raises(SettingsError, match="no seed"):
        hierarchical_arms_bootstrap({"a": a, "b": np.full((3, 40), NAN)})
    with pytest.raises(SettingsError, match="shapes differ"):
        hierarchical_arms_bootstrap({"a": a, "b": b[:, :5]})


def test_ratio_interval_covers_the_ratio_of_expectations():
    """Long samples have a lower loss here: the mean of their means is another quantity and is not what is covered."""
    rng = np.random.default_rng(16)
    truth, hits, means = 2 + 30 / 20.5, 0, []
    for k in range(400):
        sizes = rng.integers(1, 41, size=40).astype(float)
        totals = 2 * sizes + 30 + rng.normal(size=40) * 5  # E[total] / E[size] = (2 * 20.5 + 30) / 20.5
        interval = ratio_interval(totals, sizes, 0.9, replicates=400, seed=k)
        assert interval.value == pytest.approx(sum(totals.tolist()) / sum(sizes.tolist()))
        hits += covered(interval, truth)
        means.append((totals / sizes).mean())
    assert 0.86 < hits / 400 < 0.95  # 90% +- 2.7 standard errors, and a ratio's bias
    assert np.mean(means) > truth + 1


def test_ratio_interval_of_equal_sizes_is_a_bootstrap_of_the_mean():
    rng = np.random.default_rng(17)
    x = rng.normal(size=25)
    ours, mean = ratio_interval(4 * x, np.full(25, 4.0)), paired_bootstrap(x, np.zeros(25))
    assert (ours.value, ours.low, ours.high, ours.n) == pytest.approx((mean.value, mean.low, mean.high, mean.n))


def test_ratio_interval_of_too_few_samples_and_of_none():
    one = ratio_interval([3.0, NAN, 9.0], [2.0, 4.0, 0.0])
    assert (one.value, one.n) == (1.5, 1)
    assert math.isnan(one.low)
    assert math.isnan(ratio_interval([], []).value)
    with pytest.raises(UndefinedMetricError):
        ratio_interval([1.0, math.inf], [1.0, 1.0])
    with pytest.raises(SettingsError, match="belong together"):
        ratio_interval([1.0], [1.0, 2.0])


# -- arms ----------------------------------------------------------------------------------------


def test_one_seed_is_the_t_interval_over_items():
    scores = np.random.default_rng(0).normal(0, 1, 30)
    found, want = arm_intervals({"a": scores})["a"], mean_interval(scores)
    assert (found.value, found.low, found.high, found.n) == pytest.approx((want.value, want.low, want.high, 30))


def test_arms_share_the_ratio_of_their_seeds_with_loops():
    rng = np.random.default_rng(1)
    tables = {a: rng.normal(0, 1, (3, 20)) + rng.normal(0, 0.3, (3, 1)) + rng.normal(0, 1, 20) for a in "abc"}
    squares = {}
    for arm, y in tables.items():
        mean = y.mean()
        seed = sum(20 * (y[s].mean() - mean) ** 2 for s in range(3)) / 2
        item = sum(3 * (y[:, i].mean() - mean) ** 2 for i in range(20)) / 19
        rest = sum((y[s, i] - y[s].mean() - y[:, i].mean() + mean) ** 2 for s in range(3) for i in range(20)) / 38
        squares[arm] = seed, item, rest
    ratio = np.mean([seed / rest for seed, _, rest in squares.values()])
    found = arm_intervals(tables)
    for arm, (seed, item, rest) in squares.items():
        used = max(seed, ratio * rest)
        of_items = max(item - rest, 0)
        part = used * (used / (used + of_items / (8 * 6**0.5))) ** 2 * scipy_stats.t.ppf(0.975, 6) ** 2
        want = math.sqrt((part + of_items * scipy_stats.t.ppf(0.975, 19) ** 2) / 60)
        assert found[arm].high - found[arm].value == pytest.approx(want, rel=1e-9)


@pytest.mark.parametrize("seed_sd", [0.0, 0.2, 0.6])
@pytest.mark.parametrize("seeds", [2, 3])
def test_intervals_of_arms_cover(seeds, seed_sd):
    rng = np.random.default_rng(2)
    rounds = 400
    hits = 0
    for _ in range(rounds):
        item = rng.normal(0, 0.7, 60)
        tables = {a: 0.5 + item + rng.normal(0, 0.5, 60) + rng.normal(0, seed_sd, (seeds, 1))
                  + rng.normal(0, 0.5, (seeds, 60)) for a in "abcdef"}
        found = arm_intervals(tables)["a"]
        hits += found.low <= 0.5 <= found.high
    error = math.sqrt(0.95 * 0.05 / rounds)
    assert 0.93 - 2.6 * error <= hits / rounds <= 0.97 + 2.6 * error


def test_failed_seeds_limits_and_pooling():
    rng = np.random.default_rng(3)
    tables = {a: (rng.random((3, 40)) < 0.02).astype(float) for a in "abc"}
    tables["a"][1] = np.nan
    tables["d"] = np.full((3, 40), np.nan)
    found = arm_intervals(tables, limits=(0, 1))
    assert found["a"].low >= 0
    assert math.isnan(found["d"].value)
    assert found["a"].value == pytest.approx(tables["a"][[0, 2]].mean())
    alone = arm_intervals({"b": tables["b"]}, limits=(0, 1))["b"]
    apart = arm_intervals(tables, limits=(0, 1), pool_seeds=False)["b"]
    assert (alone.low, alone.high) == (apart.low, apart.high)
