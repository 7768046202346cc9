"""`midblock steer BASE SFT --data D`: add or patch in what tuning changed at a depth, and score."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, cast

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
    Tokenizer,
    TokenizerOf,
    TrustRemoteCode,
    examples,
)
from midblock.settings.load import ChainLoadSettings

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    app.command("steer", epilog=examples(
        "midblock steer smollm2 runs/tuned/model --data gsm8k --blocks 10:20 --alphas 0.5,1",
        "midblock steer BASE SFT --data arithmetic --supervised --direction pc1 --generate 'Question: 3 + 4?'",
        "midblock steer BASE SFT --data arithmetic --supervised --patch prompt --json"))(steer)


def steer(
    models: Chain,
    data: Data,
    out: Annotated[Path, typer.Option(
        "--out", metavar="DIR", help="Folder for run.json, table.csv, figures and vectors; must be empty.")
    ] = Path("runs/steer"),
    blocks: Annotated[str | None, typer.Option(
        "--blocks", metavar="B", show_default=False,
        help="Blocks to change, such as 12 or 10:20 (half-open) or 0:4,12. Default: the middle block of each fifth.")
    ] = None,
    alphas: Annotated[str, typer.Option(
        "--alphas", metavar="A,B,...", help="Strengths; the unchanged model is always scored.")] = "0,0.5,1",
    direction: Annotated[str, typer.Option(
        "--direction", metavar="mean|pc1|pcK|random",
        help="Mean shift, K-th principal direction of the paired difference, or a random control.")] = "mean",
    centered: Annotated[bool, typer.Option(
        "--centered", help="Principal directions of the centred difference (without the mean shift).")] = False,
    together: Annotated[bool, typer.Option(
        "--together", help="Change all the blocks at once instead of one after another.")] = False,
    patch: Annotated[str | None, typer.Option(
        "--patch", metavar="all|prompt|completion|last-prompt", show_default=False,
        help="Instead of adding a direction, replace the base's states at these positions by the tuned model's.")
    ] = None,
    generate: Annotated[list[str] | None, typer.Option(
        "--generate", metavar="PROMPT", show_default=False,
        help="Also continue this prompt, steered and unsteered (repeat for more; generations.csv).")] = None,
    max_new_tokens: Annotated[int, typer.Option(
        "--max-new-tokens", metavar="N", min=1, help="Length of each continuation.")] = 48,
    chat: Annotated[bool, typer.Option("--chat", help="Put prompts into the chat template.")] = False,
    samples: Annotated[int, typer.Option(
        "--samples", metavar="N", help="Samples: half give the direction, half are scored.")] = 100,
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
    """Put what tuning changed into the base, block by block, and score it.

    Adds a direction of the paired difference sft - base (made from one half of the samples) to
    the base's hidden states and scores the other half; or patches hidden states (--patch).
    """
    from midblock.analysis.steer import POSITIONS, SteerSettings, generations, save_vectors
    from midblock.analysis.steer import patch as measure_patch
    from midblock.analysis.steer import steer as measure
    from midblock.errors import SettingsError
    from midblock.segments import parse_blocks

    try:
        strengths = tuple(float(a) for a in alphas.split(","))
    except ValueError:
        raise SettingsError(f"--alphas {alphas!r} is not a list of numbers, such as 0,0.5,1.") from None
    if patch is not None:
        if patch not in POSITIONS:
            raise SettingsError(f"--patch {patch!r} is not one of {', '.join(POSITIONS)}.")
        if generate:
            raise SettingsError("--generate needs a direction to add; leave out --patch.")
        if patch != "all" and not supervised:
            raise SettingsError(f"--patch {patch} needs prompts and completions; add --supervised.")
    wanted = SteerSettings(alphas=strengths, direction=direction, centered=centered, together=together,
                           samples=samples, max_length=max_length, batch_size=batch_size, seed=seed,
                           supervised=supervised)
    found: dict[str, Any] = {}

    def work(chain: Any, keys: Any, dataset: Any, run: Any, progress: Any) -> Any:
        chosen = () if blocks is None else tuple(parse_blocks(blocks, chain[0].anatomy.num_blocks))
        call = {"data": dataset, "names": keys, "progress": progress, "settings": wanted, "blocks": chosen}
        if patch is not None:
            return measure_patch(chain, positions=cast(Any, patch), **call)
        result = measure(chain, **call)
        save_vectors(run.path / "vectors.safetensors", result.vectors, direction=direction, centered=centered,
                     data=dataset.describe(), models={k: m.fingerprint for k, m in zip(keys, chain, strict=True)})
        if generate:
            found["generations"] = generations(chain, result, generate, max_new_tokens=max_new_tokens, chat=chat,
                                               progress=progress)
            run.write_table(found["generations"], "generations.csv")
        return result

    recorded = {f: getattr(wanted, f) for f in wanted.__dataclass_fields__}
    run, result = run_analysis(
        "steer", models, names=names, data=data, seed=seed, out=out, resume=False,
        load=ChainLoadSettings(dtype=dtype.value, device=device, trust_remote_code=trust_remote_code,
                               allow_pickle=allow_pickle, tokenizer=tokenizer.value),
        settings={**recorded, "blocks": blocks, "patch": patch, "generate": generate or [],
                  "max_new_tokens": max_new_tokens, "chat": chat}, measure=work)
    frame = result.frame
    changes = frame[(frame["side"] == "difference") & (frame["kind"] != "model") & (frame["alpha"] != 0)]
    console.print_table(changes[["stage", "layer", "alpha", "metric", "value", "low", "high", "n"]]
                        .rename(columns={"layer": "blocks", "value": "change"}),
                        title=f"Change when {result.what} is put into the base")
    if "generations" in found:
        for row in found["generations"].itertuples():
            console.say(f"{row.model} {f'+ {row.alpha:g} at blocks {row.blocks}' if row.blocks else 'unchanged'}: "
                        f"{row.text.strip()!r}")
    show(run, result, **found)
