"""What a checkpoint's own files say, checked before anything is built from them.

``config.json`` and ``adapter_config.json``, the index of a sharded checkpoint, and the headers of its safetensors
files. A safetensors file is first opened by the safetensors library, whose rules (no gaps, no overlap, sizes that
fit dtype and shape) are the format; only then is its header read here.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

from pydantic import BaseModel, Field
from safetensors import SafetensorError, safe_open

from midblock.errors import AdapterError, CheckpointError
from midblock.reading import open_file, parse_json, read_json, shortened, validated

__all__ = ["check_adapter_halves", "check_weight_dtypes", "read_adapter_config", "read_config", "read_header",
           "read_index"]

_ADVICE = "mend it, or fetch the checkpoint again"

# Fields that are counts: at least 1, and not so large that building the model would fill any memory.
_COUNTS = {
    "hidden_size": 2**20, "n_embd": 2**20, "d_model": 2**20, "intermediate_size": 2**24, "n_inner": 2**24,
    "ffn_dim": 2**24, "d_ff": 2**24, "num_hidden_layers": 10_000, "n_layer": 10_000, "n_layers": 10_000,
    "num_layers": 10_000, "num_decoder_layers": 10_000, "decoder_layers": 10_000, "encoder_layers": 10_000,
    "num_attention_heads": 2**16, "n_head": 2**16, "num_heads": 2**16, "num_key_value_heads": 2**16, "head_dim": 2**16,
    "vocab_size": 2**25, "max_position_embeddings": 2**40, "n_positions": 2**40,
    "num_local_experts": 2**16, "num_experts": 2**16, "n_routed_experts": 2**16}
_HIDDEN = ("hidden_size", "n_embd", "d_model")
_POSITIVE = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "rope_theta", "initializer_range")


def read_config(path: Path) -> dict[str, Any]:
    """A model's ``config.json``.

    Raises:
        CheckpointError: it cannot be read, or a field has a type or a value that no model can have; all are named.
    """
    config: dict[str, Any] = read_json(path, error=CheckpointError)
    faults = list(_config_faults(config))
    for name in ("text_config", "llm_config"):
        if isinstance(inner := config.get(name), dict):
            faults += [f"{name}.{fault}" for fault in _config_faults(inner)]
    if faults:
        raise CheckpointError(f"{path}: {'; '.join(faults[:5])}{' ...' if len(faults) > 5 else ''}; {_ADVICE}.")
    return config


def _config_faults(config: Mapping[str, Any]) -> Iterator[str]:
    for name, largest in _COUNTS.items():
        value = config.get(name)
        # some families give a list with one value per block
        several = isinstance(value, list) and value and name not in ("vocab_size", "hidden_size")
        values: list[Any] = value if isinstance(value, list) and several else [value]
        for one in values:
            if one is not None and (isinstance(one, bool) or not isinstance(one, int) or not 0 < one <= largest):
                # MPT and others write 0 or -1 for "none" in counts that are no sizes of the model
                if isinstance(one, int) and one in (0, -1) and name in ("num_experts", "num_local_experts",
                                                                        "n_routed_experts", "max_position_embeddings"):
                    continue
                yield f"{name} is {shortened(repr(one), 30)}, where a whole number from 1 to {largest:,} was expected"
                return
    for name in _POSITIVE:
        value = config.get(name)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is not None and not (number and 0 <= value < 1e30):
            yield f"{name} is {shortened(repr(value), 30)}, where a number was expected"
    yield from _shape_faults(config)
    yield from _token_faults(config)
    yield from _name_faults(config)


def _shape_faults(config: Mapping[str, Any]) -> Iterator[str]:
    hidden = next((config[n] for n in _HIDDEN if isinstance(config.get(n), int)), None)
    heads = next((config[n] for n in ("num_attention_heads", "n_head") if isinstance(config.get(n), int)), None)
    groups = config.get("num_key_value_heads")
    # where heads have a width of their own, the three need not fit
    own = any("head_dim" in k or "head_size" in k or k in ("d_kv", "kv_channels", "kv_lora_rank") for k in config)
    if hidden and heads and hidden % heads and not own:
        yield f"hidden_size {hidden} is not divisible by num_attention_heads {heads}"
    if heads and isinstance(groups, int) and heads % groups:
        yield f"num_attention_heads {heads} is not divisible by num_key_value_heads {groups}"


def _token_faults(config: Mapping[str, Any]) -> Iterator[str]:
    vocabulary = config.get("vocab_size")
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        value = config.get(name)
        ids = value if isinstance(value, list) else [value]
        if any(i is not None and (isinstance(i, bool) or not isinstance(i, int)) for i in ids):
            yield f"{name} is {shortened(repr(value), 30)}, where a token id was expected"
        elif name == "pad_token_id" and isinstance(value, list):
            yield f"{name} is a list, where one token id was expected"
        elif (name == "pad_token_id" and isinstance(value, int) and isinstance(vocabulary, int)
              and not -vocabulary <= value < vocabulary):
            yield f"pad_token_id is {value}, the vocabulary has {vocabulary} tokens"


def _name_faults(config: Mapping[str, Any]) -> Iterator[str]:
    from transformers.activations import ACT2FN

    for name in ("hidden_act", "hidden_activation", "activation_function"):
        value = config.get(name)
        if value is None:
            continue
        if not isinstance(value, str):
            yield f"{name} is {shortened(repr(value), 30)}, where a name was expected"
        elif value not in ACT2FN and not config.get("auto_map"):
            yield f"{name} {shortened(value, 30)!r} is not an activation that transformers knows"
    for name in ("model_type", "torch_dtype", "dtype", "_name_or_path", "attn_implementation", "_attn_implementation"):
        value = config.get(name)
        if value is not None and not isinstance(value, str) and not (isinstance(value, dict) and "attn" in name):
            yield f"{name} is {shortened(repr(value), 30)}, where a name was expected"
    for name in ("architectures",):
        value = config.get(name)
        if value is not None and not (isinstance(value, list) and all(isinstance(v, str) for v in value)):
            yield f"{name} is {shortened(repr(value), 30)}, where a list of names was expected"
    for name in ("text_config", "quantization_config", "auto_map", "rope_scaling", "rope_parameters"):
        value = config.get(name)
        if value is not None and not isinstance(value, dict):
            yield f"{name} is {shortened(repr(value), 30)}, where an object was expected"
    for name in ("layer_types",):
        value = config.get(name)
        if value is not None and not (isinstance(value, list) and all(isinstance(v, str) for v in value)):
            yield f"{name} is {shortened(repr(value), 30)}, where a list of names was expected"


_Number = Annotated[float, Field(ge=-1e6, le=1e6, allow_inf_nan=False)]
_Rank = Annotated[int, Field(ge=1, le=2**20)]


class _AdapterConfig(BaseModel, extra="allow", strict=True):
    peft_type: str | None = None
    base_model_name_or_path: str | None = None
    r: _Rank | None = None
    lora_alpha: _Number | None = None
    lora_dropout: _Number | None = None
    target_modules: str | list[str] | None = None
    target_parameters: list[str] | None = None
    modules_to_save: list[str] | None = None
    rank_pattern: dict[str, _Rank] | None = None
    alpha_pattern: dict[str, _Number] | None = None
    use_rslora: bool | None = None
    use_dora: bool | None = None
    fan_in_fan_out: bool | None = None


def read_adapter_config(path: Path) -> dict[str, Any]:
    """A PEFT adapter's ``adapter_config.json``.

    Raises:
        AdapterError: it cannot be read, or a field has a type or a value that no adapter can have; all are named.
    """
    config: dict[str, Any] = read_json(path, error=AdapterError)
    validated(_AdapterConfig, config, where=str(path), error=AdapterError)
    return config


def check_adapter_halves(names: Collection[str], where: str) -> None:
    """Refuse a LoRA adapter in which one of a pair of matrices is missing.

    Raises:
        AdapterError: an A without its B, or a B without its A.
    """
    for name in names:
        for half, other in (("lora_A", "lora_B"), ("lora_B", "lora_A"), ("lora_embedding_A", "lora_embedding_B"),
                            ("lora_embedding_B", "lora_embedding_A")):
            if f".{half}." in f"{name}." and f"{name}.".replace(f".{half}.", f".{other}.")[:-1] not in names:
                raise AdapterError(f"{where} holds {shortened(name)} without its other half ({other}); fetch or write "
                                   "the adapter again.")


def read_index(path: Path) -> dict[str, str]:
    """Tensor name -> file name of a sharded checkpoint's index.

    Raises:
        CheckpointError: it cannot be read, names no files, or names one outside its folder.
    """
    shards = read_json(path, error=CheckpointError).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise CheckpointError(f"{path} names no weights; {_ADVICE}.")
    for tensor, file in shards.items():
        plain = isinstance(file, str) and file and not PurePosixPath(file).is_absolute() and \
            ".." not in PurePosixPath(file).parts and "\0" not in file and len(file) < 250
        if not plain:
            raise CheckpointError(f"{path}: the file of {shortened(tensor)} is {shortened(repr(file))}, where the name "
                                  f"of a file in the same folder was expected; {_ADVICE}.")
    return shards


def read_header(path: Path) -> dict[str, dict[str, Any]]:
    """Tensor table of a safetensors file that the safetensors library accepts.

    Returns:
        name -> ``dtype`` (as in the file), ``shape``, ``data_offsets`` (start and end, bytes after the header).

    Raises:
        CheckpointError: the file cannot be read, is truncated, or breaks a rule of the format.
    """
    try:
        size = path.stat().st_size
        with open_file(path, error=CheckpointError) as stream:
            length = int.from_bytes(stream.read(8), "little")
            if not 2 <= length <= min(size - 8, 100_000_000):
                raise CheckpointError(f"{path} is damaged: its header cannot be {length} bytes in a file of "
                                      f"{size}; fetch or write it again.")
            text = stream.read(length).decode("utf-8")
        with safe_open(path, framework="pt"):
            pass
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from error
    except (SafetensorError, UnicodeDecodeError, ValueError) as error:
        why = shortened(" ".join(str(error).split()), 120)
        raise CheckpointError(f"{path} is truncated or damaged: safetensors refuses it ({why}); fetch or write it "
                              "again.") from None
    header = parse_json(text, where=f"the header of {path}", error=CheckpointError)
    header.pop("__metadata__", None)
    return header  # type: ignore[no-any-return]


def check_weight_dtypes(entries: Mapping[str, Mapping[str, Any]], config: Mapping[str, Any], where: str) -> None:
    """Refuse weights of whole numbers that no quantisation explains.

    Raises:
        CheckpointError: a tensor called ``*.weight`` holds whole numbers or truth values, and the config names no
            quantisation.
    """
    if config.get("quantization_config") or config.get("compression_config"):
        return
    for name, entry in entries.items():
        if name.endswith(".weight") and entry["dtype"][0] in "UIB" and entry["dtype"] != "BF16":
            raise CheckpointError(f"{where}: {shortened(name)} holds {entry['dtype']} numbers and the config names no "
                                  f"quantisation, so they are not weights; {_ADVICE}.")
