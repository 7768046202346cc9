"""`midblock figures STUDY`: the paper's figures and tables from a study."""

from __future__ import annotations

from typing import Annotated

import typer

from midblock.cli import console
from midblock.cli.analysis import reading
from midblock.cli.answers import show_answer
from midblock.cli.command import command
from midblock.settings.figures import FigureSettings

__all__ = ["figures"]


@command(
    "midblock figures runs/study --out figures",
    "midblock figures runs/study runs/sweep --columns two",
    "midblock figures runs/study --style mine.mplstyle")
def figures(
    folders: Annotated[list[str], typer.Argument(
        metavar="STUDY...", show_default=False, help="A study; or any run folders, or folders that hold some.")],
    settings: FigureSettings,
) -> None:
    """Draw the paper's figures 1 to 7 and write its tables 1 to 4 from finished runs.

    Figures are PDF and SVG in sizes for one and two columns, with their numbers as CSV; tables are LaTeX, Markdown and
    CSV. Several models and data sets share a page. What the runs do not hold is named.
    """
    reading(folders)
    from midblock.report.paper import paper_figures

    with console.progress_bar() as progress:
        made = paper_figures(folders, progress=progress, settings=settings)
    for one in made.left_out:
        console.warn(f"{one.folder} is left out: {one.reason}")
    for name, files in made.files.items():
        console.say(f"{name}: {', '.join(p.name for p in files)}")
    for name, reason in made.absent.items():
        console.say(f"{name} is not there: {reason}")
    console.say(f"\nFolder: {made.folder}; captions.md says what each shows")
    show_answer(made.answer(folders))
    console.emit_json({"folder": str(made.folder), "files": {k: [str(p) for p in v] for k, v in made.files.items()},
                       "absent": made.absent, "left_out": made.left_out})
