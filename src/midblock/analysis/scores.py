"""Means over tokens of what is scored per sample, and the rows that say so: for lens, swap, merge and steer.

Every token weighs the same by default: sum over all tokens / number of tokens, with an interval from
resampled samples (`midblock.stats.ratio_interval`). Perplexity is exp of that loss, as evaluation and
the paper's code have it. The mean over samples of each sample's own mean, which a few short samples can
rule, is another quantity: ``per_sample_mean``. Column ``mean_over`` says which (``tokens`` or ``samples``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from midblock import stats
from midblock.capture import RowScores
from midblock.capture.arrivals import Arrivals
from midblock.data import Batch
from midblock.results import Estimate, Kind, Table

__all__ = ["SampleScores", "TokenMean", "add_changes", "add_scores", "exponential"]

FloatArray = npt.NDArray[np.float64]


class TokenMean:
    """One mean with its interval, from sums over each sample's tokens.

    Args:
        per_sample: Mean of the samples' own means, with a t interval, in place of the mean over all tokens.
        confidence: Confidence of every interval.
        seed: Of the resampling.

    Attributes:
        over: ``tokens`` or ``samples``: the column ``mean_over``.
    """

    def __init__(self, *, per_sample: bool = False, confidence: float = 0.95, seed: int = 0) -> None:
        self.over = "samples" if per_sample else "tokens"
        self._confidence, self._seed = confidence, seed

    def __call__(self, sums: npt.ArrayLike, tokens: npt.ArrayLike) -> Estimate:
        """Mean of a quantity with ``sums`` (n,) over the ``tokens`` (n,) of each sample; empty samples are left out."""
        if self.over == "tokens":
            return stats.ratio_interval(sums, tokens, self._confidence, seed=self._seed)
        counted = np.asarray(tokens, dtype=np.float64)
        return stats.mean_interval(np.asarray(sums, dtype=np.float64) / np.where(counted > 0, counted, np.nan),
                                   self._confidence)


class SampleScores:
    """Sums of loss and accuracy over the counted tokens of every sample, filled batch by batch.

    Args:
        samples: Sample numbers (`Batch.indices`), in the order of the arrays.

    Attributes:
        sums: ``loss`` (nats) and ``accuracy`` (right next tokens), (n,) each; NaN where nothing was put.
        tokens: Counted tokens, (n,).
    """

    def __init__(self, samples: Sequence[int]) -> None:
        self._place = {sample: i for i, sample in enumerate(samples)}
        self.tokens: FloatArray = np.zeros(len(samples))
        self._sums: dict[str, FloatArray] = {m: np.full(len(samples), np.nan) for m in ("loss", "accuracy")}
        self._arrivals = Arrivals()

    @property
    def sums(self) -> dict[str, FloatArray]:
        self._arrivals.settle()
        return self._sums

    def __getstate__(self) -> dict[str, Any]:
        self._arrivals.settle()  # what is still on its way would arrive in another copy
        return self.__dict__

    def put(self, batch: Batch, scores: RowScores) -> None:
        """Keep the scores of a batch."""
        rows = [self._place[i] for i in batch.indices]
        self.tokens[rows] = scores.tokens.numpy()
        for name, values in (("loss", scores.loss), ("accuracy", scores.correct)):
            self._arrivals.put(torch.from_numpy(self._sums[name]), rows, values)


    def add(self, other: SampleScores) -> None:
        """Take over what another has of these samples."""
        there = ~np.isnan(other.sums["loss"])
        self.tokens[there] = other.tokens[there]
        for name, values in other.sums.items():
            self.sums[name][there] = values[there]


def add_scores(table: Table, kind: Kind, layer: int | str, side: str, scores: SampleScores, mean: TokenMean,
               **extra: Any) -> None:
    """Rows of ``loss``, ``perplexity`` and ``accuracy`` of one model."""
    for metric, sums in scores.sums.items():
        found = mean(sums, scores.tokens)
        table.add(kind, layer, metric, side, found, mean_over=mean.over, **extra)
        if metric == "loss":
            table.add(kind, layer, "perplexity", side, exponential(found), mean_over=mean.over, **extra)


def add_changes(table: Table, kind: Kind, layer: int | str, scores: SampleScores, reference: SampleScores,
                mean: TokenMean, **extra: Any) -> None:
    """Rows of the paired ``difference`` of loss and accuracy from a reference, and of the ``perplexity_ratio``."""
    for metric, sums in scores.sums.items():
        found = mean(sums - reference.sums[metric], scores.tokens)
        table.add(kind, layer, metric, "difference", found, mean_over=mean.over, **extra)
        if metric == "loss":
            table.add(kind, layer, "perplexity_ratio", "pair", exponential(found), mean_over=mean.over, **extra)


def exponential(interval: Estimate) -> Estimate:
    """exp of a value and of its bounds (overflow becomes infinity)."""
    def exp(x: float) -> float:
        return math.exp(x) if x < 700 else math.inf
    return Estimate(exp(interval.value), exp(interval.low), exp(interval.high), interval.n)
