"""`midblock overlap DIR...`: do different runs select the same layers, beyond chance?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from midblock.cli import console
from midblock.cli.analysis import reading, show
from midblock.cli.command import command
from midblock.cli.options import RunOut
from midblock.settings.overlap import OverlapSettings

__all__ = ["overlap"]


@command(
    "midblock overlap runs/ila-arithmetic runs/ila-gsm8k runs/ila-dolly --out runs/overlap",
    "midblock overlap runs/ila-* --share 0.3 --methods ila_score,taylor,update_norm,random",
    "midblock overlap runs/ila --steps all")
def overlap(
    folders: Annotated[list[Path], typer.Argument(
        metavar="DIR...", show_default=False, help="Run folders of importance (or locate) on one model.")],
    settings: OverlapSettings, out: RunOut = Path("runs/overlap"),
) -> None:
    """Compare the layers that runs on other data, seeds, steps or by other methods select.

    Jaccard overlap of every pair, what two random selections would have, the overlap corrected for
    it, and a matrix figure.
    """
    reading(folders)
    from midblock.provenance import RunFolder
    from midblock.report import save_result
    from midblock.selection.overlap import overlap as measure

    RunFolder.check_free(out)
    result = measure(folders, settings=settings)
    recorded = {"folders": [str(f) for f in folders], **settings.model_dump()}
    with RunFolder(out, command="overlap", settings=recorded) as run, console.progress_bar() as progress:
        run.write_table(result.pairs, "pairs.csv")
        save_result(run, result, progress=progress)
    console.print_table(result.overview(),
                        title=f"Overlap of the top {settings.share:.0%} (interval: bootstrap over units)")
    show(run, result, pairs=result.pairs)
