"""What every analysis command does around its measurement: load, run folder, progress, save."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from midblock import ranks
from midblock.cli import console
from midblock.cli.answers import show_answer

if TYPE_CHECKING:
    import pandas as pd

    from midblock.models import LoadedModel
    from midblock.progress import Progress
    from midblock.provenance import RunFolder
    from midblock.report import Result
    from midblock.results import Answer
    from midblock.settings import Settings
    from midblock.settings.load import LoadSettings

__all__ = ["Chain", "Names", "OneOrMore", "changes_table", "loading", "reading", "run_analysis", "show", "split_names"]

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


def loading(models: Sequence[str]) -> None:
    """The first sign of life, once what can be checked at once is right: importing what comes next takes seconds."""
    console.step(f"Loading {' and '.join(dict.fromkeys(map(str, models)))} ...")


def reading(runs: Sequence[Path | str]) -> None:
    """The first sign of life of a command that reads what others wrote; nothing where that is not there."""
    if all(Path(run).exists() for run in runs):
        names = [str(r) for r in runs]
        console.step(f"Reading {' and '.join(names)} ..." if len(names) < 4 else f"Reading {len(names)} folders ...")


def run_analysis(
    command: str, models: Sequence[str], *, names: str | None, data: str | None, seed: int, out: Path, resume: bool,
    load: LoadSettings, settings: Settings | Mapping[str, Any],
    measure: Callable[[list[LoadedModel], list[str], Any, RunFolder, Progress], Result], least: int = 2,
    may_grow: Collection[str] = (),
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
        may_grow: Settings that a resumed run may have larger.

    Returns:
        The finished run folder and the result.

    Raises:
        SettingsError: too few checkpoints, or other settings than the run that is resumed.
    """
    from midblock.errors import SettingsError
    from midblock.models.stages import stage_names

    if len(models) < least:
        raise SettingsError(f"{command} compares at least {least} checkpoints, got only {' '.join(models)}; "
                            "give a base and a tuned one.")
    keys = stage_names(len(models), split_names(names))
    from midblock.data import load_data
    from midblock.models.pairs import pair_warning
    from midblock.models.resolve import resolve_checkpoint
    from midblock.provenance import RunFolder

    if not resume:
        RunFolder.check_free(out)
    trust = {k: v for k, v in load.model_dump().items() if k in ("trust_remote_code", "allow_pickle")}
    for spec in models:  # a wrong name is told before torch is imported
        resolve_checkpoint(spec, **trust)
    dataset = None if data is None else load_data(data, seed=seed)
    for tuned in models[1:]:
        if note := pair_warning(models[0], tuned):
            console.warn(note)
    loading(models)
    from midblock.models.chain import load_chain
    from midblock.report import save_result
    from midblock.settings.load import STREAM_FIELDS

    chain = load_chain(models, names=keys, **load.model_dump())
    recorded = {"models": list(models), "names": keys, "data": data, **load.model_dump(), **dict(settings)}
    with RunFolder(out, command=command, settings=recorded, resume=resume, may_differ=STREAM_FIELDS,
                   may_grow=may_grow) as run, \
            console.progress_bar() as progress:
        run.record_inputs(models={k: m.describe() for k, m in zip(keys, chain, strict=True)},
                          data={} if dataset is None else dataset.describe())
        result = measure(chain, keys, dataset, run, progress)
        if ranks.follows():
            raise typer.Exit
        save_result(run, result, fields={"counts": getattr(result, "counts", {})}, progress=progress)
    counts = getattr(result, "counts", {})
    if counts.get("truncated"):
        limit = counts.get("max_length") or dict(settings).get("max_length")
        console.warn(f"{counts['truncated']} of the samples were cut at {limit} tokens (--max-length).")
    return run, result


def changes_table(changes: pd.DataFrame, keys: Mapping[str, str]) -> pd.DataFrame:
    """One row a change, its loss and accuracy as text with intervals.

    Args:
        changes: Rows of a tidy table with side ``difference``.
        keys: Column that tells the rows apart -> its heading.
    """
    import pandas as pd

    rows = []
    for key, part in changes.groupby(list(keys), sort=False):
        row = dict(zip(keys.values(), key, strict=True))
        for metric in ("loss", "accuracy"):
            for _, found in part[part["metric"] == metric].iterrows():
                row[f"change of {metric}"] = f"{found['value']:+.4f} [{found['low']:+.4f}, {found['high']:+.4f}]"
        rows.append({**row, "n": int(part["n"].iloc[0])})
    return pd.DataFrame(rows)


def show(run: RunFolder, result: Any, *, answer: Answer | None = None, **fields: Any) -> None:
    """Print the details, where everything is, and at last the answer; or everything as JSON."""
    for line in result.details():
        console.say(line)
    console.say(f"\nTable, figures and settings: {run.path}")
    answer = answer or result.answer()
    show_answer(answer, run.path)
    console.emit_json({"run": run.run, "answer": answer, "summary": result.summary(), **fields, "table": result.frame})
