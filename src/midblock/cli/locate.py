"""`midblock locate MODEL`: where to tune, without training; `--validate SWEEP_DIR...`: what that is worth."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from midblock.cli import console
from midblock.cli.analysis import loading, show
from midblock.cli.command import command
from midblock.cli.options import RunOut
from midblock.settings.base import name_of
from midblock.settings.load import STREAM_FIELDS, LoadSettings, StreamedLoadSettings
from midblock.settings.locate import LocateSettings, ScoreSettings

__all__ = ["locate"]


@command(
    "midblock locate smollm2 --data arithmetic --out runs/locate",
    "midblock locate smollm2 --data gsm8k --share 0.4 --rule block_influence",
    "midblock locate smollm2 --data arithmetic --budget 900k --rank 16",
    "midblock locate --validate runs/sweep-a runs/sweep-b --out runs/validate")
def locate(
    targets: Annotated[list[str], typer.Argument(
        metavar="MODEL | SWEEP_DIR...", show_default=False,
        help="A model: local folder, *.gguf, hub id, or smollm2. With --validate: folders of finished sweeps.")],
    settings: LocateSettings, load: StreamedLoadSettings,
    data: Annotated[str | None, typer.Option(
        "--data", metavar="D", show_default=False,
        help="Data for the scores of hidden states and gradients (a registry name, a file, hf:NAME, arithmetic, "
             "pydocs). Without it only the weights are scored.")] = None,
    validate: Annotated[bool, typer.Option(
        "--validate", help="Compare every score with the measured gains of sweeps.")] = False,
    out: RunOut = Path("runs/locate"),
) -> None:
    """Score every block without training and propose a contiguous range to tune.

    One forward pass, one backward pass, and the spectra of the weights. A score is only worth what
    it predicts: --validate says how much that is on your own sweeps.
    """
    from midblock.errors import SettingsError
    from midblock.provenance import RunFolder

    RunFolder.check_free(out)
    if validate:
        own = {"data": data} if data is not None else {
            k: v for k, v in settings.given().items() if k not in ScoreSettings.model_fields}
        if own:
            raise SettingsError(f"{name_of(next(iter(own)))} does not go with --validate: model and data are those of "
                                "each sweep.")
        _validate(targets, out, ScoreSettings(**settings.given()),
                  LoadSettings(**{k: v for k, v in load.given().items() if k not in STREAM_FIELDS}))
        return
    if len(targets) != 1:
        raise SettingsError(f"locate takes one model, got {' '.join(targets)}; folders of sweeps need --validate.")
    _locate(targets[0], data, out, settings, load)


def _locate(model: str, data: str | None, out: Path, settings: LocateSettings, load: StreamedLoadSettings) -> None:
    from midblock.data import load_data
    from midblock.models.resolve import resolve_checkpoint

    resolve_checkpoint(model, trust_remote_code=load.trust_remote_code, allow_pickle=load.allow_pickle)
    dataset = None if data is None else load_data(data, seed=settings.seed)
    loading([model])
    from midblock.models import load_chain
    from midblock.provenance import RunFolder
    from midblock.report import save_result
    from midblock.selection.locate import locate as measure

    loaded = load_chain([model], names=[Path(model).name or "base"], **load.model_dump())[0]
    recorded = {"model": model, "data": data, **settings.model_dump(), **load.model_dump()}
    with RunFolder(out, command="locate", settings=recorded) as run, console.progress_bar() as progress:
        run.record_inputs(models={"base": loaded.describe()}, data={} if dataset is None else dataset.describe())
        result = measure(loaded, data=dataset, settings=settings, progress=progress)
        run.write_table(result.proposal_table(), "proposals.csv")
        save_result(run, result, fields={"counts": result.counts, "proposal": result.proposal.to_dict()},
                    progress=progress)
    wide = result.frame.pivot_table(index="layer", columns="metric", values="value", sort=False)
    console.print_table(wide.reset_index().rename(columns={"layer": "block"}), title="Scores per block")
    console.print_table(result.proposal_table()[["rule", "blocks", "mask"]], title="What each rule proposes")
    show(run, result, proposal=result.proposal.to_dict(),
         proposals={n: p.to_dict() for n, p in result.proposals.items()})


def _validate(folders: list[str], out: Path, settings: ScoreSettings, load: LoadSettings) -> None:
    from midblock.provenance import RunFolder
    from midblock.report import save_result
    from midblock.selection.validate import validate as measure

    with console.progress_bar() as progress:
        result = measure(folders, settings=settings, load=load, progress=progress)
    recorded = {"sweeps": folders, **settings.model_dump(), **load.model_dump()}
    with RunFolder(out, command="locate-validate", settings=recorded) as run:
        run.write_table(result.cases, "cases.csv")
        save_result(run, result, fields={"best_rule": result.best})
    console.print_table(result.overview(), title="What each score predicts")
    show(run, result, best_rule=result.best, cases=result.cases)
