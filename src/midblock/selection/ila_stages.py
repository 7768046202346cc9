"""ILA's two stages as one sequence of steps that can be saved after any of them and resumed to the same end."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from midblock import stats
from midblock.data import Batch
from midblock.errors import OutputError
from midblock.models.attention import dense_attention
from midblock.models.forwards import forwards_kept
from midblock.models.state import load_state, save_state
from midblock.progress import Progress
from midblock.selection.gates import Gates, ScoreOptimizer, batch_loss, gated, update_norms, update_worths
from midblock.settings.importance import ImportanceSettings
from midblock.training import training_steps
from midblock.tuning.adapter import Attachment
from midblock.tuning.kernels import has_plain_head, lean_lora
from midblock.writing import recomputed, sha256_of

__all__ = ["ScoreSet", "Stages", "is_stable", "loss_slope"]

_CLIP = 1.0
_WARMUP_STEPS = 10


@dataclass(frozen=True)
class ScoreSet:
    """All scores after a number of steps of the first stage."""

    step: int
    final: bool
    """Whether the first stage ended there."""
    scores: dict[str, list[float]]
    """Metric -> one value per unit."""
    worth_ranges: dict[str, list[list[float]]]
    """Intervals of the two Taylor scores over batches."""
    losses: list[float]
    """Loss of every step of the second stage, without the penalty."""
    batches: int = 1
    """Batches behind the Taylor scores."""


def loss_slope(curve: Sequence[tuple[int, float]], window: int) -> float | None:
    """Slope of the least-squares line through the last ``window`` measurements of the loss, in nats per step.

    Args:
        curve: (step, loss in nats), ascending.
        window: Number of measurements.

    Returns:
        None while there are fewer measurements than that.

    Example:
        >>> loss_slope([(0, 3.0), (10, 2.0), (20, 1.0)], 3)
        -0.1
    """
    if len(curve) < window:
        return None
    steps, losses = (np.array(column, dtype=np.float64) for column in zip(*curve[-window:], strict=True))
    centred = steps - steps.mean()
    return float(centred @ losses / (centred @ centred))


def is_stable(curve: Sequence[tuple[int, float]], settings: ImportanceSettings) -> bool:
    """Whether the loss of the first stage changes no more (ILA, section 3: epsilon-stable)."""
    slope = loss_slope(curve, settings.window)
    return slope is not None and abs(slope) < settings.epsilon


class Stages:
    """Both stages as one sequence of steps that can be saved after any of them."""

    def __init__(self, attachment: Attachment, gates: Gates, batches: list[Batch], settings: ImportanceSettings,
                 path: Path | None, save_seconds: float, progress: Progress) -> None:
        self.attachment, self.gates, self.batches, self.settings = attachment, gates, batches, settings
        self.path, self.save_seconds, self.progress = path, save_seconds, progress
        self.saved = time.monotonic()
        self.step = 0
        self.phase: Literal["train", "score", "done"] = "train"
        self.curve: list[tuple[int, float]] = []
        self.stopped = ""
        self.sets: list[ScoreSet] = []
        self.score_losses: list[float] = []
        self.scores = self._fresh_scores()
        self.optimizer = torch.optim.AdamW(list(attachment.trainable.values()), lr=settings.learning_rate,
                                           weight_decay=0.0)
        self.plain = has_plain_head(attachment.anatomy)
        # evenly over batches that are sorted by length, so that no length is left out
        places = np.linspace(0, len(batches) - 1, min(settings.probe_batches, len(batches))).round().astype(int)
        self.probe = [batches[i] for i in dict.fromkeys(places.tolist())]
        # not the most steps: a run goes on where more are allowed
        lasting = {**settings.model_dump(), "max_steps": ImportanceSettings().max_steps}
        self.identity = sha256_of(json.dumps(lasting, sort_keys=True),
                                  json.dumps(attachment.plan.to_dict()),
                                  *(b.input_ids.cpu().numpy().tobytes() for b in batches))

    def _fresh_scores(self) -> ScoreOptimizer:
        start = torch.full((len(self.gates.units),), self.settings.score_start, dtype=torch.float64)
        return ScoreOptimizer(start, self.settings.score_rate)

    # ------------------------------------------------------------------ the sequence

    def finish(self) -> None:
        """Do what is left to do."""
        with dense_attention(self.attachment.base), lean_lora(self.attachment.base):
            while self.phase != "done":
                if self.phase == "train":
                    self._train()
                else:
                    self._learn_scores()

    def _train(self) -> None:
        """First stage, up to its end or to the next step at which scores are wanted."""
        wanted = self.settings
        if not self.curve:
            self._measure()
        for step in training_steps(
                (self._batch(i, "train") for i in itertools.count(self.step)),
                lambda b: batch_loss(self.attachment, b, plain=self.plain), list(self.attachment.trainable.values()),
                self.optimizer, first=self.step, max_grad_norm=_CLIP,
                learning_rate=lambda i: wanted.learning_rate * min(1.0, (i + 1) / _WARMUP_STEPS)):
            self.step = step.number
            self.progress("stage 1: LoRA on all", self.step, wanted.max_steps, f"loss {step.loss:.3f}")
            if self.step % wanted.check_every == 0 or self.step == wanted.max_steps:
                self._measure()
                self.stopped = self._reason_to_stop()
            self.save()
            if self.stopped or self.step in wanted.at_steps:
                break
        self.phase = "score"
        self.save(now=True)

    @property
    def stable(self) -> bool:
        return is_stable(self.curve, self.settings)

    def _reason_to_stop(self) -> str:
        """Why the first stage ends here; empty where it goes on."""
        wanted, slope = self.settings, loss_slope(self.curve, self.settings.window)
        if self.stable:
            return (f"epsilon-stable: {slope:+.1e} nats per step over the last {wanted.window} measurements, below "
                    f"{wanted.epsilon:g}")
        if self.step < wanted.max_steps:
            return ""
        found = "too few measurements" if slope is None else f"{slope:+.1e} nats per step"
        return f"not stable after the most steps allowed: {found}, epsilon {wanted.epsilon:g}"

    def _batch(self, step: int, what: str) -> Batch:
        epoch, place = divmod(step, len(self.batches))
        seed = int(sha256_of("ila", what, str(self.settings.seed), str(epoch))[:15], 16)
        return self.batches[int(np.random.default_rng(seed).permutation(len(self.batches))[place])]

    def _measure(self) -> None:
        """Add the loss of the probe batches to the curve."""
        total = tokens = 0.0
        with torch.no_grad():
            for batch in self.probe:
                assert batch.labels is not None
                counted = int((batch.labels[:, 1:] != -100).sum())
                total += batch_loss(self.attachment, batch, plain=self.plain).item() * counted
                tokens += counted
        self.curve.append((self.step, total / tokens))

    def _learn_scores(self) -> None:
        """Second stage on the adapter as it is, then the controls."""
        wanted, own = self.settings, self.scores
        device = next(self.attachment.anatomy.embeddings.parameters()).device
        leaf = own.scores.to(device, torch.float32).requires_grad_(True)

        def loss(batch: Batch) -> Tensor:
            self.gates.values = torch.sigmoid(leaf)
            found = batch_loss(self.attachment, batch, plain=self.plain)
            self.score_losses.append(found.item())
            return found + wanted.penalty * self.gates.values.sum()

        class Update:
            def step(self) -> None:
                assert leaf.grad is not None
                own.step(leaf.grad.double().cpu())
                with torch.no_grad():
                    leaf.copy_(own.scores)

        with _plain_forwards(self.attachment), gated(self.attachment, self.gates):
            for step in training_steps((self._batch(i, "scores") for i in range(own.steps, wanted.score_steps)), loss,
                                       [leaf], Update(), first=own.steps, max_grad_norm=math.inf):
                self.progress("stage 2: scores", step.number, wanted.score_steps, f"loss {self.score_losses[-1]:.3f}")
                self.save()
        self.sets.append(self._score_set())
        self.score_losses = []
        self.scores = self._fresh_scores()
        self.phase = "done" if self.stopped else "train"
        self.save(now=True)

    def _score_set(self) -> ScoreSet:
        scores = {"ila_score": self.scores.scores.tolist()}
        ranges: dict[str, list[list[float]]] = {}
        for metric, at in (("taylor", 1.0), ("taylor_base", 0.0)):
            with _plain_forwards(self.attachment):
                worths = update_worths(self.attachment, self.gates, self.probe, at=at).numpy()
            means = [stats.mean_interval(column) for column in worths.T]
            scores[metric] = [abs(m.value) for m in means]
            # the interval of the signed mean, turned with it
            ranges[metric] = [[m.low, m.high] if m.value >= 0 else [-m.high, -m.low] for m in means]
        scores["update_norm"] = update_norms(self.attachment, self.gates).tolist()
        seed = int(sha256_of("ila random control", self.identity, str(self.step))[:15], 16)
        scores["random"] = np.random.default_rng(seed).random(len(self.gates.units)).tolist()
        return ScoreSet(self.step, bool(self.stopped), scores, ranges, self.score_losses, len(self.probe))

    # ------------------------------------------------------------------ progress on disk

    def save(self, *, now: bool = False) -> None:
        """Write everything, if it is time."""
        if self.path is None or not (now or time.monotonic() - self.saved >= self.save_seconds):
            return
        tensors = {f"adapter|{n}": t.contiguous() for n, t in self.attachment.state().items()}
        tensors |= {"scores": self.scores.scores, "first": self.scores.first, "second": self.scores.second}
        if self.phase != "done" or not self.stable:
            for name, parameter in self.attachment.trainable.items():
                for key, value in self.optimizer.state.get(parameter, {}).items():
                    tensors[f"optimizer|{name}|{key}"] = value.detach().cpu().contiguous()
        state = {"identity": self.identity, "step": self.step, "phase": self.phase, "curve": self.curve,
                 "stopped": self.stopped, "sets": [asdict(s) for s in self.sets],
                 "score_steps": self.scores.steps, "score_losses": self.score_losses}
        save_state(self.path, tensors, state)
        self.saved = time.monotonic()

    def restore(self) -> None:
        """Put saved progress back, if there is any.

        A first stage that ended for want of steps goes on where more are allowed; the scores at its end stay as those
        of a step on the way.

        Raises:
            OutputError: it belongs to another run.

        Progress that is damaged is named in a warning, and everything is learned anew.
        """
        if self.path is None or not self.path.is_file():
            return
        try:
            tensors, state = load_state(self.path)
        except OutputError as error:
            recomputed(error, "Everything is learned anew.")
            return
        if state["identity"] != self.identity:
            raise OutputError(f"{self.path} belongs to a run with other settings or data; name a new --out folder.")
        self.attachment.load_state({k.split("|", 1)[1]: t for k, t in tensors.items() if k.startswith("adapter|")})
        for name, parameter in self.attachment.trainable.items():
            own = {k.rsplit("|", 1)[1]: t for k, t in tensors.items() if k.startswith(f"optimizer|{name}|")}
            if own:
                self.optimizer.state[parameter] = {
                    k: t if t.ndim == 0 else t.to(parameter.device) for k, t in own.items()}
        self.step, self.phase, self.stopped = state["step"], state["phase"], state["stopped"]
        self.curve = [(int(s), float(v)) for s, v in state["curve"]]
        self.sets = [ScoreSet(**s) for s in state["sets"]]
        self.score_losses = state["score_losses"]
        self.scores.steps = state["score_steps"]
        self.scores.scores.copy_(tensors["scores"])
        self.scores.first.copy_(tensors["first"])
        self.scores.second.copy_(tensors["second"])
        # a finished run of an older version has no moments of the optimizer to go on with
        if self.stopped and not self.stable and self.step < self.settings.max_steps and self.optimizer.state:
            self._go_on()

    def _go_on(self) -> None:
        """Continue a first stage that ended for want of steps."""
        self.stopped = ""
        if self.step % self.settings.check_every:
            self.curve.pop()
        if self.phase == "done":
            self.phase, self.sets[-1] = "train", replace(self.sets[-1], final=False)


def _plain_forwards(attachment: Attachment) -> contextlib.AbstractContextManager[None]:
    """Within the context adapted layers have no lean forward, which gates would otherwise take for theirs."""
    adapted = [m for m in attachment.base.modules() if hasattr(m, "lora_A")]
    return forwards_kept(adapted, plain=True)
