"""Settings of `midblock importance`."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from midblock.settings.base import Settings, name_of, setting
from midblock.settings.sampling import batch_size, max_length, samples, seed
from midblock.settings.tune import REFERENCE_RANK

__all__ = ["ImportanceSettings", "Unit"]

Unit = Literal["matrix", "block"]


class ImportanceSettings(Settings):
    """How ILA is run; `importance` takes the same names as keyword arguments.

    docs/selection.md gives the reason of every default.
    """

    unit: Unit = setting("matrix", help=(
        "What gets one score: an adapted matrix, or all matrices of a block together."))
    samples: int | None = samples(400, "Rows to draw.")
    max_length: int = max_length(256)
    batch_size: int = batch_size(8, "Rows per step, in both stages.")
    seed: int = seed("Seed of the draw, the order, the adapter's start and the random control.")
    rank: int = setting(REFERENCE_RANK, ge=1, metavar="R", help="LoRA rank of the first stage.")
    target_modules: tuple[str, ...] = setting(("all-linear",), min_length=1, metavar="NAMES", help=(
        "Matrices to adapt, separated by commas: all-linear, attention, mlp, q, k, v, o, ..."))
    learning_rate: float = setting(5e-4, gt=0, metavar="LR", help=(
        "Of the first stage: AdamW, constant after ten steps of rise, since its length is not known."))
    max_steps: int = setting(300, ge=1, le=1_000_000, metavar="N", help=(
        "Most steps of the first stage; --resume takes more where it was not stable by then."))
    epsilon: float = setting(1e-3, gt=0, metavar="E", help=(
        "The first stage ends when the smoothed loss changes by less than this, in nats per step."))
    check_every: int = setting(10, ge=1, metavar="N", help="Steps between two looks at that loss.")
    window: int = setting(5, ge=2, metavar="N", help="Looks that the slope is fitted to.")
    probe_batches: int = setting(4, ge=1, metavar="N", help=(
        "Training batches, spread over all lengths, whose loss is the curve; also those of the controls."))
    score_steps: int = setting(100, ge=1, le=1_000_000, metavar="N", help=(
        "Steps of the second stage, on the scores alone."))
    score_rate: float = setting(0.1, gt=0, metavar="RATE", help="Largest change of a score in one step.")
    score_start: float = setting(0.0, cli=False, help="First value of every score: sigmoid(0) counts half an update.")
    penalty: float = setting(0.0, ge=0, metavar="LAMBDA", help=(
        "Adds LAMBDA * sum sigmoid(s) to the loss of the second stage, in nats."))
    at_steps: tuple[int, ...] = setting((), metavar="N,N,...", help=(
        "Learn scores after these steps of the first stage too, to see whether the choice is stable."))

    @model_validator(mode="after")
    def _stops_within_the_stage(self) -> ImportanceSettings:
        if any(not 0 < step <= self.max_steps for step in self.at_steps):
            raise ValueError(f"{name_of('at_steps')} {list(self.at_steps)} must lie between 1 and the most steps "
                             f"({self.max_steps})")
        return self
