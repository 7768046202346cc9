"""Depth segments, zones, masks and block ranges: pure index arithmetic.

Blocks are 0..L-1 from the input side to the output side; ranges are half-open. A mask has
one digit per segment, the first digit being the segment nearest the embeddings.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from midblock.errors import BlockRangeError

__all__ = ["MIDDLE", "ZONES", "ZONES_TITLE", "Zone", "all_masks_single", "blocks_from_spec", "contiguous_ranges",
           "depth", "format_blocks", "parse_blocks", "segment_blocks", "segment_bounds", "validate_mask",
           "where_most", "zone", "zone_means", "zones_in_words"]

Zone = Literal["early", "middle", "late"]
ZONES: tuple[Zone, ...] = ("early", "middle", "late")
MIDDLE = (0.2, 0.8)
"""Relative depths at which the middle begins and ends; both belong to it."""
ZONES_TITLE = f"early < {MIDDLE[0]}, late > {MIDDLE[1]}"
"""The rule of `zone` for the title of a table."""


def segment_bounds(num_segments: int, num_blocks: int) -> list[tuple[int, int]]:
    """Half-open block range of each of K equal segments: ``[int(i*L/K), int((i+1)*L/K))``.

    Args:
        num_segments: K, 1 to ``num_blocks``.
        num_blocks: L.

    Raises:
        BlockRangeError: K is smaller than 1 or larger than L (a segment would be empty).

    Example:
        >>> segment_bounds(5, 32)
        [(0, 6), (6, 12), (12, 19), (19, 25), (25, 32)]
    """
    if not 1 <= num_segments <= num_blocks:
        raise BlockRangeError(
            f"{num_segments} segments were asked for, but the model has {num_blocks} blocks; "
            f"use 1 to {num_blocks} segments."
        )
    return [
        (i * num_blocks // num_segments, (i + 1) * num_blocks // num_segments)
        for i in range(num_segments)
    ]


def validate_mask(mask: str) -> str:
    """Return ``mask`` if it is a non-empty string of 0 and 1, else raise `BlockRangeError`."""
    if not isinstance(mask, str) or not mask or set(mask) - {"0", "1"}:
        raise BlockRangeError(
            f"mask {mask!r} is not a string of the digits 0 and 1; write one digit per depth "
            "segment from input to output, such as 01100."
        )
    return mask


def segment_blocks(mask: str, num_blocks: int) -> list[int]:
    """Blocks that a mask selects, in ascending order.

    Args:
        mask: One digit per segment, input side first (``01100`` tunes the second and third
            fifth). Its length is K.
        num_blocks: L, the model's number of blocks.

    Raises:
        BlockRangeError: other digits than 0 and 1, more digits than blocks, or no 1 at all.

    Example:
        >>> segment_blocks("01100", 30)
        [6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17]
    """
    validate_mask(mask)
    if len(mask) > num_blocks:
        raise BlockRangeError(
            f"mask {mask!r} has {len(mask)} digits, but the model has {num_blocks} blocks; "
            f"use at most {num_blocks} digits."
        )
    if "1" not in mask:
        raise BlockRangeError(f"mask {mask!r} selects no block; at least one digit must be 1.")
    bounds = segment_bounds(len(mask), num_blocks)
    return [b for digit, (lo, hi) in zip(mask, bounds, strict=True) if digit == "1"
            for b in range(lo, hi)]


def all_masks_single(num_segments: int) -> list[str]:
    """The K masks that select one segment each, input side first.

    Example:
        >>> all_masks_single(3)
        ['100', '010', '001']
    """
    return ["0" * i + "1" + "0" * (num_segments - 1 - i) for i in range(num_segments)]


def parse_blocks(spec: str, num_blocks: int) -> list[int]:
    """Blocks of an explicit spec: ``8:16``, ``3``, ``0:4,12:16,20`` (half-open ranges).

    Raises:
        BlockRangeError: malformed, empty, or outside 0..L-1.

    Example:
        >>> parse_blocks("8:10,12", 30)
        [8, 9, 12]
    """
    blocks: set[int] = set()
    for part in spec.split(","):
        text = part.strip()
        try:
            if ":" in text:
                lo_text, hi_text = text.split(":")
                lo, hi = (int(lo_text) if lo_text else 0), (int(hi_text) if hi_text else num_blocks)
            else:
                lo = int(text)
                hi = lo + 1
        except ValueError:
            raise BlockRangeError(
                f"blocks {spec!r}: {text!r} is neither a block nor a half-open range; "
                "write 8:16 or 3 or 0:4,12:16."
            ) from None
        if not 0 <= lo < hi <= num_blocks:
            raise BlockRangeError(
                f"blocks [{lo}, {hi}) do not fit a model of {num_blocks} blocks "
                f"(0-{num_blocks - 1}); `midblock inspect MODEL` lists them."
            )
        blocks.update(range(lo, hi))
    return sorted(blocks)


def blocks_from_spec(mask: str | None, blocks: str | Sequence[int] | None, num_blocks: int) -> list[int]:
    """Blocks from exactly one of a mask and an explicit spec.

    Raises:
        BlockRangeError: both or neither given, or the one given does not fit.
    """
    if (mask is None) == (blocks is None):
        raise BlockRangeError("give exactly one of a mask (01100) and blocks (8:16).")
    if mask is not None:
        return segment_blocks(mask, num_blocks)
    if isinstance(blocks, str):
        return parse_blocks(blocks, num_blocks)
    assert blocks is not None
    chosen = sorted({int(b) for b in blocks})
    if not chosen or chosen[0] < 0 or chosen[-1] >= num_blocks:
        raise BlockRangeError(
            f"blocks {list(blocks)} do not fit a model of {num_blocks} blocks (0-{num_blocks - 1})."
        )
    return chosen


def contiguous_ranges(blocks: Iterable[int]) -> list[tuple[int, int]]:
    """Half-open runs that cover a set of blocks.

    Example:
        >>> contiguous_ranges([6, 7, 8, 12])
        [(6, 9), (12, 13)]
    """
    runs: list[tuple[int, int]] = []
    for b in sorted(set(blocks)):
        if runs and runs[-1][1] == b:
            runs[-1] = (runs[-1][0], b + 1)
        else:
            runs.append((b, b + 1))
    return runs


def format_blocks(blocks: Iterable[int]) -> str:
    """Blocks as the shortest spec that `parse_blocks` reads back.

    Example:
        >>> format_blocks([6, 7, 8, 12])
        '6:9,12'
    """
    return ",".join(f"{lo}" if hi == lo + 1 else f"{lo}:{hi}" for lo, hi in contiguous_ranges(blocks))


def depth(block: int, num_blocks: int) -> float:
    """Relative depth of a block, b/(L-1), in 0..1 (0 for a model of one block)."""
    return block / (num_blocks - 1) if num_blocks > 1 else 0.0


def zone(depth: float) -> Zone:
    """Zone of a relative depth: early below 0.2, late above 0.8, middle from 0.2 to 0.8.

    The only rule for zones: every summary, table and figure that says early, middle or late uses it.

    Args:
        depth: 0..1; of block b it is b/(L-1), of hidden state h it is h/L.

    Raises:
        BlockRangeError: a depth outside 0..1.

    Example:
        >>> [zone(d) for d in (0.0, 0.19, 0.2, 0.8, 0.81)]
        ['early', 'early', 'middle', 'middle', 'late']
    """
    if not 0.0 <= depth <= 1.0:
        raise BlockRangeError(f"a relative depth lies between 0 and 1, not at {depth}.")
    return "early" if depth < MIDDLE[0] else "late" if depth > MIDDLE[1] else "middle"


def zone_means(layers: Iterable[int], values: Iterable[float], last: int) -> dict[str, float]:
    """Mean of per-layer values in each zone; undefined values (NaN) are left out.

    Args:
        layers: Blocks or hidden states.
        values: One for each of ``layers``.
        last: Number of the deepest one, L-1 for blocks and L for hidden states.

    Returns:
        All three zones, early first; NaN for a zone without a defined value.

    Raises:
        BlockRangeError: a layer outside 0..``last``.

    Example:
        >>> zone_means(range(6), [5.0, 1.0, 2.0, 3.0, 2.0, 9.0], last=5)
        {'early': 5.0, 'middle': 2.0, 'late': 9.0}
    """
    found: dict[str, list[float]] = {name: [] for name in ZONES}
    for layer, value in zip(layers, values, strict=True):
        if not math.isnan(value):
            found[zone(depth(layer, last + 1))].append(float(value))
    return {name: math.fsum(part) / len(part) if part else math.nan for name, part in found.items()}


_EVEN = 1.25  # zones whose means are within this factor are called even


def zones_in_words(means: Mapping[str, float], form: str = ".3g") -> str:
    """Means of zones in words; a zone without one is left out.

    Args:
        means: Zone -> mean, as `zone_means` gives it.
        form: Format of the numbers.

    Example:
        >>> zones_in_words({"early": 0.5, "middle": float("nan"), "late": 2.0})
        'early 0.5, late 2'
    """
    return ", ".join(f"{zone} {value:{form}}" for zone, value in means.items() if not math.isnan(value))


def where_most(means: Mapping[str, float], what: str = "blocks") -> str:
    """Which zone changed most, in words; about even where the zones are within a quarter of each other.

    Args:
        means: Zone -> mean change, as `zone_means` gives it.
        what: What changed.

    Example:
        >>> where_most({"early": 1.0, "middle": 1.1, "late": 1.2}), where_most({"early": 1.0, "middle": 3.0})
        ('tuning acted about evenly on all blocks', 'tuning acted most on middle blocks')
    """
    defined = {zone: abs(value) for zone, value in means.items() if not math.isnan(value)}
    most = max(defined, key=lambda zone: defined[zone], default="")
    if not most or (len(defined) > 1 and defined[most] <= _EVEN * min(defined.values())):
        return f"tuning acted about evenly on all {what}"
    return f"tuning acted most on {most} {what}"
