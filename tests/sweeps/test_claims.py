"""The paper's claims are read from the conclusions of the right comparisons, in the right direction."""

from __future__ import annotations

import pandas as pd
import pytest

from midblock.sweeps import ArmInfo, SweepResult
from midblock.sweeps.claims import CLAIMS, claims
from midblock.sweeps.statistics import SweepStatistics
from sweep_helpers import ARMS, PLANTED, infos, planted, planted_config

COLUMNS = ["family", "task", "a", "b", "conclusion"]


def stats_of(rows, curves=(), missing=None, matrices=("t",)) -> SweepStatistics:
    empty = pd.DataFrame()

    class Matrix:
        trained = dict.fromkeys(ARMS)

    return SweepStatistics(empty, pd.DataFrame(rows, columns=COLUMNS), empty,
                           pd.DataFrame(list(curves), columns=["task", "method", "segments", "p_holm", "peak", "best"]),
                           empty, dict.fromkeys(matrices, Matrix), {}, missing or {})


def said(rows, claim, **more):
    found = claims(stats_of(rows, **more), infos([*ARMS, "full-00100"]) | RANDOM, 0.05)
    own = found[found["claim"] == claim]
    return None if own.empty else tuple(own.iloc[0][["verdict", "for", "against", "undecided"]])


RANDOM = {"random2-0": ArmInfo("random2-0", "lora", None, (4, 5), 10, 10, is_random=True)}
ALL = "the middle beats all layers"


@pytest.mark.parametrize(("conclusions", "expected"), [
    (["better", "better"], ("supported", "01000, 00100", "", "")),
    (["better", "open"], ("supported in part", "01000", "", "00100")),
    (["better", "worse"], ("mixed", "01000", "00100", "")),
    (["worse", "worse"], ("contradicted", "", "01000, 00100", "")),
    (["worse", "open"], ("not shown", "", "01000", "00100")),
    (["as good", "no worse"], ("not shown", "", "", "01000, 00100")),
    (["open", "open"], ("not shown", "", "", "01000, 00100")),
    (["too small", "too small"], ("too small to judge", "", "", "01000, 00100")),
    (["better", "too small"], ("supported in part", "01000", "", "00100")),
])
def test_verdicts(conclusions, expected):
    rows = [("evaluation", "t", arm, "11111", c) for arm, c in zip(("01000", "00100"), conclusions, strict=True)]
    assert said(rows, ALL) == expected


def test_no_worse_is_a_claim_of_its_own():
    rows = [("evaluation", "t", a, "11111", c) for a, c in
            (("01000", "better"), ("00100", "as good"), ("00010", "no worse"))]
    assert said(rows, "the middle is no worse than all layers") == ("supported", "01000, 00100, 00010", "", "")
    rows.append(("evaluation", "t", "00100", "11111", "open"))
    assert said(rows, "the middle is no worse than all layers")[0] == "supported in part"


def test_a_comparison_the_other_way_round_is_turned():
    claim = "the middle beats the last segment"
    assert said([("evaluation", "t", "00001", "00100", "worse")], claim) == ("supported", "00100 against 00001", "", "")
    assert said([("evaluation", "t", "00001", "00100", "better")], claim)[0] == "contradicted"
    assert said([("evaluation", "t", "00001", "00100", "no worse")], claim)[0] == "not shown"
    assert said([("evaluation", "t", "00001", "00100", "too small")], claim)[0] == "too small to judge"
    assert said([("evaluation", "t", "11111", "00100", "as good")],
                "the middle is no worse than all layers")[0] == "supported"


def test_every_claim_looks_at_its_own_arms_and_family():
    rows = [("evaluation", "t", "00100", "10000", "better"), ("evaluation", "t", "00100", "00001", "worse"),
            ("evaluation", "t", "00100", "random2-0", "better"), ("evaluation", "t", "full-00100", "11111", "better"),
            ("evaluation", "t", "10000", "11111", "better"), ("gain", "t", "00100", "base", "better"),
            ("retention", "t", "00100", "11111", "better"), ("retention", "t", "00100", "base", "worse")]
    assert said(rows, "the middle beats the first segment") == ("supported", "00100 against 10000", "", "")
    assert said(rows, "the middle beats the last segment") == ("contradicted", "", "00100 against 00001", "")
    assert said(rows, "the middle beats random blocks") == ("supported", "00100 against random2-0", "", "")
    assert said(rows, "the middle forgets less than all layers") == ("supported", "00100", "", "")
    assert said(rows, "the middle forgets no more than all layers") == ("supported", "00100", "", "")
    # full-rank arms and the first segment are not "the middle at equal parameters"
    assert said(rows, ALL) is None
    found = claims(stats_of(rows), infos([*ARMS, "full-00100"]) | RANDOM, 0.05)
    assert list(found["claim"]) == [c.text for c in CLAIMS if c.text not in (ALL, CLAIMS[1].text)]
    assert set(found["task"]) == {"t"}
    assert list(found["family"]) == ["evaluation"] * 3 + ["retention"] * 2
    assert claims(stats_of([]), infos(), 0.05).empty


def test_the_inverted_u_is_a_claim():
    curves = [("t", "lora", 5, 0.04, 0.457, "01000"), ("t", "full", 3, 0.06, 0.5, "full-010"),
              ("u", "dora", 5, 0.01, 0.3, "x")]
    found = claims(stats_of([], curves), infos(), 0.05)
    assert found.to_numpy().tolist() == [
        ["t", "LoRA arms rise and then fall over 5 segments", "inverted U", "supported", "peak near depth 0.46", "",
         ""],
        ["t", "full-rank arms rise and then fall over 3 segments", "inverted U", "not shown", "", "",
         "best: full-010"]]
    small = claims(stats_of([], curves, missing={("t", "00100"): "seeds"}), infos(), 0.05)
    assert list(small["verdict"]) == ["too small to judge", "not shown"]  # of the curve that the arm is on
    # what the baseline, both ends or random blocks lack says nothing of the shape, nor does another task
    for lacks in (("u", "00100"), ("t", "11111"), ("t", "random2-0")):
        other = claims(stats_of([], curves, missing={lacks: "training"}), infos() | RANDOM, 0.05)
        assert list(other["verdict"]) == ["supported", "not shown"]
    assert claims(stats_of([], curves, matrices=("u",)), infos(), 0.05)["claim"].item().startswith("DoRA arms")


def test_planted_effects_are_found_and_said(tmp_path):
    config = planted_config(tmp_path)
    found = SweepResult(config, infos(), planted(PLANTED)).claims.set_index("claim")
    assert found.loc["the middle beats the last segment", "verdict"] == "supported"
    assert found.loc["the middle beats the first segment", "verdict"] == "supported"
    assert found.loc["LoRA arms rise and then fall over 5 segments", "verdict"] == "supported"
    worse = {**PLANTED, "11111": 0.9, "00100": 0.2, "01000": 0.2, "00010": 0.2}
    found = SweepResult(config, infos(), planted(worse)).claims.set_index("claim")
    assert found.loc[ALL, "verdict"] == "contradicted"
    assert found.loc[ALL, "against"] == "01000, 00100, 00010"
