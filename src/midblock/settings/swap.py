"""Settings of `midblock swap`."""

from __future__ import annotations

from midblock.segments import all_masks_single
from midblock.settings.base import setting
from midblock.settings.token_means import TokenMeanSettings

__all__ = ["SwapSettings", "cumulative_masks"]


def cumulative_masks(num_segments: int, *, from_output: bool = False) -> list[str]:
    """Masks that grow from one end by a segment at a time.

    Example:
        >>> cumulative_masks(3), cumulative_masks(3, from_output=True)
        (['100', '110', '111'], ['001', '011', '111'])
    """
    masks = ["1" * i + "0" * (num_segments - i) for i in range(1, num_segments + 1)]
    return [m[::-1] for m in masks] if from_output else masks


class SwapSettings(TokenMeanSettings):
    """Which segments are swapped and what is scored; `swap` takes the same names as keyword arguments."""

    segments: int = setting(5, ge=1, metavar="K", help="K equal depth segments; each alone is swapped.")
    masks: tuple[str, ...] = setting((), cli=False, help="Masks to swap instead of the K singles.")
    cumulative: bool = setting(False, help="Also swap cumulatively from the input side and from the output side.")

    def all_masks(self) -> list[str]:
        """The masks to swap, without repeats."""
        chosen = list(self.masks) or all_masks_single(self.segments)
        if self.cumulative:
            k = len(chosen[0])
            chosen += [*cumulative_masks(k), *cumulative_masks(k, from_output=True)]
        return list(dict.fromkeys(chosen))
