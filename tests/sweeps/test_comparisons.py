"""Comparisons between arms: which pairs, families of Holm's correction, and what each allows to be said."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest

from midblock.settings.sweep import StatisticsConfig
from midblock.stats import compare_arms
from midblock.sweeps import ArmInfo, analyse
from midblock.sweeps.comparisons import COLUMNS, all_comparisons, conclude, default_pairs, detectable_after
from midblock.sweeps.scores import TaskMatrix
from sweep_helpers import ARMS, PLANTED, infos, planted, planted_config


@pytest.fixture
def config(tmp_path):
    return planted_config(tmp_path)


def test_default_pairs():
    extra = {"random2-0": ArmInfo("random2-0", "lora", None, (3, 5), 10, 10, is_random=True),
             "full-random2-0": ArmInfo("full-random2-0", "full", None, (3, 5), 10, 10, is_random=True)}
    arms = infos([*ARMS, "full-10000", "full-00100", "1000", "0100", "0010", "0001", "10", "01"]) | extra
    pairs = default_pairs(arms)
    against = [(n, "11111") for n in arms if n != "11111"]
    assert pairs == [
        *against, ("00100", "10000"), ("00100", "00001"), ("00100", "random2-0"),
        ("full-00100", "full-10000"), ("full-00100", "full-random2-0"),
        ("0100", "1000"), ("0100", "0001"), ("0100", "random2-0"),
        ("0010", "1000"), ("0010", "0001"), ("0010", "random2-0")]
    assert default_pairs(infos(["10000", "01100"])) == []


def test_configured_comparisons_replace_the_default_ones(config):
    changed = config.model_copy(update={"statistics": config.statistics.model_copy(
        update={"comparisons": [["01000", "00010"]]})})
    rows = analyse(planted(PLANTED), infos(), changed).family("evaluation")
    assert list(zip(rows["a"], rows["b"], strict=True)) == [("01000", "00010")]


def test_holm_counts_every_comparison_of_the_family(config):
    from statsmodels.stats.multitest import multipletests

    stats = analyse(planted(PLANTED), infos(), config)
    assert list(stats.comparisons.columns) == list(COLUMNS)
    for family, pairs in (("evaluation", 7), ("gain", 6), ("retention", 11)):
        rows = stats.family(family)
        assert len(rows) == pairs
        assert np.allclose(rows["p_holm"], multipletests(rows["p"], method="holm")[1])


def row(**changes) -> pd.Series:
    return pd.Series({"missing": "", "p_holm": 0.5, "better": 1.0, "worst": math.nan, "best": math.nan,
                      "margin": 0.02} | changes)


@pytest.mark.parametrize(("changes", "said"), [
    ({"p_holm": 0.049}, "better"),
    ({"p_holm": 0.049, "better": -1.0}, "worse"),
    ({"p_holm": 0.05}, "open"),
    ({"p_holm": math.nan}, "open"),
    ({"p_holm": 0.01, "better": 0.0}, "open"),
    ({"worst": 0.02, "best": 0.02}, "as good"),
    ({"worst": 0.02, "best": 0.021}, "no worse"),
    ({"worst": 0.021, "best": 0.01}, "open"),
    ({"worst": 0.01, "best": math.nan}, "no worse"),
    ({"worst": 0.01, "best": 0.01, "p_holm": 0.01}, "better"),
    ({"worst": 0.01, "best": 0.01, "p_holm": 0.01, "missing": "seeds"}, "too small"),
])
def test_conclusions(changes, said):
    assert conclude(row(**changes), 0.05) == said


def losses(rng: np.random.Generator, rise: float, items: int = 400) -> TaskMatrix:
    level = rng.normal(2, 0.5, items)
    noise = rng.normal(0, 0.02, (2, 3, items))
    scores = {"11111": level + noise[0], "00100": level + rise + noise[1]}
    return TaskMatrix("answers", "evaluation", "loss", False, tuple(map(str, range(items))), scores)


@pytest.mark.parametrize(("rise", "said"), [(0.0, "as good"), (0.1, "worse"), (-0.1, "better")])
def test_planted_differences_of_losses(rise, said):
    """A loss 0.1 nats above the other's is worse; equal losses with little noise are as good within 0.02."""
    matrix = losses(np.random.default_rng(1), rise)
    frame = all_comparisons({"answers": matrix}, infos(["11111", "00100"]), StatisticsConfig(replicates=200), {}, [])
    only = frame.iloc[0]
    assert (only["a"], only["b"], only["conclusion"]) == ("00100", "11111", said)
    assert only["difference"] == pytest.approx(rise, abs=0.01)
    assert -only["best"] < only["difference"] < only["worst"]
    assert math.isclose(only["margin"], 0.02)


def test_worst_and_best_are_the_bounds_of_all_comparisons_of_the_family_together(config):
    stats = analyse(planted(PLANTED), infos(), config)
    rows = stats.family("evaluation")
    matrix = stats.matrices["arithmetic"]
    direct = compare_arms(matrix.trained, pairs=list(zip(rows["a"], rows["b"], strict=True)), binary=True,
                          confidence=1 - 2 * 0.05 / 7, replicates=500)
    assert np.allclose(rows["worst"], -direct["low"])
    assert np.allclose(rows["best"], direct["high"])
    turned = analyse(planted(PLANTED), infos(), config).family("retention")
    assert (turned["worst"] + turned["best"] > 0).all()
    assert (turned["worst"] >= turned["difference"]).all()  # a higher perplexity is worse


def test_what_is_missing_holds_back_only_the_arms_concerned(config):
    stats = analyse(planted(PLANTED), infos(), config)
    frame = all_comparisons(stats.matrices, infos(), config.statistics,
                            {("arithmetic", "00001"): "seeds", ("texts", "11111"): "items"}, [])
    small = frame[frame["conclusion"] == "too small"]
    assert set(small[small["task"] == "arithmetic"]["missing"]) == {"seeds"}
    for _, r in small.iterrows():
        assert "00001" in (r["a"], r["b"]) or (r["task"] == "texts" and "11111" in (r["a"], r["b"]))
    assert (frame[(frame["a"] == "00100") & (frame["b"] == "10000")]["conclusion"] == "better").all()


def test_false_alarms_stay_at_the_nominal_rate(config):
    """Over sweeps of equal arms at most about one in twenty may claim any difference (family-wise)."""
    alarms = 0
    for seed in range(30):
        stats = analyse(planted(dict.fromkeys(ARMS, 0.5), seed=seed + 10, items=60), infos(), config)
        alarms += bool(stats.family("evaluation")["conclusion"].isin(["better", "worse"]).any())
    assert alarms <= 5  # binomial(30, 0.05) exceeds it with a chance below 1%


def test_detectable_difference_is_that_of_the_errors(config):
    frame = pd.DataFrame({"family": ["evaluation"] * 3 + ["gain"], "task": ["t", "t", "u", "t"], "p": [0.1] * 4,
                          "low": [-0.1, -0.2, -9, -9], "high": [0.1, 0.2, 9, 9]})
    found = detectable_after(frame, family="evaluation", task="t", confidence=0.95, alpha=0.05, power=0.8)
    # errors 0.1 / 1.96 and 0.2 / 1.96, median 0.15 / 1.96; Holm over 3: z = 2.394; power: 0.8416
    assert found == pytest.approx(0.15 / 1.959964 * (2.393980 + 0.841621), rel=1e-5)
    assert math.isnan(detectable_after(frame, family="evaluation", task="v", confidence=0.95, alpha=0.05, power=0.8))

    def smallest(items: int) -> float:
        stats = analyse(planted(dict.fromkeys(ARMS, 0.5), items=items), infos(), config)
        return detectable_after(stats.comparisons, family="evaluation", task="arithmetic", confidence=0.95,
                                alpha=0.05, power=0.8)

    assert smallest(400) < 0.75 * smallest(50)


def test_pairs_without_a_seed_in_common_are_told(config):
    found = planted(PLANTED)
    for record in found:
        if (record.arm, record.seed) in (("00100", 0), ("11111", 1), ("11111", 2)):
            record.status, record.tasks = "failed", {}
    stats = analyse(found, infos(), config)
    assert any(u == "arithmetic: no seed in which both have scores: 00100 against 11111" for u in stats.undefined)
