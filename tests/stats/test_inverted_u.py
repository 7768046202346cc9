"""Inverted U with seeds and items at random: against separate regressions, planted shapes, false alarms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import statsmodels.api as sm
from hypothesis import given
from hypothesis import strategies as st

from midblock.errors import SettingsError, UndefinedMetricError
from midblock.stats import crossed_mean, inverted_u_test

X = np.array([0.1, 0.3, 0.5, 0.7, 0.9])
SHAPES = {"flat": 0 * X, "rise": X, "rises and stays": np.minimum(X, 0.3), "stays and falls": -np.maximum(X, 0.5),
          "saturates": 1 - np.exp(-5 * X), "falls": -X, "u": 4 * (X - 0.5) ** 2}


def sweep(rng, truth, seeds=3, items=60, seed_sd=0.05, scale=0.5):
    """(seeds, items, depths): item effects shared by arms, and chance of each trained arm."""
    shape = (seeds, items, len(truth))
    return (scale * np.asarray(truth) + rng.normal(0, 0.4, (1, items, 1)) + rng.normal(0, 0.2, (1, items, len(truth)))
            + rng.normal(0, seed_sd, (seeds, 1, len(truth))) + rng.normal(0, 0.3, shape))


def test_slopes_are_those_of_interrupted_regression():
    y = sweep(np.random.default_rng(0), 4 * X * (1 - X))
    found = inverted_u_test(X, y)
    means, at = y.mean(axis=(0, 1)), found.break_at
    left, right = at >= X, at <= X
    assert found.left.value == pytest.approx(np.polyfit(X[left], means[left], 1)[0])
    assert found.right.value == pytest.approx(np.polyfit(X[right], means[right], 1)[0])
    parabola = sm.OLS(means, np.stack([np.ones(5), X, X * X], axis=1)).fit().params
    assert found.peak.value == pytest.approx(-parabola[1] / (2 * parabola[2]))
    assert found.left.low < found.left.value < found.left.high
    assert found.n_seeds == 3


def test_two_depths_are_a_crossed_difference():
    """With three depths the left slope is one difference of arms, whose error `crossed_mean` knows."""
    rng = np.random.default_rng(1)
    y = sweep(rng, [0.0, 0.5, 0.2], seeds=40, items=50)
    found = inverted_u_test([0.0, 0.5, 1.0], y)
    alone = crossed_mean(2 * (y[:, :, 1] - y[:, :, 0]))
    assert found.left.value == pytest.approx(alone.value)
    # pooled over the arms, the seeds' variance is nearly that of the two arms alone
    half = (found.left.high - found.left.low) / 2
    own = alone.interval()
    assert half == pytest.approx((own.high - own.low) / 2, rel=0.15)


@pytest.mark.parametrize("shape", sorted(SHAPES))
@pytest.mark.parametrize("seeds", [2, 3])
def test_false_alarms_stay_nominal_where_there_is_no_inverted_u(shape, seeds):
    rng = np.random.default_rng(1)
    rounds = 200
    hits = sum(inverted_u_test(X, sweep(rng, SHAPES[shape], seeds)).p < 0.05 for _ in range(rounds))
    # at most nominal, and 2.6 standard errors of that many rounds
    assert hits / rounds <= 0.05 + 2.6 * math.sqrt(0.05 * 0.95 / rounds)


def test_a_planted_peak_is_found_and_its_interval_holds_it():
    rng = np.random.default_rng(3)
    truth = 0.3 - 3.0 * (X - 0.45) ** 2
    found = [inverted_u_test(X, sweep(rng, truth, scale=1.0)) for _ in range(60)]
    assert np.mean([f.p < 0.05 for f in found]) > 0.85
    assert np.mean([f.peak.low <= 0.45 <= f.peak.high for f in found]) >= 0.88
    assert {f.break_at for f in found} <= {0.3, 0.5, 0.7}


def test_the_choice_of_the_break_is_paid_for():
    y = sweep(np.random.default_rng(4), 0.3 - 3.0 * (X - 0.45) ** 2)
    three = inverted_u_test(X[1:4], y[:, :, 1:4])
    assert three.break_at == 0.5  # one inner depth: nothing to choose, nothing to pay
    p_left = three.left
    assert p_left.n == 60


@given(st.permutations(range(5)), st.floats(0.1, 10), st.floats(-5, 5))
def test_order_scale_and_shift_change_nothing(order, scale, shift):
    y = sweep(np.random.default_rng(5), 4 * X * (1 - X))
    one = inverted_u_test(X, y)
    other = inverted_u_test(X[order], scale * y[:, :, order] + shift)
    assert other.p == pytest.approx(one.p, rel=1e-6, abs=1e-12)
    assert other.break_at == one.break_at
    assert other.left.value == pytest.approx(scale * one.left.value, rel=1e-6)


def test_unsure_curvature_gives_no_peak_interval():
    found = inverted_u_test(X, sweep(np.random.default_rng(6), 0 * X))
    assert math.isnan(found.peak.low)
    assert found.p > 0.05


def test_bad_input():
    y = sweep(np.random.default_rng(7), X)
    with pytest.raises(UndefinedMetricError, match="at least 3"):
        inverted_u_test(X[:2], y[:, :, :2])
    with pytest.raises(UndefinedMetricError, match="at least 3 distinct"):
        inverted_u_test([0.1, 0.1, 0.5], y[:, :, :3])
    with pytest.raises(UndefinedMetricError, match="one seed, chance between trainings"):
        inverted_u_test(X, y[:1])
    with pytest.raises(UndefinedMetricError, match="non-finite"):
        inverted_u_test(X, y * np.nan)
    with pytest.raises(SettingsError, match="must have shape"):
        inverted_u_test(X, y[0])
