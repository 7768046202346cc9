"""What all figures share: colours, sizes, labels that wrap, and files that are the same for the same data."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeVar

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from midblock.errors import SettingsError
from midblock.reading import read_text, user_path
from midblock.writing import atomic_path

__all__ = ["MAX_HEIGHT", "PAPER", "check_style", "colour", "figure_style", "read_style", "save_figure"]

MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", "--", "-.", ":")
GREY = "#6e6e6e"
BAND = 0.18
MAX_HEIGHT = 9.3
"""Inches: 1,395 pixels at 150 an inch, so that a figure fits a screen and a page."""

PAPER = "paper"
"""The layer of `figure_style` for figures that go into a paper."""
_STYLES = Path(__file__).parent
_USERS = "MIDBLOCK_STYLE"
_layers: ContextVar[tuple[Path, ...]] = ContextVar("midblock_figure_style", default=())

_P = ParamSpec("_P")
_R = TypeVar("_R")


def read_style(path: Path | str) -> dict[str, Any]:
    """The settings of a matplotlib style file.

    Raises:
        SettingsError: it cannot be read, or a line is no setting of matplotlib.
    """
    text = read_text(user_path(path, error=SettingsError), error=SettingsError)
    heard = _Heard()
    log = logging.getLogger("matplotlib")
    log.addHandler(heard)
    try:
        with tempfile.TemporaryDirectory() as folder:  # matplotlib reads files only
            copy = Path(folder) / "style"
            copy.write_text(text, encoding="utf-8")
            found = mpl.rc_params_from_file(copy, fail_on_error=True, use_default_template=False)
    except (ValueError, KeyError) as error:
        raise SettingsError(f"{path} is not a style of matplotlib: {' '.join(str(error).split())[:200]}.") from None
    finally:
        log.removeHandler(heard)
    if heard.told:
        raise SettingsError(f"{path} is not a style of matplotlib: {heard.told[0].strip()[:200]}")
    settings: Any = found
    return dict(settings)


class _Heard(logging.Handler):
    """What matplotlib only logs of a style file: unknown and repeated keys."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.told: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.told.append(" ".join(re.sub(r"in file .*?,|\(?\$?file.*$", "", record.getMessage(), flags=re.S).split()))


def check_style() -> None:
    """Refuse the style of ``MIDBLOCK_STYLE`` before long work, where it cannot be used.

    Raises:
        SettingsError: see `read_style`.
    """
    if given := os.environ.get(_USERS):
        read_style(given)


@contextlib.contextmanager
def figure_style(*layers: Path | str) -> Iterator[None]:
    """Within the context figures are drawn and saved with these styles on top of midblock's own.

    Above them all lies the file that ``MIDBLOCK_STYLE`` names, where it is set.

    Args:
        *layers: Style files, the last one on top; `PAPER` is midblock's own for papers.

    Raises:
        SettingsError: a file that cannot be used.
    """
    files = tuple(_STYLES / "paper.mplstyle" if layer == PAPER else Path(layer) for layer in layers)
    for file in files:
        read_style(file)
    token = _layers.set(files)
    try:
        yield
    finally:
        _layers.reset(token)


def style_layers() -> tuple[Path, ...]:
    """The style files of the `figure_style` in which the caller is."""
    return _layers.get()


@functools.lru_cache(maxsize=16)
def _read_once(path: Path, changed: float) -> dict[str, Any]:
    return read_style(path)


def _settings() -> Iterator[dict[str, Any]]:
    own = [_STYLES / "midblock.mplstyle", *_layers.get()]
    if given := os.environ.get(_USERS):
        own.append(Path(given))
    for path in own:
        yield _read_once(path, path.stat().st_mtime if path.exists() else 0.0)


def styled(build: Callable[_P, _R]) -> Callable[_P, _R]:
    """Build under midblock's style whatever the user's matplotlibrc says, then restore their settings."""

    @functools.wraps(build)
    def wrapper(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        with mpl.rc_context():
            mpl.rcdefaults()  # leaves the backend alone
            current: Any = mpl.rcParams
            for settings in _settings():
                current.update(settings)
            return build(*args, **kwargs)

    return wrapper


def colour(index: int) -> str:
    """The style's colour of a series; they repeat."""
    cycle = mpl.rcParams["axes.prop_cycle"].by_key().get("color") or ["black"]
    return str(cycle[index % len(cycle)])


def colours() -> int:
    """How many colours the style has."""
    return len(mpl.rcParams["axes.prop_cycle"].by_key().get("color") or ["black"])


def plain(text: str) -> str:
    """Text that matplotlib shows as it is: a dollar sign begins no formula."""
    return text.replace("\\$", "$").replace("$", "\\$")


def wrap(text: str, width: int) -> str:
    """Break a label over lines at spaces, underscores and dashes; never lose a character."""
    if len(text) > width and " (" in text and text.endswith(")"):  # keep a unit in one piece
        name, _, unit = text.rpartition(" (")
        return f"{wrap(name, width)}\n({unit}"
    out: list[str] = []
    line = ""
    for piece in _pieces(text):
        if line and len(line) + len(piece.rstrip()) > width:
            out.append(line.rstrip())
            line = ""
        line += piece
    return "\n".join([*out, line.rstrip()])


def short_name(text: str) -> str:
    """Words without the folders of paths: a figure shows what was run, not where it lies.

    Hub names (``owner/model``) stay whole.

    Example:
        >>> short_name("Scores per block, /data/models/tuned"), short_name("HuggingFaceTB/SmolLM2-135M")
        ('Scores per block, tuned', 'HuggingFaceTB/SmolLM2-135M')
    """
    return " ".join(word.rstrip("/").rpartition("/")[2] if word.startswith(("/", ".", "~")) or word.count("/") > 1
                    else word for word in text.split(" "))


def _pieces(text: str) -> list[str]:
    found, start = [], 0
    for i, character in enumerate(text):
        if character in " _-/:,":
            found.append(text[start:i + 1])
            start = i + 1
    return [*found, text[start:]]


def need(frame: pd.DataFrame, columns: Sequence[str], what: str) -> None:
    """Refuse a frame without rows, or without one of the columns."""
    missing = [c for c in columns if c not in frame.columns]
    if missing:
        raise SettingsError(f"{what} needs column {missing[0]!r}; the frame has: "
                            f"{', '.join(map(str, frame.columns)) or 'none'}.")
    if frame.empty:
        raise SettingsError(f"{what} was given a frame without rows.")


def numbers(values: Any) -> npt.NDArray[np.float64]:
    """Values as float64; what is no number is NaN."""
    return np.asarray(pd.to_numeric(pd.Series(values), errors="coerce"), dtype=np.float64)


def new_figure(width: float, height: float, title: str, layout: Literal["constrained"] | None = "constrained"
               ) -> Figure:
    """A figure of that many inches, not higher than `MAX_HEIGHT`, with a canvas but without pyplot."""
    fig = Figure(figsize=(width, min(height, MAX_HEIGHT)), layout=layout)
    FigureCanvasAgg(fig)
    if title:
        fig.suptitle(wrap(short_name(title), int(width * 12)), x=0.01, ha="left", fontweight="bold")
    return fig


def plot_series(ax: Axes, x: npt.NDArray[np.float64], rows: pd.DataFrame, index: int, label: str) -> None:
    """One line with its interval band; ``index`` chooses colour, marker and dashes."""
    shade = colour(index)
    value = numbers(rows["value"])
    many = x.size > 48  # markers would merge into a thick line
    ax.plot(x, value, color=shade, label=label, linestyle=DASHES[(index // colours()) % len(DASHES)],
            marker="" if many else MARKERS[index % len(MARKERS)])
    if many:  # a value between two gaps has no line
        gaps = np.isnan(np.concatenate([[np.nan], value, [np.nan]]))
        alone = ~gaps[1:-1] & gaps[:-2] & gaps[2:]
        ax.plot(x[alone], value[alone], linestyle="", marker=".", color=shade)
    if {"low", "high"} <= set(rows.columns):
        low, high = numbers(rows["low"]), numbers(rows["high"])
        ax.fill_between(x, low, high, color=shade, alpha=BAND, linewidth=0)


def count_note(frame: pd.DataFrame, counted: str = "samples") -> str:
    """``n = 50 samples``, or the range of n; nothing without ``counted`` or a column ``n``.

    Example:
        >>> count_note(pd.DataFrame({"n": [48, 50]}))
        'n = 48 to 50 samples'
    """
    if "n" not in frame.columns or not counted:
        return ""
    n = numbers(frame["n"])
    n = n[np.isfinite(n) & (n > 0)]
    if not n.size:
        return ""
    low, high = int(n.min()), int(n.max())
    counted = counted.removesuffix("es" if counted.endswith("ches") else "s") if high == 1 else counted
    return f"n = {low} {counted}" if low == high else f"n = {low} to {high} {counted}"


def note(ax: Axes, text: str, *, points: float = 4.0) -> None:
    """Small grey words above the panel's right end, so many points above it."""
    if text:  # y is given: finding it measures every label of the panel at each drawing
        ax.set_title(text, loc="right", fontsize=7.5, color=GREY, y=1.0, pad=points)


def integer_axis(ax: Axes) -> None:
    """Ticks at whole numbers only."""
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6, min_n_ticks=1))


def plain_grid(ax: Axes, across: Sequence[float], *, named: bool = True) -> None:
    """Ticks at these x, few ones at the y drawn so far, and the grid as one line each way.

    matplotlib draws a line, a mark and a label for each tick, which takes most of the time of many small panels.

    Args:
        ax: A finished panel; its limits stay as they are.
        across: Where x has ticks.
        named: Whether x ticks have labels; of panels below each other only the last needs them.
    """
    (low, high), x_limits = ax.get_ylim(), ax.get_xlim()
    up = [v for v in MaxNLocator(4).tick_values(low, high) if low <= v <= high]
    for places, transform, upright in ((across, ax.get_xaxis_transform(), True), (up, ax.get_yaxis_transform(), False)):
        ends = [v for _ in places for v in (0.0, 1.0, math.nan)]
        where = [v for place in places for v in (place,) * 3]
        line = Line2D(where if upright else ends, ends if upright else where, transform=transform, zorder=0.5,
                      color=mpl.rcParams["grid.color"], linewidth=mpl.rcParams["grid.linewidth"])
        ax.add_artist(line)
    ax.grid(visible=False)
    if named:
        ax.set_xticks(across)
    else:
        ax.xaxis.set_visible(False)
    ax.set_yticks(up)
    ax.tick_params(length=0, bottom=False, left=False)
    ax.set(xlim=x_limits, ylim=(low, high))


def labelled(axes: Sequence[Axes]) -> dict[str, Any]:
    """Label -> handle of everything in the panels, each label once."""
    seen: dict[str, Any] = {}
    for ax in axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            seen.setdefault(label, handle)
    return seen


def legend_columns(width: float, labels: Sequence[str]) -> int:
    """How many labels fit side by side in so many inches."""
    longest = max(map(len, labels), default=1)
    return max(1, min(len(labels), int(width * 11 / (longest + 7))))


def outside_legend(fig: Figure, axes: Sequence[Axes], least: int = 2) -> None:
    """One legend below all panels, where there are at least ``least`` labels."""
    seen = labelled(axes)
    if len(seen) >= least:
        fig.legend(list(seen.values()), list(seen), loc="outside lower center",
                   ncols=legend_columns(fig.get_figwidth(), list(seen)))


Format = Literal["svg", "pdf", "png"]
FORMATS: tuple[Format, ...] = ("svg", "pdf")
"""What is written unless other formats are asked for."""
_METADATA: dict[Format, dict[str, Any]] = {
    "svg": {"Date": None, "Creator": None}, "pdf": {"CreationDate": None, "Producer": None, "Creator": None},
    "png": {"Software": None}}


def save_figure(fig: Figure, folder: Path | str, name: str, formats: Sequence[Format] = FORMATS) -> list[Path]:
    """Write ``name.svg`` and ``name.pdf`` (or other ``formats``; png has 150 dpi) into ``folder``, each atomically.

    Words stay words in both, so that they can be edited and searched. The files carry no date and fixed ids, so equal
    data give equal bytes under one matplotlib.

    Returns:
        The paths, in the order of ``formats``.

    Raises:
        SettingsError: ``name`` is not a plain file name, or another format.
        OutputError: the folder cannot be written.
    """
    if not name or Path(name).name != name:
        raise SettingsError(f"{name!r} is not a plain file name for a figure.")
    if unknown := set(formats) - set(_METADATA):
        raise SettingsError(f"figures are written as {', '.join(_METADATA)}, not as {', '.join(sorted(unknown))}.")
    return _write(fig, Path(folder), name, formats)


def figure_paths(folder: Path | str, name: str, formats: Sequence[Format] = FORMATS) -> list[Path]:
    """The files that `save_figure` writes."""
    return [Path(folder) / f"{name}.{kind}" for kind in formats]


@styled
def _write(fig: Figure, folder: Path, name: str, formats: Sequence[Format]) -> list[Path]:
    for axis in (axis for ax in fig.axes for axis in (ax.xaxis, ax.yaxis) if not axis.get_label().get_text()):
        axis.set_label_coords(0.0, 0.0)  # else the place of words that are not there is sought at every drawing
    if fig.get_layout_engine() is not None:  # places are found once, not anew for each format
        fig.draw_without_rendering()
        fig.set_layout_engine("none")
    written = figure_paths(folder, name, formats)
    for path, kind in zip(written, formats, strict=True):
        with atomic_path(path) as temporary:
            fig.savefig(temporary, format=kind, metadata=_METADATA[kind])
    return written
