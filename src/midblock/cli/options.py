"""Options that several commands share, declared once so that they read and behave alike.

A command annotates its parameters with these and sets its own defaults::

    def profile(base: Model, sft: Model, data: Data, out: Out = None, seed: Seed = 0,
                as_json: Json = False, quiet: Quiet = False) -> None: ...

`Json` and `Quiet` also tell `midblock.cli.console` what may be printed, before the command runs.
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from midblock.cli import console

__all__ = [
    "AllowPickle",
    "BatchSize",
    "Data",
    "Device",
    "Dtype",
    "DtypeName",
    "Json",
    "MaxLength",
    "Model",
    "Out",
    "Quiet",
    "Resume",
    "RunOut",
    "Samples",
    "Seed",
    "Tokenizer",
    "TokenizerOf",
    "TrustRemoteCode",
    "examples",
]


def examples(*lines: str) -> str:
    """The epilog of a command's help: lines to copy, kept as they are.

    Example:
        >>> examples("midblock inspect smollm2").splitlines()[1:]
        ['Examples:', '  midblock inspect smollm2']
    """
    # typer's mark for a paragraph that must not be wrapped
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


class DtypeName(StrEnum):
    """Dtypes that weights can be loaded in."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class TokenizerOf(StrEnum):
    """Whose tokenizer the stages of a chain use."""

    own = "own"
    base = "base"


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

Samples = Annotated[int | None, typer.Option(
    "--samples", metavar="N", min=1, help="How many samples to draw from the data (all if unset).")]

MaxLength = Annotated[int, typer.Option(
    "--max-length", metavar="TOKENS", min=2,
    help="Cut samples after this many tokens; how many were cut is shown.")]

BatchSize = Annotated[int, typer.Option(
    "--batch-size", metavar="N", min=1, help="Samples in one batch. Results do not depend on it.")]

Dtype = Annotated[DtypeName, typer.Option(
    "--dtype", help="Dtype of the weights. auto: 16 bits for 16-bit checkpoints where this device multiplies faster in "
                    "them (measured once and remembered) or float32 would not fit into memory, else float32. "
                    "Checkpoints of different dtypes are compared in one that holds both.")]

Tokenizer = Annotated[TokenizerOf, typer.Option(
    "--tokenizer", help="own: checkpoints whose tokenizers differ are refused; base: the first one's is used for all.")]

Device = Annotated[str, typer.Option(
    "--device", metavar="DEVICE", help="auto, cpu, cuda, cuda:1, mps.")]

Seed = Annotated[int, typer.Option("--seed", metavar="N", min=0, max=2**32 - 1, help="Seed of every random choice.")]

TrustRemoteCode = Annotated[bool, typer.Option(
    "--trust-remote-code", help="Run Python code that comes with the model. Only if you trust its author.")]

AllowPickle = Annotated[bool, typer.Option(
    "--allow-pickle",
    help="Load pickle checkpoints (*.bin), which can run code. Only if you trust their author.")]

Json = Annotated[bool, typer.Option(
    "--json", callback=_remember_json, is_eager=True,
    help="Print the result as JSON on stdout, and nothing else there.")]

Quiet = Annotated[bool, typer.Option(
    "--quiet", "-q", callback=_remember_quiet, is_eager=True, help="No progress on stderr.")]
