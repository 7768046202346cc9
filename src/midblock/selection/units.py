"""Units that get one score each, and the choice of the best of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from midblock.settings.importance import Unit

if TYPE_CHECKING:
    from midblock.tuning.plan import Plan

__all__ = ["SCORES", "best_units", "top_count", "top_units", "units_of"]

SCORES = {
    "ila_score": "s of ILA: the update counts sigmoid(s)",
    "taylor": "|<gradient, update>| at the tuned weights (nats)",
    "taylor_base": "|<gradient, update>| at the base weights (nats)",
    "update_norm": "Frobenius norm of the update",
    "random": "seeded random numbers",
}
"""Metric -> what it is. The first is ILA's; the others are its controls."""


def units_of(plan: Plan, unit: Unit) -> dict[str, str]:
    """Adapted module -> its unit: the module itself, or ``block 3``."""
    return {m.name: m.name if unit == "matrix" else f"block {m.block}" for m in plan.modules}


def top_count(units: int, share: float) -> int:
    """Units in the top share: the nearest whole number, at least 1."""
    return min(units, max(1, math.floor(units * share + 0.5)))


def top_units(scores: Mapping[str, float], share: float) -> list[str]:
    """The top share of units, in the order of the model; of equal scores the earlier unit wins.

    Example:
        >>> top_units({"a": 0.1, "b": 0.9, "c": 0.5, "d": 0.5}, 0.5)
        ['b', 'c']
    """
    return best_units(scores, top_count(len(scores), share))


def best_units(scores: Mapping[str, float], count: int) -> list[str]:
    """The units with the highest scores, so many, in the order of the model."""
    kept = set(sorted(scores, key=lambda unit: -scores[unit])[:count])
    return [unit for unit in scores if unit in kept]
