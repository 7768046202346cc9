"""What each block does while a model is tuned: norm of its gradient, size of its update, drift of its output.

The trainer's numbers are not touched: gradients are only read, and the probe runs without gradients in evaluation mode,
which draws no random number. This module imports transformers' callbacks, so it is imported when a training starts.
"""

from __future__ import annotations

import copy
import json
import logging
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from midblock.capture import model_inputs
from midblock.capture.interventions import hidden_of_output
from midblock.data import TokenRow, make_batches
from midblock.models.adapters import base_weight, layer_factors, merged_weight
from midblock.tuning.adapter import Attachment, adapted_layer
from midblock.tuning.steps import BlockStep

__all__ = ["BlockWatch"]

_LOG = logging.getLogger(__name__)
_PROBE_ROWS, _PROBE_TOKENS = 2, 32
_MEASURED = 10
"""Steps of a run that are measured, evenly; with the first and the last."""


class BlockWatch(TrainerCallback):
    """Measures every block at a few steps; trackers and ``log`` are told.

    Args:
        attachment: What is trained.
        rows: Training rows; the first ones, cut, are the probe.
        pad_id: Fills padded places.
        log: File of one line a block and step; None keeps them in memory only.
    """

    def __init__(self, attachment: Attachment, rows: Sequence[TokenRow], pad_id: int, log: Path | None = None) -> None:
        self._attachment, self._log = attachment, log
        probe = [TokenRow(i, row.ids[:_PROBE_TOKENS]) for i, row in enumerate(rows[:_PROBE_ROWS])]
        device = next(iter(attachment.trainable.values())).device
        self._probe = make_batches(probe, batch_size=len(probe), pad_id=pad_id)[0].to(device)
        self._base: list[Tensor] = []
        self._gradients: dict[int, float] = {}
        self._by_block: dict[int, list[torch.nn.Parameter]] = {}
        for name, parameter in attachment.trainable.items():
            block = attachment.anatomy.block_of(name)
            if block is not None:
                self._by_block.setdefault(block, []).append(parameter)
        self.trainer: Any = None
        self.steps: list[BlockStep] = []

    def restore(self, steps: Sequence[BlockStep]) -> None:
        """What the interrupted run measured, as its checkpoint holds it; the log is written anew."""
        self.steps = list(steps)
        if self._log is None:
            return
        self._log.parent.mkdir(parents=True, exist_ok=True)
        self._log.write_text("".join(json.dumps(asdict(s)) + "\n" for s in self.steps), encoding="utf-8")

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl,
                       **kwargs: Any) -> None:
        try:
            with self._attachment.disabled():
                self._base = self._states()
        except (RuntimeError, TypeError, ValueError, AttributeError, KeyError, IndexError) as error:
            # a model that cannot be probed is trained all the same
            _LOG.warning("blocks are not watched: a probe of the model failed (%s: %s)", type(error).__name__,
                         " ".join(str(error).split())[:200])

    def _measured(self, step: int, steps: int) -> bool:
        return step in (1, steps) or step % max(1, steps // _MEASURED) == 0

    def on_pre_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl,
                              **kwargs: Any) -> None:
        if not self._base or not self._measured(state.global_step + 1, state.max_steps):
            return
        self._gradients = {block: math.sqrt(sum(float(p.grad.detach().float().square().sum()) for p in parameters
                                                if p.grad is not None))
                           for block, parameters in self._by_block.items()}

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl,
                    **kwargs: Any) -> None:
        step = state.global_step
        if not self._base or not self._measured(step, state.max_steps):
            return
        updates = self._updates()
        mask = self._probe.attention_mask > 0
        made = []
        for block, (now, then) in enumerate(zip(self._states(), self._base, strict=True)):
            cosine = torch.nn.functional.cosine_similarity(now[mask], then[mask], dim=-1).mean()
            made.append(BlockStep(step, block, self._gradients.get(block), updates.get(block),
                                  max(0.0, 1 - float(cosine))))
        self.steps += made
        if self._log is not None:
            self._log.parent.mkdir(parents=True, exist_ok=True)
            with self._log.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(asdict(s)) + "\n" for s in made)
        if self.trainer is not None:
            told = {f"blocks/{name}/{s.block:03d}": value for s in made for name, value in (
                ("gradient_norm", s.gradient_norm), ("update_norm", s.update_norm), ("drift", s.drift))
                if value is not None}
            # a copy: being told a log must not stand for the trainer's own
            self.trainer.callback_handler.on_log(args, state, copy.copy(control), told)

    @torch.no_grad()
    def _updates(self) -> dict[int, float]:
        """Block -> norm of its update."""
        squares: dict[int, float] = {}
        attachment = self._attachment
        if attachment.is_peft:
            for module in attachment.plan.modules:
                layer = adapted_layer(attachment.base, module)
                squares[module.block] = squares.get(module.block, 0.0) + _update_square(layer)
        else:
            for name, parameter in attachment.trainable.items():
                block = attachment.anatomy.block_of(name)
                if block is not None:
                    change = parameter.detach() - attachment._original[name].float()
                    squares[block] = squares.get(block, 0.0) + float(change.square().sum())
        return {block: math.sqrt(square) for block, square in squares.items()}

    @torch.no_grad()
    def _states(self) -> list[Tensor]:
        """Output of every block on the probe, (B, T, d) in float32."""
        anatomy, model = self._attachment.anatomy, self._attachment.model
        found: list[Tensor] = []
        hooks = [block.register_forward_hook(lambda _m, _a, out: found.append(hidden_of_output(out).float()))
                 for block in anatomy.blocks]
        modes = [(m, m.training) for m in model.modules()]
        model.eval()
        try:
            # hidden states are asked for so that no cache of a frozen prefix stands in for blocks
            model(**model_inputs(model, self._probe), output_hidden_states=True)
        finally:
            for hook in hooks:
                hook.remove()
            for module, mode in modes:
                module.training = mode
        return found


def _update_square(layer: Any) -> float:
    """Squared Frobenius norm of what an adapter adds to a weight; of plain LoRA from its factors alone.

    |B A|^2 = tr(B'B A A'), products of rank by rank.
    """
    plain = not hasattr(layer, "parameter_name") and not any(n in layer.lora_variant for n in layer.active_adapters)
    if plain:
        a, b = (t.float() for t in layer_factors(layer))
        return max(0.0, float(((b.t() @ b) * (a @ a.t())).sum()))
    return float((merged_weight(layer) - base_weight(layer)).square().sum())
