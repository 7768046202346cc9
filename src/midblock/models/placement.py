"""How a model's weights are held: quantised to 4 or 8 bits, and on one device or spread over several.

Measurements only run a model's modules, so they work on weights held in any way. What reads or changes the weights
themselves (gradients of them, merging, full-rank training) calls `require_full_weights`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from midblock.errors import SettingsError
from midblock.extras import require
from midblock.models.anatomy import Anatomy
from midblock.settings.base import name_of

if TYPE_CHECKING:
    from midblock.models.load import LoadedModel

__all__ = ["check_spread", "dequantised", "held_in", "in_dtype", "loading_options", "place_of", "quantiser",
           "reads_in_parts", "require_full_weights"]

_WHOLE = ("fp8", "mxfp4")  # quantisations of checkpoints that transformers can undo exactly while it loads


def loading_options(config: Any, dtype: torch.dtype, device: torch.device, *, device_map: str | None, bits: int | None
                    ) -> dict[str, Any]:
    """Keyword arguments of transformers' ``from_pretrained`` for a model's quantisation and devices.

    Args:
        config: The checkpoint's; a quantisation of its own that can be undone exactly is undone.
        dtype: In which it computes.
        device: Where it is put without a ``device_map``.
        device_map: ``auto``: transformers spreads whole blocks over all GPUs.
        bits: 4 (NF4, double quantisation) or 8 (LLM.int8), by bitsandbytes; None: as they are.

    Raises:
        SettingsError: the checkpoint is quantised already.
        MissingExtraError: bitsandbytes is not installed.
    """
    options: dict[str, Any] = {}
    own = _method(config)
    if own in _WHOLE:
        config.quantization_config = {**_as_dict(config.quantization_config), "dequantize": True}
    if bits is not None:
        option = name_of(f"load_{bits}bit")
        if own:
            raise SettingsError(f"{option}: the checkpoint is quantised already ({own}); load it without {option}.")
        require("bitsandbytes", option)
        from transformers import BitsAndBytesConfig

        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype) if bits == 4 else BitsAndBytesConfig(load_in_8bit=True)
    if device_map is not None:
        options["device_map"] = device_map
    elif options or own:
        options["device_map"] = {"": str(device)}
    return options


def dequantised(config: Any) -> str | None:
    """The quantisation that `loading_options` undoes, such as ``fp8``; None: there is none."""
    method = _method(config)
    return method if method in _WHOLE else None


def reads_in_parts(config: Any) -> bool:
    """Whether a checkpoint is stored whole, or quantised so that each matrix can be read by itself."""
    return _method(config) in (None, "fp8", "bitsandbytes")


def quantiser(config: Any, options: dict[str, Any]) -> Any:
    """transformers' quantiser of a model that `loading_options` were made for; None: its weights are whole.

    The config is told about the quantisation, as ``from_pretrained`` would.
    """
    if not _method(config) and "quantization_config" not in options:
        return None
    from transformers.quantizers.auto import get_hf_quantizer

    return get_hf_quantizer(config, options.get("quantization_config"), options.get("device_map"), True, {})[0]


def _method(config: Any) -> str | None:
    own = getattr(config, "quantization_config", None)
    return None if not own else str(_as_dict(own).get("quant_method", "unknown")).rpartition(".")[2].lower()


def _as_dict(own: Any) -> dict[str, Any]:
    return dict(own) if isinstance(own, dict) else dict(own.to_dict())


def in_dtype(model: Any, name: str, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A weight of a checkpoint whose quantisation was undone, in the model's dtype.

    transformers makes bfloat16 of what was fp8, and leaves the rest as it is stored. What a family keeps in float32
    stays so.
    """
    kept = {key.strip("*.^$") for key in model._get_dtype_plan(dtype)}
    odd = weight.is_floating_point() and weight.dtype != dtype and not any(key in name for key in kept)
    return weight.to(dtype) if odd else weight


def held_in(model: Any) -> str | None:
    """How a loaded model's weights are quantised: ``4bit``, ``8bit`` or the method's name; None: they are whole."""
    if not getattr(model, "is_quantized", False):
        return None
    own = _as_dict(model.config.quantization_config)
    return "4bit" if own.get("load_in_4bit") else "8bit" if own.get("load_in_8bit") else _method(model.config)


def keep_trainable(model: Any) -> None:
    """Let a quantised model be trained after it was run.

    On a CPU bitsandbytes would repack 4-bit weights for inference at the first forward without gradients, for good, and
    training would then silently get no gradient through them.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def check_spread(model: Any, anatomy: Anatomy, spec: str) -> None:
    """Refuse a model that was spread so that it could not be measured.

    Raises:
        SettingsError: parts were left out of the devices' memory, or a block lies on several devices.
    """
    places = {str(place) for place in getattr(model, "hf_device_map", {}).values()}
    if (outside := places & {"cpu", "disk"}) and places - {"cpu"}:
        count = sum(str(p) in outside for p in model.hf_device_map.values())
        raise SettingsError(f"model {spec!r} does not fit into the memory of this machine's devices: {count} of its "
                            f"parts would be left on {' and '.join(sorted(outside))}; use {name_of('load_8bit')} or "
                            f"{name_of('load_4bit')}, or more devices.")
    for number, block in enumerate(anatomy.blocks):
        devices = sorted({str(t.device) for t in (*block.parameters(), *block.buffers())})
        if len(devices) > 1:
            raise SettingsError(f"model {spec!r}: block {number} is split over {' and '.join(devices)}; hidden states "
                                f"are taken between blocks, so that each must be whole on one device. Leave out "
                                f"{name_of('device_map')}, or quantise the model.")


def place_of(anatomy: Anatomy) -> torch.device:
    """Where a model takes its tokens; where embeddings are read when they are needed, where the rest of it is."""
    parts = (anatomy.embeddings, anatomy.causal_lm)
    return next((p.device for part in parts for p in part.parameters() if not p.is_meta), torch.device("cpu"))


def require_full_weights(loaded: LoadedModel, what: str) -> None:
    """Refuse a model whose weights are quantised where they are read or changed themselves.

    Args:
        loaded: The model.
        what: What needs them, as the subject of a sentence ("gradients of weights").

    Raises:
        SettingsError: they are quantised.
    """
    if loaded.quantized is not None:
        raise SettingsError(f"{what} needs the full weights, and {loaded.name} holds them in {loaded.quantized}; load "
                            f"it without {name_of('load_4bit')} and {name_of('load_8bit')}, or one that is not "
                            "quantised.")
