"""`midblock evaluate` as a person calls it, on tiny models on disk."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
import torch

from conftest import build_tiny_tokenizer
from families import FAMILIES
from midblock.cli import evaluate as command
from midblock.cli.app import COMMANDS, app, run
from midblock.provenance import read_run

if "evaluate" not in COMMANDS:
    command.register(app)


@pytest.fixture(autouse=True)
def _leave_no_settings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = dict(os.environ)
    monkeypatch.delenv("MIDBLOCK_DEBUG", raising=False)
    with warnings.catch_warnings():
        yield
    for name in set(os.environ) - set(before):
        del os.environ[name]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    FAMILIES["llama"]().save_pretrained(folder)
    build_tiny_tokenizer().save_pretrained(folder)
    return folder


def make_adapter(folder: Path, base: Path, **overrides: int) -> Path:
    """A LoRA adapter that changes the model it belongs to."""
    from peft import LoraConfig, get_peft_model

    plain = FAMILIES["llama"](**overrides)
    plain.name_or_path = str(base)
    tuned = get_peft_model(plain, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(0))
    tuned.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(tmp_path_factory.mktemp("adapters") / "lora-01100", model)


def test_scores_are_printed_and_nothing_is_written_without_out(
        model: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["evaluate", str(model), "--task", "pydocs", "--samples", "3", "--max-length", "64", "-q"]) == 0
    text = capsys.readouterr().out
    assert "perplexity" in text
    assert "n=3" in text
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_is_compared_with_its_base_on_the_same_items(
        model: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert run(["evaluate", str(model), "--adapter", str(adapter), "--compare-base", "--task", "arithmetic",
                "--task", "answer_loss", "--task", "pydocs", "--samples", "4", "--max-new-tokens", "4",
                "--max-length", "128", "--out", str(out), "--json"]) == 2
    assert "answer_loss" in capsys.readouterr().err  # it has no data of its own
    assert not out.exists()
    assert run(["evaluate", str(model), "--adapter", str(adapter), "--compare-base", "--task", "arithmetic",
                "--task", "pydocs", "--samples", "4", "--max-new-tokens", "4", "--max-length", "128",
                "--out", str(out), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    table = pd.read_csv(out / "table.csv")
    assert set(table["kind"]) == {"model"}
    assert set(table["layer"]) == {"all"}
    assert set(table["side"]) == {"base", "lora-01100", "difference"}
    assert set(table["metric"]) == {"accuracy", "perplexity", "loss"}
    value = table[table["metric"] == "perplexity"].set_index("side")["value"]
    assert value["lora-01100"] != value["base"]
    assert value["difference"] == pytest.approx(value["lora-01100"] - value["base"], rel=1e-5)
    assert found["differences"]["pydocs"]["value"] == pytest.approx(value["difference"], rel=1e-5)
    stored = read_run(out)
    assert stored["status"] == "finished"
    assert set(stored["models"]) == {"base", "lora-01100"}
    assert stored["models"]["base"]["fingerprint"] != stored["models"]["lora-01100"]["fingerprint"]
    for folder in (out, out / "base"):
        for task in ("arithmetic", "pydocs"):
            assert (folder / f"samples_{task}.jsonl").read_text().count("\n") >= 4
        assert set(json.loads((folder / "results.json").read_text())["results"]) == {"arithmetic", "pydocs"}
    items = [[json.loads(line)["item"] for line in (folder / "samples_pydocs.jsonl").read_text().splitlines()]
             for folder in (out, out / "base")]
    assert items[0] == items[1]


def test_an_adapter_can_be_the_model(adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["evaluate", str(adapter), "--compare-base", "--task", "pydocs", "--samples", "2", "--max-length",
                "64", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["results"]) == {"lora-01100", "base"}
    assert found["run"] is None


def test_a_finished_task_is_not_scored_again_on_resume(
        model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["evaluate", str(model), "--task", "pydocs", "--task", "arithmetic", "--samples", "3",
             "--max-length", "64", "--max-new-tokens", "3", "--out", str(tmp_path / "run"), "--json"]
    assert run(words) == 0
    first = json.loads(capsys.readouterr().out)
    stored = tmp_path / "run" / "scores" / "base"
    (stored / "arithmetic.json").unlink()
    before = (stored / "pydocs.json").stat().st_mtime_ns
    assert run([*words, "--resume"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert (stored / "pydocs.json").stat().st_mtime_ns == before
    assert (stored / "arithmetic.json").is_file()
    for task in ("pydocs", "arithmetic"):
        a, b = (f["results"]["base"][task] for f in (first, again))
        assert {k: v for k, v in a.items() if k != "seconds"} == {k: v for k, v in b.items() if k != "seconds"}
    assert run(words) == 2  # not empty
    assert run([*words, "--resume", "--seed", "5"]) == 2  # other settings


def test_own_rows_are_scored(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"question": f"{i} + 1?", "answer": f"#### {i + 1}"} for i in range(3)]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert run(["evaluate", str(model), "--task", "exact_match", "--task", "answer_loss", "--data",
                str(tmp_path / "mine.jsonl"), "--max-new-tokens", "3", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["results"]["base"]
    assert (found["exact_match"]["n"], found["answer_loss"]["n"]) == (3, 3)
    assert found["answer_loss"]["low"] < found["answer_loss"]["value"] < found["answer_loss"]["high"]


@pytest.mark.parametrize(("words", "message"), [
    (["--task", "gsm9k"], "did you mean gsm8k"),
    (["--task", "humaneval"], "--allow-code-execution"),
    (["--task", "pydocs", "--max-new-tokens", "9"], "generates nothing"),
    (["--task", "pydocs", "--compare-base"], "--adapter"),
    (["--task", "pydocs", "--resume"], "--out"),
    (["--task", "perplexity"], "--data"),
    (["--task", "pydocs", "--adapter", "nowhere-at-all"], "nowhere-at-all"),
])
def test_mistakes_are_one_line(words: list[str], message: str, model: Path,
                               capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["evaluate", str(model), "--samples", "2", *words]) == 2
    caught = capsys.readouterr()
    assert message in caught.err
    assert caught.err.startswith("Error: ")
    assert caught.out == ""
    assert "Traceback" not in caught.err


def test_an_adapter_of_another_model_is_refused(model: Path, tmp_path: Path,
                                                capsys: pytest.CaptureFixture[str]) -> None:
    wider = make_adapter(tmp_path / "other", model, hidden_size=64)
    assert run(["evaluate", str(model), "--adapter", str(wider), "--task", "pydocs", "--samples", "2",
                "--out", str(tmp_path / "run")]) == 2
    assert "adapter" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_real_model_on_real_tasks(capsys: pytest.CaptureFixture[str]) -> None:
    """SmolLM2: untuned it solves almost no two-step problem, and reads English well."""
    assert run(["evaluate", "smollm2", "--task", "arithmetic", "--task", "pydocs", "--samples", "50",
                "--max-new-tokens", "48", "--max-length", "256", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["results"]["base"]
    assert found["arithmetic"]["value"] <= 0.1
    assert 5 < found["pydocs"]["value"] < 60
