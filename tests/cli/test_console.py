"""What goes to stdout, what to stderr, and what progress looks like without a terminal."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator

import pandas as pd
import pytest

from midblock.cli import console
from midblock.cli.console import PlainProgress, emit_json, print_table, progress_bar, say, warn


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    console.reset()
    yield
    console.reset()


class Clock:
    """Seconds that a test moves by hand."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_text_is_for_people_only(capsys: pytest.CaptureFixture[str]) -> None:
    say("hello")
    console.set_json(True)
    say("hidden")
    print_table(pd.DataFrame({"a": [1]}))
    assert capsys.readouterr().out == "hello\n"


def test_json_is_alone_on_stdout_and_has_no_nan(capsys: pytest.CaptureFixture[str]) -> None:
    emit_json({"a": 1})
    assert capsys.readouterr().out == ""
    console.set_json(True)
    warn("careful")
    emit_json({"a": float("nan"), "b": [1.5, float("inf")], "frame": pd.DataFrame({"x": [1, None]})})
    caught = capsys.readouterr()
    assert json.loads(caught.out) == {"a": None, "b": [1.5, None], "frame": [{"x": 1.0}, {"x": None}]}
    assert caught.err == "Warning: careful\n"


def test_a_table_in_a_pipe_is_never_cut(capsys: pytest.CaptureFixture[str]) -> None:
    name = "model.layers." + "x" * 300
    print_table(pd.DataFrame({"name": [name, "[8, 16)"], "value": [0.123456, float("nan")],
                              "parameters": [134_515_008, 7]}), "A title")
    out = capsys.readouterr().out
    assert name in out
    assert "[8, 16)" in out  # not taken for markup
    assert "134,515,008" in out
    assert "0.1235" in out
    assert "nan" not in out
    assert out.startswith("A title")


def test_numbers_are_right_aligned(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(pd.DataFrame({"n": [1, 1000]}))
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert [line.split() for line in lines[-2:]] == [["1"], ["1,000"]]
    assert len(lines[-2]) == len(lines[-1])


def test_a_long_title_and_booleans(capsys: pytest.CaptureFixture[str]) -> None:
    title = "A title much longer than its table"
    print_table(pd.DataFrame({"suitable": [True, False], "n": [1, None]}), title)
    lines = [line.strip() for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert lines[0] == title
    assert [line.split() for line in lines[-2:]] == [["yes", "1"], ["no"]]


def test_progress_without_a_terminal_is_a_few_plain_lines() -> None:
    clock, lines = Clock(), []
    report = PlainProgress(lines.append, clock)
    for done in range(201):
        clock.now = done * 0.05
        report("profile", done, 200, f"loss {done}")
    assert len(lines) == 10
    assert lines[0] == "profile: 10% (20/200), 20/s, 0:09 left, loss 20"
    assert lines[-1] == "profile: 100% (200/200), 20/s, took 0:10, loss 200"


def test_slow_progress_shows_a_line_after_a_while() -> None:
    clock, lines = Clock(), []
    report = PlainProgress(lines.append, clock)
    report("train", 0, 1000)
    for done in (1, 2, 3):
        clock.now += 15
        report("train", done, 1000)
    assert lines == ["train: 0% (2/1,000), 0.0667/s, 4:09:30 left"]


def test_each_kind_of_work_starts_anew() -> None:
    clock, lines = Clock(), []
    report = PlainProgress(lines.append, clock)
    for what in ("load", "measure"):
        report(what, 0, 1)
        clock.now += 2
        report(what, 1, 1)
    assert lines == ["load: 100% (1/1), 0.5/s, took 0:02", "measure: 100% (1/1), 0.5/s, took 0:02"]


def test_work_that_begins_again_is_shown_again() -> None:
    lines: list[str] = []
    report = PlainProgress(lines.append, Clock())
    for _ in range(2):
        report("epoch", 0, 2)
        report("epoch", 2, 2)
    assert len(lines) == 2


@pytest.mark.parametrize(("done", "total"), [(0, 0), (5, 3), (1, 1)])
def test_odd_totals_do_not_fail(done: float, total: float) -> None:
    lines: list[str] = []
    report = PlainProgress(lines.append, Clock())
    report("x", 0, total)
    report("x", done, total)
    assert all("%" in line for line in lines)


def test_the_bar_speaks_on_stderr_only(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar() as report:
        report("work", 0, 2)
        report("work", 2, 2)
    caught = capsys.readouterr()
    assert caught.out == ""
    assert caught.err.startswith("work: 100% (2/2)")


def test_quiet_silences_progress(capsys: pytest.CaptureFixture[str]) -> None:
    console.set_quiet(True)
    with progress_bar() as report:
        report("work", 2, 2)
    assert capsys.readouterr().err == ""


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_bar_with_note_and_percentage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    with progress_bar() as report:
        report("blocks [8, 16)", 0, 4)
        report("blocks [8, 16)", 3, 4, "loss [0.42]")
        report("second", 1, 2)
        report("second", 0, 2)  # begins again
        report("second", 2, 2)
        sys.stderr.write("a note on stderr\n")
    drawn = stream.getvalue()
    assert "blocks [8, 16)" in drawn
    assert "loss [0.42]" in drawn
    assert "75%" in drawn
    assert "100%" in drawn
    assert "a note on stderr" in drawn
    assert sys.stderr is stream


def test_an_error_inside_the_bar_comes_out(capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> None:
        with progress_bar() as report:
            report("work", 1, 2)
            raise ValueError("inside")

    with pytest.raises(ValueError, match="inside"):
        work()
