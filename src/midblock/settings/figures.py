"""Settings of `midblock figures`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from midblock.settings.base import Settings, setting

__all__ = ["FigureSettings"]


class FigureSettings(Settings):
    """The paper's figures and tables from a study."""

    out: Path = setting(Path("figures"), metavar="DIR", help=(
        "Folder; files that midblock drew before are replaced."))
    columns: Literal["both", "one", "two"] = setting("both", help=(
        "Sizes: for one column of a page (3.03 inches), for both (6.30), or each."))
    style: Path | None = setting(None, metavar="FILE", help=(
        "A matplotlib style on top of midblock's own (also MIDBLOCK_STYLE, for the figures of every command)."))
