"""`midblock correlate` on the run folders that other commands really wrote."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from conftest import build_tiny_tokenizer
from families import FAMILIES
from midblock.cli.app import run
from midblock.models import save_checkpoint
from midblock.provenance import read_run

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folders profile, lens, swap, weights and gradients of one tiny pair."""
    home = tmp_path_factory.mktemp("runs")
    for seed, name in enumerate(("base", "sft")):
        save_checkpoint(FAMILIES["llama"](seed=seed, num_hidden_layers=6), build_tiny_tokenizer(), home / name)
    rows = [{"prompt": f"what is {i} and {i + 3}? ", "completion": f"it is {2 * i + 3}, of course."} for i in range(9)]
    (home / "data.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    pair, data = [str(home / "base"), str(home / "sft")], ["--data", str(home / "data.jsonl"), "--max-length", "48"]
    for words in (["profile", *pair, *data, "--samples", "8", "--token-samples", "4", "--replicates", "20"],
                  ["lens", *pair, *data, "--samples", "5", "--top-k", "3"],
                  ["swap", *pair, *data, "--samples", "5", "--segments", "3"],
                  ["gradients", pair[0], *data, "--samples", "4"],
                  ["weights", *pair]):
        assert run([*words, "--out", str(home / words[0]), "--quiet"]) == 0
    return home


def test_all_runs_together(runs, tmp_path, capsys):
    capsys.readouterr()
    folders = [str(runs / name) for name in ("profile", "lens", "swap", "gradients", "weights")]
    out = tmp_path / "out"
    assert run(["correlate", *folders, "--out", str(out), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    table, layers = pd.read_csv(out / "table.csv"), pd.read_csv(out / "layers.csv")
    assert set(table["metric"]) == {"pearson", "spearman"}
    assert {"a", "b", "p", "p_holm", "points"} <= set(table)
    assert len(layers) == 6
    assert {"cka", "weight_change [qkvo]", "gradient_norm"} <= {c.replace(", weights", "") for c in layers}
    profile = pd.read_csv(runs / "profile" / "table.csv")
    cka = profile[(profile.metric == "cka") & (profile.side == "pair")].set_index("layer")["value"]
    weights = pd.read_csv(runs / "weights" / "table.csv")
    change = weights[(weights.metric == "weight_change") & (weights.matrix == "qkvo")]
    row = table[(table.metric == "pearson") & (table.a == "cka") & (table.b == "weight_change [qkvo]")]
    want = cka.loc[1:].reset_index(drop=True).corr(change["value"].reset_index(drop=True))
    assert row["value"].item() == pytest.approx(want, rel=1e-6)
    assert row["n"].item() == 6
    assert (table[table["points"] == "3 segments"]["n"] <= 3).all()
    assert (table["points"] == "3 segments").any()
    assert read_run(out)["counts"]["folders"] == folders
    assert {p.name for p in (out / "figures").iterdir()} == {
        f"correlation-{m}.{end}" for m in ("pearson", "spearman") for end in ("svg", "pdf")}
    assert "too optimistic" in printed["summary"]


def test_choices_and_mistakes(runs, tmp_path, capsys):
    profile = str(runs / "profile")
    assert run(["correlate", profile, "--metrics", "cka,cosine,effective_rank", "--methods", "pearson", "--out",
                str(tmp_path / "some")]) == 0
    assert "effective_rank" in capsys.readouterr().out
    assert len(pd.read_csv(tmp_path / "some" / "table.csv")) == 3
    for words, message in (([str(runs / "base")], "run.json"), ([profile, "--metrics", "nothing"], "no metric"),
                           ([profile, "--methods", "kendall"], "pearson"), ([profile, "--methods", ","], "--methods")):
        assert run(["correlate", *words, "--out", str(tmp_path / "bad"), "--quiet"]) == 2
        captured = capsys.readouterr()
        assert message in captured.err
        assert len(captured.err.strip().splitlines()) == 1
        assert not (tmp_path / "bad").exists()
