"""What is left after training: a PEFT adapter, a merged checkpoint, a model card."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import EvalResult, ModelCardData
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from midblock.errors import AdapterError
from midblock.models import LoadedModel, merged_weight, save_checkpoint
from midblock.models.adapters import VLLM_RANKS
from midblock.models.quiet import quiet
from midblock.reading import printable, read_json
from midblock.results import Estimate
from midblock.segments import format_blocks
from midblock.tuning.adapter import Attachment, adapted_layer
from midblock.tuning.peft_config import target_names, whole
from midblock.tuning.plan import Plan
from midblock.writing import atomic_folder, atomic_path, write_json

__all__ = ["PLAN_FILE", "VLLM_RANKS", "export_adapter", "merged_weights", "model_card", "pad_adapter", "save_merged",
           "vllm_note", "with_weights"]

PLAN_FILE = "midblock_plan.json"
"""Says what was trained, beside what `tune` exported."""


def vllm_note(plan: Plan, written_rank: int | None = None, *, padded: bool = False) -> str | None:
    """What a vLLM user must know about this adapter; None for full-rank updates.

    Args:
        plan: What was trained.
        written_rank: The rank that was written, where it is not the plan's (`Attachment.written_rank`).
        padded: Whether all matrices were written at it (`pad_adapter`).
    """
    rank = written_rank or plan.largest_rank
    if rank is None:
        return None
    if plan.method == "dora":
        return "vLLM serves no DoRA adapter: serve the merged model (--merge)"
    if any(m.experts for m in plan.modules):
        return "adapters of stacked experts are read by PEFT; for vLLM serve the merged model (--merge)"
    fitting = next((r for r in VLLM_RANKS if r >= rank), None)
    if fitting is None:
        return f"rank {rank} is above vLLM's largest ({VLLM_RANKS[-1]}): serve the merged model (--merge)"
    if plan.own_ranks and not padded:
        return (f"matrices have ranks of their own (PEFT's rank_pattern), and vLLM reads one: --pad-rank writes all of "
                f"them at {fitting}")
    return f"vLLM: --enable-lora --max-lora-rank {fitting}" + (
        "" if fitting == rank else f" (rank {rank}; --pad-rank writes it as {fitting})")


def export_adapter(attachment: Attachment, folder: Path | str, *, base_name: str, card: str | None = None,
                   rank: int | None = None, finish: Callable[[Path], object] | None = None) -> Path:
    """Write the adapter folder that ``peft.PeftModel.from_pretrained`` accepts; whole or not at all.

    Args:
        attachment: A LoRA or DoRA attachment.
        folder: Absent or empty.
        base_name: Base model as users write it: hub id, absolute folder, ``smollm2``.
        card: Text of ``README.md``.
        rank: Write it at this higher rank (`pad_adapter`).
        finish: Called with the folder as written so far, before it appears.

    Raises:
        AdapterError: a full-rank update is no adapter, or this one cannot be padded.
        OutputError: the folder is not empty or cannot be written.
    """
    folder = Path(folder)
    if not attachment.is_peft:
        raise AdapterError("a full-rank update is no PEFT adapter; write the merged checkpoint instead.")
    with atomic_folder(folder) as temporary:
        with quiet():
            attachment.model.save_pretrained(temporary, save_embedding_layers=False)  # type: ignore[operator]
        config = json.loads((temporary / "adapter_config.json").read_text(encoding="utf-8"))
        config["base_model_name_or_path"] = base_name
        # how the factors began is of no use to whoever loads them, and PEFT would begin them so again
        config.update({"init_lora_weights": True, "eva_config": None, "corda_config": None, "lora_ga_config": None})
        if attachment.starts_from_weights:
            save_file(attachment.plain_state(), temporary / "adapter_model.safetensors", metadata={"format": "pt"})
            factor = 2**0.5 if config.get("use_rslora") else 2
            config["r"] *= 2
            config["lora_alpha"] = whole(factor * config["lora_alpha"])
            config["rank_pattern"] = {n: 2 * r for n, r in config["rank_pattern"].items()}
            config["alpha_pattern"] = {n: whole(factor * a) for n, a in config["alpha_pattern"].items()}
        if config.get("layers_to_transform") is None:  # PEFT shortens long lists to the ends of names
            config["target_modules"] = target_names(attachment.plan)
        write_json(temporary / "adapter_config.json", config)
        attachment.plan.save(temporary / PLAN_FILE)
        if card is not None:
            _write_card(temporary, card, attachment.plan)
        if rank is not None:
            pad_adapter(temporary, rank)
        if finish is not None:
            finish(temporary)
    return folder


def pad_adapter(folder: Path | str, rank: int) -> None:
    """Rewrite a LoRA adapter folder at a higher rank with the same function.

    A gets rows of zeros and B columns of zeros; alpha is set so that the scaling stays what it was. Where matrices have
    ranks of their own, all get this one; a scaling that differs between them goes into B.

    Raises:
        AdapterError: the rank is below the adapter's, or the adapter is DoRA or of experts.
    """
    folder = Path(folder)
    config = read_json(folder / "adapter_config.json", error=AdapterError)
    state = load_file(folder / "adapter_model.safetensors")
    old = max(t.shape[0] for n, t in state.items() if ".lora_A." in n)
    if config.get("use_dora") or config.get("target_parameters") or rank < old:
        raise AdapterError(f"{folder}: an adapter of rank {old} {'with DoRA or experts ' * (rank >= old)}cannot be "
                           f"written at rank {rank}.")
    ratio = rank / int(config["r"])
    alpha = config["lora_alpha"] * (ratio ** 0.5 if config.get("use_rslora") else ratio)
    alphas: dict[str, float] = config.get("alpha_pattern") or {}

    def scaling(alpha: float, r: int) -> float:
        return alpha / (r ** 0.5 if config.get("use_rslora") else r)

    padded = {}
    for name, tensor in state.items():
        if ".lora_A." in name:
            tensor = torch.cat([tensor, tensor.new_zeros(rank - tensor.shape[0], tensor.shape[1])])
        elif ".lora_B." in name:
            module, own = name.partition(".lora_B.")[0].removeprefix("base_model.model."), tensor.shape[1]
            factor = scaling(alphas.get(module, config["lora_alpha"]), own) / scaling(alpha, rank)
            tensor = torch.cat([tensor * factor, tensor.new_zeros(tensor.shape[0], rank - own)], dim=1)
        padded[name] = tensor.contiguous()
    config.update({"r": rank, "lora_alpha": whole(alpha), "rank_pattern": {}, "alpha_pattern": {}})
    with atomic_path(folder / "adapter_model.safetensors") as temporary:
        save_file(padded, temporary, metadata={"format": "pt"})
    write_json(folder / "adapter_config.json", config)


# ---------------------------------------------------------------------------------------------
# merged weights


def merged_weights(attachment: Attachment) -> dict[str, Tensor]:
    """The trained weights by parameter name of the plain model, in the base's dtype."""
    if not attachment.is_peft:
        return {n: p.detach().to(attachment._original[n].dtype, copy=True) for n, p in attachment.trainable.items()}
    found = {}
    for module in attachment.plan.modules:
        layer = adapted_layer(attachment.base, module)
        weight = layer.get_param() if module.experts else layer.base_layer.weight
        if not weight.is_floating_point():
            raise AdapterError(f"{module.name} is quantised ({weight.dtype}), so the adapter cannot be merged into "
                               "it; load the base in 16 bit, or serve base and adapter.")
        found[module.parameter] = merged_weight(layer).to(weight.dtype)
    return found


@contextlib.contextmanager
def with_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[nn.Module]:
    """Within the context some parameters of a plain model have other values."""
    before = {n: model.get_parameter(n).data for n in weights}
    try:
        for name, value in weights.items():
            model.get_parameter(name).data = value.to(before[name].device)
        yield model
    finally:
        for name, value in before.items():
            model.get_parameter(name).data = value


def save_merged(base: LoadedModel, weights: Mapping[str, Tensor], folder: Path | str, *,
                card: str | None = None, plan: Plan | None = None,
                finish: Callable[[Path], object] | None = None) -> Path:
    """Write base + update as a plain checkpoint (after the attachment is off the model); whole or not at all."""
    def add(made: Path) -> None:
        if plan is not None:
            plan.save(made / PLAN_FILE)
        if card is not None and plan is not None:
            _write_card(made, card, plan)
        if finish is not None:
            finish(made)

    with with_weights(base.model, weights):
        return save_checkpoint(base.model, base.tokenizer, folder, finish=add)


# ---------------------------------------------------------------------------------------------
# model card


_PICTURE = "depth.svg"


def _write_card(folder: Path, card: str, plan: Plan) -> None:
    (folder / "README.md").write_text(card, encoding="utf-8")
    (folder / _PICTURE).write_text(depth_picture(plan), encoding="utf-8")


def depth_picture(plan: Plan) -> str:
    """The blocks from input (left) to output as an SVG picture, the trained ones filled."""
    step, height = 16, 26
    width = step * plan.num_blocks
    blocks = "".join(f'<rect x="{step * b + 1}" y="1" width="{step - 2}" height="{height - 2}" rx="2" '
                     f'fill="{"#0072B2" if b in plan.blocks else "#e4e4e4"}"/>' for b in range(plan.num_blocks))
    return (f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height + 16}" role="img" '
            f'font-family="sans-serif" font-size="10" fill="#6e6e6e">{blocks}'
            f'<text x="1" y="{height + 12}">block 0</text>'
            f'<text x="{width - 1}" y="{height + 12}" text-anchor="end">{plan.num_blocks - 1}</text></svg>\n')


def model_card(plan: Plan, *, base_name: str, data: str, training: Mapping[str, Any], check: str,
               held_out: Mapping[str, Estimate] | None = None, merged: bool = False,
               written_rank: int | None = None, padded: bool = False) -> str:
    """Text of a ``README.md``: what was trained where, on what, and what was measured.

    Args:
        plan: What was trained.
        base_name: The base as it is found again: a hub id, or a folder.
        data: What it was trained on, in words.
        training: Facts of the training.
        check: What the engagement check found.
        held_out: Mean held-out loss ``base``, ``tuned`` and their ``difference``; also written as results that the
            hub reads.
        merged: Whether the card is of a merged checkpoint.
        written_rank: Rank of the adapter as it is written, where it is not the plan's.
        padded: Whether all matrices are written at it.
    """
    kind = {"lora": "LoRA adapter", "dora": "DoRA adapter", "full": "full-rank update"}[plan.method]
    what = f"Merged checkpoint of {base_name} and a {kind}" if merged else f"{kind} for {base_name}"
    measured: dict[str, Any] = {}
    if held_out:
        measured = {"model_name": what, "eval_results": [EvalResult(
            task_type="text-generation", dataset_type=data, dataset_name=data, metric_type="loss",
            metric_name=f"held-out loss, {side} tuning (nats a row)", metric_value=round(found.value, 6))
            for side, found in (("before", held_out["base"]), ("after", held_out["tuned"]))]}
    about = ModelCardData(base_model=base_name, library_name="transformers" if merged else "peft",
                          pipeline_tag="text-generation", tags=["midblock", plan.method], **measured)
    head = ["---", about.to_yaml(), "---", ""]
    rows = "\n".join(f"| {r['block']} | {r['matrices']} | {r['rank']} | {r['parameters']:,} |"
                     for r in plan.table().to_dict("records"))
    usage = ("```python\nfrom transformers import AutoModelForCausalLM\n\n"
             "model = AutoModelForCausalLM.from_pretrained(\"this folder\")\n```"
             if merged or plan.method == "full" else
             "```python\nfrom peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
             f"base = AutoModelForCausalLM.from_pretrained({base_name!r})\n"
             "model = PeftModel.from_pretrained(base, \"this folder\")\n```")
    facts = "\n".join(f"| {k} | {_cell(v)} |" for k, v in training.items())
    body = [
        f"# {what}", "",
        f"Trained blocks {format_blocks(plan.blocks)} of {plan.num_blocks}"
        + (f" (mask `{plan.mask}`)" if plan.mask else "") + ":", "",
        f"![Depth from input to output, the trained blocks filled: {plan.depth_map()}]({_PICTURE})", "",
        plan.summary().split("\n", 1)[1].replace("\n", "  \n"), "",
        "## Use", "", usage, ""]
    if (note := vllm_note(plan, written_rank, padded=padded)) and not merged:
        body += [note + ".", ""]
    body += ["## Training", "", "| | |", "|---|---|", f"| data | {_cell(data)} |", facts, "", check + ".", "",
             "## Trained matrices", "", "| block | matrices | rank | parameters |", "|---|---|---|---|", rows, ""]
    if held_out:
        change = held_out["difference"]
        body += ["## Results", "", f"Held-out loss {held_out['base'].value:.4f} before and "
                 f"{held_out['tuned'].value:.4f} after: {change.value:+.4f}, 95% interval [{change.low:+.4f}, "
                 f"{change.high:+.4f}], {change.n} rows.", ""]
    body += ["Made with midblock."]
    return "\n".join([*head, *body]) + "\n"


def _cell(value: Any) -> str:
    """A value in a cell of a Markdown table."""
    return printable(str(value)).replace("|", "\\|")
