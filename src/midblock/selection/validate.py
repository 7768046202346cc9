"""What a locator's scores are worth: their predictions against the measured gains of sweeps.

One *case* is one sweep, task, method, number of segments K and seed: the gain of each single segment
over the untuned model. A score predicts with its mean over the blocks of a segment. It is judged by the
rank correlation with the gains, and by the regret of the segment it would have chosen against the best
arm (single segments and, where it was trained with the same seed, all blocks).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from midblock import stats
from midblock.data import load_data
from midblock.errors import OutputError, SettingsError, UndefinedMetricError
from midblock.models import load_model
from midblock.progress import Progress, silent
from midblock.provenance import read_run, read_table
from midblock.results import Table
from midblock.segments import segment_bounds
from midblock.selection.locate import MIDDLE, scores_of
from midblock.selection.scores import BLOCK_SCORES, ScoreSettings, block_scores

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Case", "SweepGains", "ValidateResult", "predictions", "read_sweep", "validate", "validate_cases"]

FloatArray = npt.NDArray[np.float64]
REFERENCE = "fixed-middle"
_NEEDED = ("kind", "metric", "side", "value", "arm", "mask", "role", "task", "seed", "method")


@dataclass(frozen=True)
class Case:
    """Gains of the K single segments in one sweep, task, method and seed."""

    sweep: str
    task: str
    method: str
    seed: int
    gains: tuple[float, ...]
    """Over the untuned model, input side first; higher is better (losses turned round)."""
    uniform: float
    """Gain of training all blocks at the same budget; NaN where the sweep has no such run."""

    @property
    def segments(self) -> int:
        """K."""
        return len(self.gains)

    @property
    def best(self) -> float:
        """The best arm's gain."""
        return float(np.nanmax([*self.gains, self.uniform]))


@dataclass(frozen=True)
class SweepGains:
    """One sweep: what it trained on what, and its cases."""

    folder: Path
    model: str
    data: str
    dtype: str
    cases: tuple[Case, ...]
    left_out: tuple[str, ...]
    """Why a possible case is none (a failed arm, say)."""


def read_sweep(folder: Path | str, name: str | None = None) -> SweepGains:
    """Gains of single segments from the ``run.json`` and ``table.csv`` of a sweep.

    Args:
        folder: Its run folder.
        name: How cases call it; default: the folder's name.

    Raises:
        OutputError: not the folder of a sweep, or its table lacks a column.
        SettingsError: it has no complete set of at least three single segments.
    """
    folder = Path(folder)
    run = read_run(folder, finished=True)
    if run.get("command") != "sweep":
        raise OutputError(f"{folder} holds a run of {run.get('command')!r}, not of a sweep.")
    table = read_table(folder, columns=_NEEDED, text=("arm", "task", "method"),
                       numbers=("value", "low", "high", "n", "seed", "learning_rate"))
    cases, left_out = _cases(table, name or folder.name)
    if not cases:
        raise SettingsError(f"{folder}: no task has every single segment of some K >= 3, with a value, for one seed"
                            f"{' (' + left_out[0] + ')' if left_out else ''}; sweep `arms.singles: 5`.")
    settings = run["settings"]
    return SweepGains(folder, str(settings["model"]), str(settings["train"]["data"]),
                      str(settings.get("dtype", "auto")), tuple(cases), tuple(left_out))


def _cases(table: pd.DataFrame, sweep: str) -> tuple[list[Case], list[str]]:
    scores = table[(table["kind"] == "segment") & (table["side"] != "difference") & (table["role"] == "evaluation")]
    cases: list[Case] = []
    left_out: list[str] = []
    for task, rows in scores.groupby("task", sort=False):
        metric = str(rows["metric"].iloc[0])
        base = rows[rows["arm"] == "base"]["value"].dropna()
        if base.empty:
            left_out.append(f"{task}: the untuned model has no score")
            continue
        worth = _worth(metric)
        single = rows[rows["seed"].notna() & (rows["arm"] != "base")]
        chosen = _chosen_rates(rows)
        if chosen:
            single = single[[chosen.get(a, r) == r for a, r in
                             zip(single["arm"], single["learning_rate"], strict=True)]]
        for (method, seed), runs in single.groupby(["method", "seed"], sort=False):
            by_mask = {m: v for m, v in zip(runs["mask"], runs["value"], strict=True) if isinstance(m, str)}
            gains = {m: worth(v) - worth(float(base.iloc[0])) for m, v in by_mask.items()}
            whole = [g for m, g in gains.items() if set(m) == {"1"}]
            for k in sorted({len(m) for m in gains if m.count("1") == 1 and len(m) >= 3}):
                masks = ["0" * i + "1" + "0" * (k - 1 - i) for i in range(k)]
                values = [gains.get(m, math.nan) for m in masks]
                if not np.isfinite(values).all():
                    lost = [m for m, v in zip(masks, values, strict=True) if not math.isfinite(v)]
                    left_out.append(f"{task}, {method}, seed {int(seed)}: no score of {', '.join(lost)}")
                    continue
                cases.append(Case(sweep, str(task), str(method), int(seed), tuple(values),
                                  whole[0] if whole else math.nan))
    return cases, left_out


def _worth(metric: str) -> Callable[[float], float]:
    """A score turned so that higher is better."""
    if metric == "perplexity":
        return lambda v: -math.log(v) if v > 0 else math.nan
    return (lambda v: -v) if metric == "loss" else (lambda v: v)


def _chosen_rates(rows: pd.DataFrame) -> dict[str, float]:
    """Arm -> the learning rate that the sweep chose for it (on the row over all seeds)."""
    if "learning_rate" not in rows.columns:
        return {}
    over_seeds = rows[rows["seed"].isna() & rows["learning_rate"].notna()]
    return dict(zip(over_seeds["arm"], over_seeds["learning_rate"], strict=True))


def predictions(scores: Mapping[str, Sequence[float]], segments: int, num_blocks: int) -> dict[str, FloatArray]:
    """What each score, the paper's fixed middle and a random choice say of K segments, (K,) each.

    A score's prediction is its mean over the segment's blocks; that of ``fixed-middle`` the share of them
    within 20%-80% of the depth (equal predictions count as a random choice among them); that of
    ``random`` is the same for all.

    Example:
        >>> predictions({"x": [1.0, 3.0, 5.0, 0.0, 0.0]}, 5, 5)["fixed-middle"].tolist()
        [0.0, 1.0, 1.0, 1.0, 0.0]
    """
    bounds = segment_bounds(segments, num_blocks)
    lo, hi = (edge * num_blocks for edge in MIDDLE)
    inside = [sum(lo <= b + 0.5 <= hi for b in range(a, z)) / (z - a) for a, z in bounds]
    found = {name: np.array([np.mean(values[a:z]) for a, z in bounds]) for name, values in scores.items()}
    return {**found, REFERENCE: np.array(inside), "random": np.zeros(segments)}


def validate_cases(cases: Sequence[Case], scores: Mapping[str, Mapping[str, Sequence[float]]],
                   num_blocks: Mapping[str, int]) -> pd.DataFrame:
    """Rank correlation and regret of every score in every case.

    Args:
        cases: Of one or more sweeps.
        scores: Sweep -> score -> value per block.
        num_blocks: Sweep -> L.

    Returns:
        Columns sweep, task, method, segments, seed, score, metric (``rank_correlation``, ``regret``,
        ``gain`` of the choice), value (NaN where undefined) and reason.
    """
    rows = []
    for case in cases:
        same: dict[str, Any] = {"sweep": case.sweep, "task": case.task, "method": case.method,
                                "segments": case.segments, "seed": case.seed}
        for name, predicted in predictions(scores[case.sweep], case.segments, num_blocks[case.sweep]).items():
            if not np.isfinite(predicted).all():
                rows += [{**same, "score": name, "metric": m, "value": math.nan,
                          "reason": "the score is undefined for some block"} for m in ("rank_correlation", "regret")]
                continue
            within = stats.regret(predicted, case.gains)
            gain = max(case.gains) - within
            rows.append({**same, "score": name, "metric": "regret", "value": case.best - gain, "reason": ""})
            rows.append({**same, "score": name, "metric": "gain", "value": gain, "reason": ""})
            if name == "random":
                continue
            try:
                value, reason = stats.spearman(predicted, case.gains).r, ""
            except UndefinedMetricError as error:
                value, reason = math.nan, str(error)
            rows.append({**same, "score": name, "metric": "rank_correlation", "value": value, "reason": reason})
        if math.isfinite(case.uniform):
            rows.append({**same, "score": "uniform", "metric": "regret", "value": case.best - case.uniform,
                         "reason": ""})
            rows.append({**same, "score": "uniform", "metric": "gain", "value": case.uniform, "reason": ""})
    return pd.DataFrame(rows)


def _over_cases(part: pd.DataFrame) -> tuple[Any, str]:
    """Mean with interval: over sweeps where there are three or more, else over cases."""
    by_sweep = part.groupby("sweep", sort=False)["value"].mean().dropna()
    if len(by_sweep) >= 3:
        return stats.mean_interval(by_sweep.to_numpy()), "sweeps"
    return stats.mean_interval(part["value"].to_numpy(dtype=np.float64)), "cases"


@dataclass
class ValidateResult:
    """How well every score predicts measured gains."""

    table: Table
    cases: pd.DataFrame
    """See `validate_cases`."""
    sweeps: list[SweepGains]
    verdict: str
    best: str
    """The rule that the evidence supports; the fixed middle unless another beats it."""
    notes: list[str] = field(default_factory=list)

    @property
    def frame(self) -> pd.DataFrame:
        """The tidy table: over all cases."""
        return self.table.frame()

    def overview(self) -> pd.DataFrame:
        """One row per score: rank correlation, regret, and its difference from the fixed middle's."""
        frame = self.frame
        rows = []
        for score, part in frame.groupby("score", sort=False):
            row: dict[str, Any] = {"score": score}
            for metric in ("rank_correlation", "regret", "regret_difference"):
                own = part[part["metric"] == metric]
                row[metric] = "" if own.empty or math.isnan(own["value"].iloc[0]) else _shown(own.iloc[0])
            rows.append(row)
        return pd.DataFrame(rows)

    def summary(self) -> str:
        """The verdict, and what it rests on."""
        count = sum(len(s.cases) for s in self.sweeps)
        lines = [f"{count} cases from {len(self.sweeps)} sweep{'s' if len(self.sweeps) > 1 else ''} "
                 "(sweep x task x method x K x seed).", self.verdict]
        return "\n".join([*lines, *self.notes])

    def figures(self) -> dict[str, Figure]:
        """Rank correlation and regret of every score."""
        from midblock.figures import segment_bars

        made = {}
        for metric, label in (("rank_correlation", "Spearman's rho with the measured gain"),
                              ("regret", "regret against the best arm (score units)")):
            part = self.frame[(self.frame["metric"] == metric)].assign(layer=lambda f: f["score"])
            if not part.empty and part["value"].notna().any():
                made[f"validate-{metric.replace('_', '-')}"] = segment_bars(
                    part[part["value"].notna()], title="What the scores predict", value_label=label)
        return made


def _shown(row: pd.Series) -> str:
    if math.isnan(row["low"]):
        return f"{row['value']:.3f}"
    return f"{row['value']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"


def _decide(cases: pd.DataFrame) -> tuple[str, str, list[dict[str, Any]]]:
    """The supported rule, a verdict in words, and the paired differences of regret from the fixed middle."""
    regret = cases[cases["metric"] == "regret"].set_index(
        ["sweep", "task", "method", "segments", "seed"])
    reference = regret[regret["score"] == REFERENCE]["value"]
    rows: list[dict[str, Any]] = []
    pvalues: list[float] = []
    for score in dict.fromkeys(regret["score"]):
        if score == REFERENCE:
            continue
        paired = (regret[regret["score"] == score]["value"] - reference).dropna().reset_index()
        if paired.empty:
            continue
        interval, over = _over_cases(paired)
        values = paired.groupby("sweep")["value"].mean() if over == "sweeps" else paired["value"]
        p = _two_sided(values.to_numpy(dtype=np.float64))
        rows.append({"score": score, "interval": interval, "over": over, "p": p})
        pvalues.append(p)
    held = stats.holm(pvalues) if pvalues else np.array([])
    for row, adjusted in zip(rows, held, strict=True):
        row["p_holm"] = float(adjusted)
    better = [r for r in rows if r["score"] in BLOCK_SCORES and r["interval"].value < 0 and r["p_holm"] < 0.05]
    mean = float(reference.mean())
    if better:
        best = min(better, key=lambda r: r["interval"].value)
        return best["score"], (
            f"{best['score']} chooses better than the fixed middle: its regret is lower by "
            f"{-best['interval'].value:.3f} (Holm-adjusted p {best['p_holm']:.3f}); the fixed middle's is "
            f"{mean:.3f}."), rows
    usual = [r for r in rows if r["score"] in BLOCK_SCORES]
    closest = min(usual, key=lambda r: r["interval"].value) if usual else None
    told = "" if closest is None else (
        f" The best of them, {closest['score']}, differs by {closest['interval'].value:+.3f} "
        f"(Holm-adjusted p {closest['p_holm']:.2f}).")
    return REFERENCE, (f"No score is shown to choose better than the fixed middle (regret {mean:.3f}), so the fixed "
                       f"middle stays the default.{told}"), rows


def _two_sided(values: FloatArray) -> float:
    """p of a mean difference of 0; 1 where it cannot be tested."""
    if values.size < 2 or float(np.ptp(values)) == 0:
        return 1.0
    return stats.one_sample_t(values).p


def validate(folders: Sequence[Path | str], *, settings: ScoreSettings | None = None, dtype: str | None = None,
             device: str = "auto", progress: Progress = silent, trust_remote_code: bool = False,
             allow_pickle: bool = False, **overrides: Any) -> ValidateResult:
    """Compute all scores for the models and training data of sweeps and compare them with the gains.

    Args:
        folders: Run folders of finished sweeps with single-segment arms.
        settings: Of the scores; ``overrides``: single fields.
        dtype: Number format of the weights; default: each sweep's own.
        device: Where the scores are computed.
        progress: Told how far it is.
        trust_remote_code: See `load_model`; ``allow_pickle`` likewise.

    Raises:
        OutputError: a folder that is no finished sweep.
        SettingsError: no folder, one folder twice, or a sweep without a complete set of single segments.
    """
    if not folders:
        raise SettingsError("give at least one folder of a sweep to validate on.")
    if len({Path(f).resolve() for f in folders}) < len(folders):
        raise SettingsError("one folder was given twice; it would count double.")
    chosen = ScoreSettings(**{**({} if settings is None else {
        f: getattr(settings, f) for f in settings.__dataclass_fields__}), **overrides})
    short = [Path(f).name for f in folders]
    sweeps = [read_sweep(f, n if short.count(n) == 1 else str(f)) for f, n in zip(folders, short, strict=True)]
    known: dict[tuple[str, str, str], tuple[dict[str, list[float]], int]] = {}
    scores: dict[str, Mapping[str, Sequence[float]]] = {}
    depth: dict[str, int] = {}
    for sweep in sweeps:
        key = (sweep.model, sweep.data, dtype or sweep.dtype)
        if key not in known:
            loaded = load_model(sweep.model, dtype=key[2], device=device, trust_remote_code=trust_remote_code,
                                allow_pickle=allow_pickle)
            table, _, _ = block_scores(loaded, load_data(sweep.data, seed=chosen.seed), settings=chosen,
                                       progress=progress)
            known[key] = scores_of(table, loaded.anatomy.num_blocks), loaded.anatomy.num_blocks
        for case in sweep.cases:
            scores[case.sweep], depth[case.sweep] = known[key]
    return summarise(sweeps, validate_cases([c for s in sweeps for c in s.cases], scores, depth))


def summarise(sweeps: Sequence[SweepGains], cases: pd.DataFrame) -> ValidateResult:
    """Intervals over all cases, and the verdict."""
    table = Table()
    notes = [f"left out: {reason}" for s in sweeps for reason in s.left_out]
    for (score, metric), part in cases.groupby(["score", "metric"], sort=False):
        if metric == "gain":
            continue
        interval, over = _over_cases(part)
        if math.isnan(interval.value):
            reason = next((r for r in part["reason"] if r), "no case has a value")
            table.add_undefined("model", "", str(metric), "pair", reason, score=score, over=over)
        else:
            table.add("model", "", str(metric), "pair", interval, score=score, over=over)
    best, verdict, differences = _decide(cases)
    for row in differences:
        table.add("model", "", "regret_difference", "difference", row["interval"], score=row["score"],
                  over=row["over"], versus=REFERENCE, p=row["p"], p_holm=row["p_holm"])
    if len(sweeps) < 3:
        notes.append("Cases of one sweep share model, data and items: with fewer than three sweeps the intervals "
                     "describe these sweeps, not new models.")
    return ValidateResult(table, cases, list(sweeps), verdict, best, notes)
