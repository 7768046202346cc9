"""What `midblock inspect` shows: a model's sizes and parameters, counted without its weights."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn

from midblock.errors import CheckpointError
from midblock.models.adapters import base_of_adapter
from midblock.models.anatomy import Anatomy, find_anatomy, text_config
from midblock.models.checkpoints import is_adapter_folder
from midblock.models.load import model_class, read_config, stored_dtype
from midblock.models.matrices import kind_of
from midblock.models.quiet import first_line, foreign
from midblock.models.resolve import resolve_checkpoint
from midblock.segments import all_masks_single, depth, segment_bounds

__all__ = ["ModelSummary", "SegmentSummary", "summarize", "summarize_model"]


@dataclass(frozen=True, slots=True)
class SegmentSummary:
    """One of K equal depth segments."""

    mask: str
    """The mask that selects this segment alone."""
    first: int
    stop: int
    """Blocks ``first`` to ``stop`` - 1."""
    parameters: int
    share: float
    """Of the parameters of all blocks, 0..1."""


@dataclass(frozen=True, slots=True)
class ModelSummary:
    """Sizes of one model. Parameter counts are of distinct tensors: a tied head counts once."""

    model: str
    architecture: str
    dtype: str
    num_blocks: int
    hidden_size: int
    vocab_size: int
    tied: bool
    parameters: int
    embedding_parameters: int
    head_parameters: int
    """0 where the head is tied to the embeddings."""
    final_norm_parameters: int
    other_parameters: int
    """Outside blocks, embeddings, final norm and head (learned positions, an encoder, another tower)."""
    paths: dict[str, str | None]
    """Module paths of blocks, embeddings, final norm and head."""
    blocks: tuple[dict[str, int], ...]
    """For each block its parameters by part; norms of a block are one part."""
    layer_types: tuple[str, ...] | None
    """Kind of each block where the config names them (sliding and full attention, say)."""

    def block_parameters(self, block: int) -> int:
        """Parameters of one block."""
        return sum(self.blocks[block].values())

    def segments(self, num_segments: int) -> list[SegmentSummary]:
        """The K equal segments with the mask of each.

        Raises:
            BlockRangeError: K is smaller than 1 or larger than the number of blocks.
        """
        bounds = segment_bounds(num_segments, self.num_blocks)
        total = sum(self.block_parameters(b) for b in range(self.num_blocks)) or 1
        found = []
        for mask, (first, stop) in zip(all_masks_single(num_segments), bounds, strict=True):
            count = sum(self.block_parameters(b) for b in range(first, stop))
            found.append(SegmentSummary(mask, first, stop, count, count / total))
        return found

    def frame(self) -> pd.DataFrame:
        """One row a block: its depth, kind where known, parameters, and parameters by part."""
        parts = list(dict.fromkeys(name for block in self.blocks for name in block))
        rows = []
        for b, block in enumerate(self.blocks):
            row: dict[str, Any] = {"block": b, "depth": round(depth(b, self.num_blocks), 3)}
            if self.layer_types is not None:
                row["kind"] = self.layer_types[b]
            row["parameters"] = self.block_parameters(b)
            rows.append({**row, **{name: block.get(name, 0) for name in parts}})
        return pd.DataFrame(rows)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON types."""
        plain = asdict(self)
        plain["blocks"] = self.frame().to_dict(orient="records")
        return plain

    def text(self) -> str:
        """A few lines for a person."""
        in_blocks = sum(self.block_parameters(b) for b in range(self.num_blocks))
        head = ("tied to the embeddings" if self.tied else f"{self.head_parameters:,} parameters")
        lines = [
            ("Model", f"{self.model} ({self.architecture}, {self.dtype})"),
            ("Parameters", f"{self.parameters:,}, of which {in_blocks:,} in the blocks"),
            ("Blocks", f"{self.num_blocks} at {self.paths['blocks']}, hidden size {self.hidden_size:,}"),
            ("Embeddings", f"{self.embedding_parameters:,} parameters at {self.paths['embeddings']}, "
                           f"vocabulary {self.vocab_size:,}"),
            ("Final norm", f"{self.final_norm_parameters:,} parameters at {self.paths['final_norm']}"
             if self.paths["final_norm"] else "none"),
            ("Head", f"{head}, at {self.paths['head']}"),
        ]
        if self.other_parameters:
            lines.append(("Elsewhere", f"{self.other_parameters:,} parameters "
                                       "(positions, an encoder, another tower)"))
        return "\n".join(f"{name:<12}{value}" for name, value in lines)


def summarize_model(spec: str | Path, *, trust_remote_code: bool = False, allow_pickle: bool = False,
                    revision: str | None = None) -> ModelSummary:
    """Summary of a MODEL spec from its config and the headers of its files; no weight is read.

    Args:
        spec: As for `load_model`; of an adapter's folder its base model is shown.
        trust_remote_code: Run the Python code that a checkpoint brings along.
        allow_pickle: Accept ``.bin`` weights (their dtype is then the config's word).
        revision: Branch, tag or commit of a hub id.

    Raises:
        ModelNotFoundError: nothing there.
        CheckpointError: without config or weights, truncated or corrupt.
        UnsafeCheckpointError: pickled weights or remote code that nobody asked for.
        ArchitectureError: no such architecture, or its parts cannot be found.
    """
    model, stored, _ = model_skeleton(spec, trust_remote_code=trust_remote_code, allow_pickle=allow_pickle,
                                      revision=revision)
    return summarize(model, find_anatomy(model), name=str(spec), dtype=str(stored).removeprefix("torch."))


def model_skeleton(spec: str | Path, *, trust_remote_code: bool = False, allow_pickle: bool = False,
                   revision: str | None = None) -> tuple[nn.Module, torch.dtype, Path]:
    """A model without weights (on the meta device), the dtype it is stored in, and its folder.

    Of a hub id no weight is fetched; its dtype is then the config's word.

    Arguments and errors as for `summarize_model`.
    """
    name = str(spec)
    folder = resolve_checkpoint(name, revision=revision, allow_pickle=allow_pickle,
                                trust_remote_code=trust_remote_code, weights=False)
    if is_adapter_folder(folder):
        folder = base_of_adapter(folder, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code, weights=False)
    config = read_config(folder, name, trust_remote_code)
    stored = stored_dtype(folder, config)
    remote = {"trust_remote_code": True} if trust_remote_code else {}
    with foreign(lambda error: CheckpointError(
            f"model {name!r}: transformers cannot build it from its config ({type(error).__name__}): "
            f"{first_line(error)}")), torch.device("meta"):
        model = model_class(config, name, trust_remote_code).from_config(config, **remote)
    return model, stored, folder


def summarize(model: nn.Module, anatomy: Anatomy, *, name: str, dtype: str) -> ModelSummary:
    """Count the parameters of a model, which may be on the meta device.

    Args:
        model: The model that ``anatomy`` was found in.
        anatomy: Its parts.
        name: What to call it.
        dtype: Number format of its checkpoint.
    """
    owner: dict[int, str] = {}  # each tensor belongs to the first part that holds it
    sizes: Counter[str] = Counter()
    blocks: list[dict[str, int]] = []
    for index, block in enumerate(anatomy.blocks):
        parts: Counter[str] = Counter()
        for parameter_name, parameter in block.named_parameters():
            if id(parameter) not in owner:
                owner[id(parameter)] = f"block {index}"
                parts[_part(block, parameter_name)] += parameter.numel()
        blocks.append(dict(parts))
    for part, module in (("embeddings", anatomy.embeddings), ("head", anatomy.head),
                         ("final_norm", anatomy.final_norm), ("other", model)):
        for parameter in module.parameters() if module is not None else ():
            if id(parameter) not in owner:
                owner[id(parameter)] = part
                sizes[part] += parameter.numel()
    config = text_config(model)
    kinds = getattr(config, "layer_types", None)
    return ModelSummary(
        model=name, architecture=type(anatomy.causal_lm).__name__, dtype=dtype,
        num_blocks=anatomy.num_blocks, hidden_size=anatomy.hidden_size, vocab_size=anatomy.vocab_size,
        tied=anatomy.tied, parameters=sum(sizes.values()) + sum(sum(b.values()) for b in blocks),
        embedding_parameters=sizes["embeddings"], head_parameters=sizes["head"],
        final_norm_parameters=sizes["final_norm"], other_parameters=sizes["other"],
        paths={"blocks": anatomy.blocks_path, "embeddings": anatomy.embeddings_path,
               "final_norm": anatomy.final_norm_path, "head": anatomy.head_path},
        blocks=tuple(blocks),
        layer_types=tuple(map(str, kinds)) if kinds and len(kinds) == anatomy.num_blocks
        and len(set(kinds)) > 1 else None)


def _part(block: nn.Module, parameter_name: str) -> str:
    """The child of a block that a parameter belongs to; its norms are one part."""
    if kind_of(parameter_name) == "norm":
        return "norms"
    path: list[str] = []
    for name in parameter_name.split(".")[:-1]:
        path.append(name)
        if not isinstance(block.get_submodule(".".join(path)), nn.ModuleList):
            break
    return ".".join(path) or parameter_name
