"""A sweep that is too small says so and concludes nothing."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from midblock.sweeps import SweepResult, analyse
from midblock.sweeps.sufficiency import missing_of, still_falling
from sweep_helpers import ARMS, PLANTED, infos, planted, planted_config


@pytest.fixture
def config(tmp_path):
    return planted_config(tmp_path)


def missing(config, records, names=ARMS):
    return analyse(records, infos(names), config).missing


def test_a_sweep_of_size_lacks_nothing(config):
    assert missing(config, planted(PLANTED)) == {}


def test_one_seed(config):
    one = config.model_copy(update={"seeds": [0]})
    found = missing(one, planted(PLANTED, seeds=1))
    assert found[("arithmetic", "00100")] == "seeds (has 1, needs 2 or better 3)"
    assert ("arithmetic", "base") not in found
    assert len(found) == 2 * len(ARMS)


def test_few_items(config):
    found = missing(config, planted(PLANTED, items=29))
    assert set(found) == {("arithmetic", a) for a in [*ARMS, "base"]}
    assert set(found.values()) == {"items of arithmetic (has 29, needs 30)"}
    assert missing(config, planted(PLANTED, items=30)) == {}


@pytest.mark.parametrize(("rate", "word"), [(0.01, "an easier task"), (0.99, "a harder task")])
def test_floor_and_ceiling(config, rate, word):
    found = missing(config, planted(dict.fromkeys(ARMS, rate)))
    assert found
    assert all(v.startswith(f"{word} than arithmetic") for v in found.values())
    # one arm with room on both sides is enough: the others are known to be worse (or better) than it
    assert missing(config, planted({**dict.fromkeys(ARMS, rate), "00100": 0.5})) == {}


def test_the_ceiling_says_how_many_answers_are_left(config):
    records = planted({"11111": 0.5, "00100": 0.5})
    for r in records:
        r.tasks["arithmetic"].scores = [1.0] * 147 + [0.0] * 3
    assert set(missing(config, records, ["11111", "00100"]).values()) == {
        "a harder task than arithmetic (every arm answers all but 4 of 150 items)"}


def test_two_seeds_are_enough_to_judge(config):
    two = config.model_copy(update={"seeds": [0, 1]})
    assert missing(two, planted(PLANTED, seeds=2)) == {}


def test_floor_counts_answers_at_the_border(config):
    records = planted({"11111": 0.5, "00100": 0.5})
    for r in records:
        r.tasks["arithmetic"].scores = [1.0] * 5 + [0.0] * 145
    assert missing(config, records, ["11111", "00100"]) == {}
    for r in records:
        r.tasks["arithmetic"].scores = [1.0] * 4 + [0.0] * 146
    assert missing(config, records, ["11111", "00100"])
    for r in records:
        r.tasks["arithmetic"].scores = [1.0] * 145 + [0.0] * 5
    assert missing(config, records, ["11111", "00100"]) == {}
    for r in records:
        r.tasks["arithmetic"].scores = [1.0] * 146 + [0.0] * 4
    assert missing(config, records, ["11111", "00100"])


def test_few_steps_and_steep_losses_concern_their_arm_alone(config):
    records = planted(PLANTED)
    for r in records:
        if r.arm == "00100":
            r.training["losses"] = r.training["losses"][:9]
        if r.arm == "00010":
            r.training["losses"] = list(np.linspace(3, 1, 40))
    found = missing(config, records)
    assert found == {
        ("arithmetic", "00100"): "training steps (has 9, needs 10)", ("texts", "00100"):
        "training steps (has 9, needs 10)",
        ("arithmetic", "00010"): "training (the loss of 00010 still falls steeply when it ends)",
        ("texts", "00010"): "training (the loss of 00010 still falls steeply when it ends)"}


def test_reasons_are_joined(config):
    one = config.model_copy(update={"seeds": [0]})
    found = missing(one, planted(PLANTED, seeds=1, items=8, steps=3))
    assert found[("arithmetic", "11111")] == ("seeds (has 1, needs 2 or better 3); training steps (has 3, needs 10); "
                                              "items of arithmetic (has 8, needs 30)")


def test_records_without_losses_are_not_judged_by_them(config):
    records = planted(PLANTED)
    for r in records:
        r.training = {}
    assert missing_of(analyse(records, infos(), config).matrices, records, {"11111": 0.01}) == {}


@pytest.mark.parametrize(("curve", "steep"), [
    (lambda t: 3 - t, True),
    (lambda t: 3 * np.exp(-2 * t), True),  # the last quarter holds 18% of the fall
    (lambda t: 3 * np.exp(-5 * t), False),  # 6%
    (lambda t: 0 * t + 1, False),
    (lambda t: 1 + t, False),
    (lambda t: 1 + np.abs(t - 0.6), False),
])
def test_steepness(curve, steep):
    assert still_falling(curve(np.linspace(0, 1, 80))) is steep


def test_noise_alone_is_not_a_fall():
    rng = np.random.default_rng(0)
    assert sum(still_falling(rng.normal(2, 0.3, 60)) for _ in range(200)) <= 10
    assert still_falling(np.linspace(3, 1, 60) + rng.normal(0, 0.05, 60))


def own_still_falling(losses: list[float]) -> bool:
    """The rule in words, one number at a time."""
    size, extra = divmod(len(losses), 4)
    quarters, at = [], 0
    for k in range(4):
        stop = at + size + (k < extra)
        quarters.append(losses[at:stop])
        at = stop
    means = [sum(q) / len(q) for q in quarters]
    squared = 0.0
    for q in quarters[2:]:
        if len(q) < 4:  # too few for a line: half the variance of the steps' differences
            steps = [b - a for a, b in itertools.pairwise(q)]
            variance = sum((d - sum(steps) / len(steps)) ** 2 for d in steps) / len(steps) / 2
        else:
            middle, mean = (len(q) - 1) / 2, sum(q) / len(q)
            slope = sum((i - middle) * v for i, v in enumerate(q)) / sum((i - middle) ** 2 for i in range(len(q)))
            variance = sum((v - mean - slope * (i - middle)) ** 2 for i, v in enumerate(q)) / (len(q) - 2)
        squared += variance / len(q)
    fall, whole = means[2] - means[3], means[0] - means[3]
    return whole > 0 and fall > 0.1 * whole and fall > 2 * squared ** 0.5


@pytest.mark.parametrize("steps", [8, 9, 11, 12, 15, 16, 17, 20, 40, 61])
def test_steepness_is_the_rule_in_words(steps):
    rng = np.random.default_rng(steps)
    found = []
    for _ in range(300):  # falls about a tenth of the whole, noise about half of the fall
        curve = 2 * np.exp(-rng.uniform(1, 8) * np.linspace(0, 1, steps)) + rng.normal(0, rng.uniform(0, 0.3), steps)
        found.append(still_falling(curve))
        assert found[-1] is own_still_falling(curve.tolist())
    assert 30 < sum(found) < 270


@pytest.mark.parametrize("losses", [[3.0, 2.0, 1.0], [1.0] * 7])
def test_too_few_steps_count_as_falling(losses):
    assert still_falling(np.array(losses))


def test_smoke_sweeps_never_support_a_claim(config):
    """3 steps, 8 items, one seed, whatever the scores: at most 1% may end in a finding; none does."""
    one = config.model_copy(update={"seeds": [0]})
    rng = np.random.default_rng(0)
    found = 0
    for seed in range(100):
        rates = {arm: float(rng.uniform(0.05, 0.95)) for arm in ARMS}
        result = SweepResult(one, infos(), planted(rates, seed=seed, items=8, seeds=1, steps=3))
        found += bool(result.statistics.comparisons["conclusion"].ne("too small").any()
                      or (result.claims["verdict"] != "too small to judge").any()
                      or not result.summary().startswith("Too small to judge. Missing: "))
    assert found == 0
