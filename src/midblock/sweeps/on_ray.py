"""Workers of a sweep on a Ray cluster: one that runs already, or one that is started here for the sweep.

A worker is an actor, whose calls are Ray Core tasks that share what it has loaded: the base, the rows, the cached
prefix. Ray places it by the cores, the memory and the GPUs that its largest run needs.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from midblock.errors import MidblockError, SettingsError
from midblock.extras import require
from midblock.reading import shortened
from midblock.settings.base import name_of
from midblock.settings.sweep import SweepConfig
from midblock.sweeps.arms import Job
from midblock.sweeps.data import SweepData
from midblock.sweeps.dispatch import LOOK_SECONDS, Heard, Place, Worker, WorkersEngine
from midblock.sweeps.processes import task_of
from midblock.sweeps.worker import Servant, Task, identity

if TYPE_CHECKING:
    from midblock.models import LoadedModel

__all__ = ["RayEngine", "RayWorker", "require_answer"]

_OURS = ("MIDBLOCK_", "HF_", "HUGGINGFACE_", "OMP_", "TOKENIZERS_")
_GONE_SECONDS = 10.0
_KNOCK_SECONDS = 10.0


class RayWorker:
    """The actor: what it answers is the kind and value of a `midblock.sweeps.dispatch.Heard`."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._servant: Servant | None = None

    def begin(self) -> tuple[str, Any]:
        """Load everything; who this worker is."""
        try:
            self._servant = Servant(self._task)
            return "ready", self._servant.identity()
        except MidblockError as error:
            return "error", error

    def work(self, job: Job) -> tuple[str, Any]:
        """One run."""
        assert self._servant is not None
        try:
            return "record", self._servant.run(job)
        except MidblockError as error:
            return "error", error


class _Cluster(Place):
    limited = True

    def __init__(self, config: SweepConfig, task: Task, gpu: bool, needs: Mapping[str, int], actor: type) -> None:
        import ray

        self._ray: Any = ray
        self._actor = actor
        self._task = task
        self._own = not ray.is_initialized()
        if self._own:
            _connect(config.address)
        self._gpus = 1 if gpu else 0
        try:
            self.workers = self._room(max(needs.values(), default=0), config.workers)
        except BaseException:
            self.close()
            raise

    def _room(self, need: int, wanted: int) -> int:
        """How many workers of the largest kind fit at once; ``wanted`` where that is given.

        Raises:
            SettingsError: not one fits on any node.
        """
        cores = self._task.threads
        nodes = [n["Resources"] for n in self._ray.nodes() if n["Alive"]]
        fits = [int(min(n.get("CPU", 0) // cores, n.get("memory", 0) // max(need, 1),
                        n.get("GPU", 0) // self._gpus if self._gpus else 1 << 30)) for n in nodes]
        if not any(fits):
            largest: dict[str, float] = max(nodes, key=lambda n: n.get("memory", 0), default={})
            raise SettingsError(
                f"a worker needs {cores} cores, {need / 1e9:.1f} GB of memory and {self._gpus} GPUs, and no node of "
                f"the Ray cluster has them (the largest of {len(nodes)}: {largest.get('CPU', 0):g} cores, "
                f"{largest.get('memory', 0) / 1e9:.1f} GB, {largest.get('GPU', 0):g} GPUs). Use smaller arms or "
                f"batches, fewer cores ({name_of('cores')}), or another cluster.")
        return wanted or sum(fits)

    def start(self, worker: Worker) -> None:
        environment = {n: v for n, v in os.environ.items() if n.startswith(_OURS)}
        made = self._ray.remote(self._actor).options(
            num_cpus=self._task.threads, num_gpus=self._gpus, memory=worker.memory or None, max_restarts=0,
            max_task_retries=0, runtime_env={"env_vars": environment})
        actor = made.remote(self._task)
        worker.link = [actor, actor.begin.remote()]

    def send(self, worker: Worker, job: Job) -> None:
        worker.link[1] = worker.link[0].work.remote(job)

    def heard(self, workers: Sequence[Worker]) -> list[Heard]:
        waited = {w.link[1]: w for w in workers if w.link[1] is not None}
        if not waited:
            return []
        done, _ = self._ray.wait(list(waited), num_returns=1, timeout=LOOK_SECONDS)
        if not done and not any(w.job for w in workers):  # they wait for a place: nodes may be gone since
            self._room(min(w.memory for w in waited.values()), 0)
        return [self._news(waited[call], call) for call in done]

    def _news(self, worker: Worker, call: Any) -> Heard:
        worker.link[1] = None
        try:
            kind, value = self._ray.get(call)
        except self._ray.exceptions.RayError as error:  # of the actor, of its node, or of what it raised
            self._kill(worker)
            told = [line.strip() for line in str(error).splitlines() if line.strip()]
            return Heard(worker, "dead", f"{type(error).__name__}: {shortened(told[-1] if told else '', 300)}")
        return Heard(worker, kind, value)

    def _kill(self, worker: Worker) -> None:
        with contextlib.suppress(Exception):  # dead, or Ray itself is gone
            self._ray.kill(worker.link[0], no_restart=True)

    def end(self, workers: Sequence[Worker]) -> None:
        for worker in workers:
            self._kill(worker)
        pending = [w.link[1] for w in workers if w.link[1] is not None]
        if pending:  # a killed actor's call ends with an error, once it is gone
            with contextlib.suppress(self._ray.exceptions.RayError):
                self._ray.wait(pending, num_returns=len(pending), timeout=_GONE_SECONDS)

    def close(self) -> None:
        if self._own:
            with _signals_kept():
                self._ray.shutdown()


@contextlib.contextmanager
def _signals_kept() -> Iterator[None]:
    """Ray sets a handler of SIGTERM of its own; this process keeps the one that it has."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _connect(address: str | None) -> None:
    """Connect to a cluster, or start one on this machine.

    Raises:
        SettingsError: nothing answers there.
    """
    import ray

    require_answer(address)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    more: dict[str, Any] = {"include_dashboard": False} if address is None else {}
    try:
        with _signals_kept():
            ray.init(address=address or "local", log_to_driver=False, logging_level=logging.ERROR,
                     namespace="midblock", **more)
    except (ConnectionError, RuntimeError, ValueError, TimeoutError, ImportError) as error:
        with contextlib.suppress(Exception):
            ray.shutdown()
        raise _silent(address, error) from None


def require_answer(address: str | None) -> None:
    """Ask whether anything listens at an address; Ray itself tries for many minutes.

    Raises:
        SettingsError: nothing does, or it is no address.
    """
    if address in (None, "auto", "local"):
        return
    assert address is not None
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise SettingsError(f"{shortened(address)} is not the address of a Ray cluster; write {name_of('address')} as "
                            "HOST:PORT (6379 by default), or auto.")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_KNOCK_SECONDS).close()
    except OSError as error:
        raise _silent(address, error) from None


def _silent(address: str | None, error: Exception) -> SettingsError:
    where = "a Ray cluster on this machine" if address is None else f"the Ray cluster at {address}"
    return SettingsError(f"{where} does not answer: {shortened(' '.join(str(error).split()), 300)}. Start it with "
                         f"`ray start --head`, or leave out {name_of('address')} for one on this machine.")


class RayEngine(WorkersEngine):
    """Workers on a Ray cluster; see `midblock.sweeps.dispatch.WorkersEngine`.

    Args:
        config: The sweep: ``address`` of a cluster (unset: one on this machine, ended with the sweep), ``workers`` (0:
            as many as fit), ``cores`` of each (0: the threads of this process, which make its results equal).
        loaded: The base, to compare with what the workers load.
        data: From `load_sweep_data`.
        trust: ``trust_remote_code`` and ``allow_pickle`` for the workers.
        needs: Bytes of host memory of each run by key.
        trackers: Folder of what ``report_to`` writes.
        actor: Class of the workers.

    Raises:
        MissingExtraError: Ray is not installed.
    """

    def __init__(self, config: SweepConfig, loaded: LoadedModel, data: SweepData, *,
                 trust: Mapping[str, bool] | None = None, needs: Mapping[str, int] | None = None,
                 trackers: Path | None = None, actor: type = RayWorker) -> None:
        require("ray", "engine ray")
        task = task_of(config, trust, config.cores or torch.get_num_threads(), trackers)
        place: Callable[[], Place] = lambda: _Cluster(  # noqa: E731
            config, task, loaded.device.type == "cuda", needs or {}, actor)
        super().__init__(place, identity(loaded, data), needs)
