"""`midblock swap BASE SFT --data D`: segments of one checkpoint placed into the other."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from midblock.cli import console
from midblock.cli.analysis import Chain, Names, run_analysis, show
from midblock.cli.options import (
    AllowPickle,
    BatchSize,
    Data,
    Device,
    Dtype,
    DtypeName,
    Json,
    MaxLength,
    Quiet,
    Seed,
    Segments,
    Tokenizer,
    TokenizerOf,
    TrustRemoteCode,
    examples,
)
from midblock.settings.load import ChainLoadSettings

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    app.command("swap", epilog=examples(
        "midblock swap smollm2 runs/tuned/model --data gsm8k --segments 5 --out runs/swap",
        "midblock swap BASE SFT --data mmlu --mask 01100 --mask 00110",
        "midblock swap BASE SFT --data arithmetic --cumulative --supervised --json"))(swap)


def swap(
    models: Chain,
    data: Data,
    out: Annotated[Path, typer.Option(
        "--out", metavar="DIR", help="Folder for run.json, table.csv and figures; must be empty.")
    ] = Path("runs/swap"),
    segments: Segments = 5,
    mask: Annotated[list[str] | None, typer.Option(
        "--mask", metavar="MASK", show_default=False,
        help="Swap the segments of this mask (repeat for more) instead of each single one.")] = None,
    cumulative: Annotated[bool, typer.Option(
        "--cumulative", help="Also swap cumulatively from the input side and from the output side.")] = False,
    samples: Annotated[int, typer.Option("--samples", metavar="N", help="Samples to draw.")] = 50,
    max_length: MaxLength = 256,
    batch_size: BatchSize = 8,
    names: Names = None,
    supervised: Annotated[bool, typer.Option(
        "--supervised", help="Count only completion tokens, where the data has prompts and completions.")] = False,
    dtype: Dtype = DtypeName.auto,
    device: Device = "auto",
    seed: Seed = 0,
    tokenizer: Tokenizer = TokenizerOf.own,
    trust_remote_code: TrustRemoteCode = False,
    allow_pickle: AllowPickle = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Swap depth segments between a base and its tuned checkpoint, and score what comes out.

    Both directions and both heads; loss, accuracy and perplexity per mask, with the paired
    change from the unswapped model and its interval.
    """
    from midblock.analysis.swap import SwapSettings
    from midblock.analysis.swap import swap as measure

    wanted = SwapSettings(segments=segments, masks=tuple(mask or ()), cumulative=cumulative, samples=samples,
                          max_length=max_length, batch_size=batch_size, seed=seed, supervised=supervised)

    def work(chain: Any, keys: Any, dataset: Any, run: Any, progress: Any) -> Any:
        return measure(chain, data=dataset, names=keys, progress=progress, settings=wanted)

    run, result = run_analysis(
        "swap", models, names=names, data=data, seed=seed, out=out, resume=False,
        load=ChainLoadSettings(dtype=dtype.value, device=device, trust_remote_code=trust_remote_code,
                               allow_pickle=allow_pickle, tokenizer=tokenizer.value),
        settings={f: getattr(wanted, f) for f in wanted.__dataclass_fields__}, measure=work)
    frame = result.frame
    changes = frame[(frame["side"] == "difference")].assign(
        what=lambda f: f["donor"] + " in " + f["recipient"] + ", " + f["head"] + " head")
    console.print_table(changes[["what", "layer", "metric", "value", "low", "high", "n"]]
                        .rename(columns={"layer": "mask", "value": "change"}),
                        title="Change when segments are swapped")
    show(run, result)
