"""Other packages, kept quiet: their progress bars, advice, and messages of many lines."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator

from midblock.errors import MidblockError

__all__ = ["first_line", "foreign", "quiet"]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the progress bars and advice of transformers and the hub client off stderr."""
    from huggingface_hub.utils.tqdm import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )
    from transformers.utils import logging as tf_logging

    bars, level = tf_logging.is_progress_bar_enabled(), tf_logging.get_verbosity()
    hub_bars = not are_progress_bars_disabled()
    tf_logging.disable_progress_bar()
    tf_logging.set_verbosity_error()
    disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers|peft")
            yield
    finally:
        tf_logging.set_verbosity(level)
        if bars:
            tf_logging.enable_progress_bar()
        if hub_bars:
            enable_progress_bars()


@contextlib.contextmanager
def foreign(refusal: Callable[[Exception], MidblockError]) -> Iterator[None]:
    """Run another package's reader over a user's file, quietly: what it raises becomes the error that is told.

    Such readers raise anything on odd content. midblock's own errors pass, and so does want of memory, which says
    nothing about the file.

    Args:
        refusal: Makes the error from the package's own; `first_line` gives the latter's reason.
    """
    try:
        with quiet():
            yield
    except (MidblockError, MemoryError):
        raise
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":  # torch's, without importing torch for files that need none
            raise
        raise refusal(error) from error


def first_line(error: BaseException) -> str:
    """The first line of an error's text that says something, for a message of one line.

    Example:
        >>> first_line(ValueError("Validation error for field 'x':\\n    TypeError: expected int\\n"))
        "Validation error for field 'x': TypeError: expected int"
    """
    first, *rest = [line.strip() for line in str(error).strip().splitlines()] or ["no message"]
    return f"{first} {rest[0]}" if first.endswith(":") and rest else first
