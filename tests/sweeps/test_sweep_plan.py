"""The plan of a sweep against loops of its own: times, work, what can be detected."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest

from midblock.evaluation import find_task
from midblock.stats import equivalence_margin
from midblock.sweeps import expand_arms, jobs_of, load_sweep_data, parse_config
from midblock.sweeps import planning as planning_module
from midblock.sweeps.planning import _scoring, _seconds, clock, plan_sweep
from midblock.tuning.estimate import EFFICIENCY
from midblock.tuning.estimate import outline as outline_of_spec
from sweep_helpers import tiny_values

RATE = 1e9


@pytest.fixture
def planned(tmp_path, monkeypatch):
    """A sweep on a machine whose products reach RATE operations a second."""
    values = tiny_values(tmp_path)
    values["arms"] = {"baseline": "11111", "masks": ["00100", "00001"], "full": ["00100"]}
    values["evaluation"].append({"task": "exact_match", "data": values["evaluation"][0]["data"], "name": "written",
                                 "max_new_tokens": 7})
    config = parse_config(values)
    monkeypatch.setattr(planning_module, "training_rate", lambda anatomy, device, dtype: RATE)
    outline, data = outline_of_spec(config.model, config), load_sweep_data(config)
    return config, outline, data, plan_sweep(config, outline, data)


def block_params(anatomy):
    return sum(p.numel() for p in anatomy.blocks[0].parameters())


def test_scoring_counts_blocks_and_head_on_what_is_read_and_written(planned):
    _, outline, data, _ = planned
    anatomy, tokenizer = outline.anatomy, outline.tokenizer
    block, head = block_params(anatomy), anatomy.hidden_size * anatomy.vocab_size
    found = dict(zip(data.tasks, _scoring(outline, data), strict=True))

    def tokens(label, limit=math.inf):
        rows = [len(tokenizer(e.text)["input_ids"]) for e in data.items[label]]
        return min(sum(rows) / len(rows), limit) * len(rows)

    for label, limit in (("answers", math.inf), ("texts", 32)):
        read = tokens(label, limit)
        assert found[label] == (pytest.approx(2 * head * read), pytest.approx(2 * block * read), True, 5)
    # a generated token costs as much as EFFICIENCY / DECODING read ones
    new = 7 * len(data.items["written"]) * EFFICIENCY / 0.15
    assert found["written"] == (pytest.approx(2 * head * new), pytest.approx(2 * block * (tokens("written") + new)),
                                False, 5)
    assert find_task("exact_match").kind not in ("perplexity", "answer_loss")


def test_seconds_are_operations_over_the_rate_that_is_reached(planned):
    _, outline, data, plan = planned
    scoring = _scoring(outline, data)
    whole = sum(head + 5 * block for head, block, _, _ in scoring)
    assert plan.seconds["base"] == pytest.approx(whole / RATE)
    arms = {a.name: a for a in plan.arms}
    # the first arm with a prefix computes it, the second seed finds it cached, and scoring goes on behind it
    first, again = (plan.seconds[f"00100__lr0.01__seed{s}"] for s in (0, 1))
    start = arms["00100"].plan.first_block
    resumed = sum(head + block * (5 - (start if resumes else 0)) for head, block, resumes, _ in scoring)
    assert first == pytest.approx((plan.work["00100"] + whole) / RATE)
    assert again < first
    assert again - resumed / RATE > 0
    assert plan.total_seconds == pytest.approx(sum(plan.seconds.values()))
    row = plan.frame.set_index("arm").loc["00100"]
    assert row["seconds"] == pytest.approx((first + again) / 2)


def test_shared_prefixes_count_once_and_without_a_cache_every_time():
    cost = SimpleNamespace(epoch_flops=10.0, total_flops=lambda epochs: 10.0 * epochs + 100.0)
    arm = SimpleNamespace(name="a", plan=SimpleNamespace(first_block=2))
    other = SimpleNamespace(name="b", plan=SimpleNamespace(first_block=2))

    def job(arm, key):
        return SimpleNamespace(arm=arm, key=key, name="base" if arm is None else arm.name)

    jobs = [job(None, "base"), job(arm, "a0"), job(arm, "a1"), job(other, "b0")]
    scoring = [(7.0, 3.0, True, 5), (1.0, 2.0, False, 5)]
    cached = _seconds(SimpleNamespace(cache="memory"), jobs, {"a": cost, "b": cost}, 3.0, scoring, 2.0)
    assert cached == {"base": (22 + 11) / 2, "a0": (130 + 22 + 11) / 2, "a1": (30 + 16 + 11) / 2,
                      "b0": (30 + 16 + 11) / 2}
    without = _seconds(SimpleNamespace(cache="none"), jobs, {"a": cost, "b": cost}, 3.0, scoring, 2.0)
    assert without["a1"] == without["b0"] == (130 + 22 + 11) / 2


def test_steps_and_passes_follow_from_the_rows(planned):
    config, outline, data, plan = planned
    assert (plan.frame["steps"] == 6).all()
    training = config.training.model_copy(update={"steps": None, "epochs": 1.0})
    one_epoch = config.model_copy(update={"training": training})
    other = plan_sweep(one_epoch, outline, data)
    assert (other.frame["steps"] == 3).all()  # 12 rows in batches of 4
    # 6 steps are two passes: without its prefix an arm's work doubles
    assert plan.work["11111"] == pytest.approx(2 * other.work["11111"])
    assert plan.work["00001"] < 2 * other.work["00001"]  # the prefix is computed once
    assert plan.work["00001"] < plan.work["00100"] < plan.work["11111"]


def test_the_table_and_the_summary(planned):
    config, _, _, plan = planned
    assert list(plan.frame["arm"]) == ["11111", "00100", "00001", "full-00100"]
    assert list(plan.frame["method"]) == ["lora", "lora", "lora", "full"]
    assert plan.frame["learning_rate"].tolist() == [0.01, 0.01, 0.01, 0.003]
    assert plan.jobs == jobs_of(expand_arms(config, outline_of_spec(config.model, config).anatomy), [0, 1])
    assert plan.comparisons == (3 + 1) * 2  # three arms with the baseline, the middle with the last; two tasks
    text = plan.summary()
    assert text.startswith(f"4 arms, 9 runs, about {clock(plan.total_seconds)} and ")
    assert "8 comparisons between arms" in text
    assert f"{plan.frame['peak_bytes'].max() / 1e9:.1f} GB" in text
    rows = plan.detectable.set_index("task")
    assert rows.loc["answers", ["items", "seeds", "unit"]].tolist() == [10, 2, "sd of the items' scores"]
    assert rows.loc["written", "unit"] == "share"
    guess = {"correlation": 0.5, "seed_correlation": 0.6, "arms": 4, "comparisons": 8}
    assert rows.loc["answers", "as good within"] == equivalence_margin(10, 2, binary=False, seed_sd=0.03, **guess)
    assert rows.loc["written", "as good within"] == pytest.approx(
        equivalence_margin(10, 2, base_rate=0.3, seed_sd=0.03 * math.sqrt(0.3 * 0.7), **guess))
    columns = ["paired, one test", "paired, Holm over 8", "unpaired, one test", "unpaired, Holm over 8"]
    values = rows.loc["answers", columns].tolist()
    assert values[0] < values[1]
    assert values[2] < values[3]
    assert values[0] < values[2]


@pytest.mark.parametrize(("seconds", "text"), [
    (0, "0 s"), (89.4, "89 s"), (90, "1 min 30 s"), (5399, "89 min 59 s"), (5400, "1 h 30 min"), (7380, "2 h 3 min")])
def test_clock(seconds, text):
    assert clock(seconds) == text
