"""What the results of all commands share."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from dataclasses import dataclass

import pandas as pd

import midblock
from midblock.results import BASE_COLUMNS, Answer, Origin, Table, TableResult


@dataclass
class Result(TableResult):
    table: Table
    words: str = "Block 3 <b>moved</b> most.\x1b[31m"

    def answer(self) -> Answer:
        return Answer(self.words, next=("inspect", "my model"))

    def details(self) -> list[str]:
        return ["block 3: 0.3"]


def planted(rows: int = 12) -> Result:
    table = Table()
    for b in range(rows):
        table.add("block", b, "loss", "base", b / 10, n=4, data="<script>alert(1)</script>")
    table.add_undefined("block", rows, "loss", "base", "no tokens")
    return Result(table)


def test_the_frame_is_the_table() -> None:
    result = planted()
    pd.testing.assert_frame_equal(result.frame, result.table.frame())
    assert tuple(result.frame.columns[:len(BASE_COLUMNS)]) == BASE_COLUMNS


def test_a_notebook_shows_the_reading_and_the_first_rows_as_text() -> None:
    shown = planted()._repr_html_()
    assert "Block 3 &lt;b&gt;moved&lt;/b&gt; most." in shown
    assert "<script>" not in shown
    assert "\x1b" not in shown
    assert shown.count("<tr") == 1 + 10
    assert "13 rows" in shown
    assert "NaN" not in planted(0)._repr_html_()


def test_the_answer_comes_first_and_the_next_command_last() -> None:
    first, *details, last = planted().summary().splitlines()
    assert first.startswith("Block 3")
    assert details == ["block 3: 0.3"]
    assert last == "Next: midblock inspect 'my model'"


def test_a_command_is_named_only_where_models_and_data_have_names() -> None:
    named = Origin(("base", "tuned"), "d.jsonl")
    assert named.words("tune", "--mask", "01100", models=1) == ("tune", "base", "--data", "d.jsonl", "--mask", "01100")
    assert Origin(("base",)).words("swap") == ()
    assert Origin((), "d.jsonl").words("swap") == ()
    assert Origin(("base",)).words("inspect", data=False) == ("inspect", "base")


def test_the_help_of_the_package_names_everything_that_it_offers() -> None:
    told = midblock.__doc__ or ""
    assert [n for n in midblock.__all__ if n != "__version__" and f"`{n}`" not in told] == []


def results() -> Iterator[type]:
    for found in pkgutil.walk_packages(midblock.__path__, "midblock."):
        if found.name.split(".")[1] in ("analysis", "selection", "evaluation", "tuning", "sweeps"):
            module = importlib.import_module(found.name)
            yield from (c for name, c in vars(module).items()
                        if isinstance(c, type) and c.__module__ == found.name and name.endswith("Result"))


def test_every_result_with_a_table_shares_them() -> None:
    with_tables = [c for c in results() if "table" in getattr(c, "__annotations__", {}) or hasattr(c, "table")]
    assert len(with_tables) >= 14
    assert [c.__name__ for c in with_tables if not issubclass(c, TableResult)] == []


def test_every_result_has_an_answer_details_and_figures() -> None:
    lacking = {c.__name__: [n for n in ("answer", "details", "figures", "frame", "_repr_html_") if not hasattr(c, n)]
               for c in results() if issubclass(c, TableResult)}
    assert {name: missing for name, missing in lacking.items() if missing} == {}
