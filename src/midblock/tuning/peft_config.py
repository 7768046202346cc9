"""A plan as a plain `peft.LoraConfig`, proven to adapt the plan's matrices and no other."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, cast

from torch import nn

from midblock.errors import AdapterError, SettingsError
from midblock.extras import require
from midblock.models import Anatomy, LoadedModel
from midblock.settings.tune import PlanSettings
from midblock.tuning.plan import Plan
from midblock.tuning.planning import anatomy_of, make_plan

if TYPE_CHECKING:
    from peft import LoraConfig

__all__ = ["config_of", "lora_config", "target_names", "whole"]


def lora_config(model: nn.Module | Anatomy | LoadedModel, settings: PlanSettings | None = None, *,
                dropout: float = 0.0, task_type: str | None = "CAUSAL_LM", **overrides: Any) -> LoraConfig:
    """The plan as a plain `peft.LoraConfig`, for anyone's own trainer.

    Settings as for `make_plan`. The config is proven on the model with PEFT's own matcher: it adapts exactly the
    modules of the plan (no vision tower, no expert that shares an index with a block). It names leaves and block
    indices where these say it, and every module by its full name elsewhere.

    Example:
        >>> import transformers
        >>> config = transformers.LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8,
        ...     num_hidden_layers=5, num_attention_heads=2)
        >>> made = lora_config(transformers.LlamaForCausalLM(config), mask="01100", rank=4)
        >>> made.layers_to_transform, sorted(made.target_modules), made.r
        ([1, 2], ['k_proj', 'o_proj', 'q_proj', 'v_proj'], 4)
    """
    wanted = PlanSettings.of(settings, overrides)
    if wanted.method == "full":
        raise SettingsError("a full-rank update has no LoraConfig: set requires_grad on the chosen matrices, or "
                            "use midblock.tune(method='full').")
    plan = make_plan(model, wanted)
    whole = model if isinstance(model, nn.Module) else anatomy_of(model).causal_lm
    return config_of(plan, whole, dropout, task_type)


def target_names(plan: Plan) -> list[str]:
    """Full names of the plan's linear layers (PEFT's ``target_modules``)."""
    return [m.name for m in plan.modules if not m.experts]


def config_of(plan: Plan, model: nn.Module | None, dropout: float, task_type: str | None) -> LoraConfig:
    """See `lora_config`; without a model nothing is proven.

    Raises:
        AdapterError: PEFT would adapt other matrices.
        SettingsError: a full-rank plan, or experts with what PEFT cannot do to stacked matrices.
    """
    if plan.method == "full" or plan.rank is None or plan.alpha is None:
        raise SettingsError("a full-rank plan has no LoraConfig.")
    require("peft", "midblock.lora_config")
    from peft import LoraConfig

    alpha, own = whole(plan.alpha), {n: r for n, r in plan.own_ranks.items() if r != plan.rank}
    wanted, stacked = target_names(plan), [m.name for m in plan.modules if m.experts]
    if stacked and (dropout or plan.method == "dora"):
        raise SettingsError(f"{stacked[0]} holds the matrices of all experts in one parameter, which PEFT adapts with "
                            "plain LoRA only: without dropout and DoRA. Leave the experts out of the target modules.")
    common: dict[str, Any] = {
        "r": plan.rank, "lora_alpha": alpha, "lora_dropout": dropout, "bias": "none", "task_type": task_type,
        "use_dora": plan.method == "dora", "use_rslora": plan.scale == "rslora",
        "target_parameters": stacked or None, "rank_pattern": own,
        "alpha_pattern": {n: a for n, r in own.items() if (a := whole(plan.alpha_of(r))) != alpha}}
    # Conv1D (GPT-2) stores (in, out): PEFT must be told
    named = set(wanted)
    if model is not None and any(type(m).__name__ == "Conv1D" for n, m in _named(model) if n in named):
        common["fan_in_fan_out"] = True
    readable = _readable_form(plan)
    if readable is not None and (model is None or _matched(LoraConfig(**common, **readable), model) == named):
        return LoraConfig(**common, **readable)
    config = LoraConfig(**common, target_modules=wanted)
    if model is not None and (extra := sorted(_matched(config, model) - named)):
        # the end of another module's name may be the whole name of one of ours
        config = LoraConfig(**common, target_modules=wanted, exclude_modules=extra)
    if model is not None and (matched := _matched(config, model)) != named:
        extra, lacking = sorted(matched - named), sorted(named - matched)
        raise AdapterError(f"PEFT would not adapt what the plan names: it misses {lacking[:3]} and adds {extra[:3]} "
                           f"({len(lacking)} and {len(extra)} modules).")
    return config


def whole(alpha: float) -> float:
    """A whole number as one, which is how people and other programs write it."""
    return int(alpha) if float(alpha).is_integer() else alpha


def _named(model: nn.Module) -> Iterable[tuple[str, nn.Module]]:
    """Modules under the names that PEFT sees (its own prefix left out)."""
    return ((n.removeprefix("base_model.model."), m) for n, m in model.named_modules())


def _matched(config: LoraConfig, model: nn.Module) -> set[str]:
    from peft.tuners.tuners_utils import check_target_module_exists

    names = {n for n, m in _named(model) if not n.endswith("base_layer") and ".lora_" not in n}
    return {n for n in names if check_target_module_exists(config, n) is True
            or isinstance(check_target_module_exists(config, n), re.Match)}


def _readable_form(plan: Plan) -> dict[str, Any] | None:
    """Leaf names, block indices and the name of the block list; None if these cannot say it."""
    split = [re.match(rf"^(.*?)\.{m.block}\.(.+)$", m.name) for m in plan.modules if not m.experts]
    if not split or not all(split):
        return None
    lists = {cast("re.Match[str]", s).group(1) for s in split}
    leaves = list(dict.fromkeys(cast("re.Match[str]", s).group(2).rpartition(".")[2] for s in split))
    if len(lists) != 1:
        return None
    return {"target_modules": leaves, "layers_to_transform": sorted({m.block for m in plan.modules if not m.experts}),
            "layers_pattern": lists.pop().rpartition(".")[2]}
