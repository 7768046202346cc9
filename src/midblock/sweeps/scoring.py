"""Scoring one model after another on the same items, without repeating what they share.

The blocks before an arm's first trainable one are the base's, so the hidden states that enter that
block are the same for all arms with that first block. They are kept from the first such arm on,
and an arm whose first block lies deeper goes on from there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from midblock.capture import run_blocks, why_not_resume
from midblock.data import Batch, Dataset
from midblock.evaluation import EvalResult, evaluate, find_task, model_limit
from midblock.evaluation.likelihood import score_tokens
from midblock.models.attention import dense_attention
from midblock.progress import Progress, silent
from midblock.settings.sweep import TaskConfig
from midblock.sweeps.records import TaskScores
from midblock.tuning.kernels import lean_lora

if TYPE_CHECKING:
    from midblock.models import LoadedModel

__all__ = ["Scorer"]

_TOKEN_BATCH = {"perplexity": 8, "answer_loss": 16}
_MAX_LENGTH = 1024


class Scorer:
    """Scores whatever is on the model at the moment.

    Args:
        loaded: The base, with or without an arm attached.
        tasks: What to score, by label.
        datasets: Their items, by label.
        limit_bytes: Most bytes of kept hidden states; what does not fit is computed again.
    """

    def __init__(self, loaded: LoadedModel, tasks: Mapping[str, TaskConfig], datasets: Mapping[str, Dataset], *,
                 limit_bytes: int = 2 << 30) -> None:
        self.loaded = loaded
        self.tasks = dict(tasks)
        self.datasets = dict(datasets)
        self._limit = limit_bytes
        self._kept: dict[tuple[str, tuple[int, ...]], tuple[int, Tensor]] = {}
        self._bytes = 0
        self.blocks_passed_over = 0

    def score(self, label: str, *, first_block: int | None = None, progress: Progress = silent) -> TaskScores:
        """Score one task.

        Args:
            label: Of the task.
            first_block: Blocks before it are the base's; None promises nothing.
            progress: Told how many items are done.
        """
        task, data = self.tasks[label], self.datasets[label]
        kind = find_task(task.task).kind
        if kind in _TOKEN_BATCH:
            length = min(task.max_length or _MAX_LENGTH, model_limit(self.loaded))
            with dense_attention(self.loaded.model), lean_lora(self.loaded.model):
                result = score_tokens(
                    self.loaded, task.task, data, batch_size=task.batch_size or _TOKEN_BATCH[kind],
                    max_length=length, chat=task.chat, progress=progress,
                    hidden_of=lambda batch: self._hidden(label, batch, first_block))
        else:
            result = evaluate(self.loaded, task.task, data=data, settings=task.scoring.replace(samples=None),
                              progress=progress)  # the items are drawn already
        return scores_of(label, result)

    def _hidden(self, label: str, batch: Batch, first_block: int | None) -> Tensor:
        model, anatomy = self.loaded.model, self.loaded.anatomy
        if not first_block or why_not_resume(model, anatomy, [first_block])[first_block] is not None:
            return run_blocks(model, anatomy, batch)
        key = (label, batch.indices)
        at, state = self._kept.get(key, (0, None))
        if state is None or at > first_block:
            at, state = 0, None
        found: list[Tensor] = []

        def listen(h: int, z: Tensor) -> None:
            if h == first_block:
                found.append(z)

        hidden = run_blocks(model, anatomy, batch, listener=listen if at != first_block else None,
                            start=at, hidden=state)
        self.blocks_passed_over += at * len(batch)
        if found:
            self._keep(key, first_block, found[0])
        return hidden

    def _keep(self, key: tuple[str, tuple[int, ...]], h: int, state: Tensor) -> None:
        old = self._kept.pop(key, None)
        if old is not None:
            self._bytes -= old[1].numel() * old[1].element_size()
        size = state.numel() * state.element_size()
        if self._bytes + size > self._limit:
            return
        with torch.inference_mode():
            self._kept[key] = (h, state.clone())
        self._bytes += size


def scores_of(label: str, result: EvalResult) -> TaskScores:
    """The part of an evaluation that a sweep keeps."""
    return TaskScores(
        task=label, metric=result.metric, higher_is_better=result.higher_is_better, items=list(result.items),
        scores=[float(s) for s in result.scores],
        tokens=None if result.tokens is None else [float(t) for t in result.tokens],
        value=result.value, seconds=result.seconds, notes=list(result.notes))
