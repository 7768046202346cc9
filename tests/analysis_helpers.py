"""Tiny loaded models and data sets for the tests of the analysis."""

from __future__ import annotations

from functools import cache

from conftest import build_tiny_tokenizer
from families import FAMILIES
from midblock.data import Dataset, Example
from midblock.models import LoadedModel, find_anatomy

_TEXTS = [
    "the rain in spain stays mainly in the plain",
    "a quick brown fox jumps over the lazy dog and runs on",
    "one two three four five six seven eight nine ten",
    "where are the snows of yesteryear",
    "to be or not to be that is the question here",
    "all that is gold does not glitter",
    "not all those who wander are lost, they say",
    "the old that is strong does not wither at all, and deep roots stay",
]


@cache
def loaded(name: str, seed: int = 0) -> LoadedModel:
    """A tiny model of a family as `load_model` would give it."""
    model = FAMILIES[name](seed=seed)
    parameter = next(model.parameters())
    return LoadedModel(model=model, tokenizer=build_tiny_tokenizer(), anatomy=find_anatomy(model),
                       spec=f"tiny {name} {seed}", name=name, folder=None, dtype=parameter.dtype,
                       device=parameter.device)


def tiny_data(n: int) -> Dataset:
    """``n`` English samples of unequal length."""
    examples = [Example(text=f"{_TEXTS[i % len(_TEXTS)]} {i}" + " and more" * (i % 3)) for i in range(n)]
    return Dataset("tiny", "all", "built in", examples)
