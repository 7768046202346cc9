"""A prefix cache on disk: a folder that says whose it is, and rows that prove themselves.

A folder becomes a cache by its marker file, which holds the format's version and an id. Every row's file name
begins with that id, and its header repeats namespace and key beside a digest of the numbers. Only regular
files of such names, in folders of the cache's own below a marked folder, are ever counted or removed;
whatever else lies there stays. The total size stands in one file that is changed under a lock, so that the limit
holds for all processes that share the folder together.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock
from safetensors import SafetensorError, safe_open

from midblock.errors import OutputError
from midblock.reading import read_json, user_path
from midblock.removing import TEMPORARY, remove_empty, remove_marked, remove_named
from midblock.writing import atomic_path, sha256_of

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["CacheFolder", "DamagedRowError", "row_bytes"]

MARKER = "midblock-prefix-cache.json"
FORMAT = 2
_LOCK, _TOTAL = ".midblock-prefix-cache.lock", ".midblock-prefix-cache.bytes"


class DamagedRowError(Exception):
    """A stored row is not what was written."""


def row_bytes(row: Tensor) -> bytes:
    """The bytes of a tensor, for a digest."""
    import torch

    return row.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def _digest(row: Tensor) -> str:
    return sha256_of(str(row.dtype), str(tuple(row.shape)), row_bytes(row))


class CacheFolder:
    """Rows (T, d) by namespace and key in one folder. Made by `midblock.tuning.PrefixCache`.

    Args:
        folder: Absent, empty, or marked by an earlier cache. It is made at the first use.
        limit_bytes: Largest total size of the rows' files.

    Raises:
        OutputError: the folder holds other things, or cannot be used.
    """

    def __init__(self, folder: Path | str, limit_bytes: int) -> None:
        self.folder = user_path(folder, error=OutputError)
        try:
            self._id = self._read_marker() if self.folder.exists() else None
            above = next(p for p in (self.folder, *self.folder.absolute().parents) if p.exists())
        except OSError as error:
            raise OutputError(f"cannot use {self.folder} as a cache folder: {error.strerror or error}.") from None
        if not os.access(above, os.W_OK | os.X_OK):
            raise OutputError(f"cannot use {self.folder} as a cache folder: {above} cannot be written.")
        self.limit_bytes = limit_bytes
        self._lock: FileLock | None = None
        self._used: set[str] = set()

    # ------------------------------------------------------------------ the folder

    def _touch(self, space: Path) -> None:
        """Note that a namespace is in use, once per process."""
        if space.name not in self._used:
            space.mkdir(exist_ok=True)
            os.utime(space)
            self._used.add(space.name)

    def _read_marker(self) -> str | None:
        """The id of a marked folder; None for an empty one."""
        path = self.folder / MARKER
        if not self.folder.is_dir():
            raise OutputError(f"{self.folder} is not a folder; name a folder for the cache.")
        if not path.is_file():
            own = (f".{MARKER}", _LOCK, _TOTAL)
            others = sorted(p.name for p in self.folder.iterdir() if not p.name.startswith(own))
            if others:
                raise OutputError(f"{self.folder} holds files that no prefix cache made ({others[0]}"
                                  f"{f' and {len(others) - 1} more' if len(others) > 1 else ''}); name an empty or a "
                                  f"new folder for the cache, such as {self.folder / 'prefix-cache'}.")
            return None
        try:
            value = read_json(path, error=OutputError)
        except OutputError as error:
            raise OutputError(f"{str(error).removesuffix('.')}: it marks no prefix cache; name a new folder.") from None
        number, name = value.get("format"), value.get("id")
        if not isinstance(number, int) or not isinstance(name, str) or not re.fullmatch(r"[0-9a-f]{32}", name):
            raise OutputError(f"{path} names no format and id of a prefix cache; name a new folder.")
        if number != FORMAT:
            raise OutputError(f"{self.folder} is a prefix cache of format {number}, this midblock writes format "
                              f"{FORMAT}; name a new folder.")
        return name

    def _open(self) -> str:
        """The id of the folder, which is made and marked if need be."""
        if self._lock is None:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._lock = FileLock(self.folder / _LOCK)
                with self._lock:
                    self._id = self._read_marker()
                    if self._id is None:
                        self._id = uuid.uuid4().hex
                        with atomic_path(self.folder / MARKER) as temporary:
                            temporary.write_text(json.dumps({
                                "made by": "midblock, a cache of prefix outputs; it may be removed at any time",
                                "format": FORMAT, "id": self._id}) + "\n", encoding="utf-8")
                    self._recount()
            except OSError as error:
                self._lock = None
                raise OutputError(f"cannot use {self.folder} as a cache folder: {error.strerror or error}.") from error
        assert self._id is not None
        return self._id

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        self._open()
        assert self._lock is not None
        with self._lock:
            yield

    # ------------------------------------------------------------------ which files are the cache's

    def _space(self, namespace: str) -> Path:
        return self.folder / f"prefix-{sha256_of(namespace)}"

    def _path(self, namespace: str, key: str) -> Path:
        return self._space(namespace) / f"{self._open()}-{sha256_of(namespace, key)}.safetensors"

    def _spaces(self) -> list[Path]:
        """The cache's own folders, least recently used first."""
        if self._id is None:
            return []
        found = [Path(e.path) for e in os.scandir(self.folder)
                 if re.fullmatch(r"prefix-[0-9a-f]{64}", e.name) and e.is_dir(follow_symlinks=False)]
        return sorted(found, key=lambda p: p.stat().st_mtime_ns)

    def _rows(self, space: Path) -> Iterator[os.DirEntry[str]]:
        own = re.compile(rf"{self._id}-[0-9a-f]{{64}}\.safetensors")
        with contextlib.suppress(FileNotFoundError):  # another process dropped it
            yield from (e for e in os.scandir(space) if own.fullmatch(e.name) and e.is_file(follow_symlinks=False))

    def __len__(self) -> int:
        return sum(1 for space in self._spaces() for _ in self._rows(space))

    # ------------------------------------------------------------------ sizes

    @property
    def bytes(self) -> int:
        """Bytes of all rows, of every process that shares the folder."""
        if self._id is None:
            return 0
        try:
            return int((self.folder / _TOTAL).read_text(encoding="ascii"))
        except (OSError, ValueError):  # never written, or cut by a crash
            return sum(e.stat().st_size for space in self._spaces() for e in self._rows(space))

    def _set_total(self, value: int) -> None:
        (self.folder / _TOTAL).write_text(f"{value:020d}", encoding="ascii")

    def _recount(self) -> None:
        """Under the lock: what is there; what a killed process left half-written goes (rows are written under it)."""
        spaces = self._spaces()
        for place in (self.folder, *spaces):
            for entry in list(os.scandir(place)):
                if entry.name.startswith(TEMPORARY) and entry.is_file(follow_symlinks=False):
                    remove_named(Path(entry.path))
        self._set_total(sum(e.stat().st_size for space in spaces for e in self._rows(space)))

    # ------------------------------------------------------------------ rows

    def __contains__(self, namespace: str) -> bool:
        return self._space(namespace).is_dir()

    def has(self, namespace: str, key: str) -> bool:
        """Whether there is such a row, whole or not."""
        return self._path(namespace, key).exists()

    @staticmethod
    def kept(row: Tensor) -> Tensor:
        """A copy of a row that can be written."""
        return row.to("cpu", copy=True).contiguous()

    def read(self, namespace: str, key: str) -> Tensor | None:
        """The row, or None.

        Raises:
            DamagedRowError: there is one, but not as it was written.
        """
        path = self._path(namespace, key)
        try:
            with safe_open(path, framework="pt") as stored:
                said = stored.metadata()
                row: Tensor = stored.get_tensor("hidden")
        except FileNotFoundError:
            return None
        except (SafetensorError, OSError, ValueError, TypeError, RuntimeError) as error:
            raise DamagedRowError(str(error)) from error
        due = {"namespace": namespace, "key": key, "sha256": _digest(row)}
        if said != due:
            raise DamagedRowError(f"{path.name} is not what was written")
        self._touch(path.parent)
        return row

    def write(self, namespace: str, key: str, row: Tensor) -> bool:
        """Keep a row if there is room once other namespaces are gone; whether it was kept.

        Raises:
            OutputError: the file cannot be written.
        """
        path = self._path(namespace, key)
        from safetensors.torch import save

        content = save({"hidden": row}, metadata={"namespace": namespace, "key": key, "sha256": _digest(row)})
        with self._locked():
            if path.exists():
                return True
            if not self._make_room(namespace, len(content)):
                return False
            self._touch(path.parent)
            # counted before it is there: a crash in between leaves a total that is too large, never too small
            self._set_total(self.bytes + len(content))
            with atomic_path(path) as temporary:
                temporary.write_bytes(content)
        return True

    def _make_room(self, namespace: str, size: int) -> bool:
        if size > self.limit_bytes:
            return False
        others = [s for s in self._spaces() if s != self._space(namespace)]
        while self.bytes + size > self.limit_bytes:
            if not others:
                return False
            self._drop(others.pop(0))
        return True

    def remove(self, namespace: str, key: str) -> None:
        """Remove one row."""
        path = self._path(namespace, key)
        with self._locked(), contextlib.suppress(FileNotFoundError):
            size = path.lstat().st_size
            remove_marked(self.folder / MARKER, [path])
            self._set_total(max(0, self.bytes - size))

    def clear(self, keep: int = 0) -> None:
        """Remove all rows but those of the ``keep`` namespaces last used."""
        if self._id is None:
            return
        with self._locked():
            spaces = self._spaces()
            for space in spaces[:max(0, len(spaces) - keep)]:
                self._drop(space)

    def _drop(self, space: Path) -> None:
        rows = list(self._rows(space))
        freed = sum(entry.stat().st_size for entry in rows)
        remove_marked(self.folder / MARKER, [Path(entry.path) for entry in rows])
        self._set_total(max(0, self.bytes - freed))
        self._used.discard(space.name)
        remove_empty(space)  # unless something else lies there
