"""Loading one model, with every check before the first forward."""

from __future__ import annotations

import contextlib
import itertools
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from midblock.errors import (
    AdapterError,
    ArchitectureError,
    CheckpointError,
    MidblockError,
    SettingsError,
    UnsafeCheckpointError,
)
from midblock.extras import require
from midblock.models.adapters import base_of_adapter, other_base, with_adapter
from midblock.models.anatomy import Anatomy, find_anatomy
from midblock.models.checkpoints import (
    Checkpoint,
    fingerprint,
    has_pickled_adapter,
    is_adapter_folder,
    is_pickled,
    weights_are_there,
)
from midblock.models.dtypes import DtypeChoice, choose_dtype, dtype_name, resolve_device
from midblock.models.finite import check_finite_files, check_finite_weights
from midblock.models.gguf import precision_of
from midblock.models.placement import (
    check_spread,
    dequantised,
    held_in,
    in_dtype,
    keep_trainable,
    loading_options,
    place_of,
    quantiser,
    reads_in_parts,
)
from midblock.models.quiet import first_line, foreign
from midblock.models.resolve import resolve_checkpoint
from midblock.models.streaming import StreamedWeights, build_streamed
from midblock.models.tokenizers import check_vocabulary, differences, has_tokenizer, load_tokenizer
from midblock.models.validation import read_adapter_config
from midblock.models.validation import read_config as read_config_file
from midblock.segments import format_blocks
from midblock.settings.base import name_of
from midblock.settings.load import PlaceSettings
from midblock.writing import sha256_of

__all__ = ["LoadedModel", "load_model", "model_class", "parameters_in", "read_config", "stored_dtype",
           "why_not_streamed"]

_LOG = logging.getLogger("midblock")


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
    vocabulary: int = 0
    """Rows of its embeddings as they were loaded (`common_vocabulary` may leave fewer); 0 where it was not told."""
    notes: tuple[str, ...] = ()
    """What loading left aside (weights of another tower, say); for run.json."""
    dtype_reason: str = "as asked"
    """Why it was loaded in this dtype."""
    quantized: str | None = None
    """How its weights are held where not in ``dtype``: ``4bit``, ``8bit``, or a checkpoint's own method."""
    streamed: StreamedWeights | None = None
    """Where its weights come from, block by block; None for a model that is in memory as a whole."""
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

    def note(self, text: str) -> None:
        """Keep what loading left aside or did otherwise for run.json, and say it (a warning of logger ``midblock``)."""
        self.notes += (text,)
        _LOG.warning("%s: %s.", self.name, text)

    def require_whole(self) -> None:
        """Refuse a model that is read block by block where all of it is needed at once.

        Raises:
            SettingsError: it is.
        """
        if self.streamed is not None:
            raise SettingsError(f"{self.name}: this needs the whole model in memory, and its blocks are read one after "
                                "another; load it with stream never.")

    def each_block(self) -> Iterator[tuple[int, nn.Module]]:
        """The blocks in order, with their weights in memory while each is looked at."""
        for b, block in enumerate(self.anatomy.blocks):
            with contextlib.nullcontext() if self.streamed is None else self.streamed.part(b):
                yield b, block

    def describe(self) -> dict[str, Any]:
        """What run.json keeps of a model."""
        return {
            "spec": self.spec, "name": self.name, "fingerprint": self.fingerprint,
            "class": type(self.anatomy.causal_lm).__name__, "model_type": self.anatomy.causal_lm.config.model_type,
            "blocks": self.anatomy.num_blocks, "hidden_size": self.anatomy.hidden_size,
            "vocab_size": self.anatomy.vocab_size, "tied_head": self.anatomy.tied,
            "parameters": self.anatomy.causal_lm.num_parameters(),
            "dtype": dtype_name(self.dtype), "dtype_reason": self.dtype_reason, "device": str(self.device),
            "quantized": self.quantized, "adapter": None if self.adapter is None else str(self.adapter),
            "notes": list(self.notes), "streamed": self.streamed is not None,
        }


def load_model(
    spec: str | Path, *, dtype: str | torch.dtype | DtypeChoice = "auto", device: str | torch.device = "auto",
    trust_remote_code: bool = False, allow_pickle: bool = False, adapter: str | Path | None = None,
    merge: bool = True, check_finite: bool = True, revision: str | None = None,
    attn_implementation: str | None = None, name: str | None = None,
    device_map: Literal["auto"] | None = None, load_4bit: bool = False, load_8bit: bool = False,
    streamed: bool = False,
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
            ``PeftModel``. On quantised weights an adapter is never merged, which would round it away: it stays on
            the model's layers, as it was trained.
        check_finite: Refuse weights with NaN or infinity.
        revision: Branch, tag or commit of a hub id.
        attn_implementation: transformers' name of an attention implementation.
        name: Name for tables; default the last part of the spec.
        device_map: ``auto`` spreads whole blocks over all GPUs; None: everything is on ``device``.
        load_4bit: Hold the weights in 4 bit (NF4), by bitsandbytes; embeddings and head stay as they are.
        load_8bit: The same in 8 bit.
        streamed: Keep no block in memory: passes read them one after another (`midblock.capture.block_by_block`).

    Raises:
        ModelNotFoundError: nothing there.
        CheckpointError: truncated, corrupt, incomplete or non-finite (file or tensor named).
        UnsafeCheckpointError: pickled weights or remote code that nobody asked for.
        ArchitectureError: no such architecture, or its parts cannot be found.
        AdapterError: the adapter does not belong to the model.
        SettingsError: an unknown dtype or device, a placement that the model does not fit, or a checkpoint that cannot
            be read block by block.
        MissingExtraError: bitsandbytes is asked for and not installed.
    """
    wanted = PlaceSettings(device=str(device), device_map=device_map, load_4bit=load_4bit, load_8bit=load_8bit)
    place, bits = resolve_device(device), wanted.bits
    if bits is not None:
        require("bitsandbytes", name_of(f"load_{bits}bit"))
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
        adapter_folder, folder = folder, base_of_adapter(
            folder, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code)
    elif adapter is not None:
        adapter_folder = resolve_checkpoint(adapter, allow_pickle=allow_pickle)
        if not (adapter_folder / "adapter_config.json").is_file():
            raise AdapterError(f"adapter {str(adapter)!r} holds no adapter_config.json.")
    if adapter_folder is not None:
        read_adapter_config(adapter_folder / "adapter_config.json")
        if not allow_pickle and not (adapter_folder / "adapter_model.safetensors").is_file():
            raise UnsafeCheckpointError(
                f"adapter {str(adapter_folder)!r} has no adapter_model.safetensors, and reading a pickle can run any "
                "code. Convert it to safetensors, or allow it with --allow-pickle if you trust its source.")
    if has_pickled_adapter(folder) and not (allow_pickle and is_pickled(folder)):
        raise UnsafeCheckpointError(
            f"model {text!r}: the folder holds a pickled adapter beside the model (adapter_model.bin). Move it and "
            "adapter_config.json into a folder of their own: the model is then read alone, and the adapter with "
            "--allow-pickle, which can run any code, if you trust its source.")
    config = read_config(folder, text, trust_remote_code)
    choice = dtype if isinstance(dtype, DtypeChoice) else choose_dtype(
        dtype, stored=stored_dtype(folder, config), device=place, config=config.get_text_config(decoder=True),
        parameters=0 if bits else parameters_in(folder), spread=wanted.device_map is not None)
    parts: StreamedWeights | None = None
    if streamed and (reason := why_not_streamed(folder, config, adapter_folder, spread=device_map is not None)):
        raise SettingsError(f"model {text!r} cannot be read block by block: {reason}. Load it whole, with stream "
                            "never.")
    stored = dequantised(config)
    options = loading_options(config, choice.dtype, place, device_map=wanted.device_map, bits=bits)
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    if streamed:
        model, parts, notes = _build_streamed(folder, config, text, choice.dtype, place, trust_remote_code, options,
                                              check_finite)
    else:
        model, notes = _build(folder, config, text, choice.dtype, trust_remote_code, is_pickled(folder), options)
    if stored and not streamed:
        for name_in_model, parameter in model.named_parameters():
            parameter.data = in_dtype(model, name_in_model, parameter.data, choice.dtype)
    if stored:
        notes += (f"stored in {stored}, loaded in {choice.name}",)
    quantized = held_in(model)
    if quantized:
        keep_trainable(model)
    if not streamed:
        if "device_map" not in options:
            model.to(place)
        model.eval()
        if check_finite:
            check_finite_weights(model, where=text)
            if bits and not is_pickled(folder):
                check_finite_files(Checkpoint(folder), where=text)
    if adapter_folder is not None:
        if warning := other_base(adapter_folder, text, folder):
            notes += (warning,)
        model = with_adapter(model, adapter_folder, merge and not quantized)
        if merge and quantized:
            model = model.get_base_model()
        model.eval()
        if check_finite:
            check_finite_weights(model, where=str(adapter_folder))
    anatomy = find_anatomy(model)
    if wanted.device_map is not None:
        check_spread(model, anatomy, text)
        place = place_of(anatomy)
    if parts is not None:
        parts.release(anatomy)
    tokenizer = load_tokenizer(folder, spec=text, trust_remote_code=trust_remote_code)
    if adapter_folder is not None and has_tokenizer(adapter_folder):  # it was trained with its own
        own = load_tokenizer(adapter_folder, trust_remote_code=trust_remote_code)
        if difference := differences(tokenizer, own):
            notes += (f"the adapter's own {difference} used",)
        if own.chat_template is None:
            own.chat_template = tokenizer.chat_template
        tokenizer = own
    check_vocabulary(tokenizer, anatomy, text)
    loaded = LoadedModel(
        model=model, tokenizer=tokenizer, anatomy=anatomy, spec=text,
        name=name or (adapter_folder or Path(text)).name, folder=folder, dtype=choice.dtype,
        dtype_reason=choice.reason, device=place, adapter=adapter_folder, quantized=quantized,
        vocabulary=anatomy.vocab_size, streamed=parts)
    for note in notes:
        loaded.note(note)
    return loaded


def why_not_streamed(folder: Path, config: Any, adapter: Path | None = None, *, spread: bool = False) -> str | None:
    """Why a checkpoint cannot be read block by block, as a clause; None where it can.

    Args:
        folder: Of the model.
        config: Its configuration.
        adapter: Folder of an adapter to merge.
        spread: Whether it is to be spread over devices.
    """
    if spread:
        return "it is to be spread over devices, which is done with whole models"
    if is_pickled(folder):
        return "its weights are pickled, and only safetensors can be read in parts"
    if adapter is not None:
        return "its adapter is merged into whole weights (merge it first: midblock tune --merge, or PEFT)"
    if not reads_in_parts(config):
        return "it is quantised in a way that is put together as a whole"
    return None


def stored_dtype(folder: Path, config: Any) -> torch.dtype:
    """See `precision_of`; every header is checked on the way."""
    if not is_pickled(folder) and weights_are_there(folder):
        Checkpoint(folder).check_weight_dtypes()
        return precision_of(folder)
    dtype = getattr(config, "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def parameters_in(folder: Path) -> int:
    """Numbers stored in a checkpoint; 0 where only a pickle would tell."""
    return 0 if is_pickled(folder) else Checkpoint(folder).numel


def read_config(folder: Path, spec: str, trust_remote_code: bool) -> Any:
    """The configuration of a checkpoint.

    Raises:
        CheckpointError: it cannot be read, or names no model_type.
        ArchitectureError: the installed transformers cannot read it.
        UnsafeCheckpointError: the model needs code of its own and ``trust_remote_code`` was not given.
    """
    raw = read_config_file(folder / "config.json")

    def refusal(error: Exception) -> MidblockError:
        if raw.get("auto_map") and not trust_remote_code:
            return UnsafeCheckpointError(
                f"model {spec!r} needs Python code of its own (model_type {raw.get('model_type')!r}), and "
                "loading would run it. Read that code, then allow it with --trust-remote-code.")
        if "model_type" not in raw:
            return CheckpointError(f"{folder / 'config.json'} names no model_type, so it is not a "
                                   "transformers config.")
        import transformers

        return ArchitectureError(
            f"model {spec!r}: transformers {transformers.__version__} cannot read its config (model_type "
            f"{raw['model_type']!r}): {first_line(error)}")

    with foreign(refusal):
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)


def model_class(config: Any, spec: str, trust_remote_code: bool) -> Any:
    """The class of transformers that loads a language model of this configuration.

    Raises:
        ArchitectureError: there is none.
        UnsafeCheckpointError: it comes with the model and ``trust_remote_code`` was not given.
    """
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
    raise ArchitectureError(f"model {spec!r} (model_type {config.model_type!r}) is not a language model with a "
                            "head that transformers can load.")


def _build(folder: Path, config: Any, spec: str, dtype: torch.dtype, trust_remote_code: bool,
           pickled: bool, options: Mapping[str, Any]) -> tuple[Any, tuple[str, ...]]:
    auto = model_class(config, spec, trust_remote_code)

    def refusal(error: Exception) -> MidblockError:
        if not pickled and (gaps := _gaps(Checkpoint(folder).names())):
            return CheckpointError(f"model {spec!r} lacks weights: {', '.join(gaps[:4])}"
                                   f"{' ...' if len(gaps) > 4 else ''}.")
        return CheckpointError(f"model {spec!r} cannot be loaded ({type(error).__name__}): {first_line(error)}")

    with foreign(refusal):
        model, info = auto.from_pretrained(
            folder, config=config, dtype=dtype, trust_remote_code=trust_remote_code, use_safetensors=not pickled,
            local_files_only=True, output_loading_info=True, ignore_mismatched_sizes=True,
            **options)
    return model, _check_loading(model, info, spec)


def _build_streamed(folder: Path, config: Any, spec: str, dtype: torch.dtype, device: torch.device,
                    trust_remote_code: bool, options: dict[str, Any], check_finite: bool
                    ) -> tuple[Any, StreamedWeights, tuple[str, ...]]:
    """A model with all that stands outside its blocks loaded, so that its anatomy can be tried."""
    auto = model_class(config, spec, trust_remote_code)
    extra: dict[str, Any] = {k: v for k, v in options.items() if k == "attn_implementation"}
    if trust_remote_code:
        extra["trust_remote_code"] = True

    def refusal(error: Exception) -> MidblockError:
        return CheckpointError(f"model {spec!r} cannot be loaded ({type(error).__name__}): {first_line(error)}")

    with foreign(refusal):
        made = quantiser(config, options)
        model, parts = build_streamed(lambda: auto.from_config(config, dtype=dtype, **extra), folder, spec=spec,
                                      dtype=dtype, device=device, check_finite=check_finite, quantiser=made)
        notes = _check_loading(model, vars(parts.found), spec)
        for part in ("embeddings", "head", "rest"):
            parts.load(part)
    return model, parts, notes


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
        raise CheckpointError(f"model {spec!r} cannot be loaded: {first_line(ValueError(errors[0]))}")
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
