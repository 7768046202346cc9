"""`midblock gradients MODEL --data D`: gradients per block, without training or along a short one."""

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
    app.command("gradients", epilog=examples(
        "midblock gradients smollm2 --data gsm8k --out runs/gradients",
        "midblock gradients smollm2 --data arithmetic --steps 20 --learning-rate 1e-4",
        "midblock gradients BASE SFT --data gsm8k --profile runs/profile --json"))(gradients)


def gradients(
    models: OneOrMore,
    data: Data,
    out: Annotated[Path, typer.Option(
        "--out", metavar="DIR", help="Folder for run.json, table.csv and figures; must be empty.")
    ] = Path("runs/gradients"),
    samples: Annotated[int, typer.Option("--samples", metavar="N", help="Samples to draw.")] = 32,
    max_length: MaxLength = 256,
    batch_size: BatchSize = 4,
    names: Names = None,
    steps: Annotated[int, typer.Option(
        "--steps", metavar="N", help="Really fine-tune all weights for N updates, measure how far each block moves, "
                                     "and put the weights back. 0: gradients only.")] = 0,
    learning_rate: Annotated[float, typer.Option(
        "--learning-rate", metavar="RATE", help="AdamW's learning rate for --steps.")] = 5e-5,
    profile: Annotated[Path | None, typer.Option(
        "--profile", metavar="DIR", show_default=False,
        help="Run folder of a profile of the same model: correlate gradients and changes with its metrics over depth "
             "(correlations.csv).")] = None,
    dtype: Dtype = DtypeName.auto,
    device: Device = "auto",
    seed: Seed = 0,
    tokenizer: Tokenizer = TokenizerOf.own,
    trust_remote_code: TrustRemoteCode = False,
    allow_pickle: AllowPickle = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure the gradient of the loss per block and matrix, over batches.

    Its norm, the norm relative to the weights, the sum of squares (Fisher) and the first-order
    Taylor term; with --steps also the change that a short real fine-tune makes.
    """
    from midblock.analysis.gradients import GradientSettings
    from midblock.analysis.gradients import gradients as measure

    wanted = GradientSettings(samples=samples, max_length=max_length, batch_size=batch_size, seed=seed, steps=steps,
                              learning_rate=learning_rate)
    profiled = None if profile is None else _profile_table(profile)
    found: dict[str, Any] = {}

    def work(chain: Any, keys: Any, dataset: Any, run: Any, progress: Any) -> Any:
        result = measure(chain, data=dataset, names=keys, progress=progress, settings=wanted)
        if profiled is not None:
            import pandas as pd

            found["correlations"] = pd.concat([result.correlations(profiled, m) for m in ("pearson", "spearman")],
                                              ignore_index=True)
            run.write_table(found["correlations"], "correlations.csv")
        return result

    run, result = run_analysis(
        "gradients", models, names=names, data=data, seed=seed, out=out, resume=False,
        load=ChainLoadSettings(dtype=dtype.value, device=device, trust_remote_code=trust_remote_code,
                               allow_pickle=allow_pickle, tokenizer=tokenizer.value),
        settings={"profile": profile, **{f: getattr(wanted, f) for f in wanted.__dataclass_fields__}}, measure=work,
        least=1)
    frame = result.frame
    wide = frame[frame["matrix"] == "all"].pivot_table(index="layer", columns=["metric", "side"], values="value",
                                                       sort=False)
    wide.columns = [metric if len(models) == 1 else f"{metric} {side}" for metric, side in wide.columns]
    console.print_table(wide.reset_index().rename(columns={"layer": "block"}), title="Gradients per block")
    if "correlations" in found:
        table = found["correlations"].dropna(subset=["r"])
        strongest = table.sort_values("r", key=abs, ascending=False).head(12)
        console.print_table(strongest.drop(columns=["reason"]), title="Strongest correlations over depth")
    show(run, result, losses=result.losses, **found)


def _profile_table(folder: Path) -> Any:
    from midblock.errors import OutputError
    from midblock.provenance import read_run, read_table

    run = read_run(folder)
    if run.get("command") != "profile" or run.get("status") != "finished":
        raise OutputError(f"--profile {folder} holds a {run.get('status')} run of {run.get('command')!r}; name the "
                          "folder of a finished profile.")
    return read_table(folder)
