"""`midblock importance MODEL --data D`: which matrices or blocks a fine-tune needs (ILA)."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from midblock.cli import console
from midblock.cli.analysis import run_analysis, show
from midblock.cli.options import (
    AllowPickle,
    BatchSize,
    Data,
    Device,
    Dtype,
    DtypeName,
    Json,
    MaxLength,
    Model,
    Quiet,
    Resume,
    Seed,
    TrustRemoteCode,
    examples,
)
from midblock.settings.load import ChainLoadSettings

__all__ = ["register"]


class UnitName(StrEnum):
    """What gets one score."""

    matrix = "matrix"
    block = "block"


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    app.command("importance", epilog=examples(
        "midblock importance smollm2 --data arithmetic --out runs/ila --apply top:0.3",
        "midblock importance smollm2 --data gsm8k --unit block --seed 1 --out runs/ila-gsm8k",
        "midblock importance smollm2 --data arithmetic --out runs/ila --resume --apply freeze-bottom:0.25",
        "midblock tune smollm2 --data arithmetic --plan runs/ila/plans/ila-top30.json"))(importance)


def importance(
    model: Model,
    data: Data,
    out: Annotated[Path, typer.Option(
        "--out", metavar="DIR", help="Folder for run.json, table.csv, figures, plans; must be empty unless --resume.")
    ] = Path("runs/importance"),
    apply: Annotated[list[str] | None, typer.Option(
        "--apply", metavar="top:SHARE|freeze-bottom:SHARE", show_default=False,
        help="Write plans that tune and sweep accept: the best share of the units, or all but the worst; and the "
             "same of every control at equal parameters. Can be given again, also to a finished run with --resume.")
    ] = None,
    budget: Annotated[str | None, typer.Option(
        "--budget", metavar="PARAMS", show_default=False,
        help="Trainable parameters of the plans (900k, match:11111@16). Default: what the choice takes at --rank.")
    ] = None,
    unit: Annotated[UnitName, typer.Option("--unit", help="What gets one score.")] = UnitName.matrix,
    samples: Annotated[int, typer.Option("--samples", metavar="N", min=1, help="Rows to draw.")] = 400,
    max_length: MaxLength = 256,
    batch_size: BatchSize = 8,
    rank: Annotated[int, typer.Option("--rank", metavar="R", help="LoRA rank of the first stage.")] = 16,
    target_modules: Annotated[str, typer.Option(
        "--target-modules", metavar="NAMES", help="Matrices to adapt, separated by commas: all-linear, attention, mlp, "
                                                  "q, k, v, o, ...")] = "all-linear",
    learning_rate: Annotated[float, typer.Option(
        "--learning-rate", metavar="LR", help="Of the first stage.")] = 5e-4,
    max_steps: Annotated[int, typer.Option("--max-steps", metavar="N", help="Most steps of the first stage.")] = 300,
    epsilon: Annotated[float, typer.Option(
        "--epsilon", metavar="E", help="The first stage ends when the smoothed loss changes by less than this, in nats "
                                       "per step.")] = 1e-3,
    check_every: Annotated[int, typer.Option(
        "--check-every", metavar="N", help="Steps between two looks at that loss.")] = 10,
    window: Annotated[int, typer.Option(
        "--window", metavar="N", help="Looks that the slope is fitted to.")] = 5,
    score_steps: Annotated[int, typer.Option(
        "--score-steps", metavar="N", help="Steps of the second stage, on the scores alone.")] = 100,
    penalty: Annotated[float, typer.Option(
        "--penalty", metavar="LAMBDA", help="Adds LAMBDA * sum sigmoid(s) to the loss of the second stage.")] = 0.0,
    at_steps: Annotated[str | None, typer.Option(
        "--at-steps", metavar="N,N,...", show_default=False,
        help="Learn scores after these steps of the first stage too, to see whether the choice is stable.")] = None,
    dtype: Dtype = DtypeName.auto,
    device: Device = "auto",
    seed: Seed = 0,
    trust_remote_code: TrustRemoteCode = False,
    allow_pickle: AllowPickle = False,
    resume: Resume = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Learn which matrices or blocks a fine-tune needs (ILA), with controls.

    Trains LoRA everywhere until the loss is stable, then learns one score per unit for how much of
    its update the loss wants. --apply turns scores into plans.
    """
    from midblock.errors import SettingsError
    from midblock.selection.choice import make_plans, parse_choice, write_plans
    from midblock.selection.ila import ImportanceSettings
    from midblock.selection.ila import importance as measure

    try:
        stops = tuple(int(part) for part in at_steps.split(",")) if at_steps else ()
    except ValueError:
        raise SettingsError(f"--at-steps {at_steps!r} is no list of steps; write 50,100.") from None
    choices = [parse_choice(text) for text in apply or ()]
    wanted = ImportanceSettings(
        samples=samples, max_length=max_length, batch_size=batch_size, seed=seed, unit=unit.value, rank=rank,
        target_modules=tuple(n.strip() for n in target_modules.split(",") if n.strip()), learning_rate=learning_rate,
        max_steps=max_steps, epsilon=epsilon, check_every=check_every, window=window, score_steps=score_steps,
        penalty=penalty, at_steps=stops)
    plans: dict[str, Any] = {}

    def work(chain: Any, keys: Any, dataset: Any, run: Any, progress: Any) -> Any:
        result = measure(chain[0], data=dataset, state_folder=run.path / "state", progress=progress, settings=wanted)
        for choice in choices:
            made, missing = make_plans(chain[0], result, choice, budget=budget)
            for name, path in write_plans(run.path / "plans", made).items():
                plans[name] = {"file": str(path), "params": made[name].params, "rank": made[name].rank,
                               "blocks": len(made[name].blocks), "matrices": len(made[name].modules)}
            for name, reason in missing.items():
                console.warn(f"no plan {name}: {reason}")
        return result

    run, result = run_analysis(
        "importance", [model], names=None, data=data, seed=seed, out=out, resume=resume,
        load=ChainLoadSettings(dtype=dtype.value, device=device, trust_remote_code=trust_remote_code,
                               allow_pickle=allow_pickle),
        settings={f: getattr(wanted, f) for f in wanted.__dataclass_fields__}, measure=work, least=1)
    frame = result.frame
    final = frame[frame["final"] & (frame["metric"] == "ila_score")]
    wide = final.pivot_table(index="layer", columns="matrix", values="value", sort=False)
    console.print_table(wide.reset_index().rename(columns={"layer": "block"}), title="ILA scores")
    if plans:
        import pandas as pd

        console.print_table(pd.DataFrame([{"plan": n, **p} for n, p in plans.items()]),
                            title="Plans at equal parameters, for tune --plan and arms.plans of a sweep")
    show(run, result, plans=plans)
