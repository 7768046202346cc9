"""Two places where the usual stack spends time that a training step does not need.

Profiled on SmolLM2 (docs/performance.md): head and loss on tokens that carry no label, and float32 copies of
every activation for the low-rank products. (The other two, padding and attention, are in
`midblock.models.attention`.) Each replacement computes the same quantity; what differs is named where
it does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from midblock import metrics
from midblock.capture.forward import text_inputs
from midblock.capture.scoring import head_rows
from midblock.models import Anatomy
from midblock.models.attention import packed_hidden
from midblock.models.forwards import replace_forward

__all__ = ["has_plain_head", "lean_lora", "row_losses", "supervised_loss"]

# ---------------------------------------------------------------------------------------------
# head and loss on supervised tokens


class _RowLosses(torch.autograd.Function):
    """Next-token loss of each row; the gradient is made on the way, so logits live once."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor,
                look: Callable[[Tensor, Tensor], None] | None) -> Tensor:
        wants = ctx.needs_input_grad[0]
        grad = torch.empty_like(rows) if wants else None
        losses = torch.empty(rows.shape[0], dtype=torch.float32, device=rows.device)
        wide = head_rows(weight.shape[0], rows.device)
        for lo in range(0, rows.shape[0], wide):
            logits, index = F.linear(rows[lo:lo + wide], weight, bias), targets[lo:lo + wide]
            if look is not None:
                look(logits, index)
            if grad is None:
                losses[lo:lo + wide] = metrics.row_sums(logits, index).loss
            else:
                losses[lo:lo + wide] = metrics.cross_entropy_(logits, index)
                torch.mm(logits, weight, out=grad[lo:lo + wide])
        if grad is not None:
            ctx.save_for_backward(grad)
        return losses

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        (grad,) = ctx.saved_tensors
        return grad * grads[0].to(grad.dtype)[:, None], None, None, None, None


def row_losses(rows: Tensor, head: nn.Module, targets: Tensor,
               look: Callable[[Tensor, Tensor], None] | None = None) -> Tensor:
    """Next-token losses (n,) of hidden rows (n, d) through a frozen head, in nats; logits exist in chunks only.

    Args:
        rows: After the final norm.
        head: A linear layer without a gradient of its own.
        targets: Next tokens (n,).
        look: Called with the logits (m, V) and targets (m,) of each chunk, to read and not to keep.
    """
    weight: Any = head.weight
    losses: Tensor = _RowLosses.apply(rows, weight, getattr(head, "bias", None), targets, look)
    return losses


def has_plain_head(anatomy: Anatomy) -> bool:
    """Whether logits are the head applied to the body's last hidden state, and nothing more.

    Not so for soft caps (Gemma-2), scaled logits (Granite, Cohere) and encoder-decoders; a head
    that is trained or quantised is left to the model's own forward as well.
    """
    lm, head = anatomy.causal_lm, anatomy.head
    weight = getattr(head, "weight", None)
    if (lm.config.is_encoder_decoder or type(head) is not nn.Linear or not isinstance(weight, Tensor)
            or not weight.is_floating_point() or any(p.requires_grad for p in head.parameters())):
        return False
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(1, 3, anatomy.hidden_size, generator=generator).to(weight.device, weight.dtype)
    with torch.no_grad():
        return torch.equal(anatomy.unembed(probe), head(anatomy.normed(probe)))


def supervised_loss(anatomy: Anatomy, inputs: dict[str, Tensor], *, plain: bool,
                    count: Tensor | int | float | None = None, packed: bool = False) -> Tensor:
    """Mean next-token loss over labelled tokens, with logits for these tokens only.

    Args:
        anatomy: Of the model, adapters attached.
        inputs: ``input_ids``, ``attention_mask`` and ``labels`` (B, T), labels -100 where nothing
            counts.
        plain: What `has_plain_head` said.
        count: Number of labelled tokens that the sum is divided by (of several batches, when
            gradients are accumulated); default: those of this batch.
        packed: Leave padding out of every block (where `can_pack` and `worth_packing` hold).
    """
    labels = inputs["labels"][:, 1:]
    counted = labels != -100
    targets = labels[counted]
    call = {"input_ids": inputs["input_ids"], "attention_mask": inputs.get("attention_mask"), "use_cache": False}
    if plain and packed:
        real = inputs["attention_mask"].bool()
        hidden = packed_hidden(anatomy, inputs["input_ids"], real)
        rows = hidden[F.pad(counted, (0, 1))[real]]
        total = row_losses(rows, anatomy.head, targets).sum()
    elif plain:
        hidden = anatomy.body(**call)[0]
        rows = hidden[:, :-1][counted]
        total = row_losses(rows, anatomy.head, targets).sum()
    elif anatomy.causal_lm.config.is_encoder_decoder:
        total = _encoder_decoder_loss(anatomy, inputs)
        counted = inputs["labels"] != -100
    else:
        # columns in which any row has a label: all that this forward can leave out
        columns = counted.any(dim=0).nonzero().flatten()
        if "logits_to_keep" in _names(anatomy.causal_lm):
            logits = anatomy.causal_lm(**call, logits_to_keep=columns).logits
        else:
            logits = anatomy.causal_lm(**call).logits[:, columns]
        total = F.cross_entropy(logits[counted[:, columns]].float(), targets, reduction="sum")
    return total / (counted.sum() if count is None else count)


def _encoder_decoder_loss(anatomy: Anatomy, inputs: dict[str, Tensor]) -> Tensor:
    """The encoder reads the prompt; the decoder learns the labelled tokens."""
    lm, labels = anatomy.causal_lm, inputs["labels"]
    logits = lm(**text_inputs(lm, inputs["input_ids"], inputs["attention_mask"], labels)).logits
    return F.cross_entropy(logits[labels != -100].float(), labels[labels != -100], reduction="sum")


def _names(model: nn.Module) -> set[str]:
    import inspect

    return set(inspect.signature(type(model).forward).parameters)


# ---------------------------------------------------------------------------------------------
# LoRA without float32 copies of activations


class _LowRank(torch.autograd.Function):
    """y = x W' + b + s (x A') B' for a frozen W, in x's dtype, adding in place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor,
                scaling: float) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        ctx.shape = x.shape
        down = a.to(x.dtype)
        up = (b * scaling).to(x.dtype)
        inner = rows @ down.t()
        out = F.linear(rows, weight, bias)
        out.addmm_(inner, up.t())
        ctx.save_for_backward(rows, inner, weight, down, up)
        ctx.scaling, ctx.dtypes = scaling, (a.dtype, b.dtype)
        # of the input's shape without being a view of another tensor: some families multiply it in place
        return out.resize_(*x.shape[:-1], out.shape[-1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, inner, weight, down, up = ctx.saved_tensors
        grad = grads[0].reshape(-1, grads[0].shape[-1])
        into = grad @ up
        grad_a = (into.t() @ rows).to(ctx.dtypes[0])
        grad_b = (grad.t() @ inner).to(ctx.dtypes[1]) * ctx.scaling
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad @ weight).addmm_(into, down).view(ctx.shape)
        return grad_x, None, None, grad_a, grad_b, None


def _lean_forward(layer: Any, name: str) -> Callable[..., Tensor]:
    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        base = layer.base_layer
        if (args or kwargs or layer.disable_adapters or layer.merged
                or torch.is_autocast_enabled(x.device.type) or x.dtype != base.weight.dtype):
            return type(layer).forward(layer, x, *args, **kwargs)  # type: ignore[no-any-return]
        return _LowRank.apply(x, base.weight, base.bias, layer.lora_A[name].weight,  # type: ignore[no-any-return]
                              layer.lora_B[name].weight, layer.scaling[name])
    return forward


@contextlib.contextmanager
def lean_lora(model: nn.Module) -> Iterator[int]:
    """Within the context PEFT's plain LoRA layers compute in the dtype of their base layer.

    PEFT casts activations to the adapter's float32, multiplies in float32 and casts back. Here the
    float32 weights A and B are cast instead (they stay float32 for the optimizer), as autocast
    would. In a float32 model nothing is cast and the result is the same. DoRA, dropout, several
    adapters and quantised bases keep PEFT's own forward.

    Yields:
        Number of layers that use it.
    """
    from peft.tuners.lora import Linear as LoraLinear

    changed: list[Callable[[], bool]] = []
    for module in model.modules():
        if type(module) is not LoraLinear or type(module.base_layer) is not nn.Linear:
            continue
        active = [n for n in module.active_adapters if n in module.lora_A]
        if (len(active) != 1 or module.lora_variant or module.fan_in_fan_out
                or not isinstance(module.lora_dropout[active[0]], nn.Identity)
                or getattr(module.lora_B[active[0]], "bias", None) is not None
                or module.base_layer.weight.requires_grad or "forward" in module.__dict__):
            continue
        changed.append(replace_forward(module, _lean_forward(module, active[0])))
    try:
        yield len(changed)
    finally:
        for restore in changed:
            restore()
