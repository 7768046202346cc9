"""The arms of a sweep, in the order in which they share the most work."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from midblock.errors import BudgetError, MidblockError, SettingsError
from midblock.reading import shortened
from midblock.segments import all_masks_single
from midblock.settings.sweep import NAME, SweepConfig
from midblock.settings.tune import Ranks
from midblock.tuning import Plan, budget_of, load_plan, make_plan, require_plan_fits
from midblock.tuning.eva import require_eva

__all__ = ["BASE", "METHODS", "Arm", "Job", "expand_arms", "jobs_of"]

BASE = "base"
"""Name of the untuned model among the arms."""
METHODS = {"lora": "LoRA", "lora-eva": "LoRA with EVA's ranks", "dora": "DoRA", "full": "full-rank",
           "full-equal": "full-rank of equal size"}
"""`Arm.method` in words."""


@dataclass(frozen=True)
class Arm:
    """One configuration: what is trained, with which learning rates."""

    name: str
    plan: Plan
    learning_rates: tuple[float, ...]
    is_baseline: bool = False
    is_random: bool = False
    """Its blocks were drawn at random."""
    is_equal: bool = False
    """A full-rank update of as many matrices as the LoRA arms' budget takes."""
    ranks: Ranks = "equal"
    """How its rank is spread over the matrices; ``eva`` is solved from weights and rows when the sweep begins."""

    @property
    def method(self) -> str:
        """One of `METHODS`."""
        return "full-equal" if self.is_equal else "lora-eva" if self.ranks == "eva" else self.plan.method

    @property
    def rank(self) -> int | str | None:
        """Rank of its matrices, for tables."""
        if self.plan.own_ranks:
            return self.plan.rank_words
        return "by EVA" if self.ranks == "eva" else self.plan.rank


@dataclass(frozen=True)
class Job:
    """One run: an arm with one learning rate and one seed; ``arm`` None is the untuned model."""

    arm: Arm | None
    learning_rate: float | None
    seed: int | None

    @property
    def name(self) -> str:
        """Name of the arm."""
        return BASE if self.arm is None else self.arm.name

    @property
    def key(self) -> str:
        """File name of the result, without suffix."""
        if self.arm is None:
            return BASE
        return f"{self.name}__lr{self.learning_rate:g}__seed{self.seed}"


def expand_arms(config: SweepConfig, model: Any) -> list[Arm]:
    """Every arm that the configuration asks for, each once, with its exact plan.

    Args:
        config: The sweep.
        model: A model, `LoadedModel` or `Anatomy` (also on the meta device).

    Raises:
        SettingsError: arms that do not fit the model; all are listed.
    """
    wanted = list(_wanted(config))
    arms: dict[str, Arm] = {}
    faults = []
    for name, how, arguments, rates in wanted:
        if not re.fullmatch(NAME, name) or name == BASE:
            faults.append(f"{how}: {shortened(name)!r} cannot name an arm; use letters, digits and _.@+-")
            continue
        try:
            plan = _plan(config, model, arguments)
        except MidblockError as error:
            faults.append(f"{how}: {error}")
            continue
        if name in arms:
            if (arms[name].plan.modules, arms[name].plan.params, arms[name].ranks) != (
                    plan.modules, plan.params, arguments.get("ranks", "equal")):
                faults.append(f"{how}: the name {name!r} already belongs to another arm")
            continue
        arms[name] = Arm(name, plan, rates, is_baseline=name == config.arms.baseline,
                         is_random="random_blocks" in arguments, is_equal=arguments.get("equal", False),
                         ranks=arguments.get("ranks", "equal"))
    known = {*arms, BASE}
    for a, b in config.statistics.comparisons or []:
        faults += [f"statistics.comparisons: there is no arm {x!r} (arms: {', '.join(known)})"
                   for x in (a, b) if x not in known]
        if a == b:
            faults.append(f"statistics.comparisons: arm {a!r} cannot be compared with itself")
    if faults:
        raise SettingsError(f"{len(faults)} of the arms and comparisons do not fit the model:\n"
                            + "\n".join(f"  {f}" for f in dict.fromkeys(faults)))
    return list(arms.values())


def _neighbours(num_segments: int, width: int) -> list[str]:
    return ["0" * i + "1" * width + "0" * (num_segments - i - width)
            for i in range(num_segments - width + 1)]


def _wanted(config: SweepConfig) -> Iterable[tuple[str, str, dict[str, Any], tuple[float, ...]]]:
    """(name, key in the configuration, arguments of the plan, learning rates)."""
    arms, lora = config.arms, tuple(config.training.learning_rates)
    full = tuple(config.training.full_learning_rates)
    yield arms.baseline, "arms.baseline", {"mask": arms.baseline}, lora
    for key, masks in (
            ("arms.singles", [m for k in arms.singles for m in all_masks_single(k)]),
            ("arms.pairs", [m for k in arms.pairs for m in _neighbours(k, 2)]),
            ("arms.triples", [m for k in arms.triples for m in _neighbours(k, 3)]),
            ("arms.masks", arms.masks)):
        for mask in masks:
            yield mask, key, {"mask": mask}, lora
    for draw in arms.random:
        for seed in range(draw.draws):
            yield (f"random{draw.blocks}-{seed}", "arms.random", {"random_blocks": (draw.blocks, seed)}, lora)
    for mask in arms.eva:
        yield f"eva-{mask}", "arms.eva", {"mask": mask, "ranks": "eva"}, lora
    for mask in arms.full:
        yield f"full-{mask}", "arms.full", {"mask": mask, "method": "full"}, full
    for draw in arms.full_random:
        for seed in range(draw.draws):
            yield (f"full-random{draw.blocks}-{seed}", "arms.full_random",
                   {"random_blocks": (draw.blocks, seed), "method": "full"}, full)
    for mask in arms.full_equal:
        yield f"full-equal-{mask}", "arms.full_equal", {"mask": mask, "method": "full", "equal": True}, full
    for draw in arms.full_equal_random:
        for seed in range(draw.draws):
            yield (f"full-equal-random{draw.blocks}-{seed}", "arms.full_equal_random",
                   {"random_blocks": (draw.blocks, seed), "method": "full", "equal": True}, full)
    for path in arms.plans:
        yield Path(path).stem, f"arms.plans {path}", {"file": path}, lora
    for arm in arms.explicit:
        own = {k: v for k, v in arm.given().items() if v is not None and k not in ("name", "learning_rate")}
        rates = full if arm.method == "full" else lora
        yield (arm.name, f"arms.explicit {arm.name}", own,
               (arm.learning_rate,) if arm.learning_rate is not None else rates)


def _plan(config: SweepConfig, model: Any, arguments: dict[str, Any]) -> Plan:
    if "file" in arguments:
        return require_plan_fits(load_plan(arguments["file"]), model)
    options = {"target_modules": config.target_modules, "scale": config.scale,
               "alpha_over_rank": config.alpha_over_rank, **arguments}
    spread = options.pop("ranks", "equal")
    if options.pop("equal", False):
        whole = make_plan(model, **options)
        return _within_budget(whole, budget_of(model, config.budget, targets=config.target_modules))
    if options.get("method") != "full" and "rank" not in options and "budget" not in options:
        # that of the sweep, also for an arm with other target modules
        options["budget"] = budget_of(model, config.budget, targets=config.target_modules)
    plan = make_plan(model, **options)
    if spread == "eva":
        require_eva(plan)
    return plan


def _within_budget(whole: Plan, budget: int) -> Plan:
    """A full-rank plan of as many of the plan's matrices as come nearest to a budget, spread over its blocks.

    Every block gives one matrix before any gives a second, and neighbouring blocks give different ones.

    Raises:
        BudgetError: not even one matrix is near the budget.
    """
    by_block = {b: [m for m in whole.modules if m.block == b] for b in whole.blocks}
    rounds = max(len(inside) for inside in by_block.values())
    order = [inside[(i + turn) % len(inside)] for turn in range(rounds) for i, inside in enumerate(by_block.values())
             if turn < len(inside)]
    chosen: set[str] = set()
    params = 0
    for module in order:
        size = module.inputs * module.outputs
        if params + size / 2 <= budget:  # nearer to the budget with it than without
            chosen.add(module.name)
            params += size
    if not chosen:
        smallest = min(m.inputs * m.outputs for m in order)
        raise BudgetError(f"a budget of {budget:,} trainable parameters is less than half of one matrix "
                          f"({smallest:,}); raise the budget, or leave out the full-rank arms of equal size.")
    modules = tuple(m for m in whole.modules if m.name in chosen)
    return replace(whole, modules=modules, blocks=tuple(sorted({m.block for m in modules})), params=params,
                   budget=budget, origin=f"{len(modules)} matrices of {whole.origin}")


def jobs_of(arms: Sequence[Arm], seeds: Sequence[int], searching: Sequence[int] | None = None,
            rates: Mapping[str, float] = MappingProxyType({})) -> list[Job]:
    """Every run: the untuned model first, then the arms by their first trainable block.

    Arms with the same first block follow each other, so that their prefix is computed once and
    freed when the next block's turn comes; later blocks come later, so that evaluation can go on
    from the hidden states of the arm before.

    Args:
        arms: The arms.
        seeds: The seeds.
        searching: Seeds that are trained with every rate of a grid; default all.
        rates: The rate of the other seeds by arm; where it is still open, the first of the grid stands for it.
    """
    def wanted(arm: Arm, rate: float, seed: int) -> bool:
        return searching is None or seed in searching or rate == rates.get(arm.name, arm.learning_rates[0])

    ordered = sorted(arms, key=lambda a: a.plan.first_block)
    return [Job(None, None, None)] + [
        Job(arm, rate, seed)
        for _, group in itertools.groupby(ordered, key=lambda a: a.plan.first_block)
        for arm in group for rate in arm.learning_rates for seed in seeds if wanted(arm, rate, seed)]
