"""Tests between arms: against statsmodels and scipy, and false alarms under simulated nulls."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats as scipy_stats
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_effectsize

from midblock.errors import SettingsError, UndefinedMetricError
from midblock.stats import (
    ARM_COLUMNS,
    cohens_d_paired,
    cohens_h,
    compare_arms,
    hierarchical_arms_bootstrap,
    holm,
    mcnemar_exact,
    mean_interval,
    one_sample_t,
    paired_permutation,
    rank_arms,
)

NAN = float("nan")


def binary_scores(rng, arms, seeds, items, *, item_sd=1.0, seed_sd=0.3, arm_item_sd=0.5, shift=0.0):
    """Right/wrong of equally good arms; items differ in difficulty, also per arm; seeds per arm."""
    logit = (rng.normal(0, item_sd, (1, 1, items)) + rng.normal(0, arm_item_sd, (arms, 1, items))
             + rng.normal(0, seed_sd, (arms, seeds, 1)) - 0.5)
    logit[0] += shift
    return (rng.random((arms, seeds, items)) < 1 / (1 + np.exp(-logit))).astype(float)


def false_alarms(rounds, make, **options):
    p = np.array([compare_arms(make(), **options)["p"].iloc[0] for _ in range(rounds)])
    return float((p < 0.05).mean())


def test_mcnemar_equals_statsmodels():
    rng = np.random.default_rng(0)
    a, b = rng.random(150) < 0.5, rng.random(150) < 0.4
    table = [[int((a & b).sum()), int((a & ~b).sum())], [int((~a & b).sum()), int((~a & ~b).sum())]]
    found = mcnemar_exact(a, b)
    assert found.p == pytest.approx(float(mcnemar(table, exact=True).pvalue))
    assert (found.a_only, found.b_only, found.n) == (table[0][1], table[1][0], 150)
    assert mcnemar_exact(a, a).p == 1.0


def test_mcnemar_refuses_other_scores():
    with pytest.raises(SettingsError, match=r"holds 0\.5"):
        mcnemar_exact([0.5, 1], [0, 1])
    with pytest.raises(SettingsError, match="same items"):
        mcnemar_exact([1], [0, 1])
    with pytest.raises(UndefinedMetricError, match="0 items"):
        mcnemar_exact([], [])


def test_permutation_equals_scipy_and_is_exact_for_few_items():
    rng = np.random.default_rng(1)
    a, b = rng.normal(0.5, 1, 10), rng.normal(0, 1, 10)
    reference = scipy_stats.permutation_test(
        (a, b), lambda x, y, axis: (x - y).mean(axis=axis), vectorized=True, permutation_type="samples",
        n_resamples=np.inf)
    assert paired_permutation(a, b) == pytest.approx(reference.pvalue)
    a, b = rng.normal(0.3, 1, 60), rng.normal(0, 1, 60)
    assert paired_permutation(a, b) == pytest.approx(scipy_stats.ttest_rel(a, b).pvalue, abs=0.02)
    assert paired_permutation(a, b, seed=1) == paired_permutation(a, b, seed=1)
    assert paired_permutation(a, a) == 1.0
    assert paired_permutation(a + 100, a, replicates=999) == pytest.approx(1 / 1000)  # never 0


def test_one_sample_t_equals_scipy_and_says_where_there_is_no_test():
    x = np.random.default_rng(2).normal(0.4, 1, 12)
    found = one_sample_t(np.append(x, NAN))
    reference = scipy_stats.ttest_1samp(x, 0)
    assert (found.t, found.p, found.df) == pytest.approx((reference.statistic, reference.pvalue, 11))
    assert found.interval == mean_interval(x)
    assert one_sample_t([0.0, 0.0, 0.0]).p == 1.0
    assert math.isnan(one_sample_t([0.1, 0.1, 0.1]).p)
    assert math.isnan(one_sample_t([0.3]).p)


def test_holm_equals_statsmodels_and_the_hand():
    p = np.random.default_rng(13).random(20) ** 3
    assert holm(p) == pytest.approx(multipletests(p, method="holm")[1])
    assert holm([0.01, 0.04, 0.03]).tolist() == pytest.approx([0.03, 0.06, 0.06])
    assert np.array_equal(holm([NAN, 0.02]), [NAN, 0.02], equal_nan=True)
    assert np.isnan(holm([NAN])).all()
    assert holm([0.9, 0.8]).max() <= 1.0


def test_effect_sizes():
    assert cohens_h(0.7, 0.2) == pytest.approx(proportion_effectsize(0.7, 0.2))
    with pytest.raises(SettingsError, match="share"):
        cohens_h(1.2, 0.1)
    rng = np.random.default_rng(3)
    a, b = rng.normal(1, 1, 50), rng.normal(0, 1, 50)
    assert cohens_d_paired(a, b) * math.sqrt(50) == pytest.approx(scipy_stats.ttest_rel(a, b).statistic)
    assert cohens_d_paired(a, a) == 0.0
    with pytest.raises(UndefinedMetricError, match="do not vary"):
        cohens_d_paired([2.0, 2.0], [1.0, 1.0])


def test_compare_arms_one_seed_binary_is_mcnemar():
    rng = np.random.default_rng(4)
    scores = dict(zip("abc", binary_scores(rng, 3, 1, 120)[:, 0], strict=True))
    frame = compare_arms(scores, binary=True)
    assert tuple(frame.columns) == ARM_COLUMNS
    assert list(zip(frame.a, frame.b, strict=True)) == [("a", "b"), ("a", "c"), ("b", "c")]
    assert frame.p[0] == mcnemar_exact(scores["a"], scores["b"]).p
    assert frame.p_holm.tolist() == holm(frame.p).tolist()
    assert frame.difference[1] == pytest.approx(scores["a"].mean() - scores["c"].mean())
    assert set(frame.test) == {"exact McNemar"}
    assert (frame.n_items == 120).all()
    assert (frame.n_seeds == 1).all()


def test_compare_arms_one_seed_real_scores():
    rng = np.random.default_rng(5)
    base = rng.normal(size=80)
    scores = {"x": base + 0.4 + rng.normal(0, 1, 80), "base": base}
    frame = compare_arms(scores, baseline="base", binary=False)
    row = frame.iloc[0]
    assert (row.a, row.b, row.test) == ("x", "base", "permutation")
    assert row.low < row.difference < row.high
    assert row.p < 0.05


@pytest.mark.parametrize("seeds", [1, 2, 3])
def test_compare_arms_finds_a_planted_difference(seeds):
    rng = np.random.default_rng(6)
    arms = binary_scores(rng, 4, seeds, 300, seed_sd=0.05, shift=1.5)
    frame = compare_arms(dict(zip(["good", "b", "c", "d"], arms, strict=True)), baseline="b", binary=True)
    good = frame[frame.a == "good"].iloc[0]
    assert good.difference > 0.15
    assert good.low > 0
    assert good.p_holm < 0.05
    assert good.effect_size > 0.3


@pytest.mark.parametrize(("arms", "seeds", "item_sd", "seed_sd"), [
    (2, 3, 0.5, 0.0), (2, 3, 0.5, 0.15), (2, 5, 0.5, 0.4), (6, 2, 0.5, 0.0), (6, 2, 0.5, 0.15),
    (6, 2, 0.0, 0.5), (6, 3, 1.0, 0.3)])
def test_false_alarms_stay_nominal_with_item_and_seed_variability_binary(arms, seeds, item_sd, seed_sd):
    rng = np.random.default_rng(7)
    names = [f"arm{i}" for i in range(arms)]

    def make():
        return dict(zip(names, binary_scores(rng, arms, seeds, 80, seed_sd=seed_sd, arm_item_sd=item_sd),
                        strict=True))

    rate = false_alarms(500, make, binary=True, pairs=[("arm0", "arm1")])
    assert rate < 0.08  # nominal 0.05 plus three standard errors of 500 rounds


def test_the_simulation_can_see_a_test_that_ignores_seeds():
    """Negative control: McNemar on the concatenated seeds alarms far too often on such data."""
    rng = np.random.default_rng(8)
    alarms = 0
    for _ in range(300):
        a, b = binary_scores(rng, 2, 5, 80, seed_sd=0.4)
        alarms += mcnemar_exact(a.ravel(), b.ravel()).p < 0.05
    assert alarms / 300 > 0.15


@pytest.mark.parametrize("binary", [True, False])
def test_false_alarms_one_seed_new_items(binary):
    rng = np.random.default_rng(9)

    def make():
        if binary:
            a, b = binary_scores(rng, 2, 1, 60, seed_sd=0.0)
            return {"a": a, "b": b}
        item = rng.normal(0, 3, 30)
        return {"a": item + rng.standard_t(4, 30), "b": item + rng.standard_t(4, 30)}

    rate = false_alarms(400, make, binary=binary, replicates=400)
    assert 0.005 < rate < 0.085


def test_crossed_t_interval_covers_the_true_difference():
    rng = np.random.default_rng(10)
    hits = 0
    for _ in range(400):
        item = rng.normal(0, 2, (1, 60))
        a = 0.3 + item + rng.normal(0, 0.2, (3, 1)) + rng.normal(0, 1, (3, 60)) + rng.normal(0, 0.5, (1, 60))
        b = item + rng.normal(0, 0.2, (3, 1)) + rng.normal(0, 1, (3, 60))
        row = compare_arms({"a": a, "b": b}, binary=False).iloc[0]
        hits += row.low <= 0.3 <= row.high
    assert 0.915 < hits / 400 <= 0.99


def test_compare_arms_uses_the_seeds_that_both_arms_have():
    rng = np.random.default_rng(11)
    a, b, c = binary_scores(rng, 3, 3, 50)
    b[1] = NAN
    frame = compare_arms({"a": a, "b": b, "c": c}, binary=True, pool_seeds=False)
    assert frame.n_seeds.tolist() == [2, 3, 2]
    without = compare_arms({"a": a[[0, 2]], "b": b[[0, 2]]}, binary=True)
    assert frame.p[0] == without.p[0]
    b[:] = NAN
    with pytest.raises(SettingsError, match="no seed in common"):
        compare_arms({"a": a, "b": b}, binary=True)


def test_compare_arms_without_variation():
    same = np.zeros((2, 40))
    row = compare_arms({"a": same, "b": same}, binary=True).iloc[0]
    assert (row.difference, row.p, row.effect_size) == (0.0, 1.0, 0.0)
    assert row.low < 0 < row.high
    row = compare_arms({"a": same + 1, "b": same}, binary=True).iloc[0]
    assert row.p < 1e-6
    assert row.low > 0.8
    real = compare_arms({"a": same + 0.5, "b": same}, binary=False).iloc[0]
    assert math.isnan(real.p)
    assert math.isnan(real.effect_size)


def test_compare_arms_faults():
    x = np.zeros((2, 4))
    with pytest.raises(SettingsError, match="not both"):
        compare_arms({"a": x, "b": x}, baseline="a", pairs=[("a", "b")], binary=True)
    with pytest.raises(SettingsError, match="no scores for arm 'z'"):
        compare_arms({"a": x, "b": x}, baseline="z", binary=True)
    with pytest.raises(SettingsError, match="with itself"):
        compare_arms({"a": x}, pairs=[("a", "a")], binary=True)
    with pytest.raises(SettingsError, match="shapes differ"):
        compare_arms({"a": x, "b": x[:1]}, binary=True)
    with pytest.raises(SettingsError, match="binary=False"):
        compare_arms({"a": x, "b": x + 0.3}, binary=True)
    assert compare_arms({"a": x}, binary=True).empty


def test_rank_arms_order_certainty_and_ties():
    rng = np.random.default_rng(12)
    item = rng.normal(0, 3, (1, 200))
    scores = {"low": item + rng.normal(0, 1, (2, 200)), "top": item + 2 + rng.normal(0, 1, (2, 200)),
              "mid": item + 1 + rng.normal(0, 1, (2, 200))}
    frame = rank_arms(hierarchical_arms_bootstrap(scores, 500, 0))
    assert frame.arm.tolist() == ["top", "mid", "low"]
    assert frame.best[0] > 0.99
    assert frame.best.sum() == pytest.approx(1.0)
    worst_first = rank_arms(hierarchical_arms_bootstrap(scores, 500, 0), larger_is_better=False)
    assert worst_first.arm.tolist() == ["low", "mid", "top"]
    tied = rank_arms({"a": np.ones(10), "b": np.ones(10)})
    assert tied.best.tolist() == [0.5, 0.5]
    assert tied.expected_rank.tolist() == [1.5, 1.5]
    equal = {k: item + rng.normal(0, 1, (2, 200)) for k in "ab"}
    unsure = rank_arms(hierarchical_arms_bootstrap(equal, 500, 0))
    assert unsure.rank_low.tolist() == [1, 1]
    assert unsure.rank_high.tolist() == [2, 2]
