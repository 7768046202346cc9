"""Execution of a sweep's runs by several processes on this machine: one for each GPU, or for a few cores each."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from midblock.errors import MidblockError, SettingsError, TrainingError
from midblock.models.memory import free_memory
from midblock.progress import Progress, silent
from midblock.provenance import package_versions
from midblock.results import json_ready
from midblock.settings.sweep import SweepConfig
from midblock.sweeps.arms import Job
from midblock.sweeps.data import SweepData, load_sweep_data
from midblock.sweeps.engine import LocalEngine, weights_digest
from midblock.sweeps.records import RunRecord
from midblock.sweeps.schedule import RETRIES, Schedule

if TYPE_CHECKING:
    from multiprocessing.process import BaseProcess

    from midblock.models import LoadedModel

__all__ = ["ProcessesEngine", "default_workers", "serve"]

_STARTS = 3
"""Workers that may die before their first run, one after another, until the sweep gives up."""
_LOOK_SECONDS = 1.0
_CORES_EACH = 2


def default_workers(config: SweepConfig, loaded: LoadedModel) -> int:
    """How many workers: one per GPU, else one for every two cores, as many as memory holds.

    A worker is counted as its weights twice and 1 GiB; ``workers`` of the configuration goes before.
    """
    if config.workers:
        return config.workers
    if loaded.device.type == "cuda":
        return max(1, torch.cuda.device_count())
    size = sum(p.numel() * p.itemsize for p in loaded.model.parameters())
    by_memory = free_memory(loaded.device) // (2 * size + (1 << 30))
    return int(max(1, min((os.cpu_count() or 1) // _CORES_EACH, by_memory)))


@dataclass
class _Worker:
    """A process, and what it is doing."""

    number: int
    process: BaseProcess
    pipe: Connection
    job: Job | None = None
    ready: bool = False
    done: int = 0


class ProcessesEngine:
    """Runs handed out to worker processes, each with a `midblock.sweeps.LocalEngine` of its own.

    Arms with the same first block go to one worker, which keeps their prefix. A worker that dies is replaced, and its
    run tried again, at most twice; then the run is a failed one that says so. Whatever ends this process ends the
    workers: an error or a signal here stops them, and a worker whose parent is gone stops by itself.

    Args:
        config: The sweep; ``workers`` of it, or `default_workers`.
        loaded: The base, to compare with what the workers load.
        data: From `load_sweep_data`.
        trust: ``trust_remote_code`` and ``allow_pickle`` for the workers.
        work: What a worker runs; see `serve`.
    """

    def __init__(self, config: SweepConfig, loaded: LoadedModel, data: SweepData, *,
                 trust: dict[str, bool] | None = None, work: Callable[..., None] | None = None) -> None:
        self.config = config
        self.workers = default_workers(config, loaded)
        self._identity = identity(loaded, data)
        self._trust, self._work = trust or {}, work or serve
        self._gpus = torch.cuda.device_count() if loaded.device.type == "cuda" else 0
        self._context = multiprocessing.get_context("spawn")
        self._living: list[_Worker] = []
        self._stillborn = 0
        self.trackers: Path | None = None

    def run(self, jobs: Sequence[Job], finished: Callable[[RunRecord], None], *,
            progress: Progress = silent) -> None:
        """Run every job; see `midblock.sweeps.Engine`.

        Raises:
            SettingsError: a worker has other packages, weights or data than this process.
            TrainingError: workers die before they can begin, or weights did not survive a run.
            OutputError: a result could not be written.
        """
        schedule, left = Schedule(jobs), len(jobs)
        progress("sweep", 0, len(jobs), f"{self.workers} workers start")
        try:
            for number in range(min(self.workers, len(jobs))):
                self._start(number)
            while left:
                for worker in self._heard():
                    record = self._answer(worker, schedule)
                    if record is not None:
                        left -= 1
                        finished(record)
                        progress("sweep", len(jobs) - left, len(jobs), self._doing())
                for worker in self._living:
                    if worker.ready and worker.job is None and (job := schedule.next(worker.number)) is not None:
                        worker.job = job
                        with contextlib.suppress(OSError):  # it has died: that is heard next
                            worker.pipe.send(("job", job))
                progress("sweep", len(jobs) - left, len(jobs), self._doing())
        finally:
            self._stop()

    def _doing(self) -> str:
        names = sorted(w.job.name for w in self._living if w.job is not None)
        return ", ".join(names)

    def _start(self, number: int) -> None:
        place = {"device": f"cuda:{number % self._gpus}"} if self._gpus > 1 else {}
        config = self.config.model_dump(mode="json", exclude_unset=True) | place
        ours, theirs = self._context.Pipe()
        threads = max(1, torch.get_num_threads() if self._gpus else (os.cpu_count() or 1) // self.workers)
        process = self._context.Process(
            target=self._work, args=(theirs, config, self._trust, min(threads, torch.get_num_threads()), os.getpid(),
                                     self.trackers),
            name=f"midblock-worker-{number}", daemon=True)
        process.start()
        theirs.close()
        self._living.append(_Worker(number, process, ours))

    def _heard(self) -> list[_Worker]:
        """Workers that said something, or died."""
        by_source = {w.pipe: w for w in self._living} | {w.process.sentinel: w for w in self._living}
        return list({id(w): w for source in wait(list(by_source), timeout=_LOOK_SECONDS)
                     for w in (by_source[source],)}.values())  # type: ignore[index]

    def _answer(self, worker: _Worker, schedule: Schedule) -> RunRecord | None:
        kind, value = "dead", None  # type: str, Any
        with contextlib.suppress(EOFError, OSError):
            if worker.pipe.poll():
                kind, value = worker.pipe.recv()
        if kind == "ready":
            _compare(self._identity, value)
            worker.ready, self._stillborn = True, 0
        elif kind == "record":
            worker.job = None
            worker.done += 1
            return value  # type: ignore[no-any-return]
        elif kind == "error":
            raise value
        else:
            return self._bury(worker, schedule)
        return None

    def _bury(self, worker: _Worker, schedule: Schedule) -> RunRecord | None:
        """Replace a dead worker; the record of its run, if that was tried often enough."""
        worker.process.join(_LOOK_SECONDS)
        code = worker.process.exitcode
        how = f"signal {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"
        self._living.remove(worker)
        worker.pipe.close()
        if not worker.ready:
            self._stillborn += 1
            if self._stillborn >= _STARTS:
                raise TrainingError(f"{_STARTS} workers died one after another before they could begin ({how}); what "
                                    "they said stands above. Use fewer workers, or engine local.")
        job, worker.job = worker.job, None
        self._start(worker.number)
        if job is None or schedule.lost(job, worker.number) is not None:
            return None
        plan = None if job.arm is None else json_ready(job.arm.plan.to_dict())
        return RunRecord(arm=job.name, learning_rate=job.learning_rate, seed=job.seed, status="failed", plan=plan,
                         reason=f"its worker died {RETRIES + 1} times during this run, at last by {how} (too little "
                                "memory often ends so)")

    def _stop(self) -> None:
        for worker in self._living:
            if worker.job is None:
                with contextlib.suppress(OSError):
                    worker.pipe.send(("stop", None))
            else:
                worker.process.terminate()
        deadline = time.monotonic() + 5
        for worker in self._living:
            worker.process.join(max(0.0, deadline - time.monotonic()))
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()
            worker.pipe.close()
        self._living.clear()


def identity(loaded: LoadedModel, data: SweepData) -> dict[str, Any]:
    """What must be equal in all processes for their results to be of one sweep."""
    return {"packages": package_versions(), "weights": weights_digest(loaded.model),
            "data": data.describe()["fingerprint"]}


def _compare(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    if theirs["packages"] != ours["packages"]:
        differing = sorted(n for n in {*ours["packages"], *theirs["packages"]}
                           if ours["packages"].get(n) != theirs["packages"].get(n))
        told = ", ".join(f"{n} {theirs['packages'].get(n, 'absent')} against {ours['packages'].get(n, 'absent')}"
                         for n in differing[:4])
        raise SettingsError(f"a worker has other packages than this process ({told}); results of both would not be of "
                            "one sweep. Give all workers one environment.")
    for what, word in (("weights", "weights of the base"), ("data", "rows")):
        if theirs[what] != ours[what]:
            raise SettingsError(f"a worker found other {word} than this process (their digests differ); results of "
                                "both would not be of one sweep. Did the files change since the sweep began?")


def serve(pipe: Connection, values: dict[str, Any], trust: dict[str, bool], threads: int, parent: int,
          trackers: Path | None = None) -> None:
    """What a worker does: load, say who it is, run what it is sent, until it is told to stop or its parent is gone.

    Args:
        pipe: To the engine.
        values: The configuration.
        trust: For `midblock.load_model`.
        threads: Of PyTorch.
        parent: Process that started it.
        trackers: Folder of what ``report_to`` writes.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all: the engine decides
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    torch.set_num_threads(threads)
    try:
        from midblock.models import load_model

        config = SweepConfig(**values)
        data = load_sweep_data(config)
        loaded = load_model(config.model, **{**config.placement(), **trust})
        engine = LocalEngine(config, loaded, data)
        engine.trackers = trackers
        pipe.send(("ready", identity(loaded, data)))
        while (message := pipe.recv())[0] == "job":
            engine.run([message[1]], lambda record: pipe.send(("record", record)))
    except MidblockError as error:
        pipe.send(("error", error))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass  # nobody is there any more
    finally:
        pipe.close()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_LOOK_SECONDS)
    os._exit(1)
