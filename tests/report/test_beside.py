"""What a study does in a second process: the same files as in its own, also where that process is lost."""

from __future__ import annotations

import os
import signal
import sys
import time
import types
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from midblock.errors import OutputError
from midblock.figures import figure_style, save_figure
from midblock.provenance import read_run
from midblock.report import study as module
from midblock.report.beside import Beside
from midblock.report.parts import finished
from midblock.report.study import study
from midblock.settings.study import PARTS
from midblock.writing import recomputed
from pair_helpers import SMALL, tiny_pair


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, str]:
    return tiny_pair(tmp_path_factory.mktemp("models"))


def _files(folder: Path) -> dict[str, bytes]:
    """Tables and figures of a study."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*")
            if p.suffix in (".csv", ".svg", ".pdf", ".txt")}


def _drawing() -> Figure:
    figure = Figure()
    figure.add_subplot().plot([1, 2, 3])
    return figure


def test_a_study_writes_the_same_with_and_without_a_second_process(
        pair: tuple[str, str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, tuned, rows = pair
    called: list[str] = []
    real = Beside.call
    monkeypatch.setattr(Beside, "call", lambda self, function, *args: (
        called.append(function.__name__), real(self, function, *args))[1])
    made = []
    for beside in (False, True):
        monkeypatch.setattr(module, "worth_a_process", lambda costs, beside=beside: beside)
        result = study([base, tuned], data=[rows], out=tmp_path / str(beside), **SMALL)
        assert result.failed == {}
        assert set(result.seconds) == {*(p for p in PARTS if p != "sweep"), "pass"}
        made.append(_files(tmp_path / str(beside)))
        assert bool(called) == beside
    assert called.count("_run_alone") == 1  # the weights, which need no models
    assert called.count("_save_styled") == len([n for n in made[1] if n.endswith(".svg") and "weights/" not in n])
    assert made[0].keys() == made[1].keys()
    # where a study lies stands in what correlate says to do next
    assert [n for n in made[0] if made[0][n] != made[1][n]] == ["correlate/summary.txt"]


def test_what_fails_beside_is_the_parts_own_failure(pair: tuple[str, str, str], tmp_path: Path,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    base, tuned, rows = pair
    monkeypatch.setattr(module, "worth_a_process", lambda costs: True)
    (tmp_path / "s" / "weights").mkdir(parents=True)
    (tmp_path / "s" / "weights" / "other.txt").write_text("not midblock's")
    (tmp_path / "s" / "weights" / "run.json").write_text("{}")
    with pytest.raises(OutputError, match="not empty"):
        study([base, tuned], data=[rows], out=tmp_path / "s", only=("weights", "lens"), **SMALL)
    study([base, tuned], data=[rows], out=tmp_path / "t", only=("lens",), **SMALL)
    (tmp_path / "s" / "weights").rename(tmp_path / "t" / "weights")
    result = study([base, tuned], data=[rows], out=tmp_path / "t", only=("weights", "lens"), resume=True, **SMALL)
    assert list(result.failed) == ["weights"]
    assert "run.json" in result.failed["weights"]


def test_errors_log_lines_and_style_go_through(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    style = tmp_path / "mine.mplstyle"
    style.write_text("lines.linewidth: 7\n")
    with Beside() as beside:
        failed, logged = beside.call(read_run, tmp_path), beside.call(recomputed, "It was damaged.", "It is run again.")
        printed = beside.call(os.write, 1, b"what a call prints goes to standard error")
        with figure_style(style):
            drawn = beside.save_figure(_drawing(), tmp_path / "beside", "one")
            here = save_figure(_drawing(), tmp_path / "here", "one")
        with pytest.raises(OutputError, match=r"it has no run\.json"):
            failed.result()
        assert logged.result() is None
        assert printed.result() == 41
        assert [p.read_bytes() for p in drawn.result()] == [p.read_bytes() for p in here]
    assert "It was damaged. It is run again." in caplog.text
    assert beside._process.returncode == 0


def test_calls_are_made_here_where_the_process_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only_here = types.ModuleType("only_here")
    exec("def where(): return 'here'", vars(only_here))
    monkeypatch.setitem(sys.modules, "only_here", only_here)
    with Beside() as beside:
        here = beside.call(os.getpid)
        assert here.result() == beside._process.pid != os.getpid()
        assert beside.call(only_here.where).result() == "here"  # the other process cannot import it, and ends
        beside._process.wait(30)
        assert beside.call(os.getpid).result() == os.getpid()
        assert [p.stat().st_size > 1000 for p in beside.save_figure(_drawing(), tmp_path, "one").result()] == [True] * 2


def _interrupted(beside: Beside) -> None:
    with beside:
        beside.call(os.getpid).result()
        beside.call(time.sleep, 60)
        raise KeyboardInterrupt


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_an_interruption_ends_the_process_at_once() -> None:
    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        _interrupted(beside := Beside())
    assert beside._process.returncode is not None
    assert time.monotonic() - begun < 30


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_a_signal_to_the_process_alone_loses_nothing() -> None:
    with Beside() as beside:
        beside.call(os.getpid).result()
        os.kill(beside._process.pid, signal.SIGINT)
        assert beside.call(os.getpid).result() in (os.getpid(), beside._process.pid)


def test_a_part_whose_figures_were_not_drawn_yet_is_not_finished(pair: tuple[str, str, str], tmp_path: Path) -> None:
    base, tuned, rows = pair
    study([base, tuned], data=[rows], out=tmp_path / "s", only=("weights", "gradients"), **SMALL)
    assert finished(tmp_path / "s" / "gradients")
    first = _files(tmp_path / "s")
    figure = next((tmp_path / "s" / "gradients" / "figures").glob("*.pdf"))
    figure.unlink()
    assert not finished(tmp_path / "s" / "gradients")
    result = study([base, tuned], data=[rows], out=tmp_path / "s", only=("weights", "gradients"), resume=True, **SMALL)
    assert set(result.seconds) == {"gradients"}
    assert _files(tmp_path / "s") == first
