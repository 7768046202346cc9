"""Correlations against scipy, undefined pairs, coverage, and regret."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest
from scipy import stats as scipy_stats

from midblock.errors import SettingsError, UndefinedMetricError
from midblock.stats import CORRELATION_COLUMNS, correlate, correlation, holm, regret, spearman


def frame(n=31, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=n)
    return pd.DataFrame({"x": x, "y": 0.7 * x + rng.normal(size=n), "z": rng.normal(size=n)})


@pytest.mark.parametrize("method", ["pearson", "spearman"])
def test_correlate_equals_scipy(method):
    data = frame()
    found = correlate(data, method)
    assert tuple(found.columns) == CORRELATION_COLUMNS
    for row, (a, b) in zip(found.itertuples(), itertools.combinations("xyz", 2), strict=True):
        reference = getattr(scipy_stats, f"{method}r")(data[a], data[b])
        assert (row.a, row.b, row.n, row.reason) == (a, b, 31, "")
        assert (row.r, row.p) == pytest.approx((reference.statistic, reference.pvalue))
        assert row.low < row.r < row.high
    assert found.p_holm.tolist() == holm(found.p).tolist()


def test_fisher_interval_equals_scipy():
    data = frame()
    ours = correlation(data.x, data.y, confidence=0.9)
    low, high = scipy_stats.pearsonr(data.x, data.y).confidence_interval(0.9)
    assert (ours.low, ours.high) == pytest.approx((low, high))


@pytest.mark.parametrize("method", ["pearson", "spearman"])
def test_intervals_cover(method):
    rng = np.random.default_rng(1)
    rho = 0.6
    truth = rho if method == "pearson" else 6 / np.pi * np.arcsin(rho / 2)
    hits = 0
    for _ in range(600):
        x = rng.normal(size=25)
        found = correlation(x, rho * x + np.sqrt(1 - rho**2) * rng.normal(size=25), method)
        hits += found.low <= truth <= found.high
    assert 0.92 < hits / 600 < 0.98


def test_undefined_pairs_say_why_and_do_not_count_for_holm():
    data = frame()
    data["flat"] = 3.0
    data["short"] = np.where(np.arange(31) < 2, data.x, np.nan)
    found = correlate(data).set_index(["a", "b"])
    assert found.loc[("x", "flat"), "reason"] == "'flat' is constant over its 31 points."
    assert "at least 3 points, but 2" in found.loc[("x", "short"), "reason"]
    assert found.loc[("x", "flat"), ["r", "p", "p_holm", "low"]].isna().all()
    defined = found[found.reason == ""]
    assert len(defined) == 3
    assert defined.p_holm.tolist() == holm(defined.p).tolist()


def test_nan_cells_are_left_out_pair_by_pair():
    data = frame()
    data.loc[3, "y"] = np.nan
    found = correlate(data).set_index(["a", "b"])
    assert found.n.tolist() == [30, 31, 30]
    kept = data.drop(index=3)
    assert found.loc[("x", "y"), "r"] == pytest.approx(np.corrcoef(kept.x, kept.y)[0, 1])


def test_small_spearman_is_exact():
    x = np.arange(5)
    perfect = spearman(x, x**3)
    assert perfect.p == pytest.approx(2 / 120)
    assert (perfect.r, perfect.low, perfect.high) == (1.0, 1.0, 1.0)
    rng = np.random.default_rng(2)
    p = np.array([spearman(x, rng.permutation(5)).p for _ in range(3000)])
    for level in (0.05, 0.2, 0.5):
        assert (p <= level).mean() < level + 0.025
    tied = spearman([1, 1, 2, 3], [4, 4, 5, 6])
    assert tied.r == pytest.approx(1.0)
    assert np.isnan(spearman([1, 2, 3], [1, 3, 2]).low)


def test_bad_input():
    with pytest.raises(UndefinedMetricError, match="constant"):
        correlation([1, 1, 1], [1, 2, 3])
    with pytest.raises(SettingsError, match="one length"):
        correlation([1, 2], [1, 2, 3])
    with pytest.raises(SettingsError, match="neither"):
        correlation([1, 2, 3], [1, 2, 3], "kendall")  # type: ignore[arg-type]
    with pytest.raises(SettingsError, match="two quantities"):
        correlate(pd.DataFrame({"x": [1.0]}))
    with pytest.raises(SettingsError, match="'name'"):
        correlate(pd.DataFrame({"x": [1.0], "name": ["a"]}))


def test_regret():
    gains = np.array([0.1, 0.5, 0.3])
    assert regret(gains, gains) == 0.0
    assert regret(-gains, gains) == pytest.approx(0.4)
    assert regret([0, 0, 0], gains) == pytest.approx(0.5 - 0.3)  # random choice
    assert regret([1, 0, 1], gains) == pytest.approx(0.5 - 0.2)  # random among the tied
    with pytest.raises(UndefinedMetricError, match="non-finite"):
        regret([np.nan, 1, 2], gains)
    with pytest.raises(SettingsError, match="do not match"):
        regret([1, 2], gains)
    with pytest.raises(UndefinedMetricError, match="0 arms"):
        regret([], [])
