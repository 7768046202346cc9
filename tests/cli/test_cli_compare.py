"""`midblock compare` from the command line."""

from __future__ import annotations

import json

import pandas as pd
import pytest

from midblock.cli.app import run


def write(path, rights):
    path.write_text("".join(json.dumps({"doc_id": n, "doc_hash": f"h{n}", "doc": {}, "filter": "none",
                                        "metrics": ["acc"], "acc": r}) + "\n" for n, r in enumerate(rights)))
    return str(path)


@pytest.mark.e2e
def test_a_line_for_people_json_and_files(tmp_path, capsys):
    a = write(tmp_path / "samples_t.jsonl", [1.0] * 30 + [0.0] * 10)
    b = write(tmp_path / "b.jsonl", [1.0] * 10 + [0.0] * 30)
    assert run(["compare", a, b, "--out", str(tmp_path / "out")]) == 0
    captured = capsys.readouterr()
    assert "t acc: A is better: 0.75 - 0.25 = +0.5" in captured.out
    assert "compared as t" in captured.err
    table = pd.read_csv(tmp_path / "out" / "compare.csv")
    assert table["p_holm"].item() == pytest.approx(2 / 2**20)
    assert json.loads((tmp_path / "out" / "run.json").read_text())["settings"]["margin"] == 0.02
    assert run(["compare", a, b, "--json", "--quiet"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"][0]["conclusion"] == "better"


@pytest.mark.e2e
def test_mistakes(tmp_path, capsys):
    a = write(tmp_path / "samples_t.jsonl", [1.0])
    assert run(["compare", a, str(tmp_path / "nowhere.jsonl")]) == 2
    assert "nowhere.jsonl: there is no such file" in capsys.readouterr().err
    assert run(["compare", a, a, "--margin", "0", "--alpha", "2"]) == 2
    error = capsys.readouterr().err
    assert "--margin" in error
    assert "--alpha" in error
