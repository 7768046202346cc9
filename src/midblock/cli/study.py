"""`midblock study BASE SFT --data D`: every analysis of a pair in one run, and its report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from midblock.cli import console
from midblock.cli.analysis import reading
from midblock.cli.answers import in_earnest, show_answer
from midblock.cli.command import command
from midblock.cli.options import Resume, RunOut
from midblock.settings.load import StreamedChainSettings
from midblock.settings.study import StudySettings

__all__ = ["study"]


@command(
    "midblock study smollm2 runs/tuned/model --data arithmetic --out runs/study",
    "midblock study BASE SFT DPO --data gsm8k --data mmlu --out runs/olmo",
    "midblock study study.yaml --out runs/paper",
    "midblock study recipes/paper.yaml --dry-run",
    "midblock study BASE SFT --data gsm8k --only profile,weights,lens",
    "midblock study BASE SFT --data gsm8k --out runs/olmo --resume")
def study(
    models: Annotated[list[str], typer.Argument(
        metavar="BASE SFT [DPO ...] | STUDY.yaml", show_default=False,
        help="Two or more checkpoints of one architecture; or a file with pairs:, data: and settings.")],
    settings: StudySettings,
    load: StreamedChainSettings,
    data: Annotated[list[str] | None, typer.Option(
        "--data", metavar="D", show_default=False,
        help="Registry name, file, hf:NAME, arithmetic or pydocs; repeat for more.")] = None,
    out: RunOut = Path("runs/study"),
    dry_run: Annotated[bool, typer.Option(
        "--dry-run", help="List the parts with the time, memory and disk that each is likely to take; run nothing."),
        ] = False,
    resume: Resume = False,
) -> None:
    """Run every analysis of a pair (or of several) and write one interactive report.

    Weights, profile, logit lens, swap, gradients, locate and their correlations; each checkpoint is loaded once. A part
    that fails is named and does not stop the others; an interrupted study goes on with --resume.
    """
    file = len(models) == 1 and models[0].endswith((".yaml", ".yml"))
    if file:
        reading(models)
    elif len(models) > 1:
        console.step(f"Planning a study of {' and '.join(models)} ...")
    from midblock.errors import SettingsError
    from midblock.report.study import read_study
    from midblock.report.study import study as run_study

    if file:
        # which parts run may be said on the command line too; what they measure stands in the file
        chosen = settings.given()
        if data or set(chosen) - {"only", "skip"}:
            raise SettingsError("a study file has its own data and settings; leave out the options that set them "
                                "(--only and --skip may be given).")
        chains, sources, settings = read_study(models[0])
        settings = settings.replace(**chosen)
    else:
        chains, sources = [models], list(data or [])
    if dry_run:
        _show_plan(chains, sources, out, settings, load)
        return
    with console.progress_bar() as progress:
        result = run_study(chains, data=sources, out=out, resume=resume, load=load, progress=progress,
                           tell=console.step, settings=settings)
    for line in result.details():
        console.say(line)
    console.say(f"\nReport: {result.report}")
    show_answer(result.answer(), out)
    console.emit_json({"folder": str(result.folder), "report": str(result.report), "findings": result.findings,
                       "seconds": result.seconds, "failed": result.failed})


def _show_plan(chains: list[list[str]], data: list[str], out: Path, settings: StudySettings, load: StreamedChainSettings
               ) -> None:
    import pandas as pd

    from midblock.report.study import costs_of
    from midblock.results import Answer
    from midblock.sweeps.planning import clock

    tasks, costs = costs_of(chains, data, out, settings, load)
    rows = []
    for task in tasks:
        cost = costs[task]
        rows.append({"part": task.part, "models": "" if task.chain is None else " ".join(chains[task.chain]),
                     "data": task.data or "", "folder": str(task.folder), "seconds": cost.seconds,
                     "memory_bytes": cost.memory_bytes, "disk_bytes": cost.disk_bytes, "note": cost.note})
    frame = pd.DataFrame(rows)
    shown = pd.DataFrame({"part": frame["part"], "data": frame["data"], "folder": frame["folder"],
                          "time": [clock(s) if s is not None else "" for s in (c.seconds for c in costs.values())],
                          "GB memory": [None if pd.isna(b) else round(b / 1e9, 1) for b in frame["memory_bytes"]],
                          "MB disk": [None if pd.isna(b) else round(b / 1e6) for b in frame["disk_bytes"]]})
    console.print_table(shown, title="Dry run (time, memory and disk are estimates)")
    known = frame["seconds"].notna()
    if known.any():
        console.say(f"{known.sum()} of {len(frame)} parts together: about {clock(float(frame['seconds'].sum()))}, at "
                    f"most {frame['memory_bytes'].max() / 1e9:.1f} GB of memory, "
                    f"{frame['disk_bytes'].sum() / 1e6:.0f} MB of disk. Profile, lens, swap and locate share one pass "
                    "over each data set; its forwards count as the profile's.")
    for note in dict.fromkeys(n for n in frame["note"] if n):
        console.say(f"No estimate for {(frame['note'] == note).sum()} parts: {note}")
    show_answer(Answer(f"Nothing was measured: {len(tasks)} parts would be.", next=in_earnest()))
    console.emit_json(frame)
