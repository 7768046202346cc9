"""What a sweep's scores show: intervals, paired comparisons with Holm's correction, ranks, retention,
Pareto view, inverted U. Pure functions of frames and arrays; the methods are those of `midblock.stats`.

Three families of comparisons, each corrected by Holm over all of its rows: ``evaluation`` (arm against
arm, all evaluation tasks), ``gain`` (arm against the untuned model, all evaluation tasks) and
``retention`` (arm against the untuned model and against the baseline, all retention tasks).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import stats as scipy_stats

from midblock.errors import DataError, SettingsError, UndefinedMetricError
from midblock.results import Interval
from midblock.stats import (
    compare_arms,
    hierarchical_arms_bootstrap,
    hierarchical_bootstrap,
    holm,
    inverted_u_test,
    percentile_interval,
    rank_arms,
    wilson_interval,
)
from midblock.sweeps.arms import BASE, Arm
from midblock.sweeps.config import SweepConfig
from midblock.sweeps.records import RunRecord

__all__ = ["ArmInfo", "SweepStatistics", "TaskMatrix", "analyse", "arm_interval", "choose_rates", "default_pairs",
           "detectable_after", "infos_of", "region_of", "task_matrices"]

FloatArray = npt.NDArray[np.float64]
Role = Literal["evaluation", "retention"]
Region = Literal["early", "middle", "late"]


@dataclass(frozen=True)
class ArmInfo:
    """What the statistics need to know of an arm."""

    name: str
    method: str
    mask: str | None
    depth: float
    params: int
    is_baseline: bool = False
    is_random: bool = False
    blocks: tuple[int, ...] = ()

    @property
    def segment(self) -> tuple[str, int, int] | None:
        """(method, K, index) of one segment of K >= 2 alone."""
        if self.mask is None or len(self.mask) < 2 or self.mask.count("1") != 1:
            return None
        return self.method, len(self.mask), self.mask.index("1")


def infos_of(arms: Sequence[Arm]) -> dict[str, ArmInfo]:
    """The arms as the statistics see them, by name."""
    return {a.name: ArmInfo(a.name, a.plan.method, a.plan.mask, a.depth, a.plan.params, a.is_baseline,
                            "random" in a.plan.origin, a.plan.blocks) for a in arms}


def region_of(arm: ArmInfo) -> Region | None:
    """Part of the depth that an arm of a mask of 3 or more digits tunes, where it is one part alone.

    ``early`` holds the first segment and not the second half; ``late`` the mirror image;
    ``middle`` neither the first nor the last segment.

    Example:
        >>> [region_of(ArmInfo("", "lora", m, 0.5, 1)) for m in ("10000", "01100", "00001", "11111")]
        ['early', 'middle', 'late', None]
    """
    mask = arm.mask
    if mask is None or len(mask) < 3:
        return None
    first, last = mask[0] == "1", mask[-1] == "1"
    half = len(mask) / 2
    centres = [i + 0.5 for i, digit in enumerate(mask) if digit == "1"]
    if not first and not last:
        return "middle"
    if first and max(centres) < half:
        return "early"
    if last and min(centres) > half:
        return "late"
    return None


# ---------------------------------------------------------------- scores as arrays

@dataclass
class TaskMatrix:
    """Scores of one task: arm -> (seeds, items); a seed that failed is a row of NaN.

    Perplexities are held as log perplexity: each item's mean loss weighted by its share of the
    tokens, so that the mean over items is the mean over tokens.
    """

    task: str
    role: Role
    metric: str
    higher_is_better: bool
    items: tuple[str, ...]
    scores: dict[str, FloatArray]

    @property
    def binary(self) -> bool:
        """Right or wrong."""
        return self.metric == "accuracy"

    @property
    def trained(self) -> dict[str, FloatArray]:
        """Without the untuned model, and without arms of which every seed failed."""
        return {a: s for a, s in self.scores.items() if a != BASE and not np.isnan(s).all()}


def choose_rates(records: Sequence[RunRecord], arms: Sequence[str]) -> dict[str, float]:
    """The learning rate of each arm: the lowest mean validation loss over seeds; the only one without a grid.

    A rate of which a seed failed is chosen only if the others failed as often.
    """
    chosen = {}
    for arm in arms:
        by_rate: dict[float, list[RunRecord]] = {}
        for record in records:
            if record.arm == arm and record.learning_rate is not None:
                by_rate.setdefault(record.learning_rate, []).append(record)

        def cost(rate: float, runs: Mapping[float, list[RunRecord]] = by_rate) -> tuple[int, float]:
            failed = sum(r.status == "failed" for r in runs[rate])
            losses = [r.validation_loss for r in runs[rate] if r.status == "done" and r.validation_loss is not None]
            return failed, float(np.mean(losses)) if losses else math.inf

        if by_rate:
            chosen[arm] = min(by_rate, key=cost)
    return chosen


def task_matrices(records: Sequence[RunRecord], arms: Sequence[str], seeds: Sequence[int], *,
                  evaluation: Sequence[str], retention: Sequence[str],
                  rates: Mapping[str, float]) -> dict[str, TaskMatrix]:
    """Scores of every task by arm, seed and item.

    Raises:
        DataError: two runs were scored on different items.
    """
    by_key = {(r.arm, r.seed, r.learning_rate): r for r in records if r.status == "done"}
    found: dict[str, TaskMatrix] = {}
    for task in (*evaluation, *retention):
        role: Role = "evaluation" if task in evaluation else "retention"
        done = [r.tasks[task] for r in by_key.values() if task in r.tasks]
        if not done:
            continue
        first = done[0]
        if any(t.items != first.items for t in done):
            raise DataError(f"{task}: the runs were scored on different items; they cannot be compared. Start the "
                            "sweep again in a new folder.")
        size = len(first.items)

        def row(record: RunRecord | None, task: str = task, size: int = size) -> FloatArray:
            if record is None or task not in record.tasks:
                return np.full(size, np.nan)
            scored = record.tasks[task]
            values = np.asarray(scored.scores, dtype=np.float64)
            if scored.metric != "perplexity":
                return values
            tokens = np.asarray(scored.tokens, dtype=np.float64)
            return np.asarray(values * tokens / tokens.mean(), dtype=np.float64)

        scores = {}
        if (BASE, None, None) in by_key:
            scores[BASE] = np.repeat(row(by_key[BASE, None, None])[None, :], len(seeds), axis=0)
        for arm in arms:
            scores[arm] = np.stack([row(by_key.get((arm, s, rates.get(arm)))) for s in seeds])
        found[task] = TaskMatrix(task, role, first.metric, first.higher_is_better, tuple(first.items), scores)
    return found


def arm_interval(scores: FloatArray, *, binary: bool, confidence: float, replicates: int) -> Interval:
    """Mean over seeds and items with the percentile interval of the hierarchical bootstrap.

    Where all scores are equal (nothing right, say) a bootstrap would claim certainty: right/wrong
    scores then get Wilson's interval over items.

    Args:
        scores: (seeds, items); NaN rows (failed seeds) are left out.
    """
    there = scores[~np.isnan(scores).any(axis=1)]
    if not there.size:
        return Interval(math.nan)
    items = there.shape[1]
    value = float(there.mean())
    if binary and bool((there == there[0, 0]).all()):
        return wilson_interval(int(there[0].sum()), items, confidence)
    if items < 2:
        return Interval(value, n=items)
    return percentile_interval(value, hierarchical_bootstrap(there, replicates), confidence, n=items)


# ---------------------------------------------------------------- which arms are compared

def default_pairs(infos: Mapping[str, ArmInfo]) -> list[tuple[str, str]]:
    """The comparisons made unless the configuration names others.

    Every arm against the baseline; for each method and K with single segments, the middle one (two
    for an even K) against the first and the last; and the middle one against every random block set
    of the same method.
    """
    pairs: list[tuple[str, str]] = []
    baseline = next((n for n, a in infos.items() if a.is_baseline), None)
    if baseline is not None:
        pairs += [(name, baseline) for name in infos if name != baseline]
    groups: dict[tuple[str, int], dict[int, str]] = {}
    for name, info in infos.items():
        if info.segment is not None:
            method, k, index = info.segment
            groups.setdefault((method, k), {})[index] = name
    for (method, k), by_index in groups.items():
        if k < 3:
            continue
        middles = [by_index[i] for i in dict.fromkeys(((k - 1) // 2, k // 2)) if i in by_index]
        ends = [by_index[i] for i in (0, k - 1) if i in by_index]
        rivals = [n for n, a in infos.items() if a.is_random and a.method == method]
        pairs += [(m, other) for m in middles for other in (*ends, *rivals)]
    return list(dict.fromkeys(pairs))


# ---------------------------------------------------------------- everything together

@dataclass
class SweepStatistics:
    """Results of `analyse`.

    Attributes:
        scores: One row per task and arm: ``role``, ``task``, ``metric``, ``arm``, ``value``, ``low``, ``high``,
            ``n`` (items), ``n_seeds``. Perplexities in their own unit.
        comparisons: Rows of `midblock.stats.compare_arms` with ``family``, ``task``, ``metric`` and
            ``better`` (+1: ``a`` is better, -1: worse, 0: equal), ``p_holm`` over the family. Perplexities
            as differences of log perplexity.
        ranking: Rows of `midblock.stats.rank_arms` with ``task``.
        inverted_u: One row per task, method and K.
        pareto: One row per task and arm: score, retention change, parameters, seconds, and which views of
            them no other arm beats.
        rates: Chosen learning rate per arm.
        undefined: What could not be computed, and why.
    """

    scores: pd.DataFrame
    comparisons: pd.DataFrame
    ranking: pd.DataFrame
    inverted_u: pd.DataFrame
    pareto: pd.DataFrame
    matrices: dict[str, TaskMatrix]
    rates: dict[str, float]
    undefined: list[str] = field(default_factory=list)

    def family(self, name: str) -> pd.DataFrame:
        """The comparisons of one family."""
        if self.comparisons.empty:
            return self.comparisons
        return self.comparisons[self.comparisons["family"] == name]


def analyse(records: Sequence[RunRecord], infos: Mapping[str, ArmInfo], config: SweepConfig) -> SweepStatistics:
    """All statistics of a sweep from its records.

    Arms of which every seed failed are left out; the outcome names them.
    """
    wanted = config.statistics
    arms = list(infos)
    rates = choose_rates(records, arms)
    evaluation = [t.label for t in config.evaluation]
    matrices = task_matrices(records, arms, config.seeds, evaluation=evaluation,
                             retention=[t.label for t in config.retention], rates=rates)
    undefined: list[str] = []
    score_rows, ranks, shapes = [], [], []
    for matrix in matrices.values():
        score_rows += _score_rows(matrix, wanted.confidence, wanted.replicates)
        if matrix.role != "evaluation":
            continue
        draws = _paired_draws(matrix, wanted.replicates, undefined)
        if draws:
            ranks.append(rank_arms(draws, confidence=wanted.confidence,
                                   larger_is_better=matrix.higher_is_better).assign(task=matrix.task))
            shapes += _inverted_u(matrix, infos, draws, wanted.confidence, undefined)
    pairs = ([(a, b) for a, b in wanted.comparisons] if wanted.comparisons is not None else default_pairs(infos))
    comparisons = _all_comparisons(matrices, infos, pairs, config, undefined)
    scores = pd.DataFrame(score_rows, columns=["role", "task", "metric", "arm", "value", "low", "high", "n",
                                               "n_seeds"])
    return SweepStatistics(
        scores=scores, comparisons=comparisons,
        ranking=pd.concat(ranks, ignore_index=True) if ranks else pd.DataFrame(columns=["arm", "best", "task"]),
        inverted_u=pd.DataFrame(shapes), pareto=_pareto(matrices, records, infos, rates),
        matrices=matrices, rates=rates, undefined=undefined)


def _score_rows(matrix: TaskMatrix, confidence: float, replicates: int) -> list[dict[str, Any]]:
    rows = []
    for arm, scores in matrix.scores.items():
        seeds = int((~np.isnan(scores).any(axis=1)).sum())
        # the untuned model has no seeds: its rows are copies
        own = scores[:1] if arm == BASE else scores
        e = arm_interval(own, binary=matrix.binary, confidence=confidence, replicates=replicates)
        values = [e.value, e.low, e.high]
        if matrix.metric == "perplexity":
            values = [math.exp(v) for v in values]
        rows.append({"role": matrix.role, "task": matrix.task, "metric": matrix.metric, "arm": arm,
                     "value": values[0], "low": values[1], "high": values[2], "n": len(matrix.items),
                     "n_seeds": 0 if arm == BASE else seeds})
    return rows


def _paired_draws(matrix: TaskMatrix, replicates: int, undefined: list[str]) -> dict[str, FloatArray]:
    arms = matrix.trained
    if not arms:
        return {}
    try:
        return hierarchical_arms_bootstrap(arms, replicates)
    except SettingsError as error:
        undefined.append(f"{matrix.task}: ranking and inverted U: {error}")
        return {}


def _inverted_u(matrix: TaskMatrix, infos: Mapping[str, ArmInfo], draws: Mapping[str, FloatArray],
                confidence: float, undefined: list[str]) -> list[dict[str, Any]]:
    groups: dict[tuple[str, int], list[ArmInfo]] = {}
    for name in draws:
        if (segment := infos[name].segment) is not None:
            groups.setdefault(segment[:2], []).append(infos[name])
    rows = []
    sign = 1.0 if matrix.higher_is_better else -1.0
    for (method, k), members in groups.items():
        if k < 3 or len(members) < k:
            continue
        ordered = sorted(members, key=lambda a: a.depth)
        values = np.array([sign * np.nanmean(matrix.scores[a.name]) for a in ordered])
        stacked = sign * np.stack([draws[a.name] for a in ordered], axis=1)
        try:
            found = inverted_u_test([a.depth for a in ordered], values, replicates=stacked, confidence=confidence)
        except (UndefinedMetricError, SettingsError) as error:
            undefined.append(f"{matrix.task}: inverted U over {k} segments ({method}): {error}")
            continue
        rows.append({"task": matrix.task, "method": method, "segments": k, "p": found.p,
                     "peak": found.peak.value, "peak_low": found.peak.low, "peak_high": found.peak.high,
                     "slope_left": found.line_slopes[0], "slope_right": found.line_slopes[1],
                     "break_at": found.break_at, "best": max(ordered, key=lambda a: values[ordered.index(a)]).name})
    return rows


def _all_comparisons(matrices: Mapping[str, TaskMatrix], infos: Mapping[str, ArmInfo],
                     pairs: Sequence[tuple[str, str]], config: SweepConfig, undefined: list[str]) -> pd.DataFrame:
    baseline = next((n for n, a in infos.items() if a.is_baseline), None)
    frames = []
    for matrix in matrices.values():
        against_base = [(arm, BASE) for arm in infos]
        if matrix.role == "evaluation":
            families = {"evaluation": list(pairs), "gain": against_base}
        else:
            families = {"retention": against_base + [(a, baseline) for a in infos
                                                     if baseline is not None and a != baseline]}
        for family, chosen in families.items():
            frame = _compare(matrix, chosen, config, undefined)
            if not frame.empty:
                frames.append(frame.assign(family=family, task=matrix.task, metric=matrix.metric))
    if not frames:
        return pd.DataFrame(columns=["family", "task", "metric", "a", "b", "difference", "low", "high", "p", "p_holm",
                                     "effect_size", "effect", "test", "n_items", "n_seeds", "better"])
    joined = pd.concat(frames, ignore_index=True)
    for family in joined["family"].unique():
        rows = joined["family"] == family
        joined.loc[rows, "p_holm"] = holm(joined.loc[rows, "p"].to_numpy(dtype=np.float64))
    first = ["family", "task", "metric"]
    return joined[[*first, *[c for c in joined.columns if c not in first]]]


def _compare(matrix: TaskMatrix, pairs: Sequence[tuple[str, str]], config: SweepConfig,
             undefined: list[str]) -> pd.DataFrame:
    there = {**({BASE: matrix.scores[BASE]} if BASE in matrix.scores else {}), **matrix.trained}

    def share_a_seed(a: str, b: str) -> bool:
        return bool((~np.isnan(there[a]).any(axis=1) & ~np.isnan(there[b]).any(axis=1)).any())

    usable = [(a, b) for a, b in pairs if a in there and b in there and share_a_seed(a, b)]
    if left_out := [f"{a} against {b}" for a, b in pairs if (a, b) not in usable]:
        undefined.append(f"{matrix.task}: no seed in which both have scores: {', '.join(left_out)}")
    if not usable:
        return pd.DataFrame()
    needed = {arm: scores for arm, scores in there.items() if arm != BASE or any(BASE in p for p in usable)}
    frame = compare_arms(needed, pairs=usable, binary=matrix.binary, confidence=config.statistics.confidence,
                         replicates=config.statistics.replicates)
    direction = 1.0 if matrix.higher_is_better else -1.0
    return frame.assign(better=np.sign(frame["difference"].to_numpy(dtype=np.float64) * direction))


def _pareto(matrices: Mapping[str, TaskMatrix], records: Sequence[RunRecord], infos: Mapping[str, ArmInfo],
            rates: Mapping[str, float]) -> pd.DataFrame:
    seconds: dict[str, float] = {}
    for arm in infos:
        times = [float(r.training["seconds"]) for r in records
                 if r.arm == arm and r.status == "done" and r.learning_rate == rates.get(arm) and r.training]
        if times:
            seconds[arm] = float(np.mean(times))
    forgetting = _forgetting(matrices, list(infos))
    rows = []
    for matrix in matrices.values():
        if matrix.role != "evaluation":
            continue
        for arm, scores in matrix.trained.items():
            gain = float(np.nanmean(scores)) * (1.0 if matrix.higher_is_better else -1.0)
            if BASE in matrix.scores:
                gain -= float(np.nanmean(matrix.scores[BASE])) * (1.0 if matrix.higher_is_better else -1.0)
            rows.append({"task": matrix.task, "arm": arm, "gain": gain, "forgetting": forgetting.get(arm, math.nan),
                         "params": infos[arm].params, "train_seconds": seconds.get(arm, math.nan)})
    frame = pd.DataFrame(rows)
    if frame.empty:
        return frame
    for task in frame["task"].unique():
        part = frame["task"] == task
        for cost in ("forgetting", "params", "train_seconds"):
            frame.loc[part, f"front_{cost}"] = _unbeaten(frame.loc[part, ["gain", cost]].to_numpy(dtype=np.float64)
                                                         * np.array([1.0, -1.0]))
        kept = ["gain", *[c for c in ("forgetting", "params", "train_seconds") if frame.loc[part, c].notna().any()]]
        signs = np.array([1.0] + [-1.0] * (len(kept) - 1))
        frame.loc[part, "front_all"] = _unbeaten(frame.loc[part, kept].to_numpy(dtype=np.float64) * signs)
    return frame


def _forgetting(matrices: Mapping[str, TaskMatrix], arms: Sequence[str]) -> dict[str, float]:
    """Mean rise of the log perplexity (or loss) over the retention tasks, in nats."""
    kept = [m for m in matrices.values() if m.role == "retention" and BASE in m.scores]
    found = {}
    for arm in arms:
        rises = [float(np.nanmean(m.scores[arm]) - np.nanmean(m.scores[BASE])) for m in kept if arm in m.trained]
        if rises:
            found[arm] = float(np.mean(rises))
    return found


def _unbeaten(values: FloatArray) -> npt.NDArray[np.bool_]:
    """Rows that no other row equals or beats throughout and beats somewhere; NaN rows are never on the front."""
    there = ~np.isnan(values).any(axis=1)
    at_least = np.all(values[None] >= values[:, None], axis=2)
    better = np.any(values[None] > values[:, None], axis=2)
    return np.asarray(there & ~np.any(at_least & better, axis=1), dtype=np.bool_)


def detectable_after(comparisons: pd.DataFrame, *, family: str, task: str, confidence: float, alpha: float,
                     power: float) -> float:
    """Smallest true difference that this sweep would have found, from the errors that it had.

    (z(1 - alpha/2m) + z(power)) times the median standard error of the task's comparisons, m the number of
    comparisons of the family (Holm's first step); the error is half the interval's width over its
    normal quantile, a little too large at few seeds. NaN without comparisons.
    """
    rows = comparisons[comparisons["family"] == family] if not comparisons.empty else comparisons
    own = rows[rows["task"] == task] if not rows.empty else rows
    if own.empty:
        return math.nan
    half = (own["high"] - own["low"]).to_numpy(dtype=np.float64) / 2
    half = half[np.isfinite(half)]
    if not half.size:
        return math.nan
    error = float(np.median(half)) / float(scipy_stats.norm.ppf(0.5 + confidence / 2))
    tests = int(rows["p"].notna().sum())
    return error * float(scipy_stats.norm.ppf(1 - alpha / (2 * max(tests, 1))) + scipy_stats.norm.ppf(power))
