"""What a worker process of a sweep runs in tests of faults; nothing heavy is imported before it is needed."""

from __future__ import annotations

import os
import signal
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any


def stillborn(*_: Any) -> None:
    """A worker that does not come to anything."""
    os._exit(3)


def stranger(pipe: Connection, *_: Any) -> None:
    """A worker with another version of a package."""
    from midblock.provenance import package_versions

    pipe.send(("ready", {"packages": {**package_versions(), "torch": "0.1"}, "weights": "", "data": ""}))
    pipe.recv()


def dying(pipe: Connection, task: Any, parent: int) -> None:
    """A worker that one of the runs kills."""
    from midblock.sweeps.processes import serve

    class Pipe:
        def __getattr__(self, name: str) -> Any:
            return getattr(pipe, name)

        def recv(self) -> Any:
            message = pipe.recv()
            if message[0] == "job" and message[1].key == "00100__lr0.01__seed1":
                os.kill(os.getpid(), signal.SIGKILL)
            return message

    serve(Pipe(), task, parent)  # type: ignore[arg-type]


class Lingering:
    """A Ray worker that, on one node, does not come to the end of its first run: the node can be killed meanwhile.

    ``MIDBLOCK_TEST_NODE`` names the node; the file ``MIDBLOCK_TEST_MARK`` says that the run has begun.
    """

    def __init__(self, task: Any) -> None:
        from midblock.sweeps.on_ray import RayWorker

        self._own = RayWorker(task)

    def begin(self) -> tuple[str, Any]:
        return self._own.begin()

    def work(self, job: Any) -> tuple[str, Any]:
        import ray

        if ray.get_runtime_context().get_node_id() == os.environ["MIDBLOCK_TEST_NODE"]:
            Path(os.environ["MIDBLOCK_TEST_MARK"]).write_text(job.key, encoding="utf-8")
            time.sleep(300)
        return self._own.work(job)


class Beginner(Lingering):
    """The same, while it loads."""

    def begin(self) -> tuple[str, Any]:
        Path(os.environ["MIDBLOCK_TEST_MARK"]).write_text("begins", encoding="utf-8")
        time.sleep(300)
        return self._own.begin()


class Stranger:
    """A Ray worker with another version of a package."""

    def __init__(self, task: Any) -> None:
        pass

    def begin(self) -> tuple[str, Any]:
        from midblock.provenance import package_versions

        return "ready", {"packages": {**package_versions(), "torch": "0.1"}, "weights": "", "data": ""}
