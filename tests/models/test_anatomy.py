"""Anatomy on every family: parts, read-out, classification, and what must be refused."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as tf
from peft import LoraConfig, get_peft_model
from torch import nn

from families import BLOCKS, DECODER_ONLY, FAMILIES, HIDDEN, VOCAB, token_ids
from midblock.errors import ArchitectureError
from midblock.models.anatomy import (
    attention_of,
    check_read_out,
    find_anatomy,
    kind_of,
    projections,
    split_fused,
    text_config,
)

EXPECTED = {  # blocks, embeddings, final norm: written down by hand from the families' own code
    "llama": ("model.layers", "model.embed_tokens", "model.norm"),
    "gemma3_nested": ("model.language_model.layers", "model.language_model.embed_tokens",
                      "model.language_model.norm"),
    "gpt2": ("transformer.h", "transformer.wte", "transformer.ln_f"),
    "gpt_neox": ("gpt_neox.layers", "gpt_neox.embed_in", "gpt_neox.final_layer_norm"),
    "opt": ("model.decoder.layers", "model.decoder.embed_tokens", "model.decoder.final_layer_norm"),
    "t5": ("decoder.block", "decoder.embed_tokens", "decoder.final_layer_norm"),
    "bart": ("model.decoder.layers", "model.decoder.embed_tokens", None),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_are_found(family: str) -> None:
    model = FAMILIES[family]()
    anatomy = find_anatomy(model)
    blocks, embeddings, norm = EXPECTED.get(family, EXPECTED["llama"])
    assert (anatomy.blocks_path, anatomy.embeddings_path) == (blocks, embeddings)
    assert anatomy.final_norm_path == norm
    assert anatomy.head_path == "lm_head"
    assert (anatomy.num_blocks, anatomy.hidden_size, anatomy.vocab_size) == (BLOCKS, HIDDEN, VOCAB)
    for path, part in ((anatomy.embeddings_path, anatomy.embeddings), (anatomy.head_path, anatomy.head),
                       (anatomy.body_path, anatomy.body), (anatomy.block_path(2), anatomy.blocks[2])):
        assert model.get_submodule(path) is part
    assert anatomy.tied is (anatomy.head.weight is anatomy.embeddings.weight)
    assert anatomy.tied is model.config.tie_word_embeddings
    names = [n for n, _ in model.named_parameters()]
    owners = [anatomy.block_of(n) for n in names]
    for b, block in enumerate(anatomy.blocks):
        assert owners.count(b) == len(list(block.parameters()))
    assert anatomy.block_of(anatomy.embeddings_path + ".weight") is None


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("training", [False, True])
def test_read_out_of_the_last_hidden_gives_the_models_logits(family: str, training: bool) -> None:
    model = FAMILIES[family]().train(training)
    assert check_read_out(model, token_ids()) == 0.0
    assert all(m.training is training for m in model.modules())


@pytest.mark.parametrize("family", ["gemma2", "granite", "cohere", "t5"])
def test_read_out_is_more_than_norm_and_head_where_the_family_scales(family: str) -> None:
    anatomy = find_anatomy(FAMILIES[family]())
    hidden = torch.randn(2, 5, HIDDEN, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        plain = anatomy.head(anatomy.normed(hidden))
        full = anatomy.read_out(hidden)
    assert (plain - full).abs().max() > 0.05
    if family == "gemma2":
        torch.testing.assert_close(full, 5.0 * torch.tanh(plain / 5.0))
    if family == "granite":
        torch.testing.assert_close(full, plain / 3.0)
    if family == "cohere":
        torch.testing.assert_close(full, plain * 0.25)
    if family == "t5":
        torch.testing.assert_close(full, plain * HIDDEN**-0.5)


@pytest.mark.parametrize("family", ["llama", "gemma2", "bart"])
def test_read_out_keeps_leading_shape_and_gradients(family: str) -> None:
    anatomy = find_anatomy(FAMILIES[family]())
    hidden = torch.randn(7, HIDDEN, generator=torch.Generator().manual_seed(1), requires_grad=True)
    logits = anatomy.read_out(hidden)
    assert logits.shape == (7, VOCAB)
    torch.testing.assert_close(logits, anatomy.read_out(hidden.view(1, 7, HIDDEN))[0])
    logits.pow(2).sum().backward()
    assert hidden.grad is not None
    assert torch.isfinite(hidden.grad).all()
    assert hidden.grad.abs().sum() > 0
    assert "forward" not in anatomy.body.__dict__  # the body is its own again


def test_bart_logit_bias_is_part_of_the_read_out() -> None:
    model = FAMILIES["bart"]()
    model.final_logits_bias.fill_(1.5)
    anatomy = find_anatomy(model)
    hidden = torch.randn(1, 3, HIDDEN, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(anatomy.read_out(hidden), anatomy.head(hidden) + 1.5)


def test_final_norm_is_found_even_under_another_name() -> None:
    config = tf.Lfm2Config(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, layer_types=["conv", "full_attention"])
    model = tf.Lfm2ForCausalLM(config).eval()
    nn.init.uniform_(model.model.embedding_norm.weight, 0.5, 2.0)
    anatomy = find_anatomy(model)
    assert anatomy.final_norm_path == "model.embedding_norm"
    assert check_read_out(model, token_ids()) == 0.0


def test_peft_wrapped_model() -> None:
    model = FAMILIES["llama"]()
    wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"], r=2))
    anatomy = find_anatomy(wrapped)
    assert wrapped.get_submodule(anatomy.blocks_path) is model.model.layers
    assert anatomy.block_of("base_model.model.model.layers.3.self_attn.q_proj.lora_A.default.weight") == 3
    assert check_read_out(wrapped, token_ids()) == 0.0
    found = projections(anatomy.blocks[0])
    assert found["self_attn.q_proj.base_layer.weight"].module == "self_attn.q_proj"
    assert found["self_attn.q_proj.base_layer.weight"].kind == "q"
    assert not any("lora" in name for name in found)


def test_adapter_names_are_understood_by_the_bare_models_anatomy() -> None:
    anatomy = find_anatomy(FAMILIES["gpt2"]())
    assert anatomy.block_of("base_model.model.transformer.h.11.attn.c_attn.lora_A.weight") == 11
    assert anatomy.block_of("transformer.h") is None
    assert anatomy.block_of("transformer.hx.1.weight") is None


def test_meta_model_needs_no_weights() -> None:
    with torch.device("meta"):
        model = tf.LlamaForCausalLM(FAMILIES["llama"]().config)
    anatomy = find_anatomy(model)
    assert anatomy.num_blocks == BLOCKS
    assert anatomy.final_norm_path == "model.norm"


def test_body_without_a_head_is_refused() -> None:
    with pytest.raises(ArchitectureError, match="no language-model head"):
        find_anatomy(FAMILIES["llama"]().model)


def test_no_list_of_the_configs_length_names_the_lists_there_are() -> None:
    model = FAMILIES["llama"]()
    model.config.num_hidden_layers = 7
    with pytest.raises(ArchitectureError, match=r"7 blocks.*none fits.*model\.layers \(4\)"):
        find_anatomy(model)


def test_two_lists_that_fit_are_refused() -> None:
    model = FAMILIES["llama"]()
    model.model.mirror = copy.deepcopy(model.model.layers)
    with pytest.raises(ArchitectureError, match=r"2 fit \(model\.layers, model\.mirror\)"):
        find_anatomy(model)


def test_step_between_norm_and_head_is_refused() -> None:
    config = tf.OPTConfig(vocab_size=VOCAB, hidden_size=HIDDEN, ffn_dim=64, num_hidden_layers=2,
                          num_attention_heads=4, max_position_embeddings=64, word_embed_proj_dim=16)
    with pytest.raises(ArchitectureError, match="project_out"):
        find_anatomy(tf.OPTForCausalLM(config).eval())


def test_scaling_hidden_in_the_body_is_refused() -> None:
    model = FAMILIES["llama"]()
    original = model.model.forward

    def scaled(*args: object, **kwargs: object) -> object:
        output = original(*args, **kwargs)
        output.last_hidden_state = output.last_hidden_state * 1.01
        return output

    model.model.forward = scaled
    with pytest.raises(ArchitectureError, match="more than the final norm"):
        find_anatomy(model)


def test_not_a_transformers_model() -> None:
    with pytest.raises(ArchitectureError, match="no transformers model"):
        find_anatomy(nn.Sequential(nn.Linear(2, 2)))


# -- kinds ------------------------------------------------------------------------------------

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
