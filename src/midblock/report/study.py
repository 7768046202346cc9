"""One study: every analysis of one or several chains of checkpoints on one or several data sets, and its report.

Each checkpoint is loaded once for all parts. A part is a run folder of its own, as its command would write it, so a
study resumes part by part, and whatever reads run folders reads a study. A part that fails is recorded with its reason
and does not stop the others.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from midblock.errors import MidblockError, OutputError, SettingsError
from midblock.progress import Progress, silent
from midblock.provenance import RunFolder, check_whole
from midblock.reading import read_yaml, user_path
from midblock.report.findings import answer_of
from midblock.report.page import build_report
from midblock.report.save import save_result
from midblock.results import Answer, Reading
from midblock.settings.base import as_keys
from midblock.settings.load import ChainLoadSettings
from midblock.settings.study import Part, StudySettings
from midblock.writing import recomputed

__all__ = ["StudyResult", "plan_study", "read_study", "study"]


_PER_DEPTH = ("weights", "profile", "lens", "swap", "gradients")  # parts whose tables correlate reads


@dataclass(frozen=True)
class Task:
    """One part on one chain and (but for weights and correlate) one data set."""

    part: Part
    chain: int
    data: str | None
    folder: Path


@dataclass
class StudyResult(Reading):
    """What a study made.

    Attributes:
        folder: Its folder.
        report: The page.
        findings: Of the page: ``answer``, ``limits``, ``command``.
        seconds: Part's folder -> seconds it took in this call; parts that were finished before are not in it.
        failed: Part's folder -> reason.
    """

    folder: Path
    report: Path
    findings: dict[str, Any]
    seconds: dict[str, float] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def answer(self) -> Answer:
        """The first finding, the first limit, and what to run next."""
        return answer_of(self.findings)

    def details(self) -> list[str]:
        """The other findings, and which parts failed."""
        return [*self.findings["answer"][1:],
                *(f"Not measured: {name}: {reason}" for name, reason in self.failed.items())]


@as_keys()
def read_study(path: Path | str) -> tuple[list[list[str]], list[str], StudySettings]:
    """A study file: ``pairs`` (each a list of MODEL specs), ``data`` (a list of D specs), and settings by their names.

    Raises:
        SettingsError: it cannot be read, a key is unknown, or there is no pair.
    """
    path = user_path(path, error=SettingsError)
    values = read_yaml(path, error=SettingsError)
    if not isinstance(values, Mapping):
        raise SettingsError(f"{path} holds no keys; it needs pairs: and data:.")
    rest = dict(values)
    pairs, data = rest.pop("pairs", None), rest.pop("data", [])
    if not (isinstance(pairs, list) and pairs and all(isinstance(p, list) and len(p) >= 2 and all(
            isinstance(m, str) for m in p) for p in pairs)):
        raise SettingsError(f"{path}: pairs must be a list of lists of two or more models, such as "
                            "[[base, tuned], [base-2, tuned-2]].")
    data = [data] if isinstance(data, str) else data
    if not isinstance(data, list) or not all(isinstance(d, str) for d in data):
        raise SettingsError(f"{path}: data must be a list of data specs.")
    given: dict[str, Any] = {str(k): tuple(v) if isinstance(v, list) else v for k, v in rest.items()}
    return pairs, data, StudySettings(**given)


def plan_study(chains: Sequence[Sequence[str]], data: Sequence[str], out: Path, settings: StudySettings) -> list[Task]:
    """What a study will run, in its order.

    Raises:
        SettingsError: a chain of one model, or no data for a part that needs some.
    """
    if short := [c for c in chains if len(c) < 2]:
        raise SettingsError(f"a study compares at least 2 checkpoints, got only {' '.join(short[0]) or 'none'}; "
                            "give a base and a tuned one.")
    needing = [p for p in settings.parts if p not in ("weights", "correlate")]
    if needing and not data:
        raise SettingsError(f"{', '.join(needing)} need data; name some with --data, or ask for weights alone "
                            "with --only weights.")
    tasks = []
    for number, chain in enumerate(chains):
        home = out if len(chains) == 1 else out / f"{number + 1}-{_word(chain[-1])}"
        names = _distinct([_word(d) for d in data])
        for part in settings.parts:
            if part in ("weights", "correlate"):
                tasks.append(Task(part, number, None, home / part))
            else:
                tasks += [Task(part, number, d, (home if len(data) == 1 else home / name) / part)
                          for d, name in zip(data, names, strict=True)]
    return tasks


def _word(spec: str) -> str:
    """A model or data spec as a folder's name."""
    last = spec.rstrip("/").split("/")[-1] or spec
    return re.sub(r"[^A-Za-z0-9._-]+", "-", last).strip("-.")[:60] or "part"


def _distinct(names: Sequence[str]) -> list[str]:
    return [name if list(names).index(name) == i else f"{name}-{i + 1}" for i, name in enumerate(names)]


def study(chains: Sequence[Sequence[str]], *, data: Sequence[str] = (), out: Path | str = "runs/study",
          resume: bool = False, load: ChainLoadSettings | None = None, progress: Progress = silent,
          tell: Callable[[str], None] = lambda line: None, settings: StudySettings | None = None,
          **overrides: Any) -> StudyResult:
    """Run every part of a study and write its report.

    Args:
        chains: Each a base and its tuned checkpoints, as MODEL specs; or a single such chain.
        data: D specs; every chain is measured on each.
        out: The study's folder: one run folder a part, ``run.json``, ``report.html``.
        resume: Go on in it; parts that finished with the same settings are kept.
        load: How checkpoints are loaded.
        progress: Told how far the part that runs is.
        tell: Called with a line when a part begins, and with warnings.
        settings: What is measured.
        **overrides: Single fields of `StudySettings`.

    Raises:
        SettingsError: a setting out of range, too few models, or a resumed study whose settings differ.
        OutputError: the folder is not empty, or every part failed.
    """
    chosen = StudySettings.of(settings, overrides)
    lists = [[chains]] if isinstance(chains, str) else [list(chains)] if isinstance(chains[0], str) else [
        list(c) for c in chains]
    specs: list[list[str]] = lists  # type: ignore[assignment]
    folder = user_path(out, error=OutputError)
    tasks = plan_study(specs, data, folder, chosen)
    result = StudyResult(folder, folder / "report.html", {})
    loading = load or ChainLoadSettings()
    recorded = {"chains": specs, "data": list(data), **loading.model_dump(), **chosen.model_dump(mode="json")}
    with RunFolder(folder, command="study", settings=recorded, resume=resume) as run:
        for number, stages in enumerate(specs):
            own = [t for t in tasks if t.chain == number]
            with _Chain(stages, loading, chosen) as chain:
                for task in own:
                    _run(task, chain, result, len(tasks), tasks.index(task) + 1, progress, tell)
            run.update(failed=result.failed, seconds_of_parts=result.seconds)
        if len(result.failed) == len(tasks):
            raise OutputError("every part of the study failed; the first: " + next(iter(result.failed.values())))
        made = build_report([folder], result.report)
        result.findings = made["findings"]
        run.update(findings=result.findings, report="report.html")
    return result


def _run(task: Task, chain: _Chain, result: StudyResult, total: int, number: int, progress: Progress,
         tell: Callable[[str], None]) -> None:
    name = str(task.folder.relative_to(result.folder))
    if _finished(task.folder):
        tell(f"{number}/{total} {name}: finished before")
        chain.finished.append(task)
        return
    tell(f"{number}/{total} {name}{f' on {task.data}' if task.data else ''}")
    started = time.perf_counter()
    try:
        chain.run(task, progress)
    except MidblockError as error:
        result.failed[name] = str(error)
        tell(f"{name} failed: {error}")
        return
    result.seconds[name] = round(time.perf_counter() - started, 2)


def _finished(folder: Path) -> bool:
    """Whether a run folder holds a finished run; one that is damaged is named, and run again."""
    if not (folder / "run.json").exists():
        return False
    try:
        return bool(check_whole(folder)["status"] == "finished")
    except MidblockError as error:
        recomputed(error, "This part is run again.")
        return False


class _Chain:
    """One chain of checkpoints: loaded when a part first needs it, once for all parts."""

    def __init__(self, specs: Sequence[str], load: ChainLoadSettings, settings: StudySettings) -> None:
        self._specs, self._load, self._settings = list(specs), load, settings
        self._models: list[Any] | None = None
        self._datasets: dict[str, Any] = {}
        self.finished: list[Task] = []

    def __enter__(self) -> _Chain:
        return self

    def __exit__(self, *_: object) -> None:
        self._models = None  # the next chain needs the memory

    @property
    def models(self) -> list[Any]:
        if self._models is None:
            from midblock.models import load_chain

            self._models = list(load_chain(self._specs, **self._load.model_dump()))
        return self._models

    def dataset(self, spec: str) -> Any:
        if spec not in self._datasets:
            from midblock.data import load_data

            self._datasets[spec] = load_data(spec, seed=self._settings.seed)
        return self._datasets[spec]

    def run(self, task: Task, progress: Progress) -> None:
        """Measure one part and save it in its run folder."""
        data = None if task.data is None else self.dataset(task.data)
        if task.part == "correlate" and len(self.finished) < 2:
            raise SettingsError("correlate needs at least two finished parts")
        needs_models = task.part not in ("weights", "correlate")
        models = self.models if needs_models else []
        settings = {"models": self._specs, "data": task.data, "part_of_study": True,
                    **self._load.model_dump(), **dict(self._arguments(task))}
        with RunFolder(task.folder, command=task.part, settings=settings, resume=task.folder.exists()) as run:
            if needs_models:
                from midblock.models.chain import stage_names

                names = stage_names(len(models))
                run.record_inputs(models={k: m.describe() for k, m in zip(names, models, strict=True)},
                                  data={} if data is None else data.describe())
            else:
                from midblock.models.chain import stage_names

                names = stage_names(len(self._specs))
                run.update(models={k: {"spec": s} for k, s in zip(names, self._specs, strict=True)})
            result = self._measure(task, models, data, run, progress)
            save_result(run, result, fields={"counts": getattr(result, "counts", {})}, progress=progress)
        self.finished.append(task)

    def _arguments(self, task: Task) -> Iterator[tuple[str, Any]]:
        """The settings of a part, from those of the study."""
        s = self._settings
        shared = {"max_length": s.max_length, "batch_size": s.batch_size, "seed": s.seed}
        yield from {
            "weights": {},
            "profile": {"samples": s.samples, "token_samples": s.token_samples, **shared},
            "lens": {"samples": s.lens_samples, **shared},
            "swap": {"samples": s.swap_samples, "segments": s.segments, **shared},
            "gradients": {"samples": s.gradient_samples, **shared},
            "locate": {"samples": s.gradient_samples, "gradient_samples": s.gradient_samples, **shared},
            "correlate": {},
        }[task.part].items()

    def _measure(self, task: Task, models: list[Any], data: Any, run: RunFolder, progress: Progress) -> Any:
        more: dict[str, Any] = {"progress": progress, **dict(self._arguments(task))}
        if task.part == "weights":
            from midblock.analysis.weights import weights

            return weights(self._specs, progress=progress)
        if task.part == "correlate":
            from midblock.analysis.correlate import correlate

            return correlate([t.folder for t in self.finished if t.part in _PER_DEPTH], progress=progress)
        if task.part == "locate":
            from midblock.selection.locate import locate

            return locate(models[0], data=data, **more)
        if task.part == "profile":
            from midblock.analysis.profile import profile

            return profile(models, data=data, state_folder=run.path / "state", **more)
        if task.part == "lens":
            from midblock.analysis.lens import lens

            return lens(models, data=data, state_folder=run.path / "state", **more)
        if task.part == "swap":
            from midblock.analysis.swap import swap

            return swap(models, data=data, **more)
        from midblock.analysis.gradients import gradients

        return gradients(models, data=data, **more)
