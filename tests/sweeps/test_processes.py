"""Sweeps by worker processes: the records of one process, dead workers, no orphans, other files refused."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from midblock.errors import SettingsError, TrainingError
from midblock.models import load_model
from midblock.sweeps import (
    Job,
    ProcessesEngine,
    dump_config,
    expand_arms,
    jobs_of,
    load_sweep_data,
    parse_config,
    sweep,
)
from midblock.sweeps.records import RunRecord
from midblock.sweeps.schedule import Schedule
from sweep_helpers import assert_resumes, driver_with_a_result, outcome, tiny_values
from worker_helpers import dying, stillborn, stranger


def children() -> list[psutil.Process]:
    found = []
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            if "spawn_main" in " ".join(child.cmdline()):
                found.append(child)
    return found


def test_a_killed_worker_changes_nothing(planned: dict[str, Any], tmp_path: Path) -> None:
    """Two workers; one is killed in the middle of a run; the records are those of one process."""
    killed: list[int] = []

    def listener(state: Any) -> None:
        if len(state.records) == 1 and not killed:
            victim = children()[0]
            os.kill(victim.pid, signal.SIGKILL)
            killed.append(victim.pid)

    config = parse_config({**planned["values"], "engine": "processes"})
    result = sweep(config, out=tmp_path / "out", listener=listener)
    assert killed
    assert {r.key: outcome(r) for r in result.records} == planned["local"]
    assert not children()
    again = sweep(parse_config(planned["values"]), out=tmp_path / "out", resume=True)  # the other engine: all is there
    assert {r.key: outcome(r) for r in again.records} == planned["local"]


@pytest.mark.slow
def test_a_run_that_kills_its_workers_fails_after_three(engine_parts: tuple[Any, Any, Any, list[Job]],
                                                        planned: dict[str, Any]) -> None:
    config, loaded, data, jobs = engine_parts
    records: list[RunRecord] = []
    ProcessesEngine(config, loaded, data, work=dying).run(jobs, records.append)
    by_key = {r.key: r for r in records}
    failed = by_key.pop("00100__lr0.01__seed1")
    assert failed.status == "failed"
    assert "worker died 3 times" in failed.reason
    assert "SIGKILL" in failed.reason
    assert {k: outcome(r) for k, r in by_key.items()} == {
        k: v for k, v in planned["local"].items() if k != failed.key}
    assert not children()


@pytest.mark.slow
def test_workers_that_cannot_begin_end_the_sweep(engine_parts: tuple[Any, Any, Any, list[Job]]) -> None:
    config, loaded, data, jobs = engine_parts
    with pytest.raises(TrainingError, match=r"3 workers died .* before they could begin \(exit code 3\)"):
        ProcessesEngine(config, loaded, data, work=stillborn).run(jobs, lambda record: None)
    with pytest.raises(SettingsError, match=r"other packages than this process .*torch 0\.1 against"):
        ProcessesEngine(config, loaded, data, work=stranger).run(jobs, lambda record: None)
    assert not children()


@pytest.mark.slow
def test_workers_with_other_files_are_refused(planned: dict[str, Any], tmp_path: Path) -> None:
    values = tiny_values(tmp_path)
    config = parse_config({**values, "workers": 1})
    loaded = load_model(config.model, dtype="float32", device="cpu")
    data = load_sweep_data(config)
    jobs = jobs_of(expand_arms(config, loaded), config.seeds)
    engine = ProcessesEngine(config, loaded, data)
    path = Path(values["train"]["data"])
    path.write_text(path.read_text().replace("number 3 ", "number 33 "), encoding="utf-8")
    with pytest.raises(SettingsError, match="other rows than this process"):
        engine.run(jobs, lambda record: None)
    assert not children()


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_no_worker_outlives_the_driver_and_resume_goes_on(planned: dict[str, Any], tmp_path: Path, how: int) -> None:
    config = parse_config({**planned["values"], "engine": "processes"})
    (tmp_path / "sweep.yaml").write_text(dump_config(config), encoding="utf-8")
    command = [sys.executable, "-m", "midblock", "sweep", str(tmp_path / "sweep.yaml"), "--out", str(tmp_path / "out"),
               "--quiet"]
    driver, before = driver_with_a_result(command, tmp_path / "out", 120)
    workers = [c for c in driver.children(recursive=True) if "spawn_main" in " ".join(c.cmdline())]
    assert workers
    driver.send_signal(how)
    driver.wait(30)
    _, alive = psutil.wait_procs(workers, timeout=15)
    assert not alive
    assert_resumes(command, tmp_path / "out", before, planned["local"])


def test_a_group_stays_with_its_worker_and_nobody_is_idle(planned: dict[str, Any],
                                                          engine_parts: tuple[Any, Any, Any, list[Job]]) -> None:
    *_, jobs = engine_parts
    schedule = Schedule(jobs)
    firsts: dict[int, list[int | None]] = {0: [], 1: []}
    taken = []
    for turn in range(len(jobs)):
        job = schedule.next(turn % 2)
        assert job is not None
        taken.append(job.key)
        firsts[turn % 2].append(None if job.arm is None else job.arm.plan.first_block)
    assert sorted(taken) == sorted(j.key for j in jobs)
    assert schedule.next(0) is None
    for order in firsts.values():  # each changes its group at most as often as there are groups
        assert sum(a != b for a, b in itertools.pairwise(order)) <= 2


def test_scheduling_of_ten_thousand_runs(engine_parts: tuple[Any, Any, Any, list[Job]]) -> None:
    *_, jobs = engine_parts
    arms = [j.arm for j in jobs if j.arm is not None]
    many = [Job(arms[i % len(arms)], 0.1, i) for i in range(10_000)]
    start = time.perf_counter()
    schedule = Schedule(many)
    seen = set()
    turn = 0
    while (job := schedule.next(turn % 8)) is not None:
        if job.seed == 77 and job.key not in seen:
            seen.add(job.key)
            assert schedule.lost(job, turn % 8) == 2
            continue
        seen.add(job.key)
        turn += 1
    assert len(seen) == 10_000
    assert (time.perf_counter() - start) / 10_000 < 0.005
