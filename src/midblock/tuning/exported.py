"""What `tune` exported into its run folder, by digest: ``--resume`` removes that and no more, then exports anew."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from midblock.errors import OutputError
from midblock.reading import file_digest, read_sealed, sealed
from midblock.removing import remove_empty, remove_marked
from midblock.writing import write_json

__all__ = ["EXPORTED", "free", "noting"]

EXPORTED = "exported.json"


def _noted(run: Path) -> dict[str, dict[str, str]]:
    if not (run / EXPORTED).is_file():
        return {}
    value = read_sealed(run / EXPORTED, advice="move the exported folders away, remove it, and resume",
                        error=OutputError)
    return {name: files for name, files in value.items() if isinstance(files, dict)}


def noting(run: Path, name: str) -> Callable[[Path], None]:
    """What notes the files of an exported folder in ``exported.json``, just before the folder appears in ``run``."""
    def note(made: Path) -> None:
        files = {p.relative_to(made).as_posix(): file_digest(p) for p in sorted(made.rglob("*")) if p.is_file()}
        write_json(run / EXPORTED, sealed({**_noted(run), name: files}))

    return note


def free(run: Path, name: str, *, resume: bool) -> None:
    """Remove what the interrupted run exported as ``name``, where it is as it was written.

    Raises:
        OutputError: something else lies there, or was changed.
    """
    folder = run / name
    if not resume or not folder.is_dir():
        return
    due = _noted(run).get(name, {})
    there = sorted(p for p in folder.rglob("*") if not p.is_dir() or p.is_symlink())
    if others := [p for p in there if p.is_symlink() or not p.is_file()
                  or due.get(p.relative_to(folder).as_posix()) != file_digest(p)]:
        raise OutputError(f"{folder} is to be exported anew, but its {others[0].relative_to(folder)} is not as "
                          "midblock wrote it; move it to another place, then resume.")
    if there:
        remove_marked(run / EXPORTED, there)
    remove_empty(folder)
