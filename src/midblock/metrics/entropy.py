"""Matrix-based entropies, in nats or as a share of the largest possible.

Logarithms carry no additive constant: 0 ln 0 is 0. Undefined values (an all-zero spectrum, the entropy of one row
normalised by ln 1): a call with one matrix or one spectrum raises `UndefinedMetricError`; a batched call returns NaN
for that entry, so that one broken sample does not cost the batch. Non-finite input is always a ValueError.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from midblock.metrics._inputs import (
    as_batch,
    dots,
    floating,
    resolve_mask,
    scalar_or_raise,
    symmetric_eigenvalues,
    unpadded_chunks,
)
from midblock.metrics.spectrum import ZERO, Spectrum, distribution, scaled_small_gram, unit_norm_rows

__all__ = ["Normalize", "dataset_entropy", "entropy_from_spectrum", "entropy_of", "matrix_entropy", "prompt_entropy"]

Normalize = Literal["max", "rows", "dim", "none"]
"""What an entropy is divided by: ln min(T, d), ln T, ln d, or nothing."""

# float32 errs by about 1e-6 nats whatever the entropy (measured up to 1.3e-6 at T = 128), so
# a sample whose sum p^2 is above this, whose entropy may be below 0.34 nats, takes float64.
_FLOAT32_PURITY_LIMIT = 0.8


def check_alpha(alpha: float) -> None:
    """Refuse an order of an entropy that is not above 0.

    Raises:
        ValueError: it is 0, negative or NaN.
    """
    if not alpha > 0:
        raise ValueError(f"alpha is {alpha}; the order of an entropy must be above 0 (inf is allowed).")


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
    check_alpha(alpha)
    p, total = distribution(values, "values")
    entropy = torch.where(total > 0, _renyi(p, alpha), torch.full_like(total, math.nan))
    return scalar_or_raise(entropy, values.ndim > 1, f"matrix entropy is undefined: {ZERO}.")


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
    return f"matrix entropy is undefined: {ZERO}."


def entropy_of(spectrum: Spectrum, *, alpha: float = 1.0, normalize: Normalize = "max") -> Tensor:
    """`entropy_from_spectrum` divided by ln min(rows, dim), ln rows, ln dim, or 1.

    Args:
        spectrum: Eigenvalues (*, k) with the shape of the features.
        alpha: Order, above 0.
        normalize: See `Normalize`.

    Returns:
        (*), in [0, 1] for ``max``. Undefined entries of a batch are NaN.

    Raises:
        ValueError: as `entropy_from_spectrum`.
        UndefinedMetricError: one spectrum was given and it is all zero, or the divisor is ln 1.
    """
    values, rows, dim = spectrum
    entropy = entropy_from_spectrum(values, alpha) / _log_count(rows, dim, normalize)
    return scalar_or_raise(entropy, values.ndim > 1, _undefined_entropy(rows, dim, normalize))


def _unit_trace_gram(z: Tensor, unit_rows: bool) -> tuple[Tensor, Tensor]:
    """Gram matrices (g, k, k) of the smaller side with trace 1, and where they are not 0 (g)."""
    gram, _ = scaled_small_gram(unit_norm_rows(z) if unit_rows else z)
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
    # which samples need float64 cannot be asked of an accelerator without waiting for it
    if torch.float64 in (dtype, z.dtype) or z.device.type != "cpu":
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
    S_alpha. The paper's public code scales each row to norm 1 first: ``unit_rows=True``.
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
    check_alpha(alpha)
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
        unit_rows: The paper code's variant.
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
