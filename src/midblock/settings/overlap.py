"""Settings of `midblock overlap`."""

from __future__ import annotations

from typing import Literal

from midblock.settings.base import Settings, setting
from midblock.settings.sampling import seed

__all__ = ["OverlapSettings"]


class OverlapSettings(Settings):
    """What is compared; `overlap` takes the same names as keyword arguments."""

    share: float = setting(0.75, gt=0, lt=1, metavar="P", help=(
        "Share of the units that each run selects (ILA freezes about the lowest quarter). Chance alone gives a Jaccard "
        "overlap of P / (2 - P)."))
    methods: tuple[str, ...] | None = setting(None, min_length=1, metavar="A,B,...", help=(
        "Scores to compare: ila_score, taylor, taylor_base, update_norm, random, or those of locate. Default: "
        "ila_score where there is any."))
    steps: Literal["last", "all"] = setting("last", help=(
        "Scores at the end of training, or after every step of importance --at-steps."))
    seed: int = seed("Seed of the bootstrap.")
    replicates: int = setting(2000, ge=100, le=100_000, cli=False, help="Bootstrap resamples of the units.")
    confidence: float = setting(0.95, gt=0, lt=1, cli=False, help="Confidence of every interval.")
