"""Figures for tables of results: matplotlib `Figure` objects, built without pyplot or a display.

Every figure takes data that is already computed and returns a `matplotlib.figure.Figure`;
`save_figure` writes it as SVG and PNG, byte for byte the same for the same data. Colours are
Okabe and Ito's, told apart by colour-blind readers; markers and line styles tell the series
apart in print as well. Where a value is undefined the line has a gap.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeVar

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Normalize, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Bbox

from midblock.errors import SettingsError
from midblock.provenance import atomic_path

__all__ = ["COLOURS", "METRIC_LABELS", "depth_lines", "heatmap", "lines", "metric_label", "save_figure",
           "scatter_pareto", "segment_bars"]

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
"""Okabe and Ito's palette without its yellow, which is too light on white."""
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_DASHES = ("-", "--", "-.", ":")
_GREY = "#6e6e6e"
_BAND = 0.18

_STYLE: dict[str, Any] = {
    "font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans"], "font.size": 9.0,
    "axes.titlesize": 9.5, "axes.labelsize": 9.0, "axes.titlelocation": "left",
    "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.7,
    "axes.grid": True, "grid.color": "#e4e4e4", "grid.linewidth": 0.6, "axes.axisbelow": True,
    "xtick.labelsize": 8.0, "ytick.labelsize": 8.0, "xtick.major.width": 0.7, "ytick.major.width": 0.7,
    "legend.fontsize": 8.5, "legend.frameon": False, "figure.titlesize": 11.0, "figure.dpi": 100.0,
    "lines.linewidth": 1.5, "lines.markersize": 3.5, "savefig.dpi": 200.0, "savefig.bbox": None,
    "svg.hashsalt": "midblock", "svg.fonttype": "path", "axes.unicode_minus": True, "text.usetex": False,
    "figure.facecolor": "white", "axes.facecolor": "white", "savefig.facecolor": "white",
}

METRIC_LABELS: dict[str, tuple[str, str]] = {
    "prompt_entropy": ("Prompt entropy", "share of the maximum"),
    "dataset_entropy": ("Dataset entropy", "share of the maximum"),
    "effective_rank": ("Effective rank", "dimensions"),
    "rank_deficiency": ("Rank deficiency", "share of min(N, d)"),
    "spectral_norm": ("Spectral norm", ""),
    "condition_number": ("Condition number", ""),
    "sparsity": ("Sparsity", "share of entries"),
    "curvature": ("Curvature", "mean angle / π"),
    "l2_norm": ("L2 norm", ""),
    "gini": ("Gini coefficient", ""),
    "intrinsic_dimension": ("Intrinsic dimension", "dimensions"),
    "cka": ("CKA, base with sft", ""),
    "cka_debiased": ("CKA, debiased", ""),
    "cosine": ("Cosine similarity", ""),
    "mean_shift": ("Mean shift", "L2"),
    "change_intensity": ("Change intensity", "L2"),
    "infonce": ("InfoNCE", "nats"),
    "lidar": ("LiDAR", ""),
    "dime": ("DiME", "nats"),
    "weight_change": ("Weight change", "Frobenius norm"),
    "accuracy": ("Accuracy", "share"),
    "loss": ("Loss", "nats per token"),
    "perplexity": ("Perplexity", ""),
    "entropy": ("Entropy", "nats"),
}
"""Metric -> (label, unit) on an axis; the unit may be empty (unitless)."""

_P = ParamSpec("_P")
_R = TypeVar("_R")


def _styled(build: Callable[_P, _R]) -> Callable[_P, _R]:
    """Build under this module's settings whatever the user's matplotlibrc says, then restore them."""

    @functools.wraps(build)
    def wrapper(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        with mpl.rc_context():
            mpl.rcdefaults()  # leaves the backend alone
            settings: Any = mpl.rcParams
            settings.update(_STYLE)
            return build(*args, **kwargs)

    return wrapper


def metric_label(metric: str, units: Mapping[str, str] | None = None) -> str:
    """Axis label of a metric with its unit; ``units`` overrides the default unit.

    Example:
        >>> metric_label("loss"), metric_label("my_metric"), metric_label("l2_norm", {"l2_norm": "a.u."})
        ('Loss (nats per token)', 'My metric', 'L2 norm (a.u.)')
    """
    name, unit = METRIC_LABELS.get(metric, (metric[:1].upper() + metric[1:].replace("_", " "), ""))
    unit = (units or {}).get(metric, unit)
    return f"{name} ({unit})" if unit else name


def _wrap(text: str, width: int) -> str:
    """Break a label over lines at spaces, underscores and dashes; never lose a character."""
    if len(text) > width and " (" in text and text.endswith(")"):  # keep a unit in one piece
        name, _, unit = text.rpartition(" (")
        return f"{_wrap(name, width)}\n({unit}"
    out: list[str] = []
    line = ""
    for piece in _pieces(text):
        if line and len(line) + len(piece.rstrip()) > width:
            out.append(line.rstrip())
            line = ""
        line += piece
    return "\n".join([*out, line.rstrip()])


def _pieces(text: str) -> list[str]:
    found, start = [], 0
    for i, character in enumerate(text):
        if character in " _-/:,":
            found.append(text[start:i + 1])
            start = i + 1
    return [*found, text[start:]]


def _need(frame: pd.DataFrame, columns: Sequence[str], what: str) -> None:
    missing = [c for c in columns if c not in frame.columns]
    if missing:
        raise SettingsError(f"{what} needs column {missing[0]!r}; the frame has: "
                            f"{', '.join(map(str, frame.columns)) or 'none'}.")
    if frame.empty:
        raise SettingsError(f"{what} was given a frame without rows.")


def _numbers(values: Any) -> npt.NDArray[np.float64]:
    return np.asarray(pd.to_numeric(pd.Series(values), errors="coerce"), dtype=np.float64)


def _new_figure(width: float, height: float, title: str) -> Figure:
    fig = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(fig)
    if title:
        fig.suptitle(_wrap(title, int(width * 12)), x=0.01, ha="left", fontweight="bold")
    return fig


def _plot_series(ax: Axes, x: npt.NDArray[np.float64], rows: pd.DataFrame, index: int, label: str,
                 colour: str | None = None) -> None:
    """One line with its interval band."""
    colour = colour or COLOURS[index % len(COLOURS)]
    value = _numbers(rows["value"])
    many = x.size > 48  # markers would merge into a thick line
    ax.plot(x, value, color=colour, label=label, linestyle=_DASHES[(index // len(COLOURS)) % len(_DASHES)],
            marker="" if many else _MARKERS[index % len(_MARKERS)])
    if many:  # a value between two gaps has no line
        gaps = np.isnan(np.concatenate([[np.nan], value, [np.nan]]))
        alone = ~gaps[1:-1] & gaps[:-2] & gaps[2:]
        ax.plot(x[alone], value[alone], linestyle="", marker=".", color=colour)
    if {"low", "high"} <= set(rows.columns):
        low, high = _numbers(rows["low"]), _numbers(rows["high"])
        ax.fill_between(x, low, high, color=colour, alpha=_BAND, linewidth=0)


def _count_note(frame: pd.DataFrame) -> str:
    if "n" not in frame.columns:
        return ""
    n = _numbers(frame["n"])
    n = n[np.isfinite(n) & (n > 0)]
    if not n.size:
        return ""
    low, high = int(n.min()), int(n.max())
    return f"n = {low}" if low == high else f"n = {low} to {high}"


def _note(ax: Axes, text: str) -> None:
    if text:
        ax.set_title(text, loc="right", fontsize=7.5, color=_GREY)


def _integer_axis(ax: Axes) -> None:
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=9, min_n_ticks=1))


def _outside_legend(fig: Figure, axes: Sequence[Axes]) -> None:
    """One legend below all panels, each label once."""
    seen: dict[str, Any] = {}
    for ax in axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            seen.setdefault(label, handle)
    if len(seen) > 1:
        width = max(len(label) for label in seen)
        fits = max(1, int(fig.get_figwidth() * 11 / (width + 7)))
        fig.legend(list(seen.values()), list(seen), loc="outside lower center", ncols=min(len(seen), fits))


@_styled
def depth_lines(frame: pd.DataFrame, metrics: Sequence[str] | None = None, *, title: str = "",
                hue: str | None = None, kind: str | None = None, num_layers: int | None = None,
                units: Mapping[str, str] | None = None) -> Figure:
    """Metrics over depth: the models at the left, their difference or pair score at the right.

    One row of panels per metric. Bands are the intervals ``low``..``high``; the upper axis is
    relative depth (hidden: h/L, block: b/(L-1)). A metric that has only one of the two kinds
    of sides gets one wide panel.

    Args:
        frame: Tidy table (`midblock.results`): kind, layer, metric, side, value, low, high, n.
        metrics: Which, in this order. Default: all of the frame.
        hue: A further column that splits each side into several lines (stage, matrix, data).
        kind: ``hidden`` or ``block``; needed where the frame holds both.
        num_layers: The largest layer index of the model. Default: the largest in the frame.
        units: Metric -> unit, over those of `METRIC_LABELS`.

    Raises:
        SettingsError: a missing column or metric, several kinds, or layers that are no numbers.
    """
    _need(frame, ["kind", "layer", "metric", "side", "value", *([hue] if hue else [])], "depth_lines")
    chosen = list(metrics) if metrics is not None else list(dict.fromkeys(frame["metric"]))
    absent = [m for m in chosen if m not in set(frame["metric"])]
    if absent or not chosen:
        raise SettingsError(f"depth_lines: no metric {', '.join(map(repr, absent)) or '(none asked for)'} in "
                            f"the table; it has: {', '.join(dict.fromkeys(map(str, frame['metric'])))}.")
    data = frame[frame["metric"].isin(chosen)]
    if kind is not None:
        data = data[data["kind"] == kind]
    kinds = list(dict.fromkeys(data["kind"]))
    if len(kinds) != 1:
        raise SettingsError(f"depth_lines draws one kind of layer, but the rows hold {kinds}; "
                            "choose with kind=.")
    layer = _numbers(data["layer"].to_numpy())
    if np.isnan(layer).any():
        raise SettingsError(f"depth_lines needs numbered layers, but the frame has "
                            f"{data['layer'].iloc[int(np.isnan(layer).argmax())]!r}; "
                            "use segment_bars for masks.")
    data = data.assign(layer=layer).sort_values("layer", kind="stable")
    last = float(num_layers if num_layers is not None else layer.max())
    keys = _series_keys(data, hue)
    levels = sum(key[0] not in ("difference", "pair") for key in keys)

    fig = _new_figure(7.6, 0.9 + 2.15 * len(chosen), title)
    grid = fig.add_gridspec(len(chosen), 2)
    axes: list[Axes] = []
    for i, metric in enumerate(chosen):
        rows = data[data["metric"] == metric]
        change = rows["side"].isin(["difference", "pair"])
        both = bool(change.any()) and not bool(change.all())
        panels: list[tuple[Axes, pd.DataFrame, bool]] = []
        if both:
            panels = [(fig.add_subplot(grid[i, 0]), rows[~change], False),
                      (fig.add_subplot(grid[i, 1]), rows[change], True)]
        else:
            panels = [(fig.add_subplot(grid[i, :]), rows, bool(change.all()))]
        for ax, part, is_change in panels:
            _depth_panel(ax, part, keys, hue, levels, is_change)
            pair_only = is_change and not (part["side"] == "difference").any()
            label = metric_label(metric, units)
            ax.set_ylabel(_wrap(f"Change of {label[:1].lower() + label[1:]}"
                                if is_change and not pair_only and not label[1:2].isupper() else
                                f"Change of {label}" if is_change and not pair_only else label, 26))
            ax.set_xlim(-0.02 * last - 0.3, last * 1.02 + 0.3)
            _integer_axis(ax)
            if i == 0 and last > 0:
                top = ax.secondary_xaxis("top", functions=(lambda v: np.asarray(v, dtype=np.float64) / last,
                                                           lambda v: np.asarray(v, dtype=np.float64) * last))
                top.set_xlabel("relative depth", color=_GREY, fontsize=8)
                top.tick_params(colors=_GREY, labelsize=7.5)
                top.set_xticks([0, 0.25, 0.5, 0.75, 1.0])
            if i == len(chosen) - 1:
                ax.set_xlabel("hidden state h (0 = embeddings)" if kinds[0] == "hidden" else f"{kinds[0]}")
            axes.append(ax)
    fig.align_ylabels(axes)
    _outside_legend(fig, axes)
    return fig


def _series_keys(data: pd.DataFrame, hue: str | None) -> list[tuple[str, ...]]:
    """Side (and hue) of every line, models first, in the table's order."""
    columns = ["side", hue] if hue else ["side"]
    keys = [tuple(str(v) for v in row) for row in data[columns].drop_duplicates().to_numpy()]
    order = {"base": 0, "sft": 1, "difference": 8, "pair": 9}
    return sorted(keys, key=lambda key: order.get(key[0], 2))


def _depth_panel(ax: Axes, part: pd.DataFrame, keys: list[tuple[str, ...]], hue: str | None, levels: int,
                 is_change: bool) -> None:
    drawn = False
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
        label = {"difference": "difference", "pair": "pair score"}.get(key[0], key[0])
        if hue:
            label = key[1] if levels == 0 or is_change else f"{label}, {key[1]}"
        _plot_series(ax, _numbers(rows["layer"]), rows, slot, label)
        drawn = drawn or bool(np.isfinite(_numbers(rows["value"])).any())
    low, high = ax.get_ylim()
    if is_change and ((part["side"] == "difference").any() or low < 0 < high):
        ax.axhline(0.0, color=_GREY, linewidth=0.9, zorder=1)
    if not drawn:
        ax.text(0.5, 0.5, "undefined at every layer", transform=ax.transAxes, ha="center", va="center",
                color=_GREY)
        ax.set_yticks([])
    _note(ax, _count_note(part))


@_styled
def heatmap(matrix: npt.ArrayLike, rows: Sequence[Any], columns: Sequence[Any], title: str = "",
            centre: float | None = None, *, label: str = "", row_label: str = "", column_label: str = "",
            limits: tuple[float, float] | None = None) -> Figure:
    """A matrix as colours; undefined cells are grey, small matrices carry their numbers.

    Args:
        matrix: (R, C); NaN where undefined.
        rows: R labels, first at the top; ``columns``: C labels.
        centre: Value that is white in a blue-to-red scale with equal reach on both sides (0 for
            differences and correlations). None: a scale from dark to light.
        label: What the colours measure, with its unit.
        limits: Ends of the colour scale. Default: the data's.

    Raises:
        SettingsError: labels do not fit the matrix.
    """
    array = np.asarray(matrix, dtype=np.float64)
    if array.ndim != 2 or array.shape != (len(rows), len(columns)) or not array.size:
        raise SettingsError(f"heatmap: a matrix of shape {array.shape} does not fit {len(rows)} row and "
                            f"{len(columns)} column labels.")
    row_names = [_wrap(str(r), 28) for r in rows]
    column_names = [str(c) for c in columns]
    cell = 0.42 if max(array.shape) <= 14 else 0.22
    longest = max(len(line) for name in row_names for line in name.split("\n"))
    width = min(14.0, max(4.0, 1.9 + 0.07 * longest + cell * array.shape[1]))
    height = min(9.5, max(2.6, 1.3 + cell * array.shape[0]))
    fig = _new_figure(width, height, title)
    ax = fig.add_subplot()
    ax.grid(visible=False)
    for spine in ax.spines.values():
        spine.set_visible(False)
    norm, palette = _colour_scale(array, centre, limits)
    ax.set_facecolor("#d9d9d9")
    image = ax.imshow(np.ma.masked_invalid(array), norm=norm, cmap=palette, aspect="auto",
                      interpolation="nearest")
    _heat_ticks(ax, row_names, column_names, width, height)
    ax.set_xlabel(column_label)
    ax.set_ylabel(row_label)
    bar = fig.colorbar(image, ax=ax, shrink=min(0.9, 4.0 / height), pad=0.02, aspect=22)
    bar.outline.set_visible(False)
    bar.set_label(label)
    if array.shape[0] <= 14 and array.shape[1] <= 14:
        size = float(np.abs(array[np.isfinite(array)]).max(initial=0.0))
        for (i, j), value in np.ndenumerate(array):
            text, ink = "–", _GREY
            if math.isfinite(value):
                red, green, blue, _ = image.cmap(float(norm(value)))
                text = _short(value, size)
                ink = "white" if 0.299 * red + 0.587 * green + 0.114 * blue < 0.5 else "black"
            ax.text(j, i, text, ha="center", va="center", fontsize=6.5, color=ink)
    return fig


def _colour_scale(array: npt.NDArray[np.float64], centre: float | None,
                  limits: tuple[float, float] | None) -> tuple[Normalize, str]:
    finite = array[np.isfinite(array)]
    low, high = limits or ((float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0))
    if centre is None:
        return Normalize(low, high if high > low else low + 1.0), "viridis"
    reach = max(abs(low - centre), abs(high - centre)) or 1.0
    return TwoSlopeNorm(centre, centre - reach, centre + reach), "RdBu_r"


def _heat_ticks(ax: Axes, rows: list[str], columns: list[str], width: float, height: float) -> None:
    """As many labels as have room: every k-th where there are more."""
    row_step = max(1, math.ceil(len(rows) / (height * 6)))
    longest = max(map(len, columns))
    tilted = longest > 4 and longest * len(columns) > width * 8
    column_step = max(1, math.ceil(len(columns) / (width * (4.5 if tilted else 3.0))))
    if not tilted:
        column_step = max(1, math.ceil(len(columns) * (longest + 1) / (width * 9)))
    ax.set_yticks(range(0, len(rows), row_step), rows[::row_step])
    ax.set_xticks(range(0, len(columns), column_step), columns[::column_step])
    if tilted:
        for tick in ax.get_xticklabels():
            tick.set(rotation=40, ha="right", rotation_mode="anchor")
    ax.tick_params(length=0)


def _short(value: float, largest: float) -> str:
    """A cell's number with the decimals that the matrix's largest size asks for."""
    if largest >= 10_000 or 0 < largest < 0.05:
        return f"{value:.1e}".replace("e+0", "e").replace("e-0", "e-").replace("-", "−")
    text = f"{value:.2f}" if largest < 10 else f"{value:.1f}" if largest < 100 else f"{value:.0f}"
    return ("0" + text[2:] if float(text) == 0 and text[0] == "-" else text).replace("-", "−")


@_styled
def segment_bars(frame: pd.DataFrame, *, title: str = "", metric: str | None = None, label: str = "layer",
                 hue: str | None = None, baseline: str | None = None, value_label: str = "",
                 limits: tuple[float, float] | None = None) -> Figure:
    """Values of masks or arms as bars with their intervals.

    Up to 12 short labels stand upright in the order of the frame; more or longer ones become
    lying bars, so that every label can be read.

    Args:
        frame: One row per bar: the ``label`` column, ``value`` and, where there are intervals,
            ``low`` and ``high`` (``n`` is shown).
        metric: Draw only rows of this metric; it also names the axis.
        hue: A column that makes groups of bars (side, head).
        baseline: Label whose value is drawn as a line across (the first hue's where grouped).
        value_label: Axis label with unit. Default: the metric's.

    Raises:
        SettingsError: a missing column or baseline, or several rows for one bar.
    """
    _need(frame, [label, "value", *([hue] if hue else [])], "segment_bars")
    data = frame
    if metric is not None:
        _need(frame, ["metric"], "segment_bars")
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
    value_label = value_label or (metric_label(metric) if metric else "value")
    upright = len(names) <= 12 and max(map(len, names)) <= 9 and len(names) * len(groups) <= 36
    bars = len(names) * len(groups)
    fig = (_new_figure(max(3.8, min(9.0, 1.6 + 0.36 * len(names) + 0.26 * bars)), 3.4, title) if upright else
           _new_figure(7.0, min(40.0, 1.3 + 0.14 * len(names) + 0.16 * bars), title))
    ax = fig.add_subplot()
    slot = 0.78 / len(groups)
    lowest = 0.0
    for g, group in enumerate(groups):
        rows = data[data[hue].astype(str) == group] if hue else data
        where = np.array([names.index(str(v)) for v in rows[label]], dtype=np.float64)
        at = where - 0.39 + slot * (g + 0.5)
        value = _numbers(rows["value"])
        lowest = min(lowest, float(np.nanmin(value, initial=0.0)))
        colour = COLOURS[g % len(COLOURS)]
        faces = [_GREY if baseline is not None and not hue and names[int(w)] == baseline else colour
                 for w in where]
        draw = ax.bar if upright else ax.barh
        draw(at, value, slot * 0.92, color=faces, alpha=0.85, label=group or None)
        if {"low", "high"} <= set(rows.columns):
            _whiskers(ax, at, value, _numbers(rows["low"]), _numbers(rows["high"]), upright)
        for position in at[~np.isfinite(value)]:
            spot = (position, 0.0) if upright else (0.0, position)
            ax.annotate("undefined", spot, rotation=90 if upright else 0, ha="center" if upright else "left",
                        va="bottom" if upright else "center", fontsize=7, color=_GREY,
                        xytext=(0, 3) if upright else (3, 0), textcoords="offset points")
    if baseline is not None:
        at_baseline = data[data[label].astype(str) == baseline]["value"]
        level = float(_numbers(at_baseline)[0])
        (ax.axhline if upright else ax.axvline)(level, color=_GREY, linestyle="--", linewidth=1.0, zorder=1)
    _bar_axes(ax, names, label, value_label, upright, limits, lowest)
    _note(ax, _count_note(data))
    if hue:
        _outside_legend(fig, [ax])
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


def _bar_axes(ax: Axes, names: list[str], label: str, value_label: str, upright: bool,
              limits: tuple[float, float] | None, lowest: float) -> None:
    title = "depth segments tuned (input side first)" if label == "layer" else label.replace("_", " ")
    if upright:
        ax.set_xticks(range(len(names)), names)
        ax.set_xlabel(title)
        ax.set_ylabel(_wrap(value_label, 34))
        ax.grid(visible=False, axis="x")
        if limits:
            ax.set_ylim(*limits)
        if lowest < 0:
            ax.axhline(0.0, color="black", linewidth=0.7)
    else:
        ax.set_yticks(range(len(names)), [_wrap(name, 32) for name in names])
        ax.set_ylim(len(names) - 0.4, -0.6)
        ax.set_ylabel(title)
        ax.set_xlabel(value_label)
        ax.grid(visible=False, axis="y")
        if limits:
            ax.set_xlim(*limits)
        if lowest < 0:
            ax.axvline(0.0, color="black", linewidth=0.7)


@_styled
def scatter_pareto(frame: pd.DataFrame, x: str, y: str, label: str = "arm", *, title: str = "",
                   x_label: str = "", y_label: str = "", x_larger_is_better: bool = True,
                   y_larger_is_better: bool = True, log_x: bool = False) -> Figure:
    """Arms as labelled points; those that no other arm beats on both axes are joined.

    Args:
        frame: One row per arm. Columns ``{x}_low`` and ``{x}_high`` (and of y), where there are
            any, are drawn as intervals. Arms without a value on both axes are left out and
            named below the axes.

    Raises:
        SettingsError: a missing column.
    """
    _need(frame, [x, y, label], "scatter_pareto")
    xs, ys = _numbers(frame[x].to_numpy()), _numbers(frame[y].to_numpy())
    there = np.isfinite(xs) & np.isfinite(ys)
    names = np.array([str(v) for v in frame[label]], dtype=object)
    fig = _new_figure(6.2, 4.6, title)
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
            low, high = (_numbers(frame[c].to_numpy()) for c in low_high)
            ok = there & np.isfinite(low) & np.isfinite(high)
            obstacles += [((a, c), (b, c)) if horizontal else ((c, a), (c, b)) for a, b, c in
                          zip(low[ok], high[ok], (ys if horizontal else xs)[ok], strict=True)]
            draw = ax.hlines if horizontal else ax.vlines
            draw((ys if horizontal else xs)[ok], low[ok], high[ok], color="#b5b5b5", linewidth=1.0, zorder=1)
    ax.plot(xs[order], ys[order], color=COLOURS[1], linewidth=1.0, linestyle="--", marker="s", markersize=5.5,
            zorder=3, label="not beaten on both axes")
    rest = there & ~front
    ax.scatter(xs[rest], ys[rest], color=COLOURS[0], s=26, zorder=3)
    ax.margins(0.12)
    wanted = {True: "higher is better", False: "lower is better"}
    ax.set_xlabel(x_label or f"{x.replace('_', ' ')} ({wanted[x_larger_is_better]})")
    ax.set_ylabel(_wrap(y_label or f"{y.replace('_', ' ')} ({wanted[y_larger_is_better]})", 40))
    if front.any():
        ax.legend(loc="best", handlelength=1.6)
    if not there.all():
        fig.supxlabel(_wrap("without a value: " + ", ".join(names[~there]), 90), fontsize=7.5, color=_GREY)
    _place_labels(fig, ax, xs[there], ys[there], [_wrap(str(n), 24) for n in names[there]], obstacles)
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


@_styled
def lines(frame: pd.DataFrame, x: str, y: str = "value", hue: str | None = None, *, title: str = "",
          x_label: str = "", y_label: str = "", low: str = "low", high: str = "high",
          log_x: bool = False, log_y: bool = False, zero: bool = False) -> Figure:
    """Lines of y over x, one per value of ``hue``, with bands where the frame has ``low``, ``high``.

    Args:
        zero: Draw a line at y = 0.

    Raises:
        SettingsError: a missing column, no rows, or an x column that holds no numbers.
    """
    _need(frame, [x, y, *([hue] if hue else [])], "lines")
    if np.isnan(_numbers(frame[x].to_numpy())).all():
        raise SettingsError(f"lines: column {x!r} holds no numbers; use segment_bars for names.")
    fig = _new_figure(6.4, 3.8, title)
    ax = fig.add_subplot()
    groups: list[Any] = list(dict.fromkeys(frame[hue])) if hue else [None]
    for i, group in enumerate(groups):
        rows = frame[frame[hue] == group] if hue else frame
        rows = rows.assign(**{x: _numbers(rows[x].to_numpy())}).sort_values(x, kind="stable")
        columns = {"value": rows[y]} | ({"low": rows[low], "high": rows[high]}
                                        if {low, high} <= set(rows.columns) else {})
        _plot_series(ax, _numbers(rows[x]), pd.DataFrame(columns), i, str(group) if hue else y)
    if zero:
        ax.axhline(0.0, color=_GREY, linewidth=0.9, zorder=1)
    if log_x:
        ax.set_xscale("log")
    elif pd.api.types.is_integer_dtype(frame[x]):
        _integer_axis(ax)
    if log_y:
        ax.set_yscale("log")
    ax.set_xlabel(x_label or x.replace("_", " "))
    ax.set_ylabel(_wrap(y_label or y.replace("_", " "), 36))
    if hue:
        _outside_legend(fig, [ax])
    return fig


def save_figure(fig: Figure, folder: Path | str, name: str) -> list[Path]:
    """Write ``name.svg`` and ``name.png`` (200 dpi) into ``folder``, each atomically.

    The files carry no date and fixed ids, so equal data give equal bytes under one matplotlib.

    Returns:
        The paths of the SVG and the PNG.

    Raises:
        SettingsError: ``name`` is not a plain file name.
        OutputError: the folder cannot be written.
    """
    if not name or Path(name).name != name:
        raise SettingsError(f"{name!r} is not a plain file name for a figure.")
    return _write(fig, Path(folder), name)


@_styled
def _write(fig: Figure, folder: Path, name: str) -> list[Path]:
    written = []
    kinds: tuple[tuple[Literal["svg", "png"], dict[str, Any]], ...] = (
        ("svg", {"Date": None, "Creator": None}), ("png", {"Software": None}))
    for kind, metadata in kinds:
        path = folder / f"{name}.{kind}"
        with atomic_path(path) as temporary:
            fig.savefig(temporary, format=kind, metadata=metadata)
        written.append(path)
    return written
