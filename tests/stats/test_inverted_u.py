"""Inverted U: recovers planted shapes, against statsmodels, false alarms on monotone truths."""

from __future__ import annotations

import math

import numpy as np
import pytest
import statsmodels.api as sm

from midblock.errors import SettingsError, UndefinedMetricError
from midblock.stats import inverted_u_test

X = np.linspace(0, 1, 10)
SHAPES = {"flat": 0 * X, "rise": X, "saturates": 1 - np.exp(-5 * X), "falls": -X, "u": 4 * (X - 0.5) ** 2}


def test_fit_and_slopes_equal_statsmodels():
    rng = np.random.default_rng(0)
    y = 4 * X * (1 - X) + rng.normal(0, 0.1, 10)
    w = rng.uniform(0.5, 2, 10)
    fit = sm.WLS(y, np.stack([np.ones(10), X, X * X], axis=1), weights=w).fit()
    found = inverted_u_test(X, y, weights=w)
    assert found.coefficients == pytest.approx(tuple(fit.params))
    left, right = fit.t_test([0, 1, 0]), fit.t_test([0, 1, 2])
    assert (found.slope_left.low, found.slope_left.high) == pytest.approx(tuple(left.conf_int()[0]))
    assert (found.slope_right.low, found.slope_right.high) == pytest.approx(tuple(right.conf_int()[0]))
    assert found.p_parabola == pytest.approx(max(float(left.pvalue), float(right.pvalue)) / 2)
    assert found.peak.low < found.peak.value < found.peak.high
    assert found.error == "residuals"


def test_two_lines_equal_separate_regressions():
    y = np.array([0.0, 0.21, 0.38, 0.62, 0.81, 0.78, 0.6, 0.43, 0.19, 0.02])
    found = inverted_u_test(X, y)
    left, right = found.break_at >= X, found.break_at <= X
    assert found.break_at == X[5]
    assert found.line_slopes == pytest.approx((np.polyfit(X[left], y[left], 1)[0],
                                              np.polyfit(X[right], y[right], 1)[0]))
    fit = sm.OLS(y, np.stack([left, ~left, left * X, ~left * X], axis=1).astype(float)).fit()
    assert fit.df_resid == 6
    assert found.p == pytest.approx(max(float(fit.pvalues[2]), two_lines_right(y, found.break_at)) / 2)
    assert found.p < 0.001


def two_lines_right(y, at):
    left = at > X
    fit = sm.OLS(y, np.stack([left, ~left, left * X, ~left * X], axis=1).astype(float)).fit()
    return float(fit.pvalues[3])


def test_one_side_with_a_single_depth_beside_the_break():
    depth = np.array([0.1, 0.3, 0.5, 0.7, 0.9])
    y = np.array([0.3, 0.4, 0.3, 0.1, -0.2])
    replicates = y + np.random.default_rng(5).normal(0, 0.01, (400, 5))
    found = inverted_u_test(depth, y, replicates=replicates)
    assert found.break_at == 0.3
    assert found.line_slopes[0] == pytest.approx(0.5)
    assert found.p < 0.001


@pytest.mark.parametrize("shape", sorted(SHAPES))
@pytest.mark.parametrize("with_replicates", [False, True])
def test_false_alarms_stay_nominal_where_there_is_no_inverted_u(shape, with_replicates):
    rng = np.random.default_rng(1)
    rounds, sd = 250, 0.15
    noise = rng.normal(0, sd, (200, 10))
    hits = 0
    for _ in range(rounds):
        y = SHAPES[shape] + rng.normal(0, sd, 10)
        hits += inverted_u_test(X, y, replicates=y + noise if with_replicates else None).p < 0.05
    assert hits / rounds < 0.095  # nominal 0.05 plus three standard errors of 250 rounds


def test_the_parabola_alarms_on_a_curve_that_only_levels_off():
    """Why the headline p is that of the two lines."""
    rng = np.random.default_rng(2)
    found = [inverted_u_test(X, SHAPES["saturates"] + rng.normal(0, 0.1, 10)) for _ in range(200)]
    assert np.mean([f.p_parabola < 0.05 for f in found]) > 0.25
    assert np.mean([f.p < 0.05 for f in found]) < 0.1


def test_without_an_inner_peak_nothing_is_claimed():
    found = inverted_u_test(X, SHAPES["u"] + 0.01 * np.sin(9 * X))
    assert found.p > 0.5
    assert math.isnan(found.break_at)
    assert math.isnan(found.line_slopes[0])


def test_five_segments_with_replicates_find_a_planted_peak():
    rng = np.random.default_rng(3)
    depth = np.array([0.1, 0.3, 0.5, 0.7, 0.9])
    truth = 0.3 - 0.8 * (depth - 0.45) ** 2
    hits = 0
    for _ in range(200):
        y = truth + rng.normal(0, 0.015, 5)
        found = inverted_u_test(depth, y, replicates=y + rng.normal(0, 0.015, (400, 5)))
        hits += found.p < 0.05 and found.peak.low <= 0.45 <= found.peak.high
    assert hits / 200 > 0.85
    assert found.error == "replicates"


def test_peak_interval_covers():
    rng = np.random.default_rng(4)
    hits = 0
    for _ in range(500):
        found = inverted_u_test(X, -((X - 0.6) ** 2) + rng.normal(0, 0.03, 10))
        hits += found.peak.low <= 0.6 <= found.peak.high
    assert 0.92 < hits / 500 < 0.98


def test_unsure_curvature_gives_no_peak_interval():
    found = inverted_u_test(X, np.array([0, 1, 0, 1, 0, 1, 0, 1, 0, 1.0]))
    assert math.isnan(found.peak.low)
    assert found.p > 0.05


def test_bad_input():
    with pytest.raises(UndefinedMetricError, match="at least 5"):
        inverted_u_test([0, 0.5, 1], [1, 2, 1])
    with pytest.raises(SettingsError, match="do not match"):
        inverted_u_test(X, X[:5])
    with pytest.raises(SettingsError, match="positive"):
        inverted_u_test(X, X, weights=-X)
    with pytest.raises(SettingsError, match="replicates must"):
        inverted_u_test(X, X, replicates=np.zeros((50, 9)))
