"""The outcome for a person: the answer first, then at most ten lines; everything else is in tables.

The text rests on `SweepStatistics` alone and holds no wall-clock time, so that an interrupted and resumed sweep ends
with the same words as one that ran through.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from midblock.segments import format_blocks
from midblock.settings.sweep import SweepConfig
from midblock.sweeps.arms import BASE
from midblock.sweeps.claims import claims
from midblock.sweeps.comparisons import baseline_of, detectable_after
from midblock.sweeps.pareto import COSTS
from midblock.sweeps.records import RunRecord
from midblock.sweeps.scores import ArmInfo, TaskMatrix
from midblock.sweeps.statistics import SweepStatistics
from midblock.sweeps.sufficiency import MIN_ITEMS, MIN_STEPS

__all__ = ["MAX_LINES", "Answer", "amount", "answer", "verdict"]

MAX_LINES = 10
"""Lines below the answer."""
_TASKS = 2
"""Evaluation tasks that are told in words; the others are in the tables."""
_SHOWN = 6
"""Arms named in one list."""


@dataclass(frozen=True)
class Answer:
    """Which arm to use."""

    arm: str | None
    """The arm; None where the sweep is too small to say."""
    text: str
    """One line."""


def verdict(stats: SweepStatistics, infos: Mapping[str, ArmInfo], records: Sequence[RunRecord],
            config: SweepConfig) -> str:
    """The answer and at most `MAX_LINES` lines; every one rests on a row of `SweepStatistics`."""
    chosen = answer(stats, infos, config)
    lines = [_next(stats, chosen, infos, config), _setting(stats, infos, config), _caution(infos),
             _edges(stats, records)]
    if failed := [r for r in records if r.status == "failed"]:
        names = _list([r.key for r in failed])
        lines.append(f"{len(failed)} of {len(records)} runs failed and have no score: {names}.")
    matrices = list(stats.matrices.values())
    lines += [_task(stats, m, infos, config) for m in matrices if m.role == "evaluation"][:_TASKS]
    if kept := [m for m in matrices if m.role == "retention"]:
        lines.append(_retention(stats, kept, infos))
    lines.append(_claims(stats, infos, config))
    if chosen.arm is not None:
        lines.append(_unbeaten(stats))
    return "\n".join([chosen.text, *[line for line in lines if line][:MAX_LINES]])


# ---------------------------------------------------------------- the answer


def answer(stats: SweepStatistics, infos: Mapping[str, ArmInfo], config: SweepConfig) -> Answer:
    """Which arm to use, from the comparisons with the baseline on the first evaluation task.

    The best of the arms that beat the baseline; where none does, the cheapest to train of those that are no worse
    within the margin and cheaper than it; else the baseline. An arm that is not shown to be better than the untuned
    model is never chosen.
    """
    task = config.evaluation[0].label
    baseline = baseline_of(infos)
    matrix = stats.matrices.get(task)
    rows = stats.family("evaluation", task)
    if matrix is None or baseline is None or not matrix.trained:
        return Answer(None, f"No answer: no trained arm has a score on {task}.")
    if (task, baseline) in stats.missing:
        return Answer(None, f"Too small to judge. Missing: {_missing(stats, task)}.")
    learned = {str(r["a"]) for _, r in stats.family("gain", task).iterrows() if r["conclusion"] == "better"}
    against = rows[(rows["b"] == baseline) & rows["a"].isin(learned)]
    better = against[against["conclusion"] == "better"]
    if len(better):
        best = better.loc[(better["difference"] * matrix.sign).idxmax()]
        return Answer(str(best["a"]), f"Use {best['a']}: better than {_arm(baseline, infos)} on {task} by "
                      f"{_at_least(best, matrix, config)}{_work(str(best['a']), baseline, infos)}.")
    cheaper = [r for _, r in against.iterrows() if r["conclusion"] in ("as good", "no worse")
               and infos[str(r["a"])].work < infos[baseline].work]
    if cheaper:
        row = min(cheaper, key=lambda r: (infos[str(r["a"])].work, -float(r["difference"]) * matrix.sign))
        return Answer(str(row["a"]), f"Use {row['a']}: at most {amount(matrix.metric, max(float(row['worst']), 0.0))} "
                      f"worse than {_arm(baseline, infos)} on {task} with {1 - config.statistics.alpha:.0%} confidence"
                      f"{_work(str(row['a']), baseline, infos)}.")
    if not learned:
        return Answer(None, f"No answer: no arm is shown to be better on {task} than the untuned model.")
    margin = amount(matrix.metric, config.statistics.margins.for_metric(matrix.metric))
    return Answer(baseline, f"Use {baseline} (the baseline): no other arm is shown to be better on {task}, or cheaper "
                  f"and at most {margin} worse.")


def _missing(stats: SweepStatistics, task: str) -> str:
    """What the arms of a task lack, each once."""
    found = dict.fromkeys(part for (t, _), text in stats.missing.items() if t == task for part in text.split("; "))
    return _list(list(found))


def _work(arm: str, baseline: str, infos: Mapping[str, ArmInfo]) -> str:
    share = infos[arm].work / infos[baseline].work
    return "" if math.isnan(share) else f", in about {share:.0%} of its training time (counted in operations)"


def _next(stats: SweepStatistics, chosen: Answer, infos: Mapping[str, ArmInfo], config: SweepConfig) -> str:
    """The command that helps further."""
    task = config.evaluation[0]
    changes = []
    lacking = "; ".join(text for (t, _), text in stats.missing.items() if t == task.label)
    if chosen.arm is None or chosen.arm == config.arms.baseline:
        seeds = max(3, len(config.seeds) + (0 if lacking else 2))
        if "seeds" in lacking or not lacking:
            changes.append(f"--set seeds=[{','.join(str(s) for s in range(seeds))}]")
        items = len(stats.matrices[task.label].items) if task.label in stats.matrices else 0
        if "items of" in lacking:
            changes.append(f"--set evaluation.0.samples={max(200, 2 * MIN_ITEMS)}")
        elif not lacking and items:
            changes.append(f"--set evaluation.0.samples={2 * items}")
        if "training steps" in lacking or "still falls" in lacking:
            steps = config.training.steps
            changes.append(f"--set training.steps={max(10 * MIN_STEPS, 2 * steps)}" if steps is not None else
                           f"--set training.epochs={2 * config.training.epochs:g}")
        return f"Next: midblock sweep config.yaml {' '.join(changes)} --out NEW" if changes else ""
    info = infos[chosen.arm]
    options = [f"--mask {info.mask}" if info.mask else f"--blocks {format_blocks(info.blocks)}"]
    if info.method.startswith("full"):
        options.append("--method full")
    elif config.budget is not None:
        options.append(f"--budget {config.budget}")
    options += ["--ranks eva"] * (info.method == "lora-eva")
    options += [f"--init {config.training.init}"] * (config.training.init != "default" and "full" not in info.method)
    if chosen.arm in stats.rates:
        options.append(f"--learning-rate {stats.rates[chosen.arm]:g}")
    return f"Next: midblock tune {config.model} --data {config.train.data} {' '.join(options)} --out NEW"


# ---------------------------------------------------------------- the lines


def _setting(stats: SweepStatistics, infos: Mapping[str, ArmInfo], config: SweepConfig) -> str:
    seeds = len(config.seeds)
    items = ", ".join(f"{m.task} {len(m.items)}" for m in stats.matrices.values())
    return (f"{len(infos)} arms on {config.model}, {seeds} seed{'s' if seeds > 1 else ''}, items: {items or 'none'}; a "
            f"difference counts where Holm's p is below {config.statistics.alpha:g}.")


def _caution(infos: Mapping[str, ArmInfo]) -> str:
    base = infos.get(baseline_of(infos) or "")
    if base is None:
        return ""
    unequal = [f"{a.name} {a.params:,}" for a in infos.values() if abs(a.params / base.params - 1) > 0.05]
    text = f"Not at equal parameters (the baseline has {base.params:,}): {_list(unequal)}." if unequal else ""
    if len({a.method.removesuffix("-eva") for a in infos.values()}) > 1:
        text += " Methods have learning rates of their own; differences between them hold for these rates."
    return text.strip()


def _edges(stats: SweepStatistics, records: Sequence[RunRecord]) -> str:
    """Arms whose best learning rate is the smallest or largest that they were trained with."""
    tried: dict[str, set[float]] = {}
    for record in records:
        if record.learning_rate is not None:
            tried.setdefault(record.arm, set()).add(record.learning_rate)
    found: dict[tuple[str, float], list[str]] = {}
    for arm, rate in stats.rates.items():
        own = tried.get(arm, {rate})
        if len(own) > 1 and rate in (min(own), max(own)):
            found.setdefault(("smallest" if rate == min(own) else "largest", rate), []).append(arm)
    if not found:
        return ""
    told = [f"the {end} that was tried, {rate:g}, is the best of {_list(arms)}" for (end, rate), arms in found.items()]
    return f"Learning rates: {'; '.join(told)}; one beyond it may serve them better (sweep --resume takes more)."


def _task(stats: SweepStatistics, matrix: TaskMatrix, infos: Mapping[str, ArmInfo], config: SweepConfig) -> str:
    """One evaluation task: its arms against the baseline, and what would have been seen."""
    baseline = baseline_of(infos)
    head = f"{matrix.task} ({matrix.metric}, {len(matrix.items)} items)"
    rows = stats.family("evaluation", matrix.task)
    rows = rows[rows["b"] == baseline]
    if rows.empty:
        return f"{head}: nothing to compare."
    told = _conclusions(rows, matrix, infos)
    smallest = detectable_after(stats.comparisons, family="evaluation", task=matrix.task,
                                confidence=config.statistics.confidence, alpha=config.statistics.alpha,
                                power=config.statistics.power)
    seen = f"; differences below {amount(matrix.metric, smallest)} are easily missed"
    if math.isnan(smallest) or (rows["conclusion"] == "too small").all():
        seen = ""
    return f"{head}, against {_arm(str(baseline), infos)}{_score(stats, matrix.task, str(baseline))}: {told}{seen}."


def _score(stats: SweepStatistics, task: str, arm: str) -> str:
    row = stats.scores[(stats.scores["task"] == task) & (stats.scores["arm"] == arm)]
    return f" {row['value'].iloc[0]:.3g}" if len(row) else ""


def _conclusions(rows: pd.DataFrame, matrix: TaskMatrix, infos: Mapping[str, ArmInfo]) -> str:
    margin = amount(matrix.metric, float(rows["margin"].iloc[0]))
    words = {"better": "better", "worse": "worse", "as good": f"as good within {margin}",
             "no worse": f"at most {margin} worse", "open": "not distinguishable", "too small": "too small to judge"}
    parts = []
    for conclusion, word in words.items():
        own = rows[rows["conclusion"] == conclusion]
        if own.empty:
            continue
        names = [f"{_arm(str(r['a']), infos)} {amount(matrix.metric, float(r['difference']), signed=True)}"
                 if conclusion in ("better", "worse") else _arm(str(r["a"]), infos) for _, r in own.iterrows()]
        parts.append(f"{word}: {_list(names)}")
    return "; ".join(parts)


def _retention(stats: SweepStatistics, matrices: Sequence[TaskMatrix], infos: Mapping[str, ArmInfo]) -> str:
    baseline = baseline_of(infos)
    told = []
    for matrix in matrices:
        rows = stats.family("retention", matrix.task)
        if rows.empty:
            continue
        lost = rows[(rows["b"] == BASE) & (rows["conclusion"] == "worse")]
        forgets = _list([f"{r['a']} {amount(matrix.metric, float(r['difference']), signed=True)}"
                         for _, r in lost.iterrows()]) or "none shown"
        less = rows[(rows["b"] == baseline) & (rows["conclusion"] == "better")]["a"]
        text = f"{matrix.task}: forget: {forgets}"
        text += f"; less than {baseline}: {_list([str(a) for a in less])}" if len(less) else ""
        if (rows["conclusion"] == "too small").all():
            text = f"{matrix.task}: too small to judge"
        told.append(text)
    return f"Retention ({matrices[0].metric} against the untuned model). {'. '.join(told)}." if told else ""


def _claims(stats: SweepStatistics, infos: Mapping[str, ArmInfo], config: SweepConfig) -> str:
    found = claims(stats, infos, config.statistics.alpha)
    if found.empty:
        return ""
    by_claim: dict[str, list[str]] = {}
    for task, claim, said in zip(found["task"], found["claim"], found["verdict"], strict=True):
        by_claim.setdefault(claim, []).append(said if len(config.evaluation) == 1 else f"{said} ({task})")
    return "The paper's claims: " + "; ".join(f"{c}: {', '.join(s)}" for c, s in by_claim.items()) + "."


def _unbeaten(stats: SweepStatistics) -> str:
    rows = stats.pareto
    if rows.empty:
        return ""
    rows = rows[rows["task"] == rows["task"].iloc[0]]
    views = [f"{word}: {_list(names)}" for cost, word in COSTS.items()
             if (names := [str(a) for a in rows.loc[rows[f"front_{cost}"].astype(bool), "arm"]])]
    return f"By their means no other arm is better on both gain and {'; '.join(views)}." if views else ""


# ---------------------------------------------------------------- words


def _list(names: Sequence[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _arm(name: str, infos: Mapping[str, ArmInfo]) -> str:
    """An arm as a reader knows it."""
    info = infos[name]
    if info.is_baseline and info.mask and set(info.mask) == {"1"}:
        return f"all layers ({name})"
    return f"{info.region} ({name})" if info.region and not info.is_baseline else name


def amount(metric: str, value: float, *, signed: bool = False) -> str:
    """A difference in the unit that a reader expects.

    Args:
        metric: ``accuracy`` (value: share of the items), ``perplexity`` (difference of log perplexity) or ``loss``.
        value: The difference.
        signed: With a plus sign where it is positive.

    Example:
        >>> amount("accuracy", 0.025), amount("loss", 0.5, signed=True), amount("perplexity", 0.01)
        ('2.5 points', '+0.500 nats', '1.0% of the perplexity')
    """
    sign = "+" if signed else ""
    if metric == "accuracy":
        return f"{value * 100:{sign}.1f} points"
    if metric == "perplexity":
        return f"{math.expm1(value) * 100:{sign}.1f}% of the perplexity"
    return f"{value:{sign}.3f} nats"


def _at_least(row: pd.Series, matrix: TaskMatrix, config: SweepConfig) -> str:
    """Size of a difference in the better direction, with what it is at least over all comparisons of the family."""
    size = amount(matrix.metric, float(row["difference"]) * matrix.sign)
    if not row["worst"] < 0:  # the corrected interval can be wider than the test
        return size
    return (f"{size} (at least {amount(matrix.metric, -float(row['worst']))} with "
            f"{1 - config.statistics.alpha:.0%} confidence)")
