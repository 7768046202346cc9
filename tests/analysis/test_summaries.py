"""Summaries of lens, swap, merge, steer and weights against the tables that they sum up, with planted values."""

from __future__ import annotations

import pytest
import torch

from midblock.analysis.lens import LensResult
from midblock.analysis.merge import MergeResult
from midblock.analysis.steer import SteerResult
from midblock.analysis.swap import SwapResult
from midblock.analysis.weights import WeightsResult
from midblock.results import Estimate, Table
from midblock.settings import LensSettings, MergeSettings, SteerSettings, SwapSettings


def around(value: float, n: int = 7) -> Estimate:
    """An interval that can be told from every other."""
    return Estimate(value, value - 0.001, value + 0.002, n)


def order_of(text: str, *parts: str) -> list[int]:
    places = [text.find(part) for part in parts]
    assert -1 not in places, (parts, text)
    return places


@pytest.mark.parametrize("changes", [
    {"100": -0.3, "010": 0.1, "001": 0.7},  # one helps
    {"100": 0.5, "010": 0.9, "001": 0.2},  # all harm
    {"100": -0.1, "010": -0.8, "001": -0.4},  # all help
])
def test_swap_names_the_least_and_the_most_harmful_segment_of_every_direction(changes):
    table = Table()
    signs = {("base", "sft"): 1, ("sft", "base"): -1}  # what is best one way is worst the other
    for (recipient, donor), sign in signs.items():
        for head, shift in ((recipient, 0.0), (donor, 5.0)):  # the other head must not be taken
            for mask, value in changes.items():
                extra = {"recipient": recipient, "donor": donor, "head": head, "stage": f"{donor}-{recipient}"}
                table.add("segment", mask, "loss", recipient, around(3 + value), **extra)
                table.add("segment", mask, "accuracy", "difference", around(-9 * sign * value), **extra)
                other = -1 if head == donor else 1  # reversed with the other head
                table.add("segment", mask, "loss", "difference", around(other * sign * value + shift), **extra)
    lines = SwapResult(table, ["base", "sft"], SwapSettings(segments=3)).details()
    low, high = min(changes, key=changes.get), max(changes, key=changes.get)
    for line, (recipient, donor), best, worst in zip(lines, signs, (low, high), (high, low), strict=True):
        sign = signs[recipient, donor]
        assert line.startswith(f"{donor} segments in {recipient} ({recipient} head)")
        assert f"rises least with {best} ({sign * changes[best]:+.4f} nats" in line
        assert f"rises most with {worst} ({sign * changes[worst]:+.4f} nats" in line
        assert f"[{sign * changes[best] - 0.001:+.4f}, {sign * changes[best] + 0.002:+.4f}]" in line
        assert "n = 7 samples" in line


def test_merge_names_the_lowest_loss_and_its_change_from_both_ends():
    table = Table()
    losses = {"0,1": 2.5, "0.5,0.5": 2.1, "1,0": 2.9}
    for label, loss in losses.items():
        common = {"stage": "sft-base", "alpha_rest": 0.5}
        table.add("segment", label, "loss", "merged", around(loss), **common, against=None)
        table.add("segment", label, "perplexity", "merged", around(100 - loss), **common, against=None)
        for end, own in (("base", 3.0), ("sft", 2.0)):
            table.add("segment", label, "loss", "difference", around(loss - own), **common, against=end)
            table.add("segment", label, "accuracy", "difference", around(loss), **common, against=end)
    text = "\n".join(MergeResult(table, ["base", "sft"], MergeSettings()).details())
    assert "of 3 merged models, 0.5,0.5 has the lowest loss: 2.1000 nats a token" in text
    assert "-0.9000 [-0.9010, -0.8980] against base" in text
    assert "+0.1000 [+0.0990, +0.1020] against sft" in text
    order_of(text, "lowest loss", "against base", "against sft")


@pytest.mark.parametrize(("changes", "best"), [
    ({(1, 0.5): 0.2, (1, 1.0): -0.4, (3, 0.5): -0.1, (3, 1.0): 0.6}, (1, 1.0)),
    ({(1, 0.5): 0.2, (1, 1.0): 0.4, (3, 0.5): 0.1, (3, 1.0): 0.6}, (3, 0.5)),
    ({(1, -1.0): -0.7, (1, 1.0): 0.4, (3, -1.0): 0.1, (3, 1.0): 0.6}, (1, -1.0)),
])
def test_steer_names_block_and_strength_of_the_lowest_loss(changes, best):
    table = Table()
    extra = {"direction": "mean", "stage": "sft-base"}
    table.add("model", "", "loss", "base", around(3.0), **extra, alpha=0.0)
    table.add("model", "", "loss", "sft", around(1.25), **extra)
    table.add("model", "", "loss", "difference", around(-1.75), **extra)
    for (block, alpha), value in changes.items():
        table.add("block", block, "loss", "base", around(3 + value), **extra, alpha=alpha)
        table.add("block", block, "loss", "difference", around(value), **extra, alpha=alpha)
        table.add("block", block, "accuracy", "difference", around(-10 - value), **extra, alpha=alpha)
        table.add("block", block, "loss", "difference", around(0.0), **extra, alpha=0.0)
    text = "\n".join(SteerResult(table, ["base", "sft"], SteerSettings(), "mean").details())
    assert f"at block {best[0]} with strength {best[1]:g} ({changes[best]:+.4f} nats" in text
    assert f"[{changes[best] - 0.001:+.4f}, {changes[best] + 0.002:+.4f}]" in text
    assert "sft itself differs from base by -1.7500 nats" in text


@pytest.mark.parametrize("peak", [0, 2, 4])
def test_lens_names_the_largest_kl_and_where_half_of_the_accuracy_is_reached(peak):
    table = Table()
    accuracy = {"base": [0.0, 0.1, 0.25, 0.3, 0.4], "sft": [0.0, 0.5, 0.6, 0.7, 0.9]}
    for h in range(5):
        for side, values in accuracy.items():
            table.add("hidden", h, "accuracy", side, around(values[h]))
            table.add("hidden", h, "loss", side, around(9 - values[h]))
        for stage, top in (("sft-base", peak),):
            table.add("hidden", h, "kl", "pair", around(1.5 if h == top else 0.1 + 0.01 * h), stage=stage)
            table.add("hidden", h, "top1_agreement", "pair", around(0.9 - 0.1 * h), stage=stage)
    lines = LensResult(table, ["base", "sft"], 5, LensSettings()).details()
    assert "base: next-token accuracy 0.4000 [0.3990, 0.4020]" in lines[0]
    assert "half of it is reached at hidden 2 (depth 0.50)" in lines[0]
    assert "half of it is reached at hidden 1 (depth 0.25)" in lines[1]
    assert f"largest KL(base || sft) 1.5 nats at hidden {peak};" in lines[2]
    assert "agrees on 50.0% of positions at the last" in lines[2]


@pytest.mark.parametrize("peak", [0, 5, 9])
def test_weights_names_the_block_that_moved_most_and_the_zones(peak):
    table = Table()
    changes = [1.0 + 0.01 * b for b in range(10)]
    changes[peak] = 7.0
    for b, change in enumerate(changes):
        for matrix, factor in (("qkvo", 1.0), ("mlp", -1.0), ("all", 2.0)):
            for metric, scale in (("weight_change", 1.0), ("weight_change_relative", 0.1)):
                table.add("block", b, metric, "difference", factor * scale * change, n=4, stage="sft-base",
                          matrix=matrix, tensor=None)
    result = WeightsResult(table, ["base", "sft"], 10)
    first = result.details()[0]
    assert f"largest in block {peak} (depth {peak / 9:.2f}: 7)" in first
    zones = {"early": changes[:2], "middle": changes[2:8], "late": changes[8:]}  # depth 0.2 and 0.8 are 1.8 and 7.2
    for zone, values in zones.items():
        assert f"{zone} {sum(values) / len(values):.4g}" in first
    assert "10 of 10 blocks changed" in "\n".join(result.details())
    row = result.regions().set_index(["metric", "matrix"]).loc[("weight_change", "qkvo")]
    assert [row[z] for z in zones] == pytest.approx([sum(v) / len(v) for v in zones.values()])
    assert (row["largest at block"], row["there"]) == (peak, 7.0)


def test_a_summary_of_no_change_says_so():
    table = Table()
    for b in range(3):
        for matrix in ("qkvo", "all"):
            table.add("block", b, "weight_change", "difference", 0.0, n=4, stage="sft-base", matrix=matrix, tensor=None)
    assert "\n".join(WeightsResult(table, ["base", "sft"], 3).details()) == "sft-base: no weight differs."


def test_vectors_do_not_enter_the_summary_of_a_patch():
    table = Table()
    extra = {"direction": "patch all", "stage": "sft-base"}
    for side, loss in (("base", 3.0), ("sft", 2.0)):
        table.add("model", "", "loss", side, around(loss), **extra, alpha=0.0)
    table.add("segment", "1:3", "loss", "difference", around(-0.25), **extra, alpha=1.0)
    result = SteerResult(table, ["base", "sft"], SteerSettings(together=True), "patch all",
                         {("sft-base", 1): torch.ones(2)})
    assert "at blocks 1:3 at once with strength 1 (-0.2500 nats" in "\n".join(result.details())
