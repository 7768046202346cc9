"""`evaluate`: one model on one task."""

from __future__ import annotations

import contextlib
import importlib.util
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from midblock.data import DATASETS, Dataset, load_data
from midblock.errors import DataError, SettingsError
from midblock.evaluation.likelihood import score_tokens
from midblock.evaluation.outcome import EvalResult, estimate_of
from midblock.evaluation.sandbox import ISOLATION, ProgramTest, require_sandbox, run_tests
from midblock.evaluation.tasks import (
    TaskSpec,
    benchmark_docs,
    exact_match_docs,
    find_task,
    multiple_choice_docs,
    task_data,
)
from midblock.extras import require
from midblock.progress import Progress, silent

if TYPE_CHECKING:
    from midblock.evaluation.harness import RowsTask
    from midblock.models import LoadedModel

__all__ = ["CodeExecution", "check_options", "evaluate", "model_limit"]

_BATCH = {"multiple_choice": 16, "perplexity": 8, "answer_loss": 16}
_GENERATION_ROWS, _CACHE_BYTES = 64, 4 << 30
_MAX_LENGTH = 1024
_IFEVAL_PACKAGES = ("langdetect", "nltk", "immutabledict")
_CODE_SECONDS, _CODE_MEMORY_MB = 10.0, 1024

CodeExecution = bool | Literal["unsandboxed"]
"""May code that a model writes be run: no, in a full sandbox only, or on any system."""


def evaluate(loaded_model: LoadedModel, task: str, *, data: str | Dataset | None = None,
             samples: int | None = None, seed: int = 0, batch_size: int | None = None,
             max_new_tokens: int | None = None, max_length: int | None = None, shots: int = 0,
             chat: bool = False, allow_code_execution: CodeExecution = False,
             progress: Progress = silent) -> EvalResult:
    """Score a model on a task.

    Equal arguments give the same items to every model, so that two results can be compared
    item by item (`midblock.evaluation.compare`).

    Args:
        loaded_model: From `midblock.load_model`, with or without an adapter.
        task: A name of `midblock.evaluation.TASKS`.
        data: A data spec or data set in place of the task's own.
        samples: How many rows to draw; None takes all.
        seed: Of the draw and of the choice of few-shot examples.
        batch_size: Rows in a batch; None takes a default for the kind of task. In float32 the
            scores do not depend on it; in 16 bits rounding can tip an answer.
        max_new_tokens: Longest answer in tokens; None takes the task's.
        max_length: For tasks that score tokens: rows are cut to this many (default 1,024 or the
            model's limit).
        shots: Few-shot examples from the data's train split (``dev`` for MMLU), for exact match
            and multiple choice.
        chat: Apply the tokenizer's chat template.
        allow_code_execution: ``humaneval`` may run what the model writes: True, in a sandbox (refused where the
            system gives no full one); ``"unsandboxed"``, also where it gives none.
        progress: Told how many rows are done.

    Returns:
        Value with interval, one score per item, and lm-evaluation-harness's records.

    Raises:
        SettingsError: an unknown task, an option that the task does not have, code execution not
            allowed, a package missing that the task needs.
        DataError: the data cannot be loaded or its rows lack what the task needs.
    """
    spec = find_task(task)
    check_options(task, batch_size=batch_size, max_new_tokens=max_new_tokens, max_length=max_length,
                  shots=shots, allow_code_execution=allow_code_execution)
    if chat and not getattr(loaded_model.tokenizer, "chat_template", None):
        raise SettingsError(f"the chat format was asked for, but the tokenizer of {loaded_model.name} has no "
                            "chat template; leave it out.")
    dataset = task_data(task, data, samples=samples, seed=seed)
    rows = batch_size or _BATCH.get(spec.kind) or _generation_rows(
        loaded_model, max_new_tokens or spec.max_new_tokens or 0)
    if spec.kind in ("perplexity", "answer_loss"):
        limit = model_limit(loaded_model)
        longest = min(_MAX_LENGTH, limit) if max_length is None else max_length
        if longest > limit:
            raise SettingsError(f"rows of {longest} tokens were asked for, {loaded_model.name} takes at most "
                                f"{limit}; use a smaller --max-length.")
        return score_tokens(loaded_model, task, dataset, batch_size=rows, max_length=longest, chat=chat,
                            progress=progress)
    longest = max_new_tokens or spec.max_new_tokens or 0
    return _through_lm_eval(loaded_model, spec, task, dataset, rows, longest, shots, chat, seed,
                            allow_code_execution == "unsandboxed", progress)


def model_limit(loaded: LoadedModel) -> int:
    """Tokens that a model's positions allow; effectively unlimited where its config names no limit."""
    config = loaded.model.config.get_text_config(decoder=True)
    for name in ("n_positions", "max_position_embeddings", "n_ctx"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return sys.maxsize


def _generation_rows(loaded: LoadedModel, longest: int) -> int:
    """Rows that generate together: many, because a step costs little more for 64 rows than for one,
    as long as their keys and values stay within 4 GiB (with prompts of 512 tokens)."""
    config = loaded.model.config.get_text_config(decoder=True)
    heads = getattr(config, "num_key_value_heads", None) or getattr(config, "num_attention_heads", None) or 1
    width = getattr(config, "head_dim", None) or loaded.anatomy.hidden_size // (
        getattr(config, "num_attention_heads", None) or 1)
    per_token = 2 * loaded.anatomy.num_blocks * heads * width * loaded.dtype.itemsize
    return max(1, min(_GENERATION_ROWS, _CACHE_BYTES // (per_token * (512 + longest))))


def check_options(task: str, *, batch_size: int | None = None, max_new_tokens: int | None = None,
                  max_length: int | None = None, shots: int = 0, allow_code_execution: CodeExecution = False) -> None:
    """Refuse what cannot work before any model is loaded; see `evaluate` for the options.

    Raises:
        SettingsError: an unknown task, an option that it does not have, code execution not
            allowed, a package missing that the task needs.
        MissingExtraError: lm-eval is not installed.
    """
    require("lm_eval", f"scoring the task {task}")
    spec = find_task(task)
    for name, value in (("batch size", batch_size), ("number of new tokens", max_new_tokens),
                        ("maximum length", max_length)):
        if value is not None and value < 1:
            raise SettingsError(f"{task}: a {name} of {value} was asked for; use 1 or more.")
    if max_new_tokens is not None and spec.max_new_tokens is None:
        raise SettingsError(f"task {task} generates nothing; --max-new-tokens does not apply to it.")
    if max_length is not None and spec.kind not in ("perplexity", "answer_loss"):
        raise SettingsError(f"task {task} does not cut rows; --max-length does not apply to it.")
    if shots and spec.kind not in ("exact_match", "multiple_choice"):
        raise SettingsError(f"task {task} takes no few-shot examples (--shots).")
    if shots < 0:
        raise SettingsError(f"{shots} few-shot examples were asked for; use 0 or more.")
    if spec.kind == "ifeval":
        _require_ifeval()
    if spec.kind == "humaneval":
        _require_permission(allow_code_execution)


def _require_permission(allowed: CodeExecution) -> None:
    if allowed not in (False, True, "unsandboxed"):
        raise SettingsError(f"allow_code_execution {allowed!r} is neither true, false nor 'unsandboxed'.")
    if not allowed:
        raise SettingsError(
            "task humaneval runs Python code that the model writes, in processes without network, files of yours, "
            "or privileges, and with limits on time and memory. Allow it with --allow-code-execution "
            "(allow_code_execution=True) if you accept the risk that remains.")
    if allowed is True:
        require_sandbox()


def _require_ifeval() -> None:
    missing = [name for name in _IFEVAL_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise SettingsError(f"task ifeval needs {', '.join(missing)}, with which lm-eval checks the "
                            "answers; pip install 'lm-eval[ifeval]'. The task ifeval_prompts (perplexity of "
                            "the same prompts) needs none of them.")
    import nltk

    try:
        nltk.data.find("tokenizers/punkt_tab")
    except LookupError:
        raise SettingsError("task ifeval needs NLTK's sentence splitter, which is not on this machine; fetch "
                            "it once with: python -m nltk.downloader punkt_tab") from None


# ---------------------------------------------------------------- tasks as lm-eval configurations

# makes the task; its metric; the filter whose answers count
_Built = tuple[Callable[[], "RowsTask"], str, str]

def _task_file(name: str, *, functions: bool = False) -> dict[str, Any]:
    """lm-eval's own task file; its functions are imported only on demand."""
    import lm_eval.tasks
    from lm_eval.tasks._yaml_loader import load_yaml

    # importing a task's helpers may print (NLTK announces its downloads); stdout is the result's
    with contextlib.redirect_stdout(sys.stderr):
        return dict(load_yaml(Path(lm_eval.tasks.__file__).parent / name, resolve_func=functions))


def _exact_match(dataset: Dataset, shots: Dataset | None, longest: int) -> _Built:
    from midblock.evaluation.harness import RowsTask

    docs, numeric = exact_match_docs(dataset)
    config = _task_file("gsm8k/gsm8k.yaml")
    config |= {"doc_to_text": "prompt", "doc_to_target": "answer",
               "generation_kwargs": {**config["generation_kwargs"], "max_gen_toks": longest}}
    if not numeric:  # no final number: the whole answer must match, blanks around it aside
        metric = {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}
        config |= {"metric_list": [metric],
                   "filter_list": [{"name": "strict-match", "filter": [
                       {"function": "regex", "regex_pattern": r"(?s)^\s*(.*?)\s*$", "fallback": ""},
                       {"function": "take_first"}]}],
                   "metadata": {"version": 1.0}}
        config["generation_kwargs"]["until"] = [*config["generation_kwargs"]["until"], "\n\n"]
    examples = exact_match_docs(shots)[0] if shots is not None else []
    return lambda: RowsTask(config, docs, examples), "exact_match", "strict-match"


def _multiple_choice(dataset: Dataset, shots: Dataset | None) -> _Built:
    from midblock.evaluation.harness import RowsTask

    docs = multiple_choice_docs(dataset)
    config = {"output_type": "multiple_choice", "doc_to_text": "prompt", "doc_to_choice": "choices",
              "doc_to_target": "gold",
              "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
              "metadata": {"version": 1.0}}
    examples = multiple_choice_docs(shots) if shots is not None else []
    return lambda: RowsTask(config, docs, examples), "acc", "none"


def _ifeval(dataset: Dataset, longest: int) -> _Built:
    from midblock.evaluation.harness import RowsTask

    docs = benchmark_docs(dataset, ("key", "prompt", "instruction_id_list", "kwargs"), "ifeval")
    config = _task_file("ifeval/ifeval.yaml", functions=True)
    config["generation_kwargs"] = {**config["generation_kwargs"], "max_gen_toks": longest}
    return lambda: RowsTask(config, docs), "prompt_level_strict_acc", "none"


def _humaneval(dataset: Dataset, longest: int, unsandboxed: bool, progress: Progress) -> _Built:
    from midblock.evaluation.harness import RowsTask

    fields = ("task_id", "prompt", "canonical_solution", "test", "entry_point")
    docs = benchmark_docs(dataset, fields, "humaneval")
    config = _task_file("humaneval/humaneval.yaml")

    def run(responses: Sequence[Sequence[str]],
            documents: Sequence[Mapping[str, Any]]) -> list[list[dict[str, Any]]]:
        programs = [(f"{doc['prompt']}{answer}\n", ProgramTest(doc["test"], doc["entry_point"], doc["prompt"]))
                    for answers, doc in zip(responses, documents, strict=True) for answer in answers]
        outcomes = iter(run_tests(programs, seconds=_CODE_SECONDS, memory_mb=_CODE_MEMORY_MB, unsandboxed=unsandboxed,
                                  done=lambda done, total: progress("run tests", done, total)))
        return [[{"passed": o.passed, "reason": o.reason, "isolation": list(o.isolation)}
                 for _, o in zip(answers, outcomes, strict=False)] for answers in responses]

    config |= {"filter_list": [{"name": "create_test", "filter": [{"function": "custom", "filter_fn": run}]}],
               "metric_list": [{"metric": "pass@1", "aggregation": "mean", "higher_is_better": True}],
               "process_results": lambda doc, results: {"pass@1": float(results[0][0]["passed"])},
               "generation_kwargs": {**config["generation_kwargs"], "max_gen_toks": longest}}
    return lambda: RowsTask(config, docs), "pass@1", "create_test"


def _few_shot_data(dataset: Dataset, shots: int) -> Dataset | None:
    if not shots:
        return None
    name = dataset.name.partition("@")[0]
    if name not in DATASETS:
        raise SettingsError(f"few-shot examples (--shots) come from the train split of a named data set; "
                            f"{dataset.name} has none.")
    found = load_data(dataset.name, split="dev" if name == "mmlu" else "train", samples=max(shots, 64))
    if len(found) < shots:
        raise DataError(f"{shots} few-shot examples were asked for; {found.name} ({found.split}) has "
                        f"{len(found)}.")
    return found


def _through_lm_eval(loaded: LoadedModel, spec: TaskSpec, task: str, dataset: Dataset, batch_size: int,
                     longest: int, shots: int, chat: bool, seed: int, unsandboxed: bool, progress: Progress
                     ) -> EvalResult:
    from midblock.evaluation.harness import MemoryLM, run_lm_eval

    started = time.perf_counter()
    examples = _few_shot_data(dataset, shots)
    if spec.kind == "exact_match":
        build, metric, chosen = _exact_match(dataset, examples, longest)
    elif spec.kind == "multiple_choice":
        build, metric, chosen = _multiple_choice(dataset, examples)
    elif spec.kind == "ifeval":
        build, metric, chosen = _ifeval(dataset, longest)
    else:
        build, metric, chosen = _humaneval(dataset, longest, unsandboxed, progress)
    lm = MemoryLM(loaded, batch_size=batch_size, progress=progress, what=task)
    try:
        found = run_lm_eval(lm, task, build, chat=chat, shots=shots, seed=seed,
                            allow_code=spec.kind == "humaneval")
    finally:
        lm.close()
    samples = [{**s, "item": s["doc"]["item"]} for s in found.pop("samples")[task]]
    records = sorted((s for s in samples if s["filter"] == chosen), key=lambda s: int(s["doc_id"]))
    scores = np.array([float(s[metric]) for s in records])
    notes = [dataset.note] if dataset.note else []
    if lm.unfinished:
        notes.append(f"{lm.unfinished} of {len(records)} answers reached {longest} new tokens without an "
                     "end; allow more with --max-new-tokens")
    if lm.cut_prompts:
        notes.append(f"{lm.cut_prompts} prompts were longer than the model takes and lost their beginning")
    if spec.kind == "humaneval":
        notes += _isolation_notes(records)
    settings: dict[str, Any] = {"batch_size": batch_size, "chat": chat, "shots": shots,
                                "lm_eval_metric": f"{metric},{chosen}"}
    if spec.max_new_tokens is not None:
        settings |= {"max_new_tokens": longest, "generated_tokens": lm.generated_tokens,
                     "unfinished": lm.unfinished}
    return EvalResult(
        task=task, metric=spec.metric, higher_is_better=spec.higher_is_better,
        items=tuple(s["item"] for s in records), scores=scores,
        estimate=estimate_of(spec.metric, scores, None), samples=samples, results=_plain(found),
        data=dataset.describe(), settings=settings, notes=tuple(notes), seconds=time.perf_counter() - started)


def _isolation_notes(records: Sequence[Mapping[str, Any]]) -> list[str]:
    missing = [word for word in ISOLATION
               if any(word not in s["filtered_resps"][0][0]["isolation"] for s in records)]
    return [f"this system gave the model's code no isolation of {', '.join(missing)}; only limits on time, memory and "
            "file size held"] if missing else []


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, float):  # NumPy's too
        return float(value) if math.isfinite(value) else None
    return value
