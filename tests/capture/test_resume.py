"""Resuming from a block on families that hand on more than hidden states: exact, or refused in words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf

from families import FAMILIES, token_ids
from midblock.capture import resume_at, run_blocks, verify_resume, why_not_resume
from midblock.capture.interventions import hidden_of_output, learn_outputs, passing_over, with_hidden
from midblock.data import Batch
from midblock.errors import ArchitectureError
from midblock.models import find_anatomy

SIZES: dict[str, Any] = {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 5, "num_attention_heads": 4,
                         "initializer_range": 0.1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LLAMA_LIKE = {**SIZES, "intermediate_size": 64, "num_key_value_heads": 2, "max_position_embeddings": 256}
KINDS = ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention", "full_attention"]


def gemma4(shared: int) -> tf.PreTrainedModel:
    return tf.Gemma4ForCausalLM(tf.Gemma4TextConfig(
        **LLAMA_LIKE, head_dim=8, layer_types=KINDS, sliding_window=8, hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=128, num_kv_shared_layers=shared))


T5_SIZES = {"vocab_size": 128, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 4, "num_decoder_layers": 4,
            "num_heads": 4, "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 2}
# a bias that block 0 hands on (T5, mT5), and one in every block (UMT5)
BIASES: dict[str, Callable[[], tf.PreTrainedModel]] = {
    "t5": lambda: tf.T5ForConditionalGeneration(tf.T5Config(**T5_SIZES)),
    "mt5": lambda: tf.MT5ForConditionalGeneration(tf.MT5Config(**T5_SIZES)),
    "umt5": lambda: tf.UMT5ForConditionalGeneration(tf.UMT5Config(**T5_SIZES)),
}
# blocks return a tuple whose further values the model ignores
TUPLES: dict[str, Callable[[], tf.PreTrainedModel]] = {
    "gptj": lambda: tf.GPTJForCausalLM(tf.GPTJConfig(
        vocab_size=128, n_embd=32, n_layer=5, n_head=4, n_positions=256, rotary_dim=4, bos_token_id=1, eos_token_id=2)),
    "codegen": lambda: tf.CodeGenForCausalLM(tf.CodeGenConfig(
        vocab_size=128, n_embd=32, n_layer=5, n_head=4, n_positions=256, rotary_dim=4, bos_token_id=1, eos_token_id=2)),
    "gpt_neo": lambda: tf.GPTNeoForCausalLM(tf.GPTNeoConfig(
        vocab_size=128, hidden_size=32, num_layers=4, num_heads=4, attention_types=[[["global", "local"], 2]],
        max_position_embeddings=256, bos_token_id=1, eos_token_id=2)),
    "bloom": lambda: tf.BloomForCausalLM(tf.BloomConfig(
        vocab_size=128, hidden_size=32, n_layer=5, n_head=4, bos_token_id=1, eos_token_id=2, pad_token_id=0)),
    "mpt": lambda: tf.MptForCausalLM(tf.MptConfig(
        vocab_size=128, d_model=32, n_layers=5, n_heads=4, max_seq_len=256)),
    "opt": FAMILIES["opt"] if "opt" in FAMILIES else lambda: tf.OPTForCausalLM(tf.OPTConfig(
        vocab_size=128, hidden_size=32, word_embed_proj_dim=32, ffn_dim=64, num_hidden_layers=5, num_attention_heads=4,
        max_position_embeddings=256)),
}
# blocks of several kinds, each with a return value of its own
HYBRIDS: dict[str, Callable[[], tf.PreTrainedModel]] = {
    "bamba": lambda: tf.BambaForCausalLM(tf.BambaConfig(
        **LLAMA_LIKE, attn_layer_indices=[2, 4], mamba_n_heads=8, mamba_d_head=8, mamba_n_groups=1, mamba_d_state=8,
        mamba_chunk_size=8)),
    "lfm2": lambda: tf.Lfm2ForCausalLM(tf.Lfm2Config(
        **LLAMA_LIKE, layer_types=["conv", "conv", "full_attention", "conv", "full_attention"])),
    "granitemoehybrid": lambda: tf.GraniteMoeHybridForCausalLM(tf.GraniteMoeHybridConfig(
        **LLAMA_LIKE, layer_types=["mamba", "mamba", "attention", "mamba", "attention"], mamba_n_heads=8,
        mamba_d_head=8, mamba_n_groups=1, mamba_d_state=8, mamba_chunk_size=8, num_local_experts=2,
        num_experts_per_tok=1, shared_intermediate_size=32)),
    "nemotron_h": lambda: tf.NemotronHForCausalLM(tf.NemotronHConfig(
        **LLAMA_LIKE, head_dim=8, layers_block_type=["mamba", "mlp", "attention", "mamba", "attention"],
        mamba_num_heads=8, mamba_head_dim=8, n_groups=1, ssm_state_size=8, chunk_size=8)),
    "gemma4": lambda: gemma4(0),
    "zamba2": lambda: tf.Zamba2ForCausalLM(tf.Zamba2Config(  # one attention block for several depths
        vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=5, num_attention_heads=4,
        layers_block_type=["mamba", "hybrid", "mamba", "hybrid", "mamba"], num_mem_blocks=1, mamba_d_state=8,
        mamba_ngroups=1, n_mamba_heads=8, mamba_headdim=8, chunk_size=8, adapter_rank=4, pad_token_id=0)),
}


def built(build: Callable[[], tf.PreTrainedModel]) -> tuple[tf.PreTrainedModel, Any, Batch]:
    torch.manual_seed(0)
    model = build().eval()
    ids = token_ids(3, 12)
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    return model, find_anatomy(model), Batch(indices=(0, 1, 2), input_ids=ids, attention_mask=mask)


def states_of(model, anatomy, batch) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
    states: dict[int, torch.Tensor] = {}
    last = run_blocks(model, anatomy, batch, listener=lambda h, z: states.__setitem__(h, z.clone()))
    return last, states


@pytest.mark.parametrize("name", [*TUPLES, *HYBRIDS])
def test_blocks_that_return_any_number_of_values_are_resumed_exactly(name: str) -> None:
    model, anatomy, batch = built({**TUPLES, **HYBRIDS}[name])
    verify_resume(model, anatomy)
    with torch.inference_mode():
        want, states = states_of(model, anatomy, batch)
        reasons = why_not_resume(model, anatomy, range(anatomy.num_blocks + 1))
        assert set(reasons.values()) == {None}
        for start in range(anatomy.num_blocks):
            got = run_blocks(model, anatomy, batch, start=start, hidden=states[start])
            assert torch.equal(got, want), start
    assert not any("forward" in block.__dict__ or block._forward_hooks for block in anatomy.blocks)


@pytest.mark.parametrize(("shared", "want"), [(2, {2, 3, 4}), (1, {2, 3, 4}), (0, set())])
def test_blocks_that_read_keys_and_values_of_earlier_ones_are_refused_only_where_these_are_missing(
        shared: int, want: set[int]) -> None:
    """Block 4 of 5 reads what 1 (full attention) keeps, block 3 what 2 (sliding) does."""
    model, anatomy, batch = built(lambda: gemma4(shared))
    reasons = why_not_resume(model, anatomy, range(6))
    inexact = {start for start, reason in reasons.items() if reason is not None}
    assert inexact == want
    if not shared:
        return
    with pytest.raises(ArchitectureError, match="cannot be resumed from block 4: "):
        verify_resume(model, anatomy, [1, 4])
    with torch.inference_mode():
        last, states = states_of(model, anatomy, batch)
        for start in set(range(5)) - inexact:
            assert torch.equal(run_blocks(model, anatomy, batch, start=start, hidden=states[start]), last)
        assert torch.equal(run_blocks(model, anatomy, batch), last)  # a refused trial leaves the model as it was


@pytest.mark.parametrize("name", BIASES)
def test_a_position_bias_that_is_handed_on_is_refused_and_one_in_every_block_is_exact(name: str) -> None:
    model, anatomy, batch = built(BIASES[name])
    reasons = why_not_resume(model, anatomy, range(anatomy.num_blocks))
    if name == "umt5":
        assert set(reasons.values()) == {None}
    else:
        assert [reasons[0], *map(bool, list(reasons.values())[1:])] == [None, True, True, True]
    with torch.inference_mode():
        want, states = states_of(model, anatomy, batch)
        for start in (s for s, reason in reasons.items() if reason is None):
            assert torch.equal(run_blocks(model, anatomy, batch, start=start, hidden=states[start]), want)


@pytest.mark.parametrize("error", [KeyError("full_attention"), ValueError("not enough values"), RuntimeError("shapes")])
def test_any_error_of_the_trial_is_a_reason_and_not_a_crash(error: Exception) -> None:
    model, anatomy, batch = built(FAMILIES["llama"])
    seen: list[int] = []
    block = anatomy.blocks[2]
    own = block.forward

    def needs_block_0(*args: Any, **kwargs: Any) -> Any:
        if not seen:
            raise error
        return own(*args, **kwargs)

    handle = anatomy.blocks[0].mlp.register_forward_hook(lambda *_: seen.append(1))
    before = anatomy.blocks[1].register_forward_pre_hook(lambda *_: None)
    start = anatomy.embeddings.register_forward_hook(lambda *_: seen.clear())
    block.forward = needs_block_0
    try:
        reason = why_not_resume(model, anatomy, [1])[1]
        assert type(error).__name__ in str(reason)
        with torch.inference_mode():
            run_blocks(model, anatomy, batch)
    finally:
        del block.forward
        for hook in (handle, before, start):
            hook.remove()


def test_a_model_that_does_not_run_at_all_is_refused_in_words() -> None:
    model, anatomy, _ = built(FAMILIES["llama"])

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no such kernel")

    anatomy.blocks[3].forward = broken
    try:
        with pytest.raises(ArchitectureError, match="no such kernel"):
            verify_resume(model, anatomy)
    finally:
        del anatomy.blocks[3].forward


def test_the_trial_is_remembered_and_leaves_the_mode_of_every_module() -> None:
    model, anatomy, _ = built(FAMILIES["qwen2"])
    model.train()
    anatomy.blocks[1].eval()
    modes = [m.training for m in model.modules()]
    calls: list[int] = []
    handle = anatomy.blocks[0].register_forward_hook(lambda *_: calls.append(1))
    why_not_resume(model, anatomy, [1, 2])
    assert len(calls) == 3  # the whole pass and two resumed ones
    why_not_resume(model, anatomy, [2, 1])
    assert len(calls) == 3
    handle.remove()
    assert [m.training for m in model.modules()] == modes


@pytest.mark.parametrize("output", [
    torch.zeros(1, 2), (torch.zeros(1, 2), torch.ones(3), None, 7), [torch.zeros(1, 2), torch.ones(1)],
    tf.modeling_outputs.BaseModelOutput(last_hidden_state=torch.zeros(1, 2), attentions=(torch.ones(1),))])
def test_a_block_passed_over_returns_what_it_would(output: Any) -> None:
    block, new = torch.nn.Identity(), torch.full((1, 2), 5.0)
    learn_outputs(block, output)
    anatomy: Any = type("A", (), {"blocks": (block,)})()
    made = passing_over(anatomy, 1, new)[0](torch.zeros(1, 2))
    assert type(made) is type(output)
    assert torch.equal(hidden_of_output(made), new)
    if isinstance(output, tuple | list):
        assert len(made) == len(output)
        assert not any(isinstance(value, torch.Tensor) for value in made[1:])
        assert made[3:] == output[3:]
    changed = with_hidden(output, new)
    assert type(changed) is type(output)
    assert torch.equal(hidden_of_output(changed), new)
    if isinstance(output, tuple | list):
        assert all(a is b for a, b in zip(changed[1:], output[1:], strict=True))


def test_resuming_where_there_is_no_block_is_refused() -> None:
    _, anatomy, _ = built(FAMILIES["llama"])
    with pytest.raises(ValueError, match="not a block"), resume_at(anatomy, 9, torch.zeros(1)):
        pass
