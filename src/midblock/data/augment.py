"""Seeded changes of a text, for metrics that compare views of one sample (InfoNCE, LiDAR, DiME)."""

from __future__ import annotations

import random
import re
from dataclasses import replace

from midblock.data.examples import Dataset
from midblock.errors import SettingsError
from midblock.writing import sha256_of

__all__ = ["augment", "augment_dataset"]

_WORDS = re.compile(r"\S+|\s+")


def augment(text: str, view: int, seed: int, *, drop: float = 0.1, swap: float = 0.1,
            typo: float = 0.1) -> str:
    """One view of a text: some words dropped, swapped with the next one, or misspelt.

    Each word is independently dropped with probability ``drop``; of those kept, each is
    exchanged with the following one with probability ``swap``; each word of four or more
    letters gets one typing error (two neighbouring inner characters exchanged) with
    probability ``typo``. White space, and so the lines of a text, stays where it was, except
    that the space after a dropped word goes with it. At least one word is kept.

    The result depends on ``(text, view, seed)`` and the rates alone, not on earlier calls.

    Args:
        text: Any text.
        view: Number of the view, 0 or more; different views are independent draws.
        seed: Any integer.
        drop, swap, typo: Probabilities per word, 0 to 1. All 0 gives the text back.

    Raises:
        SettingsError: a rate outside 0..1 or a negative view.

    Example:
        >>> augment("one two three", 0, 0, drop=0, swap=0, typo=0)
        'one two three'
        >>> augment("a b c d e f", 0, 1) == augment("a b c d e f", 0, 1)
        True
    """
    for name, rate in (("drop", drop), ("swap", swap), ("typo", typo)):
        if not 0.0 <= rate <= 1.0:
            raise SettingsError(f"augmentation rate {name}={rate} is no probability; use 0 to 1.")
    if view < 0:
        raise SettingsError(f"view {view} was asked for; views are counted from 0.")
    rng = random.Random(sha256_of("midblock augment", str(seed), str(view), text))
    pieces = _WORDS.findall(text)
    lead = pieces.pop(0) if pieces and pieces[0].isspace() else ""
    words, gaps = pieces[0::2], pieces[1::2]
    gaps += [""] * (len(words) - len(gaps))
    if not words:
        return text
    keep = [i for i in range(len(words)) if rng.random() >= drop] or [rng.randrange(len(words))]
    kept = [words[i] for i in keep]
    i = 0
    while i < len(kept) - 1:
        if rng.random() < swap:
            kept[i], kept[i + 1] = kept[i + 1], kept[i]
            i += 1  # a word moves by one place at most
        i += 1
    kept = [_misspell(w, rng) if len(w) >= 4 and rng.random() < typo else w for w in kept]
    return lead + "".join(w + gaps[i] for w, i in zip(kept, keep, strict=True))


def _misspell(word: str, rng: random.Random) -> str:
    at = rng.randrange(1, len(word) - 2)
    return word[:at] + word[at + 1] + word[at] + word[at + 2:]


def augment_dataset(dataset: Dataset, view: int, seed: int, *, drop: float = 0.1, swap: float = 0.1,
                    typo: float = 0.1) -> Dataset:
    """The data set with every text replaced by its view (see `augment`); order and places are kept.

    Prompts, completions and messages are left out, because a view is one text.

    Raises:
        SettingsError: a rate outside 0..1 or a negative view.
    """
    changed = [replace(e, text=augment(e.text, view, seed, drop=drop, swap=swap, typo=typo),
                       prompt=None, completion=None, messages=None) for e in dataset.examples]
    return replace(dataset, examples=changed, fingerprint="")
