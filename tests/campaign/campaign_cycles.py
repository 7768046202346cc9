"""Runs that are killed, ended by a signal or meet a full disk, and then continued: is the result the uninterrupted one?

    PYTHONPATH=src:tests:tests/campaign python tests/campaign/campaign_cycles.py --cycles 60 --seed 7

Each run is a fork of one process that has loaded the libraries, so that a cycle takes seconds. A full disk is a
small file system in memory (which takes the right to mount one) that is filled up to a random number of free bytes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
from campaign_world import build
from safetensors import SafetensorError, safe_open

_TUNE = [
    "tune", "m", "--data", "d.jsonl", "--mask", "00100", "--rank", "2", "--dtype", "float32", "--batch-size", "4",
    "--max-length", "32", "--quiet", "--steps", "8", "--save-steps", "2", "--learning-rate", "1e-2"]  # fmt: skip
WORKS: dict[str, list[str]] = {
    "tune, no cache": [*_TUNE, "--cache", "none"],
    "tune, cache in memory": [*_TUNE, "--cache", "memory"],
    "tune, cache on disk": [*_TUNE, "--cache", "disk:prefixes"],
    "sweep": ["sweep", "sweep.yaml", "--quiet"],
    "profile": ["profile", "m", "m-sft", "--data", "d.jsonl", "--samples", "8", "--token-samples", "6", "--replicates",
                "20", "--batch-size", "2", "--quiet"],
    "importance": ["importance", "m", "--data", "d.jsonl", "--max-steps", "6", "--score-steps", "6", "--rank", "2",
                   "--check-every", "2", "--window", "2", "--batch-size", "4", "--max-length", "32", "--quiet"],
    "evaluate": ["evaluate", "m", "--task", "perplexity", "--task", "answer_loss", "--data", "d.jsonl", "--max-length",
                 "32", "--batch-size", "2", "--quiet"],
}  # fmt: skip
WAYS = ("SIGKILL", "SIGTERM", "full disk")
_TIMED = ("second", "memory", "bytes", "digest", "cache", "started", "finished", "tokens_per_s")
"""In names of what two runs of the same work have otherwise: times, sizes in memory, seals over them, caches."""


def start(words: list[str], place: Path, log: Path) -> int:
    """Fork a process that runs one command in ``place``; returns its number."""
    child = os.fork()
    if child:
        return child
    code = 1
    with contextlib.suppress(BaseException):
        os.chdir(place)
        target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(target, 1)
        os.dup2(target, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        from midblock.cli.app import run

        try:
            code = run(words)
        except BaseException:
            import traceback

            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def finish(process: int, seconds: float = 300.0) -> int:
    """Exit code of a forked process (negative: the signal that ended it); one that hangs is killed."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    raise TimeoutError(f"process {process} did not end in {seconds:.0f} s")


def _plain(value: Any) -> Any:
    """A JSON value without what differs between two runs of the same work: times, sizes, caches.

    Whether a row of the frozen prefix was computed or read depends on what ran before in the same process; how many
    were needed does not.
    """
    if isinstance(value, dict):
        if "rows_computed" in value:
            value = {**value, "rows_used": value["rows_from_cache"] + value["rows_computed"]}
            value = {k: v for k, v in value.items() if k not in ("rows_computed", "rows_extended")}
        return {k: _plain(v) for k, v in value.items() if not any(t in k for t in _TIMED)}
    return [_plain(v) for v in value] if isinstance(value, list) else value


def _table(path: Path) -> pd.DataFrame:
    frame = pd.read_csv(path, dtype=str)
    frame = frame[[c for c in frame.columns if not any(t in c for t in _TIMED)]]
    if "metric" in frame:
        frame = frame[~frame["metric"].str.contains("|".join(_TIMED))]
    return frame.reset_index(drop=True)


def _content(path: Path, name: Path) -> Any:
    """What of a file must be equal in two runs of the same work; None where nothing must."""
    if path.suffix == ".safetensors":
        with safe_open(path, framework="np") as stored:  # the order of its metadata is any
            return stored.metadata(), {name: stored.get_tensor(name).tobytes() for name in stored.keys()}  # noqa: SIM118
    if path.name == "verdict.txt":
        return path.read_text()
    if path.name in ("table.csv", "comparisons.csv", "layers.csv"):
        return _table(path).to_csv()
    return _plain(json.loads(path.read_text())) if path.suffix == ".json" and "results" in name.parts else None


def _equal(expected: Path, found: Path, name: Path) -> bool:
    due = _content(expected, name)
    try:
        return bool(due == _content(found, name))
    except (ValueError, OSError, SafetensorError):  # no such table, tensors or JSON any more
        return False


def differences(expected: Path, found: Path) -> list[str]:
    """Files of the uninterrupted run that the continued one has not, or has otherwise."""
    wrong = []
    for path in sorted(p for p in expected.rglob("*") if p.is_file()):
        name = path.relative_to(expected)
        if "checkpoints" in name.parts or name.name.startswith("."):
            continue
        if not (found / name).is_file():
            wrong.append(f"{name} is missing")
        elif not _equal(path, found / name, name):
            wrong.append(f"{name} differs")
    return wrong


def can_mount() -> bool:
    """Whether this process may mount a small file system in memory."""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True)
        if done.returncode == 0:
            subprocess.run(["umount", folder], check=True)
        return done.returncode == 0


@contextlib.contextmanager
def small_disk(place: Path, free: int) -> Iterator[Callable[[], None]]:
    """A file system at ``place`` with ``free`` bytes left; calling what is yielded frees the rest."""
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(place)], check=True)
    try:
        filler = place / ".filler"
        filler.write_bytes(bytes(max(0, (64 << 20) - free)))
        yield lambda: filler.unlink()
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)
        place.rmdir()


class Cycles:
    """Reference runs of all works, and cycles of interruption against them.

    Args:
        folder: An empty folder.
        works: Names of `WORKS`.
    """

    def __init__(self, folder: Path, works: tuple[str, ...] = tuple(WORKS)) -> None:
        self.folder, self.world = folder, folder / "world"
        if not self.world.exists():
            self.world.mkdir(parents=True)
            build(self.world)
        self.reference: dict[str, tuple[Path, float, int]] = {}
        for name in works:
            place = self._place(f"reference-{len(self.reference)}")
            began = time.monotonic()
            code = finish(start([*WORKS[name], "--out", "out"], place, folder / "log"))
            assert code == 0, (name, (folder / "log").read_text()[-2000:])
            size = sum(p.stat().st_size for p in (place / "out").rglob("*") if p.is_file())
            self.reference[name] = (place / "out", time.monotonic() - began, size)

    def _place(self, name: str) -> Path:
        place = self.folder / name
        shutil.copytree(self.world, place, ignore=shutil.ignore_patterns("runs", "stopped"))
        return place

    def cycle(self, name: str, way: str, rng: random.Random) -> dict[str, Any]:
        """Interrupt one work in one way, continue it, and compare."""
        from midblock.writing import TEMPORARY

        expected, seconds, size = self.reference[name]
        place = self._place("cycle")
        log = self.folder / "log"
        result: dict[str, Any] = {"work": name, "way": way}
        try:
            with contextlib.ExitStack() as stack:
                free = None
                words = [*WORKS[name], "--out", "disk/out" if way == "full disk" else "out"]
                if way == "full disk":
                    free = stack.enter_context(small_disk(place / "disk", int(rng.uniform(0.0, 1.0) * size)))
                process = start(words, place, log)
                if free is None:
                    time.sleep(rng.uniform(0.1, 0.95) * seconds)
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(process, getattr(signal, way))
                code = finish(process)
                told = log.read_text(errors="replace")
                result |= {"code": code, "told": told.strip().splitlines()[-1][:160] if told.strip() else ""}
                out = place / words[-1]
                wrong = self._interruption(way, code, told, out)
                if free is not None:
                    free()
                if code != 0:
                    again = [*words, "--resume"] if (out / "run.json").exists() else words
                    code = finish(start(again, place, log))
                    if code != 0:
                        wrong.append(f"continued: exit {code}: {log.read_text()[-300:]}")
                if not wrong:
                    wrong += differences(expected, out)
                    wrong += [f"left over: {p.name}" for p in out.rglob(f"{TEMPORARY}*")]
                result["wrong"] = wrong
        except TimeoutError as error:
            result["wrong"] = [str(error)]
        finally:
            shutil.rmtree(place, ignore_errors=True)
        return result

    @staticmethod
    def _interruption(way: str, code: int, told: str, out: Path) -> list[str]:
        """What is wrong with the way in which the first run ended."""
        at = told.find("Traceback")
        wrong = [f"traceback: {told[max(0, at - 200):][:1500]}"] if at >= 0 else []
        if code == 0 or way == "SIGKILL":
            return wrong
        if way == "SIGTERM":
            if code != 143 and not (code == -15 and not out.exists()):  # before the program began
                wrong.append(f"exit {code}")
            status = json.loads((out / "run.json").read_text())["status"] if (out / "run.json").exists() else ""
            if status not in ("", "interrupted", "finished"):
                wrong.append(f"status {status}")
        elif code != 2 or "disk is full" not in told:
            wrong.append(f"exit {code}: {told[-200:]}")
        return wrong


def main() -> None:
    """The command line of this file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--cycles", type=int, default=60)
    parser.add_argument("--folder", type=Path)
    chosen = parser.parse_args()
    import midblock.cli.app
    import midblock.tuning

    assert midblock.cli.app
    assert midblock.tuning
    with contextlib.ExitStack() as stack:
        folder = chosen.folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="cycles-")))
        os.environ["MIDBLOCK_CACHE"] = str(folder / "cache")
        cycles = Cycles(folder)
        ways = WAYS if can_mount() else WAYS[:2]
        counts: Counter[str] = Counter()
        for number in range(chosen.cycles):
            name, way = list(WORKS)[number % len(WORKS)], ways[number // len(WORKS) % len(ways)]
            result = cycles.cycle(name, way, random.Random(f"{chosen.seed}:{number}"))
            counts[f"{way}: {'equal' if not result['wrong'] else 'WRONG'}"
                   f"{' (had ended)' if result.get('code') == 0 else ''}"] += 1
            sys.stdout.write(json.dumps({"cycle": number, **result}) + "\n")
            sys.stdout.flush()
        sys.stdout.write(f"{dict(counts)}\n")


if __name__ == "__main__":
    main()
