"""`midblock compare A B`: two evaluation logs on the same items."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from midblock.cli import console
from midblock.cli.analysis import reading
from midblock.cli.answers import show_answer
from midblock.cli.command import command
from midblock.cli.options import Out
from midblock.settings.compare import CompareSettings

__all__ = ["compare"]

Log = Annotated[Path, typer.Argument(show_default=False, help=(
    "samples_*.jsonl of lm-evaluation-harness, a folder that holds some, or a .eval or .json log of inspect."))]


@command(
    "midblock compare runs/a/samples_gsm8k.jsonl runs/b/samples_gsm8k.jsonl",
    "midblock compare lm_eval/model-a lm_eval/model-b --metric acc --out runs/compared",
    "midblock compare logs/a.eval logs/b.eval --cluster passage --json")
def compare(a: Log, b: Log, settings: CompareSettings, out: Out = None) -> None:
    """Compare two evaluations item by item: which is better, by how much, and could chance do that?

    Items are paired by their document. For every task that both logs have: the difference with its interval, exact
    McNemar (or a permutation test), Holm's correction over all tasks, and the difference that these items could have
    shown. No model is loaded.
    """
    reading([a, b])
    from midblock.evaluation.paired import compare_logs
    from midblock.provenance import RunFolder

    result = compare_logs(a, b, settings)
    for note in result.notes:
        console.warn(note)
    shown = result.frame[["task", "metric", "n", "a", "b", "difference", "low", "high", "p_holm", "conclusion"]]
    console.print_table(shown, title="A against B")
    for line in result.details():
        console.say(line)
    if out is not None:
        with RunFolder(out, command="compare", settings={"a": str(a), "b": str(b), **settings.model_dump()}) as run:
            run.write_table(result.table)
            run.write_table(result.frame, "compare.csv")
            run.write_json("compare.json", {"rows": result.frame, "notes": result.notes})
            run.write_text("summary.txt", result.summary() + "\n")
        console.say(f"\nTable and settings: {out}")
    show_answer(result.answer(), out)
    console.emit_json({"answer": result.answer(), "rows": result.frame, "notes": result.notes})
