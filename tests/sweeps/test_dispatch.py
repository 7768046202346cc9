"""The loop that hands runs to workers, on a place without processes: memory by plan, retries, what is left."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from midblock.errors import SettingsError, TrainingError
from midblock.sweeps import Job
from midblock.sweeps.dispatch import Heard, Place, Worker, WorkersEngine
from midblock.sweeps.records import RunRecord

SAME = {"packages": {"torch": "2"}, "weights": "w", "data": "d"}


class Here(Place):
    """Workers that are done as soon as they are asked; ``dies`` says which runs end their worker."""

    limited = True

    def __init__(self, workers: int, dies: Callable[[Worker, Job], bool] = lambda worker, job: False,
                 identity: dict[str, Any] = SAME) -> None:
        self.workers, self._dies, self._identity = workers, dies, identity
        self.ran: list[tuple[str, int, int]] = []  # key, worker, its memory
        self.started: list[int] = []
        self.living: set[int] = set()
        self.closed = False

    def start(self, worker: Worker) -> None:
        worker.link = object()
        self.started.append(worker.memory)
        self.living.add(id(worker.link))

    def send(self, worker: Worker, job: Job) -> None:
        self.ran.append((job.key, worker.number, worker.memory))

    def heard(self, workers: Sequence[Worker]) -> list[Heard]:
        found = []
        for worker in workers:
            if not worker.ready:
                found.append(Heard(worker, "ready", self._identity))
            elif worker.job is not None and self._dies(worker, worker.job):
                self.living.discard(id(worker.link))
                found.append(Heard(worker, "dead", "lightning"))
            elif worker.job is not None:
                found.append(Heard(worker, "record", RunRecord(worker.job.name, worker.job.learning_rate,
                                                               worker.job.seed, "done")))
        return found

    def end(self, workers: Sequence[Worker]) -> None:
        self.living -= {id(w.link) for w in workers}

    def close(self) -> None:
        self.closed = True


def run(place: Here, jobs: Sequence[Job], needs: dict[str, int] | None = None) -> list[RunRecord]:
    records: list[RunRecord] = []
    try:
        WorkersEngine(lambda: place, SAME, needs).run(jobs, records.append)
    finally:
        assert place.closed
        assert not place.living  # whatever happens, nobody is left
    return records


@pytest.fixture
def jobs(engine_parts: tuple[Any, Any, Any, list[Job]]) -> list[Job]:
    return engine_parts[3]


@pytest.mark.parametrize("workers", [1, 2, 7])
def test_every_run_has_the_memory_that_it_needs(jobs: list[Job], workers: int) -> None:
    needs = {job.key: 10 if job.arm is None else 100 * (1 + job.arm.plan.first_block) for job in jobs}
    place = Here(workers)
    records = run(place, jobs, needs)
    assert sorted(r.key for r in records) == sorted(j.key for j in jobs)
    assert Counter(key for key, _, _ in place.ran) == Counter(j.key for j in jobs)
    assert all(memory >= needs[key] for key, _, memory in place.ran)
    if workers == 1:  # one worker after another, each larger than the last
        assert place.started == sorted(set(place.started))
        assert max(place.started) == max(needs.values())


def test_a_run_is_tried_three_times_and_the_others_go_on(jobs: list[Job]) -> None:
    bad = jobs[3].key
    place = Here(2, dies=lambda worker, job: job.key == bad)
    records = {r.key: r for r in run(place, jobs)}
    assert sum(key == bad for key, _, _ in place.ran) == 3
    assert records[bad].status == "failed"
    assert "died 3 times during this run, at last by lightning" in records[bad].reason
    assert {r.status for k, r in records.items() if k != bad} == {"done"}


def test_one_death_changes_nothing(jobs: list[Job]) -> None:
    dead: list[str] = []

    def once(worker: Worker, job: Job) -> bool:
        if job.key == jobs[2].key and not dead:
            dead.append(job.key)
            return True
        return False

    place = Here(3, dies=once)
    assert {r.key: r.status for r in run(place, jobs)} == {j.key: "done" for j in jobs}
    assert len(place.ran) == len(jobs) + 1


def test_strangers_and_interruptions_leave_nobody(jobs: list[Job]) -> None:
    with pytest.raises(SettingsError, match="other weights of the base than this process"):
        run(Here(2, identity={**SAME, "weights": "x"}), jobs)

    def interrupted(worker: Worker, job: Job) -> bool:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(Here(2, dies=interrupted), jobs)


def test_workers_that_never_begin_end_the_sweep(jobs: list[Job]) -> None:
    class Stillborn(Here):
        def heard(self, workers: Sequence[Worker]) -> list[Heard]:
            self.living.discard(id(workers[0].link))
            return [Heard(workers[0], "dead", "nothing")]

    with pytest.raises(TrainingError, match=r"3 workers died .* before they could begin \(nothing\)"):
        run(Stillborn(2), jobs)


def test_a_group_stays_with_its_worker(jobs: list[Job]) -> None:
    place = Here(2)
    run(place, jobs)
    firsts = {j.key: None if j.arm is None else j.arm.plan.first_block for j in jobs}
    for number in (0, 1):
        order = [firsts[key] for key, worker, _ in place.ran if worker == number]
        changes = sum(a != b for a, b in itertools.pairwise(order))
        assert changes <= len(set(order)) + 1
