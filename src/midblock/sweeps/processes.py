"""Workers of a sweep as processes on this machine: one for each GPU, or for a few cores each."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from midblock.errors import MidblockError
from midblock.models.memory import free_memory
from midblock.settings.sweep import SweepConfig
from midblock.sizes import usable_cores
from midblock.sweeps.arms import Job
from midblock.sweeps.data import SweepData
from midblock.sweeps.dispatch import LOOK_SECONDS, Heard, Place, Worker, WorkersEngine
from midblock.sweeps.worker import Servant, Task, identity

if TYPE_CHECKING:
    from multiprocessing.process import BaseProcess

    from midblock.models import LoadedModel

__all__ = ["ProcessesEngine", "default_workers", "serve", "task_of"]

_CORES_EACH = 2
_GRACE_SECONDS = 5.0


def default_workers(config: SweepConfig, loaded: LoadedModel, need: int = 0) -> int:
    """How many workers: one per GPU, else one for every two cores, as many as memory holds.

    Args:
        config: Its ``workers`` goes before.
        loaded: The base.
        need: Bytes of the largest run; a worker is counted as the weights twice and 1 GiB where that is more.
    """
    if config.workers:
        return config.workers
    if loaded.device.type == "cuda":
        return max(1, torch.cuda.device_count())
    size = sum(p.numel() * p.itemsize for p in loaded.model.parameters())
    by_memory = free_memory(loaded.device) // max(need, 2 * size + (1 << 30))
    return int(max(1, min(usable_cores() // _CORES_EACH, by_memory)))


def task_of(config: SweepConfig, trust: Mapping[str, bool] | None, threads: int, trackers: Path | None) -> Task:
    """What a worker of this process is told."""
    return Task(config.model_dump(mode="json", exclude_unset=True), dict(trust or {}), threads, str(Path.cwd()),
                None if trackers is None else str(trackers.resolve()))


@dataclass(frozen=True)
class _Link:
    process: BaseProcess
    pipe: Connection


class _Processes(Place):
    def __init__(self, workers: int, gpus: int, task: Task, work: Callable[..., None]) -> None:
        self.workers, self._gpus, self._task, self._work = workers, gpus, task, work
        self._context = multiprocessing.get_context("spawn")

    def start(self, worker: Worker) -> None:
        place = {"device": f"cuda:{worker.number % self._gpus}"} if self._gpus > 1 else {}
        ours, theirs = self._context.Pipe()
        process = self._context.Process(
            target=self._work, args=(theirs, replace(self._task, values=self._task.values | place), os.getpid()),
            name=f"midblock-worker-{worker.number}", daemon=True)
        process.start()
        theirs.close()
        worker.link = _Link(process, ours)

    def send(self, worker: Worker, job: Job) -> None:
        with contextlib.suppress(OSError):  # it has died: that is heard next
            worker.link.pipe.send(("job", job))

    def heard(self, workers: Sequence[Worker]) -> list[Heard]:
        by_source = {w.link.pipe: w for w in workers} | {w.link.process.sentinel: w for w in workers}
        found = {id(w): w for source in wait(list(by_source), timeout=LOOK_SECONDS) for w in (by_source[source],)}
        return [_news(w) for w in found.values()]

    def end(self, workers: Sequence[Worker]) -> None:
        for worker in workers:
            if worker.job is None:
                with contextlib.suppress(OSError):
                    worker.link.pipe.send(("stop", None))
            else:
                worker.link.process.terminate()
        deadline = time.monotonic() + _GRACE_SECONDS
        for worker in workers:
            process = worker.link.process
            process.join(max(0.0, deadline - time.monotonic()))
            if process.is_alive():
                process.kill()
                process.join()
            worker.link.pipe.close()

    def close(self) -> None:
        pass  # workers are all there is


def _news(worker: Worker) -> Heard:
    link: _Link = worker.link
    with contextlib.suppress(EOFError, OSError):
        if link.pipe.poll():
            kind, value = link.pipe.recv()
            return Heard(worker, kind, value)
    link.process.join(LOOK_SECONDS)
    link.pipe.close()
    code = link.process.exitcode
    how = f"signal {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"
    return Heard(worker, "dead", how)


class ProcessesEngine(WorkersEngine):
    """Workers as processes of this machine; see `midblock.sweeps.dispatch.WorkersEngine`.

    An error or a signal here stops them, and a worker whose parent is gone stops by itself.

    Args:
        config: The sweep; ``workers`` of it, or `default_workers`.
        loaded: The base, to compare with what the workers load.
        data: From `load_sweep_data`.
        trust: ``trust_remote_code`` and ``allow_pickle`` for the workers.
        needs: Bytes of each run by key.
        trackers: Folder of what ``report_to`` writes.
        work: What a worker runs; see `serve`.
    """

    def __init__(self, config: SweepConfig, loaded: LoadedModel, data: SweepData, *,
                 trust: Mapping[str, bool] | None = None, needs: Mapping[str, int] | None = None,
                 trackers: Path | None = None, work: Callable[..., None] | None = None) -> None:
        self.workers = default_workers(config, loaded, max((needs or {}).values(), default=0))
        gpus = torch.cuda.device_count() if loaded.device.type == "cuda" else 0
        own = torch.get_num_threads()
        threads = own if gpus else max(1, min(own, usable_cores() // self.workers))
        task = task_of(config, trust, threads, trackers)
        super().__init__(lambda: _Processes(self.workers, gpus, task, work or serve), identity(loaded, data), needs)


def serve(pipe: Connection, task: Task, parent: int) -> None:
    """What a worker does: load, say who it is, run what it is sent, until it is told to stop or its parent is gone.

    Args:
        pipe: To the engine.
        task: What it is told.
        parent: Process that started it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all: the engine decides
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    try:
        servant = Servant(task)
        pipe.send(("ready", servant.identity()))
        while (message := pipe.recv())[0] == "job":
            pipe.send(("record", servant.run(message[1])))
    except MidblockError as error:
        pipe.send(("error", error))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass  # nobody is there any more
    finally:
        pipe.close()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(LOOK_SECONDS)
    os._exit(1)
