"""GGUF files: converted once into a folder of safetensors in the cache."""

from __future__ import annotations

import contextlib
import io
import logging
import mmap
import re
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from midblock import reading
from midblock.errors import CheckpointError, ModelNotFoundError, OutputError
from midblock.models.checkpoints import Checkpoint, file_digest
from midblock.models.quiet import first_line, foreign
from midblock.reading import open_file, read_json, read_sealed, sealed, shortened
from midblock.removing import remove_marked
from midblock.writing import cache_dir, recomputed, sha256_of, write_json

if TYPE_CHECKING:
    import torch

__all__ = ["convert_gguf", "precision_of"]

_CONVERSION = 3  # raise it when the conversion of a GGUF file changes: older caches are left aside
# in a converted folder: the GGUF file, the dtype that holds its precision, and a digest of every other file
_ORIGIN = "midblock.json"
_OWN = re.compile(r"midblock\.json|(generation_)?config\.json|model[\w.-]*\.safetensors(\.index\.json)?|"
                  r"chat_template\.jinja|(tokenizer|special_tokens|added_tokens)[\w.-]*")
_LOG = logging.getLogger("midblock")
_TOLD_SECONDS = 5.0
# llama.cpp's names of pre-tokenizers that split digits one by one before GPT-2's rule;
# transformers leaves the digit step out when it reads a tokenizer from GGUF.
_DIGIT_SPLITTING = ("smollm", "starcoder", "refact", "command-r", "codeshell")
# llama.cpp's file types of weights that are not quantised
_GGUF_PRECISION = {0: "float32", 1: "float16", 32: "bfloat16", None: "float32"}


def convert_gguf(path: Path, spec: str) -> Path:
    """Convert a GGUF file into a safetensors folder in the cache, once, and return the folder.

    Weights are stored as float32: dequantised values (scale times integer plus offset) are not
    exactly representable in 16 bits. Their precision is far below that of 16 bits, though, which the
    folder says (`precision_of`), so that ``--dtype auto`` may take either. Safe when several processes do
    it at once: one converts under a file lock, the others wait, and the folder appears whole by a rename. A folder
    whose files are no longer what was written is named in a warning and converted again.

    Raises:
        ModelNotFoundError: no such file.
        CheckpointError: it is no whole GGUF file, or of an architecture that transformers cannot read from one.
        OutputError: the cache cannot be written, or holds a folder in its place that midblock did not write.
    """
    stem = re.sub(r"[^\w.\-]+", "_", path.stem)
    root = cache_dir() / "converted"
    with open_file(path, error=ModelNotFoundError) as stream:
        magic = stream.read(4)
    if magic != b"GGUF":
        raise CheckpointError(f"model {spec!r}: {path.name} is not a GGUF file (it starts with {magic!r}).")
    if re.search(r"-\d{5}-of-\d{5}$", path.stem) and not path.stem.endswith("-00001-of-00001"):
        raise CheckpointError(f"model {spec!r}: {path.name} is one part of a split GGUF file; join the "
                              "parts first (llama.cpp's gguf-split --merge).")
    folder = root / f"{stem}-{sha256_of(str(_CONVERSION), file_digest(path))[:16]}"
    if folder.is_dir() and _damage(folder) is None:
        return folder
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f".{folder.name}.lock"):
            # another process may have made it while this one waited
            if folder.is_dir() and (damage := _damage(folder)) is not None:
                _remove_converted(folder, damage)
                recomputed(f"{folder} is damaged: {damage}.", f"{path.name} is converted again.")
            if not folder.is_dir():
                _write_converted(path, folder, spec)
    except OSError as error:
        raise OutputError(f"cannot write the cache folder {root}: {error.strerror or first_line(error)}; "
                          "name another with MIDBLOCK_CACHE.") from error
    return folder


def _damage(folder: Path) -> str | None:
    """What in a converted folder is not what was written; None where all is."""
    try:
        digests = read_sealed(folder / _ORIGIN, advice="it is written anew", error=CheckpointError)["digests"]
        found = {p.name: file_digest(p) for p in folder.iterdir() if p.name != _ORIGIN}
    except (CheckpointError, KeyError, OSError) as error:
        return str(error).removesuffix(".")
    wrong = sorted(name for name in {*digests, *found} if digests.get(name) != found.get(name))
    return f"{wrong[0]} is not what was written" if wrong else None


def _remove_converted(folder: Path, damage: str) -> None:
    """Remove a marked folder, unless somebody put something else into it."""
    names = {p.name for p in folder.iterdir() if not (p.is_file() and _OWN.fullmatch(p.name))}
    if names or not (folder / _ORIGIN).is_file():
        what = f"holds {shortened(min(names))}, which midblock did not write" if names else f"lacks {_ORIGIN}"
        raise OutputError(f"{folder} is damaged ({damage}) and {what}; remove the folder.")
    remove_marked(folder / _ORIGIN, list(folder.iterdir()), folder=True)


def _write_converted(path: Path, folder: Path, spec: str) -> None:
    _LOG.info("converting %s to safetensors (once, about a minute) ...", path.name)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from midblock.models.saving import save_checkpoint

    # transformers draws its progress bar with plain tqdm, which no setting of its turns off: it is read instead
    with contextlib.redirect_stderr(_Relay(path.name)), foreign(lambda error: CheckpointError(
            f"model {spec!r}: {path.name} cannot be converted ({type(error).__name__}: {first_line(error)}); the file "
            "is damaged, or transformers knows no GGUF of its architecture.")):
        model = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit and tokenizer.model_max_length > 10**9:
        tokenizer.model_max_length = limit
    _split_digits(path, tokenizer)

    def mark(written: Path) -> None:
        write_json(written / _ORIGIN, sealed({
            "file": path.name, "precision": _GGUF_PRECISION.get(_gguf_number(path, b"general.file_type"), "bfloat16"),
            "digests": {p.name: reading.file_digest(p) for p in written.iterdir()}}))

    save_checkpoint(model, tokenizer, folder, finish=mark)


class _Relay(io.StringIO):
    """Takes what a progress bar draws, and tells the log how far it is, every few seconds."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name, self._stream, self._told = name, sys.stderr, time.monotonic()

    def write(self, text: str) -> int:
        found = re.search(r"(\d+)/(\d+)", text)
        if found and time.monotonic() - self._told >= _TOLD_SECONDS:
            self._told = time.monotonic()
            with contextlib.redirect_stderr(self._stream):
                _LOG.info("converting %s: %s of %s tensors", self._name, *found.groups())
        return len(text)


def precision_of(folder: Path) -> torch.dtype:
    """The dtype that holds a checkpoint's weights as exactly as they are known, from its headers.

    It is the one that most of its bytes are stored in; of a converted GGUF file that of its own weights, and
    bfloat16 where they are quantised.
    """
    import torch

    from midblock.models.dtypes import DTYPES

    if (folder / _ORIGIN).is_file():
        return DTYPES.get(str(read_json(folder / _ORIGIN, error=CheckpointError).get("precision")), torch.float32)
    return Checkpoint(folder).main_dtype()


def _split_digits(path: Path, tokenizer: Any) -> None:
    from tokenizers import pre_tokenizers

    if _gguf_string(path, b"tokenizer.ggml.pre") in _DIGIT_SPLITTING:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)])


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
