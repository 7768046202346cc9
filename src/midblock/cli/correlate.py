"""`midblock correlate DIR...`: how everything measured per layer goes together over depth."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from midblock.cli import console
from midblock.cli.analysis import reading, show
from midblock.cli.command import command
from midblock.cli.options import RunOut
from midblock.settings import CorrelateSettings

__all__ = ["correlate"]


@command(
    "midblock correlate runs/profile runs/weights runs/lens --out runs/correlation",
    "midblock correlate runs/profile-gsm8k runs/profile-mmlu runs/weights --by-data",
    "midblock correlate runs/profile runs/swap --metrics cka,cosine,effective_rank,loss --json")
def correlate(
    folders: Annotated[list[Path], typer.Argument(
        metavar="DIR...", show_default=False, help="Run folders of profile, lens, weights, gradients, steer or swap.")],
    settings: CorrelateSettings, out: RunOut = Path("runs/correlation"),
) -> None:
    """Correlate all quantities per layer, from one or several run folders (the paper's figure 5).

    Pearson and Spearman with n, interval, p and Holm's adjustment, and a heatmap of each. Block b
    stands beside hidden b+1, its output; where one side is known per segment, the other is averaged
    over the segment's blocks.
    """
    reading(folders)
    from midblock.analysis.correlate import correlate
    from midblock.provenance import RunFolder
    from midblock.report import save_result

    RunFolder.check_free(out)
    recorded = {"folders": [str(f) for f in folders], **dict(settings)}
    with RunFolder(out, command="correlate", settings=recorded) as run, console.progress_bar() as progress:
        result = correlate(folders, progress=progress, settings=settings)
        run.write_table(result.layers, "layers.csv")
        save_result(run, result, fields={"counts": result.counts}, progress=progress)
    shown: Literal["pearson", "spearman"] = "spearman" if "spearman" in settings.methods else "pearson"
    rows = result.strongest(12, shown)
    console.print_table(
        rows[["a", "b"]].assign(r=[f"{r.r:+.2f} [{r.low:+.2f}, {r.high:+.2f}]" for r in rows.itertuples()],
                                n=rows["n"], p_holm=rows["p_holm"]).rename(columns={"p_holm": "Holm p"}),
        title=f"Strongest correlations over depth between families of quantities ({shown})")
    show(run, result)
