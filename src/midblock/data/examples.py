"""One sample of text and the data set it belongs to: sampling, hold-out parts, fingerprints."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from midblock.errors import DataError, SettingsError
from midblock.writing import sha256_of

__all__ = ["Dataset", "Example", "hold_out_part"]

_TEST_SHARE = 5  # one content in five belongs to the test part of a partitioned source


def hold_out_part(key: str) -> str:
    """``"test"`` for about one key in five, else ``"train"``; depends on the key alone.

    Because equal keys always fall into the same part, the two parts never share one,
    whatever the order of rows and however often a source repeats them.

    Example:
        >>> hold_out_part("7+5") == hold_out_part("7+5")
        True
    """
    return "test" if int(sha256_of("midblock hold-out", key)[:8], 16) % _TEST_SHARE == 0 else "train"


@dataclass(frozen=True, slots=True)
class Example:
    """One sample.

    Attributes:
        text: The whole text, in the paper's format where the source is a benchmark.
        prompt: What the model is given, and
        completion: what it should write, where the source has them. Where both exist,
            ``text`` is their concatenation (HumanEval and ToxiGen differ: see
            `midblock.data.formats`).
        messages: A conversation of ``{"role", "content"}`` and whatever else the source's messages hold
            (``tool_calls``, ``reasoning_content``), where the source has one.
        row: The original fields, with the benchmark's names
            (and ``answer_number`` for GSM8K and arithmetic).
        where: ``file:line``, or what names the row in its source.
        given: How many of ``messages`` are the prompt of a conversation that the source divides into prompt and
            completion; 0 where every turn of the assistant is its own.
    """

    text: str
    prompt: str | None = None
    completion: str | None = None
    messages: tuple[dict[str, Any], ...] | None = None
    row: Mapping[str, Any] = field(default_factory=dict)
    where: str = ""
    given: int = 0


@dataclass
class Dataset:
    """Examples in a fixed order, and the rows that could not be used.

    Attributes:
        name: Name for tables (``gsm8k``, a file's stem).
        split: ``train``, ``test``, ...; ``all`` for a file that has no splits.
        source: Where the rows come from: a path, ``hf:NAME:CONFIG:SPLIT`` or ``built in``.
        examples: The usable samples.
        skipped: ``(where, reason)`` of every row that was too short or malformed.
        fingerprint: SHA-256 over the examples' contents and order (filled in if empty).
        available: Number of usable rows before sampling.
        requested: Number of rows asked for; None if all were.
        seed: Seed of the sampling; None if there was none.
        spec: The D spec that `load_data` was given; empty where the data set was made in Python.
    """

    name: str
    split: str
    source: str
    examples: list[Example]
    skipped: list[tuple[str, str]] = field(default_factory=list)
    fingerprint: str = ""
    available: int = 0
    requested: int | None = None
    seed: int | None = None
    spec: str = ""

    def __post_init__(self) -> None:
        if not self.fingerprint:
            self.fingerprint = _fingerprint(self.examples)
        if not self.available:
            self.available = len(self.examples)

    def __len__(self) -> int:
        return len(self.examples)

    def __iter__(self) -> Iterator[Example]:
        return iter(self.examples)

    def sample(self, n: int | None, seed: int) -> Dataset:
        """``n`` rows drawn without replacement.

        The draw depends on ``n``, ``seed`` and the data set alone, and a smaller draw is the
        beginning of a larger one with the same seed: ``sample(50, s)`` are the first 50 of
        ``sample(200, s)``. If fewer than ``n`` rows exist all are used and `note` says so.

        Args:
            n: How many; None keeps all rows in their own order.
            seed: Any integer.

        Raises:
            SettingsError: ``n`` is not a positive integer.

        Example:
            >>> data = Dataset("d", "all", "built in", [Example(str(i)) for i in range(9)])
            >>> [e.text for e in data.sample(3, 0)] == [e.text for e in data.sample(5, 0)][:3]
            True
        """
        if n is None:
            return self
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise SettingsError(f"{n!r} samples of {self.name} were asked for; ask for 1 or more "
                                f"({len(self.examples)} are there).")
        order = list(range(len(self.examples)))
        # a string is hashed in full, so that seeds 1 and -1 differ
        random.Random(f"midblock sample {seed}").shuffle(order)
        return replace(self, examples=[self.examples[i] for i in order[:n]], fingerprint="",
                       available=len(self.examples), requested=n, seed=seed)

    def hold_out(self) -> tuple[Dataset, Dataset]:
        """Train and test part, about 4 to 1, split by content.

        Rows with the same prompt (the same text where there is none) stay together, so that
        nothing in the test part was seen in training.

        Raises:
            DataError: one of the parts would be empty.
        """
        return self.part("train"), self.part("test")

    def part(self, part: str) -> Dataset:
        """One part (``train`` or ``test``) of `hold_out`.

        Raises:
            DataError: the part is empty.
        """
        chosen = [e for e in self.examples
                  if hold_out_part(e.text if e.prompt is None else e.prompt) == part]
        if not chosen:
            raise DataError(f"{self.name}: with {len(self.examples)} rows the held-out {part} part is "
                            "empty; give more rows, or separate files for train and test.")
        return replace(self, split=part, examples=chosen, fingerprint="", available=len(chosen))

    @property
    def note(self) -> str:
        """What a reader of the result should know about the rows; empty if nothing."""
        notes = []
        if self.requested is not None and self.requested > self.available:
            notes.append(f"{self.requested} samples were asked for, {self.name} ({self.split}) has "
                         f"{self.available}: all were used")
        return "; ".join([*notes, *self.odd_rows()])

    def odd_rows(self) -> list[str]:
        """What to say of rows that could not be used, and of those that lack the completion that others have."""
        told = []
        if self.skipped:
            where, reason = self.skipped[0]
            told.append(f"{len(self.skipped)} rows of {self.name} were left out (first: {where}: {reason})")
        bare = [e for e in self.examples if e.prompt is not None and e.completion is None]
        if bare and any(e.completion is not None for e in self.examples):
            told.append(f"{len(bare)} rows of {self.name} have a prompt and no completion (first: {bare[0].where}), "
                        "unlike the others; all their text counts")
        return told

    def describe(self) -> dict[str, Any]:
        """What ``run.json`` stores about the data (at most 100 skipped rows by name)."""
        return {"name": self.name, "split": self.split, "source": self.source, "rows": len(self.examples),
                "available": self.available, "requested": self.requested, "seed": self.seed,
                "fingerprint": self.fingerprint, "skipped": len(self.skipped),
                "skipped_rows": [{"where": w, "reason": r} for w, r in self.skipped[:100]],
                "note": self.note}


def _fingerprint(examples: list[Example]) -> str:
    return sha256_of(*(
        json.dumps([e.text, e.prompt, e.completion, e.messages, e.row, *([e.given] if e.given else [])],
                   sort_keys=True, ensure_ascii=False, default=str).encode("utf-8", "surrogatepass")
        for e in examples))
