"""Where the frozen prefix's output of each sample is kept: in memory or on disk, under a byte limit.

A key is a digest of everything that the output depends on (token row, positions, weights, dtype,
block, settings), so that an entry is never stale: whatever changes gives another key. Nothing of
the current namespace (one model, one first block) is ever evicted: training visits all samples
in turn, and evicting the least recent would then evict each entry just before its use. When the
limit is reached, entries of other namespaces go first, then new entries are not admitted.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections import OrderedDict
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from midblock.errors import OutputError, SettingsError
from midblock.provenance import atomic_path

__all__ = ["PrefixCache", "parse_bytes"]

DEFAULT_LIMIT = {"memory": 4 << 30, "disk": 20 << 30}
_SIZE = re.compile(r"^(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?$", re.IGNORECASE)


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
            raise SettingsError(f"{text!r} is not a size in bytes; write 500M or 4GB.")
        value = round(float(found.group(1)) * 1024 ** " KMGT".index(found.group(2).upper() or " "))
    if value < 1:
        raise SettingsError(f"a limit of {text} bytes leaves no room for anything; use more, or cache none.")
    return value


class PrefixCache:
    """Prefix outputs (T, d) by key.

    Args:
        kind: ``memory`` or ``disk``.
        folder: Folder of a disk cache; several processes may share it.
        limit_bytes: Largest total size. Default: 4 GiB in memory, 20 GiB on disk.

    Attributes:
        hits, misses: Rows found and not found since the cache was made.
        refused_bytes: Bytes that were not admitted because the limit was reached.
        starts: First blocks of which something was kept by this process.

    Example:
        >>> cache = PrefixCache()
        >>> cache.put("model-a", "row-1", torch.ones(3, 4)); cache.get("model-a", "row-1").shape
        torch.Size([3, 4])
    """

    def __init__(self, kind: Literal["memory", "disk"] = "memory", *, folder: Path | str | None = None,
                 limit_bytes: int | str | None = None) -> None:
        if kind not in DEFAULT_LIMIT or (kind == "disk") != (folder is not None):
            raise SettingsError("a prefix cache is in memory (without a folder) or on disk (with one).")
        self.kind = kind
        self.folder = None if folder is None else Path(folder).expanduser()
        self.limit_bytes = DEFAULT_LIMIT[kind] if limit_bytes is None else parse_bytes(limit_bytes)
        self.hits = self.misses = self.refused_bytes = 0
        self.starts: set[int] = set()
        self._memory: OrderedDict[str, dict[str, Tensor]] = OrderedDict()
        self._sizes: OrderedDict[str, int] = OrderedDict()  # namespace -> bytes, least recently used first
        if self.folder is not None:
            self._open_folder(self.folder)

    @classmethod
    def from_spec(cls, spec: str, *, limit_bytes: int | str | None = None) -> PrefixCache | None:
        """The cache that ``none``, ``memory`` or ``disk:DIR`` names.

        Raises:
            SettingsError: another word.
        """
        if spec == "none":
            return None
        if spec == "memory":
            return cls("memory", limit_bytes=limit_bytes)
        kind, _, folder = spec.partition(":")
        if kind == "disk" and folder:
            return cls("disk", folder=folder, limit_bytes=limit_bytes)
        raise SettingsError(f"cache {spec!r} is not one of none, memory, disk:DIR.")

    @property
    def bytes(self) -> int:
        """Bytes held now."""
        return sum(self._sizes.values())

    def __len__(self) -> int:
        if self.folder is None:
            return sum(map(len, self._memory.values()))
        return sum(1 for _ in self.folder.glob("*/*.safetensors"))

    def get(self, namespace: str, key: str) -> Tensor | None:
        """The entry, or None. A broken file (of a disk that failed) is a miss and is removed."""
        found = self.peek(namespace, key)
        if found is None:
            self.misses += 1
        else:
            self.hits += 1
        return found

    def peek(self, namespace: str, key: str) -> Tensor | None:
        """The entry, or None, without counting it as used."""
        return self._memory.get(namespace, {}).get(key) if self.folder is None else self._read(namespace, key)

    def __contains__(self, namespace: object) -> bool:
        return namespace in self._sizes

    def put(self, namespace: str, key: str, value: Tensor) -> None:
        """Keep a copy of ``value`` if there is room for it."""
        size = value.numel() * value.element_size()
        self._use(namespace)
        if not self._make_room(namespace, size):
            self.refused_bytes += size
            return
        copy = value.detach().to("cpu", copy=True).contiguous()
        if self.folder is None:
            entries = self._memory.setdefault(namespace, {})
            if key in entries:
                return
            entries[key] = copy
        else:
            path = self._path(namespace, key)
            if path.exists():
                return
            with atomic_path(path) as temporary:
                save_file({"hidden": copy}, temporary)
        self._sizes[namespace] += size

    def clear(self, keep: int = 0) -> None:
        """Forget everything, files included, but for the ``keep`` namespaces last used."""
        for namespace in list(self._sizes)[:max(0, len(self._sizes) - keep)]:
            self._drop(namespace)

    def describe(self) -> dict[str, object]:
        """What ``run.json`` stores."""
        return {"kind": self.kind, "limit_bytes": self.limit_bytes, "bytes": self.bytes, "entries": len(self),
                "hits": self.hits, "misses": self.misses, "refused_bytes": self.refused_bytes}

    def _use(self, namespace: str) -> None:
        self._sizes.setdefault(namespace, 0)
        self._sizes.move_to_end(namespace)

    def _make_room(self, namespace: str, size: int) -> bool:
        while self.bytes + size > self.limit_bytes:
            other = next((n for n in self._sizes if n != namespace), None)
            if other is None:
                return False
            self._drop(other)
        return True

    def _drop(self, namespace: str) -> None:
        self._sizes.pop(namespace, None)
        self._memory.pop(namespace, None)
        if self.folder is not None:
            for path in (self.folder / namespace).glob("*.safetensors"):
                path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # another process may be writing there
                (self.folder / namespace).rmdir()

    def _path(self, namespace: str, key: str) -> Path:
        assert self.folder is not None
        return self.folder / namespace / f"{key}.safetensors"

    def _read(self, namespace: str, key: str) -> Tensor | None:
        path = self._path(namespace, key)
        try:
            return load_file(path)["hidden"]
        except FileNotFoundError:
            return None
        except (SafetensorError, KeyError, OSError):
            path.unlink(missing_ok=True)
            return None

    def _open_folder(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            spaces = sorted((p for p in folder.iterdir() if p.is_dir()), key=os.path.getmtime)
            for space in spaces:
                # left by a process that was killed while it wrote
                for stray in space.glob(".*.safetensors"):
                    if stray.stat().st_size == 0:
                        stray.unlink(missing_ok=True)
                self._sizes[space.name] = sum(p.stat().st_size for p in space.glob("[!.]*.safetensors"))
        except OSError as error:
            raise OutputError(f"cannot use {folder} as a cache folder: {error.strerror or error}.") from error


def row_bytes(row: Tensor) -> bytes:
    """The bytes of a tensor, for a digest."""
    return row.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
