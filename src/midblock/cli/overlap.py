"""`midblock overlap DIR...`: do different runs select the same layers, beyond chance?"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from midblock.cli import console
from midblock.cli.analysis import show
from midblock.cli.options import Json, Quiet, Seed, examples

__all__ = ["register"]


class Steps(StrEnum):
    """Which scores of a run are compared."""

    last = "last"
    all = "all"


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    app.command("overlap", epilog=examples(
        "midblock overlap runs/ila-arithmetic runs/ila-gsm8k runs/ila-dolly --out runs/overlap",
        "midblock overlap runs/ila-* --share 0.3 --methods ila_score,taylor,update_norm,random",
        "midblock overlap runs/ila --steps all"))(overlap)


def overlap(
    folders: Annotated[list[Path], typer.Argument(
        metavar="DIR...", show_default=False, help="Run folders of importance (or locate) on one model.")],
    out: Annotated[Path, typer.Option(
        "--out", metavar="DIR", help="Folder for run.json, table.csv and figures; must be empty.")
    ] = Path("runs/overlap"),
    share: Annotated[float, typer.Option(
        "--share", metavar="P", help="Share of the units that each run selects. Chance alone gives a Jaccard overlap "
                                     "of P / (2 - P).")] = 0.75,
    methods: Annotated[str | None, typer.Option(
        "--methods", metavar="A,B,...", show_default=False,
        help="Scores to compare: ila_score, taylor, taylor_base, update_norm, random, or those of locate. Default: "
             "ila_score where there is any.")] = None,
    steps: Annotated[Steps, typer.Option(
        "--steps", help="Scores at the end of training, or after every step of importance --at-steps.")] = Steps.last,
    seed: Seed = 0,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compare the layers that runs on other data, seeds, steps or by other methods select.

    Jaccard overlap of every pair, what two random selections would have, the overlap corrected for
    it, and a matrix figure.
    """
    from midblock.provenance import RunFolder
    from midblock.report import save_result
    from midblock.selection.overlap import overlap as measure

    chosen = None if methods is None else [m.strip() for m in methods.split(",") if m.strip()]
    RunFolder.check_free(out)
    result = measure(folders, share=share, methods=chosen, steps=steps.value, seed=seed)
    settings = {"folders": [str(f) for f in folders], "share": share, "methods": chosen, "steps": steps.value,
                "seed": seed}
    with RunFolder(out, command="overlap", settings=settings) as run, console.progress_bar() as progress:
        run.write_table(result.pairs, "pairs.csv")
        save_result(run, result, progress=progress)
    console.print_table(result.overview(), title=f"Overlap of the top {share:.0%} (interval: bootstrap over units)")
    show(run, result, pairs=result.pairs)
