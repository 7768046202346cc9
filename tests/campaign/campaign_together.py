"""Two processes at once on one output folder, for every command that writes one, and on one cache, for every kind.

    PYTHONPATH=src:tests:tests/campaign python tests/campaign/campaign_together.py

Each pair is two forks of one process that has loaded the libraries. One line of JSON a pair: exit codes, and what is
wrong. On one folder one process must do the work, with the result that it has alone, and the other be refused in one
line (or, where it comes after the first's end and continues or replaces what is there, find the equal result). On one
cache both must have the result that each has alone, and the cache be whole afterwards.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from campaign_cycles import differences, finish, start
from campaign_world import CACHE, COMMANDS, TUNE

from campaign import make_world

REFUSED = ("is in use by another run of midblock", "is not empty", "exists and is not an empty folder")
FOLDERS = [(number, command) for number, (command, _) in enumerate(COMMANDS) if "--out " in command]
CACHES = {
    "prefix cache": ("rows", [f"{TUNE} --steps 6 --cache disk:rows --out {out}" for out in "ab"]),
    "prefix cache, two sweeps": ("rows", ["sweep cached.yaml --out a --quiet", "sweep cached.yaml --out b --quiet"]),
    "converted GGUF file": (CACHE, ["weights tiny.gguf tiny.gguf --no-spectra --quiet --out a",
                                    "weights tiny.gguf tiny.gguf --no-spectra --quiet --out b"]),
    "product rates, digests, summaries": (CACHE, [
        f"lens narrow --data d.jsonl --samples 4 --max-length 32 --dtype auto --quiet --out {out}" for out in "ab"]),
}


def _pair(place: Path, commands: list[str]) -> tuple[list[int], list[str]]:
    """Exit codes and what was told of two commands that begin at once."""
    logs = [place / f"log{i}" for i in range(2)]
    codes = [finish(p) for p in [start(c.split(), place, log) for c, log in zip(commands, logs, strict=True)]]
    return codes, [log.read_text(errors="replace") for log in logs]


def _wrong_words(code: int, told: str) -> list[str]:
    errors = [line for line in told.splitlines() if line.startswith("Error: ")]
    if "Traceback" in told or code not in (0, 2) or len(errors) != (code == 2):
        return [f"exit {code}: {told[-800:]}"]
    return [f"refused as: {errors[0]}"] if errors and not any(word in errors[0] for word in REFUSED) else []


def on_one_folder(world: Path, number: int, command: str) -> dict[str, Any]:
    """Two processes run one command into one folder."""
    with tempfile.TemporaryDirectory(dir=world.parent) as folder:
        place = Path(folder) / "w"
        shutil.copytree(world, place)
        os.environ["MIDBLOCK_CACHE"] = str(place / CACHE)
        codes, told = _pair(place, [command] * 2)
        wrong = [w for code, text in zip(codes, told, strict=True) for w in _wrong_words(code, text)]
        again = "--resume" in command or command.startswith(("report", "figures"))
        if sorted(codes) != [0, 2] and not (again and codes == [0, 0]):
            wrong.append(f"exits {codes}")
        out = command.split("--out ")[1].split()[0]
        reference = world.parent / "references" / str(number)
        if (reference / out).is_dir():
            wrong += differences(reference / out, place / out)
        elif not (place / out).read_text().rstrip().endswith("</html>"):
            wrong.append(f"{out} is not whole")
        wrong += [f"left over: {p.name}" for p in place.rglob(".midblock*") if ".midblock-prefix" not in p.name]
    return {"what": command[:60], "codes": codes, "wrong": wrong}


def on_one_cache(world: Path, kind: str) -> dict[str, Any]:
    """Two processes fill one empty cache; each alone with an empty one is what they are compared with."""
    cache, commands = CACHES[kind]
    with tempfile.TemporaryDirectory(dir=world.parent) as folder:
        place = Path(folder) / "w"
        shutil.copytree(world, place, ignore=shutil.ignore_patterns("rows", CACHE, "runs", "stopped"))
        _prepare(place)
        os.environ["MIDBLOCK_CACHE"] = str(place / CACHE)
        assert finish(start(commands[0].replace("--out a", "--out alone").split(), place, place / "log")) == 0, (
            place / "log").read_text()
        shutil.rmtree(place / cache)
        codes, told = _pair(place, commands)
        wrong = [f"exit {code}: {text[-500:]}" for code, text in zip(codes, told, strict=True)
                 if code != 0 or "Traceback" in text or "damaged" in text]
        wrong += [w for out in "ab" for w in differences(place / "alone", place / out)]
        log = place / "log"
        again = finish(start(commands[0].replace("--out a", "--out again").split(), place, log))
        if again != 0 or "damaged" in log.read_text() or "converting" in log.read_text():
            wrong.append(f"the cache is not whole: {log.read_text()[-500:]}")
        wrong += differences(place / "alone", place / "again")
        if cache == "rows":
            stored = sum(p.stat().st_size for p in place.glob("rows/prefix-*/*"))
            if int((place / "rows" / ".midblock-prefix-cache.bytes").read_text()) != stored or not stored:
                wrong.append("the total of the cache is not what is there")
        elif not json.loads((place / CACHE / "product-rates.json").read_text() if "rates" in kind else "[1]"):
            wrong.append("no product rates")
        wrong += [f"left over: {p.name}" for p in place.rglob(".midblock-tmp-*")]
    return {"what": kind, "codes": codes, "wrong": wrong}


def _prepare(place: Path) -> None:
    """A sweep with a cache on disk, and a model in bfloat16, whose dtype is chosen by measuring."""
    import torch
    from safetensors.torch import load_file, save_file

    sweep = json.loads((place / "sweep.yaml").read_text())
    (place / "cached.yaml").write_text(json.dumps({**sweep, "cache": "disk:rows", "seeds": [0]}))
    shutil.copytree(place / "m", place / "narrow")
    weights = load_file(place / "m" / "model.safetensors")
    save_file({n: t.to(torch.bfloat16) for n, t in weights.items()}, place / "narrow" / "model.safetensors",
              metadata={"format": "pt"})
    config = json.loads((place / "m" / "config.json").read_text())
    (place / "narrow" / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))


def pairs(world: Path, first: int = 0) -> Iterator[dict[str, Any]]:
    """All pairs, from the ``first`` on."""
    for kind in [*CACHES][first:]:
        yield on_one_cache(world, kind)
    for number, command in FOLDERS[max(0, first - len(CACHES)):]:
        yield on_one_folder(world, number, command)


def main() -> None:
    """The command line of this file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--world", type=Path, help="one that a campaign has made")
    parser.add_argument("--first", type=int, default=0)
    chosen = parser.parse_args()
    import midblock.cli.app
    import midblock.tuning

    assert midblock.cli.app
    assert midblock.tuning
    with tempfile.TemporaryDirectory(prefix="together-") as folder:
        world = chosen.world or Path(folder) / "world"
        if not world.exists():
            make_world(world)
        for result in pairs(world, chosen.first):
            sys.stdout.write(json.dumps(result) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
