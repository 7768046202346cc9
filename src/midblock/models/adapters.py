"""PEFT adapters: the change that a LoRA makes to a weight, read from its file or from a layer that carries it.

The change of W is ``scale * B @ A`` (scale = alpha / r, or alpha / sqrt(r) for rsLoRA), DoRA's
``m * (W + scale * B @ A) / norm - W``, and for a module saved in full the difference. This is the only place for it.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from midblock.errors import AdapterError, ModelNotFoundError
from midblock.models.checkpoints import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    Checkpoint,
    fingerprint,
    is_adapter_folder,
)
from midblock.models.quiet import first_line, foreign, quiet
from midblock.models.resolve import resolve_checkpoint
from midblock.models.validation import read_adapter_config

__all__ = ["VLLM_RANKS", "AdapterFile", "StoredExpert", "base_of_adapter", "base_weight", "layer_factors",
           "merged_weight", "other_base", "stored_experts", "with_adapter"]

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Values that vLLM's ``--max-lora-rank`` takes."""


@dataclass(frozen=True)
class StoredExpert:
    """Where a matrix that a checkpoint stores for one expert stands in the stack that transformers makes of them.

    Attributes:
        stack: Name of the stack.
        expert: Which expert.
        experts: How many there are.
        part: Which of the matrices that lie above each other in one expert (gate, then up).
        parts: How many those are.
    """

    stack: str
    expert: int
    experts: int
    part: int
    parts: int


def stored_experts(config: Mapping[str, Any], names: Iterable[str]) -> dict[str, StoredExpert]:
    """Which stored weights are matrices of single experts, by transformers' own conversion of the family.

    Args:
        config: The checkpoint's config.
        names: Names of its weights.
    """
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    entries = get_checkpoint_conversion_mapping(str(config.get("model_type"))) or []
    converters = [e for e in entries if isinstance(e, WeightConverter)]
    renamings = [e for e in entries if isinstance(e, WeightRenaming)]
    found: dict[str, tuple[str, int, int, int]] = {}
    count: dict[str, int] = {}
    for name in names:
        stack, pattern = rename_source_key(name, renamings, converters)
        number = re.search(r"\.experts\.(\d+)\.", name)
        sources = next((c.source_patterns for c in converters if pattern in c.source_patterns), None)
        if number is None or sources is None or pattern is None:
            continue
        found[name] = (stack, int(number[1]), sources.index(pattern), len(sources))
        count[stack] = max(count.get(stack, 0), int(number[1]) + 1)
    return {name: StoredExpert(stack, expert, count[stack], part, parts)
            for name, (stack, expert, part, parts) in found.items()}


class AdapterFile(Checkpoint):
    """A PEFT adapter on disk: LoRA (rsLoRA, DoRA) on layers, embeddings and stacked experts, rows of single tokens,
    modules saved in full."""

    def __init__(self, folder: Path | str) -> None:
        super().__init__(folder)
        self._parts: dict[str, dict[str, str]] = {}  # base weight -> part -> name of the tensor
        experts: dict[str, dict[int, dict[str, str]]] = {}
        for name in self._entries:
            base, part = _adapter_key(name)
            owner = re.match(r"(.*?)((?:\.base_layer)*)\.weight$", base)
            if part in ("A", "B") and owner and self._targets(owner[1]):
                experts.setdefault(owner[1], {}).setdefault(owner[2].count("base_layer"), {})[f"experts_{part}"] = name
            elif part not in ("bias", "original"):
                self._parts.setdefault(base.replace(".base_layer.", "."), {}).setdefault(part, name)
        for module, levels in experts.items():
            # PEFT wraps the parameters of one module in their order: the last one outermost
            for level, leaf in zip(sorted(levels, reverse=True), self._targets(module), strict=False):
                self._parts[f"{module}.{leaf}"] = levels[level]

    def _targets(self, module: str) -> list[str]:
        """Parameters of a module that ``target_parameters`` names, in the order in which models declare them."""
        found = [leaf for path, _, leaf in (t.rpartition(".") for t in self.config.get("target_parameters") or ())
                 if module == path or module.endswith(f".{path}")]
        return sorted(found, key=lambda leaf: "down" in leaf or "w2" in leaf)

    def adapted(self) -> list[str]:
        """Names of the base model's weights that this adapter changes."""
        return list(self._parts)

    @property
    def stacked_experts(self) -> set[str]:
        """Adapted weights that are stacks of experts (PEFT's ``target_parameters``)."""
        return {name for name, parts in self._parts.items() if "experts_A" in parts}

    def replacement(self, name: str) -> str | None:
        """Name of the tensor that stands in place of a base weight as a whole; None where there is none."""
        parts = self._parts.get(name, {})
        return parts.get("saved") or parts.get("full")

    def rows_of(self, names: Iterable[str]) -> int | None:
        """Rows that replaced weights (embeddings, head) have here, where the vocabulary was resized."""
        found = [self.shape(full)[0] for n in names if (full := self.replacement(n)) is not None]
        return max(found, default=None)

    def delta(self, name: str, base: Tensor | None = None) -> Tensor:
        """What the adapter adds to one weight, in float32 and in the weight's own layout.

        Args:
            name: Name of a base weight, such as ``model.layers.0.self_attn.q_proj.weight``.
            base: That weight; needed for DoRA, experts, tokens and modules saved in full.

        Raises:
            AdapterError: no LoRA adapter, a weight that it does not change, a missing ``base``, or experts whose
                layout (out, in) or (in, out) a square shape does not tell.
        """
        if not self.is_adapter or self.config.get("peft_type", "LORA") != "LORA":
            raise AdapterError(f"{self.folder} is not a LoRA adapter "
                               f"(peft_type {self.config.get('peft_type')!r}).")
        parts = self._parts_of(name)
        thin = self.factors(name)
        if thin is not None and self.replacement(name) is None:
            return thin[0] @ thin[1]
        if base is None:
            raise AdapterError(f"{self.folder}: the change of {name} needs the base weight ({', '.join(parts)}).")
        base = base.float()
        change = torch.zeros_like(base)
        if (full := self.replacement(name)) is not None:
            change += self.read(full).float() - base
        if "tokens" in parts:
            rows = torch.tensor(self._token_indices(name))
            change[rows] = self.read(parts["tokens"]).float() - base[rows]
        if thin is not None:
            return change + thin[0] @ thin[1]
        if "experts_A" in parts:
            change += self._experts(name, parts, base)
        if "magnitude" in parts:
            left, right = self._product(name, parts)
            moved = base + left @ right
            axis = 0 if self.config.get("fan_in_fan_out") else 1
            magnitude = self.read(parts["magnitude"]).float().reshape(-1)
            factor: Tensor = magnitude / torch.linalg.vector_norm(moved, dim=axis)
            change += moved * factor.unsqueeze(axis) - base
        return change

    def factors(self, name: str) -> tuple[Tensor, Tensor] | None:
        """Two thin float32 matrices whose product is `delta`, where the change is of low rank.

        A weight that PEFT saved in full beside its factors (adapted embeddings) has its own change
        on top of the product.

        Args:
            name: Name of a base weight.

        Returns:
            ``(left (m, r), right (r, n))`` with left @ right = the change in the weight's own
            layout, scaling included; None for DoRA, experts, tokens and modules saved in full.

        Raises:
            AdapterError: a weight that the adapter does not change, or LoRA biases.
        """
        parts = self._parts_of(name)
        if {"magnitude", "tokens"} & set(parts) or not {"A", "embedding_A"} & set(parts):
            return None
        return self._product(name, parts)

    def _parts_of(self, name: str) -> dict[str, str]:
        if not self._parts.get(name):
            raise AdapterError(f"{self.folder} does not change {name}; it changes "
                               f"{', '.join(self.adapted()[:3])} ...")
        return self._parts[name]

    def _product(self, name: str, parts: dict[str, str]) -> tuple[Tensor, Tensor]:
        if self.config.get("lora_bias"):
            raise AdapterError(f"{self.folder} has LoRA biases, which have no part in a weight's change.")
        embedding = "embedding_A" in parts
        a = self.read(parts["embedding_A" if embedding else "A"]).float()
        b = self.read(parts["embedding_B" if embedding else "B"]).float()
        b = b * self._scaling(name.removesuffix(".weight"), a.shape[0])
        transposed = embedding or bool(self.config.get("fan_in_fan_out"))
        return (a.T, b.T) if transposed else (b, a)

    def _experts(self, name: str, parts: dict[str, str], base: Tensor) -> Tensor:
        """Change of a stack of experts (E, out, in) or (E, in, out), as PEFT's ``target_parameters`` stores it."""
        experts = base.shape[0]
        a, b = (self.read(parts[f"experts_{part}"]).float() for part in "AB")
        rank, width, out = a.shape[0] // experts, a.shape[1], b.shape[0]
        shape = tuple(base.shape[1:])
        if shape not in ((out, width), (width, out)):
            raise AdapterError(f"{self.folder}: its change of {name} is of shape ({out}, {width}), that weight's "
                               f"experts are of {shape}; it was trained on another model.")
        if out == width:
            raise AdapterError(f"{self.folder}: the experts of {name} are square, so that their layout cannot be told; "
                               "merge the adapter, then compare the merged checkpoint.")
        change = torch.einsum("ore,eri->eoi", b.reshape(out, rank, experts), a.reshape(experts, rank, width))
        change = change * self._scaling(name, rank)
        return change if shape == (out, width) else change.mT

    def expert_delta(self, one: StoredExpert) -> Tensor:
        """Change of one expert's matrix (out, in) in float32, of a stack that the base's files store one by one."""
        parts = self._parts_of(one.stack)
        a, b = (self.read(parts[f"experts_{part}"]).float() for part in "AB")
        rank = a.shape[0] // one.experts
        up = b.reshape(b.shape[0], rank, one.experts)[:, :, one.expert]
        down = a.reshape(one.experts, rank, a.shape[1])[one.expert]
        change = (up @ down) * self._scaling(one.stack, rank)
        return change.chunk(one.parts)[one.part]

    def _token_indices(self, name: str) -> list[int]:
        chosen = self.config.get("trainable_token_indices")
        if isinstance(chosen, dict):
            module = name.removesuffix(".weight")
            chosen = next((v for k, v in chosen.items() if module == k or module.endswith(f".{k}")), [])
        return [int(i) for i in chosen or ()]

    def _scaling(self, module: str, rank: int) -> float:
        alpha = float(self.config.get("lora_alpha", 8))
        for pattern, value in (self.config.get("alpha_pattern") or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):  # PEFT's own rule; the first match counts
                alpha = float(value)
                break
        return alpha / (rank**0.5 if self.config.get("use_rslora") else rank)


def _adapter_key(name: str) -> tuple[str, str]:
    """Base weight (with PEFT's ``base_layer``) and role of a tensor in an adapter file."""
    name = name.removeprefix("base_model.model.")
    for marker, part in (("lora_A.weight", "A"), ("lora_B.weight", "B"), ("lora_B.bias", "bias"),
                         ("lora_embedding_A", "embedding_A"), ("lora_embedding_B", "embedding_B"),
                         ("lora_magnitude_vector.weight", "magnitude"),
                         ("lora_magnitude_vector", "magnitude"),
                         ("token_adapter.trainable_tokens_delta", "tokens")):
        if name.endswith(f".{marker}"):
            return name.removesuffix(f".{marker}") + ".weight", part
    for wrapper, part in ((".modules_to_save.", "saved"), (".original_module.", "original")):
        if wrapper in name:
            return name.replace(wrapper, "."), part
    return name, "full"


def base_weight(layer: Any) -> Tensor:
    """Weight under a PEFT layer in float32; a quantised one is what its products compute with."""
    # a layer around stacked experts holds a parameter of a module, not a module with a weight
    weight: Tensor = layer.get_param() if hasattr(layer, "parameter_name") else layer.base_layer.weight
    if weight.dtype == torch.int8 and hasattr(weight, "SCB"):  # PEFT's own way leaves the layer without its scales
        scale = weight.SCB if weight.SCB is not None else layer.base_layer.state.SCB
        whole: Tensor = weight.detach().float() * (scale.float() / 127)[:, None]
        return whole
    if not weight.is_floating_point():
        from peft.utils.integrations import dequantize_module_weight

        weight = dequantize_module_weight(layer.base_layer)
    return weight.detach().float()


def merged_weight(layer: Any) -> Tensor:
    """Weight of a PEFT LoRA or DoRA layer with its adapter, in float32 and in the base's layout."""
    name = layer.active_adapters[0]
    weight = base_weight(layer)
    delta: Tensor = layer.get_delta_weight(name).detach().float()
    if name not in layer.lora_variant:
        return weight + delta
    # DoRA: magnitude times the direction of W + B A, rows being outputs
    magnitude = layer.lora_magnitude_vector[name].weight.detach().float()
    total = weight + delta
    rows = total.t() if layer.fan_in_fan_out else total
    scaled: Tensor = rows * (magnitude / rows.norm(dim=1))[:, None]
    return scaled.t() if layer.fan_in_fan_out else scaled


def layer_factors(layer: Any) -> tuple[Tensor, Tensor]:
    """A (r, in), and B (out, r) times the scale, of a PEFT layer with one active plain LoRA; detached.

    Raises:
        AdapterError: no plain LoRA, or several at once.
    """
    names = [n for n in layer.active_adapters if n in layer.lora_A]
    if len(names) != 1 or names[0] in layer.lora_variant:
        raise AdapterError(f"one plain LoRA adapter was expected on a layer, found {len(names)} active"
                           f"{' (' + ', '.join(names) + ')' if names else ''}.")
    name = names[0]
    return layer.lora_A[name].weight.detach(), (layer.lora_B[name].weight * layer.scaling[name]).detach()


def base_of_adapter(folder: Path, *, allow_pickle: bool, trust_remote_code: bool, weights: bool = True) -> Path:
    """Folder of the base model that an adapter's config names.

    Raises:
        AdapterError: it names none, or another adapter.
        ModelNotFoundError: what it names is not to be had.
    """
    base = _recorded_base(folder)
    if not base:
        raise AdapterError(f"{folder}: its adapter_config.json names no base model; give the base as MODEL "
                           "and this folder as the adapter.")
    beside = folder / base  # a path may be relative to the adapter
    try:
        found = resolve_checkpoint(beside if beside.is_dir() else base, allow_pickle=allow_pickle,
                                   trust_remote_code=trust_remote_code, weights=weights)
    except ModelNotFoundError as error:
        raise ModelNotFoundError(f"base model of the adapter {folder}: {error}") from error
    if is_adapter_folder(found):
        raise AdapterError(f"{folder}: its base model {base!r} is an adapter too; merge that one first.")
    return found


def _recorded_base(folder: Path) -> str | None:
    return read_adapter_config(folder / ADAPTER_CONFIG).get("base_model_name_or_path") or None


def other_base(adapter: Path, spec: str, base: Path) -> str | None:
    """A warning where an adapter records another base model than the one that it is put on; else None.

    The same is a folder of the same content, or an equal last part of the name (a hub id and its local copy).
    """
    recorded = _recorded_base(adapter)
    if recorded is None:
        return None
    ours = {Path(spec).name.lower(), base.name.lower()}
    if Path(recorded).name.lower() in ours:
        return None
    for place in (adapter / recorded, Path(recorded).expanduser()):
        if place.is_dir() and (place.resolve() == base.resolve() or fingerprint(place) == fingerprint(base)):
            return None
    return (f"the adapter records {recorded!r} as its base model and is put on {spec!r}; where that is another model, "
            "what is measured means nothing")


def with_adapter(model: Any, folder: Path, merge: bool) -> Any:
    """A model with a PEFT adapter on it, merged or as a ``PeftModel``.

    Embeddings and head are resized first where the adapter was trained with a larger or smaller vocabulary.

    Raises:
        AdapterError: the adapter does not belong to the model.
    """
    from peft import PeftModel

    if (folder / ADAPTER_WEIGHTS).is_file() and is_adapter_folder(folder):
        adapter = AdapterFile(folder)
        _resize(model, adapter)
        _check_adapter_fits(model, adapter)
    with foreign(lambda error: AdapterError(
            f"adapter {folder} does not go onto this model ({type(error).__name__}): {first_line(error)}")):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            wrapped = PeftModel.from_pretrained(model, str(folder))
        if lost := [str(w.message) for w in caught if "missing adapter keys" in str(w.message)]:
            raise AdapterError(f"adapter {folder}: {first_line(ValueError(lost[0]))}")
        if merge:
            _untie(wrapped)
        return wrapped.merge_and_unload() if merge else wrapped


def _untie(model: Any) -> None:
    """Give every adapted layer whose weight another layer shares (a tied head, Zamba's blocks) a weight of its own.

    An unmerged adapter changes its layer alone; merged into a shared weight it would change the others too.
    """
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    for module in model.modules():
        if hasattr(module, "lora_A") and module.lora_A and isinstance(getattr(module, "base_layer", None), nn.Module):
            for name, parameter in list(module.base_layer._parameters.items()):
                if parameter is not None and owners[id(parameter)] > 1:
                    owners[id(parameter)] -= 1
                    setattr(module.base_layer, name, nn.Parameter(parameter.detach().clone(),
                                                                  requires_grad=parameter.requires_grad))


def _resize(model: Any, adapter: AdapterFile) -> None:
    """Give embeddings and head as many rows as the adapter saved of them."""
    tables = {id(m): m for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m is not None}
    names = [f"{path}.weight" for path, module in model.named_modules() if id(module) in tables]
    rows = adapter.rows_of(names)
    if rows is not None and rows != model.get_input_embeddings().weight.shape[0]:
        with quiet():
            model.resize_token_embeddings(rows, mean_resizing=False)


def _check_adapter_fits(model: nn.Module, adapter: AdapterFile) -> None:
    if adapter.config.get("peft_type", "LORA") != "LORA":
        return  # PEFT checks its other methods itself
    parameters = dict(model.named_parameters(remove_duplicate=False))
    if unknown := [n for n in adapter.adapted() if n not in parameters]:
        raise AdapterError(
            f"adapter {adapter.folder} changes {len(unknown)} weights that the base model does not have "
            f"({', '.join(unknown[:3])}); it was trained on another model "
            f"({adapter.config.get('base_model_name_or_path') or 'not named'}).")
    transposed = bool(adapter.config.get("fan_in_fan_out"))
    for name in adapter.names():
        base, part = _adapter_key(name)
        if part not in ("A", "B") or base not in parameters:
            continue
        rows, columns = parameters[base].shape[-2:]
        out_in = (columns, rows) if transposed else (rows, columns)
        asked = out_in[1] if part == "A" else out_in[0]
        found = adapter.shape(name)[1 if part == "A" else 0]
        if asked != found and parameters[base].is_floating_point():
            raise AdapterError(f"adapter {adapter.folder}: {name} has the size {found} where {base} of "
                               f"the base model has {asked}; it was trained on another model.")
