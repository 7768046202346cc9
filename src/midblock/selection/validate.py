"""What a locator's scores are worth: their predictions against the measured gains of sweeps.

One *case* is one sweep, task, method, number of segments K and seed: the gain of each single segment
over the untuned model. A score predicts with its mean over the blocks of a segment. It is judged by the
rank correlation with the gains, and by the regret of the segment it would have chosen against the best
arm (single segments and, where it was trained with the same seed, all blocks). Cases of one model and data set are
averaged before anything is tested: `midblock.selection.evidence` says why and decides.
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
from midblock.results import Answer, Estimate, Origin, Table, TableResult
from midblock.selection.evidence import LEAST_SWEEPS, Evidence, fixed_middle, judge, segment_means
from midblock.selection.locate import scores_of
from midblock.selection.scores import block_scores
from midblock.settings.load import LoadSettings
from midblock.settings.locate import BLOCK_SCORES, ScoreSettings

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Case", "SweepGains", "ValidateResult", "predictions", "read_sweep", "validate", "validate_cases"]

FloatArray = npt.NDArray[np.float64]
REFERENCE = "fixed-middle"
_LIMITS = {"rank_correlation": (-1.0, 1.0), "regret": (0.0, math.inf)}
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
    try:
        model, data = str(run["settings"]["model"]), str(run["settings"]["train"]["data"])
    except (KeyError, TypeError):
        raise OutputError(f"{folder}: its run.json does not say on which data which model was trained; repeat the "
                          "sweep in a new folder.") from None
    return SweepGains(folder, model, data, str(run["settings"].get("dtype", "auto")), tuple(cases), tuple(left_out))


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
    found = {name: segment_means(np.array(values, dtype=np.float64), segments) for name, values in scores.items()}
    return {**found, REFERENCE: fixed_middle(segments, num_blocks), "random": np.zeros(segments)}


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


def _over_sweeps(part: pd.DataFrame, independent: Mapping[str, tuple[str, str]]) -> Estimate:
    """Mean over independent sweeps, with an interval where there are enough of them."""
    values = part.groupby(part["sweep"].map(independent), sort=False)["value"].mean().dropna().to_numpy(np.float64)
    found = stats.mean_interval(values)
    if found.n < LEAST_SWEEPS:
        return Estimate(found.value, n=found.n)
    low, high = _LIMITS[str(part["metric"].iloc[0])]
    return Estimate(found.value, max(found.low, low), min(found.high, high), found.n)


@dataclass
class ValidateResult(TableResult):
    """How well every score predicts measured gains."""

    table: Table
    """The tidy table: over all cases."""
    cases: pd.DataFrame
    """See `validate_cases`."""
    sweeps: list[SweepGains]
    verdict: str
    best: str
    """The rule that the evidence supports; the fixed middle unless another beats it."""
    evidence: Evidence
    notes: list[str] = field(default_factory=list)

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

    def answer(self) -> Answer:
        """The verdict, what it rests on, and the location by the supported rule."""
        count = sum(len(s.cases) for s in self.sweeps)
        first = self.sweeps[0]
        return Answer(self.verdict,
                      f"n = {count} cases (sweep x task x method x K x seed) from {len(self.sweeps)} sweep"
                      f"{'s' if len(self.sweeps) > 1 else ''}, {self.evidence.sweeps} of them independent (model and "
                      "data).",
                      Origin((first.model,), first.data).words("locate", "--rule", self.best))

    def details(self) -> list[str]:
        """What was left out."""
        return list(self.notes)

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


def _told(evidence: Evidence, middle: float) -> tuple[str, str]:
    """The supported rule, and the verdict in words."""
    if (winner := evidence.winner) is not None:
        return winner.score, (
            f"{winner.score} chooses better than the fixed middle: over {len(winner.differences)} independent sweeps "
            f"its regret is lower by {-winner.difference:.3f} (Holm-adjusted p {winner.p_holm:.3f}); the fixed "
            f"middle's is {middle:.3f}.")
    if evidence.sweeps < evidence.needed:
        more = evidence.needed - evidence.sweeps
        return REFERENCE, (
            f"No winner can be named from {evidence.sweeps} independent sweep{'s' if evidence.sweeps > 1 else ''}: "
            f"{more} more, of another model or other data, {'are' if more > 1 else 'is'} needed before a score of "
            f"{len(evidence.comparisons)} can be told from chance. The fixed middle (regret {middle:.3f}) stays the "
            "default.")
    closest = min(evidence.comparisons, key=lambda c: c.difference, default=None)
    told = "" if closest is None else (
        f" The best of them, {closest.score}, differs by {closest.difference:+.3f} (p {closest.p_chance:.3f} against "
        f"chance, {closest.p_middle:.3f} against the middle, Holm-adjusted {closest.p_holm:.2f}).")
    return REFERENCE, (f"No score is shown to choose better than the fixed middle (regret {middle:.3f}), so the fixed "
                       f"middle stays the default.{told}")


def validate(folders: Sequence[Path | str], *, load: LoadSettings | None = None, progress: Progress = silent,
             settings: ScoreSettings | None = None, **overrides: Any) -> ValidateResult:
    """Compute all scores for the models and training data of sweeps and compare them with the gains.

    Args:
        folders: Run folders of finished sweeps with single-segment arms.
        load: How models are loaded; ``dtype="auto"`` takes each sweep's own.
        progress: Told how far it is.
        settings: Of the scores.
        **overrides: Single fields of them.

    Raises:
        OutputError: a folder that is no finished sweep.
        SettingsError: no folder, one folder twice, or a sweep without a complete set of single segments.
    """
    chosen, loading = ScoreSettings.of(settings, overrides), load or LoadSettings()
    if not folders:
        raise SettingsError("give at least one folder of a sweep to validate on.")
    if len({Path(f).resolve() for f in folders}) < len(folders):
        raise SettingsError("one folder was given twice; it would count double.")
    short = [Path(f).name for f in folders]
    sweeps = [read_sweep(f, n if short.count(n) == 1 else str(f)) for f, n in zip(folders, short, strict=True)]
    known: dict[tuple[str, str, str], tuple[dict[str, list[float]], int]] = {}
    scores: dict[str, Mapping[str, Sequence[float]]] = {}
    depth: dict[str, int] = {}
    for sweep in sweeps:
        key = (sweep.model, sweep.data, sweep.dtype if loading.dtype == "auto" else loading.dtype)
        if key not in known:
            loaded = load_model(sweep.model, **{**loading.model_dump(), "dtype": key[2]})
            table, _, _ = block_scores(loaded, load_data(sweep.data, seed=chosen.seed), settings=chosen,
                                       progress=progress)
            known[key] = scores_of(table, loaded.anatomy.num_blocks), loaded.anatomy.num_blocks
        for case in sweep.cases:
            scores[case.sweep], depth[case.sweep] = known[key]
    return summarise(sweeps, scores, depth)


def summarise(sweeps: Sequence[SweepGains], scores: Mapping[str, Mapping[str, Sequence[float]]],
              num_blocks: Mapping[str, int]) -> ValidateResult:
    """Means over independent sweeps, and the verdict.

    Args:
        sweeps: With their cases.
        scores: Sweep (as its cases name it) -> score -> value per block.
        num_blocks: Sweep -> L.
    """
    cases = validate_cases([c for s in sweeps for c in s.cases], scores, num_blocks)
    independent = {c.sweep: (s.model, s.data) for s in sweeps for c in s.cases}
    table = Table()
    notes = [f"left out: {reason}" for s in sweeps for reason in s.left_out]
    for (score, metric), part in cases.groupby(["score", "metric"], sort=False):
        if metric == "gain":
            continue
        estimate = _over_sweeps(part, independent)
        if math.isnan(estimate.value):
            reason = next((r for r in part["reason"] if r), "no case has a value")
            table.add_undefined("model", "", str(metric), "pair", reason, score=score, over="sweeps")
        else:
            table.add("model", "", str(metric), "pair", estimate, score=score, over="sweeps")
    evidence = _evidence(sweeps, scores, num_blocks)
    for found in evidence.comparisons:
        estimate = stats.mean_interval(found.differences)
        if estimate.n < LEAST_SWEEPS:
            estimate = Estimate(estimate.value, n=estimate.n)
        table.add("model", "", "regret_difference", "difference", estimate, score=found.score, over="sweeps",
                  versus=REFERENCE, p_chance=found.p_chance, p=found.p_middle, p_holm=found.p_holm)
    regret = cases[(cases["metric"] == "regret") & (cases["score"] == REFERENCE)]
    best, verdict = _told(evidence, _over_sweeps(regret, independent).value)
    if evidence.sweeps < LEAST_SWEEPS:
        notes.append("Seeds and tasks of one model and data set are one observation; fewer than three of these have no "
                     "interval.")
    return ValidateResult(table, cases, list(sweeps), verdict, best, evidence, notes)


def _evidence(sweeps: Sequence[SweepGains], scores: Mapping[str, Mapping[str, Sequence[float]]],
              num_blocks: Mapping[str, int]) -> Evidence:
    clusters: dict[tuple[str, str], list[Case]] = {}
    for sweep in sweeps:
        clusters.setdefault((sweep.model, sweep.data), []).extend(sweep.cases)
    gains = [{k: (np.array([c.gains for c in cases if c.segments == k]),
                  np.array([c.best for c in cases if c.segments == k])) for k in sorted({c.segments for c in cases})}
             for cases in clusters.values()]
    first = [cases[0].sweep for cases in clusters.values()]
    return judge(gains, [{n: np.array(v, dtype=np.float64) for n, v in scores[name].items() if n in BLOCK_SCORES}
                         for name in first], [num_blocks[name] for name in first])
