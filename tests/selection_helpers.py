"""Planted truth for the tests of importance and locate: one block can help, the others hardly can."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from conftest import build_tiny_tokenizer
from families import FAMILIES
from midblock.data import Dataset, Example
from midblock.models import LoadedModel, find_anatomy

LETTERS = "abcdefghijklmnopqrstuvwxyz"
QUICK: dict[str, Any] = {"max_steps": 50, "score_steps": 30, "window": 3, "check_every": 10, "batch_size": 8, "rank": 4,
                         "learning_rate": 1e-2}
"""Settings of ILA with which a tiny model learns `alphabet` in seconds."""


def alphabet(n: int = 16) -> Dataset:
    """Texts in which every letter says the next one: a d g j ... from any start."""
    draw = np.random.default_rng(3)
    texts = ["".join(LETTERS[(start + 3 * j) % 26] for j in range(12)) for start in draw.integers(26, size=n)]
    return Dataset("alphabet", "all", "built in", [Example(text=t) for t in texts])


def planted(block: int | None, seed: int = 0) -> LoadedModel:
    """A tiny Llama in which only ``block`` hears the residual stream; None: no block does.

    The norms before attention and MLP of the other blocks are turned down to a fiftieth, so that their
    weights (random, as those of the planted block) and whatever is added to them can hardly act. Norm and
    spectrum of the weights do not show it.
    """
    model = FAMILIES["llama"](seed=seed)
    with torch.no_grad():
        for index, module in enumerate(find_anatomy(model).blocks):
            if index != block:
                module.input_layernorm.weight.mul_(0.02)
                module.post_attention_layernorm.weight.mul_(0.02)
    return LoadedModel(model=model, tokenizer=build_tiny_tokenizer(), anatomy=find_anatomy(model), spec="planted",
                       name="planted", folder=None, dtype=torch.float32, device=torch.device("cpu"))


def lead(values: list[float]) -> tuple[int, float]:
    """Index of the largest value, and its lead over the next."""
    order = np.argsort(values)[::-1]
    return int(order[0]), float(values[order[0]] - values[order[1]])
