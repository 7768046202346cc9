"""The one place where files are removed: only what midblock wrote and marked, which is checked here each time.

A file is marked by its own name (`TEMPORARY`, `LOCK`), or by a marker file of midblock's in its folder or in one above.
Whatever else lies there stays. No other module removes or replaces files, but for `midblock.writing`, which renames
what it has written into its place; a test holds that.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from midblock.errors import OutputError

__all__ = ["LOCK", "TEMPORARY", "remove_empty", "remove_marked", "remove_named"]

TEMPORARY = ".midblock-tmp-"
"""How the name of every file and folder begins that is renamed into its place when it is complete."""
LOCK = ".midblock.lock"
"""Name of the file by which a process holds a folder."""


def remove_named(path: Path) -> None:
    """Remove a temporary file or folder, or a lock: its name says whose it is.

    Raises:
        ValueError: the name is another.
        OSError: the system refuses.
    """
    if path.name != LOCK and not path.name.startswith(TEMPORARY):
        raise ValueError(f"{path} is not a temporary file of midblock's")
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_marked(marker: Path, paths: Iterable[Path], *, folder: bool = False) -> str | None:
    """Remove files that midblock wrote into a folder that holds its marker, or below it.

    Args:
        marker: The marker; it may be one of ``paths``.
        paths: What was written there. What is missing, a link or a folder stays as it is.
        folder: Remove folders that are left empty, and at last the marker and its folder where nothing else lies
            there.

    Returns:
        With ``folder`` the name of what stays and keeps the folder; else None.

    Raises:
        OutputError: the marker is not there.
        ValueError: a path leaves its folder.
        OSError: the system refuses.
    """
    place = marker.parent
    if marker.is_symlink() or not marker.is_file():
        raise OutputError(f"{place} has no {marker.name}, by which midblock knows its own files, so nothing in it is "
                          "removed; name another folder.")
    for path in paths:
        if not path.parent.resolve().is_relative_to(place.resolve()):
            raise ValueError(f"{path} is not in the folder of {marker}")
        if path.is_file() and not path.is_symlink() and not (folder and path == marker):
            path.unlink(missing_ok=True)
    if not folder:
        return None
    for below in sorted((p for p in place.rglob("*") if p.is_dir() and not p.is_symlink()), reverse=True):
        remove_empty(below)
    others = sorted(p.relative_to(place).as_posix() for p in place.rglob("*")
                    if p != marker and (p.is_symlink() or not p.is_dir()))
    if others:
        return others[0]
    marker.unlink(missing_ok=True)  # last: what a crash leaves is still marked
    remove_empty(place)
    return None


def remove_empty(folder: Path) -> None:
    """Remove a folder if nothing lies in it."""
    with contextlib.suppress(OSError):
        os.rmdir(folder)
