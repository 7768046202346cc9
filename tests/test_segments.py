"""The rule for early, middle and late: one place, half-open as the paper's middle of 0.2 to 0.8."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from midblock.errors import BlockRangeError
from midblock.segments import ZONES, depth, zone, zone_means


def test_both_ends_of_the_middle_belong_to_it():
    assert [zone(d) for d in (0.0, 0.1999, 0.2, 0.5, 0.8, 0.8001, 1.0)] == [
        "early", "early", "middle", "middle", "middle", "late", "late"]
    # 11 layers have depths of exactly 0.2 and 0.8, which closed intervals would count twice
    assert [zone(depth(b, 11)) for b in range(11)] == ["early"] * 2 + ["middle"] * 7 + ["late"] * 2


@pytest.mark.parametrize("wrong", [-0.01, 1.01, math.nan])
def test_a_depth_outside_the_model_is_refused(wrong):
    with pytest.raises(BlockRangeError, match="between 0 and 1"):
        zone(wrong)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=40))
def test_zone_means_agree_with_a_loop(values):
    last = len(values) - 1
    found = zone_means(range(len(values)), values, last)
    assert list(found) == list(ZONES)
    for name in ZONES:
        own = [v for b, v in enumerate(values) if zone(b / last if last else 0.0) == name]
        if own:
            assert found[name] == pytest.approx(sum(own) / len(own), abs=1e-6)
        else:
            assert math.isnan(found[name])


def test_zone_means_leave_undefined_values_out():
    found = zone_means([0, 1, 2, 3, 4, 5], [math.nan, 1.0, 2.0, 6.0, math.nan, math.nan], 5)
    assert math.isnan(found["early"])
    assert math.isnan(found["late"])
    assert found["middle"] == 3.0
    with pytest.raises(ValueError, match="shorter"):
        zone_means([0, 1], [1.0], 1)
