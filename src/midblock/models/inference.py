"""Products of forwards without gradients at the processor's rate.

On CPUs oneDNN lays a bfloat16 weight out anew for every product. `laid_out` keeps that layout, which takes
memory for a second copy of the weights and gives bit-equal results.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from midblock.models.anatomy import Anatomy

__all__ = ["laid_out"]

# most bytes of blocks that are copied; rows of a product that the layout is chosen for
_LIMIT_BYTES = 2 << 30
_ROWS = {"head": 256, "block": 1024}


@contextlib.contextmanager
def laid_out(anatomies: Iterable[Anatomy], *, blocks: bool = False) -> Iterator[int]:
    """Within the context products without gradients use copies of weights in oneDNN's layout.

    Only for plain bfloat16 linear layers on a CPU, and only where a trial is bit-equal to the usual
    product. Weights must not change within the context.

    Args:
        anatomies: Of the models whose heads are read out.
        blocks: Also for the layers of their blocks, as long as these take no more than 2 GiB.

    Yields:
        Number of layers that use it.
    """
    layers: list[tuple[nn.Module, int]] = []
    size = 0
    for anatomy in anatomies:
        layers.append((anatomy.head, _ROWS["head"]))
        for module in (m for block in anatomy.blocks for m in block.modules()) if blocks else ():
            if type(module) is nn.Linear:
                size += module.weight.numel() * module.weight.element_size()
                layers += [(module, _ROWS["block"])] if size <= _LIMIT_BYTES else []
    changed = []
    try:
        for layer, rows in layers:
            if (product := _product(layer, rows)) is not None:
                layer.forward = _forward(layer.forward, product)  # type: ignore[method-assign]
                changed.append(layer)
        yield len(changed)
    finally:
        for layer in changed:
            layer.__dict__.pop("forward", None)


def _forward(usual: Callable[..., Any], product: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Any]:
    def forward(x: Tensor) -> Any:
        if torch.is_grad_enabled() or x.dtype != torch.bfloat16 or torch.is_autocast_enabled("cpu"):
            return usual(x)
        return product(x)
    return forward


def _product(layer: nn.Module, rows: int) -> Callable[[Tensor], Tensor] | None:
    weight = getattr(layer, "weight", None)
    if (type(layer) is not nn.Linear or not isinstance(weight, Tensor) or weight.device.type != "cpu"
            or weight.dtype != torch.bfloat16 or "forward" in layer.__dict__
            or not torch.backends.mkldnn.is_available()):
        return None
    bias = layer.bias
    try:  # what torch.compile uses on CPUs; not every build of PyTorch has it
        with torch.inference_mode():
            kept = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows)
            multiply = torch.ops.mkldnn._linear_pointwise

            def product(x: Tensor) -> Tensor:
                return multiply(x, kept, bias, "none", [], "")  # type: ignore[no-any-return]

            trial = torch.randn(19, weight.shape[1], generator=torch.Generator().manual_seed(0)).bfloat16()
            equal = torch.equal(product(trial), torch.nn.functional.linear(trial, weight, bias))
    except (AttributeError, RuntimeError):
        return None
    return product if equal else None
