"""Shape of the trajectory of a sample's tokens, and of the cloud of pooled states.

Undefined values raise `UndefinedMetricError` where one matrix was given and are NaN per
sample in a batch; non-finite input is always a ValueError (as in `entropy`).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from midblock.errors import UndefinedMetricError
from midblock.metrics._inputs import (
    as_batch,
    bootstrap_weights,
    features,
    floating,
    in_safe_range,
    norms,
    require_finite,
    resolve_mask,
    scalar_or_raise,
    unit_largest_entry,
    unpadded_chunks,
)

__all__ = [
    "curvature",
    "gini_rows",
    "intrinsic_dimension",
    "intrinsic_dimension_bootstrap",
    "intrinsic_dimension_from_log_ratios",
    "row_norms",
    "sparsity",
    "two_nn_log_ratios",
]

_FIT_SHARE = 0.9
"""Share of the smallest ratios that the linear TwoNN fit uses (Facco et al. drop the top 10%)."""


def sparsity(z: Tensor, eps: float = 0.01, *, relative: bool = False, mask: Tensor | None = None,
             lengths: Tensor | None = None) -> Tensor:
    """Share of entries of each (T, d) matrix with an absolute value below ``eps``.

    The paper counts |h| < eps, but its text does not state eps; 0.01 is this function's choice.
    The paper's public code uses 0.01 times the largest absolute entry: ``relative=True``.
    The two differ by orders of magnitude, so name the variant beside every figure. The
    absolute one depends on the scale of the states, which grows with depth.

    Args:
        z: Hidden states (*, T, d); also pooled states (N, d).
        eps: Threshold, above 0, absolute or relative.
        relative: Multiply eps by the largest absolute entry of each sample.
        mask: (*, T), true for real tokens.
        lengths: (*), instead of a mask, for right padding.

    Returns:
        (*), float64, in [0, 1]. NaN in a batch: no tokens, or all zero with ``relative``.

    Raises:
        ValueError: eps not above 0, wrong shapes, non-finite states.
        UndefinedMetricError: a single matrix has no value.

    Example:
        >>> sparsity(torch.tensor([[0.0, 1.0], [0.005, -3.0]])).item()
        0.5
    """
    if not (eps > 0 and math.isfinite(eps)):
        raise ValueError(f"eps is {eps}; it must be a finite number above 0.")
    batch, flat_mask, lead = as_batch(z, resolve_mask(z, mask, lengths), "z")
    out = torch.full((batch.shape[0],), math.nan, dtype=torch.float64, device=z.device)
    for index, rows, parts in unpadded_chunks(batch, flat_mask, None, "z"):
        if rows == 0:
            continue
        size = parts[0].abs()
        if relative:
            top = size.amax(dim=(-2, -1), keepdim=True)
            share = (size < eps * top).sum(dim=(-2, -1)).to(torch.float64) / (rows * z.shape[-1])
            out[index] = torch.where(top[:, 0, 0] > 0, share, torch.full_like(share, math.nan))
        else:
            out[index] = (size < eps).sum(dim=(-2, -1)).to(torch.float64) / (rows * z.shape[-1])
    return scalar_or_raise(out.reshape(lead), bool(lead), "sparsity is undefined: no tokens, or all "
                           "entries are 0 and the threshold is relative to the largest.")


def curvature(z: Tensor, mask: Tensor | None = None, *, lengths: Tensor | None = None) -> Tensor:
    """Mean angle between consecutive differences of a token trajectory, divided by pi.

    v_t = z_{t+1} - z_t; the angle of v_t and v_{t+1} is 2 atan2(|u - w|, |u + w|) of their unit
    vectors u, w [1], which is exact at 0 and pi, where arccos loses half the digits; nothing
    is clamped. The paper code clamps the cosine to +-0.999, so that a straight line scores
    0.014 there and 0 here. A difference of length 0 (two equal states in a row) has no angle:
    the pairs it belongs to are left out of the mean.

    Args:
        z: Hidden states (*, T, d).
        mask: (*, T), true for real tokens; differences never reach into padding.
        lengths: (*), instead of a mask, for right padding.

    Returns:
        (*), float64, in [0, 1]: 0 straight, 0.5 right angles, 1 turning back. NaN in a batch
        for samples with fewer than three tokens or without a defined angle.

    Raises:
        ValueError: wrong shapes or non-finite states.
        UndefinedMetricError: a single trajectory has no value.

    Example:
        >>> curvature(torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0]])).item()
        0.5

    References:
        [1] Kahan, How Futile are Mindless Assessments of Roundoff, section 12, 2006.
    """
    batch, flat_mask, lead = as_batch(z, resolve_mask(z, mask, lengths), "z")
    out = torch.full((batch.shape[0],), math.nan, dtype=torch.float64, device=z.device)
    for index, rows, parts in unpadded_chunks(batch, flat_mask, None, "z"):
        if rows < 3:
            continue
        step = parts[0].diff(dim=-2)
        norm = norms(step, keepdim=True)
        if not in_safe_range(norm.square()):
            step = unit_largest_entry(step)
            norm = norms(step, keepdim=True)
        moved = norm[..., 0] > 0
        step = step / torch.where(norm > 0, norm, torch.ones_like(norm))
        before, after = step[:, :-1], step[:, 1:]
        angle = 2 * torch.atan2(norms(after - before).to(torch.float64),
                                norms(after + before).to(torch.float64))
        defined = moved[:, :-1] & moved[:, 1:]
        total = torch.where(defined, angle, torch.zeros_like(angle)).sum(-1)
        out[index] = total / defined.sum(-1) / math.pi  # 0/0 is NaN: no defined angle
    return scalar_or_raise(out.reshape(lead), bool(lead), "curvature is undefined: it needs three "
                           "tokens and two consecutive differences that are not 0.")


def row_norms(x: Tensor) -> Tensor:
    """Euclidean norm of each row of ``x`` (*, n, d): (*, n), float64.

    Raises:
        ValueError: fewer than two dims, empty, or non-finite entries.
    """
    return norms(features(x), dim=-1)


def gini_rows(x: Tensor) -> Tensor:
    """Gini coefficient of the absolute entries of each row of ``x`` (*, n, d): (*, n).

    With a_(1) <= ... <= a_(d): sum_i (2i - d - 1) a_(i) / (d sum a). 0 when all entries are
    equally large, (d - 1)/d when one holds everything. NaN for an all-zero row.

    Raises:
        ValueError: fewer than two dims, empty, or non-finite entries.
    """
    require_finite(x, "x")
    if x.ndim < 2:
        raise ValueError(f"x has shape {tuple(x.shape)}; features need at least two dims (n, d).")
    size = floating(x).abs()
    top = size.amax(-1, keepdim=True)
    size = (size / torch.where(top > 0, top, torch.ones_like(top))).sort(-1).values.to(torch.float64)
    d = x.shape[-1]
    rank = 2 * torch.arange(1, d + 1, dtype=torch.float64, device=x.device) - d - 1
    return (size @ rank) / (d * size.sum(-1))  # 0/0 is NaN: an all-zero row


def intrinsic_dimension_from_log_ratios(log_ratios: Tensor, weights: Tensor | None = None) -> Tensor:
    """TwoNN maximum likelihood from ln mu per row: sum w / sum(w ln mu).

    Under the model ln mu is exponential with rate d, so that for n rows the relative standard
    error is 1/sqrt(n) (and sum ln mu is Gamma(n, d) exactly). With bootstrap weights this
    resamples the ratios and keeps the neighbours: resampled rows themselves would be their own
    nearest neighbours.

    Args:
        log_ratios: ln(r2 / r1) (n); NaN entries are left out.
        weights: (B, n) replicate weights; None for the estimate itself.

    Returns:
        () or (B), float64; infinity in a replicate whose ratios are all 1.

    Raises:
        ValueError: negative or infinite ratios, weights that do not fit.
        UndefinedMetricError: no ratio is left, or all are 1 (no weights given).

    Example:
        >>> intrinsic_dimension_from_log_ratios(torch.tensor([0.5, 0.5])).item()
        2.0
    """
    if log_ratios.ndim != 1:
        raise ValueError(f"log_ratios have shape {tuple(log_ratios.shape)}; expected (n).")
    known = ~log_ratios.isnan()
    values = torch.where(known, log_ratios, torch.zeros_like(log_ratios)).to(torch.float64)
    if bool((values < 0).any()) or bool(values.isinf().any()):
        raise ValueError("log ratios must be finite and not negative: r2 is at least r1.")
    if not bool((values > 0).any()):
        raise UndefinedMetricError("intrinsic dimension is undefined: no row has a second neighbour "
                                   "farther than its first.")
    if weights is None:
        return known.sum() / values.sum()
    w = bootstrap_weights(weights, log_ratios.shape[0], torch.float64) * known
    return w.sum(1) / (w @ values)


def two_nn_log_ratios(x: Tensor) -> Tensor:
    """ln(r2/r1) of each row: the logarithm of the ratio of its two nearest neighbours' distances.

    Exact duplicates have r1 = 0: they are samples of the data, not of the density, so the first
    copy of each distinct row is kept and the others are left out. Rows are compared in float64.

    Candidates come from the matrix product ||a||^2 + ||b||^2 - 2ab; the distances of the nearest
    few are then computed directly, because the product cancels for near neighbours.

    Args:
        x: Features (n, d).

    Returns:
        (n), float64, at least 0; NaN for rows that were left out.

    Raises:
        ValueError: not two dims, or non-finite entries.
        UndefinedMetricError: fewer than three distinct rows.

    Example:
        >>> ratios = two_nn_log_ratios(torch.tensor([[0.0], [1.0], [3.0], [3.0]])).exp()
        >>> [round(ratio, 6) for ratio in ratios.tolist()]
        [3.0, 2.0, 1.5, nan]
    """
    if x.ndim != 2:
        raise ValueError(f"x has shape {tuple(x.shape)}; TwoNN takes one matrix (n, d).")
    distinct, owner = torch.unique(features(x), dim=0, return_inverse=True)
    n = distinct.shape[0]
    if n < 3:
        raise UndefinedMetricError(f"intrinsic dimension is undefined: {n} distinct rows of "
                                   f"{x.shape[0]}, at least 3 are needed.")
    centered = distinct - distinct.mean(dim=0)
    centered = centered / centered.abs().max()
    square = centered.square().sum(1)
    near = square[:, None] + square - 2 * centered @ centered.T
    near.fill_diagonal_(math.inf)
    candidates = near.topk(min(n - 1, 6), largest=False).indices
    exact = torch.stack([norms(centered[candidates[:, j]] - centered)
                         for j in range(candidates.shape[1])], dim=1)
    first, second = exact.sort(dim=1).values[:, :2].unbind(1)
    # Distinct rows can still coincide once the mean is taken off: they count as duplicates.
    log_ratio = torch.where(first > 0, (second / first).log(), torch.full_like(first, math.nan))
    first_seen = torch.full((n,), x.shape[0], device=x.device).scatter_reduce(
        0, owner, torch.arange(x.shape[0], device=x.device), "amin")
    per_row = torch.full((x.shape[0],), math.nan, dtype=torch.float64, device=x.device)
    per_row[first_seen] = log_ratio
    return per_row


def intrinsic_dimension(x: Tensor, *, method: Literal["likelihood", "fit"] = "likelihood") -> Tensor:
    """Intrinsic dimension of a cloud of rows by the TwoNN estimator [1].

    mu_i = r2/r1, the ratio of the distances to the two nearest neighbours, is Pareto with
    exponent d where the density is constant over that range, whatever the density and metric
    elsewhere. Duplicates are left out (see `two_nn_log_ratios`).

    Args:
        x: Features (n, d).
        method: ``likelihood``: n / sum ln mu. ``fit``: slope of -ln(1 - F(mu)) on ln mu through the origin, on the
            smallest 90%, as in [1].

    Returns:
        (), float64, unitless. Estimates above about 20 are biased low unless n is very large.

    Raises:
        ValueError: not two dims, non-finite entries, or another method.
        UndefinedMetricError: fewer than three distinct rows, or every ratio is 1 (a grid).

    Example:
        >>> line = torch.rand(500, 1, generator=torch.Generator().manual_seed(0))
        >>> 0.8 < intrinsic_dimension(line @ torch.ones(1, 20)).item() < 1.2
        True

    References:
        [1] Facco et al., Scientific Reports 7:12140, 2017 (fit); Denti et al., 2022 (likelihood).
    """
    log_ratios = two_nn_log_ratios(x)
    if method == "likelihood":
        return intrinsic_dimension_from_log_ratios(log_ratios)
    if method != "fit":
        raise ValueError(f"method {method!r}: use 'likelihood' or 'fit'.")
    ordered = log_ratios[~log_ratios.isnan()].sort().values
    count = ordered.numel()
    kept = max(2, math.floor(_FIT_SHARE * count))
    position = torch.arange(1, kept + 1, dtype=torch.float64, device=x.device) / count
    # F(mu_count) = 1 has no logarithm; it is only reached when so few rows are kept.
    position = position[:min(kept, count - 1)]
    horizontal, vertical = ordered[:position.numel()], -torch.log1p(-position)
    power = horizontal.square().sum()
    if not bool(power > 0):
        raise UndefinedMetricError("intrinsic dimension is undefined: the smallest 90% of the ratios are all 1.")
    return (horizontal * vertical).sum() / power


def intrinsic_dimension_bootstrap(x: Tensor, weights: Tensor) -> Tensor:
    """`intrinsic_dimension` under many sets of sample weights (B, n): (B), float64.

    The neighbours stay those of the whole sample: resampled rows would be their own nearest neighbours.

    Raises:
        ValueError: shapes that do not fit, negative weights, non-finite entries.
        UndefinedMetricError: as `intrinsic_dimension`.
    """
    return intrinsic_dimension_from_log_ratios(two_nn_log_ratios(x), weights)
