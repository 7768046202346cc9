"""Tuning families whose forwards or names differ from Llama's."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model

from families import tiny
from midblock.errors import SettingsError
from midblock.models import find_anatomy
from midblock.models.adapters import _untie
from midblock.models.attention import dense_attention
from midblock.tuning import make_plan
from midblock.tuning.adapter import attach
from midblock.tuning.kernels import lean_lora


@pytest.mark.parametrize("family", ["deepseek_v3", "afmoe", "beam", "qwen3_next", "laguna"])
def test_a_plan_on_every_linear_layer_holds_where_peft_renames_matrices(family: str) -> None:
    model = tiny(family)
    plan = make_plan(model, mask="01", rank=2, target_modules=["all-linear"])
    with attach(model, plan) as attachment:  # raises where PEFT's count is another
        assert sum(p.numel() for p in attachment.trainable.values()) == plan.params
    assert any(m.experts for m in plan.modules)


def test_a_matrix_that_peft_would_move_is_refused_for_adapters_and_trained_in_full() -> None:
    model = tiny("deepseek_v3")
    with pytest.raises(SettingsError, match="PEFT takes an adapter of it for the experts"):
        make_plan(model, blocks=[0], rank=2, target_modules=["gate_proj"])
    assert make_plan(model, blocks=[0], method="full", target_modules=["gate_proj"]).params == 32 * 64


def test_dt_proj_of_mamba_is_left_out_and_the_rest_gets_gradients() -> None:
    names = {m.name.rpartition(".")[2] for m in make_plan(
        tiny("mamba"), mask="01", rank=2, target_modules=["all-linear"]).modules}
    assert names == {"in_proj", "x_proj"}


def test_a_router_under_a_name_of_its_own_is_no_target() -> None:
    plan = make_plan(tiny("longcat_flash"), mask="01", rank=2, target_modules=["all-linear"])
    assert not [m.name for m in plan.modules if "router" in m.name]


def test_a_layer_whose_output_is_changed_in_place_can_be_trained() -> None:
    model = tiny("llama4_text")
    ids = torch.randint(4, 100, (2, 9), generator=torch.Generator().manual_seed(0))
    with attach(model, make_plan(model, mask="01", rank=2, target_modules=["all-linear"])) as attachment:
        trained = list(attachment.trainable.values())
        want = torch.autograd.grad(attachment.model(input_ids=ids, labels=ids).loss, trained)
        with lean_lora(attachment.base):
            got = torch.autograd.grad(attachment.model(input_ids=ids, labels=ids).loss, trained)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", ["deepseek_v32", "glm_moe_dsa"])
def test_a_sparse_attention_keeps_its_mask(family: str) -> None:
    model = tiny(family)
    ids = torch.randint(4, 100, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = model(input_ids=ids, use_cache=False).logits
        with dense_attention(model) as applies:
            torch.testing.assert_close(model(input_ids=ids, use_cache=False).logits, want, rtol=0, atol=0)
    assert not applies


def test_merging_into_a_weight_that_blocks_share_changes_one_block_only() -> None:
    model = tiny("zamba")
    blocks = find_anatomy(model).blocks
    shared = [n for n, p in blocks[3].named_parameters() if p is dict(blocks[1].named_parameters()).get(n)]
    assert shared
    path = next(f"model.layers.3.{n.removesuffix('.weight')}" for n in shared if n.endswith("o_proj.weight"))
    ids = torch.randint(4, 100, (1, 9), generator=torch.Generator().manual_seed(0))
    config = LoraConfig(r=2, target_modules=[path], init_lora_weights=False)
    wrapped = get_peft_model(copy.deepcopy(model), config).eval()
    with torch.no_grad():
        want = wrapped(input_ids=ids).logits
        _untie(wrapped)
        got = wrapped.merge_and_unload()(input_ids=ids).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
