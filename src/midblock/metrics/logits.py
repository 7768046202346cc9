"""Quantities of next-token distributions, from logits: loss, entropy, rank, agreement.

Whatever passes over all logits is in `row_sums` and `cross_entropy_`; on CPUs with numba these are compiled kernels
that read each row once (`midblock.metrics._rows`), elsewhere the same sums in PyTorch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from midblock.metrics import _rows
from midblock.metrics._rows import GROUP, LOG2_E, LOWEST

__all__ = ["RowSums", "TokenStatistics", "cross_entropy_", "kl_divergence", "kl_of", "row_sums", "statistics_of",
           "token_statistics", "top_k", "top_k_overlap"]

_CACHE = 1 << 20  # bytes of float32


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


class RowSums(NamedTuple):
    """What the passes over rows of logits (n, V) leave: a few float32 values per row."""

    gold: Tensor
    """Logit of the target, (n)."""
    top: Tensor
    """Largest logit, (n)."""
    total: Tensor
    """Sum of exp(logit - top), (n)."""
    weighted: Tensor
    """Sum of (logit - top) exp(logit - top), (n)."""
    above: Tensor
    """Number of tokens more likely than the target, (n) int64."""
    maxima: Tensor
    """Maximum of each group of 64 logits, (n, V / 64 rounded up)."""
    apart: Tensor
    """For each model compared with, sum of exp(logit - top) (logit - its logit), (k, n)."""

    @property
    def log_norm(self) -> Tensor:
        """log sum exp logits, (n)."""
        return self.total.log() + self.top

    @property
    def loss(self) -> Tensor:
        """Negative log-likelihood of the target in nats, (n)."""
        # rounding alone can take a certain prediction below zero
        return (self.log_norm - self.gold).clamp_min(0)


def row_sums(logits: Tensor, target: Tensor, against: Sequence[Tensor] = ()) -> RowSums:
    """All that the quantities of a next-token distribution need of its logits, in one reading of them.

    No gradient flows through.

    Args:
        logits: (n, V), of any floating dtype; summed in float32.
        target: (n) int64, 0..V-1.
        against: Logits (n, V) of other models, to be compared with.

    Example:
        >>> row_sums(torch.zeros(1, 4), torch.tensor([1])).log_norm.exp().round().item()
        4.0
    """
    logits, against = logits.detach(), [other.detach() for other in against]
    if _rows.takes(logits, *against):
        return RowSums(*_rows.sums(logits, target, against))
    if (step := _rows_in_cache(logits)) < logits.shape[0]:
        parts = [row_sums(logits[lo:lo + step], target[lo:lo + step], [other[lo:lo + step] for other in against])
                 for lo in range(0, logits.shape[0], step)]
        return RowSums(*(torch.cat(column, dim=int(name == "apart"))
                         for name, column in zip(RowSums._fields, zip(*parts, strict=True), strict=True)))
    values = logits.float()
    maxima = _group_maxima(values)
    top = maxima.amax(dim=1, keepdim=True)
    below = (values - top).clamp_min_(LOWEST)
    weights = (below * LOG2_E).exp2_()
    gold = values.gather(1, target.unsqueeze(1))
    # minus infinity in both models is no difference
    apart = [(weights * (values - other.float())).where(below > LOWEST, 0).sum(dim=1) for other in against]
    return RowSums(gold.squeeze(1), top.squeeze(1), weights.sum(dim=1), (weights * below).sum(dim=1),
                   (values > gold).sum(dim=1), maxima,
                   torch.stack(apart) if apart else values.new_empty(0, values.shape[0]))


def _rows_in_cache(logits: Tensor) -> int:
    """How many rows to pass over at a time: several passes over a chunk in a core's cache cost one over memory."""
    return logits.shape[0] if logits.device.type != "cpu" else max(1, _CACHE // (4 * max(1, logits.shape[1])))


def _group_maxima(logits: Tensor) -> Tensor:
    n, vocab = logits.shape
    if vocab < GROUP:
        return logits.amax(dim=1, keepdim=True)
    whole = vocab // GROUP * GROUP
    maxima = logits[:, :whole].reshape(n, whole // GROUP, GROUP).amax(dim=2)
    return torch.cat([maxima, logits[:, whole:].amax(dim=1, keepdim=True)], dim=1) if whole < vocab else maxima


def token_statistics(logits: Tensor, target: Tensor) -> TokenStatistics:
    """Loss, entropy, probability and rank of the target under each row.

    entropy = log sum w - sum w (l - top) / sum w, with w = exp(l - top): no logarithm of a probability is taken.

    Args:
        logits: (n, V).
        target: (n) int64.

    Example:
        >>> s = token_statistics(torch.zeros(1, 4), torch.tensor([2]))
        >>> round(s.loss.item(), 4), round(s.entropy.item(), 4), s.rank.item()
        (1.3863, 1.3863, 0)
    """
    return statistics_of(row_sums(logits, target))


def statistics_of(sums: RowSums) -> TokenStatistics:
    """`token_statistics` from what the passes left."""
    loss = sums.loss
    entropy = (sums.total.log() - sums.weighted / sums.total).clamp_min(0)
    return TokenStatistics(loss, entropy, (-loss).exp(), sums.above)


def kl_divergence(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) in nats of each row of logits (n, V): sum p (l_p - l_q) - log Z_p + log Z_q.

    Example:
        >>> uniform = torch.zeros(1, 4)
        >>> kl_divergence(uniform, uniform).item()
        0.0
    """
    anything = torch.zeros(p.shape[0], dtype=torch.int64, device=p.device)
    return kl_of(row_sums(p, anything, [q]), row_sums(q, anything))


def kl_of(p: RowSums, q: RowSums, number: int = 0) -> Tensor:
    """`kl_divergence` from what the passes left, where q is number ``number`` of those that p was compared with."""
    return (p.apart[number] / p.total - p.log_norm + q.log_norm).clamp_min(0)


def cross_entropy_(logits: Tensor, target: Tensor) -> Tensor:
    """Loss of each row, (n) float32; the logits become its gradient, softmax - one-hot, in their own dtype.

    Args:
        logits: (n, V), without gaps between rows; written over.
        target: (n) int64, 0..V-1.

    Example:
        >>> logits = torch.zeros(1, 4)
        >>> round(cross_entropy_(logits, torch.tensor([2])).item(), 4), logits.tolist()
        (1.3863, [[0.25, 0.25, -0.75, 0.25]])
    """
    if _rows.takes(logits) and logits.is_contiguous():
        return _rows.losses_and_gradient_(logits, target)
    if (step := _rows_in_cache(logits)) < logits.shape[0]:
        return torch.cat([cross_entropy_(logits[lo:lo + step], target[lo:lo + step])
                          for lo in range(0, logits.shape[0], step)])
    index = target.unsqueeze(1)
    log_p = logits.float().log_softmax(dim=1)
    loss = -log_p.gather(1, index).squeeze(1)
    logits.copy_(log_p.exp_().scatter_add_(1, index, log_p.new_full(index.shape, -1.0)))
    return loss


def top_k(logits: Tensor, maxima: Tensor, k: int) -> Tensor:
    """Indices (n, k) of the k largest logits of each row, largest first; of equal ones the lower index, as argmax does.

    Exact, in two steps: the k largest of V are among the k groups of 64 with the largest maxima,
    so that the selection sees a few hundred candidates. (Logits of half precision are often equal.) It is made of many
    small steps: better for many rows at once than for few.

    Args:
        logits: (n, V), of any floating dtype.
        maxima: Of their groups, from `row_sums` of the same rows.
        k: 1..V.

    Example:
        >>> logits = torch.tensor([[0.0, 2.0, 2.0, 1.0]])
        >>> top_k(logits, row_sums(logits, torch.tensor([0])).maxima, 3).tolist()
        [[1, 2, 3]]
    """
    n, vocab = logits.shape
    if _rows.takes(logits) and maxima.dtype == torch.float32 and k <= min(GROUP, vocab):
        return _rows.largest(logits, maxima, k)
    if k == 1:  # argmax takes the first of equals, among groups and within one
        first = maxima.argmax(dim=1, keepdim=True)
        columns = first * GROUP + torch.arange(min(GROUP, vocab), device=logits.device)
        values = logits.gather(1, columns.clamp_max(vocab - 1))  # a short last group repeats its last one
        return first * GROUP + values.argmax(dim=1, keepdim=True)
    if vocab < 4 * GROUP * k:
        return logits.sort(dim=1, descending=True, stable=True).indices[:, :k]
    groups = maxima.shape[1]
    chosen = _first_of_equals(maxima, torch.arange(groups, device=logits.device)).topk(k, dim=1).indices
    columns = (chosen.unsqueeze(2) * GROUP + torch.arange(GROUP, device=logits.device)).view(n, -1)
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
