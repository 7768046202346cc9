"""A tiny saved model, tiny data files and a configuration for the tests of sweeps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from conftest import build_tiny_tokenizer
from families import FAMILIES


def write_tiny_model(folder: Path, blocks: int = 5, **overrides: Any) -> Path:
    """A random Llama of ``blocks`` blocks with its tokenizer, as a checkpoint folder."""
    model = FAMILIES["llama"](seed=0, num_hidden_layers=blocks, **overrides)
    model.save_pretrained(folder)
    build_tiny_tokenizer().save_pretrained(folder)
    return folder


def write_rows(path: Path, first: int, count: int) -> Path:
    """Questions with answers that a tiny model can learn by heart: the answer is always alike."""
    rows = [{"prompt": f"the number {n} then", "completion": " one and one"} for n in range(first, first + count)]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return path


def write_texts(path: Path, count: int) -> Path:
    """General text for retention."""
    rows = [{"text": f"there are {n} stones on another shore and none of them is mine"} for n in range(count)]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return path


def tiny_values(folder: Path) -> dict[str, Any]:
    """Configuration values of a sweep of two arms and two seeds on files in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    model = folder / "model"
    if not model.exists():
        write_tiny_model(model)
    train = write_rows(folder / "train.jsonl", 0, 12)
    test = write_rows(folder / "test.jsonl", 100, 10)
    texts = write_texts(folder / "texts.jsonl", 6)
    return {
        "model": str(model), "dtype": "float32", "device": "cpu", "seeds": [0, 1],
        "train": {"data": str(train), "split": "all", "max_length": 64},
        "training": {"steps": 6, "batch_size": 4, "learning_rates": [0.01], "full_learning_rates": [0.003]},
        "arms": {"baseline": "11111", "masks": ["00100"]}, "budget": "match:11111@2",
        "evaluation": [{"task": "answer_loss", "data": str(test), "name": "answers"}],
        "retention": [{"task": "perplexity", "data": str(texts), "name": "texts", "max_length": 32}],
        "statistics": {"replicates": 200},
    }
