"""`midblock report DIR...`: one interactive page from run folders."""

from __future__ import annotations

from typing import Annotated

import typer

from midblock.cli import console
from midblock.cli.analysis import reading
from midblock.cli.answers import show_answer
from midblock.cli.command import command
from midblock.settings.report import ReportSettings

__all__ = ["report"]


@command(
    "midblock report demo",
    "midblock report runs/profile runs/weights runs/sweep --out report.html",
    "midblock report runs --title 'OLMo-2 1B: what SFT changed'")
def report(
    folders: Annotated[list[str], typer.Argument(
        metavar="DIR...", show_default=False, help="Run folders, or folders that hold some.")],
    settings: ReportSettings,
) -> None:
    """Write one interactive page from any mix of finished runs.

    The page opens from disk without a network and makes no request. Every figure has its data table, its definition
    and downloads; unfinished or damaged runs are named in it and left out.
    """
    reading(folders)
    from midblock.report.findings import answer_of
    from midblock.report.page import build_report

    made = build_report(folders, settings.out, title=settings.title)
    for one in made["left_out"]:
        console.warn(f"{one['folder']} is left out: {one['reason']}")
    for line in made["findings"]["answer"][1:3]:
        console.say(line)
    console.say(f"\nReport of {len(made['runs'])} runs ({made['bytes'] / 1e6:.1f} MB): {made['path']}")
    show_answer(answer_of(made["findings"]))
    console.emit_json(made)
