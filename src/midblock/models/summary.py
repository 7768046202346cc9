"""What `midblock inspect` shows: a model's sizes and parameters, counted without its weights."""

from __future__ import annotations

import contextlib
import logging
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError

from midblock import __version__
from midblock.errors import MidblockError, OutputError
from midblock.models.checkpoints import is_adapter_folder
from midblock.models.resolve import resolve_checkpoint
from midblock.models.validation import read_header
from midblock.segments import all_masks_single, depth, segment_bounds
from midblock.writing import cache_dir, read_written, sha256_of, write_sealed

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["ModelSummary", "SegmentSummary", "summarize_model"]

_LOG = logging.getLogger("midblock")


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
        import pandas as pd

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
    kept = None if trust_remote_code else _kept(spec, allow_pickle, revision)
    if kept is not None and kept.is_file():
        # a damaged or older file is no summary: it is made anew
        with contextlib.suppress(MidblockError, ValidationError):
            return TypeAdapter(ModelSummary).validate_python(read_written(kept, advice="remove it"))
    _LOG.info("counting the parameters of %s (remembered for the next time) ...", spec)
    from midblock.models.anatomy import find_anatomy
    from midblock.models.skeleton import model_skeleton, summarize

    model, stored, _ = model_skeleton(spec, trust_remote_code=trust_remote_code, allow_pickle=allow_pickle,
                                      revision=revision)
    found = summarize(model, find_anatomy(model), name=str(spec), dtype=str(stored).removeprefix("torch."))
    if kept is not None:
        with contextlib.suppress(OutputError):  # a cache that cannot be written only costs time
            kept.parent.mkdir(parents=True, exist_ok=True)
            write_sealed(kept, asdict(found))
    return found


def _kept(spec: str | Path, allow_pickle: bool, revision: str | None) -> Path | None:
    """Where the summary of a checkpoint is remembered: building the model's skeleton takes seconds of imports.

    The name holds the config's content, the files' sizes and times, and the versions that read them. None where a base
    model is elsewhere, or where nothing is there that could be told apart.
    """
    folder = resolve_checkpoint(str(spec), revision=revision, allow_pickle=allow_pickle, weights=False)
    config = folder / "config.json"
    if is_adapter_folder(folder) or not config.is_file():
        return None
    marks = [str(spec), __version__, metadata.version("transformers"), config.read_text(encoding="utf-8")]
    for path in sorted(folder.glob("*.safetensors*")):
        if path.suffix == ".safetensors":
            read_header(path)  # a damaged file is told before anything else
        told = path.stat()
        marks += [path.name, str(told.st_size), str(told.st_mtime_ns), str(told.st_ino)]
    return cache_dir() / "summaries" / f"{sha256_of(*marks)[:32]}.json"
