"""Block influence, change points and weight spectra against loops and by their properties."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from midblock import metrics
from midblock.errors import UndefinedMetricError


def _states(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_influence_and_angle_against_a_loop() -> None:
    a, b = _states(0, 2, 5, 8), _states(1, 2, 5, 8)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    influence, angle = metrics.block_influence(a, b, mask), metrics.angular_distance(a, b, mask)
    for i, n in enumerate((3, 5)):
        cosines = [float(a[i, t] @ b[i, t] / (a[i, t].norm() * b[i, t].norm())) for t in range(n)]
        assert float(influence[i]) == pytest.approx(np.mean([1 - c for c in cosines]), abs=1e-6)
        assert float(angle[i]) == pytest.approx(np.mean([math.acos(c) / math.pi for c in cosines]), abs=1e-6)


def test_a_block_that_only_scales_has_no_influence() -> None:
    a = _states(0, 1, 6, 8)
    assert float(metrics.block_influence(a, 3 * a)[0]) == pytest.approx(0, abs=1e-6)
    assert float(metrics.angular_distance(a, -a)[0]) == pytest.approx(1)
    assert float(metrics.block_influence(a, -a)[0]) == pytest.approx(2)
    dead = torch.zeros(1, 6, 8)
    assert math.isnan(metrics.block_influence(a, dead)[0])
    with pytest.raises(ValueError, match="shapes"):
        metrics.block_influence(a, a[:, :5])


def _scatter(kernel: np.ndarray, borders: tuple[int, ...]) -> float:
    edges = [0, *borders, len(kernel)]
    return sum(float(np.trace(k) - k.sum() / len(k)) for k in
               (kernel[lo:hi, lo:hi] for lo, hi in itertools.pairwise(edges)))


@pytest.mark.parametrize("segments", [1, 2, 3, 4])
def test_change_points_are_the_best_of_all(segments: int) -> None:
    for seed in range(5):
        x = _states(seed, 8, 3).double().numpy()
        kernel = x @ x.T
        found = tuple(metrics.change_points(kernel, segments))
        best = min(_scatter(kernel, cuts) for cuts in itertools.combinations(range(1, 8), segments - 1))
        assert _scatter(kernel, found) == pytest.approx(best)


def test_planted_change_points_are_found() -> None:
    level = np.repeat([0.0, 5.0, -3.0], [4, 7, 3])
    x = np.stack([level, np.random.default_rng(0).normal(0, 0.3, 14)], axis=1)
    assert metrics.change_points(x @ x.T, 3) == [4, 11]
    with pytest.raises(ValueError, match="not possible"):
        metrics.change_points(np.eye(2), 3)
    with pytest.raises(ValueError, match="square"):
        metrics.change_points(np.full((2, 2), np.nan), 1)


@pytest.mark.parametrize(("rows", "columns"), [(200, 200), (100, 400), (400, 100)])
def test_noise_ends_at_the_edge(rows: int, columns: int) -> None:
    noise = 0.3 * _states(0, rows, columns)
    values = torch.linalg.svdvals(noise)
    edge = metrics.marchenko_pastur_edge(values, noise.shape)
    assert edge == pytest.approx(0.3 * (rows ** 0.5 + columns ** 0.5), rel=0.03)
    assert float(values.max()) == pytest.approx(edge, rel=0.06)
    small, large = sorted((rows, columns))
    eigenvalues = values.double().square() / (0.09 * large)
    assert metrics.marchenko_pastur_median(small / large) == pytest.approx(float(eigenvalues.median()), rel=0.06)


def test_a_planted_signal_raises_the_ratio_and_scale_does_not() -> None:
    noise = _states(0, 120, 160)
    signal = noise + 4 * _states(1, 120, 2) @ _states(2, 2, 160)

    def snr(x: torch.Tensor) -> float:
        return metrics.spectral_snr([(torch.linalg.svdvals(x), x.shape)])
    assert snr(noise) < 0.05
    assert snr(signal) > 10 * snr(noise) + 1
    assert snr(7 * signal) == pytest.approx(snr(signal), rel=1e-4)
    with pytest.raises(UndefinedMetricError, match="noise level"):
        snr(torch.zeros(4, 4))
    with pytest.raises(UndefinedMetricError):
        metrics.spectral_snr([])
