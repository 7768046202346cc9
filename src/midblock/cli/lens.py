"""`midblock lens MODEL... --data D`: what each hidden state says about the next token."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from midblock.cli import console
from midblock.cli.analysis import Names, OneOrMore, run_analysis, show
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
    Resume,
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
    app.command("lens", epilog=examples(
        "midblock lens smollm2 runs/tuned/model --data gsm8k --out runs/lens",
        "midblock lens smollm2 --data arithmetic --supervised --trace 2 --out runs/lens",
        "midblock lens BASE SFT --data mmlu --earlier-code --json"))(lens)


def lens(
    models: OneOrMore,
    data: Data,
    out: Annotated[Path, typer.Option(
        "--out", metavar="DIR", help="Folder for run.json, table.csv and figures; must be empty unless --resume.")
    ] = Path("runs/lens"),
    samples: Annotated[int, typer.Option("--samples", metavar="N", help="Samples to draw.")] = 100,
    max_length: MaxLength = 256,
    batch_size: BatchSize = 8,
    names: Names = None,
    supervised: Annotated[bool, typer.Option(
        "--supervised", help="Count only completion tokens, where the data has prompts and completions.")] = False,
    top_k: Annotated[int, typer.Option("--top-k", metavar="K", help="Size of the compared top lists.")] = 10,
    every: Annotated[int, typer.Option("--every", metavar="N", help="Read out every N-th hidden state.")] = 1,
    trace: Annotated[int, typer.Option(
        "--trace", metavar="N", help="For N samples, write the most likely token at every depth (trace.csv).")] = 0,
    earlier_code: Annotated[bool, typer.Option(
        "--earlier-code", help="Also read out the last hidden state normed twice, as the paper's public code does."
    )] = False,
    dtype: Dtype = DtypeName.auto,
    device: Device = "auto",
    seed: Seed = 0,
    tokenizer: Tokenizer = TokenizerOf.own,
    trust_remote_code: TrustRemoteCode = False,
    allow_pickle: AllowPickle = False,
    resume: Resume = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Read every hidden state out through the final norm and head.

    Next-token accuracy, loss, perplexity, entropy, probability and rank of the gold token at
    every depth; agreement of the checkpoints (KL divergence, top-1, top-k overlap).
    """
    from midblock.analysis.lens import LensSettings
    from midblock.analysis.lens import lens as measure

    wanted = LensSettings(samples=samples, max_length=max_length, batch_size=batch_size, seed=seed,
                          supervised=supervised, top_k=top_k, every=every, trace=trace, earlier_code=earlier_code)

    def work(chain: Any, keys: Any, dataset: Any, run: Any, progress: Any) -> Any:
        found = measure(chain, data=dataset, names=keys, state_folder=run.path / "state", progress=progress,
                        settings=wanted)
        if found.traces:
            import pandas as pd

            run.write_table(pd.DataFrame(found.traces), "trace.csv")
        return found

    run, result = run_analysis(
        "lens", models, names=names, data=data, seed=seed, out=out, resume=resume,
        load=ChainLoadSettings(dtype=dtype.value, device=device, trust_remote_code=trust_remote_code,
                               allow_pickle=allow_pickle, tokenizer=tokenizer.value),
        settings={f: getattr(wanted, f) for f in wanted.__dataclass_fields__}, measure=work, least=1)
    frame = result.frame
    wide = frame[frame["metric"].isin(["accuracy", "kl"]) & ~frame["side"].isin(["difference"])].pivot_table(
        index="layer", columns=["metric", "side"], values="value", sort=False)
    wide.columns = [f"{metric} {side}" if metric == "accuracy" else metric for metric, side in wide.columns]
    console.print_table(wide.reset_index().rename(columns={"layer": "hidden"}), title="Read-out of each hidden state")
    show(run, result, traces=result.traces)
