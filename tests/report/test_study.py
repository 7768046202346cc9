"""A study on tiny models: one folder a part, shared loads, resuming, and failures that stop nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from midblock.cli.app import run
from midblock.errors import SettingsError
from midblock.report import parts as module
from midblock.report.study import costs_of, plan_study, read_study, study
from midblock.settings.study import PARTS, StudySettings
from pair_helpers import SMALL, tiny_pair

ANALYSES = [p for p in PARTS if p != "sweep"]

@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, str]:
    return tiny_pair(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def finished(pair: tuple[str, str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    base, tuned, rows = pair
    out = tmp_path_factory.mktemp("study") / "s"
    result = study([base, tuned], data=[rows], out=out, **SMALL)
    assert result.failed == {}
    assert set(result.seconds) == {*ANALYSES, "pass"}
    assert not (out / "pass").exists()
    return out


def test_every_part_is_a_run_folder_and_the_report_is_written(finished: Path) -> None:
    for part in ANALYSES:
        record = json.loads((finished / part / "run.json").read_text(encoding="utf-8"))
        assert (record["status"], record["command"]) == ("finished", part)
        assert len(pd.read_csv(finished / part / "table.csv"))
    assert json.loads((finished / "run.json").read_text(encoding="utf-8"))["status"] == "finished"
    assert (finished / "report.html").stat().st_size > 1e6


@pytest.mark.parametrize(("command", "options"), [
    ("profile", ["--samples", "6", "--token-samples", "3"]), ("lens", ["--samples", "3"]),
    ("swap", ["--samples", "3", "--segments", "2"]), ("gradients", ["--samples", "4", "--batch-size", "8"])])
def test_a_part_of_the_shared_pass_equals_its_command_to_the_last_digit(
        finished: Path, pair: tuple[str, str, str], tmp_path: Path, command: str, options: list[str]) -> None:
    """Token level, lens and swap read the same three samples, so that even their batches are the same."""
    base, tuned, rows = pair
    assert run([command, base, tuned, "--data", rows, *options, "--max-length", "48", "--out", str(tmp_path / "own"),
                "--quiet"]) == 0
    assert (tmp_path / "own" / "table.csv").read_text() == (finished / command / "table.csv").read_text()


def test_locate_takes_its_gradients_from_the_study_and_its_states_from_the_pass(
        finished: Path, pair: tuple[str, str, str], tmp_path: Path) -> None:
    base, _, rows = pair
    assert run(["locate", base, "--data", rows, "--samples", "4", "--gradient-samples", "4", "--max-length", "48",
                "--batch-size", "8", "--out", str(tmp_path / "own"), "--quiet"]) == 0
    own, shared = (pd.read_csv(f / "table.csv") for f in (tmp_path / "own", finished / "locate"))
    # four of six samples stand in other batches than alone: products of another height are rounded otherwise
    pd.testing.assert_frame_equal(own, shared, rtol=1e-4, atol=1e-6)
    exact = own["metric"].isin(["gradient_norm", "fisher", "taylor", "weight_snr"])
    assert exact.sum() == 4 * 5
    pd.testing.assert_frame_equal(own[exact], shared[exact], rtol=0, atol=0)


def test_samples_that_only_some_parts_read_change_nothing_but_rounding(
        pair: tuple[str, str, str], tmp_path: Path) -> None:
    base, tuned, rows = pair
    sizes = {**SMALL, "samples": 7, "token_samples": 2, "lens_samples": 9, "swap_samples": 5}
    assert study([base, tuned], data=[rows], out=tmp_path / "s", only=("profile", "lens", "swap"), **sizes).failed == {}
    for command, options in (("lens", ["--samples", "9"]), ("swap", ["--samples", "5", "--segments", "2"]),
                             ("profile", ["--samples", "7", "--token-samples", "2"])):
        assert run([command, base, tuned, "--data", rows, *options, "--max-length", "48", "--out",
                    str(tmp_path / command), "--quiet"]) == 0
        pd.testing.assert_frame_equal(pd.read_csv(tmp_path / command / "table.csv"),
                                      pd.read_csv(tmp_path / "s" / command / "table.csv"), rtol=1e-4, atol=1e-5)


def test_the_pass_runs_once_for_all_parts(pair: tuple[str, str, str], tmp_path: Path,
                                          monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks are run for the six samples of the profile once in each model, and for swaps from their borders on."""
    import midblock.analysis.swap
    from midblock.capture import forward

    ran: list[tuple[int, int]] = []
    real = forward.run_blocks

    def counted(model: object, anatomy: object, batch: object, **more: object) -> object:
        ran.append((int(more.get("start", 0)), len(batch)))  # type: ignore[arg-type, call-overload]
        return real(model, anatomy, batch, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(forward, "run_blocks", counted)
    monkeypatch.setattr(midblock.analysis.swap, "run_blocks", counted)
    base, tuned, rows = pair
    study([base, tuned], data=[rows], out=tmp_path / "s", only=("profile", "lens", "swap", "locate"), **SMALL)
    whole = sum(n for start, n in ran if start == 0)
    # two models on six samples; a swap of the first segment, in both directions, on three
    assert whole == 2 * 6 + 2 * 3
    assert sum(n for start, n in ran if start > 0) == 2 * 3


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


def test_what_others_left_in_the_folder_of_a_pass_stays_and_stops_nothing(pair: tuple[str, str, str], tmp_path: Path
                                                                          ) -> None:
    base, tuned, rows = pair
    study([base, tuned], data=[rows], out=tmp_path / "s", only=("profile",), **SMALL)
    foreign = tmp_path / "s" / "pass" / "part-00000.safetensors"
    foreign.parent.mkdir()
    foreign.write_text("not midblock's", encoding="utf-8")
    found = study([base, tuned], data=[rows], out=tmp_path / "s", resume=True, only=("profile", "lens", "swap"),
                  **SMALL)
    assert found.failed == {}
    assert {"lens", "swap"} <= found.seconds.keys()
    assert foreign.read_text(encoding="utf-8") == "not midblock's"


def test_an_interrupted_study_goes_on_with_the_parts_that_are_left(
        pair: tuple[str, str, str], finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, tuned, rows = pair
    real = module.Chain.run

    def stop(chain: object, task: module.Task, *more: object) -> None:
        if task.part == "swap":
            raise KeyboardInterrupt
        real(chain, task, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(module.Chain, "run", stop)
    with pytest.raises(KeyboardInterrupt):
        study([base, tuned], data=[rows], out=tmp_path / "s", **SMALL)
    monkeypatch.setattr(module.Chain, "run", real)
    result = study([base, tuned], data=[rows], out=tmp_path / "s", resume=True, **SMALL)
    assert set(result.seconds) == {"pass", "swap", "gradients", "locate", "correlate"}
    for part in ANALYSES:
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


def test_an_interrupted_pass_goes_on_with_the_samples_that_are_left(
        pair: tuple[str, str, str], finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from midblock.analysis import passes

    class Stopping(passes.Lockstep):
        made = 0

        def __init__(self, runs: object) -> None:
            Stopping.made += 1
            if Stopping.made == 2:
                raise KeyboardInterrupt
            super().__init__(runs)  # type: ignore[arg-type]

    base, tuned, rows = pair
    sizes = {**SMALL, "batch_size": 2}
    monkeypatch.setattr(passes, "Lockstep", Stopping)
    with pytest.raises(KeyboardInterrupt):
        study([base, tuned], data=[rows], out=tmp_path / "s", **sizes)
    assert list((tmp_path / "s" / "pass").glob("part-*.safetensors"))
    before = Stopping.made
    result = study([base, tuned], data=[rows], out=tmp_path / "s", resume=True, **sizes)
    assert result.failed == {}
    assert Stopping.made - before == 3  # of four batches one was done
    assert not (tmp_path / "s" / "pass").exists()
    whole = study([base, tuned], data=[rows], out=tmp_path / "w", **sizes)
    assert whole.failed == {}
    for part in ANALYSES:
        assert (tmp_path / "s" / part / "table.csv").read_text() == (tmp_path / "w" / part / "table.csv").read_text()


def test_a_part_may_be_added_to_a_finished_study(pair: tuple[str, str, str], tmp_path: Path) -> None:
    base, tuned, rows = pair
    study([base, tuned], data=[rows], out=tmp_path / "s", only=("weights", "lens"), **SMALL)
    result = study([base, tuned], data=[rows], out=tmp_path / "s", resume=True, only=("lens", "swap"), **SMALL)
    assert set(result.seconds) == {"swap"}


def test_a_pass_that_fails_for_all_is_tried_for_each(pair: tuple[str, str, str], tmp_path: Path,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    from midblock.analysis import lens as broken

    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(broken._LensSums, "feed", fail)
    base, tuned, rows = pair
    result = study([base, tuned], data=[rows], out=tmp_path / "s", only=("profile", "lens", "swap"), **SMALL)
    assert result.failed == {"lens": "RuntimeError: out of memory"}
    assert {"profile", "swap"} <= set(result.seconds)
    assert "out of memory" in (tmp_path / "s" / "failures.txt").read_text()


def test_data_that_are_read_at_the_pooled_level_alone(pair: tuple[str, str, str], tmp_path: Path) -> None:
    base, tuned, rows = pair
    chosen = StudySettings(token_data=("arithmetic",))
    tasks = plan_study([[base, tuned]], [rows, "arithmetic"], tmp_path, chosen)
    assert [t.part for t in tasks if t.data == rows] == ["profile"]
    assert {t.part for t in tasks if t.data == "arithmetic"} == {"profile", "lens", "swap", "gradients", "locate"}
    result = study([base, tuned], data=[rows, "arithmetic"], out=tmp_path / "s", token_data=("arithmetic",),
                   only=("profile",), **SMALL)
    assert result.failed == {}
    metrics = {d: set(pd.read_csv(tmp_path / "s" / d / "profile" / "table.csv")["metric"])
               for d in ("rows.jsonl", "arithmetic")}
    assert metrics["arithmetic"] - metrics["rows.jsonl"] >= {"prompt_entropy", "curvature"}
    assert {"cka", "effective_rank"} <= metrics["rows.jsonl"]
    with pytest.raises(SettingsError, match="token_data names gsm8k"):
        plan_study([["a", "b"]], ["arithmetic"], Path("x"), StudySettings(token_data=("gsm8k",)))


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
    swept = plan_study([["a", "b"]], [], Path("s"), StudySettings(only=("sweep",), sweep=("d/x.yaml", "e/x.yaml")))
    assert [t.folder.as_posix() for t in swept] == ["s/sweeps/x", "s/sweeps/x-2"]


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


def test_the_dry_run_says_what_each_part_takes(pair: tuple[str, str, str], tmp_path: Path,
                                               capsys: pytest.CaptureFixture[str]) -> None:
    base, tuned, rows = pair
    assert run(["study", base, tuned, "--data", rows, "--out", str(tmp_path / "o"), "--dry-run", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [r["part"] for r in found] == ANALYSES
    assert all(r["seconds"] > 0 and r["memory_bytes"] > 1e6 and r["disk_bytes"] > 0 and not r["note"] for r in found)
    assert not (tmp_path / "o").exists()


def test_what_cannot_be_read_has_no_estimate_but_a_reason(pair: tuple[str, str, str], tmp_path: Path) -> None:
    base, tuned, rows = pair
    tasks, costs = costs_of([[base, tuned], ["no/such", "no/other"]], [rows, "absent.jsonl"], tmp_path,
                            StudySettings(only=("lens",)))
    told = [(costs[t].seconds is not None, costs[t].note) for t in tasks]
    assert [known for known, _ in told] == [True, False, False, False]
    assert "absent.jsonl" in told[1][1]
    assert "no/such" in told[2][1]


def test_the_papers_recipe_plans_offline(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    recipe = Path(__file__).parents[2] / "recipes" / "paper.yaml"
    pairs, data, settings = read_study(recipe)
    assert len(pairs) == 5
    assert len(data) == 7
    assert (settings.samples, settings.token_samples, len(settings.token_data)) == (1000, 100, 4)
    assert all(Path(s).is_file() for s in settings.sweep)
    assert run(["study", str(recipe), "--dry-run", "--json", "--out", str(tmp_path / "o")]) == 0
    found = pd.DataFrame(json.loads(capsys.readouterr().out))
    assert (found["part"] == "profile").sum() == 5 * 7
    assert (found["part"] == "lens").sum() == 5 * 4
    assert {*ANALYSES, "sweep"} == set(found["part"])
    assert not (tmp_path / "o").exists()


def test_faults_of_a_study_file_name_its_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "study.yaml"
    file.write_text("pairs: [[a, b]]\ndata: arithmetic\nsamples: 0\nsampels: 3\n")
    assert run(["study", str(file), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "samples must be" in error
    assert "unknown setting sampels" in error
    assert "--samples" not in error
