"""Settings of `midblock profile`."""

from __future__ import annotations

import pytest

from midblock.errors import SettingsError
from midblock.settings import ProfileSettings, StabilitySettings


def test_presets_set_what_was_not_given() -> None:
    s = ProfileSettings(paper=True, token_samples=7)
    assert (s.samples, s.token_samples) == (1000, 7)
    s = ProfileSettings(paper_code=True, energy=False)
    assert (s.unit_rows, s.energy, s.sparsity_relative) == (True, False, True)
    assert ProfileSettings(earlier_code=True).sparsity_relative


def test_one_view_is_none() -> None:
    with pytest.raises(SettingsError, match="views must be 0 or 2 to 16, got 1"):
        ProfileSettings(views=1)
    assert ProfileSettings(views=2).views == 2


def test_resampling() -> None:
    assert ProfileSettings().resampling == "first-order"
    assert StabilitySettings(exact_bootstrap=True, seeds=3).resampling == "exact"
