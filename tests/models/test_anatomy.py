"""Anatomy on every family: parts, read-out, classification, and what must be refused."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as tf
from peft import LoraConfig, get_peft_model
from torch import nn

from families import BLOCKS, FAMILIES, HIDDEN, VOCAB, token_ids
from midblock.errors import ArchitectureError
from midblock.models import (
    check_unembed,
    find_anatomy,
    projections,
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
def test_unembedding_of_the_last_hidden_gives_the_models_logits(family: str, training: bool) -> None:
    model = FAMILIES[family]().train(training)
    assert check_unembed(model, token_ids()) == 0.0
    assert all(m.training is training for m in model.modules())


@pytest.mark.parametrize("family", ["gemma2", "granite", "cohere", "t5"])
def test_unembedding_is_more_than_norm_and_head_where_the_family_scales(family: str) -> None:
    anatomy = find_anatomy(FAMILIES[family]())
    hidden = torch.randn(2, 5, HIDDEN, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        plain = anatomy.head(anatomy.normed(hidden))
        full = anatomy.unembed(hidden)
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
def test_unembedding_keeps_leading_shape_and_gradients(family: str) -> None:
    anatomy = find_anatomy(FAMILIES[family]())
    hidden = torch.randn(7, HIDDEN, generator=torch.Generator().manual_seed(1), requires_grad=True)
    logits = anatomy.unembed(hidden)
    assert logits.shape == (7, VOCAB)
    torch.testing.assert_close(logits, anatomy.unembed(hidden.view(1, 7, HIDDEN))[0])
    logits.pow(2).sum().backward()
    assert hidden.grad is not None
    assert torch.isfinite(hidden.grad).all()
    assert hidden.grad.abs().sum() > 0
    assert "forward" not in anatomy.body.__dict__  # the body is its own again


def test_bart_logit_bias_is_part_of_the_unembedding() -> None:
    model = FAMILIES["bart"]()
    model.final_logits_bias.fill_(1.5)
    anatomy = find_anatomy(model)
    hidden = torch.randn(1, 3, HIDDEN, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(anatomy.unembed(hidden), anatomy.head(hidden) + 1.5)


def test_final_norm_is_found_even_under_another_name() -> None:
    config = tf.Lfm2Config(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, layer_types=["conv", "full_attention"])
    model = tf.Lfm2ForCausalLM(config).eval()
    nn.init.uniform_(model.model.embedding_norm.weight, 0.5, 2.0)
    anatomy = find_anatomy(model)
    assert anatomy.final_norm_path == "model.embedding_norm"
    assert check_unembed(model, token_ids()) == 0.0


def test_peft_wrapped_model() -> None:
    model = FAMILIES["llama"]()
    wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"], r=2))
    anatomy = find_anatomy(wrapped)
    assert wrapped.get_submodule(anatomy.blocks_path) is model.model.layers
    assert anatomy.block_of("base_model.model.model.layers.3.self_attn.q_proj.lora_A.default.weight") == 3
    assert check_unembed(wrapped, token_ids()) == 0.0
    found = projections(anatomy.blocks[0])
    assert found["self_attn.q_proj.base_layer.weight"].module == "self_attn.q_proj"
    assert found["self_attn.q_proj.base_layer.weight"].kind == "q"
    assert not any("lora" in name for name in found)


def test_adapter_names_are_understood_by_the_bare_models_anatomy() -> None:
    anatomy = find_anatomy(FAMILIES["gpt2"]())
    assert anatomy.block_of("base_model.model.transformer.h.11.attn.c_attn.lora_A.weight") == 11
    assert anatomy.block_of("transformer.h") is None
    assert anatomy.block_of("transformer.hx.1.weight") is None


@pytest.mark.parametrize(("name", "block"), [
    ("model.layers.2.mlp.up_proj.weight", 2), ("_orig_mod.model.layers.2.mlp.up_proj.weight", 2),
    ("base_model.model.model.layers.3.x", 3), ("module.base_model.model.model.layers.0.x", 0),
    ("vision_model.model.layers.2.mlp.fc1.weight", None), ("audio.model.layers.0.x", None),
    ("mtp.model.layers.1.x", None)])
def test_blocks_of_other_towers_are_not_the_texts(name: str, block: int | None) -> None:
    assert find_anatomy(FAMILIES["llama"]()).block_of(name) == block
    wrapped = get_peft_model(FAMILIES["llama"](), LoraConfig(target_modules=["q_proj"]))
    assert find_anatomy(wrapped).block_of(name) == block


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
    with pytest.raises(ArchitectureError, match="not a transformers model"):
        find_anatomy(nn.Sequential(nn.Linear(2, 2)))
