"""transformers' loader of weights, for some of a model's weights at a time."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from midblock.errors import CheckpointError, MidblockError, SettingsError
from midblock.models.checkpoints import Checkpoint
from midblock.models.finite import require_finite
from midblock.models.quiet import first_line

__all__ = ["Found", "Loader", "QuantisedStates", "Stored"]


@dataclass
class Found:
    """What a checkpoint's names say before anything is read."""

    missing_keys: set[str] = field(default_factory=set)
    unexpected_keys: set[str] = field(default_factory=set)
    mismatched_keys: set[tuple[str, tuple[int, ...], tuple[int, ...]]] = field(default_factory=set)


class Stored:
    """A tensor that is read when transformers' loader slices it.

    Args:
        checkpoint: Where it is.
        name: Its name there.
        where: Refuse NaN and infinity in what is stored, of a model of this name.
    """

    def __init__(self, checkpoint: Checkpoint, name: str, where: str | None) -> None:
        self._checkpoint, self._name, self._where = checkpoint, name, where
        self.error: MidblockError | None = None

    def get_dtype(self) -> str:
        """The stored dtype in the words of safetensors."""
        return self._checkpoint.stored_dtype(self._name)

    def __getitem__(self, _: Any) -> Tensor:
        try:
            found = self._checkpoint.load(self._name)
            if self._where is not None:
                require_finite([(self._name, found)], self._where)
            return found
        except MidblockError as error:  # the loader would make it one of its own
            self.error = error
            raise


class QuantisedStates:
    """What bitsandbytes keeps of a weight on its layer, beside the parameter; it would hold on to a dropped one."""

    def __init__(self, model: nn.Module) -> None:
        self._kept = {module: copy.copy(module.state) for module in model.modules()
                      if type(module).__name__ == "Linear8bitLt"}

    def forget(self, module: nn.Module) -> None:
        """Let a layer be as it was before its weight was read."""
        if getattr(module, "quant_state", None) is not None:
            module.quant_state = None  # type: ignore[assignment]
        if module in self._kept:
            module.state = copy.copy(self._kept[module])


class Loader:
    """transformers' loader of weights, for some of a model's weights at a time.

    Raises:
        SettingsError: this version of transformers has another one.
    """

    def __init__(self, model: Any, dtype: torch.dtype, device: torch.device, quantiser: Any) -> None:
        self._quantiser = quantiser
        self.turns_back = quantiser is not None and bool(getattr(quantiser.quantization_config, "dequantize", False))
        self.quantised = quantiser is not None and not self.turns_back
        self.dtype = dtype
        self.keeps_float32 = bool(model._get_dtype_plan(dtype))
        try:
            from transformers import core_model_loading
            from transformers.conversion_mapping import get_model_conversion_mapping
            from transformers.modeling_utils import LoadStateDictConfig

            self._load = core_model_loading.convert_and_load_state_dict_in_model
            self._rename = core_model_loading.rename_source_key
            mapping: Any = get_model_conversion_mapping(model, None, quantiser)
            self._renamings = [m for m in mapping if isinstance(m, core_model_loading.WeightRenaming)]
            self._converters = [m for m in mapping if isinstance(m, core_model_loading.WeightConverter)]
            self._config = LoadStateDictConfig(device_map={"": device}, dtype=dtype, weight_mapping=mapping,
                                               dtype_plan=model._get_dtype_plan(dtype), hf_quantizer=quantiser)
        except (ImportError, AttributeError, TypeError) as error:
            raise _other_version(error) from error
        self._model = model

    def targets(self, key: str, own: dict[str, Any]) -> tuple[list[str], bool]:
        """Names in the model that a stored tensor goes to, and whether it is converted on the way."""
        prefix = self._model.base_model_prefix
        name, pattern = self._rename(key, self._renamings, self._converters, prefix, own)
        if name not in own and key in own:
            name, pattern = self._rename(key, [], [], prefix, own)
        if pattern is None:
            return [name], False
        converter = next(c for c in self._converters if pattern in c.source_patterns)
        return [name.replace(converter.target_patterns[0], other) for other in converter.target_patterns], True

    def passes(self, name: str, targets: Sequence[str]) -> bool:
        """Whether a converter leaves a tensor as it is: a quantiser's own, for what it does not quantise."""
        return self._quantiser is not None and len(targets) == 1 and not self.quantises(name)

    def quantises(self, name: str) -> bool:
        """Whether a parameter of the model is held quantised."""
        return self.quantised and bool(self._quantiser.param_needs_quantization(self._model, name))

    def bytes_of(self, name: str, parameter: Tensor) -> int:
        """Bytes that a parameter takes once it is there."""
        size = self._quantiser.quantized_element_size if self.quantises(name) else parameter.itemsize
        return int(parameter.numel() * size)

    def converts(self, keys: Iterable[str]) -> bool:
        """Whether stored tensors are made into others on their way, so that both are there for a while."""
        own = self._model.state_dict()
        return self._quantiser is not None or any(self.targets(key, own)[1] for key in keys)

    def forget_ignored(self, found: Found) -> None:
        """Drop what the family says may be missing or too many."""
        self._model._adjust_missing_and_unexpected_keys(found)

    def fill(self, stored: dict[str, Stored], spec: str) -> None:
        """Put tensors into the model.

        Raises:
            CheckpointError: they cannot be read, or do not fit.
        """
        try:
            info, _ = self._load(self._model, stored, self._config)
        except TypeError as error:
            raise _other_version(error) from error
        finally:
            for tensor in stored.values():
                if tensor.error is not None:
                    raise tensor.error
        if info.mismatched_keys:
            name, was, asked = next(iter(info.mismatched_keys))
            raise CheckpointError(f"model {spec!r}: {name} is {tuple(was)}, the config asks for {tuple(asked)}.")
        if info.conversion_errors:
            name, told = next(iter(info.conversion_errors.items()))
            raise CheckpointError(f"model {spec!r}: {name} cannot be made of what is stored "
                                  f"({str(told).strip().splitlines()[-1][:200]}).")


def _other_version(error: Exception) -> SettingsError:
    import transformers

    return SettingsError(f"reading a model block by block does not work with transformers {transformers.__version__} "
                         f"({first_line(error)}); install a newer one, or load the model whole with stream never.")
