"""The head on labelled tokens only, under any trainer."""

from __future__ import annotations

import contextlib
import functools
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from midblock import metrics
from midblock.errors import SettingsError
from midblock.models import LoadedModel, find_anatomy
from midblock.models.forwards import forwards_replaced, replace_forward
from midblock.tuning.kernels import has_plain_head, lean_lora, row_losses

__all__ = ["SupervisedHead"]


class SupervisedHead:
    """Within the context, training forwards with labels make logits for labelled tokens only, and never all at once.

    Works under transformers' Trainer, TRL's SFTTrainer (whose fused head is served too) and hand-written loops that
    read ``model(**inputs, labels=labels).loss``; such a forward then has no ``logits``. Loss and gradients are those
    without it, up to the order of sums. Plain LoRA layers compute in the dtype of their base, as
    `midblock.tuning.kernels.lean_lora` does. Forwards without gradient or labels, and models whose logits are more
    than their head (soft caps, scaled logits, encoder-decoders, a trained head), are left alone; ``notes`` says so.

    Args:
        model: A transformers causal LM or a PEFT model around one, with its adapters attached; a `LoadedModel`.

    Raises:
        SettingsError: another `SupervisedHead` is active on this model.

    Example:
        ``with FrozenPrefix(trainer.model, cache="memory"), SupervisedHead(trainer.model): trainer.train()``
    """

    def __init__(self, model: nn.Module | LoadedModel) -> None:
        self.anatomy = model.anatomy if isinstance(model, LoadedModel) else find_anatomy(model)
        self._model = model.model if isinstance(model, LoadedModel) else model
        self._stack = contextlib.ExitStack()
        self.notes: list[str] = []
        self.tokens = self.labelled = 0
        """Tokens of all forwards, and those that went through the head."""

    def __enter__(self) -> SupervisedHead:
        lm: Any = self.anatomy.causal_lm
        if getattr(lm.__dict__.get("forward"), "_supervised_head", False):
            raise SettingsError("another SupervisedHead is active on this model; leave its context first.")
        if not has_plain_head(self.anatomy):
            self.notes.append(f"the logits of {type(lm).__name__} are more than its head, or the head is trained: "
                              "its forward is left as it is")
            return self
        self._stack.enter_context(lean_lora(self._model))
        original = lm.forward

        @functools.wraps(original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            return self._forward(original, args, kwargs)

        forward._supervised_head = True  # type: ignore[attr-defined]
        self._stack.callback(replace_forward(lm, forward))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self._stack.close()

    def _forward(self, original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        labels = kwargs.get("labels")
        if (not torch.is_grad_enabled() or not isinstance(labels, Tensor) or kwargs.get("shift_labels") is not None
                or kwargs.get("output_router_logits") or kwargs.get("logits_to_keep")):
            return original(*args, **kwargs)
        inside = {k: v for k, v in kwargs.items() if k not in ("labels", "fused_lm_head", "num_items_in_batch")}
        hidden: list[Tensor] = []

        def keep(x: Tensor) -> Tensor:
            hidden.append(x)
            return x

        # the model's own forward, whose head hands its input on: whatever comes before the head is as ever
        with forwards_replaced([self.anatomy.head], [keep]):
            out = original(*args, **inside)
        states = hidden[0]
        if states.shape[:2] != labels.shape:  # prompt tuning adds positions
            return original(*args, **kwargs)
        return self._scored(out, states, labels, kwargs)

    def _scored(self, out: Any, states: Tensor, labels: Tensor, kwargs: dict[str, Any]) -> Any:
        targets = labels[:, 1:].to(states.device)
        mask = targets != -100
        rows, index = states[:, :-1][mask], targets[mask]
        self.tokens += mask.numel()
        self.labelled += index.numel()
        entropy, first = torch.zeros(index.numel()), torch.zeros(index.numel(), dtype=torch.bool)
        fused = bool(kwargs.get("fused_lm_head"))
        done = 0

        def look(logits: Tensor, part: Tensor) -> None:
            nonlocal done
            sums = metrics.row_sums(logits, part)
            entropy[done:done + len(part)] = metrics.statistics_of(sums).entropy
            first[done:done + len(part)] = metrics.top_k(logits, sums.maxima, 1)[:, 0] == part
            done += len(part)

        losses = self._losses(rows, index, look if fused else None)
        count = kwargs.get("num_items_in_batch")
        loss = losses.sum() / (mask.sum().clamp(min=1) if count is None else count)
        if not fused:
            return type(out)(**{**out, "loss": loss, "logits": None})
        from trl.trainer.utils import FusedCausalLMOutput

        def placed(values: Tensor) -> Tensor:
            return torch.zeros(mask.shape, dtype=values.dtype, device=mask.device).masked_scatter(
                mask, values.to(mask.device))

        return FusedCausalLMOutput(loss=loss, log_probs=placed(-losses), entropy=placed(entropy),
                                   is_top1=placed(first), label_mask=mask)

    def _losses(self, rows: Tensor, index: Tensor, look: Any) -> Tensor:
        kind = rows.device.type
        if not torch.is_autocast_enabled(kind):
            return row_losses(rows, self.anatomy.head, index, look)
        dtype = torch.get_autocast_dtype(kind)
        head: Any = self.anatomy.head
        cast: Any = nn.Module()  # holds the head's weights in the dtype that autocast would give them
        cast.weight = nn.Parameter(head.weight.detach().to(dtype), requires_grad=False)
        cast.bias = None if head.bias is None else nn.Parameter(head.bias.detach().to(dtype), requires_grad=False)
        with torch.autocast(kind, enabled=False):
            return row_losses(rows.to(dtype), cast, index, look)
