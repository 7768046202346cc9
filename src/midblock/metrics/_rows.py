"""The one door to the compiled kernels: rows of logits on a CPU, where numba is installed.

The price of the kernels is a dependency of 208 MB (numba and LLVM) and a second way of making the same sums, which
tests hold to loops and to the first. A prototype without them, PyTorch passing over chunks of rows that stay in the
cache, took 1.6 to 2.1 times the core-seconds in `lens` and 1.2 times in the head's loss of a training step (float32,
2 cores; docs/decisions.md), so they stay, as the extra ``midblock[fast]``.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["GROUP", "LOG2_E", "LOWEST", "largest", "losses_and_gradient_", "sums", "takes"]

LOG2_E = 1.4426950408889634
LOWEST = -87.0  # so far below the largest a logit counts for nothing, also where it is minus infinity
GROUP = 64  # logits that share a maximum, from which the most likely tokens are found
_BITS = {torch.bfloat16: torch.int16, torch.float32: torch.int32}


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("numba") is not None


def takes(*logits: Tensor) -> bool:
    """Whether the kernels can pass over these rows: on a CPU, of one shape and dtype, and numba is there."""
    first = logits[0]
    return first.device.type == "cpu" and first.dtype in _BITS and first.numel() > 0 and all(
        x.device == first.device and x.dtype == first.dtype and x.shape == first.shape for x in logits) and _installed()


def sums(logits: Tensor, target: Tensor, against: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Gold, top, total, weighted, above, maxima and apart of `midblock.metrics.logits.RowSums`."""
    from midblock.metrics import _kernels

    (n, vocab), threads = logits.shape, torch.get_num_threads()
    own, targets, others = _bits(logits), _checked(target, vocab), [_bits(other) for other in against]
    maxima = np.empty((n, -(-vocab // GROUP)), np.float32)
    found, above = np.empty((5, n), np.float32), np.empty(n, np.int64)
    apart = np.empty((len(others), n), np.float32)
    first = others[0] if others else own
    _kernels.in_threads(lambda lo, hi: _kernels.passes(
        own, first, bool(others), targets, lo, hi, maxima, found, above), n, threads)
    for row, other in enumerate(others):
        if row == 0:
            apart[0] = found[4]
            continue
        _kernels.in_threads(lambda lo, hi, of=other, to=apart[row]: _kernels.differences(  # type: ignore[misc]
            own, of, found[1], lo, hi, to), n, threads)
    return (*(torch.from_numpy(row) for row in found[:4]), torch.from_numpy(above), torch.from_numpy(maxima),
            torch.from_numpy(apart))


def losses_and_gradient_(logits: Tensor, target: Tensor) -> Tensor:
    """Loss of each row; the logits become its gradient."""
    from midblock.metrics import _kernels

    bits, targets = _bits(logits.detach()), _checked(target, logits.shape[1])
    losses = np.empty(logits.shape[0], np.float32)
    _kernels.in_threads(lambda lo, hi: _kernels.softmax_minus_one_hot(
        bits, targets, np.empty(logits.shape[1], np.float32), lo, hi, bits, losses),
        logits.shape[0], torch.get_num_threads())
    return torch.from_numpy(losses)


def largest(logits: Tensor, maxima: Tensor, k: int) -> Tensor:
    """Columns (n, k) of the k largest logits of each row."""
    from midblock.metrics import _kernels

    found, bits, groups = torch.empty(logits.shape[0], k, dtype=torch.int64), _bits(logits.detach()), maxima.numpy()
    _kernels.in_threads(lambda lo, hi: _kernels.largest(bits, groups, k, lo, hi, found.numpy()), logits.shape[0],
                        torch.get_num_threads())
    return found


def _bits(values: Tensor) -> np.ndarray[Any, Any]:
    """The numbers as integers of their bits, in the same memory where it has no gaps."""
    found: np.ndarray[Any, Any] = values.contiguous().view(_BITS[values.dtype]).numpy()
    return found


def _checked(target: Tensor, vocab: int) -> np.ndarray[Any, Any]:
    # compiled code would read beyond its memory
    if target.numel() and not 0 <= int(target.min()) <= int(target.max()) < vocab:
        raise IndexError(f"targets {int(target.min())} to {int(target.max())} are not all among {vocab} logits.")
    found: np.ndarray[Any, Any] = target.contiguous().numpy()
    return found
