"""`midblock locate MODEL`: where to tune, without training; `--validate SWEEP_DIR...`: what that is worth."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from midblock.cli import console
from midblock.cli.analysis import show
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
    TrustRemoteCode,
    examples,
)

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    app.command("locate", epilog=examples(
        "midblock locate smollm2 --data arithmetic --out runs/locate",
        "midblock locate smollm2 --data gsm8k --share 0.4 --rule block_influence",
        "midblock locate smollm2 --data arithmetic --budget 900k --rank 16",
        "midblock locate --validate runs/sweep-a runs/sweep-b --out runs/validate"))(locate)


def locate(
    targets: Annotated[list[str], typer.Argument(
        metavar="MODEL | SWEEP_DIR...", show_default=False,
        help="A model: local folder, *.gguf, hub id, or smollm2. With --validate: folders of finished sweeps.")],
    data: Annotated[str | None, typer.Option(
        "--data", metavar="D", show_default=False,
        help="Data for the scores of hidden states and gradients (a registry name, a file, hf:NAME, arithmetic, "
             "pydocs). Without it only the weights are scored.")] = None,
    validate: Annotated[bool, typer.Option(
        "--validate", help="Compare every score with the measured gains of sweeps.")] = False,
    out: Annotated[Path, typer.Option(
        "--out", metavar="DIR", help="Folder for run.json, table.csv and figures; must be empty.")
    ] = Path("runs/locate"),
    rule: Annotated[str | None, typer.Option(
        "--rule", metavar="NAME", show_default=False,
        help="fixed-middle (default), cka-borders, uniform, random, or a score: block_influence, angular_distance, "
             "cka_novelty, rank_plateau, weight_snr, gradient_norm, gradient_norm_relative, fisher, taylor.")] = None,
    share: Annotated[float | None, typer.Option(
        "--share", metavar="P", show_default=False, help="Share of the blocks to choose. Default: 0.6.")] = None,
    budget: Annotated[str | None, typer.Option(
        "--budget", metavar="PARAMS", show_default=False,
        help="In place of --share: most trainable parameters at --rank (900k).")] = None,
    rank: Annotated[int, typer.Option("--rank", metavar="R", min=1, help="LoRA rank behind --budget.")] = 16,
    target_modules: Annotated[str, typer.Option(
        "--target-modules", metavar="NAMES", help="Matrices behind --budget, separated by commas.")] = "q,k,v,o",
    scores: Annotated[str | None, typer.Option(
        "--scores", metavar="A,B,...", show_default=False, help="Compute only these scores. Default: all.")] = None,
    samples: Annotated[int, typer.Option("--samples", metavar="N", help="Samples of the forward pass.")] = 32,
    gradient_samples: Annotated[int, typer.Option(
        "--gradient-samples", metavar="N", help="Samples of the backward pass.")] = 16,
    max_length: MaxLength = 128,
    batch_size: BatchSize = 4,
    dtype: Dtype = DtypeName.auto,
    device: Device = "auto",
    seed: Seed = 0,
    trust_remote_code: TrustRemoteCode = False,
    allow_pickle: AllowPickle = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Score every block without training and propose a contiguous range to tune.

    One forward pass, one backward pass, and the spectra of the weights. A score is only worth what
    it predicts: --validate says how much that is on your own sweeps.
    """
    from midblock.errors import SettingsError
    from midblock.selection.scores import BLOCK_SCORES, ScoreSettings

    names = tuple(BLOCK_SCORES) if scores is None else tuple(s.strip() for s in scores.split(",") if s.strip())
    wanted = ScoreSettings(samples=samples, gradient_samples=gradient_samples, max_length=max_length,
                           batch_size=batch_size, seed=seed, scores=names)
    where = {"dtype": dtype.value, "device": device, "trust_remote_code": trust_remote_code,
             "allow_pickle": allow_pickle}
    if validate:
        given = [n for n, v in (("--data", data), ("--rule", rule), ("--share", share), ("--budget", budget))
                 if v is not None]
        if given:
            raise SettingsError(f"{given[0]} does not go with --validate: model and data are those of each sweep.")
        _validate(targets, out, wanted, where)
        return
    if len(targets) != 1:
        raise SettingsError(f"locate takes one model, got {' '.join(targets)}; folders of sweeps need --validate.")
    _locate(targets[0], data, out, wanted, where, rule=rule, share=share, budget=budget, rank=rank,
            target_modules=[n.strip() for n in target_modules.split(",") if n.strip()])


def _recorded(settings: Any, **more: Any) -> dict[str, Any]:
    return {**{f: getattr(settings, f) for f in settings.__dataclass_fields__}, **more}


def _locate(model: str, data: str | None, out: Path, wanted: Any, where: dict[str, Any], *, rule: str | None,
            share: float | None, budget: str | None, rank: int, target_modules: list[str]) -> None:
    from midblock.data import load_data
    from midblock.errors import SettingsError
    from midblock.models import load_model
    from midblock.provenance import RunFolder
    from midblock.report import save_result
    from midblock.selection.locate import DEFAULT_RULE, RULES
    from midblock.selection.locate import locate as measure
    from midblock.tuning.plan import budget_of

    chosen = rule or DEFAULT_RULE
    if chosen not in RULES:
        raise SettingsError(f"--rule {chosen!r} is not known; choose among {', '.join(RULES)}.")
    if share is not None and budget is not None:
        raise SettingsError("both --share and --budget were given; give one of them.")
    RunFolder.check_free(out)
    dataset = None if data is None else load_data(data, seed=wanted.seed)
    loaded = load_model(model, **where)
    params = None if budget is None else budget_of(loaded.anatomy, budget, targets=target_modules)
    settings = _recorded(wanted, model=model, data=data, rule=chosen, share=share, budget=budget, rank=rank,
                         target_modules=target_modules, dtype=where["dtype"], device=where["device"])
    with RunFolder(out, command="locate", settings=settings) as run, console.progress_bar() as progress:
        run.record_inputs(models={"base": loaded.describe()}, data={} if dataset is None else dataset.describe())
        result = measure(loaded, data=dataset, rule=chosen, share=share, budget=params, rank=rank,
                         target_modules=target_modules, settings=wanted, progress=progress)
        result.model, result.data = model, data or "D"
        run.write_table(result.proposal_table(), "proposals.csv")
        save_result(run, result, fields={"counts": result.counts, "proposal": result.proposal.to_dict()},
                    progress=progress)
    wide = result.frame.pivot_table(index="layer", columns="metric", values="value", sort=False)
    console.print_table(wide.reset_index().rename(columns={"layer": "block"}), title="Scores per block")
    console.print_table(result.proposal_table()[["rule", "blocks", "mask"]], title="What each rule proposes")
    show(run, result, proposal=result.proposal.to_dict(),
         proposals={n: p.to_dict() for n, p in result.proposals.items()})


def _validate(folders: list[str], out: Path, wanted: Any, where: dict[str, Any]) -> None:
    from midblock.provenance import RunFolder
    from midblock.report import save_result
    from midblock.selection.validate import validate as measure

    RunFolder.check_free(out)
    dtype = None if where["dtype"] == "auto" else where["dtype"]
    with console.progress_bar() as progress:
        result = measure(folders, settings=wanted, progress=progress, **{**where, "dtype": dtype})
    settings = _recorded(wanted, sweeps=folders, dtype=where["dtype"], device=where["device"])
    with RunFolder(out, command="locate-validate", settings=settings) as run:
        run.write_table(result.cases, "cases.csv")
        save_result(run, result, fields={"best_rule": result.best})
    console.print_table(result.overview(), title="What each score predicts")
    show(run, result, best_rule=result.best, cases=result.cases)
