"""The engagement check: what should have moved moved, nothing else did, and the model answers otherwise.

Run after every training. A masked arm whose adapter never engaged (a pattern that matched nothing, a
learning rate of 0, a wrapper that was not called) scores like the base and would be read as "this
depth does not matter".
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from midblock.errors import AdapterError
from midblock.models import base_weight, kind_of, merged_weight
from midblock.tuning.adapter import Attachment, adapted_layer
from midblock.tuning.cache_folder import row_bytes
from midblock.writing import sha256_of

__all__ = ["EngagementReport", "ModuleUpdate", "check_engagement", "frozen_digests", "logits_of",
           "require_gradients"]


@dataclass(frozen=True, slots=True)
class ModuleUpdate:
    """How far one matrix moved."""

    name: str
    block: int
    kind: str
    norm: float
    """Frobenius norm of the update of the weight."""
    relative: float
    """The same, divided by the norm of the weight before."""


@dataclass
class EngagementReport:
    """What `check_engagement` found."""

    updates: list[ModuleUpdate]
    frozen_tensors: int
    """Tensors that had to stay as they were."""
    logit_difference: float
    """Largest absolute difference of a logit from the base."""
    top1_changed: float
    """Share of positions where the most likely token changed."""
    problems: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    def require(self) -> EngagementReport:
        """This report, if nothing is wrong.

        Raises:
            AdapterError: something is; every problem is named.
        """
        if self.problems:
            raise AdapterError(f"the engagement check failed: {'; '.join(self.problems)}.")
        return self

    def describe(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"ok": self.ok, "problems": self.problems, "frozen_tensors": self.frozen_tensors,
                "logit_difference": self.logit_difference, "top1_changed": self.top1_changed,
                "updates": [{"module": u.name, "block": u.block, "kind": u.kind, "norm": u.norm,
                             "relative": u.relative} for u in self.updates]}

    def summary(self) -> str:
        """One line for people."""
        if self.problems:
            return f"engagement check FAILED: {'; '.join(self.problems)}"
        relative = [u.relative for u in self.updates]
        return (f"engagement check: all {len(self.updates)} matrices moved (by {min(relative):.2%} to "
                f"{max(relative):.2%} of their norm), {self.frozen_tensors} frozen tensors unchanged, logits differ "
                f"from the base by up to {self.logit_difference:.3g}, top token in {self.top1_changed:.1%} of places")


def frozen_digests(attachment: Attachment) -> dict[str, str]:
    """Digest of every tensor that training must not change: frozen parameters and all buffers.

    Weights that are read from their files when they are needed are left out: they are never written.
    """
    trained = {id(p) for p in attachment.trainable.values()}
    named = (*attachment.model.named_parameters(), *attachment.model.named_buffers())
    return {n: sha256_of(str(t.dtype), str(tuple(t.shape)), row_bytes(t)) for n, t in named
            if id(t) not in trained and not t.is_meta}


def _forward(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    logits: Tensor = model(**inputs).logits
    return logits


def logits_of(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """Logits (B, T, V) of some tokens in float32, the model in eval mode."""
    model.eval()
    with torch.no_grad():
        return _forward(model, ids, mask).float()


def require_gradients(attachment: Attachment, input_ids: Tensor, attention_mask: Tensor) -> None:
    """One backward pass on a few tokens before anything is spent: every matrix of the plan must be reached.

    Args:
        attachment: Before training.
        input_ids: (B, T) tokens.
        attention_mask: Of these tokens.

    Raises:
        AdapterError: a matrix gets no gradient, since the model's forward does not go through it.
    """
    names = list(attachment.trainable)
    attachment.model.eval()
    with torch.enable_grad():
        logits = _forward(attachment.model, input_ids, attention_mask)
        found = torch.autograd.grad(logits[attention_mask.bool()].float().logsumexp(-1).sum(),
                                    list(attachment.trainable.values()), allow_unused=True)
    # A of LoRA gets a gradient of zeros while B is zero; None is a matrix that no forward goes through
    lost = [n for n, gradient in zip(names, found, strict=True) if gradient is None]
    if lost and not (attachment.plan.whole_blocks and len(lost) < len(names)):
        raise AdapterError(f"{len(lost)} of {len(names)} trained tensors get no gradient: the forward of "
                           f"{type(attachment.anatomy.causal_lm).__name__} does not go through {lost[0]}. Leave these "
                           "matrices out of the target modules.")


def check_engagement(attachment: Attachment, before: dict[str, str], input_ids: Tensor, *,
                     attention_mask: Tensor | None = None) -> EngagementReport:
    """Compare a trained model with what it was.

    Args:
        attachment: After training.
        before: `frozen_digests` of it before training.
        input_ids: (B, T) tokens to compare logits on.
        attention_mask: Of these tokens; padding is left out of the comparison.
    """
    problems: list[str] = []
    after = frozen_digests(attachment)
    changed = sorted(n for n in before.keys() | after.keys() if before.get(n) != after.get(n))
    if changed:
        problems.append(f"{len(changed)} tensors outside the plan changed, the first {changed[0]}")
    updates = _updates(attachment)
    for update in updates:
        if not update.norm > 0:  # NaN as well
            problems.append(f"{update.name} did not move" if update.norm == 0 else f"{update.name} is not finite")
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    tuned = logits_of(attachment.model, input_ids, mask)[mask.bool()]
    with attachment.disabled():
        base = logits_of(attachment.model, input_ids, mask)[mask.bool()]
    difference = float((tuned - base).abs().max())
    if not difference > 0:
        problems.append("the logits are those of the base")
    top1 = float((tuned.argmax(-1) != base.argmax(-1)).float().mean())
    return EngagementReport(updates, len(before), difference, top1, problems)


def _updates(attachment: Attachment) -> list[ModuleUpdate]:
    found = []
    if attachment.is_peft:
        for module in attachment.plan.modules:
            layer = adapted_layer(attachment.base, module)
            before = attachment.original(module.parameter)
            weight = base_weight(layer) if before is None else before.float()
            found.append(_update(module.name, module.block, module.kind, merged_weight(layer) - weight, weight))
        return found
    for name, parameter in attachment.trainable.items():
        block = attachment.anatomy.block_of(name)
        original = attachment._original[name]
        found.append(_update(name.removesuffix(".weight"), -1 if block is None else block, kind_of(name),
                             parameter.detach() - original.float(), original))
    return found


def _update(name: str, block: int, kind: str, delta: Tensor, weight: Tensor) -> ModuleUpdate:
    norm = float(delta.norm())
    size = float(weight.detach().float().norm())
    return ModuleUpdate(name, block, kind, norm, norm / size if size else norm)
