"""How fast a device multiplies: the products ``x W'`` and ``g W`` of a model's own shapes, timed in a moment.

The dtype that ``auto`` takes, the estimates of `tune --dry-run` and of sweeps, and the benchmarks' share of what a
processor can do all rest on this one measurement.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional

from midblock.models.anatomy import Anatomy
from midblock.models.matrices import projections

__all__ = ["block_shapes", "product_rate"]

_PROBE_ROWS = 16
_SLOW = 0.25  # of the time allowed: a probe that takes so much of it is the whole measurement


def block_shapes(anatomy: Anatomy, *, widest: int | None = None) -> dict[tuple[int, int], int]:
    """(out, in) of the linear layers of a model's middle block -> how many of each.

    Args:
        anatomy: Of the model; it may be on the meta device.
        widest: Cut widths to this, which is enough to see the rate and soon measured.
    """
    limit = widest or 1 << 62
    found: dict[tuple[int, int], int] = {}
    for part in projections(anatomy.blocks[anatomy.num_blocks // 2]).values():
        if len(part.shape) == 2 and part.kind != "norm":
            outputs, inputs = (min(limit, w) for w in part.out_in)
            found[outputs, inputs] = found.get((outputs, inputs), 0) + 1
    return found or {(min(limit, 4 * anatomy.hidden_size), min(limit, anatomy.hidden_size)): 1}


def product_rate(shapes: Mapping[tuple[int, int], int], device: torch.device, dtype: torch.dtype, *, rows: int = 256,
                 seconds: float = 0.5, backward: bool = True, own_time: bool = False) -> float:
    """FLOP/s of linear layers, in the layout in which models use them; the fastest of several repeats counts.

    Args:
        shapes: (out, in) of the layers -> how many of each there are, which is its weight.
        device: Where.
        dtype: Of weights and activations.
        rows: Tokens in one product.
        seconds: About how long all of it may take; a device on which a product of 16 rows is slow is measured by that.
        backward: Also the product with the gradient of the outputs, of the same size.
        own_time: Count this thread's own time (CPU, one thread), which other programs do not lengthen.

    Returns:
        2 x rows x out x in per product, over the time taken.
    """
    flops = taken = 0.0
    each = seconds / max(1, len(shapes))
    with torch.inference_mode():
        for (outputs, inputs), count in shapes.items():
            weight = torch.full((outputs, inputs), 0.01, device=device, dtype=dtype)
            few = _seconds(weight, _PROBE_ROWS, 0.0, backward, own_time)
            if few > _SLOW * each:
                measured, best = _PROBE_ROWS, few
            else:
                measured, best = rows, _seconds(weight, rows, each - few, backward, own_time)
            flops += count * (4 if backward else 2) * measured * outputs * inputs
            taken += count * best
    return flops / taken


def _seconds(weight: Tensor, rows: int, budget: float, backward: bool, own_time: bool) -> float:
    outputs, inputs = weight.shape
    x = torch.full((rows, inputs), 0.01, device=weight.device, dtype=weight.dtype)
    took = _shortest(functools.partial(functional.linear, x, weight), weight.device, budget / 2, own_time)
    if backward:
        gradient = torch.full((rows, outputs), 0.01, device=weight.device, dtype=weight.dtype)
        took += _shortest(functools.partial(torch.matmul, gradient, weight), weight.device, budget / 2, own_time)
    return took


def _shortest(product: Callable[[], Tensor], device: torch.device, budget: float, own_time: bool) -> float:
    """Seconds of the fastest repeat after the first, which sets things up."""
    clock = time.thread_time if own_time else time.perf_counter
    best, begun, repeats = math.inf, clock(), 0
    while repeats < 2 or clock() - begun < budget:
        before = clock()
        product()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        took, repeats = clock() - before, repeats + 1
        best = min(best, took) if repeats > 1 else math.inf
    return max(best, 1e-9)
