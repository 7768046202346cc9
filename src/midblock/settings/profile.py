"""Settings of `midblock profile`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import field_validator, model_validator

from midblock.settings import sampling
from midblock.settings.base import Settings, setting

__all__ = ["ProfileSettings", "StabilitySettings"]


class ProfileSettings(Settings):
    """What is measured and how; `profile` takes the same names as keyword arguments."""

    samples: int = sampling.samples(200, "Samples of the pooled level (the paper: 1,000).", least=2)
    token_samples: int = setting(
        50, ge=0, metavar="N", help="Samples of the token level, the first of the same draw (the paper: 100; 0: none).")
    paper: bool = setting(False, help="The paper's sizes: 1,000 pooled and 100 token-level samples.")
    max_length: int = sampling.max_length(512, least=3)
    batch_size: int = sampling.batch_size()
    seed: int = sampling.seed("Seed of the draw, the bootstrap and the augmentations.")
    views: int = setting(0, ge=0, le=16, metavar="Q", help=(
        "Augmented views per sample for InfoNCE, LiDAR and DiME; 0 leaves them out."))
    view_samples: int = setting(100, ge=2, metavar="N", help="Samples that get views.")
    alpha: float = setting(1.0, gt=0, metavar="A", help="Order of the matrix entropies.")
    normalize: Literal["max", "rows", "dim", "none"] = setting(
        "max", help=("What entropies are divided by: ln min(T, d) (max, the paper's code), ln T (rows, the paper's "
                     "text), ln d (dim), nothing (none)."))
    sparsity_eps: float = setting(1e-2, gt=0, metavar="EPS", help="Entries below this size count as inactive.")
    paper_code: bool = setting(False, old=("earlier_code",), help=(
        "The formulas of the paper's public code where they differ: unit rows, squared singular values, "
        "sparsity relative to the largest entry."))
    unit_rows: bool = setting(False, cli=False, help="Scale every row to norm 1 before the entropies.")
    energy: bool = setting(False, cli=False, help="Effective rank from squared singular values.")
    sparsity_relative: bool = setting(
        False, cli=False, help="Take `sparsity_eps` relative to the largest entry.")
    rank_tol: float = setting(0.01, gt=0, lt=1, cli=False, help=(
        "Singular values above this share of the largest count towards the rank."))
    replicates: int = setting(
        1000, ge=20, le=1_000_000, metavar="B", help="Bootstrap replicates of the dataset-level intervals.")
    exact_bootstrap: bool = setting(False, help=(
        "Decompose every bootstrap replicate anew (slow) instead of to first order."))
    confidence: float = setting(0.95, gt=0, lt=1, cli=False, help="Confidence of every interval.")

    @model_validator(mode="before")
    @classmethod
    def _presets(cls, values: Any) -> Any:
        """``paper`` and ``paper_code`` set what was not given by itself."""
        if not isinstance(values, Mapping):
            return values
        presets: dict[str, Any] = {}
        if values.get("paper"):
            presets |= {"samples": 1000, "token_samples": 100}
        if values.get("paper_code") or values.get("earlier_code"):
            presets |= {"unit_rows": True, "energy": True, "sparsity_relative": True}
        return {**presets, **values}

    @field_validator("views")
    @classmethod
    def _enough_views(cls, views: int) -> int:
        if views == 1:
            raise ValueError("must be 0 or 2 to 16, got 1")
        return views

    @property
    def resampling(self) -> Literal["first-order", "exact"]:
        """How replicate spectra are made: to first order from one decomposition, or one by one."""
        return "exact" if self.exact_bootstrap else "first-order"


class StabilitySettings(ProfileSettings):
    """A profile that is repeated: `profile_seeds` takes the same names as keyword arguments."""

    seeds: int = setting(1, ge=1, metavar="N", help=(
        "Repeat with N draws of samples and augmentations; adds a t-test per hidden state against no change."))
