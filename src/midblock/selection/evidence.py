"""Does a score choose better than the fixed middle? Independent sweeps decide, not their seeds and tasks.

Seeds, tasks, methods and segmentations of one sweep share its model, data and items, and a score is the same for
all of them: they are one observation. Sweeps of one model on one data set are one observation as well. A score wins
if, over at least three of these, its regret is

* lower than its own would be by chance: the score's values moved round the depth of the model by every number of
  blocks are equally likely if its place means nothing (exact, whatever the gains look like), and
* lower than the fixed middle's (one-sided t test over the observations),

both at 5% in all, by Holm over the larger of the two p values of every score.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from midblock import stats
from midblock.segments import MIDDLE, segment_bounds

__all__ = ["LEAST_SWEEPS", "LEVEL", "Comparison", "Evidence", "chance_p", "fixed_middle", "judge", "regrets_of",
           "segment_means", "sweeps_needed"]

FloatArray = npt.NDArray[np.float64]
LEAST_SWEEPS = 3
"""Independent sweeps (model and data) below which no score wins."""
LEVEL = 0.05
_ENUMERATED, _DRAWN = 1_000_000, 100_000


@dataclass(frozen=True)
class Comparison:
    """A score against the fixed middle, over independent sweeps."""

    score: str
    difference: float
    """Mean regret minus the fixed middle's."""
    differences: tuple[float, ...]
    """One for each independent sweep in which the score is defined."""
    p_chance: float
    p_middle: float
    p_holm: float

    @property
    def wins(self) -> bool:
        """Lower than by chance and than the fixed middle's, over enough sweeps."""
        return len(self.differences) >= LEAST_SWEEPS and self.difference < 0 and self.p_holm < LEVEL


@dataclass(frozen=True)
class Evidence:
    """What all scores together show."""

    comparisons: tuple[Comparison, ...]
    sweeps: int
    """Independent ones."""
    needed: int
    """Independent sweeps with which a win is possible."""

    @property
    def winner(self) -> Comparison | None:
        """Of the scores that win, the one with the lowest regret."""
        return min((c for c in self.comparisons if c.wins), key=lambda c: c.difference, default=None)


def segment_means(values: FloatArray, segments: int) -> FloatArray:
    """Mean over the blocks of each of K segments, (..., L) -> (..., K)."""
    bounds = segment_bounds(segments, values.shape[-1])
    return np.stack([values[..., lo:hi].mean(axis=-1) for lo, hi in bounds], axis=-1)


def fixed_middle(segments: int, num_blocks: int) -> FloatArray:
    """What the fixed middle says of K segments: the share of their blocks within 20%-80% of the depth, (K,).

    Example:
        >>> fixed_middle(5, 10).tolist()
        [0.0, 1.0, 1.0, 1.0, 0.0]
    """
    lo, hi = (edge * num_blocks for edge in MIDDLE)
    inside = [sum(lo <= b + 0.5 <= hi for b in range(a, z)) / (z - a) for a, z in segment_bounds(segments, num_blocks)]
    return np.array(inside)


def regrets_of(predicted: FloatArray, gains: FloatArray, best: FloatArray) -> FloatArray:
    """Regret of every prediction in every case, (P, C).

    Args:
        predicted: (P, K); equal highest predictions count as a random choice among them.
        gains: (C, K).
        best: (C,), the best arm's gain.
    """
    chosen = (predicted == predicted.max(axis=1, keepdims=True)).astype(np.float64)
    shares = chosen / chosen.sum(axis=1, keepdims=True)
    found: FloatArray = best[None, :] - shares @ gains.T
    return found


def chance_p(observed: float, chances: Sequence[FloatArray], seed: int = 0) -> float:
    """P(sum of one draw from each of ``chances`` <= observed); exact up to a million combinations.

    Args:
        observed: A sum.
        chances: Equally likely values of each independent part.
        seed: Of the draws where there are more combinations.

    Example:
        >>> chance_p(0.0, [np.array([0.0, 1.0]), np.array([0.0, 1.0, 1.0, 1.0])])
        0.125
    """
    slack = 1e-9 * max(1.0, abs(observed))
    # a score chooses one of K segments, so most of its L places are alike
    alike = [np.unique(values.round(12), return_counts=True) for values in chances]
    if math.prod(len(values) for values, _ in alike) <= _ENUMERATED:
        sums, weights = np.zeros(1), np.ones(1)
        for values, counts in alike:
            sums = (sums[:, None] + values[None, :]).ravel()
            weights = (weights[:, None] * (counts / counts.sum())[None, :]).ravel()
        return float(weights[sums <= observed + slack].sum())
    draw = np.random.default_rng(seed)
    sums = np.sum([draw.choice(values, _DRAWN) for values in chances], axis=0)
    return float((1 + (sums <= observed + slack).sum()) / (1 + _DRAWN))


def sweeps_needed(scores: int, segments: int) -> int:
    """Independent sweeps with which the best of so many scores can win: chance picks the best of K segments each time.

    Example:
        >>> sweeps_needed(1, 5), sweeps_needed(9, 5), sweeps_needed(9, 3)
        (3, 4, 5)
    """
    count = LEAST_SWEEPS
    while scores * segments ** -float(count) >= LEVEL:
        count += 1
    return count


def judge(gains: Sequence[Mapping[int, tuple[FloatArray, FloatArray]]],
          scores: Sequence[Mapping[str, FloatArray]], num_blocks: Sequence[int]) -> Evidence:
    """Compare every score with the fixed middle and with chance.

    Args:
        gains: One for each independent sweep: K -> gains of its cases (C, K), and each case's best arm (C,).
        scores: One for each: score -> value of every block (L,); NaN where undefined.
        num_blocks: L of each.
    """
    middle = [float(np.concatenate([regrets_of(fixed_middle(k, blocks)[None], g, best)[0]
                                    for k, (g, best) in by_k.items()]).mean())
              for by_k, blocks in zip(gains, num_blocks, strict=True)]
    found: dict[str, tuple[list[float], float]] = {}
    for name in dict.fromkeys(n for by_name in scores for n in by_name):
        differences, chances, total = [], [], 0.0
        for by_k, by_name, reference in zip(gains, scores, middle, strict=True):
            values = by_name.get(name)
            if values is None or not np.isfinite(values).all():
                continue
            shifts = np.stack([np.roll(values, s) for s in range(values.size)])
            regrets = np.concatenate([regrets_of(segment_means(shifts, k), g, best)
                                      for k, (g, best) in by_k.items()], axis=1).mean(axis=1)
            chances.append(regrets)
            total += regrets[0]
            differences.append(float(regrets[0]) - reference)
        if differences:
            found[name] = differences, chance_p(total, chances)
    p_middle = {name: _lower(np.array(d)) for name, (d, _) in found.items()}
    worse = [max(p, p_middle[name]) for name, (_, p) in found.items()]
    held = stats.holm(worse) if worse else np.array([])
    segments = min((k for by_k in gains for k in by_k), default=LEAST_SWEEPS)
    return Evidence(tuple(Comparison(name, float(np.mean(d)), tuple(d), p, p_middle[name], float(adjusted))
                          for (name, (d, p)), adjusted in zip(found.items(), held, strict=True)),
                    len(gains), sweeps_needed(len(found), segments))


def _lower(differences: FloatArray) -> float:
    """One-sided p of a mean difference of 0 or more."""
    if differences.size < 2:
        return 1.0
    if float(np.ptp(differences)) == 0:
        return 0.5 ** differences.size if differences[0] < 0 else 1.0
    p = stats.one_sample_t(differences).p
    return p / 2 if differences.mean() < 0 else 1 - p / 2
