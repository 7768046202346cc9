"""What every analysis command does around its measurement: load, run folder, progress, save."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from midblock.cli import console

if TYPE_CHECKING:
    from midblock.models import LoadedModel
    from midblock.progress import Progress
    from midblock.provenance import RunFolder
    from midblock.report import Result
    from midblock.settings import Settings
    from midblock.settings.load import LoadSettings

__all__ = ["Chain", "Names", "OneOrMore", "run_analysis", "split_names"]

Chain = Annotated[list[str], typer.Argument(
    metavar="BASE SFT [DPO ...]", show_default=False,
    help="Two or more checkpoints of one architecture: local folders, *.gguf, hub ids, smollm2.")]
OneOrMore = Annotated[list[str], typer.Argument(
    metavar="MODEL [SFT ...]", show_default=False,
    help="One or more checkpoints of one architecture: local folders, *.gguf, hub ids, smollm2.")]
Names = Annotated[str | None, typer.Option(
    "--names", metavar="A,B,...", help="Stage names. Default: base,sft,dpo,rlvr.", show_default=False)]


def split_names(names: str | None) -> list[str] | None:
    """``--names a,b`` as a list; None where it was not given."""
    return None if names is None else [n.strip() for n in names.split(",")]


def run_analysis(
    command: str, models: Sequence[str], *, names: str | None, data: str | None, seed: int, out: Path, resume: bool,
    load: LoadSettings, settings: Settings | Mapping[str, Any],
    measure: Callable[[list[LoadedModel], list[str], Any, RunFolder, Progress], Result], least: int = 2,
) -> tuple[RunFolder, Any]:
    """Load the chain and the data, measure, and save the result in its run folder.

    Nothing is written before the models and the data are known to be good.

    Args:
        command: Name for ``run.json``.
        models: MODEL specs.
        names: The ``--names`` option.
        data: D spec; None: nothing is scored.
        seed: Seed for generated data.
        out: Run folder.
        resume: Continue in it.
        load: How the checkpoints are loaded.
        settings: The measurement's own settings, for ``run.json``.
        measure: Called with models, their names, the data, the run folder and the progress bar.
        least: Fewest checkpoints that make sense.

    Returns:
        The finished run folder and the result.

    Raises:
        SettingsError: too few checkpoints, or other settings than the run that is resumed.
    """
    from midblock.data import load_data
    from midblock.errors import SettingsError
    from midblock.models import load_chain, pair_warning
    from midblock.models.chain import stage_names
    from midblock.provenance import RunFolder
    from midblock.report import save_result
    from midblock.settings.load import STREAM_FIELDS

    if len(models) < least:
        raise SettingsError(f"{command} compares at least {least} checkpoints, got only {' '.join(models)}; "
                            "give a base and a tuned one.")
    keys = stage_names(len(models), split_names(names))
    dataset = None if data is None else load_data(data, seed=seed)
    for tuned in models[1:]:
        if note := pair_warning(models[0], tuned):
            console.warn(note)
    if not resume:
        RunFolder.check_free(out)
    chain = load_chain(models, names=keys, **load.model_dump())
    recorded = {"models": list(models), "names": keys, "data": data, **load.model_dump(), **dict(settings)}
    with RunFolder(out, command=command, settings=recorded, resume=resume, may_differ=STREAM_FIELDS) as run, \
            console.progress_bar() as progress:
        run.record_inputs(models={k: m.describe() for k, m in zip(keys, chain, strict=True)},
                          data={} if dataset is None else dataset.describe())
        result = measure(chain, keys, dataset, run, progress)
        save_result(run, result, fields={"counts": getattr(result, "counts", {})}, progress=progress)
    counts = getattr(result, "counts", {})
    if counts.get("truncated"):
        console.warn(f"{counts['truncated']} of the samples were cut at {counts.get('max_length', 'the limit of')} "
                     "tokens.")
    return run, result


def show(run: RunFolder, result: Any, **fields: Any) -> None:
    """Print the reading and where everything is, or everything as JSON."""
    console.say(result.summary())
    console.say(f"\nTable, figures and settings: {run.path}")
    console.emit_json({"run": run.run, "summary": result.summary(), **fields, "table": result.frame})
