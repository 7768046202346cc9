"""Tables and prose that fit a terminal: no number, mask or name is ever cropped or broken.

A table that is too wide first breaks its headings at words, then turns (few rows), then is printed in parts that
repeat its leading column, and at last becomes one record a row, whose values the terminal may wrap.
"""

from __future__ import annotations

import itertools
import shlex
import textwrap
from collections.abc import Sequence

from rich import box
from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

__all__ = ["Grid", "continued", "fitted", "wrapped"]

_GAP = 3  # columns between cells
_LEAST_HEADING = 6  # a heading is not broken into shorter lines than this
_TURNED_ROWS = 6  # tables of at most so many rows are turned


class Grid:
    """A table of finished text.

    Args:
        headings: One per column.
        rows: Cells as text, no line ends.
        right: Whether a column is aligned to the right.
    """

    def __init__(self, headings: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[bool]) -> None:
        self.headings, self.rows, self.right = list(headings), [list(r) for r in rows], list(right)

    def width(self, column: int, *, broken: bool) -> int:
        """Columns of the terminal that one column takes, its heading broken at words or not."""
        cells = max((cell_len(r[column]) for r in self.rows), default=0)
        heading = self.headings[column]
        longest = max((cell_len(w) for w in heading.split()), default=0) if broken else cell_len(heading)
        return max(cells, longest)

    def total(self, *, broken: bool) -> int:
        """Width of the whole table."""
        widths = [self.width(c, broken=broken) for c in range(len(self.headings))]
        return sum(widths) + _GAP * (len(widths) - 1)

    def columns(self, chosen: Sequence[int]) -> Grid:
        """Some of the columns."""
        return Grid([self.headings[c] for c in chosen], [[r[c] for c in chosen] for r in self.rows],
                    [self.right[c] for c in chosen])

    def turned(self) -> Grid:
        """Rows become columns; the first column gives the headings."""
        return Grid([self.headings[0], *(r[0] for r in self.rows)],
                    [[self.headings[c], *(r[c] for r in self.rows)] for c in range(1, len(self.headings))],
                    [False, *(True for _ in self.rows)])

    def table(self, width: int) -> Table:
        """The grid as a rich table, headings broken where the whole does not fit otherwise."""
        broken = self.total(broken=False) > width
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
        for c, heading in enumerate(self.headings):
            if broken:
                room = max(self.width(c, broken=True), _LEAST_HEADING)
                heading = "\n".join(textwrap.wrap(heading, room, break_long_words=False, break_on_hyphens=False))
            table.add_column(Text(heading), justify="right" if self.right[c] else "left", no_wrap=True,
                             vertical="bottom")
        for row in self.rows:
            table.add_row(*(Text(v) for v in row))
        return table


def fitted(grid: Grid, width: int) -> list[Table | str]:
    """What to print, part by part, so that nothing is cropped at ``width`` columns."""
    if grid.total(broken=True) <= width:
        return [grid.table(width)]
    if len(grid.rows) <= _TURNED_ROWS and len(grid.headings) > 2:
        turned = grid.turned()
        if turned.total(broken=True) <= width:
            return [turned.table(width)]
    same = [c for c in range(1 if grid.right[:1] == [True] else 0, len(grid.headings))
            if len(grid.rows) > 1 and len({r[c] for r in grid.rows}) == 1]
    if same and len(grid.headings) - len(same) >= 2:  # what every row says is said once
        told = ", ".join(f"{grid.headings[c]} {grid.rows[0][c] or 'empty'}" for c in same)
        rest = [c for c in range(len(grid.headings)) if c not in same]
        return [wrapped(f"(every row: {told})", width), *fitted(grid.columns(rest), width)]
    return _parts(grid, width) or [_records(grid)]


def _parts(grid: Grid, width: int) -> list[Table | str]:
    """Panels of columns, each beginning with the leading column(s) of text; none where one would not fit."""
    texts = list(itertools.takewhile(lambda c: not grid.right[c], range(len(grid.headings)))) or [0]
    widths = [grid.width(c, broken=True) for c in range(len(grid.headings))]
    while len(texts) > 1 and sum(widths[c] + _GAP for c in texts) > width // 2:
        texts.pop()
    taken = sum(widths[c] + _GAP for c in texts)
    rest = [c for c in range(len(grid.headings)) if c not in texts]
    if any(taken + widths[c] > width for c in rest) or not rest:
        return []
    panels: list[list[int]] = [[]]
    room = width - taken
    for c in rest:
        if panels[-1] and room < widths[c]:
            panels.append([])
            room = width - taken
        panels[-1].append(c)
        room -= widths[c] + _GAP
    return [grid.columns([*texts, *panel]).table(width) for panel in panels]


def _records(grid: Grid) -> str:
    name = max(cell_len(h) for h in grid.headings)
    blocks = ["\n".join(f"{heading}{' ' * (name - cell_len(heading))}  {value}"
                        for heading, value in zip(grid.headings, row, strict=True) if value) for row in grid.rows]
    return "\n" + "\n\n".join(blocks) + "\n"


def continued(label: str, line: str, width: int | None) -> str:
    """A command after its label, broken before words with a backslash, so that it can be pasted as it stands.

    Example:
        >>> print(continued("Next: ", "midblock swap base tuned --data d.jsonl", 30))
        Next: midblock swap base \\
            tuned --data d.jsonl
    """
    words = [shlex.quote(word) for word in shlex.split(line)]
    lines, now = [], label + words[0]
    for i, word in enumerate(words[1:], start=1):
        mark = 0 if i == len(words) - 1 else 2  # the backslash
        if width is not None and len(now) + 1 + len(word) + mark > width:
            lines.append(now + " \\")
            now = "    " + word
        else:
            now += " " + word
    return "\n".join([*lines, now])


def wrapped(text: str, width: int, further: str = "") -> str:
    """Prose broken at words only, line by line; a line's own indent is kept for what it is broken into.

    Args:
        text: Lines.
        width: Columns.
        further: Goes before every line but the first that one is broken into.

    Example:
        >>> print(wrapped("budget 1,843,200 of 134,515,008", 20))
        budget 1,843,200 of
        134,515,008
    """
    lines = []
    for line in text.split("\n"):
        indent = line[:len(line) - len(line.lstrip())]
        lines += textwrap.wrap(line, max(width, len(indent) + 20), subsequent_indent=indent + further,
                               break_long_words=False, break_on_hyphens=False, drop_whitespace=True) or [""]
    return "\n".join(lines)
