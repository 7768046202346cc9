"""The three places where the usual stack spends time that a training step does not need.

Profiled on SmolLM2 (docs/performance.md): head and loss on tokens that carry no label, float32 copies
of every activation for the low-rank products, and a flash attention kernel that is slow on short
sequences in bfloat16 on CPUs. Each replacement computes the same quantity; what differs is named
where it does.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from midblock.models import Anatomy

__all__ = ["dense_attention", "has_plain_head", "lean_lora", "supervised_loss"]

# numbers in one chunk of logits: 2**23 float32 are 32 MiB
_CHUNK_NUMBERS = 1 << 23
# attention scores of one block, in numbers, above which they are not held at once
_DENSE_LIMIT = 1 << 24

# ---------------------------------------------------------------------------------------------
# head and loss on supervised tokens


class _HeadLoss(torch.autograd.Function):
    """Sum of next-token losses of rows; the gradient is made on the way, so logits live once."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        wants = ctx.needs_input_grad[0]
        grad = torch.empty_like(rows) if wants else None
        total = torch.zeros((), dtype=torch.float32, device=rows.device)
        step = max(1, _CHUNK_NUMBERS // weight.shape[0])
        for lo in range(0, rows.shape[0], step):
            part = rows[lo:lo + step]
            scores = F.log_softmax(F.linear(part, weight, bias).float(), dim=-1)
            index = targets[lo:lo + step, None]
            gold = scores.gather(1, index)
            total -= gold.sum()
            if grad is not None:  # d loss / d logits = softmax - one-hot
                scores.exp_().scatter_add_(1, index, torch.full_like(gold, -1.0))
                torch.mm(scores.to(weight.dtype), weight, out=grad[lo:lo + step])
        if grad is not None:
            ctx.save_for_backward(grad)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (grad,) = ctx.saved_tensors
        return grad * grads[0].to(grad.dtype), None, None, None


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
        return torch.equal(anatomy.read_out(probe), head(anatomy.normed(probe)))


def supervised_loss(anatomy: Anatomy, inputs: dict[str, Tensor], *, plain: bool,
                    count: Tensor | int | float | None = None) -> Tensor:
    """Mean next-token loss over labelled tokens, with logits for these tokens only.

    Args:
        anatomy: Of the model, adapters attached.
        inputs: ``input_ids``, ``attention_mask`` and ``labels`` (B, T), labels -100 where nothing
            counts.
        plain: What `has_plain_head` said.
        count: Number of labelled tokens that the sum is divided by (of several batches, when
            gradients are accumulated); default: those of this batch.
    """
    labels = inputs["labels"][:, 1:]
    counted = labels != -100
    targets = labels[counted]
    call = {"input_ids": inputs["input_ids"], "attention_mask": inputs.get("attention_mask"), "use_cache": False}
    if plain:
        hidden = anatomy.body(**call)[0]
        rows = hidden[:, :-1][counted]
        total = _HeadLoss.apply(rows, anatomy.head.weight, getattr(anatomy.head, "bias", None), targets)
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
    return total / (counted.sum() if count is None else count)  # type: ignore[no-any-return]


def _encoder_decoder_loss(anatomy: Anatomy, inputs: dict[str, Tensor]) -> Tensor:
    """The prompt goes to the encoder as it is; the decoder learns the labelled tokens."""
    lm = anatomy.causal_lm
    labels = inputs["labels"]
    start = lm.config.decoder_start_token_id
    first = torch.full_like(labels[:, :1], start)
    shifted = torch.cat([first, inputs["input_ids"][:, :-1]], dim=1)
    logits = lm(input_ids=inputs["input_ids"], attention_mask=inputs.get("attention_mask"),
                decoder_input_ids=shifted, use_cache=False).logits
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
        down = a.to(x.dtype)
        up = (b * scaling).to(x.dtype)
        inner = rows @ down.t()
        out = F.linear(rows, weight, bias)
        out.addmm_(inner, up.t())
        ctx.save_for_backward(rows, inner, weight, down, up)
        ctx.scaling, ctx.shape, ctx.dtypes = scaling, x.shape, (a.dtype, b.dtype)
        return out.view(*x.shape[:-1], out.shape[-1])

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
        if (args or kwargs or layer.disable_adapters or layer.merged or not torch.is_grad_enabled()
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
    would. In a float32 model nothing is cast and the result is the same. Forwards without grad,
    DoRA, dropout, several adapters and quantised bases keep PEFT's own forward.

    Yields:
        Number of layers that use it.
    """
    from peft.tuners.lora import Linear as LoraLinear

    changed: list[nn.Module] = []
    for module in model.modules():
        if type(module) is not LoraLinear or type(module.base_layer) is not nn.Linear:
            continue
        active = [n for n in module.active_adapters if n in module.lora_A]
        if (len(active) != 1 or module.lora_variant or module.fan_in_fan_out
                or not isinstance(module.lora_dropout[active[0]], nn.Identity)
                or getattr(module.lora_B[active[0]], "bias", None) is not None
                or module.base_layer.weight.requires_grad or "forward" in module.__dict__):
            continue
        module.forward = _lean_forward(module, active[0])  # type: ignore[method-assign]
        changed.append(module)
    try:
        yield len(changed)
    finally:
        for module in changed:
            module.__dict__.pop("forward", None)


# ---------------------------------------------------------------------------------------------
# attention of short sequences on a CPU in bfloat16


# queries handled at once: keys behind the last of them are left out
_QUERIES = 128


class _DenseAttention(torch.autograd.Function):
    """softmax(q k' s + bias) v with float32 scores, key-value heads not repeated.

    Shapes: q (B*K, G, T, D) for K key-value heads of G query heads each; k, v (B*K, S, D); bias
    (B, 1, T, S) float32, 0 where a query may look and very low where not. With ``causal`` no query
    looks at keys behind it, so that each group of queries meets only the keys up to its end.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scaling: float,
                causal: bool) -> Tensor:
        many, groups, length, width = q.shape
        batch = bias.shape[0]
        out = torch.empty_like(q)
        kept: list[Tensor] = []
        wide_k = k.float().transpose(1, 2)
        for lo, hi, end in _pieces(length, k.shape[1], causal):
            part = q[:, :, lo:hi].reshape(many, -1, width)
            scores = torch.bmm(part.float().mul_(scaling), wide_k[:, :, :end])
            scores.view(batch, -1, groups, hi - lo, end).add_(bias[:, None, :, lo:hi, :end])
            weights = torch.softmax(scores, dim=-1).to(q.dtype)
            kept.append(weights)
            out[:, :, lo:hi] = torch.bmm(weights, v[:, :end]).view(many, groups, hi - lo, width)
        ctx.save_for_backward(q, k, v, *kept)
        ctx.scaling, ctx.causal = scaling, causal
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *kept = ctx.saved_tensors
        many, groups, length, width = q.shape
        grad_q = torch.empty_like(q)
        grad_k, grad_v = torch.zeros_like(k), torch.zeros_like(v)
        for weights, (lo, hi, end) in zip(kept, _pieces(length, k.shape[1], ctx.causal), strict=True):
            grad = grads[0][:, :, lo:hi].reshape(many, -1, width)
            part = q[:, :, lo:hi].reshape(many, -1, width)
            grad_v[:, :end] += torch.bmm(weights.transpose(1, 2), grad)
            grad_w = torch.bmm(grad, v[:, :end].transpose(1, 2))
            grad_s = torch.ops.aten._softmax_backward_data(grad_w, weights, -1, weights.dtype)
            grad_q[:, :, lo:hi] = torch.bmm(grad_s, k[:, :end]).view(many, groups, hi - lo, width)
            grad_k[:, :end] += torch.bmm(grad_s.transpose(1, 2), part)
        return grad_q.mul_(ctx.scaling), grad_k.mul_(ctx.scaling), grad_v, None, None, None


def _pieces(length: int, keys: int, causal: bool) -> list[tuple[int, int, int]]:
    """(first query, behind the last query, keys met) of each group of queries."""
    if not causal:
        return [(0, length, keys)]
    return [(lo, min(lo + _QUERIES, length), min(lo + _QUERIES, length)) for lo in range(0, length, _QUERIES)]


class _Bias:
    """The additive form of the last mask seen: all layers of a forward get the same mask."""

    def __init__(self) -> None:
        self._mask: weakref.ref[Tensor] | None = None
        self._value: tuple[Tensor, bool] | None = None

    def of(self, mask: Tensor | None, length: int, keys: int) -> tuple[Tensor, bool]:
        """Bias (B or 1, 1, T, S) and whether nothing behind a query is allowed."""
        if mask is not None and self._mask is not None and self._mask() is mask and self._value is not None:
            return self._value
        low = torch.finfo(torch.float32).min
        triangle = torch.ones(length, keys, dtype=torch.bool).tril()
        allowed = triangle[None, None] if mask is None else mask
        bias = torch.zeros(allowed.shape, dtype=torch.float32).masked_fill_(~allowed, low)
        causal = length == keys and (mask is None or not bool((mask & ~triangle).any()))
        if mask is not None:
            self._mask, self._value = weakref.ref(mask), (bias, causal)
        return bias, causal


_bias = _Bias()
_NAME = "midblock_dense"


def _attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
               dropout: float = 0.0, scaling: float | None = None, **kwargs: Any) -> tuple[Tensor, None]:
    """Attention in transformers' interface: q (B,H,T,D), k and v (B,K,S,D) -> (B,T,H,D)."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    batch, heads, length, width = query.shape
    kv_heads, keys = key.shape[1], key.shape[2]
    special = any(kwargs.get(name) is not None for name in ("softcap", "s_aux", "position_bias"))
    fits = attention_mask is None or (attention_mask.dtype == torch.bool
                                      and attention_mask.shape[-2:] == (length, keys)
                                      and attention_mask.shape[1] == 1)
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    if (not torch.is_grad_enabled() or dropout or special or not fits or query.dtype != torch.bfloat16
            or value.shape[-1] != width or (attention_mask is None and not (causal and length == keys))
            or batch * heads * length * keys > _DENSE_LIMIT):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
    bias, causal_only = _bias.of(attention_mask, length, keys)
    if bias.shape[0] != batch:
        bias = bias.expand(batch, -1, -1, -1)
    out = _DenseAttention.apply(
        query.reshape(batch * kv_heads, heads // kv_heads, length, width),
        key.reshape(batch * kv_heads, keys, width), value.reshape(batch * kv_heads, keys, width), bias,
        width ** -0.5 if scaling is None else scaling, causal_only)
    return out.view(batch, heads, length, width).transpose(1, 2).contiguous(), None


@contextlib.contextmanager
def dense_attention(model: nn.Module) -> Iterator[bool]:
    """Within the context attention of a bfloat16 model on a CPU uses matrix products of its own.

    Scores are float32 as in PyTorch's flash kernel; that kernel takes about twice the time forward
    and backward at 100 to 500 tokens. Forwards without grad, and whatever has a soft cap, sinks,
    dropout or long sequences, keep PyTorch's kernel.

    Yields:
        Whether it applies to this model.
    """
    from transformers import AttentionInterface, PreTrainedModel
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    lm = next((m for m in model.modules() if isinstance(m, PreTrainedModel)), None)
    weight = next(model.parameters())
    applies = (lm is not None and weight.device.type == "cpu"
               and any(p.dtype == torch.bfloat16 for p in model.parameters())
               and getattr(lm.config, "_attn_implementation", None) == "sdpa"
               and not lm.config.is_encoder_decoder)
    if not applies or lm is None:
        yield False
        return
    AttentionInterface.register(_NAME, _attention)
    AttentionMaskInterface.register(_NAME, sdpa_mask)
    try:
        lm.set_attn_implementation(_NAME)
        yield True
    finally:
        lm.set_attn_implementation("sdpa")
