"""Which worker runs which run of a sweep next, and what becomes of runs whose worker died."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Hashable, Mapping, Sequence

from midblock.sweeps.arms import BASE, Job

__all__ = ["RETRIES", "Schedule"]

RETRIES = 2
"""How often a run is tried again after its worker died."""


class Schedule:
    """Runs that share a frozen prefix go to one worker, as long as every worker has something to do.

    A worker stays with the arms of one first block until they are done; then it takes the largest group that nobody
    has, and when there is none it helps with the largest that is left.

    Args:
        jobs: The runs.
        needs: Bytes of each run by key.

    Example:
        >>> schedule = Schedule([Job(None, None, None)])
        >>> schedule.next("first worker").name, schedule.next("second worker")
        ('base', None)
    """

    def __init__(self, jobs: Sequence[Job], needs: Mapping[str, int] | None = None) -> None:
        self._groups: dict[int | str, deque[Job]] = {}
        self._need: dict[int | str, int] = {}
        for job in jobs:
            group = BASE if job.arm is None else job.arm.plan.first_block
            self._groups.setdefault(group, deque()).append(job)
            self._need[group] = max(self._need.get(group, 0), (needs or {}).get(job.key, 0))
        self._owner: dict[Hashable, int | str] = {}
        self._kept: dict[Hashable, Job] = {}
        self._again: deque[Job] = deque()
        self._deaths: Counter[str] = Counter()

    def claim(self, worker: Hashable) -> int:
        """Give a worker that is about to start a group; the bytes that its largest run needs."""
        if (free := self._largest_free()) is None:
            return max(self._need.values(), default=0)
        self._owner[worker] = free
        return self._need[free]

    def next(self, worker: Hashable) -> Job | None:
        """The worker's next run; None: there is none (but one that runs now may come back, see `lost`)."""
        if (kept := self._kept.pop(worker, None)) is not None:
            return kept
        if self._again:
            return self._again.popleft()
        if worker in self._owner and (own := self._groups[self._owner[worker]]):
            return own.popleft()
        self._owner.pop(worker, None)
        if (free := self._largest_free()) is not None:
            self._owner[worker] = free
            return self._groups[free].popleft()
        left = [jobs for jobs in self._groups.values() if jobs]
        return max(left, key=len).pop() if left else None  # its own worker goes on from the other end

    def _largest_free(self) -> int | str | None:
        """The largest group that has runs left and that nobody has."""
        held = set(self._owner.values())
        free = [group for group, jobs in self._groups.items() if jobs and group not in held]
        return max(free, key=lambda group: len(self._groups[group])) if free else None

    def keep(self, job: Job, worker: Hashable) -> None:
        """A run that was taken and not begun; the worker's next, when it asks again."""
        self._kept[worker] = job

    def lost(self, job: Job, worker: Hashable) -> int | None:
        """A worker died of, or during, a run: it is tried again by whoever asks next.

        Returns:
            Which attempt comes next (2, 3); None: it was tried often enough.
        """
        self._owner.pop(worker, None)
        self._deaths[job.key] += 1
        if self._deaths[job.key] > RETRIES:
            return None
        self._again.append(job)
        return self._deaths[job.key] + 1
