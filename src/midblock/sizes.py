"""Sizes in bytes, as people write and read them, and the cores there are."""

from __future__ import annotations

import os
import re

from midblock.errors import SettingsError

__all__ = ["parse_bytes", "size_text", "usable_cores"]

_SIZE = re.compile(r"^(\d{1,15}(?:\.\d{1,15})?)\s*([KMGT]?)(?:i?B)?$", re.IGNORECASE | re.ASCII)


def parse_bytes(text: str | int) -> int:
    """Bytes of ``4GB``, ``500M``, ``1048576`` (powers of 1024).

    Raises:
        SettingsError: not such a size, or 0.

    Example:
        >>> parse_bytes("1.5G")
        1610612736
    """
    if isinstance(text, int):
        value = text
    else:
        if not (found := _SIZE.match(text.strip())):
            raise SettingsError(f"{text[:80]!r} is not a size in bytes; write 500M or 4GB.")
        value = round(float(found.group(1)) * 1024 ** " KMGT".index(found.group(2).upper() or " "))
    if value < 1:
        raise SettingsError(f"a limit of {text} bytes leaves no room for anything; use more.")
    return value


def size_text(size: float) -> str:
    """Bytes for people, in the units that `parse_bytes` reads (powers of 1024).

    Example:
        >>> size_text(3 << 20), size_text(1.25 * (1 << 30))
        ('3 MB', '1.2 GB')
    """
    if size < 1 << 30:
        return f"{max(1, round(size / (1 << 20)))} MB"
    return f"{size / (1 << 30):.1f} GB"


def usable_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
