"""How alike two sets of states of the same samples are (base and tuned, or two depths).

Rows correspond: row i of ``x`` and of ``y`` belong to the same sample. Undefined values raise
`UndefinedMetricError` (NaN per row, sample or replicate where many are returned); non-finite
input is a ValueError.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from midblock.errors import UndefinedMetricError
from midblock.metrics._inputs import (
    as_batch,
    bootstrap_weights,
    dots,
    features,
    in_safe_range,
    matching,
    norms,
    require_finite,
    resolve_mask,
    safe_scale,
    scalar_or_raise,
    unit_largest_entry,
    unpadded_chunks,
)

__all__ = [
    "center_gram",
    "change_intensity",
    "cka",
    "cka_bootstrap",
    "cka_debiased",
    "cka_debiased_from_grams",
    "cka_from_grams",
    "cka_jackknife",
    "cosine_similarity",
    "linear_gram",
    "mean_shift",
    "mean_shift_bootstrap",
    "row_changes",
    "token_cosine",
]

_CONSTANT = "all rows of one side are equal, so its centred Gram matrix is 0"


# ---------------------------------------------------------------------------------------------
# Centred kernel alignment
# ---------------------------------------------------------------------------------------------


def center_gram(gram: Tensor) -> Tensor:
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


def _scaled_gram(k: Tensor, name: str) -> Tensor:
    require_finite(k, name)
    k = safe_scale(k.to(torch.float64))
    return _without_rounding(center_gram(k), k)


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


def cka_from_grams(k: Tensor, l: Tensor) -> Tensor:  # noqa: E741
    """Plain linear CKA of two Gram matrices (n, n), centred or not; see `cka`.

    Raises:
        ValueError: shapes that differ or are not square, non-finite entries.
        UndefinedMetricError: a centred Gram matrix is 0.
    """
    k, l = _pair(k, l)  # noqa: E741
    return _ratio((k * l).sum(), k.square().sum(), l.square().sum(), "CKA")


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


def cka_jackknife(k: Tensor, l: Tensor) -> Tensor:  # noqa: E741
    """All n delete-one values of the debiased CKA, in O(n^2) and closed form.

    Deleting sample r from the three sums of HSIC_1 (K, L hollow; k, l their row sums):
    sum KL loses 2 (K o L 1)_r; sum k loses 2 k_r; k'l becomes
    k'l - k_r l_r - (Kl)_r - (Lk)_r + (K o L 1)_r. The jackknife standard error is
    sqrt((n-1)/n sum (v_r - mean v)^2). The bootstrap does not suit this estimator: a repeated
    row is off-diagonal similarity that the zero diagonal was meant to remove.

    Args:
        k: Gram matrix of x (n, n), n >= 5, centred or not (see `linear_gram`).
        l: Gram matrix of y.

    Returns:
        (n), float64: entry r leaves sample r out. NaN where that leaves no variation.

    Raises:
        ValueError: fewer than five samples, shapes that differ, non-finite entries.
    """
    k, l = _pair(k, l)  # noqa: E741
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


def cka_bootstrap(k: Tensor, l: Tensor, weights: Tensor, *,  # noqa: E741
                  dtype: torch.dtype = torch.float64) -> Tensor:
    """Plain CKA under many sets of sample weights, with weighted centring, by matrix products.

    With p = w / sum w the weighted HSIC is
    p'(K o L)p - 2 sum_i p_i (Kp)_i (Lp)_i + (p'Kp)(p'Lp); counts of a resample as weights give
    exactly the CKA of the resampled rows. Five (B, n) x (n, n) products serve all replicates.

    Args:
        k: Gram matrix of x (n, n), centred or not.
        l: Gram matrix of y.
        weights: (B, n), non-negative.
        dtype: Working dtype.

    Returns:
        (B); NaN for a replicate whose rows are all equal on one side.

    Raises:
        ValueError: shapes that do not fit, negative weights, non-finite entries.

    Example:
        >>> k = linear_gram(torch.tensor([[0.0], [1.0], [3.0]]))
        >>> cka_bootstrap(k, 2 * k, torch.tensor([[1.0, 1.0, 1.0], [2.0, 1.0, 0.0]])).round().tolist()
        [1.0, 1.0]
    """
    k, l = _pair(k, l)  # noqa: E741
    k, l = k.to(dtype), l.to(dtype)  # noqa: E741
    w = bootstrap_weights(weights, k.shape[0], dtype)
    p = w / w.sum(1, keepdim=True)
    pk, pl = p @ k, p @ l
    mean_k, mean_l = (pk * p).sum(1), (pl * p).sum(1)

    def hsic(product: Tensor, left: Tensor, right: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return ((p @ product) * p).sum(1) - 2 * (p * left * right).sum(1) + a * b

    own_k = hsic(k * k, pk, pk, mean_k, mean_k)
    own_l = hsic(l * l, pl, pl, mean_l, mean_l)
    cross = hsic(k * l, pk, pl, mean_k, mean_l)
    # What is left of a constant side is rounding of the sums above, of this size.
    floor = 64 * torch.finfo(dtype).eps
    defined = (own_k > floor * ((p @ (k * k)) * p).sum(1)) & (own_l > floor * ((p @ (l * l)) * p).sum(1))
    ratio = cross / (own_k.clamp_min(0).sqrt() * own_l.clamp_min(0).sqrt())
    return torch.where(defined, ratio, torch.full_like(ratio, math.nan))


# ---------------------------------------------------------------------------------------------
# Cosine, shift, intensity
# ---------------------------------------------------------------------------------------------


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    """cos of rows, NaN where one is zero; rounding beyond +-1 is cut."""
    own_a, own_b = dots(a, a), dots(b, b)
    if not (in_safe_range(own_a) and in_safe_range(own_b)):
        a, b = unit_largest_entry(a), unit_largest_entry(b)
        own_a, own_b = dots(a, a), dots(b, b)
    scale = (own_a.to(torch.float64) * own_b.to(torch.float64)).sqrt()
    return (dots(a, b).to(torch.float64) / scale).clamp(-1.0, 1.0)  # 0/0 is NaN


def cosine_similarity(x: Tensor, y: Tensor) -> Tensor:
    """Cosine of corresponding rows of two (*, n, d) tensors: (*, n), float64.

    The paper's figure is the mean over samples. NaN for a pair with a zero row.

    Raises:
        ValueError: different shapes, fewer than two dims, non-finite entries.

    Example:
        >>> cosine_similarity(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]])).item()
        0.0
    """
    matching(x, y, "x and y")
    return _cosine(features(x), features(y, "y"))


def token_cosine(za: Tensor, zb: Tensor, mask: Tensor | None = None, *,
                 lengths: Tensor | None = None) -> Tensor:
    """Mean over a sample's tokens of the cosine of corresponding states.

    Args:
        za: Hidden states (*, T, d) of one side.
        zb: The other side, same tokens.
        mask: (*, T), true for real tokens.
        lengths: (*), instead of a mask, for right padding.

    Returns:
        (*), float64, in [-1, 1]; tokens with a zero state are left out. NaN in a batch for a
        sample without any defined token.

    Raises:
        ValueError: different shapes, non-finite states.
        UndefinedMetricError: a single sample has no value.

    Example:
        >>> token_cosine(torch.eye(3), -torch.eye(3)).item()
        -1.0
    """
    matching(za, zb, "za and zb")
    batch, flat_mask, lead = as_batch(za, resolve_mask(za, mask, lengths), "za")
    other = zb.reshape(batch.shape)
    out = torch.full((batch.shape[0],), math.nan, dtype=torch.float64, device=za.device)
    for index, rows, parts in unpadded_chunks(batch, flat_mask, None, "the states", (other,)):
        if rows:
            out[index] = _cosine(parts[0], parts[1]).nanmean(-1)
    return scalar_or_raise(out.reshape(lead), bool(lead),
                           "the cosine is undefined: no token has a non-zero state on both sides.")


def row_changes(x_base: Tensor, x_sft: Tensor) -> Tensor:
    """Euclidean distance of corresponding rows, (*, n, d) twice to (*, n), float64.

    Raises:
        ValueError: different shapes, fewer than two dims, non-finite entries.
    """
    matching(x_base, x_sft, "x_base and x_sft")
    return norms(features(x_sft, "x_sft") - features(x_base, "x_base"), dim=-1)


def _base_scale(x_base: Tensor) -> Tensor:
    scale = norms(x_base.mean(dim=-2), dim=-1)
    if not bool((scale > 0).all()):
        raise UndefinedMetricError("the relative change is undefined: the mean of x_base is 0.")
    return scale


def mean_shift(x_base: Tensor, x_sft: Tensor, *, relative: bool = False) -> Tensor:
    """||mean X_sft - mean X_base||: how far the cloud's centre moved.

    Args:
        x_base: Features (*, n, d).
        x_sft: The same samples of the tuned model.
        relative: Divide by ||mean X_base||.

    Returns:
        (*), float64, in the units of the features or unitless.

    Raises:
        ValueError: different shapes, fewer than two dims, non-finite entries.
        UndefinedMetricError: ``relative`` and the mean of x_base is 0.

    Example:
        >>> mean_shift(torch.zeros(2, 2), torch.tensor([[3.0, 4.0], [3.0, 4.0]])).item()
        5.0
    """
    matching(x_base, x_sft, "x_base and x_sft")
    base, sft = features(x_base, "x_base"), features(x_sft, "x_sft")
    shift = norms((sft - base).mean(dim=-2), dim=-1)
    return shift / _base_scale(base) if relative else shift


def change_intensity(x_base: Tensor, x_sft: Tensor, *, relative: bool = False) -> Tensor:
    """Mean over samples of ||x_sft_i - x_base_i||; at least `mean_shift`.

    Args:
        x_base: Features (*, n, d).
        x_sft: The same samples of the tuned model.
        relative: Divide by ||mean X_base||.

    Returns:
        (*), float64, in the units of the features or unitless. `row_changes` has the terms.

    Raises:
        ValueError: different shapes, fewer than two dims, non-finite entries.
        UndefinedMetricError: ``relative`` and the mean of x_base is 0.

    Example:
        >>> change_intensity(torch.zeros(2, 2), torch.tensor([[3.0, 4.0], [-3.0, -4.0]])).item()
        5.0
    """
    change = row_changes(x_base, x_sft).mean(-1)
    return change / _base_scale(features(x_base)) if relative else change


def mean_shift_bootstrap(x_base: Tensor, x_sft: Tensor, weights: Tensor, *,
                         relative: bool = False) -> Tensor:
    """`mean_shift` under many sets of sample weights: norms of the rows of P(X_sft - X_base).

    Args:
        x_base: Features (n, d).
        x_sft: The same samples of the tuned model.
        weights: (B, n), non-negative; rows are scaled to sum 1 here.
        relative: Divide by the norm of the replicate's own mean of X_base.

    Returns:
        (B), float64. A norm is biased upwards by noise: replicates centre on
        sqrt(shift^2 + variance of the mean), so prefer a basic to a percentile interval near 0.

    Raises:
        ValueError: shapes that do not fit, negative weights, non-finite entries.
        UndefinedMetricError: ``relative`` and a replicate's mean of x_base is 0.

    Example:
        >>> base, sft = torch.zeros(2, 1), torch.tensor([[1.0], [3.0]])
        >>> mean_shift_bootstrap(base, sft, torch.tensor([[1.0, 1.0], [0.0, 2.0]])).tolist()
        [2.0, 3.0]
    """
    matching(x_base, x_sft, "x_base and x_sft")
    if x_base.ndim != 2:
        raise ValueError(f"x_base has shape {tuple(x_base.shape)}; expected (n, d).")
    base, sft = features(x_base, "x_base"), features(x_sft, "x_sft")
    w = bootstrap_weights(weights, base.shape[0], torch.float64)
    p = w / w.sum(1, keepdim=True)
    shift = norms(p @ (sft - base), dim=1)
    if not relative:
        return shift
    scale = norms(p @ base, dim=1)
    if not bool((scale > 0).all()):
        raise UndefinedMetricError("the relative shift is undefined: a replicate's mean of x_base is 0.")
    return shift / scale
