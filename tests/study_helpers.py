"""Simulated studies of `locate --validate`, for its tests and for benchmarks/locate_validate.py."""

from __future__ import annotations

from typing import Any

import numpy as np


def simulated_study(draw: np.random.Generator, *, sweeps: int, profile: str, num_blocks: int = 30, segments: int = 5,
                    tasks: int = 2, seeds: int = 3, scores: int = 9, spread: float = 0.1, noise: float = 0.05,
                    informative: float = 0.0, smooth: bool = False) -> tuple[Any, Any, Any]:
    """Arguments of `judge` for a study with real effects of the segments and scores of noise.

    Args:
        draw: Random numbers.
        sweeps: Independent ones.
        profile: Where tuning helps: ``late``, ``middle``, ``flat`` in all sweeps, or ``random`` in each anew.
        spread: Standard deviation of a segment's effect between sweeps; tasks of a sweep share it.
        noise: Of one seed.
        informative: Correlation of the first score with the sweep's own effects; the others are noise.
        smooth: Neighbouring blocks have like scores.
    """
    common = {"late": np.linspace(0, 0.3, segments), "flat": np.zeros(segments), "random": np.zeros(segments),
              "middle": 0.3 * np.sin(np.pi * (np.arange(segments) + 0.5) / segments)}[profile]
    gains, values = [], []
    width = 3 * spread if profile == "random" else spread
    for _ in range(sweeps):
        effect = common + draw.normal(0, width, segments)
        cases = np.stack([effect + draw.normal(0, spread / 3, segments) + draw.normal(0, noise, segments)
                          for _ in range(tasks) for _ in range(seeds)])
        gains.append({segments: (cases, cases.max(axis=1))})
        made = draw.normal(size=(scores, num_blocks))
        if smooth:
            made = np.cumsum(made, axis=1)
        if informative:
            target = np.repeat((effect - effect.mean()) / effect.std(), num_blocks // segments)
            made[0] = informative * target + np.sqrt(1 - informative ** 2) * made[0]
        values.append({f"score{i}": row for i, row in enumerate(made)})
    return gains, values, [num_blocks] * sweeps
