"""Overlap of selections against enumeration of all selections."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from midblock.errors import SettingsError, UndefinedMetricError
from midblock.stats import chance_corrected, expected_jaccard, jaccard, random_share_jaccard, set_overlap


def _flags(n: int, chosen: tuple[int, ...]) -> np.ndarray:
    flags = np.zeros(n, dtype=bool)
    flags[list(chosen)] = True
    return flags


@pytest.mark.parametrize(("n", "a", "b"), [(6, 3, 3), (7, 2, 5), (5, 4, 4)])
def test_chance_is_that_of_all_selections(n: int, a: int, b: int) -> None:
    first = _flags(n, tuple(range(a)))
    every = [_flags(n, c) for c in itertools.combinations(range(n), b)]
    values = np.array([jaccard(first, other) for other in every])
    assert expected_jaccard(n, a, b) == pytest.approx(values.mean())
    for other in every:
        found = set_overlap(first, other, confidence=0.8)
        common = int((first & other).sum())
        assert found.p == pytest.approx(np.mean([int((first & o).sum()) >= common for o in every]))
        assert found.corrected == pytest.approx((found.jaccard - values.mean()) / (1 - values.mean()))
        inside = (values >= found.chance_low - 1e-12) & (values <= found.chance_high + 1e-12)
        assert inside.mean() >= 0.8


def test_the_limit_of_many_units() -> None:
    assert random_share_jaccard(0.75) == pytest.approx(0.6)
    assert expected_jaccard(20000, 15000, 15000) == pytest.approx(0.6, abs=1e-3)
    draw = np.random.default_rng(0)
    pairs = [(draw.permutation(200) < 150, draw.permutation(200) < 150) for _ in range(200)]
    measured = np.mean([set_overlap(a, b).corrected for a, b in pairs])
    assert abs(measured) < 0.02  # no overlap beyond chance
    assert np.mean([jaccard(a, b) for a, b in pairs]) == pytest.approx(0.6, abs=0.02)


def test_equal_and_disjoint_selections() -> None:
    a = np.array([True, True, False, False])
    same, other = set_overlap(a, a), set_overlap(a, ~a)
    assert (same.jaccard, same.corrected, same.shared) == (1.0, 1.0, 1.0)
    assert other.jaccard == 0.0
    assert other.corrected < 0
    assert other.p == 1.0
    everything = np.ones(4, dtype=bool)
    assert np.isnan(set_overlap(everything, everything).corrected)
    assert np.isnan(chance_corrected(1.0, 1.0))


def test_what_cannot_be_compared() -> None:
    with pytest.raises(UndefinedMetricError):
        jaccard([False, False], [False, False])
    with pytest.raises(SettingsError, match="boolean"):
        jaccard([1, 0], [True, False])
    with pytest.raises(SettingsError, match="not possible"):
        expected_jaccard(3, 4, 1)
    with pytest.raises(SettingsError):
        random_share_jaccard(1.5)
