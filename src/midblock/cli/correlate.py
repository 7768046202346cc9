"""`midblock correlate DIR...`: how everything measured per layer goes together over depth."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from midblock.cli import console
from midblock.cli.analysis import show
from midblock.cli.options import Json, Quiet, examples

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    app.command("correlate", epilog=examples(
        "midblock correlate runs/profile runs/weights runs/lens --out runs/correlation",
        "midblock correlate runs/profile-gsm8k runs/profile-mmlu runs/weights --by-data",
        "midblock correlate runs/profile runs/swap --metrics cka,cosine,effective_rank,loss --json"))(correlate)


def correlate(
    folders: Annotated[list[Path], typer.Argument(
        metavar="DIR...", show_default=False, help="Run folders of profile, lens, weights, gradients, steer or swap.")],
    out: Annotated[Path, typer.Option(
        "--out", metavar="DIR", help="Folder for run.json, table.csv, layers.csv and figures; must be empty.")
    ] = Path("runs/correlation"),
    by_data: Annotated[bool, typer.Option(
        "--by-data", help="Keep runs on different data apart. Default: runs of one kind are averaged.")] = False,
    metrics: Annotated[str | None, typer.Option(
        "--metrics", metavar="A,B,...", show_default=False, help="Only these metrics.")] = None,
    matrices: Annotated[str | None, typer.Option(
        "--matrices", metavar="A,B,...", show_default=False,
        help="Of tables with a matrix column only these (q, up, ...). Default: qkvo and mlp, or whole blocks.")] = None,
    all_sides: Annotated[bool, typer.Option(
        "--all-sides", help="Also each checkpoint's own values, not only changes.")] = False,
    embeddings: Annotated[bool, typer.Option(
        "--embeddings", help="Let the embedding output (hidden 0) be a point too, for pairs of hidden quantities.")
    ] = False,
    method: Annotated[list[str] | None, typer.Option(
        "--method", metavar="pearson|spearman", show_default=False, help="Repeat for more. Default: both.")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Correlate all quantities per layer, from one or several run folders (the paper's figure 5).

    Pearson and Spearman with n, interval, p and Holm's adjustment, and a heatmap of each. Block b
    stands beside hidden b+1, its output; where one side is known per segment, the other is averaged
    over the segment's blocks.
    """
    from midblock.analysis.correlate import METHODS
    from midblock.analysis.correlate import correlate as measure
    from midblock.provenance import RunFolder
    from midblock.report import save_result

    def split(text: str | None) -> list[str] | None:
        return None if text is None else [part.strip() for part in text.split(",")]

    methods = list(method or METHODS)
    settings = {"folders": [str(f) for f in folders], "by_data": by_data, "metrics": split(metrics),
                "matrices": split(matrices), "sides": "all" if all_sides else "change", "embeddings": embeddings,
                "methods": methods}
    RunFolder.check_free(out)
    with RunFolder(out, command="correlate", settings=settings) as run, console.progress_bar() as progress:
        result = measure(folders, by_data=by_data, metrics=split(metrics), matrices=split(matrices),
                         sides="all" if all_sides else "change", embeddings=embeddings,
                         methods=methods, progress=progress)  # type: ignore[arg-type]
        run.write_table(result.layers, "layers.csv")
        save_result(run, result, fields={"counts": result.counts}, progress=progress)
    shown: Literal["pearson", "spearman"] = "spearman" if "spearman" in methods else "pearson"
    console.print_table(result.strongest(15, shown), title=f"Strongest correlations over depth ({shown})")
    show(run, result)
