"""What tuning did to a weight matrix: how its singular vectors turned, and how two changes point.

References:
    [1] Shuttleworth, Andreas, Torralba & Sharma, LoRA vs Full Fine-tuning: An Illusion of Equivalence,
    arXiv:2410.21228. [2] Björck & Golub, Mathematics of Computation 27 (1973): principal angles between subspaces.
"""

from __future__ import annotations

import torch
from torch import Tensor

from midblock.errors import UndefinedMetricError
from midblock.metrics._inputs import features, matching, require_finite

__all__ = ["INTRUDER", "change_cosine", "intruder_dimensions", "largest_cosines", "left_singular_vectors",
           "principal_angles", "share_unchanged", "vector_rotation"]

INTRUDER = 0.6
"""Cosine below which a direction counts as new, as in [1]."""


def share_unchanged(base: Tensor, sft: Tensor) -> Tensor:
    """Share of entries that are exactly, bit for bit, what they were: ().

    Raises:
        ValueError: different shapes or dtypes, empty.

    Example:
        >>> share_unchanged(torch.zeros(4), torch.tensor([0.0, 0.0, 0.0, 1e-30])).item()
        0.75
    """
    matching(base, sft, "base and sft")
    if base.dtype != sft.dtype or base.numel() == 0:
        raise ValueError(f"entries of {base.dtype} and {sft.dtype} (shape {tuple(base.shape)}) cannot be compared "
                         "exactly.")
    return (base == sft).double().mean()


def change_cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine between two changes of one weight (of two stages, or of two arms): (), float64, -1..1.

    Raises:
        ValueError: different shapes, non-finite entries.
        UndefinedMetricError: one of them is zero.

    Example:
        >>> round(change_cosine(torch.eye(2), -torch.eye(2)).item(), 9)
        -1.0
    """
    matching(a, b, "the two changes")
    require_finite(a, "a")
    require_finite(b, "b")
    first, second = a.flatten().double(), b.flatten().double()
    scale = first.norm() * second.norm()
    if not bool(scale > 0):
        raise UndefinedMetricError("the cosine of two changes is undefined: one of them is zero.")
    cosine: Tensor = (first @ second) / scale
    return cosine.clamp(-1.0, 1.0)


def principal_angles(a: Tensor, b: Tensor, *, k: int) -> Tensor:
    """Angles [2] between the spaces of the ``k`` strongest output directions of two changes (m, n), smallest first.

    Args:
        a: A change of a weight, (m, n1).
        b: Another change of it, (m, n2).
        k: Dimension of either space; at most the rank of both.

    Returns:
        (k), float64, radians in 0..pi/2: all 0 for one space, all pi/2 for orthogonal ones.

    Raises:
        ValueError: other shapes, k outside 1..m, non-finite entries.
        UndefinedMetricError: a change has fewer than k directions.

    Example:
        >>> principal_angles(torch.diag(torch.tensor([2.0, 1.0, 0.0])), torch.eye(3)[:, :2], k=2).tolist()
        [0.0, 0.0]
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[0] or not 1 <= k <= a.shape[0]:
        raise ValueError(f"changes of shape {tuple(a.shape)} and {tuple(b.shape)} have no {k} common directions.")
    spaces = []
    for change, name in ((a, "a"), (b, "b")):
        u, s, _ = torch.linalg.svd(features(change, name), full_matrices=False)
        if s.numel() < k or not bool(s[k - 1] > max(change.shape) * torch.finfo(s.dtype).eps * s[0]):
            raise UndefinedMetricError(f"principal angles are undefined: change {name} has fewer than {k} directions.")
        spaces.append(u[:, :k])
    first, second = spaces
    cosines = torch.linalg.svdvals(first.mT @ second).clamp(max=1.0)
    # near 0 the sine has the digits that the cosine lacks
    sines = torch.linalg.svdvals(second - first @ (first.mT @ second)).flip(0).clamp(max=1.0)
    return torch.where(cosines**2 > 0.5, torch.arcsin(sines), torch.arccos(cosines))


def vector_rotation(base: Tensor, sft: Tensor, *, k: int = 10) -> Tensor:
    """Largest cosine of each of the ``k`` first left singular vectors of the tuned weight with any of the base's [1].

    Args:
        base: (m, n).
        sft: (m, n).
        k: Vectors; fewer where the matrix has fewer.

    Returns:
        (k), float64, 0..1, in the order of the tuned weight's singular values. 1: the vector is still there.

    Raises:
        ValueError: different shapes, not two dims, k below 1, non-finite entries.

    Example:
        >>> vector_rotation(torch.diag(torch.tensor([2.0, 1.0])), torch.diag(torch.tensor([1.0, 3.0]))).tolist()
        [1.0, 1.0]
    """
    matching(base, sft, "base and sft")
    if base.ndim != 2 or k < 1:
        raise ValueError(f"weights have shape {tuple(base.shape)} and k is {k}; expected a matrix and k of at least 1.")
    return largest_cosines(left_singular_vectors(base), left_singular_vectors(sft)[:, :k])


def left_singular_vectors(x: Tensor) -> Tensor:
    """Left singular vectors (m, min(m, n)) of a matrix (m, n), float64, those of the largest singular values first."""
    vectors: Tensor = torch.linalg.svd(features(x, "x"), full_matrices=False).U
    return vectors


def largest_cosines(before: Tensor, after: Tensor) -> Tensor:
    """Largest cosine, in size, of each of ``after``'s unit columns (m, k) with any of ``before``'s (m, n): (k)."""
    cosines: Tensor = before.mT @ after
    return cosines.abs().amax(dim=0).clamp(max=1.0)


def intruder_dimensions(base: Tensor, sft: Tensor, *, k: int = 10, epsilon: float = INTRUDER) -> Tensor:
    """Number of intruders [1] among the ``k`` first left singular vectors of the tuned weight: ().

    An intruder has a cosine below ``epsilon`` with every left singular vector of the base. LoRA makes them, full
    fine-tuning hardly does; they go with forgetting.

    Raises:
        ValueError: as `vector_rotation`; epsilon outside 0..1.

    Example:
        >>> turned = torch.tensor([[2.0, 0.0], [0.0, 1.0]]) + 9 * torch.ones(2, 2)
        >>> intruder_dimensions(torch.diag(torch.tensor([2.0, 1.0])), turned, k=1, epsilon=0.8).item()
        1
    """
    if not 0 < epsilon <= 1:
        raise ValueError(f"epsilon is {epsilon}; a cosine between 0 and 1 is needed.")
    return (vector_rotation(base, sft, k=k) < epsilon).sum()
