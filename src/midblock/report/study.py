"""One study: every analysis of one or several chains of checkpoints on one or several data sets, and its report.

Each checkpoint is loaded once for all parts, and one pass over each data set feeds all parts that read hidden states
(`midblock.report.parts`). A part is a run folder of its own, as its command would write it, so a study resumes part by
part, and whatever reads run folders reads a study. A part that fails is recorded with its reason and does not stop the
others.
"""

from __future__ import annotations

import contextlib
import re
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from midblock.errors import MidblockError, OutputError, SettingsError
from midblock.progress import Progress, silent
from midblock.provenance import RunFolder
from midblock.reading import read_yaml, user_path
from midblock.report.beside import Beside, Promise
from midblock.report.findings import answer_of
from midblock.report.forecast import Cost, StudyProgress, forecast_study, worth_a_process
from midblock.report.page import build_report
from midblock.report.parts import SHARED, Chain, Sources, Task, finished, shared_groups
from midblock.results import Answer, Reading
from midblock.settings.base import as_keys
from midblock.settings.load import STREAM_FIELDS, ChainLoadSettings
from midblock.settings.study import StudySettings

__all__ = ["StudyResult", "costs_of", "plan_study", "read_study", "study"]


@dataclass
class StudyResult(Reading):
    """What a study made.

    Attributes:
        folder: Its folder.
        report: The page.
        findings: Of the page: ``answer``, ``limits``, ``command``.
        seconds: Part's folder -> seconds it took in this call; parts that were finished before are not in it. What
            several parts share has a name of its own, which ends in ``pass``.
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

    Sweeps are found beside the study file.

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
    settings = StudySettings(**given)
    if settings.sweep:
        settings = settings.replace(sweep=tuple(str(path.parent / s) for s in settings.sweep))
    return pairs, data, settings


def plan_study(chains: Sequence[Sequence[str]], data: Sequence[str], out: Path, settings: StudySettings) -> list[Task]:
    """What a study will run, in its order.

    Raises:
        SettingsError: a chain of one model, no data for a part that needs some, or ``token_data`` that is not among it.
    """
    if short := [c for c in chains if len(c) < 2]:
        raise SettingsError(f"a study compares at least 2 checkpoints, got only {' '.join(short[0]) or 'none'}; "
                            "give a base and a tuned one.")
    reading = [p for p in settings.parts if p not in ("weights", "correlate", "sweep")]
    if reading and not data:
        raise SettingsError(f"{', '.join(reading)} need data; name some with --data, or ask for weights alone "
                            "with --only weights.")
    if absent := [d for d in settings.token_data if d not in data]:
        raise SettingsError(f"token_data names {', '.join(absent)}, which is not among the study's data "
                            f"({', '.join(data) or 'none'}).")
    tasks = []
    for number, chain in enumerate(chains):
        home = out if len(chains) == 1 else out / f"{number + 1}-{_word(chain[-1])}"
        if "weights" in settings.parts:
            tasks.append(Task("weights", number, None, home / "weights"))
        for d, name in zip(data, _distinct([_word(d) for d in data]), strict=True):
            whole = not settings.token_data or d in settings.token_data
            tasks += [Task(p, number, d, (home if len(data) == 1 else home / name) / p) for p in reading
                      if whole or p == "profile"]
        if "correlate" in settings.parts:
            tasks.append(Task("correlate", number, None, home / "correlate"))
    if "sweep" in settings.parts:
        names = _distinct([_word(Path(s).stem) for s in settings.sweep])
        tasks += [Task("sweep", None, s, out / "sweeps" / name) for s, name in zip(settings.sweep, names, strict=True)]
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
        resume: Go on in it; parts that finished with the same settings are kept. Which parts and sweeps are wanted
            may be others than before.
        load: How checkpoints are loaded.
        progress: Told how far the part that runs is, and as ``study`` how far the whole is, with the time left.
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
    sources = Sources(chosen.seed)
    with RunFolder(folder, command="study", settings=recorded, resume=resume,
                   may_differ=("only", "skip", "sweep", *STREAM_FIELDS)) as run:
        costs = forecast_study(specs, tasks, chosen, loading, sources)
        going = _Going(result, tasks, tell, StudyProgress(progress, costs))
        with Beside() if worth_a_process(costs) else contextlib.nullcontext() as beside:
            for number, stages in enumerate(specs):
                with Chain(stages, loading, chosen, sources, beside) as chain:
                    for group in shared_groups([t for t in tasks if t.chain == number]):
                        going.group(chain, group)
                    going.settle(chain)
        for task in (t for t in tasks if t.part == "sweep"):
            going.task(task, lambda t=task: _sweep(t, loading, going.progress))  # type: ignore[misc]
        run.update(failed=result.failed, seconds_of_parts=result.seconds)
        if len(result.failed) == len(tasks):
            raise OutputError("every part of the study failed; the first: " + next(iter(result.failed.values())))
        made = build_report([folder], result.report)
        result.findings = made["findings"]
        run.update(findings=result.findings, report="report.html")
    return result


def _sweep(task: Task, load: ChainLoadSettings, progress: Progress) -> None:
    from midblock.sweeps import load_config, sweep

    assert task.data is not None
    sweep(load_config(task.data, []), out=task.folder, resume=task.folder.exists(), progress=progress,
          trust_remote_code=load.trust_remote_code, allow_pickle=load.allow_pickle)


class _Going:
    """Tasks as they run: what is told, timed, and noted as failed."""

    def __init__(self, result: StudyResult, tasks: Sequence[Task], tell: Callable[[str], None],
                 progress: StudyProgress) -> None:
        self._result, self._tasks, self._tell, self.progress = result, list(tasks), tell, progress
        self._beside: dict[Task, Promise] = {}

    def _name(self, folder: Path) -> str:
        return folder.relative_to(self._result.folder).as_posix()

    def group(self, chain: Chain, tasks: Sequence[Task]) -> None:
        """Tasks of one chain and one data set (or of none)."""
        done = [t for t in tasks if finished(t.folder)]
        for task in done:
            self._tell(f"{self._place(task)}: finished before")
            self.progress.passed(task)
            chain.finished.append(task)
        waiting = [t for t in tasks if t not in done]
        shared = [t for t in waiting if t.part in SHARED]
        seconds = None
        if len(shared) > 1:
            name = self._name(shared[0].folder.parent / "pass")
            self._tell(f"{', '.join(t.part for t in shared)} on {shared[0].data}: one pass "
                       f"({self.progress.status()})")
            self.progress.begin(*shared)
            seconds = chain.share(shared, self.progress, self._guard)
            if seconds is not None:
                self._result.seconds[name] = seconds
        for task in waiting:
            if (promise := chain.start(task)) is not None:
                self._tell(f"{self._place(task)}, beside the others ({self.progress.status()})")
                self._beside[task] = promise
                continue
            if task.part == "correlate":
                self.settle(chain)
            if self._name(task.folder) not in self._result.failed:
                self.task(task, lambda t=task: chain.run(  # type: ignore[misc]
                    t, self.progress, seconds if t in shared else None))
        chain.forget(shared)

    def settle(self, chain: Chain) -> None:
        """Wait for what runs beside."""
        for task, promise in self._beside.items():
            self.progress.begin(task)
            seconds = self._guard(task, promise.result)
            self.progress.passed(task)
            if seconds is not None:
                chain.finished.append(task)
                self._result.seconds[self._name(task.folder)] = seconds
        self._beside.clear()
        for task, promise in chain.drawn:
            self._guard(task, promise.result)
        chain.drawn.clear()

    def task(self, task: Task, run: Callable[[], None]) -> None:
        """One task, unless it is finished."""
        name = self._name(task.folder)
        if task.part == "sweep" and finished(task.folder):
            self._tell(f"{self._place(task)}: finished before")
            self.progress.passed(task)
            return
        self._tell(f"{self._place(task)}{f' on {task.data}' if task.data else ''} ({self.progress.status()})")
        started = time.perf_counter()
        self.progress.begin(task)
        self._guard(task, run)
        self.progress.passed(task)
        if name not in self._result.failed:
            self._result.seconds[name] = round(time.perf_counter() - started, 2)

    def _place(self, task: Task) -> str:
        return f"{self._tasks.index(task) + 1}/{len(self._tasks)} {self._name(task.folder)}"

    def _guard(self, task: Task, run: Callable[[], Any]) -> Any:
        """The boundary of a part: whatever fails in it is its own failure, and the others go on."""
        try:
            return run()
        except MidblockError as error:
            reason = str(error)
        except Exception as error:
            # a bug or a lack of memory: named as what it is, its traceback for whoever reports it
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            with (self._result.folder / "failures.txt").open("a", encoding="utf-8") as file:
                file.write(f"{self._name(task.folder)}\n{traceback.format_exc()}\n")
        self._result.failed[self._name(task.folder)] = reason
        self._tell(f"{self._name(task.folder)} failed: {reason}")
        return None


def costs_of(chains: Sequence[Sequence[str]], data: Sequence[str], out: Path, settings: StudySettings,
             load: ChainLoadSettings | None = None) -> tuple[list[Task], dict[Task, Cost]]:
    """The tasks of a study and what each is likely to cost; measures nothing.

    Raises:
        SettingsError: as `plan_study`.
    """
    tasks = plan_study(chains, data, out, settings)
    return tasks, forecast_study(chains, tasks, settings, load or ChainLoadSettings(), Sources(settings.seed))
