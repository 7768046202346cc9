"""Gates on the low-rank updates of a model: the second stage of ILA, and the scores that need one backward.

Each adapted matrix computes W x + g (s B A x) with a gate g. Base weights, A and B are frozen and not
copied; gradients flow to the gates and through the activations only.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from midblock.data import Batch
from midblock.errors import AdapterError, SettingsError, TrainingError
from midblock.models import layer_factors
from midblock.models.forwards import replace_forward
from midblock.tuning.adapter import Attachment
from midblock.tuning.kernels import has_plain_head, supervised_loss

__all__ = ["Gates", "ScoreOptimizer", "batch_loss", "gated", "update_norms", "update_worths"]


class _GatedUpdate(torch.autograd.Function):
    """g (x A') B', B scaled already, with gradients for x and for g alone.

    The gate's gradient is <grad B, x A'> in the r inner dims: the update is never kept.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, down: Tensor, up: Tensor, gate: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        inner = rows @ down.t()
        ctx.save_for_backward(inner, down, up, gate)
        ctx.shape = x.shape
        return ((inner * gate.to(inner.dtype)) @ up.t()).view(*x.shape[:-1], up.shape[0])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        inner, down, up, gate = ctx.saved_tensors
        into = grads[0].reshape(-1, up.shape[0]).to(up.dtype) @ up
        grad_gate = (into.float() * inner.float()).sum()
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = ((into * gate.to(into.dtype)) @ down).view(ctx.shape)
        return grad_x, None, None, grad_gate.to(gate.dtype)


class Gates:
    """The gates of all units; set ``values`` (U,) before a forward."""

    def __init__(self, units: Sequence[str], unit_of: Mapping[str, str]) -> None:
        self.units = list(units)
        place = {unit: i for i, unit in enumerate(self.units)}
        self.index = {module: place[unit] for module, unit in unit_of.items()}
        self.values: Tensor = torch.ones(len(self.units))


def _factors(attachment: Attachment, module: str) -> tuple[Any, Tensor, Tensor]:
    """The PEFT layer of a module, and its A and scaled B."""
    layer: Any = attachment.base.get_submodule(module)
    try:
        return layer, *layer_factors(layer)
    except AdapterError as error:
        raise SettingsError(f"{module}: gates need plain LoRA ({attachment.plan.method}: {error}).") from error


@contextlib.contextmanager
def gated(attachment: Attachment, gates: Gates) -> Iterator[Gates]:
    """Within the context every update is multiplied by its unit's gate, and only gates get gradients.

    Forwards and ``requires_grad`` are as before afterwards, also after an error.

    Raises:
        SettingsError: the plan is not plain LoRA.
    """
    needed = {p: p.requires_grad for p in attachment.model.parameters()}
    changed: list[Callable[[], bool]] = []
    try:
        for parameter in needed:
            parameter.requires_grad_(False)
        for module, index in gates.index.items():
            layer, down, up = _factors(attachment, module)
            changed.append(replace_forward(layer, _gated_forward(layer, down, up, gates, index)))
        yield gates
    finally:
        for restore in changed:
            restore()
        for parameter, flag in needed.items():
            parameter.requires_grad_(flag)


def _gated_forward(layer: Any, down: Tensor, up: Tensor, gates: Gates, index: int) -> Callable[..., Tensor]:
    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        out: Tensor = layer.base_layer(x, *args, **kwargs)
        update: Tensor = _GatedUpdate.apply(
            x, down.to(x.dtype), up.to(x.dtype), gates.values[index])
        return out + update.to(out.dtype)
    return forward


def batch_loss(attachment: Attachment, batch: Batch, *, plain: bool) -> Tensor:
    """Mean loss over the labelled tokens of a batch, in nats.

    Raises:
        TrainingError: it is not finite.
    """
    assert batch.labels is not None
    loss = supervised_loss(attachment.anatomy, {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask,
                                                "labels": batch.labels}, plain=plain)
    if not bool(torch.isfinite(loss)):
        raise TrainingError(f"the loss became {loss.item()}; use a lower learning rate, or --dtype float32.")
    return loss


def update_worths(attachment: Attachment, gates: Gates, batches: Sequence[Batch], *, at: float) -> Tensor:
    """<gradient, update> of every unit for each batch, (batches, U): one backward per batch.

    With dW_i the update of unit i and the loss taken at W + at * sum dW, the derivative of the loss by
    the gate of unit i is <dL/dW_i, dW_i>: what a small step of that update changes, to first order.

    Args:
        attachment: A model with a LoRA adapter.
        gates: Its units.
        batches: On the model's device.
        at: Gate of every unit: 1 is the tuned model, 0 the base.
    """
    plain = has_plain_head(attachment.anatomy)
    device = next(attachment.anatomy.embeddings.parameters()).device
    rows = []
    with gated(attachment, gates):
        for batch in batches:
            gates.values = torch.full((len(gates.units),), float(at), device=device, requires_grad=True)
            batch_loss(attachment, batch, plain=plain).backward()
            grad = gates.values.grad
            rows.append(torch.zeros(len(gates.units)) if grad is None else grad.detach().cpu())
    return torch.stack(rows).double()


def update_norms(attachment: Attachment, gates: Gates) -> Tensor:
    """Frobenius norm of every unit's update s B A, (U,), from r x r Gram matrices.

    |s B A|_F^2 = s^2 tr((B'B)(A A')); a unit of several matrices has the root of the sum of squares.
    """
    squares = torch.zeros(len(gates.units), dtype=torch.float64)
    for module, index in gates.index.items():
        _, down, up = _factors(attachment, module)
        a, b = down.double(), up.double()
        squares[index] += ((b.t() @ b) * (a @ a.t())).sum().clamp_min(0).cpu()
    return squares.sqrt()


class ScoreOptimizer:
    """Adam with one second moment for all scores.

    Adam divides each coordinate by its own size, so that a score without influence would wander as
    far as one that matters. Here all are divided by the size of the largest: a score moves by at most
    about the learning rate per step, and in proportion to its own gradient.
    """

    def __init__(self, scores: Tensor, learning_rate: float, betas: tuple[float, float] = (0.9, 0.99)) -> None:
        self.scores = scores
        self.rate, self.betas = learning_rate, betas
        self.steps = 0
        self.first = torch.zeros_like(scores)
        self.second = torch.zeros((), dtype=scores.dtype)

    def step(self, grad: Tensor) -> None:
        """Change ``scores`` in place by one gradient (U,)."""
        self.steps += 1
        one, two = self.betas
        self.first.mul_(one).add_(grad, alpha=1 - one)
        self.second.mul_(two).add_(grad.square().max(), alpha=1 - two)
        scale = (self.second / (1 - two ** self.steps)).sqrt() + torch.finfo(grad.dtype).tiny
        self.scores.sub_(self.first / (1 - one ** self.steps) / scale, alpha=self.rate)
