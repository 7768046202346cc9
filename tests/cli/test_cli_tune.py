"""`midblock tune` end to end on a tiny model: files, dry run, resumption, mistakes."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from families import FAMILIES
from midblock.cli.app import run
from midblock.models import save_checkpoint
from midblock.tuning import load_plan, make_plan

pytestmark = [pytest.mark.e2e, pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")]


@pytest.fixture
def base(tmp_path: Path, tiny_tokenizer: Any) -> Path:
    return save_checkpoint(FAMILIES["llama"](), tiny_tokenizer, tmp_path / "base")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"Say {i}: ", "completion": f"it is {i}"}) + "\n"
                            for i in range(20)))
    return path


def tune(base: Path, data: Path, *words: str) -> int:
    return run(["tune", str(base), "--data", str(data), "--dtype", "float32", "--quiet", *words])


def test_a_run_writes_everything_and_resumes(base: Path, data: Path, tmp_path: Path,
                                             capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    words = ("--mask", "0110", "--rank", "4", "--epochs", "2", "--batch-size", "4", "--learning-rate", "1e-2",
             "--merge", "--out", str(out))
    assert tune(base, data, *words, "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    found = json.loads((out / "run.json").read_text())
    assert found["status"] == "finished"
    assert found["command"] == "tune"
    assert found["results"]["check"]["ok"]
    assert found["results"]["plan"] == printed["plan"]
    assert found["results"]["training"]["steps"] == 10
    assert found["models"]["base"]["fingerprint"]
    for name in ("adapter/adapter_model.safetensors", "adapter/README.md", "model/model.safetensors", "summary.txt",
                 "figures/loss.svg", "figures/update.pdf"):
        assert (out / name).is_file(), name
    with (out / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {"kind", "layer", "metric", "side", "value", "low", "high", "n"} <= set(rows[0])
    assert sum(float(r["value"]) for r in rows if r["metric"] == "trainable_parameters" and r["kind"] == "block") == \
        printed["plan"]["params"]
    weights = (out / "adapter" / "adapter_model.safetensors").read_bytes()
    assert tune(base, data, *words) == 2  # not empty
    assert "--resume" in capsys.readouterr().err
    assert tune(base, data, *words, "--resume") == 0
    assert (out / "adapter" / "adapter_model.safetensors").read_bytes() == weights
    assert tune(base, data, *words, "--resume", "--seed", "1") == 2
    assert "seed was 0, now 1" in capsys.readouterr().err


def test_dry_run_prints_the_plan_and_writes_nothing(base: Path, data: Path, tmp_path: Path,
                                                    capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--mask", "0010", "--budget", "match:1111@4", "--dry-run", "--out", str(tmp_path / "out"))
    assert tune(base, data, *words) == 0
    text = capsys.readouterr().out
    for part in ("blocks 2 of 4", "rank 16, alpha 32", "mismatch +0", "all-layer LoRA", "memory", "later epoch"):
        assert part in text, part
    assert not (tmp_path / "out").exists()
    assert tune(base, data, *words, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    mine, other = found["estimates"]
    assert found["plan"]["params"] == make_plan(FAMILIES["llama"](), mask="1111", rank=4).params
    assert mine["relative time"] <= 1 == other["relative time"]
    (tmp_path / "plan.json").write_text(json.dumps(found))
    assert load_plan(tmp_path / "plan.json").rank == 16


def test_a_streamed_run_writes_the_same_adapter(base: Path, data: Path, tmp_path: Path,
                                                capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--mask", "0100", "--rank", "4", "--epochs", "2", "--batch-size", "4", "--learning-rate", "1e-2",
             "--eval-data", str(data), "--eval-samples", "4")
    outs = {s: tmp_path / s for s in ("never", "always")}
    for stream, out in outs.items():
        assert tune(base, data, *words, "--stream", stream, "--scratch", str(tmp_path), "--out", str(out)) == 0
    found = {s: json.loads((out / "run.json").read_text()) for s, out in outs.items()}
    assert found["always"]["models"]["base"]["streamed"]
    assert not found["never"]["models"]["base"]["streamed"]
    assert found["always"]["results"]["held_out"] == found["never"]["results"]["held_out"]
    weights = {s: (out / "adapter" / "adapter_model.safetensors").read_bytes() for s, out in outs.items()}
    assert weights["always"] == weights["never"]
    capsys.readouterr()
    for mistake, told in ((("--memory-limit", "50MB"), "at least"), (("--merge",), "whole checkpoint"),
                          (("--scratch", str(tmp_path / "absent"), "--cache", "none"), None)):
        out = tmp_path / "mistake"
        assert tune(base, data, *words, "--stream", "always", *mistake, "--out", str(out)) == (2 if told else 0)
        assert told is None or told in capsys.readouterr().err


@pytest.mark.parametrize("index", [False, True])
def test_a_dry_run_needs_no_weights(base: Path, data: Path, index: bool, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--mask", "0010", "--rank", "2", "--dry-run", "--json")
    assert tune(base, data, *words) == 0
    whole = json.loads(capsys.readouterr().out)
    (base / "model.safetensors").unlink()
    if index:  # of shards that were not fetched
        (base / "model.safetensors.index.json").write_text(json.dumps(
            {"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}))
    assert tune(base, data, *words) == 0
    assert json.loads(capsys.readouterr().out)["plan"] == whole["plan"]
    assert tune(base, data, *words[:-2]) == 2
    assert "weights" in capsys.readouterr().err or index


def test_plan_files(base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = make_plan(FAMILIES["llama"](), modules=["model.layers.1.mlp.up_proj", "model.layers.3.self_attn.q_proj"],
                     rank=2)
    plan.save(tmp_path / "plan.json")
    assert tune(base, data, "--plan", str(tmp_path / "plan.json"), "--steps", "3", "--out", str(tmp_path / "out"),
                "--learning-rate", "1e-2", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert {u["module"] for u in found["results"]["check"]["updates"]} == {m.name for m in plan.modules}
    assert tune(base, data, "--plan", str(tmp_path / "plan.json"), "--mask", "0010") == 2
    assert "leave out --mask" in capsys.readouterr().err


MISTAKES: dict[str, tuple[list[str], str]] = {
    "digits": (["--mask", "0120"], "digits 0 and 1"),
    "long mask": (["--mask", "01010"], "has 4 blocks"),
    "nowhere": ([], "exactly one way"),
    "twice": (["--mask", "0010", "--blocks", "1:2"], "exactly one way"),
    "outside": (["--blocks", "2:9"], "do not fit"),
    "budget": (["--mask", "0010", "--budget", "10"], "smaller than rank 1"),
    "rank and budget": (["--mask", "0010", "--rank", "2", "--budget", "9k"], "both a rank"),
    "targets": (["--mask", "0010", "--target-modules", "c_attn"], "self_attn.q_proj"),
    "rate": (["--mask", "0010", "--rank", "2", "--learning-rate", "-1"], "--learning-rate must be more than 0"),
    "schedule": (["--mask", "0010", "--rank", "2", "--schedule", "steep"], "linear, cosine, constant"),
    "cache": (["--mask", "0010", "--rank", "2", "--cache", "ram"], "none, memory, disk:DIR"),
    "limit": (["--mask", "0010", "--rank", "2", "--cache-limit", "lots"], "size in bytes"),
    "plan": (["--plan", "absent.json"], "plan file"),
    "tracker": (["--mask", "0010", "--rank", "2", "--report-to", "nobody"], "--report-to nobody cannot be used"),
    "several": (["--mask", "0010", "--rank", "-1", "--warmup", "2", "--scale", "big"],
                "--rank must be at least 1, got -1; --scale 'big' is not one of"),
    "alpha": (["--mask", "0010", "--rank", "2", "--alpha", "nan"], "--alpha must be a finite number"),
    "seed": (["--mask", "0010", "--rank", "2", "--seed", "4294967296"], "--seed must be less than"),
    "explosion": (["--mask", "0010", "--rank", "2", "--learning-rate", "1e36", "--steps", "20", "--warmup", "0"],
                  "lower learning rate"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_clear_line(name: str, base: Path, data: Path, tmp_path: Path,
                                     capsys: pytest.CaptureFixture[str]) -> None:
    words, message = MISTAKES[name]
    assert tune(base, data, *words, "--out", str(tmp_path / "out")) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert captured.err.startswith("Error: ")
    assert "Traceback" not in captured.err
    if name != "explosion":
        assert not (tmp_path / "out").exists()


def test_data_without_completions(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": "words and words"}\n{"text": "more words here"}\n')
    assert tune(base, path, "--mask", "0010", "--rank", "2", "--out", str(tmp_path / "out")) == 2
    message = capsys.readouterr().err
    assert "completion" in message
    assert "text.jsonl:1" in message
    assert tune(base, path, "--mask", "0010", "--rank", "2", "--all-tokens", "--steps", "3", "--out",
                str(tmp_path / "out"), "--learning-rate", "1e-2") == 0


def test_samples_over_the_limit_are_counted(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "long.jsonl"
    path.write_text("".join(json.dumps({"prompt": "Go. ", "completion": "x" * n}) + "\n" for n in (5, 40, 60)))
    assert tune(base, path, "--mask", "0010", "--rank", "2", "--steps", "3", "--max-length", "16", "--out",
                str(tmp_path / "out"), "--learning-rate", "1e-2") == 0
    captured = capsys.readouterr()
    assert "2 of 3 samples were longer than --max-length 16" in captured.err
    assert "2 rows cut to 16 tokens" in captured.out
    assert json.loads((tmp_path / "out" / "run.json").read_text())["results"]["tokens"]["truncated"] == 2


def test_an_adapter_of_another_model_is_told(base: Path, data: Path, tmp_path: Path, tiny_tokenizer: Any,
                                             capsys: pytest.CaptureFixture[str]) -> None:
    make_plan(FAMILIES["gpt2"](), mask="0010", rank=2).save(tmp_path / "plan.json")
    assert tune(base, data, "--plan", str(tmp_path / "plan.json")) == 2
    assert "another model" in capsys.readouterr().err
