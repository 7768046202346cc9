"""Models on disk for the tests of models, tuning and the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from conftest import build_tiny_tokenizer
from families import FAMILIES
from midblock.models import save_checkpoint


def saved(folder: Path, family: str = "llama", *, dtype: torch.dtype = torch.float32, seed: int = 0,
          tokenizer: object = None, **overrides: object) -> Path:
    """A tiny model of a family and its tokenizer, saved."""
    model = FAMILIES[family](seed=seed, **overrides).to(dtype)
    return save_checkpoint(model, tokenizer or build_tiny_tokenizer(), folder)


def edit_config(folder: Path, **changes: object) -> None:
    """Change keys of a folder's config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the tensors of a folder's model.safetensors."""
    path = folder / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})
