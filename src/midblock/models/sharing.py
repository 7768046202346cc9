"""Which parts of several models are the same, so that a pass computes them once.

Fine-tuning of a block of layers, or with LoRA anywhere, leaves most parts of a model bit for bit alone: embeddings,
final norm, head, blocks outside the mask.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from midblock.models.anatomy import Anatomy, text_config

__all__ = ["SharedParts", "shared_block", "shared_parts", "shared_unembeddings"]

# entries of a config that do not change what its model computes
_NAMES_ONLY = {"_name_or_path", "name_or_path", "_commit_hash", "transformers_version", "architectures", "dtype",
               "torch_dtype", "use_cache", "bos_token_id", "eos_token_id", "pad_token_id", "output_hidden_states",
               "output_attentions", "return_dict"}


@dataclass(frozen=True)
class SharedParts:
    """Per model the first model of the list that has the same part: equal numbers mean equal results.

    Attributes:
        inputs: Everything before block 0.
        blocks: Per model, per block.
        unembeddings: Final norm, head and what the family does to logits.
    """

    inputs: tuple[int, ...]
    blocks: tuple[tuple[int, ...], ...]
    unembeddings: tuple[int, ...]


def shared_parts(models: Sequence[Anatomy]) -> SharedParts:
    """Compare models part by part: equal configs, modules and weights, bit for bit.

    Args:
        models: Of equal depth.

    Example:
        >>> import transformers
        >>> config = transformers.LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8,
        ...     num_hidden_layers=2, num_attention_heads=2)
        >>> from midblock.models import find_anatomy
        >>> a, b = (find_anatomy(transformers.LlamaForCausalLM(config)) for _ in range(2))
        >>> shared_parts([a, b, a]).blocks
        ((0, 0), (1, 1), (0, 0))
    """
    configs = [_config(m) for m in models]
    depth = min(m.num_blocks for m in models)
    by_block = [_first(models, configs, lambda m, b=b: _state([("", m.blocks[b])]))  # type: ignore[misc]
                for b in range(depth)]
    return SharedParts(_first(models, configs, _before_blocks), tuple(zip(*by_block, strict=True)),
                       shared_unembeddings(models))


def shared_block(models: Sequence[Anatomy], b: int) -> tuple[int, ...]:
    """`SharedParts.blocks` of one block, for models whose blocks are not all in memory."""
    return _first(models, [_config(m) for m in models], lambda m: _state([("", m.blocks[b])]))


def shared_unembeddings(models: Sequence[Anatomy]) -> tuple[int, ...]:
    """`SharedParts.unembeddings` alone."""
    return _first(models, [_config(m) for m in models], _unembedding)


def _first(models: Sequence[Anatomy], configs: Sequence[dict[str, Any]],
           part: Callable[[Anatomy], Mapping[str, Tensor] | None]) -> tuple[int, ...]:
    found: list[int] = []
    for i, model in enumerate(models):
        own = part(model)
        same = (j for j in dict.fromkeys(found) if models[j].causal_lm is model.causal_lm or (
            own is not None and configs[j] == configs[i] and _equal(own, part(models[j]))))
        found.append(next(same, i))
    return tuple(found)


def _config(model: Anatomy) -> dict[str, Any]:
    return {k: v for k, v in text_config(model.causal_lm).to_dict().items() if k not in _NAMES_ONLY}


def _hides_settings(module: nn.Module) -> bool:
    return type(module).__module__.startswith(("peft.", "bitsandbytes."))


def _state(modules: Iterable[tuple[str, nn.Module]]) -> dict[str, Tensor] | None:
    """Weights and buffers by name; None where an adapter or a quantiser takes part, whose settings they do not show."""
    state: dict[str, Tensor] = {}
    for name, module in modules:
        if any(_hides_settings(m) for m in module.modules()):
            return None
        state |= {f"{name}.{k}": v for k, v in (*module.named_parameters(), *module.named_buffers())}
    return state


def _before_blocks(model: Anatomy) -> dict[str, Tensor] | None:
    behind = [m for m in (*model.blocks, model.final_norm, None if model.tied else model.head) if m is not None]
    inside = {id(m) for part in behind for m in part.modules()}
    if any(_hides_settings(m) for m in model.causal_lm.modules() if id(m) not in inside):
        return None
    later = {id(p) for part in behind for p in (*part.parameters(), *part.buffers())}
    body = model.causal_lm
    return {k: v for k, v in (*body.named_parameters(), *body.named_buffers()) if id(v) not in later}


def _unembedding(model: Anatomy) -> dict[str, Tensor] | None:
    parts = [("head", model.head)] + ([("norm", model.final_norm)] if model.final_norm is not None else [])
    state = _state(parts)
    if state is None:
        return None
    loose = model.causal_lm.named_buffers(recurse=False)  # BART's bias of the logits
    return state | dict(loose)


def _equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor] | None) -> bool:
    if b is None or a.keys() != b.keys():
        return False
    return all(v is b[k] or (v.shape == b[k].shape and v.dtype == b[k].dtype and torch.equal(v, b[k].to(v.device)))
               for k, v in a.items())
