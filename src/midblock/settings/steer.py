"""Settings of `midblock steer`."""

from __future__ import annotations

import re
from typing import Literal, Self

from pydantic import field_validator, model_validator

from midblock.errors import SettingsError
from midblock.segments import blocks_from_spec, segment_bounds
from midblock.settings import sampling
from midblock.settings.base import name_of, setting
from midblock.settings.token_means import TokenMeanSettings

__all__ = ["Positions", "SteerSettings", "principal_number"]

Positions = Literal["all", "prompt", "completion", "last-prompt"]


def principal_number(direction: str) -> int | None:
    """K of ``pcK``; None for ``mean`` and ``random``.

    Raises:
        SettingsError: another direction.

    Example:
        >>> principal_number("pc2")
        2
    """
    found = re.fullmatch(r"mean|random|pc([1-9]\d*)", direction)
    if found is None:
        raise SettingsError(f"direction {direction!r} is unknown; use mean, pc1, pc2 ..., or random.")
    return int(found[1]) if found[1] else None


class SteerSettings(TokenMeanSettings):
    """What is added or replaced, where, and what is scored; `steer` takes the same names as keyword arguments."""

    blocks: str | tuple[int, ...] | None = setting(None, metavar="B", help=(
        "Blocks at whose output states are changed, such as 12 or 10:20 (half-open) or 0:4,12. Default: the middle "
        "block of each fifth of the depth."))
    alphas: tuple[float, ...] = setting((0.5, 1.0), metavar="A,B,...", help=(
        "Strengths; the unchanged model (0) is always scored."))
    direction: str = setting("mean", metavar="mean|pc1|pcK|random", help=(
        "Mean shift, K-th principal direction of the paired difference, or a random control."))
    centered: bool = setting(False, help="Principal directions of the centred difference (without the mean shift).")
    together: bool = setting(False, help="Change all the blocks at once instead of one after another.")
    patch: Positions | None = setting(None, help=(
        "Instead of adding a direction, replace the base's states at these positions by the tuned model's."))
    samples: int = sampling.samples(
        100, "Samples: one half gives the direction, the other is scored (patching scores all).", least=4)
    seed: int = sampling.seed("Seed of the draw, the split and the random control.")
    max_new_tokens: int = setting(48, ge=1, metavar="N", help="Length of each continuation.")
    chat: bool = setting(False, help="Put prompts to continue into the chat template.")

    @field_validator("alphas")
    @classmethod
    def _some_strength(cls, alphas: tuple[float, ...]) -> tuple[float, ...]:
        if not any(alphas):
            raise ValueError("must be numbers that are not all 0, such as 0.5,1")
        return alphas

    @field_validator("direction")
    @classmethod
    def _known_direction(cls, direction: str) -> str:
        try:
            principal_number(direction)
        except SettingsError as error:
            raise ValueError(str(error)) from None
        return direction

    @model_validator(mode="after")
    def _positions_are_known(self) -> Self:
        if self.patch not in (None, "all") and not self.supervised:
            raise ValueError(f"patching {self.patch} positions needs prompts and completions; add "
                             f"{name_of('supervised')}")
        return self

    def chosen_blocks(self, num_blocks: int) -> list[int]:
        """The blocks, or one in the middle of each fifth of the depth.

        Raises:
            BlockRangeError: a block that the model does not have.
        """
        if not self.blocks:
            bounds = segment_bounds(min(5, num_blocks), num_blocks)
            return [(low + high - 1) // 2 for low, high in bounds]
        return blocks_from_spec(None, self.blocks, num_blocks)
