"""InfoNCE, LiDAR and DiME against loops from their definitions and in planted cases."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from midblock import metrics
from midblock.errors import UndefinedMetricError


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def views(n: int, d: int, noise: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    x = gaussian(n, d, seed=seed)
    return x + noise * gaussian(n, d, seed=seed + 1), x + noise * gaussian(n, d, seed=seed + 2)


def loop_infonce(a: np.ndarray, b: np.ndarray, temperature: float) -> float:
    total = 0.0
    for i in range(len(a)):
        scores = [float(a[i] @ b[j]) / np.linalg.norm(a[i]) / np.linalg.norm(b[j]) / temperature
                  for j in range(len(b))]
        total -= math.log(math.exp(scores[i]) / sum(math.exp(s) for s in scores))
    return total / len(a)


@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_infonce_equals_loop(temperature: float) -> None:
    a, b = views(7, 5, 0.5)
    one, other = (loop_infonce(u.numpy(), v.numpy(), temperature) for u, v in ((a, b), (b, a)))
    got = metrics.infonce(a, b, temperature, symmetric=False)
    assert got.loss.item() == pytest.approx(one, rel=1e-10)
    both = metrics.infonce(a, b, temperature)
    assert both.loss.item() == pytest.approx((one + other) / 2, rel=1e-10)
    assert both.bound.item() == pytest.approx(math.log(7) - both.loss.item())
    assert both.normalized.item() == pytest.approx(both.bound.item() / math.log(7))
    assert both.per_sample.mean().item() == pytest.approx(both.loss.item())


def test_infonce_orders_clean_noisy_and_unrelated_views() -> None:
    clean, noisy = metrics.infonce(*views(50, 20, 0.1)), metrics.infonce(*views(50, 20, 1.0))
    unrelated = metrics.infonce(gaussian(50, 20, seed=8), gaussian(50, 20, seed=9))
    assert 0.99 < clean.normalized <= 1
    assert clean.loss < noisy.loss < math.log(50) < unrelated.loss
    same = metrics.infonce(torch.ones(6, 3), torch.ones(6, 3))
    assert same.loss.item() == pytest.approx(math.log(6))  # nothing to tell prompts by


def loop_lidar(x: np.ndarray, delta: float) -> float:
    n, q, d = x.shape
    means = x.mean(1)
    between, within = np.zeros((d, d)), np.zeros((d, d))
    for i in range(n):
        between += np.outer(means[i] - means.mean(0), means[i] - means.mean(0)) / (n - 1)
        for j in range(q):
            within += np.outer(x[i, j] - means[i], x[i, j] - means[i]) / (n * (q - 1))
    values, axes = np.linalg.eigh(within + delta * np.eye(d))
    root = axes / np.sqrt(values) @ axes.T
    p = np.linalg.eigvalsh(root @ between @ root).clip(0)
    p = p / p.sum()
    return math.exp(-sum(v * math.log(v) for v in p if v > 0))


@pytest.mark.parametrize(("n", "q", "d"), [(6, 3, 5), (8, 4, 12), (4, 2, 30)])
@pytest.mark.parametrize("delta", [1e-4, 0.1])
def test_lidar_equals_loop(n: int, q: int, d: int, delta: float) -> None:
    x = gaussian(n, 1, d, seed=1) + 0.3 * gaussian(n, q, d, seed=2)
    assert metrics.lidar(x, delta=delta).item() == pytest.approx(loop_lidar(x.numpy(), delta), rel=1e-6)


def test_lidar_counts_planted_directions() -> None:
    centers = torch.zeros(60, 40, dtype=torch.float64)
    centers[:, :5] = 10 * gaussian(60, 5, seed=3)
    x = centers[:, None] + gaussian(60, 10, 40, seed=4)
    assert metrics.lidar(x).item() == pytest.approx(5, rel=0.3)
    relative = metrics.lidar(x, relative_delta=True).item()
    assert metrics.lidar(x * 1e4, relative_delta=True).item() == pytest.approx(relative, rel=1e-6)


def loop_dime(a: np.ndarray, b: np.ndarray, alpha: float, orders: list[np.ndarray]) -> float:
    def kernel(x: np.ndarray) -> np.ndarray:
        u = x / np.linalg.norm(x, axis=1, keepdims=True)
        return u @ u.T

    def entropy(k: np.ndarray) -> float:
        p = np.linalg.eigvalsh(k / np.trace(k)).clip(1e-300)
        return -float((p * np.log(p)).sum()) if alpha == 1 else math.log((p**alpha).sum()) / (1 - alpha)

    ka, kb = kernel(a), kernel(b)
    return float(np.mean([entropy(ka * kb[np.ix_(o, o)]) for o in orders])) - entropy(ka * kb)


@pytest.mark.parametrize("alpha", [1.0, 2.0, 0.5])
def test_dime_equals_loop(alpha: float) -> None:
    a, b = views(9, 4, 0.3, seed=5)
    generator = torch.Generator().manual_seed(3)
    orders = [torch.randperm(9, generator=generator).numpy() for _ in range(6)]
    got = metrics.dime(a, b, alpha=alpha, permutations=6, generator=torch.Generator().manual_seed(3)).item()
    assert got == pytest.approx(loop_dime(a.numpy(), b.numpy(), alpha, orders), rel=1e-8)


@pytest.mark.parametrize("kernel", ["cosine", "gaussian"])
def test_dime_is_seeded_and_falls_with_noise(kernel: str) -> None:
    values = [metrics.dime(*views(60, 6, noise, seed=6), kernel=kernel).item() for noise in (0.05, 0.5, 20.0)]
    assert values[0] > values[1] > values[2]
    assert abs(values[2]) < 0.2 * values[0]
    a, b = views(60, 6, 0.05, seed=6)
    assert metrics.dime(a, b, kernel=kernel).item() == values[0]
    assert metrics.dime(a, b, kernel=kernel, normalize=True).item() == pytest.approx(values[0] / math.log(60))


def test_gaussian_dime_takes_a_bandwidth() -> None:
    a, b = views(20, 4, 0.1)
    assert metrics.dime(a, b, kernel="gaussian", bandwidth=1e-6).item() == pytest.approx(0, abs=1e-9)


def test_views_undefined_and_bad_input() -> None:
    a, b = views(5, 3, 0.1)
    zero = a.clone()
    zero[2] = 0
    for function in (metrics.infonce, metrics.dime):
        with pytest.raises(UndefinedMetricError, match="row 2"):
            function(zero, b)
        with pytest.raises(ValueError, match="must be equal"):
            function(a, b[:4])
        with pytest.raises(ValueError, match="two prompts"):
            function(a[:1], b[:1])
        with pytest.raises(ValueError, match="NaN or infinity"):
            function(a, b / 0)
    with pytest.raises(UndefinedMetricError, match="same mean"):
        metrics.lidar(gaussian(1, 3, 4).expand(5, 3, 4))
    with pytest.raises(ValueError, match="views >= 2"):
        metrics.lidar(a[:, None])
    for call in (lambda: metrics.infonce(a, b, 0.0), lambda: metrics.lidar(torch.stack([a, b], 1), delta=0.0),
                 lambda: metrics.dime(a, b, permutations=0), lambda: metrics.dime(a, b, alpha=0.0),
                 lambda: metrics.dime(a, b, kernel="rbf"),  # type: ignore[arg-type]
                 lambda: metrics.dime(a, b, kernel="gaussian", bandwidth=-1.0)):
        with pytest.raises(ValueError, match=r"temperature|delta|permutations|alpha|kernel|bandwidth"):
            call()
