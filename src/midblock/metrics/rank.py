"""Ranks and scale of a spectrum: how many directions a set of hidden states uses, and how long they are.

Each measure is a function of features (*, n, d); ``..._of`` takes a `Spectrum` that the caller already has, with any
leading dims (bootstrap replicates). Undefined values are as in `midblock.metrics.entropy`.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from midblock.errors import UndefinedMetricError
from midblock.metrics._inputs import floating, require_finite, scalar_or_raise
from midblock.metrics.spectrum import ZERO, Spectrum, distribution, singular_values

__all__ = ["algebraic_rank", "condition_number", "condition_number_of", "effective_rank",
           "effective_rank_from_singular_values", "effective_rank_of", "rank_deficiency", "rank_deficiency_of",
           "spectral_norm", "spectral_norm_of"]


def effective_rank_from_singular_values(s: Tensor, *, energy: bool = False,
                                        max_rank: int | None = None) -> Tensor:
    """exp of the entropy of s / sum(s) (paper, eq. 4) or of s^2 / sum(s^2) (``energy``).

    Args:
        s: Singular values (*, k), any order.
        energy: The paper code's variant, on squared values.
        max_rank: Divide by this (min(N, d)), so that samples of unequal size compare.

    Returns:
        (*), in [1, k] (or divided by ``max_rank``). NaN in a batch where all values are 0.

    Raises:
        ValueError: empty, non-finite or negative values.
        UndefinedMetricError: one all-zero spectrum.

    Example:
        >>> round(effective_rank_from_singular_values(torch.ones(3)).item(), 6)
        3.0
    """
    p, total = distribution(s, "s")
    if energy:
        p = p.square()
        squared = p.sum(-1, keepdim=True)
        p = p / torch.where(squared > 0, squared, torch.ones_like(squared))
    rank = torch.where(total > 0, torch.special.entr(p).sum(-1).exp(), torch.full_like(total, math.nan))
    if max_rank is not None:
        rank = rank / max_rank
    return scalar_or_raise(rank, s.ndim > 1, f"effective rank is undefined: {ZERO}.")


def effective_rank_of(spectrum: Spectrum, *, energy: bool = False, normalize: bool = False) -> Tensor:
    """`effective_rank` of a spectrum, (*).

    Example:
        >>> round(effective_rank_of(Spectrum(torch.ones(3), rows=3, dim=6), normalize=True).item(), 6)
        1.0
    """
    return effective_rank_from_singular_values(spectrum.singular_values, energy=energy,
                                               max_rank=spectrum.rank if normalize else None)


def effective_rank(x: Tensor, *, energy: bool = False, center: bool = False, normalize: bool = False,
                   method: Literal["svd", "gram"] = "gram", dtype: torch.dtype = torch.float64) -> Tensor:
    """Effective rank [1]: exponential of the entropy of the normalised singular values.

    p_k = s_k / sum(s); returns exp(-sum_k p_k ln p_k), the paper's eq. 4. With
    ``energy=True`` p_k = s_k^2 / sum(s^2): another quantity, the one of the paper's code, and
    exp of `matrix_entropy` in nats.

    Args:
        x: Features (*, n, d), one row per sample.
        energy: Use squared singular values.
        center: Subtract the mean row first (the paper does not).
        normalize: Divide by min(n, d).
        method: ``gram`` or ``svd``, see `singular_values`; they agree to about 1e-6 relative.
        dtype: Working dtype.

    Returns:
        (*), unitless, in [1, min(n, d)]. Compare only at equal n. NaN marks all-zero entries
        of a batch.

    Raises:
        ValueError: fewer than two dims, empty, or non-finite entries.
        UndefinedMetricError: one matrix whose singular values are all 0.

    Example:
        >>> round(effective_rank(torch.eye(4)).item(), 4)
        4.0

    References:
        [1] Roy & Vetterli, EUSIPCO 2007.
    """
    s = singular_values(x, center=center, method=method, dtype=dtype)
    return effective_rank_from_singular_values(
        s, energy=energy, max_rank=min(x.shape[-2:]) if normalize else None)


def rank_deficiency_of(spectrum: Spectrum, *, tol: float = 0.01) -> Tensor:
    """Share of directions below ``tol`` times the largest: 1 - #{s > tol * s_1} / min(rows, dim).

    Args:
        spectrum: Eigenvalues (*, k) with the shape of the features.
        tol: Relative threshold in [0, 1); the paper's setting is 0.01.

    Returns:
        (*), in [0, 1). NaN in a batch where all values are 0.

    Raises:
        ValueError: tol outside [0, 1), empty or non-finite values.
        UndefinedMetricError: one all-zero spectrum.
    """
    if not 0 <= tol < 1:
        raise ValueError(f"tol is {tol}; it is relative to the largest singular value, so 0 <= tol < 1.")
    require_finite(spectrum.values, "values")
    s = floating(spectrum.singular_values)
    top = s.amax(-1, keepdim=True)
    kept = (s > tol * top).sum(-1).to(s.dtype)
    share = torch.where(top[..., 0] > 0, 1 - kept / spectrum.rank, torch.full_like(kept, math.nan))
    return scalar_or_raise(share, s.ndim > 1, f"rank deficiency is undefined: {ZERO}.")


def rank_deficiency(x: Tensor, *, tol: float = 0.01, center: bool = False,
                    dtype: torch.dtype = torch.float64) -> Tensor:
    """1 - #{s > tol * s_1} / min(n, d) of features (*, n, d).

    Raises:
        ValueError: wrong shape, non-finite entries, or tol outside [0, 1).
        UndefinedMetricError: one all-zero matrix (NaN in a batch).

    Example:
        >>> rank_deficiency(torch.diag(torch.tensor([1.0, 1.0, 0.001, 0.0]))).item()
        0.5
    """
    method: Literal["svd", "gram"] = "gram" if tol >= 1e-6 and dtype == torch.float64 else "svd"
    s = singular_values(x, center=center, method=method, dtype=dtype)
    return rank_deficiency_of(Spectrum(s.square(), *x.shape[-2:]), tol=tol)


def algebraic_rank(x: Tensor, *, tol: float | None = None, center: bool = False) -> Tensor:
    """Number of singular values of features (*, n, d) above ``tol`` times the largest: (*), int64; 0 for zeros.

    Args:
        x: Features; singular values come from a float64 SVD.
        tol: Default max(n, d) * eps of the features' own dtype, as in NumPy's ``matrix_rank``. Half types count as
            float32: their own eps would give a tolerance above 1 (1000 * 0.0078).
        center: Subtract the mean row first.

    Raises:
        ValueError: fewer than two dims, empty, or non-finite entries.

    Example:
        >>> algebraic_rank(torch.ones(5, 3)).item()
        1
    """
    s = singular_values(x, center=center, method="svd")
    eps = torch.finfo(torch.float64 if x.dtype == torch.float64 else torch.float32).eps
    return (s > (max(x.shape[-2:]) * eps if tol is None else tol) * s.amax(-1, keepdim=True)).sum(-1)


def spectral_norm_of(spectrum: Spectrum) -> Tensor:
    """Largest singular value of a spectrum, (*), in the units of the features."""
    return spectrum.singular_values.amax(-1)


def spectral_norm(x: Tensor, *, center: bool = False, dtype: torch.dtype = torch.float64) -> Tensor:
    """Largest singular value of features (*, n, d), in the units of the features.

    Raises:
        ValueError: fewer than two dims, empty, or non-finite entries.

    Example:
        >>> spectral_norm(torch.diag(torch.tensor([3.0, 2.0]))).item()
        3.0
    """
    return singular_values(x, center=center, method="gram", dtype=dtype)[..., 0]


def condition_number_of(spectrum: Spectrum, *, floor: float | None = None) -> Tensor:
    """s_1 / s_min; infinity where s_min is 0 to rounding.

    Args:
        spectrum: Eigenvalues (*, k), all min(n, d) of them.
        floor: s_min at or below ``floor * s_1`` counts as 0. Default: the square root of the dtype's eps, below which
            square roots of Gram eigenvalues are noise.

    Returns:
        (*), at least 1. NaN in a batch where all values are 0.

    Raises:
        ValueError: empty or non-finite values.
        UndefinedMetricError: one all-zero spectrum, or one whose smallest value cannot be told from 0.

    Example:
        >>> condition_number_of(Spectrum(torch.tensor([16.0, 4.0]), rows=2, dim=2)).item()
        2.0
    """
    require_finite(spectrum.values, "values")
    s = spectrum.singular_values
    ratio = _ratio_of_ends(s, math.sqrt(torch.finfo(s.dtype).eps) if floor is None else floor)
    ratio = scalar_or_raise(ratio, s.ndim > 1, f"the condition number is undefined: {ZERO}.")
    if s.ndim == 1 and bool(ratio.isinf()):
        raise UndefinedMetricError("the condition number is undefined: the smallest singular value is zero to working "
                                   "precision (repeated or linearly dependent samples).")
    return ratio


def _ratio_of_ends(s: Tensor, floor: float) -> Tensor:
    top, low = s.amax(-1), s.amin(-1)
    ratio = torch.where(low > floor * top, top / low, torch.full_like(top, math.inf))
    return torch.where(top > 0, ratio, torch.full_like(ratio, math.nan))


def condition_number(x: Tensor, *, center: bool = False) -> Tensor:
    """Ratio of the largest to the smallest of the min(n, d) singular values of (*, n, d).

    From a float64 SVD, because small singular values are what it is about. Infinity for a
    matrix that is singular to rounding (centred features with n <= d always are).

    Raises:
        ValueError: fewer than two dims, empty, or non-finite entries.
        UndefinedMetricError: one all-zero matrix (NaN in a batch).

    Example:
        >>> condition_number(torch.diag(torch.tensor([3.0, 1.5]))).item()
        2.0
    """
    s = singular_values(x, center=center, method="svd")
    ratio = _ratio_of_ends(s, max(x.shape[-2:]) * torch.finfo(torch.float64).eps)
    return scalar_or_raise(ratio, x.ndim > 2, f"the condition number is undefined: {ZERO}.")
