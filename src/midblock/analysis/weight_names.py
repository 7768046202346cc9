"""What is compared in `weights`: the tensors of several checkpoints that correspond, and where each belongs.

Names differ between checkpoints (prefixes, tied heads, adapters) and from the module tree (transformers
renames on loading). What all have in common is the block list.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from midblock.errors import (
    AdapterError,
    ArchitectureError,
    CheckpointError,
    MidblockError,
    PairMismatchError,
    SettingsError,
)
from midblock.models import (
    AdapterFile,
    Anatomy,
    Checkpoint,
    LoadedModel,
    find_anatomy,
    is_adapter_folder,
    kind_of,
    resolve_checkpoint,
    split_fused,
    text_config,
)
from midblock.models.adapters import StoredExpert, stored_experts
from midblock.models.skeleton import model_skeleton
from midblock.segments import format_blocks

__all__ = ["ATTENTION_KINDS", "EXPERT_KINDS", "Operand", "Plan", "Slab", "Stage", "Weight", "correspondence",
           "stage_of"]

#: Kinds of matrices that the paper's equation 1 sums over.
ATTENTION_KINDS = frozenset({"q", "k", "v", "kv", "o", "qkv", "linear_in"})
#: Kinds of matrices that some families keep in one tensor for all experts.
EXPERT_KINDS = frozenset({"gate", "up", "down", "gate_up"})


@dataclass(frozen=True)
class Weight:
    """One tensor of the base, and where it belongs."""

    name: str
    shape: tuple[int, ...]
    block: int | None
    kind: str
    """`kind_of` inside a block; outside, ``embeddings``, ``final_norm``, ``head`` or ``other``."""
    fused: Literal["rows", "columns", "experts"] | None = None
    """Axis along which a fused matrix is told apart: q, k and v in one, or a stack (E, a, b) of experts."""

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def columns(self) -> int:
        return self.shape[-1] if len(self.shape) > 1 else 1


@dataclass(frozen=True)
class Slab:
    """A tensor as it lies in a file."""

    path: Path
    offset: int
    dtype: torch.dtype
    name: str
    owner: Checkpoint = field(repr=False, compare=False)


@dataclass(frozen=True)
class Operand:
    """What one stage has in place of a base weight: a slab, plus thin factors, or a whole tensor."""

    slab: Slab | None
    left: Tensor | None = None
    right: Tensor | None = None
    whole: Tensor | None = None

    @property
    def dtype(self) -> torch.dtype:
        return self.slab.dtype if self.slab is not None else torch.float32


class Stage:
    """A checkpoint, or an adapter on top of the first stage's checkpoint."""

    def __init__(self, name: str, folder: Path, base: Stage | None) -> None:
        self.name = name
        self.adapter: AdapterFile | None = None
        self.own_names: dict[str, str] = {}
        if is_adapter_folder(folder):
            if base is None or base.adapter is not None:
                raise AdapterError(f"{folder} is an adapter; the first checkpoint must be the base model "
                                   "that it adapts.")
            self.adapter = AdapterFile(folder)
            kind = self.adapter.config.get("peft_type", "LORA")
            if kind != "LORA":
                raise AdapterError(f"{folder} is a {kind} adapter, but only LoRA adapters can be compared with "
                                   "their base as they are. Merge it, then compare the merged checkpoint.")
        self.checkpoint: Checkpoint = (Checkpoint(folder) if self.adapter is None or base is None
                                       else base.checkpoint)
        if method := (self.checkpoint.config.get("quantization_config") or {}).get("quant_method"):
            raise CheckpointError(f"{folder} is quantised ({method}): its stored integers are not weights. "
                                  "Dequantise it first.")
        self.changed: dict[str, str] = {}  # base weight -> its name as the adapter has it
        self.experts: dict[str, StoredExpert] = {}  # base weight -> its place in a stack that the adapter changes

    @property
    def source(self) -> Checkpoint:
        """What the spec named: the adapter, or the checkpoint."""
        return self.adapter or self.checkpoint

    def release(self) -> None:
        """Let go of mapped pages."""
        self.source.release()
        self.checkpoint.release()

    def operand(self, weight: Weight) -> Operand:
        """What to read in place of a base weight."""
        stored = _slab(self.checkpoint, self.own_names[weight.name])
        if self.adapter is not None and weight.name in self.experts:
            base = self.checkpoint.read(self.own_names[weight.name]).float()
            change = self.adapter.expert_delta(self.experts[weight.name])
            if change.shape != base.shape:
                raise AdapterError(_no_fit(self.adapter, self.experts[weight.name].stack, tuple(change.shape), weight))
            return Operand(None, whole=base + change)
        if self.adapter is None or weight.name not in self.changed:
            return Operand(stored)
        key = self.changed[weight.name]
        full = self.adapter.replacement(key)
        if full is not None:
            stored = _slab(self.adapter, full)
            if not _begins_with(self.adapter.shape(full), weight.shape):
                raise AdapterError(_no_fit(self.adapter, key, self.adapter.shape(full), weight))
        factors = self.factors(weight)
        if factors is not None:
            return Operand(stored, *factors)
        if full is not None:
            return Operand(stored)
        base = self.checkpoint.read(self.own_names[weight.name]).float()
        return Operand(None, whole=base + self.adapter.delta(key, base))

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of what this stage has in place of a base weight."""
        if self.adapter is not None and name in self.changed and (
                full := self.adapter.replacement(self.changed[name])):
            return self.adapter.shape(full)
        return self.checkpoint.shape(self.own_names[name])

    def factors(self, weight: Weight) -> tuple[Tensor, Tensor] | None:
        """Thin factors of an adapter's change in the weight's layout; None where it is not of low rank."""
        assert self.adapter is not None
        found = self.adapter.factors(self.changed[weight.name])
        if found is None:
            return None
        left, right = found
        shape = (left.shape[0], right.shape[1])
        if shape != weight.shape and shape[::-1] == weight.shape:
            # PEFT notes a transposed layout once per adapter, but decides it for each module
            left, right = right.T, left.T
        elif shape != weight.shape:
            raise AdapterError(_no_fit(self.adapter, weight.name, shape, weight))
        return left.contiguous(), right.contiguous()


def _slab(checkpoint: Checkpoint, name: str) -> Slab:
    path, offset = checkpoint.location(name)
    return Slab(path, offset, checkpoint.dtype(name), name, checkpoint)


def _begins_with(shape: Sequence[int], wanted: Sequence[int]) -> bool:
    """Whether a tensor has at least the wanted rows, each of the wanted size."""
    return len(shape) == len(wanted) and tuple(shape[1:]) == tuple(wanted[1:]) and shape[0] >= wanted[0]


def _no_fit(adapter: Checkpoint, name: str, shape: Sequence[int], weight: Weight) -> str:
    return (f"{adapter.folder}: its change of {name} has the shape {tuple(shape)}, the base's {weight.name} "
            f"{weight.shape}; it is an adapter of another model.")


def stage_of(key: str, spec: LoadedModel | str | Path, base: Stage | None) -> Stage:
    """The files of one stage: of a MODEL spec, or of what a loaded model was loaded from.

    Raises:
        SettingsError: the model was not loaded from a folder.
    """
    if isinstance(spec, str | Path):
        return Stage(key, resolve_checkpoint(spec), base)
    folder = spec.adapter or spec.folder
    if folder is None:
        raise SettingsError(f"{spec.name} was not loaded from a folder, so there are no files to read; save "
                            "it with save_checkpoint first.")
    return Stage(key, folder, base)


def _described(folder: Path) -> tuple[Anatomy | None, set[str], Any]:
    """Anatomy, parameter names and text config of the model that a config describes, without weights.

    Nothing (None, no names, None) where transformers does not know the architecture: the names of
    the weights must do then.
    """
    try:
        model, _, _ = model_skeleton(folder)
        return find_anatomy(model, verify=False), set(model.state_dict()), text_config(model)
    except MidblockError:
        return None, set(), None


def _align(reference: Sequence[str], own: Sequence[str]) -> dict[str, str]:
    """Reference name -> own name. A prefix that one side has in front of all names is understood."""
    known = set(own)
    found = {name: name for name in reference if name in known}
    lost = [name for name in reference if name not in found]
    spare = [name for name in own if name not in found]
    for longer, shorter in ((lost, spare), (spare, lost)):
        ends = {name: name for name in shorter}
        prefixes: dict[str, int] = {}
        for name in longer:
            parts = name.split(".")
            for i in range(1, len(parts)):
                if ".".join(parts[i:]) in ends:
                    prefix = ".".join(parts[:i]) + "."
                    prefixes[prefix] = prefixes.get(prefix, 0) + 1
        for prefix, _ in sorted(prefixes.items(), key=lambda item: -item[1])[:1]:
            for name in longer:
                rest = name.removeprefix(prefix)
                if rest != name and rest in ends:
                    pair = (name, rest) if longer is lost else (rest, name)
                    found.setdefault(*pair)
    return found


@dataclass
class Plan:
    """All weights to compare, in the order in which they lie in the base's files."""

    weights: list[Weight]
    num_blocks: int
    tied: bool
    config: Any
    left_out: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def correspondence(stages: Sequence[Stage]) -> Plan:
    """Which tensors of all stages are one weight, and in which block and matrix each belongs.

    Raises:
        PairMismatchError: the stages' weights do not correspond.
        CheckpointError: weights are stored quantised and cannot be compared.
    """
    base = stages[0].checkpoint
    anatomy, parameters, config = _described(base.folder)
    layout = _Layout(base, anatomy, parameters)
    embeddings, head = layout.embeddings, layout.head
    tied = anatomy.tied if anatomy is not None else head not in base
    reference = base.names()
    has_head = any(head in s.checkpoint
                   or (s.adapter is not None and s.adapter.replacement(head)) for s in stages)
    if head not in base and tied and has_head:
        reference.append(head)
    left_out: set[str] = set()
    for stage in stages:
        own = stage.checkpoint.names()
        stage.own_names = _align(reference, own)
        if tied and head not in stage.own_names and embeddings in stage.own_names:
            stage.own_names[head] = stage.own_names[embeddings]  # a tied head is stored once
        lost = [n for n in reference if n not in stage.own_names]
        extra = sorted(set(own) - set(stage.own_names.values()))
        # buffers that older versions stored (rotary frequencies, causal masks) are not weights
        weights_lost = [n for n in lost if (n in parameters or _is_weight(n, base)) and not layout.lies_beyond(n)]
        weights_extra = [n for n in extra if (n in parameters or _is_weight(n, stage.checkpoint))
                         and not layout.lies_beyond(n, stage.checkpoint.num_blocks)]
        if weights_lost or weights_extra:
            what, some = (("lacks", weights_lost) if weights_lost else ("also has", weights_extra))
            raise PairMismatchError(
                f"{stage.checkpoint.folder} {what} {len(some)} weights beside {stages[0].checkpoint.folder} "
                f"({', '.join(some[:3])}{' ...' if len(some) > 3 else ''}); base and tuned checkpoint must be "
                "of one architecture and size.")
        left_out.update(lost, extra)
        _map_adapter(stage, reference)
    notes: list[str] = []
    beyond = {n for n in (*reference, *left_out) if layout.lies_beyond(n)}
    left_out -= beyond
    found = []
    for name in reference:
        if name in left_out or name in beyond:
            continue
        dtypes = [s.checkpoint.dtype(s.own_names[name]) for s in stages]
        if not all(d.is_floating_point for d in dtypes):
            if name in parameters:
                raise CheckpointError(
                    f"{name} is stored as {next(d for d in dtypes if not d.is_floating_point)}: quantised "
                    "weights cannot be compared; dequantise the checkpoint first.")
            left_out.add(name)
            continue
        block = layout.block_of(name)
        kind = _kind_in_block(name) if block is not None else layout.part_of(name)
        shapes = {stage.name: stage.shape(name) for stage in stages}
        shape = min(shapes.values())
        for stage in stages[1:]:
            # a vocabulary that was enlarged has more rows; those that all have are compared
            fits = _begins_with(shapes[stage.name], shape) if kind in ("embeddings", "head") else (
                shapes[stage.name] == shapes[stages[0].name])
            if not fits:
                raise PairMismatchError(
                    f"{name} has the shape {shapes[stages[0].name]} in {stages[0].source.folder} and "
                    f"{shapes[stage.name]} in {stage.source.folder}; base and tuned checkpoint must be of one "
                    "architecture and size.")
        if len(set(shapes.values())) > 1:
            rows = ", ".join(f"{stage} {size[0]:,}" for stage, size in shapes.items())
            notes.append(f"{name} is compared over the first {shape[0]:,} rows, which all stages have (rows: {rows}).")
        found.append(Weight(name, shape, block, kind, _fused_axis(name, kind, shape, config)))
    plan = Plan(found, layout.num_blocks, tied and not has_head, config, sorted(left_out), notes)
    if plan.left_out:
        plan.notes.append(f"{len(plan.left_out)} stored tensors are not weights and were left out: "
                          f"{', '.join(plan.left_out[:3])}{' ...' if len(plan.left_out) > 3 else ''}.")
    if beyond:
        places = format_blocks(sorted({layout.block_of(name) or 0 for name in beyond}))
        plan.notes.append(f"{len(beyond)} weights of blocks {places} lie past the {layout.num_blocks} blocks that the "
                          "config describes (multi-token prediction, say) and were left aside.")
    if mixed := _mixed_kinds(found):
        plan.notes.append(mixed)
    whole = {w.name for w in found if w.kind == "qkv" and w.fused is None}
    if whole:
        plan.notes.append(f"q, k and v cannot be told apart in {min(whole)} and its like: they count as one "
                          "matrix in qkvo.")
    return plan


def _kind_in_block(name: str) -> str:
    kind = kind_of(name)
    # Qwen3-Next, Qwen3.5: q, k and v of linear attention in one matrix, whose parts no config value tells apart
    return "linear_in" if kind == "other" and re.search(r"attn\.in_proj_qkvz?\.weight$", name) else kind


def _mixed_kinds(weights: Sequence[Weight]) -> str | None:
    """A note where attention's matrices are others in some blocks than in the rest; None where they are the same."""
    by_block: dict[int, set[str]] = {}
    for weight in weights:
        if weight.block is not None:
            by_block.setdefault(weight.block, set()).update({weight.kind} & ATTENTION_KINDS)
    kinds: dict[frozenset[str], list[int]] = {}
    for block, found in by_block.items():
        kinds.setdefault(frozenset(found), []).append(block)
    if len(kinds) < 2:
        return None
    told = "; ".join(f"{', '.join(sorted(found)) or 'none'} in blocks {format_blocks(blocks)}"
                     for found, blocks in sorted(kinds.items(), key=lambda item: item[1]))
    return (f"Sums over q, k, v and o rest on other matrices from block to block ({told}): between such blocks compare "
            "weight_change_relative.")


def _is_weight(name: str, checkpoint: Checkpoint) -> bool:
    # older checkpoints store causal masks as attn.bias, with four axes
    return name.endswith((".weight", ".bias")) and len(checkpoint.shape(name)) < 4


_EMBEDDING_LEAVES = ("embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings", "shared")
_HEAD_LEAVES = ("lm_head", "embed_out", "output")


class _Layout:
    """Where a checkpoint's stored names put blocks, embeddings, final norm and head.

    Stored names may have other prefixes than the module tree (transformers renames on loading).
    What both have in common is the block list, from which the rest is found.
    """

    def __init__(self, base: Checkpoint, anatomy: Anatomy | None, parameters: set[str]) -> None:
        self.num_blocks, self.block_of = _blocks(base, anatomy, parameters)
        first = next(n for n in base.names() if self.block_of(n) == 0)
        self._anatomy = anatomy
        self._body = re.split(r"\.?\b0\.", first, maxsplit=1)[0]  # stored path of the block list
        if anatomy is not None:
            inside = anatomy.blocks_path.removeprefix(anatomy.body_path)
            self._body = self._body.removesuffix(inside).removesuffix(inside.removeprefix("."))
        else:
            self._body = self._body.rpartition(".")[0]
        self.embeddings = self._find(base, anatomy.embeddings_path if anatomy else None, _EMBEDDING_LEAVES)
        self.head = self._find(base, anatomy.head_path if anatomy else None, _HEAD_LEAVES)
        self._norm = self._stored(anatomy.final_norm_path) if anatomy and anatomy.final_norm_path else None

    def lies_beyond(self, name: str, own_blocks: int | None = None) -> bool:
        """Whether a weight is of a block past the last one that the base's config describes, and its own."""
        return (self.block_of(name) or 0) >= max(self.num_blocks, own_blocks or 0)

    def _stored(self, path: str) -> str:
        """Stored path of a module."""
        assert self._anatomy is not None
        body = self._anatomy.body_path
        if body and not path.startswith(f"{body}."):
            return path
        return f"{self._body}.{path.removeprefix(body)}".replace("..", ".").strip(".")

    def _find(self, base: Checkpoint, path: str | None, leaves: tuple[str, ...]) -> str:
        wanted = [f"{p}.weight" for p in ((path, self._stored(path)) if path else ())]
        by_leaf = [n for n in base.names() if n.removesuffix(".weight").rpartition(".")[2] in leaves]
        return next((n for n in (*wanted, *by_leaf) if n in base), (wanted or [f"{leaves[0]}.weight"])[0])

    def part_of(self, name: str) -> str:
        """``embeddings``, ``final_norm``, ``head`` or ``other`` of a weight outside the blocks."""
        module = name.rpartition(".")[0]
        if name == self.embeddings:
            return "embeddings"
        if module == self.head.removesuffix(".weight"):
            return "head"
        if self._norm is not None:
            return "final_norm" if module == self._norm else "other"
        # without weights the module tree cannot always tell the final norm from an embedding's norm
        inside = not self._body or name.startswith(f"{self._body}.")
        return "final_norm" if inside and kind_of(name) == "norm" and "emb" not in name.lower() else "other"


def _blocks(base: Checkpoint, anatomy: Anatomy | None, parameters: set[str]
            ) -> tuple[int, Callable[[str], int | None]]:
    """Number of blocks and a function from a weight's name to its block (which may lie past the last one).

    Where the model can be described without weights, the list is the one whose members have the names
    of its blocks' parameters; else the names alone show it.
    """
    path = None if anatomy is None else _stored_path(base.names(), anatomy.blocks_path, parameters)
    block_of = base.block_of if path is None else _block_in(path)
    numbers = {b for name in base.names() if (b := block_of(name)) is not None}
    num_blocks = anatomy.num_blocks if anatomy is not None else len(numbers)
    if missing := set(range(num_blocks)) - numbers:
        raise ArchitectureError(f"{base.folder}: of the {num_blocks} blocks that its config describes its weights lack "
                                f"{sorted(missing)[:5]}; the files are incomplete or of another model.")
    return num_blocks, block_of


def _block_in(path: str) -> Callable[[str], int | None]:
    numbered = re.compile(rf"{re.escape(path)}\.(\d+)\.")

    def block_of(name: str) -> int | None:
        found = numbered.match(name)
        return int(found[1]) if found else None
    return block_of


def _stored_path(names: Sequence[str], blocks_path: str, parameters: set[str]) -> str | None:
    """Path of the block list in the stored names, whatever prefix they have; None where none fits the module tree."""
    votes: dict[str, int] = {}
    for name in names:
        for found in re.finditer(r"\.(\d+)\.", name):
            if f"{blocks_path}{name[found.start():]}" in parameters:
                votes[name[:found.start()]] = votes.get(name[:found.start()], 0) + 1
    return max(votes, key=lambda path: votes[path], default=None)


def _map_adapter(stage: Stage, reference: Sequence[str]) -> None:
    if stage.adapter is None:
        return
    adapted = stage.adapter.adapted()
    names = _align(adapted, reference)
    lost = [n for n in adapted if n not in names]
    if lost and set(lost) <= stage.adapter.stacked_experts:  # which the files of the base may store one by one
        stage.experts = {n: e for n, e in stored_experts(stage.checkpoint.config, reference).items()
                         if e.stack in lost}
        lost = sorted(set(lost) - {e.stack for e in stage.experts.values()})
    if lost:
        raise AdapterError(f"{stage.adapter.folder} changes {len(lost)} weights that the base lacks "
                           f"({', '.join(lost[:3])}{' ...' if len(lost) > 3 else ''}); it is an adapter of "
                           "another model.")
    stage.changed = {weight: name for name, weight in names.items()}


def _fused_axis(name: str, kind: str, shape: tuple[int, ...], config: Any
                ) -> Literal["rows", "columns", "experts"] | None:
    """Axis along which a fused matrix can be told apart; None where it cannot, or is single."""
    if len(shape) == 3 and kind in EXPERT_KINDS:
        return "experts"
    if kind != "qkv" or len(shape) != 2 or config is None:
        return None
    by_columns = name.removesuffix(".weight").endswith("c_attn")
    if split_fused(name, torch.empty(shape[1 if by_columns else 0]), config) is None:
        return None
    return "columns" if by_columns else "rows"
