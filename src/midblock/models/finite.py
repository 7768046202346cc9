"""Weights with NaN or infinity are refused, with their names."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import torch
from torch import nn

from midblock.errors import CheckpointError
from midblock.models.checkpoints import Checkpoint

__all__ = ["check_finite_files", "check_finite_weights", "require_finite"]

_PIECE = 1 << 22


def check_finite_weights(model: nn.Module, *, where: str = "model") -> None:
    """Refuse NaN and infinity in parameters and persistent buffers, naming the tensors.

    Raises:
        CheckpointError: a tensor has non-finite entries.
    """
    require_finite(itertools.chain(model.named_parameters(), model.named_buffers()), where)


def check_finite_files(checkpoint: Checkpoint, *, where: str) -> None:
    """`check_finite_weights` of what is stored, for a model that quantisation does not let look at."""
    require_finite(((name, checkpoint.read(name)) for name in checkpoint.names()), where)
    checkpoint.release()


def require_finite(tensors: Iterable[tuple[str, torch.Tensor]], where: str) -> None:
    """One sum per tensor; only a tensor whose sum is not finite is looked at closely (a finite one's can overflow)."""
    bad: list[str] = []
    with torch.no_grad():
        for tensor_name, tensor in tensors:
            if not tensor.is_floating_point() or tensor.is_meta or tensor.numel() == 0:
                continue
            if tensor.dtype.itemsize < 2:
                tensor = tensor.float()
            # in pieces: a sum in another dtype makes a copy of all that it adds up
            if any(not torch.isfinite(piece.sum(dtype=torch.float32)) and not torch.isfinite(piece).all()
                   for piece in tensor.detach().reshape(-1).split(_PIECE)):
                bad.append(f"{tensor_name} ({int((~torch.isfinite(tensor)).sum())} of {tensor.numel()})")
    if bad:
        raise CheckpointError(f"{where}: weights with NaN or infinity: {', '.join(bad[:4])}"
                              f"{f' and {len(bad) - 4} more tensors' if len(bad) > 4 else ''}. The "
                              "checkpoint cannot be measured; fetch or train it again.")
