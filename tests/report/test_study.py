"""A study on tiny models: one folder a part, shared loads, resuming, and failures that stop nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from conftest import build_tiny_tokenizer
from midblock.cli.app import run
from midblock.errors import SettingsError
from midblock.report import study as module
from midblock.report.study import plan_study, read_study, study
from midblock.settings.study import PARTS, StudySettings

SMALL = {"samples": 6, "token_samples": 3, "lens_samples": 3, "swap_samples": 3, "gradient_samples": 4,
         "max_length": 48, "segments": 2}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, str]:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=5, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=2))
    model.save_pretrained(folder / "base")
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            generator = torch.Generator().manual_seed(number)
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder / "tuned")
    for name in ("base", "tuned"):
        build_tiny_tokenizer().save_pretrained(folder / name)
    rows = folder / "rows.jsonl"
    lines = [{"prompt": f"what is {i} and {i * i}? ", "completion": f"it is {i + i * i}, of course."}
             for i in range(12)]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return str(folder / "base"), str(folder / "tuned"), str(rows)


@pytest.fixture(scope="module")
def finished(pair: tuple[str, str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    base, tuned, rows = pair
    out = tmp_path_factory.mktemp("study") / "s"
    result = study([base, tuned], data=[rows], out=out, **SMALL)
    assert result.failed == {}
    assert set(result.seconds) == set(PARTS)
    return out


def test_every_part_is_a_run_folder_and_the_report_is_written(finished: Path) -> None:
    for part in PARTS:
        record = json.loads((finished / part / "run.json").read_text(encoding="utf-8"))
        assert (record["status"], record["command"]) == ("finished", part)
        assert len(pd.read_csv(finished / part / "table.csv"))
    assert json.loads((finished / "run.json").read_text(encoding="utf-8"))["status"] == "finished"
    assert (finished / "report.html").stat().st_size > 1e6


def test_a_part_equals_its_command(finished: Path, pair: tuple[str, str, str], tmp_path: Path) -> None:
    base, tuned, rows = pair
    assert run(["swap", base, tuned, "--data", rows, "--samples", "3", "--segments", "2", "--max-length", "48",
                "--out", str(tmp_path / "swap"), "--quiet"]) == 0
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "swap" / "table.csv"),
                                  pd.read_csv(finished / "swap" / "table.csv"))


def test_each_checkpoint_is_loaded_once(pair: tuple[str, str, str], tmp_path: Path,
                                        monkeypatch: pytest.MonkeyPatch) -> None:
    import midblock.models

    calls = []
    real = midblock.models.load_chain

    def counted(*args: object, **kwargs: object) -> object:
        calls.append(args)
        return real(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(midblock.models, "load_chain", counted)
    base, tuned, rows = pair
    result = study([base, tuned], data=[rows, "arithmetic"], out=tmp_path / "s", only=("lens", "swap"), **SMALL)
    assert result.failed == {}
    assert len(calls) == 1
    assert (tmp_path / "s" / "rows.jsonl" / "lens" / "table.csv").is_file()
    assert (tmp_path / "s" / "arithmetic" / "swap" / "table.csv").is_file()


def test_a_failed_part_is_named_and_stops_nothing(pair: tuple[str, str, str], tmp_path: Path) -> None:
    base, tuned, rows = pair
    result = study([base, tuned], data=[rows], out=tmp_path / "s", only=("lens", "swap"), **{**SMALL, "segments": 99})
    assert set(result.failed) == {"swap"}
    assert "lens" in result.seconds
    assert "Not measured: swap:" in result.summary()
    assert (tmp_path / "s" / "report.html").is_file()


def test_an_interrupted_study_goes_on_with_the_parts_that_are_left(
        pair: tuple[str, str, str], finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, tuned, rows = pair
    real = module._Chain.run

    def stop(chain: object, task: module.Task, progress: object) -> None:
        if task.part == "swap":
            raise KeyboardInterrupt
        real(chain, task, progress)  # type: ignore[arg-type]

    monkeypatch.setattr(module._Chain, "run", stop)
    with pytest.raises(KeyboardInterrupt):
        study([base, tuned], data=[rows], out=tmp_path / "s", **SMALL)
    monkeypatch.setattr(module._Chain, "run", real)
    result = study([base, tuned], data=[rows], out=tmp_path / "s", resume=True, **SMALL)
    assert set(result.seconds) == {"swap", "gradients", "locate", "correlate"}
    for part in PARTS:
        pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "s" / part / "table.csv"),
                                      pd.read_csv(finished / part / "table.csv"))


@pytest.mark.parametrize("name", ["table.csv", "summary.txt"])
def test_a_damaged_part_is_named_and_run_again(pair: tuple[str, str, str], tmp_path: Path, name: str,
                                               caplog: pytest.LogCaptureFixture) -> None:
    base, tuned, rows = pair
    few = {**SMALL, "only": ("weights", "lens")}
    study([base, tuned], data=[rows], out=tmp_path / "s", **few)
    path = tmp_path / "s" / "weights" / name
    before = path.read_text(encoding="utf-8")
    path.write_text(before.replace("1", "2"), encoding="utf-8")
    result = study([base, tuned], data=[rows], out=tmp_path / "s", resume=True, **few)
    assert set(result.seconds) == {"weights"}
    assert f"{path} was changed after midblock wrote it" in caplog.text
    assert path.read_text(encoding="utf-8") == before


@pytest.mark.parametrize(("chains", "data", "more", "message"), [
    ([["one"]], ["arithmetic"], {}, "at least 2 checkpoints"),
    ([["a", "b"]], [], {}, "need data"),
])
def test_what_cannot_be_planned(chains: list[list[str]], data: list[str], more: dict[str, object],
                                message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        plan_study(chains, data, Path("x"), StudySettings(**more))


def test_only_and_skip() -> None:
    assert StudySettings(only="lens,weights", skip="lens").parts == ("weights",)
    with pytest.raises(SettingsError, match="leave no part"):
        StudySettings(only=("lens",), skip=("lens",))
    with pytest.raises(SettingsError, match="only"):
        StudySettings(only=("lense",))
    assert [t.part for t in plan_study([["a", "b"]], [], Path("x"), StudySettings(only=("weights",)))] == ["weights"]


def test_folders_of_several_pairs_and_data_sets_are_distinct() -> None:
    tasks = plan_study([["a", "m/x"], ["b", "n/x"]], ["d/rows.jsonl", "e/rows.jsonl"], Path("s"), StudySettings())
    assert len({t.folder for t in tasks}) == len(tasks) == 2 * (2 + 5 * 2)


def test_a_study_file(tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    file.write_text("pairs: [[a, b], [c, d, e]]\ndata: gsm8k\nsamples: 7\nonly: [lens, swap]\n", encoding="utf-8")
    pairs, data, settings = read_study(file)
    assert (pairs, data) == ([["a", "b"], ["c", "d", "e"]], ["gsm8k"])
    assert (settings.samples, settings.parts) == (7, ("lens", "swap"))


@pytest.mark.parametrize("text", ["", "[]", "pairs: 5", "pairs: [[a]]", "pairs: [[a, b]]\nsampels: 3", "pairs: {a: b}",
                                  "pairs: [[a, b]]\ndata: {x: 1}", "pairs: [[1, 2]]", "pairs: [[a, b"])
def test_a_bad_study_file_is_one_error(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(text, encoding="utf-8")
    assert run(["study", str(file), "--out", str(tmp_path / "o"), "--dry-run"]) == 2
    assert capsys.readouterr().err.count("Error:") == 1
    assert not (tmp_path / "o").exists()


def test_the_dry_run_lists_the_parts(pair: tuple[str, str, str], tmp_path: Path,
                                     capsys: pytest.CaptureFixture[str]) -> None:
    base, tuned, rows = pair
    assert run(["study", base, tuned, "--data", rows, "--out", str(tmp_path / "o"), "--dry-run", "--json"]) == 0
    assert [r["part"] for r in json.loads(capsys.readouterr().out)] == list(PARTS)
    assert not (tmp_path / "o").exists()


def test_faults_of_a_study_file_name_its_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "study.yaml"
    file.write_text("pairs: [[a, b]]\ndata: arithmetic\nsamples: 0\nsampels: 3\n")
    assert run(["study", str(file), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "samples must be" in error
    assert "unknown setting sampels" in error
    assert "--samples" not in error
