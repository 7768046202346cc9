"""What a training measured: one record per optimizer step, and what they add up to."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

__all__ = ["BlockStep", "StepLog", "TrainResult"]


@dataclass(frozen=True, slots=True)
class StepLog:
    """One optimizer step. Losses are means over labelled tokens, in nats."""

    step: int
    epoch: int
    loss: float
    tokens: int
    """Real tokens (padding left out) of the step."""
    supervised: int
    padded: int
    """Tokens that went through the blocks, padding included."""
    seconds: float


@dataclass(frozen=True, slots=True)
class BlockStep:
    """One block at one step."""

    step: int
    block: int
    gradient_norm: float | None
    """Frobenius norm of the gradient of its trained tensors, as the optimizer gets it; None where none is trained."""
    update_norm: float | None
    """Frobenius norm of what training has added to its weights, sqrt of the sum over matrices."""
    drift: float
    """1 - cosine of its output with the base's, mean over the probe's tokens."""


@dataclass
class TrainResult:
    """What training measured. The adapter itself is in the `Attachment`."""

    steps: list[StepLog]
    seconds: float
    """Time in steps, without saving and setting up."""
    peak_memory_bytes: int
    """Peak of the device where it counts memory, else of the process."""
    prefix: dict[str, Any]
    """`FrozenPrefix.describe`."""
    notes: list[str] = field(default_factory=list)
    resumed_from: int = 0
    """Step that this call started from; 0 without a checkpoint."""
    blocks: list[BlockStep] = field(default_factory=list)
    """What each block did at some of the steps, where that was watched."""

    @property
    def tokens_per_second(self) -> float:
        """Real tokens per second over all steps of this call."""
        own = [s for s in self.steps if s.step > self.resumed_from]
        seconds = sum(s.seconds for s in own)
        return sum(s.tokens for s in own) / seconds if seconds else math.nan

    def tokens_per_second_of_epoch(self, epoch: int) -> float:
        """Real tokens per second of one epoch (the first fills the prefix cache)."""
        own = [s for s in self.steps if s.epoch == epoch]
        seconds = sum(s.seconds for s in own)
        return sum(s.tokens for s in own) / seconds if seconds else math.nan

    @property
    def losses(self) -> list[float]:
        """Loss of every step."""
        return [s.loss for s in self.steps]

    def final_loss(self, share: float = 0.1) -> float:
        """Mean loss of the last tenth of the steps."""
        tail = self.losses[-max(1, round(len(self.steps) * share)):]
        return sum(tail) / len(tail)

    def describe(self) -> dict[str, Any]:
        """JSON-ready summary without the single steps."""
        epochs = sorted({s.epoch for s in self.steps})
        return {"steps": len(self.steps), "seconds": self.seconds, "first_loss": self.losses[0],
                "final_loss": self.final_loss(), "tokens": sum(s.tokens for s in self.steps),
                "supervised_tokens": sum(s.supervised for s in self.steps),
                "padding_share": 1 - sum(s.tokens for s in self.steps) / max(1, sum(s.padded for s in self.steps)),
                "tokens_per_second": self.tokens_per_second,
                "tokens_per_second_by_epoch": {str(e + 1): self.tokens_per_second_of_epoch(e) for e in epochs},
                "peak_memory_bytes": self.peak_memory_bytes, "prefix": self.prefix,
                "resumed_from": self.resumed_from, "notes": self.notes}
