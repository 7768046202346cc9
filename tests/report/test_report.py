"""One page from run folders: what it shows, what it leaves out, and that nothing from outside becomes markup."""

from __future__ import annotations

import base64
import gzip
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from midblock.cli.app import run
from midblock.errors import OutputError
from midblock.provenance import RunFolder
from midblock.report import page as page_module
from midblock.report.charts import charts_of
from midblock.report.collect import collect
from midblock.report.findings import findings_of
from midblock.report.page import build_report, render
from midblock.results import Estimate, Table
from sweep_helpers import write_rows, write_tiny_model

pytest.importorskip("plotly")

BLOCKS = 10
MODELS = {s: {"spec": f"models/{s}", "name": s, "fingerprint": s, "blocks": BLOCKS, "dtype": "float32"}
          for s in ("base", "sft")}


def a_run(folder: Path, command: str, table: Table, *, summary: str = "", models: dict[str, Any] = MODELS,
          data: str = "gsm8k") -> Path:
    with RunFolder(folder, command=command, settings={"data": data}) as made:
        made.record_inputs(models=models, data={"name": data, "fingerprint": "d"})
        made.write_table(table)
        if summary:
            made.write_text("summary.txt", summary)
    return folder


def profile_table(peak: str = "late", n: int = 120) -> Table:
    table = Table()
    for h in range(BLOCKS + 1):
        place = h / BLOCKS
        size = {"early": 1 - place, "late": place, "middle": 1 - 2 * abs(place - 0.5)}[peak]
        table.add("hidden", h, "cosine", "pair", Estimate(1 - 0.1 * size, 0.8, 1.0, n), stage="sft-base")
        for side, value in (("base", 3.0), ("sft", 3.0 + size)):
            table.add("hidden", h, "effective_rank", side, Estimate(value, value - 1, value + 1, n))
        table.add("hidden", h, "effective_rank", "difference", Estimate(size, 0.0, 2.0, n), stage="sft-base")
    return table


def swap_table() -> Table:
    table = Table()
    for i, mask in enumerate(("10000", "01000", "00100", "00010", "00001")):
        table.add("segment", mask, "loss", "difference", Estimate(-0.1 * i, -0.2 * i - 0.1, 0.05 - 0.1 * i, 30),
                  donor="sft", recipient="base", head="base")
    return table


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    a_run(tmp_path / "runs" / "profile", "profile", profile_table(), summary="Something.")
    a_run(tmp_path / "runs" / "deeper" / "swap", "swap", swap_table(), summary="The loss falls most with 00001.")
    return tmp_path / "runs"


def payload(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="text/plain" id="data">(.*?)</script>', page, re.S)
    assert found
    assert re.fullmatch(r"[A-Za-z0-9+/=]+", found.group(1)), "nothing in it can be markup"
    read: dict[str, Any] = json.loads(gzip.decompress(base64.b64decode(found.group(1))))
    for chart in read["charts"]:  # as the page's script does
        columns = [[c["of"][i] for i in c["at"]] if "of" in c else c["values"] for c in chart.pop("packed")]
        chart["rows"] = [list(row) for row in zip(*columns, strict=True)]
    return read


def test_the_page_holds_every_row_of_the_tables(folders: Path, tmp_path: Path) -> None:
    made = build_report([folders], tmp_path / "r.html")
    charts = {c["title"]: c for c in payload((tmp_path / "r.html").read_text(encoding="utf-8"))["charts"]}
    assert {r["command"] for r in made["runs"]} == {"profile", "swap"}
    rank = charts["Effective rank"]
    frame = pd.read_csv(folders / "profile" / "table.csv")
    assert len(rank["rows"]) == (frame["metric"] == "effective_rank").sum() == 3 * (BLOCKS + 1)
    shown = {(r[rank["columns"].index("side")], r[rank["columns"].index("layer")]): r[rank["columns"].index("value")]
             for r in rank["rows"]}
    for row in frame[frame["metric"] == "effective_rank"].to_dict("records"):
        assert math.isclose(shown[row["side"], int(row["layer"])], row["value"], rel_tol=1e-5)
    assert rank["n"] == [120, 120]
    assert rank["formula"]
    bars = next(c for c in charts.values() if c["kind"] == "bars")
    assert [r[bars["columns"].index("mask")] for r in bars["rows"]] == ["10000", "01000", "00100", "00010", "00001"]


def test_data_sets_that_agree_are_one_sentence_and_a_run_counts_once(tmp_path: Path) -> None:
    for number, (peak, data) in enumerate([("late", "gsm8k"), ("early", "mmlu"), ("late", "dolly"), ("late", "gsm8k")]):
        a_run(tmp_path / str(number), "profile", profile_table(peak), data=data)
    runs, _ = collect([tmp_path])
    where = [line for line in findings_of(runs, charts_of(runs)).answer if "acted" in line]
    assert [line.partition(":")[0].partition(" on ")[2] for line in where] == ["gsm8k and dolly", "mmlu"]
    assert "most on late" in where[0]
    assert "most on early" in where[1]


@pytest.mark.parametrize("peak", ["early", "middle", "late"])
def test_the_answer_names_where_tuning_acted(peak: str, tmp_path: Path) -> None:
    a_run(tmp_path / "p", "profile", profile_table(peak))
    runs, _ = collect([tmp_path])
    found = findings_of(runs, charts_of(runs))
    assert f"tuning acted most on {peak} hidden states" in found.answer[0]
    assert any("No sweep" in line for line in found.limits)
    assert found.command.startswith("midblock tune models/base --data gsm8k")


def test_a_sweeps_verdict_leads_and_names_the_next_command(tmp_path: Path) -> None:
    a_run(tmp_path / "a", "profile", profile_table())
    table = Table()
    for arm, value in (("base", 0.1), ("01100", 0.5), ("11111", 0.4)):
        table.add("segment", arm, "exact_match", "base" if arm == "base" else "sft",
                  Estimate(value, value - 0.1, value + 0.1, 40), arm=arm, task="arithmetic", role="evaluation",
                  seed=None, params=10)
    with RunFolder(tmp_path / "s", command="sweep", settings={}) as made:
        made.write_table(table)
        made.write_text("verdict.txt", "Use 01100.\nMore words.\nNext: midblock tune m --mask 01100 --out NEW\n")
    runs, _ = collect([tmp_path])
    charts = charts_of(runs)
    found = findings_of(runs, charts)
    assert found.answer[0].endswith("Use 01100.")
    assert found.command == f"midblock tune m --mask 01100 --out {tmp_path / 's-next'}"
    arms = next(c for c in charts if c["section"] == "arms")
    assert arms["id"] == found.key[0]
    assert arms["baseline"] == pytest.approx(0.1)
    assert not any("No sweep" in line for line in found.limits)


def test_even_change_is_not_called_a_place(tmp_path: Path) -> None:
    table = Table()
    for h in range(BLOCKS + 1):
        table.add("hidden", h, "cosine", "pair", Estimate(0.9 + 0.001 * (h % 2), 0.8, 1.0, 120), stage="sft-base")
    a_run(tmp_path / "p", "profile", table)
    runs, _ = collect([tmp_path])
    assert "about evenly" in findings_of(runs, charts_of(runs)).answer[0]


def test_a_model_against_itself_changed_nowhere(tmp_path: Path) -> None:
    table = Table()
    for h in range(BLOCKS + 1):
        table.add("hidden", h, "cosine", "pair", Estimate(1.0, 1.0, 1.0, 120), stage="sft-base")
    a_run(tmp_path / "p", "profile", table)
    runs, _ = collect([tmp_path])
    assert "no change at any depth" in findings_of(runs, charts_of(runs)).answer[0]


@pytest.mark.parametrize(("spec", "shown"), [
    ("smollm2", "smollm2"), ("allenai/OLMo-2-0425-1B", "allenai/OLMo-2-0425-1B"),
    ("/data/runs/tuned/model", "tuned/model"), ("./mine", "mine"), ("a/b/c", "c"), ("C:\\models\\x.gguf", "x.gguf")])
def test_models_are_named_as_people_do(spec: str, shown: str, tmp_path: Path) -> None:
    a_run(tmp_path / "p", "profile", profile_table(), models={"base": {"spec": spec, "name": "base"}})
    assert collect([tmp_path])[0][0].pair == shown


def test_few_samples_are_said(tmp_path: Path) -> None:
    a_run(tmp_path / "p", "profile", profile_table(n=8))
    runs, _ = collect([tmp_path])
    assert any("rests on 8 samples" in line for line in findings_of(runs, []).limits)


EVIL = ["<script>alert(1)</script>", "</script><script>alert(2)</script>", "<img src=x onerror=alert(3)>",
        "<a href='javascript:alert(4)'>x</a>", "\u202egnp.exe", "a\x1b[31mb", "<!--", "\u2028\u2029",
        "${1}{{7331*7333}}{% x %}"]


@pytest.mark.parametrize("evil", EVIL)
def test_text_from_outside_never_becomes_markup(evil: str, tmp_path: Path) -> None:
    models = {"base": {**MODELS["base"], "spec": evil}, "sft": MODELS["sft"]}
    table = profile_table()
    for row in table.rows:
        row["stage"] = evil
    a_run(tmp_path / "p", "profile", table, summary=evil, models=models, data=evil)
    other = swap_table()
    for row in other.rows:
        row["donor"] = evil
    a_run(tmp_path / "s", "swap", other, summary=evil, models=models, data=evil)
    runs, _ = collect([tmp_path])
    page, _ = render(runs, title=evil)
    outside = re.sub(r"<script>.*?</script>", "", page, flags=re.S)  # our own scripts and the bundle
    for piece in ("<script>alert", "onerror=alert(3)>", "<a href='javascript", "\u202e", "\x1b", "\u2028", "<!--"):
        assert piece not in outside
    assert str(7331 * 7333) not in outside
    payload(page)


def test_the_policy_allows_only_the_pages_own_scripts(folders: Path) -> None:
    import hashlib

    runs, _ = collect([folders])
    page, _ = render(runs)
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)
    assert policy
    assert policy.group(1).startswith("default-src 'none'")
    allowed = set(re.findall(r"sha256-[A-Za-z0-9+/=]+", policy.group(1)))
    scripts = re.findall(r"<script>(.*?)</script>", page, re.S)
    assert {"sha256-" + base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in scripts} == allowed
    assert len(page) < 8e6


def test_unfinished_and_damaged_runs_are_named_and_left_out(folders: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), RunFolder(folders / "stopped", command="profile", settings={}):
        raise KeyboardInterrupt
    (folders / "broken").mkdir()
    (folders / "broken" / "run.json").write_text("[1, 2", encoding="utf-8")
    a_run(folders / "cut", "lens", profile_table())
    table = (folders / "cut" / "table.csv")
    table.write_text("\n".join(line.split(",", 1)[1] for line in table.read_text().splitlines()), encoding="utf-8")
    a_run(folders / "edited", "lens", profile_table())
    table = (folders / "edited" / "table.csv")
    table.write_text(table.read_text(encoding="utf-8").replace("0.", "9.", 1), encoding="utf-8")
    made = build_report([folders], tmp_path / "r.html")
    assert {Path(o["folder"]).name for o in made["left_out"]} == {"stopped", "broken", "cut", "edited"}
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert all(name in page for name in ("stopped", "broken", "cut", "edited"))


def test_nothing_to_report_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(OutputError, match="no finished run"):
        build_report([tmp_path / "empty"], tmp_path / "r.html")
    with pytest.raises(OutputError, match="not a folder"):
        build_report([tmp_path / "absent"], tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()


@pytest.mark.parametrize("content", ["<html><title>midblock</title></html>", "", "notes"])
def test_only_a_page_of_midblocks_is_replaced(folders: Path, tmp_path: Path, content: str,
                                              capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "r.html"
    out.write_text(content)
    assert run(["report", str(folders), "--out", str(out)]) == 2
    assert "no page that midblock wrote" in capsys.readouterr().err
    assert out.read_text() == content
    out.unlink()
    for _ in range(2):  # a page of its own is
        assert run(["report", str(folders), "--out", str(out), "--quiet"]) == 0
    (tmp_path / "d.html").mkdir()
    assert run(["report", str(folders), "--out", str(tmp_path / "d.html")]) == 2
    assert "is a folder" in capsys.readouterr().err


def test_the_command(folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["report", str(folders), "--out", str(tmp_path / "r.html"), "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["bytes"] == (tmp_path / "r.html").stat().st_size
    assert run(["report", str(tmp_path / "absent")]) == 2
    assert capsys.readouterr().err.startswith("Error: ")


def test_undefined_values_are_gaps(tmp_path: Path) -> None:
    table = profile_table()
    table.add_undefined("hidden", 3, "gini", "base", "all norms are zero", n=4)
    a_run(tmp_path / "p", "profile", table)
    runs, _ = collect([tmp_path])
    chart = next(c for c in charts_of(runs) if c.get("metric") == "gini")
    assert chart["rows"][0][chart["columns"].index("value")] is None
    assert np.isfinite(json.loads(json.dumps(chart))["rows"][0][chart["columns"].index("n")])


def test_masks_that_look_like_numbers_keep_their_zeros(tmp_path: Path) -> None:
    table = Table()
    for arm in ("111", "100", "001"):
        table.add("segment", arm, "loss", "sft", Estimate(0.3, 0.2, 0.4, 9), arm=arm, mask=arm, role="evaluation",
                  task="t", seed=None, method="lora", params=1)
    folder = a_run(tmp_path / "s", "sweep", table)
    with RunFolder(tmp_path / "t", command="sweep", settings={}) as run:
        run.record_inputs(models=MODELS, data={})
        run.write_table(table)
        run.write_table(pd.DataFrame({"task": "t", "arm": ["111", "100", "001"], "gain": [0.1, 0.2, 0.3],
                                      "forgetting": [0.0, 0.1, 0.2]}), "pareto.csv")
        run.write_table(pd.DataFrame({"arm": ["100", "001"], "seed": 0, "step": 6, "block": 0, "gradient_norm": 1.0,
                                      "update_norm": 1.0, "drift": 0.5}), "block_steps.csv")
    runs, _ = collect([folder, tmp_path / "t"])
    charts = {c["title"]: c for c in charts_of(runs)}
    assert [r[0] for r in charts["t: gain against retention"]["rows"]] == ["111", "100", "001"]
    assert {r[1] for r in charts["Drift of each block's output: t"]["rows"]} == {"100", "001"}


def test_a_correlation_is_a_square_over_blocks(tmp_path: Path) -> None:
    table = Table()
    for a, b, r, points in (("cka", "cosine", 0.5, "blocks"), ("cka", "loss", -0.5, "blocks"),
                            ("cosine", "loss", 0.1, "blocks"), ("cka", "swap", 0.9, "5 segments")):
        table.add("model", "depth", "pearson", "pair", Estimate(r, n=10), a=a, b=b, points=points)
    runs, _ = collect([a_run(tmp_path / "c", "correlate", table)])
    chart, = charts_of(runs)
    cells = {(r[0], r[1]): r[2] for r in chart["rows"]}
    assert len(cells) == 6
    assert all(cells[b, a] == r for (a, b), r in cells.items())


def test_a_page_of_many_runs_stays_small_and_says_what_it_shortened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch
                                                                     ) -> None:
    rng = np.random.default_rng(0)
    for name in "ab":
        with RunFolder(tmp_path / name, command="profile", settings={}) as run:
            run.record_inputs(models={**MODELS, "sft": {**MODELS["sft"], "spec": f"models/{name}"}},
                              data={"name": "gsm8k"})
            run.write_table(profile_table())
            run.write_table(pd.DataFrame([
                {"stage": "sft-base", "layer": h, "other": o, "cka_debiased": rng.random(), "n": 9}
                for h in range(41) for o in range(41)]), "layers.csv")
            run.write_table(pd.DataFrame({"token": rng.integers(0, 9**9, 1500), "share": rng.random(1500)}),
                            "kl_tokens.csv")
    runs, _ = collect([tmp_path])
    whole = {c["title"]: c for c in payload(render(runs)[0])["charts"]}
    assert len(whole) == 6
    monkeypatch.setattr(page_module, "_LIMIT", len(render(runs)[0]) - 30_000)
    page, _ = render(runs)
    assert len(page.encode()) <= page_module._LIMIT
    charts = {c["title"]: c for c in payload(page)["charts"]}
    assert charts.keys() == whole.keys()
    for chart in whole.values():
        chart["rows"] = [[float(f"{v:.4g}") if isinstance(v, float) else v for v in row] for row in chart["rows"]]
    for title, chart in charts.items():
        if chart["kind"] == "depth":
            assert chart == whole[title], "what the page says is never shortened"
        else:
            assert 0 < len(chart["rows"]) < len(whole[title]["rows"])
            assert "all are in the run's folder" in chart["about"]
            assert {tuple(r) for r in chart["rows"]} <= {tuple(r) for r in whole[title]["rows"]}
        if chart["kind"] == "heatmap":
            assert max(r[0] for r in chart["rows"]) == 40, "the last layer is among them"


def test_figures_of_several_pairs_say_whose_they_are(tmp_path: Path) -> None:
    for name in "ab":
        models = {**MODELS, "sft": {**MODELS["sft"], "spec": f"models/{name}"}}
        with RunFolder(tmp_path / name, command="profile", settings={}) as run:
            run.record_inputs(models=models, data={"name": "gsm8k"})
            run.write_table(profile_table())
            run.write_table(pd.DataFrame([{"stage": "sft-base", "layer": h, "other": o, "cka_debiased": 0.5, "n": 9}
                                          for h in range(3) for o in range(3)]), "layers.csv")
    runs, _ = collect([tmp_path])
    squares = [c for c in charts_of(runs) if c["kind"] == "heatmap"]
    assert [c["pair"] for c in squares] == [runs[0].pair, runs[1].pair]
    assert all(c["pair"] in c["title"] for c in squares)


def test_a_tuned_models_training_curve_is_drawn(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", 0, 12)
    write_tiny_model(tmp_path / "model")
    assert run(["tune", str(tmp_path / "model"), "--data", str(tmp_path / "rows.jsonl"), "--mask", "00100", "--rank",
                "2", "--steps", "4", "--out", str(tmp_path / "tuned")]) == 0
    runs, _ = collect([tmp_path / "tuned"])
    charts = {c["title"]: c for c in charts_of(runs)}
    assert [r[0] for r in charts["Loss while training: tuned"]["rows"]] == [1, 2, 3, 4]
    assert {c.partition(":")[0] for c in charts} >= {"Gradient norm of each block", "Update of each block",
                                                     "Drift of each block's output"}


def test_sweeps_of_one_model_are_told_apart_and_rounding_is_a_limit(tmp_path: Path) -> None:
    for name in ("one", "two"):
        a_run(tmp_path / name, "sweep", profile_table(), summary=f"Verdict {name}.")
    a_run(tmp_path / "weights", "weights", profile_table())
    with RunFolder(tmp_path / "weights", command="weights", settings={"data": "gsm8k"}, resume=True) as run:
        run.update(counts={"rounding": {"sft-base": 0.001}})
    found = build_report([tmp_path], tmp_path / "report.html")["findings"]
    assert [line.split(": ")[0].endswith((" (one)", " (two)")) for line in found["answer"][:2]] == [True, True]
    assert any("sft-base is between checkpoints stored in different precision" in line for line in found["limits"])


def test_stages_of_a_chain_are_told_apart(tmp_path: Path) -> None:
    table = Table()
    for h in range(BLOCKS + 1):
        for stage, place in (("sft-base", h), ("dpo-sft", BLOCKS - h)):
            table.add("hidden", h, "cosine", "pair", Estimate(1 - 0.01 * place, 0.8, 1.0, 120), stage=stage)
    a_run(tmp_path / "p", "profile", table)
    runs, _ = collect([tmp_path])
    late, early = findings_of(runs, charts_of(runs)).answer[:2]
    assert "(sft-base)" in late
    assert "acted most on late" in late
    assert "(dpo-sft)" in early
    assert "acted most on early" in early
