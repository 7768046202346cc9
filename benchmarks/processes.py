"""One command as one process and as several of one job: the same table, and how the time goes down.

Each process has as many threads as ``--threads`` says, so that several have several cores. The time is that of the
command's work (``seconds`` of run.json), without starting Python and importing torch, which every process does.

    python benchmarks/processes.py                       # lens and tune, 1 and 2 processes
    python benchmarks/processes.py --processes 1 2 4 --samples 400
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import _common as common

# isort: split
import pandas as pd


def words(command: str, samples: int) -> list[str]:
    """The command's words without ``--out``."""
    if command == "lens":
        return ["lens", "smollm2", "--data", "pydocs", "--samples", str(samples), "--max-length", "128", "--batch-size",
                "8"]
    return ["tune", "smollm2", "--data", "arithmetic@1", "--samples", str(samples), "--mask", "01100", "--epochs", "2",
            "--batch-size", "8"]


def run(command: str, processes: int, threads: int, samples: int, out: Path) -> tuple[float, pd.DataFrame]:
    """Seconds of the work, and the table."""
    launcher = [] if processes == 1 else ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
                                          str(processes)]
    line = [sys.executable, *launcher, "-m", "midblock", *words(command, samples), "--device", "cpu", "--out", str(out),
            "--quiet"]
    subprocess.run(line, check=True, env={**os.environ, "OMP_NUM_THREADS": str(threads)}, capture_output=True)
    return json.loads((out / "run.json").read_text())["seconds"], pd.read_csv(out / "table.csv")


def main() -> None:
    """Print the table."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="numbers (default: 1 2)")
    made.add_argument("--samples", type=int, default=200, help="samples, or rows (default: %(default)s)")
    made.add_argument("--threads", type=int, default=1, help="of each process (default: %(default)s)")
    made.add_argument("--repeats", type=int, default=3, help="the fastest counts (default: %(default)s)")
    chosen = made.parse_args()
    print(common.machine())
    rows = []
    for command in ("lens", "tune"):
        fastest: dict[int, float] = {}
        tables: dict[int, pd.DataFrame] = {}
        with tempfile.TemporaryDirectory() as folder:
            for repeat in range(chosen.repeats):  # in turn, so that what else runs meets all alike
                for count in chosen.processes:
                    seconds, tables[count] = run(command, count, chosen.threads, chosen.samples,
                                                 Path(folder) / f"{command}-{count}-{repeat}")
                    fastest[count] = min(seconds, fastest.get(count, seconds))
        first = chosen.processes[0]
        for count, seconds in fastest.items():
            ours, theirs = (t[t["metric"].isin(["loss", "accuracy", "final_loss"])]["value"] for t in
                            (tables[count], tables[first]))
            rows.append((command, count, f"{seconds:.1f} s", f"{fastest[first] / seconds:.2f}",
                         f"{(ours - theirs).abs().max():.1e}"))
    common.table(f"{chosen.samples} samples, {chosen.threads} threads a process", rows,
                 ("command", "processes", "time", "times as fast", "largest difference of a value"))


if __name__ == "__main__":
    main()
