"""What a worker process of a sweep runs in tests of faults; nothing heavy is imported before it is needed."""

from __future__ import annotations

import os
import signal
from multiprocessing.connection import Connection
from typing import Any


def stillborn(*_: Any) -> None:
    """A worker that does not come to anything."""
    os._exit(3)


def stranger(pipe: Connection, *_: Any) -> None:
    """A worker with another version of a package."""
    from midblock.provenance import package_versions

    pipe.send(("ready", {"packages": {**package_versions(), "torch": "0.1"}, "weights": "", "data": ""}))
    pipe.recv()


def dying(pipe: Connection, values: dict[str, Any], trust: dict[str, bool], threads: int, parent: int,
          trackers: Any) -> None:
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

    serve(Pipe(), values, trust, threads, parent, trackers)  # type: ignore[arg-type]
