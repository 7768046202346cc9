"""Which worker runs which run of a sweep next, and what becomes of runs whose worker died."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Hashable, Sequence

from midblock.sweeps.arms import Job

__all__ = ["RETRIES", "Schedule"]

RETRIES = 2
"""How often a run is tried again after its worker died."""


class Schedule:
    """Runs that share a frozen prefix go to one worker, as long as every worker has something to do.

    A worker stays with the arms of one first block until they are done; then it takes the largest group that nobody
    has, and when there is none it helps with the largest that is left.

    Args:
        jobs: The runs.

    Example:
        >>> schedule = Schedule([Job(None, None, None)])
        >>> schedule.next("first worker").name, schedule.next("second worker")
        ('base', None)
    """

    def __init__(self, jobs: Sequence[Job]) -> None:
        self._groups: dict[int | None, deque[Job]] = {}
        for job in jobs:
            self._groups.setdefault(None if job.arm is None else job.arm.plan.first_block, deque()).append(job)
        self._owner: dict[Hashable, int | None] = {}
        self._again: deque[Job] = deque()
        self._deaths: Counter[str] = Counter()

    def next(self, worker: Hashable) -> Job | None:
        """The worker's next run; None: there is none (but one that runs now may come back, see `lost`)."""
        if self._again:
            return self._again.popleft()
        own = self._owner.get(worker)
        if worker in self._owner and self._groups.get(own):
            return self._groups[own].popleft()
        self._owner.pop(worker, None)
        left = {first: jobs for first, jobs in self._groups.items() if jobs}
        if not left:
            return None
        held = set(self._owner.values())
        free = {first: jobs for first, jobs in left.items() if first not in held}
        first = max(free or left, key=lambda f: len(left[f]))
        if free:
            self._owner[worker] = first
            return left[first].popleft()
        return left[first].pop()  # its own worker goes on from the other end

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
