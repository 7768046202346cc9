"""The outcome in plain language: what the data support, what they contradict, and what they cannot tell."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import pandas as pd

from midblock.sweeps.arms import BASE
from midblock.sweeps.config import SweepConfig
from midblock.sweeps.records import RunRecord
from midblock.sweeps.statistics import ArmInfo, SweepStatistics, detectable_after, region_of

__all__ = ["verdict"]


def verdict(stats: SweepStatistics, infos: Mapping[str, ArmInfo], records: Sequence[RunRecord],
            config: SweepConfig) -> str:
    """Several paragraphs for a reader; every sentence rests on a row of `SweepStatistics`."""
    writer = _Writer(stats, infos, config)
    parts = [writer.setting(records), writer.failures(records)]
    for task in config.evaluation:
        parts.append(writer.task(task.label))
    parts.append(writer.retention())
    parts.append(writer.claims())
    if stats.undefined:
        parts.append("Could not be computed:\n" + "\n".join(f"- {u}" for u in stats.undefined))
    return "\n\n".join(p for p in parts if p)


def _p(value: float) -> str:
    if math.isnan(value):
        return "undefined"
    return "< 0.001" if value < 0.001 else f"{value:.3f}" if value < 0.1 else f"{value:.2f}"


def _with_p(value: float) -> str:
    text = _p(value)
    return f"Holm p {text}"


def _amount(metric: str, value: float, *, signed: bool = False) -> str:
    """A difference in the unit that a reader expects."""
    sign = "+" if signed else ""
    if metric == "accuracy":
        return f"{value * 100:{sign}.1f}"
    if metric == "perplexity":  # of log perplexities
        return f"{(math.exp(value) - 1) * 100:{sign}.1f}%"
    return f"{value:{sign}.3f}"


def _unit(metric: str) -> str:
    return {"accuracy": " points", "perplexity": " of the perplexity"}.get(metric, " nats per token")


def _interval(metric: str, low: float, high: float, confidence: float) -> str:
    if math.isnan(low) or math.isnan(high):
        return "no interval"
    return f"{confidence:.0%} interval {_amount(metric, low)} to {_amount(metric, high)}"


class _Writer:
    def __init__(self, stats: SweepStatistics, infos: Mapping[str, ArmInfo], config: SweepConfig) -> None:
        self.stats = stats
        self.infos = infos
        self.config = config
        self.alpha = config.statistics.alpha
        self.confidence = config.statistics.confidence

    # ------------------------------------------------------------ words

    def arm(self, name: str) -> str:
        """An arm as a reader knows it."""
        if name == BASE:
            return "the untuned model"
        info = self.infos[name]
        how = "full-rank " if info.method == "full" else ""
        if info.is_baseline:
            word = "all-layer" if info.mask and set(info.mask) == {"1"} else "the baseline"
            return f"{word} ({name})"
        if info.is_random:
            return f"{how}random blocks ({name})"
        region = region_of(info)
        return f"{how}{region} ({name})" if region else f"{how}{name}".strip()

    def found(self, row: pd.Series) -> bool:
        """Whether a comparison counts as a difference after Holm's correction."""
        return bool(row["p_holm"] < self.alpha)

    def sentence(self, row: pd.Series) -> str:
        """One comparison."""
        metric, difference = str(row["metric"]), float(row["difference"])
        a, b = self.arm(str(row["a"])), self.arm(str(row["b"]))
        low, high = float(row["low"]), float(row["high"])
        effect = ""
        if not math.isnan(float(row["effect_size"])):
            name = {"cohens_h": "Cohen's h", "cohens_d": "Cohen's d"}.get(str(row["effect"]), str(row["effect"]))
            effect = f", {name} {abs(float(row['effect_size'])):.2f}"
        if not self.found(row):
            return (f"{a} against {b}: not distinguishable at this n (difference "
                    f"{_amount(metric, difference, signed=True)}{_unit(metric)}, "
                    f"{_interval(metric, low, high, self.confidence)}, {_with_p(float(row['p_holm']))}).")
        better = row["better"] > 0
        winner, loser = (a, b) if better else (b, a)
        if difference < 0:  # told as a positive amount
            difference, low, high = -difference, -high, -low
        return (f"{winner} beats {loser} by {_amount(metric, difference)}{_unit(metric)}, "
                f"{_interval(metric, low, high, self.confidence)}, {_with_p(float(row['p_holm']))}{effect}.")

    # ------------------------------------------------------------ paragraphs

    def setting(self, records: Sequence[RunRecord]) -> str:
        seeds = len(self.config.seeds)
        items = ", ".join(f"{m.task} {len(m.items)}" for m in self.stats.matrices.values())
        tests = int(self.stats.family("evaluation")["p"].notna().sum()) if len(self.stats.comparisons) else 0
        text = (f"{len(self.infos)} arms on {self.config.model}, {seeds} seed{'s' if seeds > 1 else ''}; items: "
                f"{items or 'none'}. A difference counts as found where its p value, adjusted by Holm over all "
                f"{tests} comparisons between arms, is below {self.alpha:g}; intervals are not adjusted.")
        if seeds == 1:
            text += (" With one seed the tests speak about other items only: another seed could give another "
                     "order.")
        base = next((a for a in self.infos.values() if a.is_baseline), None)
        if base is not None:
            unequal = [f"{a.name} {a.params:,}" for a in self.infos.values() if abs(a.params / base.params - 1) > 0.05]
            if unequal:
                text += (f" Not at equal parameters (the baseline has {base.params:,}): {', '.join(unequal)}; "
                         "differences from these may come from size as well as from place.")
        if len({a.method for a in self.infos.values()}) > 1:
            text += (" Arms of different methods have learning rates of their own; a difference between methods "
                     "holds for these rates only.")
        rates = self.stats.rates
        if any(len({r.learning_rate for r in records if r.arm == a and r.status == "done"}) > 1 for a in rates):
            text += " Learning rates were chosen per arm by validation loss: " + ", ".join(
                f"{a} {r:g}" for a, r in rates.items()) + "."
        return text

    def failures(self, records: Sequence[RunRecord]) -> str:
        failed = [r for r in records if r.status == "failed"]
        if not failed:
            return ""
        lines = [f"- {r.key}: {r.reason}" for r in failed]
        return f"{len(failed)} of {len(records)} runs failed and have no score:\n" + "\n".join(lines)

    def task(self, task: str) -> str:
        matrix = self.stats.matrices.get(task)
        if matrix is None:
            return f"{task}: no run has a score."
        lines = [f"{task} ({matrix.metric}, {'higher' if matrix.higher_is_better else 'lower'} is better; "
                 f"{len(matrix.items)} items)"]
        lines += self._gains(task)
        rows = self.stats.family("evaluation")
        rows = rows[rows["task"] == task] if not rows.empty else rows
        found = [r for _, r in rows.iterrows() if self.found(r)]
        open_ = [r for _, r in rows.iterrows() if not self.found(r)]
        lines.append("Differences that the data support:" if found else
                     "No difference between arms is supported by the data.")
        lines += [f"- {self.sentence(r)}" for r in found]
        if open_:
            lines.append("Differences that the data do NOT support:")
            lines += [f"- {self.sentence(r)}" for r in open_]
        smallest = detectable_after(self.stats.comparisons, family="evaluation", task=task,
                                    confidence=self.confidence, alpha=self.alpha,
                                    power=self.config.statistics.power)
        if not math.isnan(smallest):
            lines.append(f"With these items and seeds a true difference of about {_amount(matrix.metric, smallest)}"
                         f"{_unit(matrix.metric)} would be found with a chance of "
                         f"{self.config.statistics.power:.0%} after correction; smaller ones are easily missed, so "
                         "\"not distinguishable\" does not mean equal.")
        lines += self._ranking(task)
        lines += self._shape(task)
        lines += self._unbeaten(task)
        return "\n".join(lines)

    def _gains(self, task: str) -> list[str]:
        rows = self.stats.family("gain")
        rows = rows[rows["task"] == task] if not rows.empty else rows
        if rows.empty:
            return []
        better = [str(r["a"]) for _, r in rows.iterrows() if self.found(r) and r["better"] > 0]
        worse = [str(r["a"]) for _, r in rows.iterrows() if self.found(r) and r["better"] < 0]
        rest = [str(a) for a in rows["a"] if a not in better and a not in worse]
        text = f"Against the untuned model {len(better)} of {len(rows)} arms are better"
        if worse:
            text += f", worse: {', '.join(worse)}"
        if rest:
            text += f", not distinguishable: {', '.join(rest)}"
        return [text + f" (Holm over {int(self.stats.family('gain')['p'].notna().sum())} tests)."]

    def _ranking(self, task: str) -> list[str]:
        if self.stats.ranking.empty:
            return []
        rows = self.stats.ranking[self.stats.ranking["task"] == task]
        if len(rows) < 2:
            return []
        top = rows.sort_values("best", ascending=False).head(3)
        told = ", ".join(f"{self.arm(str(r['arm']))} in {r['best']:.0%}" for _, r in top.iterrows()
                         if r["best"] >= 0.005)
        first = top.iloc[0]
        sure = "" if first["best"] >= self.confidence else " The data do not single out a best arm."
        return [f"Best under resampling of items and seeds: {told}.{sure}"]

    def _shape(self, task: str) -> list[str]:
        if self.stats.inverted_u.empty:
            return []
        lines = []
        for _, row in self.stats.inverted_u[self.stats.inverted_u["task"] == task].iterrows():
            how = "full-rank updates" if row["method"] == "full" else str(row["method"]).upper().replace("LORA", "LoRA")
            if row["p"] < self.alpha:
                lines.append(f"Inverted U over the {row['segments']} segments ({how}): supported, arms get better "
                             f"with depth and then worse (p {_p(float(row['p']))}), peak near depth {row['peak']:.2f}.")
            else:
                lines.append(f"Inverted U over the {row['segments']} segments ({how}): NOT supported "
                             f"(p {_p(float(row['p']))}); the best single segment is {row['best']}.")
        return lines

    def _unbeaten(self, task: str) -> list[str]:
        if self.stats.pareto.empty:
            return []
        rows = self.stats.pareto[self.stats.pareto["task"] == task]
        views = []
        for column, word in (("front_forgetting", "retention"), ("front_params", "parameters"),
                             ("front_train_seconds", "training time")):
            names = [str(a) for a in rows.loc[rows[column].fillna(False).astype(bool), "arm"]]
            if names:
                views.append(f"{word}: {', '.join(names)}")
        return [f"By their means no other arm is better on both gain and {'; '.join(views)}."] if views else []

    def _change(self, row: pd.Series) -> str:
        metric = str(row["metric"])
        return (f"{self.arm(str(row['a']))}: {_amount(metric, float(row['difference']), signed=True)}{_unit(metric)}, "
                f"{_interval(metric, float(row['low']), float(row['high']), self.confidence)}, "
                f"{_with_p(float(row['p_holm']))}.")

    def retention(self) -> str:
        rows = self.stats.family("retention")
        if rows.empty:
            return ""
        lines = []
        for task in dict.fromkeys(rows["task"]):
            own = rows[(rows["task"] == task)]
            against = own[own["b"] == BASE]
            metric = str(own["metric"].iloc[0])
            lost = [r for _, r in against.iterrows() if self.found(r) and r["better"] < 0]
            gained = [r for _, r in against.iterrows() if self.found(r) and r["better"] > 0]
            lines.append(f"Retention on {task} ({metric}, change from the untuned model; Holm over "
                         f"{int(rows['p'].notna().sum())} tests)")
            for name, part in (("Forgets:", lost), ("Improves:", gained)):
                if part:
                    lines.append(name)
                    lines += [f"- {self._change(r)}" for r in part]
            same = [str(r["a"]) for _, r in against.iterrows() if not self.found(r)]
            if same:
                lines.append(f"No change shown for {', '.join(same)}.")
            others = [r for _, r in own[own["b"] != BASE].iterrows() if self.found(r)]
            if others:
                lines.append("Against the baseline:")
                lines += [f"- {self.sentence(r).replace(' beats ', ' keeps more than ')}" for r in others]
            elif len(own) > len(against):
                lines.append("No arm is shown to keep more or less than the baseline.")
        return "\n".join(lines)

    # ------------------------------------------------------------ the paper's claims

    def claims(self) -> str:
        """The paper's findings as hypotheses, each with what this sweep says."""
        lines = []
        for task in (t.label for t in self.config.evaluation):
            rows = self.stats.family("evaluation")
            own = rows[rows["task"] == task] if not rows.empty else rows
            if own.empty:
                continue
            for text, left, right in (
                    ("tuning a middle segment beats tuning all layers at equal parameters", self._middle,
                     self._baseline),
                    ("a middle segment beats the last one", self._middle, self._late),
                    ("a middle segment beats the first one", self._middle, self._early),
                    ("a middle segment beats random blocks", self._middle, self._random)):
                if said := self._judge(own, left, right):
                    lines.append(f"- {task}: {text}: {said}")
        kept = self.stats.family("retention")
        for task in dict.fromkeys(kept["task"]) if not kept.empty else []:
            if said := self._judge(kept[kept["task"] == task], self._middle, self._baseline):
                lines.append(f"- {task}: middle segments forget less than all layers: {said}")
        return "The paper's claims as hypotheses:\n" + "\n".join(lines) if lines else ""

    def _middle(self, name: str) -> bool:
        return name in self.infos and self.infos[name].method != "full" and region_of(self.infos[name]) == "middle"

    def _late(self, name: str) -> bool:
        return name in self.infos and region_of(self.infos[name]) == "late"

    def _early(self, name: str) -> bool:
        return name in self.infos and region_of(self.infos[name]) == "early"

    def _random(self, name: str) -> bool:
        return name in self.infos and self.infos[name].is_random

    def _baseline(self, name: str) -> bool:
        return name in self.infos and self.infos[name].is_baseline

    def _judge(self, rows: pd.DataFrame, left: object, right: object) -> str:
        assert callable(left)
        assert callable(right)
        won: list[tuple[str, str]] = []
        lost: list[tuple[str, str]] = []
        open_: list[tuple[str, str]] = []
        for _, row in rows.iterrows():
            a, b = str(row["a"]), str(row["b"])
            if left(a) and right(b):
                subject, sign = (a, b), 1
            elif left(b) and right(a):
                subject, sign = (b, a), -1
            else:
                continue
            place = open_ if not self.found(row) else won if row["better"] * sign > 0 else lost
            place.append(subject)
        if not (won or lost or open_):
            return ""

        def names(pairs: Iterable[tuple[str, str]]) -> str:
            return ", ".join(a if right == self._baseline else f"{a} against {b}" for a, b in pairs)

        total = len(won) + len(lost) + len(open_)
        if won and not lost:
            head = "supported" if len(won) == total else "supported in part"
        elif lost and not won:
            head = "contradicted" if len(lost) == total else "NOT supported"
        elif won:
            head = "mixed"
        else:
            head = "NOT supported, not distinguishable at this n"
        detail = [f"{word}: {names(part)}" for word, part in
                  (("better", won), ("worse", lost), ("not distinguishable", open_)) if part]
        return f"{head} ({'; '.join(detail)})."
