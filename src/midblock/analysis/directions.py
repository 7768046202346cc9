"""Directions of the change that tuning made to pooled states, and the file that keeps them.

* ``mean``: the mean over samples of the paired difference sft - base;
* ``pcK``: its K-th principal direction (K-th right singular vector of the (n, d) matrix of
  differences, not centred unless asked), as long as the differences' root mean square along
  it, and pointing where their mean points: strength 1 adds what tuning typically adds;
* ``random``: a seeded random direction as long as the mean shift, the control.

Source: Zou et al., "Representation Engineering", 2023 (directions of paired differences).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from midblock import metrics
from midblock.errors import OutputError, SettingsError
from midblock.settings.steer import principal_number
from midblock.writing import atomic_path

__all__ = ["direction_of", "load_vectors", "save_vectors"]


def direction_of(base: Tensor, sft: Tensor, direction: str = "mean", *, centered: bool = False, seed: int = 0
                 ) -> tuple[Tensor, float]:
    """A direction of the paired difference of pooled states, and the share of the change it holds.

    With D = X_sft - X_base, singular values s and right singular vectors v: ``mean`` is the mean row
    m of D; ``pcK`` is (s_K / sqrt(n)) v_K, with the sign that makes its product with m positive. With
    ``centered`` v comes from D - m: the directions in which the change varies between samples.

    Args:
        base: X_base (n, d).
        sft: X_sft (n, d), the same samples.
        direction: ``mean``, ``pc1``, ``pc2`` ..., or ``random`` (norm of ``mean``).
        centered: Principal directions of the centred difference.
        seed: Seed of ``random``.

    Returns:
        The direction (d,) in float32; and the share of sum of squares of D (centred: of D - m) along it.

    Raises:
        SettingsError: an unknown direction, or K exceeds the rank of the difference.

    Example:
        >>> base = torch.zeros(3, 2)
        >>> sft = torch.tensor([[3.0, 0.0], [3.0, 0.0], [3.0, 0.0]])
        >>> direction_of(base, sft, "mean")[0].tolist(), direction_of(base, sft, "pc1")
        ([3.0, 0.0], (tensor([3., 0.]), 1.0))
    """
    number = principal_number(direction)
    difference = sft.double() - base.double()
    mean = difference.mean(dim=0)
    total = float(difference.square().sum())
    if number is None:
        vector = mean
        if direction == "random":
            generator = torch.Generator().manual_seed(seed)
            drawn = torch.randn(mean.shape[0], generator=generator, dtype=torch.float64)
            vector = drawn / drawn.norm() * mean.norm()
        norm = float(vector.norm())
        along = float((difference @ (vector / norm)).square().sum()) if norm > 0 else 0.0
        return vector.float(), along / total if total > 0 else math.nan
    spectrum = metrics.gram_spectrum(difference, center=centered)
    values = spectrum.values
    # eigenvalues of a Gram matrix below this share of the largest are rounding
    rank = int((values > values[0] * 1e-12).sum()) if float(values[0]) > 0 else 0
    if number > rank:
        raise SettingsError(f"direction {direction}: the {'centred ' if centered else ''}difference of "
                            f"{difference.shape[0]} samples has only {rank} principal directions; use more samples or "
                            "a smaller number.")
    rows = difference - mean if centered else difference
    unit = rows.mT @ spectrum.vectors[:, number - 1]
    unit = unit / unit.norm()
    if float(unit @ mean) < 0:
        unit = -unit
    length = math.sqrt(float(values[number - 1]) / difference.shape[0])
    return (length * unit).float(), float(values[number - 1] / values.sum())


def save_vectors(path: Path, vectors: Mapping[tuple[str, int], Tensor], **about: Any) -> Path:
    """Write steering vectors as safetensors (names ``sft-base.block.12``), atomically.

    Args:
        path: File to write.
        vectors: (comparison, block) -> (d,).
        about: What the file's metadata keeps, such as ``direction="mean"``.

    Raises:
        OutputError: the file cannot be written.
    """
    arrays = {f"{stage}.block.{block}": v.detach().float().contiguous().cpu() for (stage, block), v in vectors.items()}
    with atomic_path(path) as temporary:
        save_file(arrays, temporary, metadata={"midblock": json.dumps(about, default=str)})
    return path


def load_vectors(path: Path) -> dict[tuple[str, int], Tensor]:
    """Steering vectors that `save_vectors` wrote: (comparison, block) -> (d,).

    Raises:
        OutputError: the file is absent or holds something else.
    """
    vectors: dict[tuple[str, int], Tensor] = {}
    try:
        with safe_open(path, framework="pt") as stored:
            for name in stored.keys():  # noqa: SIM118 (not a dict)
                stage, _, block = name.rpartition(".block.")
                vectors[stage, int(block)] = stored.get_tensor(name)
    except (OSError, ValueError, SafetensorError) as error:
        raise OutputError(f"{path} holds no steering vectors: {error}.") from None
    return vectors
