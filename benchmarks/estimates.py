"""What `tune --dry-run` and `sweep --dry-run` say beside what the run takes: time within 1.5, memory within 1.25.

Each run is a process of its own, so that peak memory is its own.

    python benchmarks/estimates.py                  # four plans of tune and a sweep of two arms, some minutes
    python benchmarks/estimates.py --cpu-time       # on a busy machine, one thread
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import _common as common

PLANS = {
    "tune 01100": ["--mask", "01100"],
    "tune 00001": ["--mask", "00001"],
    "tune 11111, no cache": ["--mask", "11111", "--cache", "none"],
    "tune 00100, full": ["--mask", "00100", "--method", "full"],
}
SWEEP = {"train": {"data": "arithmetic", "max_length": 128}, "training": {"epochs": 2, "batch_size": 8},
         "arms": {"baseline": "11111", "masks": ["00100"]}, "seeds": [0],
         "evaluation": [{"task": "arithmetic", "samples": 16, "max_new_tokens": 32},
                        {"task": "answer_loss", "data": "arithmetic", "samples": 32, "name": "answers"}],
         "retention": [{"task": "pydocs", "samples": 8, "max_length": 96}]}


def midblock(*words: str) -> tuple[Any, float]:
    """One command's JSON, and the share of its time for which it had a processor."""
    begun, before = time.perf_counter(), os.times()
    done = subprocess.run([sys.executable, "-m", "midblock", *words, "--json", "--quiet"], capture_output=True,
                          text=True, check=False)
    wall, after = time.perf_counter() - begun, os.times()
    if done.returncode:
        sys.exit(f"midblock {' '.join(words)}:\n{done.stderr[-3000:]}")
    own = after.children_user + after.children_system - before.children_user - before.children_system
    return json.loads(done.stdout), min(1.0, own / wall)


def measured(wanted: argparse.Namespace, place: Path) -> Iterator[tuple[str, float, float, float, float, float]]:
    """Case, estimated and measured seconds, estimated and measured bytes, share of the processor."""
    machine = ["--dtype", wanted.dtype, "--device", wanted.device]
    for number, (name, words) in enumerate(PLANS.items()):
        common_words = ["tune", wanted.model, "--data", wanted.data, "--samples", str(wanted.samples), *words, *machine]
        said = midblock(*common_words, "--dry-run")[0]["estimates"][0]
        run, share = midblock(*common_words, "--out", str(place / str(number)))
        took = run["results"]["training"]
        yield name, said["training s"], took["seconds"], said["memory MiB"] * 2**20, took["peak_memory_bytes"], share
    if wanted.skip_sweep:
        return
    config = place / "sweep.yaml"
    values = {**SWEEP, "model": wanted.model, "dtype": wanted.dtype, "device": wanted.device}
    values["train"] = {**SWEEP["train"], "samples": wanted.samples}
    config.write_text(json.dumps(values))  # JSON is YAML
    said = midblock("sweep", str(config), "--dry-run")[0]
    _, share = midblock("sweep", str(config), "--out", str(place / "sweep"))
    records = [json.loads(p.read_text()) for p in sorted((place / "sweep" / "results").glob("*.json"))]
    yield ("sweep, all runs", said["seconds"], sum(r["seconds"] for r in records),
           max(a["peak_bytes"] for a in said["arms"]), max(r["peak_memory_bytes"] for r in records), share)


def main() -> int:
    """Print the table; 1 where an estimate is outside its factor."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--data", default="arithmetic")
    parser.add_argument("--samples", type=int, default=48)
    parser.add_argument("--skip-sweep", action="store_true", help="tune alone")
    parser.add_argument("--cpu-time", action="store_true", help=(
        "one thread, and seconds are those for which the program had the processor: for a busy machine"))
    common.add_machine(parser)
    wanted = parser.parse_args()
    if wanted.cpu_time:
        wanted.threads = 1
    common.use_threads(wanted.threads)
    print(common.machine())
    rows, outside = [], 0
    with tempfile.TemporaryDirectory() as folder:
        for name, said_s, took_s, said_bytes, took_bytes, share in measured(wanted, Path(folder)):
            took_s *= share if wanted.cpu_time else 1.0
            times, memory = said_s / took_s, said_bytes / took_bytes
            fits = 1 / 1.5 <= times <= 1.5 and 1 / 1.25 <= memory <= 1.25
            outside += not fits
            rows.append([name, f"{said_s:.1f}", f"{took_s:.1f}", f"{times:.2f}", common.mib(said_bytes),
                         common.mib(took_bytes), f"{memory:.2f}", "yes" if fits else "no"])
            print(f"{name}: {times:.2f}, {memory:.2f}", file=sys.stderr, flush=True)
    common.table(f"estimates: {wanted.samples} rows of {wanted.data}, batches of 8, 2 epochs ({wanted.model})", rows,
                 ["case", "estimated s", "took s", "ratio", "estimated memory", "peak", "ratio", "within 1.5 and 1.25"])
    return int(outside > 0)


if __name__ == "__main__":
    sys.exit(main())
