"""Training checkpoints: what is trained, the optimizer, random states, the log of steps; safetensors and JSON only.

A checkpoint is begun with one file and completed with another, which holds the digest of every file in between.
Only what midblock wrote into folders that were begun so is ever removed: half-written ones, and all but the last two
complete ones. A checkpoint whose files do not fit their digests is passed over, so that an older one serves.
"""

from __future__ import annotations

import contextlib
import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from midblock.errors import MidblockError, OutputError
from midblock.reading import file_digest, read_json, read_sealed, sealed
from midblock.removing import TEMPORARY, remove_marked, remove_named
from midblock.writing import atomic_path, write_json

__all__ = ["begin", "complete", "last_checkpoint", "load_random_state", "load_tree", "random_state",
           "require_no_others", "save_tree", "stored_steps"]

BEGUN = "midblock_begun.json"
COMPLETE = "midblock_complete.json"
KEPT = 2
_OWN = re.compile(
    r"midblock_(begun|complete)\.json|(adapter_(model|config)|trained|optimizer|random_\d+|trainer_state|training_args)"
    r"\.(safetensors|json)|README\.md|(tokenizer|special_tokens|added_tokens|vocab|merges|chat_template|spiece|"
    r"sentencepiece)[\w.-]*")
_ADVICE = "an older checkpoint or the start serves"


def begin(folder: Path) -> None:
    """Mark a folder as a checkpoint that is being written; what an earlier try left in it goes."""
    _remove(folder)
    write_json(folder / BEGUN, {"made by": "midblock"})


def complete(folder: Path, step: int, steps: list[dict[str, Any]], blocks: Sequence[dict[str, Any]] = ()) -> None:
    """Seal a checkpoint with its files' digests and what was measured so far, of steps and of blocks in some of them.

    Older ones but the last go.
    """
    files = {str(p.relative_to(folder)): file_digest(p) for p in _files(folder)}
    write_json(folder / COMPLETE, sealed({"step": step, "files": files, "steps": steps, "blocks": list(blocks)}))
    for _, old in sorted(_numbered(folder.parent))[:-KEPT]:
        if (old / COMPLETE).is_file():
            _remove(old)


def last_checkpoint(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is whole, and what was wrong with newer ones.

    What a killed process left half-written is removed.
    """
    wrong: list[str] = []
    for _, path in sorted(_numbered(folder), reverse=True):
        if not (path / COMPLETE).is_file():
            _remove(path)
            continue
        try:
            files = _sealed(path)["files"]
            damaged = [name for name, digest in files.items()
                       if not (path / name).is_file() or file_digest(path / name) != digest]
        except (MidblockError, OSError, AttributeError, TypeError) as error:
            damaged = [f"{COMPLETE} ({error})"]
        if not damaged:
            return path, wrong
        wrong.append(f"{path.name} was not used: {damaged[0]} is not what was written")
    return None, wrong


def stored_steps(checkpoint: Path, of: Literal["steps", "blocks"] = "steps") -> list[dict[str, Any]]:
    """What was measured up to a checkpoint."""
    found: list[dict[str, Any]] = _sealed(checkpoint).get(of, [])
    return found


def require_no_others(folder: Path) -> None:
    """Refuse to start anew where checkpoints lie.

    Raises:
        OutputError: the folder holds some.
    """
    if folder.is_dir() and (found := sorted(_numbered(folder))):
        raise OutputError(f"{folder} holds checkpoints ({found[-1][1].name}); resume from them (--resume, "
                          "resume=True) or name a new folder.")


def _sealed(checkpoint: Path) -> dict[str, Any]:
    return read_sealed(checkpoint / COMPLETE, advice=_ADVICE, error=OutputError)


def _numbered(folder: Path) -> Iterator[tuple[int, Path]]:
    for path in folder.glob("checkpoint-*"):
        number = path.name.removeprefix("checkpoint-")
        if re.fullmatch(r"[0-9]{1,9}", number) and path.is_dir() and not path.is_symlink():
            yield int(number), path


def _remove(folder: Path) -> None:
    """Remove a checkpoint that was begun: files of names that one has; what else lies there stays, and is no state."""
    with contextlib.suppress(OSError):
        for temporary in folder.glob(f"{TEMPORARY}*"):
            remove_named(temporary)
        if (folder / BEGUN).is_file():
            remove_marked(folder / BEGUN, [p for p in folder.iterdir() if _OWN.fullmatch(p.name)], folder=True)


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in (BEGUN, COMPLETE))


# ---------------------------------------------------------------------------------------------
# states without pickle


def save_tree(value: Any, path: Path) -> None:
    """A tree of dicts, lists, numbers and tensors as ``PATH.safetensors`` and ``PATH.json``."""
    tensors: dict[str, Tensor] = {}

    def plain(part: Any) -> Any:
        if isinstance(part, Tensor):
            name = str(len(tensors))
            tensors[name] = part.detach().to("cpu", copy=True).contiguous()
            return {"tensor": name}
        if isinstance(part, np.ndarray):
            return {"array": part.tolist(), "dtype": str(part.dtype)}
        if isinstance(part, dict):
            return {"items": [[plain(k), plain(v)] for k, v in part.items()]}
        if isinstance(part, tuple | list):
            return {type(part).__name__: [plain(p) for p in part]}
        if part is None or isinstance(part, bool | int | float | str):
            return part
        raise OutputError(f"a checkpoint cannot hold the state of this optimizer: it has a {type(part).__name__}.")

    tree = plain(value)
    with atomic_path(path.with_suffix(".safetensors")) as temporary:
        save_file(tensors, temporary)
    write_json(path.with_suffix(".json"), {"tree": tree})


def load_tree(path: Path) -> Any:
    """What `save_tree` wrote.

    Raises:
        OutputError: it is missing or not JSON.
    """
    tree = read_json(path.with_suffix(".json"), error=OutputError)["tree"]
    with safe_open(path.with_suffix(".safetensors"), framework="pt") as stored:
        def back(part: Any) -> Any:
            if not isinstance(part, dict):
                return part
            if "tensor" in part:
                return stored.get_tensor(part["tensor"])
            if "array" in part:
                return np.array(part["array"], dtype=part["dtype"])
            if "items" in part:
                return {back(k): back(v) for k, v in part["items"]}
            (kind, values), = part.items()
            return (tuple if kind == "tuple" else list)(back(v) for v in values)

        return back(tree)


def random_state() -> dict[str, Any]:
    """States of Python's, numpy's and torch's global generators."""
    found = {"python": random.getstate(), "numpy": np.random.get_state(),  # noqa: NPY002  what trainers seed
             "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        found["cuda"] = torch.cuda.get_rng_state_all()
    return found


def load_random_state(state: dict[str, Any]) -> None:
    """Put states from `random_state` back."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
