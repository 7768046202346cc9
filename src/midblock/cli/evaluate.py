"""`midblock evaluate MODEL --task T`: scores on tasks, item by item, with intervals."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from midblock.cli import console
from midblock.cli.options import (
    AllowPickle,
    Device,
    Dtype,
    DtypeName,
    Json,
    Model,
    Out,
    Quiet,
    Resume,
    Samples,
    Seed,
    TrustRemoteCode,
    examples,
)

if TYPE_CHECKING:
    from midblock.data import Dataset
    from midblock.evaluation import Comparison, EvalResult
    from midblock.models import LoadedModel
    from midblock.provenance import RunFolder

__all__ = ["register"]

_TASKS = ("gsm8k, arithmetic[@N], mmlu, toxigen, wikitext, pydocs, ifeval_prompts, mt_bench, ifeval, "
          "humaneval; on any --data: exact_match, multiple_choice, perplexity, answer_loss")


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    app.command("evaluate", epilog=examples(
        "midblock evaluate smollm2 --task arithmetic --samples 100",
        "midblock evaluate smollm2 --adapter runs/tune/adapter --compare-base --task arithmetic",
        "midblock evaluate runs/tune/adapter --task arithmetic --samples 100 --out runs/eval",
        "midblock evaluate MODEL --task gsm8k --samples 200 --shots 5 --json",
        "midblock evaluate MODEL --task answer_loss --data mine.jsonl",
        "midblock evaluate MODEL --task humaneval --allow-code-execution"))(evaluate)


def evaluate(
    model: Model,
    task: Annotated[list[str], typer.Option(
        "--task", metavar="T", show_default=False, help=f"What to score; repeat for more. {_TASKS}.")],
    adapter: Annotated[str | None, typer.Option(
        "--adapter", metavar="A", show_default=False,
        help="Folder or hub id of a PEFT adapter of MODEL.")] = None,
    data: Annotated[str | None, typer.Option(
        "--data", metavar="D", show_default=False,
        help="Data in place of the task's own: a registry name, a local file, hf:NAME[:SPLIT].")] = None,
    compare_base: Annotated[bool, typer.Option(
        "--compare-base", help="Also score MODEL without its adapter on the same items, and show the "
                               "difference.")] = False,
    base: Annotated[str | None, typer.Option(
        "--base", metavar="MODEL", show_default=False,
        help="Compare with this model instead (for a tuned model that is no adapter).")] = None,
    samples: Samples = None,
    max_new_tokens: Annotated[int | None, typer.Option(
        "--max-new-tokens", metavar="N", min=1, show_default=False,
        help="Longest answer (gsm8k 256, arithmetic 96, humaneval 512, ifeval 1280).")] = None,
    max_length: Annotated[int | None, typer.Option(
        "--max-length", metavar="TOKENS", min=2, show_default=False,
        help="Perplexity and answer_loss: cut rows after this many tokens (1024 or the model's limit).")
    ] = None,
    shots: Annotated[int, typer.Option(
        "--shots", metavar="N", min=0, help="Few-shot examples from the train split.")] = 0,
    chat: Annotated[bool, typer.Option("--chat", help="Use the tokenizer's chat template.")] = False,
    batch_size: Annotated[int | None, typer.Option(
        "--batch-size", metavar="N", min=1, show_default=False,
        help="Rows in a batch (8 to 64 by kind of task).")
    ] = None,
    allow_code_execution: Annotated[bool, typer.Option(
        "--allow-code-execution", help="humaneval: run what the model writes, in a sandbox (refused where the system "
                                       "gives no full one).")] = False,
    allow_unsandboxed_code: Annotated[bool, typer.Option(
        "--allow-unsandboxed-code", help="humaneval: run what the model writes also where the system gives no full "
                                         "sandbox. Only in a machine made for that.")] = False,
    out: Out = None,
    dtype: Dtype = DtypeName.auto,
    device: Device = "auto",
    seed: Seed = 0,
    trust_remote_code: TrustRemoteCode = False,
    allow_pickle: AllowPickle = False,
    resume: Resume = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Score a model, with or without an adapter, through lm-evaluation-harness.

    Accuracy comes with Wilson's interval, losses with a t interval, perplexity (padding masked,
    every token weighs the same) with a bootstrap interval over texts. With --out: run.json,
    table.csv, and results.json and samples_TASK.jsonl in lm-evaluation-harness's own shapes.
    """
    import contextlib

    from midblock.errors import SettingsError
    from midblock.evaluation import check_options, compare, task_data
    from midblock.evaluation import evaluate as score
    from midblock.models import load_model
    from midblock.provenance import RunFolder, sha256_of
    from midblock.results import Table

    tasks = list(dict.fromkeys(task))
    if compare_base and base is not None:
        raise SettingsError("give --compare-base or --base, not both.")
    if resume and out is None:
        raise SettingsError("--resume continues the run in --out; name that folder.")
    own = {"max_new_tokens": max_new_tokens, "max_length": max_length, "shots": shots}
    options = {name: _options_of(name, own, tasks) for name in tasks}
    allowed: Any = "unsandboxed" if allow_unsandboxed_code else allow_code_execution
    for name in tasks:
        check_options(name, batch_size=batch_size, allow_code_execution=allowed, **options[name])
    datasets = {name: task_data(name, data, samples=samples, seed=seed) for name in tasks}
    if out is not None and not resume:
        RunFolder.check_free(out)
    loading: dict[str, Any] = {"dtype": dtype.value, "device": device, "trust_remote_code": trust_remote_code,
                               "allow_pickle": allow_pickle}
    loaded: LoadedModel | None = load_model(model, adapter=adapter, **loading)
    assert loaded is not None
    if compare_base and loaded.adapter is None:
        raise SettingsError(f"--compare-base compares an adapter with its base, but {model} was given "
                            "without one; add --adapter A, or name the base with --base MODEL.")
    other = str(loaded.folder) if compare_base else base
    side = loaded.name if loaded.adapter is not None or other is not None else "base"
    side = f"{side}-tuned" if side in ("base", "difference") and other is not None else side
    settings = {"model": model, "adapter": adapter, "tasks": tasks, "data": data, "base": base,
                "compare_base": compare_base, "samples": samples, **own, "chat": chat,
                "batch_size": batch_size, "allow_code_execution": allowed,
                "dtype": dtype.value, "device": device, "seed": seed}
    results: dict[str, dict[str, EvalResult]] = {}
    with contextlib.ExitStack() as stack:
        run = stack.enter_context(RunFolder(out, command="evaluate", settings=settings, resume=resume)) \
            if out is not None else None
        progress = stack.enter_context(console.progress_bar())
        for name, spec in {side: None, **({"base": other} if other is not None else {})}.items():
            if spec is not None:
                loaded = None  # the first model's memory is free before the second comes
                loaded = load_model(spec, **loading)
            assert loaded is not None
            if run is not None:
                run.record_inputs(
                    models={**run.run["models"], name: loaded.describe()},
                    data={"fingerprint": sha256_of(*(d.fingerprint for d in datasets.values())),
                          "tasks": {t: d.describe() for t, d in datasets.items()}})
            results[name] = {}
            for t in tasks:
                found = _stored(run, name, t)
                if found is None:
                    found = score(loaded, t, data=datasets[t], seed=seed, batch_size=batch_size, chat=chat,
                                  allow_code_execution=allowed, progress=progress, **options[t])
                    _store(run, name, found)
                results[name][t] = found
        table = Table()
        for name, found_of in results.items():
            for result in found_of.values():
                result.add_to(table, name)
        differences = {t: compare(results[side][t], results["base"][t]) for t in tasks} if other else {}
        for difference in differences.values():
            table.add("model", "all", difference.metric, "difference", difference.estimate,
                      data=difference.task, p=difference.p)
        if run is not None:
            _write(run, table, results, model, loading, datasets)
    _show(results, differences, table, run)


def _options_of(task: str, own: dict[str, Any], tasks: list[str]) -> dict[str, Any]:
    """The options that a task takes; among several tasks each takes its own."""
    from midblock.evaluation import find_task

    spec = find_task(task)
    takes = {"max_new_tokens": spec.max_new_tokens is not None,
             "max_length": spec.kind in ("perplexity", "answer_loss"),
             "shots": spec.kind in ("exact_match", "multiple_choice")}
    return {name: value for name, value in own.items() if takes[name] or len(tasks) == 1}


def _path(side: str, task: str) -> str:
    from midblock.evaluation import file_name

    return f"scores/{file_name(side)}/{file_name(task)}.json"


def _stored(run: RunFolder | None, side: str, task: str) -> EvalResult | None:
    from midblock.evaluation import read_result

    if run is None or not run.resumed or not (run.path / _path(side, task)).is_file():
        return None
    return read_result(run.path / _path(side, task))


def _store(run: RunFolder | None, side: str, result: EvalResult) -> None:
    from midblock.evaluation import write_result

    if run is not None:
        write_result(run.file(_path(side, result.task)), result)


def _write(run: RunFolder, table: Any, results: dict[str, dict[str, EvalResult]], model: str,
           loading: dict[str, Any], datasets: dict[str, Dataset]) -> None:
    from midblock.evaluation import write_lm_eval_files

    first = next(iter(results))
    for side, found in results.items():
        folder = run.path if side == first else run.path / "base"
        name = model if side == first else f"{model} (base)"
        write_lm_eval_files(folder, list(found.values()), model_name=name,
                            config={"device": loading["device"], "dtype": loading["dtype"]})
    run.write_table(table)
    run.update(results={side: {t: {"metric": r.metric, "estimate": r.estimate, "settings": r.settings,
                                   "notes": r.notes, "seconds": r.seconds} for t, r in found.items()}
                        for side, found in results.items()})


def _show(results: dict[str, dict[str, EvalResult]], differences: dict[str, Comparison], table: Any,
          run: RunFolder | None) -> None:
    frame = table.frame().rename(columns={"data": "task"})
    for side, found in results.items():
        for result in found.values():
            for note in result.notes:
                console.warn(f"{result.task} ({side}): {note}.")
    columns = ["task", "metric", "side", "value", "low", "high", "n", *(["p"] if "p" in frame else [])]
    console.print_table(frame[columns], title="Scores with 95% intervals")
    for side, found in results.items():
        for result in found.values():
            console.say(f"{side}: {result.summary()}")
    if run is not None:
        console.say(f"\nTable, samples and settings: {run.path}")
    console.emit_json({
        "results": {side: {t: {"metric": r.metric, "value": r.estimate.value, "low": r.estimate.low,
                               "high": r.estimate.high, "n": r.n, "higher_is_better": r.higher_is_better,
                               "seconds": r.seconds, "notes": r.notes, "data": r.data}
                           for t, r in found.items()}
                    for side, found in results.items()},
        "differences": {t: {"metric": d.metric, "value": d.estimate.value, "low": d.estimate.low,
                            "high": d.estimate.high, "p": d.p, "n": d.n} for t, d in differences.items()},
        "run": None if run is None else run.run})
