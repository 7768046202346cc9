"""Checkpoints on disk: a folder of safetensors, read through mmap without a model, and its content hash."""

from __future__ import annotations

import contextlib
import functools
import math
import re
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from midblock import reading
from midblock.errors import CheckpointError, OutputError, UnsafeCheckpointError
from midblock.models.quiet import first_line
from midblock.models.validation import (
    check_adapter_halves,
    check_weight_dtypes,
    read_adapter_config,
    read_config,
    read_header,
    read_index,
)
from midblock.writing import atomic_path, cache_dir, sha256_of

if TYPE_CHECKING:  # names and headers are read without torch
    import torch
    from torch import Tensor

__all__ = ["ADAPTER_CONFIG", "ADAPTER_WEIGHTS", "INDEX", "WEIGHTS", "Checkpoint", "checked_folder", "file_digest",
           "fingerprint", "has_pickled_adapter",
           "is_adapter_folder", "is_pickled", "weight_files",
           "weights_are_there"]

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
_PICKLED_ADAPTER = "adapter_model.bin"

_READ_BYTES = 1 << 28  # of one read: systems refuse more than 2 GiB


@functools.cache
def _dtypes() -> dict[str, torch.dtype]:
    import torch

    return {
        "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
        "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64,
        "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    }


def is_adapter_folder(folder: Path) -> bool:
    """Whether a folder holds a PEFT adapter and no model of its own."""
    return (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").is_file()


def checked_folder(folder: Path, spec: str, allow_pickle: bool, *, weights: bool = True) -> Path:
    """The folder, if it holds a checkpoint or an adapter that may be read.

    Args:
        folder: The folder.
        spec: What the user called it.
        allow_pickle: Accept ``.bin`` weights.
        weights: Whether it must hold its weights; without them the config tells a model's shape.

    Raises:
        CheckpointError: no config, or no weights.
        UnsafeCheckpointError: the weights are pickled and ``allow_pickle`` was not given.
    """
    adapter = is_adapter_folder(folder)
    if not adapter and not (folder / "config.json").is_file():
        inside = sorted(folder.glob("*.gguf"))
        hint = f" It holds {inside[0].name}: name that file itself." if inside else ""
        raise CheckpointError(f"model {spec!r}: the folder has no config.json and no "
                              f"adapter_config.json, so it is not a checkpoint.{hint}")
    if weights_are_there(folder) or (weights and weight_files(folder, required=False)):
        return folder
    pickles = [p.name for p in sorted(folder.iterdir()) if p.suffix in (".bin", ".pt", ".pth", ".ckpt")
               and p.name not in ("training_args.bin", "optimizer.pt", "scheduler.pt")]
    if not pickles:
        if not weights:
            return folder
        raise CheckpointError(
            f"model {spec!r}: the folder has no weights (looked for {WEIGHTS}, {INDEX} and "
            f"{ADAPTER_WEIGHTS}).")
    if not allow_pickle:
        raise UnsafeCheckpointError(
            f"model {spec!r} has only pickled weights ({pickles[0]}), and reading a pickle can run any "
            "code. Convert it to safetensors, or allow it with --allow-pickle if you trust its source.")
    return folder


def has_pickled_adapter(folder: Path) -> bool:
    """Whether an adapter that is a pickle lies in a model's own folder; transformers would put it on the model."""
    return (all((folder / name).is_file() for name in ("config.json", ADAPTER_CONFIG, _PICKLED_ADAPTER))
            and not (folder / ADAPTER_WEIGHTS).is_file())


def is_pickled(folder: Path) -> bool:
    """Whether a model's folder has no safetensors, whole or sharded."""
    return not any((folder / n).is_file() for n in ("model.safetensors", "model.safetensors.index.json"))


def weights_are_there(folder: Path) -> bool:
    """Whether all of a model's safetensors are in its folder; of a hub model only the small files may be."""
    if (folder / WEIGHTS).is_file():
        return True
    index = folder / INDEX
    return index.is_file() and all((folder / shard).is_file() for shard in set(read_index(index).values()))


def fingerprint(folder: Path) -> str:
    """SHA-256 of a checkpoint's content: its weight files and its config or adapter config.

    Any change of a weight changes it. Every byte is hashed, several files at once; the digest of
    a file is kept in the cache under (path, size, modification time), so a second call is free.
    """
    files = weight_files(folder, required=False) or sorted(folder.glob("*.bin"))
    files = files + [p for name in ("config.json", ADAPTER_CONFIG) if (p := folder / name).is_file()]
    with ThreadPoolExecutor(max_workers=4) as pool:
        digests = list(pool.map(file_digest, files))
    return sha256_of(*(part for path, digest in zip(files, digests, strict=True)
                       for part in (path.name, digest)))


def file_digest(path: Path) -> str:
    """SHA-256 of a file, remembered in the cache folder by path, size and times."""
    real = path.resolve()
    if real.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", real.name):
        return real.name  # the hub cache names large files by their SHA-256
    before = real.stat()
    key = sha256_of(str(real), str(before.st_size), str(before.st_mtime_ns), str(before.st_ino))
    store = cache_dir() / "digests" / key[:40]
    with contextlib.suppress(OSError, UnicodeError):
        known = store.read_text(encoding="ascii").strip()
        if re.fullmatch(r"[0-9a-f]{64}", known):
            return known
    digest = reading.file_digest(real, error=CheckpointError)
    after = real.stat()
    settled = time.time_ns() - after.st_mtime_ns > 2_000_000_000
    # A file written a moment ago can change again within one tick of its clock: do not keep it.
    if settled and (before.st_mtime_ns, before.st_size) == (after.st_mtime_ns, after.st_size):
        with contextlib.suppress(OutputError), atomic_path(store) as temporary:
            temporary.write_text(digest, encoding="ascii")
    return digest


def weight_files(folder: Path, *, required: bool = True) -> list[Path]:
    """Safetensors files of a checkpoint or adapter, in order."""
    for name in (WEIGHTS, ADAPTER_WEIGHTS):
        # A single adapter file beside a model (PEFT writes both) belongs to the adapter only.
        if (folder / name).is_file() and (name == WEIGHTS or is_adapter_folder(folder)):
            return [folder / name]
    if (folder / INDEX).is_file():
        shards = read_index(folder / INDEX)
        missing = sorted({s for s in shards.values() if not (folder / s).is_file()})
        if missing:
            raise CheckpointError(f"{folder}: {len(missing)} of the shards that {INDEX} names are missing "
                                  f"({', '.join(missing[:3])}); fetch the checkpoint again.")
        return [folder / s for s in sorted(set(shards.values()))]
    if required:
        raise CheckpointError(f"{folder} has no safetensors weights (looked for {WEIGHTS}, {INDEX} "
                              f"and {ADAPTER_WEIGHTS}).")
    return []


class Checkpoint:
    """Reads the weights of a checkpoint or a PEFT adapter through mmap, without building a model.

    Args:
        folder: What `resolve_checkpoint` returns.

    Raises:
        CheckpointError: no weights, a missing shard, or a truncated or damaged file (named).
        UnsafeCheckpointError: pickled weights only.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self.is_adapter = is_adapter_folder(self.folder)
        checked_folder(self.folder, str(folder), allow_pickle=False)
        self.config: dict[str, Any] = (read_adapter_config(self.folder / ADAPTER_CONFIG) if self.is_adapter
                                       else read_config(self.folder / "config.json"))
        self.files = weight_files(self.folder)
        self._where: dict[str, Path] = {}
        self._entries: dict[str, dict[str, Any]] = {}
        for path in self.files:
            for name, entry in read_header(path).items():
                self._where[name] = path
                self._entries[name] = entry
        if self.is_adapter:
            check_adapter_halves(self._entries, str(self.folder))
        index = self.folder / INDEX
        if index.is_file() and len(self.files) > 1:
            lost = sorted(set(read_index(index)) - set(self._entries))
            if lost:
                raise CheckpointError(f"{index} names weights that no shard holds: {', '.join(lost[:3])}"
                                      f"{' ...' if len(lost) > 3 else ''}.")
        self._open: dict[Path, Any] = {}
        self._data_start: dict[Path, int] = {}
        self._blocks_prefix: str | None = None

    def check_weight_dtypes(self) -> None:
        """Refuse whole numbers where weights are expected (`midblock.models.validation`).

        Raises:
            CheckpointError: a weight of whole numbers, and no quantisation that explains it.
        """
        check_weight_dtypes(self._entries, self.config, str(self.folder))

    def names(self) -> list[str]:
        """Names of all tensors, in file order."""
        return list(self._entries)

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def _entry(self, name: str) -> dict[str, Any]:
        try:
            return self._entries[name]
        except KeyError:
            raise CheckpointError(f"{self.folder} holds no tensor {name!r}.") from None

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header."""
        return tuple(self._entry(name)["shape"])

    def stored_dtype(self, name: str) -> str:
        """Stored dtype of a tensor in the words of safetensors, from the header."""
        return str(self._entry(name)["dtype"])

    def dtype(self, name: str) -> torch.dtype:
        """Stored dtype of a tensor, from the header."""
        kind = self.stored_dtype(name)
        if kind not in _dtypes():
            raise CheckpointError(f"{self._where[name]}: {name} has the dtype {kind}, which cannot be read.")
        return _dtypes()[kind]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(self.nbytes_of(name) for name in self._entries)

    @property
    def numel(self) -> int:
        """Numbers in all floating-point tensors."""
        return sum(math.prod(self.shape(name)) for name in self._entries if self.dtype(name).is_floating_point)

    def nbytes_of(self, name: str) -> int:
        """Bytes of one tensor."""
        start, end = self._entry(name)["data_offsets"]
        return int(end) - int(start)

    def location(self, name: str) -> tuple[Path, int]:
        """File of a tensor and the byte at which its data begin (row-major, little-endian)."""
        start = int(self._entry(name)["data_offsets"][0])
        path = self._where[name]
        if path not in self._data_start:
            with reading.open_file(path, error=CheckpointError) as stream:
                self._data_start[path] = 8 + int.from_bytes(stream.read(8), "little")
        return path, self._data_start[path] + start

    def main_dtype(self) -> torch.dtype:
        """The floating-point dtype that most bytes of the checkpoint are stored in."""
        import torch

        sums: dict[torch.dtype, int] = {}
        for name in self._entries:
            dtype = self.dtype(name)
            if dtype.is_floating_point:
                sums[dtype] = sums.get(dtype, 0) + self.nbytes_of(name)
        return max(sums, key=lambda d: sums[d]) if sums else torch.float32

    def read(self, name: str) -> Tensor:
        """One tensor as stored, backed by the file's pages: clone it before writing to it."""
        path = self._where[name] if name in self._where else self._where_missing(name)
        try:
            if path not in self._open:
                self._open[path] = safe_open(path, framework="pt", device="cpu")
            return self._open[path].get_tensor(name)  # type: ignore[no-any-return]
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(f"{path}: {name} cannot be read ({first_line(error)}).") from error

    def load(self, name: str) -> Tensor:
        """One tensor as stored, read into memory of its own: unlike pages of a mapped file it is gone when dropped.

        Raises:
            CheckpointError: the file is gone, or shorter than its header says.
        """
        path, offset = self.location(name)
        import torch

        data = torch.empty(self.nbytes_of(name), dtype=torch.uint8)
        left = data.numpy().data
        with reading.open_file(path, error=CheckpointError) as stream:
            try:
                stream.seek(offset)
                while left and (got := stream.readinto(left[:_READ_BYTES])):
                    left = left[got:]
            except OSError as error:
                raise CheckpointError(f"{path}: {name} cannot be read ({first_line(error)}).") from error
        if left:
            raise CheckpointError(f"{path} ends before {name} does; fetch the checkpoint again.")
        return data.view(self.dtype(name)).reshape(self.shape(name))

    def load_rows(self, name: str, rows: Sequence[int]) -> Tensor:
        """Some rows of a matrix as stored, in this order, read alone.

        Raises:
            CheckpointError: as `load`.
        """
        path, offset = self.location(name)
        import torch

        wide = self.nbytes_of(name) // self.shape(name)[0]
        data = torch.empty((len(rows), wide), dtype=torch.uint8)
        with reading.open_file(path, error=CheckpointError) as stream:
            try:
                for row, place in zip(rows, data.numpy(), strict=True):
                    stream.seek(offset + row * wide)
                    if stream.readinto(place.data) < wide:
                        raise CheckpointError(f"{path} ends before {name} does; fetch the checkpoint again.")
            except OSError as error:
                raise CheckpointError(f"{path}: {name} cannot be read ({first_line(error)}).") from error
        return data.view(self.dtype(name)).reshape(len(rows), *self.shape(name)[1:])

    def _where_missing(self, name: str) -> Path:
        self._entry(name)
        raise AssertionError("unreachable")

    def release(self) -> None:
        """Unmap the files, so that their pages no longer count as this process's memory."""
        self._open.clear()

    # -- blocks ------------------------------------------------------------------------------

    @property
    def num_blocks(self) -> int | None:
        """Decoder blocks that the config names; None for an adapter."""
        if self.is_adapter:
            return None
        text = self.config.get("text_config")
        config = text if isinstance(text, dict) else self.config
        # an encoder-decoder's config names both depths, also where its decoder stands alone (BartForCausalLM)
        keys = ("num_decoder_layers", "decoder_layers", "num_hidden_layers", "n_layer", "n_layers", "num_layers")
        return next((config[k] for k in keys if isinstance(config.get(k), int)), None)

    def block_of(self, name: str) -> int | None:
        """Index of the decoder block that a tensor belongs to, from the names alone.

        Raises:
            CheckpointError: the names show no single list of as many blocks as the config says.
        """
        if self._blocks_prefix is None:
            self._blocks_prefix = self._find_blocks_prefix()
        match = re.match(rf"{re.escape(self._blocks_prefix)}(\d+)\.", name)
        return int(match.group(1)) if match else None

    def _find_blocks_prefix(self) -> str:
        found: dict[str, set[int]] = {}
        for name in self._entries:
            # the outermost number of a name; inner ones count experts or parts of a block
            match = re.match(r"^(.*?(?:^|\.))(\d+)\.", name)
            if match:
                found.setdefault(match.group(1), set()).add(int(match.group(2)))
        count = self.num_blocks
        # further blocks (multi-token prediction) may follow those of the config
        fit = [p for p, numbers in found.items() if count is not None and numbers >= set(range(count))]
        fit = [p for p in fit if len(found[p]) == count] or fit
        if self.config.get("is_encoder_decoder"):
            fit = [p for p in fit if "decoder" in p] or fit
        if len(fit) > 1:
            fit = [p for p in fit if not re.search(r"vision|visual|audio|image|encoder", p)] or fit
        if len(fit) != 1:
            listing = ", ".join(f"{p}* ({len(n)})" for p, n in found.items()) or "none"
            raise CheckpointError(f"{self.folder}: looked for one numbered list of {count} blocks among the "
                                  f"weights' names, found {len(fit)}; lists: {listing}.")
        return fit[0]
