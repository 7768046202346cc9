"""Quantities of next-token distributions, from logits: loss, entropy, rank, agreement."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Distribution", "RowSums", "Scratch", "TokenStatistics", "count_above", "distribution", "kl_divergence",
           "kl_of", "row_sums", "statistics_of", "token_statistics", "top_k", "top_k_overlap", "weighted_difference"]

_LOG2_E = math.log2(math.e)
_GROUP = 64


class Scratch:
    """Float32 memory (n, V) that passes over logits use again and again.

    New memory of this size comes from the system page by page, which takes a CPU longer than the
    passes themselves. What is given out under a name is overwritten when the name is asked for again.

    Example:
        >>> scratch = Scratch()
        >>> scratch.like("logits", torch.zeros(2, 3)).shape
        torch.Size([2, 3])
    """

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    def like(self, name: str, values: Tensor) -> Tensor:
        """Memory of the shape and place of ``values``."""
        kept = self._kept.get(name)
        if kept is None or kept.numel() < values.numel() or kept.device != values.device:
            kept = self._kept[name] = torch.empty(values.numel(), dtype=torch.float32, device=values.device)
        return kept[:values.numel()].view(values.shape)


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


class Distribution(NamedTuple):
    """Softmax of rows of logits, kept unnormalised: what all quantities of one chunk share."""

    logits: Tensor
    """(n, V) float32."""
    maxima: Tensor
    """Maximum of each group of 64 logits, (n, V // 64); rows of a small vocabulary have the one group V."""
    weights: Tensor
    """exp(logits - top), (n, V)."""
    top: Tensor
    """Largest logit, (n)."""
    total: Tensor
    """Sum of the weights, (n)."""

    @property
    def log_norm(self) -> Tensor:
        """log sum exp logits, (n)."""
        return self.total.log() + self.top


class RowSums(NamedTuple):
    """What is left of rows of logits after the passes over them: one float32 value per row each.

    Rows that were passed over in small parts can be put together before the cheap rest.
    """

    top: Tensor
    """Largest logit."""
    total: Tensor
    """Sum of exp(logit - top)."""
    weighted: Tensor
    """Sum of logit exp(logit - top)."""
    above: Tensor
    """Number of tokens more likely than the target."""


def distribution(logits: Tensor, scratch: Scratch | None = None, name: str = "") -> Distribution:
    """The one pass of maxima and the one pass of exponentials that everything else shares.

    Args:
        logits: (n, V), of any floating-point format; worked on in float32.
        scratch: Where to put logits and weights; without it, in new memory.
        name: Of what is kept there: distributions of different names can be used side by side.

    Example:
        >>> distribution(torch.zeros(1, 4)).log_norm.exp().round().item()
        4.0
    """
    if logits.dtype != torch.float32:
        logits = logits.float() if scratch is None else scratch.like(f"{name} logits", logits).copy_(logits)
    maxima = _group_maxima(logits)
    top = maxima.amax(dim=1, keepdim=True)
    # exp(x) = 2^(x log2 e), the product within the subtraction's pass: on a CPU exp2 is several times faster than exp
    kept = None if scratch is None else scratch.like(f"{name} weights", logits)
    weights = torch.add(top * -_LOG2_E, logits, alpha=_LOG2_E, out=kept).exp2_()
    return Distribution(logits, maxima, weights, top.squeeze(1), weights.sum(dim=1))


def _group_maxima(logits: Tensor) -> Tensor:
    n, vocab = logits.shape
    if vocab < _GROUP:
        return logits.amax(dim=1, keepdim=True)
    whole = vocab // _GROUP * _GROUP
    maxima = logits[:, :whole].view(n, -1, _GROUP).amax(dim=2)
    return torch.cat([maxima, logits[:, whole:].amax(dim=1, keepdim=True)], dim=1) if whole < vocab else maxima


def token_statistics(of: Distribution, target: Tensor, scratch: Scratch | None = None) -> TokenStatistics:
    """Loss, entropy, probability and rank of the target under each row.

    entropy = log Z - sum p l, with p = softmax(l): no logarithm of a probability is taken.

    Args:
        of: Distribution of each row.
        target: (n) int64.
        scratch: Memory for what is passed over.

    Example:
        >>> s = token_statistics(distribution(torch.zeros(1, 4)), torch.tensor([2]))
        >>> round(s.loss.item(), 4), round(s.entropy.item(), 4), s.rank.item()
        (1.3863, 1.3863, 0)
    """
    gold = of.logits.gather(1, target.unsqueeze(1))
    return statistics_of(row_sums(of, gold, scratch), gold.squeeze(1))


def row_sums(of: Distribution, gold: Tensor, scratch: Scratch | None = None) -> RowSums:
    """The passes of `token_statistics`, without the cheap rest.

    Args:
        of: Distribution of each row.
        gold: Logit of the target, (n, 1) float32.
        scratch: Memory for what is passed over.
    """
    return RowSums(of.top, of.total, _dot(of.weights, of.logits, scratch),
                   count_above(of.logits, gold, scratch).float())


def statistics_of(sums: RowSums, gold: Tensor) -> TokenStatistics:
    """`token_statistics` from what the passes left.

    Args:
        sums: From `row_sums`.
        gold: Logit of the target, (n).
    """
    log_norm = sums.total.log() + sums.top
    loss = log_norm - gold
    # rounding alone can take a certain prediction below zero
    return TokenStatistics(loss.clamp_min(0), (log_norm - sums.weighted / sums.total).clamp_min(0),
                           (-loss).exp().clamp_max(1), sums.above.long())


def _dot(a: Tensor, b: Tensor, scratch: Scratch | None) -> Tensor:
    return torch.mul(a, b, out=None if scratch is None else scratch.like("product", a)).sum(dim=1)


def count_above(logits: Tensor, threshold: Tensor, scratch: Scratch | None = None) -> Tensor:
    """How many entries of each row (n, V) exceed the row's threshold (n, 1): (n) int64."""
    if logits.shape[1] >= 1 << 24 or logits.dtype != torch.float32:
        return (logits > threshold).sum(dim=1)
    # summing 0 and 1 as float32 is exact below 2**24 and several times faster than counting booleans
    out = torch.empty_like(logits, requires_grad=False) if scratch is None else scratch.like("product", logits)
    above = torch.gt(logits.detach(), threshold.detach(), out=out)
    return above.sum(dim=1).long()


def kl_divergence(p: Distribution, q: Distribution, scratch: Scratch | None = None) -> Tensor:
    """KL(p || q) in nats of each row: sum p (l_p - l_q) - log Z_p + log Z_q.

    Example:
        >>> uniform = distribution(torch.zeros(1, 4))
        >>> kl_divergence(uniform, uniform).item()
        0.0
    """
    return kl_of(weighted_difference(p, q, scratch), p, q)


def weighted_difference(p: Distribution, q: Distribution, scratch: Scratch | None = None) -> Tensor:
    """The pass of `kl_divergence`: sum exp(l_p - top_p) (l_p - l_q), (n)."""
    apart = torch.sub(p.logits, q.logits, out=None if scratch is None else scratch.like("difference", p.logits))
    return _dot(p.weights, apart, scratch)


def kl_of(weighted: Tensor, p: Distribution | RowSums, q: Distribution | RowSums) -> Tensor:
    """`kl_divergence` from what the passes left: `weighted_difference`, and top and total of both sides."""
    log_norms = (side.total.log() + side.top for side in (p, q))
    return (weighted / p.total - next(log_norms) + next(log_norms)).clamp_min(0)


def top_k(logits: Tensor, maxima: Tensor, k: int) -> Tensor:
    """Indices (n, k) of the k largest logits of each row, largest first; of equal ones the lower index, as argmax does.

    Exact, in two steps: the k largest of V are among the k groups of 64 with the largest maxima,
    so that the selection sees a few hundred candidates. (Logits of half precision are often equal.) It is made of many
    small steps: better for many rows at once than for few.

    Args:
        logits: (n, V), of any number format.
        maxima: Of their groups, from `distribution` of the same rows.
        k: 1..V.

    Example:
        >>> logits = torch.tensor([[0.0, 2.0, 2.0, 1.0]])
        >>> top_k(logits, distribution(logits).maxima, 3).tolist()
        [[1, 2, 3]]
    """
    n, vocab = logits.shape
    if k == 1:  # argmax takes the first of equals, among groups and within one
        first = maxima.argmax(dim=1, keepdim=True)
        columns = first * _GROUP + torch.arange(min(_GROUP, vocab), device=logits.device)
        values = logits.gather(1, columns.clamp_max(vocab - 1))  # a short last group repeats its last one
        return first * _GROUP + values.argmax(dim=1, keepdim=True)
    if vocab < 4 * _GROUP * k:
        return logits.sort(dim=1, descending=True, stable=True).indices[:, :k]
    groups = maxima.shape[1]
    chosen = _first_of_equals(maxima, torch.arange(groups, device=logits.device)).topk(k, dim=1).indices
    columns = (chosen.unsqueeze(2) * _GROUP + torch.arange(_GROUP, device=logits.device)).view(n, -1)
    inside = columns < vocab  # the last group may be a short one
    values = logits.gather(1, columns.clamp_max(vocab - 1)).masked_fill_(~inside, -math.inf)
    return columns.gather(1, _first_of_equals(values, columns).topk(k, dim=1).indices)


def _first_of_equals(values: Tensor, index: Tensor) -> Tensor:
    """``values`` (n, m) in float64, less so little by index that no two different float32 near the largest swap."""
    size = values.abs().nan_to_num(0, 0, 0).amax(dim=1, keepdim=True).clamp_min(1e-30)
    return values.double() - index * (size.double() * 2.0**-46)


def top_k_overlap(top_a: Tensor, top_b: Tensor) -> Tensor:
    """Share of common tokens of two top-k lists (n, k), per row, in 0..1."""
    common: Tensor = (top_a.unsqueeze(2) == top_b.unsqueeze(1)).any(dim=2)
    return common.float().mean(dim=1)
