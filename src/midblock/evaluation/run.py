"""`evaluate`: one model on one task."""

from __future__ import annotations

import contextlib
import importlib.util
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from midblock import ranks
from midblock.data import DATASETS, Dataset, load_data
from midblock.errors import DataError, SettingsError
from midblock.evaluation.on_vllm import VllmModel
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
from midblock.settings.base import name_of
from midblock.settings.evaluate import ScoringSettings

if TYPE_CHECKING:
    from midblock.evaluation.harness import RowsTask
    from midblock.models import LoadedModel

__all__ = ["check_options", "evaluate", "model_limit", "options_of", "scores_tokens"]

_TOKEN_KINDS = ("perplexity", "answer_loss")
_BATCH = {"multiple_choice": 16, "perplexity": 8, "answer_loss": 16}
_GENERATION_ROWS, _CACHE_BYTES = 64, 4 << 30
_MAX_LENGTH = 1024
_IFEVAL_PACKAGES = ("langdetect", "nltk", "immutabledict")
_CODE_SECONDS, _CODE_MEMORY_MB = 10.0, 1024


def evaluate(loaded_model: LoadedModel | VllmModel, task: str, *, data: str | Dataset | None = None,
             progress: Progress = silent, settings: ScoringSettings | None = None, **overrides: Any) -> EvalResult:
    """Score a model on a task.

    Equal arguments give the same items to every model, so that two results can be compared
    item by item (`midblock.evaluation.compare`); `evaluate_tasks` does that for several tasks.

    Args:
        loaded_model: From `midblock.load_model`, with or without an adapter; or from `open_in_vllm`.
        task: A name of `midblock.evaluation.TASKS`.
        data: A data spec or data set in place of the task's own.
        progress: Told how many rows are done.
        settings: How it is scored; see `ScoringSettings`.
        **overrides: Single fields of them.

    Returns:
        Value with interval, one score per item, and lm-evaluation-harness's records.

    Raises:
        SettingsError: an unknown task, an option that the task does not have, code execution not
            allowed, a package missing that the task needs.
        MissingExtraError: lm-eval is not installed and the task is scored through it.
        DataError: the data cannot be loaded or its rows lack what the task needs.
    """
    chosen = ScoringSettings.of(settings, overrides)
    spec = check_options(task, chosen)
    if chosen.chat and not getattr(loaded_model.tokenizer, "chat_template", None):
        raise SettingsError(f"the chat format was asked for, but the tokenizer of {loaded_model.name} has no "
                            "chat template; leave it out.")
    dataset = task_data(task, data, samples=chosen.samples, seed=chosen.seed)
    longest = chosen.max_new_tokens or spec.max_new_tokens or 0
    if isinstance(loaded_model, VllmModel):
        if spec.kind in _TOKEN_KINDS:
            raise SettingsError(f"task {task} is scored from hidden states; leave out {name_of('backend')} vllm.")
        return _through_lm_eval(loaded_model, spec, task, dataset, chosen.batch_size or 0, longest, chosen, progress)
    rows = chosen.batch_size or _BATCH.get(spec.kind) or _generation_rows(loaded_model, longest)
    if spec.kind not in _TOKEN_KINDS:
        loaded_model.require_whole()
        return _through_lm_eval(loaded_model, spec, task, dataset, rows, longest, chosen, progress)
    limit = model_limit(loaded_model)
    width = min(_MAX_LENGTH, limit) if chosen.max_length is None else chosen.max_length
    if width > limit:
        raise SettingsError(f"rows of {width} tokens were asked for, {loaded_model.name} takes at most "
                            f"{limit}; use a smaller {name_of('max_length')}.")
    from midblock.evaluation.likelihood import score_tokens  # torch: not needed to refuse an option

    return score_tokens(loaded_model, task, dataset, batch_size=rows, max_length=width, chat=chosen.chat,
                        progress=progress)


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


def check_options(task: str, settings: ScoringSettings | None = None, **overrides: Any) -> TaskSpec:
    """Refuse what cannot work before any model is loaded.

    Args:
        task: Its name.
        settings: As for `evaluate`, like ``overrides``.

    Returns:
        The task.

    Raises:
        SettingsError: an unknown task, an option that it does not have, code execution not
            allowed, a package missing that the task needs.
        MissingExtraError: lm-eval is not installed and the task is scored through it.
    """
    chosen = ScoringSettings.of(settings, overrides)
    spec = find_task(task)
    takes = options_of(spec)
    for name, why in (("max_new_tokens", "generates nothing"), ("max_length", "does not cut rows"),
                      ("shots", "takes no few-shot examples")):
        if getattr(chosen, name) and name not in takes:
            raise SettingsError(f"task {task} {why}; {name_of(name)} does not apply to it.")
    if spec.kind not in _TOKEN_KINDS:
        require("lm_eval", f"scoring the task {task}")
    if spec.kind == "ifeval":
        _require_ifeval()
    if spec.kind == "humaneval" and not chosen.allow_unsandboxed_code:
        if not chosen.allow_code_execution:
            raise SettingsError(
                "task humaneval runs Python code that the model writes, in processes without network, files of yours, "
                f"or privileges, and with limits on time and memory. Allow it with {name_of('allow_code_execution')} "
                "if you accept the risk that remains.")
        require_sandbox()
    return spec


def scores_tokens(task: str) -> bool:
    """Whether a task is the loss of given tokens, which needs no generation and no lm-eval."""
    return find_task(task).kind in _TOKEN_KINDS


def options_of(spec: TaskSpec) -> set[str]:
    """Which of the options that not every task has a task has."""
    takes = {"max_new_tokens": spec.max_new_tokens is not None, "max_length": spec.kind in _TOKEN_KINDS,
             "shots": spec.kind in ("exact_match", "multiple_choice")}
    return {name for name, taken in takes.items() if taken}


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
        outcomes = iter(ranks.first(lambda: list(run_tests(
            programs, seconds=_CODE_SECONDS, memory_mb=_CODE_MEMORY_MB, unsandboxed=unsandboxed,
            done=lambda done, total: progress("run tests", done, total)))))
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


def _through_lm_eval(loaded: LoadedModel | VllmModel, spec: TaskSpec, task: str, dataset: Dataset, batch_size: int,
                     longest: int, chosen: ScoringSettings, progress: Progress) -> EvalResult:
    from midblock.evaluation.harness import MemoryLM, run_lm_eval

    started = time.perf_counter()
    examples = _few_shot_data(dataset, chosen.shots)
    if spec.kind == "exact_match":
        build, metric, counted = _exact_match(dataset, examples, longest)
    elif spec.kind == "multiple_choice":
        build, metric, counted = _multiple_choice(dataset, examples)
    elif spec.kind == "ifeval":
        build, metric, counted = _ifeval(dataset, longest)
    else:
        build, metric, counted = _humaneval(dataset, longest, chosen.allow_unsandboxed_code, progress)
    served = isinstance(loaded, VllmModel)
    lm: Any = loaded.lm() if isinstance(loaded, VllmModel) else MemoryLM(
        loaded, batch_size=batch_size, progress=progress, what=task)
    try:
        found = run_lm_eval(lm, task, build, chat=chosen.chat, shots=chosen.shots, seed=chosen.seed,
                            allow_code=spec.kind == "humaneval")
    finally:
        if not served:
            lm.close()
    samples = [{**s, "item": s["doc"]["item"]} for s in found.pop("samples")[task]]
    records = sorted((s for s in samples if s["filter"] == counted), key=lambda s: int(s["doc_id"]))
    scores = np.array([float(s[metric]) for s in records])
    notes = [dataset.note] if dataset.note else []
    if not served and lm.unfinished:
        notes.append(f"{lm.unfinished} of {len(records)} answers reached {longest} new tokens without an "
                     "end; allow more with --max-new-tokens")
    if not served and lm.cut_prompts:
        notes.append(f"{lm.cut_prompts} prompts were longer than the model takes and lost their beginning")
    if spec.kind == "humaneval":
        notes += _isolation_notes(records)
    settings: dict[str, Any] = {"backend": "vllm"} if served else {"batch_size": batch_size}
    settings |= {"chat": chosen.chat, "shots": chosen.shots, "lm_eval_metric": f"{metric},{counted}"}
    if spec.max_new_tokens is not None:
        settings |= {"max_new_tokens": longest}
        settings |= {} if served else {"generated_tokens": lm.generated_tokens, "unfinished": lm.unfinished}
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
