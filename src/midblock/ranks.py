"""One job of several processes, as ``torchrun`` or ``accelerate launch`` start them: each takes a share of the work.

The first process writes and speaks; the others follow, and all do the same steps in the same order. Nothing here has
an effect before `joined`: the program enters it by itself where it was started so, a script of one's own says so. What
passes between processes goes through gloo, from memory to memory, whatever the devices are.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from midblock.errors import MidblockError, PeerError

__all__ = ["asked", "everybody", "first", "follows", "joined", "rank", "share", "size", "to_first"]

T = TypeVar("T")

_WORDS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_LONGEST = timedelta(hours=48)
"""A process waits so long for one that works; one that has died is noticed at once, as its connection closes."""


@dataclass(frozen=True)
class _Job:
    rank: int
    size: int
    group: Any


_alone = _Job(0, 1, None)
_job = _alone


def asked() -> tuple[int, int] | None:
    """(number of this process, number of processes) where a launcher started several; None for one process."""
    try:
        own, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    except (KeyError, ValueError):
        return None
    return (own, size) if size > 1 and all(os.environ.get(word) for word in _WORDS) else None


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Within the context the processes of this job share the work; nothing changes where there is one only.

    Raises:
        PeerError: the others cannot be reached, or have ended.
    """
    global _job
    wanted = asked()
    if wanted is None or _job.size > 1:
        yield
        return
    import torch
    from torch import distributed

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    with _peers():
        if not distributed.is_initialized():
            distributed.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
                                           timeout=_LONGEST)
        _job = _Job(*wanted, distributed.new_group(backend="gloo", timeout=_LONGEST))
    try:
        yield
    except RuntimeError as error:  # of a collective within the model or the training
        if isinstance(error, distributed.DistError) or "gloo" in str(error):
            raise _lost(error) from None
        raise
    finally:
        _job = _alone


def rank() -> int:
    """Number of this process in the job."""
    return _job.rank


def size() -> int:
    """How many processes share the work."""
    return _job.size


def follows() -> bool:
    """Whether another process writes and speaks for this one."""
    return _job.rank > 0


def share(items: Sequence[T]) -> list[T]:
    """This process's part: every n-th, so that what is sorted by size is shared evenly.

    Example:
        >>> share([1, 2, 3])  # one process
        [1, 2, 3]
    """
    return list(items[_job.rank::_job.size])


def first(function: Callable[[], T]) -> T:
    """What the first process finds, in all of them; an error of its own is raised in all of them too.

    Args:
        function: Called in the first process only; what it returns is sent as a pickle.

    Raises:
        MidblockError: as the function.
        PeerError: a process has ended.
    """
    if _job.size == 1:
        return function()
    found: Any = None
    error: MidblockError | None = None
    if _job.rank == 0:
        try:
            found = function()
        except MidblockError as problem:
            error = problem
    told = [(found, error)]
    from torch import distributed

    with _peers():
        distributed.broadcast_object_list(told, src=0, group=_job.group)
    found, error = told[0]
    if error is not None:
        raise error
    return found  # type: ignore[no-any-return]


def everybody(value: T) -> list[T]:
    """The value of every process, in their order.

    Raises:
        PeerError: a process has ended.
    """
    if _job.size == 1:
        return [value]
    from torch import distributed

    found: list[Any] = [None] * _job.size
    with _peers():
        distributed.all_gather_object(found, value, group=_job.group)
    return found


def to_first(value: T) -> list[T]:
    """The value of every process in the first one, which is sent them; nothing in the others.

    Raises:
        PeerError: a process has ended.
    """
    if _job.size == 1:
        return [value]
    from torch import distributed

    found: list[Any] = [None] * _job.size if _job.rank == 0 else []
    with _peers():
        distributed.gather_object(value, found if _job.rank == 0 else None, dst=0, group=_job.group)
    return found


@contextlib.contextmanager
def _peers() -> Iterator[None]:
    """gloo's errors (a closed connection, a time limit) in our words."""
    try:
        yield
    except (RuntimeError, ValueError, OSError) as error:
        raise _lost(error) from None


def _lost(error: Exception) -> PeerError:
    return PeerError(f"process {os.environ.get('RANK')} of {os.environ.get('WORLD_SIZE')} lost the others "
                     f"({' '.join(str(error).split())[:200]}). One of them has ended: what it said stands above, or in "
                     "the launcher's report.")
