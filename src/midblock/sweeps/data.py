"""Rows that the runs of a sweep are trained and scored on: loaded once, the same for every arm."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from midblock.data import Dataset, Example, TokenRows, load_data, tokenize
from midblock.errors import DataError
from midblock.evaluation import task_data
from midblock.settings.sweep import DataConfig, SweepConfig, TaskConfig
from midblock.writing import sha256_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["VALIDATION", "SweepData", "load_sweep_data", "split_off", "token_rows"]

VALIDATION = "validation"
"""Label of the rows that choose among learning rates."""


@dataclass(frozen=True)
class SweepData:
    """Everything that runs are trained and scored on."""

    train: Dataset
    validation: Dataset | None
    """Rows that choose among learning rates; None without a grid."""
    tasks: dict[str, TaskConfig]
    """Task settings by label, evaluation first, validation last."""
    items: dict[str, Dataset]
    """Items by label, as ``tasks``."""

    def describe(self) -> dict[str, Any]:
        """What ``run.json`` stores."""
        parts = {"train": self.train, **({VALIDATION: self.validation} if self.validation is not None else {}),
                 **self.items}
        return {"fingerprint": sha256_of(*(d.fingerprint for d in parts.values())),
                "parts": {name: d.describe() for name, d in parts.items()}}


def load_sweep_data(config: SweepConfig) -> SweepData:
    """Load all rows of a sweep, once.

    Raises:
        DataError: rows cannot be loaded, or an evaluation item occurs in the training rows.
    """
    wanted = config.train
    drawn = load_data(wanted.data, split=wanted.split, seed=wanted.seed,
                      samples=None if wanted.samples is None else wanted.samples + wanted.validation)
    train, validation = split_off(drawn, wanted.validation)
    tasks = {t.label: t for t in (*config.evaluation, *config.retention)}
    items = {label: task_data(t.task, t.data, samples=t.samples, seed=t.seed) for label, t in tasks.items()}
    for task in config.evaluation:
        _refuse_overlap(train, items[task.label], task.label)
    if validation is not None:
        has_answers = all(e.completion is not None for e in validation)
        tasks[VALIDATION] = TaskConfig(task="answer_loss" if has_answers else "perplexity", data=wanted.data,
                                       max_length=wanted.max_length, chat=wanted.chat)
        items[VALIDATION] = validation
    return SweepData(train, validation, tasks, items)


def split_off(rows: Dataset, held: int) -> tuple[Dataset, Dataset | None]:
    """Training rows and at least ``held`` validation rows, taken from the end.

    Rows of equal content (ToxiGen rates some sentences twice) stay together, so that no validation row was
    trained on; they can make the validation part a few rows longer.

    Raises:
        DataError: no row would be left to train on.
    """
    if not held:
        return rows, None
    contents = [_content(e) for e in rows]
    copies = Counter(contents)
    chosen: set[str] = set()
    count = 0
    for content in dict.fromkeys(reversed(contents)):
        if count >= held:
            break
        chosen.add(content)
        count += copies[content]
    train = [e for e, content in zip(rows, contents, strict=True) if content not in chosen]
    if not train:
        raise DataError(f"train: {rows.name} ({rows.split}) has {len(rows)} rows, {held} of them are wanted for "
                        "validation; ask for fewer.")
    validation = [e for e, content in zip(rows, contents, strict=True) if content in chosen]
    return replace(rows, examples=train, fingerprint=""), replace(rows, examples=validation, fingerprint="")


def _content(example: Example) -> str:
    """What makes two rows the same question: the prompt, or the text where there is none."""
    return example.text if example.prompt is None else example.prompt


def _refuse_overlap(train: Dataset, items: Dataset, label: str) -> None:
    if shared := {_content(e) for e in train} & {_content(e) for e in items}:
        raise DataError(f"{len(shared)} of the {len(items)} items of {label} also occur in the training rows "
                        f"({train.name}, {train.split}); a score on them would show memory. Use another split.")


def token_rows(data: Dataset, tokenizer: PreTrainedTokenizerBase, wanted: DataConfig) -> TokenRows:
    """Training rows; the loss counts completions where the data have them, unless every token is to be learned."""
    supervised = not wanted.all_tokens and all(e.messages is not None or e.completion is not None for e in data)
    return tokenize(data, tokenizer, max_length=wanted.max_length, supervised=supervised, chat=wanted.chat,
                    add_eos=True if wanted.all_tokens else None, every_turn=True)
