"""`midblock evaluate MODEL --task T`: scores on tasks, item by item, with intervals."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from midblock.cli import console
from midblock.cli.answers import show_answer
from midblock.cli.command import command
from midblock.cli.options import Model, Out, Resume
from midblock.settings.evaluate import EvaluateSettings, ServingSettings
from midblock.settings.load import STREAM_FIELDS, LoadSettings, StreamedLoadSettings

__all__ = ["evaluate"]

_TASKS = ("gsm8k, arithmetic[@N], mmlu, toxigen, wikitext, pydocs, ifeval_prompts, mt_bench, ifeval, "
          "humaneval; on any --data: exact_match, multiple_choice, perplexity, answer_loss")


@command(
    "midblock evaluate smollm2 --task arithmetic --samples 100",
    "midblock evaluate smollm2 --adapter runs/tune/adapter --compare-base --task arithmetic",
    "midblock evaluate runs/tune/adapter --task arithmetic --samples 100 --out runs/eval",
    "midblock evaluate MODEL --task gsm8k --samples 200 --shots 5 --json",
    "midblock evaluate MODEL --task answer_loss --data mine.jsonl",
    "midblock evaluate MODEL --task humaneval --allow-code-execution",
    "midblock evaluate MODEL --adapter runs/tune/adapter --check-serving http://localhost:8000")
def evaluate(
    model: Model,
    settings: EvaluateSettings, load: StreamedLoadSettings, serving: ServingSettings,
    task: Annotated[list[str] | None, typer.Option(
        "--task", metavar="T", show_default=False, help=f"What to score; repeat for more. {_TASKS}.")] = None,
    check_serving: Annotated[str | None, typer.Option(
        "--check-serving", metavar="URL", show_default=False,
        help="In place of a task: is --adapter applied by the server there (OpenAI's completions API)? Compares its "
             "log-probabilities with local ones.")] = None,
    out: Out = None, resume: Resume = False,
) -> None:
    """Score a model, with or without an adapter, through lm-evaluation-harness.

    Accuracy comes with Wilson's interval, losses with a t interval, perplexity (padding masked,
    every token weighs the same) with a bootstrap interval over texts. With --out: run.json,
    table.csv, and results.json and samples_TASK.jsonl in lm-evaluation-harness's own shapes.
    """
    from midblock.evaluation.suite import evaluate_tasks

    if check_serving is not None:
        _check_serving(check_serving, model, settings, LoadSettings(
            **{k: v for k, v in load.given().items() if k not in STREAM_FIELDS}), serving, task, out)
        return
    with console.progress_bar() as progress:
        found = evaluate_tasks(model, task or [], out=out, resume=resume, load=load, settings=settings,
                               progress=progress)
    for note in found.notes:
        console.warn(f"{note}.")
    frame = found.frame.rename(columns={"data": "task"})
    columns = ["task", "metric", "side", "value", "low", "high", "n", *(["p"] if "p" in frame else [])]
    console.print_table(frame[columns], title="Scores with 95% intervals")
    for line in found.details():
        console.say(line)
    if out is not None:
        console.say(f"\nTable, samples and settings: {out}")
    show_answer(found.answer(), out)
    console.emit_json({
        "answer": found.answer(),
        "results": {side: {t: {"metric": r.metric, "value": r.estimate.value, "low": r.estimate.low,
                               "high": r.estimate.high, "n": r.n, "higher_is_better": r.higher_is_better,
                               "seconds": r.seconds, "notes": r.notes, "data": r.data} for t, r in of_side.items()}
                    for side, of_side in found.results.items()},
        "differences": {t: {"metric": d.metric, "value": d.estimate.value, "low": d.estimate.low,
                            "high": d.estimate.high, "p": d.p, "n": d.n} for t, d in found.differences.items()},
        "run": found.run})


def _check_serving(url: str, model: str, settings: EvaluateSettings, load: LoadSettings, serving: ServingSettings,
                   task: list[str] | None, out: Path | None) -> None:
    from midblock.errors import SettingsError
    from midblock.evaluation.serving import check_serving
    from midblock.provenance import RunFolder
    from midblock.report import save_result

    adapter = settings.adapter
    if adapter is None or task or settings.replace(adapter=None) != EvaluateSettings():
        raise SettingsError("--check-serving takes MODEL and --adapter A, and no task or other option of scoring.")
    if out is not None:
        RunFolder.check_free(out)
    with console.progress_bar() as progress:
        found = check_serving(url, model, adapter=adapter, load=load, settings=serving, progress=progress)
    run = None
    if out is not None:
        recorded = {"url": url, "model": model, "adapter": adapter, **serving.model_dump(), **load.model_dump()}
        with RunFolder(out, command="check-serving", settings=recorded) as run:
            run.write_table(found.tokens, "tokens.csv")
            save_result(run, found, fields={"verdict": found.verdict})
    for line in found.details():
        console.say(line)
    show_answer(found.answer())
    console.emit_json({"verdict": found.verdict, "served": found.served, "share": found.share, "table": found.frame,
                       "run": None if run is None else run.run})
