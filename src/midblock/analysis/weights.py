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
import re
import threading
from collections.abc import Callable, Iterator, Sequence
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
)
from midblock.models import LoadedModel
from midblock.models.anatomy import Anatomy, find_anatomy, kind_of, split_fused, text_config
from midblock.models.checkpoints import Checkpoint, is_adapter_folder, quiet, resolve_checkpoint
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
_ALL_GROUPS = {**GROUPS, "cross": frozenset(f"cross_{k}" for k in GROUPS["qkvo"])}

_PIECE = 1 << 17  # entries: two widened pieces and their difference fit a core's second-level cache
_JOB = 1 << 22  # entries handed to a thread at a time
_AUTO_SPECTRA = 2e12  # operations: under a minute or two on two cores

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
    """`kind_of` inside a block; outside, ``embeddings``, ``final_norm``, ``head`` or ``other``."""
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
    owner: Checkpoint = field(repr=False, compare=False)


@dataclass(frozen=True)
class _Operand:
    """What one stage has in place of a base weight: a slab, plus thin factors, or a whole tensor."""

    slab: _Slab | None
    left: Tensor | None = None
    right: Tensor | None = None
    whole: Tensor | None = None

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
            self.adapter = Checkpoint(folder)
            kind = self.adapter.config.get("peft_type", "LORA")
            if kind != "LORA":
                raise AdapterError(f"{folder} is a {kind} adapter, but only LoRA adapters can be compared with "
                                   "their base as they are. Merge it, then compare the merged checkpoint.")
        self.checkpoint: Checkpoint = (Checkpoint(folder) if self.adapter is None or base is None
                                       else base.checkpoint)
        if method := (self.checkpoint.config.get("quantization_config") or {}).get("quant_method"):
            raise CheckpointError(f"{folder} is quantised ({method}): its stored integers are no weights. "
                                  "Dequantise it first.")
        self.changed: dict[str, str] = {}  # base weight -> its name as the adapter has it

    @property
    def source(self) -> Checkpoint:
        """What the spec named: the adapter, or the checkpoint."""
        return self.adapter or self.checkpoint

    def release(self) -> None:
        """Let go of mapped pages."""
        self.source.release()
        self.checkpoint.release()

    def operand(self, weight: _Weight) -> _Operand:
        """What to read in place of a base weight."""
        stored = _slab(self.checkpoint, self.own_names[weight.name])
        if self.adapter is None or weight.name not in self.changed:
            return _Operand(stored)
        key = self.changed[weight.name]
        # modules saved in full, and embeddings that PEFT saves beside their adapter
        full = next((n for n in self.adapter.names() if _full_name(n) == key), None)
        if full is not None:
            stored = _slab(self.adapter, full)
            if self.adapter.shape(full) != weight.shape:
                raise AdapterError(_no_fit(self.adapter, key, self.adapter.shape(full), weight))
        factors = self.factors(weight)
        if factors is not None:
            return _Operand(stored, *factors)
        if full is not None:
            return _Operand(stored)
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
    return _Slab(path, offset, checkpoint.dtype(name), name, checkpoint)


def _full_name(name: str) -> str | None:
    if ".lora_" in name:
        return None
    name = name.removeprefix("base_model.model.")
    return name.replace(".modules_to_save.", ".").replace(".base_layer.", ".")


def _no_fit(adapter: Checkpoint, name: str, shape: Sequence[int], weight: _Weight) -> str:
    return (f"{adapter.folder}: its change of {name} has the shape {tuple(shape)}, the base's {weight.name} "
            f"{weight.shape}; it is an adapter of another model.")


# ---------------------------------------------------------------------------------------------
# names


def _meta_anatomy(folder: Path) -> tuple[Anatomy | None, set[str], Any]:
    """Anatomy, parameter names and text config of the model that a config describes, without weights.

    Nothing (None, no names, None) where transformers does not know the architecture: the names of
    the weights must do then.
    """
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoModelForSeq2SeqLM,
    )

    try:
        with quiet():
            config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError):
        return None, set(), None
    autos = (AutoModelForSeq2SeqLM,) if config.is_encoder_decoder else (AutoModelForCausalLM,
                                                                          AutoModelForImageTextToText)
    for auto in autos:
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
    layout = _Layout(base, anatomy, parameters)
    embeddings, head = layout.embeddings, layout.head
    tied = anatomy.tied if anatomy is not None else head not in base
    reference = base.names()
    has_head = any(head in s.checkpoint
                   or (s.adapter is not None and head in map(_full_name, s.adapter.names())) for s in stages)
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
        # buffers that older versions stored (rotary frequencies, causal masks) are no weights
        weights_lost = [n for n in lost if n in parameters or _is_weight(n, base)]
        weights_extra = [n for n in extra if n in parameters or _is_weight(n, stage.checkpoint)]
        if weights_lost or weights_extra:
            what, some = (("lacks", weights_lost) if weights_lost else ("also has", weights_extra))
            raise PairMismatchError(
                f"{stage.checkpoint.folder} {what} {len(some)} weights beside {stages[0].checkpoint.folder} "
                f"({', '.join(some[:3])}{' ...' if len(some) > 3 else ''}); base and tuned checkpoint must be "
                "of one architecture and size.")
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
                raise CheckpointError(
                    f"{name} is stored as {next(d for d in dtypes if not d.is_floating_point)}: quantised "
                    "weights cannot be compared; dequantise the checkpoint first.")
            left_out.add(name)
            continue
        for stage in stages[1:]:
            other = stage.checkpoint.shape(stage.own_names[name])
            if other != shape:
                raise PairMismatchError(
                    f"{name} has the shape {shape} in {stages[0].checkpoint.folder} and {other} in "
                    f"{stage.checkpoint.folder}; base and tuned checkpoint must be of one architecture and "
                    "size.")
        block = layout.block_of(name)
        kind = kind_of(name) if block is not None else layout.part_of(name)
        found.append(_Weight(name, shape, block, kind, _fused_axis(name, kind, shape, config)))
    plan = _Plan(found, layout.num_blocks, tied and not has_head, config, sorted(left_out))
    if plan.left_out:
        plan.notes.append(f"{len(plan.left_out)} stored tensors are no weights and were left out: "
                          f"{', '.join(plan.left_out[:3])}{' ...' if len(plan.left_out) > 3 else ''}.")
    whole = {w.name for w in found if w.kind == "qkv" and w.fused is None}
    if whole:
        plan.notes.append(f"q, k and v cannot be told apart in {min(whole)} and its like: they count as one "
                          "matrix in qkvo.")
    return plan


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


def _fused_axis(name: str, kind: str, shape: tuple[int, ...], config: Any
                ) -> Literal["rows", "columns"] | None:
    """Axis along which `split_fused` splits a fused matrix; None where it cannot."""
    if kind != "qkv" or len(shape) != 2 or config is None:
        return None
    by_columns = name.removesuffix(".weight").endswith("c_attn")
    if split_fused(name, torch.empty(shape[1 if by_columns else 0]), config) is None:
        return None
    return "columns" if by_columns else "rows"


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


class _Reader:
    """Buffers and file handles of one thread."""

    def __init__(self) -> None:
        self._files: dict[Path, int] = {}
        self._room: dict[tuple[int, torch.dtype], Tensor] = {}
        self._views: dict[tuple[int, torch.dtype, torch.dtype, int], tuple[Tensor, Tensor, memoryview]] = {}

    def handle(self, path: Path) -> int:
        """File descriptor. Each thread has its own: the system's read-ahead then sees one stream in each."""
        if path not in self._files:
            self._files[path] = os.open(path, os.O_RDONLY)
        return self._files[path]

    def close(self) -> None:
        """Close all files."""
        for handle in self._files.values():
            os.close(handle)
        self._files.clear()

    def buffer(self, slot: int, dtype: torch.dtype, size: int) -> Tensor:
        """Room for the widened entries of one stage (slots 0..S-1) or for a difference (slot S)."""
        found = self._room.get((slot, dtype))
        if found is None or found.numel() < size:
            found = self._room[slot, dtype] = torch.empty(max(size, _PIECE), dtype=dtype)
            self._views.clear()
        return found if found.numel() == size else found[:size]

    def announce(self, slab: _Slab, first: int, stop: int) -> None:
        """Ask the system to fetch entries that will be read in a moment."""
        if hasattr(os, "posix_fadvise"):
            size = slab.dtype.itemsize
            with contextlib.suppress(OSError):  # it is only a hint
                os.posix_fadvise(self.handle(slab.path), slab.offset + first * size, (stop - first) * size,
                                 os.POSIX_FADV_WILLNEED)

    def load(self, slab: _Slab, first: int, size: int, slot: int, wide: torch.dtype) -> Tensor:
        """Entries ``first``..``first + size`` of a tensor, widened; good until the slot's next load."""
        key = (slot, slab.dtype, wide, size)
        if key not in self._views:  # making views costs as much as reading a small piece
            out = self.buffer(slot, wide, size)
            # stored entries get room of their own where they have to be widened
            stored = out if slab.dtype == wide else self.buffer(-1 - slot, slab.dtype, size)
            self._views[key] = (out, stored, memoryview(stored.view(torch.uint8).numpy()))  # type: ignore[arg-type]
        out, stored, view = self._views[key]
        handle, position = self.handle(slab.path), slab.offset + first * slab.dtype.itemsize
        while (count := os.preadv(handle, [view], position)) < view.nbytes:
            if count == 0:
                raise CheckpointError(f"{slab.path} ended within {slab.name}: it was cut while it was read.")
            view, position = view[count:], position + count
        return out if stored is out else out.copy_(stored)


@dataclass(frozen=True)
class _Job:
    """Entries ``start``..``stop`` of one weight."""

    index: int
    start: int
    stop: int


class _Summer:
    """Sums of squares of all weights, by a few threads."""

    def __init__(self, stages: Sequence[_Stage], plan: _Plan, pairs: Sequence[Pair],
                 workers: int) -> None:
        self._stages, self._plan, self._pairs = list(stages), plan, list(pairs)
        self._earlier = sorted({earlier for _, earlier in pairs})
        self._workers = workers
        self._local = threading.local()
        self._readers: list[_Reader] = []

    def run(self, progress: Progress) -> list[_Sums]:
        """Sums of every weight, in the plan's order."""
        weights = self._plan.weights
        jobs = []
        for index, weight in enumerate(weights):
            step = max(1, _JOB // weight.columns) * weight.columns
            jobs += [_Job(index, lo, min(lo + step, weight.numel)) for lo in range(0, weight.numel, step)]
        sums = [_Sums({}, {}) for _ in weights]
        bytes_of = [sum(s.checkpoint.nbytes_of(s.own_names[w.name]) for s in self._stages
                        if s.adapter is None) for w in weights]
        total = sum(bytes_of) / 1e6
        done = 0.0
        threads = torch.get_num_threads()
        pool = ThreadPoolExecutor(self._workers, thread_name_prefix="weights")
        try:
            # in the order of the jobs, so that equal calls give equal sums to the last bit
            for job, found in zip(jobs, pool.map(self._job, jobs), strict=True):
                sums[job.index].add(found)
                weight = weights[job.index]
                done += bytes_of[job.index] * (job.stop - job.start) / weight.numel / 1e6
                progress("weights (MB)", done, total, note=weight.name)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            for reader in self._readers:
                reader.close()
            torch.set_num_threads(threads)
        for weight, found in zip(weights, sums, strict=True):
            if not all(bool(v.isfinite().all()) for v in (*found.difference.values(), *found.own.values())):
                self._explain(weight)
        return sums

    def _reader(self) -> _Reader:
        reader: _Reader | None = getattr(self._local, "reader", None)
        if reader is None:
            torch.set_num_threads(1)  # the threads are ours; torch's own would only multiply them
            reader = self._local.reader = _Reader()
            self._readers.append(reader)
        return reader

    def _job(self, job: _Job) -> _Sums:
        weight = self._plan.weights[job.index]
        operands = [stage.operand(weight) for stage in self._stages]
        found = _Sums({}, {})
        dense = []
        for pair in self._pairs:
            thin = _thin_difference(operands[pair[0]], operands[pair[1]])
            if thin is None:
                dense.append(pair)
            elif job.start == 0:
                found.difference[pair] = _thin_squares(thin, weight)
        needed = sorted({*self._earlier, *(stage for pair in dense for stage in pair)})
        reader = self._reader()
        for stage in needed:
            if (slab := operands[stage].slab) is not None:
                reader.announce(slab, job.start, job.stop)
        wide = torch.float64 if any(operands[s].dtype == torch.float64 for s in needed) else torch.float32
        rowwise = weight.fused is not None or any(operands[s].left is not None for s in needed)
        piece = max(1, _PIECE // weight.columns) * weight.columns if rowwise else _PIECE
        differences: dict[Pair, float | Tensor] = dict.fromkeys(dense, 0.0)
        own: dict[int, float | Tensor] = dict.fromkeys(self._earlier, 0.0)
        for lo in range(job.start, job.stop, piece):
            hi = min(lo + piece, job.stop)
            values = {i: self._values(reader, i, operands[i], weight, lo, hi, wide) for i in needed}
            scratch = reader.buffer(len(self._stages), wide, hi - lo)
            for pair in dense:
                torch.sub(values[pair[0]], values[pair[1]], out=scratch)
                differences[pair] += _squares(scratch, scratch, weight, lo)
            for stage in self._earlier:
                own[stage] += _squares(values[stage], scratch, weight, lo)
        for pair, value in differences.items():
            found.difference[pair] = torch.as_tensor(value, dtype=torch.float64)
        found.own = {stage: torch.as_tensor(value, dtype=torch.float64) for stage, value in own.items()}
        return found

    def _values(self, reader: _Reader, stage: int, operand: _Operand, weight: _Weight, lo: int, hi: int,
                wide: torch.dtype) -> Tensor:
        """Entries ``lo``..``hi`` of a stage's weight, widened."""
        if operand.whole is not None:
            return operand.whole.flatten()[lo:hi].to(wide)
        assert operand.slab is not None
        out = reader.load(operand.slab, lo, hi - lo, stage, wide)
        if operand.left is not None and operand.right is not None:
            rows = slice(lo // weight.columns, hi // weight.columns)
            out.view(-1, weight.columns).addmm_(operand.left[rows].to(wide), operand.right.to(wide))
        return out

    def _explain(self, weight: _Weight) -> None:
        """Raise for a weight whose sums are not finite."""
        for stage in self._stages:
            sources = [(stage.checkpoint, stage.own_names[weight.name])]
            if stage.adapter is not None and weight.name in stage.changed:
                module = stage.changed[weight.name].removesuffix(".weight")
                sources += [(stage.adapter, n) for n in stage.adapter.names() if f".{module}." in f".{n}"]
            for checkpoint, name in sources:
                flat = checkpoint.read(name).reshape(-1)
                if not all(bool(part.isfinite().all()) for part in flat.split(_JOB)):
                    raise CheckpointError(f"{checkpoint.location(name)[0]}: {name} holds NaN or infinity; "
                                          "fetch or write the checkpoint again.")
        raise CheckpointError(f"{weight.name} holds values so large that their squares overflow float32; "
                              "they are no plausible weights.")


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _squares(values: Tensor, scratch: Tensor, weight: _Weight, first: int) -> float | Tensor:
    """Sum of squares: one number, or for a fused matrix one (float64) for each output."""
    if weight.fused is None:
        return torch.dot(values, values).item()
    squares = torch.mul(values, values, out=scratch).view(-1, weight.columns)
    if weight.fused == "columns":
        return squares.sum(dim=0, dtype=torch.float64)
    found = torch.zeros(weight.shape[0], dtype=torch.float64)
    row = first // weight.columns
    found[row:row + squares.shape[0]] = squares.sum(dim=1, dtype=torch.float64)
    return found


def _thin_difference(later: _Operand, earlier: _Operand) -> tuple[Tensor, Tensor] | None:
    """Thin float64 factors of later - earlier where both rest on the same stored weight; else None.

    Equal operands give factors of rank 0.
    """
    if later.slab is None or later.slab != earlier.slab:
        return None
    left = [sign * o.left for o, sign in ((later, 1), (earlier, -1)) if o.left is not None]
    right = [o.right for o in (later, earlier) if o.right is not None]
    if not left:
        return torch.zeros(1, 0), torch.zeros(0, 1)
    return torch.cat(left, dim=1).double(), torch.cat(right, dim=0).double()


def _thin_squares(thin: tuple[Tensor, Tensor], weight: _Weight) -> Tensor:
    """As `_squares`, of left @ right: row i has left_i (right right') left_i'."""
    left, right = thin
    if left.shape[1] == 0:
        outputs = {None: (), "rows": weight.shape[:1], "columns": weight.shape[-1:]}[weight.fused]
        return torch.zeros(outputs, dtype=torch.float64)
    if weight.fused == "columns":
        return (right * ((left.T @ left) @ right)).sum(dim=0).clamp(min=0)
    rows = (left * (left @ (right @ right.T))).sum(dim=1).clamp(min=0)
    return rows.sum() if weight.fused is None else rows


# ---------------------------------------------------------------------------------------------
# spectra of the difference


def _spectrum(stages: Sequence[_Stage], weight: _Weight, pair: Pair) -> Tensor:
    """Singular values (float64, descending) of a matrix's difference.

    From the Gram matrix of the smaller side, summed in float64 over strips of the other side, or
    from an r x r matrix where the difference has rank r. Values below sqrt(k * eps) of the
    largest, which the Gram matrix cannot tell from zero, are zero.
    """
    later, earlier = (stages[i].operand(weight) for i in pair)
    if (thin := _thin_difference(later, earlier)) is not None:
        left, right = thin
        core = torch.linalg.qr(left, mode="r").R @ torch.linalg.qr(right.T, mode="r").R.T
        values: Tensor = torch.linalg.svdvals(core)
        return values
    rows, columns = weight.shape
    smaller = min(rows, columns)
    strip = max(1, (1 << 20) // smaller)
    gram = torch.zeros(smaller, smaller, dtype=torch.float64)
    read_later, read_earlier = _strips(later), _strips(earlier)
    everything = slice(None)
    for lo in range(0, max(rows, columns), strip):
        part = slice(lo, lo + strip)
        where = (part, everything) if columns <= rows else (everything, part)
        difference = read_later(where) - read_earlier(where)
        if columns <= rows:
            difference = difference.T
        gram.addmm_(difference, difference.T)
    values = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt().flip(0)
    floor = math.sqrt(smaller * torch.finfo(torch.float64).eps)
    return torch.where(values > floor * values[0], values, 0.0)


def _strips(operand: _Operand) -> Callable[[tuple[slice, slice]], Tensor]:
    """Function from (rows, columns) to those entries of a stage's weight, in float64."""
    if operand.whole is not None:
        stored = operand.whole
        return lambda where: _wide(stored[where])
    assert operand.slab is not None
    stored = operand.slab.owner.read(operand.slab.name)
    if operand.left is None or operand.right is None:
        return lambda where: _wide(stored[where])
    left, right = operand.left.double(), operand.right.double()
    return lambda where: _wide(stored[where]) + left[where[0]] @ right[:, where[1]]


def _wide(values: Tensor) -> Tensor:
    return values.to(torch.float64)


def _spectra_cost(plan: _Plan, stages: Sequence[_Stage], pairs: Sequence[Pair]) -> float:
    """Rough number of operations that the spectra of all matrices take; thin differences are free."""
    dense = [p for p in pairs if not any(stages[i].adapter is not None for i in p)]
    return len(dense) * sum(2.0 * w.numel * min(w.shape) + 10.0 * min(w.shape) ** 3
                            for w in plan.weights if len(w.shape) == 2)


# ---------------------------------------------------------------------------------------------
# the result


@dataclass
class WeightsResult:
    """Weight change of every matrix, group and block."""

    table: Table
    stages: list[str]
    num_blocks: int
    counts: dict[str, Any] = field(default_factory=dict)
    """Bytes and weights compared, tying, what was left out, notes, whether spectra were taken."""

    @property
    def frame(self) -> pd.DataFrame:
        """The tidy table, with the columns ``stage``, ``matrix`` and ``tensor``."""
        return self.table.frame()

    def by_block(self, stage: str | None = None, metric: str = "weight_change") -> pd.DataFrame:
        """One row a block, one column a group or kind of matrix, of one comparison.

        Where a block has several matrices of a kind (norms, experts), their mean stands for them.

        Args:
            stage: ``sft-base``; default the first comparison.
            metric: ``weight_change``, ``weight_change_relative``, ``weight_change_spectral_norm`` or
                ``weight_change_effective_rank``.
        """
        stage = stage or side_of(comparisons(self.stages)[0])
        frame = self.frame
        part = frame[(frame["kind"] == "block") & (frame["stage"] == stage) & (frame["metric"] == metric)]
        single_norm = (part["matrix"] == "norm") & part["tensor"].notna()  # not the group of that name
        part = part[~single_norm]
        wide = part.pivot_table(index="layer", columns="matrix", values="value", aggfunc="mean", sort=False)
        first = [g for g in (*GROUPS, "all") if g in wide]
        wide = wide[[*first, *(c for c in wide if c not in (*first, "bias"))]]
        wide.columns.name = None
        wide.insert(0, "depth", [round(depth(int(b), self.num_blocks), 3) for b in wide.index])
        return wide.reset_index(names="block")

    def regions(self) -> pd.DataFrame:
        """Mean change of early (depth < 0.2), middle and late (> 0.8) blocks, and the largest, per group."""
        frame = self.frame
        frame = frame[(frame["kind"] == "block") & frame["tensor"].isna() & (frame["side"] == "difference")]
        rows = []
        for (stage, metric, matrix), part in frame.groupby(["stage", "metric", "matrix"], sort=False):
            where = np.array([depth(int(b), self.num_blocks) for b in part["layer"]])
            zone = np.where(where < 0.2, "early", np.where(where > 0.8, "late", "middle"))
            means = part.groupby(zone)["value"].mean()
            peak = part.loc[part["value"].idxmax()] if (part["value"] > 0).any() else None
            rows.append({"stage": stage, "metric": metric, "matrix": matrix,
                         **{z: means.get(z, math.nan) for z in ("early", "middle", "late")},
                         "largest at block": None if peak is None else int(peak["layer"]),
                         "there": None if peak is None else float(peak["value"])})
        return pd.DataFrame(rows)

    def summary(self) -> str:
        """In words: where the weights moved most, absolutely and relative to their size."""
        lines = []
        regions = self.regions().set_index(["stage", "metric", "matrix"])
        frame = self.frame
        for pair in comparisons(self.stages):
            stage = side_of(pair)
            own = frame[(frame["stage"] == stage) & (frame["metric"] == "weight_change")]
            if not (own["value"] > 0).any():
                lines.append(f"{stage}: no weight differs.")
                continue
            for metric, what in (("weight_change", "change of q, k, v and o (sum of Frobenius norms)"),
                                 ("weight_change_relative", "the same relative to the weights' own norm")):
                if (stage, metric, "qkvo") not in regions.index:
                    continue
                row = regions.loc[(stage, metric, "qkvo")]
                if pd.isna(row["largest at block"]):
                    lines.append(f"{stage}: {what}: none.")
                    continue
                b = int(row["largest at block"])
                lines.append(f"{stage}: {what}: largest in block {b} (depth {depth(b, self.num_blocks):.2f}: "
                             f"{row['there']:.4g}); mean early {row['early']:.4g}, "
                             f"middle {row['middle']:.4g}, late {row['late']:.4g}.")
            ranks = frame[(frame["stage"] == stage) & (frame["kind"] == "block")
                          & (frame["metric"] == "weight_change_effective_rank")].groupby("matrix")["value"].mean()
            if len(ranks := ranks.dropna()):
                lines.append(f"{stage}: mean effective rank of the difference: "
                             + ", ".join(f"{matrix} {rank:.1f}" for matrix, rank in ranks.items()) + ".")
            blocks = own[(own["kind"] == "block") & (own["matrix"] == "all")]
            outside = own[(own["kind"] == "model") & (own["value"] > 0)]["layer"].unique()
            changed = int((blocks["value"] > 0).sum())
            lines.append(f"{stage}: {changed} of {self.num_blocks} blocks changed; outside them: "
                         f"{', '.join(outside) if len(outside) else 'nothing'}.")
        if self.counts.get("tied"):
            lines.append("The head is tied to the embeddings and stands under their name.")
        return "\n".join([*lines, *self.counts.get("notes", [])])

    def figures(self) -> dict[str, Figure]:
        """Change by block and group, absolute and relative, and the relative change as a heatmap."""
        from midblock.figures import depth_lines, heatmap

        frame = self.frame
        frame = frame[(frame["kind"] == "block") & (frame["side"] == "difference")]
        made = {}
        for pair in comparisons(self.stages):
            stage = side_of(pair)
            own = frame[frame["stage"] == stage]
            suffix = "" if len(self.stages) == 2 else f"-{stage}"
            groups = own[own["tensor"].isna() & own["matrix"].isin(GROUPS)]
            if len(groups):
                made[f"weights{suffix}"] = depth_lines(
                    groups, ["weight_change", "weight_change_relative"], hue="matrix",
                    num_layers=self.num_blocks - 1, title=f"Weight change: {pair[0]} against {pair[1]}")
            kinds = self.by_block(stage, "weight_change_relative").drop(columns=["depth", *GROUPS, "all"],
                                                                        errors="ignore").set_index("block")
            if kinds.shape[1]:
                made[f"weights-matrices{suffix}"] = heatmap(
                    kinds.T.to_numpy(), list(kinds.columns), list(kinds.index),
                    title=f"Relative weight change by matrix: {pair[0]} against {pair[1]}",
                    label="||difference|| / ||earlier stage||", row_label="matrix", column_label="block")
        return made


# ---------------------------------------------------------------------------------------------
# the call


def weights(stages: Sequence[LoadedModel | str | Path] | LoadedModel | str | Path,
            sft: LoadedModel | str | Path | None = None, *, names: Sequence[str] | None = None,
            spectra: bool | Literal["auto"] = False, workers: int | None = None,
            progress: Progress = silent) -> WeightsResult:
    """Compare the weights of two or more checkpoints, matrix by matrix, straight from their files.

    ``weight_change`` of a matrix is ||W_later - W_earlier||_F. Of a group (column ``matrix``: ``qkvo``
    is the paper's equation 1; ``mlp``, ``norm``, ``all`` are all MLP matrices, norms, or everything in
    a block) it is the sum of its members' norms. ``weight_change_relative`` is the Frobenius norm of
    the difference over that of the earlier stage's weights, for a group over all of it at once.

    Args:
        stages: The base (then give ``sft``), or a chain: MODEL specs, folders, or loaded models (whose
            files are read). Every stage but the first may be a folder with a LoRA adapter of
            the first (rsLoRA, DoRA, embeddings and modules saved in full included).
        sft: The tuned checkpoint, where ``stages`` is a single base.
        names: Stage names; default base, sft, dpo, rlvr.
        spectra: Also the spectral norm and the effective rank of every matrix's difference
            (``weight_change_spectral_norm``, ``weight_change_effective_rank``). They cost an
            eigendecomposition for each matrix; ``auto`` takes them where that is a minute or two at
            most on a small machine (up to some 300M parameters, and adapters of any size).
        workers: Threads; default one for each core, at most 8.
        progress: Told how many megabytes have been read.

    Returns:
        Rows of kind ``block`` for every matrix (columns ``matrix``, its role, and ``tensor``, its name) and
        group (no ``tensor``), and of kind ``model`` (layer ``embeddings``, ``final_norm``, ``head``,
        ``other``) outside the blocks. ``n`` is the number of entries compared. Nothing is sampled, so
        there are no intervals. Fused qkv matrices have rows for q, k and v as well.

    Raises:
        PairMismatchError: weights that one side lacks, or of another shape.
        AdapterError: an adapter of another model or kind.
        CheckpointError: a damaged file, quantised weights, or NaN or infinity (the tensor is named).

    Source: "A Layer-wise Analysis of Supervised Fine-Tuning", equation 1.
    """
    specs = list(stages) if isinstance(stages, Sequence) and not isinstance(stages, str) else [stages]
    if sft is not None:
        specs.append(sft)
    if len(specs) < 2:
        raise SettingsError("at least two checkpoints are compared: give a base and a tuned one.")
    if workers is not None and workers < 1:
        raise SettingsError(f"{workers} threads cannot read anything; use 1 or more.")
    workers = workers or min(_cores(), 8)
    keys = stage_names(len(specs), names)
    chain: list[_Stage] = []
    for key, spec in zip(keys, specs, strict=True):
        chain.append(_stage(key, spec, chain[0] if chain else None))
    plan = _plan(chain)
    pairs = [(keys.index(later), keys.index(earlier)) for later, earlier in comparisons(keys)]
    sums = _Summer(chain, plan, pairs, workers).run(progress)
    if spectra == "auto":
        spectra = _spectra_cost(plan, chain, pairs) <= _AUTO_SPECTRA
    table = Table()
    # files list blocks as 0, 1, 10, 11, ...: readers want them in order, blocks before the rest
    measured = sorted(zip(plan.weights, sums, strict=True),
                      key=lambda m: plan.num_blocks if m[0].block is None else m[0].block)
    _table(table, keys, plan.config, pairs, measured)
    if spectra:
        _spectra_rows(table, chain, pairs, measured, workers, progress)
    for stage in chain:
        stage.release()
    counts = {"weights": len(plan.weights), "entries": sum(w.numel for w in plan.weights),
              "bytes": sum(s.source.nbytes for s in chain), "tied": plan.tied, "left_out": plan.left_out,
              "notes": plan.notes, "spectra": bool(spectra)}
    return WeightsResult(table, keys, plan.num_blocks, counts)


def _stage(key: str, spec: LoadedModel | str | Path, base: _Stage | None) -> _Stage:
    if isinstance(spec, str | Path):
        return _Stage(key, resolve_checkpoint(spec), base)
    folder = spec.adapter or spec.folder
    if folder is None:
        raise SettingsError(f"{spec.name} was not loaded from a folder, so there are no files to read; save "
                            "it with save_checkpoint first.")
    return _Stage(key, folder, base)


def _place(weight: _Weight) -> tuple[Literal["block", "model"], int | str]:
    return ("model", weight.kind) if weight.block is None else ("block", weight.block)


def _table(table: Table, keys: Sequence[str], config: Any, pairs: Sequence[Pair],
           measured: Sequence[tuple[_Weight, _Sums]]) -> None:
    for pair in pairs:
        stage = side_of((keys[pair[0]], keys[pair[1]]))
        groups: dict[tuple[int, str], list[_Part]] = {}
        for weight, found in measured:
            parts = _parts(weight, found.difference[pair], found.own[pair[1]], config)
            for part in parts:
                _change_rows(table, _place(weight), [part], stage, part.matrix, weight.name)
            if weight.block is None:
                continue
            # a fused matrix counts as its parts where they are known, else as one
            counted = [p for p in parts if p.matrix != weight.kind] or parts
            for group in ("all", *(g for g, kinds in _ALL_GROUPS.items() if weight.kind in kinds)):
                groups.setdefault((weight.block, group), []).extend(counted)
        for (block, group), members in sorted(groups.items()):
            _change_rows(table, ("block", block), members, stage, group, None)
    for i in sorted({earlier for _, earlier in pairs}):
        for weight, found in measured:
            table.add(*_place(weight), "weight_norm", keys[i], math.sqrt(float(found.own[i].sum())),
                      n=weight.numel, stage=None, matrix=weight.kind, tensor=weight.name)


@dataclass(frozen=True, slots=True)
class _Part:
    """A matrix, or one of those that a fused one holds: sums of squares and number of entries."""

    matrix: str
    change: float
    own: float
    entries: int


def _change_rows(table: Table, place: tuple[Literal["block", "model"], int | str], members: Sequence[_Part],
                 stage: str, matrix: str, tensor: str | None) -> None:
    """Absolute and relative change of one matrix or of a group of them."""
    cell: dict[str, Any] = {"stage": stage, "matrix": matrix, "tensor": tensor,
                            "n": sum(m.entries for m in members)}
    square, own = math.fsum(m.change for m in members), math.fsum(m.own for m in members)
    table.add(*place, "weight_change", "difference", math.fsum(math.sqrt(m.change) for m in members), **cell)
    if own > 0:
        table.add(*place, "weight_change_relative", "difference", math.sqrt(square / own), **cell)
    else:
        table.add_undefined(*place, "weight_change_relative", "difference",
                            "every weight of the earlier stage is zero", **cell)


def _parts(weight: _Weight, difference: Tensor, own: Tensor, config: Any) -> list[_Part]:
    """A weight, and after it q, k and v where it fuses them."""
    found = [_Part(weight.kind, float(difference.sum()), float(own.sum()), weight.numel)]
    if weight.fused is not None:
        changed, norms = split_fused(weight.name, difference, config), split_fused(weight.name, own, config)
        assert changed is not None
        assert norms is not None
        inputs = weight.numel // difference.numel()
        found += [_Part(part, float(changed[part].sum()), float(norms[part].sum()),
                        changed[part].numel() * inputs) for part in changed]
    return found


def _spectra_rows(table: Table, chain: Sequence[_Stage], pairs: Sequence[Pair],
                  measured: Sequence[tuple[_Weight, _Sums]], workers: int, progress: Progress) -> None:
    matrices = [(w, s) for w, s in measured if len(w.shape) == 2]
    # a Gram matrix, its decomposition and the workspace: three of the smaller side's squares a thread
    largest = max((min(w.shape) for w, _ in matrices), default=1)
    workers = max(1, min(workers, (1 << 30) // (24 * largest * largest)))
    threads = torch.get_num_threads()
    done = 0
    with ThreadPoolExecutor(workers, thread_name_prefix="spectra",
                            initializer=lambda: torch.set_num_threads(1 if workers > 1 else threads)) as pool:
        for pair in pairs:
            stage = side_of((chain[pair[0]].name, chain[pair[1]].name))
            for group in _groups(matrices):
                spectra = pool.map(lambda m, p=pair: _norm_and_rank(chain, m[0], p, m[1]), group)
                for (weight, _), (norm, rank) in zip(group, spectra, strict=True):
                    place = _place(weight)
                    cell: dict[str, Any] = {"n": weight.numel, "stage": stage, "matrix": weight.kind,
                                            "tensor": weight.name}
                    table.add(*place, "weight_change_spectral_norm", "difference", norm, **cell)
                    if rank is None:
                        table.add_undefined(*place, "weight_change_effective_rank", "difference",
                                            "the weight did not change", **cell)
                    else:
                        table.add(*place, "weight_change_effective_rank", "difference", rank, **cell)
                    done += 1
                    progress("spectra (matrices)", done, len(matrices) * len(pairs), note=weight.name)
                for checkpoint in chain:  # mapped pages count as this process's memory until they are let go
                    checkpoint.release()
    torch.set_num_threads(threads)


def _groups(matrices: Sequence[tuple[_Weight, _Sums]]) -> Iterator[list[tuple[_Weight, _Sums]]]:
    """Runs of matrices of about 2**24 entries together."""
    group: list[tuple[_Weight, _Sums]] = []
    for matrix in matrices:
        group.append(matrix)
        if sum(w.numel for w, _ in group) >= 1 << 24:
            yield group
            group = []
    if group:
        yield group


def _norm_and_rank(chain: Sequence[_Stage], weight: _Weight, pair: Pair, sums: _Sums
                   ) -> tuple[float, float | None]:
    """Spectral norm and effective rank of a matrix's difference; no rank where there is none."""
    if float(sums.difference[pair].sum()) == 0:
        return 0.0, None
    values = _spectrum(chain, weight, pair)
    return float(values[0]), float(metrics.effective_rank_from_singular_values(values))
