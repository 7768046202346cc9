"""Capture, resume and lockstep against transformers' own hidden states and plain forwards."""

from __future__ import annotations

import pytest
import torch

from families import DECODER_ONLY, FAMILIES, token_ids
from midblock.capture import (
    Lockstep,
    model_inputs,
    resume_at,
    run_blocks,
    verify_resume,
)
from midblock.data import Batch
from midblock.errors import ArchitectureError
from midblock.models import find_anatomy


def make_batch(seed: int = 0, rows: int = 3, length: int = 12) -> Batch:
    ids = token_ids(rows, length, seed=seed)
    mask = torch.ones_like(ids)
    mask[1, length - 3:] = 0
    return Batch(indices=tuple(range(rows)), input_ids=ids, attention_mask=mask)


def build(name: str, seed: int = 0):
    model = FAMILIES[name](seed=seed)
    return model, find_anatomy(model)


@pytest.mark.parametrize("name", DECODER_ONLY)
def test_hidden_states_are_those_of_transformers_and_the_last_is_not_normed(name):
    model, anatomy = build(name)
    batch = make_batch()
    states = {}
    with torch.inference_mode():
        last = run_blocks(model, anatomy, batch, listener=lambda h, z: states.__setitem__(h, z.clone()))
        output = model(**model_inputs(model, batch), output_hidden_states=True)
        logits = anatomy.unembed(last)
    assert sorted(states) == list(range(anatomy.num_blocks + 1))
    for h in range(anatomy.num_blocks):  # transformers' last one is normed: see docs/words.md
        torch.testing.assert_close(states[h], output.hidden_states[h], rtol=0, atol=0)
    torch.testing.assert_close(logits, output.logits, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_decoder_of_an_encoder_decoder(name):
    model, anatomy = build(name)
    batch = make_batch()
    with torch.inference_mode():
        last = run_blocks(model, anatomy, batch)
        output = model(**model_inputs(model, batch))
        torch.testing.assert_close(anatomy.unembed(last), output.logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", DECODER_ONLY)
def test_resume_is_exact_from_every_block(name):
    model, anatomy = build(name)
    verify_resume(model, anatomy)
    batch = make_batch()
    states = {}
    with torch.inference_mode():
        want = run_blocks(model, anatomy, batch, listener=lambda h, z: states.__setitem__(h, z.clone()))
        for start in range(anatomy.num_blocks):
            heard = []
            got = run_blocks(model, anatomy, batch, start=start, hidden=states[start],
                             listener=lambda h, z, heard=heard: heard.append(h))
            torch.testing.assert_close(got, want, rtol=0, atol=0)
            assert heard == list(range(start, anatomy.num_blocks + 1))


def test_resume_uses_the_given_hidden_and_not_the_tokens():
    model, anatomy = build("llama")
    verify_resume(model, anatomy)
    one, other = make_batch(seed=0), make_batch(seed=1)
    with torch.inference_mode():
        want, states = None, {}
        want = run_blocks(model, anatomy, one, listener=lambda h, z: states.__setitem__(h, z.clone()))
        got = run_blocks(model, anatomy, other, start=2, hidden=states[2])
    torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_blocks_are_restored_also_after_an_error():
    model, anatomy = build("qwen2")
    verify_resume(model, anatomy)
    batch = make_batch()
    with torch.inference_mode():
        want = run_blocks(model, anatomy, batch)
        with pytest.raises(RuntimeError, match="on purpose"), resume_at(anatomy, 3, torch.zeros_like(want)):
            raise RuntimeError("on purpose")
        assert all("forward" not in block.__dict__ for block in anatomy.blocks)
        assert not any(block._forward_pre_hooks or block._forward_hooks for block in anatomy.blocks)
        torch.testing.assert_close(run_blocks(model, anatomy, batch), want, rtol=0, atol=0)


def test_resuming_without_a_trial_is_refused():
    _, anatomy = build("llama")
    with pytest.raises(ArchitectureError, match="verify_resume"), resume_at(anatomy, 1, torch.zeros(1, 1, 1)):
        pass


@pytest.mark.parametrize("name", ["llama", "gemma3", "mixtral", "gpt2"])
def test_lockstep_equals_plain_forwards(name):
    (base, anatomy), (sft, other) = build(name, 0), build(name, 1)
    batch = make_batch()
    with torch.inference_mode():
        plain = {}
        for key, model, parts in (("base", base, anatomy), ("sft", sft, other)):
            run_blocks(model, parts, batch, listener=lambda h, z, key=key: plain.__setitem__((key, h), z.clone()))
        seen = 0
        for h, states in Lockstep({"base": (base, anatomy, batch), "sft": (sft, other, batch)}):
            for key, z in states.items():
                torch.testing.assert_close(z, plain[key, h], rtol=0, atol=0)
                seen += 1
    assert seen == 2 * (anatomy.num_blocks + 1)
    assert not any(block._forward_pre_hooks for block in anatomy.blocks)


def test_lockstep_of_a_model_with_itself_and_an_early_end():
    model, anatomy = build("llama")
    batch = make_batch()
    with torch.inference_mode():
        for h, states in Lockstep({"base": (model, anatomy, batch), "sft": (model, anatomy, batch)}):
            torch.testing.assert_close(states["base"], states["sft"], rtol=0, atol=0)
            if h == 2:
                break
    assert not any(block._forward_pre_hooks for block in anatomy.blocks)
