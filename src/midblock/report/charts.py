"""From runs to charts: plain data that the page's script draws and lists; nothing here knows HTML.

A chart is a dictionary of JSON types with ``columns`` and ``rows`` (its data table: what is drawn is what is listed)
and a ``kind`` that says how the script draws them: ``depth``, ``bars``, ``heatmap``, ``scatter``, ``lines``, ``table``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import pandas as pd

from midblock.quantities import FAMILIES, Quantity, find, known, label_of, matrix_order
from midblock.reading import printable
from midblock.report.collect import Run

__all__ = ["Chart", "charts_of"]

Chart = dict[str, Any]

_LOGARITHMIC = ("perplexity", "condition_number")
_DEPTH_COLUMNS = ("pair", "data", "stage", "side", "group", "layer", "value", "low", "high", "n")
_GROUPS = ("matrix", "head", "component", "rule", "method", "unit")  # columns that split a metric into several curves
SECTIONS = {**FAMILIES, "segments": "Segments swapped or merged", "arms": "Arms of sweeps",
            "correlation": "What goes together", "training": "Training", "other": "Further measures"}
"""Sections of the page, in this order."""


def charts_of(runs: Sequence[Run]) -> list[Chart]:
    """Every chart that these runs carry, in the order of the page."""
    charts = [*_depth_charts(runs), *_matrix_heatmaps(runs), *_segment_bars(runs), *_sweep_charts(runs),
              *_correlations(runs), *_layer_cka(runs), *_traces(runs), *_changed_tokens(runs),
              *_training(runs)]
    if len({c["pair"] for c in charts if "pair" in c}) > 1:
        for chart in charts:
            if chart.get("pair") and chart["pair"] not in chart["title"]:
                chart["title"] += f" ({chart['pair']})"
    order = {name: i for i, name in enumerate(SECTIONS)}
    charts.sort(key=lambda c: order.get(c["section"], len(order)))
    for number, chart in enumerate(charts):
        chart["id"] = f"figure-{number + 1}"
    return charts


def _chart(kind: str, section: str, title: str, columns: Sequence[str], rows: list[list[Any]], *, about: str = "",
           quantity: Quantity | None = None, axis: str = "", run: Run | None = None, **more: Any) -> Chart:
    chart: Chart = {"kind": kind, "section": section if section in SECTIONS else "other", "title": title,
                    "axis": axis or title, "about": about, "formula": "", "source": "", "variants": [],
                    "columns": list(columns), "rows": rows, **more}
    if run is not None:  # the chart is there while its pair and its data are chosen
        chart |= {"pair": printable(run.pair), "data": printable(run.data)}
    if quantity is not None:
        chart |= {"axis": quantity.axis, "about": about or quantity.reading, "formula": quantity.formula,
                  "source": quantity.source, "variants": list(quantity.variants),
                  "unchanged": quantity.unchanged if quantity.paired else None, "paired": quantity.paired}
    sizes = [row[list(columns).index("n")] for row in rows] if "n" in columns else []
    # of a weight it counts entries, which say nothing of how sure a value is
    sizes = [n for n in sizes if n is not None and (quantity is None or quantity.level != "weight")]
    chart["n"] = [min(sizes), max(sizes)] if sizes else []
    return chart


def _cell(value: Any) -> Any:
    """A cell as JSON: numbers with six digits, text printable, what is undefined null."""
    if value is None or (isinstance(value, float) and math.isnan(value)) or value is pd.NA:
        return None
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return printable(str(value))


def _rows(frame: pd.DataFrame, columns: Sequence[str]) -> list[list[Any]]:
    shown = frame.reindex(columns=list(columns))
    return [[_cell(v) for v in row] for row in shown.itertuples(index=False, name=None)]


def _tidy(run: Run) -> pd.DataFrame:
    """A run's table with the columns ``pair``, ``data``, ``stage`` and ``group`` filled."""
    frame = run.frame.assign(pair=run.pair)
    for name, value in (("data", run.data), ("stage", "")):
        frame[name] = frame[name].fillna(value) if name in frame else value
    groups = [c for c in _GROUPS if c in frame and frame[c].nunique(dropna=True) > 1]
    frame["group"] = frame[groups].fillna("").astype(str).agg(" ".join, axis=1).str.strip() if groups else ""
    if "tensor" in frame:
        frame = frame[frame["tensor"].isna()]
    if "final" in frame:  # scores of importance while they are learned: the last ones
        frame = frame[frame["final"].astype(str).str.lower().isin(("true", "1", "1.0"))]
    if "seed" in frame and run.command == "sweep":
        frame = frame[frame["seed"].isna()]
    return frame


def _quantity(metric: str) -> Quantity | None:
    return find(metric) if known(metric) else None


def _title(metric: str) -> str:
    """A measure's name in words, without its unit."""
    return find(metric).label if known(metric) else printable(label_of(metric))


# -- over depth --------------------------------------------------------------------------------------------------------


def _depth_charts(runs: Sequence[Run]) -> Iterator[Chart]:
    """One chart per measure: every run, data set and stage that has it."""
    parts: dict[tuple[str, str], list[pd.DataFrame]] = {}
    depths: dict[str, int] = {}
    for run in runs:
        frame = _tidy(run)
        frame = frame[frame["kind"].isin(["hidden", "block"])].copy()
        if frame.empty:
            continue
        frame["layer"] = pd.to_numeric(frame["layer"], errors="coerce")
        frame = frame[frame["layer"].notna()]
        for (kind, metric), part in frame.groupby(["kind", "metric"], sort=False):
            if run.command == "locate":
                part = part.assign(stage="locate")
            parts.setdefault((str(kind), str(metric)), []).append(part)
        for kind, part in frame.groupby("kind"):
            least = 0 if run.num_blocks is None else run.num_blocks - (1 if kind == "block" else 0)
            depths[str(kind)] = max(depths.get(str(kind), 1), int(part["layer"].max()), least)
    for (kind, metric), found in parts.items():
        frame = pd.concat(found, ignore_index=True)
        quantity = _quantity(metric)
        yield _chart("depth", quantity.family if quantity else "other", _title(metric), _DEPTH_COLUMNS,
                     _rows(frame.astype({"layer": int}), _DEPTH_COLUMNS), quantity=quantity, metric=metric, at=kind,
                     last=depths[kind], axis=label_of(metric), log=metric in _LOGARITHMIC,
                     groups=_in_order(frame["group"]), sides=list(dict.fromkeys(frame["side"])))


def _in_order(groups: pd.Series[Any]) -> list[str]:
    """Groups as they are listed: those that hold whole blocks first, matrices from input to output."""
    names = [str(g) for g in dict.fromkeys(groups)]
    first = [g for g in ("all", "qkvo") if g in names]
    return [*first, *matrix_order([g for g in names if g not in first])]


_MATRIX_HEATMAPS = {"weights": ("weight_change_relative", "intruder_dimensions", "vector_rotation"),
                    "importance": ("ila_score",)}


def _matrix_heatmaps(runs: Sequence[Run]) -> Iterator[Chart]:
    """Matrices by blocks: how far each was moved and how it turned (weights), how much each matters (importance)."""
    for run in runs:
        wanted = _MATRIX_HEATMAPS.get(run.command, ())
        if not wanted or "matrix" not in run.frame:
            continue
        # of weights one row per tensor, of importance none
        frame = run.frame[run.frame["tensor"].notna()] if run.command == "weights" else _tidy(run)
        frame = frame[(frame["kind"] == "block") & frame["metric"].isin(wanted) & frame["matrix"].notna()
                      & ~frame["matrix"].isin(["all", "qkvo", "mlp"])]
        frame = frame.assign(stage=frame["stage"].fillna("") if "stage" in frame else "",
                             layer=pd.to_numeric(frame["layer"], errors="coerce"))
        for (metric, stage), part in frame.groupby(["metric", "stage"], sort=False):
            grid = part[part["value"].notna()].groupby(["matrix", "layer"])["value"].mean()
            if grid.empty:
                continue
            rows = [[_cell(m), int(b), _cell(v)] for (m, b), v in grid.items()]
            place = {m: i for i, m in enumerate(matrix_order([r[0] for r in rows]))}
            rows.sort(key=lambda r: (place[r[0]], r[1]))
            quantity = _quantity(metric)
            yield _chart("heatmap", quantity.family if quantity else "weights",
                         f"{_title(metric)} of each matrix{f' ({printable(str(stage))})' if stage else ''}",
                         ("matrix", "block", "value"), rows, quantity=quantity, x="block", y="matrix", run=run)


# -- segments ----------------------------------------------------------------------------------------------------------

_BAR_COLUMNS = ("pair", "data", "stage", "what", "mask", "value", "low", "high", "n")


def _segment_bars(runs: Sequence[Run]) -> Iterator[Chart]:
    titles = {"swap": "Change when a segment is swapped", "merge": "Change when segments are interpolated",
              "steer": "Change when blocks are steered"}
    for command, title in titles.items():
        parts: dict[str, list[pd.DataFrame]] = {}
        for run in runs:
            if run.command != command:
                continue
            frame = _tidy(run)
            frame = frame[(frame["kind"] == "segment") & (frame["side"] == "difference")].copy()
            what = [c for c in ("donor", "recipient", "head", "against", "alpha") if c in frame]
            frame["what"] = frame.apply(lambda row, what=what: ", ".join(
                f"{c} {row[c]}" for c in what if pd.notna(row[c])), axis=1) if len(frame) else ""
            frame["mask"] = frame["layer"]
            for metric, part in frame.groupby("metric", sort=False):
                parts.setdefault(str(metric), []).append(part)
        for metric, found in parts.items():
            quantity = _quantity(metric)
            yield _chart("bars", "segments", f"{title}: {_title(metric).lower()}", _BAR_COLUMNS,
                         _rows(pd.concat(found, ignore_index=True), _BAR_COLUMNS), baseline=0.0,
                         axis=f"Change of {(quantity.axis if quantity else label_of(metric)).lower()}",
                         about="A bar is the difference from the model without the exchange, on the same samples, with "
                               "its 95% interval; the first digit of a mask is nearest the embeddings. Filled bars "
                               "have intervals that do not hold 0.")


_ARM_COLUMNS = ("pair", "data", "task", "metric", "arm", "value", "low", "high", "n", "params", "tokens_per_second")


def _sweep_charts(runs: Sequence[Run]) -> Iterator[Chart]:
    for run in runs:
        if run.command != "sweep":
            continue
        frame = _tidy(run)
        if "arm" not in frame or "task" not in frame:
            continue
        scores = frame[frame["side"] != "difference"]
        for (task, metric), part in scores.groupby(["task", "metric"], sort=False):
            base = part[part["arm"] == "base"]["value"]
            yield _chart("bars", "arms", f"{printable(str(task))}: {_title(str(metric)).lower()} of each arm",
                         _ARM_COLUMNS, _rows(part, _ARM_COLUMNS), quantity=_quantity(str(metric)), bars="arm",
                         baseline=_cell(base.iloc[0]) if len(base) else None, run=run,
                         about="Means over seeds and items with 95% intervals; the line is the untuned model.")
        pareto = run.more.get("pareto")
        if pareto is not None and {"task", "arm", "gain", "forgetting"} <= {*pareto.columns}:
            for task, part in pareto.groupby("task", sort=False):
                rows = [[_cell(a), _cell(-f), _cell(g)] for a, f, g in
                        zip(part["arm"], pd.to_numeric(part["forgetting"], errors="coerce"), part["gain"], strict=True)]
                yield _chart("scatter", "arms", f"{printable(str(task))}: gain against retention",
                             ("arm", "retention", "gain"), rows, x="retention", y="gain", run=run,
                             axis=f"Gain on {printable(str(task))} over the untuned model",
                             x_axis="Retention: change of log likelihood (nats a token)",
                             about="Up is a better score on the task, right is less forgetting of general text.")


# -- the rest ----------------------------------------------------------------------------------------------------------


def _correlations(runs: Sequence[Run]) -> Iterator[Chart]:
    for run in runs:
        if run.command != "correlate":
            continue
        frame = run.frame
        names = [c for c in ("a", "b", "x", "y", "first", "second") if c in frame][:2]
        if len(names) < 2:
            continue
        for method, part in frame.groupby("metric", sort=False):
            if "points" in part and (part["points"] == "blocks").any():  # a handful of segments is no curve over depth
                part = part[part["points"] == "blocks"]
            pairs = [(_cell(_title(str(a))), _cell(_title(str(b))), _cell(v), _cell(n)) for a, b, v, n in
                     zip(part[names[0]], part[names[1]], part["value"], part["n"], strict=True)]
            # a square: each pair both ways, in one order
            order = list(dict.fromkeys(x for a, b, _, _ in pairs for x in (a, b)))
            cells = {(a, b): [v, n] for a, b, v, n in pairs} | {(b, a): [v, n] for a, b, v, n in pairs}
            rows = [[a, b, *cells[a, b]] for b in order for a in order if (a, b) in cells]
            yield _chart("heatmap", "correlation", f"Correlation over depth ({printable(str(method))})",
                         ("one", "other", "r", "n"), rows, x="one", y="other", signed=True, run=run,
                         about="Each cell correlates two measures over the depths of the model; neighbouring depths "
                               "are not independent, so n overstates what is known.")


def _layer_cka(runs: Sequence[Run]) -> Iterator[Chart]:
    for run in runs:
        table = run.more.get("layers")
        if table is None or not {"stage", "layer", "other", "cka_debiased"} <= {*table.columns}:
            continue
        for stage, part in table.groupby("stage", sort=False):
            rows = [[int(a), int(b), _cell(float(v))] for a, b, v in
                    zip(part["layer"], part["other"], part["cka_debiased"], strict=True)]
            where = printable(f"{stage} {run.data}".strip())
            yield _chart("heatmap", "alignment", f"CKA of every hidden state with every other: {where}",
                         ("hidden of the earlier model", "hidden of the later model", "CKA"), rows,
                         y="hidden of the earlier model", x="hidden of the later model",
                         quantity=_quantity("cka_debiased"), run=run)


def _traces(runs: Sequence[Run]) -> Iterator[Chart]:
    for run in runs:
        trace = run.more.get("trace")
        if trace is not None and len(trace):
            yield from _trace_heatmaps(run, trace)
            columns = [str(c) for c in trace.columns]
            yield _chart("table", "predictions", f"Most likely token at every depth: {printable(run.pair)}", columns,
                         _rows(trace.head(2000), columns), run=run,
                         about="The logit lens: what each hidden state would predict next if the blocks after it "
                               "were left out.")


_TRACED = 32
"""Positions of a sample that a heatmap of tokens shows."""


def _trace_heatmaps(run: Run, trace: pd.DataFrame) -> Iterator[Chart]:
    """The first sample's most likely tokens, hidden states by positions, coloured where they are right."""
    if not {"sample", "hidden", "stage", "position", "next", "predicted"} <= {*trace.columns}:
        return
    for stage, part in trace[trace["sample"] == trace["sample"].iloc[0]].groupby("stage", sort=False):
        last = sorted(part["position"].unique())[-_TRACED:]
        part = part[part["position"].isin(last)].sort_values(["hidden", "position"], ascending=[False, True])
        rows = [[int(p), int(h), int(str(a) == str(b)), printable(str(a))] for p, h, a, b in
                zip(part["position"], part["hidden"], part["predicted"], part["next"], strict=True)]
        where = printable(f"{stage} {run.data}".strip())
        yield _chart("heatmap", "predictions", f"What each hidden state would say next: {where}",
                     ("position", "hidden", "right", "predicted"), rows, x="position", y="hidden", text="predicted",
                     run=run,
                     about="The logit lens on one sample: the most likely next token of every hidden state at every "
                           "position, coloured where it is the token that follows.")


def _changed_tokens(runs: Sequence[Run]) -> Iterator[Chart]:
    for run in runs:
        for name, title, about in (
                ("difference_tokens", "Tokens that the mean difference speaks for", (
                    "The mean change of the hidden states, through the earlier model's final norm and head: what a "
                    "narrow fine-tuning was about often shows by name.")),
                ("direction_tokens", "Tokens that the added directions speak for", (
                    "Each direction through the earlier model's final norm and head.")),
                ("kl_tokens", "Tokens of the data at which predictions moved most", (
                    "By KL divergence of the next-token distributions; `earlier` and `later` are what both models find "
                    "most likely after the context."))):
            table = run.more.get(name)
            if table is not None and len(table):
                columns = [str(c) for c in table.columns]
                yield _chart("table", "predictions", f"{title}: {printable(run.pair)}", columns,
                             _rows(table.head(2000), columns), about=about, run=run)


_WATCHED = {
    "gradient_norm": ("Gradient norm of each block", "Frobenius norm of the gradient of what is trained in a block."),
    "update_norm": ("Update of each block", "Frobenius norm of what training has added to a block's weights."),
    "drift": ("Drift of each block's output", "1 minus the cosine of a block's output with the base's, mean over the "
                                              "tokens of a fixed probe of training rows."),
}


def _block_steps(runs: Sequence[Run]) -> Iterator[Chart]:
    """While one model was tuned: blocks by steps; in a sweep: blocks by arms, at the last step."""
    for run in runs:
        steps = run.more.get("block_steps")
        if steps is None or not {"step", "block", *_WATCHED} <= {*steps.columns}:
            continue
        for name, (title, about) in _WATCHED.items():
            own = steps[steps[name].notna()]
            across = "step"
            if "arm" in own:
                own, across = own[own.groupby(["arm", "seed"])["step"].transform("max") == own["step"]], "arm"
            if own.empty:
                continue
            grid = own.groupby(["block", across], sort=False)[name].mean()
            rows = sorted([_cell(b), _cell(x), _cell(v)] for (b, x), v in grid.items()) if across == "step" else [
                [_cell(b), _cell(x), _cell(v)] for (b, x), v in grid.items()]
            yield _chart("heatmap", "training", f"{title}: {printable(run.folder.name)}", ("block", across, name), rows,
                         x=across, y="block", run=run, about=about + (
                             " Mean over seeds, at the end of training." if across == "arm" else ""))


def _training(runs: Sequence[Run]) -> Iterator[Chart]:
    yield from _block_steps(runs)
    for run in runs:
        steps = run.more.get("steps")
        if steps is None or "step" not in steps or "loss" not in steps:
            continue
        numbers = [str(c) for c in steps.columns if c != "step" and pd.api.types.is_numeric_dtype(steps[c])]
        for name in [c for c in ("loss", "grad_norm", "update_norm", "drift") if c in numbers]:
            words = name.replace("_", " ").capitalize()
            yield _chart("lines", "training", f"{words} while training: {printable(run.folder.name)}", ("step", name),
                         _rows(steps, ("step", name)), x="step", y=name, run=run,
                         axis=f"{words} (nats a token)" if name == "loss" else words)
