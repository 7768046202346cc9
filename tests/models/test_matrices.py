"""What the matrices of a block are."""

from __future__ import annotations

import pytest
import torch
import transformers as tf

from families import DECODER_ONLY, FAMILIES, HIDDEN, token_ids
from midblock.models import (
    attention_of,
    find_anatomy,
    kind_of,
    projections,
    split_fused,
    text_config,
)

ATTENTION_KINDS = {
    "phi3": ["qkv", "o"], "gpt2": ["qkv", "o"], "gpt_neox": ["qkv", "o"],
}
MLP_KINDS = {
    "gpt2": ["down", "up"], "gpt_neox": ["down", "up"], "opt": ["down", "up"], "bart": ["down", "up"],
    "t5": ["down", "up"], "phi3": ["down", "gate_up"], "mixtral": ["down", "gate_up", "router"],
    "qwen3_moe": ["down", "gate_up", "router"],
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_matrix_of_a_block_is_classified(family: str) -> None:
    anatomy = find_anatomy(FAMILIES[family]())
    block = anatomy.blocks[1]
    found = projections(block)
    parameters = dict(block.named_parameters())
    assert {n for n, p in parameters.items() if p.ndim >= 2} <= set(found)
    kinds = [p.kind for p in found.values()]
    assert "other" not in kinds
    attention = sorted(k for k in kinds if k in ("q", "k", "v", "o", "qkv"))
    assert attention == sorted(ATTENTION_KINDS.get(family, ["q", "k", "v", "o"]))
    mlp = sorted(k for k in kinds if k in ("gate", "up", "down", "gate_up", "router"))
    assert mlp == MLP_KINDS.get(family, ["down", "gate", "up"])
    assert [k for k in kinds if k.startswith("cross")] == (
        [] if family in DECODER_ONLY else kinds_in_order(found, "cross"))
    for name, projection in found.items():
        assert tuple(parameters[name].shape) == projection.shape
    owner = attention_of(block)
    assert any(owner is m for m in block.modules())
    assert "Attention" in type(owner).__name__


def kinds_in_order(found: dict, prefix: str) -> list[str]:
    cross = [p.kind for p in found.values() if p.kind.startswith(prefix)]
    assert sorted(cross) == ["cross_k", "cross_o", "cross_q", "cross_v"]
    return cross


def test_conv1d_is_seen_as_transposed() -> None:
    found = projections(find_anatomy(FAMILIES["gpt2"]()).blocks[0])
    fused = found["attn.c_attn.weight"]
    assert fused.transposed
    assert fused.linear
    assert fused.shape == (HIDDEN, 3 * HIDDEN)
    assert fused.out_in == (3 * HIDDEN, HIDDEN)


@pytest.mark.parametrize(("name", "kind"), [
    ("model.layers.0.self_attn.o_proj.weight", "o"),
    ("h.3.attn.c_attn.weight", "qkv"),
    ("h.3.attn.c_proj.bias", "bias"),
    ("layers.1.block_sparse_moe.experts.3.w2.weight", "down"),
    ("encoder.layer.0.attention.self.query.weight", "q"),
    ("model.layers.0.input_layernorm.bias", "norm"),
    ("transformer.h.0.ln_1.weight", "norm"),
    ("self_attn.q_norm.weight", "norm"),
    ("self_attn.q_proj.lora_A.default.weight", "adapter"),
    ("decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", "other"),
    ("mlp.experts.gate_up_proj_bias", "bias"),
    ("backbone.layers.2.mixer.o_proj.weight", "o"),
    ("mixer.out_proj.weight", "other"),
    ("model.layers.0.self_attn.indexer.wk.weight", "other"),
    ("model.layers.0.self_attn.indexer.wq_b.weight", "other"),
    ("model.layers.0.self_attn.indexer.k_norm.weight", "norm"),
    ("", "other"),
])
def test_kind_of(name: str, kind: str) -> None:
    assert kind_of(name) == kind


def test_unmistakable_leaf_needs_no_context() -> None:
    assert kind_of("q_proj") == "q"
    assert kind_of("c_proj") == "down"


@pytest.mark.parametrize("family", ["gpt2", "phi3", "gpt_neox"])
def test_fused_split_gives_what_the_model_computes(family: str) -> None:
    """The query part of the fused weight gives the query that attention uses: zeroing the value
    part (and only it) must make the attention's context vanish."""
    model = FAMILIES[family]()
    block = find_anatomy(model).blocks[0]
    config = text_config(model)
    name, fused = next((n, p) for n, p in block.named_parameters() if kind_of(n) == "qkv")
    parts = split_fused(name, fused, config)
    assert parts is not None
    assert sum(p.numel() for p in parts.values()) == fused.numel()
    bias = dict(block.named_parameters()).get(name.removesuffix("weight") + "bias")
    attention = attention_of(block)
    seen: list[torch.Tensor] = []
    o_name = next(n.removesuffix(".weight") for n, _ in block.named_parameters() if kind_of(n) == "o"
                  and n.endswith("weight"))
    hook = block.get_submodule(o_name).register_forward_pre_hook(lambda _, args: seen.append(args[0]))

    def context_size() -> float:
        seen.clear()
        with torch.no_grad():
            model(input_ids=token_ids(1, 5))
        return seen[0].abs().max().item()

    assert context_size() > 1e-3
    with torch.no_grad():
        for part in ("q", "k"):
            saved = fused.clone()
            _zero(fused, bias, name, part, config)
            assert context_size() > 1e-3, f"zeroing {part} must not silence the values"
            fused.copy_(saved)
        _zero(fused, bias, name, "v", config)
    assert context_size() == 0.0
    hook.remove()
    assert attention is attention_of(block)


def _zero(fused: torch.Tensor, bias: torch.Tensor | None, name: str, part: str, config: object) -> None:
    for tensor in (fused, bias):
        if tensor is None:
            continue
        marks = torch.arange(tensor.numel()).view_as(tensor)
        chosen = split_fused(name, marks, config)
        assert chosen is not None
        tensor.view(-1)[chosen[part].reshape(-1)] = 0.0


def test_unknown_fused_layouts_are_not_guessed() -> None:
    config = tf.FalconConfig(hidden_size=32, num_attention_heads=4)
    assert split_fused("query_key_value", torch.zeros(48, 32), config) is None
    assert split_fused("mystery_proj", torch.zeros(96, 32), tf.LlamaConfig()) is None
