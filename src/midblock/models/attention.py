"""Attention that is told where rows begin: no padding in the blocks, and on a CPU a faster kernel.

Padding is computed by every block and then thrown away. Where attention keeps rows apart by their
bounds, the real tokens of a batch go through the model as one row ("padding-free"), with positions
that restart. On CPUs midblock registers such an attention with transformers, which in bfloat16 also
replaces PyTorch's flash kernel, slow on short sequences there, by batched matrix products.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from midblock.models.anatomy import Anatomy
from midblock.models.forwards import forwards_kept
from midblock.models.placement import place_of

__all__ = ["attends_by_row", "can_pack", "dense_attention", "packed_hidden", "worth_packing"]

# attention scores of one block, in numbers, above which they are not held at once
_DENSE_LIMIT = 1 << 24

# ---------------------------------------------------------------------------------------------
# rows without their padding

# body -> name of the attention -> what `can_pack` found
_can_pack: WeakKeyDictionary[nn.Module, dict[str, bool]] = WeakKeyDictionary()
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
    """How many tokens a local or sparse attention looks at, where the config names such: a row of no more is
    attended to as a whole."""
    config = anatomy.causal_lm.config.get_text_config(decoder=True)
    found = (getattr(config, name, None) for name in (
        "sliding_window", "attention_chunk_size", "index_topk", "index_topk_blocks", "indexer_budget"))
    return [w for w in found if isinstance(w, int) and w > 0]


def attends_by_row(config: Any) -> bool:
    """Whether the model's attention keeps packed rows apart by their bounds."""
    name = str(getattr(config, "_attn_implementation", ""))
    return name == _NAME or name.startswith("flash")


def can_pack(anatomy: Anatomy) -> bool:
    """Whether rows can share one packed forward; tried on the model itself.

    That is so where every block mixes tokens by an attention that is told where rows begin: midblock's
    own on a CPU (within `dense_attention`) or flash attention on a GPU. What is required of two rows: no
    gradient of the second reaches the first, and both equal the padded forward up to rounding. The
    answer is remembered.
    """
    lm = anatomy.causal_lm
    if lm.config.is_encoder_decoder or not attends_by_row(lm.config):
        return False
    known = _can_pack.setdefault(anatomy.body, {})
    name = str(lm.config._attn_implementation)
    if name not in known:
        known[name] = _rows_stay_apart(anatomy)
    return known[name]


def _rows_stay_apart(anatomy: Anatomy) -> bool:
    longest = min([9, *_windows(anatomy)])
    if longest < 2:
        return False
    generator = torch.Generator().manual_seed(0)
    device = place_of(anatomy)
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
        # a prefix that is cached around the body would answer for it
        with torch.enable_grad(), forwards_kept([anatomy.body], plain=True):
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
# attention on a CPU


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
                with torch.inference_mode(False):  # it is kept, and training may need it next
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
    if (length == 1 or dropout or special or not fits or query.dtype != torch.bfloat16
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
    and backward at 100 to 500 tokens. Other dtypes, single queries, and whatever has a soft cap,
    sinks, dropout or long sequences, keep PyTorch's kernel.

    Yields:
        Whether it applies to this model.
    """
    from transformers import AttentionInterface, PreTrainedModel
    from transformers.masking_utils import AttentionMaskInterface

    lm = next((m for m in model.modules() if isinstance(m, PreTrainedModel)), None)
    weight = next((p for p in model.parameters() if not p.is_meta), None)
    applies = (lm is not None and weight is not None and weight.device.type == "cpu"
               and getattr(lm.config, "_attn_implementation", None) == "sdpa"
               and not lm.config.is_encoder_decoder
               # a sparse attention masks what its indexer leaves out for transformers' own implementations only
               and not any(name.rpartition(".")[2] == "indexer" for name, _ in lm.named_modules()))
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
