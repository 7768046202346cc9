"""The one way long work reports how far it is: a callback that the command line draws."""

from __future__ import annotations

from typing import Protocol

__all__ = ["Progress", "silent"]


class Progress(Protocol):
    """Called with what is being done, how much is done and the total (any unit).

    ``note`` is a short text shown beside the bar, such as ``loss 0.42``.
    """

    def __call__(self, what: str, done: float, total: float, note: str = "") -> None: ...


def silent(what: str, done: float, total: float, note: str = "") -> None:
    """The default: report nothing."""
