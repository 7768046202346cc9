"""Hidden states of all batches between two blocks: in memory, or in a file where they do not fit."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Hashable
from pathlib import Path
from types import TracebackType
from typing import IO, Self

import torch
from torch import Tensor

from midblock.errors import OutputError
from midblock.sizes import size_text

__all__ = ["HiddenStates", "require_disk"]


class HiddenStates:
    """One tensor per key, replaced as a pass goes on.

    A file is read and written plainly, not mapped: its pages are then never this process's memory. It has no name, so
    that nothing is left of it whatever becomes of the process.

    Args:
        folder: Of the file; None: everything stays in memory.
        size: Bytes of all tensors together.

    Raises:
        OutputError: the folder is not there, or its disk has not so much free (says how much is missing).
    """

    def __init__(self, folder: Path | None = None, size: int = 0) -> None:
        self._kept: dict[Hashable, Tensor] = {}
        self._places: dict[Hashable, tuple[int, torch.dtype, torch.Size]] = {}
        self._free: dict[int, list[int]] = {}
        self._end = 0
        self._file: IO[bytes] | None = None
        if folder is None:
            return
        require_disk(folder, size)
        try:
            self._file = tempfile.TemporaryFile(prefix="midblock-", dir=folder, buffering=0)  # noqa: SIM115
        except OSError as error:
            raise _no_place(folder, error) from None

    @property
    def on_disk(self) -> bool:
        """Whether they are in a file."""
        return self._file is not None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
                 ) -> None:
        self._kept.clear()
        if self._file is not None:
            self._file.close()

    def put(self, key: Hashable, hidden: Tensor) -> None:
        """Keep a tensor in place of the one of the same key, which had the same shape and dtype."""
        hidden = hidden.detach().to("cpu").contiguous()
        if self._file is None:
            self._kept[key] = hidden
            return
        if key not in self._places:
            if free := self._free.get(hidden.nbytes):
                place = free.pop()
            else:
                place, self._end = self._end, self._end + hidden.nbytes
            self._places[key] = (place, hidden.dtype, hidden.shape)
        place, dtype, shape = self._places[key]
        if (dtype, shape) != (hidden.dtype, hidden.shape):
            raise ValueError(f"{key}: {hidden.dtype} {tuple(hidden.shape)} in place of {dtype} {tuple(shape)}")
        left = hidden.reshape(-1).view(torch.uint8).numpy().data
        try:
            self._file.seek(place)
            while left:
                left = left[self._file.write(left):]
        except OSError as error:
            raise OutputError(f"hidden states cannot be kept on disk: {error.strerror or error}. Name another folder "
                              "as scratch.") from None

    def get(self, key: Hashable) -> Tensor:
        """The tensor of a key, on the CPU.

        Raises:
            KeyError: nothing was put there.
        """
        if self._file is None:
            return self._kept[key]
        place, dtype, shape = self._places[key]
        hidden = torch.empty(shape, dtype=dtype)
        left = hidden.reshape(-1).view(torch.uint8).numpy().data
        self._file.seek(place)
        while left and (got := self._file.readinto(left)):  # type: ignore[attr-defined]
            left = left[got:]
        return hidden

    def drop(self, key: Hashable) -> None:
        """Forget a tensor."""
        self._kept.pop(key, None)
        if (found := self._places.pop(key, None)) is not None:
            place, dtype, shape = found
            self._free.setdefault(shape.numel() * dtype.itemsize, []).append(place)


def require_disk(folder: Path, size: int) -> None:
    """Refuse a scratch folder that hidden states will not fit into.

    Args:
        folder: Where they will be written.
        size: Bytes of all of them.

    Raises:
        OutputError: the folder is not there, or its disk has not so much free (says how much is missing).
    """
    try:
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise _no_place(folder, error) from None
    if free < size:
        raise OutputError(f"the hidden states of this pass take {size_text(size)}, and the disk of {folder} has "
                          f"{size_text(free)} free: {size_text(size - free)} are missing. Name another folder as "
                          "scratch, or use fewer samples.")


def _no_place(folder: Path, error: OSError) -> OutputError:
    return OutputError(f"hidden states cannot be kept in {folder}: {error.strerror or error}; name another folder as "
                       "scratch.")
