"""Quantities of the spectrum of a set of hidden states (DESIGN section 3).

Token level: Z (T, d), the states of one sample, padding removed. Dataset level: X (N, d),
one row per sample. The eigenvalues of ZZ' and Z'Z agree but for zeros, so the smaller Gram
side is used. Entropies are in nats. Logarithms carry no additive constant: 0 ln 0 is 0.

Undefined values (an all-zero spectrum, the entropy of one row normalised by ln 1): a call
with one matrix or one spectrum raises `UndefinedMetricError`; a batched call returns NaN for
that entry, so that one broken sample does not cost the batch. Non-finite input is always a
ValueError.

Each quantity exists twice: from features, and from a spectrum that the caller already has
(``..._from_spectrum`` takes eigenvalues of the Gram matrix, ``..._from_singular_values`` their
square roots; any leading dims), because one decomposition per hidden state serves them all
and the bootstrap replicates too (`first_order_spectra`).
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from midblock.metrics._inputs import (
    as_batch,
    bootstrap_weights,
    dots,
    features,
    floating,
    norms,
    require_finite,
    resolve_mask,
    scalar_or_raise,
    symmetric_eigenvalues,
    unit_largest_entry,
    unpadded_chunks,
)

__all__ = [
    "GramSpectrum",
    "Normalize",
    "algebraic_rank",
    "algebraic_rank_from_singular_values",
    "condition_number",
    "condition_number_from_singular_values",
    "dataset_entropy",
    "effective_rank",
    "effective_rank_from_singular_values",
    "entropy_from_spectrum",
    "first_order_spectra",
    "gram_matrix",
    "gram_spectrum",
    "matrix_entropy",
    "normalized_entropy_from_spectrum",
    "prompt_entropy",
    "rank_deficiency",
    "rank_deficiency_from_singular_values",
    "singular_values",
    "spectral_norm",
    "unit_norm_rows",
]

Normalize = Literal["max", "rows", "dim", "none"]
"""What an entropy is divided by: ln min(T, d), ln T, ln d, or nothing."""

# float32 errs by about 1e-6 nats whatever the entropy (measured up to 1.3e-6 at T = 128), so
# a sample whose sum p^2 is above this, whose entropy may be below 0.34 nats, takes float64.
_FLOAT32_PURITY_LIMIT = 0.8

_ZERO = "every singular value is 0 (all rows are zero), so the spectrum has no distribution"


class GramSpectrum(NamedTuple):
    """Eigenvalues (k), descending, and left singular vectors (n, k) of features (n, d)."""

    values: Tensor
    vectors: Tensor


# ---------------------------------------------------------------------------------------------
# Decompositions
# ---------------------------------------------------------------------------------------------


def unit_norm_rows(x: Tensor) -> Tensor:
    """Rows of ``x`` (*, n, d) scaled to Euclidean norm 1; zero rows stay zero.

    Example:
        >>> unit_norm_rows(torch.tensor([[3.0, 4.0], [0.0, 0.0]])).tolist()
        [[0.6000000238418579, 0.800000011920929], [0.0, 0.0]]
    """
    x = unit_largest_entry(x)  # so that squares cannot over- or underflow
    norm = norms(x, dim=-1, keepdim=True)
    return x / torch.where(norm > 0, norm, torch.ones_like(norm))


def gram_matrix(x: Tensor, *, dtype: torch.dtype = torch.float64, center: bool = False) -> Tensor:
    """Gram matrix XX' (*, n, n) of the rows of ``x`` (*, n, d).

    Args:
        x: Features, any floating dtype; the product runs in ``dtype``.
        dtype: torch.float64 or torch.float32.
        center: Subtract the mean row first.

    Raises:
        ValueError: fewer than two dims, empty, or non-finite entries.
    """
    x = features(x, dtype=dtype)
    if center:
        x = x - x.mean(dim=-2, keepdim=True)
    return x @ x.mT


def _scaled_small_gram(x: Tensor) -> tuple[Tensor, Tensor]:
    """Gram matrix of the smaller side and the factor (*, 1, 1) that ``x`` was multiplied with.

    The factor is 1 unless squares would leave the range of the dtype.
    """
    def product(y: Tensor) -> Tensor:
        return y @ y.mT if y.shape[-2] <= y.shape[-1] else y.mT @ y

    gram = product(x)
    trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)
    limit = 1e30 if x.dtype == torch.float32 else 1e280
    one = x.new_ones(*x.shape[:-2], 1, 1)
    if bool(((trace > 1 / limit) & (trace < limit)).all()):
        return gram, one
    top = x.abs().amax(dim=(-2, -1), keepdim=True)
    factor = torch.where(top > 0, 1 / top, one)
    return product(x * factor), factor


def gram_spectrum(x: Tensor, *, center: bool = False, unit_rows: bool = False,
                  dtype: torch.dtype = torch.float64) -> GramSpectrum:
    """Eigenvalues of XX' in descending order with their eigenvectors, k = min(n, d).

    The d x d side is decomposed when d < n; the vectors are then XV, scaled to norm 1.
    Everything of this module, and `first_order_spectra`, follows from the result.

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
    gram, factor = _scaled_small_gram(x)
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
    gram, factor = _scaled_small_gram(x)
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


# ---------------------------------------------------------------------------------------------
# Entropy
# ---------------------------------------------------------------------------------------------


def _check_alpha(alpha: float) -> None:
    if not alpha > 0:
        raise ValueError(f"alpha is {alpha}; the order of an entropy must be above 0 (inf is allowed).")


def _distribution(values: Tensor, name: str) -> tuple[Tensor, Tensor]:
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


def _renyi(p: Tensor, alpha: float) -> Tensor:
    if alpha == 1:
        terms: Tensor = torch.special.entr(p)
        return terms.sum(-1)
    if math.isinf(alpha):
        return -p.amax(-1).log()
    # The largest p is taken out so that p**alpha cannot underflow for large alpha.
    top = p.amax(-1, keepdim=True)
    ratio = p / torch.where(top > 0, top, torch.ones_like(top))
    log_sum = alpha * top[..., 0].log() + ratio.pow(alpha).sum(-1).log()
    return (log_sum / (1 - alpha)).clamp_min(0)


def entropy_from_spectrum(values: Tensor, alpha: float = 1.0) -> Tensor:
    """Renyi entropy of order ``alpha`` (nats) of spectra scaled to sum 1.

    alpha = 1: -sum p ln p; alpha = inf: -ln max p; else ln(sum p^alpha) / (1 - alpha).

    Args:
        values: Eigenvalues (*, k), need not be normalised or sorted; negatives of the size of
            rounding count as 0.
        alpha: Order, above 0.

    Returns:
        (*), in [0, ln k]. An all-zero spectrum raises for one spectrum (k), and is NaN in a batch.

    Raises:
        ValueError: alpha not above 0, empty, non-finite or clearly negative values.
        UndefinedMetricError: one spectrum was given and it is all zero.

    Example:
        >>> round(entropy_from_spectrum(torch.ones(4)).exp().item(), 4)
        4.0
    """
    _check_alpha(alpha)
    p, total = _distribution(values, "values")
    entropy = torch.where(total > 0, _renyi(p, alpha), torch.full_like(total, math.nan))
    return scalar_or_raise(entropy, values.ndim > 1, f"matrix entropy is undefined: {_ZERO}.")


def _log_count(rows: int, dim: int, normalize: Normalize) -> float:
    if normalize == "none":
        return 1.0
    counts = {"max": min(rows, dim), "rows": rows, "dim": dim}
    if normalize not in counts:
        raise ValueError(f"normalize {normalize!r}: use 'max', 'rows', 'dim' or 'none'.")
    count = counts[normalize]
    return math.log(count) if count > 1 else math.nan


def _undefined_entropy(rows: int, dim: int, normalize: Normalize) -> str:
    if math.isnan(_log_count(rows, dim, normalize)):
        return (f"entropy of {rows} x {dim} states normalised by '{normalize}' divides by ln 1; "
                "use two rows or more, or normalize='none'.")
    return f"matrix entropy is undefined: {_ZERO}."


def normalized_entropy_from_spectrum(values: Tensor, *, rows: int, dim: int, alpha: float = 1.0,
                                     normalize: Normalize = "max") -> Tensor:
    """`entropy_from_spectrum` divided by ln min(rows, dim), ln rows, ln dim, or 1.

    Args:
        values: Eigenvalues (*, k).
        rows: Rows T or N of the features that the spectrum belongs to.
        dim: Their width d.
        alpha: Order, above 0.
        normalize: See `Normalize`.

    Returns:
        (*), in [0, 1] for ``max``. Undefined entries of a batch are NaN.

    Raises:
        ValueError: as `entropy_from_spectrum`.
        UndefinedMetricError: one spectrum was given and it is all zero, or the divisor is ln 1.
    """
    entropy = entropy_from_spectrum(values, alpha) / _log_count(rows, dim, normalize)
    return scalar_or_raise(entropy, values.ndim > 1, _undefined_entropy(rows, dim, normalize))


def _unit_trace_gram(z: Tensor, unit_rows: bool) -> tuple[Tensor, Tensor]:
    """Gram matrices (g, k, k) of the smaller side with trace 1, and where they are not 0 (g)."""
    gram, _ = _scaled_small_gram(unit_norm_rows(z) if unit_rows else z)
    trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)
    return gram / torch.where(trace > 0, trace, torch.ones_like(trace))[..., None, None], trace > 0


def _gram_entropies(gram: Tensor, alpha: float, defined: Tensor) -> Tensor:
    """Entropies (g) of Gram matrices with trace 1; NaN where not ``defined``."""
    if alpha == 2:  # sum p^2 is the squared Frobenius norm: no eigenvalues needed
        entropy = -gram.square().sum(dim=(-2, -1)).log()
        entropy = entropy.clamp_min(0)
    else:
        values = symmetric_eigenvalues(gram)
        total = values.sum(-1, keepdim=True)
        entropy = _renyi(values / torch.where(total > 0, total, torch.ones_like(total)), alpha)
    return torch.where(defined, entropy, torch.full_like(entropy, math.nan)).to(torch.float64)


def _entropies(z: Tensor, alpha: float, unit_rows: bool, dtype: torch.dtype) -> Tensor:
    """Entropies (g) of unpadded (g, T, d); NaN where all is zero."""
    if dtype == torch.float64 or z.dtype == torch.float64:
        gram, defined = _unit_trace_gram(z.to(torch.float64), unit_rows)
        return _gram_entropies(gram, alpha, defined)
    z = floating(z, dtype)
    out = torch.full((z.shape[0],), math.nan, dtype=torch.float64, device=z.device)
    left = torch.arange(z.shape[0], device=z.device)

    def split(pure: Tensor) -> None:  # the pure samples are done in float64 and leave the rest
        nonlocal left
        if bool(pure.any()):
            out[left[pure]] = _entropies(z[left[pure]], alpha, unit_rows, torch.float64)
            left = left[~pure]

    if not unit_rows:  # one long row (an attention sink) shows before any product: p_1 >= its share
        rows = dots(z, z)
        split(rows.amax(-1) > math.sqrt(_FLOAT32_PURITY_LIMIT) * rows.sum(-1))
    if left.numel():
        gram, defined = _unit_trace_gram(z[left] if left.numel() < len(z) else z, unit_rows)
        pure = (gram.square().sum(dim=(-2, -1)) > _FLOAT32_PURITY_LIMIT) & defined
        split(pure)
        out[left] = _gram_entropies(gram[~pure], alpha, defined[~pure])
    return out


def matrix_entropy(x: Tensor, alpha: float = 1.0, *, unit_rows: bool = False,
                   normalize: Normalize = "max", mask: Tensor | None = None,
                   lengths: Tensor | None = None, dtype: torch.dtype = torch.float64) -> Tensor:
    """Matrix-based Renyi entropy of order ``alpha`` of each (T, d) matrix [1].

    K = ZZ' / tr(ZZ') with eigenvalues p; see `entropy_from_spectrum`. This is the paper's
    S_alpha. The earlier public code scales each row to norm 1 first: ``unit_rows=True``.
    Without it one long row (an attention sink) can hold nearly all of the trace.

    Args:
        x: Hidden states (*, T, d), any floating dtype.
        alpha: Order, above 0. 2 needs no eigenvalues and is the cheapest.
        unit_rows: Scale each row to norm 1 first (zero rows stay zero).
        normalize: ``max`` divides by ln min(T_i, d) of each sample (in [0, 1]), ``rows`` by
            ln T_i, ``dim`` by ln d, ``none`` keeps nats.
        mask: (*, T), true for real tokens; padding anywhere, with any content, changes nothing.
        lengths: (*), instead of a mask, for right padding.
        dtype: torch.float64, or torch.float32: about half the time, for alpha >= 1 equal to
            1e-5 relative (a test holds it). Samples with one dominating direction (sum p^2
            above 0.8: tiny entropies, of which float32 has too few digits) are detected from
            the Gram matrix and take float64. Orders below 1 weigh the smallest eigenvalues
            and keep about 1e-3. float64 input stays float64.

    Returns:
        (*), float64. In a batch NaN marks samples without a value: no tokens, all zero,
        or one token where the divisor is ln 1.

    Raises:
        ValueError: wrong shapes, non-finite states, alpha not above 0, unknown ``normalize``.
        UndefinedMetricError: a single (T, d) matrix has no value.

    Example:
        >>> round(matrix_entropy(torch.eye(3, 5)).item(), 6)
        1.0
        >>> states = torch.eye(3, 5).expand(2, 3, 5)
        >>> torch.round(matrix_entropy(states, lengths=torch.tensor([3, 2])), decimals=6).tolist()
        [1.0, 1.0]

    References:
        [1] Giraldo, Rao, Principe, IEEE Trans. Inf. Theory 61(1), 2015; Skean et al., ICML 2025.
    """
    _check_alpha(alpha)
    _log_count(2, 2, normalize)  # an unknown name fails before any work
    batch, flat_mask, lead = as_batch(x, resolve_mask(x, mask, lengths))
    out = torch.full((batch.shape[0],), math.nan, dtype=torch.float64, device=x.device)
    for index, rows, parts in unpadded_chunks(batch, flat_mask, None, "x"):
        if rows == 0:
            continue
        divisor = _log_count(rows, batch.shape[-1], normalize)
        if math.isnan(divisor):
            continue
        out[index] = _entropies(parts[0], alpha, unit_rows, dtype) / divisor
    result = out.reshape(lead)
    if lead:
        return result
    rows = x.shape[-2] if flat_mask is None else int(flat_mask.sum())
    return scalar_or_raise(result, False, _undefined_entropy(rows, x.shape[-1], normalize)
                           if rows else "matrix entropy is undefined: the mask leaves no token.")


def prompt_entropy(z: Tensor, mask: Tensor | None = None, *, lengths: Tensor | None = None,
                   alpha: float = 1.0, unit_rows: bool = False,
                   normalize: Normalize = "max", dtype: torch.dtype = torch.float64) -> Tensor:
    """Entropy of each sample's tokens (B); the paper's prompt entropy is its mean (eq. 2).

    Values per sample are returned so that the caller can give them an interval.

    Args:
        z: Hidden states (B, T, d), one row per token.
        mask: (B, T), true for real tokens.
        lengths: (B), instead of a mask.
        alpha: Order, above 0.
        unit_rows: The earlier code's variant.
        normalize: Paper: ``max`` (ln min(T_i, d) per sample).
        dtype: See `matrix_entropy`.

    Raises:
        ValueError: not three dims, or as `matrix_entropy`.
    """
    if z.ndim != 3:
        raise ValueError(f"z has shape {tuple(z.shape)}; prompt_entropy takes (samples, tokens, d).")
    return matrix_entropy(z, alpha, unit_rows=unit_rows, normalize=normalize, mask=mask,
                          lengths=lengths, dtype=dtype)


def dataset_entropy(x: Tensor, alpha: float = 1.0, *, unit_rows: bool = False,
                    normalize: Normalize = "max", dtype: torch.dtype = torch.float64) -> Tensor:
    """Entropy of the pooled states X (N, d), one row per sample (the paper's eq. 3).

    Raises:
        ValueError: not two dims, or as `matrix_entropy`.
        UndefinedMetricError: all zero, or one row with a divisor of ln 1.

    Example:
        >>> round(dataset_entropy(torch.eye(4), normalize="none").exp().item(), 6)
        4.0
    """
    if x.ndim != 2:
        raise ValueError(f"x has shape {tuple(x.shape)}; dataset_entropy takes one matrix (samples, d).")
    return matrix_entropy(x, alpha, unit_rows=unit_rows, normalize=normalize, dtype=dtype)


# ---------------------------------------------------------------------------------------------
# Rank and scale
# ---------------------------------------------------------------------------------------------


def effective_rank_from_singular_values(s: Tensor, *, energy: bool = False,
                                        max_rank: int | None = None) -> Tensor:
    """exp of the entropy of s / sum(s) (paper, eq. 4) or of s^2 / sum(s^2) (``energy``).

    Args:
        s: Singular values (*, k), any order.
        energy: The earlier code's variant, on squared values.
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
    p, total = _distribution(s, "s")
    if energy:
        p = p.square()
        squared = p.sum(-1, keepdim=True)
        p = p / torch.where(squared > 0, squared, torch.ones_like(squared))
    rank = torch.where(total > 0, _renyi(p, 1.0).exp(), torch.full_like(total, math.nan))
    if max_rank is not None:
        rank = rank / max_rank
    return scalar_or_raise(rank, s.ndim > 1, f"effective rank is undefined: {_ZERO}.")


def effective_rank(x: Tensor, *, energy: bool = False, center: bool = False, normalize: bool = False,
                   method: Literal["svd", "gram"] = "gram", dtype: torch.dtype = torch.float64) -> Tensor:
    """Effective rank [1]: exponential of the entropy of the normalised singular values.

    p_k = s_k / sum(s); returns exp(-sum_k p_k ln p_k), the paper's eq. 4. With
    ``energy=True`` p_k = s_k^2 / sum(s^2): another quantity, the one of the earlier code, and
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


def rank_deficiency_from_singular_values(s: Tensor, *, max_rank: int | None = None,
                                         tol: float = 0.01) -> Tensor:
    """Share of directions below ``tol`` times the largest: 1 - #{s > tol * s_1} / max_rank.

    Args:
        s: Singular values (*, k), any order.
        max_rank: min(N, d); default k.
        tol: Relative threshold in [0, 1); the paper's setting is 0.01.

    Returns:
        (*), in [0, 1). NaN in a batch where all values are 0.

    Raises:
        ValueError: tol outside [0, 1), empty or non-finite values.
        UndefinedMetricError: one all-zero spectrum.
    """
    if not 0 <= tol < 1:
        raise ValueError(f"tol is {tol}; it is relative to the largest singular value, so 0 <= tol < 1.")
    require_finite(s, "s")
    s = floating(s)
    top = s.amax(-1, keepdim=True)
    kept = (s > tol * top).sum(-1).to(s.dtype)
    share = 1 - kept / (max_rank or s.shape[-1])
    share = torch.where(top[..., 0] > 0, share, torch.full_like(share, math.nan))
    return scalar_or_raise(share, s.ndim > 1, f"rank deficiency is undefined: {_ZERO}.")


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
    return rank_deficiency_from_singular_values(s, tol=tol)


def _rank_tolerance(shape: tuple[int, int], dtype: torch.dtype) -> float:
    # Half types would give a tolerance above 1 (1000 * 0.0078): their values, once upcast, are
    # treated as float32 numbers.
    eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    return max(shape) * eps


def algebraic_rank_from_singular_values(s: Tensor, *, shape: tuple[int, int],
                                        feature_dtype: torch.dtype = torch.float32,
                                        tol: float | None = None) -> Tensor:
    """Number of singular values above ``tol`` times the largest.

    Args:
        s: Singular values (*, k).
        shape: (n, d) of the features.
        feature_dtype: Dtype in which the features were computed; sets the default ``tol``,
            max(n, d) * eps as in NumPy's ``matrix_rank``. Half types count as float32.
        tol: Relative tolerance, instead. From Gram eigenvalues nothing below about 1e-8 can
            be told from 0 (see `singular_values`).

    Returns:
        (*), int64; 0 for an all-zero spectrum.

    Raises:
        ValueError: empty or non-finite values.
    """
    require_finite(s, "s")
    relative = _rank_tolerance(shape, feature_dtype) if tol is None else tol
    return (s > relative * s.amax(-1, keepdim=True)).sum(-1)


def algebraic_rank(x: Tensor, *, tol: float | None = None, center: bool = False) -> Tensor:
    """Rank of features (*, n, d) with a tolerance scaled to their own dtype.

    Singular values come from a float64 SVD; see `algebraic_rank_from_singular_values`.

    Raises:
        ValueError: fewer than two dims, empty, or non-finite entries.

    Example:
        >>> algebraic_rank(torch.ones(5, 3)).item()
        1
    """
    s = singular_values(x, center=center, method="svd")
    return algebraic_rank_from_singular_values(s, shape=(x.shape[-2], x.shape[-1]),
                                               feature_dtype=x.dtype, tol=tol)


def spectral_norm(x: Tensor, *, center: bool = False, dtype: torch.dtype = torch.float64) -> Tensor:
    """Largest singular value of features (*, n, d), in the units of the features.

    Raises:
        ValueError: fewer than two dims, empty, or non-finite entries.

    Example:
        >>> spectral_norm(torch.diag(torch.tensor([3.0, 2.0]))).item()
        3.0
    """
    return singular_values(x, center=center, method="gram", dtype=dtype)[..., 0]


def condition_number_from_singular_values(s: Tensor, *, floor: float | None = None) -> Tensor:
    """s_1 / s_min; infinity where s_min is 0 to rounding.

    Args:
        s: Singular values (*, k), all min(n, d) of them.
        floor: s_min at or below ``floor * s_1`` counts as 0; default k * eps of the dtype of
            ``s``. Give about 1e-8 for square roots of Gram eigenvalues: below that they are noise.

    Returns:
        (*), at least 1. NaN in a batch where all values are 0.

    Raises:
        ValueError: empty or non-finite values.
        UndefinedMetricError: one all-zero spectrum.

    Example:
        >>> condition_number_from_singular_values(torch.tensor([4.0, 2.0])).item()
        2.0
    """
    require_finite(s, "s")
    s = floating(s)
    top, low = s.amax(-1), s.amin(-1)
    relative = s.shape[-1] * torch.finfo(s.dtype).eps if floor is None else floor
    ratio = torch.where(low > relative * top, top / low, torch.full_like(top, math.inf))
    ratio = torch.where(top > 0, ratio, torch.full_like(ratio, math.nan))
    return scalar_or_raise(ratio, s.ndim > 1, f"the condition number is undefined: {_ZERO}.")


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
    return condition_number_from_singular_values(
        s, floor=max(x.shape[-2:]) * torch.finfo(torch.float64).eps)
