"""The page of a sweep while it runs, and what its runs say of each block."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from midblock.report import live as module
from midblock.report.live import LiveReport
from midblock.sweeps import SweepState, parse_config, sweep
from report.test_report import payload
from sweep_helpers import tiny_values

pytest.importorskip("plotly")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A sweep whose page was written after every run: the folder, and the page at each time."""
    folder = tmp_path_factory.mktemp("live")
    config = parse_config(tiny_values(folder))
    live, pages = LiveReport(config, folder / "out"), list[str]()
    live._next = -1.0

    def heard(state: SweepState) -> None:
        live._next = 0.0
        live(state)
        path = folder / "out" / "report.html"
        if path.exists():
            pages.append(path.read_text(encoding="utf-8"))

    sweep(config, out=folder / "out", listener=heard)
    assert live.finish()
    return folder / "out", pages


def test_the_page_grows_with_the_runs_and_reads_itself_again(swept: tuple[Path, list[str]]) -> None:
    _, pages = swept
    assert len(pages) == 5  # the untuned model, and two arms with two seeds
    for number, page in enumerate(pages, start=1):
        assert f"{number} of 5 runs so far" in page
        assert ('http-equiv="refresh"' in page) == (number < 5)
    assert "00100" in json.dumps(payload(pages[-1]))


def test_the_last_page_is_of_the_finished_run(swept: tuple[Path, list[str]]) -> None:
    out, _ = swept
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "runs so far" not in page
    assert 'http-equiv="refresh"' not in page


def test_every_block_of_every_run_is_in_the_table_and_the_charts(swept: tuple[Path, list[str]]) -> None:
    out, _ = swept
    steps = pd.read_csv(out / "block_steps.csv", dtype={"arm": str})
    assert set(steps["arm"]) == {"11111", "00100"}
    assert set(steps["seed"]) == {0, 1}
    assert set(steps["block"]) == set(range(5))
    middle = steps[(steps["arm"] == "00100") & (steps["step"] == 6)]
    assert middle["update_norm"].notna().groupby(middle["block"]).all().to_dict() == {b: b == 2 for b in range(5)}
    assert (middle[middle["block"] < 2]["drift"] < 1e-6).all()
    data = payload((out / "report.html").read_text(encoding="utf-8"))
    titles = {c["title"].split(":")[0] for c in data["charts"]}
    assert {"Gradient norm of each block", "Update of each block", "Drift of each block's output"} <= titles


def test_a_page_that_cannot_be_made_stops_no_sweep_and_is_made_at_its_end(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    calls = 0

    def second_fails(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise RuntimeError("no ink")
        return real(*args, **options)

    real = module.render
    monkeypatch.setattr(module, "render", second_fails)
    monkeypatch.setattr(module, "_SHARE", 1e9)  # after every run
    values = {**tiny_values(tmp_path), "seeds": [0]}
    config = parse_config(values)
    live = LiveReport(config, tmp_path / "out")
    sweep(config, out=tmp_path / "out", listener=live)
    assert calls == 2
    assert "report.html is not kept up to date: RuntimeError: no ink" in caplog.text
    assert "1 of 3 runs so far" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert live.finish()  # no page of a sweep that still runs is left
    assert "runs so far" not in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert (tmp_path / "out" / "table.csv").exists()
