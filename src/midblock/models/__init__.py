"""Models: loading, anatomy, checkpoints on disk, and what is known of published pairs."""

from __future__ import annotations

from midblock.models.anatomy import (
    Anatomy,
    Projection,
    attention_of,
    check_read_out,
    find_anatomy,
    kind_of,
    projections,
    split_fused,
    text_config,
)
from midblock.models.checkpoints import (
    Checkpoint,
    fingerprint,
    quiet,
    resolve_checkpoint,
    save_checkpoint,
)
from midblock.models.dtypes import DtypeChoice, choose_dtype, resolve_device
from midblock.models.load import (
    LoadedModel,
    check_fit,
    load_chain,
    load_model,
    load_pair,
    load_tokenizer,
)
from midblock.models.pairs import KnownPair, known_pairs, pair_warning, stages_of
from midblock.models.sharing import SharedParts, shared_parts, shared_read_outs

__all__ = [
    "Anatomy",
    "Checkpoint",
    "DtypeChoice",
    "KnownPair",
    "LoadedModel",
    "Projection",
    "SharedParts",
    "attention_of",
    "check_fit",
    "check_read_out",
    "choose_dtype",
    "find_anatomy",
    "fingerprint",
    "kind_of",
    "known_pairs",
    "load_chain",
    "load_model",
    "load_pair",
    "load_tokenizer",
    "pair_warning",
    "projections",
    "quiet",
    "resolve_checkpoint",
    "resolve_device",
    "save_checkpoint",
    "shared_parts",
    "shared_read_outs",
    "split_fused",
    "stages_of",
    "text_config",
]
