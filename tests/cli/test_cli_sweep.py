"""`midblock sweep` from the command line."""

from __future__ import annotations

import json

import pytest
import typer

from midblock.cli import app as program
from midblock.cli import sweep as command
from midblock.sweeps import dump_config, parse_config
from sweep_helpers import tiny_values


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "sweep.yaml"
    path.write_text(dump_config(parse_config(tiny_values(tmp_path))))
    return path


@pytest.fixture
def run(monkeypatch):
    if "sweep" not in program.COMMANDS:
        app = typer.Typer()
        app.callback()(lambda: None)
        command.register(app)
        monkeypatch.setattr(program, "app", app)
    return program.run


@pytest.mark.e2e
def test_dry_run_prints_the_plan_and_writes_nothing(run, config, capsys, tmp_path):
    assert run(["sweep", str(config), "--dry-run"]) == 0
    out = capsys.readouterr().out
    for word in ("11111", "00100", "params", "mismatch", "steps", "paired", "unpaired", "2 arms, 5 runs"):
        assert word in out
    assert run(["sweep", str(config), "--dry-run", "--json", "--set", "seeds=[0]"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["runs"] == ["base", "11111__lr0.01__seed0", "00100__lr0.01__seed0"]
    assert {"params", "mismatch", "peak_bytes"} <= set(plan["arms"][0])


@pytest.mark.e2e
def test_a_sweep_and_its_resumption(run, config, capsys, tmp_path):
    out = tmp_path / "out"
    assert run(["sweep", str(config), "--out", str(out), "--json"]) == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)  # nothing but the result on stdout
    assert {"scores", "comparisons", "verdict", "ranking", "pareto"} <= set(found)
    assert "sweep: 5/5 00100 seed 1: answers" in captured.err
    assert "left" in captured.err
    assert run(["sweep", str(config), "--out", str(out)]) == 2
    assert "--resume" in capsys.readouterr().err
    assert run(["sweep", str(config), "--out", str(out), "--resume", "--quiet"]) == 0
    captured = capsys.readouterr()
    assert captured.out.count("Too small to judge. Missing: items of answers (has 10, needs 30)") == 1
    assert "sweep:" not in captured.err


@pytest.mark.e2e
def test_mistakes_are_told_at_once(run, config, capsys, tmp_path):
    assert run(["sweep", str(config)]) == 2
    assert "--out DIR" in capsys.readouterr().err
    text = config.read_text().replace("batch_size: 4", "batch_size: none").replace("dtype: float32", "dtyp: float32")
    config.write_text(text)
    assert run(["sweep", str(config), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "2 faults" in error
    assert "training.batch_size" in error
    assert "unknown key dtyp; did you mean dtype" in error
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists()
    assert run(["sweep", str(tmp_path / "nowhere.yaml"), "--dry-run"]) == 2
    assert "nowhere.yaml" in capsys.readouterr().err
