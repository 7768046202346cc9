"""One run, one file: what an arm with one learning rate and one seed gave, or why it failed."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, TypeAdapter, ValidationError

from midblock.errors import OutputError
from midblock.settings.base import faults_of
from midblock.writing import read_written, write_sealed

__all__ = ["RunRecord", "TaskScores", "read_record", "read_records", "write_record"]

FOLDER = "results"
_ADVICE = "remove it, then repeat the command with --resume"


def _numbers(values: Any) -> Any:
    """JSON has no NaN: a missing score is null."""
    return [math.nan if v is None else v for v in values] if isinstance(values, list) else values


Numbers = Annotated[list[float], BeforeValidator(_numbers)]


@dataclass
class TaskScores:
    """Scores of one run on one task.

    Attributes:
        task: Its label in the sweep.
        metric: ``accuracy``, ``loss`` or ``perplexity``.
        higher_is_better: Whether a larger value is a better model.
        items: Content ids, equal in every run.
        scores: Per item: 1 right / 0 wrong, or mean loss per token in nats.
        tokens: Counted tokens per item where tokens were scored.
        value: The metric over all items.
        seconds: Time of the scoring.
        notes: What a reader should know (answers cut off, rows left out).
    """

    task: str
    metric: str
    higher_is_better: bool
    items: list[str]
    scores: Numbers
    tokens: Numbers | None
    value: float
    seconds: float
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name, values in (("scores", self.scores), ("tokens", self.tokens)):
            if values is not None and len(values) != len(self.items):
                raise ValueError(f"{len(values)} {name} for {len(self.items)} items")


@dataclass
class RunRecord:
    """Result of one run."""

    arm: str
    learning_rate: float | None
    seed: int | None
    status: Literal["done", "failed"]
    reason: str = ""
    """Why it failed, for people."""
    traceback: str = ""
    plan: dict[str, Any] | None = None
    """`midblock.tuning.Plan.to_dict`; None for the untuned model."""
    training: dict[str, Any] = field(default_factory=dict)
    """`midblock.tuning.TrainResult.describe` with every step's loss."""
    tasks: dict[str, TaskScores] = field(default_factory=dict)
    """Evaluation and retention, by label."""
    validation_loss: float | None = None
    seconds: float = 0.0
    """Training and scoring."""
    peak_memory_bytes: int | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def key(self) -> str:
        """File name without suffix."""
        return self.arm if self.seed is None else f"{self.arm}__lr{self.learning_rate:g}__seed{self.seed}"


    def outline(self) -> RunRecord:
        """The record without what grows with items and steps: what a running sweep keeps of it in memory."""
        tasks = {label: replace(t, items=[], scores=[], tokens=None) for label, t in self.tasks.items()}
        training = {k: v for k, v in self.training.items() if k not in ("losses", "blocks")}
        return replace(self, tasks=tasks, training=training, plan=None)


_RECORD = TypeAdapter(RunRecord)


def write_record(folder: Path, record: RunRecord) -> Path:
    """Write ``results/KEY.json`` atomically, sealed with its digest, and return its path.

    Raises:
        OutputError: the folder cannot be written.
    """
    path = folder / FOLDER / f"{record.key}.json"
    write_sealed(path, asdict(record))
    return path


def read_records(folder: Path) -> dict[str, RunRecord]:
    """Every result of a sweep's folder, by key. Files that were never completed do not exist.

    Raises:
        OutputError: a file is not such a result, or was changed after it was written.
    """
    records = [read_record(path) for path in sorted((folder / FOLDER).glob("[!.]*.json"))]
    return {record.key: record for record in records}


def read_record(path: Path) -> RunRecord:
    """One result.

    Raises:
        OutputError: as `read_records`.
    """
    stored = read_written(path, advice=_ADVICE)
    try:
        record = _RECORD.validate_python(stored)
    except ValidationError as error:
        raise OutputError(f"{path} is not the result of a run of a sweep ({'; '.join(faults_of(error))}); "
                          f"{_ADVICE}.") from None
    if record.key != path.stem:
        raise OutputError(f"{path} holds the result of {record.key}; {_ADVICE}.")
    return record
