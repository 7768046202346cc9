"""A matrix of numbers as colours."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.colors import Normalize, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from midblock.errors import SettingsError
from midblock.figures.style import GREY, MAX_HEIGHT, new_figure, short_name, styled, wrap
from midblock.quantities import MATRICES, matrix_order

__all__ = ["draw_cells", "heatmap"]

PIXELS = 8
"""Of a cell, in each direction, in vector files."""


@styled
def heatmap(matrix: npt.ArrayLike, rows: Sequence[Any], columns: Sequence[Any], title: str = "",
            centre: float | None = None, *, label: str = "", row_label: str = "", column_label: str = "",
            limits: tuple[float, float] | None = None, marks: npt.ArrayLike | None = None,
            texts: npt.ArrayLike | None = None, footnote: str = "") -> Figure:
    """A matrix as colours; undefined cells are grey, small matrices carry their numbers.

    Rows that are matrices of a model (``q``, ``gate`` ...) are put into the one order of `quantities.MATRICES`.

    Args:
        matrix: (R, C); NaN where undefined.
        rows: R labels, first at the top.
        columns: C labels.
        title: Above the figure.
        centre: Value that is white in a blue-to-red scale with equal reach on both sides (0 for
            differences and correlations). None: a scale from dark to light.
        label: What the colours measure, with its unit.
        row_label: Of the vertical axis.
        column_label: Of the horizontal axis.
        limits: Ends of the colour scale. Default: the data's.
        marks: (R, C) text behind each number, such as a star for significance.
        texts: (R, C) words that cells carry in place of their numbers, such as tokens; spaces are made visible.
        footnote: Below the axes: what the marks mean, n.

    Raises:
        SettingsError: labels do not fit the matrix.
    """
    array = np.asarray(matrix, dtype=np.float64)
    if array.ndim != 2 or array.shape != (len(rows), len(columns)) or not array.size:
        raise SettingsError(f"heatmap: a matrix of shape {array.shape} does not fit {len(rows)} row and "
                            f"{len(columns)} column labels.")
    signs = np.full(array.shape, "", dtype=object) if marks is None else np.asarray(marks, dtype=object)
    if set(map(str, rows)) <= set(MATRICES):
        order = [list(map(str, rows)).index(name) for name in matrix_order([str(r) for r in rows])]
        if len(order) == len(rows):
            array, signs, rows = array[order], signs[order], [rows[i] for i in order]
    row_names = [short_name(str(r)) for r in rows]
    if len(row_names) <= 40:
        row_names = [wrap(name, 28) for name in row_names]
    column_names = [short_name(str(c)) for c in columns]
    cell = 0.42 if max(array.shape) <= 14 else 0.22
    longest = max(len(line) for name in row_names for line in name.split("\n"))
    width = min(14.0, max(4.0, 1.9 + 0.07 * longest + (cell if texts is None else 0.95) * array.shape[1]))
    height = min(MAX_HEIGHT, max(2.6, (1.6 if footnote else 1.3) + cell * array.shape[0]))
    fig = new_figure(width, height, title)
    ax = fig.add_subplot()
    ax.grid(visible=False)
    for spine in ax.spines.values():
        spine.set_visible(False)
    norm, palette = _colour_scale(array, centre, limits)
    ax.set_facecolor("#d9d9d9")
    image = draw_cells(ax, array, norm=norm, cmap=palette, aspect="auto")
    _heat_ticks(ax, row_names, column_names, width, height)
    ax.set_xlabel(column_label)
    ax.set_ylabel(row_label)
    bar = fig.colorbar(image, ax=ax, shrink=min(0.9, 4.0 / height), pad=0.02, aspect=22)
    bar.outline.set_visible(False)
    bar.set_label(wrap(label, max(14, int(9 * height))))  # no longer than the figure is high
    if footnote:
        fig.supxlabel(wrap(footnote, int(width * 13)), fontsize=7.5, color=GREY, x=0.01, ha="left")
    if texts is not None or (array.shape[0] <= 14 and array.shape[1] <= 14):
        words = None if texts is None else np.asarray(texts, dtype=object)
        size = float(np.abs(array[np.isfinite(array)]).max(initial=0.0))
        for (i, j), value in np.ndenumerate(array):
            text, ink = "–", GREY
            if math.isfinite(value):
                text = _short(value, size) + str(signs[i, j]) if words is None else _visible(str(words[i, j]))
                ink = _ink(image, value)
            ax.text(j, i, text, ha="center", va="center", fontsize=6.5, color=ink, parse_math=False)
    elif marks is not None:  # no room for numbers: the marks alone
        for sign in {str(s) for s in signs.flat if s}:  # one artist each: hundreds of texts take seconds
            for ink in ("white", "black"):
                at = [(j, i) for (i, j), value in np.ndenumerate(array)
                      if signs[i, j] == sign and math.isfinite(value) and _ink(image, value) == ink]
                ax.plot(*zip(*at, strict=True) if at else ([], []), linestyle="", marker=f"${sign}$", markersize=3.6,
                        markeredgewidth=0, color=ink, scalex=False, scaley=False)
    return fig


def draw_cells(ax: Axes, array: npt.NDArray[np.float64], **options: Any) -> AxesImage:
    """A matrix as an image whose cell (i, j) has its middle at x = j, y = i; undefined cells are left out.

    Vector files hold a few pixels a cell, where matplotlib's own choice would be one for each dot of a printer: a
    fraction of the time and of the bytes. Several, since some programs blur the edges of what they enlarge.
    """
    cells = np.ma.masked_invalid(array).repeat(PIXELS, axis=0).repeat(PIXELS, axis=1)
    rows, columns = array.shape
    return ax.imshow(cells, interpolation="none", extent=(-0.5, columns - 0.5, rows - 0.5, -0.5), **options)


def _ink(image: Any, value: float) -> str:
    """Black or white, whichever is read more easily on the colour of a value."""
    red, green, blue, _ = image.cmap(float(image.norm(value)))
    return "white" if 0.299 * red + 0.587 * green + 0.114 * blue < 0.5 else "black"


def _colour_scale(array: npt.NDArray[np.float64], centre: float | None,
                  limits: tuple[float, float] | None) -> tuple[Normalize, str]:
    finite = array[np.isfinite(array)]
    low, high = limits or ((float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0))
    if centre is None:
        return Normalize(low, high if high > low else low + 1.0), "viridis"
    reach = max(abs(low - centre), abs(high - centre)) or 1.0
    return TwoSlopeNorm(centre, centre - reach, centre + reach), "RdBu_r"


def _heat_ticks(ax: Axes, rows: list[str], columns: list[str], width: float, height: float) -> None:
    """Every label where there is room, in smaller type where that is enough; else every k-th."""
    longest = max(map(len, columns))
    tilted = longest > 4 and longest * len(columns) > width * 8
    row_step, row_size = _thinned(72 * 0.7 * height / len(rows) / max(name.count("\n") + 1 for name in rows))
    column_step, column_size = _thinned(72 * 0.7 * width / len(columns) / (1.0 if tilted else 0.62 * (longest + 1)))
    ax.set_yticks(range(0, len(rows), row_step), rows[::row_step], fontsize=row_size)
    ax.set_xticks(range(0, len(columns), column_step), columns[::column_step], fontsize=column_size)
    if tilted:
        turned = 90 if len(columns) > 20 else 40
        for tick in ax.get_xticklabels():
            tick.set(rotation=turned, ha="right", va="center" if turned == 90 else "top", rotation_mode="anchor")
    ax.tick_params(length=0)


def _thinned(room: float, least: float = 5.5) -> tuple[int, float]:
    """Step and type size (points) of labels of which each has so many points.

    Example:
        >>> _thinned(20), _thinned(8), _thinned(3)
        ((1, 8.0), (1, 6.8), (3, 5.5))
    """
    size = min(8.0, 0.85 * room)
    return (1, size) if size >= least else (math.ceil(least / size), least)


def _visible(token: str) -> str:
    """A token as a figure can show it: spaces as \N{OPEN BOX}, what the font may lack as its number, at most 14 signs.

    Example:
        >>> _visible(" a\\n")
        '␣a\\\\n'
    """
    def sign(c: str) -> str:
        return "␣" if c == " " else c if c.isprintable() and ord(c) < 0x250 else c.encode("unicode_escape").decode()

    shown = "".join(map(sign, token))
    return shown if len(shown) <= 14 else f"{shown[:13]}…"


def _short(value: float, largest: float) -> str:
    """A cell's number with the decimals that the matrix's largest size asks for."""
    if largest >= 10_000 or 0 < largest < 0.05:
        return f"{value:.1e}".replace("e+0", "e").replace("e-0", "e-").replace("-", "−")
    text = f"{value:.2f}" if largest < 10 else f"{value:.1f}" if largest < 100 else f"{value:.0f}"
    return ("0" + text[2:] if float(text) == 0 and text[0] == "-" else text).replace("-", "−")
