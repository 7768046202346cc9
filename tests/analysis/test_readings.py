"""What each analysis says of small planted tables, to the letter.

Numbers are chosen so that none can be taken for another: what a sentence says stands in one cell of its table. The
sentences of ``readings.txt`` were made once and read against the tables, case by case; a change of words is read anew.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from midblock.analysis.correlate import CorrelationResult
from midblock.analysis.gradients import GradientsResult
from midblock.analysis.lens import LensResult
from midblock.analysis.merge import MergeResult
from midblock.analysis.profile import ProfileResult
from midblock.analysis.stability import StabilityResult
from midblock.analysis.steer import SteerResult
from midblock.analysis.swap import SwapResult
from midblock.analysis.weights import WeightsResult
from midblock.results import Estimate, Origin, Table
from midblock.settings import (
    GradientSettings,
    LensSettings,
    MergeSettings,
    ProfileSettings,
    SteerSettings,
    SwapSettings,
)

PAIR = Origin(("m/base", "m/tuned"), "mine.jsonl")
STAGES = ("base", "sft", "dpo")
PAIRS = (("sft", "base"), ("dpo", "sft"), ("dpo", "base"))


def around(value: float, n: int = 7) -> Estimate:
    """An interval that can be told from every other."""
    return Estimate(value, value - 0.01, value + 0.02, n)


COSINE = [1.0, 0.9, 0.95, 0.8, 0.97, 0.99]
CHANGE = [0.0, 0.3, 0.2, 0.7, 0.1, 0.4]
COUNTS = {"pooled_samples": 40, "hidden_size": 8}


def profile_table(*, same: bool = False, n: int = 7) -> Table:
    table = Table()
    for h in range(6):
        for metric, side, value, still in (
            ("cosine", "pair", COSINE[h], 1.0),
            ("cka_debiased", "pair", 1 - 0.01 * h, 1.0),
            ("change_intensity_relative", "pair", CHANGE[h], 0.0),
            ("prompt_entropy", "difference", -0.05 * h * (5 - h), 0.0),
        ):
            table.add(
                "hidden", h, metric, side, around(still if same else value, n), stage="sft-base", p_holm=0.5 - 0.1 * h
            )
    return table


def profiled(*, same: bool = False) -> ProfileResult:
    return ProfileResult(
        profile_table(same=same), ["base", "sft"], 6, ProfileSettings(replicates=123), COUNTS, origin=PAIR
    )


def stable(share: float, *, same: bool = False) -> StabilityResult:
    return StabilityResult(
        profile_table(same=same, n=3),
        ["base", "sft"],
        6,
        ProfileSettings(confidence=0.9),
        [4, 5, 6],
        {**COUNTS, "share_drawn": share},
        origin=PAIR,
    )


def lensed(*stages: str, every: int = 1, paper_code: bool = False, kl: float = 1.5) -> LensResult:
    table = Table()
    accuracy = {
        "base": [0.0, 0.1, 0.25, 0.3, 0.4],
        "sft": [0.0, 0.5, 0.6, 0.7, 0.9],
        "dpo": [0.0, 0.0, 0.2, 0.3, 0.8],
    }
    for h in range(0, 5, every):
        for k, stage in enumerate(stages):
            table.add("hidden", h, "accuracy", stage, around(accuracy[stage][h], 7 + k))
            table.add("hidden", h, "accuracy", stage + " (normed twice)", around(0.01 * (h + k)))
    for k, (later, earlier) in enumerate(PAIRS):
        if later in stages and earlier in stages:
            for h in range(0, 5, every):
                stage = f"{later}-{earlier}"
                table.add(
                    "hidden",
                    h,
                    "accuracy",
                    "difference",
                    around(accuracy[later][h] - accuracy[earlier][h]),
                    stage=stage,
                )
                table.add("hidden", h, "kl", "pair", around(kl * (2 + k - abs(h - 2)) if kl else 0.0), stage=stage)
                table.add("hidden", h, "top1_agreement", "pair", around(0.9 - 0.1 * h - 0.01 * k), stage=stage)
    return LensResult(table, list(stages), 5, LensSettings(every=every, paper_code=paper_code), origin=PAIR)


def swapped(changes: dict[str, float], half: float = 0.05) -> SwapResult:
    table = Table()
    for sign, recipient, donor in ((1, "base", "sft"), (-1, "sft", "base")):
        for mask, value in changes.items():
            for head, shift in ((recipient, 0.0), (donor, 5.0)):  # the other head must not be taken
                extra = {"recipient": recipient, "donor": donor, "head": head, "stage": f"{donor}-{recipient}"}
                change = sign * value + shift
                table.add(
                    "segment", mask, "loss", "difference", Estimate(change, change - half, change + half, 9), **extra
                )
    return SwapResult(table, ["base", "sft"], SwapSettings(segments=len(changes)), origin=PAIR)


def merged(high: float = 0.1, low: float = -0.1, **counts: Any) -> MergeResult:
    table = Table()
    for label, loss in (("0,1", 2.5), ("0.5,0.5", 2.1), ("1,0", 2.9)):
        common = {"stage": "sft-base", "alpha_rest": 0.5}
        table.add("segment", label, "loss", "merged", around(loss), **common, against=None)
        for end, own in (("base", 3.0), ("sft", 2.0)):
            d = loss - own
            table.add(
                "segment", label, "loss", "difference", Estimate(d, d + low, d + high, 8), **common, against=end
            )
    return MergeResult(table, ["base", "sft"], MergeSettings(), counts, origin=PAIR)


def steered(best: float = -0.4, *, together: bool = False, tokens: bool = False) -> SteerResult:
    table = Table()
    extra = {"direction": "mean", "stage": "sft-base"}
    table.add("model", "", "loss", "base", around(3.0), **extra, alpha=0.0)
    table.add("model", "", "loss", "sft", around(1.25), **extra)
    table.add("model", "", "loss", "difference", around(-1.75), **extra)
    for (block, alpha), value in ({(1, 0.5): 0.2, (1, 1.0): best, (3, 0.5): 0.3, (3, 1.0): 0.6}).items():
        kind, layer = ("segment", f"{block}:{block + 2}") if together else ("block", block)
        table.add(kind, layer, "loss", "difference", around(value), **extra, alpha=alpha)
    frame = (
        pd.DataFrame(
            {
                "stage": "sft-base",
                "block": [1, 1, 3, 3],
                "rank": [1, 2, 1, 2],
                "token": [" a", "b", "c", "d"],
                "id": [5, 6, 7, 8],
                "probability": [0.25, 0.125, 0.5, 0.0625],
            }
        )
        if tokens
        else pd.DataFrame()
    )
    return SteerResult(table, ["base", "sft"], SteerSettings(), "mean", tokens=frame, origin=PAIR)


def weighed(
    changes: dict[int, float], *, tied: bool = False, outside: bool = False, ranks: bool = False, qkvo: bool = True
) -> WeightsResult:
    table = Table()
    for b in range(6):
        for metric, scale in (("weight_change", 1.0), ("weight_change_relative", 0.125)):
            for matrix, factor in (("qkvo", 1.0), ("all", 3.0)):
                if qkvo or matrix == "all":
                    table.add(
                        "block",
                        b,
                        metric,
                        "difference",
                        factor * scale * changes.get(b, 0.0),
                        n=4,
                        stage="sft-base",
                        matrix=matrix,
                        tensor=None,
                    )
        if ranks:
            for matrix, rank in (("q", 2.0 + b), ("up", 11.0)):
                table.add(
                    "block",
                    b,
                    "weight_change_effective_rank",
                    "difference",
                    rank,
                    n=4,
                    stage="sft-base",
                    matrix=matrix,
                    tensor=f"{b}.{matrix}",
                )
    for name in ("embeddings", "head"):
        table.add(
            "model",
            name,
            "weight_change",
            "difference",
            0.5 if outside else 0.0,
            n=4,
            stage="sft-base",
            matrix=name,
            tensor=name,
        )
    return WeightsResult(
        table,
        ["base", "sft"],
        6,
        {"tied": tied, "notes": ["A note."] if tied else []},
        origin=Origin(("m/base", "m/tuned")),
    )


def graded(*stages: str, steps: bool = False) -> GradientsResult:
    table = Table()
    for k, stage in enumerate(stages):
        for b in range(6):
            for j, metric in enumerate(
                ("gradient_norm", "gradient_norm_relative", *(["weight_change"] if steps else []))
            ):
                value = [0.1, 0.4, 0.3, 0.9, 0.2, 0.5][(b + k + j) % 6] * 10**j
                table.add("block", b, metric, stage, around(value, 3), matrix="all")
                table.add("block", b, metric, stage, around(99.0, 3), matrix="q")
    return GradientsResult(table, list(stages), 6, GradientSettings(), origin=PAIR)


def correlated(*methods: str, undefined: bool = False) -> CorrelationResult:
    rows = [
        ("cka", "cka_debiased", 0.99, 0.97, 1.0, 0.0001),
        ("cka", "weight_change", -0.7, -0.9, -0.4, 0.02),
        ("cosine", "weight_change", 0.6, 0.2, 0.8, 0.06),
        ("prompt_entropy", "kl", 0.3, math.nan, math.nan, 0.5),
    ]
    rows += [("effective_rank", "kl", math.nan, math.nan, math.nan, math.nan)] if undefined else []
    pairs = pd.DataFrame(
        [
            {
                "a": a,
                "b": b,
                "method": m,
                "r": r - 0.01 * k,
                "low": lo,
                "high": hi,
                "n": 30,
                "p": p / 2,
                "p_holm": p,
                "reason": "",
                "points": "of 30 blocks",
            }
            for k, m in enumerate(methods)
            for a, b, r, lo, hi, p in rows
        ]
    )
    families = {
        "cka": "alignment",
        "cka_debiased": "alignment",
        "weight_change": "weights",
        "cosine": "alignment",
        "prompt_entropy": "information",
        "kl": "lens",
        "effective_rank": "information",
    }
    return CorrelationResult(
        Table(), pairs, pd.DataFrame(), 30, {"folders": ["runs/a", "runs/b"], "notes": ["A note."]}, families
    )


CASES: dict[str, Callable[[], Any]] = {
    "profiled": profiled,
    "profiled(same=True)": lambda: profiled(same=True),
    "stable(0.2)": lambda: stable(0.2),
    "stable(0.5, same=True)": lambda: stable(0.5, same=True),
    "lensed(base)": lambda: lensed("base"),
    "lensed(base,sft)": lambda: lensed("base", "sft"),
    "lensed(base,sft,kl=0)": lambda: lensed("base", "sft", kl=0.0),
    "lensed(base,sft,dpo,every=2,paper_code=True)": lambda: lensed("base", "sft", "dpo", every=2, paper_code=True),
    "swapped one": lambda: swapped({"100": 0.3, "010": -0.5, "001": -0.02}),
    "swapped two": lambda: swapped({"100": 0.3, "010": -0.5, "001": -0.2}),
    "swapped all alike": lambda: swapped({"100": -0.3, "010": -0.32, "001": -0.31}),
    "swapped none": lambda: swapped({"100": 0.3, "010": -0.04, "001": 0.1}),
    "swapped same": lambda: swapped({"100": 0.0, "010": 0.0}, 0.0),
    "merged": merged,
    "merged(0.05,-0.2)": lambda: merged(0.05, -0.2),
    "merged(-0.15,-0.2)": lambda: merged(-0.15, -0.2),
    "merged(0.2,-0.05)": lambda: merged(0.2, -0.05),
    "merged(written)": lambda: merged(written=["out/a"]),
    "steered": steered,
    "steered(-0.01)": lambda: steered(-0.01),
    "steered(together)": lambda: steered(together=True),
    "steered(tokens)": lambda: steered(tokens=True),
    "weighed all": lambda: weighed({0: 1.0, 1: 2.0, 2: 4.0, 3: 3.0, 4: 5.0, 5: 1.5}, tied=True, ranks=True),
    "weighed some": lambda: weighed({1: 2.0, 3: 3.0, 4: 1.0}, outside=True),
    "weighed none": lambda: weighed({}),
    "weighed outside": lambda: weighed({}, outside=True),
    "weighed noqkvo": lambda: weighed({2: 1.0}, qkvo=False),
    "graded base": lambda: graded("base"),
    "graded two": lambda: graded("base", "sft", steps=True),
    "corr both": lambda: correlated("pearson", "spearman", undefined=True),
    "corr pearson": lambda: correlated("pearson"),
}


def written() -> dict[str, str]:
    text = Path(__file__).with_name("readings.txt").read_text(encoding="utf-8")
    return {part.partition("\n")[0]: part.partition("\n")[2].strip("\n") for part in text.split("\n## ")[1:]}


def test_every_case_is_written() -> None:
    assert list(written()) == list(CASES)


@pytest.mark.parametrize("case", CASES)
def test_a_reading_to_the_letter(case: str) -> None:
    assert CASES[case]().summary() == written()[case]
