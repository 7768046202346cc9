"""Parts in common: equal only where nothing that computes differs."""

from __future__ import annotations

import copy

import peft
import pytest
import torch

from families import DECODER_ONLY, FAMILIES
from midblock.models import find_anatomy, shared_parts


@pytest.mark.parametrize("name", DECODER_ONLY)
def test_a_copy_shares_everything_and_another_seed_nothing(name):
    model = FAMILIES[name](seed=0)
    same, other = copy.deepcopy(model), FAMILIES[name](seed=1)
    found = shared_parts([find_anatomy(m) for m in (model, same, other)])
    assert found.inputs == (0, 0, 2)
    assert found.unembeddings == (0, 0, 2)
    assert all(own == (0, 0, 2) for own in zip(*found.blocks, strict=True))


def changed(model, path: str):
    made = copy.deepcopy(model)
    with torch.no_grad():
        made.get_parameter(path).view(-1)[0] += 1
    return made


@pytest.mark.parametrize(("path", "inputs", "second_block", "unembeddings"), [
    ("model.layers.1.mlp.up_proj.weight", 0, 1, 0), ("model.norm.weight", 0, 0, 1),
    ("lm_head.weight", 0, 0, 1), ("model.embed_tokens.weight", 1, 0, 0)])
def test_one_changed_number_is_seen_where_it_is(path, inputs, second_block, unembeddings):
    model = FAMILIES["llama"](seed=0)
    assert not find_anatomy(model).tied
    found = shared_parts([find_anatomy(model), find_anatomy(changed(model, path))])
    assert (found.inputs[1], found.blocks[1][1], found.unembeddings[1]) == (inputs, second_block, unembeddings)
    assert found.blocks[1][0] == 0


def test_equal_weights_under_another_config_are_not_the_same():
    model = FAMILIES["llama"](seed=0)
    other = copy.deepcopy(model)
    other.config.rms_norm_eps = 0.1
    found = shared_parts([find_anatomy(model), find_anatomy(other)])
    assert (found.inputs[1], found.blocks[1], found.unembeddings[1]) == (1, (1,) * 4, 1)


def test_an_adapters_scale_is_not_in_its_weights_so_its_blocks_are_its_own():
    def adapted(alpha: int):
        torch.manual_seed(0)
        config = peft.LoraConfig(r=2, lora_alpha=alpha, target_modules=["q_proj"], layers_to_transform=[1])
        return peft.get_peft_model(FAMILIES["llama"](seed=0), config)
    found = shared_parts([find_anatomy(m) for m in (adapted(2), adapted(64))])
    assert found.blocks[1] == (0, 1, 0, 0)
    assert (found.inputs[1], found.unembeddings[1]) == (0, 0)
