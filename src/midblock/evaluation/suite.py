"""`evaluate_tasks`: one model on several tasks, its base on the same items, the differences, and the files."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from midblock import ranks
from midblock.data import Dataset
from midblock.errors import SettingsError
from midblock.evaluation.on_vllm import VllmModel, open_in_vllm
from midblock.evaluation.outcome import (
    Comparison,
    EvalResult,
    compare,
    file_name,
    read_result,
    write_lm_eval_files,
    write_result,
)
from midblock.evaluation.run import check_options, evaluate, options_of, scores_tokens
from midblock.evaluation.tasks import TASKS, find_task, task_data
from midblock.extras import require
from midblock.models.checkpoints import is_adapter_folder
from midblock.models.resolve import resolve_checkpoint
from midblock.progress import Progress, silent
from midblock.provenance import RunFolder
from midblock.results import UNNAMED, Answer, Origin, Table, TableResult
from midblock.settings.base import name_of
from midblock.settings.evaluate import EvaluateSettings, ScoringSettings
from midblock.settings.load import STREAM_FIELDS, LoadSettings
from midblock.writing import sha256_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from midblock.models import LoadedModel

__all__ = ["TasksResult", "evaluate_tasks"]

_LOG = logging.getLogger("midblock")


@dataclass
class TasksResult(TableResult):
    """Scores on several tasks, beside the base's where there is one."""

    results: dict[str, dict[str, EvalResult]]
    """Side (``base``, the adapter's name) -> task -> its result; the scored model first."""
    differences: dict[str, Comparison]
    """Task -> the model minus its base, paired by item."""
    table: Table
    """The tidy table: one row per task, metric and side."""
    run: dict[str, Any] | None
    """``run.json``; None where nothing was written."""
    origin: Origin = UNNAMED
    """What was scored: a MODEL spec and the folder of its adapter where it has one; data that is no task's own."""

    @property
    def notes(self) -> list[str]:
        """What a reader should know of each score."""
        return [f"{result.task} ({side}): {note}" for side, found in self.results.items()
                for result in found.values() for note in result.notes]

    def answer(self) -> Answer:
        """The first task's score, and whether it differs from the base's."""
        side, found = next(iter(self.results.items()))
        task, result = next(iter(found.items()))
        model, adapter = self.origin.models[:1], self.origin.models[1:]
        again = ("evaluate", *model, *(("--adapter", *adapter) if adapter else ()), "--compare-base", "--task", task,
                 *(("--data", self.origin.data) if self.origin.data else ()), "--samples", str(4 * result.n))
        if task not in self.differences:
            return Answer(f"{side}: {result.told()}.",
                          "One score alone says nothing of a block; compare it with the base or another adapter on the "
                          "same items.",
                          again if adapter else ())
        d = self.differences[task]
        e, better = d.estimate, "higher" if result.higher_is_better else "lower"
        found_text = (f"{side} against its base on {task}: {d.metric} {e.value:+.3g} [{e.low:+.3g}, {e.high:+.3g}], "
                      f"n = {d.n} items, p {d.p:.2g} ({better} is better).")
        if e.low <= 0 <= e.high or d.p >= 0.05:
            return Answer(found_text, "These items do not show a difference; take more before a block is judged by it.",
                          again if model else ())
        gain = (e.value > 0) == result.higher_is_better
        return Answer(found_text, f"Tuning these blocks {'helped' if gain else 'harmed'} here. Whether other blocks do "
                      "better needs them tuned at the same budget and scored on the same items (midblock sweep).")

    def details(self) -> list[str]:
        """One line per score and per difference."""
        lines = [f"{side}: {result.summary()}" for side, found in self.results.items() for result in found.values()]
        for task, d in self.differences.items():
            e = d.estimate
            within = e.low <= 0 <= e.high if e.low == e.low else True
            lines.append(f"{task}: {d.metric} {e.value:+.4g} [{e.low:.4g}, {e.high:.4g}] against the base (n={d.n}, "
                         f"p {d.p:.3g}){': no difference is shown' if within else ''}.")
        return lines

    def figures(self) -> dict[str, Figure]:
        """Each metric by task and side."""
        from midblock.figures import segment_bars

        frame = self.frame
        made = {}
        for metric in dict.fromkeys(frame["metric"]):
            part = frame[(frame["metric"] == metric) & (frame["side"] != "difference")]
            made[f"evaluate-{metric}"] = segment_bars(part, metric=str(metric), label="data", hue="side",
                                                      title="Scores with 95% intervals")
        return made


def evaluate_tasks(model: LoadedModel | str, tasks: Sequence[str], *, out: Path | str | None = None,
                   resume: bool = False, load: LoadSettings | None = None, progress: Progress = silent,
                   settings: EvaluateSettings | None = None, **overrides: Any) -> TasksResult:
    """Score a model, with or without an adapter, on several tasks; optionally against its base on the same items.

    Args:
        model: A MODEL spec, or a loaded model (then the base must be named for a comparison).
        tasks: Names of `midblock.evaluation.TASKS`.
        out: Run folder: ``run.json``, ``table.csv``, lm-evaluation-harness's own files, and one complete result per
            side and task under ``scores/``.
        resume: Go on in ``out``; what is complete there is not scored again.
        load: How checkpoints are loaded.
        progress: Told how many rows are done.
        settings: See `EvaluateSettings`; an option that only some of the tasks have goes to these.
        **overrides: Single fields of them.

    Raises:
        SettingsError: an option that does not fit (see `evaluate`), or no base to compare with.
        DataError: see `evaluate`.
        OutputError: ``out`` is not free, or not of this run.
    """
    chosen, loading = EvaluateSettings.of(settings, overrides), load or LoadSettings()
    tasks = list(dict.fromkeys(tasks))
    if not tasks:
        raise SettingsError(f"no task was named; choose among {', '.join(TASKS)} ({name_of('task')}).")
    if resume and out is None:
        raise SettingsError(f"{name_of('resume')} continues the run in {name_of('out')}; name that folder.")
    if chosen.backend == "vllm":
        require("vllm", f"{name_of('backend')} vllm")
        if not isinstance(model, str):
            raise SettingsError(f"{name_of('backend')} vllm takes a MODEL spec, not a model in memory.")
        if ranks.size() > 1:
            raise SettingsError(f"{name_of('backend')} vllm spreads a model over GPUs itself "
                                f"({name_of('tensor_parallel')}); start it as one process.")
    elif chosen.tensor_parallel > 1:
        raise SettingsError(f"{name_of('tensor_parallel')} is for {name_of('backend')} vllm.")
    scoring = {task: _scoring_of(task, chosen, alone=len(tasks) == 1) for task in tasks}
    for task, own in scoring.items():
        check_options(task, own)
    datasets = {task: task_data(task, chosen.data, samples=chosen.samples, seed=chosen.seed) for task in tasks}
    if out is not None and not resume:
        RunFolder.check_free(out)
    if isinstance(model, str):  # a wrong name is told before torch is imported
        trust: dict[str, Any] = {"trust_remote_code": loading.trust_remote_code, "allow_pickle": loading.allow_pickle}
        alone = chosen.adapter is None and not is_adapter_folder(resolve_checkpoint(model, **trust))
        for named_too in filter(None, (chosen.adapter, chosen.base)):
            resolve_checkpoint(str(named_too), **trust)
        if chosen.compare_base and alone:
            raise _no_base(model)
        _LOG.info("Loading %s ...", " and ".join([model, *([str(chosen.adapter)] if chosen.adapter else [])]))

    def opened(spec: str, adapter: str | None = None) -> LoadedModel | VllmModel:
        if chosen.backend == "vllm":
            return open_in_vllm(spec, adapter=adapter, load=loading, tensor_parallel=chosen.tensor_parallel)
        return _load(spec, adapter, tasks, loading)

    loaded: LoadedModel | VllmModel | None = opened(model, chosen.adapter) if isinstance(model, str) else model
    assert loaded is not None
    if chosen.compare_base and loaded.adapter is None:
        raise _no_base(loaded.spec)
    other = str(loaded.folder) if chosen.compare_base else chosen.base
    named = Origin((loaded.spec, *((str(chosen.adapter),) if chosen.adapter else ())),
                   chosen.data if isinstance(chosen.data, str) else "")
    side = _side_of(loaded, other)
    recorded = {"model": loaded.spec if not isinstance(model, str) else model, "tasks": tasks,
                **chosen.model_dump(), **loading.model_dump()}
    results: dict[str, dict[str, EvalResult]] = {}
    with contextlib.ExitStack() as stack:
        run = None if out is None else stack.enter_context(
            RunFolder(out, command="evaluate", settings=recorded, resume=resume, may_differ=STREAM_FIELDS))
        for name, spec in {side: None, **({"base": other} if other is not None else {})}.items():
            if spec is not None:
                if isinstance(loaded, VllmModel):
                    loaded.close()
                loaded = None  # the first model's memory is free before the second comes
                loaded = opened(spec)
            assert loaded is not None
            if run is not None:
                run.record_inputs(
                    models={**run.run["models"], name: loaded.describe()},
                    data={"fingerprint": sha256_of(*(d.fingerprint for d in datasets.values())),
                          "tasks": {t: d.describe() for t, d in datasets.items()}})
            results[name] = {task: _scored(run, name, task, loaded, datasets[task], scoring[task], progress)
                             for task in tasks}
        differences = {t: compare(results[side][t], results["base"][t]) for t in tasks} if other is not None else {}
        table = _table(results, differences)
        if run is not None and not ranks.follows():
            _write(run, table, results, str(recorded["model"]), loading)
    return TasksResult(results, differences, table, None if run is None else run.run, named)


def _load(spec: str, adapter: str | None, tasks: Sequence[str], loading: LoadSettings) -> LoadedModel:
    """A model for these tasks, read block by block only where all of them are losses of tokens."""
    from midblock.models.chain import load_chain

    options = loading.model_dump()
    if options.get("stream") == "auto" and (adapter is not None or not all(map(scores_tokens, tasks))):
        options["stream"] = "never"
    return load_chain([spec], names=[(Path(adapter or spec)).name or "base"], adapter=adapter, **options)[0]


def _no_base(spec: str) -> SettingsError:
    return SettingsError(f"{name_of('compare_base')} compares an adapter with its base, but {spec} was given without "
                         f"one; add {name_of('adapter')} A, or name the base with {name_of('base')} MODEL.")


def _scoring_of(task: str, chosen: EvaluateSettings, *, alone: bool) -> ScoringSettings:
    """What a task takes of the options; a task alone is given all, so that a wrong one is refused."""
    takes = options_of(find_task(task))
    apart = {"max_new_tokens", "max_length", "shots"} - takes
    return chosen.scoring() if alone else chosen.scoring(**{
        name: ScoringSettings.model_fields[name].default for name in apart})


def _side_of(loaded: LoadedModel | VllmModel, other: str | None) -> str:
    """Name of the scored model in tables: its own beside a base, or where it carries an adapter."""
    if loaded.adapter is None and other is None:
        return "base"
    return f"{loaded.name}-tuned" if loaded.name in ("base", "difference") and other is not None else loaded.name


def _scored(run: RunFolder | None, side: str, task: str, loaded: LoadedModel | VllmModel, dataset: Dataset,
            settings: ScoringSettings, progress: Progress) -> EvalResult:
    """The stored result where there is one, else a new one, stored at once."""
    place = f"scores/{file_name(side)}/{file_name(task)}.json"
    stored = None if run is None or not run.resumed else ranks.first(
        lambda: read_result(run.path / place) if (run.path / place).is_file() else None)
    if stored is not None:
        return stored
    result = evaluate(loaded, task, data=dataset, settings=settings, progress=progress)
    if run is not None and not ranks.follows():
        write_result(run.file(place), result)
    return result


def _table(results: dict[str, dict[str, EvalResult]], differences: dict[str, Comparison]) -> Table:
    table = Table()
    for side, found in results.items():
        for result in found.values():
            result.add_to(table, side)
    for difference in differences.values():
        table.add("model", "all", difference.metric, "difference", difference.estimate, data=difference.task,
                  p=difference.p)
    return table


def _write(run: RunFolder, table: Table, results: dict[str, dict[str, EvalResult]], model: str,
           loading: LoadSettings) -> None:
    first = next(iter(results))
    for side, found in results.items():
        folder = run.path if side == first else run.path / "base"
        write_lm_eval_files(folder, list(found.values()), model_name=model if side == first else f"{model} (base)",
                            config={"device": loading.device, "dtype": loading.dtype})
    run.write_table(table)
    run.update(results={side: {t: {"metric": r.metric, "estimate": r.estimate, "settings": r.settings,
                                   "notes": r.notes, "seconds": r.seconds} for t, r in found.items()}
                        for side, found in results.items()})
