"""Loading one model, a pair, or a chain of stages, with every check before the first forward."""

from __future__ import annotations

import functools
import itertools
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from midblock.errors import (
    AdapterError,
    ArchitectureError,
    CheckpointError,
    MidblockError,
    ModelNotFoundError,
    PairMismatchError,
    SettingsError,
    UnsafeCheckpointError,
)
from midblock.models.anatomy import Anatomy, find_anatomy
from midblock.models.checkpoints import (
    Checkpoint,
    _first_line,
    _read_json,
    fingerprint,
    is_adapter_folder,
    precision_of,
    quiet,
    resolve_checkpoint,
)
from midblock.models.dtypes import DTYPES, DtypeChoice, choose_dtype, config_value, dtype_name, resolve_device
from midblock.provenance import sha256_of
from midblock.segments import format_blocks

__all__ = [
    "LoadedModel",
    "check_finite_weights",
    "check_fit",
    "load_chain",
    "load_model",
    "load_pair",
    "load_tokenizer",
]

@dataclass
class LoadedModel:
    """A model in eval mode with its tokenizer, anatomy and identity."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    anatomy: Anatomy
    spec: str
    """The MODEL spec as it was given."""
    name: str
    """Short name for tables: a stage name in a chain, else the spec's last part."""
    folder: Path | None
    """The checkpoint folder (after GGUF conversion or download)."""
    dtype: torch.dtype
    device: torch.device
    adapter: Path | None = None
    """Folder of the PEFT adapter, if one was loaded."""
    notes: tuple[str, ...] = ()
    """What loading left aside (weights of another tower, say); for run.json."""
    dtype_reason: str = "as asked"
    """Why it was loaded in this dtype."""
    _fingerprint: str | None = field(default=None, repr=False)

    @property
    def fingerprint(self) -> str:
        """Content hash of the checkpoint (and adapter); computed on first use, then kept."""
        if self._fingerprint is None:
            parts = [fingerprint(folder) for folder in (self.folder, self.adapter) if folder is not None]
            if not parts:
                raise CheckpointError(f"{self.spec}: a model without a folder has no fingerprint.")
            self._fingerprint = parts[0] if len(parts) == 1 else sha256_of(*parts)
        return self._fingerprint

    def describe(self) -> dict[str, Any]:
        """What run.json keeps of a model."""
        return {
            "spec": self.spec, "name": self.name, "fingerprint": self.fingerprint,
            "class": type(self.anatomy.causal_lm).__name__,
            "model_type": self.anatomy.causal_lm.config.model_type,
            "blocks": self.anatomy.num_blocks, "hidden_size": self.anatomy.hidden_size,
            "vocab_size": self.anatomy.vocab_size, "tied_head": self.anatomy.tied,
            "parameters": self.anatomy.causal_lm.num_parameters(),
            "dtype": dtype_name(self.dtype), "dtype_reason": self.dtype_reason, "device": str(self.device),
            "adapter": None if self.adapter is None else str(self.adapter), "notes": list(self.notes),
        }


# ---------------------------------------------------------------------------------------------
# one model


def load_model(
    spec: str | Path, *, dtype: str | torch.dtype | DtypeChoice = "auto", device: str | torch.device = "auto",
    trust_remote_code: bool = False, allow_pickle: bool = False, adapter: str | Path | None = None,
    merge: bool = True, check_finite: bool = True, revision: str | None = None,
    attn_implementation: str | None = None, name: str | None = None,
) -> LoadedModel:
    """Load a MODEL spec for measuring or tuning.

    Args:
        spec: Hub id, local folder, ``*.gguf`` file, ``smollm2``, or the folder of a PEFT adapter
            (its base model is loaded too).
        dtype: ``auto``, ``float32``, ``bfloat16`` or ``float16``; see `choose_dtype`, whose result is taken too.
        device: See `resolve_device`.
        trust_remote_code: Run the Python code that a checkpoint brings along.
        allow_pickle: Read ``.bin`` weights.
        adapter: Folder or hub id of a PEFT adapter to put on the model.
        merge: Merge the adapter into the weights (what measuring wants). If not, ``model`` is the
            ``PeftModel``.
        check_finite: Refuse weights with NaN or infinity.
        revision: Branch, tag or commit of a hub id.
        attn_implementation: transformers' name of an attention implementation.
        name: Name for tables; default the last part of the spec.

    Raises:
        ModelNotFoundError: nothing there.
        CheckpointError: truncated, corrupt, incomplete or non-finite (file or tensor named).
        UnsafeCheckpointError: pickled weights or remote code that nobody asked for.
        ArchitectureError: no such architecture, or its parts cannot be found.
        AdapterError: the adapter does not belong to the model.
        SettingsError: an unknown dtype or device.
    """
    place = resolve_device(device)
    if not isinstance(dtype, DtypeChoice):  # a wrong word must not cost a download first
        choose_dtype(dtype, stored=torch.float32, device=place)
    text = str(spec)
    folder = resolve_checkpoint(text, revision=revision, allow_pickle=allow_pickle,
                                trust_remote_code=trust_remote_code)
    adapter_folder: Path | None = None
    if is_adapter_folder(folder):
        if adapter is not None:
            raise SettingsError(f"model {text!r} is itself an adapter; give its base model as MODEL, and "
                                "one adapter.")
        adapter_folder, folder = folder, _base_of_adapter(
            folder, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code)
    elif adapter is not None:
        adapter_folder = resolve_checkpoint(adapter, allow_pickle=allow_pickle)
        if not (adapter_folder / "adapter_config.json").is_file():
            raise AdapterError(f"adapter {str(adapter)!r} holds no adapter_config.json.")
    config = _read_config(folder, text, trust_remote_code)
    choice = dtype if isinstance(dtype, DtypeChoice) else choose_dtype(
        dtype, stored=_stored_dtype(folder, config), device=place, config=config.get_text_config(decoder=True),
        parameters=_parameters_in(folder))
    model, notes = _build(folder, config, text, choice.dtype, trust_remote_code, _pickled(folder),
                          attn_implementation)
    model.to(place)
    model.eval()
    if check_finite:
        check_finite_weights(model, where=text)
    if adapter_folder is not None:
        model = _with_adapter(model, adapter_folder, merge)
        model.eval()
        if check_finite:
            check_finite_weights(model, where=str(adapter_folder))
    anatomy = find_anatomy(model)
    tokenizer = load_tokenizer(folder, spec=text, trust_remote_code=trust_remote_code)
    _check_vocabulary(tokenizer, anatomy, text)
    return LoadedModel(
        model=model, tokenizer=tokenizer, anatomy=anatomy, spec=text,
        name=name or (adapter_folder or Path(text)).name, folder=folder, dtype=choice.dtype,
        dtype_reason=choice.reason, device=place, adapter=adapter_folder, notes=notes)


def _base_of_adapter(folder: Path, *, allow_pickle: bool, trust_remote_code: bool) -> Path:
    base = _read_json(folder / "adapter_config.json").get("base_model_name_or_path")
    if not base:
        raise AdapterError(f"{folder}: its adapter_config.json names no base model; give the base as MODEL "
                           "and this folder as the adapter.")
    beside = folder / base  # a path may be relative to the adapter
    try:
        found = resolve_checkpoint(beside if beside.is_dir() else base, allow_pickle=allow_pickle,
                                   trust_remote_code=trust_remote_code)
    except ModelNotFoundError as error:
        raise ModelNotFoundError(f"base model of the adapter {folder}: {error}") from error
    if is_adapter_folder(found):
        raise AdapterError(f"{folder}: its base model {base!r} is an adapter too; merge that one first.")
    return found


def _pickled(folder: Path) -> bool:
    return not any((folder / n).is_file() for n in ("model.safetensors", "model.safetensors.index.json"))


def _stored_dtype(folder: Path, config: Any) -> torch.dtype:
    """See `precision_of`; every header is checked on the way."""
    if not _pickled(folder):
        return precision_of(folder)
    dtype = getattr(config, "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def _parameters_in(folder: Path) -> int:
    """Numbers stored in a checkpoint; 0 where only a pickle would tell."""
    return 0 if _pickled(folder) else Checkpoint(folder).numel


def _read_config(folder: Path, spec: str, trust_remote_code: bool) -> Any:
    raw = _read_json(folder / "config.json")
    try:
        with quiet():
            return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code,
                                              local_files_only=True)
    except (ValueError, KeyError, OSError, TypeError, AttributeError) as error:
        if raw.get("auto_map") and not trust_remote_code:
            raise UnsafeCheckpointError(
                f"model {spec!r} needs Python code of its own (model_type {raw.get('model_type')!r}), and "
                "loading would run it. Read that code, then allow it with --trust-remote-code.") from error
        if "model_type" not in raw:
            raise CheckpointError(f"{folder / 'config.json'} names no model_type, so it is no "
                                  "transformers config.") from error
        import transformers

        raise ArchitectureError(
            f"model {spec!r}: transformers {transformers.__version__} cannot read its config (model_type "
            f"{raw['model_type']!r}): {_first_line(error)}") from error


def _model_class(config: Any, spec: str, trust_remote_code: bool) -> Any:
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    )

    kind = type(config)
    if config.is_encoder_decoder and kind in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING:
        return AutoModelForSeq2SeqLM
    if kind in MODEL_FOR_CAUSAL_LM_MAPPING or (
            trust_remote_code and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})):
        return AutoModelForCausalLM
    if kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return AutoModelForImageTextToText
    if getattr(config, "auto_map", None) and not trust_remote_code:
        raise UnsafeCheckpointError(f"model {spec!r} needs Python code of its own; read it, then allow it "
                                    "with --trust-remote-code.")
    raise ArchitectureError(f"model {spec!r} (model_type {config.model_type!r}) is no language model with a "
                            "head that transformers can load.")


def _build(folder: Path, config: Any, spec: str, dtype: torch.dtype, trust_remote_code: bool,
           pickled: bool, attn_implementation: str | None) -> tuple[Any, tuple[str, ...]]:
    auto = _model_class(config, spec, trust_remote_code)
    extra = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    try:
        with quiet():
            model, info = auto.from_pretrained(
                folder, config=config, dtype=dtype, trust_remote_code=trust_remote_code,
                use_safetensors=not pickled, local_files_only=True, output_loading_info=True,
                ignore_mismatched_sizes=True, **extra)
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, AttributeError, ImportError,
            SafetensorError) as error:
        if not pickled and (gaps := _gaps(Checkpoint(folder).names())):
            raise CheckpointError(f"model {spec!r} lacks weights: {', '.join(gaps[:4])}"
                                  f"{' ...' if len(gaps) > 4 else ''}.") from error
        raise CheckpointError(f"model {spec!r} cannot be loaded ({type(error).__name__}): "
                              f"{_first_line(error)}") from error
    return model, _check_loading(model, info, spec)


def _gaps(names: list[str]) -> list[str]:
    """Numbered weights (an expert of a block) that a regular numbering would have, but are absent.

    transformers stacks experts while loading and says only that stacking failed.
    """
    found: dict[str, set[tuple[int, ...]]] = {}
    for name in names:
        numbers = tuple(int(part) for part in name.split(".") if part.isdigit())
        if len(numbers) > 1:
            found.setdefault(re.sub(r"(?<=\.)\d+(?=\.)", "{}", name), set()).add(numbers)
    return [pattern.format(*numbers) for pattern, there in found.items()
            for numbers in itertools.product(*(sorted(set(axis)) for axis in zip(*there, strict=True)))
            if numbers not in there]


def _check_loading(model: nn.Module, info: dict[str, Any], spec: str) -> tuple[str, ...]:
    """Refuse a model with weights that were not in its files; note what the files had too much."""
    def some(names: Sequence[str]) -> str:
        return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")

    if wrong := sorted(info.get("mismatched_keys") or ()):
        shown = [f"{name} is {tuple(found)}, the config asks for {tuple(asked)}"
                 for name, found, asked in wrong]
        raise CheckpointError(f"model {spec!r}: weights do not fit the config: {some(shown)}.")
    if missing := sorted(info.get("missing_keys") or ()):
        raise CheckpointError(f"model {spec!r} lacks weights that its config asks for: {some(missing)}. They "
                              "would be random; fetch the checkpoint again or correct its config.")
    if errors := list(info.get("error_msgs") or ()):
        raise CheckpointError(f"model {spec!r} cannot be loaded: {_first_line(ValueError(errors[0]))}")
    extra = sorted(info.get("unexpected_keys") or ())
    if not extra:
        return ()
    anatomy = find_anatomy(model, verify=False)

    def block(name: str) -> int | None:
        return next((b for n in (name, f"{anatomy.body_path}.{name}") if (b := anatomy.block_of(n)) is not None), None)

    inside = {n: b for n in extra if (b := block(n)) is not None and n.endswith((".weight", ".bias"))}
    if wrong := [n for n, b in inside.items() if b < anatomy.num_blocks]:
        raise CheckpointError(f"model {spec!r} holds weights in its blocks that its config has no place for: "
                              f"{some(wrong)}. Config and weights are not of one model.")
    notes = []
    if beyond := sorted(set(inside.values())):
        notes.append(f"blocks {format_blocks(beyond)} left aside: they lie past the {anatomy.num_blocks} blocks that "
                     "the config describes (multi-token prediction, say)")
    if rest := [n for n in extra if n not in inside]:
        notes.append(f"weights left aside: {some(rest)}")
    return tuple(notes)


def check_finite_weights(model: nn.Module, *, where: str = "model") -> None:
    """Refuse NaN and infinity in parameters and persistent buffers, naming the tensors.

    One sum per tensor; only a tensor whose sum is not finite is looked at closely (a finite
    tensor's sum can overflow).

    Raises:
        CheckpointError: a tensor has non-finite entries.
    """
    bad: list[str] = []
    with torch.no_grad():
        for tensor_name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
            if not tensor.is_floating_point() or tensor.is_meta or tensor.numel() == 0:
                continue
            if tensor.dtype.itemsize < 2:
                tensor = tensor.float()
            if not torch.isfinite(tensor.sum(dtype=torch.float32)) and not torch.isfinite(tensor).all():
                bad.append(f"{tensor_name} ({int((~torch.isfinite(tensor)).sum())} of {tensor.numel()})")
    if bad:
        raise CheckpointError(f"{where}: weights with NaN or infinity: {', '.join(bad[:4])}"
                              f"{f' and {len(bad) - 4} more tensors' if len(bad) > 4 else ''}. The "
                              "checkpoint cannot be measured; fetch or train it again.")


def _with_adapter(model: Any, folder: Path, merge: bool) -> Any:
    from peft import PeftModel

    if (folder / "adapter_model.safetensors").is_file() and is_adapter_folder(folder):
        _check_adapter_fits(model, Checkpoint(folder))
    try:
        with quiet(), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            wrapped = PeftModel.from_pretrained(model, str(folder))
        lost = [str(w.message) for w in caught if "missing adapter keys" in str(w.message)]
        if lost:
            raise AdapterError(f"adapter {folder}: {_first_line(ValueError(lost[0]))}")
        if not merge:
            return wrapped
        with quiet():
            return wrapped.merge_and_unload()
    except (ValueError, RuntimeError, KeyError, TypeError, OSError, SafetensorError) as error:
        if isinstance(error, MidblockError | torch.OutOfMemoryError):
            raise
        raise AdapterError(f"adapter {folder} does not go onto this model ({type(error).__name__}): "
                           f"{_first_line(error)}") from error


def _check_adapter_fits(model: nn.Module, adapter: Checkpoint) -> None:
    if adapter.config.get("peft_type", "LORA") != "LORA":
        return  # PEFT checks its other methods itself
    parameters = dict(model.named_parameters(remove_duplicate=False))
    unknown = [n for n in adapter.adapted() if n not in parameters and "trainable_tokens" not in n]
    if unknown and not adapter.config.get("target_parameters"):  # PEFT's own names; it checks them
        raise AdapterError(
            f"adapter {adapter.folder} changes {len(unknown)} weights that the base model does not have "
            f"({', '.join(unknown[:3])}); it was trained on another model "
            f"({adapter.config.get('base_model_name_or_path') or 'not named'}).")
    transposed = bool(adapter.config.get("fan_in_fan_out"))
    for name in adapter.names():
        if name.endswith((".lora_A.weight", ".lora_B.weight")):
            side = "A" if name.endswith(".lora_A.weight") else "B"
            base = name.removeprefix("base_model.model.").removesuffix(f".lora_{side}.weight") + ".weight"
            if base not in parameters:
                continue
            rows, columns = parameters[base].shape[-2:]
            out_in = (columns, rows) if transposed else (rows, columns)
            asked = out_in[1] if side == "A" else out_in[0]
            found = adapter.shape(name)[1 if side == "A" else 0]
            if asked != found and parameters[base].is_floating_point():
                raise AdapterError(f"adapter {adapter.folder}: {name} has the size {found} where {base} of "
                                   f"the base model has {asked}; it was trained on another model.")


# ---------------------------------------------------------------------------------------------
# tokenizer


def load_tokenizer(folder: Path, *, spec: str | None = None,
                   trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint folder; without a padding token its end token pads.

    Raises:
        CheckpointError: the folder has no tokenizer, or it cannot be read.
    """
    spec = spec or str(folder)
    files = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "spiece.model",
             "vocab.txt", "sentencepiece.bpe.model", "tekken.json")
    if not any((folder / name).is_file() for name in files):
        raise CheckpointError(f"model {spec!r} has no tokenizer in its folder (looked for {files[0]}, "
                              f"{files[2]} and others); copy the tokenizer files of its base model there.")
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code,
                                                      local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, ImportError, RuntimeError, AttributeError) as error:
        raise CheckpointError(f"model {spec!r}: its tokenizer cannot be loaded ({type(error).__name__}): "
                              f"{_first_line(error)}") from error
    except Exception as error:  # the Rust tokenizers library raises bare Exception for a bad file
        if type(error) is not Exception:
            raise
        raise CheckpointError(
            f"model {spec!r}: its tokenizer file is damaged: {_first_line(error)}") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer


def _check_vocabulary(tokenizer: PreTrainedTokenizerBase, anatomy: Anatomy, spec: str) -> None:
    highest = max(tokenizer.get_vocab().values(), default=-1)
    weight: Any = anatomy.embeddings.weight
    rows = int(getattr(anatomy.embeddings, "num_embeddings", weight.shape[0]))
    if highest >= rows:
        raise CheckpointError(f"model {spec!r}: its tokenizer has ids up to {highest}, its embeddings only "
                              f"{rows} rows; tokenizer and weights are not of one model.")


# ---------------------------------------------------------------------------------------------
# pairs and chains


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
               **options: Any) -> list[LoadedModel]:
    """Load the stages of one model (base, sft, dpo ...) and check that they fit together.

    Configs are compared before any weight is read. With dtype ``auto``, stages that are stored in different
    dtypes are all loaded in one that holds each exactly, so that no difference is the rounding of one side.

    Args:
        specs: MODEL specs, the base first.
        names: Stage names for tables; default ``base``, ``sft`` for two, else ``base`` and each
            spec's own name.
        tokenizer: ``own`` (tokenizers must agree) or ``base`` (the base's is used for all).
        options: As for `load_model`.

    Raises:
        PairMismatchError: a stage differs from the base (says in what).
        SettingsError: no specs, names that do not fit them, or an unknown ``tokenizer``.
    """
    if not specs:
        raise SettingsError("no model was named.")
    if tokenizer not in ("own", "base"):
        raise SettingsError(f"tokenizer {tokenizer!r} is unknown; use own or base.")
    stage_names = list(names) if names is not None else _stage_names(specs)
    if len(stage_names) != len(specs) or len(set(stage_names)) != len(specs):
        raise SettingsError(f"{len(specs)} models need {len(specs)} different names, got {stage_names}.")
    options.pop("name", None)
    stored_dtypes, config, parameters = _compare_configs(list(specs), stage_names, options)
    if options.get("dtype", "auto") == "auto":
        plain = (f if f in DTYPES.values() else torch.float32 for f in stored_dtypes)  # float8, int8
        options["dtype"] = choose_dtype(
            "auto", stored=functools.reduce(torch.promote_types, plain), config=config, parameters=parameters,
            device=resolve_device(options.get("device", "auto")), models=len(specs))
    loaded = [load_model(spec, name=name, **options)
              for spec, name in zip(specs, stage_names, strict=True)]
    if len(set(stored_dtypes)) > 1:
        for stage, stored in zip(loaded, stored_dtypes, strict=True):
            if stored != stage.dtype:
                stage.notes += (f"stored in {dtype_name(stored)}",)
    check_fit(loaded, compare_tokenizers=tokenizer == "own")
    if tokenizer == "base":
        for stage in loaded[1:]:
            stage.tokenizer = loaded[0].tokenizer
            _check_vocabulary(stage.tokenizer, stage.anatomy, stage.spec)
    return loaded


def _stage_names(specs: Sequence[str]) -> list[str]:
    if len(specs) <= 2:
        return ["base", "sft"][:len(specs)]
    names = ["base"]
    for index, spec in enumerate(specs[1:], start=1):
        own = Path(spec).name
        names.append(own if own and own not in names else f"stage{index}")
    return names


_SIZES = {
    "model_type": "architecture", "num_hidden_layers": "depth", "hidden_size": "width",
    "intermediate_size": "MLP width", "num_attention_heads": "attention heads",
    "num_key_value_heads": "key-value heads", "head_dim": "head size", "vocab_size": "vocabulary",
}


def _compare_configs(specs: list[str], names: list[str], options: dict[str, Any]
                     ) -> tuple[list[torch.dtype], Any, int]:
    """Compare what configs alone tell, so that a mismatch costs no loading.

    Returns:
        The dtypes that are stored, the first model's text config, and its number of parameters.
    """
    keep = {k: options[k] for k in ("revision", "allow_pickle", "trust_remote_code") if k in options}
    trust = bool(options.get("trust_remote_code"))
    reference: Any = None
    stored_dtypes, parameters = [], 0
    for spec, name in zip(specs, names, strict=True):
        folder = resolve_checkpoint(spec, **keep)
        if is_adapter_folder(folder):
            keep_base = {k: keep.get(k, False) for k in ("allow_pickle", "trust_remote_code")}
            folder = _base_of_adapter(folder, **keep_base)
        whole = _read_config(folder, spec, trust)
        config = whole.get_text_config(decoder=True)
        stored_dtypes.append(_stored_dtype(folder, whole))
        if reference is None:
            reference, parameters = config, _parameters_in(folder)
            continue
        differing = [f"{what} {ours!r} against {theirs!r}" for key, what in _SIZES.items()
                     if (ours := config_value(reference, key)) != (theirs := config_value(config, key))]
        if differing:
            raise PairMismatchError(
                f"{names[0]} ({specs[0]}) and {name} ({spec}) are not of one architecture and size: "
                f"{'; '.join(differing)}.{_hint(differing)}")
    return stored_dtypes, reference, parameters


def _hint(differing: list[str]) -> str:
    if len(differing) == 1 and differing[0].startswith("vocabulary"):
        return (" One of them was resized (padding or added tokens); resize the other to the same number of "
                "rows, or choose the matching pair.")
    return " Name two checkpoints of one model."


def check_fit(loaded: Sequence[LoadedModel], *, compare_tokenizers: bool = True) -> None:
    """Check that loaded stages have equal parts, dtypes, weights of equal shape, and equal tokenizers.

    Raises:
        PairMismatchError: says which stage differs from the first, and in what.
    """
    base = loaded[0]
    shapes = {n: tuple(p.shape) for n, p in base.model.named_parameters()}
    for other in loaded[1:]:
        pair = f"{base.name} ({base.spec}) and {other.name} ({other.spec})"
        a, b = base.anatomy, other.anatomy
        for what, ours, theirs in (
                ("class", type(a.causal_lm).__name__, type(b.causal_lm).__name__),
                ("depth", a.num_blocks, b.num_blocks), ("width", a.hidden_size, b.hidden_size),
                ("vocabulary", a.vocab_size, b.vocab_size)):
            if ours != theirs:
                raise PairMismatchError(f"{pair} differ in {what}: {ours} against {theirs}. Name two "
                                        "checkpoints of one model.")
        if base.dtype != other.dtype:
            ours, theirs = (dtype_name(m.dtype) for m in (base, other))
            raise PairMismatchError(f"{pair} were loaded in different dtypes, {ours} and {theirs}, and their "
                                    "difference would be one of rounding too. Load both with one dtype, or by "
                                    "load_chain.")
        # A tied head is a name less, not another architecture: compare what both have, then blocks.
        theirs_shapes = {n: tuple(p.shape) for n, p in other.model.named_parameters()}
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
    if ours != theirs:
        differing = sorted(t for t in {*ours, *theirs} if ours.get(t) != theirs.get(t))
        shown = ", ".join(f"{t!r} ({ours.get(t, 'absent')} against {theirs.get(t, 'absent')})"
                          for t in differing[:3])
        raise PairMismatchError(f"{pair} have different tokenizers: {len(differing)} entries of the "
                                f"vocabulary differ, such as {shown}.{hint}")
    encoded = [stage.tokenizer(_PROBE_TEXT, add_special_tokens=True)["input_ids"] for stage in (base, other)]
    if encoded[0] != encoded[1]:
        raise PairMismatchError(f"{pair} have different tokenizers: the vocabularies agree, but one text "
                                f"gives {len(encoded[0])} ids against {len(encoded[1])}, or others.{hint}")
