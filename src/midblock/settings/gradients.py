"""Settings of `midblock gradients`."""

from __future__ import annotations

from midblock.settings import sampling
from midblock.settings.base import Settings, setting

__all__ = ["GradientSettings"]


class GradientSettings(Settings):
    """How many batches, and whether to train; `gradients` takes the same names as keyword arguments."""

    samples: int = sampling.samples(32, "Samples to draw; each batch is one observation of the gradient.")
    max_length: int = sampling.max_length(256)
    batch_size: int = sampling.batch_size(4, "Samples in one batch, whose mean loss has the gradient.")
    seed: int = sampling.seed("Seed of the draw and of the order.")
    steps: int = setting(0, ge=0, metavar="N", help=(
        "Really fine-tune all weights for N updates, measure how far each block moves, and put the weights back. "
        "0: gradients only."))
    learning_rate: float = setting(5e-5, gt=0, metavar="RATE", help="AdamW's learning rate for the updates.")
    confidence: float = setting(0.95, gt=0, lt=1, cli=False, help="Confidence of every interval.")
