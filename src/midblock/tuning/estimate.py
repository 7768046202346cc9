"""What a plan will cost, before it is paid: operations, time and memory beside all-layer LoRA.

Operations per token, with P the parameters of a block and T the row's length: forward 2 P, gradient of
the inputs 2 P, gradient of trained weights 2 per trained parameter, attention 4 T d forward and twice
that backward; head 2 V d forward and 2 V d backward on labelled tokens only. A cached prefix costs
nothing. Activations of a block in 16 bit are taken as 34 d bytes per token (Korthikanti et al.,
"Reducing Activation Recomputation in Large Transformer Models", 2022, without the attention scores).
These are estimates: `midblock tune` reports what was measured.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from midblock.models import Anatomy
from midblock.tuning.plan import Plan, make_plan

__all__ = ["Cost", "estimate", "matmul_rate"]


@dataclass(frozen=True, slots=True)
class Cost:
    """Estimated cost of one plan."""

    first_epoch_flops: float
    """Floating-point operations of the epoch that fills the cache."""
    epoch_flops: float
    """Of every later epoch (equal to the first without a cache)."""
    memory_bytes: int
    """Weights, trained parameters with gradients and Adam's moments, activations of one batch, cache."""
    cache_bytes: int

    def total_flops(self, epochs: float) -> float:
        """Of a whole training."""
        return self.first_epoch_flops * min(1.0, epochs) + self.epoch_flops * max(0.0, epochs - 1.0)


def estimate(plan: Plan, anatomy: Anatomy, lengths: Sequence[int], supervised: int, *, batch_size: int,
             dtype: torch.dtype, cached: bool, checkpointing: bool = False) -> Cost:
    """Cost of a plan on rows of these lengths.

    Args:
        plan: The plan.
        anatomy: Of the model; it may be on the meta device.
        lengths: Tokens of each row.
        supervised: Labelled tokens of all rows.
        batch_size: Rows in one forward.
        dtype: Of the weights and activations.
        cached: Whether the prefix is cached.
        checkpointing: Whether activations inside blocks are recomputed.
    """
    tokens = sum(lengths)
    squares = sum(n * n for n in lengths)
    width = anatomy.hidden_size
    blocks = [sum(p.numel() for p in b.parameters()) for b in anatomy.blocks]
    prefix, running = blocks[:plan.first_block], blocks[plan.first_block:]
    attention = 4 * width * squares / 2  # causal: half of the scores
    forward_prefix = 2 * tokens * sum(prefix) + attention * len(prefix)
    rounds = 3 if checkpointing else 2  # forward, input gradients, and the second forward
    suffix = rounds * 2 * tokens * sum(running) + 3 * attention * len(running)
    trained = (2 if plan.method == "full" else 6) * tokens * plan.params
    head = 4 * supervised * anatomy.vocab_size * width
    epoch = suffix + trained + head
    size = torch.empty((), dtype=dtype).element_size()
    longest = sorted(lengths)[-batch_size:]
    batch_tokens = max(longest, default=0) * len(longest)
    kept = 2 * width * len(running) if checkpointing else 34 * width * len(running)
    activations = batch_tokens * kept * size // 2
    cache = tokens * width * size if cached and plan.first_block else 0
    memory = plan.model_params * size + plan.params * 16 + activations + cache
    return Cost(epoch + forward_prefix, epoch + (0 if cached else forward_prefix), int(memory), int(cache))


def all_layer_plan(anatomy: Anatomy, plan: Plan) -> Plan:
    """LoRA of rank 16 on all blocks, the same matrices."""
    targets = plan.targets if plan.targets != ("all",) else ("attention",)
    return make_plan(anatomy, mask="1", rank=16, target_modules=targets)


def matmul_rate(device: torch.device, dtype: torch.dtype, *, seconds: float = 0.2) -> float:
    """Floating-point operations a second of a (1024, 1024) x (1024, 1024) product, measured now."""
    a = torch.randn(1024, 1024, device=device).to(dtype)
    torch.mm(a, a)
    if device.type == "cuda":
        torch.cuda.synchronize()
    begun, done = time.perf_counter(), 0
    while time.perf_counter() - begun < seconds:
        torch.mm(a, a)
        done += 1
        if device.type == "cuda":
            torch.cuda.synchronize()
    return done * 2 * 1024**3 / (time.perf_counter() - begun)
