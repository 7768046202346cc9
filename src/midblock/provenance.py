"""Run folders: what a command was asked, what it ran on, and what it wrote.

Files are written beside their place and renamed into it, so an interruption never leaves
half a file. ``run.json`` holds format version, status, command, given and resolved
settings, package versions, git state, fingerprints, times and peak memory.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any

import pandas as pd

from midblock.errors import MidblockError, OutputError, SettingsError
from midblock.results import Table, json_ready

__all__ = ["FORMAT_VERSION", "RunFolder", "atomic_path", "cache_dir", "peak_memory_bytes",
           "read_run", "sha256_of", "write_json"]

FORMAT_VERSION = 1
_PACKAGES = ("midblock", "torch", "transformers", "peft", "trl", "accelerate", "datasets",
             "lm-eval", "safetensors", "gguf", "numpy", "scipy", "pandas")


def cache_dir() -> Path:
    """Folder for converted models and caches: ``$MIDBLOCK_CACHE`` or the XDG cache folder."""
    if given := os.environ.get("MIDBLOCK_CACHE"):
        return Path(given).expanduser()
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "midblock"


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder; rename it to ``path`` if no error came.

    Raises:
        OutputError: the disk is full or the folder cannot be written.
    """
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=path.suffix, dir=path.parent)
        os.close(handle)
        os.chmod(name, 0o666 & ~_umask())
        temporary = Path(name)
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise _output_error(path, error) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _output_error(path: Path, error: OSError) -> OutputError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return OutputError(f"cannot write {path}: the disk is full; free some space, then "
                           "repeat the command with --resume.")
    return OutputError(f"cannot write {path}: {error.strerror or error}.")


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as JSON (no NaN) atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(json_ready(value), indent=1, allow_nan=False) + "\n",
                             encoding="utf-8")


def sha256_of(*parts: bytes | str) -> str:
    """Hex digest over length-prefixed parts (so that ("ab","c") differs from ("a","bc"))."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()


def peak_memory_bytes() -> int:
    """Largest resident size of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _package_versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _git_state() -> dict[str, Any] | None:
    """Commit and dirtiness of the checkout midblock runs from; None outside one."""
    here = Path(__file__).resolve().parent
    try:
        def git(*words: str) -> str:
            return subprocess.run(["git", "-C", str(here), *words], check=True, text=True,
                                  capture_output=True, timeout=10).stdout.strip()
        if not (Path(git("rev-parse", "--show-toplevel")) / "src" / "midblock").is_dir():
            return None
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def read_run(folder: Path | str) -> dict[str, Any]:
    """``run.json`` of a run folder.

    Raises:
        OutputError: there is none, it is not JSON, or its format is newer than this version.
    """
    path = Path(folder) / "run.json"
    try:
        run: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise OutputError(f"{folder} is not a run folder: it has no run.json.") from None
    except (OSError, ValueError) as error:
        raise OutputError(f"cannot read {path}: {error}.") from None
    if run.get("format_version", 0) > FORMAT_VERSION:
        raise OutputError(f"{path} has format {run['format_version']}, newer than the format "
                          f"{FORMAT_VERSION} this midblock reads; update midblock.")
    return run


class RunFolder:
    """One command's output folder; use it as a context manager.

    Args:
        path: The folder. It must be absent or empty, unless ``resume``.
        command: Name of the command, such as ``profile``.
        settings: The settings as resolved; a resumed run must have the same.
        given: The settings as the user gave them (default: ``settings``).
        resume: Continue an interrupted run in this folder.
        may_differ: Settings that may be others than in the first call: the command itself checks what it keeps.

    Raises:
        OutputError: not empty, cannot be written, or nothing to resume from.
        SettingsError: resumed with settings that differ from those of the first call.

    On a clean exit the status becomes ``finished``; on an error ``failed`` with the
    message; on Ctrl-C ``interrupted``. A folder that this call made and that holds nothing but
    ``run.json`` when a user's mistake is found is removed again.
    """

    def __init__(self, path: Path | str, *, command: str, settings: Mapping[str, Any],
                 given: Mapping[str, Any] | None = None, resume: bool = False,
                 may_differ: Collection[str] = ()) -> None:
        self.path = Path(path).expanduser()
        self.resumed = False
        self._created = not self.path.exists()
        self._started = time.perf_counter()
        resolved = json_ready(dict(settings))
        if not resume:
            self.check_free(self.path)
        previous: dict[str, Any] = {}
        if self._contents(self.path):
            previous = read_run(self.path)
            self._check_same(previous, command, resolved, may_differ)
            self.resumed = True
        self.run: dict[str, Any] = {
            "format_version": FORMAT_VERSION, "status": "running", "command": command,
            "given": json_ready(dict(given if given is not None else settings)),
            "settings": resolved, "argv": sys.argv[1:],
            "versions": {"python": platform.python_version(), **_package_versions()},
            "platform": {"system": platform.platform(), "machine": platform.machine(),
                         "cpus": os.cpu_count()},
            "git": _git_state(),
            "started": previous.get("started", _now()), "finished": None,
            "seconds": None, "seconds_before": (previous.get("seconds") or 0.0)
            + (previous.get("seconds_before") or 0.0),
            "peak_memory_bytes": None, "models": {}, "data": {}, "undefined": [],
        }
        for key in ("models", "data"):
            self.run[key] = previous.get(key, {})
        self.save()

    @staticmethod
    def _contents(path: Path) -> list[str]:
        if path.exists() and not path.is_dir():
            raise OutputError(f"--out {path} is a file; name a folder.")
        return sorted(p.name for p in path.iterdir() if not p.name.startswith(".")) if path.exists() else []

    @classmethod
    def check_free(cls, path: Path | str) -> None:
        """Refuse a folder that already holds something; call it before long work.

        Raises:
            OutputError: it is a file or not empty.
        """
        path = Path(path).expanduser()
        if existing := cls._contents(path):
            raise OutputError(
                f"--out {path} is not empty (it holds {existing[0]}{' and more' if len(existing) > 1 else ''}); "
                "name another folder, or continue the run in it with --resume.")

    @staticmethod
    def _check_same(previous: dict[str, Any], command: str, resolved: dict[str, Any],
                    may_differ: Collection[str]) -> None:
        if previous.get("command") != command:
            raise OutputError(f"--resume: this folder holds a run of {previous.get('command')!r}, "
                              f"not of {command!r}.")
        before = previous.get("settings", {})
        changed = [k for k in sorted({*before, *resolved} - {*may_differ}) if before.get(k) != resolved.get(k)]
        if changed:
            what = "; ".join(f"{k} was {before.get(k)!r}, now {resolved.get(k)!r}" for k in changed)
            raise SettingsError(f"--resume: the settings differ from the interrupted run's: {what}. "
                                "Repeat them as they were, or name a new folder.")

    @property
    def finished(self) -> bool:
        """Whether this folder already holds a finished run (before the current call)."""
        return bool(self.run.get("status") == "finished")

    def save(self) -> None:
        """Write ``run.json`` as it stands."""
        self.run["seconds"] = round(time.perf_counter() - self._started, 3)
        self.run["peak_memory_bytes"] = peak_memory_bytes()
        write_json(self.path / "run.json", self.run)

    def update(self, **fields: Any) -> None:
        """Set fields of ``run.json`` (``models``, ``data``, ``results`` ...) and save it."""
        self.run.update(json_ready(fields))
        self.save()

    def record_inputs(self, *, models: Mapping[str, Any], data: Mapping[str, Any]) -> None:
        """Store what was read; a resumed run must read the same.

        Args:
            models: name -> description with a ``fingerprint``.
            data: Description of the data with a ``fingerprint``.

        Raises:
            SettingsError: resumed with other weights or data than those of the first call.
        """
        before: dict[str, Any] = {**self.run["models"], "data": self.run["data"]}
        for name, now in {**models, "data": data}.items():
            then = (before.get(name) or {}).get("fingerprint")
            if self.resumed and then and then != now.get("fingerprint"):
                raise SettingsError(f"--resume: the content of {name} has changed since the run was interrupted; "
                                    "name a new folder.")
        self.update(models=models, data=data)

    def file(self, name: str) -> Path:
        """Path of a file in this folder; its parent folder is made."""
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def write_text(self, name: str, text: str) -> Path:
        """Write a text file atomically and return its path."""
        with atomic_path(self.path / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
        return self.path / name

    def write_json(self, name: str, value: Any) -> Path:
        """Write a JSON file (no NaN) atomically and return its path."""
        write_json(self.path / name, value)
        return self.path / name

    def write_table(self, table: Table | pd.DataFrame, name: str = "table.csv") -> Path:
        """Write a tidy table as CSV atomically; undefined cells stay empty, reasons go to run.json."""
        if isinstance(table, Table):
            self.run["undefined"] = json_ready(table.reasons)
            table = table.frame()
        with atomic_path(self.path / name) as temporary:
            table.to_csv(temporary, index=False, float_format="%.10g")
        return self.path / name

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        if error is None:
            self.run["status"] = "finished"
        elif isinstance(error, KeyboardInterrupt):
            self.run["status"] = "interrupted"
        else:
            self.run["status"] = "failed"
            self.run["error"] = f"{type(error).__name__}: {error}"
        self.run["finished"] = _now()
        if isinstance(error, MidblockError) and self._created and self._only_run_json():
            (self.path / "run.json").unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                self.path.rmdir()
            return
        if error is None:
            self.save()
        else:  # the first error is the one to show
            with contextlib.suppress(OutputError):
                self.save()

    def _only_run_json(self) -> bool:
        return self.path.is_dir() and {p.name for p in self.path.iterdir()} <= {"run.json"}
