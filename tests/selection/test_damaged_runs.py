"""`overlap` and `locate --validate` on runs that are unfinished, cut, edited or of another shape: one clear line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from midblock.cli.app import run
from midblock.provenance import RunFolder
from midblock.results import Table


def _importance(path: Path) -> Path:
    table = Table()
    for unit, value in zip("abcdefgh", np.random.default_rng(0).random(8), strict=True):
        table.add("block", 0, "ila_score", "pair", float(value), n=1, matrix=unit, module=unit, unit=unit, step=10,
                  final=True, data="d", seed=0)
    with RunFolder(path, command="importance", settings={"model": "tiny"}) as folder:
        folder.write_table(table)
    return path


def _sweep(path: Path) -> Path:
    table = Table()
    for arm, value in {"base": 0.1, "100": 0.2, "010": 0.4, "001": 0.3}.items():
        table.add("segment", arm, "accuracy", "base" if arm == "base" else "sft", value, n=10, arm=arm, mask=arm,
                  role="evaluation", task="t", seed=None if arm == "base" else 0,
                  method="none" if arm == "base" else "lora")
    with RunFolder(path, command="sweep", settings={"model": "tiny", "train": {"data": "arithmetic"}}) as folder:
        folder.write_table(table)
    return path


def _status(folder: Path, status: str) -> None:
    kept = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**kept, "status": status}))


def _drop(folder: Path, column: str) -> None:
    pd.read_csv(folder / "table.csv").drop(columns=column).to_csv(folder / "table.csv", index=False)


def _cut(folder: Path, name: str) -> None:
    text = (folder / name).read_bytes()
    (folder / name).write_bytes(text[:len(text) // 2])


DAMAGE: dict[str, Callable[[Path], object]] = {
    "unfinished": lambda f: _status(f, "running"), "interrupted": lambda f: _status(f, "interrupted"),
    "no value column": lambda f: _drop(f, "value"), "no seed column": lambda f: _drop(f, "seed"),
    "table cut": lambda f: _cut(f, "table.csv"), "run.json cut": lambda f: _cut(f, "run.json"),
    "table empty": lambda f: (f / "table.csv").write_text(""),
    "table binary": lambda f: (f / "table.csv").write_bytes(bytes(range(256))),
    "table gone": lambda f: (f / "table.csv").unlink(),
    "a score edited": lambda f: (f / "table.csv").write_text((f / "table.csv").read_text().replace(",0.", ",7.", 1)),
    **{f"run.json is {text[:9]}": (lambda f, text=text: (f / "run.json").write_text(text))  # type: ignore[misc]
       for text in ("[]", "5", "null", '"x"', "{}", '{"format_version": "x"}', '{"status": 3, "settings": []}',
                    "[" * 50_000, '{"settings": ' + "9" * 6000 + "}")},
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("command", ["overlap", "validate"])
def test_damaged_runs_are_one_line(command: str, damage: str, tmp_path: Path,
                                   capsys: pytest.CaptureFixture[str]) -> None:
    make = _importance if command == "overlap" else _sweep
    whole, broken = make(tmp_path / "whole"), make(tmp_path / "broken")
    DAMAGE[damage](broken)
    words = ["overlap"] if command == "overlap" else ["locate", "--validate"]
    capsys.readouterr()
    assert run([*words, str(whole), str(broken), "--out", str(tmp_path / "out"), "--quiet"]) == 2
    caught = capsys.readouterr()
    assert caught.err.startswith("Error: ")
    assert "broken" in caught.err
    assert caught.err.count("Error:") == 1
    assert "Traceback" not in caught.err
    assert not (tmp_path / "out").exists()


def test_a_sweep_that_does_not_say_its_data_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = _sweep(tmp_path / "a")
    table = pd.read_csv(whole / "table.csv", dtype={"mask": str, "arm": str, "layer": str})
    for number, settings in enumerate(({}, {"model": "m"}, {"model": "m", "train": 5}, {"model": "m", "train": {}})):
        with RunFolder(tmp_path / str(number), command="sweep", settings=settings) as folder:
            folder.write_table(table)
        assert run(["locate", "--validate", str(tmp_path / str(number)), "--out", str(tmp_path / "out"), "-q"]) == 2
        assert "on which data" in capsys.readouterr().err
