"""Settings of `midblock swap`."""

from __future__ import annotations

from midblock.errors import BlockRangeError
from midblock.segments import all_masks_single, segment_blocks, segment_bounds
from midblock.settings.base import name_of, setting
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
    depth: int | None = setting(None, ge=1, metavar="N", help=(
        "Swap only the last N blocks of each segment, as the paper's public code does. Default: whole segments."))
    cumulative: bool = setting(False, help="Also swap cumulatively from the input side and from the output side.")

    def all_masks(self) -> list[str]:
        """The masks to swap, without repeats."""
        chosen = list(self.masks) or all_masks_single(self.segments)
        if self.cumulative:
            k = len(chosen[0])
            chosen += [*cumulative_masks(k), *cumulative_masks(k, from_output=True)]
        return list(dict.fromkeys(chosen))

    def blocks_of(self, mask: str, num_blocks: int) -> list[int]:
        """Blocks that a mask swaps: of each chosen segment all, or the last ``depth``.

        Raises:
            BlockRangeError: the mask does not fit, or a chosen segment has fewer blocks than ``depth``.

        Example:
            >>> SwapSettings(depth=2).blocks_of("01001", 30)
            [10, 11, 28, 29]
        """
        whole = segment_blocks(mask, num_blocks)
        if self.depth is None:
            return whole
        chosen: list[int] = []
        for digit, (low, high) in zip(mask, segment_bounds(len(mask), num_blocks), strict=True):
            if digit == "1":
                if self.depth > high - low:
                    raise BlockRangeError(f"{name_of('depth')} {self.depth}: a segment of mask {mask} has only "
                                          f"{high - low} blocks ({low} to {high - 1}); use at most that.")
                chosen += range(high - self.depth, high)
        return chosen
