"""Trackers receive what each block does while it is tuned: every arm of a sweep in a run of its own.

Each runs where its package is installed: ``pip install tensorboard trackio wandb``.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from families import BLOCKS
from midblock.cli.app import run
from midblock.sweeps import parse_config, sweep
from sweep_helpers import tiny_values

pytestmark = [pytest.mark.e2e, pytest.mark.filterwarnings("ignore")]
ARMS = {"00100__lr0.01__seed0", "11111__lr0.01__seed0"}


def measured(folder: Path) -> dict[str, float]:
    """Tag as trackers have it -> last value, of one run's ``block_steps.csv``."""
    steps = pd.read_csv(folder / "block_steps.csv")
    last = steps[steps["step"] == steps["step"].max()]
    return {f"blocks/{name}/{int(row['block']):03d}": float(row[name]) for _, row in last.iterrows()
            for name in ("gradient_norm", "update_norm", "drift") if pd.notna(row[name])}


def heard_by_tensorboard(folder: Path) -> dict[str, float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    file, = folder.rglob("*tfevents*")
    events = EventAccumulator(str(file))
    events.Reload()
    tags = [t for t in events.Tags()["scalars"] if "blocks/" in t]
    return {t.removeprefix("train/"): events.Scalars(t)[-1].value for t in tags}


@pytest.fixture
def values(tmp_path: Path) -> dict[str, Any]:
    return {**tiny_values(tmp_path), "seeds": [0], "retention": []}


def tuned(values: dict[str, Any], tracker: str, out: Path) -> None:
    assert run(["tune", values["model"], "--data", values["train"]["data"], "--max-length", "64", "--mask", "01100",
                "--rank", "2", "--steps", "3", "--report-to", tracker, "--out", str(out)]) == 0


def test_tensorboard_has_every_block(values: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    tuned(values, "tensorboard", tmp_path / "tune")
    want = measured(tmp_path / "tune")
    assert {tag.rpartition("/")[2] for tag in want if "drift" in tag} == {f"{b:03d}" for b in range(BLOCKS + 1)}
    assert heard_by_tensorboard(tmp_path / "tune") == pytest.approx(want, rel=1e-5)
    sweep(parse_config({**values, "report_to": "tensorboard"}), out=tmp_path / "sweep")
    found = {p.name: heard_by_tensorboard(p) for p in (tmp_path / "sweep" / "trackers").iterdir()}
    assert found.keys() == ARMS
    assert {t for t in found["00100__lr0.01__seed0"] if "update" in t} == {"blocks/update_norm/002"}


def test_trackio_has_every_block(values: dict[str, Any], tmp_path: Path) -> None:
    if importlib.util.find_spec("trackio") is None:
        pytest.skip("trackio is not installed")
    config = tmp_path / "sweep.yaml"
    config.write_text(json.dumps({**values, "name": "tiny", "report_to": "trackio"}), encoding="utf-8")
    # a process of its own: trackio reads where it writes when it is imported
    subprocess.run([sys.executable, "-m", "midblock", "sweep", str(config), "--out", str(tmp_path / "sweep")],
                   env={**os.environ, "TRACKIO_DIR": str(tmp_path / "trackio")}, check=True, capture_output=True)
    file, = (tmp_path / "trackio").glob("*.db")
    with sqlite3.connect(file) as database:
        rows = database.execute("select run_name, metrics from metrics order by step").fetchall()
    found: dict[str, dict[str, float]] = {}
    for name, told in rows:
        found.setdefault(name.removeprefix("tiny "), {}).update(json.loads(told))
    assert found.keys() == ARMS
    blocks = {t for t in found["00100__lr0.01__seed0"] if "blocks/update" in t}
    assert blocks == {"train/blocks/update_norm/002"}


def test_wandb_has_a_run_for_each_arm(values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    for name, value in {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(name, value)
    sweep(parse_config({**values, "report_to": "wandb"}), out=tmp_path / "sweep")
    files = [p.read_bytes() for p in tmp_path.rglob("run-*.wandb")]
    assert len(files) == len(ARMS)
    assert sorted(b"blocks/update_norm/000" in f for f in files) == [False, True]
    assert all(b"blocks/drift/004" in f for f in files)
