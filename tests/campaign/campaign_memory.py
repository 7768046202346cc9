"""Peak memory of every command at n samples and at ten times as many.

    PYTHONPATH=src:tests:tests/campaign python tests/campaign/campaign_memory.py

Each run is a fork of one process that has loaded the libraries, so that what it needs more is its own.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from campaign_cycles import start
from campaign_world import build_models

_CUT = "--max-length 32 --batch-size 8 --quiet"
COMMANDS = {
    "profile": f"profile m m-sft --data d.jsonl --samples {{n}} --token-samples 50 --replicates 20 {_CUT}",
    "lens": f"lens m m-sft --data d.jsonl --samples {{n}} {_CUT}",
    "swap": f"swap m m-sft --data d.jsonl --samples {{n}} {_CUT}",
    "merge": f"merge m m-sft --alphas 0,1,1,1,0 --data d.jsonl --samples {{n}} {_CUT}",
    "gradients": f"gradients m --data d.jsonl --samples {{n}} {_CUT}",
    "steer": f"steer m m-sft --data d.jsonl --samples {{n}} {_CUT}",
    "locate": f"locate m --data d.jsonl --samples {{n}} {_CUT}",
    "importance": "importance m --data d.jsonl --samples {n} --max-steps 4 --score-steps 2 --rank 2 --check-every 2 "
                  f"--window 2 {_CUT}",
    "tune": f"tune m --data d.jsonl --mask 00100 --rank 2 --dtype float32 --epochs 1 --cache none {_CUT}",
    "tune, cache": "tune m --data d.jsonl --mask 00100 --rank 2 --dtype float32 --epochs 1 --cache disk:rows "
                   f"--cache-limit 256K {_CUT}",
    "evaluate": f"evaluate m --task perplexity --data d.jsonl --samples {{n}} {_CUT}",
    "evaluate, answer_loss": f"evaluate m --task answer_loss --data d.jsonl --samples {{n}} {_CUT}",
    "sweep": "sweep sweep.yaml --quiet",
    "study": "study m m-sft --data d.jsonl --samples {n} --token-samples 50 --lens-samples {n} --swap-samples {n} "
             f"--gradient-samples {{n}} {_CUT}",
    "compare": "compare samples_a.jsonl samples_b.jsonl --quiet",
    "correlate": "correlate runs/profile runs/weights --quiet",
    "locate, validate": "locate --validate runs/sweep --quiet",
    "report": "report runs",
    "figures": "figures runs --columns one --quiet",
}
BEFORE = {
    "correlate": {"profile": COMMANDS["profile"], "weights": "weights m m-sft --quiet"},
    "locate, validate": {"sweep": COMMANDS["sweep"]},
    "report": {name: COMMANDS[name] for name in ("profile", "lens", "swap", "evaluate", "sweep")},
    "figures": {name: COMMANDS[name] for name in ("profile", "lens", "swap", "sweep")},
}
"""Runs that a command reads, by name; of as many samples."""
WITHOUT_SAMPLES = ("inspect", "pairs", "weights", "overlap", "demo")
"""Commands that are given no samples: what they read grows with the model only (`demo` runs others of fixed sizes)."""
CACHE_LIMIT = 256 << 10


def peak_of(words: list[str], place: Path) -> int:
    """Largest resident size of a command, in bytes.

    Raises:
        RuntimeError: it did not end with exit code 0.
    """
    log = place / "log"
    _, status, used = os.wait4(start(words, place, log), 0)
    if os.waitstatus_to_exitcode(status) != 0 or "failed: " in log.read_text():  # an arm of a sweep
        raise RuntimeError(f"{' '.join(words)}: {log.read_text()[-1000:]}")
    return int(used.ru_maxrss) * 1024


def _write_inputs(place: Path, count: int) -> None:
    (place / "d.jsonl").write_text("".join(
        json.dumps({"prompt": f"what is {i} and {i * i}? ", "completion": f"it is {i + i * i}."}) + "\n"
        for i in range(count)))
    (place / "held.jsonl").write_text("".join(
        json.dumps({"prompt": f"after {i}? ", "completion": f"{i + 1}."}) + "\n" for i in range(count)))
    for name, right in (("a", 0.9), ("b", 0.4)):
        (place / f"samples_{name}.jsonl").write_text("".join(
            json.dumps({"doc_id": n, "doc_hash": f"h{n}", "doc": {"q": str(n)}, "filter": "none", "metrics": ["acc"],
                        "acc": float(n < right * count)}) + "\n" for n in range(count)))
    (place / "sweep.yaml").write_text(json.dumps({
        "model": "m", "dtype": "float32", "device": "cpu", "seeds": [0, 1],
        "train": {"data": "d.jsonl", "split": "all", "max_length": 32},
        "training": {"epochs": 1, "batch_size": 8, "learning_rates": [0.01]},
        "arms": {"baseline": "11111", "singles": 5}, "budget": "match:11111@2", "statistics": {"replicates": 100},
        "evaluation": [{"task": "answer_loss", "data": "held.jsonl", "name": "answers", "max_length": 32}]}))


def measure(world: Path, name: str, samples: int) -> dict[str, Any]:
    """Peaks of one command at ``samples`` and at ten times as many, and the largest size of its cache in bytes."""
    found: dict[str, Any] = {"command": name, "samples": samples}
    for key, count in (("peak", samples), ("peak_10", 10 * samples)):
        with tempfile.TemporaryDirectory(dir=world.parent) as folder:
            place = Path(folder) / "w"
            shutil.copytree(world, place)
            _write_inputs(place, count)
            for run, words in BEFORE.get(name, {}).items():
                peak_of([*words.format(n=count).split(), "--out", f"runs/{run}"], place)
            found[key] = peak_of([*COMMANDS[name].format(n=count).split(), "--out", "out"], place)
            found["cache"] = sum(p.stat().st_size for p in place.glob("rows/prefix-*/*"))
    found["ratio"] = round(found["peak_10"] / found["peak"], 4)
    found["bytes_per_sample"] = round((found["peak_10"] - found["peak"]) / (9 * samples))
    return found


def main() -> None:
    """The command line of this file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--samples", type=int, default=100)
    parser.add_argument("--only", nargs="*", default=list(COMMANDS))
    chosen = parser.parse_args()
    import midblock.analysis
    import midblock.cli.app
    import midblock.tuning

    assert midblock.analysis
    assert midblock.cli.app
    assert midblock.tuning
    with tempfile.TemporaryDirectory(prefix="memory-") as folder:
        world = Path(folder) / "world"
        world.mkdir()
        build_models(world)
        for name in chosen.only:
            sys.stdout.write(json.dumps(measure(world, name, chosen.samples)) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
