"""What the matrices of a block are, from their names: q, k, v, o, gate, up, down, router, norm ..."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from midblock.errors import ArchitectureError

__all__ = ["NORM", "Projection", "attention_of", "attentions", "kind_of", "projections", "split_fused"]

NORM = re.compile(r"norm|(?:^|[._])ln(?:[._\d]|$)", re.IGNORECASE)
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_CROSS = re.compile(r"cross|encdec|encoder_attn", re.IGNORECASE)
# Leaf names of the field's checkpoints. Which model they come from does not matter; a leaf that
# is not listed is "other".
_IN_ATTENTION = {
    "q": ("q_proj", "q", "query", "wq", "q_lin", "to_q", "q_a_proj", "q_b_proj"),
    "k": ("k_proj", "k", "key", "wk", "k_lin", "to_k"),
    "v": ("v_proj", "v", "value", "wv", "v_lin", "to_v"),
    "kv": ("kv_proj", "kv_a_proj_with_mqa", "kv_b_proj"),
    "o": ("o_proj", "o", "out_proj", "wo", "dense", "c_proj", "out_lin", "to_out"),
    "qkv": ("qkv_proj", "c_attn", "query_key_value", "wqkv", "qkv", "w_pack", "att_proj"),
}
_OUTSIDE_ATTENTION = {
    "gate": ("gate_proj", "w1", "wi_0"),
    "up": ("up_proj", "w3", "wi_1", "wi", "fc1", "c_fc", "dense_h_to_4h", "fc_in", "lin1"),
    "down": ("down_proj", "w2", "wo", "fc2", "c_proj", "dense_4h_to_h", "fc_out", "lin2"),
    "gate_up": ("gate_up_proj",),
    "router": ("gate", "router", "shared_expert_gate"),
}
_ATTENTION_LEAF = {leaf: kind for kind, leaves in _IN_ATTENTION.items() for leaf in leaves}
_OTHER_LEAF = {leaf: kind for kind, leaves in _OUTSIDE_ATTENTION.items() for leaf in leaves}
_UNMISTAKABLE = {"q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "query_key_value", "wqkv"}
# a part of attention that chooses which tokens are attended to; the loss gives it no gradient (DeepSeek-V3.2)
_INDEXER = re.compile(r"indexer", re.IGNORECASE)


def kind_of(name: str) -> str:
    """What a module or parameter of a block is, from its name alone.

    Rule: the leaf (the last component, ``weight`` and PEFT's ``base_layer`` left out) is looked up
    in a fixed vocabulary, once for names below a component that contains ``attn`` or
    ``attention`` and once for all others.

    Args:
        name: Name inside a block or of a whole checkpoint, with or without ``.weight``.

    Returns:
        ``q k v kv o qkv`` (``cross_`` before them in a decoder's cross-attention), ``gate up down
        gate_up router``, ``norm``, ``bias``, ``adapter``, or ``other``.

    Example:
        >>> [kind_of(n) for n in ("self_attn.q_proj.weight", "attn.c_proj", "mlp.c_proj.weight")]
        ['q', 'o', 'down']
        >>> kind_of("layer.1.EncDecAttention.k.weight"), kind_of("mixer.A_log")
        ('cross_k', 'other')
    """
    parts = [p for p in name.split(".") if p not in ("base_layer", "original_module")]
    if any(p.startswith(("lora_", "modules_to_save")) for p in parts):
        return "adapter"
    if parts and parts[-1] in ("weight", "bias", "qweight"):
        last = parts.pop()
        if last == "bias":
            return "norm" if parts and NORM.search(parts[-1]) else "bias"
    if not parts:
        return "other"
    leaf, context = parts[-1], ".".join(parts[:-1])
    if leaf.endswith("_bias") and name.endswith(leaf):  # a bias stored beside stacked experts
        return "bias"
    if NORM.search(leaf):
        return "norm"
    if _INDEXER.search(context):
        return "other"
    if parts[-2:-1] == ["router"]:
        return "router"
    if _ATTENTION.search(context) or leaf.lower() in _UNMISTAKABLE or leaf == "c_attn":
        kind = _ATTENTION_LEAF.get(leaf, _ATTENTION_LEAF.get(leaf.lower(), "other"))
        return f"cross_{kind}" if kind != "other" and _CROSS.search(context) else kind
    return _OTHER_LEAF.get(leaf, "other")


@dataclass(frozen=True, slots=True)
class Projection:
    """One parameter of a block that is a matrix, a stack of expert matrices, or a norm."""

    name: str
    """Parameter name inside the block, such as ``self_attn.q_proj.weight``."""
    module: str
    """Name of the module that owns it, such as ``self_attn.q_proj``."""
    kind: str
    """See `kind_of`."""
    shape: tuple[int, ...]
    """Shape as stored."""
    transposed: bool
    """Stored as (in, out) (GPT-2's Conv1D) and not as (out, in)."""
    linear: bool
    """Owned by a linear layer, so that PEFT can adapt it as a target module."""

    @property
    def out_in(self) -> tuple[int, int]:
        """(out, in) of one matrix, whatever way it is stored."""
        rows, columns = self.shape[-2:]
        return (columns, rows) if self.transposed else (rows, columns)


def projections(block: nn.Module) -> dict[str, Projection]:
    """Matrices and norms of a block by parameter name, classified by `kind_of`.

    Biases are left out. Experts that transformers stacks in one parameter (E, out, in) are one
    entry.
    """
    found: dict[str, Projection] = {}
    for path, module in block.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            name = f"{path}.{leaf}" if path else leaf
            kind = kind_of(name)
            if leaf == "bias" or kind in ("bias", "adapter") or (parameter.ndim < 2 and kind != "norm"):
                continue
            conv1d = type(module).__name__ == "Conv1D" and hasattr(module, "nf")
            module_name = path.removesuffix(".base_layer")
            found[name] = Projection(
                name=name, module=module_name, kind=kind, shape=tuple(parameter.shape),
                transposed=conv1d, linear=isinstance(module, nn.Linear) or conv1d)
    return found


def attentions(block: nn.Module) -> list[tuple[str, nn.Module]]:
    """Modules of a block that directly own a query (or fused) projection; not cross-attention."""
    owners: dict[str, nn.Module] = {}
    for path, _ in block.named_modules():
        if path and kind_of(path) in ("q", "qkv") and not path.endswith("base_layer"):
            owner = path.rpartition(".")[0]
            owners.setdefault(owner, block.get_submodule(owner))
    return list(owners.items())


def attention_of(block: nn.Module) -> nn.Module:
    """The self-attention module of a block (what owns its query, or fused qkv, projection).

    Raises:
        ArchitectureError: the block has none (a state-space block, say) or more than one.
    """
    found = attentions(block)
    if len(found) != 1:
        raise ArchitectureError(
            f"{type(block).__name__}: looked for one module that owns a query projection, found "
            f"{len(found)}{': ' + ', '.join(p for p, _ in found) if found else ''}.")
    return found[0][1]


def split_fused(name: str, weight: Tensor, config: Any) -> dict[str, Tensor] | None:
    """Query, key and value parts of a fused weight, as views.

    Layouts: ``c_attn`` stores (in, 3*out) with q, k, v side by side; ``qkv_proj`` and ``Wqkv`` store
    q rows, then k rows, then v rows; ``query_key_value`` stores q, k, v of one head after another
    (GPT-NeoX, BLOOM; not Falcon's grouped form).

    Args:
        name: Parameter or module name; its leaf decides the layout.
        weight: The fused matrix as stored, or its bias.
        config: Text config, for heads and key-value heads.

    Returns:
        ``{"q": ..., "k": ..., "v": ...}``, or None where the layout is not one of these.
    """
    leaf = name.removesuffix(".weight").removesuffix(".bias").rpartition(".")[2]
    heads = getattr(config, "num_attention_heads", None)
    if not heads:
        return None
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    if leaf == "c_attn":
        width = weight.shape[-1]
        if width % 3 or getattr(config, "multi_query", False):
            return None
        return dict(zip("qkv", weight.split(width // 3, dim=-1), strict=True))
    rows = weight.shape[0]
    if leaf in ("qkv_proj", "Wqkv"):
        size, rest = divmod(rows, heads + 2 * kv_heads)
        if rest:
            return None
        sizes = [heads * size, kv_heads * size, kv_heads * size]
        return dict(zip("qkv", weight.split(sizes, dim=0), strict=True))
    if leaf == "query_key_value":
        grouped = (kv_heads != heads or getattr(config, "multi_query", False)
                   or getattr(config, "new_decoder_architecture", False))
        if grouped or rows % (3 * heads):
            return None
        by_head = weight.reshape(heads, 3, rows // (3 * heads), *weight.shape[1:])
        return {kind: by_head[:, i].flatten(0, 1) for i, kind in enumerate("qkv")}
    return None
