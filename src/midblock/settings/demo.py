"""Settings of `midblock demo`."""

from __future__ import annotations

from midblock.settings import sampling
from midblock.settings.base import Settings, setting

__all__ = ["DemoSettings"]


class DemoSettings(Settings):
    """How much the demo does."""

    scale: float | None = setting(None, ge=0.05, metavar="X", help=(
        "Multiply samples and steps. Default: what fits this machine in about four minutes, from its product rate."))
    seed: int = sampling.seed()
