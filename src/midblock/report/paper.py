"""The paper's figures 1 to 7 and tables 1 to 4 from the run folders of a study."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from midblock import stats
from midblock.errors import OutputError
from midblock.figures import figure_style, save_figure
from midblock.progress import Progress, silent
from midblock.provenance import held
from midblock.quantities import known, label_of
from midblock.reading import printable, user_path
from midblock.report.collect import LeftOut, Run, collect, sweeps_in
from midblock.results import Answer
from midblock.settings.figures import FigureSettings
from midblock.writing import atomic_path, replace_own, temporary_folder

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from midblock.figures.paper import Width

__all__ = ["PaperFigures", "paper_figures"]

_FIGURES = {
    1: "Likeness of base and tuned model over depth: CKA, cosine similarity and mean shift",
    2: "Base and tuned model over depth: effective rank, condition number, spectral norm and entropy of the pooled "
       "states",
    3: "Accuracy of the next token read out of every hidden state",
    4: "Change of the weights and norm of the gradients over depth",
    5: "Correlation over depth (Pearson) of what was measured, mean over data sets",
    6: "Accuracy after segments of one model replaced those of the other, with both models as they are; the first "
       "digit is the segment nearest the embeddings; where both heads say the same, one is drawn",
    7: "Score by pattern of tuned segments (the first digit nearest the embeddings) at equal numbers of trainable "
       "parameters",
}
_TABLES = {1: "Score by tuned third", 2: "Score by tuned tenth", 3: "Families and their alignment",
           4: "Perplexity of general text after tuning"}
_INTERVALS = {**dict.fromkeys(("figure-1", "figure-2", "figure-3", "figure-4"), " Bands are 95% intervals."),
              **dict.fromkeys(("figure-6", "figure-7"), " Whiskers are 95% intervals."),
              **dict.fromkeys(("table-1", "table-2", "table-4"), " Brackets hold 95% intervals.")}
_NEEDS = {1: "a profile", 2: "a profile", 3: "a lens", 4: "weights", 5: "a profile and weights", 6: "a swap",
          7: "a sweep"}
_ALIKE = ("cka", "cosine", "mean_shift")
_STATES = ("effective_rank", "condition_number", "spectral_norm", "dataset_entropy")
_CORRELATED = ("weight_change", "gradient_norm", "cosine", "cka", "mean_shift", "effective_rank", "condition_number",
               "spectral_norm", "dataset_entropy", "prompt_entropy", "curvature", "sparsity", "accuracy")
_DRAWN = "midblock-figures.json"
_SIDES = {"base": "base", "difference": "difference", "pair": "pair"}


@dataclass
class PaperFigures:
    """What was written.

    Attributes:
        folder: Where.
        files: ``figure-1`` ... ``table-4`` -> their files.
        absent: What could not be made, and why.
        left_out: Run folders that were not read, and why.
    """

    folder: Path
    files: dict[str, list[Path]] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    left_out: list[LeftOut] = field(default_factory=list)

    def answer(self, folders: Sequence[Path | str]) -> Answer:
        """How many were made, what the others need, and the page of the same runs."""
        whole = len(self.files) + len(self.absent)
        means = "; ".join(f"{name} is not there: {why}" for name, why in list(self.absent.items())[:1])
        return Answer(f"{len(self.files)} of the paper's {whole} figures and tables are drawn from these runs.",
                      f"{means}." if means else "", ("report", *map(str, folders)))


def paper_figures(folders: Sequence[Path | str], *, progress: Progress = silent,
                  settings: FigureSettings | None = None, **overrides: object) -> PaperFigures:
    """Draw the paper's figures and write its tables.

    Args:
        folders: A study, or any run folders and folders that hold some.
        progress: Told how many figures and tables are done.
        settings: Where to, in which sizes and style.
        **overrides: Single fields of them.

    Returns:
        The files: of a figure PDF and SVG in each size, and the numbers as CSV; of a table LaTeX, Markdown and CSV;
        and what these runs lack.

    Raises:
        SettingsError: a style that matplotlib does not know.
        OutputError: no finished run, the folder cannot be written or is in use by another process, or holds a file of
            the same name that midblock did not draw.
    """
    chosen = FigureSettings.of(settings, overrides)
    out = user_path(chosen.out, error=OutputError)
    with figure_style("paper", *([chosen.style] if chosen.style else [])):
        runs, left_out = collect(folders)
        made = PaperFigures(out, left_out=left_out)
        with held(out), temporary_folder(beside=out / _DRAWN) as place:
            _draw(made, runs, place, ["one", "two"] if chosen.columns == "both" else [chosen.columns], progress)
            with atomic_path(place / "captions.md") as temporary:
                temporary.write_text(_captions(made, runs), encoding="utf-8")
            replace_own(place, out, _DRAWN)
    made.files = {name: [out / path.name for path in files] for name, files in made.files.items()}
    return made


def _draw(made: PaperFigures, runs: Sequence[Run], out: Path, widths: Sequence[Width], progress: Progress) -> None:
    total = len(_FIGURES) + len(_TABLES)
    for number, (draw, frame) in _drawings(runs):
        name = f"figure-{number}"
        if draw is None or frame.empty:
            made.absent[name] = f"it needs {_NEEDS[number]}, which is not among these runs"
        else:
            made.files[name] = _write_figure(draw, frame, out, name, widths)
        progress("figures", number, total)
    for number, table in _tables(runs):
        name = f"table-{number}"
        if table is None:
            made.absent[name] = {1: "it needs a sweep with single thirds (arms: singles: 3)",
                                 2: "it needs a sweep with single tenths (arms: singles: 10)",
                                 4: "it needs a sweep with retention tasks"}[number]
        else:
            made.files[name] = _write_table(table, out, name)
        progress("tables", len(_FIGURES) + number, total)


_Drawing = Callable[["Width"], "list[Figure]"]


def _drawings(runs: Sequence[Run]) -> Iterator[tuple[int, tuple[_Drawing | None, pd.DataFrame]]]:
    """Figure number -> what draws it in a width, and the numbers in it."""
    from midblock.figures.paper import correlation_sheet, depth_sheet, pattern_sheet, swap_sheet

    headings = _headings(runs)
    depth = _over_depth(runs, headings)
    one_base = len({pair for pair, _ in headings}) == 1

    def over(metrics: Sequence[str], sides: str) -> tuple[_Drawing | None, pd.DataFrame]:
        part = depth[depth["metric"].isin(metrics) & (depth["side"].isin(["pair", "difference"]) == (sides == "pair"))]
        present = [m for m in metrics if (part["metric"] == m).any()]
        if not present:
            return None, part
        return (lambda width: depth_sheet(part, present, width, one_base=one_base)), part

    yield 1, over(_ALIKE, "pair")
    yield 2, over(_STATES, "own")
    yield 3, over(("accuracy",), "own")
    changes = depth[(depth["metric"] == "weight_change") | ((depth["metric"] == "gradient_norm")
                                                            & ~depth["side"].isin(["pair", "difference"]))]
    shown = [m for m in ("weight_change", "gradient_norm") if (changes["metric"] == m).any()]
    yield 4, ((lambda width: depth_sheet(changes, shown, width, one_base=one_base)) if "weight_change" in shown
              else None, changes)
    squares = _correlations(depth)
    listed = pd.DataFrame([{"model": m, "a": a, "b": b, "pearson": s.loc[a, b]} for m, s in squares.items()
                           for a in s.index for b in s.columns])
    yield 5, ((lambda width: correlation_sheet(squares, width)) if squares else None, listed)
    swaps = _swaps(runs, headings)
    yield 6, ((lambda width: swap_sheet(swaps, width)), swaps)
    patterns, baselines = _patterns(runs)
    yield 7, ((lambda width: pattern_sheet(patterns, width, baselines)), patterns)


# -- what the runs say, as one tidy frame ------------------------------------------------------------------------------


def _headings(runs: Sequence[Run]) -> dict[tuple[str, str], str]:
    """(pair, comparison) -> heading of its panels: the base's name, with the stage where there are several."""
    pairs: dict[str, list[str]] = {}
    for run in runs:
        if len(run.models) > 1:
            stages = list(run.models)
            pairs.setdefault(run.pair, [f"{later}-{stages[0]}" for later in stages[1:]])
    names = {pair: pair.split(" → ") for pair in pairs}
    found: dict[tuple[str, str], str] = {}
    for pair, comparisons in pairs.items():
        parts = names[pair]
        alone = sum(n[0] == parts[0] for n in names.values()) == 1
        for place, comparison in enumerate(comparisons, start=1):
            tuned = parts[min(place, len(parts) - 1)]
            found[pair, comparison] = parts[0] if alone and len(comparisons) == 1 else tuned
    if len(set(found.values())) < len(found):
        found = {key: f"{value} ({key[1].partition('-')[0]}) {number}" for number, (key, value) in
                 enumerate(found.items(), start=1)}
    return {key: printable(value) for key, value in found.items()}


def _over_depth(runs: Sequence[Run], headings: dict[tuple[str, str], str]) -> pd.DataFrame:
    """Everything per hidden state or block, one row per heading, data set, side, metric and layer."""
    parts = []
    for run in runs:
        if run.command not in ("profile", "lens", "weights", "gradients"):
            continue
        frame = run.frame[run.frame["kind"].isin(["hidden", "block"])].copy()
        frame["layer"] = pd.to_numeric(frame["layer"], errors="coerce")
        frame = frame[frame["layer"].notna()]
        if "tensor" in frame:
            frame = frame[frame["tensor"].isna()]
        if "matrix" in frame:  # of weights the paper's equation 1: q, k, v and o; of gradients the whole block
            wanted = "qkvo" if run.command == "weights" else "all"
            frame = frame[(frame["matrix"] == wanted) | (frame["matrix"].isna())]
            frame = frame[(frame["metric"] != "weight_norm")]
        if frame.empty:
            continue
        frame["data"] = printable(run.data)
        frame["depth"] = frame["layer"] / max(1.0, float(frame["layer"].max()))
        stage = frame["stage"] if "stage" in frame else pd.Series(None, index=frame.index, dtype=object)
        for comparison, heading in ((c, h) for (pair, c), h in headings.items() if pair == run.pair):
            later, earlier = comparison.split("-", 1)
            own = frame["side"].isin([later, earlier])
            part = frame[own | (frame["side"].isin(["difference", "pair"]) & (stage.isna() | (stage == comparison)))]
            # the tuned stage's own name says nothing that the heading does not
            parts.append(part.assign(model=heading, side=part["side"].map(lambda s, e=earlier: "base" if s == e else
                                                                          _SIDES.get(s, "tuned"))))
    columns = ["model", "data", "side", "metric", "kind", "layer", "depth", "value", "low", "high", "n"]
    if not parts:
        return pd.DataFrame(columns=columns)
    return pd.concat(parts, ignore_index=True)[columns].drop_duplicates(["model", "data", "side", "metric", "layer"])


def _correlations(depth: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Heading -> Pearson correlations over blocks of the paper's quantities, each a mean over data sets."""
    found = {}
    for model, part in depth.groupby("model", sort=False):
        changes = part["side"].isin(["pair", "difference"]) | (part["metric"] == "gradient_norm")
        part = part[changes & part["metric"].isin(_CORRELATED)].copy()
        # hidden b + 1 is what block b puts out; the embeddings belong to no block
        part["block"] = part["layer"] - (part["kind"] == "hidden")
        part = part[part["block"] >= 0]
        wide = part.pivot_table(index="block", columns="metric", values="value", aggfunc="mean")
        names = [m for m in _CORRELATED if m in wide]
        if "weight_change" not in names or len(names) < 3:
            continue
        pairs = stats.correlate(wide[names], "pearson")
        square = pd.DataFrame(1.0, index=names, columns=names)
        for a, b, r in zip(pairs["a"], pairs["b"], pairs["r"], strict=True):
            square.loc[a, b] = square.loc[b, a] = r
        found[str(model)] = square
    return found


def _swaps(runs: Sequence[Run], headings: dict[tuple[str, str], str]) -> pd.DataFrame:
    parts = []
    for run in runs:
        needed = {"donor", "recipient", "head", "stage"}
        if run.command != "swap" or not needed <= set(run.frame.columns):
            continue
        frame = run.frame[(run.frame["metric"] == "accuracy") & (run.frame["side"] != "difference")]
        frame = frame.assign(mask=frame["layer"].astype(str), data=printable(run.data))
        for comparison, heading in ((c, h) for (pair, c), h in headings.items() if pair == run.pair):
            later, earlier = comparison.split("-", 1)
            # the stage column names recipient and donor in their order
            part = frame[frame["donor"].isin([later, earlier]) & frame["recipient"].isin([later, earlier])]
            roles = {later: "tuned", earlier: "base"}
            parts.append(part.assign(model=heading, **{c: part[c].map(lambda s, r=roles: r.get(s, s))
                                                       for c in ("donor", "recipient", "head")}))
    columns = ["model", "data", "mask", "donor", "recipient", "head", "value", "low", "high", "n"]
    return pd.concat(parts, ignore_index=True)[columns] if parts else pd.DataFrame(columns=columns)


def _sweeps(runs: Sequence[Run]) -> Iterator[tuple[str, Run, pd.DataFrame]]:
    """Name, run and scores over seeds of each sweep."""
    for name, run in sweeps_in(runs):
        if {"arm", "task", "role", "seed"} <= set(run.frame.columns):
            yield printable(name), run, run.frame[(run.frame["side"] != "difference") & run.frame["seed"].isna()]


def _patterns(runs: Sequence[Run]) -> tuple[pd.DataFrame, dict[str, str]]:
    parts, baselines = [], {}
    for heading, run, scores in _sweeps(runs):
        scores = scores[scores["role"] == "evaluation"]
        for task, part in scores.groupby("task", sort=False):
            title = f"{heading}, {printable(str(task))}"
            parts.append(part.assign(model=title, arm=part["arm"].map(lambda a: printable(str(a)))))
            settings = run.record.get("settings", {})
            arms = settings.get("arms") if isinstance(settings, dict) else None
            if isinstance(arms, dict) and arms.get("baseline"):
                baselines[title] = str(arms["baseline"])
    columns = ["model", "metric", "arm", "mask", "side", "value", "low", "high", "n", "params"]
    frame = pd.concat(parts, ignore_index=True).reindex(columns=columns) if parts else pd.DataFrame(columns=columns)
    return frame, baselines


# -- tables ------------------------------------------------------------------------------------------------------------


def _tables(runs: Sequence[Run]) -> Iterator[tuple[int, pd.DataFrame | None]]:
    yield 1, _single_segments(runs, 3)
    yield 2, _single_segments(runs, 10)
    yield 3, _families()
    yield 4, _retention(runs)


def _single_segments(runs: Sequence[Run], count: int) -> pd.DataFrame | None:
    rows = []
    for heading, _, scores in _sweeps(runs):
        single = scores["mask"].astype(str).str.fullmatch(rf"(?=.{{{count}}}$)0*10*")
        own = scores[(scores["role"] == "evaluation") & single & (scores["method"] == "lora")]
        for row in own.itertuples():
            rows.append({"model": heading, "task": printable(str(row.task)), "segment": str(row.mask).index("1") + 1,
                         "metric": label_of(str(row.metric)) if known(str(row.metric)) else str(row.metric),
                         **_scored(row)})
    return pd.DataFrame(rows) if rows else None


def _scored(row: object) -> dict[str, float]:
    return {name: float(getattr(row, name)) for name in ("value", "low", "high", "n")}


def _families() -> pd.DataFrame:
    from midblock.models.pairs import known_pairs

    return pd.DataFrame([{"family": p.family, "base": p.base, "tuned": p.tuned or "none", "pipeline": p.pipeline,
                          "SFT alone": "yes" if p.suitable else "no"} for p in known_pairs()])


def _retention(runs: Sequence[Run]) -> pd.DataFrame | None:
    rows = []
    for heading, _, scores in _sweeps(runs):
        own = scores[scores["role"] == "retention"]
        for row in own.itertuples():
            rows.append({"model": heading, "strategy": "untuned" if row.side == "base" else printable(str(row.arm)),
                         "task": printable(str(row.task)), "metric": str(row.metric), **_scored(row)})
    return pd.DataFrame(rows) if rows else None


# -- files -------------------------------------------------------------------------------------------------------------


def _write_figure(draw: _Drawing, frame: pd.DataFrame, out: Path, name: str, widths: Sequence[Width]) -> list[Path]:
    written = []
    for width in widths:
        for page, figure in enumerate(draw(width), start=1):
            file = f"{name}-{width}-column{'s' if width == 'two' else ''}{f'-{page}' if page > 1 else ''}"
            written += save_figure(figure, out, file, ("pdf", "svg"))
    with atomic_path(out / f"{name}.csv") as temporary:
        frame.to_csv(temporary, index=False, float_format="%.10g")
    return [*written, out / f"{name}.csv"]


def _write_table(frame: pd.DataFrame, out: Path, name: str) -> list[Path]:
    """CSV as it is; LaTeX and Markdown with four digits and the interval in one cell."""
    shown = frame
    if "value" in frame:
        cells = [_interval(v, a, b) for v, a, b in zip(frame["value"], frame["low"], frame["high"], strict=True)]
        shown = frame.drop(columns=["value", "low", "high"]).assign(value=cells, n=frame["n"].map(_whole))
        shown = shown[[c for c in shown if c not in ("value", "n")] + ["value", "n"]]
    texts = {"tex": shown.to_latex(index=False, escape=True), "md": _markdown(shown),
             "csv": frame.to_csv(index=False, float_format="%.10g")}
    for suffix, text in texts.items():
        with atomic_path(out / f"{name}.{suffix}") as temporary:
            temporary.write_text(text, encoding="utf-8")
    return [out / f"{name}.{suffix}" for suffix in texts]


def _whole(n: float) -> str:
    return f"{n:.0f}" if math.isfinite(n) else ""


def _interval(value: float, low: float, high: float) -> str:
    if not math.isfinite(value):
        return "undefined"
    return f"{value:.4f}" + (f" [{low:.4f}, {high:.4f}]" if math.isfinite(low) and math.isfinite(high) else "")


def _markdown(frame: pd.DataFrame) -> str:
    def row(cells: Sequence[object]) -> str:
        return "| " + " | ".join(re.sub(r"([\\|`*_<>\[\]])", r"\\\1", str(c)) for c in cells) + " |"
    return "\n".join([row(list(frame.columns)), "|" + " --- |" * len(frame.columns),
                      *(row(r) for r in frame.itertuples(index=False, name=None))]) + "\n"


def _captions(made: PaperFigures, runs: Sequence[Run]) -> str:
    """What each file shows and rests on, and what is absent."""
    lines = ["# Figures and tables", "", "From " + ", ".join(dict.fromkeys(f"`{r.folder}`" for r in runs)) + ".", ""]
    titles = {f"figure-{n}": t for n, t in _FIGURES.items()} | {f"table-{n}": t for n, t in _TABLES.items()}
    for name, title in titles.items():
        if name in made.files:
            lines.append(f"- **{name.replace('-', ' ').capitalize()}.** {title}.{_INTERVALS.get(name, '')} "
                         f"Files: {', '.join(f'`{p.name}`' for p in made.files[name])}.")
        else:
            lines.append(f"- **{name.replace('-', ' ').capitalize()}** is not here: {made.absent[name]}.")
    lines += [f"- Left out: `{printable(o.folder)}`: {printable(o.reason)}" for o in made.left_out]
    return "\n".join(lines) + "\n"
