"""The tasks that can be scored, and the documents that each makes of a data set.

| task | data | scored by | metric |
|---|---|---|---|
| ``gsm8k``, ``arithmetic`` | of that name | generation, the number after ``####`` | accuracy |
| ``mmlu``, ``toxigen`` | of that name | likelihood of the choices | accuracy |
| ``wikitext``, ``pydocs`` | of that name | every token | perplexity |
| ``ifeval_prompts``, ``mt_bench`` | the prompts of ``ifeval``, ``mt_bench`` | every token | perplexity |
| ``ifeval`` | ``ifeval`` | generation, checkable instructions | accuracy (all instructions of a prompt) |
| ``humaneval`` | ``humaneval`` | generation, tests run in a sandbox | accuracy (pass@1) |
| ``exact_match``, ``multiple_choice``, ``perplexity`` | any, named by ``data`` | as above | as above |
| ``answer_loss`` | any with completions | every token of the reference answer | loss |

A task of one data set takes other data of the same form as well: ``gsm8k`` on your own questions.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from midblock.data import Dataset, Example, load_data
from midblock.errors import DataError, SettingsError
from midblock.writing import sha256_of

__all__ = ["TASKS", "TaskKind", "TaskSpec", "find_task", "item_ids", "task_data"]

TaskKind = Literal["exact_match", "multiple_choice", "perplexity", "answer_loss", "ifeval", "humaneval"]


@dataclass(frozen=True, slots=True)
class TaskSpec:
    """How a task is scored.

    Attributes:
        name: Its name on the command line and in tables.
        kind: The way of scoring.
        metric: ``accuracy``, ``loss`` or ``perplexity``.
        higher_is_better: Whether a larger value is a better model.
        data: Data set it uses unless told otherwise; None if it must be named.
        max_new_tokens: Longest answer in tokens, for tasks that generate.
        about: One line for people.
    """

    name: str
    kind: TaskKind
    metric: Literal["accuracy", "loss", "perplexity"]
    higher_is_better: bool
    data: str | None
    max_new_tokens: int | None
    about: str


def _generated(name: str, kind: TaskKind, data: str | None, tokens: int, about: str) -> TaskSpec:
    return TaskSpec(name, kind, "accuracy", True, data, tokens, about)


def _perplexity(name: str, data: str | None, about: str) -> TaskSpec:
    return TaskSpec(name, "perplexity", "perplexity", False, data, None, about)


_SPECS = (
    _generated("gsm8k", "exact_match", "gsm8k", 256, "school problems, exact match of the final number"),
    _generated("arithmetic", "exact_match", "arithmetic", 96,
               "generated problems (arithmetic@N: N steps), exact match of the final number"),
    TaskSpec("mmlu", "multiple_choice", "accuracy", True, "mmlu", None,
             "57 subjects, likelihood of the letter"),
    TaskSpec("toxigen", "multiple_choice", "accuracy", True, "toxigen", None,
             "is the statement hateful? likelihood of Yes and No"),
    _perplexity("wikitext", "wikitext", "perplexity of Wikipedia paragraphs"),
    _perplexity("pydocs", "pydocs", "perplexity of English reference text (no download)"),
    _perplexity("ifeval_prompts", "ifeval", "perplexity of IFEval's prompts (retention)"),
    _perplexity("mt_bench", "mt_bench", "perplexity of MT-Bench's first turns (retention)"),
    _generated("ifeval", "ifeval", "ifeval", 1280,
               "share of prompts whose checkable instructions are all followed"),
    _generated("humaneval", "humaneval", "humaneval", 512,
               "share of functions that pass their tests (runs the model's code: must be allowed)"),
    _generated("exact_match", "exact_match", None, 256, "exact match of generated answers, on your --data"),
    TaskSpec("multiple_choice", "multiple_choice", "accuracy", True, None, None,
             "likelihood of the choices' letters, on your --data"),
    _perplexity("perplexity", None, "perplexity of any text, on your --data"),
    TaskSpec("answer_loss", "answer_loss", "loss", False, None, None,
             "mean loss per token of the reference answers, on your --data"),
)

TASKS: dict[str, TaskSpec] = {spec.name: spec for spec in _SPECS}
"""Every task by name, in the order in which to show them."""


def find_task(name: str) -> TaskSpec:
    """The task of a name; ``arithmetic@3`` is the task ``arithmetic``.

    Raises:
        SettingsError: there is no such task.

    Example:
        >>> find_task("arithmetic@3").kind
        'exact_match'
    """
    base, at, option = name.partition("@")
    if base in TASKS and (not at or (base == "arithmetic" and option)):
        return TASKS[base]
    close = difflib.get_close_matches(base, TASKS, n=1)
    raise SettingsError(f"task {name!r} is not known{f'; did you mean {close[0]}?' if close else '.'} "
                        f"Tasks: {', '.join(TASKS)}.")


def task_data(task: str, data: str | Dataset | None, *, samples: int | None, seed: int) -> Dataset:
    """The rows that a task is scored on.

    Args:
        task: Its name.
        data: A data spec or a data set; None takes the task's own.
        samples: How many rows to draw; None takes all. The same draw for every model.
        seed: Of the draw.

    Raises:
        SettingsError: the task has no data of its own and none was named.
        DataError: the data cannot be loaded.
    """
    spec = find_task(task)
    if data is None:
        data = task if "@" in task else spec.data
    if data is None:
        raise SettingsError(f"task {task!r} has no data of its own; name some with --data, such as "
                            "--data gsm8k or --data rows.jsonl.")
    if isinstance(data, Dataset):
        return data.sample(samples, seed)
    return load_data(data, split="test", samples=samples, seed=seed)


def item_ids(examples: Sequence[Example]) -> tuple[str, ...]:
    """A name for each example from its content alone: equal for every model, machine and order.

    The second example with the same content gets ``-2``, and so on.

    Example:
        >>> [i[16:] for i in item_ids([Example("a"), Example("b"), Example("a")])]
        ['', '', '-2']
    """
    seen: dict[str, int] = {}
    names = []
    for example in examples:
        content = json.dumps([example.text, example.prompt, example.completion, example.messages,
                              example.row.get("choices"), example.row.get("test")],
                             sort_keys=True, ensure_ascii=False, default=str)
        digest = sha256_of(content)[:16]
        seen[digest] = seen.get(digest, 0) + 1
        names.append(digest if seen[digest] == 1 else f"{digest}-{seen[digest]}")
    return tuple(names)


def _needs(example: Example, what: str, hint: str) -> DataError:
    return DataError(f"{example.where}: this row has no {what}; {hint}")


def exact_match_docs(dataset: Dataset) -> tuple[list[dict[str, Any]], bool]:
    """Documents with prompt and reference answer, and whether the final number is what counts.

    Raises:
        DataError: a row has no completion, or only some rows end in ``#### number``.
    """
    docs = []
    for item, example in zip(item_ids(dataset.examples), dataset.examples, strict=True):
        if example.prompt is None or example.completion is None:
            raise _needs(example, "prompt and completion", "exact match needs a question and its answer.")
        docs.append({"item": item, "prompt": example.prompt, "answer": example.completion.strip()})
    numeric = ["answer_number" in e.row or "####" in (e.completion or "") for e in dataset.examples]
    if any(numeric) and not all(numeric):
        raise _needs(dataset.examples[numeric.index(False)], "final '#### number'",
                     "other rows of this data have one; give it to all rows or to none.")
    return docs, all(numeric)


def multiple_choice_docs(dataset: Dataset) -> list[dict[str, Any]]:
    """Documents with prompt, the texts of the choices and the index of the right one.

    Raises:
        DataError: a row is neither a question with choices nor a labelled statement.
    """
    docs = []
    for item, example in zip(item_ids(dataset.examples), dataset.examples, strict=True):
        row = example.row
        if isinstance(row.get("choices"), list) and isinstance(row.get("answer"), int):
            choices = [chr(ord("A") + i) for i in range(len(row["choices"]))]
            gold = int(row["answer"])
        elif row.get("label") in (0, 1) and example.completion in (" Yes", " No"):
            choices, gold = ["No", "Yes"], int(row["label"])
        else:
            raise _needs(example, "choices with the index of the right one",
                         "multiple choice needs question, choices and answer, or ToxiGen's text and label.")
        docs.append({"item": item, "prompt": example.prompt, "choices": choices, "gold": gold,
                     **({"subject": str(row["subject"])} if row.get("subject") is not None else {})})
    return docs


def benchmark_docs(dataset: Dataset, fields: Sequence[str], task: str) -> list[dict[str, Any]]:
    """Documents with the benchmark's own fields, for lm-evaluation-harness's own scorers.

    Raises:
        DataError: a row lacks one of ``fields``.
    """
    docs = []
    for item, example in zip(item_ids(dataset.examples), dataset.examples, strict=True):
        for name in fields:
            if example.row.get(name) is None:
                raise _needs(example, f"field {name!r}", f"task {task} needs {', '.join(fields)}.")
        docs.append({"item": item, **{name: example.row[name] for name in fields}})
    return docs
