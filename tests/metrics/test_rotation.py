"""What tuning did to a weight, against loops, and with planted intruders."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.linalg import subspace_angles

from midblock import metrics
from midblock.errors import UndefinedMetricError


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_share_unchanged_counts_bits() -> None:
    base = gaussian(20, 30).bfloat16()
    sft = base.clone()
    sft[3:5] += 1
    assert metrics.share_unchanged(base, sft).item() == pytest.approx(18 / 20)
    small = (base.float() * (1 + 1e-4)).bfloat16()  # less than half a step of 2^-8: rounding puts every entry back
    assert metrics.share_unchanged(base, small).item() == 1
    with pytest.raises(ValueError, match="exactly"):
        metrics.share_unchanged(base, sft.float())


def test_cosine_of_changes_equals_a_loop() -> None:
    a, b = gaussian(4, 5), gaussian(4, 5, seed=1)
    inner = sum(a[i, j].item() * b[i, j].item() for i in range(4) for j in range(5))
    size = math.sqrt(sum(v * v for v in a.flatten().tolist()) * sum(v * v for v in b.flatten().tolist()))
    assert metrics.change_cosine(a, b).item() == pytest.approx(inner / size)
    with pytest.raises(UndefinedMetricError):
        metrics.change_cosine(a, 0 * b)


def test_principal_angles_equal_scipy() -> None:
    a, b = gaussian(12, 4), gaussian(12, 7, seed=1)
    u, v = (torch.linalg.svd(x).U[:, :3].numpy() for x in (a, b))
    want = sorted(subspace_angles(u, v))
    assert metrics.principal_angles(a, b, k=3).tolist() == pytest.approx(want, abs=1e-9)
    turned = a @ gaussian(4, 4, seed=2)  # the same space, from other columns
    assert metrics.principal_angles(a, turned, k=4).tolist() == pytest.approx([0] * 4, abs=1e-7)
    with pytest.raises(UndefinedMetricError, match="fewer than 5"):
        metrics.principal_angles(a, b, k=5)


def test_vectors_kept_equal_a_loop() -> None:
    base, sft = gaussian(9, 6), gaussian(9, 6, seed=1)
    u, v = (np.linalg.svd(w.numpy(), full_matrices=False)[0] for w in (base, sft))
    want = [max(abs(float(u[:, j] @ v[:, i])) for j in range(6)) for i in range(4)]
    assert metrics.vector_rotation(base, sft, k=4).tolist() == pytest.approx(want)
    assert metrics.vector_rotation(base, 2 * base, k=3).tolist() == pytest.approx([1, 1, 1])


def test_planted_intruders_are_counted() -> None:
    turn, other = (torch.linalg.qr(gaussian(40, 40, seed=s)).Q for s in (0, 1))
    base = turn * torch.linspace(2, 0.5, 40) @ other
    assert metrics.intruder_dimensions(base, base).item() == 0
    for rank in (1, 3):
        left, right = (torch.linalg.qr(gaussian(40, rank, seed=s)).Q for s in (2, 3))
        # strong new directions, which are spread over all of the base's
        assert metrics.intruder_dimensions(base, base + 30 * left @ right.T, k=5).item() == rank
    assert metrics.intruder_dimensions(base, base + 1e-3 * gaussian(40, 40, seed=4)).item() == 0
    with pytest.raises(ValueError, match="epsilon"):
        metrics.intruder_dimensions(base, base, epsilon=0)
