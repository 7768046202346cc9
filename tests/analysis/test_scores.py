"""Means over tokens and over samples against loops, and their intervals."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from midblock.analysis.scores import SampleScores, TokenMean, add_changes, add_scores, exponential
from midblock.capture import RowScores
from midblock.data import Batch
from midblock.results import Estimate, Table


def filled(loss: list[float], correct: list[float], tokens: list[float]) -> SampleScores:
    scores = SampleScores(range(len(loss)))
    for i in range(len(loss)):  # one batch for each sample, in reverse
        j = len(loss) - 1 - i
        ids = torch.zeros(1, 3, dtype=torch.long)
        scores.put(Batch(indices=(j,), input_ids=ids, attention_mask=ids + 1), RowScores(
            *(torch.tensor([v[j]], dtype=torch.float64) for v in (tokens, loss, correct))))
    return scores


def test_tokens_are_pooled_and_sample_means_are_an_option():
    """A short hard sample beside long easy ones: 433 against 60 is this effect on real text."""
    loss, correct, tokens = [30.0, 100.0, 90.0], [0.0, 60.0, 50.0], [3.0, 100.0, 97.0]
    scores = filled(loss, correct, tokens)
    for per_sample, want in ((False, (220 / 200, 110 / 200)),
                             (True, ((10 + 1 + 90 / 97) / 3, (0 + 0.6 + 50 / 97) / 3))):
        table = Table()
        add_scores(table, "model", "x", "base", scores, TokenMean(per_sample=per_sample), stage="s")
        found = table.frame().set_index("metric")
        assert found.loc["loss", "value"] == pytest.approx(want[0])
        assert found.loc["accuracy", "value"] == pytest.approx(want[1])
        assert found.loc["perplexity", "value"] == pytest.approx(math.exp(want[0]))
        assert set(found["mean_over"]) == {"samples" if per_sample else "tokens"}
        assert (found["n"] == 3).all()
        assert set(found["stage"]) == {"s"}


def test_changes_are_paired_and_their_intervals_resample_samples():
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 50, size=30).astype(float)
    before = tokens * rng.uniform(1, 4, size=30)
    after = before - tokens * rng.normal(0.2, 0.1, size=30)
    table = Table()
    mean = TokenMean(seed=3)
    zero = [0.0] * 30
    scores = [filled(list(loss), zero, list(tokens)) for loss in (after, before)]
    add_changes(table, "segment", "10", *scores, mean)
    found = table.frame().set_index("metric")
    change = (after - before).sum() / tokens.sum()
    row = found.loc["loss"]
    assert row["value"] == pytest.approx(change)
    draws = []
    for _ in range(4000):
        chosen = rng.integers(0, 30, size=30)
        draws.append((after - before)[chosen].sum() / tokens[chosen].sum())
    low, high = np.quantile(draws, [0.025, 0.975])
    # the expanded interval is a little wider (4% at n = 30) than the plain percentiles
    assert row["low"] == pytest.approx(low, abs=0.2 * (high - low))
    assert row["high"] == pytest.approx(high, abs=0.2 * (high - low))
    ratio = found.loc["perplexity_ratio"]
    assert [ratio["value"], ratio["low"], ratio["high"]] == pytest.approx(
        [math.exp(row["value"]), math.exp(row["low"]), math.exp(row["high"])])
    assert (found.loc["accuracy", ["value", "low", "high"]] == 0).all()


@pytest.mark.parametrize("per_sample", [False, True])
def test_samples_without_a_counted_token_are_left_out(per_sample):
    mean = TokenMean(per_sample=per_sample)
    found = mean([4.0, 0.0, 9.0], [2.0, 0.0, 3.0])
    assert found.value == pytest.approx(13 / 5 if not per_sample else 2.5)
    assert found.n == 2
    assert math.isnan(mean([0.0], [0.0]).value)


def test_equal_lengths_make_both_means_equal():
    rng = np.random.default_rng(1)
    sums = rng.normal(size=12)
    assert TokenMean()(sums, np.full(12, 7.0)).value == pytest.approx(
        TokenMean(per_sample=True)(sums, np.full(12, 7.0)).value)


def test_an_overflow_becomes_infinity():
    assert exponential(Estimate(800.0, 1.0, 900.0, 3)) == Estimate(math.inf, math.e, math.inf, 3)
