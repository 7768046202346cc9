"""A model without weights, and what it is made of."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import torch
from torch import nn

from midblock.errors import CheckpointError
from midblock.models.adapters import base_of_adapter
from midblock.models.anatomy import Anatomy, text_config
from midblock.models.checkpoints import is_adapter_folder
from midblock.models.load import model_class, read_config, stored_dtype
from midblock.models.matrices import kind_of
from midblock.models.quiet import first_line, foreign
from midblock.models.resolve import resolve_checkpoint
from midblock.models.summary import ModelSummary

__all__ = ["model_skeleton", "summarize"]


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
