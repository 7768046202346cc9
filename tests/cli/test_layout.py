"""Tables and prose at any width: every cell stands in the output whole."""

from __future__ import annotations

import io
import os
import pty
import shlex
import subprocess
import sys

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from rich.console import Console

from midblock.cli.layout import Grid, continued, fitted, wrapped


def shown(grid: Grid, width: int) -> str:
    stream = io.StringIO()
    console = Console(file=stream, width=max(width, grid.total(broken=False)), highlight=False)
    for part in fitted(grid, width):
        console.print(part, markup=False)
    return stream.getvalue()


cell = st.text("abcde01234,.%-[]:", min_size=1, max_size=14)


@given(st.data(), st.integers(40, 120))
@settings(max_examples=80, deadline=None)
def test_every_cell_is_whole_and_no_line_is_too_long(data: st.DataObject, width: int) -> None:
    columns = data.draw(st.integers(1, 9))
    headings = [f"heading {c}" for c in range(columns)]
    rows = data.draw(st.lists(st.lists(cell, min_size=columns, max_size=columns), min_size=1, max_size=9))
    text = shown(Grid(headings, rows, [c > 0 for c in range(columns)]), width)
    assert all(value in text for row in rows for value in row)
    assert max(len(line) for line in text.splitlines()) <= width


def test_a_narrow_table_is_one_table() -> None:
    text = shown(Grid(["mask", "share"], [["01100", "0.4"], ["11111", "1"]], [False, True]), 80)
    assert [line.split() for line in text.splitlines() if line.strip() and "─" not in line] == [
        ["mask", "share"], ["01100", "0.4"], ["11111", "1"]]


def test_headings_break_before_anything_else() -> None:
    text = shown(Grid(["mask", "share of the whole model", "memory in MiB"], [["01100", "0.4", "1,924"]] * 9,
                      [False, True, True]), 24)
    assert text.count("01100") == 9
    assert "share of the whole" not in text


def test_few_rows_are_turned() -> None:
    grid = Grid(["arm", *(f"column{i:02d}" for i in range(12))], [["this plan", *["123,456"] * 12]],
                [False, *[True] * 12])
    lines = shown(grid, 60).splitlines()
    assert sum("123,456" in line for line in lines) == 12


def test_many_rows_come_in_parts_that_repeat_the_leading_column() -> None:
    rows = [[f"0{i:04b}", *(f"{i}.{c:03d}" for c in range(20))] for i in range(10)]
    text = shown(Grid(["mask", *(f"column{c}" for c in range(20))], rows, [False, *[True] * 20]), 60)
    assert text.count("01001") == len([1 for line in text.splitlines() if line.startswith("mask")]) > 1


def test_a_cell_wider_than_the_terminal_makes_records() -> None:
    name = "organisation/" + "a-very-long-model-name-" * 4
    text = shown(Grid(["base", "tuned"], [[name, "x"], [name, "y"]], [False, False]), 60)
    assert text.count(name) == 2


@pytest.mark.parametrize("width", [30, 80])
def test_prose_breaks_at_words_and_keeps_lines_and_indent(width: int) -> None:
    text = "first line\n  an indented line with the figure 1,843,200 and the mask 01100 and a-path/with-hyphens here"
    out = wrapped(text, width)
    assert out.split("\n")[0] == "first line"
    assert all(line.startswith("  ") for line in out.split("\n")[1:])
    assert all(word in out.split() for word in ("1,843,200", "01100", "a-path/with-hyphens"))
    assert " ".join(out.split()) == " ".join(text.split())


@pytest.mark.parametrize("columns", [80, 100])
def test_a_real_terminal_shows_whole_cells(columns: int) -> None:
    """Under a pseudo-terminal of that width the known pairs (hub ids) can be copied."""
    from midblock.models.pairs import known_pairs

    text = on_terminal(["pairs"], columns)
    assert max(len(line.rstrip()) for line in text.splitlines()) <= columns
    assert "…" not in text
    assert all(p.base in text and (p.tuned or "") in text for p in known_pairs())


def on_terminal(words: list[str], columns: int) -> str:
    """What a command prints on a terminal of so many columns."""
    parent, child = pty.openpty()
    environment = {**os.environ, "COLUMNS": str(columns), "LINES": "50", "TERM": "dumb"}
    process = subprocess.Popen([sys.executable, "-m", "midblock", *words], stdout=child, stderr=subprocess.DEVNULL,
                               stdin=subprocess.DEVNULL, env=environment)
    os.close(child)
    parts = []
    while True:
        try:
            chunk = os.read(parent, 65536)
        except OSError:  # Linux: the other end is closed
            break
        if not chunk:
            break
        parts.append(chunk)
    os.close(parent)
    assert process.wait(60) == 0
    return b"".join(parts).decode().replace("\r\n", "\n")


@pytest.mark.parametrize("width", [30, 50, 80, None])
def test_a_command_can_be_pasted_whatever_the_width(width: int | None) -> None:
    words = ["midblock", "tune", "my model", "--data", "a long name.jsonl", "--mask", "01100", "--out", "runs/tune"]
    shown = continued("Next: ", shlex.join(words), width)
    assert shlex.split(shown.removeprefix("Next: ").replace("\\\n", "")) == words
    if width is not None:
        assert all(len(line) <= max(width, 30) for line in shown.splitlines())
    else:
        assert "\n" not in shown


def test_what_every_row_says_is_said_once() -> None:
    rows = [["sft-base", f"0{i:04b}", "loss", f"0.1234{i:02d}", "7"] for i in range(12)]
    text = shown(Grid(["stage", "mask", "metric", "a long heading of values", "n"], rows, [False, False, False, True,
                                                                                           True]), 30)
    assert text.count("sft-base") == 1
    assert "(every row: stage sft-base, metric loss, n 7)" in " ".join(text.split())
