"""How tuning turned a weight: entries left bit for bit, singular vectors kept, intruders, and two changes side by side.

Whole matrices are decomposed (float64), which costs minutes for a model of some 100M parameters; only where it is
asked for (``rotations``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from midblock import metrics
from midblock.analysis.weight_names import Stage, Weight
from midblock.analysis.weight_sums import Pair, entries, single_threads
from midblock.errors import UndefinedMetricError
from midblock.models.chain import side_of
from midblock.progress import Progress

__all__ = ["Turn", "turns"]

DIRECTIONS = 10
"""Strongest directions that are looked at, as in arXiv:2410.21228."""

Turn = tuple[Weight, str, str, str, float | str]
"""Weight, metric, side (difference or pair), comparison, and its value or why it has none."""


def turns(chain: Sequence[Stage], pairs: Sequence[Pair], weights: Sequence[Weight], workers: int, progress: Progress
          ) -> Iterator[Turn]:
    """Rows of every matrix: of each comparison, and of the changes of every later stage side by side.

    ``share_unchanged``, ``change_rank``, ``vector_rotation`` (mean over the 10 first singular vectors) and
    ``intruder_dimensions`` of a stage against an earlier one; ``change_cosine`` and ``principal_angles`` (mean over 10)
    of two later stages' changes since the first.
    """
    matrices = [w for w in weights if len(w.shape) == 2 and min(w.shape) > 1]
    largest = max((w.numel for w in matrices), default=1)
    workers = max(1, min(workers, (1 << 30) // (8 * (4 + 2 * len(chain)) * largest)))  # with vectors, workspaces
    with single_threads(workers, "rotations") as pool:
        for done, found in enumerate(pool.map(lambda w: list(_of_weight(chain, pairs, w)), matrices), start=1):
            yield from found
            progress("rotations (matrices)", done, len(matrices))


def _of_weight(chain: Sequence[Stage], pairs: Sequence[Pair], weight: Weight) -> Iterator[Turn]:
    operands = [stage.operand(weight) for stage in chain]
    values = [entries(operand, weight) for operand in operands]
    k = min(DIRECTIONS, *weight.shape)
    vectors = {i: metrics.left_singular_vectors(values[i]) for i in {i for pair in pairs for i in pair}}
    for later, earlier in pairs:
        name = side_of((chain[later].name, chain[earlier].name))
        before, after = values[earlier], values[later]
        stored = min((operands[i].dtype for i in (later, earlier)), key=lambda dtype: torch.finfo(dtype).bits)
        kept = metrics.largest_cosines(vectors[earlier], vectors[later][:, :k])
        for metric, side, value in (("share_unchanged", "pair", metrics.share_unchanged(before, after)),
                                    ("change_rank", "difference", _rank(before, after, stored)),
                                    ("vector_rotation", "pair", kept.mean()),
                                    ("intruder_dimensions", "pair", (kept < metrics.INTRUDER).sum())):
            yield weight, metric, side, name, float(value)
    for later in range(2, len(chain)):
        one, other = values[later - 1] - values[0], values[later] - values[0]
        stored = min((operands[i].dtype for i in (0, later - 1, later)), key=lambda dtype: torch.finfo(dtype).bits)
        common = min(k, *(int(_rank(values[0], values[i], stored)) for i in (later - 1, later)))
        name = f"{chain[later].name} with {chain[later - 1].name}"
        try:
            yield weight, "change_cosine", "pair", name, float(metrics.change_cosine(one, other))
        except UndefinedMetricError as error:
            yield weight, "change_cosine", "pair", name, str(error)
        if common:
            yield weight, "principal_angles", "pair", name, float(
                metrics.principal_angles(one, other, k=common).mean())
        else:
            yield weight, "principal_angles", "pair", name, "a change is not above the rounding of what is stored"


def _rank(before: Tensor, after: Tensor, dtype: torch.dtype) -> Tensor:
    """Of the change: singular values above those that rounding to the stored dtype alone would make.

    Rounding errors of m x n entries of size r have a spectral norm of about eps r (sqrt(m) + sqrt(n)).
    """
    change = after - before
    floor = torch.finfo(dtype).eps * float(after.square().mean().sqrt()) * sum(n ** 0.5 for n in change.shape)
    return torch.count_nonzero(metrics.singular_values(change) > floor)

