"""Lines over depth, and over anything else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from midblock.errors import SettingsError
from midblock.figures.style import (
    GREY,
    MAX_HEIGHT,
    count_note,
    integer_axis,
    labelled,
    legend_columns,
    need,
    new_figure,
    note,
    numbers,
    outside_legend,
    plain_grid,
    plot_series,
    styled,
    wrap,
)
from midblock.quantities import find, known, label_of, matrix_order, unchanged

__all__ = ["depth_lines", "lines"]

_CHANGES = ("difference", "pair")
_MARGINS = {"left": 0.92, "right": 0.12, "top": 0.3, "bottom": 0.45}
"""Inches around a panel: its axis label and ticks, n above it."""
_COUNTED = {"weight": "", "gradient": "batches"}
"""What n counts, by level of the metric: entries of a matrix are not worth a note."""


@styled
def depth_lines(frame: pd.DataFrame, metrics: Sequence[str] | None = None, *, title: str = "",
                hue: str | None = None, kind: str | None = None, num_layers: int | None = None,
                shade: Sequence[int] = (), shaded: str = "tuned blocks", counted: str | None = None) -> Figure:
    """Metrics over depth: the models' own values in one panel, their difference or pair score in the next.

    Bands are the intervals ``low``..``high``; the upper axis of the first row is relative depth (hidden: h/L, block:
    b/(L-1)); a grey line marks "no change". A metric with only one kind of side has one panel.

    Args:
        frame: Tidy table (`midblock.results`): kind, layer, metric, side, value, low, high, n.
        metrics: Which, in this order. Default: all of the frame.
        title: Above the figure.
        hue: A further column that splits each side into several lines (stage, matrix, data).
        kind: ``hidden`` or ``block``; needed where the frame holds both.
        num_layers: The largest layer index of the model. Default: the largest in the frame.
        shade: Blocks to shade, such as those that were tuned.
        shaded: What the shade says in the legend.
        counted: What ``n`` counts. Default: samples, or batches for gradients, nothing for weights.

    Raises:
        SettingsError: a missing column or metric, several kinds, or layers that are no numbers.
    """
    need(frame, ["kind", "layer", "metric", "side", "value", *([hue] if hue else [])], "depth_lines")
    chosen = list(metrics) if metrics is not None else list(dict.fromkeys(frame["metric"]))
    absent = [m for m in chosen if m not in set(frame["metric"])]
    if absent or not chosen:
        raise SettingsError(f"depth_lines: no metric {', '.join(map(repr, absent)) or '(none asked for)'} in "
                            f"the table; it has: {', '.join(dict.fromkeys(map(str, frame['metric'])))}.")
    data, drawn_kind = _numbered(frame[frame["metric"].isin(chosen)], kind)
    last = float(num_layers if num_layers is not None else data["layer"].max())
    keys = _series_keys(data, hue)
    panels: list[tuple[str, pd.DataFrame, bool]] = []
    for metric in chosen:
        rows = data[data["metric"] == metric]
        change = rows["side"].isin(_CHANGES)
        panels += [(metric, rows[of], bool(is_change)) for of, is_change in ((~change, False), (change, True))
                   if of.any()]
    columns = 1 if len(panels) == 1 else 2 if len(panels) <= 8 else 4
    fig, axes, row_height = _sheet(len(panels), columns, title, legend=len(keys) > 1 or bool(shade))
    counts: list[str] = []
    across = [v for v in MaxNLocator(integer=True, nbins=6, min_n_ticks=1).tick_values(0, last) if 0 <= v <= last]
    for place, (ax, (metric, rows, is_change)) in enumerate(zip(axes, panels, strict=True)):
        _panel(ax, rows, keys, hue, is_change)
        name = wrap(label_of(metric, change=is_change and bool((rows["side"] == "difference").any())), 26)
        # all labels of a column in one line, as far from their panels as the margin lets them, no longer than a row
        longest = max(map(len, name.split("\n")))
        ax.set_ylabel(name, fontsize=min(9.0 if name.count("\n") < 2 else 7.5, 72 * row_height / (0.58 * longest)))
        ax.yaxis.set_label_coords(-0.54 / (ax.get_position().width * fig.get_figwidth()), 0.5)
        ax.set_xlim(-0.02 * last - 0.3, last * 1.02 + 0.3)
        for block in shade:
            centre = block + (drawn_kind == "hidden")
            ax.axvspan(centre - 0.5, centre + 0.5, color="#f0e6c8", alpha=0.6, linewidth=0, zorder=0,
                       label=shaded)
        counts.append(count_note(rows, counted if counted is not None else
                                 _COUNTED.get(find(metric).level, "samples") if known(metric) else "samples"))
        lowest = place >= len(panels) - columns
        plain_grid(ax, across, named=lowest)
        if place < columns and last > 0:
            _relative_depth(ax, last)
        ax.xaxis.set_label_coords(0.5, -0.3 / (ax.get_position().height * fig.get_figheight()))
        if lowest:
            ax.set_xlabel("hidden state h (0 = embeddings)" if drawn_kind == "hidden" else f"{drawn_kind}")
    if len(set(counts)) == 1:
        fig.text(0.99, 1 - 0.1 / fig.get_figheight(), counts[0], ha="right", va="top", fontsize=7.5, color=GREY)
    else:
        for place, (ax, count) in enumerate(zip(axes, counts, strict=True)):
            note(ax, count, points=13.0 if place < columns else 4.0)
    _legend_below(fig, axes)
    return fig


def _numbered(data: pd.DataFrame, kind: str | None) -> tuple[pd.DataFrame, str]:
    """Rows of one kind with layers as numbers, in order; and the kind."""
    if kind is not None:
        data = data[data["kind"] == kind]
    kinds = list(dict.fromkeys(data["kind"]))
    if len(kinds) != 1:
        raise SettingsError(f"depth_lines draws one kind of layer, but the rows hold {kinds}; "
                            "choose with kind=.")
    layer = numbers(data["layer"].to_numpy())
    if np.isnan(layer).any():
        raise SettingsError(f"depth_lines needs numbered layers, but the frame has "
                            f"{data['layer'].iloc[int(np.isnan(layer).argmax())]!r}; "
                            "use segment_bars for masks.")
    return data.assign(layer=layer).sort_values("layer", kind="stable"), str(kinds[0])


def _sheet(count: int, columns: int, title: str, *, legend: bool) -> tuple[Figure, list[Axes], float]:
    """Panels at places known beforehand (finding them by layout takes longer than all the drawing), and a row's height.
    """
    rows = -(-count // columns)
    width = {1: 6.4, 2: 8.2, 4: 13.6}[columns]
    head, foot = (0.5 if title else 0.2), (0.75 if legend else 0.5)  # title; axis label and legend
    height = min(head + foot + rows * 2.05, MAX_HEIGHT)
    fig = new_figure(width, height, title, layout=None)
    cell_w, cell_h = width / columns, (height - head - foot) / rows
    axes = []
    for i in range(count):
        row, column = divmod(i, columns)
        left = column * cell_w + _MARGINS["left"]
        bottom = height - head - (row + 1) * cell_h + 0.12
        axes.append(fig.add_axes((left / width, bottom / height,
                                  (cell_w - _MARGINS["left"] - _MARGINS["right"]) / width,
                                  (cell_h - _MARGINS["top"] - 0.12) / height)))
    return fig, axes, cell_h


def _relative_depth(ax: Axes, last: float) -> None:
    """Words above a panel: where it is 0, half and all of the depth."""
    for share, words in ((0.0, "depth 0"), (0.5, "0.5"), (1.0, "1")):
        ax.annotate(words, (share * last, 1.0), (0, 2), xycoords=ax.get_xaxis_transform(), textcoords="offset points",
                    ha="center", va="bottom", fontsize=7.5, color=GREY, annotation_clip=False)


def _legend_below(fig: Figure, axes: Sequence[Axes]) -> None:
    seen = labelled(axes)
    if len(seen) < 2:
        return
    columns = legend_columns(fig.get_figwidth(), list(seen))
    rows = -(-len(seen) // columns)
    extra = 0.19 * (rows - 1)  # more lines of labels: the panels move up by as much
    width, height = fig.get_size_inches()
    if extra:
        grown = min(height + extra, MAX_HEIGHT)
        for ax in axes:
            box = ax.get_position()
            scale = (grown - extra) / height
            ax.set_position((box.x0, (box.y0 * height * scale + extra) / grown, box.width,
                             box.height * height * scale / grown))
        fig.set_size_inches(width, grown)
    fig.legend(list(seen.values()), list(seen), loc="lower center", ncols=columns, borderaxespad=0.1)


def _series_keys(data: pd.DataFrame, hue: str | None) -> list[tuple[str, ...]]:
    """Side (and hue) of every line, models first, in the table's order; matrices in their own order."""
    columns = ["side", hue] if hue else ["side"]
    keys = [tuple(str(v) for v in row) for row in data[columns].drop_duplicates().to_numpy()]
    order = {"base": 0, "sft": 1, "difference": 8, "pair": 9}
    if hue == "matrix":
        place = {name: i for i, name in enumerate(matrix_order([key[1] for key in keys]))}
        keys.sort(key=lambda key: place[key[1]])
    return sorted(keys, key=lambda key: order.get(key[0], 2))


def _panel(ax: Axes, part: pd.DataFrame, keys: list[tuple[str, ...]], hue: str | None, is_change: bool) -> None:
    drawn = False
    levels = sum(key[0] not in _CHANGES for key in keys)
    for index, key in enumerate(keys):
        rows = part[part["side"].astype(str) == key[0]]
        if hue:
            rows = rows[rows[hue].astype(str) == key[1]]
        if rows.empty:
            continue
        if rows["layer"].duplicated().any():
            raise SettingsError(f"depth_lines: {rows['metric'].iloc[0]!r} has several rows for layer "
                                f"{rows['layer'][rows['layer'].duplicated()].iloc[0]:g}, side {key[0]!r}; "
                                "filter the table or split it with hue=.")
        # changes restart the palette after the models' colours unless a hue needs it whole
        slot = index if not is_change or not hue else index - levels
        label = _compared(rows, key[0])
        if hue:
            label = key[1] if levels == 0 or is_change else f"{label}, {key[1]}"
        plot_series(ax, numbers(rows["layer"]), rows, slot, label)
        drawn = drawn or bool(np.isfinite(numbers(rows["value"])).any())
    if is_change:
        side = str(part["side"].iloc[0])
        same, (low, high) = unchanged(str(part["metric"].iloc[0]), side), ax.get_ylim()
        if side == "difference" or low < same < high:
            ax.axhline(same, color=GREY, linewidth=0.9, zorder=1)
    if not drawn:
        ax.text(0.5, 0.5, "undefined at every layer", transform=ax.transAxes, ha="center", va="center", color=GREY)
        ax.tick_params(labelleft=False)


def _compared(rows: pd.DataFrame, side: str) -> str:
    """What a line shows: a model's name, ``sft − base``, or ``sft with base``."""
    if side not in _CHANGES:
        return side
    stages = list(dict.fromkeys(rows["stage"].dropna())) if "stage" in rows else []
    later, dash, earlier = str(stages[0]).partition("-") if len(stages) == 1 else ("", "", "")
    if not dash:
        return {"difference": "difference", "pair": "pair score"}[side]
    return f"{later} − {earlier}" if side == "difference" else f"{later} with {earlier}"


@styled
def lines(frame: pd.DataFrame, x: str, y: str = "value", hue: str | None = None, *, title: str = "",
          x_label: str = "", y_label: str = "", low: str = "low", high: str = "high",
          log_x: bool = False, log_y: bool = False, zero: bool = False, counted: str = "samples") -> Figure:
    """Lines of y over x, one per value of ``hue``, with bands where the frame has ``low``, ``high``.

    Args:
        frame: One row per point.
        x: Column of the horizontal axis.
        y: Column of the vertical axis.
        hue: Column that makes several lines.
        title: Above the figure.
        x_label: With unit. Default: the column's name.
        y_label: With unit. Default: the column's name.
        low: Column of the interval's lower end.
        high: Column of its upper end.
        log_x: Logarithmic axis.
        log_y: Logarithmic axis.
        zero: Draw a line at y = 0.
        counted: What the column ``n`` counts, where there is one.

    Raises:
        SettingsError: a missing column, no rows, or an x column that holds no numbers.
    """
    need(frame, [x, y, *([hue] if hue else [])], "lines")
    if np.isnan(numbers(frame[x].to_numpy())).all():
        raise SettingsError(f"lines: column {x!r} holds no numbers; use segment_bars for names.")
    fig = new_figure(6.4, 3.8, title)
    ax = fig.add_subplot()
    groups: list[Any] = list(dict.fromkeys(frame[hue])) if hue else [None]
    for i, group in enumerate(groups):
        rows = frame[frame[hue] == group] if hue else frame
        rows = rows.assign(**{x: numbers(rows[x].to_numpy())}).sort_values(x, kind="stable")
        columns = {"value": rows[y]} | ({"low": rows[low], "high": rows[high]}
                                        if {low, high} <= set(rows.columns) else {})
        plot_series(ax, numbers(rows[x]), pd.DataFrame(columns), i, str(group) if hue else label_of(y))
    if zero:
        ax.axhline(0.0, color=GREY, linewidth=0.9, zorder=1)
    if log_x:
        ax.set_xscale("log")
    elif (whole := numbers(frame[x].to_numpy())).size and (whole[np.isfinite(whole)] % 1 == 0).all():
        integer_axis(ax)
    if log_y:
        ax.set_yscale("log")
    ax.set_xlabel(x_label or label_of(x))
    ax.set_ylabel(wrap(y_label or label_of(y), 36))
    note(ax, count_note(frame, counted))
    if hue:
        outside_legend(fig, [ax])
    return fig
