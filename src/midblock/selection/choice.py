"""From scores to a choice of units, and from a choice to plan files: the third stage of ILA.

A plan of the controls has as many trainable parameters as the plan of ILA (their ranks are solved for
it), so that a sweep with all of them compares choices and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from midblock.errors import BudgetError, SettingsError
from midblock.selection.units import SCORES, best_units, top_count
from midblock.settings.base import name_of

if TYPE_CHECKING:
    from midblock.selection.ila import ImportanceResult
    from midblock.tuning.plan import Plan

__all__ = ["Choice", "chosen_units", "make_plans", "parse_choice", "write_plans"]


@dataclass(frozen=True, slots=True)
class Choice:
    """How many units are kept."""

    how: Literal["top", "freeze-bottom"]
    share: float

    @property
    def label(self) -> str:
        """Part of file and arm names: ``top30``, ``freeze25``."""
        percent = f"{100 * self.share:g}".replace(".", "p")
        return f"{'top' if self.how == 'top' else 'freeze'}{percent}"

    def count(self, units: int) -> int:
        """Units kept of so many."""
        if self.how == "top":
            return top_count(units, self.share)
        return units - min(units - 1, round(units * self.share))


def parse_choice(text: str) -> Choice:
    """``top:0.3`` (train the best 30% only) or ``freeze-bottom:0.25`` (all but the worst 25%).

    Raises:
        SettingsError: anything else.

    Example:
        >>> parse_choice("top:0.3").label, parse_choice("freeze-bottom:0.25").count(8)
        ('top30', 6)
    """
    how, _, number = text.strip().partition(":")
    try:
        share = float(number)
    except ValueError:
        share = math.nan
    if how not in ("top", "freeze-bottom") or not 0 < share < 1:
        raise SettingsError(f"{name_of('apply')} {text!r} is neither top:SHARE nor freeze-bottom:SHARE with a share "
                            "between 0 and 1; write top:0.3 or freeze-bottom:0.25.")
    return Choice("top" if how == "top" else "freeze-bottom", share)


def chosen_units(scores: Mapping[str, float], choice: Choice) -> list[str]:
    """The units that a choice keeps, in the order of the model."""
    return best_units(scores, choice.count(len(scores)))


def make_plans(model: Any, result: ImportanceResult, choice: Choice, *, budget: int | str | None = None
               ) -> tuple[dict[str, Plan], dict[str, str]]:
    """Plans of ILA's choice and of the controls' at equal parameters.

    Args:
        model: The model, `LoadedModel` or `Anatomy`.
        result: From `importance`.
        choice: From `parse_choice`.
        budget: Trainable parameters of every plan. Default: what ILA's choice takes at the rank of the
            first stage, so that fewer units mean fewer parameters.

    Returns:
        Name (``ila-top30``, ``taylor-top30`` ...) -> plan, and name -> reason for controls that have no
        plan at these parameters.

    Raises:
        BudgetError: ILA's own choice cannot meet the budget.
    """
    from midblock.tuning.planning import make_plan  # imports torch, which a wrong --apply need not wait for

    plans: dict[str, Plan] = {}
    missing: dict[str, str] = {}
    for metric in SCORES:
        name = f"{'ila' if metric == 'ila_score' else metric.replace('_', '-')}-{choice.label}"
        units = chosen_units(result.scores(metric), choice)
        modules = [m.name for m in result.modules(units)]
        try:
            if metric == "ila_score":
                plan = make_plan(model, modules=modules, budget=budget) if budget is not None else \
                    make_plan(model, modules=modules, rank=result.plan.rank)
            else:
                plan = make_plan(model, modules=modules, budget=plans[next(iter(plans))].params)
        except BudgetError as error:
            if metric == "ila_score":
                raise
            missing[name] = str(error)
            continue
        kind = "matrices" if result.settings.unit == "matrix" else "blocks"
        plans[name] = replace(plan, origin=(
            f"{'top' if choice.how == 'top' else 'all but the lowest'} {choice.share:.0%} of {len(result.units)} "
            f"{kind} by {metric} ({result.data}, seed {result.settings.seed}, step {result.final.step})"))
    return plans, missing


def write_plans(folder: Path | str, plans: Mapping[str, Plan]) -> dict[str, Path]:
    """One JSON file per plan, which ``tune --plan`` and the key ``arms.plans`` of a sweep accept."""
    paths = {name: Path(folder) / f"{name}.json" for name in plans}
    for name, path in paths.items():
        plans[name].save(path)
    return paths
