"""Alignment scores against loops from their definitions, their invariances and closed forms."""

from __future__ import annotations

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


def related(n: int, d: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    x = gaussian(n, d, seed=seed)
    return x, x + 0.8 * gaussian(n, d, seed=seed + 100)


def loop_cka(x: np.ndarray, y: np.ndarray) -> float:
    n = len(x)
    h = np.eye(n) - np.ones((n, n)) / n
    k, l = h @ (x @ x.T) @ h, h @ (y @ y.T) @ h  # noqa: E741

    def inner(a: np.ndarray, b: np.ndarray) -> float:
        return sum(a[i, j] * b[i, j] for i in range(n) for j in range(n))

    return inner(k, l) / math.sqrt(inner(k, k) * inner(l, l))


def loop_debiased(x: np.ndarray, y: np.ndarray) -> float:
    """Song et al. as an average over tuples of distinct samples: no trace formula."""
    n = len(x)
    gram_x, gram_y = x @ x.T, y @ y.T

    def hsic(k: np.ndarray, l: np.ndarray) -> float:  # noqa: E741
        pairs = [(i, j) for i in range(n) for j in range(n) if i != j]
        first = sum(k[i, j] * l[i, j] for i, j in pairs) / len(pairs)
        triples = [(i, j, q) for i, j in pairs for q in range(n) if q not in (i, j)]
        third = sum(k[i, j] * l[i, q] for i, j, q in triples) / len(triples)
        fours = [(i, j, q, r) for i, j, q in triples for r in range(n) if r not in (i, j, q)]
        second = sum(k[i, j] * l[q, r] for i, j, q, r in fours) / len(fours)
        return first + second - 2 * third

    return hsic(gram_x, gram_y) / math.sqrt(hsic(gram_x, gram_x) * hsic(gram_y, gram_y))


# -- CKA ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "d"), [(7, 20), (20, 5)])
def test_cka_equals_loop_from_features_and_grams(n: int, d: int) -> None:
    x, y = related(n, d)
    expected = loop_cka(x.numpy(), y.numpy())
    assert metrics.cka(x, y).item() == pytest.approx(expected, rel=1e-10)


def test_debiased_cka_equals_the_average_over_tuples() -> None:
    x, y = related(7, 4, seed=1)
    expected = loop_debiased(x.numpy(), y.numpy())
    assert metrics.cka_debiased(x, y).item() == pytest.approx(expected, rel=1e-9)
    assert metrics.cka_debiased_from_grams(x @ x.T, y @ y.T).item() == pytest.approx(expected, rel=1e-9)


@settings(derandomize=True, max_examples=30, deadline=None)
@given(st.integers(5, 12), st.integers(2, 15), st.integers(0, 10_000),
       st.floats(1e-8, 1e8), st.floats(-50, 50))
def test_cka_invariances(n: int, d: int, seed: int, scale: float, shift: float) -> None:
    x, y = related(n, d, seed)
    rotation, _ = torch.linalg.qr(gaussian(d, d, seed=seed + 1))
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    for function in (metrics.cka, metrics.cka_debiased):
        value = function(x, y).item()
        assert function(y, x).item() == pytest.approx(value, abs=1e-9)
        assert function(x, x).item() == pytest.approx(1, abs=1e-9)
        assert function(x, (y @ rotation + shift) * scale).item() == pytest.approx(value, abs=1e-8)
        assert function(x[order], y[order]).item() == pytest.approx(value, abs=1e-9)
    assert -1e-12 <= metrics.cka(x, y).item() <= 1 + 1e-12


def test_independent_features_plain_is_large_debiased_is_near_zero() -> None:
    plain, debiased = [], []
    for seed in range(5):
        x, y = gaussian(200, 200, seed=2 * seed), gaussian(200, 200, seed=2 * seed + 1)
        plain.append(metrics.cka(x, y).item())
        debiased.append(metrics.cka_debiased(x, y).item())
    assert np.mean(plain) == pytest.approx(0.50, abs=0.01)
    assert abs(np.mean(debiased)) < 0.01
    x, y = gaussian(200, 4096, seed=1), gaussian(200, 4096, seed=2)
    assert metrics.cka(x, y).item() == pytest.approx(0.95, abs=0.01)
    assert abs(metrics.cka_debiased(x, y).item()) < 0.02


def test_both_estimators_agree_where_samples_are_many() -> None:
    x, y = related(2000, 5, seed=3)
    assert metrics.cka(x, y).item() == pytest.approx(metrics.cka_debiased(x, y).item(), abs=0.01)


def test_a_far_mean_costs_no_digits() -> None:
    x, y = related(20, 30, seed=4)
    far = 1e6
    for function in (metrics.cka, metrics.cka_debiased):
        assert function(x + far, y - far).item() == pytest.approx(function(x, y).item(), abs=1e-8)


def test_cka_undefined_and_bad_input() -> None:
    x = gaussian(6, 3)
    constant = torch.full((6, 3), 0.1) * torch.tensor([1.0, 3.0, 7.0])
    for function in (metrics.cka, metrics.cka_debiased):
        with pytest.raises(UndefinedMetricError, match="equal"):
            function(x, constant)
        with pytest.raises(ValueError, match="same samples"):
            function(x, x[:5])
        with pytest.raises(ValueError, match="NaN or infinity"):
            function(x, x.masked_fill(x > 0, math.nan))
    with pytest.raises(ValueError, match="at least 4"):
        metrics.cka_debiased(x[:3], x[:3])
    with pytest.raises(ValueError, match="at least 5"):
        metrics.cka_debiased_jackknife(torch.eye(4), torch.eye(4))


def test_jackknife_equals_leaving_each_sample_out() -> None:
    x, y = related(15, 6, seed=5)
    got = metrics.cka_debiased_jackknife(x, y)
    for r in range(15):
        kept = [i for i in range(15) if i != r]
        assert got[r].item() == pytest.approx(metrics.cka_debiased(x[kept], y[kept]).item(), rel=1e-9)


def test_jackknife_standard_error_is_the_spread_over_fresh_samples() -> None:
    values, errors = [], []
    mixing = gaussian(8, 8, seed=6)
    for seed in range(60):
        x = gaussian(60, 8, seed=1000 + seed)
        y = x @ mixing + 2 * gaussian(60, 8, seed=2000 + seed)
        values.append(metrics.cka_debiased(x, y).item())
        left_out = metrics.cka_debiased_jackknife(x, y).numpy()
        errors.append(math.sqrt(59 / 60 * ((left_out - left_out.mean()) ** 2).sum()))
    assert np.mean(errors) == pytest.approx(np.std(values, ddof=1), rel=0.35)


def test_cka_bootstrap_equals_resampling_rows() -> None:
    x, y = related(12, 7, seed=7)
    rng = np.random.default_rng(0)
    draws = rng.integers(0, 12, size=(20, 12))
    counts = torch.from_numpy(np.stack([np.bincount(row, minlength=12) for row in draws]))
    got = metrics.cka_bootstrap(x, y, counts)
    expected = [metrics.cka(x[row], y[row]).item() for row in map(torch.from_numpy, draws)]
    assert got.tolist() == pytest.approx(expected, rel=1e-9)


def test_cka_bootstrap_marks_replicates_without_variation() -> None:
    x, y = related(6, 3, seed=8)
    only_one = torch.zeros(2, 6)
    only_one[0, 2] = 6
    only_one[1] = 1
    got = metrics.cka_bootstrap(x, y, only_one)
    assert math.isnan(got[0].item())
    assert got[1].item() == pytest.approx(metrics.cka(x, y).item())


# -- cosine, shift, intensity --------------------------------------------------------------------


def test_cosine_equals_loop() -> None:
    x, y = related(6, 5, seed=9)
    rows = [float(a @ b) / math.sqrt(float(a @ a) * float(b @ b))
            for a, b in zip(x.numpy(), y.numpy(), strict=True)]
    assert metrics.cosine_similarity(x, y).tolist() == pytest.approx(rows, rel=1e-12)
    assert metrics.token_cosine(x, y).item() == pytest.approx(np.mean(rows), rel=1e-12)


def test_cosine_of_zero_rows() -> None:
    x = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    got = metrics.cosine_similarity(x, torch.ones(2, 2))
    assert math.isnan(got[0].item())
    assert metrics.token_cosine(x, torch.ones(2, 2)).item() == pytest.approx(math.sqrt(0.5))
    with pytest.raises(UndefinedMetricError):
        metrics.token_cosine(torch.zeros(2, 2), torch.ones(2, 2))
    got = metrics.token_cosine(torch.ones(2, 3, 4), torch.ones(2, 3, 4), lengths=torch.tensor([2, 0]))
    assert got[0].item() == 1
    assert math.isnan(got[1].item())


@pytest.mark.parametrize("scale", [1e-30, 1e25])
def test_cosine_does_not_over_or_underflow(scale: float) -> None:
    x, y = (side.float() for side in related(6, 5, seed=13))
    expected = metrics.token_cosine(x, y).item()
    assert metrics.token_cosine(x * scale, y).item() == pytest.approx(expected, rel=1e-5)


def test_shift_and_intensity_equal_loop() -> None:
    x, y = related(9, 4, seed=10)
    a, b = x.numpy(), y.numpy()
    shift = math.sqrt(sum((b[:, j].mean() - a[:, j].mean()) ** 2 for j in range(4)))
    intensity = np.mean([math.sqrt(((b[i] - a[i]) ** 2).sum()) for i in range(9)])
    scale = math.sqrt((a.mean(0) ** 2).sum())
    assert metrics.mean_shift(x, y).item() == pytest.approx(shift)
    assert metrics.change_intensity(x, y).item() == pytest.approx(intensity)
    assert metrics.mean_shift(x, y, relative=True).item() == pytest.approx(shift / scale)
    assert metrics.change_intensity(x, y, relative=True).item() == pytest.approx(intensity / scale)
    assert shift <= intensity
    with pytest.raises(UndefinedMetricError):
        metrics.mean_shift(torch.zeros(2, 2), torch.ones(2, 2), relative=True)
    with pytest.raises(ValueError, match="must be equal"):
        metrics.change_intensity(x, y[:4])


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("name", ["mean_shift", "change_intensity"])
def test_bootstraps_of_changes_equal_resampling_rows(name: str, relative: bool) -> None:
    x, y = related(10, 4, seed=11)
    draws = np.random.default_rng(2).integers(0, 10, size=(15, 10))
    counts = torch.from_numpy(np.stack([np.bincount(row, minlength=10) for row in draws]))
    got = getattr(metrics, f"{name}_bootstrap")(x, y, counts, relative=relative)
    expected = [getattr(metrics, name)(x[row], y[row], relative=relative).item()
                for row in map(torch.from_numpy, draws)]
    assert got.tolist() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_against_itself_shows_zero_change(dtype: torch.dtype) -> None:
    x = (gaussian(20, 30, seed=12) * 100).to(dtype)
    same = x.clone()
    assert metrics.mean_shift(x, same).item() == 0
    assert metrics.change_intensity(x, same).item() == 0
    assert bool((metrics.mean_shift_bootstrap(x, same, torch.ones(3, 20)) == 0).all())
    assert metrics.cka(x, same).item() == pytest.approx(1, abs=1e-12)
    assert metrics.cka_debiased(x, same).item() == pytest.approx(1, abs=1e-12)
    assert metrics.cosine_similarity(x, same).tolist() == pytest.approx([1] * 20, abs=1e-12)
    assert metrics.token_cosine(x, same).item() == pytest.approx(1, abs=1e-6)
    for function in (metrics.dataset_entropy, metrics.effective_rank, metrics.curvature, metrics.sparsity,
                     metrics.gini_rows, metrics.rank_deficiency, metrics.spectral_norm):
        assert bool((function(x) - function(same) == 0).all())
