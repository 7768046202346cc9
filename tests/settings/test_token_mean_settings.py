"""Settings of lens, swap, merge, steer and weights: defaults, bounds, old names."""

from __future__ import annotations

import pytest

from midblock.errors import BlockRangeError, SettingsError
from midblock.settings import LensSettings, MergeSettings, SteerSettings, SwapSettings, WeightsSettings
from midblock.settings.base import as_options
from midblock.settings.steer import principal_number
from midblock.settings.token_means import TokenMeanSettings


@pytest.mark.parametrize("model", [LensSettings, SwapSettings, MergeSettings, SteerSettings])
def test_all_share_how_tokens_are_sampled_and_what_their_mean_is_taken_over(model):
    assert issubclass(model, TokenMeanSettings)
    assert not model().per_sample_mean
    with pytest.raises(SettingsError, match=r"samples must be.*batch_size must be|batch_size must be.*samples must be"):
        model(samples=0, batch_size=0)
    with as_options(), pytest.raises(SettingsError, match="--max-length must be at least 2, got 1"):
        model(max_length=1)


def test_old_names_still_work():
    assert LensSettings(earlier_code=True).paper_code
    assert WeightsSettings(spectra="auto").spectra is None
    assert WeightsSettings(spectra=False).spectra is False


def test_swap_masks_are_singles_unless_named():
    assert SwapSettings(segments=3).all_masks() == ["100", "010", "001"]
    assert SwapSettings(masks=("0110", "1000"), cumulative=True).all_masks() == [
        "0110", "1000", "1100", "1110", "1111", "0001", "0011", "0111"]


@pytest.mark.parametrize(("blocks", "want"), [(None, [0, 2, 4, 6, 9]), ("2:4,9", [2, 3, 9]), ((7, 1), [1, 7]),
                                              ([3], [3])])
def test_steer_takes_blocks_as_text_or_numbers(blocks, want):
    settings = SteerSettings() if blocks is None else SteerSettings(blocks=blocks)
    assert settings.chosen_blocks(11) == want
    assert len(SteerSettings().chosen_blocks(11)) == 5
    with pytest.raises(BlockRangeError, match="0-2"):
        SteerSettings(blocks="5").chosen_blocks(3)


def test_steer_refuses_what_has_no_meaning():
    with pytest.raises(SettingsError, match="not all 0"):
        SteerSettings(alphas=(0.0,))
    with pytest.raises(SettingsError, match=r"alphas.*number"):
        SteerSettings(alphas="a,b")
    assert SteerSettings(alphas="0,0.5,1").alphas == (0.0, 0.5, 1.0)
    with as_options(), pytest.raises(SettingsError, match="add --supervised"):
        SteerSettings(patch="prompt")
    with pytest.raises(SettingsError, match="last-prompt"):
        SteerSettings(patch="nowhere")
    assert SteerSettings(patch="prompt", supervised=True).patch == "prompt"
    for direction in ("pc0", "median", "pc", "PC1"):
        with pytest.raises(SettingsError, match="direction"):
            SteerSettings(direction=direction)
    assert [principal_number(d) for d in ("mean", "random", "pc12")] == [None, None, 12]
