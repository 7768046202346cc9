"""Settings that most commands share, declared once; a command gives its own default."""

from __future__ import annotations

from typing import Any

from midblock.settings.base import setting

__all__ = ["batch_size", "max_length", "samples", "seed"]


def samples(default: int | None, help: str = "How many samples to draw from the data (all if unset).",
            *, least: int = 1) -> Any:
    """How many samples."""
    return setting(default, ge=least, metavar="N", help=help)


def max_length(default: int, *, least: int = 2) -> Any:
    """Tokens per sample."""
    return setting(default, ge=least, metavar="TOKENS",
                   help="Cut samples after this many tokens; how many were cut is shown.")


def batch_size(default: int = 8, help: str = "Samples in one batch. Results do not depend on it.") -> Any:
    """Samples per forward."""
    return setting(default, ge=1, metavar="N", help=help)


def seed(help: str = "Seed of every random choice.") -> Any:
    """A seed of 32 bits, which every library takes."""
    return setting(0, ge=0, lt=2**32, metavar="N", help=help)
