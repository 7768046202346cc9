"""What a plan will cost, before it is paid: operations, time and memory. `tune --dry-run` and sweeps use it alike.

Operations per token, with P the parameters of a block that a token meets and T the row's length: forward 2 P, gradient
of the inputs 2 P, gradient of trained weights 2 per trained parameter, attention 2 T d forward (causal) and twice
that backward; head 2 V d forward and 2 V d backward on labelled tokens only. A cached prefix costs nothing.

Activations kept for the backward pass are `KEPT` numbers of width d per token and block, as counted for a transformer
block by Korthikanti et al. ("Reducing Activation Recomputation in Large Transformer Models", 2022: 34 bytes at 16 bit,
without attention scores), and one layer's more where gradients are checkpointed.

The rate is that of the model's own products in training's layout (`F.linear` and its gradient), measured in under a
second, of which `EFFICIENCY` is reached in a step: norms, attention, small products and the optimizer take the rest.
benchmarks/estimates.py compares these estimates with runs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from midblock.data import Dataset, TokenRow, TokenRows
from midblock.models import (
    Anatomy,
    choose_dtype,
    find_anatomy,
    load_tokenizer,
    resolve_device,
    text_config,
)
from midblock.models.matrices import projections
from midblock.models.products import block_shapes, product_rate
from midblock.models.skeleton import model_skeleton
from midblock.provenance import peak_memory_bytes
from midblock.settings import LoadSettings, TuneSettings
from midblock.settings.load import PlaceSettings
from midblock.settings.tune import REFERENCE_RANK, LoopSettings
from midblock.tuning.plan import Plan
from midblock.tuning.planning import make_plan

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["EFFICIENCY", "Cost", "Outline", "all_layer_plan", "estimate", "forecast", "met_by_a_token", "outline",
           "process_bytes", "step_bytes", "training_rate", "weight_bytes"]

EFFICIENCY = 0.55
"""Share of the products' rate that a training step reaches (0.49 to 0.65 were measured on two cores)."""
KEPT = 17
"""Numbers of width d that a block keeps per token for the backward pass."""
ADAM_BYTES = 16
"""Bytes of a trained parameter: float32 weight, gradient and two moments."""
PROGRAM_BYTES = 350 << 20
"""What libraries that only a training imports and the allocator's slack take of a process."""
_WIDEST = 2048
_LOGITS = 1 << 27  # of the chunk that goes through the head at once
_SCALES = 0.02  # bytes of a quantised weight's share of its block's scales (NF4 with double quantisation: 0.127 bits)


@dataclass(frozen=True)
class Outline:
    """What estimates need of a model; no weights."""

    anatomy: Anatomy
    tokenizer: Any
    dtype: torch.dtype
    device: torch.device
    bits: int | None = None
    """Of the blocks' matrices, where they are quantised."""


def outline(model: str, load: PlaceSettings, *, trust_remote_code: bool = False, allow_pickle: bool = False) -> Outline:
    """Anatomy and tokenizer of a MODEL spec without reading its weights, and how they would be loaded."""
    skeleton, stored, folder = model_skeleton(model, trust_remote_code=trust_remote_code, allow_pickle=allow_pickle)
    device, bits = resolve_device(load.device), load.bits
    choice = choose_dtype(load.dtype, stored=stored, device=device, config=text_config(skeleton),
                          parameters=0 if bits else sum(p.numel() for p in skeleton.parameters()),
                          spread=load.device_map is not None)
    return Outline(find_anatomy(skeleton), load_tokenizer(folder, spec=model), choice.dtype, device, bits)


def weight_bytes(anatomy: Anatomy, dtype: torch.dtype, bits: int | None = None) -> int:
    """Bytes of a model's weights; with ``bits`` those of quantised matrices of the blocks, their scales included."""
    size = torch.empty((), dtype=dtype).element_size()
    whole = anatomy.causal_lm.num_parameters() * size
    if bits is None:
        return whole
    matrices = sum(math.prod(part.shape) for block in anatomy.blocks for part in projections(block).values()
                   if part.linear)
    return whole - round(matrices * (size - bits / 8 - _SCALES))


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


def met_by_a_token(anatomy: Anatomy, block: int) -> float:
    """Parameters of a block that a token meets: of a mixture's experts those it is sent to."""
    config = anatomy.causal_lm.config.get_text_config(decoder=True)
    total = stacked = 0
    experts = 1
    for parameter in anatomy.blocks[block].parameters():
        total += parameter.numel()
        if parameter.ndim == 3:
            stacked, experts = stacked + parameter.numel(), parameter.shape[0]
    chosen = min(experts, int(getattr(config, "num_experts_per_tok", None) or experts))
    return total - stacked * (1 - chosen / experts)


def estimate(plan: Plan, anatomy: Anatomy, rows: Sequence[TokenRow], settings: LoopSettings, *, dtype: torch.dtype,
             cached: bool, bits: int | None = None) -> Cost:
    """Cost of a plan on these rows.

    Args:
        plan: The plan.
        anatomy: Of the model; it may be on the meta device.
        rows: Tokenised rows.
        settings: Batch size and checkpointing.
        dtype: Of the weights and activations.
        cached: Whether the prefix is cached.
        bits: Of the blocks' matrices, where they are quantised.
    """
    lengths = [len(r) for r in rows]
    supervised = sum((stop - start for r in rows for start, stop in r.supervised), 0) or sum(lengths)
    tokens, squares = sum(lengths), sum(n * n for n in lengths)
    width = anatomy.hidden_size
    blocks = [met_by_a_token(anatomy, b) for b in range(anatomy.num_blocks)]
    prefix, running = blocks[:plan.first_block], blocks[plan.first_block:]
    attention = 4 * width * squares / 2  # causal: half of the scores
    forward_prefix = 2 * tokens * sum(prefix) + attention * len(prefix)
    passes = 3 if settings.gradient_checkpointing else 2  # forward, input gradients, and the second forward
    suffix = passes * 2 * tokens * sum(running) + 3 * attention * len(running)
    trained = (2 if plan.method == "full" else 6) * tokens * plan.params
    epoch = suffix + trained + 4 * supervised * anatomy.vocab_size * width
    size = torch.empty((), dtype=dtype).element_size()
    batch_tokens = _batch_tokens(lengths, settings)
    kept = len(running) + KEPT if settings.gradient_checkpointing else KEPT * len(running)
    cache = tokens * width * size if cached and plan.first_block else 0
    memory = weight_bytes(anatomy, dtype, bits) + plan.params * ADAM_BYTES + batch_tokens * kept * width * size + cache
    return Cost(epoch + forward_prefix, epoch + (0 if cached else forward_prefix), int(memory), int(cache))


def _batch_tokens(lengths: Sequence[int], settings: LoopSettings) -> int:
    """Places, padding included, of the largest batch."""
    longest = sorted(lengths)[-settings.batch_size:]
    return max(longest, default=0) * len(longest)


def step_bytes(plan: Plan, anatomy: Anatomy, rows: Sequence[TokenRow], settings: LoopSettings, *, dtype: torch.dtype
               ) -> int:
    """Bytes that a step takes where frozen blocks keep nothing but their inputs: trained parameters with gradients
    and Adam's moments, activations of the trained blocks and of one more, logits."""
    kept = KEPT * (len(plan.blocks) + 1) + anatomy.num_blocks
    places = _batch_tokens([len(r) for r in rows], settings)
    return plan.params * ADAM_BYTES + places * kept * anatomy.hidden_size * dtype.itemsize + _LOGITS


def all_layer_plan(anatomy: Anatomy, plan: Plan) -> Plan:
    """LoRA of the reference rank on all blocks, the same matrices."""
    targets = plan.targets if plan.targets != ("all",) else ("attention",)
    return make_plan(anatomy, mask="1", rank=REFERENCE_RANK, target_modules=targets)


def training_rate(anatomy: Anatomy, device: torch.device, dtype: torch.dtype, *, seconds: float = 0.5) -> float:
    """Floating-point operations a second that a training step reaches, measured now on the model's own shapes.

    Args:
        anatomy: Of the model; it may be on the meta device.
        device: Where it will be trained.
        dtype: Of its weights.
        seconds: About how long to measure.
    """
    return EFFICIENCY * product_rate(block_shapes(anatomy, widest=_WIDEST), device, dtype, seconds=seconds)


def process_bytes(device: torch.device) -> int:
    """Bytes of this process besides a model and its training; 0 where a device has memory of its own."""
    return 0 if device.type != "cpu" else peak_memory_bytes() + PROGRAM_BYTES


def forecast(model: str, plan: Plan, dataset: Dataset, settings: TuneSettings, load: LoadSettings
             ) -> tuple[pd.DataFrame, TokenRows]:
    """Estimated time and memory of a run, beside all-layer LoRA's, from the model's config alone.

    Returns:
        One row for the plan and one for all-layer LoRA; the tokenised rows.
    """
    import pandas as pd

    from midblock.tuning.run import token_rows

    found = outline(model, load, trust_remote_code=load.trust_remote_code, allow_pickle=load.allow_pickle)
    rows = token_rows(dataset, found.tokenizer, settings)
    besides = process_bytes(found.device)
    rate = training_rate(found.anatomy, found.device, found.dtype)
    lines = []
    everything = (f"all-layer LoRA, rank {REFERENCE_RANK}", all_layer_plan(found.anatomy, plan), False)
    for name, one, cached in (("this plan", plan, settings.cache != "none"), everything):
        cost = estimate(one, found.anatomy, rows.rows, settings, dtype=found.dtype, cached=cached, bits=found.bits)
        lines.append({"": name, "trainable": one.params, "share of model": f"{one.share:.3%}",
                      "memory MiB": round((cost.memory_bytes + besides) / 2**20),
                      "of which cache": round(cost.cache_bytes / 2**20),
                      "first epoch s": round(cost.first_epoch_flops / rate, 1),
                      "later epoch s": round(cost.epoch_flops / rate, 1),
                      "training s": round(cost.total_flops(settings.num_epochs(len(rows))) / rate, 1)})
    frame = pd.DataFrame(lines)
    frame["relative time"] = [round(v / lines[-1]["training s"], 2) if lines[-1]["training s"] else 1.0
                              for v in frame["training s"]]
    return frame, rows
