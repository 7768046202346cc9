"""Settings of everything that is scored token by token: lens, swap, merge, steer."""

from __future__ import annotations

from midblock.settings import sampling
from midblock.settings.base import Settings, setting

__all__ = ["TokenMeanSettings"]


class TokenMeanSettings(Settings):
    """Which samples, which of their tokens, and what their mean is taken over."""

    samples: int = sampling.samples(50, "Samples to draw.")
    max_length: int = sampling.max_length(256)
    batch_size: int = sampling.batch_size()
    seed: int = sampling.seed("Seed of the draw and of the resampling.")
    supervised: bool = setting(False, help=(
        "Count only completion tokens, where the data has prompts and completions."))
    per_sample_mean: bool = setting(False, help=(
        "Take loss, accuracy and perplexity as the mean of the samples' own means, not over all tokens at once."))
    confidence: float = setting(0.95, gt=0, lt=1, cli=False, help="Confidence of every interval.")
