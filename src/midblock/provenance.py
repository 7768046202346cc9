"""Run folders: what a command was asked, what it ran on, and what it wrote.

``run.json`` holds format version, status, command, given and resolved settings, package versions, git
state, fingerprints, times, peak memory, and digests: its own and that of each table. A run folder belongs
to one process at a time.
"""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any

import pandas as pd
from pydantic import BaseModel, Field

from midblock import ranks
from midblock.errors import MidblockError, OutputError, SettingsError
from midblock.reading import file_digest, read_csv, user_path, validated
from midblock.removing import LOCK, TEMPORARY, remove_empty, remove_marked, remove_named
from midblock.results import Table, json_ready
from midblock.writing import (
    FORMAT_VERSION,
    atomic_path,
    output_errors,
    read_written,
    write_json,
    write_sealed,
)

__all__ = ["RunFolder", "check_whole", "held", "peak_memory_bytes", "read_run", "read_table"]

_PACKAGES = ("midblock", "torch", "transformers", "peft", "trl", "accelerate", "datasets",
             "lm-eval", "safetensors", "gguf", "numpy", "scipy", "pandas")


def peak_memory_bytes() -> int:
    """Largest resident size of this process so far, in bytes."""
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def package_versions() -> dict[str, str]:
    """Name -> version of the installed packages on which results depend."""
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


class _Run(BaseModel, extra="allow"):
    """What every ``run.json`` holds, as far as other commands rely on it."""

    status: str
    command: str
    settings: dict[str, Any]
    models: dict[str, Any]
    data: dict[str, Any]
    seconds: float | None = None
    seconds_before: float | None = None
    digests: dict[str, str] = Field(default_factory=dict)
    files: list[str] = Field(default_factory=list)


def read_run(folder: Path | str, *, finished: bool = False) -> dict[str, Any]:
    """``run.json`` of a run folder.

    Args:
        folder: The folder.
        finished: Refuse a run that is not finished.

    Raises:
        OutputError: there is none, it is not of midblock, it was changed after it was written, it is of another
            format, or the run is not finished.
    """
    path = user_path(folder, error=OutputError) / "run.json"
    if not path.exists():
        raise OutputError(f"{folder} is not a run folder: it has no run.json.")
    run = read_written(path, advice="repeat the run in a new folder")
    validated(_Run, run, where=str(path), error=OutputError)
    if finished and run["status"] != "finished":
        raise OutputError(f"the run in {folder} is not finished (its status is {run['status']!r}); finish it with "
                          "--resume, or repeat it.")
    return run


def read_table(folder: Path | str, *, columns: Collection[str] = (), text: Collection[str] = (),
               numbers: Collection[str] = ("value", "low", "high", "n"), name: str = "table.csv") -> pd.DataFrame:
    """A table of a run folder, as the run wrote it.

    Args:
        folder: The folder.
        columns: Columns that must be there.
        text: Columns that stay text; ``layer`` and ``mask`` always do (01000).
        numbers: Columns of numbers.
        name: Its file.

    Raises:
        OutputError: it is missing, lacks a column, holds text for a number, or a finished run's table was changed.
    """
    folder = user_path(folder, error=OutputError)
    run = read_run(folder)
    path = folder / name
    if not path.exists():
        raise OutputError(f"{folder} has no {name}; a {run['command']} run writes it when it ends.")
    digest = run.get("digests", {}).get(name)
    if digest is not None and run["status"] == "finished":
        _check_digest(path, digest)
    return read_csv(path, columns=tuple(columns), numbers=tuple(numbers), text=("layer", "mask", *text),
                    error=OutputError)


def check_whole(folder: Path | str) -> dict[str, Any]:
    """``run.json`` of a run folder whose tables are as they were written, where the run is finished.

    Raises:
        OutputError: as `read_run`; or a table of a finished run is missing or was changed.
    """
    run = read_run(folder)
    for name, digest in run.get("digests", {}).items() if run["status"] == "finished" else ():
        _check_digest(user_path(folder, error=OutputError) / name, digest)
    return run


def _check_digest(path: Path, digest: str) -> None:
    if digest != file_digest(path, error=OutputError):
        raise OutputError(f"{path} was changed after midblock wrote it (its digest does not fit); repeat the run in a "
                          "new folder.")


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Within the context no other process of midblock writes into a folder, which is made if absent.

    Raises:
        OutputError: another one does, or it cannot be written.
    """
    created = not folder.exists()
    lock = _lock(folder)
    try:
        yield
    finally:
        _let_go(folder, lock)
        if created:
            remove_empty(folder)


def _let_go(folder: Path, lock: Any) -> None:
    if lock is not None:
        with contextlib.suppress(OSError):
            remove_named(folder / LOCK)
        lock.release()


def _lock(path: Path) -> Any:
    """Hold a run folder for this process; the system lets it go when the process ends."""
    from filelock import FileLock, Timeout

    lock = FileLock(path / LOCK, timeout=0, thread_local=False)
    try:
        with output_errors(path):
            path.mkdir(parents=True, exist_ok=True)
            lock.acquire()
    except OutputError as error:
        if isinstance(error.__cause__, Timeout):
            raise OutputError(f"--out {path} is in use by another run of midblock; wait for its end, or name another "
                              "folder.") from None
        raise
    except NotImplementedError:  # a file system without locks
        return None
    return lock


def _differences(before: Mapping[str, Any], now: Mapping[str, Any], may_differ: Collection[str],
                 may_grow: Collection[str] = (), group: str = "") -> list[str]:
    """In words, which settings differ. A switch that is off is as one that the version of that run did not have."""
    found = []
    for key in sorted({*before, *now}):
        name, a, b = group + key, before.get(key), now.get(key)
        if name in may_differ or a == b or all(value is None or value is False for value in (a, b)):
            continue
        if name in may_grow and a is not None and b is not None and b > a:
            continue
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += _differences(a, b, may_differ, may_grow, f"{name}.")
        else:
            found.append(f"{name} was {a!r}, now {b!r}")
    return found



class RunFolder:
    """One command's output folder; use it as a context manager.

    Args:
        path: The folder. It must be absent or empty, unless ``resume``.
        command: Name of the command, such as ``profile``.
        settings: The settings as resolved; a resumed run must have the same.
        given: The settings as the user gave them (default: ``settings``).
        resume: Continue an interrupted run in this folder.
        may_differ: Settings (``training.steps`` for one of a group) that may be others than in the first call: the
            command itself checks what it keeps.
        may_grow: Settings that may be larger than in the first call.

    Raises:
        OutputError: not empty, cannot be written, or nothing to resume from.
        SettingsError: resumed with settings that differ from those of the first call.

    On a clean exit the status becomes ``finished``; on an error ``failed`` with the
    message; on Ctrl-C ``interrupted``. A folder that this call made and that holds nothing but
    ``run.json`` when a user's mistake is found is removed again. Until then no other process can use
    the folder, and what a killed run left in it half-written is removed at the start. Of the processes of one job
    (`midblock.ranks`) the first has the folder; in the others nothing that writes does anything.
    """

    def __init__(self, path: Path | str, *, command: str, settings: Mapping[str, Any],
                 given: Mapping[str, Any] | None = None, resume: bool = False,
                 may_differ: Collection[str] = (), may_grow: Collection[str] = ()) -> None:
        self.path = user_path(path, error=OutputError)
        self.resumed = False
        self._created = not self.path.exists()
        self._started = time.perf_counter()
        self._held: Any = None
        self.run: dict[str, Any] = {}
        resolved = json_ready(dict(settings))
        self.run, self.resumed = ranks.first(lambda: self._take(
            command, resolved, resolved if given is None else json_ready(dict(given)), resume, may_differ, may_grow))

    def _take(self, command: str, resolved: dict[str, Any], given: dict[str, Any], resume: bool,
              *others: Collection[str]) -> tuple[dict[str, Any], bool]:
        if not resume:
            self._require_free(self.path)
        self._contents(self.path)
        self._held = _lock(self.path)
        try:
            self._start(command, resolved, given, resume, *others)
        except BaseException:
            self._leave(remove=self._created)
            raise
        return self.run, self.resumed

    def _start(self, command: str, resolved: dict[str, Any], given: dict[str, Any], resume: bool,
               *others: Collection[str]) -> None:
        if not resume:
            self._require_free(self.path)  # another process may have used it before the lock was ours
        previous: dict[str, Any] = {}
        if self._contents(self.path):
            previous = read_run(self.path)
            self._check_same(previous, command, resolved, *others)
            self.resumed = True
            self._remove_half_written()
        self.run = {
            "format_version": FORMAT_VERSION, "status": "running", "command": command,
            "given": given,
            "settings": resolved, "argv": sys.argv[1:],
            "versions": {"python": platform.python_version(), **package_versions()},
            "platform": {"system": platform.platform(), "machine": platform.machine(),
                         "cpus": os.cpu_count()},
            "git": _git_state(),
            "started": previous.get("started", _now()), "finished": None,
            "seconds": None, "seconds_before": (previous.get("seconds") or 0.0)
            + (previous.get("seconds_before") or 0.0),
            "peak_memory_bytes": None, "models": {}, "data": {}, "undefined": [], "digests": {}, "files": [],
        }
        for key in ("models", "data", "digests", "files"):
            self.run[key] = previous.get(key, self.run[key])
        self.save()

    @staticmethod
    def _contents(path: Path) -> list[str]:
        try:
            if path.exists() and not path.is_dir():
                raise OutputError(f"--out {path} is a file; name a folder.")
            return sorted(p.name for p in path.iterdir() if not p.name.startswith(".")) if path.exists() else []
        except OSError as error:
            raise OutputError(f"--out {path} cannot be used: {error.strerror or error}.") from None

    @classmethod
    def check_free(cls, path: Path | str) -> None:
        """Refuse a folder that already holds something; call it before long work.

        Raises:
            OutputError: it is a file or not empty.
        """
        ranks.first(lambda: cls._require_free(user_path(path, error=OutputError)))

    @classmethod
    def _require_free(cls, path: Path) -> None:
        if existing := cls._contents(path):
            raise OutputError(
                f"--out {path} is not empty (it holds {existing[0]}{' and more' if len(existing) > 1 else ''}); "
                "name another folder, or continue the run in it with --resume.")

    @staticmethod
    def _check_same(previous: dict[str, Any], command: str, resolved: dict[str, Any],
                    may_differ: Collection[str], may_grow: Collection[str]) -> None:
        if previous.get("command") != command:
            raise OutputError(f"--resume: this folder holds a run of {previous.get('command')!r}, "
                              f"not of {command!r}.")
        if changed := _differences(previous.get("settings", {}), resolved, may_differ, may_grow):
            raise SettingsError(f"--resume: the settings differ from the interrupted run's: {'; '.join(changed)}. "
                                "Repeat them as they were, or name a new folder.")

    def _remove_half_written(self) -> None:
        """What killed runs left: while the lock is held, no other process writes here."""
        for folder, folders, files in os.walk(self.path):
            for name in [n for n in (*folders, *files) if n.startswith(TEMPORARY)]:
                with contextlib.suppress(OSError):
                    remove_named(Path(folder) / name)
            folders[:] = [n for n in folders if not n.startswith(TEMPORARY)]

    def _leave(self, *, remove: bool = False) -> None:
        """Let the folder go; ``remove``: and the folder itself, where it holds nothing."""
        _let_go(self.path, self._held)
        if remove:
            remove_empty(self.path)

    @property
    def finished(self) -> bool:
        """Whether this folder already holds a finished run (before the current call)."""
        return bool(self.run.get("status") == "finished")

    def save(self) -> None:
        """Write ``run.json`` as it stands."""
        if ranks.follows():
            return
        self.run["seconds"] = round(time.perf_counter() - self._started, 3)
        self.run["peak_memory_bytes"] = peak_memory_bytes()
        write_sealed(self.path / "run.json", self.run)

    def update(self, **fields: Any) -> None:
        """Set fields of ``run.json`` (``models``, ``data``, ``results`` ...) and save it."""
        self.run.update(json_ready(fields))
        self.save()

    def publish(self, names: Sequence[str], **fields: Any) -> None:
        """Set ``files``, what the result consists of, and further fields; what an earlier result of this folder had
        besides (tables of arms that are gone) is removed with its digest."""
        earlier = set(self.run["files"]) - set(names)
        for name in () if ranks.follows() else earlier:
            with contextlib.suppress(OSError, ValueError):  # ValueError: outside this folder, so none of ours
                remove_marked(self.path / "run.json", [self.path / name])
        self.run["digests"] = {name: digest for name, digest in self.run["digests"].items() if name not in earlier}
        self.update(files=names, **fields)

    def record_inputs(self, *, models: Mapping[str, Any], data: Mapping[str, Any]) -> None:
        """Store what was read; a resumed run must read the same.

        Args:
            models: name -> description with a ``fingerprint``.
            data: Description of the data with a ``fingerprint``.

        Raises:
            SettingsError: resumed with other weights or data than those of the first call; or a process of this job
                has others than the first one, or other packages.
        """
        self._same_everywhere({name: v.get("fingerprint") for name, v in {**models, "data": data}.items()})
        before: dict[str, Any] = {**self.run["models"], "data": self.run["data"]}
        for name, now in {**models, "data": data}.items():
            then = (before.get(name) or {}).get("fingerprint")
            if self.resumed and then and then != now.get("fingerprint"):
                raise SettingsError(f"--resume: the content of {name} has changed since the run was interrupted; "
                                    "name a new folder.")
        self.update(models=models, data=data)

    @staticmethod
    def _same_everywhere(fingerprints: dict[str, Any]) -> None:
        """Processes of one job must have read the same."""
        own = {**package_versions(), **fingerprints}
        first = ranks.first(lambda: own)
        if other := [name for name in {**first, **own} if first.get(name) != own.get(name)]:
            raise SettingsError(f"process {ranks.rank()} of this job has another {', '.join(other)} than the first one "
                                "(their versions or digests differ); give all of them the same files and packages.")

    def file(self, name: str) -> Path:
        """Path of a file in this folder; its parent folder is made."""
        path = self.path / name
        if not ranks.follows():
            path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def write_text(self, name: str, text: str) -> Path:
        """Write a text file atomically, keep its digest, and return its path."""
        if ranks.follows():
            return self.path / name
        with atomic_path(self.path / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
            self.run["digests"][name] = file_digest(temporary, error=OutputError)
        return self.path / name

    def write_json(self, name: str, value: Any) -> Path:
        """Write a JSON file (no NaN) atomically and return its path."""
        if ranks.follows():
            return self.path / name
        write_json(self.path / name, value)
        return self.path / name

    def write_table(self, table: Table | pd.DataFrame, name: str = "table.csv") -> Path:
        """Write a tidy table as CSV atomically; undefined cells stay empty, reasons go to run.json."""
        if ranks.follows():
            return self.path / name
        if isinstance(table, Table):
            self.run["undefined"] = json_ready(table.reasons)
            table = table.frame()
        with atomic_path(self.path / name) as temporary:
            table.to_csv(temporary, index=False, float_format="%.10g")
            self.run["digests"][name] = file_digest(temporary, error=OutputError)
        return self.path / name

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        if ranks.follows():
            return
        if error is None:
            self.run["status"] = "finished"
        elif isinstance(error, KeyboardInterrupt):
            self.run["status"] = "interrupted"
        else:
            self.run["status"] = "failed"
            self.run["error"] = f"{type(error).__name__}: {error}"
        self.run["finished"] = _now()
        try:
            if isinstance(error, MidblockError) and self._created and self._only_run_json():
                remove_marked(self.path / "run.json", [self.path / "run.json"])
            elif error is None:
                self.save()
            else:  # the first error is the one to show
                with contextlib.suppress(OutputError):
                    self.save()
        finally:
            self._leave(remove=isinstance(error, MidblockError) and self._created)

    def _only_run_json(self) -> bool:
        return self.path.is_dir() and {p.name for p in self.path.iterdir()} <= {"run.json", LOCK}
