"""Counts of parameters: complete, never double, and the same without the weights."""

from __future__ import annotations

import pytest
import torch

from families import FAMILIES
from midblock.errors import BlockRangeError
from midblock.models import find_anatomy
from midblock.models.skeleton import summarize
from midblock.models.summary import ModelSummary


def summary_of(family: str) -> ModelSummary:
    model = FAMILIES[family]()
    return summarize(model, find_anatomy(model), name=family, dtype="float32")


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_parameter_is_counted_once(family: str) -> None:
    model = FAMILIES[family]()
    found = summarize(model, find_anatomy(model), name=family, dtype="float32")
    in_blocks = sum(found.block_parameters(b) for b in range(found.num_blocks))
    outside = (found.embedding_parameters + found.head_parameters + found.final_norm_parameters
               + found.other_parameters)
    assert found.parameters == in_blocks + outside == sum(p.numel() for p in model.parameters())
    assert found.num_blocks == 4
    assert len(found.frame()) == 4


def test_a_llama_block_by_hand() -> None:
    found = summary_of("llama")  # d 32, 4 heads, 2 key-value heads, MLP 64, vocabulary 128
    attention = 2 * 32 * 32 + 2 * 32 * 16
    assert found.blocks[0] == {"self_attn": attention, "mlp": 3 * 32 * 64, "norms": 64}
    assert (found.embedding_parameters, found.head_parameters) == (4096, 4096)
    assert found.final_norm_parameters == 32
    assert not found.tied


def test_a_tied_head_has_no_parameters_of_its_own() -> None:
    found = summary_of("llama_tied")
    assert found.tied
    assert found.head_parameters == 0
    assert "tied" in found.text()


def test_a_vision_tower_is_not_in_the_blocks() -> None:
    nested, text = summary_of("gemma3_nested"), summary_of("gemma3")
    assert nested.blocks == text.blocks
    assert nested.other_parameters > 0
    assert nested.layer_types == ("sliding_attention",) * 3 + ("full_attention",)


def test_counts_need_no_weights() -> None:
    model = FAMILIES["qwen2"]()
    with torch.device("meta"):
        empty = type(model)(model.config)
    assert (summarize(empty, find_anatomy(empty), name="m", dtype="x")
            == summarize(model, find_anatomy(model), name="m", dtype="x"))


def test_segments_share_out_all_blocks() -> None:
    found = summary_of("llama")
    segments = found.segments(3)
    assert [(s.mask, s.first, s.stop) for s in segments] == [("100", 0, 1), ("010", 1, 2), ("001", 2, 4)]
    assert sum(s.share for s in segments) == pytest.approx(1.0)
    assert segments[2].parameters == 2 * found.block_parameters(0)
    with pytest.raises(BlockRangeError, match="4 blocks"):
        found.segments(5)
