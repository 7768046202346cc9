"""Share of the full gain: Fieller's interval against its closed form, coverage, and where it has no bounds."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats as scipy_stats

from midblock.errors import SettingsError
from midblock.stats import share_of_gain


def test_one_seed_equals_fiellers_closed_form():
    rng = np.random.default_rng(0)
    base = rng.normal(0, 1, 60)
    full, arm = base + 1.0 + rng.normal(0, 0.5, 60), base + 0.8 + rng.normal(0, 0.5, 60)
    found = share_of_gain(arm, full, base)
    gained, possible = arm - base, full - base
    cov = np.cov(gained, possible) / 60
    t2 = scipy_stats.t.ppf(0.975, 59) ** 2
    a = possible.mean() ** 2 - t2 * cov[1, 1]
    b = gained.mean() * possible.mean() - t2 * cov[0, 1]
    c = gained.mean() ** 2 - t2 * cov[0, 0]
    root = math.sqrt(b * b - a * c)
    assert found.value == pytest.approx(gained.mean() / possible.mean())
    assert (found.low, found.high) == pytest.approx(((b - root) / a, (b + root) / a), rel=1e-6)
    assert found.n == 60


def test_the_unit_and_sign_of_scores_do_not_matter():
    rng = np.random.default_rng(1)
    base, full, arm = rng.normal(0, 1, 50), rng.normal(2, 1, (3, 50)), rng.normal(1.5, 1, (3, 50))
    one, other = share_of_gain(arm, full, base), share_of_gain(-7 * arm, -7 * full, -7 * base)
    assert (one.value, one.low, one.high) == pytest.approx((other.value, other.low, other.high), rel=1e-6)


def test_an_unsure_full_gain_has_no_bounds():
    rng = np.random.default_rng(2)
    base = rng.normal(0, 1, 20)
    found = share_of_gain(base + rng.normal(0, 1, 20), base + 0.05 * rng.normal(0.1, 1, 20), base)
    assert math.isfinite(found.value)
    assert math.isnan(found.low)
    assert math.isnan(share_of_gain(base + 1, base, base).value)
    with pytest.raises(SettingsError, match="same seeds and items"):
        share_of_gain(base, base[:5], base)


def test_it_covers_over_seeds_and_items():
    rng = np.random.default_rng(3)
    hits = bounded = 0
    for _ in range(200):
        base = rng.normal(0, 1, 80)
        arm, full = (base + gain + rng.normal(0, 0.1, (3, 1)) + rng.normal(0, 0.6, (3, 80)) for gain in (0.9, 1.0))
        found = share_of_gain(arm, full, base)
        bounded += not math.isnan(found.low)
        hits += math.isnan(found.low) or found.low <= 0.9 <= found.high  # without bounds it holds every share
    assert bounded / 200 > 0.8
    assert 0.9 <= hits / 200 <= 1.0
