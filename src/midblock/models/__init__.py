"""Models: finding, loading, anatomy, checkpoints on disk, adapters, and what is known of published pairs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from midblock.lazily import on_first_use

if TYPE_CHECKING:
    from midblock.models.adapters import AdapterFile, base_weight, layer_factors, merged_weight
    from midblock.models.anatomy import Anatomy, check_unembed, find_anatomy, text_config
    from midblock.models.chain import (
        check_fit,
        comparisons,
        load_chain,
        load_pair,
        resolve_stages,
        side_of,
        stage_names,
    )
    from midblock.models.checkpoints import Checkpoint, fingerprint, is_adapter_folder
    from midblock.models.dtypes import DtypeChoice, choose_dtype, resolve_device
    from midblock.models.finite import check_finite_weights
    from midblock.models.load import LoadedModel, load_model
    from midblock.models.matrices import Projection, attention_of, kind_of, projections, split_fused
    from midblock.models.pairs import KnownPair, known_pairs, pair_warning, stages_of
    from midblock.models.placement import require_full_weights
    from midblock.models.resolve import resolve_checkpoint
    from midblock.models.saving import save_checkpoint
    from midblock.models.sharing import SharedParts, shared_block, shared_parts, shared_unembeddings
    from midblock.models.tokenizers import load_tokenizer

__all__ = [
    "AdapterFile",
    "Anatomy",
    "Checkpoint",
    "DtypeChoice",
    "KnownPair",
    "LoadedModel",
    "Projection",
    "SharedParts",
    "attention_of",
    "base_weight",
    "check_finite_weights",
    "check_fit",
    "check_unembed",
    "choose_dtype",
    "comparisons",
    "find_anatomy",
    "fingerprint",
    "is_adapter_folder",
    "kind_of",
    "known_pairs",
    "layer_factors",
    "load_chain",
    "load_model",
    "load_pair",
    "load_tokenizer",
    "merged_weight",
    "pair_warning",
    "projections",
    "require_full_weights",
    "resolve_checkpoint",
    "resolve_device",
    "resolve_stages",
    "save_checkpoint",
    "shared_block",
    "shared_parts",
    "shared_unembeddings",
    "side_of",
    "split_fused",
    "stage_names",
    "stages_of",
    "text_config",
]

__getattr__, __dir__ = on_first_use(__name__, __file__, __all__)
