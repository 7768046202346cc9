"""Tensors and a JSON object in one file that tells whether it is still what was written: state of interrupted runs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from midblock.errors import OutputError
from midblock.reading import parse_json, shortened
from midblock.writing import TEMPORARY, atomic_path, output_error, write_json

__all__ = ["STATE_MARKER", "load_state", "mark_state_folder", "require_state_folder", "save_state"]

STATE_MARKER = "midblock-state.json"


def require_state_folder(folder: Path) -> None:
    """Refuse a folder for the state of an interrupted run that holds what midblock did not write.

    Raises:
        OutputError: it is not marked and not empty.
    """
    if folder.is_dir() and not (folder / STATE_MARKER).is_file():
        others = sorted(p.name for p in folder.iterdir() if not p.name.startswith(TEMPORARY))
        if others:
            raise OutputError(f"{folder} holds {shortened(others[0])}, which no interrupted run of midblock left "
                              "there; name an empty or a new folder for the state.")


def mark_state_folder(folder: Path) -> None:
    """Make a folder and mark it as midblock's, so that what is saved in it may be removed.

    Raises:
        OutputError: it holds what midblock did not write, or cannot be written.
    """
    require_state_folder(folder)
    if not (folder / STATE_MARKER).is_file():
        write_json(folder / STATE_MARKER, {"made by": "midblock, state of an interrupted run; --resume reads it"})


def save_state(path: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Write tensors and an object atomically as a safetensors file with a SHA-256 of both.

    Args:
        path: The file; its folder is marked as midblock's.
        tensors: Any shapes and dtypes that safetensors holds; copied to the CPU.
        state: Plain JSON values.

    Raises:
        OutputError: the file cannot be written, or its folder holds what midblock did not write.
    """
    mark_state_folder(path.parent)
    kept = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps(dict(state))
    with atomic_path(path) as temporary:
        try:
            save_file(kept, temporary, metadata={"state": text, "sha256": _digest(kept, text)})
        except SafetensorError as error:  # it carries the system's words, but is not an OSError
            raise output_error(path, error) from error


def load_state(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `save_state` wrote: tensors on the CPU, and the object.

    Raises:
        OutputError: the file cannot be read, or is not what was written.
    """
    try:
        with safe_open(path, framework="pt") as stored:
            said = stored.metadata() or {}
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise OutputError(f"{path} cannot be read: {shortened(str(error), 120)}.") from None
    text = said.get("state", "")
    if said.get("sha256") != _digest(tensors, text):
        raise OutputError(f"{path} is not what midblock wrote (its digest does not fit).")
    return tensors, parse_json(text, where=str(path), error=OutputError)


def _digest(tensors: Mapping[str, Tensor], text: str) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"|{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return digest.hexdigest()
