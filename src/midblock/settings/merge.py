"""Settings of `midblock merge`."""

from __future__ import annotations

from midblock.settings.base import setting
from midblock.settings.token_means import TokenMeanSettings

__all__ = ["MergeSettings"]


class MergeSettings(TokenMeanSettings):
    """How merged models are made and scored; `merge` takes the same names as keyword arguments."""

    alpha_rest: float | None = setting(None, metavar="A", help=(
        "Share of embeddings, final norm and head. Unset: the mean of the alphas, so that all zeros are the base and "
        "all ones the tuned model."))
