"""Workers of a sweep as jobs of a Slurm cluster, submitted with submitit; they meet this process in a shared folder.

Each worker has a folder below the sweep's own, ``workers/CALL/NAME``. This process writes there which run is next;
the worker writes who it is, then records. Nothing but JSON files passes between them, and the folders are removed at
the end, unless a worker died: then Slurm's output of it is worth reading. A worker ends when it is told to, when
Slurm cancels it, or when this process has given no sign of life.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from midblock import errors
from midblock.errors import MidblockError, OutputError, SettingsError, TrainingError
from midblock.extras import require
from midblock.reading import read_json, shortened
from midblock.removing import remove_empty, remove_marked
from midblock.settings.base import name_of
from midblock.settings.sweep import SweepConfig
from midblock.sweeps.arms import Job, expand_arms, jobs_of
from midblock.sweeps.data import SweepData
from midblock.sweeps.dispatch import LOOK_SECONDS, Heard, Place, Worker, WorkersEngine
from midblock.sweeps.processes import task_of
from midblock.sweeps.records import read_record, write_record
from midblock.sweeps.worker import Servant, Task, identity
from midblock.writing import read_written, write_json, write_sealed

if TYPE_CHECKING:
    from midblock.models import LoadedModel

__all__ = ["SlurmEngine", "make_executor", "work_in"]

_POLL_SECONDS = 0.2
_SIGN_SECONDS = 5.0
PATIENCE_SECONDS = 180.0
"""A worker ends that has seen no sign of life for so long; file systems of clusters show changes late."""
_GONE_SECONDS = 20.0
_MARKER = "midblock-workers.json"
_ADVICE = "start the sweep again with --resume"


@dataclass
class _Link:
    box: Path
    job: Any
    ready: bool = False
    sent: int = 0
    taken: set[str] = field(default_factory=set)


class _Jobs(Place):
    limited = True

    def __init__(self, config: SweepConfig, task: Task, folder: Path, workers: int, gpu: bool) -> None:
        self.workers = workers
        self._task = task
        self._folder = folder / "workers" / uuid.uuid4().hex[:8]  # one a call: no worker may outlive its own
        self._died = False
        self._sign = self._folder / "alive.json"
        write_json(self._folder / _MARKER, {"made by": "midblock"})
        try:
            self._executor = make_executor(config, self._folder / "log", cpus_per_task=task.threads,
                                           **({"gpus_per_node": 1} if gpu else {}))
        except SettingsError:
            self._tidy()
            raise
        self._memory_is_given = any(k in config.slurm for k in ("mem_gb", "slurm_mem", "slurm_mem_per_cpu"))
        self._over = threading.Event()
        self._signs = threading.Thread(target=self._give_signs, daemon=True)
        self._signs.start()

    def _give_signs(self) -> None:
        count = 0
        while not self._over.is_set():
            count += 1
            with contextlib.suppress(OutputError, OSError):
                write_json(self._sign, {"count": count})
            self._over.wait(_SIGN_SECONDS)

    def start(self, worker: Worker) -> None:
        box = self._folder / f"{worker.number:03d}-{uuid.uuid4().hex[:8]}"
        box.mkdir()
        write_json(box / "task.json", {**asdict(self._task), "patience": PATIENCE_SECONDS})
        if worker.memory and not self._memory_is_given:
            self._executor.update_parameters(mem_gb=max(1, -(-worker.memory // (1 << 30))))
        try:
            job = self._executor.submit(work_in, str(box))
        except Exception as error:  # sbatch's own refusals come as submitit's and as subprocess's
            raise SettingsError(f"Slurm does not take the job of a worker: "
                                f"{shortened(' '.join(str(error).split()), 400)}") from None
        worker.link = _Link(box, job)

    def send(self, worker: Worker, job: Job) -> None:
        link: _Link = worker.link
        write_json(link.box / f"next-{link.sent:06d}.json", {"run": job.key})
        link.sent += 1

    def heard(self, workers: Sequence[Worker]) -> list[Heard]:
        deadline = time.monotonic() + LOOK_SECONDS
        while True:
            found = [news for w in workers if (news := self._news(w)) is not None]
            if found or time.monotonic() > deadline:
                return found
            time.sleep(_POLL_SECONDS)

    def _news(self, worker: Worker) -> Heard | None:
        link: _Link = worker.link
        gone = link.job.done()  # asked first: what it wrote before its end is there afterwards
        if (link.box / "error.json").is_file():
            told = read_written(link.box / "error.json", advice=_ADVICE)
            kind = getattr(errors, str(told.get("type")), TrainingError)
            return Heard(worker, "error", kind(str(told.get("text"))))
        if not link.ready and (link.box / "ready.json").is_file():
            link.ready = True
            return Heard(worker, "ready", read_written(link.box / "ready.json", advice=_ADVICE))
        if worker.job is not None and worker.job.key not in link.taken \
                and (link.box / "results" / f"{worker.job.key}.json").is_file():
            link.taken.add(worker.job.key)
            return Heard(worker, "record", read_record(link.box / "results" / f"{worker.job.key}.json"))
        if gone:
            self._died = True
            return Heard(worker, "dead", f"state {link.job.state} of job {link.job.job_id}, whose output is "
                                         f"{link.job.paths.stderr}")
        return None

    def end(self, workers: Sequence[Worker]) -> None:
        for worker in workers:
            link: _Link | None = worker.link
            if link is None:
                continue
            with contextlib.suppress(OutputError, OSError):
                write_json(link.box / "stop.json", {"now": worker.job is not None})
            if worker.job is not None or not link.ready:
                link.job.cancel(check=False)
        deadline = time.monotonic() + _GONE_SECONDS
        for worker in workers:
            link = worker.link
            while link is not None and not link.job.done(force_check=True) and time.monotonic() < deadline:
                time.sleep(_POLL_SECONDS)
            if link is not None and not link.job.done(force_check=True):
                link.job.cancel(check=False)

    def close(self) -> None:
        self._over.set()
        self._signs.join()
        self._tidy()

    def _tidy(self) -> None:
        """Remove what passed between processes, of killed calls too; Slurm's output stays where a worker died."""
        for marker in self._folder.parent.glob(f"*/{_MARKER}"):
            keeps = self._died and marker.parent == self._folder
            remove_marked(marker, [p for p in marker.parent.rglob("*") if not (keeps and p.parent.name == "log")],
                          folder=True)
        remove_empty(self._folder.parent)


def make_executor(config: SweepConfig, folder: Path, **options: Any) -> Any:
    """submitit's executor, with what the sweep says of Slurm; it makes its folder.

    Args:
        config: Its ``slurm`` goes before ``options``.
        folder: For the output of the jobs.
        options: In submitit's names.

    Raises:
        SettingsError: there is no such cluster, or no such option.
    """
    import submitit

    asked = dict(config.slurm)
    try:
        made = submitit.AutoExecutor(folder=folder, cluster=str(asked.pop("cluster", "slurm")))
        made.update_parameters(**{"name": config.name, "timeout_min": 24 * 60, **options, **asked})
    except (ValueError, NameError, TypeError, RuntimeError, AssertionError) as error:
        raise SettingsError(f"submitit does not take {name_of('slurm')}: "
                            f"{shortened(' '.join(str(error).split()), 400)}") from None
    return made


class SlurmEngine(WorkersEngine):
    """Workers as jobs of Slurm; see `midblock.sweeps.dispatch.WorkersEngine`.

    Args:
        config: The sweep: ``workers`` (0: one), ``cores`` of each, and ``slurm``, what submitit is told.
        loaded: The base, to compare with what the workers load.
        data: From `load_sweep_data`.
        folder: The sweep's run folder, on a disk that all nodes share.
        trust: ``trust_remote_code`` and ``allow_pickle`` for the workers.
        needs: Bytes of host memory of each run by key.
        trackers: Folder of what ``report_to`` writes.

    Raises:
        MissingExtraError: submitit is not installed.
    """

    def __init__(self, config: SweepConfig, loaded: LoadedModel, data: SweepData, *, folder: Path,
                 trust: Mapping[str, bool] | None = None, needs: Mapping[str, int] | None = None,
                 trackers: Path | None = None) -> None:
        require("submitit", "engine slurm")
        task = task_of(config, trust, config.cores or torch.get_num_threads(), trackers)
        gpu = loaded.device.type == "cuda"
        place: Callable[[], Place] = lambda: _Jobs(  # noqa: E731
            config, task, folder.resolve(), config.workers or 1, gpu)
        super().__init__(place, identity(loaded, data), needs)


# ---------------------------------------------------------------- in the worker

def work_in(box: str) -> None:
    """What a job does: load, say who it is, run what its folder names, until it is told to stop.

    Args:
        box: The worker's folder.
    """
    place = Path(box)
    told = read_json(place / "task.json")
    patience = float(told.pop("patience"))
    threading.Thread(target=_end_when_told, args=(place, patience), daemon=True).start()
    try:
        servant = Servant(Task(**told))
        jobs = {j.key: j for j in jobs_of(expand_arms(servant.config, servant.loaded), servant.config.seeds)}
        write_sealed(place / "ready.json", servant.identity())
        number = 0
        while not (place / "stop.json").is_file():
            asked = place / f"next-{number:06d}.json"
            if not asked.is_file():
                time.sleep(_POLL_SECONDS)
                continue
            write_record(place, servant.run(jobs[read_json(asked)["run"]]))
            number += 1
    except MidblockError as error:
        write_sealed(place / "error.json", {"type": type(error).__name__, "text": str(error)})


def _end_when_told(place: Path, patience: float) -> None:
    """End this process when its run is to be broken off, or when the main process gives no sign of life."""
    last, seen = None, time.monotonic()
    while True:
        time.sleep(LOOK_SECONDS)
        with contextlib.suppress(OSError, MidblockError):
            if (place / "stop.json").is_file() and read_json(place / "stop.json").get("now"):
                os._exit(1)
            sign = (place.parent / "alive.json").read_bytes()
            if sign != last:
                last, seen = sign, time.monotonic()
        if time.monotonic() - seen > patience:
            os._exit(1)
