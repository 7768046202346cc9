"""Backward passes over a model whose blocks come one after another: every batch goes back through block b before any
goes on to b - 1.

The forward pass keeps every batch's input of every block, in memory or in the scratch file. On the way back each block
is read again and run on them with a graph, which gives the gradient of its weights and of its input.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from midblock.capture import block_by_block, room_for_hidden_states, run_layer_major
from midblock.data import Batch
from midblock.errors import TrainingError
from midblock.models import LoadedModel
from midblock.models.streaming import PartReader
from midblock.progress import Progress, silent

__all__ = ["backward_by_block"]


def backward_by_block(loaded: LoadedModel, batches: Sequence[Batch], loss: Callable[[Tensor, Batch], Tensor],
                      use: Callable[[int, int], None], *, progress: Progress = silent) -> list[float]:
    """Gradients of the weights of every block for every batch, block by block from the last.

    Args:
        loaded: A streamed model.
        batches: With labels, on the CPU.
        loss: Of a batch's logits, a scalar with a graph.
        use: Called with block and batch number; reads ``parameter.grad`` of the block's parameters.
        progress: Told how many steps back are done.

    Returns:
        The loss of each batch.

    Raises:
        TrainingError: a loss is not finite.
        MidblockError: as `midblock.capture.run_layer_major`.
    """
    weights = loaded.streamed
    assert weights is not None
    depth, named = loaded.anatomy.num_blocks, {"": loaded}
    losses: list[float] = []
    training = loaded.model.training
    loaded.model.eval()
    with contextlib.ExitStack() as stack:
        stack.callback(loaded.model.train, training)
        # a block's gradients take as much as the block
        kept = stack.enter_context(room_for_hidden_states(named, batches, heads=True, states=depth + 2,
                                                          blocks_at_once=2))
        with torch.no_grad():
            for h, number, states in run_layer_major(named, batches, heads=True):
                kept.put((h, number), states[""])
        with weights.part(weights.head):
            for number, batch in enumerate(batches):
                hidden = kept.get((depth, number)).to(loaded.device).requires_grad_(True)
                value = loss(loaded.anatomy.unembed(hidden), batch.to(loaded.device))
                if not bool(torch.isfinite(value)):
                    raise TrainingError(f"the loss became {value.item()} in step {number + 1}; use dtype float32.")
                losses.append(value.item())
                gradient, = torch.autograd.grad(value, hidden)
                kept.put(("gradient", number), gradient)
        runner = stack.enter_context(block_by_block(named))
        reader = PartReader(weights)
        stack.callback(reader.close)
        for b in reversed(range(depth)):
            with reader.part(b, b - 1 if b else None):
                parameters = [p.requires_grad_(True) for p in loaded.anatomy.blocks[b].parameters()
                              if p.is_floating_point()]
                for number, batch in enumerate(batches):
                    hidden = kept.get((b, number)).to(loaded.device).requires_grad_(True)
                    with torch.enable_grad():
                        out = runner.step("", b, batch.to(loaded.device), hidden)
                    gradient = kept.get(("gradient", number)).to(loaded.device)
                    back, *found = torch.autograd.grad(out, [hidden, *parameters], gradient, allow_unused=True)
                    kept.put(("gradient", number), back)
                    for parameter, own in zip(parameters, found, strict=True):
                        parameter.grad = own
                    use(b, number)
                    for parameter in parameters:
                        parameter.grad = None
                    progress("backward", (depth - 1 - b) * len(batches) + number + 1, depth * len(batches),
                             note=f"block {b}")
    return losses
