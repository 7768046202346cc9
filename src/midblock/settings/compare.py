"""Settings of `midblock compare`."""

from __future__ import annotations

from midblock.settings.base import Settings, setting

__all__ = ["CompareSettings"]


class CompareSettings(Settings):
    """How two logs are compared."""

    metric: str | None = setting(None, metavar="NAME", help=(
        "Compare this metric alone, such as exact_match or exact_match,strict-match; unset: every one that both have."))
    cluster: str | None = setting(None, metavar="FIELD", help=(
        "Field of the documents (inspect: of the samples' metadata) whose equal values make items a group, such as a "
        "passage that several questions are about; groups are then what is tested."))
    margin: float = setting(0.02, gt=0, metavar="M", help=(
        "Largest loss that still counts as \"no worse\", in the metric's unit."))
    confidence: float = setting(0.95, gt=0.5, lt=1, metavar="P", help="Confidence of the intervals.")
    alpha: float = setting(0.05, gt=0, lt=0.5, metavar="A", help="Holm's p below it counts as a difference.")
    power: float = setting(0.8, gt=0, lt=1, metavar="P", help=(
        "Chance of being found for the difference that is called detectable."))
    replicates: int = setting(10_000, ge=100, le=1_000_000, metavar="N", help=(
        "Replicates of permutations and bootstraps."))
