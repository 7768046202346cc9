"""The four places where the usual stack spends time that a training step does not need.

Profiled on SmolLM2 (docs/performance.md): head and loss on tokens that carry no label, every block on
padding, float32 copies of every activation for the low-rank products, and a flash attention kernel
that is slow on short sequences in bfloat16 on CPUs. Each replacement computes the same quantity; what
differs is named where it does.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from midblock.models import Anatomy

__all__ = ["attends_by_row", "can_pack", "dense_attention", "has_plain_head", "lean_lora", "packed_hidden",
           "supervised_loss", "worth_packing"]

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
        total = _HeadLoss.apply(rows, anatomy.head.weight, getattr(anatomy.head, "bias", None), targets)
    elif plain:
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
# no padding in the blocks

# set while a body runs on packed rows: attention then keeps them apart, and no mask is built for it
_packing: ContextVar[bool] = ContextVar("midblock_packing", default=False)
# how far a packed batch may be from the padded one, relative, in the arithmetic of the model
_PACK_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8}


def packed_hidden(anatomy: Anatomy, input_ids: Tensor, real: Tensor) -> Tensor:
    """The body's output (N, d) for the N real tokens of padded rows, run as one row without padding.

    Positions restart with every row and attention keeps rows apart, as transformers does for flash
    attention ("padding-free"; its names for the bounds are used).

    Args:
        anatomy: Of a model for which `can_pack` holds.
        input_ids: (B, T).
        real: (B, T) bool, False on padding, which is on the right.
    """
    lengths = real.sum(dim=1)
    bounds = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    positions = torch.arange(real.shape[1], device=real.device).expand_as(real)[real]
    longest = int(lengths.max())
    token = _packing.set(True)
    try:
        return anatomy.body(input_ids=input_ids[real][None], position_ids=positions[None],  # type: ignore[no-any-return]
                            use_cache=False, cu_seq_lens_q=bounds, cu_seq_lens_k=bounds, max_length_q=longest,
                            max_length_k=longest)[0][0]
    finally:
        _packing.reset(token)


def worth_packing(anatomy: Anatomy, mask: Tensor) -> bool:
    """Whether rows (B, T) have padding, all of it on the right, and fit into every attention window (a shorter
    window would need its mask)."""
    if bool(mask.all()) or not bool(mask[:, 0].all()):
        return False
    longest = int(mask.sum(dim=1).max())
    return all(longest <= window for window in _windows(anatomy))


def _windows(anatomy: Anatomy) -> list[int]:
    """How many tokens back local attention looks, where the config names such."""
    config = anatomy.causal_lm.config.get_text_config(decoder=True)
    found = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
    return [w for w in found if isinstance(w, int) and w > 0]


def attends_by_row(config: Any) -> bool:
    """Whether the model's attention keeps packed rows apart by their bounds."""
    name = str(getattr(config, "_attn_implementation", ""))
    return name == _NAME or name.startswith("flash")


def can_pack(anatomy: Anatomy) -> bool:
    """Whether rows can share one packed forward; tried on the model itself.

    That is so where every block mixes tokens by an attention that is told where rows begin: midblock's
    own on a CPU (within `dense_attention`) or flash attention on a GPU. What is required of two rows: no
    gradient of the second reaches the first, and both equal the padded forward up to rounding.
    """
    lm = anatomy.causal_lm
    longest = min([9, *_windows(anatomy)])
    if lm.config.is_encoder_decoder or longest < 2 or not attends_by_row(lm.config):
        return False
    generator = torch.Generator().manual_seed(0)
    device = anatomy.embeddings.weight.device
    ids = torch.randint(anatomy.vocab_size, (2, longest), generator=generator).to(device)
    mask = torch.ones_like(ids)
    split = longest // 2
    mask[0, split:] = 0
    training = anatomy.body.training
    embedded: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1]

    handle = anatomy.embeddings.register_forward_hook(keep)
    anatomy.body.eval()
    try:
        with torch.enable_grad():
            padded = anatomy.body(input_ids=ids, attention_mask=mask, use_cache=False)[0][mask.bool()].detach()
            packed = packed_hidden(anatomy, ids, mask.bool())
            reached, = torch.autograd.grad(packed[split:].float().square().sum(), embedded[-1])
    except (TypeError, ValueError, RuntimeError):  # a body that does not take these inputs
        return False
    finally:
        handle.remove()
        anatomy.body.train(training)
    reached = reached.reshape(-1, reached.shape[-1])
    off = (packed.detach() - padded).float().norm() / padded.float().norm()
    return (not bool(reached[:split].any()) and bool(reached[split:].any())
            and bool(off <= _PACK_TOLERANCE.get(packed.dtype, 0.05)))


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
        self._triangle: Tensor | None = None
        """Of the longest row so far; shorter ones use its corner."""

    def of(self, mask: Tensor | None, length: int, keys: int) -> tuple[Tensor, bool]:
        """Bias (B or 1, 1, T, S) and whether nothing behind a query is allowed."""
        if mask is not None and self._mask is not None and self._mask() is mask and self._value is not None:
            return self._value
        low = torch.finfo(torch.float32).min
        if mask is None:
            if self._triangle is None or self._triangle.shape[-1] < length:
                behind = torch.ones(length, length, dtype=torch.bool).triu(1)
                self._triangle = torch.zeros(1, 1, length, length).masked_fill_(behind, low)
            return self._triangle[..., :length, :keys], True
        triangle = torch.ones(length, keys, dtype=torch.bool).tril()
        bias = torch.zeros(mask.shape, dtype=torch.float32).masked_fill_(~mask, low)
        causal = length == keys and not bool((mask & ~triangle).any())
        self._mask, self._value = weakref.ref(mask), (bias, causal)
        return bias, causal


_bias = _Bias()
_NAME = "midblock_dense"


def _attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
               dropout: float = 0.0, scaling: float | None = None, **kwargs: Any) -> tuple[Tensor, None]:
    """Attention in transformers' interface: q (B,H,T,D), k and v (B,K,S,D) -> (B,T,H,D)."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    bounds = kwargs.get("cu_seq_lens_q")
    if bounds is not None:
        return _attention_by_row(module, query, key, value, bounds.diff().tolist(), dropout, scaling, kwargs), None
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


def _attention_by_row(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int],
                      dropout: float, scaling: float | None, kwargs: dict[str, Any]) -> Tensor:
    """Packed rows (1,H,N,D), each on its own; causal, for `worth_packing` keeps windows out of play."""
    rest = {k: v for k, v in kwargs.items() if not k.startswith(("cu_seq_lens", "max_length"))}
    parts = zip(*(x.split(list(lengths), dim=2) for x in (query, key, value)), strict=True)
    return torch.cat([_attention(module, q, k, v, None, dropout=dropout, scaling=scaling, **rest)[0]
                      for q, k, v in parts], dim=1)


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    from transformers.masking_utils import sdpa_mask

    return None if _packing.get() else sdpa_mask(*args, **kwargs)


@contextlib.contextmanager
def dense_attention(model: nn.Module) -> Iterator[bool]:
    """Within the context attention on a CPU goes through midblock: row by row where rows are packed, and in
    bfloat16 by matrix products of its own.

    Scores are float32 as in PyTorch's flash kernel; that kernel takes about twice the time forward
    and backward at 100 to 500 tokens. Forwards without grad, other number formats, and whatever has a
    soft cap, sinks, dropout or long sequences, keep PyTorch's kernel.

    Yields:
        Whether it applies to this model.
    """
    from transformers import AttentionInterface, PreTrainedModel
    from transformers.masking_utils import AttentionMaskInterface

    lm = next((m for m in model.modules() if isinstance(m, PreTrainedModel)), None)
    weight = next(model.parameters())
    applies = (lm is not None and weight.device.type == "cpu"
               and getattr(lm.config, "_attn_implementation", None) == "sdpa"
               and not lm.config.is_encoder_decoder)
    if not applies or lm is None:
        yield False
        return
    AttentionInterface.register(_NAME, _attention)
    AttentionMaskInterface.register(_NAME, _mask)
    try:
        lm.set_attn_implementation(_NAME)
        yield True
    finally:
        lm.set_attn_implementation("sdpa")
