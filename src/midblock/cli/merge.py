"""`midblock merge BASE SFT --alphas 0,.5,1,.5,0`: models between base and tuned, segment by segment."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from midblock.cli import console
from midblock.cli.analysis import Chain, Names, show, split_names
from midblock.cli.options import (
    AllowPickle,
    BatchSize,
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

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    app.command("merge", epilog=examples(
        "midblock merge smollm2 runs/tuned/model --alphas 0,.5,1,.5,0 --data gsm8k --out runs/merge",
        "midblock merge BASE SFT --alphas 0,1,1,1,0 --alphas 1,0,0,0,1 --data mmlu --alpha-rest 0",
        "midblock merge BASE SFT --alphas 0,0,1,1,0 --save merged-model"))(merge)


def merge(
    models: Chain,
    alphas: Annotated[list[str], typer.Option(
        "--alphas", metavar="A1,..,AK", show_default=False,
        help="Share of the tuned model in each of K equal depth segments, input side first: 0 is the base, 1 the "
             "tuned model. Repeat for more settings.")],
    data: Annotated[str | None, typer.Option(
        "--data", metavar="D", show_default=False,
        help="Score on this: a registry name, a local file, hf:NAME, arithmetic, pydocs. Unset: only --save.")] = None,
    save: Annotated[Path | None, typer.Option(
        "--save", metavar="DIR", show_default=False,
        help="Write the merged checkpoint (safetensors) here; several settings get a folder each in it.")] = None,
    alpha_rest: Annotated[float | None, typer.Option(
        "--alpha-rest", metavar="A", show_default=False,
        help="Share of embeddings, final norm and head. Default: the mean of the alphas, so that all zeros are the "
             "base and all ones the tuned model.")] = None,
    out: Annotated[Path, typer.Option(
        "--out", metavar="DIR", help="Folder for run.json, table.csv and figures; must be empty.")
    ] = Path("runs/merge"),
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
    """Interpolate between a base and its tuned checkpoint block by block; score and save the result.

    W = base + a (sft - base) with a share a for each depth segment. Loss, accuracy and perplexity of
    each merged model, with the paired change from both ends. The saved checkpoint gives the
    logits that were scored.
    """
    from midblock.analysis.merge import MergeSettings, parse_alphas
    from midblock.analysis.merge import merge as measure
    from midblock.analysis.stages import stage_names
    from midblock.data import load_data
    from midblock.errors import SettingsError
    from midblock.models import load_chain, pair_warning
    from midblock.provenance import RunFolder
    from midblock.report import save_result

    if len(models) < 2:
        raise SettingsError(f"merge interpolates between at least 2 checkpoints, got only {' '.join(models)}; give a "
                            "base and a tuned one.")
    if data is None and save is None:
        raise SettingsError("merge has nothing to do: give --data to score on, --save to write a checkpoint, or both.")
    wanted = [parse_alphas(text) for text in alphas]
    chosen = MergeSettings(alpha_rest=alpha_rest, samples=samples, max_length=max_length, batch_size=batch_size,
                           seed=seed, supervised=supervised)
    keys = stage_names(len(models), split_names(names))
    dataset = None if data is None else load_data(data, seed=seed)
    for tuned in models[1:]:
        if note := pair_warning(models[0], tuned):
            console.warn(note)
    RunFolder.check_free(out)
    chain = load_chain(models, names=keys, dtype=dtype.value, device=device, trust_remote_code=trust_remote_code,
                       allow_pickle=allow_pickle, tokenizer=tokenizer.value)
    settings: dict[str, Any] = {"models": models, "names": keys, "data": data, "alphas": wanted, "dtype": dtype.value,
                                "device": device, "tokenizer": tokenizer.value,
                                "save": None if save is None else str(save),
                                **{f: getattr(chosen, f) for f in chosen.__dataclass_fields__}}
    with RunFolder(out, command="merge", settings=settings) as run, console.progress_bar() as progress:
        run.record_inputs(models={k: m.describe() for k, m in zip(keys, chain, strict=True)},
                          data={} if dataset is None else dataset.describe())
        result = measure(chain, alphas=wanted, data=dataset, names=keys, save=save, progress=progress, settings=chosen)
        save_result(run, result, fields={"counts": result.counts}, progress=progress)
    if result.counts.get("truncated"):
        console.warn(f"{result.counts['truncated']} of the samples were cut at {max_length} tokens.")
    if dataset is not None:
        console.print_table(result.scores(), title="Merged models (loss in nats a token)")
    show(run, result)
