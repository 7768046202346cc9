"""The one way in which a module's forward is replaced: on the instance, and given back exactly as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import nn

__all__ = ["forwards_replaced", "replace_forward"]

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
