"""What an evaluation found: one score per item, the value with its interval, lm-eval's own shapes."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from midblock.errors import DataError, OutputError
from midblock.results import Answer, Estimate, Table, TableResult, json_ready
from midblock.stats import (
    bootstrap_weights,
    mcnemar_exact,
    mean_interval,
    paired_permutation,
    paired_proportion_interval,
    percentile_interval,
    wilson_interval,
)
from midblock.writing import atomic_path, read_written, sha256_of, write_json, write_sealed

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Comparison", "EvalResult", "compare", "file_name", "lm_eval_results", "perplexity_interval",
           "read_result", "sample_line", "write_lm_eval_files", "write_result"]

FloatArray = npt.NDArray[np.float64]
_REPLICATES = 2000


@dataclass(frozen=True)
class EvalResult(TableResult):
    """Scores of one model on one task.

    Attributes:
        task: Name of the task.
        metric: ``accuracy``, ``loss`` (nats per token) or ``perplexity``.
        higher_is_better: Whether a larger value is a better model.
        items: (n,) content ids, equal for every model scored on the same rows.
        scores: (n,) per item: 1 right / 0 wrong, or mean loss per token in nats.
        tokens: (n,) counted tokens per item where tokens were scored, else None.
        estimate: The value with its 95% interval. Accuracy: Wilson. Loss: mean over items, t.
            Perplexity: exp of the total loss over all tokens; bootstrap over items.
        samples: One record per item (and filter) in lm-evaluation-harness's shape, with ``item``.
        results: lm-evaluation-harness's results dictionary of this task.
        data: What the rows were.
        settings: What the scoring used (longest answer, batch size, format ...).
        notes: What a reader should know (answers cut off, rows left out).
        seconds: Time of the scoring.
    """

    task: str
    metric: str
    higher_is_better: bool
    items: tuple[str, ...]
    scores: FloatArray
    estimate: Estimate
    tokens: FloatArray | None = None
    samples: list[dict[str, Any]] = field(default_factory=list, repr=False)
    results: dict[str, Any] = field(default_factory=dict, repr=False)
    data: dict[str, Any] = field(default_factory=dict, repr=False)
    settings: dict[str, Any] = field(default_factory=dict, repr=False)
    notes: tuple[str, ...] = ()
    seconds: float = 0.0

    @property
    def value(self) -> float:
        """The value without its interval."""
        return self.estimate.value

    @property
    def n(self) -> int:
        """Number of items."""
        return len(self.items)

    @property
    def by_item(self) -> pd.Series:
        """Scores indexed by item id."""
        return pd.Series(self.scores, index=list(self.items), name=self.metric)

    def add_to(self, table: Table, side: str) -> None:
        """Append the value (and, for perplexity, the loss behind it) to a tidy table."""
        table.add("model", "all", self.metric, side, self.estimate, data=self.task)
        if self.metric == "perplexity":
            e = self.estimate
            table.add("model", "all", "loss", side, data=self.task, estimate=Estimate(
                math.log(e.value), math.log(e.low), math.log(e.high), self.n))

    @property
    def table(self) -> Table:
        """The tidy table of this result alone."""
        table = Table()
        self.add_to(table, "base")
        return table

    def figures(self) -> dict[str, Figure]:
        """The score with its interval."""
        from midblock.figures import segment_bars

        frame = self.frame
        return {f"evaluate-{self.metric}": segment_bars(frame[frame["metric"] == self.metric], metric=self.metric,
                                                        label="data", label_title="task", counted="items",
                                                        title="Score with its 95% interval")}

    def summary(self) -> str:
        """One line for people."""
        e = self.estimate
        interval = "" if math.isnan(e.low) else f" [{e.low:.4g}, {e.high:.4g}]"
        return f"{self.task}: {self.metric} {e.value:.4g}{interval} (n={self.n}, {self.seconds:.0f} s)"

    def answer(self) -> Answer:
        """The score."""
        return Answer(f"{self.told()}.", "One score alone says nothing of a block; compare two on the same items.")

    def details(self) -> list[str]:
        """What a reader should know."""
        return list(self.notes)

    def told(self) -> str:
        """The score in words, without the time that it took."""
        return self.summary().rpartition(",")[0] + ")"


@dataclass(frozen=True)
class Comparison:
    """One result against another on the items that both have.

    Attributes:
        estimate: ``a`` minus ``b`` with its interval over items (paired).
        p: Two-sided: exact McNemar for accuracy, sign permutation of the items' differences
            for loss (and for perplexity, of the items' summed losses).
        n: Shared items.
    """

    task: str
    metric: str
    estimate: Estimate
    p: float
    n: int


def perplexity_interval(loss: npt.ArrayLike, tokens: npt.ArrayLike, *, seed: int = 0) -> Estimate:
    """exp(total loss / total tokens) with a bootstrap interval over items.

    Every token weighs the same, so that a long text counts more than a short one; items, not
    tokens, are resampled because the tokens of one text are not independent.

    Args:
        loss: (n,) mean loss per token of each item, in nats.
        tokens: (n,) counted tokens of each item.

    Example:
        >>> round(perplexity_interval([math.log(2), math.log(8)], [3, 1]).value, 4)
        2.8284
    """
    mean, count = np.asarray(loss, dtype=np.float64), np.asarray(tokens, dtype=np.float64)
    total = mean * count
    value = math.exp(float(total.sum() / count.sum()))
    if mean.size < 2:
        return Estimate(value, n=int(mean.size))
    weights = bootstrap_weights(mean.size, _REPLICATES, seed)
    return percentile_interval(value, np.exp((weights @ total) / (weights @ count)), n=int(mean.size),
                               expanded=True)


def estimate_of(metric: str, scores: FloatArray, tokens: FloatArray | None) -> Estimate:
    """The value of a metric from the items' scores."""
    if metric == "accuracy":
        return wilson_interval(int(scores.sum()), scores.size)
    if metric == "perplexity":
        assert tokens is not None
        return perplexity_interval(scores, tokens)
    return mean_interval(scores)


def compare(a: EvalResult, b: EvalResult) -> Comparison:
    """``a`` minus ``b``, paired by item.

    Raises:
        DataError: other tasks or metrics, or no item in common.
    """
    if (a.task, a.metric) != (b.task, b.metric):
        raise DataError(f"cannot compare {a.task} ({a.metric}) with {b.task} ({b.metric}).")
    where_b = {item: i for i, item in enumerate(b.items)}
    pairs = [(i, where_b[item]) for i, item in enumerate(a.items) if item in where_b]
    if not pairs:
        raise DataError(f"{a.task}: the two results share no item; score both on the same rows "
                        "(same data, samples and seed).")
    left, right = (np.asarray(x, dtype=np.int64) for x in zip(*pairs, strict=True))
    x, y, n = a.scores[left], b.scores[right], len(pairs)
    if a.metric == "accuracy":
        return Comparison(a.task, a.metric, paired_proportion_interval(x, y), mcnemar_exact(x, y).p, n)
    if a.metric == "perplexity":
        assert a.tokens is not None
        assert b.tokens is not None
        u, v = a.tokens[left], b.tokens[right]

        def ratio(w: FloatArray) -> FloatArray:
            found: FloatArray = np.exp((w @ (x * u)) / (w @ u)) - np.exp((w @ (y * v)) / (w @ v))
            return found

        value = float(ratio(np.ones((1, n)))[0])
        interval = Estimate(value, n=n) if n < 2 else percentile_interval(
            value, ratio(bootstrap_weights(n, _REPLICATES, 0)), n=n, expanded=True)
        return Comparison(a.task, a.metric, interval, paired_permutation(x * u, y * v), n)
    return Comparison(a.task, a.metric, mean_interval(x - y), paired_permutation(x, y), n)


# ---------------------------------------------------------------- lm-evaluation-harness's shapes

def _strings(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_strings(v) for v in value]
    return str(value)


def sample_line(sample: Mapping[str, Any]) -> dict[str, Any]:
    """A sample record as lm-evaluation-harness writes it to ``samples_TASK.jsonl``.

    Requests become ``{"gen_args_0": {"arg_0": ...}}``, responses and target strings.
    """
    arguments = {f"gen_args_{i}": {f"arg_{j}": part for j, part in enumerate(request)}
                 for i, request in enumerate(sample["arguments"])}
    line = {**sample, "arguments": arguments, "resps": _strings(sample["resps"]),
            "filtered_resps": _strings(sample["filtered_resps"]), "target": str(sample["target"])}
    found: dict[str, Any] = json_ready(line)
    return found


def lm_eval_results(results: Sequence[EvalResult], *, model_name: str, seconds: float | None = None,
                    config: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """One results dictionary of several tasks, as ``lm_eval --output_path`` writes it."""
    from importlib import metadata

    merged: dict[str, Any] = {}
    keys = ("results", "group_subtasks", "configs", "versions", "n-shot", "higher_is_better", "n-samples")
    for key in keys:
        merged[key] = {}
        for result in results:
            merged[key].update(result.results.get(key, {}))
    merged["config"] = {"model": "hf", "model_args": {"pretrained": model_name}, **(config or {})}
    for package in ("lm_eval", "transformers"):
        with contextlib.suppress(metadata.PackageNotFoundError):  # perplexity and loss need no lm-eval
            merged[f"{package}_version"] = metadata.version(package)
    merged["model_source"] = "hf"
    merged["model_name"] = model_name
    merged["task_hashes"] = {
        r.task: sha256_of(*(s["doc_hash"] + s["prompt_hash"] + s["target_hash"] for s in r.samples))
        for r in results}
    total = sum(r.seconds for r in results) if seconds is None else seconds
    merged["total_evaluation_time_seconds"] = f"{total:.3f}"
    return merged


def write_lm_eval_files(folder: Path, results: Sequence[EvalResult], *, model_name: str,
                        config: Mapping[str, Any] | None = None) -> list[Path]:
    """Write ``results.json`` and one ``samples_TASK.jsonl`` per task; returns the files."""
    files = []
    for result in results:
        path = folder / f"samples_{file_name(result.task)}.jsonl"
        with atomic_path(path) as temporary:
            temporary.write_text("".join(json.dumps(sample_line(s), ensure_ascii=False) + "\n"
                                         for s in result.samples), encoding="utf-8")
        files.append(path)
    write_json(folder / "results.json", lm_eval_results(results, model_name=model_name, config=config))
    return [*files, folder / "results.json"]


def file_name(task: str) -> str:
    """A task's name as part of a file name.

    Example:
        >>> file_name("arithmetic@3")
        'arithmetic-3'
    """
    return "".join(c if c.isalnum() or c in "_-." else "-" for c in task)


# ---------------------------------------------------------------- one result, one file

_FIELDS = ("task", "metric", "higher_is_better", "items", "scores", "tokens", "estimate", "samples",
           "results", "data", "settings", "notes", "seconds")


def write_result(path: Path, result: EvalResult) -> None:
    """Write a result to one JSON file, atomically; `read_result` gives it back."""
    write_sealed(path, {name: getattr(result, name) for name in _FIELDS})


def read_result(path: Path) -> EvalResult:
    """A result that `write_result` wrote.

    Raises:
        OutputError: missing, not such a file, or of a newer format.
    """
    try:
        stored = read_written(path, advice="remove it and evaluate again")
        e = stored["estimate"]
        value, low, high = _floats([e["value"], e["low"], e["high"]]).tolist()
        return EvalResult(**{
            **{name: stored[name] for name in _FIELDS}, "estimate": Estimate(value, low, high, e["n"]),
            "items": tuple(stored["items"]), "notes": tuple(stored["notes"]),
            "scores": _floats(stored["scores"]),
            "tokens": None if stored["tokens"] is None else _floats(stored["tokens"])})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise OutputError(f"{path} is not a result of an evaluation ({error}).") from None


def _floats(values: Iterable[float | None]) -> FloatArray:
    return np.array([math.nan if v is None else v for v in values], dtype=np.float64)
