"""Streamed analyses: the tables of those in memory, over the families."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from analysis_helpers import tiny_data
from families import FAMILIES
from midblock.analysis.gradients import gradients
from midblock.analysis.lens import lens
from midblock.analysis.profile import profile
from midblock.errors import SettingsError
from midblock.models import load_chain
from model_helpers import saved

SIZES = {"samples": 10, "batch_size": 4, "max_length": 24}


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "t5"])
def test_profile_and_lens_are_the_same_streamed(family: str, tmp_path: Path) -> None:
    specs = [str(saved(tmp_path / str(seed), family, seed=seed)) for seed in range(2)]
    data = tiny_data(10)
    tables = []
    for stream in ("never", "always"):
        chain = load_chain(specs, device="cpu", stream=stream)
        tables.append((profile(chain, data=data, token_samples=4, views=2, view_samples=4, replicates=20,
                               **SIZES).frame, lens(chain, data=data, trace=1, **SIZES).frame))
    for whole, streamed in zip(*tables, strict=True):
        pd.testing.assert_frame_equal(streamed, whole, check_exact=True)


def test_analyses_that_need_all_of_a_model_say_so(tmp_path: Path) -> None:
    chain = load_chain([str(saved(tmp_path / "a"))], device="cpu", stream="always")
    with pytest.raises(SettingsError, match=r"whole model in memory.*stream never"):
        gradients(chain, data=tiny_data(4))
