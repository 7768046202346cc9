"""The parts of a study on one chain of checkpoints: one load, one pass a data set, one run folder a part."""

from __future__ import annotations

import contextlib
import pickle
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from midblock.errors import MidblockError, OutputError, SettingsError
from midblock.figures.style import figure_paths, save_figure
from midblock.progress import Progress, silent
from midblock.provenance import RunFolder, check_whole
from midblock.report.beside import Beside, Promise
from midblock.report.save import save_result
from midblock.settings.load import STREAM_FIELDS, ChainLoadSettings
from midblock.settings.study import Part, StudySettings
from midblock.writing import recomputed

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Chain", "Sources", "Task", "arguments", "finished"]

SHARED: tuple[Part, ...] = ("profile", "lens", "swap", "locate")
"""Parts that read hidden states and share one pass."""
_PER_DEPTH = ("weights", "profile", "lens", "swap", "gradients")  # parts whose tables correlate reads
_STORED = 0.25  # of the free memory, for hidden states that swaps go on from


@dataclass(frozen=True)
class Task:
    """One part, on one chain and (but for weights and correlate) one data set, or one sweep."""

    part: Part
    chain: int | None
    data: str | None
    folder: Path

    @property
    def needs_models(self) -> bool:
        """Whether checkpoints are loaded for it."""
        return self.part not in ("weights", "correlate", "sweep")


class Sources:
    """Data sets by their specs, each loaded once."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._found: dict[str, Any] = {}

    def __call__(self, spec: str) -> Any:
        if spec not in self._found:
            from midblock.data import load_data

            self._found[spec] = load_data(spec, seed=self._seed)
        return self._found[spec]


def arguments(part: Part, settings: StudySettings, data: str | None) -> dict[str, Any]:
    """The settings of a part, from those of the study."""
    s = settings
    shared = {"max_length": s.max_length, "batch_size": s.batch_size, "seed": s.seed}
    tokens = s.token_samples if not s.token_data or data in s.token_data else 0
    found: dict[Part, dict[str, Any]] = {
        "weights": {"rotations": s.rotations},
        "profile": {"samples": s.samples, "token_samples": tokens, "paper_code": s.paper_code, **shared},
        "lens": {"samples": s.lens_samples, "trace": 1, "paper_code": s.paper_code, **shared},
        "swap": {"samples": s.swap_samples, "segments": s.segments, "depth": s.swap_depth, **shared},
        "gradients": {"samples": s.gradient_samples, **shared},
        "locate": {"samples": s.gradient_samples, "gradient_samples": s.gradient_samples, **shared},
        "correlate": {}, "sweep": {},
    }
    return found[part]


def finished(folder: Path) -> bool:
    """Whether a run folder holds a finished run with its figures; one that is damaged is named, and run again."""
    if not (folder / "run.json").exists():
        return False
    try:
        run = check_whole(folder)
        # figures are drawn beside the parts that follow: an interruption may have left some out
        return run["status"] == "finished" and all((folder / n).exists() for n in run.get("files", ()))
    except MidblockError as error:
        recomputed(error, "This part is run again.")
        return False


class Chain:
    """One chain of checkpoints: loaded when a part first needs it, once for all parts."""

    def __init__(self, specs: Sequence[str], load: ChainLoadSettings, settings: StudySettings, sources: Sources,
                 beside: Beside | None = None) -> None:
        self._specs, self._load, self._settings, self._sources = list(specs), load, settings, sources
        self._beside = beside
        self.drawn: list[tuple[Task, Promise]] = []
        self._models: list[Any] | None = None
        self._passed: dict[Task, Any] = {}
        self._backward: dict[str | None, Any] = {}
        self.finished: list[Task] = []

    def __enter__(self) -> Chain:
        return self

    def __exit__(self, *_: object) -> None:
        self._models = None  # the next chain needs the memory

    @property
    def models(self) -> list[Any]:
        if self._models is None:
            from midblock.models import load_chain

            self._models = list(load_chain(self._specs, **self._load.model_dump()))
        return self._models

    # -- what several parts share

    def share(self, tasks: Sequence[Task], progress: Progress, guard: Callable[[Task, Callable[[], Any]], Any]
              ) -> float | None:
        """One pass over a data set for all of these tasks; `run` then takes from it what it finds.

        Args:
            tasks: Of one data set, in `SHARED`.
            progress: Told how far the pass is.
            guard: Calls a function for a task; where that fails, it notes the task as failed and gives None.

        Returns:
            Seconds of the pass; None where there was none.
        """
        from midblock.analysis.passes import run_together

        parts: dict[Task, Any] = {}
        for task in tasks:
            part = guard(task, lambda t=task: self._part(t, progress))  # type: ignore[misc]
            if part is not None:
                parts[task] = part
        if len(parts) < 2:
            return None
        started = time.perf_counter()
        try:
            run_together({t.part: part for t, part in parts.items()}, state_folder=self._state(tasks[0]),
                         progress=progress)
        except (MidblockError, RuntimeError, MemoryError, ValueError):
            return None  # whose fault it was shows when each runs alone
        self._passed.update(parts)
        return round(time.perf_counter() - started, 2)

    @staticmethod
    def _state(task: Task) -> Path:
        return task.folder.parent / "pass"

    def forget(self, tasks: Sequence[Task]) -> None:
        """Drop what a pass gave these tasks, and what it kept on disk."""
        from midblock.analysis.passes import PassState

        for task in tasks:
            self._passed.pop(task, None)
        if tasks:
            with contextlib.suppress(OutputError):  # what no run of midblock left there stays, and stops no study
                PassState(self._state(tasks[0])).discard()

    def _part(self, task: Task, progress: Progress) -> Any:
        from midblock.analysis.lens import lens_part
        from midblock.analysis.profile import profile_part
        from midblock.analysis.swap import swap_part
        from midblock.models.chain import stage_names
        from midblock.selection.scores import forward_part
        from midblock.settings.locate import LocateSettings

        assert task.data is not None
        data, chosen = self._sources(task.data), arguments(task.part, self._settings, task.data)
        if task.part == "profile":
            return profile_part(self.models, data=data, progress=progress, **chosen)
        if task.part == "lens":
            return lens_part(self.models, data=data, **chosen)
        if task.part == "swap":
            return swap_part(self.models, data=data, progress=progress, **chosen,
                             limit_bytes=int(_STORED * psutil.virtual_memory().available))
        return forward_part(self.models[0], data, settings=LocateSettings(**chosen),
                            stage=stage_names(len(self.models))[0])

    # -- one part

    def run(self, task: Task, progress: Progress, seconds: float | None = None) -> None:
        """Measure one part and save it in its run folder.

        Args:
            task: Which.
            progress: Told how far it is.
            seconds: What the pass took that it shared with others, for its record.
        """
        from midblock.models.chain import stage_names

        if task.part == "correlate" and len([t for t in self.finished if t.part in _PER_DEPTH]) < 2:
            raise SettingsError(f"correlate needs at least two finished parts of {', '.join(_PER_DEPTH)}")
        models = self.models if task.needs_models else []
        data = None if task.data is None else self._sources(task.data)
        settings = {"models": self._specs, "data": task.data, "part_of_study": True, **self._load.model_dump(),
                    **arguments(task.part, self._settings, task.data)}
        with RunFolder(task.folder, command=task.part, settings=settings, resume=task.folder.exists(),
                       may_differ=STREAM_FIELDS) as run:
            names = stage_names(len(self._specs))
            if models:
                run.record_inputs(models={k: m.describe() for k, m in zip(names, models, strict=True)},
                                  data={} if data is None else data.describe())
            else:
                run.update(models={k: {"spec": s} for k, s in zip(names, self._specs, strict=True)})
            result = self._measure(task, models, data, progress)
            more = {} if seconds is None else {"shared_pass_seconds": round(seconds, 2)}
            save_result(run, result, fields={"counts": getattr(result, "counts", {}), **more}, progress=progress,
                        draw=save_figure if self._beside is None else partial(self._draw_beside, task))
        self.finished.append(task)

    def start(self, task: Task) -> Promise | None:
        """Begin a part that needs no models beside those that do; None where it must run here."""
        if self._beside is None or task.part != "weights":
            return None
        return self._beside.call(_run_alone, self._specs, self._load, self._settings, task)

    def _draw_beside(self, task: Task, fig: Figure, folder: Path, name: str) -> list[Path]:
        assert self._beside is not None
        try:
            self.drawn.append((task, self._beside.save_figure(fig, folder, name)))
        except (pickle.PicklingError, AttributeError, TypeError):  # a figure that cannot be sent
            return save_figure(fig, folder, name)
        return figure_paths(folder, name)

    def _measure(self, task: Task, models: list[Any], data: Any, progress: Progress) -> Any:
        if task.part == "weights":
            from midblock.analysis.weights import weights

            return weights(self._specs, progress=progress, **arguments(task.part, self._settings, None))
        if task.part == "correlate":
            from midblock.analysis.correlate import correlate

            # in the order of the parts, whichever ended first
            parts = sorted((t for t in self.finished if t.part in _PER_DEPTH), key=lambda t: t.part != "weights")
            return correlate([t.folder for t in parts], progress=progress)
        chosen = arguments(task.part, self._settings, task.data)
        if task.part == "gradients":
            from midblock.analysis.gradients import gradients

            found = self._backward[task.data] = gradients(models, data=data, progress=progress, **chosen)
            return found
        passed = self._passed.pop(task, None)
        if task.part == "locate":
            from midblock.selection.locate import locate

            return locate(models[0], data=data, progress=progress, **chosen,
                          forward=None if passed is None else passed.finish(),
                          backward=self._backward.pop(task.data, None))
        if passed is None:
            passed = self._part(task, progress)
            return passed.run(progress=progress)
        return passed.finish()


def _run_alone(specs: Sequence[str], load: ChainLoadSettings, settings: StudySettings, task: Task) -> float:
    """A part by itself; seconds."""
    started = time.perf_counter()
    with Chain(specs, load, settings, Sources(settings.seed)) as chain:
        chain.run(task, silent)
    return round(time.perf_counter() - started, 2)


def shared_groups(tasks: Sequence[Task]) -> Iterator[list[Task]]:
    """Tasks in their order, those of one data set together."""
    group: list[Task] = []
    for task in tasks:
        if group and task.data != group[0].data:
            yield group
            group = []
        group.append(task)
    if group:
        yield group
