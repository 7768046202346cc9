"""The smallest detectable difference: closed forms, statsmodels and simulated power."""

from __future__ import annotations

import math

import numpy as np
import pytest
from statsmodels.stats.power import TTestIndPower

from midblock.errors import SettingsError
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


@pytest.mark.parametrize(("paired", "seeds"), [(False, 1), (True, 1), (True, 3)])
def test_simulated_power_at_the_detectable_difference(paired, seeds):
    """Items share a normal difficulty; outcomes are thresholded latent normals, so that the
    correlation of right/wrong is measured on the simulation and handed to the formula."""
    rng = np.random.default_rng(0)
    items, rounds, base = 300, 2000, 0.3

    def draw(shift_rate, n):
        from scipy.stats import norm
        difficulty = rng.normal(size=(2, n, 1, items))
        if paired:
            difficulty[1] = difficulty[0]
        latent = math.sqrt(0.6) * difficulty + math.sqrt(0.4) * rng.normal(size=(2, n, seeds, items))
        cut = np.array([norm.ppf(base + shift_rate), norm.ppf(base)])[:, None, None, None]
        return (latent < cut).astype(float)

    pilot = draw(0.0, 300)
    rho = np.corrcoef(pilot[0].ravel(), pilot[1].ravel())[0, 1] if paired else 0.0
    delta = mdd(items, seeds, base, paired=paired, correlation=rho)
    scores = draw(delta, rounds)
    if paired:
        d = (scores[0] - scores[1]).mean(axis=1)
        z = d.mean(axis=1) / (d.std(axis=1, ddof=1) / math.sqrt(items))
    else:
        a, b = scores.mean(axis=2)
        z = (a - b).mean(axis=1) / np.sqrt(sum(s.mean(axis=1).var(axis=1) for s in scores) / items)
    assert np.mean(np.abs(z) > 1.96) == pytest.approx(0.8, abs=0.035)


def test_it_falls_with_items_and_seeds_and_rises_with_comparisons():
    assert mdd(100) > mdd(400) > mdd(1600)
    assert mdd(200, 1) > mdd(200, 2) > mdd(200, 4)
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
