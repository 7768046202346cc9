"""The tidy table that every command writes, and the reasons for its empty cells.

One row is one figure: what was measured (``metric``), where (``kind`` and ``layer``), of
which model or comparison (``side``), its ``value`` with interval ``low``..``high`` and the
``n`` it rests on. Further columns are free (``matrix``, ``data``, ``stage``, ``head``, ``seed``).
"""

from __future__ import annotations

import html
import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import pandas as pd

from midblock.reading import printable

__all__ = [
    "BASE_COLUMNS",
    "UNNAMED",
    "Answer",
    "Estimate",
    "Kind",
    "Origin",
    "Reading",
    "Table",
    "TableResult",
    "json_ready",
]

Kind = Literal["hidden", "block", "segment", "model"]
_SHOWN_ROWS = 10  # of a table in a notebook
BASE_COLUMNS = ("kind", "layer", "metric", "side", "value", "low", "high", "n")


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value with its confidence interval and sample size; NaN bounds mean "no interval"."""

    value: float
    low: float = math.nan
    high: float = math.nan
    n: int = 0


@dataclass
class Table:
    """Rows being collected, and why some have no value."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    reasons: list[dict[str, Any]] = field(default_factory=list)

    def add(self, kind: Kind, layer: int | str, metric: str, side: str,
            estimate: Estimate | float, *, n: int | None = None, **extra: Any) -> None:
        """Append one row. A float gets no interval; pass ``n`` for it."""
        if not isinstance(estimate, Estimate):
            estimate = Estimate(float(estimate), n=n or 0)
        self.rows.append({"kind": kind, "layer": layer, "metric": metric, "side": side,
                          "value": estimate.value, "low": estimate.low, "high": estimate.high,
                          "n": estimate.n if n is None else n, **extra})

    def add_undefined(self, kind: Kind, layer: int | str, metric: str, side: str, reason: str,
                      *, n: int = 0, **extra: Any) -> None:
        """Append an empty cell and remember its reason (stored in ``run.json``)."""
        self.add(kind, layer, metric, side, Estimate(math.nan, n=n), **extra)
        self.reasons.append({"kind": kind, "layer": layer, "metric": metric, "side": side,
                             **extra, "reason": reason})

    def extend(self, other: Table) -> None:
        """Append all rows and reasons of another table."""
        self.rows.extend(other.rows)
        self.reasons.extend(other.reasons)

    def frame(self) -> pd.DataFrame:
        """All rows as a data frame with the base columns first."""
        frame = pd.DataFrame(self.rows)
        extra = [c for c in frame.columns if c not in BASE_COLUMNS]
        return frame.reindex(columns=[*BASE_COLUMNS, *extra])


@dataclass(frozen=True, slots=True)
class Answer:
    """What a reader takes along who reads nothing else."""

    found: str
    """What was found, with its n and interval; one sentence."""
    means: str = ""
    """What that means for the choice of blocks; one sentence."""
    next: tuple[str, ...] = ()
    """The words after ``midblock`` of the command to run next; empty where there is none."""

    @property
    def command(self) -> str:
        """`next` as a line to paste; empty where there is none.

        Example:
            >>> Answer("found", next=("inspect", "my model")).command
            "midblock inspect 'my model'"
        """
        return shlex.join(["midblock", *self.next]) if self.next else ""


@dataclass(frozen=True, slots=True)
class Origin:
    """What a result was measured on, in the words that name it again."""

    models: tuple[str, ...] = ()
    """MODEL specs in their order."""
    data: str = ""
    """D spec."""

    def words(self, command: str, *more: str, models: int | None = None, data: bool = True) -> tuple[str, ...]:
        """A command on the same models and data; empty where these have no names (they were made in Python).

        Args:
            command: Its name.
            *more: Further words.
            models: How many of the models it takes; default all.
            data: Whether it takes data.

        Example:
            >>> Origin(("base", "tuned"), "d.jsonl").words("swap", "--segments", "3")
            ('swap', 'base', 'tuned', '--data', 'd.jsonl', '--segments', '3')
        """
        if not self.models or (data and not self.data):
            return ()
        return (command, *self.models[:models], *(("--data", self.data) if data else ()), *more)


UNNAMED = Origin()
"""Of a result on models or data that were made in Python."""


class Reading:
    """A result that speaks: the answer first, then what it rests on."""

    if TYPE_CHECKING:
        def answer(self) -> Answer:
            """What was found, what it means for the choice of blocks, and what to run next."""

        def details(self) -> Sequence[str]:
            """Further lines, each a finding with its numbers."""

    def summary(self) -> str:
        """The result in words: the answer, the details, and the command to run next."""
        answer = self.answer()
        command = f"Next: {answer.command}" if answer.next else ""
        return "\n".join(line for line in (answer.found, answer.means, *self.details(), command) if line)


class TableResult(Reading):
    """What the results of all commands share: a tidy table, a reading in words, and how a notebook shows them."""

    if TYPE_CHECKING:  # a field of most results, a property of some
        @property
        def table(self) -> Table:
            """The rows, and the reasons of empty cells."""

    @property
    def frame(self) -> pd.DataFrame:
        """The tidy table as a data frame: `BASE_COLUMNS` first, then the command's own."""
        return self.table.frame()

    def tables(self) -> dict[str, pd.DataFrame]:
        """Further tables by name, which are written beside ``table.csv``; empty ones are not."""
        return {}

    def _repr_html_(self) -> str:
        """The reading and the first rows, for notebooks; text from outside is escaped."""
        frame = self.frame
        return (f"<pre style='white-space: pre-wrap'>{html.escape(printable(self.summary(), lines=True))}</pre>"
                f"{frame.head(_SHOWN_ROWS).to_html(index=False, na_rep='')}"
                f"<p>{len(frame):,} rows in <code>.frame</code></p>")


def json_ready(value: Any) -> Any:
    """Copy of ``value`` with only JSON types; NaN and infinity become None.

    Example:
        >>> json_ready({"a": float("nan"), "b": (1, 2)})
        {'a': None, 'b': [1, 2]}
    """
    if isinstance(value, bool) or value is None or isinstance(value, str | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): json_ready(v) for k, v in value.items()}
    if isinstance(value, pd.DataFrame):
        return [json_ready(r) for r in value.to_dict(orient="records")]
    if hasattr(value, "tolist"):  # NumPy and torch scalars and arrays
        return json_ready(value.tolist())
    if hasattr(value, "__dataclass_fields__"):
        return {k: json_ready(getattr(value, k)) for k in value.__dataclass_fields__}
    if isinstance(value, Iterable):
        return [json_ready(v) for v in value]
    return str(value)
