"""Shape, neighbours, dissimilarities and layers against loops and closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from midblock import metrics
from midblock.errors import UndefinedMetricError


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def related(n: int, d: int, noise: float = 0.5, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    x = gaussian(n, d, seed=seed)
    return x, x + noise * gaussian(n, d, seed=seed + 100)


@pytest.mark.parametrize(("n", "d"), [(8, 20), (20, 5), (6, 6)])
def test_procrustes_angle_equals_scipys_rotation(n: int, d: int) -> None:
    from scipy.linalg import orthogonal_procrustes

    x, y = (side.numpy() for side in related(n, d))
    a, b = x - x.mean(0), y - y.mean(0)
    a, b = a / np.linalg.norm(a), b / np.linalg.norm(b)
    rotation, _ = orthogonal_procrustes(a, b)
    want = math.acos(float((a @ rotation * b).sum()))
    assert metrics.procrustes_angle(torch.from_numpy(x), torch.from_numpy(y)).item() == pytest.approx(want, rel=1e-9)


@settings(deadline=None, max_examples=20)
@given(st.integers(3, 10), st.integers(2, 12), st.floats(0.01, 100), st.floats(-9, 9), st.integers(0, 1000))
def test_procrustes_angle_is_a_metric_of_shapes(n: int, d: int, scale: float, shift: float, seed: int) -> None:
    x, y = related(n, d, seed=seed)
    rotation, _ = torch.linalg.qr(gaussian(d, d, seed=seed + 1))
    angle = metrics.procrustes_angle(x, y).item()
    assert metrics.procrustes_angle(scale * x @ rotation + shift, y).item() == pytest.approx(angle, abs=1e-7)
    assert metrics.procrustes_angle(y, x).item() == pytest.approx(angle, abs=1e-9)
    assert metrics.procrustes_angle(x, scale * x @ rotation + shift).item() == pytest.approx(0, abs=1e-6)
    third = gaussian(n, d, seed=seed + 2)
    assert angle <= metrics.procrustes_angle(x, third).item() + metrics.procrustes_angle(third, y).item() + 1e-9


def test_mutual_neighbours_equal_a_loop() -> None:
    x, y = related(30, 6)
    a, b = x.numpy(), y.numpy()

    def nearest(rows: np.ndarray, i: int) -> set[int]:
        cosine = {j: float(rows[i] @ rows[j] / np.linalg.norm(rows[i]) / np.linalg.norm(rows[j]))
                  for j in range(30) if j != i}
        return set(sorted(cosine, key=lambda j: -cosine[j])[:5])

    want = [len(nearest(a, i) & nearest(b, i)) / 5 for i in range(30)]
    assert metrics.mutual_neighbours(x, y, k=5).tolist() == want
    assert metrics.mutual_neighbours(x, 3 * x).tolist() == [1.0] * 30


def test_unrelated_states_share_neighbours_by_chance_alone() -> None:
    shared = metrics.mutual_neighbours(gaussian(400, 50), gaussian(400, 50, seed=9)).mean().item()
    assert shared == pytest.approx(10 / 399, abs=0.02)


def test_rsa_equals_spearman_of_correlation_distances() -> None:
    x, y = related(12, 7)

    def distances(rows: np.ndarray) -> list[float]:
        return [1 - float(np.corrcoef(rows[i], rows[j])[0, 1]) for i in range(12) for j in range(i + 1, 12)]

    want = scipy_stats.spearmanr(distances(x.numpy()), distances(y.numpy())).statistic
    assert metrics.rsa(x, y).item() == pytest.approx(float(want), rel=1e-9)
    assert metrics.rsa(x, 2 * x).item() == pytest.approx(1)
    tied = torch.cat([x, x[:3]])  # repeated samples are ties
    other = torch.cat([y, y[:3]])
    assert -1 <= metrics.rsa(tied, other).item() <= 1


@pytest.mark.parametrize("numbers", [1 << 22, 500, 1])  # all rows at once, some, one
def test_layer_cka_equals_debiased_cka_of_every_pair(numbers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("midblock.metrics.likeness._GRAM_NUMBERS", numbers)
    x, y = gaussian(3, 10, 6), gaussian(4, 10, 8, seed=5)
    y[1] = torch.cat([x[1], gaussian(10, 2, seed=6)], dim=1)
    found = metrics.layer_cka(x, y)
    assert found.shape == (3, 4)
    for i in range(3):
        for j in range(4):
            assert found[i, j].item() == pytest.approx(metrics.cka_debiased(x[i], y[j]).item(), rel=1e-9, abs=1e-12)
    x[2] = 1.0
    assert metrics.layer_cka(x, y)[2].isnan().all()


def test_undefined_and_bad_input() -> None:
    x = gaussian(6, 4)
    constant = torch.ones(6, 4)
    for function in (metrics.procrustes_angle, metrics.rsa):
        with pytest.raises(UndefinedMetricError):
            function(x, constant)
    with pytest.raises(UndefinedMetricError, match="no direction"):
        metrics.mutual_neighbours(x, torch.zeros(6, 4))
    for function in (metrics.procrustes_angle, metrics.rsa, metrics.mutual_neighbours):
        with pytest.raises(ValueError, match="same samples"):
            function(x, x[:5])
        with pytest.raises(ValueError, match="NaN or infinity"):
            function(x, x.masked_fill(x > 0, math.nan))
    with pytest.raises(ValueError, match="4 samples"):
        metrics.layer_cka(x[None, :3], x[None, :3])
