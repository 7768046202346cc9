"""Scores of every block without training: from one forward pass, from one backward, from the weights alone.

A higher score means "tune here" as a hypothesis only: `midblock.selection.validate` says which of them
predicts measured gains.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from midblock import metrics, stats
from midblock.analysis.gradients import GradientsResult, gradients, supervised_batches
from midblock.analysis.passes import PassPart, encode
from midblock.analysis.weight_sums import single_threads
from midblock.capture.accumulators import PooledStates
from midblock.capture.arrivals import Arrivals
from midblock.data import Batch, Dataset
from midblock.errors import BudgetError, UndefinedMetricError
from midblock.models import LoadedModel, projections
from midblock.progress import Progress, silent
from midblock.results import Table
from midblock.settings.locate import ScoreSettings
from midblock.settings.tune import REFERENCE_RANK
from midblock.tuning.eva import eva_ranks
from midblock.tuning.planning import make_plan

__all__ = ["AdjacentStates", "ForwardPass", "block_scores", "cka_matrix", "forward_part", "weight_snr"]

class AdjacentStates:
    """Block influence and angular distance per sample and block, an `Accumulator`.

    Hidden h must come before h+1 within a batch, in whatever order the batches come; one hidden state
    of each batch on its way is kept.

    Attributes:
        values: metric -> stage -> float64 (L, N).
    """

    METRICS = ("block_influence", "angular_distance")
    keeps_states = 1

    def __init__(self, stages: Sequence[str], num_blocks: int, samples: Sequence[int]) -> None:
        self.place = {sample: row for row, sample in enumerate(samples)}
        self._last = num_blocks
        self._before: dict[tuple[str, tuple[int, ...]], Tensor] = {}
        self._values = {m: {s: torch.full((num_blocks, len(samples)), torch.nan, dtype=torch.float64) for s in stages}
                        for m in self.METRICS}
        self._arrivals = Arrivals()

    @property
    def values(self) -> dict[str, dict[str, Tensor]]:
        self._arrivals.settle()
        return self._values

    def feed(self, h: int, batch: Batch, states: Mapping[str, Tensor]) -> None:
        """Take hidden h of a batch: stage name -> (B, T, d)."""
        rows = [self.place[i] for i in batch.indices]
        for stage, z in states.items():
            key = (stage, batch.indices)
            before = self._before.pop(key, None)
            if before is not None:
                mask = (batch.host or batch).attention_mask
                both = (metrics.block_influence(before, z, mask), metrics.angular_distance(before, z, mask))
                for metric, found in zip(self.METRICS, both, strict=True):
                    self._arrivals.put(self._values[metric][stage], (h - 1, rows), found)
            if h < self._last:
                self._before[key] = z

    def part(self, samples: Sequence[int]) -> dict[str, Tensor]:
        """What it knows of some samples, by array name."""
        rows = [self.place[s] for s in samples]
        return {f"{m}|{s}": v[:, rows].contiguous() for m, by in self.values.items() for s, v in by.items()}

    def put(self, samples: Sequence[int], part: Mapping[str, Tensor]) -> None:
        """Put saved values back."""
        rows = [self.place[s] for s in samples]
        for key, values in part.items():
            metric, stage = key.split("|")
            self.values[metric][stage][:, rows] = values


def cka_matrix(x: Tensor) -> npt.NDArray[np.float64]:
    """Debiased CKA between all pooled hidden states.

    Args:
        x: (H, N, d) pooled states, N >= 4.

    Returns:
        (H, H), symmetric, 1 on the diagonal; NaN where it is undefined.
    """
    result: npt.NDArray[np.float64] = metrics.layer_cka(x, x).cpu().numpy()
    np.fill_diagonal(result, 1.0)
    return result


def weight_snr(block: torch.nn.Module, each: Callable[..., Iterable[Tensor]] = map) -> float:
    """`midblock.metrics.spectral_snr` over the linear layers of a block; reads weights only.

    Args:
        block: The block.
        each: Calls a function for every matrix, as ``map``; a pool's does it for several at once.

    Raises:
        UndefinedMetricError: no matrix, or one whose noise level is 0.
    """
    found = {part.name: part.shape for part in projections(block).values() if part.linear and len(part.shape) == 2}
    weights = [block.get_parameter(name).detach() for name in found]
    for name, weight in zip(found, weights, strict=True):
        if not weight.is_floating_point():
            raise UndefinedMetricError(f"{name} is quantised ({weight.dtype}); a spectrum needs floats.")
    spectra = each(lambda weight: metrics.singular_values(weight.float(), method="gram"), weights)
    return metrics.spectral_snr(list(zip(spectra, found.values(), strict=True)))


def block_scores(loaded: LoadedModel, dataset: Dataset | None, *, settings: ScoreSettings | None = None,
                 stage: str = "base", progress: Progress = silent, forward: ForwardPass | None = None,
                 backward: GradientsResult | None = None, **overrides: Any
                 ) -> tuple[Table, npt.NDArray[np.float64] | None, dict[str, Any]]:
    """All chosen scores of every block.

    Args:
        loaded: The model; unchanged afterwards.
        dataset: Texts or tasks; None leaves the scores that need data out.
        settings: See `ScoreSettings`; ``overrides``: single fields of it.
        stage: The ``side`` of the rows.
        progress: Told how far it is.
        forward: What a pass shared with others found (`forward_part`).
        backward: `gradients` of this model on the same samples, in the same batches.

    Returns:
        Rows of kind ``block`` (columns ``matrix`` = all, ``data``, ``seed``); the CKA matrix between hidden
        0..L (None without a forward pass); counts of the rows that were read.

    Raises:
        DataError: no usable sample.
        SettingsError: a setting out of range.
    """
    chosen = ScoreSettings.of(settings, overrides)
    table = Table()
    extra: dict[str, Any] = {"matrix": "all", "data": "" if dataset is None else dataset.name, "seed": chosen.seed}
    counts: dict[str, Any] = {}
    similarity = None
    if dataset is not None and chosen.wants("forward"):
        found = forward if forward is not None else forward_part(
            loaded, dataset, settings=chosen, stage=stage).run(progress=progress)
        similarity, counts = _forward_scores(table, found, chosen, stage, extra)
    if chosen.wants("weights"):
        own = {**extra, "data": ""}
        with single_threads(torch.get_num_threads(), "snr") as pool:  # decompositions scale over matrices, not within
            for b, block in loaded.each_block():
                try:
                    table.add("block", b, "weight_snr", stage, weight_snr(block, pool.map), n=1, **own)
                except UndefinedMetricError as error:
                    table.add_undefined("block", b, "weight_snr", stage, str(error), **own)
                progress("weights", b + 1, loaded.anatomy.num_blocks)
    wanted = chosen.wants("backward")
    if dataset is not None and wanted:
        if backward is None:
            backward = gradients(loaded, data=dataset, names=[stage], samples=chosen.gradient_samples,
                                 max_length=chosen.max_length, batch_size=chosen.batch_size, seed=chosen.seed,
                                 progress=progress)
        for row in backward.table.rows:
            if row["matrix"] == "all" and row["metric"] in wanted and row["side"] == stage:
                table.rows.append({**row, **extra})
        counts = counts or dict(backward.counts)
    if dataset is not None and chosen.wants("inputs"):
        own, halves = _eva_scores(table, loaded, dataset, chosen, stage, extra)
        counts = {**own, **counts, "split_half": {**counts.get("split_half", {}), "eva_share": halves}}
    return table, similarity, counts


@dataclass
class ForwardPass:
    """What one forward pass tells of the blocks, before it is made into scores."""

    adjacent: AdjacentStates
    pooled: PooledStates
    counts: dict[str, Any]


def forward_part(loaded: LoadedModel, dataset: Dataset, *, settings: ScoreSettings, stage: str = "base"
                 ) -> PassPart[ForwardPass]:
    """The forward pass of `block_scores` as a part of a pass that others may share.

    Raises:
        DataError: no usable sample.
    """
    drawn = dataset.sample(settings.samples, settings.seed)
    inputs = encode({stage: loaded}, drawn, settings, need="a score of blocks")
    samples = sorted(row.index for row in inputs.rows)
    blocks = loaded.anatomy.num_blocks
    adjacent = AdjacentStates([stage], blocks, samples)
    pooled = PooledStates([stage], blocks + 1, samples, loaded.anatomy.hidden_size)
    return PassPart(inputs, [inputs.rows], {"adjacent": adjacent, "pooled": pooled},
                    lambda: ForwardPass(adjacent, pooled, inputs.encoded.describe()))


def _forward_scores(table: Table, found: ForwardPass, settings: ScoreSettings, stage: str, extra: Mapping[str, Any]
                    ) -> tuple[npt.NDArray[np.float64], dict[str, Any]]:
    adjacent, pooled, counts = found.adjacent, found.pooled, dict(found.counts)
    blocks, samples = len(pooled.x[stage]) - 1, list(pooled.place)
    wanted = settings.wants("forward")
    for metric in adjacent.METRICS:
        if metric in wanted:
            for b, values in enumerate(adjacent.values[metric][stage].numpy()):
                table.add("block", b, metric, stage, stats.mean_interval(values), **extra)
    x = pooled.x[stage]
    n = len(samples)
    similarity = cka_matrix(x) if n >= 4 else np.full((blocks + 1, blocks + 1), math.nan)
    counts["split_half"] = _split_halves(x)
    if "cka_novelty" in wanted:
        for b in range(blocks):
            value = 1 - similarity[b, b + 1]
            if math.isnan(value):
                table.add_undefined("block", b, "cka_novelty", stage,
                                    "debiased CKA is undefined here (too few samples, or equal rows)", n=n, **extra)
            else:
                table.add("block", b, "cka_novelty", stage, value, n=n, **extra)
    if "rank_plateau" in wanted:
        ranks = [_effective_rank(h) for h in x]
        for b in range(blocks):
            if math.isnan(ranks[b]) or math.isnan(ranks[b + 1]):
                table.add_undefined("block", b, "rank_plateau", stage, "the effective rank is undefined here", n=n,
                                    **extra)
            else:
                table.add("block", b, "rank_plateau", stage, -abs(math.log(ranks[b + 1] / ranks[b])), n=n, **extra)
    return similarity, counts


def _eva_scores(table: Table, loaded: LoadedModel, dataset: Dataset, settings: ScoreSettings, stage: str,
                extra: Mapping[str, Any]) -> tuple[dict[str, Any], float]:
    """Share of an all-layer budget that EVA's ranks give each block's q, k, v and o (`midblock.tuning.eva`).

    Returns:
        Counts of the rows that were read, and how two halves of them agree.
    """
    loaded.require_whole()
    drawn = dataset.sample(settings.gradient_samples, settings.seed)
    batches, counts = supervised_batches(loaded, drawn, max_length=settings.max_length, batch_size=settings.batch_size)
    batches = [batch.to(loaded.device) for batch in batches]
    uniform = make_plan(loaded, mask="1", rank=REFERENCE_RANK)

    def shares(batches: Sequence[Batch]) -> npt.NDArray[np.float64]:
        plan = eva_ranks(uniform, loaded, batches)
        return np.array([plan.params_of_block(b) for b in range(loaded.anatomy.num_blocks)]) / plan.params

    try:
        found, reason = shares(batches), ""
    except BudgetError as error:
        found, reason = np.full(loaded.anatomy.num_blocks, math.nan), str(error)
    for b, value in enumerate(found.tolist()):
        if reason:
            table.add_undefined("block", b, "eva_share", stage, reason, n=len(drawn), **extra)
        else:
            table.add("block", b, "eva_share", stage, value, n=len(drawn), **extra)
    try:
        halves = _agreement(shares(batches[::2]), shares(batches[1::2]))
    except BudgetError:
        halves = 0.0
    return counts, halves


def _agreement(one: npt.NDArray[np.float64], two: npt.NDArray[np.float64]) -> float:
    """Spearman-Brown, 2 r / (1 + r), of the correlation r of two halves over blocks; 0 where they disagree."""
    with np.errstate(invalid="ignore", divide="ignore"):
        r = float(np.corrcoef(one, two)[0, 1])
    return 2 * r / (1 + r) if r > 0 else 0.0


def _split_halves(x: Tensor) -> dict[str, float]:
    """Reliability of the scores without an interval: how two halves of the samples agree over blocks.

    See `_agreement`; 0 where a half is too small.

    Args:
        x: (L + 1, N, d) pooled states.
    """
    if x.shape[1] < 8:
        return dict.fromkeys(("cka_novelty", "rank_plateau"), 0.0)
    found: dict[str, list[npt.NDArray[np.float64]]] = {"cka_novelty": [], "rank_plateau": []}
    for half in (x[:, ::2], x[:, 1::2]):
        found["cka_novelty"].append(1 - cka_matrix(half).diagonal(1))
        found["rank_plateau"].append(-np.abs(np.diff(np.log([_effective_rank(h) for h in half]))))
    return {name: _agreement(one, two) for name, (one, two) in found.items()}


def _effective_rank(x: Tensor) -> float:
    try:
        return float(metrics.effective_rank(x))
    except UndefinedMetricError:
        return math.nan
