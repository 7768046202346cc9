"""How files are written: beside their place and renamed into it, so that an interruption never leaves half a file.

What a killed run leaves has a name of its own (`TEMPORARY`), and the next run removes it. What is read back carries
format version and digest (`write_sealed`, `read_written`). The other direction is `midblock.reading`.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import platformdirs

from midblock.errors import OutputError
from midblock.reading import file_digest, read_sealed, sealed
from midblock.removing import TEMPORARY, remove_named
from midblock.results import json_ready

__all__ = ["FORMAT_VERSION", "TEMPORARY", "atomic_folder", "atomic_path", "cache_dir", "output_error", "output_errors",
           "read_written", "recomputed", "remove_leftovers", "replace_own", "sha256_of", "temporary_folder", "umask",
           "write_json", "write_sealed"]

FORMAT_VERSION = 2
"""Of everything that midblock writes and reads back; 2: with digests."""
_STALE_SECONDS = 3600.0


def cache_dir() -> Path:
    """Folder for converted models and caches: ``$MIDBLOCK_CACHE``, or the system's folder for caches."""
    if given := os.environ.get("MIDBLOCK_CACHE"):
        return Path(given).expanduser()
    return platformdirs.user_cache_path("midblock", appauthor=False)


def _temporary_prefix() -> str:
    return f"{TEMPORARY}{socket.gethostname()[:64]}-{os.getpid()}-"


@contextlib.contextmanager
def output_errors(path: Path) -> Iterator[None]:
    """What the system says of a failed write is an `OutputError`: a full disk names --resume."""
    try:
        yield
    except OSError as error:
        raise output_error(path, error) from error


def output_error(path: Path, error: Exception) -> OutputError:
    """What to tell of a failed write; a full disk is known by its number, or by words (safetensors has no numbers).

    Args:
        path: What was to be written.
        error: What the system or a library said.
    """
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or os.strerror(errno.ENOSPC) in str(error):
        return OutputError(f"cannot write {path}: the disk is full; free some space, then repeat the command with "
                           "--resume.")
    said = getattr(error, "strerror", None) or " ".join(str(error).split())
    return OutputError(f"cannot write {path}: {said.removesuffix('.')}.")


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder; rename it to ``path`` if no error came.

    Raises:
        OutputError: the disk is full or the folder cannot be written.
    """
    with output_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=_temporary_prefix(), suffix=path.suffix, dir=path.parent)
        os.close(handle)
        try:
            os.chmod(name, 0o666 & ~umask())
            yield Path(name)
            os.replace(name, path)
        finally:
            remove_named(Path(name))


@contextlib.contextmanager
def temporary_folder(beside: Path) -> Iterator[Path]:
    """A new folder beside ``beside`` that is gone afterwards.

    Raises:
        OutputError: the disk is full or the folder cannot be made.
    """
    with output_errors(beside):
        beside.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(beside.parent)
        temporary = Path(tempfile.mkdtemp(prefix=_temporary_prefix(), dir=beside.parent))
        try:
            temporary.chmod(0o777 & ~umask())
            yield temporary
        finally:
            with contextlib.suppress(OSError):
                remove_named(temporary)


@contextlib.contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder beside ``folder``; rename it to that if no error came.

    Raises:
        OutputError: ``folder`` is not empty (also where another process has made it meanwhile), the disk is full, or
            it cannot be written.
    """
    def require_free() -> None:
        if folder.is_symlink() or (folder.exists() and (not folder.is_dir() or any(folder.iterdir()))):
            raise OutputError(f"{folder} exists and is not an empty folder; name another.")

    with output_errors(folder):
        require_free()
        with temporary_folder(beside=folder) as temporary:
            yield temporary
            require_free()
            os.replace(temporary, folder)


def replace_own(made: Path, folder: Path, record: str) -> list[Path]:
    """Move the files of a temporary folder into another, where only files of an earlier call's are replaced.

    Args:
        made: From `temporary_folder`; files only.
        folder: Where to; made if absent.
        record: Name of the file there that holds the digests of what was written, by name.

    Returns:
        The files at their place.

    Raises:
        OutputError: a file of the same name is there that no such call wrote, or that was changed since; nothing is
            moved then.
    """
    with output_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        known: dict[str, Any] = {}
        if (folder / record).is_file():
            known = read_sealed(folder / record, advice="move these files away", error=OutputError)["files"]
        files = sorted(p.name for p in made.iterdir())
        for name in files:
            place = folder / name
            if place.is_symlink() or (
                    place.exists() and file_digest(place, error=OutputError) not in known.get(name, ())):
                raise OutputError(f"{place} is there, and is not as midblock wrote it; move it to another place, or "
                                  "name another folder.")
        now = {name: [file_digest(made / name, error=OutputError)] for name in files}
        # what stands there if a crash comes in between: the former file, or the new one
        write_json(folder / record, sealed({"files": {**known, **{n: [*known.get(n, ()), *now[n]] for n in files}}}))
        for name in files:
            os.replace(made / name, folder / name)
        write_json(folder / record, sealed({"files": {**known, **now}}))
    return [folder / name for name in files]


def remove_leftovers(folder: Path) -> list[Path]:
    """Remove what killed runs left in a folder (not below it); returns what was removed.

    A temporary file or folder goes only if midblock made it, on this machine, by a process that no longer
    runs, and if nothing wrote to it for an hour. (Process numbers of containers overlap.)
    """
    removed = []
    own = f"{TEMPORARY}{socket.gethostname()[:64]}-"
    with contextlib.suppress(OSError):
        for entry in list(os.scandir(folder)):
            if not entry.name.startswith(own) or _runs(entry.name.removeprefix(own).split("-")[0]):
                continue
            with contextlib.suppress(OSError):
                if time.time() - _last_written(Path(entry.path)) > _STALE_SECONDS:
                    remove_named(Path(entry.path))
                    removed.append(Path(entry.path))
    return removed


def _runs(process: str) -> bool:
    if not process.isdecimal():
        return True
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


def _last_written(path: Path) -> float:
    return max(float(p.lstat().st_mtime) for p in (path, *(path.rglob("*") if path.is_dir() else ())))


def umask() -> int:
    """Permissions that this process takes from the files that it makes."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as JSON (no NaN) atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(json_ready(value), indent=1, allow_nan=False) + "\n",
                             encoding="utf-8")


def write_sealed(path: Path, value: Mapping[str, Any]) -> None:
    """Write an object as JSON with format version and digest, atomically; `read_written` reads it back."""
    write_json(path, sealed({"format_version": FORMAT_VERSION, **json_ready(value)}))


def read_written(path: Path, *, advice: str) -> dict[str, Any]:
    """An object that `write_sealed` wrote, without format version and digest.

    Args:
        path: The file.
        advice: What to do where it cannot be used, as the end of a sentence (``repeat the run``).

    Raises:
        OutputError: missing, not such a file, changed since it was written, or of another format.
    """
    value = read_sealed(path, advice=advice, error=OutputError)
    version = value.pop("format_version", None)
    if version != FORMAT_VERSION:
        why = "update midblock" if isinstance(version, int) and version > FORMAT_VERSION else advice
        raise OutputError(f"{path} has format {version!r}, this midblock reads {FORMAT_VERSION}; {why}.")
    return value


def recomputed(why: object, then: str) -> None:
    """Say that saved work is damaged and what happens instead (a warning of logger ``midblock``).

    Args:
        why: The error, a sentence.
        then: The consequence, a sentence (``Its samples are run again.``).
    """
    logging.getLogger("midblock").warning("%s %s", why, then)


def sha256_of(*parts: bytes | str) -> str:
    """Hex digest over length-prefixed parts (so that ("ab","c") differs from ("a","bc"))."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()
