"""`midblock weights` end to end on tiny checkpoints on disk."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch
from peft import LoraConfig, get_peft_model

from families import FAMILIES
from midblock.cli.app import run
from midblock.models import AdapterFile, save_checkpoint
from midblock.provenance import read_run

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders base, sft (three weights of block 1 changed), other (wider) and lora (an adapter of base)."""
    home = tmp_path_factory.mktemp("weights")
    base = FAMILIES["llama"]()
    save_checkpoint(base, None, home / "base")
    sft = FAMILIES["llama"]()
    with torch.no_grad():
        for matrix in "qkv":
            getattr(sft.model.layers[1].self_attn, f"{matrix}_proj").weight.add_(0.25)
    save_checkpoint(sft, None, home / "sft")
    save_checkpoint(FAMILIES["llama"](intermediate_size=96), None, home / "other")
    adapter = get_peft_model(FAMILIES["llama"](), LoraConfig(r=2, target_modules=["q_proj"]))
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    adapter.save_pretrained(home / "lora")
    return home


def test_table_figures_summary_and_json(home, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(["weights", str(home / "base"), str(home / "sft"), "--out", str(out), "--json", "--spectra"]) == 0
    printed = json.loads(capsys.readouterr().out)
    table = pd.read_csv(out / "table.csv")
    assert list(table)[:8] == ["kind", "layer", "metric", "side", "value", "low", "high", "n"]
    own = table[(table.kind == "block") & (table.metric == "weight_change") & (table.matrix == "qkvo")]
    want = 0.25 * (32 + 2 * (16 * 32) ** 0.5)  # q is 32 x 32; k and v are 16 x 32
    assert own.set_index("layer")["value"].to_dict() == pytest.approx({"0": 0, "1": want, "2": 0, "3": 0})
    ranks = table[table.metric == "weight_change_effective_rank"].dropna(subset="value")
    assert ranks["value"].tolist() == pytest.approx([1.0] * 3, rel=1e-4)  # a constant is of rank 1
    run_json = read_run(out)
    assert run_json["status"] == "finished"
    assert run_json["models"]["base"]["blocks"] == 4
    assert len(run_json["models"]["base"]["fingerprint"]) == 64
    assert run_json["models"]["base"]["fingerprint"] != run_json["models"]["sft"]["fingerprint"]
    assert run_json["undefined"]
    assert "largest in block 1" in printed["summary"] == (out / "summary.txt").read_text().strip()
    assert {p.name for p in (out / "figures").iterdir()} == {
        f"weights{kind}.{end}" for kind in ("", "-matrices") for end in ("svg", "pdf")}
    assert len(printed["table"]) == len(table)


def test_for_people_and_with_an_adapter(home, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(["weights", str(home / "base"), str(home / "lora"), "--names", "base,lora", "--out", str(out)]) == 0
    captured = capsys.readouterr()
    assert "lora-base: Frobenius norm of the difference" in captured.out
    assert "4 of 4 blocks changed" in captured.out
    assert "figures: 100%" in captured.err
    table = pd.read_csv(out / "table.csv")
    q = table[(table.metric == "weight_change") & (table.matrix == "q")]
    factors = AdapterFile(home / "lora")
    want = [factors.delta(name).double().norm().item() for name in q["tensor"]]
    assert q["value"].tolist() == pytest.approx(want, rel=1e-5)
    assert (table[(table.metric == "weight_change") & (table.matrix == "k")]["value"] == 0).all()
    assert read_run(out)["models"]["lora"]["adapter"] == str(home / "lora")


@pytest.mark.parametrize(("words", "message"), [
    (["base"], "at least 2 checkpoints"),
    (["base", "nowhere/at/all"], "no such folder"),
    (["base", "other"], "has the shape"),
    (["lora", "base"], "first checkpoint must be the base"),
    (["base", "sft", "--names", "a,a"], "different stage names"),
])
def test_mistakes_are_one_line_and_leave_nothing(home, tmp_path, capsys, words, message):
    named = [str(home / w) if (home / w).exists() else w for w in words]
    assert run(["weights", *named, "--out", str(tmp_path / "out"), "--quiet"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert len(captured.err.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_truncated_file_and_full_output_folder(home, tmp_path, capsys):
    broken = tmp_path / "broken"
    shutil.copytree(home / "sft", broken)
    file = broken / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert run(["weights", str(home / "base"), str(broken), "--out", str(tmp_path / "out")]) == 2
    assert "model.safetensors is truncated" in capsys.readouterr().err
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").touch()
    assert run(["weights", str(home / "base"), str(home / "sft"), "--out", str(tmp_path / "used")]) == 2
    assert "not empty" in capsys.readouterr().err
