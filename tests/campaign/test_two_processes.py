"""Two real processes on one output folder (every command that writes one) and on one cache (every kind)."""

# ruff: noqa: F811  (the fixture is imported by name)
from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from campaign_fixtures import world  # noqa: F401
from campaign_together import CACHES, FOLDERS

pytestmark = [pytest.mark.slow, pytest.mark.e2e, pytest.mark.filterwarnings("ignore")]


def test_results_are_equal_and_the_second_is_refused(world: Path) -> None:
    """In a process of its own: forks need one that has loaded everything and started no threads."""
    script = Path(__file__).with_name("campaign_together.py")
    done = subprocess.run([sys.executable, str(script), "--world", str(world)], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == len(CACHES) + len(FOLDERS)
    assert [one for one in found if one["wrong"]] == []
    assert sum(2 in one["codes"] for one in found) > len(FOLDERS) // 2  # most do meet
