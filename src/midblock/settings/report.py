"""Settings of `midblock report`."""

from __future__ import annotations

from pathlib import Path

from midblock.settings.base import Settings, setting

__all__ = ["ReportSettings"]


class ReportSettings(Settings):
    """One HTML page from run folders."""

    out: Path = setting(Path("report.html"), metavar="FILE", help=(
        "The page; one that midblock wrote before is replaced."))
    title: str | None = setting(None, metavar="TEXT", help="Heading; by default the models' names.")
