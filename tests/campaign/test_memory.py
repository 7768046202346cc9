"""Memory does not grow with the number of samples, and a cache stays below its limit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from campaign_memory import CACHE_LIMIT, COMMANDS

pytestmark = [pytest.mark.slow, pytest.mark.e2e,
              pytest.mark.skipif(sys.platform != "linux", reason="peaks of forked processes are Linux's")]


def test_ten_times_the_samples_take_no_more_memory() -> None:
    script = Path(__file__).with_name("campaign_memory.py")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    assert done.returncode == 0, done.stderr[-2000:]
    found = {r["command"]: r for r in map(json.loads, done.stdout.splitlines())}
    assert set(found) == set(COMMANDS)
    assert {n: r["ratio"] for n, r in found.items() if r["ratio"] > 1.1} == {}
    # the rows themselves and what is kept of each: far less than a row's logits or hidden states
    assert {n: r["bytes_per_sample"] for n, r in found.items() if r["bytes_per_sample"] > 40_000} == {}
    assert 0 < found["tune, cache"]["cache"] <= CACHE_LIMIT
