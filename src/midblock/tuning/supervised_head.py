"""The head on labelled tokens only, under any trainer."""

from __future__ import annotations

import contextlib
import functools
from types import TracebackType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from midblock import metrics
from midblock.errors import SettingsError
from midblock.models import LoadedModel, find_anatomy
from midblock.models.attention import can_pack, dense_attention, packed_hidden, worth_packing
from midblock.models.forwards import forwards_replaced, replace_forward
from midblock.tuning.kernels import has_plain_head, lean_lora, row_losses

__all__ = ["SupervisedHead"]

_PLAIN = {"input_ids", "attention_mask", "use_cache", "return_dict"}
"""What a forward may be given for its padding to be left out; anything else could mean something there."""


def _more_is_wanted(config: Any) -> bool:
    """Whether a forward's output holds hidden states or attention weights, which have the shape of the padded rows."""
    return any(getattr(config, name, False) for name in ("output_hidden_states", "output_attentions"))


class SupervisedHead:
    """Within the context, training forwards with labels make logits for labelled tokens only, and never all at once.

    Works under transformers' Trainer, TRL's SFTTrainer (whose fused head is served too) and hand-written loops that
    read ``model(**inputs, labels=labels).loss``; such a forward then has no ``logits``. Loss and gradients are those
    without it, up to the order of sums. As in `midblock.tune`, padding on the right stays out of the blocks where
    attention can keep rows apart, attention on a CPU is midblock's, and plain LoRA layers compute in the dtype of
    their base (`midblock.tuning.kernels.lean_lora`). Forwards without gradient or labels, and models whose logits are
    more than their head (soft caps, scaled logits, encoder-decoders, a trained head) are left alone; ``notes`` says so.

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
        self.packs = False
        """Whether padding stays out of the blocks (of forwards whose inputs allow it)."""
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
        self._stack.enter_context(dense_attention(self._model))
        self._stack.enter_context(lean_lora(self._model))
        self.packs = can_pack(self.anatomy)
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
        targets = labels[:, 1:] != -100
        if not args and self._without_padding(inside, targets):
            real = inside["attention_mask"].bool()
            states = packed_hidden(self.anatomy, inside["input_ids"], real)
            return self._scored(CausalLMOutputWithPast(), states[F.pad(targets, (0, 1))[real]], labels, kwargs)
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
        return self._scored(out, states[:, :-1][targets.to(states.device)], labels, kwargs)

    def _without_padding(self, inside: dict[str, Any], targets: Tensor) -> bool:
        """Whether the blocks can do without the padding of this call, whose labelled next tokens are ``targets``."""
        ids, mask = inside.get("input_ids"), inside.get("attention_mask")
        return (self.packs and isinstance(ids, Tensor) and isinstance(mask, Tensor) and mask.shape == ids.shape
                and all(k in _PLAIN or v is None for k, v in inside.items()) and not inside.get("use_cache")
                and inside.get("return_dict") is not False and not _more_is_wanted(self.anatomy.causal_lm.config)
                and worth_packing(self.anatomy, mask)
                and not bool((targets & (mask[:, :-1] == 0)).any()))

    def _scored(self, out: Any, rows: Tensor, labels: Tensor, kwargs: dict[str, Any]) -> Any:
        """The output with its loss, from the hidden rows (n, d) that precede the labelled tokens."""
        targets = labels[:, 1:].to(rows.device)
        mask = targets != -100
        index = targets[mask]
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
