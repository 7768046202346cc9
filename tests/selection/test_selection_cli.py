"""`importance`, `overlap` and `locate` as a person calls them, from data to a plan that `tune` takes."""

from __future__ import annotations

import json
import os
import shlex
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from midblock.cli.app import run
from midblock.models import save_checkpoint
from midblock.provenance import read_run
from midblock.tuning import load_plan
from selection_helpers import alphabet, planted

SHORT = ["--max-steps", "20", "--score-steps", "10", "--batch-size", "8", "--rank", "2", "--learning-rate", "1e-2",
         "--quiet"]


@pytest.fixture(autouse=True)
def _leave_no_settings() -> Iterator[None]:
    before = dict(os.environ)
    with warnings.catch_warnings():
        yield
    for name in set(os.environ) - set(before):
        del os.environ[name]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A planted model and a data file."""
    folder = tmp_path_factory.mktemp("selection")
    model = planted(2)
    save_checkpoint(model.model, model.tokenizer, folder / "model")
    rows = [json.dumps({"text": e.text}) for e in alphabet(16).examples]
    (folder / "alphabet.jsonl").write_text("\n".join(rows) + "\n")
    return folder


def _call(capsys: pytest.CaptureFixture[str], *words: object, code: int = 0) -> Any:
    capsys.readouterr()
    assert run([str(w) for w in words]) == code
    caught = capsys.readouterr()
    return json.loads(caught.out) if "--json" in words else caught


def test_importance_to_overlap(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["--data", place / "alphabet.jsonl", *SHORT]
    found = _call(capsys, "importance", place / "model", *common, "--out", tmp_path / "a", "--apply", "top:0.25",
                  "--at-steps", "10", "--json")
    assert set(found["plans"]) >= {"ila-top25", "random-top25"}
    plan = load_plan(tmp_path / "a" / "plans" / "ila-top25.json")
    assert len(plan.modules) == 7
    assert sum(m.block == 2 for m in plan.modules) >= 5
    frame = pd.read_csv(tmp_path / "a" / "table.csv")
    assert set(frame["metric"]) == {"ila_score", "taylor", "taylor_base", "update_norm", "random"}
    assert set(frame["step"]) == {10, 20}
    assert (tmp_path / "a" / "figures" / "importance-ila_score.svg").is_file()
    assert read_run(tmp_path / "a")["status"] == "finished"
    # another choice from the same scores, without training again
    before = (tmp_path / "a" / "table.csv").read_text()
    _call(capsys, "importance", place / "model", *common, "--out", tmp_path / "a", "--at-steps", "10", "--resume",
          "--apply", "freeze-bottom:0.25")
    assert (tmp_path / "a" / "table.csv").read_text() == before
    assert len(load_plan(tmp_path / "a" / "plans" / "ila-freeze25.json").modules) == 21
    # tune accepts the plan
    shown = _call(capsys, "tune", place / "model", "--data", place / "alphabet.jsonl", "--plan",
                  tmp_path / "a" / "plans" / "ila-top25.json", "--all-tokens", "--dry-run")
    assert f"{plan.params:,}" in shown.out

    _call(capsys, "importance", place / "model", *common, "--seed", "1", "--out", tmp_path / "b")
    both = _call(capsys, "overlap", tmp_path / "a", tmp_path / "b", "--share", "0.25", "--out", tmp_path / "o",
                 "--json")
    assert [p["differ"] for p in both["pairs"]] == ["seed"]
    assert "by chance" in both["summary"]
    assert (tmp_path / "o" / "figures" / "overlap-jaccard.pdf").is_file()
    steps = _call(capsys, "overlap", tmp_path / "a", "--steps", "all", "--out", tmp_path / "s")
    assert "differ in step" in steps.out


def test_the_next_command_goes_on_with_all_options(place: Path, tmp_path: Path,
                                                    capsys: pytest.CaptureFixture[str]) -> None:
    words = ["importance", str(place / "model"), "--data", str(place / "alphabet.jsonl"), *SHORT, "--epsilon", "1e-9",
             "--out", str(tmp_path / "a")]
    shown = _call(capsys, *words)
    following = shlex.split(next(line for line in shown.out.splitlines() if line.startswith("Next: "))[len("Next: "):])
    assert following[1:3] == words[:2]
    assert following[-3:] == ["--resume", "--max-steps", "40"]
    assert following.count("--max-steps") == 1
    _call(capsys, *following[1:])  # not refused: every setting is repeated
    frame = pd.read_csv(tmp_path / "a" / "table.csv")
    assert set(frame.loc[frame["final"], "step"]) == {40}
    fewer = _call(capsys, *words, "--resume", "--max-steps", "30", code=2)
    assert "max_steps was 40, now 30" in fewer.err
    assert read_run(tmp_path / "a")["status"] == "finished"
    shown = _call(capsys, *words, "--resume", "--max-steps", "40", "--apply", "top:0.25")
    assert "midblock tune" in shown.out


def test_locate_proposes(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = _call(capsys, "locate", place / "model", "--data", place / "alphabet.jsonl", "--samples", "8", "--share",
                  "0.25", "--rule", "fisher", "--out", tmp_path / "l", "--quiet", "--json")
    assert found["proposal"]["blocks"] == [2, 3]
    assert found["proposal"]["mask"] == "0010"
    assert {"fixed-middle", "uniform", "random", "taylor"} <= set(found["proposals"])
    assert read_run(tmp_path / "l")["proposal"]["rule"] == "fisher"
    shown = _call(capsys, "locate", place / "model", "--budget", "3k", "--rank", "8", "--out", tmp_path / "w",
                  "--quiet")
    assert f"midblock tune {place / 'model'} --data arithmetic --blocks " in shown.out
    assert "mask" in shown.out


@pytest.mark.parametrize(("words", "message"), [
    (["importance", "MODEL", "--data", "DATA", "--apply", "best:1"], "top:0.3"),
    (["importance", "MODEL", "--data", "DATA", "--at-steps", "x"], "--at-steps"),
    (["importance", "MODEL", "--data", "DATA", "--rank", "0"], "--rank"),
    (["locate", "MODEL", "--rule", "guess"], "fixed-middle"),
    (["locate", "MODEL", "--share", "0.5", "--budget", "1k"], "both --share and --budget"),
    (["locate", "MODEL", "MODEL"], "one model"),
    (["locate", "--validate", "MODEL"], "not a run folder"),
    (["locate", "--validate", "MODEL", "--data", "DATA"], "--data does not go with --validate"),
    (["overlap", "MODEL"], "not a run folder"),
])
def test_mistakes_are_one_line(words: list[str], message: str, place: Path, tmp_path: Path,
                               capsys: pytest.CaptureFixture[str]) -> None:
    given = [str(place / "model") if w == "MODEL" else str(place / "alphabet.jsonl") if w == "DATA" else w
             for w in words]
    caught = _call(capsys, *given, "--out", tmp_path / "x", "--quiet", code=2)
    assert message in caught.err
    assert "Traceback" not in caught.err
    assert not (tmp_path / "x").exists()
