"""The cost model against hand-written sums: a constant that is wrong by a factor of ten shows."""

from __future__ import annotations

import time

import pytest
import torch

from families import FAMILIES
from midblock.data import TokenRow
from midblock.models import find_anatomy
from midblock.settings import TrainSettings
from midblock.tuning import make_plan
from midblock.tuning.estimate import Cost, all_layer_plan, estimate, training_rate, weight_bytes

ROWS = [TokenRow(i, tuple(range(3, 3 + n)), ((n - s, n),)) for i, (n, s) in enumerate(((10, 4), (7, 3), (9, 9)))]
D, V, TOKENS, SUPERVISED = 32, 128, 26, 16


def block_parameters() -> int:
    # q, o (32, 32); k, v (16, 32); gate, up, down (64, 32); two norms
    return 2 * 32 * 32 + 2 * 16 * 32 + 3 * 64 * 32 + 2 * 32


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_operations_and_memory_are_these_sums(cached: bool, checkpointing: bool) -> None:
    model = FAMILIES["llama"]()
    anatomy = find_anatomy(model)
    plan = make_plan(model, mask="0010", rank=2)  # block 2 of 4: two before it, two from it on
    settings = TrainSettings(batch_size=2, gradient_checkpointing=checkpointing)
    cost = estimate(plan, anatomy, ROWS, settings, dtype=torch.float32, cached=cached)
    trained = 2 * (2 * (32 + 32) + 2 * (32 + 16))
    attention = 2 * D * (100 + 49 + 81)
    forward = 2 * TOKENS * block_parameters()
    prefix = 2 * (forward + attention)
    suffix = 2 * ((3 if checkpointing else 2) * forward + 3 * attention)
    updates = 6 * TOKENS * trained
    head = 4 * SUPERVISED * V * D
    assert cost.first_epoch_flops == pytest.approx(prefix + suffix + updates + head)
    assert cost.epoch_flops == pytest.approx(suffix + updates + head + (0 if cached else prefix))
    kept = (2 + 17 if checkpointing else 2 * 17) * 20 * D * 4  # two rows of at most 10 tokens
    cache = TOKENS * D * 4 if cached else 0
    assert cost.cache_bytes == cache
    assert cost.memory_bytes == 4 * sum(p.numel() for p in model.parameters()) + 16 * trained + kept + cache
    assert cost.total_flops(0.5) == pytest.approx(0.5 * cost.first_epoch_flops)
    assert cost.total_flops(3) == pytest.approx(cost.first_epoch_flops + 2 * cost.epoch_flops)


def test_all_rows_count_where_nothing_is_marked() -> None:
    model = FAMILIES["llama"]()
    plan, anatomy, settings = make_plan(model, mask="1", rank=2), find_anatomy(model), TrainSettings()
    bare = [TokenRow(r.index, r.ids, ()) for r in ROWS]
    one, other = (estimate(plan, anatomy, rows, settings, dtype=torch.float32, cached=False) for rows in (ROWS, bare))
    assert other.epoch_flops - one.epoch_flops == pytest.approx(4 * (TOKENS - SUPERVISED) * V * D)


def test_a_token_meets_the_experts_that_it_is_sent_to() -> None:
    model = FAMILIES["mixtral"]()
    plan, anatomy, settings = make_plan(model, mask="1", rank=2), find_anatomy(model), TrainSettings()
    few = estimate(plan, anatomy, ROWS, settings, dtype=torch.float32, cached=False)
    model.config.num_experts_per_tok = model.config.num_local_experts
    every = estimate(plan, anatomy, ROWS, settings, dtype=torch.float32, cached=False)
    assert few.memory_bytes == every.memory_bytes
    stacks = sum(p.numel() for p in model.model.layers.parameters() if p.ndim == 3)
    assert every.epoch_flops - few.epoch_flops == pytest.approx(4 * TOKENS * stacks / 2)  # 2 of 4 experts


def test_quantised_matrices_take_their_bits_and_the_rest_its_dtype() -> None:
    model = FAMILIES["llama"]()
    anatomy = find_anatomy(model)
    matrices = sum(p.numel() for n, p in model.model.layers.named_parameters() if p.ndim == 2)
    others = sum(p.numel() for p in model.parameters()) - matrices
    assert weight_bytes(anatomy, torch.bfloat16) == 2 * (matrices + others)
    for bits in (4, 8):
        assert weight_bytes(anatomy, torch.bfloat16, bits) == pytest.approx(
            matrices * (bits / 8 + 0.02) + 2 * others, rel=1e-4)  # whole bytes


def test_the_yardstick_is_lora_of_rank_16_everywhere() -> None:
    model = FAMILIES["llama"]()
    everything = all_layer_plan(find_anatomy(model), make_plan(model, mask="0010", rank=3, target_modules=["q"]))
    assert (everything.rank, everything.blocks, everything.targets) == (16, (0, 1, 2, 3), ("q",))


def test_the_rate_is_measured_in_under_a_second_whatever_the_width() -> None:
    import transformers

    with torch.device("meta"):
        wide = transformers.LlamaForCausalLM(transformers.LlamaConfig(
            hidden_size=4096, intermediate_size=14336, num_hidden_layers=2, num_attention_heads=32))
    begun = time.perf_counter()
    rate = training_rate(find_anatomy(wide), torch.device("cpu"), torch.float32, seconds=0.2)
    assert time.perf_counter() - begun < 20  # generous: other tests run beside it
    assert rate > 1e7
    assert Cost(1.0, 1.0, 1, 1).total_flops(2) == 2
