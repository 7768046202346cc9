"""Do different data sets, seeds, steps and methods select the same layers?

A selection is the top share of the units of one run folder by one score. Every pair of selections gets
its Jaccard index beside what two random selections of these sizes have; pairs are grouped by what the two
differ in. ILA's claim of "nearly 90% overlap across data sets" is read with its chance level.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from midblock import stats
from midblock.errors import OutputError, SettingsError
from midblock.provenance import read_run, read_table
from midblock.results import Answer, Estimate, Table, TableResult
from midblock.selection.units import SCORES, top_units
from midblock.settings.base import name_of
from midblock.settings.locate import BLOCK_SCORES
from midblock.settings.overlap import OverlapSettings

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["CLAIM", "OverlapResult", "Selection", "overlap", "overlap_of", "read_selections"]

CLAIM = 0.9
"""The claim to test: "nearly 90% overlap" of the important layers across data sets (ILA's abstract)."""

_CLAIMED = "data (ila_score)"  # the group of pairs that the claim is about


@dataclass(frozen=True)
class Selection:
    """Scores of all units in one run, by one method."""

    folder: str
    data: str
    seed: int
    step: int | None
    """Step of training after which the scores were learned; None for scores without training."""
    method: str
    scores: dict[str, float]
    """Unit -> score, in the order of the model."""
    settings: str = ""
    """What else two runs may differ in (rank, unit, model ...), as text."""

    def label(self, others: Sequence[Selection]) -> str:
        """Short name that tells it from the others."""
        parts = [self.data or self.folder]
        for name, text in (("seed", f"s{self.seed}"), ("step", f"@{self.step}"), ("method", self.method)):
            if len({getattr(o, name) for o in others}) > 1:
                parts.append(text)
        if sum(o.key == self.key for o in others) > 1:
            parts.append(self.folder)
        return " ".join(parts)

    @property
    def key(self) -> tuple[Any, ...]:
        """What pairs are classified by."""
        return self.data, self.seed, self.step, self.method


def read_selections(folder: Path | str, methods: Sequence[str] | None = None) -> list[Selection]:
    """Every selection that a run folder of ``importance`` or ``locate`` holds.

    Args:
        folder: The run folder.
        methods: Scores to read; default: all of ILA and its controls (and of a locator) that are there.

    Raises:
        OutputError: no such run folder.
        SettingsError: none of the methods is there.
    """
    folder = Path(folder)
    run = read_run(folder, finished=True)
    if run.get("command") not in ("importance", "locate"):
        raise OutputError(f"{folder} holds a run of {run.get('command')!r}; overlap compares runs of importance "
                          "(or locate).")
    table = read_table(folder, columns=("kind", "layer", "metric", "value", "data", "seed"),
                       text=("matrix", "module", "data"), numbers=("value", "seed", "step"))
    wanted = tuple(methods) if methods is not None else (*SCORES, *BLOCK_SCORES)
    rows = table[(table["kind"] == "block") & table["metric"].isin(wanted)].copy()
    if rows.empty:
        raise SettingsError(f"{folder} has none of the scores {', '.join(wanted)}; it has: "
                            f"{', '.join(dict.fromkeys(table['metric'].astype(str)))}.")
    if "unit" not in rows:
        rows["unit"] = [f"block {b}" for b in rows["layer"]]
    if "step" not in rows:
        rows["step"] = math.nan
    settings = run.get("settings", {})
    told = {k: settings.get(k) for k in ("model", "models", "target_modules", "rank", "samples", "max_length")}
    rows["data"] = rows["data"].fillna("")
    found = []
    for (method, data, seed, step), part in rows.groupby(["metric", "data", "seed", "step"], sort=False, dropna=False):
        values = dict(zip(part["unit"].astype(str), part["value"].astype(float), strict=True))
        if any(math.isnan(v) for v in values.values()):
            raise SettingsError(f"{folder}: {method} is undefined for some units; leave it out with "
                                f"{name_of('methods')}.")
        found.append(Selection(folder.name, str(data), int(seed), None if math.isnan(step) else int(step), str(method),
                               values, str(told)))
    return found


def _difference(a: Selection, b: Selection, last: set[tuple[Any, ...]]) -> str:
    """What two selections differ in: data, seed, step, method, repeat, or several of them.

    The number of steps of an epsilon-stable end differs between data sets and seeds by itself; two
    last steps count as equal.
    """
    names = []
    for name in ("data", "seed", "step", "method"):
        if getattr(a, name) != getattr(b, name) and not (
                name == "step" and (a.folder, *a.key) in last and (b.folder, *b.key) in last):
            names.append(name)
    if not names:
        return "repeat" if a.settings == b.settings else "settings"
    return names[0] if len(names) == 1 else "several"


@dataclass
class OverlapResult(TableResult):
    """Overlap of all pairs of selections."""

    table: Table
    pairs: pd.DataFrame
    """One row per pair: a, b, differ, group, jaccard, low, high, expected, corrected, p, chance_low, chance_high."""
    labels: list[str]
    share: float
    units: int
    folders: tuple[str, ...] = ()
    """The run folders that were compared."""

    def matrix(self, column: str = "jaccard") -> npt.NDArray[np.float64]:
        """Symmetric matrix of a column of ``pairs`` over all selections; 1 on the diagonal."""
        found = np.eye(len(self.labels))
        place = {label: i for i, label in enumerate(self.labels)}
        for row in self.pairs.to_dict(orient="records"):
            i, j = place[row["a"]], place[row["b"]]
            found[i, j] = found[j, i] = row[column]
        return found

    def overview(self) -> pd.DataFrame:
        """One row per group of pairs."""
        rows = []
        frame = self.frame
        for group in dict.fromkeys(self.pairs["group"]):
            own = frame[frame["layer"] == group].set_index("metric")
            rows.append({"differ in": group, "pairs": int(own.loc["jaccard", "n"]),
                         **{m: _shown(own.loc[m]) for m in ("jaccard", "chance_jaccard", "corrected")}})
        return pd.DataFrame(rows)

    def answer(self) -> Answer:
        """The overlap of the first group of pairs beside chance, and what that makes of the claim."""
        frame = self.frame
        group = next(iter(self.pairs["group"]))
        own = frame[frame["layer"] == group].set_index("metric")
        part = self.pairs[self.pairs["group"] == group]
        alone = stats.random_share_jaccard(self.share)
        return Answer(
            f"Selections that differ in {group} overlap by {_shown(own.loc['jaccard'])} (Jaccard, top {self.share:.0%} "
            f"of {self.units} units, n = {len(part)} pairs), by chance {own.loc['chance_jaccard', 'value']:.2f}.",
            self._claim(alone, stats.chance_corrected(CLAIM, alone)),
            ("report", *self.folders) if self.folders else ())

    def details(self) -> list[str]:
        """What this model shows and what chance gives, per group of pairs."""
        alone = stats.random_share_jaccard(self.share)
        lines = [f"Top {self.share:.0%} of {self.units} units. Two random selections of that share have a Jaccard "
                 f"overlap of {alone:.2f} and share {self.share:.0%} of their units."]
        frame = self.frame
        for group in dict.fromkeys(self.pairs["group"]):
            own = frame[frame["layer"] == group].set_index("metric")
            part = self.pairs[self.pairs["group"] == group]
            lines.append(
                f"Pairs that differ in {group} ({len(part)}): Jaccard {_shown(own.loc['jaccard'])}, "
                f"{own.loc['chance_jaccard', 'value']:.2f} by chance; corrected {_shown(own.loc['corrected'])}; "
                f"{int((part['p_holm'] < 0.05).sum())} of {len(part)} above chance (Holm).")
        return lines

    def _claim(self, alone: float, corrected: float) -> str:
        told = (f'The claim to test is "about 90% overlap across data sets". At this share {CLAIM:.0%} would be '
                f"{corrected:.2f} after correction for chance, of which {alone:.2f} is the level of chance.")
        ila = self.pairs[self.pairs["group"] == _CLAIMED]
        if ila.empty:
            return f"{told} No two of these runs differ in the data alone by ILA's score, so it is not tested here."
        own = self.frame[(self.frame["layer"] == _CLAIMED) & (self.frame["metric"] == "jaccard")].iloc[0]
        if own["low"] > CLAIM:
            verdict = "more than claimed"
        elif own["high"] < CLAIM:
            verdict = "less than claimed"
        else:
            verdict = "compatible with the claim"
        above = "above chance" if own["low"] > ila["expected"].mean() else "not distinguishable from chance"
        return (f"{told} This model's ILA selections overlap by {_shown(own)} across data sets: {verdict}, {above} "
                f"({ila['corrected'].mean():.2f} corrected, {len(ila)} pairs).")

    def figures(self) -> dict[str, Figure]:
        """Matrices of the plain and of the chance-corrected overlap."""
        from midblock.figures import heatmap

        return {f"overlap-{column}": heatmap(self.matrix(column), self.labels, self.labels, title=title, label=label,
                                             limits=limits, centre=centre)
                for column, title, label, limits, centre in (
                    ("jaccard", f"Overlap of the top {self.share:.0%}", "Jaccard index", (0.0, 1.0), None),
                    ("corrected", f"Overlap of the top {self.share:.0%}, corrected for chance",
                     "0 = chance, 1 = equal", None, 0.0))}


def _shown(row: pd.Series) -> str:
    if math.isnan(row["low"]):
        return f"{row['value']:.2f}"
    return f"{row['value']:.2f} [{row['low']:.2f}, {row['high']:.2f}]"


def overlap(folders: Sequence[Path | str], *, settings: OverlapSettings | None = None, **overrides: Any
            ) -> OverlapResult:
    """Compare the selections of several run folders.

    Args:
        folders: Run folders of ``importance`` (or ``locate``).
        settings: See `OverlapSettings`.
        **overrides: Single fields of them; ``methods="ila_score,taylor,update_norm,random"`` compares the controls too.

    Raises:
        SettingsError: fewer than two selections, other units, or a setting out of range.
        OutputError: not such run folders.
    """
    chosen = OverlapSettings.of(settings, overrides)
    if len({Path(f).resolve() for f in folders}) < len(folders):
        raise SettingsError("one folder was given twice; it would agree with itself.")
    found = [s for folder in folders for s in read_selections(folder, chosen.methods)]
    if chosen.methods is None and any(s.method == "ila_score" for s in found):
        found = [s for s in found if s.method == "ila_score"]
    if chosen.steps == "last":
        found = [s for s in found if (s.folder, *s.key) in _last_steps(found)]
    return replace(overlap_of(found, settings=chosen), folders=tuple(map(str, folders)))


def _last_steps(selections: Sequence[Selection]) -> set[tuple[Any, ...]]:
    latest: dict[tuple[Any, ...], Selection] = {}
    for s in selections:
        key = (s.folder, s.data, s.seed, s.method, s.settings)
        if key not in latest or (s.step or 0) > (latest[key].step or 0):
            latest[key] = s
    return {(s.folder, *s.key) for s in latest.values()}


def overlap_of(selections: Sequence[Selection], *, settings: OverlapSettings | None = None, **overrides: Any
               ) -> OverlapResult:
    """Overlap of all pairs of selections of the same units.

    Intervals are percentile bootstraps over the units (the same resamples for all pairs); the range under chance is
    hypergeometric and exact.

    Raises:
        SettingsError: fewer than two selections, selections of other units, or a setting out of range.
    """
    chosen = OverlapSettings.of(settings, overrides)
    share, confidence = chosen.share, chosen.confidence
    if len(selections) < 2:
        raise SettingsError(f"an overlap needs at least two selections, found {len(selections)}; give more run folders "
                            f"of importance, {name_of('methods')}, or {name_of('steps')} all.")
    units = list(selections[0].scores)
    for other in selections[1:]:
        if set(other.scores) != set(units):
            raise SettingsError(f"{other.folder} scores {len(other.scores)} units and {selections[0].folder} "
                                f"{len(units)} others; compare runs on one model with the same unit and targets.")
    labels = _labels(selections)
    flags = np.array([np.isin(units, top_units({u: s.scores[u] for u in units}, share)) for s in selections])
    weights = stats.bootstrap_weights(len(units), chosen.replicates, chosen.seed)
    last = _last_steps(selections)
    rows: list[dict[str, Any]] = []
    draws: list[npt.NDArray[np.float64]] = []
    for i, j in itertools.combinations(range(len(selections)), 2):
        a, b = selections[i], selections[j]
        measured = stats.set_overlap(flags[i], flags[j], confidence)
        union = weights @ (flags[i] | flags[j])
        draw = np.divide(weights @ (flags[i] & flags[j]), union, out=np.full(len(weights), math.nan), where=union > 0)
        interval = stats.percentile_interval(measured.jaccard, draw, confidence)
        draws.append(draw)
        differ = _difference(a, b, last)
        group = f"{differ} ({a.method})" if a.method == b.method else differ
        rows.append({"a": labels[i], "b": labels[j], "differ": differ, "group": group,
                     "jaccard": measured.jaccard, "low": interval.low, "high": interval.high,
                     "shared": measured.shared, "expected": measured.expected, "corrected": measured.corrected,
                     "p": measured.p, "chance_low": measured.chance_low, "chance_high": measured.chance_high})
    pairs = pd.DataFrame(rows)
    pairs["p_holm"] = stats.holm(pairs["p"].to_numpy())
    table = Table()
    for row in pairs.to_dict(orient="records"):
        extra = {k: row[k] for k in ("a", "b", "differ", "group", "p", "p_holm", "chance_low", "chance_high")}
        extra["share"] = share
        name = f"{row['a']} | {row['b']}"
        table.add("model", name, "jaccard_pair", "pair",
                  Estimate(row["jaccard"], row["low"], row["high"], len(units)), **extra)
        table.add("model", name, "corrected_pair", "pair", row["corrected"], n=len(units), **extra)
    stacked = np.array(draws)
    for group in dict.fromkeys(pairs["group"]):
        member = (pairs["group"] == group).to_numpy()
        _group_rows(table, group, pairs[member], stacked[member], share, confidence)
    return OverlapResult(table, pairs, labels, share, len(units))


def _labels(selections: Sequence[Selection]) -> list[str]:
    labels = [s.label(selections) for s in selections]
    return [f"{label} ({s.folder})" if labels.count(label) > 1 else label
            for label, s in zip(labels, selections, strict=True)]


def _group_rows(table: Table, name: str, part: pd.DataFrame, draws: npt.NDArray[np.float64], share: float,
                confidence: float) -> None:
    """Means over the pairs of one group; resampled units are shared by its pairs."""
    expected = float(part["expected"].mean())
    index = stats.percentile_interval(float(part["jaccard"].mean()), draws.mean(axis=0), confidence)
    n = len(part)
    table.add("model", name, "jaccard", "pair", Estimate(index.value, index.low, index.high, n), share=share)
    table.add("model", name, "chance_jaccard", "pair", expected, n=n, share=share)
    low, high = (stats.chance_corrected(v, expected) for v in (index.low, index.high))
    table.add("model", name, "corrected", "pair", Estimate(float(part["corrected"].mean()), low, high, n), share=share)
    table.add("model", name, "shared", "pair", float(part["shared"].mean()), n=n, share=share)
