"""Runs of a sweep handed out to workers, wherever they are: who runs what next, and what happens when one dies.

`WorkersEngine` is the one loop; a `Place` knows how workers are started, told and heard on one kind of system
(`midblock.sweeps.processes`, ``on_ray``, ``on_slurm``).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from midblock.errors import TrainingError
from midblock.progress import Progress, silent
from midblock.results import json_ready
from midblock.sweeps.arms import Job
from midblock.sweeps.records import RunRecord
from midblock.sweeps.schedule import RETRIES, Schedule
from midblock.sweeps.worker import compare

__all__ = ["LOOK_SECONDS", "Heard", "Place", "Worker", "WorkersEngine"]

LOOK_SECONDS = 1.0
"""How long a place waits for news at most."""
_STARTS = 3
"""Workers that may die before their first run, one after another, until the sweep gives up."""


@dataclass(eq=False)
class Worker:
    """One worker, and what it is doing."""

    number: int
    memory: int = 0
    """Bytes that it was given; 0: as much as there is."""
    job: Job | None = None
    ready: bool = False
    link: Any = field(default=None, repr=False)
    """What its place needs to reach it."""


@dataclass(frozen=True)
class Heard:
    """News of a worker.

    ``value`` is its identity (ready), a `RunRecord` (record), the exception that ended it (error), or how it died.
    """

    worker: Worker
    kind: Literal["ready", "record", "error", "dead"]
    value: Any


class Place(ABC):
    """Where workers run."""

    workers: int
    """How many there are to be at once."""
    limited: bool = False
    """Whether a worker gets a fixed amount of memory, so that one with more must take its place for a larger run."""

    @abstractmethod
    def start(self, worker: Worker) -> None:
        """Start it; it is heard of when it is ready."""

    @abstractmethod
    def send(self, worker: Worker, job: Job) -> None:
        """Let a ready worker run a job; that it is dead is heard next, and no error here."""

    @abstractmethod
    def heard(self, workers: Sequence[Worker]) -> list[Heard]:
        """News, waited for at most `LOOK_SECONDS`; one piece a worker."""

    @abstractmethod
    def end(self, workers: Sequence[Worker]) -> None:
        """End workers, whatever they do, and return when they are gone."""

    @abstractmethod
    def close(self) -> None:
        """Give back what the place itself holds."""


class WorkersEngine:
    """An engine (`midblock.sweeps.Engine`) whose runs are those of workers elsewhere.

    Arms with the same first block go to one worker, which keeps their prefix. A worker that dies is replaced, and its
    run tried again by whoever is free, at most twice; then the run is a failed one that says so. Whatever ends this
    process ends the workers.

    Args:
        place: Where they run.
        identity: `midblock.sweeps.worker.identity` of this process.
        needs: Bytes of memory for each run by key; a place that gives workers a fixed amount gives them this much.
    """

    def __init__(self, place: Callable[[], Place], identity: dict[str, Any],
                 needs: Mapping[str, int] | None = None) -> None:
        self._make, self._identity, self._needs = place, identity, needs or {}
        self._place: Place | None = None
        self._living: list[Worker] = []
        self._stillborn = 0

    def run(self, jobs: Sequence[Job], finished: Callable[[RunRecord], None], *,
            progress: Progress = silent) -> None:
        """Run every job; see `midblock.sweeps.Engine`.

        Raises:
            SettingsError: a worker has other packages, weights or data than this process, or the place cannot be had.
            TrainingError: workers die before they can begin, or weights did not survive a run.
            OutputError: a result could not be written.
        """
        schedule, left = Schedule(jobs, self._needs), len(jobs)
        progress("sweep", 0, left, "workers start")
        place = self._place = self._make()
        try:
            for number in range(min(place.workers, len(jobs))):
                self._start(place, number, schedule.claim(number))
            while left:
                for news in place.heard(self._living):
                    record = self._answer(place, news, schedule)
                    if record is not None:
                        left -= 1
                        finished(record)
                self._hand_out(place, schedule)
                progress("sweep", len(jobs) - left, len(jobs), self._doing())
        finally:
            try:
                place.end(self._living)
            finally:
                self._living.clear()
                place.close()

    def _doing(self) -> str:
        return ", ".join(sorted(w.job.name for w in self._living if w.job is not None))

    def _start(self, place: Place, number: int, memory: int) -> None:
        worker = Worker(number, memory)
        self._living.append(worker)
        place.start(worker)

    def _hand_out(self, place: Place, schedule: Schedule) -> None:
        for worker in list(self._living):
            if not worker.ready or worker.job is not None or (job := schedule.next(worker.number)) is None:
                continue
            need = self._needs.get(job.key, 0)
            if place.limited and need > worker.memory:
                schedule.keep(job, worker.number)
                place.end([worker])
                self._living.remove(worker)
                self._start(place, worker.number, need)
                continue
            worker.job = job
            place.send(worker, job)

    def _answer(self, place: Place, news: Heard, schedule: Schedule) -> RunRecord | None:
        worker = news.worker
        if news.kind == "ready":
            compare(self._identity, news.value)
            worker.ready, self._stillborn = True, 0
        elif news.kind == "record":
            worker.job = None
            return news.value  # type: ignore[no-any-return]
        elif news.kind == "error":
            raise news.value
        else:
            return self._bury(place, worker, str(news.value), schedule)
        return None

    def _bury(self, place: Place, worker: Worker, how: str, schedule: Schedule) -> RunRecord | None:
        """Replace a dead worker; the record of its run, if that was tried often enough."""
        self._living.remove(worker)
        if not worker.ready:
            self._stillborn += 1
            if self._stillborn >= _STARTS:
                raise TrainingError(f"{_STARTS} workers died one after another before they could begin ({how}); what "
                                    "they said stands above. Use fewer workers, or engine local.")
        job, memory = worker.job, worker.memory
        again = job is not None and schedule.lost(job, worker.number) is not None
        self._start(place, worker.number, memory)
        if job is None or again:
            return None
        plan = None if job.arm is None else json_ready(job.arm.plan.to_dict())
        return RunRecord(arm=job.name, learning_rate=job.learning_rate, seed=job.seed, status="failed", plan=plan,
                         reason=f"its worker died {RETRIES + 1} times during this run, at last by {how} (too little "
                                "memory often ends so)")
