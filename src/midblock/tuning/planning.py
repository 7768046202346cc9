"""Solving a plan: where (mask, blocks, random blocks or single modules) and how large (rank or budget)."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch import nn

from midblock.errors import AdapterError, BlockRangeError, BudgetError, SettingsError
from midblock.models import Anatomy, LoadedModel, find_anatomy
from midblock.reading import MAX_DIGITS, shortened
from midblock.segments import blocks_from_spec, format_blocks, segment_blocks
from midblock.settings.tune import (
    DEFAULT_TARGETS,
    PAPER_ALPHA,
    REFERENCE_BUDGET,
    REFERENCE_RANK,
    Method,
    PlanSettings,
    WhereSettings,
)
from midblock.tuning.plan import Missing, ModulePlan, Plan
from midblock.tuning.targets import every_matrix, modules_by_name, modules_of_blocks, modules_of_kinds

__all__ = ["anatomy_of", "budget_of", "full_blocks_for_budget", "make_plan", "random_block_set", "require_plan_fits"]

_MATCH = re.compile(r"match:([01]+)@(\d{1,9})", re.ASCII)
_NUMBER = re.compile(r"(\d+(?:\.\d+)?)\s*([kKmM]?)", re.ASCII)
_UNITS = {"": 1, "k": 10**3, "m": 10**6}


def anatomy_of(model: nn.Module | Anatomy | LoadedModel) -> Anatomy:
    """The anatomy of any form of a model."""
    if isinstance(model, Anatomy):
        return model
    return model.anatomy if isinstance(model, LoadedModel) else find_anatomy(model)


def random_block_set(n: int, num_blocks: int, seed: int) -> list[int]:
    """``n`` different blocks drawn at random, ascending.

    Raises:
        BlockRangeError: ``n`` is not 1..``num_blocks``.

    Example:
        >>> random_block_set(3, 10, seed=0) == random_block_set(3, 10, seed=0)
        True
    """
    if not 1 <= n <= num_blocks:
        raise BlockRangeError(f"{n} random blocks were asked for, but the model has {num_blocks}; use 1 to "
                              f"{num_blocks}.")
    return sorted(int(b) for b in np.random.default_rng(seed).choice(num_blocks, size=n, replace=False))


# ---------------------------------------------------------------------------------------------
# how large


def budget_of(model: nn.Module | Anatomy | LoadedModel, budget: int | str | None = None, *,
              targets: Sequence[str] = DEFAULT_TARGETS) -> int:
    """A budget in trainable parameters.

    Args:
        model: A model, `LoadedModel` or `Anatomy`.
        budget: A number; text such as ``"921600"``, ``"900k"`` or ``"1.5M"``; ``"match:11111@16"``,
            the parameters of LoRA of rank 16 under the mask 11111; None: ``match:1@16``, all blocks.
        targets: Target modules, for ``match``.

    Raises:
        BudgetError: it is none of these, or below 1.
    """
    budget = REFERENCE_BUDGET if budget is None else budget
    if isinstance(budget, str):
        text = budget.strip()
        if found := _MATCH.fullmatch(text):
            anatomy, rank = anatomy_of(model), int(found.group(2))
            if rank < 1:
                raise BudgetError(f"budget {budget!r}: a rank of 0 trains nothing; use 1 or more.")
            modules, _ = modules_of_blocks(anatomy, segment_blocks(found.group(1), anatomy.num_blocks), targets)
            return rank * sum(m.cost_per_rank for m in modules)
        number = _NUMBER.fullmatch(text)
        if number is None or len(text) > MAX_DIGITS:
            raise BudgetError(f"budget {shortened(text)!r} is neither a number of parameters (921600, 900k, 1.5M) nor "
                              "match:MASK@RANK (match:11111@16).")
        budget = round(float(number.group(1)) * _UNITS[number.group(2).lower()])
    if budget < 1:
        raise BudgetError(f"a budget of {budget} trainable parameters was asked for; use 1 or more.")
    return int(budget)


def _solve_rank(modules: Sequence[ModulePlan], budget: int, method: Method) -> int:
    """The rank whose parameters come nearest to the budget (the lower of two equally near).

    Raises:
        BudgetError: rank 1 is already too much, or the matrices have no such rank.
    """
    step = sum(m.cost_per_rank for m in modules)
    fixed = sum(m.outputs for m in modules) if method == "dora" else 0
    smallest = step + fixed
    if budget < smallest:
        raise BudgetError(
            f"a budget of {budget:,} trainable parameters is smaller than rank 1 of the {len(modules)} matrices "
            f"chosen, which takes {smallest:,}; raise the budget, or choose fewer blocks or matrices.")
    # in whole numbers: a budget may have more digits than a float holds
    rank = max(1, -((step - 2 * (budget - fixed)) // (2 * step)))
    full = _full_rank(modules)
    if rank > full:
        raise BudgetError(
            f"a budget of {budget:,} trainable parameters needs rank {rank} on the {len(modules)} matrices chosen, "
            f"but none has more than rank {full} ({full * step + fixed:,} parameters); lower the budget, choose "
            "more blocks or matrices, or train them with method full.")
    return rank


def _full_rank(modules: Sequence[ModulePlan]) -> int:
    return max(min(m.inputs, m.outputs) for m in modules)


def full_blocks_for_budget(model: nn.Module | Anatomy | LoadedModel, budget: int, *,
                           targets: Sequence[str] = DEFAULT_TARGETS) -> int:
    """How many blocks a full-rank update may have to come nearest to a budget (at least 1)."""
    anatomy = anatomy_of(model)
    modules, _ = modules_of_blocks(anatomy, range(anatomy.num_blocks), targets)
    each = sum(m.weights for m in modules) / anatomy.num_blocks
    return min(anatomy.num_blocks, max(1, round(budget / each)))


# ---------------------------------------------------------------------------------------------
# the plan


def make_plan(model: nn.Module | Anatomy | LoadedModel, settings: PlanSettings | None = None,
              **overrides: Any) -> Plan:
    """Solve what to train.

    Exactly one of ``mask``, ``blocks``, ``random_blocks`` and ``modules`` says where. The rank is
    given, or solved so that the parameters come as near to the budget as ranks allow; with
    neither, the budget is what LoRA of rank 16 takes on all blocks.

    Args:
        model: A model (PEFT-wrapped or not, also on the meta device), `LoadedModel` or `Anatomy`.
        settings: Where and how large.
        **overrides: Single fields of `midblock.settings.PlanSettings`: ``mask``, ``blocks``, ``random_blocks``,
            ``modules``, ``target_modules``, ``method``, ``rank``, ``budget`` (see `budget_of`), ``scale``,
            ``alpha_over_rank``, ``alpha``.

    Raises:
        BlockRangeError: the mask or blocks do not fit.
        BudgetError: the budget is below rank 1 or above full rank.
        SettingsError: targets match nothing (what was found is listed), or settings exclude each other.
    """
    wanted = PlanSettings.of(settings, overrides)
    anatomy = anatomy_of(model)
    whole = wanted.method == "full" and wanted.target_modules == ("all",)
    modules, missing, origin = _where(anatomy, wanted, whole)
    blocks = tuple(sorted({m.block for m in modules}))
    targets = wanted.target_modules if wanted.modules is None else tuple(dict.fromkeys(m.kind for m in modules))
    rank, budget = (None, None) if wanted.method == "full" else _size(anatomy, wanted, modules, targets)
    if whole:
        params = sum(p.numel() for b in blocks for p in anatomy.blocks[b].parameters())
    else:
        params = sum(m.cost(wanted.method, rank) for m in modules)
    return Plan(method=wanted.method, num_blocks=anatomy.num_blocks, blocks=blocks, modules=tuple(modules), rank=rank,
                alpha=None if rank is None else _alpha(wanted, rank), scale=wanted.scale, params=params, budget=budget,
                model_params=anatomy.causal_lm.num_parameters(), targets=targets, mask=wanted.mask,
                whole_blocks=whole, origin=origin, missing=tuple(missing))


def _where(anatomy: Anatomy, wanted: WhereSettings, whole: bool) -> tuple[list[ModulePlan], list[Missing], str]:
    """Matrices, what is not reached, and how they were chosen."""
    if wanted.modules is not None:
        modules = modules_by_name(anatomy, wanted.modules)
        return modules, [], f"{len(modules)} named modules"
    if wanted.random_blocks is not None:
        n, seed = (wanted.random_blocks if isinstance(wanted.random_blocks, tuple)
                   else (wanted.random_blocks, getattr(wanted, "seed", 0)))
        blocks, origin = random_block_set(n, anatomy.num_blocks, seed), f"{n} random blocks, seed {seed}"
    elif not wanted.ways:
        raise SettingsError("say where to train in exactly one way: a mask (01100), blocks (8:16), random blocks or "
                            "module names; got none.")
    else:
        blocks = blocks_from_spec(wanted.mask, wanted.blocks, anatomy.num_blocks)
        origin = f"mask {wanted.mask}" if wanted.mask is not None else f"blocks {format_blocks(blocks)}"
    if whole:
        return every_matrix(anatomy, blocks), [], origin
    return *modules_of_blocks(anatomy, blocks, wanted.target_modules,
                             adapters=getattr(wanted, "method", "lora") != "full"), origin


def _size(anatomy: Anatomy, wanted: PlanSettings, modules: Sequence[ModulePlan], targets: Sequence[str]
          ) -> tuple[int, int | None]:
    """Rank, and the budget that it was solved from."""
    if wanted.rank is not None:
        if wanted.rank > (full := _full_rank(modules)):
            raise BudgetError(f"rank {wanted.rank} was asked for, but none of the matrices chosen has more than rank "
                              f"{full}.")
        return wanted.rank, None
    if wanted.modules is not None and wanted.budget is None:
        # the same kinds of matrices in all blocks at the reference rank
        budget = REFERENCE_RANK * sum(m.cost_per_rank for m in modules_of_kinds(anatomy, {m.kind for m in modules}))
    else:
        budget = budget_of(anatomy, wanted.budget, targets=targets)
    return _solve_rank(modules, budget, wanted.method), budget


def _alpha(wanted: PlanSettings, rank: int) -> float:
    if wanted.alpha is not None:
        return wanted.alpha
    return {"fixed-ratio": wanted.alpha_over_rank * rank, "fixed-alpha": PAPER_ALPHA,
            "rslora": wanted.alpha_over_rank * math.sqrt(REFERENCE_RANK)}[wanted.scale]


def require_plan_fits(plan: Plan, model: nn.Module | Anatomy | LoadedModel) -> Plan:
    """Check that a plan (from a file, or made for another copy) belongs to this model.

    Returns:
        The plan, with this model's own parameter count.

    Raises:
        AdapterError: another number of blocks, or a module that is missing, in another block or of another shape.
    """
    anatomy = anatomy_of(model)
    if plan.num_blocks != anatomy.num_blocks:
        raise AdapterError(f"the plan is for a model of {plan.num_blocks} blocks, this one has "
                           f"{anatomy.num_blocks}; make the plan with this model.")
    try:
        here = {m.name: m for m in modules_by_name(anatomy, [m.name for m in plan.modules])}
    except SettingsError as error:
        raise AdapterError(f"the plan belongs to another model: {error}") from None
    for module in plan.modules:
        other = here[module.name]
        if (other.inputs, other.outputs, other.experts) != (module.inputs, module.outputs, module.experts):
            raise AdapterError(f"the plan belongs to another model: {module.name} is {module.inputs}->"
                               f"{module.outputs} in the plan and {other.inputs}->{other.outputs} here.")
        if other.block != module.block:
            raise AdapterError(f"the plan belongs to another model: {module.name} is in block {module.block} in the "
                               f"plan and in block {other.block} here.")
    return replace(plan, model_params=anatomy.causal_lm.num_parameters())
