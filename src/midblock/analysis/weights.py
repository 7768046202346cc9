"""Weight change between checkpoints, read straight from their safetensors (paper eq. 1, figure 4).

No model is built. Both files are read side by side in small pieces by a few threads; a piece is
widened, subtracted, squared and summed while it is still in the processor's cache, so that
memory does not grow with the model and the reading, not the arithmetic, sets the pace.
Sums within a piece of 2**17 entries are float32 (float64 where a checkpoint is), the totals float64.

A LoRA adapter against its base is never multiplied out: ||s B A||_F^2 = s^2 tr((B'B)(AA')), and the
singular values of B A are those of an r x r matrix.
"""

from __future__ import annotations

import contextlib
import math
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from midblock import metrics
from midblock.analysis.stages import comparisons, side_of, stage_names
from midblock.errors import (
    AdapterError,
    ArchitectureError,
    CheckpointError,
    PairMismatchError,
    SettingsError,
    UndefinedMetricError,
)
from midblock.models import LoadedModel
from midblock.models.anatomy import Anatomy, find_anatomy, kind_of, split_fused, text_config
from midblock.models.checkpoints import Checkpoint, is_adapter_folder, resolve_checkpoint
from midblock.progress import Progress, silent
from midblock.results import Table
from midblock.segments import depth

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["GROUPS", "WeightsResult", "weights"]

#: Groups of a block's matrices that get rows of their own; ``qkvo`` is the paper's equation 1.
GROUPS: dict[str, frozenset[str]] = {
    "qkvo": frozenset({"q", "k", "v", "kv", "o", "qkv"}),
    "mlp": frozenset({"gate", "up", "down", "gate_up", "router"}),
    "norm": frozenset({"norm"}),
}
_CROSS = frozenset({"cross_q", "cross_k", "cross_v", "cross_kv", "cross_o", "cross_qkv"})

_PIECE = 1 << 17  # entries: two widened pieces and their difference fit a core's second-level cache
_JOB = 1 << 22  # entries handed to a thread at a time
_AUTO_SPECTRA = 2e12  # operations: under a minute or two on two cores
_OUTSIDE = ("embeddings", "final_norm", "head", "other")

Pair = tuple[int, int]


# ---------------------------------------------------------------------------------------------
# what is compared


@dataclass(frozen=True)
class _Weight:
    """One tensor of the base, and where it belongs."""

    name: str
    shape: tuple[int, ...]
    block: int | None
    kind: str
    """`kind_of` inside a block; outside, one of `_OUTSIDE`."""
    fused: Literal["rows", "columns"] | None = None
    """Axis of a fused qkv matrix along which q, k and v are told apart."""

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def columns(self) -> int:
        return self.shape[-1] if len(self.shape) > 1 else 1


@dataclass(frozen=True)
class _Slab:
    """A tensor as it lies in a file."""

    path: Path
    offset: int
    dtype: torch.dtype
    name: str


@dataclass(frozen=True)
class _Operand:
    """What one stage has in place of a base weight: a slab, plus thin factors, or a whole tensor."""

    slab: _Slab | None
    left: Tensor | None = None
    right: Tensor | None = None
    whole: Tensor | None = None

    @property
    def rowwise(self) -> bool:
        return self.left is not None

    @property
    def dtype(self) -> torch.dtype:
        return self.slab.dtype if self.slab is not None else torch.float32


class _Stage:
    """A checkpoint, or an adapter on top of the first stage's checkpoint."""

    def __init__(self, name: str, folder: Path, base: _Stage | None) -> None:
        self.name = name
        self.adapter: Checkpoint | None = None
        self.own_names: dict[str, str] = {}
        if is_adapter_folder(folder):
            if base is None or base.adapter is not None:
                raise AdapterError(f"{folder} is an adapter; the first checkpoint must be the base model "
                                   "that it adapts.")
            self.adapter, self.checkpoint = Checkpoint(folder), base.checkpoint
            kind = self.adapter.config.get("peft_type", "LORA")
            if kind != "LORA":
                raise AdapterError(f"{folder} is a {kind} adapter; weights reads LoRA adapters. Merge it into its "
                                   "base first, then compare the merged checkpoint.")
        else:
            self.checkpoint = Checkpoint(folder)
            if method := (self.checkpoint.config.get("quantization_config") or {}).get("quant_method"):
                raise CheckpointError(f"{folder} is quantised ({method}); its stored integers are no weights. "
                                      "Dequantise it first.")
        self.changed: dict[str, str] = {}  # base weight -> its name as the adapter has it

    def describe(self) -> dict[str, Any]:
        """For ``run.json``."""
        source = self.adapter or self.checkpoint
        return {"folder": str(source.folder), "adapter": self.adapter is not None, "bytes": source.nbytes,
                "files": len(source.files)}

    def slab(self, weight: str) -> _Slab:
        return _slab(self.checkpoint, self.own_names[weight])

    def operand(self, weight: _Weight) -> _Operand:
        """What to read in place of a base weight."""
        plain = _Operand(self.slab(weight.name))
        if self.adapter is None or weight.name not in self.changed:
            return plain
        factors = self.factors(weight)
        if factors is not None:
            return _Operand(plain.slab, *factors)
        key = self.changed[weight.name]
        full = [n for n in self.adapter.names() if _full_name(n) == key]
        if full:
            slab = _slab(self.adapter, full[0])
            if self.adapter.shape(full[0]) != weight.shape:
                raise AdapterError(_no_fit(self.adapter, key, self.adapter.shape(full[0]), weight))
            return _Operand(slab)
        base = self.checkpoint.read(self.own_names[weight.name]).float()
        return _Operand(None, whole=base + self.adapter.delta(key, base))

    def factors(self, weight: _Weight) -> tuple[Tensor, Tensor] | None:
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


def _slab(checkpoint: Checkpoint, name: str) -> _Slab:
    path, offset = checkpoint.location(name)
    return _Slab(path, offset, checkpoint.dtype(name), name)


def _full_name(name: str) -> str | None:
    if ".lora_" in name:
        return None
    return name.removeprefix("base_model.model.").replace(".modules_to_save.", ".").replace(".base_layer.", ".")


def _no_fit(adapter: Checkpoint, name: str, shape: Sequence[int], weight: _Weight) -> str:
    return (f"{adapter.folder}: its change of {name} has the shape {tuple(shape)}, the base's {weight.name} "
            f"{weight.shape}; it is an adapter of another model.")


# ---------------------------------------------------------------------------------------------
# names


def _meta_anatomy(folder: Path) -> tuple[Anatomy | None, set[str], Any]:
    """Anatomy, parameter names and text config of the model that a config describes, without weights.

    (None, ...) where transformers does not know the architecture: the weights' names must do then.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForSeq2SeqLM

    from midblock.models.checkpoints import quiet

    try:
        with quiet():
            config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError):
        return None, set(), None
    for auto in (AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForImageTextToText):
        try:
            with quiet(), torch.device("meta"):
                model = auto.from_config(config)
            return find_anatomy(model, verify=False), set(model.state_dict()), text_config(model)
        except (ValueError, ArchitectureError, ImportError):
            continue
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
class _Plan:
    """All weights to compare, in the order in which they lie in the base's files."""

    weights: list[_Weight]
    num_blocks: int
    tied: bool
    config: Any
    left_out: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def _plan(stages: Sequence[_Stage]) -> _Plan:
    base = stages[0].checkpoint
    anatomy, parameters, config = _meta_anatomy(base.folder)
    embeddings, head = _ends(anatomy, base)
    tied = anatomy.tied if anatomy is not None else head not in base
    reference = [n for n in base.names()]
    has_head = any(head in s.checkpoint or (s.adapter is not None and head in map(_full_name, s.adapter.names()))
                   for s in stages)
    if head not in base and tied and has_head:
        reference.append(head)
    num_blocks, block_of = _blocks(base, anatomy, parameters)
    left_out: set[str] = set()
    for stage in stages:
        own = stage.checkpoint.names()
        stage.own_names = _align(reference, own)
        if tied and head not in stage.own_names and embeddings in stage.own_names:
            stage.own_names[head] = stage.own_names[embeddings]  # a tied head is stored once
        lost = [n for n in reference if n not in stage.own_names]
        extra = sorted(set(own) - set(stage.own_names.values()))
        # buffers that older versions stored (rotary frequencies, causal masks) are no weights
        weights_lost = [n for n in lost if not parameters or n in parameters]
        weights_extra = [n for n in extra if not parameters or n in parameters]
        if weights_lost or weights_extra:
            what = (f"lacks {len(weights_lost)} weights of {stages[0].name} ({', '.join(weights_lost[:3])}"
                    f"{' ...' if len(weights_lost) > 3 else ''})" if weights_lost else
                    f"has {len(weights_extra)} weights that {stages[0].name} lacks ({', '.join(weights_extra[:3])}"
                    f"{' ...' if len(weights_extra) > 3 else ''})")
            raise PairMismatchError(f"{stage.checkpoint.folder} {what}; base and tuned checkpoint must be of one "
                                    "architecture and size.")
        left_out.update(lost, extra)
        _map_adapter(stage, reference)
    found = []
    for name in reference:
        if name in left_out:
            continue
        shape = base.shape(stages[0].own_names[name])
        dtypes = [s.checkpoint.dtype(s.own_names[name]) for s in stages]
        if not all(d.is_floating_point for d in dtypes):
            if name in parameters:
                raise CheckpointError(f"{name} is stored as {next(d for d in dtypes if not d.is_floating_point)}: "
                                      "quantised weights cannot be compared; dequantise the checkpoint first.")
            left_out.add(name)
            continue
        for stage in stages[1:]:
            other = stage.checkpoint.shape(stage.own_names[name])
            if other != shape:
                raise PairMismatchError(
                    f"{name} has the shape {shape} in {stages[0].checkpoint.folder} and {other} in "
                    f"{stage.checkpoint.folder}; base and tuned checkpoint must be of one architecture and size.")
        block = block_of(name)
        kind = kind_of(name) if block is not None else _outside(name, anatomy, embeddings, head)
        found.append(_Weight(name, shape, block, kind, _fused_axis(name, kind, shape, config)))
    plan = _Plan(found, num_blocks, tied and not has_head, config, sorted(left_out))
    if plan.left_out:
        plan.notes.append(f"{len(plan.left_out)} stored tensors are no weights and were left out: "
                          f"{', '.join(plan.left_out[:3])}{' ...' if len(plan.left_out) > 3 else ''}.")
    whole = {w.name for w in found if w.kind == "qkv" and w.fused is None}
    if whole:
        plan.notes.append(f"q, k and v cannot be told apart in {min(whole)} and its like: they count as one "
                          "matrix in qkvo.")
    return plan


def _ends(anatomy: Anatomy | None, base: Checkpoint) -> tuple[str, str]:
    """Names of the embeddings' and the head's weight in the base checkpoint."""
    names = base.names()

    def find(path: str | None, leaves: tuple[str, ...]) -> str:
        wanted = f"{path}.weight"
        if path is not None and wanted in base:
            return wanted
        if path is not None:  # another prefix than the module tree's
            ends = [n for n in names if wanted.endswith(f".{n}") or n.endswith(f".{wanted}")]
            if len(ends) == 1:
                return ends[0]
        ends = [n for n in names if n.removesuffix(".weight").rpartition(".")[2] in leaves]
        return ends[0] if ends else wanted if path is not None else f"{leaves[0]}.weight"

    return (find(anatomy.embeddings_path if anatomy else None,
                 ("embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings", "shared")),
            find(anatomy.head_path if anatomy else None, ("lm_head", "embed_out", "output")))


def _outside(name: str, anatomy: Anatomy | None, embeddings: str, head: str) -> str:
    if name == embeddings:
        return "embeddings"
    if name in (head, f"{head.removesuffix('.weight')}.bias"):
        return "head"
    if anatomy is not None:
        path = anatomy.final_norm_path
        if path is not None and (name.startswith(f"{path}.") or f"{path}.".endswith(
                f".{name.rpartition('.')[0]}.")):
            return "final_norm"
        return "other"
    return "final_norm" if kind_of(name) == "norm" and name.count(".") <= 2 else "other"


def _blocks(base: Checkpoint, anatomy: Anatomy | None, parameters: set[str]) -> tuple[int, Any]:
    """Number of blocks and a function from a weight's name to its block.

    The names alone show the structure; where the model can be described without weights, its
    module tree must agree.
    """
    try:
        known = {name: base.block_of(name) for name in base.names()}
    except CheckpointError:
        if anatomy is None:
            raise
        known = {name: anatomy.block_of(name) for name in base.names()}
    if anatomy is not None:
        for name, block in known.items():
            if name in parameters and anatomy.block_of(name) != block:
                raise ArchitectureError(
                    f"{base.folder}: the names of the weights put {name} into block {block}, the module tree "
                    f"into {anatomy.block_of(name)}; blocks are at {anatomy.blocks_path}.")
    numbers = {b for b in known.values() if b is not None}
    num_blocks = anatomy.num_blocks if anatomy is not None else len(numbers)
    if numbers != set(range(num_blocks)):
        raise ArchitectureError(f"{base.folder}: its weights show blocks {sorted(numbers)[:5]} ..., where "
                                f"0..{num_blocks - 1} were expected.")
    return num_blocks, known.get


def _map_adapter(stage: _Stage, reference: Sequence[str]) -> None:
    if stage.adapter is None:
        return
    adapted = stage.adapter.adapted()
    names = _align(adapted, reference)
    lost = [n for n in adapted if n not in names]
    if lost:
        raise AdapterError(f"{stage.adapter.folder} changes {len(lost)} weights that the base lacks "
                           f"({', '.join(lost[:3])}{' ...' if len(lost) > 3 else ''}); it is an adapter of "
                           "another model.")
    stage.changed = {weight: name for name, weight in names.items()}


def _fused_axis(name: str, kind: str, shape: tuple[int, ...], config: Any) -> Literal["rows", "columns"] | None:
    """Axis along which `split_fused` splits a fused matrix; None where it cannot."""
    if kind != "qkv" or len(shape) != 2 or config is None:
        return None
    axis: Literal["rows", "columns"] = "columns" if name.removesuffix(".weight").endswith("c_attn") else "rows"
    length = shape[1] if axis == "columns" else shape[0]
    return axis if split_fused(name, torch.empty(length), config) is not None else None


# ---------------------------------------------------------------------------------------------
# reading and summing


@dataclass
class _Sums:
    """Sums of squares of one weight: of each comparison's difference and each stage's own values.

    For a fused matrix every sum is a vector over the outputs.
    """

    difference: dict[Pair, Tensor]
    own: dict[int, Tensor]

    def add(self, other: _Sums) -> None:
        for key, value in other.difference.items():
            self.difference[key] = self.difference[key] + value if key in self.difference else value
        for stage, value in other.own.items():
            self.own[stage] = self.own[stage] + value if stage in self.own else value


class _Reader(threading.local):
    """Buffers and file handles of one thread."""

    def __init__(self) -> None:
        self.files: dict[Path, int] = {}
        self.raw: dict[int, Tensor] = {}
        self.wide: dict[tuple[int, torch.dtype], Tensor] = {}

    def handle(self, path: Path) -> int:
        if path not in self.files:
            self.files[path] = os.open(path, os.O_RDONLY)
            _advise(self.files[path], 0, 0, "POSIX_FADV_SEQUENTIAL")
        return self.files[path]

    def buffer(self, slot: int, dtype: torch.dtype, size: int) -> Tensor:
        """Widened entries of one stage (slots 0..S-1) or the difference (slot S)."""
        found = self.wide.get((slot, dtype))
        if found is None or found.numel() < size:
            found = self.wide[slot, dtype] = torch.empty(max(size, _PIECE), dtype=dtype)
        return found[:size]

    def load(self, slab: _Slab, first: int, out: Tensor, slot: int) -> None:
        """Read entries ``first``.. of a tensor and widen them into ``out``."""
        size = out.numel() * slab.dtype.itemsize
        if slab.dtype == out.dtype:
            target = out
        else:
            raw = self.raw.get(slot)
            if raw is None or raw.numel() < size:
                raw = self.raw[slot] = torch.empty(max(size, _PIECE * 4), dtype=torch.uint8)
            target = raw[:size].view(slab.dtype)
        view = memoryview(target.view(torch.uint8).numpy())
        position = slab.offset + first * slab.dtype.itemsize
        while view.nbytes:
            count = os.preadv(self.handle(slab.path), [view], position)
            if count == 0:
                raise CheckpointError(f"{slab.path} ended within {slab.name}: it was cut while it was read.")
            view, position = view[count:], position + count
        if target is not out:
            out.copy_(target)


def _advise(handle: int, start: int, length: int, advice: str) -> None:
    if hasattr(os, advice):  # not on every system; it is only a hint
        with contextlib.suppress(OSError):
            os.posix_fadvise(handle, start, length, getattr(os, advice))


@dataclass(frozen=True)
class _Job:
    weight: int
    start: int
    stop: int


class _Summer:
    """Sums of squares of all weights, in threads."""

    def __init__(self, stages: Sequence[_Stage], plan: _Plan, pairs: Sequence[Pair]) -> None:
        self.stages, self.plan, self.pairs = stages, plan, list(pairs)
        self.earlier = sorted({earlier for _, earlier in pairs})
        self.opened: list[_Reader] = []
        self.lock = threading.Lock()
        self.local = threading.local()

    def reader(self) -> _Reader:
        if not hasattr(self.local, "reader"):
            torch.set_num_threads(1)  # one core for each thread; the default would multiply them
            self.local.reader = _Reader()
            with self.lock:
                self.opened.append(self.local.reader)
        reader: _Reader = self.local.reader
        return reader
