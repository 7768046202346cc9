"""Settings of `midblock correlate`."""

from __future__ import annotations

from pydantic import field_validator

from midblock.settings.base import Settings, setting

__all__ = ["CorrelateSettings"]


class CorrelateSettings(Settings):
    """What is set side by side; `correlate` takes the same names as keyword arguments."""

    by_data: bool = setting(False, help="Keep runs on different data apart. Default: runs of one kind are averaged.")
    metrics: tuple[str, ...] | None = setting(None, metavar="A,B,...", help="Only these metrics.")
    matrices: tuple[str, ...] | None = setting(None, metavar="A,B,...", help=(
        "Of tables with a matrix column only these (q, up, ...). Default: qkvo and mlp, or whole blocks."))
    all_sides: bool = setting(False, help="Also each checkpoint's own values, not only changes.")
    embeddings: bool = setting(False, help=(
        "Let the embedding output (hidden 0) be a point too, for pairs of hidden quantities."))
    methods: tuple[str, ...] = setting(
        ("pearson", "spearman"), metavar="A,B", old=("method",), help="pearson, spearman or both.")
    confidence: float = setting(0.95, gt=0, lt=1, cli=False, help="Confidence of every interval.")

    @field_validator("methods")
    @classmethod
    def _known(cls, methods: tuple[str, ...]) -> tuple[str, ...]:
        if not methods or set(methods) - {"pearson", "spearman"}:
            raise ValueError(f"must be pearson, spearman or both, got {','.join(methods) or 'none'}")
        return methods
