"""`midblock merge` end to end: scores, and a saved checkpoint that scores the same."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
import torch

from conftest import build_tiny_tokenizer
from families import FAMILIES
from midblock.cli.app import run
from midblock.models import load_model, save_checkpoint
from midblock.provenance import read_run

pytestmark = pytest.mark.e2e
SMALL = ["--samples", "5", "--max-length", "48", "--batch-size", "2"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("merge")
    for seed, name in enumerate(("base", "sft")):
        save_checkpoint(FAMILIES["llama"](seed=seed), build_tiny_tokenizer(), home / name)
    rows = [{"text": f"sample number {i} of the tiny data set"} for i in range(8)]
    (home / "data.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return home


def test_a_saved_merge_scores_as_it_was_scored(home, tmp_path, capsys):
    pair = [str(home / "base"), str(home / "sft")]
    data = ["--data", str(home / "data.jsonl")]
    out, saved = tmp_path / "out", tmp_path / "merged"
    assert run(["merge", *pair, "--alphas", "0,.5,1,.25", *data, "--save", str(saved), "--out", str(out), *SMALL]) == 0
    captured = capsys.readouterr()
    assert "lowest loss" in captured.out
    assert f"Written: {saved}" in captured.out
    table = pd.read_csv(out / "table.csv", dtype={"layer": str})
    own = table[(table["side"] == "merged")].set_index("metric")["value"]
    assert set(own.index) == {"loss", "accuracy", "perplexity"}
    assert read_run(out)["counts"]["written"] == [str(saved)]
    # the written model, as a base of its own
    again = tmp_path / "again"
    assert run(["merge", str(saved), pair[1], "--alphas", "0", *data, "--out", str(again), *SMALL]) == 0
    repeated = pd.read_csv(again / "table.csv", dtype={"layer": str})
    repeated = repeated[repeated["side"] == "merged"].set_index("metric")["value"]
    pd.testing.assert_series_equal(repeated, own, check_exact=True)
    assert load_model(saved).model.dtype == torch.float32


def test_json_and_several_settings(home, tmp_path, capsys):
    pair = [str(home / "base"), str(home / "sft")]
    assert run(["merge", *pair, "--alphas", "0,0", "--alphas", "1,1", "--data", str(home / "data.jsonl"),
                "--out", str(tmp_path / "out"), "--json", *SMALL]) == 0
    rows = pd.DataFrame(json.loads(capsys.readouterr().out)["table"])
    loss = rows[(rows["metric"] == "loss") & (rows["side"] == "difference")].set_index(["layer", "against"])["value"]
    assert loss[("0,0", "base")] == 0
    assert loss[("1,1", "sft")] == 0
    assert loss[("1,1", "base")] != 0


@pytest.mark.parametrize(("words", "message"), [
    (["--alphas", "0,x", "--save", "m"], "not numbers"),
    (["--alphas", "0,1"], "nothing to do"),
    (["--alphas", "0,0,0,0,1", "--save", "m"], "5 segments"),
    (["--alphas", "1", "--data", "nothing.jsonl"], "nothing.jsonl"),
    (["--alphas", "1", "--save", "m", "--samples", "0"], "--samples"),
])
def test_mistakes_are_one_line_and_leave_nothing(home, tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    assert run(["merge", str(home / "base"), str(home / "sft"), *words, "--quiet"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert len(captured.err.strip().splitlines()) == 1
    assert list(tmp_path.rglob("*.*")) == []
