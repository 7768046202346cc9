"""Quantities of two or more augmented views of each prompt: what survives the augmentation.

``views_a`` and ``views_b`` (n, d) hold the pooled states of two views; row i of both belongs
to prompt i. LiDAR takes all q views of each prompt at once, (n, q, d).
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from midblock.errors import UndefinedMetricError
from midblock.metrics._inputs import features, matching, norms, symmetric_eigenvalues
from midblock.metrics.entropy import check_alpha, entropy_from_spectrum
from midblock.metrics.rank import effective_rank_from_singular_values

__all__ = ["InfoNCE", "dime", "dime_of_views", "infonce", "infonce_of_views", "lidar"]


class InfoNCE(NamedTuple):
    """Contrastive loss of matching views.

    Attributes:
        loss: Mean cross-entropy of finding the partner among n, nats; ln n when the
            similarities say nothing, smaller is more invariant.
        bound: ln n - loss, a lower bound of the mutual information of the views, nats.
        normalized: bound / ln n, at most 1; 0 for uninformative similarities, below 0 when
            worse than that.
        per_sample: The n terms of ``loss``. They share their negatives, so that resampling
            them speaks about the anchors only.
    """

    loss: Tensor
    bound: Tensor
    normalized: Tensor
    per_sample: Tensor


def _two_views(views_a: Tensor, views_b: Tensor) -> tuple[Tensor, Tensor]:
    matching(views_a, views_b, "the two views")
    if views_a.ndim != 2:
        raise ValueError(f"views have shape {tuple(views_a.shape)}; expected (prompts, d).")
    if views_a.shape[0] < 2:
        raise ValueError("at least two prompts are needed: one has no other to be told from.")
    return features(views_a, "views_a"), features(views_b, "views_b")


def _directions(x: Tensor, name: str) -> Tensor:
    top = x.abs().amax(dim=1, keepdim=True)
    if not bool((top > 0).all()):
        row = int((top[:, 0] == 0).nonzero()[0, 0])
        raise UndefinedMetricError(f"row {row} of {name} is zero and has no direction.")
    x = x / top
    return x / norms(x, dim=1, keepdim=True)


def infonce(views_a: Tensor, views_b: Tensor, temperature: float = 0.1, *,
            symmetric: bool = True) -> InfoNCE:
    """InfoNCE between two views with cosine similarities [1].

    loss_i = -ln(exp(c_ii / t) / sum_j exp(c_ij / t)), c_ij the cosine of view a of prompt i and
    view b of prompt j; with ``symmetric`` averaged with the same in the other direction. The
    bound cannot exceed ln n, so compare only at equal n and temperature.

    Args:
        views_a: (n, d), n >= 2.
        views_b: (n, d), the same prompts in the same order.
        temperature: t, above 0.
        symmetric: Use both directions.

    Returns:
        See `InfoNCE`; float64.

    Raises:
        ValueError: different shapes, fewer than two prompts, temperature not above 0,
            non-finite entries.
        UndefinedMetricError: a zero row.

    Example:
        >>> views = torch.eye(4)
        >>> round(infonce(views, views).normalized.item(), 3)
        1.0

    References:
        [1] van den Oord, Li, Vinyals, arXiv:1807.03748.
    """
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; it must be above 0.")
    a, b = _two_views(views_a, views_b)
    logits = _directions(a, "views_a") @ _directions(b, "views_b").T / temperature
    match = logits.diagonal()
    per_sample = torch.logsumexp(logits, dim=1) - match
    if symmetric:
        per_sample = (per_sample + torch.logsumexp(logits, dim=0) - match) / 2
    loss = per_sample.mean()
    chance = math.log(a.shape[0])
    return InfoNCE(loss, chance - loss, (chance - loss) / chance, per_sample)


def infonce_of_views(views: Tensor) -> Tensor:
    """Loss of `infonce` between the first two views of each prompt, (n, q, d) -> (), nats."""
    return infonce(views[:, 0], views[:, 1]).loss


def lidar(views: Tensor, *, delta: float = 1e-4, relative_delta: bool = False) -> Tensor:
    """LiDAR [1]: effective rank of what separates prompts, in units of what augmentation moves.

    S_b = 1/(n-1) sum_i (m_i - m)(m_i - m)', S_w = 1/(n(q-1)) sum_ij (e_ij - m_i)(e_ij - m_i)'
    + delta I; LiDAR = exp of the entropy of the eigenvalues of S_w^-1/2 S_b S_w^-1/2, scaled
    to sum 1. (The publication adds a constant inside the logarithm; here 0 ln 0 is 0.)

    The n x n matrix M' S_w^-1 M with M the centred class means has the same eigenvalues and is
    what is decomposed.

    Args:
        views: (n, q, d): q >= 2 views of each of n >= 2 prompts.
        delta: Ridge of the within-scatter, above 0. In absolute units as published: states of
            different scale then see different ridges.
        relative_delta: Multiply delta by the mean within-variance tr(S_w)/d, which makes the
            value scale-free (delta itself is taken if that is 0).

    Returns:
        (), float64, in [1, min(n - 1, d)].

    Raises:
        ValueError: wrong shape, fewer than two prompts or views, delta not above 0, non-finite entries.
        UndefinedMetricError: all prompts have the same mean.

    Example:
        >>> axes = torch.eye(4).repeat_interleave(2, 0).reshape(4, 2, 4)
        >>> round(lidar(axes).item(), 4)
        3.0

    References:
        [1] Thilak et al., ICLR 2024, arXiv:2312.04000.
    """
    if views.ndim != 3 or views.shape[0] < 2 or views.shape[1] < 2:
        raise ValueError(f"views have shape {tuple(views.shape)}; expected (prompts >= 2, views >= 2, d).")
    if not delta > 0:
        raise ValueError(f"delta is {delta}; it must be above 0.")
    x = features(views, "views")
    n, q, d = x.shape
    mean = x.mean(dim=1)
    within = ((x - mean[:, None]) / math.sqrt(n * (q - 1))).reshape(n * q, d)
    between = (mean - mean.mean(dim=0)) / math.sqrt(n - 1)
    if bool(between.abs().max() <= 8 * torch.finfo(torch.float64).eps * mean.abs().max()):
        raise UndefinedMetricError("LiDAR is undefined: all prompts have the same mean.")
    trace = within.square().sum() / d
    ridge = delta * trace if relative_delta and bool(trace > 0) else torch.as_tensor(delta, dtype=x.dtype)
    if d <= n * q:
        variances, axes = torch.linalg.eigh(within.T @ within)
        variances = variances.clamp_min(0)
    else:  # the row space only; its complement sees the ridge alone
        variances, left = torch.linalg.eigh(within @ within.T)
        kept = variances > 1e-12 * variances[-1].clamp_min(0)
        variances, left = variances[kept], left[:, kept]
        axes = torch.linalg.qr(within.T @ left)[0] if variances.numel() else x.new_zeros(d, 0)
    inside = between @ axes
    outside = between - inside @ axes.T
    gram = (inside / (variances + ridge)) @ inside.T + outside @ outside.T / ridge
    values = symmetric_eigenvalues((gram + gram.T) / 2)
    return effective_rank_from_singular_values(values)


def _median_bandwidth(x: Tensor) -> Tensor:
    distance = torch.pdist(x)
    median = distance.median()
    if not bool(median > 0):
        raise UndefinedMetricError("the median distance of the rows is 0; give a bandwidth.")
    return median


def _unit_diagonal_kernel(x: Tensor, name: str, kernel: str, bandwidth: float | None) -> Tensor:
    if kernel == "cosine":
        x = _directions(x, name)
        return (x @ x.T).fill_diagonal_(1.0)
    if kernel == "gaussian":
        width = _median_bandwidth(x) if bandwidth is None else bandwidth
        distance = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
        return (-(distance / width).square() / 2).exp()
    raise ValueError(f"kernel {kernel!r}: use 'cosine' or 'gaussian'.")


def dime(views_a: Tensor, views_b: Tensor, *, alpha: float = 1.0, permutations: int = 10,
         kernel: Literal["cosine", "gaussian"] = "cosine", bandwidth: float | None = None,
         normalize: bool = False, generator: torch.Generator | None = None) -> Tensor:
    """DiME [1]: how much the true pairing of views lowers their joint matrix-based entropy.

    DiME = mean over permutations P of S(A o PBP') - S(A o B), where A and B are the kernel
    matrices of the views divided by n (unit diagonal, so the Hadamard product again has trace 1
    after scaling) and S is the matrix-based entropy of order alpha. 0 when pairing carries
    nothing; larger is more shared information.

    Args:
        views_a: (n, d), n >= 2.
        views_b: (n, d), the same prompts in the same order.
        alpha: Order of the entropy, above 0.
        permutations: Random permutations to average over, at least 1.
        kernel: ``cosine`` (linear on rows of norm 1) or ``gaussian``.
        bandwidth: Width of the Gaussian kernel; default: the median distance of each view.
        normalize: Divide by ln n.
        generator: Source of the permutations, on the CPU; default: one seeded with 0, so that
            repeated calls agree. Base and tuned models should see the same permutations.

    Returns:
        (), float64, nats (or a share of ln n).

    Raises:
        ValueError: different shapes, fewer than two prompts, bad alpha, kernel, bandwidth or
            number of permutations, non-finite entries.
        UndefinedMetricError: a zero row (cosine) or a median distance of 0 (gaussian).

    Example:
        >>> views = torch.eye(8)
        >>> dime(views, torch.ones(8, 8)).item()
        0.0

    References:
        [1] Skean et al., DiME, arXiv:2301.08164.
    """
    check_alpha(alpha)
    if permutations < 1:
        raise ValueError(f"permutations is {permutations}; at least 1 is needed.")
    if bandwidth is not None and not bandwidth > 0:
        raise ValueError(f"bandwidth is {bandwidth}; it must be above 0.")
    a, b = _two_views(views_a, views_b)
    kernel_a = _unit_diagonal_kernel(a, "views_a", kernel, bandwidth)
    kernel_b = _unit_diagonal_kernel(b, "views_b", kernel, bandwidth)
    n = a.shape[0]
    generator = generator or torch.Generator().manual_seed(0)

    def joint(paired: Tensor) -> Tensor:
        product = kernel_a * paired / n
        if alpha == 2:
            return -product.square().sum().log()
        return entropy_from_spectrum(symmetric_eigenvalues(product), alpha)

    matched = joint(kernel_b)
    shuffled = torch.stack([
        joint(kernel_b[order][:, order])
        for order in (torch.randperm(n, generator=generator).to(a.device) for _ in range(permutations))
    ]).mean()
    difference = shuffled - matched
    return difference / math.log(n) if normalize else difference


def dime_of_views(views: Tensor, *, alpha: float = 1.0, seed: int = 0) -> Tensor:
    """`dime` between the first two views of each prompt, (n, q, d) -> (), nats.

    Two models with the same seed see the same permutations.
    """
    return dime(views[:, 0], views[:, 1], alpha=alpha, generator=torch.Generator().manual_seed(seed))
