"""Spectral quantities against plain NumPy, by properties, and the first-order bootstrap."""

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

shapes = st.tuples(st.integers(2, 9), st.integers(2, 9), st.integers(0, 10_000))


def gaussian(n: int, d: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def hidden_like(seed: int, tokens: int = 128, width: int = 192, sink: float = 20_000.0) -> Tensor:
    """Token states as deep blocks have them: decaying spectrum, one common direction, one sink token."""
    g = torch.Generator().manual_seed(seed)
    scales = torch.arange(1, width + 1).float().pow(-0.7)
    z = torch.randn(tokens, width, generator=g) * scales * 30
    z = z + 60 * torch.randn(width, generator=g) / math.sqrt(width)
    z[0, 3] += sink
    return z


def numpy_entropy(z: np.ndarray, alpha: float, unit_rows: bool = False) -> float:
    """Straight from the definition, with the T x T matrix and a loop over its eigenvalues."""
    z = np.asarray(z, dtype=np.float64)
    if unit_rows:
        z = np.array([row / np.sqrt((row**2).sum()) for row in z])
    gram = np.array([[float(a @ b) for b in z] for a in z])
    p = np.linalg.eigvalsh(gram / np.trace(gram))
    p = [v for v in p if v > 1e-15]
    if alpha == 1:
        return -sum(v * math.log(v) for v in p)
    return math.log(sum(v**alpha for v in p)) / (1 - alpha)


def numpy_effective_rank(x: np.ndarray, energy: bool = False) -> float:
    s = np.linalg.svd(np.asarray(x, dtype=np.float64), compute_uv=False)
    if energy:
        s = s**2
    p = [v / s.sum() for v in s if v > 0]
    return math.exp(-sum(v * math.log(v) for v in p))


# -- entropy -----------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0, 3.0])
@pytest.mark.parametrize("unit_rows", [False, True])
@pytest.mark.parametrize(("n", "d"), [(5, 8), (8, 5), (6, 6)])
def test_matrix_entropy_equals_loop(alpha: float, unit_rows: bool, n: int, d: int) -> None:
    z = gaussian(n, d, 1)
    got = metrics.matrix_entropy(z, alpha, unit_rows=unit_rows, normalize="none").item()
    assert got == pytest.approx(numpy_entropy(z.numpy(), alpha, unit_rows), rel=1e-9)


def test_unit_rows_is_another_quantity() -> None:
    z = hidden_like(0)
    plain = metrics.matrix_entropy(z).item()
    unit = metrics.matrix_entropy(z, unit_rows=True).item()
    assert plain < 0.05 < unit  # the sink holds nearly the whole trace, but only one unit row


@pytest.mark.parametrize(("normalize", "divisor"), [("max", 5), ("rows", 5), ("dim", 7)])
def test_normalisations(normalize: str, divisor: int) -> None:
    z = gaussian(5, 7, 2)
    nats = metrics.matrix_entropy(z, normalize="none").item()
    assert metrics.matrix_entropy(z, normalize=normalize).item() == pytest.approx(nats / math.log(divisor))


def test_orders_of_entropy_decrease_and_reach_the_minimum_entropy() -> None:
    p = torch.tensor([0.5, 0.25, 0.125, 0.125])
    values = [metrics.entropy_from_spectrum(p, a).item() for a in (0.3, 1.0, 2.0, 50.0, math.inf)]
    assert values == sorted(values, reverse=True)
    assert values[1] == pytest.approx(1.75 * math.log(2))
    assert values[2] == pytest.approx(-math.log(0.25 + 0.0625 + 2 * 0.015625))
    assert values[-1] == pytest.approx(math.log(2))


def test_extreme_orders_do_not_underflow() -> None:
    p = torch.full((1000,), 1e-3, dtype=torch.float64)
    assert metrics.entropy_from_spectrum(p, 500.0).item() == pytest.approx(math.log(1000))


@pytest.mark.parametrize("side", ["left", "right", "scattered"])
@pytest.mark.parametrize("alpha", [1.0, 2.0])
def test_padding_changes_nothing(side: str, alpha: float) -> None:
    lengths = [7, 3, 10, 3]
    samples = [gaussian(t, 6, 10 + i) for i, t in enumerate(lengths)]
    alone = [metrics.matrix_entropy(z, alpha).item() for z in samples]
    batch = torch.full((4, 12, 6), math.nan, dtype=torch.float64)  # padding of any content
    mask = torch.zeros(4, 12, dtype=torch.bool)
    for i, z in enumerate(samples):
        t = len(z)
        where = {"right": range(t), "left": range(12 - t, 12), "scattered": range(i % 2, i % 2 + t)}[side]
        batch[i, list(where)] = z
        mask[i, list(where)] = True
    got = metrics.prompt_entropy(batch, mask=mask, alpha=alpha)
    assert got.tolist() == pytest.approx(alone, rel=1e-12)
    if side == "right":
        by_length = metrics.prompt_entropy(batch, lengths=torch.tensor(lengths), alpha=alpha)
        assert torch.equal(by_length, got)


def test_leading_dims_and_batch_size_change_nothing() -> None:
    z = torch.stack([gaussian(9, 5, i) for i in range(6)])
    whole = metrics.matrix_entropy(z.reshape(2, 3, 9, 5))
    assert whole.shape == (2, 3)
    single = [metrics.matrix_entropy(sample).item() for sample in z]
    assert whole.flatten().tolist() == pytest.approx(single, rel=1e-12)


def test_undefined_entropy() -> None:
    with pytest.raises(UndefinedMetricError, match="all rows are zero"):
        metrics.matrix_entropy(torch.zeros(3, 4))
    with pytest.raises(UndefinedMetricError, match="ln 1"):
        metrics.matrix_entropy(torch.ones(1, 4))
    assert metrics.matrix_entropy(torch.ones(1, 4), normalize="none").item() == 0
    batch = torch.stack([torch.eye(3), torch.zeros(3, 3), torch.eye(3), torch.eye(3)])
    got = metrics.prompt_entropy(batch, lengths=torch.tensor([3, 3, 0, 1])).tolist()
    assert got[0] == pytest.approx(1)
    assert all(math.isnan(v) for v in got[1:])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_input_is_an_error(bad: float) -> None:
    x = torch.eye(4)
    x[1, 2] = bad
    for function in (metrics.matrix_entropy, metrics.effective_rank, metrics.rank_deficiency,
                     metrics.spectral_norm, metrics.condition_number, metrics.algebraic_rank,
                     metrics.dataset_entropy, metrics.gram_spectrum):
        with pytest.raises(ValueError, match="NaN or infinity"):
            function(x)
    with pytest.raises(ValueError, match="NaN or infinity"):
        metrics.entropy_from_spectrum(x[1])


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="alpha"):
        metrics.matrix_entropy(torch.eye(3), 0.0)
    with pytest.raises(ValueError, match="normalize"):
        metrics.matrix_entropy(torch.eye(3), normalize="maximum")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="mask has shape"):
        metrics.matrix_entropy(torch.eye(3), mask=torch.ones(2, dtype=torch.bool))
    with pytest.raises(ValueError, match="not both"):
        metrics.matrix_entropy(torch.eye(3), mask=torch.ones(3, dtype=torch.bool), lengths=torch.tensor(3))
    with pytest.raises(ValueError, match="lie in"):
        metrics.matrix_entropy(torch.eye(3), lengths=torch.tensor(4))
    with pytest.raises(ValueError, match="negative"):
        metrics.entropy_from_spectrum(torch.tensor([1.0, -0.5]))
    with pytest.raises(ValueError, match="tol"):
        metrics.rank_deficiency(torch.eye(3), tol=1.0)


@pytest.mark.parametrize("sink", [0.0, 500.0, 2_000.0, 20_000.0, 1e6])
@pytest.mark.parametrize("alpha", [1.0, 2.0, 0.5])
def test_float32_equals_float64_to_1e5_also_with_one_dominating_direction(sink: float, alpha: float) -> None:
    z = torch.stack([hidden_like(i, sink=sink) for i in range(3)]).to(torch.bfloat16)
    exact = metrics.prompt_entropy(z, alpha=alpha, normalize="none")
    fast = metrics.prompt_entropy(z, alpha=alpha, normalize="none", dtype=torch.float32)
    # Orders below 1 weigh the smallest eigenvalues, where float32 has fewer digits.
    assert fast.tolist() == pytest.approx(exact.tolist(), rel=1e-5 if alpha >= 1 else 1e-3)


def test_float32_with_a_dominating_common_direction() -> None:
    z = torch.stack([hidden_like(i, sink=0.0) + shift for i, shift in enumerate((30.0, 300.0, 3000.0))])
    exact = metrics.prompt_entropy(z, normalize="none")
    assert exact.min() < 1e-3  # the case that float32 alone cannot do
    assert metrics.prompt_entropy(z, normalize="none", dtype=torch.float32).tolist() == pytest.approx(
        exact.tolist(), rel=1e-5)


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_squares_never_leave_the_range_of_float32(scale: float) -> None:
    z = gaussian(6, 5, 0, torch.float32)
    for dtype in (torch.float32, torch.float64):
        assert metrics.matrix_entropy(z * scale, dtype=dtype).item() == pytest.approx(
            metrics.matrix_entropy(z).item(), rel=1e-5)


def test_half_input_is_upcast() -> None:
    z = gaussian(6, 9, 3).to(torch.bfloat16)
    assert metrics.matrix_entropy(z).item() == metrics.matrix_entropy(z.double()).item()
    assert metrics.effective_rank(z).dtype == torch.float64


# -- ranks -------------------------------------------------------------------------------------


@pytest.mark.parametrize("energy", [False, True])
@pytest.mark.parametrize("method", ["gram", "svd"])
@pytest.mark.parametrize(("n", "d"), [(5, 8), (8, 5)])
def test_effective_rank_equals_loop(energy: bool, method: str, n: int, d: int) -> None:
    x = gaussian(n, d, 4)
    expected = numpy_effective_rank(x.numpy(), energy)
    assert metrics.effective_rank(x, energy=energy, method=method).item() == pytest.approx(expected, rel=1e-9)
    normal = metrics.effective_rank(x, energy=energy, method=method, normalize=True).item()
    assert normal == pytest.approx(expected / 5, rel=1e-9)
    centered = x.numpy() - x.numpy().mean(0)
    # Centring makes one singular value 0, which a Gram matrix only knows to sqrt(eps).
    assert metrics.effective_rank(x, energy=energy, method=method, center=True).item() == pytest.approx(
        numpy_effective_rank(centered, energy), rel=1e-6)


def test_energy_variant_is_exp_of_the_matrix_entropy() -> None:
    x = gaussian(7, 4, 5)
    assert metrics.effective_rank(x, energy=True).log().item() == pytest.approx(
        metrics.dataset_entropy(x, normalize="none").item())


@settings(derandomize=True, max_examples=40, deadline=None)
@given(shapes, st.floats(1e-6, 1e6))
def test_effective_rank_is_scale_free_and_bounded(shape: tuple[int, int, int], scale: float) -> None:
    n, d, seed = shape
    x = gaussian(n, d, seed)
    rank = metrics.effective_rank(x).item()
    assert 1 - 1e-9 <= rank <= min(n, d) + 1e-9
    assert metrics.effective_rank(x * scale).item() == pytest.approx(rank, rel=1e-9)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    assert metrics.effective_rank(x[order]).item() == pytest.approx(rank, rel=1e-9)
    entropy = metrics.dataset_entropy(x).item()
    assert metrics.dataset_entropy(x[order]).item() == pytest.approx(entropy, rel=1e-9)


def test_rank_deficiency_and_algebraic_rank() -> None:
    u, _ = torch.linalg.qr(gaussian(10, 6, 6))
    v, _ = torch.linalg.qr(gaussian(8, 6, 7))
    x = u @ torch.diag(torch.tensor([5.0, 1.0, 0.06, 0.04, 1e-10, 0.0], dtype=torch.float64)) @ v.T
    assert metrics.rank_deficiency(x).item() == pytest.approx(1 - 3 / 8)  # 0.06 is above 0.05, 0.04 below
    assert metrics.rank_deficiency(x, tol=1e-12).item() == pytest.approx(1 - 5 / 8)
    assert metrics.algebraic_rank(x).item() == 5
    assert metrics.algebraic_rank(x.float()).item() == 4  # 1e-10 is rounding in float32
    assert metrics.algebraic_rank(x, tol=0.1).item() == 2
    assert metrics.algebraic_rank(torch.zeros(3, 3)).item() == 0
    four = metrics.Spectrum(metrics.singular_values(x)[:4].square(), 10, 8)
    assert metrics.rank_deficiency_of(four).item() == pytest.approx(1 - 3 / 8)


def test_norm_and_condition_number() -> None:
    x = gaussian(6, 9, 8)
    s = np.linalg.svd(x.numpy(), compute_uv=False)
    assert metrics.spectral_norm(x).item() == pytest.approx(s[0])
    assert metrics.condition_number(x).item() == pytest.approx(s[0] / s[-1])
    assert math.isinf(metrics.condition_number(x, center=True).item())
    hard = torch.diag(torch.tensor([1.0, 1e-12], dtype=torch.float64))
    assert metrics.condition_number(hard).item() == pytest.approx(1e12, rel=1e-6)


def test_zero_matrices_are_undefined() -> None:
    zero = torch.zeros(3, 4)
    for function in (metrics.effective_rank, metrics.rank_deficiency, metrics.condition_number):
        with pytest.raises(UndefinedMetricError):
            function(zero)
        batch = function(torch.stack([zero, torch.eye(3, 4)]))
        assert math.isnan(batch[0].item())
        assert math.isfinite(batch[1].item())
    with pytest.raises(UndefinedMetricError):
        metrics.entropy_from_spectrum(torch.zeros(3))
    assert metrics.spectral_norm(zero).item() == 0


# -- one decomposition for everything ------------------------------------------------------------


@pytest.mark.parametrize(("n", "d"), [(6, 9), (9, 6)])
@pytest.mark.parametrize("center", [False, True])
def test_spectrum_rebuilds_the_gram_matrix_and_every_quantity(n: int, d: int, center: bool) -> None:
    x = gaussian(n, d, 9)
    values, vectors = metrics.gram_spectrum(x, center=center)
    assert values.shape == (min(n, d),)
    assert bool((values.diff() <= 0).all())
    centred = x - x.mean(dim=0) if center else x
    gram = centred @ centred.T
    assert torch.allclose(vectors * values @ vectors.T, gram, atol=1e-9)
    spectrum = metrics.Spectrum(values, n, d)
    assert metrics.effective_rank_of(spectrum).item() == pytest.approx(
        metrics.effective_rank(x, center=center).item(), rel=1e-6)
    if not center:
        assert metrics.entropy_of(spectrum).item() == pytest.approx(
            metrics.dataset_entropy(x).item())
        assert metrics.condition_number_of(spectrum).item() == pytest.approx(
            metrics.condition_number(x).item(), rel=1e-6)


def test_a_smallest_value_lost_in_rounding_has_no_condition_number() -> None:
    repeated = gaussian(5, 9, 1)[[0, 1, 2, 3, 4, 0]]
    spectrum = metrics.Spectrum(metrics.gram_spectrum(repeated).values, 6, 9)
    with pytest.raises(UndefinedMetricError, match="linearly dependent"):
        metrics.condition_number_of(spectrum)


def low_rank_plus_noise(n: int, d: int, seed: int) -> Tensor:
    return gaussian(n, 4, seed) * torch.tensor([6.0, 4.0, 3.0, 2.0]).double() @ gaussian(4, d, seed + 1) \
        + 0.7 * gaussian(n, d, seed + 2)


def test_first_order_spectrum_is_the_derivative() -> None:
    x = low_rank_plus_noise(30, 50, 11)
    values, vectors = metrics.gram_spectrum(x)
    direction = gaussian(1, 30, 12)[0].tanh()
    for step, tolerance in ((1e-2, 2e-3), (1e-4, 2e-7)):
        weights = 1 + step * direction
        linear = metrics.first_order_spectra(vectors, values, weights[None])[0]
        exact = metrics.gram_spectrum(x * weights.sqrt()[:, None]).values
        assert ((linear - exact).abs() / exact).max() < tolerance  # error falls with the square of the step


@pytest.mark.parametrize(("n", "d"), [(200, 60), (60, 200), (150, 150)])
def test_first_order_standard_errors_match_the_exact_bootstrap(n: int, d: int) -> None:
    x = low_rank_plus_noise(n, d, 20)
    values, vectors = metrics.gram_spectrum(x)
    rng = np.random.default_rng(0)
    weights = torch.from_numpy(rng.multinomial(n, np.full(n, 1 / n), size=200)).double()
    linear = metrics.first_order_spectra(vectors, values, weights)
    assert linear.shape == (200, min(n, d))
    gram = x @ x.T
    exact = torch.stack([torch.linalg.eigvalsh(w.sqrt()[:, None] * gram * w.sqrt()).flip(0)[:min(n, d)]
                         for w in weights]).clamp_min(0)
    for quantity in (metrics.entropy_from_spectrum,
                     lambda v: metrics.effective_rank_from_singular_values(v.sqrt(), energy=True)):
        assert quantity(linear).std().item() == pytest.approx(quantity(exact).std().item(), rel=0.35)
    assert linear.sum(1).tolist() == pytest.approx(exact.sum(1).tolist())  # the trace is linear: exact


def test_first_order_effective_rank_spread_where_rows_are_many() -> None:
    x = low_rank_plus_noise(600, 40, 30)
    values, vectors = metrics.gram_spectrum(x)
    weights = torch.from_numpy(np.random.default_rng(1).multinomial(600, np.full(600, 1 / 600), 200)).double()
    linear = metrics.effective_rank_from_singular_values(
        metrics.first_order_spectra(vectors, values, weights).sqrt())
    exact = torch.stack([metrics.effective_rank(x * w.sqrt()[:, None]) for w in weights])
    assert linear.std().item() == pytest.approx(exact.std().item(), rel=0.35)


def test_unit_weights_give_the_spectrum_itself() -> None:
    values, vectors = metrics.gram_spectrum(gaussian(12, 5, 13))
    same = metrics.first_order_spectra(vectors, values, torch.ones(2, 12))
    assert torch.allclose(same, values.expand(2, -1))
    for bad in (torch.ones(2, 11), -torch.ones(2, 12), torch.zeros(1, 12)):
        with pytest.raises(ValueError, match="weights"):
            metrics.first_order_spectra(vectors, values, bad)
