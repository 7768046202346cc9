"""Which matrices of a block a target means, and what of the blocks asked for a plan does not reach.

A target is a kind (q, k, v, o, gate, up, down, qkv ...), a module's own name, or a group of kinds. In a hybrid
model a target may mean something in one block and nothing in the next: it is dropped there, never the block, and what
was dropped is listed. A target that means nothing anywhere in the model is an error.
"""

from __future__ import annotations

import functools
import importlib.util
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import nn

from midblock.errors import SettingsError
from midblock.models import Anatomy, projections
from midblock.segments import format_blocks
from midblock.tuning.plan import Missing, ModulePlan

if TYPE_CHECKING:
    from midblock.models import Projection

__all__ = ["every_matrix", "modules_by_name", "modules_of_blocks", "modules_of_kinds"]

_MLP = ("gate", "up", "down")
_GROUPS = {"attention": ("q", "k", "v", "o"), "mlp": (*_MLP, "experts"), "all-linear": ("linear", "experts")}
# a fused matrix is meant when all of its parts are
_FUSED = {"qkv": {"q", "k", "v"}, "kv": {"k", "v"}, "gate_up": {"gate", "up"}}
_NEVER = ("norm", "bias", "adapter")
# what PEFT refuses: fused kernels read these weights past their module (`_check_lora_target_modules_mamba`)
_MAMBA_TYPES = frozenset({"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"})
_MAMBA_LEAVES = frozenset({"out_proj", "conv1d"})
# a sparse attention's indexer chooses tokens by their ranks, through which no gradient goes; Mamba's fused kernels
# read the weight of dt_proj past its module; of Zamba2's own adapters a block uses one
_NO_GRADIENT = re.compile(r"(?:^|\.)indexer(?:\.|$)|(?:^|\.)dt_proj$|_adapter_list\.")


@dataclass
class _Picked:
    """What the targets mean in one block."""

    parts: list[Projection]
    absent: dict[str, str] = field(default_factory=dict)
    """Target -> why it means nothing here."""


def _is_expert(module: str) -> bool:
    return re.search(r"(?:^|\.)experts?(?:\.|$)", module) is not None


def _is_stack(part: Projection) -> bool:
    """Whether it is the fused matrices of all experts, one parameter (E, out, in) without a module of its own."""
    return not part.linear and len(part.shape) == 3 and _is_expert(part.module) and part.kind not in _NEVER


def _usable(part: Projection, model_type: str, adapters: bool) -> bool:
    leaf = part.module.rpartition(".")[2]
    return part.linear and part.kind not in _NEVER and not _is_expert(part.module) \
        and not _NO_GRADIENT.search(part.module) and not (model_type in _MAMBA_TYPES and leaf in _MAMBA_LEAVES) \
        and not (adapters and _peft_renames(model_type, part.module))


@functools.cache
def _peft_renames(model_type: str, module: str) -> bool:
    """Whether PEFT takes an adapter of this module for one of transformers 4 and moves it to another module.

    In some families of mixtures PEFT reads ``gate_proj`` of any module as the experts', and renames what transformers
    renamed since: an adapter of a shared expert or of a dense block would not be read back.
    """
    from transformers import conversion_mapping

    changes = conversion_mapping.get_checkpoint_conversion_mapping(model_type)
    if changes is None:
        return False
    name = f"model.{module}.lora_A.weight"
    for change in changes:
        if type(change).__name__ == "WeightRenaming" and not name.endswith(change.rename_source_key(name)[0]):
            return True
    family = getattr(conversion_mapping, "_MODEL_TO_CONVERSION_PATTERN", {}).get(model_type)
    if family is None or importlib.util.find_spec("peft") is None:
        return False
    from peft.utils import transformers_weight_conversion as peft_names

    moved = getattr(peft_names, "_MOE_TARGET_MODULE_MAPPING", {}).get(family, {})
    return module.rpartition(".")[2] in moved


def _named(part: Projection, target: str) -> bool:
    names = (part.module, part.name)  # stacked experts are parameters without a module of their own
    return any(n == target or n.endswith(f".{target}") for n in names)


def _means(part: Projection, target: str) -> bool:
    if part.kind.startswith("cross_") and "." not in target:  # a decoder's view of its encoder: by kind only
        return part.kind == target
    if target == "linear":
        return part.linear and part.kind != "router"
    if target == "experts":
        return _is_stack(part)
    return _named(part, target) or (part.kind == target and not _is_stack(part))


def _found(parts: Iterable[Projection]) -> str:
    linear = [f"{p.module} ({p.kind}, {p.out_in[1]}->{p.out_in[0]})" for p in parts if p.linear]
    stacked = [f"{p.name} (stacked experts {tuple(p.shape)})" for p in parts if _is_stack(p)]
    return "; ".join(linear + stacked) or "nothing"


def _pick(block: nn.Module, targets: Sequence[str], model_type: str, adapters: bool) -> _Picked:
    every = list(projections(block).values())
    usable = [p for p in every if _usable(p, model_type, adapters) or _is_stack(p)]
    wanted = {t: None for target in targets for t in _GROUPS.get(target, (target,))}
    kinds = {p.kind for p in usable if not _is_stack(p)}
    chosen: set[str] = set()
    absent: dict[str, str] = {}
    for target in wanted:
        hits = [p for p in usable if _means(p, target)]
        fused = [f for f, pieces in _FUSED.items() if target in pieces and f in kinds]
        if not hits and fused:
            if _FUSED[fused[0]] <= wanted.keys():
                hits = [p for p in usable if p.kind == fused[0] and not _is_stack(p)]
            else:
                absent[target] = (f"is one part of the fused matrix {fused[0]!r}; name {fused[0]!r} or all of "
                                  f"{', '.join(sorted(_FUSED[fused[0]]))}")
                continue
        if hits:
            chosen.update(p.name for p in hits)
            continue
        refused = [p for p in every if _means(p, target) and p.kind not in _NEVER]
        if any(_is_expert(p.module) for p in refused):
            absent[target] = (f"matches only experts of a mixture that are modules ({refused[0].name} and "
                              f"{len(refused) - 1} more), which are not adapted one by one: their indices are not "
                              "block indices. Name attention matrices (attention) instead")
        elif refused:
            absent[target] = (f"matches only {refused[0].module}, which cannot be adapted "
                              f"({_why(refused[0], model_type)})")
        else:
            absent[target] = "matches no linear layer"
    return _Picked([p for p in every if p.name in chosen], absent)


def _why(part: Projection, model_type: str) -> str:
    if not part.linear:
        return "it is not a linear layer"
    if _peft_renames(model_type, part.module):
        return (f"PEFT takes an adapter of it for the experts' in a {model_type} model; method full "
                "trains it")
    return "no gradient reaches it" if _NO_GRADIENT.search(part.module) else "PEFT refuses it in a Mamba model"


def modules_of_blocks(anatomy: Anatomy, blocks: Sequence[int], targets: Sequence[str], *, adapters: bool = True
                      ) -> tuple[list[ModulePlan], list[Missing]]:
    """The matrices that targets mean in some blocks, and what they do not reach there.

    Args:
        anatomy: Of the model; it may be on the meta device.
        blocks: Ascending.
        targets: Kinds, groups or names.
        adapters: Whether they get a PEFT adapter, which a few matrices cannot have; otherwise they are trained
            themselves.

    Returns:
        Matrices in the order of the model; one `Missing` for each block where a target that the model knows means
        nothing.

    Raises:
        SettingsError: a target means nothing in the whole model, or none means anything in these blocks.
    """
    model_type = str(getattr(anatomy.causal_lm.config, "model_type", ""))
    own = {b: _pick(anatomy.blocks[b], targets, model_type, adapters) for b in blocks}
    planned = [_module(anatomy, b, p) for b, picked in own.items() for p in picked.parts]
    nowhere = set.intersection(*(set(p.absent) for p in own.values()))
    if nowhere:  # the other blocks tell a target of a hybrid model from a mistake
        for b, block in enumerate(anatomy.blocks):
            if b not in own:
                nowhere &= set(_pick(block, targets, model_type, adapters).absent)
    first = own[blocks[0]]
    grouped = {t for target in targets for t in _GROUPS.get(target, ())}
    parts = list(projections(anatomy.blocks[blocks[0]]).values())
    if mistakes := [t for t in first.absent if t in nowhere and t not in grouped]:
        raise SettingsError(f"target {mistakes[0]!r} of {anatomy.block_path(blocks[0])} {first.absent[mistakes[0]]}. "
                            f"Found: {_found(parts)}.")
    if not planned:
        raise SettingsError(
            f"blocks {format_blocks(blocks)} have none of {', '.join(targets)}; "
            f"{_reached(anatomy, targets, model_type)} {anatomy.block_path(blocks[0])} has: {_found(parts)}.")
    return planned, [Missing(block=b, targets=lacking) for b, picked in own.items()
                     if (lacking := tuple(t for t in picked.absent if t not in nowhere))]


def _reached(anatomy: Anatomy, targets: Sequence[str], model_type: str) -> str:
    where = [b for b, block in enumerate(anatomy.blocks) if _pick(block, targets, model_type, True).parts]
    return f"blocks {format_blocks(where)} do." if where else "no block has any."


def modules_by_name(anatomy: Anatomy, names: Iterable[str]) -> list[ModulePlan]:
    """Named modules, checked one by one.

    Raises:
        SettingsError: a name is not a linear layer (or stacked experts) of a decoder block; what was found is listed.
    """
    known = {m.name: m for m in _every_module(anatomy)}
    chosen = list(dict.fromkeys(n.removeprefix("base_model.model.") for n in names))
    unknown = [n for n in chosen if n not in known]
    if unknown or not chosen:
        what = "an empty list of modules names no" if not chosen else (
            f"{unknown[0]!r}" + (f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else "") + " is no")
        first = [n for n in known if n.startswith(f"{anatomy.block_path(0)}.")]
        raise SettingsError(f"{what} linear layer of a decoder block of this model. Its block 0 has: "
                            f"{', '.join(first) or 'none'}.")
    order = {name: i for i, name in enumerate(known)}
    return [known[n] for n in sorted(chosen, key=order.__getitem__)]


def modules_of_kinds(anatomy: Anatomy, kinds: set[str]) -> list[ModulePlan]:
    """Every matrix of some kinds in all blocks."""
    return [m for m in _every_module(anatomy) if m.kind in kinds]


def every_matrix(anatomy: Anatomy, blocks: Iterable[int]) -> list[ModulePlan]:
    """All matrices of some blocks, norms left out."""
    chosen = set(blocks)
    return [m for m in _every_module(anatomy) if m.block in chosen]


def _every_module(anatomy: Anatomy) -> Iterable[ModulePlan]:
    for block, module in enumerate(anatomy.blocks):
        for part in projections(module).values():
            if (part.linear and part.kind not in _NEVER) or _is_stack(part):
                yield _module(anatomy, block, part)


def _module(anatomy: Anatomy, block: int, part: Projection) -> ModulePlan:
    owner = anatomy.blocks[block].get_submodule(part.module)
    path = anatomy.block_path(block)
    if _is_stack(part):
        experts, rows, columns = part.shape
        if getattr(owner, "is_transposed", False):  # stored as (experts, in, out)
            rows, columns = columns, rows
        return ModulePlan(name=f"{path}.{part.name}", block=block, kind=part.kind, inputs=columns, outputs=rows,
                          experts=experts)
    outputs, inputs = part.out_in
    if isinstance(owner, nn.Linear):  # quantised weights are stored in another shape
        outputs, inputs = owner.out_features, owner.in_features
    return ModulePlan(name=f"{path}.{part.module}", block=block, kind=part.kind, inputs=inputs, outputs=outputs)

