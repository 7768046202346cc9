"""Decompositions of a set of hidden states, of which entropies and ranks are made.

Token level: Z (T, d), the states of one sample, padding removed. Dataset level: X (N, d), one row per sample. The
eigenvalues of ZZ' and Z'Z agree but for zeros, so the smaller Gram side is used. One decomposition per hidden state
serves every measure of a spectrum and its bootstrap replicates (`first_order_spectra`).
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from midblock.metrics._inputs import (
    bootstrap_weights,
    features,
    floating,
    norms,
    require_finite,
    symmetric_eigenvalues,
    unit_largest_entry,
)

__all__ = ["GramSpectrum", "Spectrum", "first_order_spectra", "gram_spectrum", "singular_values", "unit_norm_rows"]

ZERO = "every singular value is 0 (all rows are zero), so the spectrum has no distribution"


class GramSpectrum(NamedTuple):
    """Eigenvalues (k), descending, and left singular vectors (n, k) of features (n, d)."""

    values: Tensor
    vectors: Tensor


class Spectrum(NamedTuple):
    """What a measure of the spectrum of features (rows, dim) needs to know."""

    values: Tensor
    """Eigenvalues of XX' (*, min(rows, dim)), any order; leading dims are bootstrap replicates."""
    rows: int
    dim: int

    @property
    def rank(self) -> int:
        """Largest possible rank, min(rows, dim)."""
        return min(self.rows, self.dim)

    @property
    def singular_values(self) -> Tensor:
        """Square roots of the eigenvalues, (*, k)."""
        return self.values.clamp_min(0).sqrt()


def unit_norm_rows(x: Tensor) -> Tensor:
    """Rows of ``x`` (*, n, d) scaled to Euclidean norm 1; zero rows stay zero.

    Example:
        >>> unit_norm_rows(torch.tensor([[3.0, 4.0], [0.0, 0.0]])).tolist()
        [[0.6000000238418579, 0.800000011920929], [0.0, 0.0]]
    """
    x = unit_largest_entry(x)  # so that squares cannot over- or underflow
    norm = norms(x, dim=-1, keepdim=True)
    return x / torch.where(norm > 0, norm, torch.ones_like(norm))


def scaled_small_gram(x: Tensor) -> tuple[Tensor, Tensor]:
    """Gram matrix of the smaller side and the factor (*, 1, 1) that ``x`` was multiplied with.

    The factor is 1 unless squares would leave the range of the dtype.
    """
    def product(y: Tensor) -> Tensor:
        return y @ y.mT if y.shape[-2] <= y.shape[-1] else y.mT @ y

    gram = product(x)
    trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)
    limit = 1e30 if x.dtype == torch.float32 else 1e280
    one = x.new_ones(*x.shape[:-2], 1, 1)
    # on an accelerator scaling costs less than asking whether it is needed
    if x.device.type == "cpu" and bool(((trace > 1 / limit) & (trace < limit)).all()):
        return gram, one
    top = x.abs().amax(dim=(-2, -1), keepdim=True)
    factor = torch.where(top > 0, 1 / top, one)
    return product(x * factor), factor


def gram_spectrum(x: Tensor, *, center: bool = False, unit_rows: bool = False,
                  dtype: torch.dtype = torch.float64) -> GramSpectrum:
    """Eigenvalues of XX' in descending order with their eigenvectors, k = min(n, d).

    The d x d side is decomposed when d < n; the vectors are then XV, scaled to norm 1.
    Ranks, entropies and `first_order_spectra` follow from the result.

    Args:
        x: Features (n, d).
        center: Subtract the mean row first.
        unit_rows: Scale each row to norm 1 first (before centring).
        dtype: Working dtype.

    Returns:
        Eigenvalues (k), clamped at 0, and eigenvectors (n, k). A vector whose eigenvalue is 0 to
        rounding is arbitrary, or 0 where d < n.

    Raises:
        ValueError: not two dims, empty, or non-finite entries.

    Example:
        >>> gram_spectrum(torch.tensor([[3.0, 0.0], [0.0, 4.0]])).values.tolist()
        [16.0, 9.0]
    """
    if x.ndim != 2:
        raise ValueError(f"x has shape {tuple(x.shape)}; gram_spectrum takes one matrix (n, d).")
    x = features(x, dtype=dtype)
    if unit_rows:
        x = unit_norm_rows(x)
    if center:
        x = x - x.mean(dim=0)
    gram, factor = scaled_small_gram(x)
    values, vectors = torch.linalg.eigh(gram)
    values, vectors = values.flip(-1).clamp_min(0), vectors.flip(-1)
    if x.shape[0] > x.shape[1]:
        vectors = (x * factor) @ vectors
        norm = norms(vectors, dim=0)
        vectors = vectors / torch.where(norm > 0, norm, torch.ones_like(norm))
    return GramSpectrum(values / factor.reshape(()).square(), vectors)


def singular_values(x: Tensor, *, center: bool = False, method: Literal["svd", "gram"] = "svd",
                    dtype: torch.dtype = torch.float64) -> Tensor:
    """Singular values of ``x`` (*, n, d) in descending order, (*, min(n, d)).

    ``gram`` (square roots of the Gram eigenvalues) is several times faster, but values below
    about sqrt(eps) * s_1 (1e-8 in float64) are noise; ``svd`` resolves down to eps * s_1.

    Raises:
        ValueError: fewer than two dims, empty, or non-finite entries.

    Example:
        >>> singular_values(torch.tensor([[3.0, 0.0], [0.0, 4.0]])).tolist()
        [4.0, 3.0]
    """
    x = features(x, dtype=dtype)
    if center:
        x = x - x.mean(dim=-2, keepdim=True)
    if method == "svd":
        exact: Tensor = torch.linalg.svdvals(x)
        return exact
    if method != "gram":
        raise ValueError(f"method {method!r}: use 'svd' or 'gram'.")
    gram, factor = scaled_small_gram(x)
    return symmetric_eigenvalues(gram).flip(-1).sqrt() / factor[..., 0]


def first_order_spectra(vectors: Tensor, values: Tensor, weights: Tensor) -> Tensor:
    """Eigenvalues of sum_i w_i x_i x_i' for many weight vectors, to first order in w - 1.

    With XX' = U diag(l) U' the derivative of eigenvalue k with respect to w_i is l_k U_ik^2
    (first-order perturbation of a symmetric matrix [1]), and sum_i U_ik^2 = 1, so

        l_k(w) = l_k * sum_i w_i U_ik^2.

    One matrix product gives all replicates where the exact bootstrap needs one decomposition
    each. Eigenvalues that cross keep their identity, which symmetric functions of the spectrum
    (entropy, effective rank) do not notice. Two uses, one limit: with bootstrap weights it
    gives standard errors; the exact bootstrap is, on top, biased towards low rank (a resample has
    only 63% distinct rows), and this linearisation is free of that. It is first order: for N
    not much larger than the effective rank its spread is an approximation (tests hold it within
    35% of the exact bootstrap's).

    For centred features give U and l of the centred matrix: moving the weighted mean changes
    the spectrum only at second order.

    Args:
        vectors: U (n, k), orthonormal columns, see `gram_spectrum`.
        values: l (k), the eigenvalues.
        weights: (B, n), non-negative; bootstrap counts (row sum n) or any weights.

    Returns:
        (B, k), unsorted, same units as ``values``.

    Raises:
        ValueError: shapes that do not fit, negative or non-finite weights, a row that sums to 0.

    Example:
        >>> u, l = torch.eye(2), torch.tensor([4.0, 1.0])
        >>> first_order_spectra(u, l, torch.tensor([[1.0, 1.0], [2.0, 0.0]])).tolist()
        [[4.0, 1.0], [8.0, 0.0]]

    References:
        [1] Kato, Perturbation Theory for Linear Operators, ch. II.
    """
    if vectors.ndim != 2 or values.shape != vectors.shape[1:]:
        raise ValueError(f"vectors {tuple(vectors.shape)} and values {tuple(values.shape)} do not fit: "
                         "expected (n, k) and (k).")
    require_finite(vectors, "vectors")
    require_finite(values, "values")
    w = bootstrap_weights(weights, vectors.shape[0], vectors.dtype)
    return values * (w @ vectors.square())


def distribution(values: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """(p, total): rows scaled to sum 1, rounding-size negatives set to 0; total 0 gives p = 0."""
    if values.ndim < 1:
        raise ValueError(f"{name} must have at least one dim (k).")
    require_finite(values, name)
    values = floating(values)
    top = values.amax(dim=-1, keepdim=True)
    tolerance = math.sqrt(torch.finfo(values.dtype).eps)
    if bool((values < -tolerance * top.clamp_min(0)).any()):
        raise ValueError(f"{name} holds negative values; a spectrum cannot.")
    values = values.clamp_min(0)
    values = values / torch.where(top > 0, top, torch.ones_like(top))
    total = values.sum(-1, keepdim=True)
    return values / torch.where(total > 0, total, torch.ones_like(total)), total[..., 0]
