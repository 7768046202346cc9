"""Quantities of next-token distributions, from logits: loss, entropy, rank, agreement."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["TokenStatistics", "count_above", "kl_divergence", "log_normalizer", "token_statistics", "top_k",
           "top_k_overlap"]


class TokenStatistics(NamedTuple):
    """One value per row of logits; all float32 but ``rank`` (int64)."""

    loss: Tensor
    """Negative log-likelihood of the target, nats."""
    entropy: Tensor
    """Entropy of the distribution, nats."""
    probability: Tensor
    """Probability of the target."""
    rank: Tensor
    """Number of tokens more likely than the target; 0 means that the target is the most likely."""


def log_normalizer(logits: Tensor) -> tuple[Tensor, Tensor]:
    """(exp(logits - max), log sum exp logits): the one pass of exponentials that everything shares.

    Args:
        logits: (n, V) float32.

    Returns:
        Unnormalised probabilities (n, V) and the log normaliser (n).
    """
    top = logits.amax(dim=1, keepdim=True)
    weights = (logits - top).exp_()
    return weights, weights.sum(dim=1).log_() + top.squeeze(1)


def token_statistics(logits: Tensor, target: Tensor, *, weights: Tensor | None = None,
                     log_norm: Tensor | None = None) -> TokenStatistics:
    """Loss, entropy, probability and rank of the target under each row of logits.

    entropy = log Z - sum p l, with p = softmax(l): no logarithm of a probability is taken.

    Args:
        logits: (n, V) float32.
        target: (n) int64.
        weights: First result of `log_normalizer`, if it is known already.
        log_norm: Its second result.

    Example:
        >>> s = token_statistics(torch.zeros(1, 4), torch.tensor([2]))
        >>> round(s.loss.item(), 4), round(s.entropy.item(), 4), s.rank.item()
        (1.3863, 1.3863, 0)
    """
    if weights is None or log_norm is None:
        weights, log_norm = log_normalizer(logits)
    gold = logits.gather(1, target.unsqueeze(1))
    expected = torch.linalg.vecdot(weights, logits) / weights.sum(dim=1)
    loss = log_norm - gold.squeeze(1)
    # rounding alone can take a certain prediction below zero
    return TokenStatistics(loss.clamp_min(0), (log_norm - expected).clamp_min(0), (-loss).exp().clamp_max(1),
                           count_above(logits, gold))


def count_above(logits: Tensor, threshold: Tensor) -> Tensor:
    """How many entries of each row (n, V) exceed the row's threshold (n, 1): (n) int64."""
    if logits.shape[1] >= 1 << 24 or logits.dtype != torch.float32:
        return (logits > threshold).sum(dim=1)
    # summing 0 and 1 as float32 is exact below 2**24 and several times faster than counting booleans
    above = torch.gt(logits.detach(), threshold.detach(), out=torch.empty_like(logits, requires_grad=False))
    return above.sum(dim=1).long()


def kl_divergence(logits_p: Tensor, logits_q: Tensor, *, weights_p: Tensor | None = None,
                  log_norm_p: Tensor | None = None, log_norm_q: Tensor | None = None) -> Tensor:
    """KL(p || q) in nats of each row: sum p (l_p - l_q) - log Z_p + log Z_q.

    Args:
        logits_p: (n, V) float32.
        logits_q: (n, V) float32.
        weights_p: First result of `log_normalizer` of p, if known.
        log_norm_p: Its second result.
        log_norm_q: The log normaliser of q.

    Example:
        >>> kl_divergence(torch.zeros(1, 4), torch.zeros(1, 4)).item()
        0.0
    """
    if weights_p is None or log_norm_p is None:
        weights_p, log_norm_p = log_normalizer(logits_p)
    if log_norm_q is None:
        log_norm_q = logits_q.logsumexp(dim=1)
    expected: Tensor = torch.linalg.vecdot(weights_p, logits_p - logits_q) / weights_p.sum(dim=1)
    return (expected - log_norm_p + log_norm_q).clamp_min(0)


def top_k(logits: Tensor, k: int) -> Tensor:
    """Indices (n, k) of the k largest logits of each row, largest first.

    Exact, in two steps: the k largest of V are among the k groups of 64 with the largest maxima,
    so that a full pass only takes maxima and the selection sees a few hundred candidates.
    """
    n, vocab = logits.shape
    group = 64
    if vocab < 4 * group * k:
        return logits.topk(k, dim=1).indices
    whole = vocab // group * group
    maxima = logits[:, :whole].view(n, -1, group).amax(dim=2)
    chosen = maxima.topk(k, dim=1).indices
    columns = (chosen.unsqueeze(2) * group + torch.arange(group, device=logits.device)).view(n, -1)
    if whole < vocab:
        rest = torch.arange(whole, vocab, device=logits.device).expand(n, -1)
        columns = torch.cat([columns, rest], dim=1)
    return columns.gather(1, logits.gather(1, columns).topk(k, dim=1).indices)


def top_k_overlap(top_a: Tensor, top_b: Tensor) -> Tensor:
    """Share of common tokens of two top-k lists (n, k), per row, in 0..1."""
    common: Tensor = (top_a.unsqueeze(2) == top_b.unsqueeze(1)).any(dim=2)
    return common.float().mean(dim=1)
