"""Run damaged inputs through all commands and judge how each ends.

    PYTHONPATH=src:tests:tests/campaign python tests/campaign/campaign.py --count 1000 --seed 7
    PYTHONPATH=src:tests:tests/campaign python tests/campaign/campaign.py --seed 7 --case 123  # one, shown whole

The rule: exit code 0 or 2; with 2 exactly one line ``Error: ...`` on stderr, else none; no traceback; nothing
half-written; no other file touched; nothing taken silently (`campaign_results`); at most 60 seconds and 4 GB. Cases run
in a worker process (one start of the libraries for all of them); a case that hangs ends its worker, and the next one
goes on.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import select
import shutil
import subprocess
import sys
import tempfile
import time
import unicodedata
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from campaign_results import WRITTEN, make_references, run_in, taken_silently
from campaign_world import COMMANDS, Case, apply, build, case_of

SECONDS = 60.0
BYTES = 4 << 30


def snapshot(place: Path) -> dict[str, tuple[int, int, int]]:
    """Kind, size and time of every file below a folder."""
    found = {}
    for folder, _, files in os.walk(place):
        for name in files:
            path = Path(folder) / name
            with contextlib.suppress(OSError):
                state = path.lstat()
                found[str(path.relative_to(place))] = (state.st_mode, state.st_size, state.st_mtime_ns)
    return found


def judge(
    case: Case, code: int | None, out: str, err: str, before: dict[str, Any], place: Path, seconds: float,
    reference: Path | None = None,
) -> str:
    """``ok`` (exit 0), ``refused`` (exit 2) or what is wrong; ``reference``: see `taken_silently`."""
    from midblock.writing import TEMPORARY

    errors = [line for line in err.splitlines() if line.startswith("Error: ")]
    if "Traceback (most recent call last)" in err or code is None:
        return "traceback"
    if code not in (0, 2):
        return f"exit {code}"
    if len(errors) != (1 if code == 2 else 0):
        return f"{len(errors)} error lines"
    if any(unicodedata.category(c) in ("Cc", "Cs", "Cf") and c not in "\n\t\u200c\u200d" for c in out + err):
        return "control characters"
    after = snapshot(place)
    if left := [name for name in after if TEMPORARY in name and name not in before]:
        return f"half-written {left[0]}"
    touched = [n for n in before if after.get(n) != before[n] and not n.startswith(WRITTEN) and n != case.target]
    if touched:
        return f"touched {touched[0]}"
    run = place / "out" / "run.json"
    if run.exists() and json.loads(run.read_text())["status"] != ("finished" if code == 0 else "failed"):
        return "status " + json.loads(run.read_text())["status"]
    if seconds > SECONDS:
        return "slow"
    if code == 0 and reference is not None and (silent := taken_silently(case, place, out, err, reference)):
        return silent
    return "ok" if code == 0 else "refused"


def run_case(seed: int, number: int, world: Path, show: bool = False) -> dict[str, Any]:
    """One case in a copy of the world."""
    case = case_of(seed, number, world)
    with tempfile.TemporaryDirectory(prefix="campaign-", dir=world.parent) as folder:
        place = Path(folder) / "w"
        shutil.copytree(world, place)
        what = apply(case, seed, number, place)
        before = snapshot(place)
        began = time.perf_counter()
        code, out, err = run_in(place, case.words)
        seconds = time.perf_counter() - began
        verdict = judge(case, code, out, err, before, place, seconds,
                        world.parent / "references" / str(number % len(COMMANDS)))
        if show:
            sys.stdout.write(f"{out}\n---\n{err}")
    told = [line for line in err.splitlines() if line.strip()]
    return {
        "case": number,
        "verdict": verdict,
        "command": " ".join(w[:40] for w in case.words),
        "target": case.target,
        "what": what,
        "seconds": round(seconds, 2),
        "told": (told or [""])[-1][:200],
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def serve(seed: int, numbers: range, world: Path) -> None:
    """Run cases one after another, one line of JSON each."""
    answers = os.fdopen(os.dup(1), "w")
    for number in numbers:
        answers.write(json.dumps(run_case(seed, number, world)) + "\n")
        answers.flush()


def campaign(
    seed: int, count: int, world: Path, first: int = 0, until: float = float("inf")
) -> Iterator[dict[str, Any]]:
    """Results of ``count`` cases, in order; a case that hangs is one of them."""
    number = first
    while number < first + count and time.time() < until:
        worker = subprocess.Popen(
            [
                sys.executable,
                __file__,
                "--seed",
                str(seed),
                "--serve",
                str(number),
                str(first + count),
                "--world",
                str(world),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            bufsize=1,
        )
        assert worker.stdout is not None
        try:
            limit = SECONDS + 60  # the first case pays for the start of the libraries
            while number < first + count and time.time() < until:
                ready, _, _ = select.select([worker.stdout], [], [], limit)
                line = worker.stdout.readline() if ready else ""
                limit = SECONDS + 30
                result = (
                    json.loads(line)
                    if line
                    else {
                        "case": number,
                        "verdict": "hang" if not ready else "died",
                        "what": "",
                        "seconds": limit,
                        "peak": 0,
                        "command": " ".join(w[:40] for w in case_of(seed, number, world).words),
                        "told": "",
                        "target": case_of(seed, number, world).target,
                    }
                )
                number += 1
                yield result
                if not line or result["peak"] > BYTES:
                    break
        finally:
            worker.kill()
            worker.wait()


def make_world(world: Path) -> None:
    """Build the world, and the results of all commands on it, beside it."""
    world.mkdir(parents=True)
    build(world)
    make_references(world, world.parent / "references")


def is_good(result: dict[str, Any]) -> bool:
    """Whether a case ended as it should."""
    return result["verdict"] in ("ok", "refused") and result["peak"] <= BYTES


def main() -> None:
    """The command line of this file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--case", type=int)
    parser.add_argument("--serve", type=int, nargs=2)
    parser.add_argument("--world", type=Path)
    parser.add_argument("--out", type=Path, help="file for one line of JSON per case")
    chosen = parser.parse_args()
    if chosen.serve:
        serve(chosen.seed, range(*chosen.serve), chosen.world)
        return
    with contextlib.ExitStack() as stack:
        world = chosen.world
        if world is None:
            world = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="campaign-"))) / "world"
        if not world.exists():
            make_world(world)
        if chosen.case is not None:
            sys.stdout.write(json.dumps(run_case(chosen.seed, chosen.case, world, show=True), indent=1) + "\n")
            return
        counts: Counter[str] = Counter()
        for result in campaign(chosen.seed, chosen.count, world, chosen.first):
            counts["good" if is_good(result) else "bad"] += 1
            counts[result["verdict"]] += 1
            if chosen.out:
                with chosen.out.open("a") as file:
                    file.write(json.dumps(result) + "\n")
            if not is_good(result):
                sys.stdout.write(json.dumps(result) + "\n")
                sys.stdout.flush()
        sys.stdout.write(f"{dict(counts)}\n")


if __name__ == "__main__":
    main()
