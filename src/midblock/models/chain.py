"""A chain of checkpoints (base, SFT, DPO, RLVR ...): loading, whether they fit together, names, what is compared."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from midblock import ranks
from midblock.errors import PairMismatchError, SettingsError
from midblock.models.adapters import base_of_adapter
from midblock.models.anatomy import find_anatomy
from midblock.models.checkpoints import Checkpoint, is_adapter_folder
from midblock.models.dtypes import DTYPES, DtypeChoice, choose_dtype, config_value, dtype_name, resolve_device
from midblock.models.load import (
    LoadedModel,
    load_model,
    parameters_in,
    read_config,
    stored_dtype,
    why_not_streamed,
)
from midblock.models.matrices import kind_of
from midblock.models.memory import free_memory, resident_memory
from midblock.models.placement import dequantised
from midblock.models.quiet import quiet
from midblock.models.resolve import resolve_checkpoint
from midblock.models.stages import comparisons, side_of, stage_names
from midblock.models.tokenizers import check_vocabulary
from midblock.sizes import parse_bytes, size_text

__all__ = ["check_fit", "comparisons", "load_chain", "load_pair", "resolve_stages", "side_of", "stage_names"]

def resolve_stages(stages: Sequence[LoadedModel | str] | LoadedModel | str, sft: LoadedModel | str | None,
                   names: Sequence[str] | None, *, least: int = 2) -> list[LoadedModel]:
    """Loaded models of a chain given as models, specs, or a base and a tuned one.

    Raises:
        SettingsError: fewer than ``least``.
        PairMismatchError: they do not fit together.
    """
    chain: list[Any] = list(stages) if isinstance(stages, Sequence) and not isinstance(stages, str) else [stages]
    if sft is not None:
        chain.append(sft)
    if len(chain) < least:
        raise SettingsError("at least two checkpoints are compared: give a base and a tuned one.")
    if all(isinstance(m, str) for m in chain):
        return load_chain(chain, names=names)
    dtype = next(m.dtype for m in chain if not isinstance(m, str))
    loaded = [load_model(m, dtype=dtype) if isinstance(m, str) else m for m in chain]
    check_fit(loaded)
    return loaded


def load_pair(base: str | Path, sft: str | Path, **options: Any) -> tuple[LoadedModel, LoadedModel]:
    """Load a base and a tuned checkpoint and check that they can be compared.

    Args:
        base: MODEL spec of the base.
        sft: MODEL spec of the tuned checkpoint (an adapter folder is loaded and merged).
        options: As for `load_chain`.

    Raises:
        PairMismatchError: they differ in architecture, depth, width, vocabulary or tokenizer.
        MidblockError: as `load_model`.
    """
    first, second = load_chain([str(base), str(sft)], **options)
    return first, second


def load_chain(specs: Sequence[str], *, names: Sequence[str] | None = None, tokenizer: str = "own",
               stream: str = "never", memory_limit: int | str | None = None, scratch: str | Path | None = None,
               **options: Any) -> list[LoadedModel]:
    """Load the stages of one model (base, sft, dpo ...) and check that they fit together.

    Configs are compared before any weight is read. With dtype ``auto``, stages that are stored in different
    dtypes are all loaded in one that holds each exactly, so that no difference is the rounding of one side.

    Args:
        specs: MODEL specs, the base first.
        names: Stage names for tables; default `stage_names`.
        tokenizer: ``own`` (tokenizers must agree) or ``base`` (the base's is used for all).
        stream: ``never`` loads whole models; ``always`` reads their blocks one after another from the files, in each
            pass; ``auto`` decides by sizes and free memory, and notes why.
        memory_limit: Bytes (or 4GB) that a streamed pass may take in all.
        scratch: Folder for hidden states that do not fit; default the system's for temporary files.
        options: As for `load_model`.

    Raises:
        PairMismatchError: a stage differs from the base (says in what).
        SettingsError: no specs, names that do not fit them, or an unknown ``tokenizer``.
    """
    if not specs:
        raise SettingsError("no model was named.")
    if tokenizer not in ("own", "base"):
        raise SettingsError(f"tokenizer {tokenizer!r} is unknown; use own or base.")
    keys = stage_names(len(specs), names)
    options.pop("name", None)
    stored_dtypes, config, parameters = _compare_configs(list(specs), keys, options)
    if options.get("dtype", "auto") == "auto":
        plain = (f if f in DTYPES.values() else torch.float32 for f in stored_dtypes)  # float8, int8
        options["dtype"] = choose_dtype(
            "auto", stored=functools.reduce(torch.promote_types, plain), config=config,
            # read block by block they need no memory for whole models, whatever the dtype
            parameters=0 if options.get("load_4bit") or options.get("load_8bit") or (
                stream != "never" and _can_stream(list(specs), options)) else parameters,
            spread=options.get("device_map") is not None, device=resolve_device(options.get("device", "auto")),
            models=len(specs))
    # free memory is not the same for every process of a job
    why = ranks.first(lambda: _why_streamed(list(specs), stream, memory_limit, options))
    loaded = [load_model(spec, name=name, streamed=why is not None, **options)
              for spec, name in zip(specs, keys, strict=True)]
    for stage in loaded if why is not None else ():
        assert stage.streamed is not None
        stage.streamed.memory_limit = None if memory_limit is None else parse_bytes(memory_limit)
        stage.streamed.scratch = None if scratch is None else Path(scratch)
        stage.note(f"its blocks are read one after another, {why}")
    if len(set(stored_dtypes)) > 1:
        for stage, stored in zip(loaded, stored_dtypes, strict=True):
            if stored != stage.dtype:
                stage.note(f"stored in {dtype_name(stored)}")
    common_vocabulary(loaded)
    check_fit(loaded, compare_tokenizers=tokenizer == "own")
    if tokenizer == "base":
        for stage in loaded[1:]:
            stage.tokenizer = loaded[0].tokenizer
            check_vocabulary(stage.tokenizer, stage.anatomy, stage.spec)
    return loaded


def _why_streamed(specs: list[str], stream: str, memory_limit: int | str | None, options: dict[str, Any]
                  ) -> str | None:
    """Why stages are read block by block, as a clause; None: they are loaded whole.

    Raises:
        SettingsError: an unknown word for ``stream``.
    """
    if stream not in ("auto", "always", "never"):
        raise SettingsError(f"stream {stream!r} is unknown; use auto, always or never.")
    limit = None if memory_limit is None else parse_bytes(memory_limit)
    if stream != "auto":
        return "as asked" if stream == "always" else None
    dtype, device = options["dtype"], resolve_device(options.get("device", "auto"))
    size = dtype.dtype.itemsize if isinstance(dtype, DtypeChoice) else choose_dtype(
        dtype, stored=torch.float32, device=device).dtype.itemsize
    if not _can_stream(specs, options):
        return None
    held: float = 1 if options.get("load_8bit") else 0.5 if options.get("load_4bit") else size
    need, trust = 0, bool(options.get("trust_remote_code"))
    for folder in (_model_folder(spec, options)[0] for spec in specs):
        config = read_config(folder, str(folder), trust)
        own = getattr(config, "quantization_config", None) and not dequantised(config)
        need += Checkpoint(folder).nbytes if own else int(held * parameters_in(folder))
    room = free_memory(device)
    if limit is not None and device.type == "cpu":
        room = min(room, limit - resident_memory())
    if need + max(_ROOM_TO_WORK, need // 10) <= room:
        return None
    return (f"as {len(specs)} x {size_text(need / len(specs))} of weights do not fit into the "
            f"{size_text(max(0, room))} that are free" + (" under the limit" if limit is not None else ""))


def _can_stream(specs: list[str], options: dict[str, Any]) -> bool:
    """Whether the blocks of all stages can be read one after another."""
    trust = bool(options.get("trust_remote_code"))
    spread = options.get("device_map") is not None
    places = ((spec, *_model_folder(spec, options)) for spec in specs)
    return all(why_not_streamed(folder, read_config(folder, spec, trust), adapter, spread=spread) is None
               for spec, folder, adapter in places)


_ROOM_TO_WORK = 1 << 29
"""Bytes that a pass needs beside whole models, at least."""


def _model_folder(spec: str, options: dict[str, Any]) -> tuple[Path, Path | None]:
    """Folders of the model and of the adapter, if the spec is one."""
    keep = {k: options[k] for k in ("revision", "allow_pickle", "trust_remote_code") if k in options}
    folder = resolve_checkpoint(spec, **keep)
    if not is_adapter_folder(folder):
        return folder, None
    return base_of_adapter(folder, **{k: keep.get(k, False) for k in ("allow_pickle", "trust_remote_code")}), folder


_SIZES = {
    "model_type": "architecture", "num_hidden_layers": "depth", "hidden_size": "width",
    "intermediate_size": "MLP width", "num_attention_heads": "attention heads",
    "num_key_value_heads": "key-value heads", "head_dim": "head size",
}


def _compare_configs(specs: list[str], names: list[str], options: dict[str, Any]
                     ) -> tuple[list[torch.dtype], Any, int]:
    """Compare what configs alone tell, so that a mismatch costs no loading.

    Returns:
        The dtypes that are stored, the first model's text config, and its number of parameters.
    """
    trust = bool(options.get("trust_remote_code"))
    reference: Any = None
    stored_dtypes, parameters = [], 0
    for spec, name in zip(specs, names, strict=True):
        folder, _ = _model_folder(spec, options)
        whole = read_config(folder, spec, trust)
        config = whole.get_text_config(decoder=True)
        stored_dtypes.append(stored_dtype(folder, whole))
        if reference is None:
            reference, parameters = config, parameters_in(folder)
            continue
        differing = [f"{what} {ours!r} against {theirs!r}" for key, what in _SIZES.items()
                     if (ours := config_value(reference, key)) != (theirs := config_value(config, key))]
        if differing:
            raise PairMismatchError(
                f"{names[0]} ({specs[0]}) and {name} ({spec}) are not of one architecture and size: "
                f"{'; '.join(differing)}. Name two checkpoints of one model.")
    return stored_dtypes, reference, parameters


def common_vocabulary(loaded: Sequence[LoadedModel]) -> None:
    """Leave every stage the rows of embeddings and head that all of them have; in place, noted and logged.

    One stage may have been padded, or have got tokens of its own. Ids are then those of the common rows, and a
    distribution is over these: the rest has no counterpart.

    Raises:
        PairMismatchError: a tokenizer that all could use does not exist.
    """
    rows = [stage.anatomy.vocab_size for stage in loaded]
    common = min(rows)
    if max(rows) == common:
        return
    smallest = loaded[rows.index(common)]
    for stage, own in zip(loaded, rows, strict=True):
        if own > common:
            if stage.streamed is not None:  # what is cut must stay
                stage.streamed.hold("embeddings")
                stage.streamed.hold("head")
            with quiet():
                stage.anatomy.causal_lm.resize_token_embeddings(common, mean_resizing=False)
            stage.anatomy = find_anatomy(stage.model)
            stage.note(f"compared over the first {common} of the {own} rows of its vocabulary; the last "
                       f"{own - common} have no counterpart in {smallest.name}")
        if max(stage.tokenizer.get_vocab().values(), default=-1) >= common:
            stage.tokenizer = smallest.tokenizer
            stage.note(f"the tokenizer of {smallest.name} is used")


def _shapes(stage: LoadedModel) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter; an adapter that was left on quantised layers is not one of them."""
    return {n.replace(".base_layer.", "."): tuple(p.shape) for n, p in stage.model.named_parameters()
            if kind_of(n) != "adapter"}


def check_fit(loaded: Sequence[LoadedModel], *, compare_tokenizers: bool = True) -> None:
    """Check that loaded stages have equal parts, dtypes, weights of equal shape, and equal tokenizers.

    Raises:
        PairMismatchError: says which stage differs from the first, and in what.
    """
    base = loaded[0]
    shapes = _shapes(base)
    for other in loaded[1:]:
        pair = f"{base.name} ({base.spec}) and {other.name} ({other.spec})"
        a, b = base.anatomy, other.anatomy
        for what, ours, theirs in (
                ("class", type(a.causal_lm).__name__, type(b.causal_lm).__name__),
                ("depth", a.num_blocks, b.num_blocks), ("width", a.hidden_size, b.hidden_size),
                ("vocabulary", a.vocab_size, b.vocab_size),
                ("quantisation", base.quantized or "none", other.quantized or "none")):
            if ours != theirs:
                raise PairMismatchError(f"{pair} differ in {what}: {ours} against {theirs}. Name two "
                                        "checkpoints of one model.")
        if base.dtype != other.dtype:
            ours, theirs = (dtype_name(m.dtype) for m in (base, other))
            raise PairMismatchError(f"{pair} were loaded in different dtypes, {ours} and {theirs}, and their "
                                    "difference would be one of rounding too. Load both with one dtype, or by "
                                    "load_chain.")
        # A tied head is a name less, not another architecture: compare what both have, then blocks.
        theirs_shapes = _shapes(other)
        for parameter in sorted({*shapes, *theirs_shapes}):
            left, right = shapes.get(parameter), theirs_shapes.get(parameter)
            one_sided = left is None or right is None
            if left != right and not (one_sided and parameter.startswith((a.head_path, a.embeddings_path))):
                raise PairMismatchError(
                    f"{pair} differ in {parameter}: {left or 'absent'} against {right or 'absent'}. Name "
                    "two checkpoints of one model.")
        if compare_tokenizers:
            _compare_tokenizers(base, other, pair)


_PROBE_TEXT = ("Question: Tom has 12 apples, buys 345 more\u2014how many?\n\nAnswer: 357.  def f(x):\n"
               "\treturn x**2  # na\u00efve \u4f60\u597d \U0001f642 don't. The quick brown fox that jumps over "
               "the lazy dog is neither there nor here; WITHOUT a doubt, 3.14 > 2.7e-8!")


def _compare_tokenizers(base: LoadedModel, other: LoadedModel, pair: str) -> None:
    hint = (" Hidden states can be compared only on the same ids; use the base's tokenizer for both with "
            "--tokenizer base.")
    ours, theirs = base.tokenizer.get_vocab(), other.tokenizer.get_vocab()
    # tokens that only one of two vocabularies of different size has were added to it
    added = base.vocabulary != other.vocabulary and all(theirs[t] == i for t, i in ours.items() if t in theirs)
    if ours != theirs and not added:
        differing = sorted(t for t in {*ours, *theirs} if ours.get(t) != theirs.get(t))
        shown = ", ".join(f"{t!r} ({ours.get(t, 'absent')} against {theirs.get(t, 'absent')})"
                          for t in differing[:3])
        raise PairMismatchError(f"{pair} have different tokenizers: {len(differing)} entries of the "
                                f"vocabulary differ, such as {shown}.{hint}")
    encoded = [stage.tokenizer(_PROBE_TEXT, add_special_tokens=True)["input_ids"] for stage in (base, other)]
    if encoded[0] != encoded[1]:
        raise PairMismatchError(f"{pair} have different tokenizers: the vocabularies agree, but one text "
                                f"gives {len(encoded[0])} ids against {len(encoded[1])}, or others.{hint}")
