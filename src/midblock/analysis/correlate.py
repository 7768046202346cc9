"""Correlation over depth of everything that was measured per layer (paper figure 5).

Run folders of `profile`, `lens`, `weights`, `gradients`, `steer` and `swap` are read and set side by side:
the points are the blocks. Hidden h = b+1, the output of block b, stands beside block b. Hidden 0,
the embedding output, belongs to no block and is left out (or is a point of its own, for pairs of
hidden quantities only). Where one side is known per depth segment only, the other is
averaged over the blocks of each segment, so that n is the number of segments and not more.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from midblock import stats
from midblock.errors import DataError, SettingsError
from midblock.progress import Progress, silent
from midblock.provenance import read_run, read_table
from midblock.quantities import find, known, label_of
from midblock.results import Answer, Estimate, Table, TableResult
from midblock.segments import segment_bounds
from midblock.settings import CorrelateSettings
from midblock.stats.correlation import Method

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["METHODS", "CorrelationResult", "correlate"]

METHODS: tuple[Method, ...] = ("pearson", "spearman")
_CHANGES = ("difference", "pair")
#: Matrices (and groups of them) taken from tables that have such a column, unless others are named.
_MATRICES = ("qkvo", "mlp")
_WHOLE = "all"
_NEVER_QUALIFY = {"kind", "layer", "metric", "side", "value", "low", "high", "n", "tensor", "seed", "t", "p", "p_holm",
                  "tokens"}


@dataclass(frozen=True)
class _Series:
    """One quantity over the layers of one folder."""

    metric: str
    labels: tuple[tuple[str, str], ...]
    """(column, value) of everything that tells it from others of the same metric."""
    kind: Literal["hidden", "block", "segment"]
    values: dict[int, float]
    """Hidden, block, or segment number -> value."""
    segments: int = 0
    """K of a segment quantity."""


@dataclass
class CorrelationResult(TableResult):
    """Correlations of all pairs of per-layer quantities."""

    table: Table
    """The tidy table: metric ``pearson`` or ``spearman``, columns ``a``, ``b``, ``p`` and ``p_holm``."""
    pairs: pd.DataFrame
    """Columns of `midblock.stats.CORRELATION_COLUMNS` and ``points`` (``blocks`` or ``K segments``)."""
    layers: pd.DataFrame
    """What was correlated: one row a hidden state (``hidden`` = b+1, and ``block`` = b), one column a quantity."""
    num_blocks: int
    counts: dict[str, Any] = field(default_factory=dict)
    """Folders read, quantities, notes."""
    families: dict[str, str] = field(default_factory=dict)
    """Quantity -> its family (`midblock.quantities`): two of one family measure nearly the same."""

    def matrix(self, method: Method = "pearson") -> pd.DataFrame:
        """Symmetric matrix of correlations, 1 on the diagonal, NaN where undefined."""
        names = list(dict.fromkeys([*self.pairs["a"], *self.pairs["b"]]))
        square = pd.DataFrame(np.eye(len(names)), index=names, columns=names)
        part = self.pairs[self.pairs["method"] == method]
        places = [square.index.get_indexer(part[side]) for side in ("a", "b")]
        values = square.to_numpy(copy=True)
        values[places[0], places[1]] = values[places[1], places[0]] = part["r"]
        return pd.DataFrame(values, index=names, columns=names)

    def strongest(self, count: int = 10, method: Method = "spearman", *, related: bool = False) -> pd.DataFrame:
        """The pairs with the largest absolute correlation below 1 (1: one quantity on two scales).

        Args:
            count: How many.
            method: ``pearson`` or ``spearman``.
            related: Also pairs of one family (CKA and its debiased form), which go together by construction. They are
                taken as well where there are no others.
        """
        part = self.pairs[(self.pairs["method"] == method) & (self.pairs["r"].abs() < 1 - 1e-9)]
        if not related:
            apart = part[part["a"].map(self.families.get).fillna(part["a"])
                         != part["b"].map(self.families.get).fillna(part["b"])]
            part = apart if len(apart) else part
        # what differs by rounding alone stays in the order of the quantities, on every machine
        order = part["r"].abs().round(12).sort_values(ascending=False, kind="stable").index
        return part.loc[order].head(count).drop(columns=["method", "reason"]).reset_index(drop=True)

    def answer(self) -> Answer:
        """The strongest correlation of two quantities of different families."""
        shown: Method = "spearman" if (self.pairs["method"] == "spearman").any() else "pearson"
        best = self.strongest(1, shown)
        after = ("report", *self.counts["folders"])
        if best.empty:
            return Answer("No correlation is defined: every quantity is constant over depth, or one on two scales.",
                          "Nothing can be said of which measures go together.", after)
        row, part = best.iloc[0], self.pairs[self.pairs["method"] == shown]
        interval = "" if math.isnan(row["low"]) else f" [{row['low']:+.2f}, {row['high']:+.2f}]"
        return Answer(
            f"Of quantities of different families, {_words(row['a'])} and {_words(row['b'])} go together most over "
            f"depth: {shown} {row['r']:+.2f}{interval}, n = {int(row['n'])} {row['points'].split()[-1]}; "
            f"{int((part['p_holm'] < 0.05).sum())} of {int(part['r'].notna().sum())} pairs have Holm p < 0.05.",
            "Neighbouring layers are no independent points: this describes depth profiles, and chooses no block.",
            after)

    def details(self) -> list[str]:
        """How many pairs hold up, and the strongest."""
        lines = []
        for method in METHODS:
            part = self.pairs[self.pairs["method"] == method]
            if part.empty:
                continue
            defined = int(part["r"].notna().sum())
            lines.append(f"{method}: {int((part['p_holm'] < 0.05).sum())} of {defined} pairs have Holm p < 0.05"
                         + (f" ({len(part) - defined} undefined)." if defined < len(part) else "."))
        shown: Method = "spearman" if (self.pairs["method"] == "spearman").any() else "pearson"
        for _, row in self.strongest(5, shown).iterrows():
            interval = "" if math.isnan(row["low"]) else f" [{row['low']:+.2f}, {row['high']:+.2f}]"
            lines.append(f"{row['a']} and {row['b']}: {shown} {row['r']:+.2f}{interval}, n = {int(row['n'])} "
                         f"{row['points'].split()[-1]}, Holm p {row['p_holm']:.2g}.")
        lines.append("Neighbouring layers resemble each other, so that they are no independent points: p values and "
                     "intervals describe the depth profile and are too optimistic as tests.")
        return [*lines, *self.counts.get("notes", [])]

    def figures(self) -> dict[str, Figure]:
        """One heatmap for each method; a star where Holm p is below 0.05."""
        from midblock.figures import heatmap

        made = {}
        for method, part in self.pairs.groupby("method", sort=False):
            square = self.matrix(method)
            if (by_block := part[part["points"] == "blocks"]).size:  # a handful of segments is no curve over depth
                part, names = by_block, list(dict.fromkeys([*by_block["a"], *by_block["b"]]))
                square = square.loc[names, names]
            stars = pd.DataFrame("", index=square.index, columns=square.columns)
            for row in part[part["p_holm"] < 0.05].itertuples():
                stars.loc[row.a, row.b] = stars.loc[row.b, row.a] = "*"
            counts = part["n"].astype(int)
            spread = f"{counts.min()}" if counts.nunique() == 1 else f"{counts.min()} to {counts.max()}"
            names = [_words(name) for name in square.index]
            made[f"correlation-{method}"] = heatmap(
                square.to_numpy(), names, names, centre=0.0, limits=(-1.0, 1.0), marks=stars.to_numpy(),
                title="Correlation over depth", label=f"{method.capitalize()} correlation",
                footnote=f"n = {spread} points over depth; * Holm p < 0.05 (neighbouring layers are not independent)")
        return made


def correlate(folders: Sequence[Path | str], *, progress: Progress = silent,
              settings: CorrelateSettings | None = None, **overrides: Any) -> CorrelationResult:
    """Correlate all per-layer quantities of run folders.

    Quantities are differences and pair scores; of a metric without those (gradients of one
    model) its own values. From tables with a ``matrix`` column come the rows of whole blocks
    (``all``), or where there are any of the groups ``qkvo`` and ``mlp``. Rows of the same quantity in
    several folders are averaged layer by layer.

    Args:
        folders: Run folders with ``run.json`` and ``table.csv``, of one model (or of one depth).
        progress: Told how many pairs are done.
        settings: What is set side by side.
        **overrides: Single fields of `CorrelateSettings`.

    Returns:
        Pairs with r, interval, n, two-sided p and Holm's adjustment (over all pairs of a method), and
        the aligned quantities.

    Raises:
        OutputError: no run folder.
        DataError: a table that cannot be read, a run that has not finished, folders of different
            depth, or fewer than two quantities.
        SettingsError: an unknown metric or method.
    """
    if not folders:
        raise SettingsError("correlate needs at least one run folder.")
    chosen = CorrelateSettings.of(settings, overrides)
    notes: list[str] = []
    series: list[_Series] = []
    depths: dict[str, int] = {}
    models: dict[str, dict[str, str]] = {}
    for folder in dict.fromkeys(map(str, folders)):
        run = read_run(folder)
        if run.get("status") != "finished":
            raise DataError(f"{folder}: its run has the status {run.get('status')!r}; let it finish first (--resume).")
        frame = _read_table(Path(folder))
        data = (run.get("data") or {}).get("name")
        found, shown = _series_of(frame, str(run.get("command")), data or "", chosen, folder, notes)
        series += found
        # tables of chosen blocks do not show the model's depth, but what was loaded does
        loaded = {m["blocks"] for m in (run.get("models") or {}).values() if isinstance(m, dict) and "blocks" in m}
        if depth := max(loaded, default=shown):
            depths[folder] = depth
        for stage, model in (run.get("models") or {}).items():
            if isinstance(model, dict) and model.get("fingerprint"):
                models.setdefault(stage, {}).setdefault(model["fingerprint"], folder)
    for stage, prints in models.items():
        if len(prints) > 1:
            notes.append(f"The folders hold {len(prints)} different models under the name {stage!r} (as in "
                         f"{', '.join(list(prints.values())[:2])}).")
    num_blocks = _one_depth(depths)
    if chosen.metrics is not None:
        there = {s.metric for s in series}
        if absent := [m for m in chosen.metrics if m not in there]:
            raise SettingsError(f"no metric {absent[0]!r} in the tables; there are: {', '.join(sorted(there))}.")
        series = [s for s in series if s.metric in chosen.metrics]
    named = _named(series, notes)
    if len(named) < 2:
        raise DataError(f"the folders hold {len(named)} quantities per layer, but a correlation needs two; give "
                        "further run folders (profile, lens, weights, gradients, swap) or other metrics.")
    first = 0 if chosen.embeddings else 1
    layers = _wide(named, num_blocks, first)
    methods = [m for m in METHODS if m in chosen.methods]
    pairs = _all_pairs(named, layers, num_blocks, methods, chosen.confidence, progress)
    if pairs.empty:
        raise DataError("no pair of quantities shares layers: segments of different number cannot be compared.")
    table = Table()
    for row in pairs.to_dict("records"):
        extra = {name: row[name] for name in ("a", "b", "p", "p_holm", "points")}
        if math.isnan(row["r"]):
            table.add_undefined("model", "depth", row["method"], "pair", row["reason"], n=int(row["n"]), **extra)
        else:
            table.add("model", "depth", row["method"], "pair",
                      Estimate(row["r"], row["low"], row["high"], int(row["n"])), **extra)
    counts = {"folders": list(dict.fromkeys(map(str, folders))), "quantities": list(named), "notes": notes}
    families = {name: find(s.metric).family if known(s.metric) else s.metric for name, s in named.items()}
    return CorrelationResult(table, pairs, layers, num_blocks, counts, families)


def _words(name: str) -> str:
    """``gradient_norm [q]`` as words."""
    metric, space, rest = name.partition(" ")
    return label_of(metric, unit="") + space + rest


# -- reading -------------------------------------------------------------------------------------


def _read_table(folder: Path) -> pd.DataFrame:
    return read_table(folder, columns=("kind", "layer", "metric", "side", "value"), text=("data", "stage", "matrix"))


def _series_of(frame: pd.DataFrame, command: str, data: str, settings: CorrelateSettings, folder: str,
               notes: list[str]) -> tuple[list[_Series], int]:
    """Quantities of one table, and how many blocks it shows."""
    matrices = settings.matrices
    numeric = frame["layer"].str.fullmatch(r"\d+").fillna(False)
    hidden, block = (numeric & (frame["kind"] == k) for k in ("hidden", "block"))
    shown = [int(frame.loc[rows, "layer"].astype(int).max()) + offset
             for rows, offset in ((hidden, 0), (block, 1)) if rows.any()]
    single = (frame["kind"] == "segment") & frame["layer"].str.fullmatch(r"0*10*").fillna(False)
    chosen = frame[hidden | block | single].copy()
    if "tensor" in chosen:
        chosen = chosen[chosen["tensor"].isna() | (matrices is not None)]
    if "matrix" in chosen:
        chosen = chosen[chosen["matrix"].isna() | chosen["matrix"].isin(_matrices(chosen["matrix"], matrices))]
    if not settings.all_sides:
        changing = set(chosen[chosen["side"].isin(_CHANGES)]["metric"])
        chosen = chosen[chosen["side"].isin(_CHANGES) | ~chosen["metric"].isin(changing)]
    chosen["data"] = chosen["data"].fillna(data) if "data" in chosen else data
    chosen["run"] = command
    extra = [c for c in chosen.columns if c not in _NEVER_QUALIFY and not c.startswith("seed_")
             and (settings.by_data or c != "data")]
    text = [c for c in extra if not pd.api.types.is_numeric_dtype(chosen[c])]
    numbers = [c for c in extra if c not in text]
    found: list[_Series] = []
    keys = ["kind", "metric", "side", *text]
    for key, part in chosen.groupby(keys, sort=False, dropna=False):
        parts: list[tuple[dict[str, Any], pd.DataFrame]] = [({}, part)]
        if numbers and part["layer"].duplicated().any():  # a strength, say, tells the rows apart
            parts = [(dict(zip(numbers, k, strict=True)), p)
                     for k, p in part.groupby(numbers, sort=False, dropna=False)]
        for extra_labels, rows in parts:
            labels = {**dict(zip(keys, key, strict=True)), **extra_labels}
            kind, metric = labels.pop("kind"), labels.pop("metric")
            if labels["side"] in _CHANGES:
                labels["side"] = ""
            if rows["layer"].duplicated().any():
                notes.append(f"{folder}: several rows of {metric} for one layer were averaged.")
            means = rows.groupby("layer", sort=False)["value"].mean()
            series_labels = tuple((str(c), "" if pd.isna(v) else str(v)) for c, v in labels.items())
            if kind == "segment":
                for length, group in means.groupby(means.index.str.len()):
                    values = {str(mask).index("1"): float(v) for mask, v in group.items()}
                    found.append(_Series(metric, series_labels, "segment", values, int(length)))
            else:
                found.append(_Series(metric, series_labels, kind, {int(h): float(v) for h, v in means.items()}))
    return found, max(shown, default=0)


def _matrices(present: pd.Series[str], wanted: Sequence[str] | None) -> Sequence[str]:
    if wanted is not None:
        return wanted
    there = set(present.dropna())
    return _MATRICES if there & set(_MATRICES) else (_WHOLE,) if _WHOLE in there else sorted(there)


def _one_depth(depths: dict[str, int]) -> int:
    if not depths:
        raise DataError("none of the tables has rows per hidden state or block; give at least one folder of profile, "
                        "lens, weights or gradients.")
    if len(set(depths.values())) > 1:
        raise DataError("the folders are of models of different depth: "
                        + ", ".join(f"{folder} {n} blocks" for folder, n in depths.items()) + ".")
    return next(iter(depths.values()))


# -- alignment -----------------------------------------------------------------------------------


def _named(series: Sequence[_Series], notes: list[str]) -> dict[str, _Series]:
    """Quantities by name; the same one from several folders averaged layer by layer."""
    merged: dict[tuple[Any, ...], list[_Series]] = {}
    for s in series:
        merged.setdefault((s.metric, s.kind, s.segments, s.labels), []).append(s)
    averaged: list[_Series] = []
    for same in merged.values():
        places = list(dict.fromkeys(p for s in same for p in s.values))
        if any(set(s.values) != set(places) for s in same):
            notes.append(f"{same[0].metric}: the folders cover different layers; each layer's mean is over those "
                         "that have it.")
        values = {p: [s.values[p] for s in same if not math.isnan(s.values.get(p, math.nan))] for p in places}
        averaged.append(_Series(same[0].metric, same[0].labels, same[0].kind,
                                {p: float(np.mean(v)) if v else math.nan for p, v in values.items()},
                                same[0].segments))
    named: dict[str, _Series] = {}
    for s in averaged:
        others = [o for o in averaged if o.metric == s.metric]
        # only what tells it from the other quantities of that metric
        telling = [value for column, value in s.labels
                   if value and len({dict(o.labels).get(column, "") for o in others}) > 1]
        if s.kind == "segment" and len({(o.kind, o.segments) for o in others}) > 1:
            telling.append(f"{s.segments} segments")
        name = s.metric + (f" [{', '.join(telling)}]" if telling else "")
        if name in named:  # hidden and block rows of one metric
            name = f"{name} ({s.kind})"
        named[name] = s
    return named


def _wide(named: dict[str, _Series], num_blocks: int, first: int) -> pd.DataFrame:
    """One row a hidden state h (block h-1), one column a quantity; segments spread over their blocks."""
    hidden = range(first, num_blocks + 1)
    columns: dict[str, list[float]] = {}
    for name, s in named.items():
        if s.kind == "hidden":
            columns[name] = [s.values.get(h, math.nan) for h in hidden]
        elif s.kind == "block":
            columns[name] = [s.values.get(h - 1, math.nan) if h else math.nan for h in hidden]
        else:
            place = _segment_of(s.segments, num_blocks)
            columns[name] = [s.values.get(place[h - 1], math.nan) if h else math.nan for h in hidden]
    frame = pd.DataFrame(columns, index=hidden)
    frame.insert(0, "hidden", list(hidden))
    frame.insert(1, "block", [h - 1 if h else math.nan for h in hidden])
    return frame.reset_index(drop=True)


def _segment_of(segments: int, num_blocks: int) -> list[int]:
    bounds = segment_bounds(segments, num_blocks)
    return [i for i, (lo, hi) in enumerate(bounds) for _ in range(lo, hi)]


def _all_pairs(named: dict[str, _Series], layers: pd.DataFrame, num_blocks: int, methods: Sequence[Method],
               confidence: float, progress: Progress) -> pd.DataFrame:
    wide = layers[list(named)]
    by_layer = [n for n, s in named.items() if s.kind != "segment"]
    sizes = sorted({s.segments for s in named.values() if s.kind == "segment"})
    parts: list[pd.DataFrame] = []
    total = len(methods) * (1 + len(sizes))
    for number, method in enumerate(methods):
        found = []
        if len(by_layer) >= 2:
            found.append(stats.correlate(wide[by_layer], method, confidence).assign(points="blocks"))
        progress("correlations", number * (1 + len(sizes)) + 1, total, note=method)
        for k, size in enumerate(sizes, start=1):
            own = [n for n, s in named.items() if s.segments == size and s.kind == "segment"]
            blocks = wide[layers["hidden"] > 0]
            # a missing layer would make a segment's mean stand for others: then it is undefined
            means = blocks.groupby(_segment_of(size, num_blocks)).agg(lambda v: v.mean(skipna=False))
            if len(own) + len(by_layer) >= 2:
                both = stats.correlate(means[[*own, *by_layer]], method, confidence).assign(points=f"{size} segments")
                found.append(both[both["a"].isin(own)])
            progress("correlations", number * (1 + len(sizes)) + 1 + k, total, note=method)
        if found:
            joined = pd.concat(found, ignore_index=True)
            joined["p_holm"] = stats.holm(joined["p"].to_numpy(dtype=np.float64))
            parts.append(joined)
    if not parts:
        return pd.DataFrame(columns=[*stats.CORRELATION_COLUMNS, "points"])
    return pd.concat(parts, ignore_index=True)
