"""The last lines of commands against planted tables: what was found, what it means for the choice, what to run next."""

from __future__ import annotations

import pandas as pd
import pytest

from midblock.analysis.correlate import CorrelationResult
from midblock.analysis.lens import LensResult
from midblock.analysis.merge import MergeResult
from midblock.analysis.swap import SwapResult
from midblock.analysis.weights import WeightsResult
from midblock.results import Estimate, Origin, Table
from midblock.settings import LensSettings, MergeSettings, SwapSettings

PAIR = Origin(("base", "tuned"), "mine.jsonl")


def swapped(changes: dict[str, tuple[float, float]], n: int = 9) -> SwapResult:
    """Mask -> change of the loss and half the width of its interval."""
    table = Table()
    for mask, (value, half) in changes.items():
        extra = {"recipient": "base", "donor": "sft", "head": "base", "stage": "sft-base"}
        table.add("segment", mask, "loss", "difference", Estimate(value, value - half, value + half, n), **extra)
    return SwapResult(table, ["base", "sft"], SwapSettings(segments=len(changes)), origin=PAIR)


def test_swap_proposes_what_carries_the_gain() -> None:
    answer = swapped({"100": (0.1, 0.2), "010": (-0.5, 0.1), "001": (-0.2, 0.1)}).answer()
    assert "segment 010 in base" in answer.found
    assert "-0.5000 nats a token [-0.6000, -0.4000], n = 9 samples" in answer.found
    assert answer.means.startswith("010, 001 carry part of what tuning gained")
    assert answer.command == "midblock tune base --data mine.jsonl --mask 010 --dry-run"


def test_swap_on_few_samples_asks_for_more() -> None:
    answer = swapped({"100": (0.1, 0.2), "010": (-0.05, 0.1), "001": (0.2, 0.4)}).answer()
    assert "beyond chance" in answer.means
    assert answer.command == "midblock swap base tuned --data mine.jsonl --samples 36"


def test_swap_where_every_segment_carries_alike_names_none() -> None:
    answer = swapped({"100": (-0.3, 0.1), "010": (-0.35, 0.1), "001": (-0.32, 0.1)}).answer()
    assert "no block stands out" in answer.means


def test_a_model_against_itself_has_no_change_and_no_next_step() -> None:
    answer = swapped({"100": (0.0, 0.0), "010": (0.0, 0.0)}).answer()
    assert answer.found.startswith("No change")
    assert not answer.next


def changed(blocks: dict[int, float], count: int = 10) -> WeightsResult:
    table = Table()
    for b in range(count):
        for metric, scale in (("weight_change", 1.0), ("weight_change_relative", 0.1)):
            for matrix in ("qkvo", "all"):
                table.add("block", b, metric, "difference", scale * blocks.get(b, 0.0), n=4, stage="sft-base",
                          matrix=matrix, tensor=None)
    table.add("model", "embeddings", "weight_change", "difference", 0.0, n=4, stage="sft-base", matrix="embeddings",
              tensor="e")
    return WeightsResult(table, ["base", "sft"], count, origin=Origin(("base", "tuned")))


def test_weights_names_the_changed_blocks_and_averages_over_them() -> None:
    result = changed({3: 2.0, 4: 4.0, 9: 1.0})
    answer = result.answer()
    assert "3 of 10 blocks changed (3:5,9)" in answer.found
    assert "middle 0.3, late 0.1" in answer.found  # not diluted by the four middle blocks that did not change
    assert "early" not in answer.found
    assert "most in block 4 (0.4)" in answer.found
    assert result.regions().set_index(["metric", "matrix"]).loc[("weight_change", "all"), "middle"] == 3.0
    assert answer.command == "midblock profile base tuned --data arithmetic"


def test_weights_of_a_model_against_itself() -> None:
    answer = changed({}).answer()
    assert "no weight differs" in answer.found
    assert not answer.next


def lens(kl: float, every: int = 1) -> LensResult:
    table = Table()
    for h in range(0, 5, every):
        for side in ("base", "sft"):
            table.add("hidden", h, "accuracy", side, Estimate(h / 10, h / 10 - 0.01, h / 10 + 0.01, 6))
        table.add("hidden", h, "accuracy", "difference", Estimate(kl, kl - 0.1, kl + 0.1, 6), stage="sft-base")
        table.add("hidden", h, "kl", "pair", Estimate(kl, kl, kl, 6), stage="sft-base")
        table.add("hidden", h, "top1_agreement", "pair", Estimate(1.0, 1.0, 1.0, 6), stage="sft-base")
    return LensResult(table, ["base", "sft"], 5, LensSettings(every=every), origin=PAIR)


def test_lens_says_no_change_and_what_was_not_read() -> None:
    assert "no change in the predictions" in lens(0.0).answer().found
    assert not lens(0.0).answer().next
    answer = lens(0.2, every=2).answer()
    assert "change +0.2 [+0.1, +0.3], n = 6 samples" in answer.found
    assert "hidden 2 of 4 on (of those read)" in answer.means
    assert "3 of 5 hidden states" in lens(0.2, every=2).details()[0]
    assert "3 of 5" not in "".join(lens(0.2).details())


@pytest.mark.parametrize(("against", "said"), [((-0.2, 0.1), "Better than sft"), ((0.2, 0.1), "Worse than sft"),
                                               ((0.1, 0.2), "Not told apart")])
def test_merge_says_whether_anything_is_lost(against: tuple[float, float], said: str) -> None:
    table, (value, half) = Table(), against
    extra = {"stage": "sft-base", "alpha_rest": 0.5}
    table.add("segment", "0,1", "loss", "merged", Estimate(2.0, 1.9, 2.1, 5), **extra, against=None)
    for end in ("base", "sft"):
        table.add("segment", "0,1", "loss", "difference", Estimate(value, value - half, value + half, 5), **extra,
                  against=end)
    answer = MergeResult(table, ["base", "sft"], MergeSettings(), origin=PAIR).answer()
    assert answer.means.startswith(said)
    assert answer.command == "midblock merge base tuned --alphas 0,1 --save merged-model"


def test_near_tautologies_do_not_lead_the_correlations() -> None:
    pairs = pd.DataFrame([
        {"a": "cka", "b": "cka_debiased", "method": "spearman", "r": 0.99, "low": 0.9, "high": 1.0, "n": 30, "p": 0.0,
         "p_holm": 0.0, "reason": "", "points": "30 blocks"},
        {"a": "cka", "b": "weight_change", "method": "spearman", "r": -0.7, "low": -0.9, "high": -0.4, "n": 30,
         "p": 0.01, "p_holm": 0.02, "reason": "", "points": "30 blocks"}])
    families = {"cka": "alignment", "cka_debiased": "alignment", "weight_change": "weights"}
    result = CorrelationResult(Table(), pairs, pd.DataFrame(), 30, {"folders": ["a", "b"]}, families)
    assert "CKA and Weight change" in result.answer().found
    assert "-0.70 [-0.90, -0.40], n = 30 blocks" in result.answer().found
    assert list(result.strongest()["b"]) == ["weight_change"]
    assert list(result.strongest(related=True)["b"]) == ["cka_debiased", "weight_change"]
    assert result.answer().command == "midblock report a b"
