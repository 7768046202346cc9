"""Scores as arrays: weighting, chosen learning rates, intervals, regions of the depth."""

from __future__ import annotations

import math

import numpy as np
import pytest

from midblock.errors import DataError
from midblock.stats import arm_intervals, mean_interval, share_of_gain
from midblock.sweeps import ArmInfo, RunRecord, analyse
from midblock.sweeps.scores import TaskMatrix, arm_estimates, choose_rates, score_rows, task_matrices
from sweep_helpers import ARMS, PLANTED, infos, planted, planted_config, scored


@pytest.fixture
def config(tmp_path):
    return planted_config(tmp_path)


def arm(blocks, num_blocks, **more) -> ArmInfo:
    return ArmInfo("x", "lora", None, tuple(blocks), num_blocks, 1, **more)


def test_regions_follow_the_zones_of_the_mean_depth():
    found = infos([*ARMS, "11000", "00011", "01100", "01110", "10001", "11100"])
    assert {n: a.region for n, a in found.items()} == {
        "11111": None, "10000": "early", "01000": "middle", "00100": "middle", "00010": "middle", "00001": "late",
        "11000": "early", "00011": "late", "01100": "middle", "01110": "middle", "10001": None, "11100": None}
    # the paper's best arm of a model of 32 blocks begins a little above the border of the zones
    assert arm(range(6, 12), 32).region == "middle"
    assert arm(range(1, 31), 32).region == "middle"
    assert arm(range(31), 32).region is None
    assert arm(range(1, 32), 32).region is None
    assert arm([4, 5], 10, is_random=True).region is None
    assert arm([0, 9], 10).depth == 0.5


def test_segments_are_single_ones_of_two_or_more():
    found = infos(["10000", "01100"])
    assert found["10000"].segment == ("lora", 5, 0)
    assert found["01100"].segment is None
    assert ArmInfo("1", "lora", "1", (0,), 10, 1).segment is None
    assert ArmInfo("r", "lora", None, (0,), 10, 1).segment is None


def matrix_of(scores, *, binary):
    items = tuple(str(i) for i in range(next(iter(scores.values())).shape[1]))
    return TaskMatrix("t", "evaluation", "accuracy" if binary else "loss", binary, items, dict(scores))


def test_arms_have_the_intervals_of_new_seeds_and_items():
    rng = np.random.default_rng(0)
    scores = {arm: rng.normal(0, 1, (3, 80)) for arm in ("10000", "01000", "00100")}
    scores["base"] = np.tile(rng.normal(0, 1, 80), (3, 1))
    found = arm_estimates(matrix_of(scores, binary=False), 0.95)
    trained = arm_intervals({a: scores[a] for a in ("10000", "01000", "00100")})
    assert {a: found[a] for a in trained} == trained
    once = mean_interval(scores["base"][0])  # three copies of one row are one row
    assert (found["base"].low, found["base"].high) == pytest.approx((once.low, once.high))


def test_an_arm_that_never_answers_right_has_an_interval():
    found = arm_estimates(matrix_of({"10000": np.zeros((2, 20)), "01000": np.full((2, 20), np.nan)}, binary=True), 0.95)
    assert found["10000"].value == 0.0
    assert found["10000"].high == pytest.approx(0.161, abs=0.001)  # Wilson at 0 of 20
    assert math.isnan(found["01000"].value)


def test_an_arm_is_told_its_share_of_the_full_gain():
    rng = np.random.default_rng(1)
    start = np.tile(rng.normal(0, 1, 200), (3, 1))
    scores = {"base": start, "11111": start + 1 + rng.normal(0, 0.1, (3, 200)),
              "01100": start + 0.9 + rng.normal(0, 0.1, (3, 200))}
    scores["01100"][1] = np.nan  # that seed failed: it is left out on both sides
    rows = {r["arm"]: r for r in score_rows(matrix_of(scores, binary=False), 0.95, "11111")}
    want = share_of_gain(scores["01100"][[0, 2]], scores["11111"][[0, 2]], start[0])
    assert (rows["01100"]["share"], rows["01100"]["share_low"]) == (want.value, want.low)
    assert want.low < 0.9 < want.high
    assert "share" not in rows["11111"]
    assert not any("share" in r for r in score_rows(matrix_of(scores, binary=False), 0.95))


def test_other_items_are_refused(config):
    found = planted(PLANTED)
    found[3].tasks["arithmetic"].items[0] = "another"
    with pytest.raises(DataError, match="different items"):
        analyse(found, infos(), config)


def test_perplexity_weighs_tokens_not_texts(config):
    found = planted({"11111": 0.5})
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
    found.append(RunRecord("another", 0.5, 0, "done", validation_loss=0.0))
    assert choose_rates(found, ["11111"], [0, 1]) == {"11111": 0.1}
    found[2].validation_loss = 0.5
    assert choose_rates(found, ["11111"], [0]) == {"11111": 0.01}
    assert choose_rates(found, ["11111"], [1]) == {"11111": 0.1}
    found[0].status = "failed"
    assert choose_rates(found, ["11111"], [0, 1]) == {"11111": 0.01}
    assert choose_rates([], ["11111"], [0, 1]) == {}


def test_a_seed_that_failed_is_a_row_without_scores():
    found = planted({"11111": 0.5, "00100": 0.5})
    found[2].status = "failed"
    matrix = task_matrices(found, ["11111", "00100"], [0, 1, 2], evaluation=["arithmetic"], retention=["texts"],
                           rates={"11111": 0.01, "00100": 0.01})["arithmetic"]
    assert matrix.role == "evaluation"
    assert np.isnan(matrix.scores["11111"]).all(axis=1).tolist() == [False, True, False]
    assert matrix.seeds("11111") == 2
    assert matrix.seeds("00100") == 3
    assert (matrix.scores["base"] == matrix.scores["base"][0]).all()
    assert set(matrix.trained) == {"11111", "00100"}
    assert matrix.binary
    assert matrix.sign == 1.0
