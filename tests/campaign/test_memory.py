"""Memory does not grow with the number of samples, and a cache stays below its limit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from campaign_memory import CACHE_LIMIT, COMMANDS

pytestmark = [pytest.mark.slow, pytest.mark.e2e,
              pytest.mark.skipif(sys.platform != "linux", reason="peaks of forked processes are Linux's")]


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, Any]]:
    script = Path(__file__).with_name("campaign_memory.py")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    assert done.returncode == 0, done.stderr[-2000:]
    return {r["command"]: r for r in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize("name", COMMANDS)
def test_ten_times_the_samples_take_no_more_memory(found: dict[str, dict[str, Any]], name: str) -> None:
    assert found[name]["ratio"] <= 1.1
    # the rows themselves and what is kept of each: far less than a row's logits or hidden states
    assert found[name]["bytes_per_sample"] <= (80_000 if name == "study" else 40_000)  # a study: of six analyses


def test_every_command_is_measured_or_takes_no_samples() -> None:
    from campaign_memory import WITHOUT_SAMPLES

    from midblock.cli import app

    assert {name.split(",")[0] for name in COMMANDS} | {*WITHOUT_SAMPLES} == {*app.COMMANDS}


def test_a_cache_stays_below_its_limit(found: dict[str, dict[str, Any]]) -> None:
    assert 0 < found["tune, cache"]["cache"] <= CACHE_LIMIT
