"""Quantities of one block or of the chain of blocks, for locating a block worth tuning.

References:
    [1] Men et al., ShortGPT, 2024: block influence, 1 - cos of a block's input and output.
    [2] Gromov et al., The Unreasonable Ineffectiveness of the Deeper Layers, 2024: angular distance.
    [3] Harchaoui & Cappe, 2007; Arlot, Celisse & Harchaoui, JMLR 20 (2019): kernel change points.
    [4] Marchenko & Pastur, 1967. [5] Gavish & Donoho, IEEE Trans. Inf. Theory 60 (2014): noise level
    from the median singular value. [6] Hartford et al., Spectrum, 2024: layers by signal to noise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from midblock.errors import UndefinedMetricError
from midblock.metrics._inputs import as_batch, floating, matching, norms, require_finite

__all__ = ["angular_distance", "block_influence", "change_points", "marchenko_pastur_edge",
           "marchenko_pastur_median", "spectral_snr"]


def _chords(z_in: Tensor, z_out: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """|u - v| and |u + v| of each token's directions u, v before and after a block, and what counts.

    1 - cos = |u - v|^2 / 2 and angle = 2 atan2(|u - v|, |u + v|): exact also where a block hardly turns
    anything, where 1 - cos and arccos lose all digits.

    Returns:
        Two tensors (B, T) and a boolean mask (B, T) of real tokens whose states are not 0.

    Raises:
        ValueError: shapes differ, or non-finite entries.
    """
    matching(z_in, z_out, "states before and after a block")
    require_finite(z_in, "z_in")
    require_finite(z_out, "z_out")
    first, valid, _ = as_batch(z_in, mask, "z_in")
    second, _, _ = as_batch(z_out, mask, "z_out")
    first, second = floating(first), floating(second)
    length_in, length_out = norms(first, keepdim=True), norms(second, keepdim=True)
    counts = ((length_in > 0) & (length_out > 0)).squeeze(-1)
    if valid is not None:
        counts &= (valid > 0).to(counts.device, non_blocking=True)
    u = first / torch.where(length_in > 0, length_in, torch.ones_like(length_in))
    v = second / torch.where(length_out > 0, length_out, torch.ones_like(length_out))
    return norms(u - v), norms(u + v), counts


def _token_mean(values: Tensor, counts: Tensor) -> Tensor:
    total = counts.sum(dim=1)
    mean = torch.where(counts, values, torch.zeros_like(values)).double().sum(dim=1) / total
    return torch.where(total > 0, mean, torch.full_like(mean, math.nan))


def block_influence(z_in: Tensor, z_out: Tensor, mask: Tensor | None = None) -> Tensor:
    """Block influence [1]: mean over tokens of 1 - cos(z_in, z_out).

    Args:
        z_in: Hidden b, (T, d) or (B, T, d); ``z_out``: hidden b+1; ``mask``: (B, T).

    Returns:
        (B,) in 0..2 (one number per sample; (1,) for one sample without a batch dim). NaN for a sample
        without a countable token.

    Example:
        >>> z = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> round(block_influence(z, torch.tensor([[3.0, 0.0], [1.0, 0.0]])).item(), 6)
        0.5
    """
    apart, _, counts = _chords(z_in, z_out, mask)
    return _token_mean(apart.square() / 2, counts)


def angular_distance(z_in: Tensor, z_out: Tensor, mask: Tensor | None = None) -> Tensor:
    """Angular distance [2]: mean over tokens of arccos(cos(z_in, z_out)) / pi, 0..1.

    The source takes the last token only; here all real tokens count. Arguments and shapes as for
    `block_influence`.

    Example:
        >>> round(angular_distance(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])).item(), 6)
        0.5
    """
    apart, together, counts = _chords(z_in, z_out, mask)
    return _token_mean(2 * torch.atan2(apart, together) / math.pi, counts)


def change_points(similarity: npt.ArrayLike, segments: int) -> list[int]:
    """Borders that cut a sequence into segments of like elements [3].

    Minimises sum over segments S of sum_{i in S} k_ii - (1/|S|) sum_{i,j in S} k_ij (the within-segment
    scatter in the feature space of the kernel k) by dynamic programming, exactly.

    Args:
        similarity: Kernel matrix (n, n), symmetric: CKA between all hidden states, say.
        segments: How many segments, 1 to n; each has at least one element.

    Returns:
        The first index of every segment but the first, ascending; the first of equally good cuts.

    Raises:
        ValueError: not a square finite matrix, or more segments than elements.

    Example:
        >>> change_points([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]], 2)
        [2]
    """
    kernel = np.asarray(similarity, dtype=np.float64)
    if kernel.ndim != 2 or kernel.shape[0] != kernel.shape[1] or not np.isfinite(kernel).all():
        raise ValueError(f"change points need a square finite matrix, got shape {kernel.shape}.")
    n = kernel.shape[0]
    if not 1 <= segments <= n:
        raise ValueError(f"{segments} segments of {n} elements are not possible.")
    inside = np.zeros((n + 1, n + 1))
    inside[1:, 1:] = kernel.cumsum(axis=0).cumsum(axis=1)
    diagonal = np.concatenate([[0.0], np.diag(kernel).cumsum()])

    def scatter(lo: int, hi: int) -> float:
        block = inside[hi, hi] - inside[lo, hi] - inside[hi, lo] + inside[lo, lo]
        return float(diagonal[hi] - diagonal[lo] - block / (hi - lo))

    cost = {(1, hi): scatter(0, hi) for hi in range(1, n + 1)}
    cut: dict[tuple[int, int], int] = {}
    for k in range(2, segments + 1):
        for hi in range(k, n + 1):
            best = min(range(k - 1, hi), key=lambda lo: (round(cost[k - 1, lo] + scatter(lo, hi), 12), lo))
            cost[k, hi], cut[k, hi] = cost[k - 1, best] + scatter(best, hi), best
    borders: list[int] = []
    hi = n
    for k in range(segments, 1, -1):
        hi = cut[k, hi]
        borders.append(hi)
    return borders[::-1]


@lru_cache(maxsize=256)
def marchenko_pastur_median(ratio: float) -> float:
    """Median eigenvalue of W W' / n for an m x n matrix of independent unit-variance entries [4].

    Args:
        ratio: m / n in (0, 1].

    Example:
        >>> round(marchenko_pastur_median(1.0), 3), round(marchenko_pastur_median(0.01), 2)
        (0.653, 1.0)
    """
    if not 0 < ratio <= 1:
        raise ValueError(f"the ratio m/n must be in (0, 1], got {ratio}.")
    low, high = (1 - math.sqrt(ratio)) ** 2, (1 + math.sqrt(ratio)) ** 2
    # t = centre - radius cos(u) removes the square-root ends of the density
    u = (np.arange(20000) + 0.5) * math.pi / 20000
    t = (low + high) / 2 - (high - low) / 2 * np.cos(u)
    mass = np.cumsum(np.sin(u) ** 2 / t)
    return float(t[int(np.searchsorted(mass, mass[-1] / 2))])


def marchenko_pastur_edge(singular_values: Tensor, shape: Sequence[int]) -> float:
    """Largest singular value that noise alone would reach: sigma (sqrt(m) + sqrt(n)) [4].

    The noise level comes from the median singular value [5]: sigma = s_med / sqrt(n mu), with n the
    larger side and mu the median of the Marchenko-Pastur law.

    Args:
        singular_values: (min(m, n),), any order.
        shape: (m, n) of the matrix.

    Raises:
        UndefinedMetricError: the median is 0 (at least half of the values are).
    """
    require_finite(singular_values, "singular_values")
    small, large = sorted(int(x) for x in shape)
    median = float(torch.quantile(singular_values.double(), 0.5))
    if median <= 0:
        raise UndefinedMetricError("the noise level is undefined: half of the singular values are 0.")
    sigma = median / math.sqrt(large * marchenko_pastur_median(small / large))
    return sigma * (math.sqrt(small) + math.sqrt(large))


def spectral_snr(spectra: Sequence[tuple[Tensor, Sequence[int]]]) -> float:
    """Energy of singular values above the Marchenko-Pastur edge over the energy below, over matrices.

    Sum over matrices of sum_{s > edge} s^2, divided by the sum of sum_{s <= edge} s^2. Like [6], but with
    energies instead of singular values and without division by the largest one. Independent noise has
    about 0 (one value may stray over the edge).

    Args:
        spectra: (singular values, shape) of each matrix.

    Raises:
        UndefinedMetricError: no matrix, or a noise level of 0.

    Example:
        >>> noise = torch.randn(60, 90, generator=torch.Generator().manual_seed(0))
        >>> spectral_snr([(torch.linalg.svdvals(noise), noise.shape)]) < 0.1
        True
    """
    signal = noise = 0.0
    for values, shape in spectra:
        energy = values.double().square()
        above = values.double() > marchenko_pastur_edge(values, shape)
        signal += float(energy[above].sum())
        noise += float(energy[~above].sum())
    if noise <= 0:
        raise UndefinedMetricError("the signal-to-noise ratio is undefined: no singular value is noise.")
    return signal / noise


