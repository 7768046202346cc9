"""Importance-aware layer adaptation (ILA): which matrices or blocks does a fine-tune need?

1. LoRA on all linear layers of all blocks is trained until it is epsilon-stable.
2. A and B are frozen; each unit's update is multiplied by sigmoid(s), and the training loss is
   minimised over the scores s alone, optionally with lambda * sum sigmoid(s).
3. The units with the highest scores (or all but the lowest) are trained anew: `midblock.selection.choice`
   writes the plan.

The public abstract of ILA fixes the idea; every constant here is this program's own and is listed in
docs/selection.md with its reason. Controls are computed on the same adapter: the first-order worth of each
update, its norm, and random scores.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from midblock import stats
from midblock.analysis.gradients import supervised_batches
from midblock.data import Dataset, load_data
from midblock.models import LoadedModel, load_model
from midblock.models.state import require_state_folder
from midblock.progress import Progress, silent
from midblock.quantities import label_of, matrix_order
from midblock.results import UNNAMED, Answer, Estimate, Origin, Table, TableResult
from midblock.segments import zone_means
from midblock.selection.gates import Gates
from midblock.selection.ila_stages import ScoreSet, Stages, is_stable
from midblock.selection.units import SCORES, top_units, units_of
from midblock.settings.importance import ImportanceSettings
from midblock.tuning.adapter import attach
from midblock.tuning.plan import ModulePlan, Plan
from midblock.tuning.planning import make_plan

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["ImportanceResult", "importance"]

TOP = 0.3
"""Share of the units whose choice is compared with the controls'."""


@dataclass
class ImportanceResult(TableResult):
    """Scores of all units, how they were learned, and the plan they are scores of."""

    table: Table
    """The tidy table: one row per unit, metric and step."""
    plan: Plan
    unit_of: dict[str, str]
    """Adapted module -> unit."""
    sets: list[ScoreSet]
    curve: list[tuple[int, float]]
    """(step, loss of the probe batches in nats) of the first stage."""
    stopped: str
    """Why the first stage ended."""
    settings: ImportanceSettings
    data: str
    counts: dict[str, Any] = field(default_factory=dict)
    origin: Origin = UNNAMED

    @property
    def units(self) -> list[str]:
        """Units in the order of the model."""
        return list(dict.fromkeys(self.unit_of.values()))

    @property
    def final(self) -> ScoreSet:
        """Scores at the end of the first stage."""
        return self.sets[-1]

    def scores(self, metric: str = "ila_score") -> dict[str, float]:
        """Unit -> its score at the end of the first stage."""
        return dict(zip(self.units, self.final.scores[metric], strict=True))

    def modules(self, units: Sequence[str]) -> list[ModulePlan]:
        """The adapted matrices of some units, in the order of the model."""
        chosen = set(units)
        return [m for m in self.plan.modules if self.unit_of[m.name] in chosen]

    def _agreement(self) -> tuple[dict[str, float], float]:
        """Jaccard overlap of the top units with each control's, and of two random choices."""
        mine = np.isin(self.units, top_units(self.scores(), TOP))
        found = {m: stats.set_overlap(mine, np.isin(self.units, top_units(self.scores(m), TOP)))
                 for m in SCORES if m != "ila_score"}
        return {m: o.jaccard for m, o in found.items()}, next(iter(found.values())).expected

    def answer(self) -> Answer:
        """Where the scores are high, and whether the controls would have chosen the same."""
        frame = self.frame
        own = frame[(frame["metric"] == "ila_score") & frame["final"]]
        by_block = own.groupby("layer")["value"].mean()
        best = by_block.sort_values(ascending=False, kind="stable").index[:5]
        zones = zone_means(by_block.index, by_block, self.plan.num_blocks - 1)
        agree, chance = self._agreement()
        closest = max((m for m in agree if m != "random"), key=lambda m: agree[m])
        return Answer(
            f"Highest mean scores: blocks {', '.join(map(str, best))} (mean "
            + ", ".join(f"{zone} {value:.2f}" for zone, value in zones.items())
            + f"); n = {len(self.units)} scores learned in {len(self.final.losses)} steps.",
            f"The top {TOP:.0%} share {agree[closest]:.2f} (Jaccard) with {label_of(closest, unit='').lower()}, a "
            f"cheaper control, and {chance:.2f} with a random choice; train it against both before you trust it.",
            self.origin.words("importance", "--resume", *self._next(), models=1))

    def _next(self) -> tuple[str, str]:
        if is_stable(self.curve, self.settings):
            return "--apply", f"top:{TOP:g}"
        return "--max-steps", str(2 * self.settings.max_steps)

    def details(self) -> list[str]:
        """How training stopped, where the scores are high, and what the controls say."""
        last = self.curve[-1]
        lines = [f"Stage 1: LoRA of rank {self.plan.rank} on {len(self.plan.modules)} matrices; loss of the probe "
                 f"batches {self.curve[0][1]:.3f} -> {last[1]:.3f} nats in {last[0]} steps; {self.stopped}.",
                 f"Stage 2: {len(self.final.losses)} steps on {len(self.units)} scores (unit: {self.settings.unit}); "
                 f"mean loss of the first tenth {_tenth(self.final.losses, 0):.3f}, of the last "
                 f"{_tenth(self.final.losses, -1):.3f} nats."]
        frame = self.frame
        own = frame[(frame["metric"] == "ila_score") & frame["final"]]
        by_block = own.groupby("layer")["value"].mean()
        zones = zone_means(by_block.index, by_block, self.plan.num_blocks - 1)
        best = by_block.sort_values(ascending=False, kind="stable").index[:5]
        lines.append("Mean score of early, middle and late blocks: "
                     f"{', '.join(f'{v:.2f}' for v in zones.values())}; highest blocks: {', '.join(map(str, best))}.")
        if own["matrix"].nunique() > 1:
            kinds = own.groupby("matrix")["value"].mean().sort_values(ascending=False)
            lines.append("Mean score by matrix: " + ", ".join(f"{k} {v:.2f}" for k, v in kinds.items()) + ".")
        agree, expected = self._agreement()
        told = [f"{metric} {value:.2f}" for metric, value in agree.items()]
        lines.append(f"Jaccard overlap of the top {TOP:.0%} with the controls' ({', '.join(told)}); two random "
                     f"choices have {expected:.2f}.")
        return lines

    def figures(self) -> dict[str, Figure]:
        """Block by matrix for every score, and the two loss curves."""
        from midblock.figures import heatmap, lines

        frame = self.frame
        made: dict[str, Figure] = {}
        for metric, label in SCORES.items():
            part = frame[(frame["metric"] == metric) & frame["final"]]
            wide = part.pivot_table(index="matrix", columns="layer", values="value", sort=False)
            wide = wide.loc[matrix_order(list(wide.index)), sorted(wide.columns)]
            made[f"importance-{metric}"] = heatmap(
                wide.to_numpy(), list(wide.index), list(wide.columns), label=label, row_label="matrix",
                column_label="block", title=f"Importance by {label.partition(': ')[0]}: {self.data}",
                centre=0.0 if metric == "ila_score" else None)
        curve = pd.DataFrame(self.curve, columns=["step", "value"])
        made["importance-stage1"] = lines(curve, "step", title="Stage 1: until epsilon-stable", x_label="step",
                                          y_label="Loss of the probe batches (nats per labelled token)")
        second = pd.DataFrame([{"step": i + 1, "value": v, "scores at": f"step {s.step}"}
                               for s in self.sets for i, v in enumerate(s.losses)])
        made["importance-stage2"] = lines(second, "step", hue="scores at", title="Stage 2: scores alone",
                                          x_label="step of the second stage", y_label="Loss (nats per labelled token)")
        return made


def _tenth(values: Sequence[float], place: int) -> float:
    n = max(1, len(values) // 10)
    part = values[:n] if place == 0 else values[-n:]
    return sum(part) / len(part)


def importance(model: LoadedModel | str, *, data: Dataset | str, state_folder: Path | str | None = None,
               save_seconds: float = 60.0, progress: Progress = silent, settings: ImportanceSettings | None = None,
               **overrides: Any) -> ImportanceResult:
    """Run ILA's first two stages and the controls.

    Args:
        model: A model or a MODEL spec. Its weights are as before afterwards.
        data: A data set or a D spec; the loss counts completions where it has them.
        state_folder: Where progress is kept (``importance.safetensors``, written atomically); a run
            that finds it there goes on from it, to the result of an uninterrupted one; damaged progress is named in
            a warning and learned anew.
        save_seconds: Time between two saves; the end of each stage is always saved.
        progress: Told how many steps of each stage are done.
        settings: See `ImportanceSettings`.
        **overrides: Single fields of them.

    Returns:
        Rows of kind ``block``: metric ``ila_score`` and its controls (`SCORES`), side ``pair`` (base
        against tuned), with columns ``matrix``, ``module``, ``unit``, ``step``, ``final``, ``data``, ``seed``.

    Raises:
        SettingsError: a setting out of range.
        DataError: no usable row.
        TrainingError: a loss became non-finite; saved progress is kept.
        OutputError: saved progress is of another run.
    """
    chosen = ImportanceSettings.of(settings, overrides)
    loaded = load_model(model) if isinstance(model, str) else model
    dataset = load_data(data, seed=chosen.seed) if isinstance(data, str) else data
    if chosen.samples is not None:
        dataset = dataset.sample(chosen.samples, chosen.seed)
    batches, counts = supervised_batches(loaded, dataset, max_length=chosen.max_length, batch_size=chosen.batch_size)
    plan = make_plan(loaded, blocks=range(loaded.anatomy.num_blocks), rank=chosen.rank,
                     target_modules=chosen.target_modules)
    unit_of = units_of(plan, chosen.unit)
    path = None if state_folder is None else Path(state_folder) / "importance.safetensors"
    if path is not None:
        require_state_folder(path.parent)
    with attach(loaded, plan, seed=chosen.seed) as attachment:
        run = Stages(attachment, Gates(list(dict.fromkeys(unit_of.values())), unit_of),
                     [b.to(loaded.device) for b in batches], chosen, path, save_seconds, progress)
        run.restore()
        run.finish()
    table = _table(plan, unit_of, run.sets, chosen, dataset.name)
    return ImportanceResult(table, plan, unit_of, run.sets, run.curve, run.stopped, chosen, dataset.name, counts,
                            Origin((loaded.spec,), dataset.spec))


def _table(plan: Plan, unit_of: Mapping[str, str], sets: Sequence[ScoreSet], settings: ImportanceSettings,
           data: str) -> Table:
    first: dict[str, ModulePlan] = {}
    for module in plan.modules:
        first.setdefault(unit_of[module.name], module)
    table = Table()
    for found in sets:
        for metric, values in found.scores.items():
            ranges = found.worth_ranges.get(metric)
            for i, (unit, module) in enumerate(first.items()):
                low, high = ranges[i] if ranges else (math.nan, math.nan)
                n = settings.score_steps if metric == "ila_score" else found.batches if ranges else 1
                matrix = module.kind if settings.unit == "matrix" else "all"
                table.add("block", module.block, metric, "pair", Estimate(values[i], low, high, n), matrix=matrix,
                          module=module.name if settings.unit == "matrix" else "", unit=unit, step=found.step,
                          final=found.final, data=data, seed=settings.seed)
    return table
