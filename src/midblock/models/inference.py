"""The head's product at the processor's rate, for passes that read out much.

On a CPU in bfloat16 the head is most of what reading out a small model costs, and oneDNN lays its
weight out anew for every product. `laid_out_heads` keeps that layout; logits stay bit-equal. (Midblock's
attention is not used in such passes: it rounds otherwise than the model's own, and the KL divergence of two
near models shows that.)
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from midblock.models.anatomy import Anatomy

__all__ = ["laid_out_head", "laid_out_heads"]

# rows that the layout is chosen for
_ROWS = 256


@contextlib.contextmanager
def laid_out_heads(anatomies: Iterable[Anatomy]) -> Iterator[None]:
    """`laid_out_head` of several models."""
    with contextlib.ExitStack() as stack:
        for anatomy in anatomies:
            stack.enter_context(laid_out_head(anatomy))
        yield


@contextlib.contextmanager
def laid_out_head(anatomy: Anatomy) -> Iterator[bool]:
    """Within the context the head's products without gradients use a copy of its weight in oneDNN's layout.

    Only for a plain bfloat16 head on a CPU, and where a trial is bit-equal to the usual product. The
    weight must not change within the context.

    Yields:
        Whether it applies.
    """
    head = anatomy.head
    product = _product(head)
    if product is None:
        yield False
        return
    usual = head.forward

    def forward(x: Tensor) -> Tensor:
        if torch.is_grad_enabled() or x.dtype != torch.bfloat16 or torch.is_autocast_enabled("cpu"):
            return usual(x)  # type: ignore[no-any-return]
        return product(x)  # type: ignore[no-any-return]

    head.forward = forward  # type: ignore[method-assign]
    try:
        yield True
    finally:
        head.__dict__.pop("forward", None)


def _product(head: nn.Module) -> Any:
    weight = getattr(head, "weight", None)
    if (type(head) is not nn.Linear or not isinstance(weight, Tensor) or weight.device.type != "cpu"
            or weight.dtype != torch.bfloat16 or "forward" in head.__dict__
            or not torch.backends.mkldnn.is_available()):
        return None
    bias = head.bias
    try:  # what torch.compile uses on CPUs; not every build of PyTorch has it
        with torch.inference_mode():
            laid_out = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), _ROWS)
            multiply = torch.ops.mkldnn._linear_pointwise

            def product(x: Tensor) -> Tensor:
                return multiply(x, laid_out, bias, "none", [], "")  # type: ignore[no-any-return]

            trial = torch.randn(19, weight.shape[1], generator=torch.Generator().manual_seed(0)).bfloat16()
            equal = torch.equal(product(trial), torch.nn.functional.linear(trial, weight, bias))
    except (AttributeError, RuntimeError):
        return None
    return product if equal else None
