"""The analysis commands end to end, in process, on a tiny pair on disk; and every kind of bad input."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import build_tiny_tokenizer
from families import FAMILIES
from midblock import writing
from midblock.cli.app import run
from midblock.provenance import read_run

COLUMNS = ["kind", "layer", "metric", "side", "value", "low", "high", "n"]
PROFILE = ["--samples", "8", "--token-samples", "4", "--max-length", "48", "--replicates", "50"]
SMALL = {
    "profile": PROFILE,
    "lens": ["--samples", "6", "--max-length", "48", "--top-k", "3"],
    "swap": ["--samples", "6", "--max-length", "48", "--segments", "2"],
    "gradients": ["--samples", "4", "--max-length", "48"],
    "steer": ["--samples", "8", "--max-length", "48", "--blocks", "1:3", "--alphas", "0,1"],
}


def save_model(folder: Path, seed: int = 0, family: str = "llama", **overrides: Any) -> Path:
    FAMILIES[family](seed=seed, **overrides).save_pretrained(folder)
    build_tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with base, sft, third and data.jsonl."""
    home = tmp_path_factory.mktemp("pair")
    for seed, name in enumerate(("base", "sft", "third")):
        save_model(home / name, seed)
    rows = [{"prompt": f"what is {i} and {i + 3} plus one? ", "completion": f"it is {2 * i + 4}, of course."}
            for i in range(12)]
    (home / "data.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return home


@pytest.fixture(autouse=True)
def _here(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Models and data by short names, and an environment that is put back."""
    before = dict(os.environ)
    monkeypatch.chdir(tmp_path)
    for path in home.iterdir():
        (tmp_path / path.name).symlink_to(path)
    with warnings.catch_warnings():
        yield
    for name in set(os.environ) - set(before):
        del os.environ[name]


@pytest.fixture
def no_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the drawing of figures out (seconds a command) where a test looks at other things."""
    for name in ("depth_lines", "heatmap", "lines", "segment_bars"):
        monkeypatch.setattr(f"midblock.figures.{name}", lambda *args, **options: None)
    monkeypatch.setattr("midblock.report.save.save_figure", lambda figure, folder, name: [])


def models_of(command: str) -> list[str]:
    return ["base"] if command == "gradients" else ["base", "sft"]


def words(command: str, *more: str, models: list[str] | None = None, data: str = "data.jsonl",
          out: str = "out") -> list[str]:
    own = SMALL.get(command, ["--samples", "4", "--max-length", "48", "--alphas", "0,1"])  # merge
    return [command, *(models or models_of(command)), "--data", data, "--out", out, *own, *more]


def assert_refused(capsys: pytest.CaptureFixture[str], argv: list[str], *expected: str, out: str = "out") -> str:
    """The call exits with 2, says one line with the expected words, and leaves no folder behind."""
    capsys.readouterr()
    code = run([*argv, "--quiet"])
    caught = capsys.readouterr()
    assert code == 2, caught.err
    errors = [line for line in caught.err.splitlines() if not line.startswith("Warning: ")]
    assert len(errors) == 1, caught.err
    assert errors[0].startswith("Error: ")
    for word in expected:
        assert word in errors[0], errors[0]
    assert caught.out == ""
    assert not Path(out).exists()
    return errors[0]


# -- what is written -----------------------------------------------------------------------------


@pytest.mark.e2e
@pytest.mark.parametrize("command", SMALL)
def test_a_command_writes_table_figures_and_settings(command: str, capsys: pytest.CaptureFixture[str],
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    # one small figure of the profile instead of its four large ones, which take longest here
    monkeypatch.setattr("midblock.analysis.profile.FAMILIES", {"spectrum": "Scale of the spectrum"})
    assert run(words(command, "--quiet")) == 0
    caught = capsys.readouterr()
    assert "out" in caught.out
    frame = pd.read_csv("out/table.csv")
    assert list(frame.columns[:8]) == COLUMNS
    assert len(frame) > 20
    done = read_run("out")
    assert (done["status"], done["command"]) == ("finished", command)
    assert done["settings"]["samples"] == int(SMALL[command][1])
    assert set(done["models"]) == {"base", "sft"} if command != "gradients" else {"base"}
    assert done["data"]["fingerprint"]
    assert done["peak_memory_bytes"] > 0
    empty = frame[frame["value"].isna()]
    reasons = {(r["metric"], str(r["layer"]), r["side"]) for r in done["undefined"]}
    assert {(r.metric, str(r.layer), r.side) for r in empty.itertuples()} <= reasons
    bounded = frame.dropna(subset=["low", "high"])
    assert (bounded["low"] <= bounded["high"]).all()
    figures = {p.name for p in Path("out/figures").iterdir()}
    assert figures
    assert {p.rsplit(".", 1)[1] for p in figures} == {"svg", "pdf"}
    assert set(done["files"]) >= {"table.csv", "summary.txt", *(f"figures/{f}" for f in figures)}
    *told, following = Path("out/summary.txt").read_text(encoding="utf-8").strip().splitlines()
    assert all(line in caught.out for line in told)
    last = caught.out.strip().splitlines()[-1]
    assert last.startswith(following)  # and a folder of its own
    assert last.startswith("Next: midblock ")
    assert not Path("out/state").exists()


@pytest.mark.usefixtures("no_drawing")
def test_the_next_command_repeats_what_the_same_models_need(capsys: pytest.CaptureFixture[str]) -> None:
    Path("swap").mkdir()
    assert run(words("lens", "--quiet", "--tokenizer", "base", "--names", "raw,tuned", "--device", "cpu")) == 0
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert last == ("Next: midblock swap base sft --data data.jsonl --tokenizer base --device cpu --names raw,tuned "
                    "--out swap-2")  # a folder that is free


@pytest.mark.e2e
@pytest.mark.parametrize("command", SMALL)
@pytest.mark.usefixtures("no_drawing")
def test_json_is_all_of_stdout_and_equals_the_table(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(words(command, "--json", "--quiet")) == 0
    printed = json.loads(capsys.readouterr().out)
    frame = pd.read_csv("out/table.csv")
    assert len(printed["table"]) == len(frame)
    assert printed["run"]["status"] == "finished"
    for row, value in zip(printed["table"], frame["value"], strict=True):
        assert row["value"] is None if math.isnan(value) else row["value"] == pytest.approx(value, rel=1e-8)


@pytest.mark.usefixtures("no_drawing")
def test_profile_has_every_metric_at_every_hidden_and_none_changes_against_itself(
        capsys: pytest.CaptureFixture[str]) -> None:
    assert run(words("profile", "--quiet", models=["base", "base"])) == 0
    frame = pd.read_csv("out/table.csv")
    per_hidden = frame.groupby("layer")["metric"].nunique()
    assert sorted(per_hidden.index) == [0, 1, 2, 3, 4]
    assert per_hidden.nunique() == 1
    change = frame[frame["side"] == "difference"].dropna(subset=["value"])
    assert (change["value"] == 0).all()
    shift = frame[frame["metric"].isin(["mean_shift", "change_intensity"])]
    assert (shift["value"] == 0).all()
    cosine = frame[frame["metric"] == "cosine"]["value"]
    assert cosine.to_numpy() == pytest.approx(1.0)


@pytest.mark.usefixtures("no_drawing")
@pytest.mark.parametrize("command", SMALL)
@pytest.mark.usefixtures("no_drawing")
def test_a_pair_stored_in_different_formats_is_compared_in_one(command: str) -> None:
    FAMILIES["llama"](seed=1).bfloat16().save_pretrained("half")
    build_tiny_tokenizer().save_pretrained("half")
    assert run(words(command, models=["base", "half"])) == 0
    models = read_run(Path("out"))["models"]
    assert [m["dtype"] for m in models.values()] == ["float32", "float32"]
    assert [m["notes"] for m in models.values()] == [[], ["stored in bfloat16"]]


@pytest.mark.usefixtures("no_drawing")
def test_the_bases_tokenizer_for_all(capsys: pytest.CaptureFixture[str]) -> None:
    other = build_tiny_tokenizer()
    other.add_tokens(["<extra>"], special_tokens=True)
    FAMILIES["llama"](seed=1).save_pretrained("added")
    other.save_pretrained("added")
    call = words("swap", models=["base", "added"])
    assert_refused(capsys, call, "--tokenizer base")
    assert run([*call, "--tokenizer", "base"]) == 0
    assert read_run(Path("out"))["settings"]["tokenizer"] == "base"


def test_a_chain_of_three_compares_each_with_the_first_and_the_one_before() -> None:
    for command in ("profile", "lens", "swap", "steer"):
        assert run(words(command, "--quiet", models=["base", "sft", "third"], out=command)) == 0
        stages = set(pd.read_csv(f"{command}/table.csv")["stage"].dropna())
        both_ways = {"base-sft", "base-dpo", "sft-dpo"} if command == "swap" else set()  # donor-recipient
        assert stages == {"sft-base", "dpo-base", "dpo-sft"} | both_ways


@pytest.mark.usefixtures("no_drawing")
def test_gradients_along_training_stand_beside_a_profile() -> None:
    assert run(words("profile", "--quiet", out="p")) == 0
    assert run(words("gradients", "--quiet", "--steps", "2", out="g")) == 0
    assert "weight_change" in set(pd.read_csv("g/table.csv")["metric"])
    assert run(["correlate", "p", "g", "--quiet", "--out", "c"]) == 0
    table = pd.read_csv("c/table.csv")
    pairs = set(zip(table["a"], table["b"], strict=True)) | set(zip(table["b"], table["a"], strict=True))
    assert {("gradient_norm", "cosine"), ("weight_change", "prompt_entropy")} <= pairs
    assert set(table["metric"]) == {"pearson", "spearman"}
    assert (table["n"] == 4).all()


@pytest.mark.usefixtures("no_drawing")
def test_steer_writes_vectors_and_generations_and_patches(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(words("steer", "--quiet", "--direction", "pc1", "--generate", "what is 2", "--max-new-tokens", "4")) == 0
    vectors = load_file("out/vectors.safetensors")
    assert set(vectors) == {"sft-base.block.1", "sft-base.block.2"}
    assert all(v.shape == (32,) for v in vectors.values())
    made = pd.read_csv("out/generations.csv")
    assert len(made) == 2 + 2
    assert run(words("steer", "--quiet", "--supervised", "--patch", "prompt", out="patched")) == 0
    frame = pd.read_csv("patched/table.csv")
    assert set(frame["direction"]) == {"patch prompt"}
    assert not Path("patched/vectors.safetensors").exists()
    assert_refused(capsys, words("steer", "--patch", "prompt", out="no"), "--supervised", out="no")
    assert_refused(capsys, words("steer", "--patch", "nowhere", out="no"), "last-prompt", out="no")
    assert_refused(capsys, words("steer", "--alphas", "a,b", out="no"), "--alphas", out="no")
    assert_refused(capsys, words("steer", "--blocks", "3:9", out="no"), "4 blocks", out="no")


@pytest.mark.usefixtures("no_drawing")
def test_lens_trace_and_double_norm() -> None:
    assert run(words("lens", "--quiet", "--trace", "1", "--earlier-code")) == 0
    trace = pd.read_csv("out/trace.csv")
    assert set(trace["hidden"]) == {0, 1, 2, 3, 4}
    assert trace["sample"].nunique() == 1
    assert "base (normed twice)" in set(pd.read_csv("out/table.csv")["side"])


@pytest.mark.parametrize("command", ["lens", "gradients"])
def test_one_model_alone_is_measured_and_drawn(command: str) -> None:
    more = ["--earlier-code"] if command == "lens" else []
    assert run(words(command, "--quiet", *more, models=["base"])) == 0
    assert len(pd.read_csv("out/table.csv")) > 3
    assert list(Path("out/figures").glob("*.svg"))


# -- resume --------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["profile", "lens"])
@pytest.mark.usefixtures("no_drawing")
def test_an_interrupted_run_resumes_to_the_same_table(command: str, monkeypatch: pytest.MonkeyPatch,
                                                      capsys: pytest.CaptureFixture[str]) -> None:
    from midblock.capture import Lockstep

    assert run(words(command, "--quiet", "--batch-size", "2", out="whole")) == 0
    passes: list[int] = []
    start = Lockstep.__iter__

    def stop_in_the_third(self: Lockstep) -> Any:
        passes.append(1)
        if len(passes) == 3:
            raise KeyboardInterrupt
        return start(self)

    with monkeypatch.context() as patch:
        patch.setattr(Lockstep, "__iter__", stop_in_the_third)
        assert run(words(command, "--quiet", "--batch-size", "2")) == 130
    assert "--resume" in capsys.readouterr().err
    assert read_run("out")["status"] == "interrupted"
    assert not Path("out/table.csv").exists()
    assert run(words(command, "--quiet", "--batch-size", "2")) == 2  # not empty, and no --resume
    assert "--resume" in capsys.readouterr().err
    passes.clear()
    with monkeypatch.context() as patch:
        patch.setattr(Lockstep, "__iter__", lambda self: passes.append(1) or start(self))
        assert run(words(command, "--quiet", "--batch-size", "2", "--resume")) == 0
    count = int(SMALL[command][1]) // 2
    assert len(passes) == count - 2
    assert read_run("out")["status"] == "finished"
    pd.testing.assert_frame_equal(pd.read_csv("out/table.csv"), pd.read_csv("whole/table.csv"))
    assert not Path("out/state").exists()


@pytest.mark.parametrize("command", ["profile", "lens"])
@pytest.mark.usefixtures("no_drawing")
def test_a_streamed_run_writes_the_same_table(command: str, monkeypatch: pytest.MonkeyPatch,
                                              capsys: pytest.CaptureFixture[str]) -> None:
    from midblock.models.streaming import StreamedWeights

    assert run(words(command, "--quiet", out="whole")) == 0
    assert not read_run("whole")["models"]["base"]["streamed"]
    load = StreamedWeights.load

    def stop(self: StreamedWeights, part: Any) -> None:
        if part == 2:
            raise KeyboardInterrupt
        load(self, part)

    with monkeypatch.context() as patch:
        patch.setattr(StreamedWeights, "load", stop)
        assert run(words(command, "--quiet", "--stream", "always", "--memory-limit", "100GB")) == 130
    assert read_run("out")["status"] == "interrupted"
    assert run(words(command, "--quiet", "--resume", "--stream", "always", "--scratch", ".")) == 0
    assert read_run("out")["models"]["sft"]["streamed"]
    assert Path("out/table.csv").read_bytes() == Path("whole/table.csv").read_bytes()
    capsys.readouterr()
    assert run(words(command, "--quiet", "--stream", "always", "--memory-limit", "50MB", out="small")) == 2
    assert "at least" in capsys.readouterr().err
    assert run(words(command, "--quiet", "--stream", "sometimes", out="small")) == 2


@pytest.mark.usefixtures("no_drawing")
def test_resuming_with_other_settings_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(words("lens", "--quiet")) == 0
    before = Path("out/run.json").read_bytes()
    assert run(words("lens", "--quiet", "--resume", "--seed", "5")) == 2
    assert "seed was 0, now 5" in capsys.readouterr().err
    assert Path("out/run.json").read_bytes() == before


# -- bad input -----------------------------------------------------------------------------------


def copy_of(home: Path, name: str, into: str) -> Path:
    return Path(shutil.copytree(home / name, into))


@pytest.mark.parametrize("command", SMALL)
@pytest.mark.usefixtures("no_drawing")
def test_a_model_that_does_not_exist(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    models = [*models_of(command)[:-1], "no-such-folder/model"]
    assert_refused(capsys, words(command, models=models), "no-such-folder/model")


@pytest.mark.usefixtures("no_drawing")
def test_a_folder_without_config(capsys: pytest.CaptureFixture[str]) -> None:
    Path("empty").mkdir()
    assert_refused(capsys, words("profile", models=["base", "empty"]), "empty", "config.json")


@pytest.mark.parametrize(("change", "expected"), [
    ({"family": "qwen3"}, "architecture"),
    ({"num_hidden_layers": 3}, "depth"),
    ({"hidden_size": 48}, "width"),
], ids=["architecture", "depth", "width"])
@pytest.mark.usefixtures("no_drawing")
def test_a_pair_that_does_not_fit_says_in_what(change: dict[str, Any], expected: str,
                                               capsys: pytest.CaptureFixture[str]) -> None:
    save_model(Path("other"), **change)
    assert_refused(capsys, words("profile", models=["base", "other"]), expected, "base", "other")


@pytest.mark.parametrize("command", ["profile", "lens", "swap", "merge"])
@pytest.mark.usefixtures("no_drawing")
def test_a_larger_vocabulary_is_compared_over_the_common_rows(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    save_model(Path("other"), vocab_size=160)
    assert run(words(command, models=["base", "other"])) == 0
    said = "compared over the first 128 of the 160 rows of its vocabulary; the last 32 have no counterpart in base"
    assert capsys.readouterr().err.count(said) == 1
    assert read_run(Path("out"))["models"]["sft"]["notes"] == [said]


@pytest.mark.parametrize("damage", ["truncated", "corrupt"])
@pytest.mark.usefixtures("no_drawing")
def test_a_damaged_safetensors_file_is_named(damage: str, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = copy_of(home, "sft", "bad") / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:len(content) // 2] if damage == "truncated" else b"\xff" * 64 + content[64:])
    assert_refused(capsys, words("profile", models=["base", "bad"]), "model.safetensors", "bad")


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.usefixtures("no_drawing")
def test_weights_that_are_not_finite_are_named(value: float, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = copy_of(home, "sft", "bad") / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.2.mlp.up_proj.weight"][1, 1] = value
    save_file(tensors, path, metadata={"format": "pt"})
    assert_refused(capsys, words("lens", models=["base", "bad"]), "model.layers.2.mlp.up_proj.weight",
                   "NaN or infinity")


@pytest.mark.usefixtures("no_drawing")
def test_a_tokenizer_of_another_model(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = copy_of(home, "sft", "bad") / "tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    path.write_text(json.dumps(tokenizer), encoding="utf-8")
    assert_refused(capsys, words("profile", models=["base", "bad"]), "tokenizer", "'a'")


@pytest.mark.parametrize("command", SMALL)
@pytest.mark.usefixtures("no_drawing")
def test_an_empty_data_set(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("empty.jsonl").write_text("", encoding="utf-8")
    assert_refused(capsys, words(command, data="empty.jsonl"), "empty.jsonl")


@pytest.mark.usefixtures("no_drawing")
def test_data_that_does_not_exist(capsys: pytest.CaptureFixture[str]) -> None:
    assert_refused(capsys, words("profile", data="nowhere.jsonl"), "nowhere.jsonl")


@pytest.mark.usefixtures("no_drawing")
def test_rows_without_the_needed_field_are_named_by_file_and_line(capsys: pytest.CaptureFixture[str]) -> None:
    Path("rows.jsonl").write_text('{"title": "x"}\n{"title": "y"}\n', encoding="utf-8")
    assert_refused(capsys, words("profile", data="rows.jsonl"), "rows.jsonl:1", "text")


@pytest.mark.usefixtures("no_drawing")
def test_a_single_row_without_the_field_is_left_out_and_named(capsys: pytest.CaptureFixture[str]) -> None:
    lines = Path("data.jsonl").read_text(encoding="utf-8").splitlines()
    Path("rows.jsonl").write_text("\n".join([lines[0], '{"title": "x"}', *lines[1:]]) + "\n", encoding="utf-8")
    code = run(words("profile", "--quiet", data="rows.jsonl"))
    assert "rows.jsonl:2" in capsys.readouterr().err
    if code == 0:
        assert read_run("out")["data"]["skipped"] == 1
    else:
        assert code == 2
        assert not Path("out").exists()


@pytest.mark.parametrize("command", SMALL)
@pytest.mark.usefixtures("no_drawing")
def test_no_samples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert_refused(capsys, words(command, "--samples", "0"), "--samples")


@pytest.mark.parametrize("command", SMALL)
@pytest.mark.usefixtures("no_drawing")
def test_an_output_folder_that_is_not_empty_is_left_alone(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("out").mkdir()
    Path("out/mine.txt").write_text("mine", encoding="utf-8")
    assert run(words(command, "--quiet")) == 2
    caught = capsys.readouterr()
    assert caught.err.count("\n") == 1
    assert "out is not empty" in caught.err
    assert [p.name for p in Path("out").iterdir()] == ["mine.txt"]
    assert Path("out/mine.txt").read_text(encoding="utf-8") == "mine"


@pytest.mark.usefixtures("no_drawing")
def test_an_output_place_that_is_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(words("profile", "--quiet", out="data.jsonl")) == 2
    assert "is a file" in capsys.readouterr().err


@pytest.mark.parametrize(("command", "full_at"), [
    *((c, name) for c in SMALL for name in ("run.json", "table.csv")), ("swap", ".svg")])
def test_a_full_disk_is_one_line_and_leaves_no_half_file(command: str, full_at: str, monkeypatch: pytest.MonkeyPatch,
                                                         capsys: pytest.CaptureFixture[str]) -> None:
    rename = os.replace

    def full(source: Any, target: Any) -> None:
        if str(target).endswith(full_at):
            raise OSError(errno.ENOSPC, "No space left on device", str(target))
        rename(source, target)

    monkeypatch.setattr(writing.os, "replace", full)
    assert run(words(command, "--quiet")) == 2
    caught = capsys.readouterr()
    errors = [line for line in caught.err.splitlines() if not line.startswith("Warning: ")]
    assert len(errors) == 1, caught.err
    assert "disk is full" in errors[0]
    left = [p for p in Path("out").rglob("*") if p.is_file()] if Path("out").exists() else []
    assert not [p for p in left if p.name.endswith(full_at) or p.name.startswith(".")]
    for path in left:
        if path.suffix == ".json":
            assert json.loads(path.read_text(encoding="utf-8"))["status"] == "failed"


@pytest.mark.usefixtures("no_drawing")
def test_a_model_with_code_of_its_own_is_refused(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = copy_of(home, "sft", "coded")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config |= {"model_type": "my_own", "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "code.py").write_text("raise SystemExit('code was run')\n", encoding="utf-8")
    assert_refused(capsys, words("profile", models=["base", "coded"]), "--trust-remote-code")


@pytest.mark.usefixtures("no_drawing")
def test_a_pickle_checkpoint_is_refused_unless_asked_for(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = copy_of(home, "sft", "pickled")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert_refused(capsys, words("lens", models=["base", "pickled"]), "--allow-pickle")
    assert run(words("lens", "--quiet", "--allow-pickle", models=["base", "pickled"])) == 0


@pytest.mark.parametrize("command", ["profile", "swap", "steer"])
@pytest.mark.usefixtures("no_drawing")
def test_one_model_where_two_are_needed(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert_refused(capsys, words(command, models=["base"]), "at least 2")


@pytest.mark.usefixtures("no_drawing")
def test_unknown_devices_and_names_that_do_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    assert_refused(capsys, words("profile", "--device", "abacus"), "abacus")
    assert_refused(capsys, words("profile", "--names", "one"), "names")
