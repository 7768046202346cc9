"""LoRA on a base held in 4 bit: where bitsandbytes is installed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.utils.integrations import dequantize_module_weight

from midblock.data import load_data
from midblock.errors import SettingsError
from midblock.models import load_model
from midblock.tuning import TrainSettings, tune

pytest.importorskip("bitsandbytes", reason="the extra 'quantized' is not installed")


@pytest.fixture
def quantised(smollm2_folder: Path) -> Any:
    return load_model(smollm2_folder, dtype="bfloat16", load_4bit=True)


@pytest.mark.slow
def test_a_4bit_base_is_tuned_checked_and_its_adapter_fits_the_plain_base(quantised: Any, smollm2_folder: Path,
                                                                         tmp_path: Path) -> None:
    plain = load_model(smollm2_folder, dtype="bfloat16")
    before = {n: p.detach().clone() for n, p in quantised.model.named_parameters()}
    result = tune(quantised, load_data("arithmetic", split="train"), mask="00100", samples=32, max_length=128,
                  settings=TrainSettings(epochs=2), eval_data="arithmetic", eval_samples=16, out=tmp_path / "out")
    assert result.plan.model_params == plain.model.num_parameters()
    assert result.check.ok
    assert result.held_out["difference"].high < 0
    assert all(torch.equal(p, before[n]) for n, p in quantised.model.named_parameters())
    # the update is measured against the weights that the products see
    layer = quantised.model.model.layers[12].self_attn.q_proj
    size = dequantize_module_weight(layer).float().norm().item()
    update, = (u for u in result.check.updates if u.name == "model.layers.12.self_attn.q_proj")
    assert update.relative == pytest.approx(update.norm / size, rel=1e-3)
    again = load_model(smollm2_folder, dtype="bfloat16", adapter=result.adapter)
    assert again.adapter is not None
    config = json.loads((result.adapter / "adapter_config.json").read_text())
    assert config["r"] == result.plan.rank


@pytest.mark.slow
def test_merging_into_4bit_weights_is_refused_before_training(quantised: Any, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="quantised"):
        tune(quantised, "arithmetic", mask="00100", samples=8, merge=True, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
