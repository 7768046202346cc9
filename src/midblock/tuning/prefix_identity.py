"""What a frozen prefix is: where it ends, everything its output depends on, and what in it is random."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
import transformers
from torch import nn

from midblock.capture import verify_resume
from midblock.errors import ArchitectureError, CacheRefusedError
from midblock.models import Anatomy
from midblock.models.placement import place_of
from midblock.tuning.cache_folder import row_bytes
from midblock.writing import sha256_of

__all__ = ["first_trainable_block", "needs_leaf", "noise_in", "not_checkpointed", "prefix_identity", "prefix_stamp",
           "require_cacheable"]

# entries of a config that no hidden state depends on
_NOT_IDENTITY = ("use_cache", "pad_token_id", "eos_token_id", "bos_token_id", "output_router_logits",
                 "router_aux_loss_coef", "_name_or_path", "transformers_version", "architectures",
                 "quantization_config")

_digests: WeakKeyDictionary[nn.Module, dict[str, tuple[int, int, str]]] = WeakKeyDictionary()


def first_trainable_block(anatomy: Anatomy) -> int | None:
    """The first block with a parameter that requires a gradient.

    Returns:
        0..L-1; L if only final norm or head are trained; None if nothing is.

    Raises:
        CacheRefusedError: something before the blocks is trained (embeddings, an encoder), or a
            head that shares its weight with the embeddings: then nothing is a frozen prefix.
    """
    first: int | None = None
    inside = set()
    for index, block in enumerate(anatomy.blocks):
        for parameter in block.parameters():
            inside.add(id(parameter))
            if first is None and parameter.requires_grad:
                first = index
    behind = {id(p) for m in (anatomy.final_norm, anatomy.head) if m is not None for p in m.parameters()}
    before = {id(p) for p in anatomy.embeddings.parameters()}
    trained_behind = False
    for name, parameter in anatomy.causal_lm.named_parameters():
        if not parameter.requires_grad or id(parameter) in inside:
            continue
        if id(parameter) in behind and id(parameter) not in before:
            trained_behind = True
            continue
        raise CacheRefusedError(
            f"there is no frozen prefix: {name} is trained and acts before block 0"
            + (" (the head shares its weight with the embeddings)" if anatomy.tied and id(parameter) in before
               else "") + ". Freeze it, or train without FrozenPrefix.")
    if first is None and trained_behind:
        return anatomy.num_blocks
    return first


def prefix_identity(anatomy: Anatomy, start: int, weights: str | None = None) -> str:
    """Digest of everything but the tokens that hidden ``start`` depends on.

    Weights and buffers of embeddings and blocks before ``start``, config, state of adapters there,
    dtype, device type, autocast and library versions. Digests of tensors are remembered until they
    change.

    Args:
        anatomy: Of the model.
        start: The first block behind the prefix.
        weights: What stands for the weights, where they are not in memory: the fingerprint of their files.
    """
    behind = {id(t) for m in (*anatomy.blocks[start:], anatomy.final_norm) if m is not None
              for t in (*m.parameters(), *m.buffers())}
    known = _digests.setdefault(anatomy.body, {})
    parts: list[str] = [] if weights is None else [weights, str(anatomy.causal_lm.dtype)]
    for name, tensor in (*anatomy.body.named_parameters(), *anatomy.body.named_buffers()):
        if id(tensor) in behind or weights is not None:
            continue
        stamp = (tensor._version, tensor.data_ptr())
        if name not in known or known[name][:2] != stamp:
            known[name] = (*stamp, sha256_of(str(tensor.dtype), str(tuple(tensor.shape)), row_bytes(tensor)))
        parts += [name, known[name][2]]
    for name, module in anatomy.body.named_modules():
        if hasattr(module, "merged_adapters") and _before(anatomy, name, start):
            parts += [name, str(module.active_adapters), str(module.merged_adapters),
                      str(getattr(module, "disable_adapters", "")), str(getattr(module, "scaling", ""))]
    config = anatomy.causal_lm.config.get_text_config(decoder=True)
    entries = {k: v for k, v in config.to_dict().items() if k not in _NOT_IDENTITY}
    device = place_of(anatomy).type
    autocast = str(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else "none"
    return sha256_of(*parts, json.dumps(entries, sort_keys=True, default=str), type(anatomy.body).__name__,
                     _attention_name(config), str(start), device, autocast,
                     torch.__version__, transformers.__version__)


def _attention_name(config: Any) -> str:
    return str(getattr(config, "_attn_implementation", ""))


def _before(anatomy: Anatomy, name: str, start: int) -> bool:
    block = anatomy.block_of(f"{anatomy.body_path}.{name}" if anatomy.body_path else name)
    return block is None or block < start


def prefix_stamp(anatomy: Anatomy, start: int, weights: str | None = None) -> tuple[Any, ...]:
    """Changes whenever `prefix_identity` may have changed; cheap enough for every forward."""
    parts: list[Any] = []
    for module in (anatomy.embeddings, *anatomy.blocks[:start]):
        for tensor in (*module.parameters(), *module.buffers()) if weights is None else ():
            parts += (tensor._version, tensor.data_ptr())
        for inner in module.modules():
            if hasattr(inner, "merged_adapters"):
                parts += (str(inner.active_adapters), str(inner.merged_adapters),
                          getattr(inner, "disable_adapters", None))
    device = place_of(anatomy).type
    parts.append(torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None)
    parts.append(_attention_name(anatomy.causal_lm.config))
    return tuple(parts)


def noise_in(anatomy: Anatomy, start: int) -> list[str]:
    """Sources of randomness in the prefix that are on in training mode."""
    found = []
    for name, module in anatomy.body.named_modules():
        if not _before(anatomy, name, start) or not module.training:
            continue
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            found.append(f"{name} (p={module.p:g})")
            continue
        for key, value in vars(module).items():
            if ("drop" in key or "jitter" in key) and isinstance(value, float) and value > 0:
                found.append(f"{name or type(module).__name__}.{key}={value:g}")
    return found


def require_cacheable(anatomy: Anatomy, start: int) -> None:
    """Refuse a prefix whose output cannot be cached exactly.

    Raises:
        CacheRefusedError: why not.
    """
    lm = anatomy.causal_lm
    if lm.config.is_encoder_decoder:
        raise CacheRefusedError(
            f"the prefix of {type(lm).__name__} cannot be cached: its decoder blocks also read an encoder's "
            "output.")
    if noise := noise_in(anatomy, start):
        raise CacheRefusedError(
            f"the prefix is random in training mode, so its output cannot be cached: {', '.join(noise[:3])}"
            f"{f' and {len(noise) - 3} more' if len(noise) > 3 else ''}. Set these to 0 before loading.")
    rope = str(getattr(lm.config.get_text_config(decoder=True), "rope_parameters", None) or {})
    if "'dynamic'" in rope:
        raise CacheRefusedError("the prefix cannot be cached: dynamic rotary embeddings depend on the longest "
                                "sequence seen so far.")
    try:
        verify_resume(lm, anatomy, [start])
    except ArchitectureError as error:
        raise CacheRefusedError(f"the prefix cannot be cached: {error}") from error


def needs_leaf(anatomy: Anatomy, start: int) -> bool:
    """Reentrant checkpointing only differentiates blocks whose input requires a gradient."""
    if start >= anatomy.num_blocks:
        return False
    block = anatomy.blocks[start]
    if not (getattr(block, "gradient_checkpointing", False) and block.training):
        return bool(getattr(anatomy.body, "gradient_checkpointing", False)) and block.training
    function = getattr(block, "_gradient_checkpointing_func", None)
    return bool(getattr(function, "keywords", {}).get("use_reentrant", True))


@contextlib.contextmanager
def not_checkpointed(blocks: Iterable[nn.Module]) -> Iterator[None]:
    """Within the context these blocks run once, whatever gradient checkpointing says of them."""
    switched = [b for b in blocks if getattr(b, "gradient_checkpointing", False)]
    try:
        for block in switched:
            block.gradient_checkpointing = False  # type: ignore[assignment]
        yield
    finally:
        for block in switched:
            block.gradient_checkpointing = True  # type: ignore[assignment]
