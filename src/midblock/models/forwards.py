"""The one way in which a module's forward is replaced: on the instance, and given back exactly as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from torch import nn

__all__ = ["forwards_kept", "forwards_replaced", "replace_forward"]

Forward = Callable[..., Any]


def replace_forward(module: nn.Module, forward: Forward) -> Callable[[], bool]:
    """Let a module run another forward.

    Returns:
        A function that puts the former state back. It does nothing, and says False, where somebody has
        replaced the forward again since: theirs then stays on top and may still call ours.
    """
    previous = module.__dict__.get("forward")
    module.__dict__["forward"] = forward

    def restore() -> bool:
        if module.__dict__.get("forward") is not forward:
            return False
        if previous is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = previous
        return True

    return restore


@contextlib.contextmanager
def forwards_replaced(modules: Sequence[nn.Module], forwards: Sequence[Forward]) -> Iterator[None]:
    """Within the context each module's ``forward`` is the given function; restored also after an error.

    Raises:
        ValueError: not as many functions as modules.
    """
    with contextlib.ExitStack() as stack:
        for module, forward in zip(modules, forwards, strict=True):
            stack.callback(replace_forward(module, forward))
        yield


@contextlib.contextmanager
def forwards_kept(modules: Iterable[nn.Module], *, plain: bool = False) -> Iterator[None]:
    """Afterwards each module has the forward that it had before, whatever was done to it within.

    Args:
        modules: The modules.
        plain: Within the context they have the forward of their class.
    """
    kept = [(module, module.__dict__.get("forward")) for module in modules]
    try:
        if plain:
            for module, _ in kept:
                module.__dict__.pop("forward", None)
        yield
    finally:
        for module, forward in kept:
            module.__dict__.pop("forward", None)
            if forward is not None:
                module.__dict__["forward"] = forward
