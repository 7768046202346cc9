"""How alike two sets of states of the same samples are, beside CKA: shape, neighbours, dissimilarities, layers.

Row i of ``x`` and of ``y`` belong to the same sample. Undefined values raise `UndefinedMetricError`; non-finite input
is a ValueError.

References:
    [1] Williams, Kunz, Kornblith & Linderman, Generalized Shape Metrics on Neural Representations, NeurIPS 2021.
    [2] Huh, Cheung, Wang & Isola, The Platonic Representation Hypothesis, ICML 2024: mutual nearest neighbours.
    [3] Kriegeskorte, Mur & Bandettini, Frontiers in Systems Neuroscience 2:4, 2008: RSA.
    [4] Song et al., JMLR 13, 2012, eq. 5: the unbiased HSIC.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from midblock.errors import UndefinedMetricError
from midblock.metrics._inputs import features, norms, safe_scale, unit_largest_entry
from midblock.metrics.cka import _centered

__all__ = ["layer_cka", "mutual_neighbours", "procrustes_angle", "rsa"]


def _pair(x: Tensor, y: Tensor, least: int) -> tuple[Tensor, Tensor]:
    if x.ndim != 2 or y.ndim != 2 or x.shape[0] != y.shape[0]:
        raise ValueError(f"x {tuple(x.shape)} and y {tuple(y.shape)} must be (n, d1) and (n, d2): one row per sample, "
                         "the same samples in the same order.")
    if x.shape[0] < least:
        raise ValueError(f"{x.shape[0]} samples were given; at least {least} are needed.")
    return features(x, "x"), features(y, "y")


def procrustes_angle(x: Tensor, y: Tensor) -> Tensor:
    """Angular Procrustes distance [1]: the angle between two clouds after the best rotation of one onto the other.

    arccos(||X'Y||_* / (||X||_F ||Y||_F)) of centred rows, ||.||_* the sum of singular values. A metric (it obeys the
    triangle inequality), invariant to rotation, shift and scale of either side.

    Args:
        x: Features (n, d1), n >= 2.
        y: Features (n, d2), the same samples.

    Returns:
        (), float64, radians in 0..pi/2; exactly 0 where only rounding separates the two.

    Raises:
        ValueError: different samples, fewer than two, non-finite entries.
        UndefinedMetricError: all rows of one side are equal.

    Example:
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [3.0, 1.0]])
        >>> procrustes_angle(x, 2 * x.flip(1) + 5).item()
        0.0
    """
    x, y = _pair(x, y, 2)
    # an n x n core has the singular values of the d1 x d2 product
    cores = []
    for side in (x, y):
        side = safe_scale(side)
        centred = side - side.mean(dim=0)
        if not bool(centred.abs().amax() > 8 * torch.finfo(side.dtype).eps):
            raise UndefinedMetricError("the Procrustes angle is undefined: all rows of one side are equal.")
        cores.append(torch.linalg.qr(centred.mT, mode="r").R if side.shape[0] < side.shape[1] else centred.mT)
    a, b = cores
    cosine = torch.linalg.svdvals(a @ b.mT).sum() / (a.norm() * b.norm())
    rounding = 8 * torch.finfo(x.dtype).eps * min(x.shape[0], *a.shape, *b.shape)
    return torch.arccos(cosine.clamp(max=1.0)) if bool(cosine < 1 - rounding) else torch.zeros_like(cosine)


def mutual_neighbours(x: Tensor, y: Tensor, *, k: int = 10) -> Tensor:
    """Share of a sample's ``k`` nearest neighbours that are the same on both sides [2]: (n,) in 0..1.

    Neighbours are those with the largest cosine; with fewer than 4 ``k`` samples, a quarter of the samples. Two
    unrelated sets share about k / (n - 1).

    Args:
        x: Features (n, d1), n >= 3.
        y: Features (n, d2), the same samples.
        k: Neighbours.

    Raises:
        ValueError: different samples, fewer than three, k below 1, non-finite entries.
        UndefinedMetricError: a row is zero.

    Example:
        >>> x = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]])
        >>> mutual_neighbours(x, x.flip(1)).tolist()
        [1.0, 1.0, 1.0, 1.0]
    """
    x, y = _pair(x, y, 3)
    if k < 1:
        raise ValueError(f"k is {k}; at least one neighbour is needed.")
    n = x.shape[0]
    count = max(1, min(k, n // 4))
    near = []
    for side in (x, y):
        size = norms(unit_largest_entry(side), keepdim=True)
        if not bool((size > 0).all()):
            raise UndefinedMetricError("nearest neighbours are undefined: a row is zero and has no direction.")
        unit = unit_largest_entry(side) / size
        cosine = (unit @ unit.mT).fill_diagonal_(-math.inf)
        near.append(torch.zeros(n, n, dtype=torch.bool, device=x.device).scatter_(1, cosine.topk(count, dim=1).indices,
                                                                                 value=True))
    return (near[0] & near[1]).sum(dim=1).double() / count


def rsa(x: Tensor, y: Tensor) -> Tensor:
    """Representational similarity analysis [3]: Spearman correlation of the two sides' dissimilarities of samples.

    The dissimilarity of two samples is 1 - Pearson's correlation of their rows.

    Args:
        x: Features (n, d1), n >= 3.
        y: Features (n, d2), the same samples.

    Returns:
        (), float64, in -1..1.

    Raises:
        ValueError: different samples, fewer than three, non-finite entries.
        UndefinedMetricError: a row whose entries are all equal, or dissimilarities that are all equal.

    Example:
        >>> x = torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.5, 0.0], [0.0, 0.2, 1.0], [0.3, 1.0, 0.0]])
        >>> round(rsa(x, 3 * x + 1).item(), 6)
        1.0
    """
    x, y = _pair(x, y, 3)
    ranks = []
    for side in (x, y):
        centred = unit_largest_entry(side - side.mean(dim=1, keepdim=True))
        size = norms(centred, keepdim=True)
        if not bool((size > 0).all()):
            raise UndefinedMetricError("RSA is undefined: the entries of a row are all equal.")
        unit = centred / size
        upper = torch.triu_indices(side.shape[0], side.shape[0], offset=1)
        # like samples have like dissimilarities: what differs by rounding is a tie
        rank = _average_ranks((unit @ unit.mT)[upper[0], upper[1]].round(decimals=12))
        if not bool((rank != rank[0]).any()):
            raise UndefinedMetricError("RSA is undefined: all samples are equally far from each other.")
        ranks.append(rank - rank.mean())
    a, b = ranks
    correlation: Tensor = (a @ b) / (a.norm() * b.norm())
    return correlation


def _average_ranks(values: Tensor) -> Tensor:
    """Ranks from 0, equal values the mean of theirs."""
    _, place, counts = torch.unique(values, return_inverse=True, return_counts=True)
    counts = counts.double()
    found: Tensor = (counts.cumsum(0) - (counts + 1) / 2)[place]
    return found


_GRAM_NUMBERS = 1 << 22  # numbers of Gram matrices held at once, 32 MiB


def layer_cka(x: Tensor, y: Tensor) -> Tensor:
    """Debiased linear CKA [4] of every layer of one model with every layer of another.

    Args:
        x: Features (L1, n, d1) of the first model's layers, n >= 4.
        y: Features (L2, n, d2) of the second's, the same samples.

    Returns:
        (L1, L2), float64; NaN for a layer in which all samples are equal. The diagonal of two aligned models is
        `cka_debiased`.

    Raises:
        ValueError: different samples, fewer than four, non-finite entries.

    Example:
        >>> x = torch.randn(2, 20, 5, generator=torch.Generator().manual_seed(0))
        >>> layer_cka(x, x).diagonal().round(decimals=6).tolist()
        [1.0, 1.0]
    """
    if x.ndim != 3 or y.ndim != 3 or x.shape[1] != y.shape[1] or x.shape[1] < 4:
        raise ValueError(f"x {tuple(x.shape)} and y {tuple(y.shape)} must be (layers, n, d): the same 4 samples or "
                         "more.")
    n, same = x.shape[1], y is x
    first = torch.stack([_centered(features(layer, "x")) for layer in x])
    second = first if same else torch.stack([_centered(features(layer, "y")) for layer in y])

    def hollow(layers: Tensor, start: int, stop: int) -> Tensor:
        """Rows start..stop-1 of every layer's Gram matrix without its diagonal, (L, rows, n)."""
        rows = layers[:, start:stop] @ layers.mT
        rows.diagonal(offset=start, dim1=1, dim2=2).zero_()
        return rows

    def hsic(products: Tensor, rows: Tensor, sums: Tensor) -> Tensor:
        return (products + sums / ((n - 1) * (n - 2)) - 2 * rows / (n - 2)) / (n * (n - 3))

    # some rows of the Gram matrices at a time, so that memory does not grow with the square of n
    step = max(1, _GRAM_NUMBERS // (n * (len(first) + len(second))))
    joined, joined_rows = (torch.zeros(len(x), len(y), dtype=torch.float64, device=x.device) for _ in range(2))
    own = {"x": torch.zeros(3, len(x), dtype=torch.float64, device=x.device),
           "y": torch.zeros(3, len(y), dtype=torch.float64, device=x.device)}  # products, rows, sums
    for start in range(0, n, step):
        k = hollow(first, start, min(n, start + step))
        m = k if same else hollow(second, start, min(n, start + step))
        for name, part in (("x", k), ("y", m)):
            sums = part.sum(dim=2)
            own[name] += torch.stack([part.square().sum(dim=(1, 2)), sums.square().sum(dim=1), sums.sum(dim=1)])
        joined += k.flatten(1) @ m.flatten(1).mT
        joined_rows += k.sum(dim=2) @ m.sum(dim=2).mT
    own_x, own_y = (hsic(products, rows, sums.square()) for products, rows, sums in (own["x"], own["y"]))
    scale = (own_x.clamp_min(0)[:, None] * own_y.clamp_min(0)).sqrt()
    both = hsic(joined, joined_rows, own["x"][2][:, None] * own["y"][2])
    return torch.where(scale > 0, both / scale, torch.full_like(scale, math.nan))
