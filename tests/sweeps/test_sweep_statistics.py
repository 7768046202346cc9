"""Statistics and verdict on scores whose truth is known."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest

from midblock.errors import DataError
from midblock.sweeps import ArmInfo, RunRecord, SweepResult, TaskScores, analyse, parse_config
from midblock.sweeps.statistics import (
    _unbeaten,
    arm_interval,
    choose_rates,
    default_pairs,
    detectable_after,
    region_of,
)
from sweep_helpers import tiny_values

ITEMS, SEEDS = 150, 3
ARMS = ["11111", "10000", "01000", "00100", "00010", "00001"]


def infos(names=ARMS, **changes) -> dict[str, ArmInfo]:
    depths = {"11111": 0.5, "10000": 0.1, "01000": 0.3, "00100": 0.5, "00010": 0.7, "00001": 0.9}
    found = {}
    for name in names:
        mask = name.removeprefix("full-")
        found[name] = ArmInfo(name, "full" if name.startswith("full") else "lora", mask, depths[mask], 1000,
                              is_baseline=name == "11111")
    return found | changes


@pytest.fixture
def config(tmp_path):
    values = tiny_values(tmp_path)
    values["evaluation"] = [{"task": "arithmetic"}]
    values["seeds"] = list(range(SEEDS))
    values["statistics"] = {"replicates": 500}
    return parse_config(values)


def scored(task: str, metric: str, scores: np.ndarray, tokens: float | None = None) -> TaskScores:
    return TaskScores(task, metric, metric == "accuracy", [f"i{k}" for k in range(len(scores))],
                      [float(s) for s in scores], None if tokens is None else [tokens] * len(scores),
                      float(np.mean(scores)), 0.0)


def records(rates: dict[str, float], *, seed: int = 0, forget: dict[str, float] | None = None,
            items: int = ITEMS) -> list[RunRecord]:
    """Right/wrong answers drawn with these rates over items of unequal difficulty, and retention losses."""
    rng = np.random.default_rng(seed)
    ease = rng.normal(0, 1, items)
    texts = rng.normal(3.0, 0.3, 40)
    found = []

    def tasks(rate: float, rise: float) -> dict[str, TaskScores]:
        logit = math.log(rate / (1 - rate)) if rate > 0 else -np.inf
        right = rng.random(items) < 1 / (1 + np.exp(-(1.2 * logit + ease)))
        noise = rng.normal(0, 0.01, texts.size)
        return {"arithmetic": scored("arithmetic", "accuracy", right.astype(float)),
                "texts": scored("texts", "perplexity", texts + rise + noise * (rise != 0), tokens=20.0)}

    found.append(RunRecord("base", None, None, "done", tasks=tasks(rates.get("base", 0.02), 0.0)))
    for arm, rate in rates.items():
        if arm == "base":
            continue
        for k in range(SEEDS):
            found.append(RunRecord(arm, 0.01, k, "done", training={"seconds": 1.0, "tokens_per_second": 5.0},
                                   tasks=tasks(rate, (forget or {}).get(arm, 1e-6))))
    return found


PLANTED = {"11111": 0.5, "10000": 0.3, "01000": 0.6, "00100": 0.8, "00010": 0.6, "00001": 0.2}


def test_a_planted_effect_is_found_and_said(config):
    result = SweepResult(config, infos(), records(PLANTED, forget={a: 0.02 if a == "11111" else 0.002 for a in ARMS}))
    rows = result.statistics.family("evaluation").set_index(["a", "b"])
    assert rows.loc[("00100", "00001"), "p_holm"] < 0.001
    assert rows.loc[("00100", "00001"), "low"] < PLANTED["00100"] - PLANTED["00001"]
    assert rows.loc[("00100", "11111"), "better"] == 1
    text = result.summary()
    assert "middle (00100) beats late (00001) by " in text
    assert "middle (00100) beats all-layer (11111) by " in text
    assert "Holm p < 0.001" in text
    assert "Inverted U over the 5 segments (LoRA): supported" in text
    assert "a middle segment beats the last one: supported" in text
    assert "Against the untuned model 6 of 6 arms are better" in text
    assert re.search(r"all-layer \(11111\): \+(1\.[89]|2\.[0-2])% of the perplexity", text)
    assert "middle (00100) keeps more than all-layer (11111)" in text
    best = result.statistics.ranking.iloc[0]
    assert best["arm"] == "00100"
    assert best["best"] > 0.9


def test_without_a_difference_nothing_is_claimed(config):
    result = SweepResult(config, infos(), records(dict.fromkeys(ARMS, 0.5), seed=1))
    text = result.summary()
    assert "No difference between arms is supported by the data." in text
    assert " beats all-layer (11111) by " not in text
    assert text.count("not distinguishable at this n (difference") == len(result.statistics.family("evaluation"))
    assert "NOT supported" in text
    assert "Inverted U over the 5 segments (LoRA): NOT supported" in text
    assert "does not mean equal" in text
    assert "do not single out a best arm" in text


def test_unequal_arms_are_called_unequal(config):
    full = infos(["full-00100"])["full-00100"]
    arms = infos(["11111", "00100"]) | {"full-00100": ArmInfo(full.name, full.method, full.mask, full.depth, 5000)}
    text = SweepResult(config, arms, records({"11111": 0.5, "00100": 0.5, "full-00100": 0.5})).summary()
    assert "Not at equal parameters (the baseline has 1,000): full-00100 5,000" in text
    assert "learning rates of their own" in text
    equal = SweepResult(config, infos(["11111", "00100"]), records({"11111": 0.5, "00100": 0.5})).summary()
    assert "Not at equal parameters" not in equal
    assert "learning rates of their own" not in equal


def test_a_worse_middle_contradicts_the_claim(config):
    rates = {**PLANTED, "11111": 0.9, "00100": 0.2, "01000": 0.2, "00010": 0.2, "10000": 0.6, "00001": 0.6}
    text = SweepResult(config, infos(), records(rates)).summary()
    assert "beats tuning all layers at equal parameters: contradicted (worse: 01000, 00100, 00010)" in text
    assert "late (00001) beats middle (00100)" in text


def test_false_alarms_stay_at_the_nominal_rate(config):
    """Over sweeps of equal arms at most about one in twenty may claim any difference (family-wise)."""
    alarms = 0
    for seed in range(30):
        stats = analyse(records(dict.fromkeys(ARMS, 0.5), seed=seed + 10, items=60), infos(), config)
        alarms += bool((stats.family("evaluation")["p_holm"] < 0.05).any())
    assert alarms <= 5  # binomial(30, 0.05) exceeds it with a chance below 1%


def test_intervals_cover():
    """The hierarchical interval holds the true mean about 95 times in a hundred."""
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(150):
        items, seeds = rng.normal(0, 1, 80), rng.normal(0, 0.1, 5)
        scores = 2.0 + items[None] + seeds[:, None] + rng.normal(0, 0.5, (5, 80))
        i = arm_interval(scores, binary=False, confidence=0.95, replicates=400)
        covered += i.low <= 2.0 <= i.high
    assert 0.88 <= covered / 150 <= 1.0


def test_an_arm_that_never_answers_right_has_an_interval():
    interval = arm_interval(np.zeros((2, 20)), binary=True, confidence=0.95, replicates=200)
    assert interval.value == 0.0
    assert interval.high == pytest.approx(0.161, abs=0.001)  # Wilson at 0 of 20


def test_failed_runs_are_told_and_left_out(config):
    found = records(PLANTED)
    for record in found:
        if record.arm == "00001" or (record.arm == "00100" and record.seed == 1):
            record.status, record.reason, record.tasks = "failed", "OutOfMemoryError: no room", {}
    result = SweepResult(config, infos(), found)
    text = result.summary()
    assert "4 of 19 runs failed" in text
    assert "00001__lr0.01__seed0: OutOfMemoryError: no room" in text
    scores = result.statistics.scores.set_index(["task", "arm"])
    assert math.isnan(scores.loc[("arithmetic", "00001"), "value"])
    assert scores.loc[("arithmetic", "00100"), "n_seeds"] == 2
    frame = result.frame
    assert frame[(frame["arm"] == "00001") & (frame["side"] == "sft")]["value"].isna().all()
    assert any("no room" in r["reason"] for r in result.table.reasons)
    # the pair has no score, so there is no test of it
    rows = result.statistics.family("evaluation")
    assert not ((rows["a"] == "00001") | (rows["b"] == "00001")).any()
    assert any("00001" in u for u in result.statistics.undefined)


def test_other_items_are_refused(config):
    found = records(PLANTED)
    found[3].tasks["arithmetic"].items[0] = "another"
    with pytest.raises(DataError, match="different items"):
        analyse(found, infos(), config)


def test_perplexity_weighs_tokens_not_texts(config):
    found = records({"11111": 0.5})
    for record in found:
        record.tasks["texts"].scores = [1.0, 3.0]
        record.tasks["texts"].items = ["x", "y"]
        record.tasks["texts"].tokens = [30.0, 10.0]
    stats = analyse(found, infos(["11111"]), config)
    value = stats.scores.set_index(["task", "arm"]).loc[("texts", "11111"), "value"]
    assert value == pytest.approx(math.exp((30 * 1 + 10 * 3) / 40))


def test_learning_rates_are_chosen_by_validation_not_by_the_test_items():
    found = []
    for rate, loss, right in ((0.1, 1.0, 0.2), (0.01, 2.0, 0.9)):
        for seed in (0, 1):
            found.append(RunRecord("11111", rate, seed, "done", validation_loss=loss,
                                   tasks={"arithmetic": scored("arithmetic", "accuracy", np.full(4, right))}))
    assert choose_rates(found, ["11111"]) == {"11111": 0.1}
    found[0].status = "failed"
    assert choose_rates(found, ["11111"]) == {"11111": 0.01}


def test_default_pairs_and_regions():
    extra = {"random2-0": ArmInfo("random2-0", "lora", None, 0.4, 10, is_random=True)}
    pairs = default_pairs(infos([*ARMS, "full-10000", "full-00100"]) | extra)
    assert ("00100", "11111") in pairs
    assert ("00100", "00001") in pairs
    assert ("00100", "10000") in pairs
    assert ("00100", "random2-0") in pairs
    assert ("full-00100", "11111") in pairs
    assert len(pairs) == len(set(pairs))
    assert region_of(infos(["00100"])["00100"]) == "middle"
    assert region_of(infos(["11111"])["11111"]) is None


def test_configured_comparisons_replace_the_default_ones(tmp_path, config):
    changed = config.model_copy(update={"statistics": config.statistics.model_copy(
        update={"comparisons": [["01000", "00010"]]})})
    rows = analyse(records(PLANTED), infos(), changed).family("evaluation")
    assert list(zip(rows["a"], rows["b"], strict=True)) == [("01000", "00010")]


def test_holm_counts_every_comparison_of_the_family(config):
    from statsmodels.stats.multitest import multipletests

    rows = analyse(records(PLANTED), infos(), config).family("evaluation")
    expected = multipletests(rows["p"], method="holm")[1]
    assert np.allclose(rows["p_holm"], expected)


def test_pareto_front():
    values = np.array([[1.0, 1.0], [2.0, 0.0], [0.5, 0.5], [np.nan, 5.0], [2.0, 0.0]])
    assert _unbeaten(values).tolist() == [True, True, False, False, True]


def test_detectable_difference_shrinks_with_items(config):
    def smallest(items: int) -> float:
        stats = analyse(records(dict.fromkeys(ARMS, 0.5), items=items), infos(), config)
        return detectable_after(stats.comparisons, family="evaluation", task="arithmetic", confidence=0.95,
                                alpha=0.05, power=0.8)

    assert smallest(400) < 0.75 * smallest(50)
