"""Masks and arms of a sweep: bars, and gain against cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from midblock.errors import SettingsError
from midblock.figures.style import (
    GREY,
    colour,
    count_note,
    need,
    new_figure,
    note,
    numbers,
    outside_legend,
    short_name,
    styled,
    wrap,
)
from midblock.quantities import label_of

__all__ = ["scatter_pareto", "segment_bars"]


@styled
def segment_bars(frame: pd.DataFrame, *, title: str = "", metric: str | None = None, label: str = "layer",
                 hue: str | None = None, baseline: str | None = None, value_label: str = "",
                 limits: tuple[float, float] | None = None, label_title: str = "", counted: str = "samples") -> Figure:
    """Values of masks or arms as bars with their intervals.

    Up to 12 short labels stand upright in the order of the frame; more or longer ones become
    lying bars, so that every label can be read.

    Args:
        frame: One row per bar: the ``label`` column, ``value`` and, where there are intervals,
            ``low`` and ``high`` (``n`` is shown).
        title: Above the figure.
        metric: Draw only rows of this metric; it also names the axis.
        label: Column of the bars' names.
        hue: A column that makes groups of bars (side, head).
        baseline: Label whose value is drawn as a line across, with its name (the first hue's where grouped).
        value_label: Axis label with unit. Default: the metric's.
        limits: Ends of the value axis. Default: the data's.
        label_title: What the names are. Default: the column's name in words, masks where it is ``layer``.
        counted: What the column ``n`` counts.

    Raises:
        SettingsError: a missing column or baseline, or several rows for one bar.
    """
    need(frame, [label, "value", *([hue] if hue else [])], "segment_bars")
    data = frame
    if metric is not None:
        need(frame, ["metric"], "segment_bars")
        data = frame[frame["metric"] == metric]
        if data.empty:
            raise SettingsError(f"segment_bars: no rows of metric {metric!r} in the table.")
    names = [str(v) for v in dict.fromkeys(data[label])]
    groups = [str(v) for v in dict.fromkeys(data[hue])] if hue else [""]
    key = [data[label].astype(str), data[hue].astype(str)] if hue else [data[label].astype(str)]
    if pd.concat(key, axis=1).duplicated().any():
        raise SettingsError("segment_bars: several rows for one bar; filter the table or give hue=.")
    if baseline is not None and baseline not in names:
        raise SettingsError(f"segment_bars: no baseline {baseline!r} among {', '.join(names)}.")
    value_label = value_label or (label_of(metric) if metric else "Value")
    upright = len(names) <= 12 and max(map(len, names)) <= 9 and len(names) * len(groups) <= 36
    bars = len(names) * len(groups)
    fig = (new_figure(max(3.8, min(9.0, 1.6 + 0.36 * len(names) + 0.26 * bars)), 3.4, title) if upright else
           new_figure(7.0, 1.3 + 0.14 * len(names) + 0.16 * bars, title))
    ax = fig.add_subplot()
    slot = 0.78 / len(groups)
    lowest = 0.0
    for g, group in enumerate(groups):
        rows = data[data[hue].astype(str) == group] if hue else data
        where = np.array([names.index(str(v)) for v in rows[label]], dtype=np.float64)
        at = where - 0.39 + slot * (g + 0.5)
        value = numbers(rows["value"])
        lowest = min(lowest, float(np.nanmin(value, initial=0.0)))
        own = colour(g)
        faces = [GREY if baseline is not None and not hue and names[int(w)] == baseline else own
                 for w in where]
        draw = ax.bar if upright else ax.barh
        draw(at, value, slot * 0.92, color=faces, alpha=0.85, label=group or None)
        if {"low", "high"} <= set(rows.columns):
            _whiskers(ax, at, value, numbers(rows["low"]), numbers(rows["high"]), upright)
        for position in at[~np.isfinite(value)]:
            spot = (position, 0.0) if upright else (0.0, position)
            ax.annotate("undefined", spot, rotation=90 if upright else 0, ha="center" if upright else "left",
                        va="bottom" if upright else "center", fontsize=7, color=GREY,
                        xytext=(0, 3) if upright else (3, 0), textcoords="offset points")
    if baseline is not None:
        at_baseline = data[data[label].astype(str) == baseline]["value"]
        level = float(numbers(at_baseline)[0])
        (ax.axhline if upright else ax.axvline)(level, color=GREY, linestyle="--", linewidth=1.0, zorder=1,
                                                label=f"{baseline} (baseline)")
    title_of_names = label_title or ("segments (input side first)" if label == "layer" else label_of(label))
    _bar_axes(ax, fig.get_figheight(), names, title_of_names, value_label, upright, limits, lowest)
    note(ax, count_note(data, counted))
    outside_legend(fig, [ax], least=2 if baseline is None else 1)
    return fig


def _whiskers(ax: Axes, at: npt.NDArray[np.float64], value: npt.NDArray[np.float64],
              low: npt.NDArray[np.float64], high: npt.NDArray[np.float64], upright: bool) -> None:
    # not errorbar: the interval need not hold the value (adjusted and percentile intervals)
    there = np.isfinite(low) & np.isfinite(high) & np.isfinite(value)
    draw = ax.vlines if upright else ax.hlines
    draw(at[there], low[there], high[there], color="#222222", linewidth=1.1, zorder=3)
    for end in (low, high):
        x, y = (at[there], end[there]) if upright else (end[there], at[there])
        ax.plot(x, y, linestyle="", marker="_" if upright else "|", markersize=5, color="#222222", zorder=3)


def _bar_axes(ax: Axes, tall: float, names: list[str], title: str, value_label: str, upright: bool,
              limits: tuple[float, float] | None, lowest: float) -> None:
    if upright:
        ax.set_xticks(range(len(names)), [short_name(name) for name in names])
        ax.set_xlabel(title)
        ax.set_ylabel(wrap(value_label, 34))
        ax.grid(visible=False, axis="x")
        if limits:
            ax.set_ylim(*limits)
        if lowest < 0:
            ax.axhline(0.0, color="black", linewidth=0.7)
    else:
        size = min(8.0, 72 * 0.8 * (tall - 1.2) / max(len(names), 1))
        ax.set_yticks(range(len(names)), [wrap(short_name(name), 32) for name in names], fontsize=size)
        ax.set_ylim(len(names) - 0.4, -0.6)
        ax.set_title(title, loc="left", fontsize=7.5, color=GREY)  # beside few bars there is no room for it
        ax.set_xlabel(value_label)
        ax.grid(visible=False, axis="y")
        if limits:
            ax.set_xlim(*limits)
        if lowest < 0:
            ax.axvline(0.0, color="black", linewidth=0.7)


@styled
def scatter_pareto(frame: pd.DataFrame, x: str, y: str, label: str = "arm", *, title: str = "",
                   x_label: str = "", y_label: str = "", x_larger_is_better: bool = True,
                   y_larger_is_better: bool = True, log_x: bool = False) -> Figure:
    """Arms as labelled points; those that no other arm beats on both axes are joined.

    Args:
        frame: One row per arm. Columns ``{x}_low`` and ``{x}_high`` (and of y), where there are
            any, are drawn as intervals. Arms without a value on both axes are left out and
            named below the axes.
        x: Column of the horizontal axis.
        y: Column of the vertical axis.
        label: Column of the arms' names.
        title: Above the figure.
        x_label: With unit. Default: the column's name, and which way is better.
        y_label: With unit. Default: the column's name, and which way is better.
        x_larger_is_better: Which way is better.
        y_larger_is_better: Which way is better.
        log_x: Logarithmic axis.

    Raises:
        SettingsError: a missing column.
    """
    need(frame, [x, y, label], "scatter_pareto")
    xs, ys = numbers(frame[x].to_numpy()), numbers(frame[y].to_numpy())
    there = np.isfinite(xs) & np.isfinite(ys)
    names = np.array([str(v) for v in frame[label]], dtype=object)
    fig = new_figure(6.2, 4.6, title)
    ax = fig.add_subplot()
    if log_x:
        ax.set_xscale("log")
    front = np.zeros_like(there)
    front[there] = _pareto_front(xs[there] * (1 if x_larger_is_better else -1),
                                 ys[there] * (1 if y_larger_is_better else -1))
    obstacles: list[tuple[tuple[float, float], tuple[float, float]]] = []
    order = np.flatnonzero(front)[np.argsort(xs[front], kind="stable")]
    for low_high, horizontal in (((f"{x}_low", f"{x}_high"), True), ((f"{y}_low", f"{y}_high"), False)):
        if set(low_high) <= set(frame.columns):
            low, high = (numbers(frame[c].to_numpy()) for c in low_high)
            ok = there & np.isfinite(low) & np.isfinite(high)
            obstacles += [((a, c), (b, c)) if horizontal else ((c, a), (c, b)) for a, b, c in
                          zip(low[ok], high[ok], (ys if horizontal else xs)[ok], strict=True)]
            draw = ax.hlines if horizontal else ax.vlines
            draw((ys if horizontal else xs)[ok], low[ok], high[ok], color="#b5b5b5", linewidth=1.0, zorder=1)
    ax.plot(xs[order], ys[order], color=colour(1), linewidth=1.0, linestyle="--", marker="s", markersize=5.5,
            zorder=3, label="not beaten on both axes")
    rest = there & ~front
    ax.scatter(xs[rest], ys[rest], color=colour(0), s=26, zorder=3)
    ax.margins(0.12)
    wanted = {True: "higher is better", False: "lower is better"}
    ax.set_xlabel(x_label or f"{label_of(x)} ({wanted[x_larger_is_better]})")
    ax.set_ylabel(wrap(y_label or f"{label_of(y)} ({wanted[y_larger_is_better]})", 40))
    if front.any():
        ax.legend(loc="best", handlelength=1.6)
    if not there.all():
        fig.supxlabel(wrap("without a value: " + ", ".join(names[~there]), 90), fontsize=7.5, color=GREY)
    _place_labels(fig, ax, xs[there], ys[there], [wrap(str(n), 24) for n in names[there]], obstacles)
    return fig


def _pareto_front(x: npt.NDArray[np.float64], y: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
    """Points (n,) that no other point equals or beats on both axes and beats on one."""
    at_least = (x[None, :] >= x[:, None]) & (y[None, :] >= y[:, None])
    better = (x[None, :] > x[:, None]) | (y[None, :] > y[:, None])
    return np.asarray(~(at_least & better).any(axis=1), dtype=np.bool_)


def _place_labels(fig: Figure, ax: Axes, x: npt.NDArray[np.float64], y: npt.NDArray[np.float64],
                  names: list[str],
                  obstacles: Sequence[tuple[tuple[float, float], tuple[float, float]]]) -> None:
    """Each label at the first of several places beside its point where it covers nothing."""
    fig.draw_without_rendering()
    renderer = fig.canvas.get_renderer()  # type: ignore[attr-defined]
    points = ax.transData.transform(np.stack([x, y], axis=1)) if x.size else np.empty((0, 2))
    taken = [Bbox.from_bounds(px - 4, py - 4, 8, 8) for px, py in points]
    legend = ax.get_legend()
    if legend is not None:
        taken.append(legend.get_window_extent(renderer))
    for start, end in obstacles:  # interval lines, given a pixel of width
        (x0, y0), (x1, y1) = ax.transData.transform([start, end])
        taken.append(Bbox([[x0 - 1, y0 - 1], [x1 + 1, y1 + 1]]))
    frame_box = ax.get_window_extent(renderer)
    sides = [(r * math.cos(a), r * math.sin(a)) for r in (7, 14, 22, 32, 44)
             for a in np.deg2rad([20, 160, -20, 200, 90, -90, 55, 125, -55, 235])]
    for i, name in enumerate(names):
        best: tuple[float, Any] | None = None
        for dx, dy in sides:
            text = ax.annotate(name, (x[i], y[i]), xytext=(dx, dy), textcoords="offset points", fontsize=7.5,
                               ha="left" if dx > 1 else "right" if dx < -1 else "center",
                               va="center", zorder=4,
                               arrowprops={"arrowstyle": "-", "color": "#b5b5b5", "linewidth": 0.6,
                                           "shrinkA": 0, "shrinkB": 3} if math.hypot(dx, dy) > 13 else None)
            text.update_positions(renderer)
            box = Text.get_window_extent(text, renderer)  # the words alone, without their arrow
            overlap = sum(_overlap(box, other) for other in taken[:i] + taken[i + 1:])
            outside = box.width * box.height - _overlap(box, frame_box)
            cost = overlap + 4 * outside
            if best is None or cost < best[0] - 1e-9:
                if best is not None:
                    best[1].remove()
                best = (cost, text)
            else:
                text.remove()
            if cost <= 1e-9:
                break
        if best is not None:
            taken.append(Text.get_window_extent(best[1], renderer))


def _overlap(a: Bbox, b: Bbox) -> float:
    width = min(a.x1, b.x1) - max(a.x0, b.x0)
    height = min(a.y1, b.y1) - max(a.y0, b.y0)
    return float(width * height) if width > 0 and height > 0 else 0.0
