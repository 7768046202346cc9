"""What handing out 10,000 runs of a sweep costs the driver, in time and in memory.

The sweep is a real one (configuration, plan, records on disk, `midblock.sweeps.sweep`), and so are the worker
processes and all that passes to and from them; only the work is simulated: a worker answers at once with a record of
the usual size (200 items, 100 steps). The driver's own processor time is what scheduling takes; its memory is read
every thousandth run.

    python benchmarks/dispatch.py
    python benchmarks/dispatch.py --arms 2000 --workers 4
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import _common as common

# isort: split
import psutil

from midblock.errors import SettingsError
from midblock.models import load_model
from midblock.sweeps import ProcessesEngine, RunRecord, SweepState, TaskScores, parse_config, sweep
from midblock.sweeps.worker import Task

_ITEMS, _STEPS = 200, 100
_MASKS = ["10000", "01000", "00100", "00010", "00001", "11000", "01100", "00110", "00011"]


class _Enough(SettingsError):
    """All runs were handed out: the statistics that follow are not this benchmark's."""


def simulated(pipe: Connection, task: Task, parent: int) -> None:
    """A worker that says it is like the driver and answers every run at once."""
    import os

    pipe.send(("ready", task.trust["identity"]))
    scores = TaskScores("answers", "loss", False, [f"item {i}" for i in range(_ITEMS)], [0.5] * _ITEMS, [8.0] * _ITEMS,
                        0.5, 0.1)
    while os.getppid() == parent and (message := pipe.recv())[0] == "job":
        job = message[1]
        plan = None if job.arm is None else job.arm.plan.to_dict()
        pipe.send(("record", RunRecord(job.name, job.learning_rate, job.seed, "done", plan=plan, seconds=0.1,
                                       training={"losses": [1.0] * _STEPS, "seconds": 1.0},
                                       tasks={"answers": scores})))


def configuration(arms: int, workers: int) -> Any:
    """A sweep of the nine masks and the baseline with as many seeds as give this number of runs."""
    return parse_config({
        "model": "smollm2", "dtype": "float32", "device": "cpu", "workers": workers, "engine": "processes",
        "train": {"data": "arithmetic@1", "samples": 8}, "training": {"steps": _STEPS},
        "arms": {"baseline": "11111", "masks": _MASKS}, "seeds": list(range(max(1, arms // (len(_MASKS) + 1)))),
        "evaluation": [{"task": "answer_loss", "data": "arithmetic@1", "samples": 4, "name": "answers"}]})


def measure(arms: int, workers: int) -> list[tuple[str, ...]]:
    """Rows of the table: runs so far, processor and wall milliseconds of the driver for each, its memory."""
    config = configuration(arms, workers)
    loaded = load_model(config.model, **config.placement())
    own = psutil.Process()
    rows: list[tuple[str, ...]] = []
    every = max(1, arms // 10)
    last = [time.process_time(), time.perf_counter(), 0.0]

    def listener(state: SweepState) -> None:
        done = len(state.records)
        if done and done % every == 0:
            now = [time.process_time(), time.perf_counter(), float(done)]
            runs = now[2] - last[2]
            if runs:
                rows.append((f"{done:,}", f"{1000 * (now[0] - last[0]) / runs:.2f}",
                             f"{1000 * (now[1] - last[1]) / runs:.2f}", f"{own.memory_info().rss / 2**20:,.0f} MiB"))
            last[:] = now
        if state.runs_left == 0:
            raise _Enough("done")

    def engine(config: Any, loaded: Any, data: Any) -> ProcessesEngine:
        from midblock.sweeps.worker import identity

        told = {"identity": identity(loaded, data)}
        return ProcessesEngine(config, loaded, data, trust=told, work=simulated)  # type: ignore[arg-type]

    # workers begin by importing this script, whose neighbours must be found (last, see `_common`)
    sys.path.append(str(Path(__file__).resolve().parent))
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(_Enough):
        sweep(config, out=Path(folder) / "sweep", loaded=loaded, listener=listener, engine=engine)
    return rows


def main() -> None:
    """Print the table."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--arms", type=int, default=10_000, help="runs (default: %(default)s)")
    made.add_argument("--workers", type=int, default=2, help="worker processes (default: %(default)s)")
    chosen = made.parse_args()
    print(common.machine())
    rows = measure(chosen.arms, chosen.workers)
    common.table(f"{chosen.arms:,} simulated runs, {chosen.workers} workers", rows,
                 ("runs", "driver's CPU, ms a run", "wall, ms a run", "driver's memory"))


if __name__ == "__main__":
    main()
