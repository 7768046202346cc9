"""The one hand-made training loop: loss, backward pass, norm limit, update.

ILA's two stages and the short fine-tune of `gradients` run on it. `midblock tune` runs on TRL's trainer, for its
trackers, callbacks and checkpoints; a test holds that both give the same weights bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from midblock.errors import TrainingError

__all__ = ["MasterAdamW", "Step", "Update", "training_steps"]

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Step:
    """One update that was made."""

    number: int
    """Counted from 1, over interruptions."""
    loss: float
    """Of the batch, before the update."""
    gradient_norm: float | None
    """Before it was limited; None where no limit was set."""


class Update(Protocol):
    """What changes the parameters once their gradients are there: a `torch.optim.Optimizer`, say."""

    def step(self) -> object:
        """Change the parameters."""
        ...


def training_steps(batches: Iterable[Item], loss: Callable[[Item], Tensor], parameters: Sequence[Tensor],
                   update: Update | None, *, first: int = 0, max_grad_norm: float | None = None,
                   learning_rate: Callable[[int], float] | None = None,
                   on_gradients: Callable[[int, float], None] | None = None) -> Iterator[Step]:
    """Make one update per batch and yield after each; whoever iterates may stop at any step.

    Args:
        batches: One item per step.
        loss: Of an item, a scalar with a graph.
        parameters: Whose gradients are made, limited and cleared.
        update: Changes them; None makes gradients only.
        first: Steps that an interrupted run has made.
        max_grad_norm: Gradients are scaled down to this norm.
        learning_rate: Of step 0, 1, ...; set in the groups of an optimizer before each update.
        on_gradients: Called with the step's index and loss once the gradients are there, before the update.

    Raises:
        TrainingError: a loss or the norm of the gradients is not finite; the parameters are those of the step before.
    """
    for index, batch in enumerate(batches, start=first):
        for parameter in parameters:
            parameter.grad = None
        value = loss(batch)
        if not bool(torch.isfinite(value)):
            raise TrainingError(f"the loss became {value.item()} in step {index + 1}; use a lower learning rate, or "
                                "dtype float32.")
        value.backward()
        norm: float | None = None
        if max_grad_norm is not None:
            norm = float(nn.utils.clip_grad_norm_(parameters, max_grad_norm))
            if not norm < float("inf"):
                raise TrainingError(f"the gradient became {norm} in step {index + 1}; use a lower learning rate, or "
                                    "dtype float32.")
        if on_gradients is not None:
            on_gradients(index, value.item())
        if update is not None:
            if learning_rate is not None:
                for group in getattr(update, "param_groups", ()):
                    group["lr"] = learning_rate(index)
            update.step()
        yield Step(index + 1, value.item(), norm)


class MasterAdamW:
    """AdamW on float32 copies of 16-bit weights, which would round small updates away.

    Args:
        parameters: Floating ones; float32 parameters are their own copies.
        learning_rate: Of every step.
        weight_decay: AdamW's, 0 by default.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], learning_rate: float, weight_decay: float = 0.0) -> None:
        self._own = [p for p in parameters if p.is_floating_point()]
        self._masters = [p if p.dtype == torch.float32 else p.detach().float() for p in self._own]
        # without a gradient nothing moves: experts that no token reached keep their weights
        self._optimizer = torch.optim.AdamW(self._masters, lr=learning_rate, weight_decay=weight_decay, foreach=False)

    @property
    def param_groups(self) -> list[dict[str, object]]:
        """Of the optimizer, whose learning rate may be changed."""
        return self._optimizer.param_groups

    def step(self) -> None:
        """One update from the gradients of the parameters."""
        with torch.no_grad():
            for own, master in zip(self._own, self._masters, strict=True):
                if master is not own:
                    master.grad = None if own.grad is None else own.grad.float()
            self._optimizer.step()
            for own, master in zip(self._own, self._masters, strict=True):
                if master is not own:
                    own.copy_(master)

    def trained(self) -> dict[int, Tensor]:
        """id of each parameter -> its weights in float32."""
        return {id(own): master.detach() for own, master in zip(self._own, self._masters, strict=True)}
