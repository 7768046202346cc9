"""Products at the processor's rate, for passes that read much out on a CPU.

oneDNN lays a bfloat16 weight out anew for every product. `laid_out` keeps that layout, which takes
memory for a second copy of the weight and gives bit-equal results. glibc gives freed memory back to the system, which
hands it out again page by page for the next logits; within `freed_memory_kept` it stays.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from midblock.models.anatomy import Anatomy
from midblock.models.forwards import replace_forward

__all__ = ["freed_memory_kept", "laid_out", "many_unembeddings", "one_product"]

# rows of a product that the layout is chosen for
_ROWS = 256

# parameters of glibc's mallopt, and the largest values that it reaches by itself
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGEST_MMAP, _LARGEST_TRIM = 32 << 20, 64 << 20
_OWN_SETTINGS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES", "LD_PRELOAD")


@contextlib.contextmanager
def many_unembeddings(anatomies: Iterable[Anatomy]) -> Iterator[None]:
    """Both of `laid_out` and `freed_memory_kept`, for the time of a pass."""
    with freed_memory_kept(), laid_out(anatomies):
        yield


@contextlib.contextmanager
def one_product(head: nn.Module) -> Iterator[None]:
    """Within the context a head reads its rows (B, T, d) as one product, also where they are part of longer ones.

    The last positions of B rows have gaps between them, and PyTorch multiplies such rows with a frozen weight as B
    products, for which it copies the weight B times (0.9 GB for 16 rows and a head of 56 MB).
    """
    handle = head.register_forward_pre_hook(lambda module, args: (args[0].contiguous(), *args[1:]) if args else None)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def laid_out(anatomies: Iterable[Anatomy]) -> Iterator[int]:
    """Within the context heads' products without gradients use copies of weights in oneDNN's layout.

    Only plain bfloat16 layers on a CPU, and only where a trial is bit-equal to the usual product.
    Weights must not change within the context.

    Args:
        anatomies: Of the models whose heads are laid out.

    Yields:
        Number of layers that use it.
    """
    with contextlib.ExitStack() as stack:
        changed = 0
        for head in (anatomy.head for anatomy in anatomies):
            if _plain(head) and (product := _product(head)) is not None:
                stack.callback(replace_forward(head, _forward(head.forward, product)))
                changed += 1
        yield changed


def _forward(usual: Callable[..., Any], product: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Any]:
    def forward(x: Tensor) -> Any:
        if torch.is_grad_enabled() or x.dtype != torch.bfloat16 or torch.is_autocast_enabled("cpu"):
            return usual(x)
        return product(x)
    return forward


def _plain(layer: nn.Module) -> TypeGuard[nn.Linear]:
    return (type(layer) is nn.Linear and isinstance(layer.weight, Tensor) and layer.weight.device.type == "cpu"
            and layer.weight.dtype == torch.bfloat16 and "forward" not in layer.__dict__)


def _product(layer: nn.Linear) -> Callable[[Tensor], Tensor] | None:
    """The layer's product with its laid-out weight; None where it is not to be had, or not bit-equal in a trial."""
    if not torch.backends.mkldnn.is_available():
        return None
    weight, bias = layer.weight, layer.bias
    try:  # what torch.compile uses on CPUs; not every build of PyTorch has it
        with torch.inference_mode():
            kept = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), _ROWS)
            multiply = torch.ops.mkldnn._linear_pointwise

            def product(x: Tensor) -> Tensor:
                return multiply(x, kept, bias, "none", [], "")  # type: ignore[no-any-return]

            trial = torch.randn(19, weight.shape[1], generator=torch.Generator().manual_seed(0)).bfloat16()
            equal = torch.equal(product(trial), torch.nn.functional.linear(trial, weight, bias))
    except (AttributeError, RuntimeError):
        return None
    return product if equal else None


@contextlib.contextmanager
def freed_memory_kept(largest: int = 64 << 20, kept: int = 512 << 20) -> Iterator[bool]:
    """Within the context freed memory stays with the process; afterwards what is free goes back to the system.

    On Linux with glibc only, and not where the environment chooses an allocator or sets its thresholds.

    Args:
        largest: Bytes of the largest single piece that is kept.
        kept: Bytes kept in all.

    Yields:
        Whether it has an effect.
    """
    library = None if any(name in os.environ for name in _OWN_SETTINGS) else _glibc()
    if library is None:
        yield False
        return
    library.mallopt(_MMAP_THRESHOLD, largest)
    library.mallopt(_TRIM_THRESHOLD, kept)
    try:
        yield True
    finally:
        library.mallopt(_MMAP_THRESHOLD, _LARGEST_MMAP)
        library.mallopt(_TRIM_THRESHOLD, _LARGEST_TRIM)
        library.malloc_trim(0)


def _glibc() -> Any:
    """The C library, where it is glibc."""
    try:
        library = ctypes.CDLL(None)
        # musl and others have no such function, or no effect of it
        return library if hasattr(library, "gnu_get_libc_version") and hasattr(library, "mallopt") else None
    except (OSError, TypeError):  # no such thing on Windows
        return None
