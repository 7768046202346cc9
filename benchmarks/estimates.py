"""What `tune --dry-run` says beside what the run then takes: time within a factor 1.5, memory within 1.25.

Each run is a process of its own, so that peak memory is its own.

    python benchmarks/estimates.py [--model smollm2] [--data arithmetic] [--samples 48]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile

CASES = {
    "01100": ["--mask", "01100"],
    "00001": ["--mask", "00001"],
    "11111, no cache": ["--mask", "11111", "--cache", "none"],
    "00100, full": ["--mask", "00100", "--method", "full"],
}


def midblock(*words: str) -> dict[str, object]:
    """One command's JSON."""
    done = subprocess.run([sys.executable, "-m", "midblock", *words, "--json", "--quiet"], capture_output=True,
                          text=True, check=False)
    if done.returncode:
        sys.exit(f"midblock {' '.join(words)}:\n{done.stderr[-3000:]}")
    found: dict[str, object] = json.loads(done.stdout)
    return found


def main() -> int:
    """Print the table; 1 where an estimate is outside its factor."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--data", default="arithmetic")
    parser.add_argument("--samples", type=int, default=48)
    wanted = parser.parse_args()
    outside = 0
    print(f"{'plan':18s} {'estimated s':>12s} {'took s':>8s} {'ratio':>6s} {'estimated MiB':>14s} {'peak MiB':>9s} "
          f"{'ratio':>6s}")
    for name, words in CASES.items():
        common = ["tune", wanted.model, "--data", wanted.data, "--samples", str(wanted.samples), *words]
        with tempfile.TemporaryDirectory() as folder:
            said = midblock(*common, "--dry-run")["estimates"][0]  # type: ignore[index]
            took = midblock(*common, "--out", f"{folder}/out")["results"]["training"]  # type: ignore[index]
        seconds, memory = took["seconds"], took["peak_memory_bytes"] / 2**20
        time_ratio, memory_ratio = said["training s"] / seconds, said["memory MiB"] / memory
        fits = 1 / 1.5 <= time_ratio <= 1.5 and 1 / 1.25 <= memory_ratio <= 1.25
        outside += not fits
        print(f"{name:18s} {said['training s']:12.1f} {seconds:8.1f} {time_ratio:6.2f} {said['memory MiB']:14.0f} "
              f"{memory:9.0f} {memory_ratio:6.2f}{'' if fits else '  outside'}", flush=True)
    return int(outside > 0)


if __name__ == "__main__":
    sys.exit(main())
