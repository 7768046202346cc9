"""Write any result into its run folder: the tidy table, the figures, the reading in words."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import pandas as pd

from midblock.figures import save_figure
from midblock.progress import Progress, silent
from midblock.provenance import RunFolder

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from midblock.results import Table

__all__ = ["Draw", "Result", "save_result"]

Draw = Callable[["Figure", Path, str], list[Path]]


class Result(Protocol):
    """What every analysis returns."""

    @property
    def table(self) -> Table: ...

    @property
    def frame(self) -> pd.DataFrame: ...

    def summary(self) -> str: ...

    def tables(self) -> dict[str, pd.DataFrame]: ...

    def figures(self) -> dict[str, Figure]: ...


def save_result(run: RunFolder, result: Result, *, fields: Mapping[str, Any] | None = None,
                progress: Progress = silent, draw: Draw | None = None) -> list[str]:
    """Write ``table.csv``, further tables, ``summary.txt`` and ``figures/*.svg|pdf``; returns the names written.

    Args:
        run: The open run folder.
        result: The result.
        fields: Further fields of ``run.json``, such as ``{"data": {...}}``.
        progress: Told how many figures are drawn.
        draw: Writes a figure into a folder under a name and gives its files; default `save_figure`.

    Raises:
        OutputError: the folder cannot be written.
    """
    names = [run.write_table(result.table).name, run.write_text("summary.txt", result.summary() + "\n").name]
    names += [run.write_table(frame, f"{name}.csv").name for name, frame in result.tables().items() if len(frame)]
    with _uncollected():
        figures = result.figures()
        for number, (name, figure) in enumerate(figures.items(), start=1):
            names += [f"figures/{p.name}" for p in (draw or save_figure)(figure, run.path / "figures", name)]
            progress("figures", number, len(figures))
    run.publish(names, **(fields or {}))
    return names


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """No search for garbage meanwhile: figures are many small objects, and each search also walks through PyTorch's."""
    on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if on:
            gc.enable()
