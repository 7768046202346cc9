"""Killed, signalled and disk-full runs continue to the equal result; two processes share a cache, never a folder."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from campaign_cycles import WORKS, Cycles, can_mount, differences, finish, start

pytestmark = [pytest.mark.slow, pytest.mark.e2e, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    place = tmp_path_factory.mktemp("cycles")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MIDBLOCK_CACHE", str(place / "cache"))
        yield place


@pytest.fixture(scope="module")
def two(folder: Path) -> Cycles:
    return Cycles(folder / "two", ("tune, cache on disk", "evaluate"))


@pytest.mark.parametrize("way", ["SIGKILL", "SIGTERM", "full disk"])
@pytest.mark.parametrize("work", ["tune, cache on disk", "evaluate"])
def test_some_interruptions(two: Cycles, work: str, way: str) -> None:
    if way == "full disk" and not can_mount():
        pytest.skip("no right to mount a small disk")
    assert two.cycle(work, way, random.Random(f"{work} {way}"))["wrong"] == []


def test_sixty_interruptions(folder: Path) -> None:
    """In a process of its own: forks need one that has loaded everything and started no threads."""
    script = Path(__file__).with_name("campaign_cycles.py")
    done = subprocess.run([sys.executable, str(script), "--folder", str(folder / "s")], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert len(lines) == 61
    assert [line for line in lines[:-1] if '"wrong": []' not in line] == []


def test_two_processes_on_one_cache_and_on_one_folder(two: Cycles) -> None:
    name = "tune, cache on disk"
    expected, _, _ = two.reference[name]
    place = two._place("shared")
    words = WORKS[name]
    first, second, third = (start([*words, "--out", out], place, place / f"log{i}")
                            for i, out in enumerate(("a", "b", "a")))
    codes = [finish(p) for p in (first, second, third)]
    assert codes[1] == 0
    assert sorted((codes[0], codes[2])) == [0, 2], [(place / f"log{i}").read_text()[-500:] for i in range(3)]
    refused = (place / f"log{0 if codes[0] else 2}").read_text()
    assert "is in use by another run" in refused or "is not empty" in refused
    assert differences(expected, place / "a") == []
    assert differences(expected, place / "b") == []
