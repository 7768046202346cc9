"""`midblock study BASE SFT --data D`: every analysis of a pair in one run, and its report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from midblock.cli import console
from midblock.cli.answers import in_earnest, show_answer
from midblock.cli.command import command
from midblock.cli.options import Resume, RunOut
from midblock.settings.load import ChainLoadSettings
from midblock.settings.study import StudySettings

__all__ = ["study"]


@command(
    "midblock study smollm2 runs/tuned/model --data arithmetic --out runs/study",
    "midblock study BASE SFT DPO --data gsm8k --data mmlu --out runs/olmo",
    "midblock study study.yaml --out runs/paper",
    "midblock study BASE SFT --data gsm8k --only profile,weights,lens",
    "midblock study BASE SFT --data gsm8k --out runs/olmo --resume")
def study(
    models: Annotated[list[str], typer.Argument(
        metavar="BASE SFT [DPO ...] | STUDY.yaml", show_default=False,
        help="Two or more checkpoints of one architecture; or a file with pairs:, data: and settings.")],
    settings: StudySettings,
    load: ChainLoadSettings,
    data: Annotated[list[str] | None, typer.Option(
        "--data", metavar="D", show_default=False,
        help="Registry name, file, hf:NAME, arithmetic or pydocs; repeat for more.")] = None,
    out: RunOut = Path("runs/study"),
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the parts and their folders; run nothing.")] = False,
    resume: Resume = False,
) -> None:
    """Run every analysis of a pair (or of several) and write one interactive report.

    Weights, profile, logit lens, swap, gradients, locate and their correlations; each checkpoint is loaded once. A part
    that fails is named and does not stop the others; an interrupted study goes on with --resume.
    """
    import pandas as pd

    from midblock.errors import SettingsError
    from midblock.report.study import plan_study, read_study
    from midblock.report.study import study as run_study
    from midblock.results import Answer

    if len(models) == 1 and models[0].endswith((".yaml", ".yml")):
        if settings.given() or data:
            raise SettingsError("a study file has its own data and settings; leave out the options that set them.")
        chains, sources, settings = read_study(models[0])
    else:
        chains, sources = [models], list(data or [])
    if dry_run:
        tasks = plan_study(chains, sources, out, settings)
        frame = pd.DataFrame([{"part": t.part, "models": " ".join(chains[t.chain]), "data": t.data or "",
                               "folder": str(t.folder)} for t in tasks])
        console.print_table(frame, title="Dry run")
        show_answer(Answer(f"Nothing was measured: {len(tasks)} parts would be.", next=in_earnest()))
        console.emit_json(frame)
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
