"""Where the frozen prefix's output of each sample is kept: in memory or on disk, under a byte limit.

A key is a digest of everything that the output depends on (token row, positions, weights, dtype,
block, settings), so that an entry is never stale: whatever changes gives another key. Nothing of
the current namespace (one model, one first block) is ever evicted: training visits all samples
in turn, and evicting the least recent would then evict each entry just before its use. When the
limit is reached, entries of other namespaces go first, then new entries are not admitted.
"""

from __future__ import annotations

import contextlib
import functools
from collections import ChainMap, OrderedDict, deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from midblock.errors import OutputError, SettingsError
from midblock.sizes import parse_bytes
from midblock.tuning.cache_folder import CacheFolder, DamagedRowError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["PrefixCache"]

DEFAULT_LIMIT = {"memory": 4 << 30, "disk": 20 << 30}
_SHARE_OF_CARD = 0.25  # of a GPU's memory that is free when the first row comes


class PrefixCache:
    """Prefix outputs (T, d) by key.

    Args:
        kind: ``memory`` or ``disk``.
        folder: Folder of a disk cache: absent, empty, or one that a cache marked as its own. Several processes may
            share it. It is made when the first row is kept.
        limit_bytes: Largest total size. Default: 4 GiB in memory, 20 GiB on disk.

    Attributes:
        hits, misses: Rows found and not found since the cache was made.
        damaged: Rows found but not as they were written (a flipped bit, a file cut short): misses too.
        refused_bytes: Bytes that were not admitted because the limit was reached or the disk was full.
        starts: First blocks of which something was kept by this process.

    Raises:
        OutputError: the folder holds other files than a cache's own.

    Example:
        >>> import torch
        >>> cache = PrefixCache()
        >>> cache.put("model-a", "row-1", torch.ones(3, 4)); cache.get("model-a", "row-1").shape
        torch.Size([3, 4])
    """

    def __init__(self, kind: Literal["memory", "disk"] = "memory", *, folder: Path | str | None = None,
                 limit_bytes: int | str | None = None) -> None:
        if kind not in DEFAULT_LIMIT or (kind == "disk") != (folder is not None):
            raise SettingsError("a prefix cache is in memory (without a folder) or on disk (with one).")
        self.kind = kind
        self.limit_bytes = DEFAULT_LIMIT[kind] if limit_bytes is None else parse_bytes(limit_bytes)
        self.hits = self.misses = self.damaged = self.refused_bytes = 0
        self.starts: set[int] = set()
        self._coming: deque[dict[tuple[str, str], Future[Tensor | None]]] = deque(maxlen=2)
        self._rows: CacheFolder | _Memory = (_Memory(self.limit_bytes) if folder is None
                                             else CacheFolder(folder, self.limit_bytes))

    @classmethod
    def from_spec(cls, spec: str, *, limit_bytes: int | str | None = None) -> PrefixCache | None:
        """The cache that ``none``, ``memory`` or ``disk:DIR`` names.

        Raises:
            SettingsError: another word.
            OutputError: the folder holds other files than a cache's own.
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
    def folder(self) -> Path | None:
        """Folder of a disk cache."""
        return self._rows.folder if isinstance(self._rows, CacheFolder) else None

    @property
    def bytes(self) -> int:
        """Bytes held now (on disk: whole files, those of other processes included)."""
        return self._rows.bytes

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, namespace: str) -> bool:
        return namespace in self._rows

    def get(self, namespace: str, key: str, shape: tuple[int, ...] | None = None) -> Tensor | None:
        """The entry, or None. One that is not what was written, or of another shape, is a miss and is removed."""
        found = self.peek(namespace, key, shape)
        if found is None:
            self.misses += 1
        else:
            self.hits += 1
        return found

    def peek(self, namespace: str, key: str, shape: tuple[int, ...] | None = None) -> Tensor | None:
        """The entry, or None, without counting it as used."""
        coming = next((batch.pop((namespace, key)) for batch in self._coming if (namespace, key) in batch), None)
        try:
            found = None if coming is None else coming.result()
            if found is None:
                found = self._rows.read(namespace, key)
            if found is not None and shape is not None and tuple(found.shape) != shape:
                raise DamagedRowError(f"{tuple(found.shape)} where {shape} was due")
        except DamagedRowError:
            self.damaged += 1
            with contextlib.suppress(OSError):
                self._rows.remove(namespace, key)
            return None
        return found

    def expect(self, namespace: str, keys: Iterable[str]) -> None:
        """The entries of a batch are asked for soon: of a disk cache a thread reads them meanwhile.

        What was expected two batches ago and was not asked for is dropped.
        """
        if self.kind == "disk":
            known = ChainMap(*self._coming)
            self._coming.append({(namespace, key): known.get((namespace, key)) or self._reader.submit(
                self._rows.read, namespace, key) for key in keys})

    @functools.cached_property
    def _reader(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(1, thread_name_prefix="midblock-rows")

    def put(self, namespace: str, key: str, value: Tensor) -> None:
        """Keep a copy of ``value`` if there is room for it."""
        if self._rows.has(namespace, key):
            return
        copy = self._rows.kept(value.detach())
        try:
            kept = self._rows.write(namespace, key, copy)
        except (OutputError, OSError):  # a full disk: training goes on without these rows
            kept = False
        if not kept:
            self.refused_bytes += copy.numel() * copy.element_size()

    def clear(self, keep: int = 0) -> None:
        """Forget everything, the cache's own files included, but for the ``keep`` namespaces last used."""
        self._rows.clear(keep)

    def describe(self) -> dict[str, object]:
        """What ``run.json`` stores."""
        return {"kind": self.kind, "limit_bytes": self.limit_bytes, "bytes": self.bytes, "entries": len(self),
                "hits": self.hits, "misses": self.misses, "damaged": self.damaged,
                "refused_bytes": self.refused_bytes}


class _Memory:
    """Rows in this process: those of a GPU on the card, as far as a share of its free memory goes, then pinned.

    Neither way makes the host wait: a pinned row is written behind the work that makes it, on the stream that reads it.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.bytes = 0
        self._room: dict[torch.device, int] = {}  # bytes that rows may still take of a card
        self._spaces: OrderedDict[str, dict[str, Tensor]] = OrderedDict()  # least recently used first

    def __len__(self) -> int:
        return sum(map(len, self._spaces.values()))

    def __contains__(self, namespace: str) -> bool:
        return namespace in self._spaces

    def kept(self, row: Tensor) -> Tensor:
        """A copy of a row where it can stay."""
        import torch

        if row.device.type != "cuda":
            return row.to("cpu", copy=True).contiguous()
        size = row.numel() * row.element_size()
        room = self._room.setdefault(row.device, int(_SHARE_OF_CARD * torch.cuda.mem_get_info(row.device)[0]))
        if size <= room:
            self._room[row.device] = room - size
            return row.clone(memory_format=torch.contiguous_format)
        pinned = torch.empty(row.shape, dtype=row.dtype, pin_memory=True)
        return pinned.copy_(row, non_blocking=True)

    def has(self, namespace: str, key: str) -> bool:
        return key in self._spaces.get(namespace, {})

    def read(self, namespace: str, key: str) -> Tensor | None:
        return self._spaces.get(namespace, {}).get(key)

    def write(self, namespace: str, key: str, row: Tensor) -> bool:
        self._spaces.setdefault(namespace, {})
        self._spaces.move_to_end(namespace)
        size = row.numel() * row.element_size()
        if size > self.limit_bytes:
            return False
        while self.bytes + size > self.limit_bytes:
            other = next(iter(self._spaces))
            if other == namespace:
                return False
            self._drop(other)
        self._spaces[namespace][key] = row
        self.bytes += size
        return True

    def remove(self, namespace: str, key: str) -> None:
        row = self._spaces.get(namespace, {}).pop(key, None)
        if row is not None:
            self._forget([row])

    def clear(self, keep: int = 0) -> None:
        for namespace in list(self._spaces)[:max(0, len(self._spaces) - keep)]:
            self._drop(namespace)

    def _drop(self, namespace: str) -> None:
        self._forget(self._spaces.pop(namespace).values())

    def _forget(self, rows: Iterable[Tensor]) -> None:
        for row in rows:
            size = row.numel() * row.element_size()
            self.bytes -= size
            if row.device in self._room:
                self._room[row.device] += size
