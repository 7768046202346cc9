"""The smallest detectable difference: closed forms, statsmodels and simulated power."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import norm
from statsmodels.stats.power import TTestIndPower

from midblock.errors import SettingsError
from midblock.stats import compare_arms, equivalence_margin
from midblock.stats import minimum_detectable_difference as mdd


def test_the_papers_n_is_near_nine_points_unpaired():
    half_width = 1.96 * math.sqrt(2 * 0.3 * 0.7 / 200)
    assert half_width == pytest.approx(0.09, abs=0.0005)
    assert mdd(200, base_rate=0.3, paired=False, power=0.5) == pytest.approx(half_width, abs=0.004)
    assert mdd(200, base_rate=0.3, paired=False) > half_width
    assert mdd(200, base_rate=0.3, paired=True) < mdd(200, base_rate=0.3, paired=False)


def test_real_scores_equal_statsmodels_for_many_items():
    d = TTestIndPower().solve_power(nobs1=2000, alpha=0.05, power=0.8)
    assert mdd(2000, paired=False, binary=False, sd=3.0) == pytest.approx(3 * d, rel=0.002)


def tables(rng, arms, seeds, items, correlation, seed_correlation, seed_sd):
    """Normal scores of arms, seeds and items with these correlations, and means that vary from seed to seed."""
    parts = (correlation, (1, 1, items)), (seed_correlation - correlation, (arms, 1, items)), (
        1 - seed_correlation, (arms, seeds, items)), (seed_sd**2, (arms, seeds, 1))
    return sum(math.sqrt(v) * rng.normal(size=shape) for v, shape in parts)


@pytest.mark.parametrize(("arms", "seeds", "items", "seed_correlation", "seed_sd"), [
    (2, 3, 200, 0.5, 0.0), (2, 3, 200, 0.7, 0.03), (6, 2, 100, 0.6, 0.05), (6, 5, 60, 0.8, 0.1)])
def test_the_power_that_the_test_itself_has(arms, seeds, items, seed_correlation, seed_sd):
    """At the difference, and within the margin, that are announced for a power of 0.8, `compare_arms` has it."""
    m, rounds = arms - 1, 200
    guess = {"binary": False, "correlation": 0.5, "seed_correlation": seed_correlation, "seed_sd": seed_sd,
             "arms": arms, "comparisons": m}
    delta, margin = mdd(items, seeds, **guess), equivalence_margin(items, seeds, **guess)
    rng = np.random.default_rng(items)
    seen, within = [], []
    for _ in range(rounds):
        y = tables(rng, arms, seeds, items, 0.5, seed_correlation, seed_sd)
        named = {str(i): t for i, t in enumerate(y)}
        told = compare_arms(named, baseline="0", binary=False, confidence=1 - 0.1 / m)
        within.append(((told["low"] >= -margin) & (told["high"] <= margin)).mean())
        named["0"] = named["0"] - delta
        told = compare_arms(named, baseline="0", binary=False, confidence=1 - 0.05 / m)
        seen.append((told["low"] > 0).mean())
    # independent rounds: three standard errors
    allowed = 3 * math.sqrt(0.8 * 0.2 / rounds)
    assert np.mean(seen) == pytest.approx(0.8, abs=allowed)
    assert np.mean(within) == pytest.approx(0.8, abs=allowed)


def test_right_and_wrong_have_the_power_too():
    """Thresholded normals, whose correlations are measured on a pilot and handed to the formula."""
    rng = np.random.default_rng(0)
    items, seeds, base = 300, 3, 0.3

    def draw(rate):
        y = tables(rng, 2, seeds, items, 0.5, 0.7, 0.0)
        return (y < norm.ppf([[[rate]], [[base]]])).astype(float)

    pilot = np.stack([draw(base) for _ in range(300)])
    rho = np.corrcoef(pilot[:, 0, 0].ravel(), pilot[:, 1, 0].ravel())[0, 1]
    rho_seed = np.corrcoef(pilot[:, 0, 0].ravel(), pilot[:, 0, 1].ravel())[0, 1]
    delta = mdd(items, seeds, base, correlation=rho, seed_correlation=rho_seed)
    seen = []
    for _ in range(400):
        a, b = draw(base + delta)
        seen.append(compare_arms({"a": a, "b": b}, binary=True)["low"].iloc[0] > 0)
    assert np.mean(seen) == pytest.approx(0.8, abs=3 * math.sqrt(0.8 * 0.2 / 400))


def test_many_items_and_seeds_come_to_the_closed_form():
    """With thousands of degrees of freedom the quantiles are the normal's: two one-sided tests by hand."""
    error = math.sqrt(2 * 0.4 * 0.6 * (1 - 0.5) / 4000)
    margin = equivalence_margin(4000, base_rate=0.4, alpha=0.05, power=0.9, comparisons=5)
    assert margin == pytest.approx(error * (norm.ppf(1 - 0.05 / 5) + norm.ppf(0.95)), rel=0.005)
    assert mdd(4000, binary=False, sd=math.sqrt(0.24), power=0.9) == pytest.approx(
        error * (norm.ppf(0.975) + norm.ppf(0.9)), rel=0.005)


def test_it_falls_with_items_and_seeds_and_rises_with_comparisons():
    assert mdd(100) > mdd(400) > mdd(1600)
    assert mdd(200, 2) > mdd(200, 3) > mdd(200, 6)
    assert mdd(200, 2) > mdd(200, 1)  # which speaks of new items only, and of no other seeds
    assert mdd(200, 2, arms=8) < mdd(200, 2)
    assert mdd(200, comparisons=10) > mdd(200)
    assert mdd(200, 2, seed_sd=0.03) > mdd(200, 2)
    assert mdd(200, correlation=0.8) < mdd(200, correlation=0.2)


def test_discordance_is_another_way_to_say_correlation():
    assert mdd(200, base_rate=0.4, discordance=2 * 0.4 * 0.6 * 0.3) == pytest.approx(
        mdd(200, base_rate=0.4, correlation=0.7))
    with pytest.raises(SettingsError, match="discordance"):
        mdd(200, paired=False, discordance=0.2)
    with pytest.raises(SettingsError, match="cannot disagree"):
        mdd(200, base_rate=0.05, discordance=0.5)


def test_too_few_items_detect_nothing():
    assert mdd(3, base_rate=0.5, paired=False) == math.inf


@pytest.mark.parametrize("wrong", [{"n_items": 0}, {"n_seeds": 0}, {"base_rate": 1.0}, {"alpha": 0.0},
                                   {"power": 1.0}, {"correlation": 1.0}, {"comparisons": 0},
                                   {"seed_sd": -1.0}, {"sd": 0.0, "binary": False},
                                   {"correlation": 0.6, "seed_correlation": 0.2, "n_seeds": 4}])
def test_numbers_out_of_range(wrong):
    with pytest.raises(SettingsError):
        mdd(**{"n_items": 100, **wrong})
    with pytest.raises(SettingsError):
        equivalence_margin(**{"n_items": 100, **wrong})
