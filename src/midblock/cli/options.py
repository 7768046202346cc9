"""Options that several commands share, declared once so that they read and behave alike.

A command annotates its parameters with these and sets its own defaults::

    def profile(models: Chain, data: Data, settings: ProfileSettings, out: Out = None) -> None: ...

What a command measures is declared in `midblock.settings`. `Json` and `Quiet`, which every command has, tell
`midblock.cli.console` what may be printed, before the command runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from midblock.cli import console

__all__ = ["Data", "Json", "Model", "Out", "Quiet", "Resume", "RunOut", "examples"]


def examples(*lines: str) -> str:
    """The epilog of a command's help: lines to copy, kept as they are.

    Example:
        >>> examples("midblock inspect smollm2").splitlines()[1:]
        ['Examples:', '  midblock inspect smollm2']
    """
    # typer's mark for a paragraph that must not be wrapped
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


def _remember_json(value: bool) -> bool:
    console.set_json(value)
    return value


def _remember_quiet(value: bool) -> bool:
    console.set_quiet(value)
    return value


Model = Annotated[str, typer.Argument(
    metavar="MODEL", show_default=False,
    help="A local folder, a *.gguf file, a hub id, or smollm2 (embedded in a package).")]
"""A MODEL spec. Commands with other names for it (BASE, SFT) declare their own metavar."""

Data = Annotated[str, typer.Option(
    "--data", metavar="D",
    help="Registry name (gsm8k, mmlu, ...), local .jsonl/.json/.csv/.parquet file, "
         "hf:NAME[:CONFIG][:SPLIT], or built in: arithmetic, pydocs. "
         "MIDBLOCK_DATA=DIR is searched first.")]

Out = Annotated[Path | None, typer.Option(
    "--out", metavar="DIR", show_default=False,
    help="Folder for run.json, table.csv and figures; must be empty unless --resume.")]

RunOut = Annotated[Path, typer.Option(
    "--out", metavar="DIR", help="Folder for run.json, table.csv and figures; must be empty unless --resume.")]
"""For commands that always write a run folder; each has a default of its own."""

Resume = Annotated[bool, typer.Option(
    "--resume", help="Continue an interrupted run in --out (with the same settings).")]

Json = Annotated[bool, typer.Option(
    "--json", callback=_remember_json, is_eager=True,
    help="Print the result as JSON on stdout, and nothing else there.")]

Quiet = Annotated[bool, typer.Option(
    "--quiet", "-q", callback=_remember_quiet, is_eager=True, help="No progress on stderr.")]
