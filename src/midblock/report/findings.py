"""The first screen of a report: what the runs say, what they do not, and the command to run next."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from midblock.quantities import find
from midblock.reading import printable
from midblock.report.charts import Chart
from midblock.report.collect import Run, sweeps_in
from midblock.results import Answer
from midblock.segments import where_most, zone_means

__all__ = ["Findings", "answer_of", "findings_of"]

_WHERE = ("weight_change_relative", "change_intensity_relative", "cosine")
_NEXT = "Next: "  # how a verdict names the command to run
_KEY_METRICS = ("cosine", "weight_change_relative", "accuracy", "cka_debiased", "loss", "effective_rank")


@dataclass(frozen=True)
class Findings:
    """Sentences for a reader who reads nothing else.

    Attributes:
        answer: What was found, most important first.
        limits: What these runs do not support.
        command: What to run next.
        key: Ids of at most three charts that carry the answer.
    """

    answer: list[str]
    limits: list[str]
    command: str
    key: list[str]


def answer_of(findings: Mapping[str, Any]) -> Answer:
    """The first finding, the first limit, and what to run next, of `Findings` as they are kept."""
    answer, limits = findings["answer"], findings["limits"]
    return Answer(answer[0] if answer else "No finding: none of these runs has a reading.", limits[0] if limits else "",
                  tuple(shlex.split(findings["command"])[1:]))


def findings_of(runs: Sequence[Run], charts: Sequence[Chart]) -> Findings:
    """The answer that the runs' own tables and verdicts give."""
    answer = [*_verdicts(runs), *_where(runs), *_readings(runs)]
    return Findings([printable(a) for a in answer[:6]], _limits(runs), printable(_next(runs)), _key(charts))


def _verdicts(runs: Sequence[Run]) -> list[str]:
    return [f"{name}: {run.summary.splitlines()[0]}" for name, run in sweeps_in(runs) if run.summary]


def _where(runs: Sequence[Run]) -> list[str]:
    """Where tuning acted most, from the mean of early, middle and late depths; data sets that agree in one sentence."""
    found: dict[tuple[str, str, str], dict[str, dict[str, float]]] = {}
    for run in runs:
        if run.command not in ("profile", "weights"):
            continue
        frame = run.frame[run.frame["side"].isin(["difference", "pair"])]
        if "matrix" in frame:
            frame = frame[frame["matrix"].isna() | (frame["matrix"] == "all")]
        for metric in _WHERE:
            rows = frame[(frame["metric"] == metric) & frame["kind"].isin(["hidden", "block"])]
            layers = pd.to_numeric(rows["layer"], errors="coerce")
            if len(rows) < 5 or layers.isna().any():
                continue
            what = "blocks" if (rows["kind"] == "block").all() else "hidden states"
            stages = rows["stage"].fillna("") if "stage" in rows else pd.Series("", index=rows.index)
            for stage, part in rows.groupby(stages, sort=False):
                away = (part["value"] - (find(metric).unchanged if find(metric).paired else 0.0)).abs()
                zones = zone_means(layers[part.index].astype(int), away, int(layers.max()))
                means = {str(zone): value for zone, value in zones.items()}
                words = where_most(means, what) if (away > 0).any() else ""
                who = run.pair if stages.nunique() == 1 else f"{run.pair} ({stage})"
                found.setdefault((who, find(metric).label.lower(), words), {})[run.data] = means
            break
    return [_sentence(*key, by_data) for key, by_data in found.items()]


def _sentence(pair: str, label: str, words: str, by_data: Mapping[str, Mapping[str, float]]) -> str:
    *most, last = by_data
    names = f"{', '.join(most)} and {last}" if most else last
    place = f"{pair}{f' on {names}' if names else ''}"
    if not words:
        return f"{place}: {label} shows no change at any depth."
    means = pd.DataFrame(list(by_data.values())).mean()
    return (f"{place}: by {label}, {words} (mean change "
            + ", ".join(f"{zone} {value:.3g}" for zone, value in means.items()) + ").")


def _readings(runs: Sequence[Run]) -> list[str]:
    """The first line of the other commands' own readings."""
    return [f"{run.command.capitalize()}: {run.summary.splitlines()[0]}" for run in runs
            if run.command not in ("sweep", "profile", "weights", "demo") and run.summary]


def _limits(runs: Sequence[Run]) -> list[str]:
    commands = {run.command for run in runs}
    limits = []
    if "sweep" not in commands:
        limits.append("No sweep is among these runs: where a model changed says what tuning did, not which blocks are "
                      "best to tune.")
    small = [run for run in runs if run.command == "profile" and run.frame["n"].max() < 100]
    if small:
        most = int(max(r.frame["n"].max() for r in small))
        limits.append(f"The profile rests on {most} samples (the paper: 1,000 pooled, 100 at the token level); "
                      "intervals say what that leaves open.")
    for run in runs:
        counts = run.record.get("counts")
        rounding = counts.get("rounding") if run.command == "weights" and isinstance(counts, dict) else None
        if isinstance(rounding, dict) and rounding:
            limits.append(f"{run.pair}: {', '.join(map(str, rounding))} {'are' if len(rounding) > 1 else 'is'} between "
                          "checkpoints stored in different precision: part of the change of every weight is rounding, "
                          "also in blocks that tuning left alone.")
    if len({run.pair for run in runs}) < 3:
        limits.append("Claims about models in general need at least three independent pairs.")
    return limits


def _next(runs: Sequence[Run]) -> str:
    """What a sweep's verdict says to run; without one, the plan of the middle on the same model and data."""
    for run in runs:
        for line in run.summary.splitlines():
            if run.command == "sweep" and line.startswith(_NEXT):
                here = {"config.yaml": str(run.folder / "config.yaml"), "NEW": f"{run.folder}-next"}
                return shlex.join(here.get(word, word) for word in line.removeprefix(_NEXT).split())
    specs = [str(m.get("spec") or "") for run in runs for m in run.models.values()]
    model = next((s for s in specs if s), "smollm2")
    data = next((str(run.record.get("settings", {}).get("data") or run.data) for run in runs if run.data), "arithmetic")
    return f"midblock tune {shlex.quote(model)} --data {shlex.quote(data)} --mask 01100 --dry-run"


def _key(charts: Sequence[Chart]) -> list[str]:
    """At most three charts of different sections: arms of a sweep, then the measures that carry the answer."""
    ranked = [c for c in charts if c["section"] == "arms" and c["kind"] == "bars"][:1]
    for metric in _KEY_METRICS:
        ranked += [c for c in charts if c.get("metric") == metric]
    ranked += [c for c in charts if c["section"] == "segments"] + [c for c in charts if c["kind"] == "lines"]
    chosen: list[Chart] = []
    for chart in ranked:
        if len(chosen) < 3 and chart["section"] not in {c["section"] for c in chosen}:
            chosen.append(chart)
    return [str(c["id"]) for c in chosen]
