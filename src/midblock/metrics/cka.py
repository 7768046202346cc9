"""Centred kernel alignment: how alike the geometry of two sets of states of the same samples is.

Row i of ``x`` and of ``y`` belong to the same sample. Undefined values raise `UndefinedMetricError` (NaN per replicate
where many are returned); non-finite input is a ValueError.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from midblock.errors import UndefinedMetricError
from midblock.metrics._inputs import bootstrap_weights, features, matching, require_finite, safe_scale

__all__ = ["cka", "cka_bootstrap", "cka_debiased", "cka_debiased_from_grams", "cka_debiased_jackknife", "linear_gram"]

_CONSTANT = "all rows of one side are equal, so its centred Gram matrix is 0"


def _center_gram(gram: Tensor) -> Tensor:
    """HKH with H = I - 11'/n: the Gram matrix (*, n, n) of centred rows."""
    gram = gram - gram.mean(dim=-1, keepdim=True)
    return gram - gram.mean(dim=-2, keepdim=True)


def linear_gram(x: Tensor, *, dtype: torch.dtype = torch.float64) -> Tensor:
    """Gram matrix (*, n, n) of centred features (*, n, d), scaled to a largest entry near 1.

    The scale of a Gram matrix cancels in every CKA; features are centred before the product,
    which loses fewer digits than centring the matrix when the mean dominates.

    Raises:
        ValueError: fewer than two dims, empty, or non-finite entries.
    """
    x = _centered(features(x, dtype=dtype))
    return x @ x.mT


def _centered(x: Tensor) -> Tensor:
    """Centred rows, scaled to a largest entry of 1; exactly 0 where only rounding was left."""
    x = safe_scale(x)
    centered = x - x.mean(dim=-2, keepdim=True)
    return safe_scale(_without_rounding(centered, x))


def _without_rounding(centered: Tensor, original: Tensor) -> Tensor:
    limit = 8 * torch.finfo(original.dtype).eps * original.abs().amax(dim=(-2, -1), keepdim=True)
    varies = centered.abs().amax(dim=(-2, -1), keepdim=True) > limit
    return torch.where(varies, centered, torch.zeros_like(centered))


def _pair(k: Tensor, l: Tensor) -> tuple[Tensor, Tensor]:  # noqa: E741
    matching(k, l, "the two Gram matrices")
    if k.ndim != 2 or k.shape[0] != k.shape[1]:
        raise ValueError(f"Gram matrices have shape {tuple(k.shape)}; expected (n, n).")
    return _scaled_gram(k, "K"), _scaled_gram(l, "L")


def _grams(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    _same_samples(x, y)
    return linear_gram(x), linear_gram(y)


def _scaled_gram(k: Tensor, name: str) -> Tensor:
    require_finite(k, name)
    k = safe_scale(k.to(torch.float64))
    return _without_rounding(_center_gram(k), k)


def _same_samples(x: Tensor, y: Tensor) -> None:
    if x.ndim != 2 or y.ndim != 2 or x.shape[0] != y.shape[0]:
        raise ValueError(f"x {tuple(x.shape)} and y {tuple(y.shape)} must be (n, d1) and (n, d2): "
                         "one row per sample, the same samples in the same order.")


def _ratio(cross: Tensor, own_x: Tensor, own_y: Tensor, what: str) -> Tensor:
    scale = own_x.sqrt() * own_y.sqrt()
    if not bool(scale > 0):
        raise UndefinedMetricError(f"{what} is undefined: {_CONSTANT}.")
    return cross / scale


def _centered_features(x: Tensor, name: str, what: str) -> Tensor:
    centered = _centered(features(x, name))
    if not bool(centered.any()):
        raise UndefinedMetricError(f"{what} is undefined: {_CONSTANT} ({name}).")
    return centered


def cka(x: Tensor, y: Tensor) -> Tensor:
    """Plain linear CKA, <HKH, HLH> / (||HKH|| ||HLH||) (paper, eq. 6) [1].

    BIASED towards 1 when n is not much larger than d: 200 independent Gaussian rows score 0.50
    at d = 200 and 0.95 at d = 4096. Report `cka_debiased` beside it.

    Args:
        x: Features (n, d1), one row per sample.
        y: Features (n, d2), the same samples.

    Returns:
        (), float64, in [0, 1]; invariant to rotation, shift and isotropic scale of either side.

    Raises:
        ValueError: different samples, not two dims, non-finite entries.
        UndefinedMetricError: all rows of one side are equal.

    Example:
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
        >>> round(cka(x, 3 * x + 1).item(), 6)
        1.0

    References:
        [1] Kornblith et al., ICML 2019.
    """
    _same_samples(x, y)
    x, y = _centered_features(x, "x", "CKA"), _centered_features(y, "y", "CKA")
    if x.shape[0] <= max(x.shape[1], y.shape[1]):
        k, l = x @ x.T, y @ y.T  # noqa: E741
        return _ratio((k * l).sum(), k.square().sum(), l.square().sum(), "CKA")
    # <XX', YY'> = ||X'Y||^2: d x d products when rows are many.
    return _ratio((x.T @ y).square().sum(), (x.T @ x).square().sum(), (y.T @ y).square().sum(), "CKA")


def _hsic1(k: Tensor, l: Tensor) -> Tensor:  # noqa: E741
    """Unbiased HSIC of zero-diagonal Gram matrices, Song et al. (2012), eq. 5."""
    n = k.shape[0]
    rows_k, rows_l = k.sum(1), l.sum(1)
    return ((k * l).sum() + rows_k.sum() * rows_l.sum() / ((n - 1) * (n - 2))
            - 2 * (rows_k @ rows_l) / (n - 2)) / (n * (n - 3))


def _hollow(k: Tensor) -> Tensor:
    return k.clone().fill_diagonal_(0)


def cka_debiased_from_grams(k: Tensor, l: Tensor) -> Tensor:  # noqa: E741
    """Debiased linear CKA of two Gram matrices (n, n), centred or not, n >= 4; see `cka_debiased`.

    Raises:
        ValueError: fewer than four samples, shapes that differ, non-finite entries.
        UndefinedMetricError: the unbiased self-similarity of one side is not above 0.
    """
    k, l = _pair(k, l)  # noqa: E741
    if k.shape[0] < 4:
        raise ValueError(f"debiased CKA needs at least 4 samples, got {k.shape[0]}.")
    k, l = _hollow(k), _hollow(l)  # noqa: E741
    own_k, own_l = _hsic1(k, k), _hsic1(l, l)
    eps = 1e-14
    if not (bool(own_k > eps * k.square().mean()) and bool(own_l > eps * l.square().mean())):
        raise UndefinedMetricError("debiased CKA is undefined: the unbiased self-similarity of one side is "
                                   "0 (all rows equal, or too few samples).")
    return _ratio(_hsic1(k, l), own_k, own_l, "debiased CKA")


def cka_debiased(x: Tensor, y: Tensor) -> Tensor:
    """Linear CKA with the unbiased HSIC_1 [1] in numerator and denominator [2].

    HSIC_1 = [tr(K~L~) + 1'K~1 1'L~1 / ((n-1)(n-2)) - 2/(n-2) 1'K~L~1] / (n(n-3)), K~ and L~
    with zero diagonal. Near 0 for independent features whatever d, and may be slightly
    negative; equal to `cka` in the limit of many samples.

    Args:
        x: Features (n, d1), n >= 4.
        y: Features (n, d2), the same samples.

    Returns:
        (), float64, in [-1, 1].

    Raises:
        ValueError: fewer than four samples, different samples, non-finite entries.
        UndefinedMetricError: all rows of one side are equal.

    Example:
        >>> x = torch.randn(50, 100, generator=torch.Generator().manual_seed(0))
        >>> y = torch.randn(50, 100, generator=torch.Generator().manual_seed(1))
        >>> abs(cka_debiased(x, y).item()) < 0.1 < cka(x, y).item()
        True

    References:
        [1] Song et al., JMLR 13, 2012. [2] Nguyen, Raghu, Kornblith, ICLR 2021.
    """
    _same_samples(x, y)
    x = _centered_features(x, "x", "debiased CKA")
    y = _centered_features(y, "y", "debiased CKA")
    return cka_debiased_from_grams(x @ x.T, y @ y.T)


def cka_debiased_jackknife(x: Tensor, y: Tensor) -> Tensor:
    """All n delete-one values of the debiased CKA, in O(n^2) and closed form.

    Deleting sample r from the three sums of HSIC_1 (K, L hollow; k, l their row sums):
    sum KL loses 2 (K o L 1)_r; sum k loses 2 k_r; k'l becomes
    k'l - k_r l_r - (Kl)_r - (Lk)_r + (K o L 1)_r. The jackknife standard error is
    sqrt((n-1)/n sum (v_r - mean v)^2). The bootstrap does not suit this estimator: a repeated
    row is off-diagonal similarity that the zero diagonal was meant to remove.

    Args:
        x: Features (n, d1), n >= 5.
        y: Features (n, d2), the same samples.

    Returns:
        (n), float64: entry r leaves sample r out. NaN where that leaves no variation.

    Raises:
        ValueError: fewer than five samples, shapes that differ, non-finite entries.
    """
    k, l = _grams(x, y)  # noqa: E741
    n = k.shape[0]
    if n < 5:
        raise ValueError(f"the jackknife of debiased CKA needs at least 5 samples, got {n}.")
    k, l = _hollow(k), _hollow(l)  # noqa: E741
    m = n - 1

    def deleted(a: Tensor, b: Tensor) -> Tensor:
        rows_a, rows_b = a.sum(1), b.sum(1)
        both = (a * b).sum(1)
        total = both.sum() - 2 * both
        sums = (rows_a.sum() - 2 * rows_a) * (rows_b.sum() - 2 * rows_b)
        inner = rows_a @ rows_b - rows_a * rows_b - a @ rows_b - b @ rows_a + both
        return (total + sums / ((m - 1) * (m - 2)) - 2 * inner / (m - 2)) / (m * (m - 3))

    own_k, own_l = deleted(k, k), deleted(l, l)
    defined = (own_k > 1e-14 * k.square().mean()) & (own_l > 1e-14 * l.square().mean())
    nan = torch.full_like(own_k, math.nan)
    return torch.where(defined, deleted(k, l) / (own_k.clamp_min(0).sqrt() * own_l.clamp_min(0).sqrt()), nan)


def cka_bootstrap(x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
    """Plain CKA under many sets of sample weights, with weighted centring, by matrix products.

    With p = w / sum w the weighted HSIC is
    p'(K o L)p - 2 sum_i p_i (Kp)_i (Lp)_i + (p'Kp)(p'Lp); counts of a resample as weights give
    exactly the CKA of the resampled rows. Five (B, n) x (n, n) products serve all replicates.

    Args:
        x: Features (n, d1), one row per sample.
        y: Features (n, d2), the same samples.
        weights: (B, n), non-negative.

    Returns:
        (B); NaN for a replicate whose rows are all equal on one side.

    Raises:
        ValueError: shapes that do not fit, negative weights, non-finite entries.

    Example:
        >>> x = torch.tensor([[0.0], [1.0], [3.0]])
        >>> cka_bootstrap(x, 2 * x, torch.tensor([[1.0, 1.0, 1.0], [2.0, 1.0, 0.0]])).round().tolist()
        [1.0, 1.0]
    """
    k, l = _grams(x, y)  # noqa: E741
    w = bootstrap_weights(weights, k.shape[0], k.dtype)
    p = w / w.sum(1, keepdim=True)
    pk, pl = p @ k, p @ l
    mean_k, mean_l = (pk * p).sum(1), (pl * p).sum(1)

    def hsic(product: Tensor, left: Tensor, right: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return ((p @ product) * p).sum(1) - 2 * (p * left * right).sum(1) + a * b

    own_k = hsic(k * k, pk, pk, mean_k, mean_k)
    own_l = hsic(l * l, pl, pl, mean_l, mean_l)
    cross = hsic(k * l, pk, pl, mean_k, mean_l)
    # What is left of a constant side is rounding of the sums above, of this size.
    floor = 64 * torch.finfo(k.dtype).eps
    defined = (own_k > floor * ((p @ (k * k)) * p).sum(1)) & (own_l > floor * ((p @ (l * l)) * p).sum(1))
    ratio = cross / (own_k.clamp_min(0).sqrt() * own_l.clamp_min(0).sqrt())
    return torch.where(defined, ratio, torch.full_like(ratio, math.nan))
