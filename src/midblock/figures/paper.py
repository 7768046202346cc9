"""The paper's figures in its own layout: several models and data sets on one page, in sizes for one or two columns.

Each function takes one tidy frame with the columns ``model`` (heading of a panel), ``data``, ``side``, ``metric``,
``layer``, ``value``, ``low`` and ``high`` and returns pages: one, or more where a page of `MAX_HEIGHT` is full.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, StrMethodFormatter

from midblock.figures.matrices import draw_cells
from midblock.figures.style import (
    BAND,
    DASHES,
    GREY,
    MARKERS,
    MAX_HEIGHT,
    colour,
    labelled,
    legend_columns,
    need,
    new_figure,
    numbers,
    plain,
    short_name,
    styled,
    wrap,
)
from midblock.quantities import find, known, label_of, unchanged

__all__ = ["WIDTHS", "Width", "correlation_sheet", "depth_sheet", "pattern_sheet", "swap_sheet"]

Width = Literal["one", "two"]
WIDTHS: dict[Width, float] = {"one": 3.03, "two": 6.30}
"""Inches of one column and of both, in the style of the ACL."""
_MOST: dict[Width, int] = {"one": 2, "two": 5}
"""Panels side by side."""
_BARS = 1.6
"""Inches of a panel of bars, whose names stand below it."""
_TALL, _LEAST = 1.2, 0.78
"""Inches of a panel, with its ticks."""
_LOGARITHMIC = ("condition_number",)
_IN_UNITS = ("spectrum", "change", "gradients")
"""Families whose values hang on a model's size."""
_ZONES = ((0.0, 0.2), (0.8, 1.0))


def _sheets(rows: Sequence[str], columns: Sequence[str], draw: Callable[[Axes, str, str], None], width: Width, *,
            y_label: Callable[[str], str], x_label: str, shared: Callable[[str], bool], most: int | None = None,
            tall: float = _TALL) -> list[Figure]:
    """Panels (row by column), the columns in groups that fit the width, the groups on as few pages as hold them."""
    side_by_side = min(len(columns), most or _MOST[width])
    groups = [list(columns[i:i + side_by_side]) for i in range(0, len(columns), side_by_side)]
    margin = 0.75  # axis label and legend
    fitting = max(1, int((MAX_HEIGHT - margin) / (_LEAST * len(rows) + 0.15)))
    pages = []
    for start in range(0, len(groups), fitting):
        own = groups[start:start + fitting]
        lines = len(own) * len(rows)
        height = min(MAX_HEIGHT, margin + lines * tall + 0.15 * len(own))
        fig = new_figure(WIDTHS[width], height, "")
        engine: Any = fig.get_layout_engine()
        engine.set(w_pad=0.02, h_pad=0.02, wspace=0.02, hspace=0.02)
        grid = fig.subplots(lines, side_by_side, squeeze=False)
        for line in range(lines):
            group, row = own[line // len(rows)], rows[line % len(rows)]
            drawn: list[Axes] = []
            for place, ax in enumerate(grid[line]):
                if place >= len(group):
                    ax.set_visible(False)
                    continue
                draw(ax, row, group[place])
                drawn.append(ax)
                if line % len(rows) == 0:
                    ax.set_title(wrap(plain(short_name(group[place])), int(WIDTHS[width] * 17 / side_by_side)))
                if line % len(rows) == len(rows) - 1:
                    ax.set_xlabel(x_label)
                else:
                    ax.tick_params(labelbottom=False)
            drawn[0].set_ylabel(wrap(y_label(row), _label_width(tall)))
            if shared(row):
                _share(drawn)
        _legend(fig, [ax for ax in fig.axes if ax.get_visible()])
        pages.append(fig)
    return pages


def _label_width(tall: float) -> int:
    """Letters of a line of the vertical axis' label."""
    return max(12, int(tall * 15))


def _share(axes: Sequence[Axes]) -> None:
    low = min(ax.get_ylim()[0] for ax in axes)
    high = max(ax.get_ylim()[1] for ax in axes)
    for place, ax in enumerate(axes):
        ax.set_ylim(low, high)
        if place:
            ax.tick_params(labelleft=False)


def _legend(fig: Figure, axes: Sequence[Axes]) -> None:
    seen = labelled(axes)
    if len(seen) >= 2:
        # small type: half as many more labels fit as in the figures of single commands
        fig.legend(list(seen.values()), list(seen), loc="outside lower center", handlelength=1.8, columnspacing=1.0,
                   ncols=legend_columns(fig.get_figwidth() * 1.5, list(seen)))


def _band(ax: Axes, rows: pd.DataFrame, shade: str) -> None:
    if {"low", "high"} <= set(rows.columns):
        ax.fill_between(numbers(rows["layer"]), numbers(rows["low"]), numbers(rows["high"]), color=shade, alpha=BAND,
                        linewidth=0)


def _names(values: pd.Series[Any]) -> list[str]:
    return [str(v) for v in dict.fromkeys(values)]


@styled
def depth_sheet(frame: pd.DataFrame, metrics: Sequence[str], width: Width, *, one_base: bool = False) -> list[Figure]:
    """Metrics over relative depth: a row each, a column for each model, a colour for each data set.

    Of a metric that each model has, the tuned model's line is drawn through and the base's is dashed. Early and late
    fifths are shaded.

    Args:
        frame: See the module; ``depth`` is 0..1. One row per model, data set, side, metric and depth.
        metrics: Rows of panels.
        width: One column or two.
        one_base: All models come of one base, so that every measure has one scale; of models of different size those
            in units of their states have not.

    Raises:
        SettingsError: a missing column, or no rows.
    """
    need(frame, ["model", "data", "side", "metric", "depth", "value"], "depth_sheet")
    data = _names(frame["data"])
    several = len(data) > 1

    def draw(ax: Axes, metric: str, model: str) -> None:
        part = frame[(frame["metric"] == metric) & (frame["model"] == model)]
        for low, high in _ZONES:
            ax.axvspan(low, high, color="#f2f2f2", linewidth=0, zorder=0)
        for (name, side), rows in part.groupby(["data", "side"], sort=False):
            rows = rows.assign(layer=rows["depth"]).sort_values("layer", kind="stable")
            base = side == "base"
            number = data.index(str(name))
            # one data set: the colour tells the models apart
            shade = colour(number if several else int(base))
            label = ", ".join(x for x in ((str(name) if several or name else ""),
                                          (str(side) if part["side"].nunique() > 1 or base else "")) if x)
            label = label or {"difference": "tuned − base", "pair": "tuned with base"}.get(str(side), str(side))
            ax.plot(numbers(rows["layer"]), numbers(rows["value"]), color=shade, linestyle=DASHES[int(base)],
                    marker=MARKERS[number % len(MARKERS)], markevery=max(1, len(rows) // 8),
                    label=plain(label))
            _band(ax, rows, shade)
        if part.empty:
            _absent(ax)
        elif metric in _LOGARITHMIC and (part["value"] > 0).any():
            ax.set_yscale("log")
            _log_ticks(ax)
        else:
            ax.yaxis.set_major_locator(MaxNLocator(4))
        if known(metric) and find(metric).paired and not part.empty:
            same, (low, high) = unchanged(metric), ax.get_ylim()
            if low <= same <= high:
                ax.axhline(same, color=GREY, linewidth=0.6, zorder=1)
        ax.set_xlim(-0.02, 1.02)
        ax.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])

    return _sheets(list(metrics), _names(frame["model"]), draw, width, x_label="relative depth", y_label=label_of,
                   shared=lambda m: one_base or not known(m) or find(m).family not in _IN_UNITS)


def _log_ticks(ax: Axes) -> None:
    """A few labels on a logarithmic axis: powers of ten, or 1, 2 and 5 times these where they span little."""
    low, high = ax.get_ylim()
    ax.yaxis.set_major_locator(LogLocator(subs=(1.0,) if high > 100 * low else (1.0, 2.0, 5.0), numticks=6))
    ax.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    ax.yaxis.set_minor_locator(NullLocator())


def _absent(ax: Axes) -> None:
    ax.text(0.5, 0.5, "not measured", transform=ax.transAxes, ha="center", va="center", color=GREY,
            fontsize="x-small")
    ax.set_yticks([])


@styled
def correlation_sheet(matrices: Mapping[str, pd.DataFrame], width: Width) -> list[Figure]:
    """Correlations over depth as one heatmap for each model.

    Args:
        matrices: Model -> square frame of correlations, -1..1; NaN is grey.
        width: One column or two.
    """
    names = list(matrices)
    side_by_side = {"one": 1, "two": 2}[width] if len(names) <= 4 else {"one": 2, "two": 3}[width]
    side_by_side = min(side_by_side, len(names))
    lines = -(-len(names) // side_by_side)
    cell = WIDTHS[width] / side_by_side
    fitting = max(1, int(MAX_HEIGHT / cell))
    pages = []
    for first in range(0, lines, fitting):
        own = names[first * side_by_side:(first + fitting) * side_by_side]
        rows = -(-len(own) // side_by_side)
        fig = new_figure(WIDTHS[width], min(MAX_HEIGHT, rows * cell * 0.98 + 0.35), "")
        grid = fig.subplots(rows, side_by_side, squeeze=False)
        image: Any = None
        for place, ax in enumerate(grid.flat):
            if place >= len(own):
                ax.set_visible(False)
                continue
            image = _correlations(ax, matrices[own[place]], cell, labelled_rows=place % side_by_side == 0)
            ax.set_title(plain(short_name(own[place])))
        bar = fig.colorbar(image, ax=grid, orientation="horizontal", shrink=0.5, aspect=40, pad=0.01)
        bar.outline.set_visible(False)
        bar.set_label("correlation over depth")
        pages.append(fig)
    return pages


def _correlations(ax: Axes, square: pd.DataFrame, cell: float, *, labelled_rows: bool) -> Any:
    values = square.to_numpy(dtype=np.float64)
    words = [plain(label_of(str(n), unit="") if known(str(n)) else str(n)) for n in square.index]
    ax.set_facecolor("#d9d9d9")
    ax.grid(visible=False)
    image = draw_cells(ax, values, norm=Normalize(-1, 1), cmap="RdBu_r")
    size = 72 * (cell - 0.9) / max(1, len(words))  # points of a cell
    ax.set_xticks(range(len(words)), words, rotation=60, ha="right", rotation_mode="anchor",
                  fontsize=min(6.0, size * 0.8))
    ax.set_yticks(range(len(words)), words if labelled_rows else [""] * len(words), fontsize=min(6.0, size * 0.8))
    ax.tick_params(length=0)
    if size >= 10:
        for (i, j), value in np.ndenumerate(values):
            if math.isfinite(value):
                ax.text(j, i, f"{value:.2f}".replace("0.", ".").replace("-", "−"), ha="center", va="center",
                        fontsize=min(5.5, size * 0.36), color="white" if abs(value) > 0.65 else "black")
    return image


@styled
def swap_sheet(frame: pd.DataFrame, width: Width) -> list[Figure]:
    """Accuracy after segments of one model replaced the other's, a row for each data set, a column for each model.

    Points with intervals, since differences are small; lines across are base and tuned model as they are.

    Args:
        frame: Also with ``mask``, ``donor``, ``recipient`` and ``head``; ``mask`` of zeros is the model as it is.
        width: One column or two.

    Raises:
        SettingsError: a missing column, or no rows.
    """
    need(frame, ["model", "data", "mask", "donor", "recipient", "head", "value", "low", "high"], "swap_sheet")

    def is_whole(rows: pd.DataFrame) -> pd.Series[bool]:
        return ~rows["mask"].astype(str).str.contains("1")

    frame = _without_equal_heads(frame)
    swapped = frame[~is_whole(frame)]
    masks = _names(swapped["mask"])
    kinds = [tuple(map(str, k)) for k in swapped[["donor", "recipient", "head"]].drop_duplicates().to_numpy()]
    roles = list(dict.fromkeys(_roles(*kind) for kind in kinds))

    def draw(ax: Axes, data: str, model: str) -> None:
        part = frame[(frame["data"] == data) & (frame["model"] == model)]
        if part.empty:
            _absent(ax)
            return
        for number, side in enumerate(("base", "tuned")):
            own = part[is_whole(part) & part["head"].isin(["any", side])
                       & ((part["recipient"] == "base") == (side == "base"))]["value"]
            if len(own):
                ax.axhline(float(own.iloc[0]), color=GREY, linestyle=DASHES[1 + number], linewidth=0.9, zorder=1,
                           label=f"{side} as it is")
        step = 0.8 / len(roles)
        for (donor, recipient, head), rows in part[~is_whole(part)].groupby(["donor", "recipient", "head"], sort=False):
            role = _roles(str(donor), str(recipient), str(head))
            number = roles.index(role)
            x = np.array([masks.index(str(m)) for m in rows["mask"]]) - 0.4 + step * (number + 0.5)
            own = str(head) in ("any", str(recipient))
            ax.vlines(x, numbers(rows["low"]), numbers(rows["high"]), color=colour(number), linewidth=0.7)
            ax.plot(x, numbers(rows["value"]), linestyle="", marker=MARKERS[number % len(MARKERS)],
                    color=colour(number), markerfacecolor=colour(number) if own else "white", label=role, zorder=3)
        ax.yaxis.set_major_locator(MaxNLocator(4))
        ax.set_xlim(-0.6, len(masks) - 0.4)
        room = WIDTHS[width] / min(_MOST[width], frame["model"].nunique()) - 0.3
        crowded = 0.055 * len(masks) * (len(masks[0]) + 1) > room  # inches that the labels take side by side
        ax.set_xticks(range(len(masks)), masks, rotation=60 if crowded else 0, ha="right" if crowded else "center",
                      rotation_mode="anchor")
        ax.grid(visible=False, axis="x")

    return _sheets(_names(frame["data"]), _names(frame["model"]), draw, width, shared=lambda d: False, tall=1.35,
                   y_label=lambda d: f"{plain(d)}\naccuracy" if d else "accuracy",
                   x_label="segment replaced")


def _without_equal_heads(frame: pd.DataFrame) -> pd.DataFrame:
    """One head is enough where both say the same of every swap, as tied or untuned heads do; it is ``any`` then."""
    keys = ["model", "data", "mask", "donor", "recipient"]
    apart = frame.groupby(keys, sort=False)["value"].agg(lambda v: float(np.ptp(v)))
    if len(frame) == len(apart) or not (apart == 0).all():
        return frame
    return frame[frame["head"] == frame["recipient"]].assign(head="any")


def _roles(donor: str, recipient: str, head: str) -> str:
    """``tuned in base, base's head``: whatever the stages are called, every model of a page shares the legend."""
    into = "tuned in base" if recipient == "base" else "base in tuned"
    return into if head == "any" else f"{into}, {'base' if head == 'base' else 'tuned'} head"


@styled
def pattern_sheet(frame: pd.DataFrame, width: Width, baselines: Mapping[str, str]) -> list[Figure]:
    """Score by pattern of tuned segments: a panel for each sweep's task, a bar for each pattern.

    The baseline's bar is grey and its value a line across; the untuned model is a dotted line.

    Args:
        frame: ``model`` (heading of the panel), ``metric``, ``arm``, ``side`` (``base``: untuned), ``value``, ``low``,
            ``high``.
        width: One column or two.
        baselines: Heading -> the baseline's arm.

    Raises:
        SettingsError: a missing column, or no rows.
    """
    need(frame, ["model", "metric", "arm", "side", "value", "low", "high"], "pattern_sheet")
    models = _names(frame["model"])
    most_arms = max(int((frame[frame["model"] == m]["side"] != "base").sum()) for m in models)
    most = max(1, min(_MOST[width], int(WIDTHS[width] / (0.35 + 0.11 * most_arms))))

    def draw(ax: Axes, row: str, model: str) -> None:
        part = frame[frame["model"] == model]
        arms, untuned = part[part["side"] != "base"], part[part["side"] == "base"]
        at = np.arange(len(arms))
        value = numbers(arms["value"])
        names = [str(a) for a in arms["arm"]]
        baseline = baselines.get(model)
        ax.bar(at, value, 0.74, color=[GREY if n == baseline else colour(0) for n in names], alpha=0.85)
        ax.vlines(at, numbers(arms["low"]), numbers(arms["high"]), color="#222222", linewidth=0.8)
        for place in at[~np.isfinite(value)]:
            ax.annotate("failed", (place, 0), rotation=90, ha="center", va="bottom", fontsize="x-small", color=GREY)
        if baseline in names and math.isfinite(level := float(value[names.index(baseline)])):
            ax.axhline(level, color=GREY, linestyle=DASHES[1], linewidth=0.8, zorder=1, label="baseline (grey)")
        if len(untuned) and math.isfinite(level := float(numbers(untuned["value"])[0])):
            ax.axhline(level, color="black", linestyle=DASHES[3], linewidth=0.8, zorder=1, label="untuned")
        ax.set_xticks(at, [plain(n) for n in names], rotation=60, ha="right", rotation_mode="anchor")
        ax.yaxis.set_major_locator(MaxNLocator(4))
        ax.grid(visible=False, axis="x")
        metric = str(part["metric"].iloc[0])
        ax.set_ylabel(wrap(label_of(metric), _label_width(_BARS)))

    def y_label(row: str) -> str:
        return label_of(str(frame["metric"].iloc[0])) if frame["metric"].nunique() == 1 else ""

    return _sheets([""], models, draw, width, y_label=y_label, x_label="", most=most, tall=_BARS,
                   shared=lambda row: False)
