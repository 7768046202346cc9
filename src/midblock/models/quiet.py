"""Other packages, kept quiet: their progress bars, advice, and messages of many lines."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

__all__ = ["first_line", "quiet"]


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


def first_line(error: BaseException) -> str:
    """The first line of an error's text, for a message of one line."""
    text = str(error).strip()
    return text.splitlines()[0] if text else "no message"
