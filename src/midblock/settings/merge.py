"""Settings of `midblock merge`."""

from __future__ import annotations

import math

from midblock.errors import SettingsError
from midblock.settings.base import setting
from midblock.settings.token_means import TokenMeanSettings

__all__ = ["MergeSettings", "parse_alphas"]


class MergeSettings(TokenMeanSettings):
    """How merged models are made and scored; `merge` takes the same names as keyword arguments."""

    alpha_rest: float | None = setting(None, metavar="A", help=(
        "Share of embeddings, final norm and head. Unset: the mean of the alphas, so that all zeros are the base and "
        "all ones the tuned model."))


def parse_alphas(text: str) -> tuple[float, ...]:
    """Shares of the tuned model per depth segment, from ``0,.5,1,.5,0``.

    Raises:
        SettingsError: something that is not a finite number.

    Example:
        >>> parse_alphas("0,.5,1")
        (0.0, 0.5, 1.0)
    """
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError:
        found = ()
    if not found or not all(math.isfinite(a) for a in found):
        raise SettingsError(f"alphas {text!r} are not numbers with commas between them; write one share of the tuned "
                            "model per depth segment, such as 0,0.5,1,0.5,0.")
    return found
