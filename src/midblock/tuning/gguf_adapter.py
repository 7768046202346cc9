"""An adapter as a GGUF file for llama.cpp and Ollama.

The tensors are those that llama.cpp's ``convert_lora_to_gguf.py`` writes: ``blk.N.attn_q.weight.lora_a`` (r, in) and
``.lora_b`` (out, r) in float32. llama.cpp multiplies their product by alpha / r whatever the adapter's own rule was,
with one alpha for the file and r the rank of each matrix; the scale (alpha / r, or alpha / sqrt(r) of rsLoRA) is folded
into B, and alpha is written as the largest r.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import Tensor

from midblock.errors import SettingsError
from midblock.models import LoadedModel
from midblock.models.adapters import AdapterFile
from midblock.settings.base import name_of
from midblock.tuning.plan import Plan
from midblock.writing import atomic_path

__all__ = ["require_gguf", "write_gguf"]

# transformers' model type -> llama.cpp's architecture, and whether it stores q and k with interleaved rotary halves
_ARCHITECTURES = {
    "llama": ("llama", True), "mistral": ("llama", True), "granite": ("granite", True), "smollm3": ("smollm3", True),
    "qwen2": ("qwen2", False), "qwen3": ("qwen3", False), "gemma": ("gemma", False), "gemma2": ("gemma2", False),
    "gemma3_text": ("gemma3", False), "phi3": ("phi3", False), "olmo2": ("olmo2", False),
    "starcoder2": ("starcoder2", False)}


def require_gguf(plan: Plan, model: LoadedModel) -> None:
    """Stop before training where the adapter cannot be written as GGUF.

    Raises:
        SettingsError: DoRA, a full-rank update, stacked experts, or a family that llama.cpp names in another way.
    """
    kind = model.anatomy.causal_lm.config.get_text_config(decoder=True).model_type
    if plan.method != "lora" or any(m.experts for m in plan.modules):
        what = plan.method if plan.method != "lora" else "stacked experts"
        raise SettingsError(f"{name_of('gguf')} writes LoRA of linear layers, and this plan has {what}; merge instead "
                            f"({name_of('merge')}) and convert the model.")
    if kind not in _ARCHITECTURES:
        raise SettingsError(f"{name_of('gguf')} knows the tensor names of {', '.join(_ARCHITECTURES)}, and this model "
                            f"is {kind!r}; merge instead ({name_of('merge')}) and convert the model with llama.cpp.")
    names = _tensor_names(kind, plan.num_blocks)
    if unknown := [m.name for m in plan.modules if names.get_name(_plain(m.name), try_suffixes=(".weight",)) is None]:
        raise SettingsError(f"{name_of('gguf')}: llama.cpp has no tensor for {unknown[0]}; leave it out of the target "
                            "modules.")


def write_gguf(adapter: Path, model: LoadedModel, path: Path, *, base: str) -> Path:
    """Write an exported adapter as GGUF, and beside it a ``Modelfile`` for Ollama.

    Args:
        adapter: Folder of the PEFT adapter.
        model: Its base.
        path: The GGUF file.
        base: What the Modelfile builds on: a GGUF file, a folder or a name.

    Returns:
        ``path``.
    """
    import gguf

    config: Any = model.anatomy.causal_lm.config.get_text_config(decoder=True)
    architecture, interleaved = _ARCHITECTURES[config.model_type]
    names = _tensor_names(config.model_type, model.anatomy.num_blocks)
    file = AdapterFile(adapter)
    heads = {"q_proj": config.num_attention_heads,
             "k_proj": getattr(config, "num_key_value_heads", None) or config.num_attention_heads}
    changes = {weight: factors for weight in sorted(file.adapted()) if (factors := file.factors(weight)) is not None}
    alpha = max(down.shape[0] for _, down in changes.values())
    with atomic_path(path) as temporary:
        writer = gguf.GGUFWriter(temporary, architecture)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_string(gguf.Keys.General.NAME, f"{model.name} adapter")
        for weight, (up, down) in changes.items():  # DoRA and experts were refused
            up = up * (down.shape[0] / alpha)
            leaf = weight.removesuffix(".weight").rpartition(".")[2]
            if interleaved and leaf in heads:
                up = _interleaved(up, heads[leaf])
            name = names.get_name(_plain(weight), try_suffixes=(".weight",))
            writer.add_tensor(f"{name}.lora_a", down.contiguous().numpy())
            writer.add_tensor(f"{name}.lora_b", up.contiguous().numpy())
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(alpha))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    with atomic_path(path.with_name("Modelfile")) as temporary:
        temporary.write_text(f"# ollama create NAME -f Modelfile\nFROM {base}\nADAPTER ./{path.name}\n",
                             encoding="utf-8")
    return path


def _plain(name: str) -> str:
    """A module's or weight's name with ``.weight`` and without the prefix of a model of several towers."""
    return re.sub(r"^(?:model\.)?language_model\.(?:model\.)?", "model.", name.removesuffix(".weight")) + ".weight"


def _tensor_names(model_type: str, num_blocks: int) -> Any:
    import gguf

    wanted = _ARCHITECTURES[model_type][0]
    architecture = next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == wanted)
    return gguf.get_tensor_name_map(architecture, num_blocks)


def _interleaved(rows: Tensor, heads: int) -> Tensor:
    """Rows (heads * width, r) of q or k in llama.cpp's order: of each head, its two rotary halves interleaved."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, -1).transpose(1, 2).reshape(rows.shape)
