"""What a sweep leaves behind: the tidy table, one line per score, figures and the verdict."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from midblock.figures import lines as line_figure
from midblock.figures import scatter_pareto, segment_bars
from midblock.provenance import RunFolder
from midblock.quantities import label_of
from midblock.results import Answer, Estimate, Table, TableResult
from midblock.settings.sweep import SweepConfig
from midblock.sweeps.arms import BASE, METHODS
from midblock.sweeps.claims import claims
from midblock.sweeps.planning import SweepPlan
from midblock.sweeps.records import RunRecord
from midblock.sweeps.scores import SHARES, ArmInfo, infos_of
from midblock.sweeps.statistics import SweepStatistics, analyse
from midblock.sweeps.verdict import verdict
from midblock.writing import atomic_path

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["SweepResult"]


@dataclass
class SweepResult(TableResult):
    """A finished sweep (or what there is of one).

    Attributes:
        config: Its configuration.
        infos: The arms by name.
        records: Every run.
    """

    config: SweepConfig
    infos: dict[str, ArmInfo]
    records: list[RunRecord]

    @classmethod
    def of(cls, config: SweepConfig, plan: SweepPlan, records: Sequence[RunRecord]) -> SweepResult:
        """The result of these runs."""
        return cls(config, infos_of(plan.arms, plan.work), list(records))

    @cached_property
    def statistics(self) -> SweepStatistics:
        """Intervals, comparisons, ranks, Pareto view and inverted U."""
        return analyse(self.records, self.infos, self.config)

    @property
    def failed(self) -> list[RunRecord]:
        """Runs without a score."""
        return [r for r in self.records if r.status == "failed"]

    @cached_property
    def table(self) -> Table:
        """The tidy table: arms over seeds with intervals, single runs, and differences."""
        table = Table()
        stats = self.statistics
        runs: dict[str, list[RunRecord]] = {}
        for record in self.records:
            runs.setdefault(record.arm, []).append(record)
        for row in stats.scores.to_dict(orient="records"):
            arm = str(row["arm"])
            own = [r for r in runs.get(arm, []) if r.status == "done" and r.learning_rate == stats.rates.get(arm)]
            if math.isnan(row["value"]):
                table.add_undefined("segment", self._layer(arm), row["metric"], _side(arm), self._why(arm),
                                    n=row["n"], **self._extra(arm, row["task"], row["role"], None))
                continue
            table.add("segment", self._layer(arm), row["metric"], _side(arm),
                      Estimate(row["value"], row["low"], row["high"], row["n"]),
                      **self._extra(arm, row["task"], row["role"], None),
                      learning_rate=stats.rates.get(arm), n_seeds=row["n_seeds"], **_means(own),
                      **{name: row[name] for name in SHARES if not math.isnan(row[name])})
        for record in self.records:
            for label in stats.matrices:
                extra = self._extra(record.arm, label, stats.matrices[label].role, record.seed)
                metric = stats.matrices[label].metric
                rate: dict[str, Any] = {"learning_rate": record.learning_rate}
                if record.status == "failed":
                    table.add_undefined("segment", self._layer(record.arm), metric, _side(record.arm),
                                        record.reason, **extra, **rate)
                elif record.seed is not None:
                    scored = record.tasks[label]
                    table.add("segment", self._layer(record.arm), metric, _side(record.arm), scored.value,
                              n=len(scored.items), **extra, **rate, **_means([record]))
        for row in stats.comparisons.to_dict(orient="records"):
            metric = "log_perplexity" if row["metric"] == "perplexity" else row["metric"]
            table.add("segment", self._layer(row["a"]), metric, "difference",
                      Estimate(row["difference"], row["low"], row["high"], row["n_items"]),
                      **self._extra(row["a"], row["task"], row["family"], None), versus=row["b"],
                      p=row["p"], p_holm=row["p_holm"], conclusion=row["conclusion"], effect_size=row["effect_size"],
                      effect=row["effect"],
                      test=row["test"], n_seeds=row["n_seeds"])
        return table

    @cached_property
    def claims(self) -> pd.DataFrame:
        """The paper's findings as hypotheses, each with what this sweep says of it."""
        return claims(self.statistics, self.infos, self.config.statistics.alpha)

    def answer(self) -> Answer:
        """The verdict's first line, what it rests on, and the command that helps further."""
        first, *rest = self.summary().splitlines()
        following = next((line for line in rest if line.startswith("Next: midblock ")), "")
        return Answer(first, next((line for line in rest if line != following), ""),
                      tuple(shlex.split(following.removeprefix("Next: midblock "))))

    def details(self) -> list[str]:
        """The verdict's further lines."""
        answer = self.answer()
        return [line for line in self.summary().splitlines()[1:]
                if line != answer.means and not line.startswith("Next: ")]

    def summary(self) -> str:
        """The verdict in plain language: the answer, then at most ten lines."""
        return verdict(self.statistics, self.infos, self.records, self.config)

    def overview(self) -> pd.DataFrame:
        """One row per arm: its parameters, every task's score with interval, time, memory."""
        rows = []
        stats = self.statistics
        for arm in (BASE, *self.infos):
            own = [r for r in self.records if r.arm == arm and r.status == "done"
                   and r.learning_rate == stats.rates.get(arm)]
            missing = "failed" if any(r.arm == arm for r in self.failed) else ""
            row: dict[str, Any] = {"arm": arm, "params": self.infos[arm].params if arm != BASE else 0}
            for task in stats.matrices:
                found = stats.scores[(stats.scores["arm"] == arm) & (stats.scores["task"] == task)]
                row[task] = missing if found.empty or math.isnan(found["value"].iloc[0]) else (
                    f"{found['value'].iloc[0]:.3f} [{found['low'].iloc[0]:.3f}, {found['high'].iloc[0]:.3f}]")
            means = _means(own)
            rows.append({**row, "tokens/s": means["tokens_per_second"], "seconds": means["seconds"],
                         "peak GB": None if means["peak_memory"] is None else means["peak_memory"] / 1e9})
        return pd.DataFrame(rows)

    def block_steps(self) -> pd.DataFrame:
        """What each block did while the arms were trained: ``arm``, ``learning_rate``, ``seed``, ``step``, ``block``,
        ``gradient_norm``, ``update_norm``, ``drift``."""
        return pd.DataFrame([{"arm": r.arm, "learning_rate": r.learning_rate, "seed": r.seed, **step}
                             for r in self.records for step in r.training.get("blocks", [])])

    def figures(self) -> dict[str, Figure]:
        """Score by segment, gain against retention, and the curve over depth for every evaluation task."""
        stats = self.statistics
        found: dict[str, Figure] = {}
        for task, matrix in stats.matrices.items():
            name = "".join(c if c.isalnum() else "-" for c in task)
            rows = stats.scores[(stats.scores["task"] == task) & stats.scores["value"].notna()]
            if not rows.empty:
                baseline = self.config.arms.baseline
                found[f"score-{name}"] = segment_bars(
                    rows.rename(columns={"arm": "layer"}), title=f"{task} by tuned segments", metric=matrix.metric,
                    baseline=baseline if baseline in set(rows["arm"]) else None)
            if matrix.role == "evaluation":
                found |= self._pareto_figure(task, name)
                found |= self._depth_figure(task, name)
        return found

    def _pareto_figure(self, task: str, name: str) -> dict[str, Figure]:
        pareto = self.statistics.pareto
        rows = pareto[pareto["task"] == task] if not pareto.empty else pareto
        if rows.empty or rows["forgetting"].isna().all():
            return {}
        shown = rows.assign(kept=-rows["forgetting"])
        return {f"gain-retention-{name}": scatter_pareto(
            shown, "kept", "gain", title=f"{task}: gain against retention",
            x_label="retention: change of log likelihood of general text (nats per token)",
            y_label=f"gain on {task} over the untuned model")}

    def _depth_figure(self, task: str, name: str) -> dict[str, Figure]:
        scores = self.statistics.scores
        rows = []
        for arm, info in self.infos.items():
            own = scores[(scores["task"] == task) & (scores["arm"] == arm)]
            if info.segment is None or own.empty:
                continue
            method, k, _ = info.segment
            rows.append({"depth": info.depth, "segments": f"{METHODS[method]}, K={k}",
                         **own.iloc[0][["value", "low", "high"]].to_dict()})
        frame = pd.DataFrame(rows)
        if len(frame) < 3:
            return {}
        matrix = self.statistics.matrices[task]
        better = "higher" if matrix.higher_is_better else "lower"
        return {f"depth-{name}": line_figure(
            frame, "depth", hue="segments", title=f"{task} over depth",
            x_label="mean relative depth of the tuned segment",
            y_label=f"{label_of(matrix.metric)}, {better} is better")}

    def samples(self) -> list[dict[str, Any]]:
        """One record per run, task and item: ``arm``, ``learning_rate``, ``seed``, ``task``, ``item``, ``score``."""
        return [{"arm": r.arm, "learning_rate": r.learning_rate, "seed": r.seed, "task": label, "item": item,
                 "score": None if math.isnan(score) else score}
                for r in self.records for label, scored in r.tasks.items()
                for item, score in zip(scored.items, scored.scores, strict=True)]

    def write(self, run: RunFolder) -> list[str]:
        """Write tables, samples, verdict and figures into a run folder; returns the names."""
        from midblock.figures import save_figure

        stats = self.statistics
        names = [run.write_table(self.table).name,
                 run.write_table(stats.comparisons, "comparisons.csv").name,
                 run.write_table(self.claims, "claims.csv").name,
                 run.write_table(stats.ranking, "ranking.csv").name,
                 run.write_table(stats.pareto, "pareto.csv").name,
                 run.write_table(self.overview(), "arms.csv").name,
                 run.write_text("verdict.txt", self.summary() + "\n").name]
        if len(blocks := self.block_steps()):
            names.append(run.write_table(blocks, "block_steps.csv").name)
        if not stats.inverted_u.empty:
            names.append(run.write_table(stats.inverted_u, "inverted_u.csv").name)
        path = run.path / "samples.jsonl"
        with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(s) + "\n" for s in self.samples())
        names.append(path.name)
        for name, figure in self.figures().items():
            names += [f"figures/{p.name}" for p in save_figure(figure, run.path / "figures", name)]
        run.publish(names, results={"failed": {r.key: r.reason for r in self.failed},
                                    "undefined_statistics": stats.undefined,
                                    "missing": {f"{t}, {a}": m for (t, a), m in stats.missing.items()}})
        return names

    def _layer(self, arm: str) -> str:
        if arm == BASE:
            return "0" * len(self.config.arms.baseline)
        return self.infos[arm].mask or arm

    def _extra(self, arm: str, task: str, role: str, seed: int | None) -> dict[str, Any]:
        info = self.infos.get(arm)
        return {"arm": arm, "mask": info.mask if info else self._layer(arm), "role": role, "task": task, "seed": seed,
                "method": info.method if info else "none", "params": info.params if info else 0}

    def _why(self, arm: str) -> str:
        return next((r.reason for r in self.failed if r.arm == arm), "no run of this arm has a score")


def _side(arm: str) -> str:
    return "base" if arm == BASE else "sft"


def _means(records: Sequence[RunRecord]) -> dict[str, Any]:
    """Tokens per second, seconds and peak memory of runs, averaged (memory: the largest)."""
    speed = [float(r.training["tokens_per_second"]) for r in records
             if isinstance(r.training.get("tokens_per_second"), int | float)]
    memory = [r.peak_memory_bytes for r in records if r.peak_memory_bytes is not None]
    return {"tokens_per_second": float(np.mean(speed)) if speed else None,
            "seconds": float(np.mean([r.seconds for r in records])) if records else None,
            "peak_memory": max(memory) if memory else None}

