"""`midblock evaluate MODEL --task T`: scores on tasks, item by item, with intervals."""

from __future__ import annotations

from typing import Annotated

import typer

from midblock.cli import console
from midblock.cli.command import expand
from midblock.cli.options import Json, Model, Out, Quiet, Resume, examples
from midblock.settings.evaluate import EvaluateSettings
from midblock.settings.load import LoadSettings

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
        "midblock evaluate MODEL --task humaneval --allow-code-execution"))(expand(evaluate))


def evaluate(
    model: Model,
    task: Annotated[list[str], typer.Option(
        "--task", metavar="T", show_default=False, help=f"What to score; repeat for more. {_TASKS}.")],
    settings: EvaluateSettings, load: LoadSettings, out: Out = None, resume: Resume = False, as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Score a model, with or without an adapter, through lm-evaluation-harness.

    Accuracy comes with Wilson's interval, losses with a t interval, perplexity (padding masked,
    every token weighs the same) with a bootstrap interval over texts. With --out: run.json,
    table.csv, and results.json and samples_TASK.jsonl in lm-evaluation-harness's own shapes.
    """
    from midblock.evaluation import evaluate_tasks

    with console.progress_bar() as progress:
        found = evaluate_tasks(model, task, out=out, resume=resume, load=load, settings=settings, progress=progress)
    for note in found.notes:
        console.warn(f"{note}.")
    frame = found.frame.rename(columns={"data": "task"})
    columns = ["task", "metric", "side", "value", "low", "high", "n", *(["p"] if "p" in frame else [])]
    console.print_table(frame[columns], title="Scores with 95% intervals")
    console.say(found.summary())
    if out is not None:
        console.say(f"\nTable, samples and settings: {out}")
    console.emit_json({
        "results": {side: {t: {"metric": r.metric, "value": r.estimate.value, "low": r.estimate.low,
                               "high": r.estimate.high, "n": r.n, "higher_is_better": r.higher_is_better,
                               "seconds": r.seconds, "notes": r.notes, "data": r.data} for t, r in of_side.items()}
                    for side, of_side in found.results.items()},
        "differences": {t: {"metric": d.metric, "value": d.estimate.value, "low": d.estimate.low,
                            "high": d.estimate.high, "p": d.p, "n": d.n} for t, d in found.differences.items()},
        "run": found.run})
