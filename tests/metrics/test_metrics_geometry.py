"""Geometry against plain NumPy loops, padding, undefined cases and planted dimensions."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from midblock import metrics
from midblock.errors import UndefinedMetricError


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def loop_curvature(z: np.ndarray) -> float:
    steps = [z[t + 1] - z[t] for t in range(len(z) - 1)]
    angles = []
    for a, b in itertools.pairwise(steps):
        size = math.sqrt(float(a @ a)) * math.sqrt(float(b @ b))
        if size > 0:
            angles.append(math.acos(max(-1.0, min(1.0, float(a @ b) / size))))
    return sum(angles) / len(angles) / math.pi


def loop_gini(row: np.ndarray) -> float:
    a = np.abs(row)
    return sum(abs(x - y) for x in a for y in a) / (2 * len(a) ** 2 * a.mean())


def padded(samples: list[Tensor], side: str) -> tuple[Tensor, Tensor]:
    width = max(map(len, samples)) + 2
    batch = torch.full((len(samples), width, samples[0].shape[1]), math.nan, dtype=torch.float64)
    mask = torch.zeros(len(samples), width, dtype=torch.bool)
    for i, z in enumerate(samples):
        start = {"right": 0, "left": width - len(z), "middle": 1}[side]
        batch[i, start:start + len(z)] = z
        mask[i, start:start + len(z)] = True
    return batch, mask


# -- curvature ---------------------------------------------------------------------------------


def test_curvature_equals_loop() -> None:
    for seed in range(5):
        z = gaussian(9, 6, seed=seed).cumsum(0)
        assert metrics.curvature(z).item() == pytest.approx(loop_curvature(z.numpy()), rel=1e-12)


def test_curvature_of_known_paths() -> None:
    line = torch.arange(6.0)[:, None] * torch.tensor([1.0, 2.0])
    assert metrics.curvature(line).item() == pytest.approx(0, abs=1e-7)
    assert metrics.curvature(torch.tensor([[0.0], [1.0], [0.0], [1.0]])).item() == 1
    corner = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0]])
    assert metrics.curvature(corner).item() == pytest.approx(0.5, abs=1e-12)


@pytest.mark.parametrize("angle", [1e-6, 1e-3, math.pi - 1e-3])
def test_curvature_is_not_clamped_near_straight_lines(angle: float) -> None:
    z = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1 + math.cos(angle), math.sin(angle)]], dtype=torch.float64)
    assert metrics.curvature(z).item() * math.pi == pytest.approx(angle, rel=1e-6)


def test_zero_differences_carry_no_angle() -> None:
    z = torch.tensor([[0.0, 0], [1, 0], [1, 1], [1, 1], [2, 1], [3, 1]])
    # steps: right, up, none, right, right; pairs with an angle: (right, up) 90 and (right, right) 0
    assert metrics.curvature(z).item() == pytest.approx(0.25)


def test_curvature_undefined() -> None:
    for z in (torch.randn(2, 4), torch.ones(5, 4)):
        with pytest.raises(UndefinedMetricError, match="three"):
            metrics.curvature(z)
    batch = gaussian(3, 5, 4)
    got = metrics.curvature(batch, lengths=torch.tensor([5, 2, 0]))
    assert got[0].item() == pytest.approx(metrics.curvature(batch[0]).item())
    assert got[1:].isnan().all()


@pytest.mark.parametrize("scale", [1e-30, 1e25])
def test_curvature_is_scale_free_in_float32(scale: float) -> None:
    z = gaussian(6, 5).float()
    assert metrics.curvature(z * scale).item() == pytest.approx(metrics.curvature(z).item(), rel=1e-5)


@settings(derandomize=True, max_examples=30, deadline=None)
@given(st.integers(3, 8), st.integers(1, 6), st.integers(0, 1000))
def test_curvature_does_not_know_rotation_shift_or_direction(tokens: int, width: int, seed: int) -> None:
    z = gaussian(tokens, width, seed=seed)
    rotation, _ = torch.linalg.qr(gaussian(width, width, seed=seed + 1))
    value = metrics.curvature(z).item()
    assert 0 <= value <= 1
    assert metrics.curvature(z @ rotation * 3 + 5).item() == pytest.approx(value, abs=1e-7)
    assert metrics.curvature(z.flip(0)).item() == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize("side", ["left", "right", "middle"])
def test_padding_changes_nothing(side: str) -> None:
    samples = [gaussian(t, 5, seed=t) for t in (7, 4, 7, 3)]
    batch, mask = padded(samples, side)
    for function in (metrics.curvature, lambda z, mask=None: metrics.sparsity(z, 0.3, mask=mask),
                     lambda z, mask=None: metrics.sparsity(z, 0.3, relative=True, mask=mask)):
        alone = [function(z).item() for z in samples]
        assert function(batch, mask=mask).tolist() == pytest.approx(alone, rel=1e-12)
    other = torch.where(mask[..., None], batch + 0.3, batch)
    alone = [metrics.token_cosine(z, z + 0.3).item() for z in samples]
    assert metrics.token_cosine(batch, other, mask).tolist() == pytest.approx(alone, rel=1e-12)


# -- sparsity ----------------------------------------------------------------------------------


def test_sparsity_equals_loop_in_both_variants() -> None:
    z = gaussian(6, 7, seed=3)
    values = z.numpy().ravel()
    assert metrics.sparsity(z, 0.4).item() == sum(abs(v) < 0.4 for v in values) / 42
    limit = 0.1 * max(abs(v) for v in values)
    assert metrics.sparsity(z, 0.1, relative=True).item() == sum(abs(v) < limit for v in values) / 42
    assert metrics.sparsity(z * 1e-3).item() > metrics.sparsity(z).item()  # absolute knows the scale
    relative = [metrics.sparsity(scale * z, 0.1, relative=True).item() for scale in (1, 1e-3)]
    assert relative[0] == relative[1]


def test_sparsity_edges() -> None:
    assert metrics.sparsity(torch.zeros(2, 2)).item() == 1
    with pytest.raises(UndefinedMetricError):
        metrics.sparsity(torch.zeros(2, 2), relative=True)
    batch = metrics.sparsity(torch.zeros(2, 2, 2), lengths=torch.tensor([2, 0]))
    assert batch.isnan().tolist() == [False, True]
    for eps in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="eps"):
            metrics.sparsity(torch.eye(2), eps)


# -- rows --------------------------------------------------------------------------------------


def test_norms_equal_numpy() -> None:
    x = gaussian(8, 5, seed=4)
    rows = np.sqrt((x.numpy() ** 2).sum(1))
    assert metrics.row_norms(x).tolist() == pytest.approx(rows.tolist())


def test_gini_equals_loop() -> None:
    x = gaussian(4, 9, seed=5)
    rows = [loop_gini(row) for row in x.numpy()]
    assert metrics.gini_rows(x).tolist() == pytest.approx(rows, rel=1e-12)
    shuffled = -x[[2, 0, 3, 1]][:, torch.randperm(9, generator=torch.Generator().manual_seed(0))] * 1e-3
    assert metrics.gini_rows(shuffled).mean().item() == pytest.approx(np.mean(rows))


def test_gini_edges() -> None:
    assert metrics.gini_rows(torch.ones(2, 5)).tolist() == pytest.approx([0, 0])
    assert metrics.gini_rows(torch.eye(5)).tolist() == pytest.approx([0.8] * 5)
    zero, one = metrics.gini_rows(torch.tensor([[0.0, 0.0], [0.0, 1.0]])).tolist()
    assert math.isnan(zero)
    assert one == 0.5


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_input_is_an_error(bad: float) -> None:
    x = torch.randn(5, 4)
    x[2, 1] = bad
    for function in (metrics.curvature, metrics.sparsity, metrics.row_norms, metrics.gini_rows,
                     metrics.intrinsic_dimension):
        with pytest.raises(ValueError, match="NaN or infinity"):
            function(x)


# -- intrinsic dimension -----------------------------------------------------------------------


def test_two_nn_equals_loop() -> None:
    x = gaussian(40, 3, seed=6)
    a = x.numpy()
    logs = []
    for i in range(40):
        distance = sorted(math.sqrt(((a[i] - a[j]) ** 2).sum()) for j in range(40) if j != i)
        logs.append(math.log(distance[1] / distance[0]))
    assert metrics.two_nn_log_ratios(x).tolist() == pytest.approx(logs, rel=1e-9)
    assert metrics.intrinsic_dimension(x).item() == pytest.approx(40 / sum(logs), rel=1e-9)
    ordered = sorted(logs)[:36]
    heights = [-math.log(1 - (i + 1) / 40) for i in range(36)]
    slope = sum(u * v for u, v in zip(ordered, heights, strict=True)) / sum(u * u for u in ordered)
    assert metrics.intrinsic_dimension(x, method="fit").item() == pytest.approx(slope, rel=1e-9)


@pytest.mark.parametrize("dimension", [1, 2, 5])
def test_two_nn_finds_a_planted_dimension(dimension: int) -> None:
    inside = torch.rand(1500, dimension, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    x = inside @ gaussian(dimension, 40, seed=8) + 100  # a far offset must not blur near neighbours
    assert metrics.intrinsic_dimension(x).item() == pytest.approx(dimension, rel=0.12)
    assert metrics.intrinsic_dimension(x, method="fit").item() == pytest.approx(dimension, rel=0.15)


def test_two_nn_leaves_duplicates_out() -> None:
    x = gaussian(30, 4, seed=9)
    doubled = torch.cat([x, x[:10]])
    plain, got = metrics.intrinsic_dimension(x), metrics.intrinsic_dimension(doubled)
    assert got.item() == pytest.approx(plain.item(), rel=1e-12)
    assert metrics.two_nn_log_ratios(doubled).isnan().tolist() == [False] * 30 + [True] * 10


def test_two_nn_does_not_know_order_scale_or_rotation() -> None:
    x = gaussian(50, 6, seed=10)
    rotation, _ = torch.linalg.qr(gaussian(6, 6, seed=11))
    value = metrics.intrinsic_dimension(x).item()
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    assert metrics.intrinsic_dimension(x[order] @ rotation * 7).item() == pytest.approx(value)


def test_two_nn_undefined() -> None:
    with pytest.raises(UndefinedMetricError, match="distinct"):
        metrics.intrinsic_dimension(torch.ones(10, 3))
    with pytest.raises(UndefinedMetricError, match="second neighbour"):
        metrics.intrinsic_dimension(torch.eye(5))  # all distances equal


def test_two_nn_weights() -> None:
    logs = torch.tensor([0.5, 0.25, math.nan, 1.0], dtype=torch.float64)
    weights = torch.tensor([[1.0, 1, 1, 1], [2, 0, 5, 1]])
    assert metrics.intrinsic_dimension_from_log_ratios(logs).item() == pytest.approx(3 / 1.75)
    got = metrics.intrinsic_dimension_from_log_ratios(logs, weights).tolist()
    assert got == pytest.approx([3 / 1.75, 3 / 2.0])
    x = gaussian(12, 3, seed=12)
    draws = metrics.intrinsic_dimension_bootstrap(x, torch.stack([torch.ones(12), torch.arange(12.0)]))
    ratios = metrics.two_nn_log_ratios(x)
    assert draws.tolist() == pytest.approx([12 / ratios.sum().item(),
                                            66 / sum(i * v for i, v in enumerate(ratios.tolist()))])
