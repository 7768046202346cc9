"""How far states of the same samples moved from one model to another: direction, centre, distance.

Row i of both sides belongs to the same sample. Undefined values raise `UndefinedMetricError` (NaN per row or sample
where many are returned); non-finite input is a ValueError.
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
    resolve_mask,
    scalar_or_raise,
    unit_largest_entry,
    unpadded_chunks,
)

__all__ = ["change_intensity", "change_intensity_bootstrap", "cosine_similarity", "mean_shift", "mean_shift_bootstrap",
           "row_changes", "token_cosine"]


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


def change_intensity_bootstrap(x_base: Tensor, x_sft: Tensor, weights: Tensor, *,
                               relative: bool = False) -> Tensor:
    """`change_intensity` under many sets of sample weights (B, n): (B), float64.

    Raises:
        ValueError: shapes that do not fit, negative weights, non-finite entries.
        UndefinedMetricError: ``relative`` and a replicate's mean of x_base is 0.
    """
    changes = row_changes(x_base, x_sft)
    w = bootstrap_weights(weights, changes.shape[-1], torch.float64)
    p = w / w.sum(1, keepdim=True)
    return p @ changes / _replicate_scale(p, features(x_base)) if relative else p @ changes


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
    return shift / _replicate_scale(p, base) if relative else shift


def _replicate_scale(p: Tensor, base: Tensor) -> Tensor:
    scale = norms(p @ base, dim=1)
    if not bool((scale > 0).all()):
        raise UndefinedMetricError("the relative change is undefined: a replicate's mean of x_base is 0.")
    return scale
