"""The verdict against the table that it sums up, with planted rows."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from midblock.sweeps import ArmInfo, RunRecord, SweepResult
from midblock.sweeps.scores import TaskMatrix
from midblock.sweeps.statistics import SweepStatistics
from midblock.sweeps.verdict import MAX_LINES, amount, answer, verdict
from sweep_helpers import ARMS, PLANTED, infos, planted, planted_config

NAMES = ["11111", "10000", "00100", "00001"]
# half widths of the corrected bounds that planted rows get, in the scores' unit
HALF = 0.015


@pytest.fixture
def config(tmp_path):
    return planted_config(tmp_path)


def row(family, a, b, conclusion, difference=0.0, task="arithmetic", metric="accuracy"):
    sign = 1 if metric == "accuracy" else -1
    return {"family": family, "task": task, "metric": metric, "a": a, "b": b, "conclusion": conclusion,
            "difference": difference, "low": difference - 0.01, "high": difference + 0.01, "p": 0.5,
            "margin": 0.02 if metric == "accuracy" else 0.01, "worst": HALF - difference * sign,
            "best": HALF + difference * sign}


def stats_of(rows, names=NAMES, missing=None, curves=(), front=("00100",)) -> SweepStatistics:
    shape = np.zeros((3, 50))
    arms = {"base": shape, **dict.fromkeys(names, shape)}
    matrices = {"arithmetic": TaskMatrix("arithmetic", "evaluation", "accuracy", True, tuple("x" * 50), arms),
                "texts": TaskMatrix("texts", "retention", "perplexity", False, tuple("x" * 20), arms)}
    pareto = pd.DataFrame([{"task": "arithmetic", "arm": n, "gain": 0.1, "forgetting": 0.0, "params": 1, "work": 1.0,
                            **{f"front_{c}": n in front for c in ("forgetting", "params", "work")}} for n in names])
    # the text names the first task's front and the baseline's score there: nothing else has these values
    pareto = pd.concat([pareto, pareto.assign(task="other", front_forgetting=True, front_params=True, front_work=True)])
    scores = pd.DataFrame([{"task": task, "arm": n, "value": 0.51234 if (task, n) == ("arithmetic", "11111") else 0.7}
                           for task in ("texts", "arithmetic") for n in reversed(names)])
    return SweepStatistics(scores, pd.DataFrame(rows), pd.DataFrame(), pd.DataFrame(
        list(curves), columns=["task", "method", "segments", "p_holm", "peak", "best"]), pareto, matrices,
        dict.fromkeys(names, 0.01), missing or {})


def gains(*names, conclusion="better"):
    return [row("gain", n, "base", conclusion, 0.4) for n in names]


LEARNED = gains(*NAMES)


def against(**conclusions):
    """Rows against the baseline: arm=(conclusion, difference)."""
    return [row("evaluation", a.removeprefix("m"), "11111", c, d) for a, (c, d) in conclusions.items()]


def test_an_arm_that_is_better_is_used(config):
    stats = stats_of(LEARNED + against(m10000=("worse", -0.1), m00100=("better", 0.05), m00001=("better", 0.03)))
    found = answer(stats, infos(NAMES), config)
    assert found.arm == "00100"
    assert found.text == ("Use 00100: better than all layers (11111) on arithmetic by 5.0 points (at least 3.5 points "
                          "with 95% confidence), in about 60% of its training time (counted in operations).")


def test_a_bound_that_the_correction_takes_away_is_not_told(config):
    stats = stats_of(LEARNED + against(m00100=("better", HALF)))
    assert "by 1.5 points, in about 60%" in answer(stats, infos(NAMES), config).text


def test_a_rate_at_the_end_of_its_grid_is_told(config):
    stats = stats_of(LEARNED + against(m10000=("worse", -0.1), m00100=("open", 0.0), m00001=("open", 0.0)))

    def told(**rates):
        runs = [RunRecord(arm.removeprefix("m"), rate, 0, "done") for arm, tried in rates.items() for rate in tried]
        text = verdict(stats, infos(NAMES), runs, config)
        return next((line for line in text.splitlines() if line.startswith("Learning rates: ")), "")

    assert told(m11111=[0.01], m00100=[0.01]) == ""  # nothing was searched
    assert told(m11111=[0.001, 0.01, 0.1], m00100=[0.001, 0.01, 0.1]) == ""
    both = told(m11111=[0.001, 0.01], m00100=[0.001, 0.01], m10000=[0.01, 0.02], m00001=[0.01])
    assert "the largest that was tried, 0.01, is the best of 11111, 00100;" in both
    assert "the smallest that was tried, 0.01, is the best of 10000;" in both
    assert "00001" not in both  # one rate of its own, in place of a grid


def test_lower_losses_are_better(config):
    rows = [row("gain", n, "base", "better", -0.4, metric="loss") for n in NAMES]
    rows += [row("evaluation", "00100", "11111", "better", -0.05, metric="loss"),
             row("evaluation", "00001", "11111", "better", -0.03, metric="loss")]
    stats = stats_of(rows)
    stats.matrices["arithmetic"] = replace(stats.matrices["arithmetic"], metric="loss", higher_is_better=False)
    found = answer(stats, infos(NAMES), config)
    assert found.arm == "00100"
    assert "by 0.050 nats (at least 0.035 nats with" in found.text


def test_the_cheapest_arm_that_is_no_worse_is_used(config):
    rows = against(m10000=("as good", 0.01), m00100=("no worse", 0.002), m00001=("as good", -0.003))
    stats = stats_of(LEARNED + rows)
    found = answer(stats, infos(NAMES), config)
    assert found.arm == "00001"
    assert found.text == ("Use 00001: at most 1.8 points worse than all layers (11111) on arithmetic with 95% "
                          "confidence, in about 20% of its training time (counted in operations).")
    # of two arms of equal work the better one
    arms = infos(NAMES)
    arms["00001"] = replace(arms["00001"], work=arms["00100"].work)
    assert answer(stats, arms, config).arm == "00100"
    # a bound above zero is told as none worse
    stats = stats_of(LEARNED + against(m00100=("as good", 0.018)))
    assert "Use 00100: at most 0.0 points worse" in answer(stats, infos(NAMES), config).text


def test_an_arm_that_costs_as_much_gives_no_reason_to_leave_the_baseline(config):
    stats = stats_of(LEARNED + against(m10000=("as good", 0.0)))
    found = answer(stats, infos(NAMES), config)
    assert found.arm == "11111"
    assert found.text == ("Use 11111 (the baseline): no other arm is shown to be better on arithmetic, or cheaper and "
                          "at most 2.0 points worse.")
    unknown = {n: replace(a, work=math.nan) for n, a in infos(NAMES).items()}
    stats = stats_of(LEARNED + against(m00100=("better", 0.05)))
    assert "training time" not in answer(stats, unknown, config).text


def test_an_arm_that_did_not_learn_is_never_used(config):
    rows = against(m00100=("better", 0.05), m00001=("as good", 0.0))
    assert answer(stats_of(rows + gains("11111", "00001")), infos(NAMES), config).arm == "00001"
    found = answer(stats_of(rows + gains(*NAMES, conclusion="open")), infos(NAMES), config)
    assert found.arm is None
    assert found.text == "No answer: no arm is shown to be better on arithmetic than the untuned model."


def test_too_small_names_everything_that_is_missing_once(config):
    missing = {("arithmetic", "11111"): "seeds (a); items (b)", ("arithmetic", "00100"): "seeds (a); steps (c)",
               ("texts", "11111"): "texts (d)"}
    found = answer(stats_of(LEARNED + against(m00100=("better", 0.05)), missing=missing), infos(NAMES), config)
    assert found.arm is None
    assert found.text == "Too small to judge. Missing: seeds (a), items (b), steps (c)."


def test_without_scores_or_baseline_there_is_no_answer(config):
    stats = stats_of(LEARNED + against(m00100=("better", 0.05)))
    del stats.matrices["arithmetic"]
    assert answer(stats, infos(NAMES), config).text == "No answer: no trained arm has a score on arithmetic."
    assert answer(stats_of(LEARNED), infos(NAMES[1:]), config).arm is None


def lines(stats, config, arms=None, records=()):
    return verdict(stats, arms if arms is not None else infos(NAMES), list(records), config).splitlines()


def test_the_whole_text(config):
    rows = LEARNED + against(m10000=("worse", -0.1), m00100=("better", 0.05), m00001=("open", -0.01)) + [
        row("evaluation", "00100", "10000", "better", 0.15), row("evaluation", "00100", "00001", "open", 0.06),
        *(row("retention", n, "base", "worse" if n in ("11111", "10000") else "open", 0.02, "texts", "perplexity")
          for n in NAMES),
        row("retention", "00100", "11111", "better", -0.02, "texts", "perplexity"),
        row("retention", "10000", "11111", "open", 0.0, "texts", "perplexity")]
    curves = [("arithmetic", "lora", 3, 0.2, 0.5, "00100")]
    failed = RunRecord("00001", 0.01, 2, "failed", reason="no room")
    assert lines(stats_of(rows, curves=curves), config, records=[failed, RunRecord("base", None, None, "done")]) == [
        "Use 00100: better than all layers (11111) on arithmetic by 5.0 points (at least 3.5 points with 95% "
        "confidence), in about 60% of its training time (counted in operations).",
        f"Next: midblock tune {config.model} --data {config.train.data} --mask 00100 --budget match:11111@2 "
        "--learning-rate 0.01 --out NEW",
        f"4 arms on {config.model}, 3 seeds, items: arithmetic 50, texts 20; a difference counts where Holm's p is "
        "below 0.05.",
        "1 of 2 runs failed and have no score: 00001__lr0.01__seed2.",
        "arithmetic (accuracy, 50 items), against all layers (11111) 0.512: better: middle (00100) +5.0 points; "
        "worse: early (10000) -10.0 points; not distinguishable: late (00001); differences below 1.7 points are easily "
        "missed.",
        "Retention (perplexity against the untuned model). texts: forget: 11111 +2.0% of the perplexity, 10000 +2.0% "
        "of the perplexity; less than 11111: 00100.",
        "The paper's claims: the middle beats all layers: supported; the middle is no worse than all layers: "
        "supported; the middle beats the last segment: not shown; the middle beats the first segment: supported; LoRA "
        "arms rise and then fall over 3 segments: not shown; the middle forgets less than all layers: supported; the "
        "middle forgets no more than all layers: supported.",
        "By their means no other arm is better on both gain and retention: 00100; parameters: 00100; training work: "
        "00100."]


def test_every_conclusion_has_its_words(config):
    rows = LEARNED + against(m10000=("as good", 0.0), m00100=("no worse", 0.0), m00001=("too small", 0.0))
    text = "\n".join(lines(stats_of(rows), config))
    assert ("as good within 2.0 points: early (10000); at most 2.0 points worse: middle (00100); too small to judge: "
            "late (00001)") in text
    assert "texts: forget: none shown" not in text  # there is nothing to say without comparisons


def test_what_is_not_there_leaves_no_trace(config):
    stats = stats_of(LEARNED + against(m00100=("open", 0.0)))
    alone = replace(stats, scores=stats.scores.iloc[:0], pareto=stats.pareto.iloc[:0])
    text = "\n".join(lines(alone, config))
    assert "against all layers (11111): not distinguishable: middle (00100)" in text
    assert "By their means" not in text
    nobody = stats.pareto.assign(**{f"front_{c}": False for c in ("forgetting", "params", "work")})
    assert "By their means" not in "\n".join(lines(replace(stats, pareto=nobody), config))


def test_retention_without_findings(config):
    kept = [row("retention", n, "base", "open", 0.0, "texts", "perplexity") for n in NAMES]
    assert "texts: forget: none shown." in "\n".join(lines(stats_of(LEARNED + kept), config))
    small = [{**r, "conclusion": "too small"} for r in kept]
    assert "texts: too small to judge." in "\n".join(lines(stats_of(LEARNED + small), config))


def next_line(config, missing, **changes):
    rows = LEARNED + against(m00100=("open", 0.0))
    return lines(stats_of(rows, missing=missing), config.model_copy(update=changes))[1]


def test_the_next_command_mends_what_is_missing(config):
    all_missing = {("arithmetic", "11111"): "seeds (has 1); items of arithmetic (has 8); training steps (has 3)"}
    assert next_line(config, all_missing, seeds=[0]) == (
        "Next: midblock sweep config.yaml --set seeds=[0,1,2] --set evaluation.0.samples=200 --set training.steps=100 "
        "--out NEW")
    falls = {("arithmetic", "11111"): "training (the loss of 11111 still falls steeply)"}
    by_steps = config.training.model_copy(update={"steps": 80})
    assert next_line(config, falls, training=by_steps) == (
        "Next: midblock sweep config.yaml --set training.steps=160 --out NEW")
    by_epochs = config.training.model_copy(update={"steps": None, "epochs": 1.5})
    assert next_line(config, falls, training=by_epochs) == (
        "Next: midblock sweep config.yaml --set training.epochs=3 --out NEW")
    easier = {("arithmetic", "11111"): "an easier task than arithmetic (no arm)"}
    assert not next_line(config, easier).startswith("Next")  # no option makes a task easier
    # nothing is missing and nothing is shown: more of everything
    assert next_line(config, {}) == (
        "Next: midblock sweep config.yaml --set seeds=[0,1,2,3,4] --set evaluation.0.samples=100 --out NEW")


def test_the_next_command_trains_the_arm(config):
    arms = infos(NAMES)
    arms["mine"] = replace(arms["00001"], name="mine", mask=None, blocks=(3, 4, 7), method="full-equal")
    rows = LEARNED + gains("mine") + against(mmine=("better", 0.2))
    stats = stats_of(rows, names=[*NAMES, "mine"])
    start = f"Next: midblock tune {config.model} --data {config.train.data} "
    assert lines(stats, config, arms)[1] == start + "--blocks 3:5,7 --method full --learning-rate 0.01 --out NEW"
    lora = arms | {"mine": replace(arms["mine"], method="lora")}
    assert lines(stats, config, lora)[1] == start + (
        "--blocks 3:5,7 --budget match:11111@2 --learning-rate 0.01 --out NEW")
    without = config.model_copy(update={"budget": None})
    del stats.rates["mine"]
    assert lines(stats, without, lora)[1] == start + "--blocks 3:5,7 --out NEW"


def test_unequal_arms_are_called_unequal(config):
    arms = infos(NAMES)
    stats = stats_of(LEARNED + against(m00100=("open", 0.0)))
    assert not any("equal parameters" in line or "Methods" in line for line in lines(stats, config, arms))
    arms["00100"] = replace(arms["00100"], params=1049)
    assert not any("equal parameters" in line for line in lines(stats, config, arms))
    arms["00100"] = replace(arms["00100"], params=5000)
    arms["00001"] = replace(arms["00001"], params=900, method="full")
    assert ("Not at equal parameters (the baseline has 1,000): 00100 5,000, 00001 900. Methods have learning rates of "
            "their own; differences between them hold for these rates.") in lines(stats, config, arms)


def test_long_lists_and_many_tasks_are_cut(config):
    names = ["11111", *(f"x{i}" for i in range(9))]
    arms = {n: ArmInfo(n, "lora", None, (3, 4), 10, 1000, is_baseline=n == "11111", work=1.0) for n in names}
    rows = gains(*names) + [row("evaluation", n, "11111", "open") for n in names[1:]]
    stats = stats_of(rows, names=names, front=names)
    text = lines(stats, config, arms)
    told = next(line for line in text if line.startswith("arithmetic"))
    assert ("not distinguishable: middle (x0), middle (x1), middle (x2), middle (x3), middle (x4), middle (x5) "
            "and 3 more") in told
    for extra in ("u", "v", "w"):
        stats.matrices[extra] = replace(stats.matrices["arithmetic"], task=extra)
    text = lines(stats, config, arms)
    assert sum(line.startswith(("arithmetic (", "u (", "v (", "w (")) for line in text) == 2
    assert "u (accuracy, 50 items): nothing to compare." in text


def test_planted_scores_end_in_an_answer_of_at_most_eleven_lines(config):
    result = SweepResult(config, infos(), planted(PLANTED, forget={a: 0.02 if a == "11111" else 0.002 for a in ARMS}))
    text = result.summary()
    assert text.startswith("Use 00100: better than all layers (11111) on arithmetic by ")
    assert len(text.splitlines()) <= 1 + MAX_LINES
    assert re.search(r"forget: 11111 \+(1\.[89]|2\.[0-2])% of the perplexity", text)
    best = result.statistics.ranking.iloc[0]
    assert best["arm"] == "00100"
    assert best["best"] > 0.9


def test_without_a_difference_nothing_is_claimed(config):
    result = SweepResult(config, infos(), planted(dict.fromkeys(ARMS, 0.5), seed=1))
    assert not result.statistics.family("evaluation")["conclusion"].isin(["better", "worse"]).any()
    text = result.summary()
    assert "better: " not in text
    assert "; worse: " not in text
    assert "easily missed" in text
    assert "beats all layers: not shown" in text


def test_failed_runs_are_told_and_left_out(config):
    found = planted(PLANTED)
    for record in found:
        if record.arm == "00001" or (record.arm == "00100" and record.seed == 1):
            record.status, record.reason, record.tasks = "failed", "OutOfMemoryError: no room", {}
    result = SweepResult(config, infos(), found)
    assert "4 of 19 runs failed and have no score: 00100__lr0.01__seed1, 00001__lr0.01__seed0" in result.summary()
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


@pytest.mark.parametrize(("metric", "value", "signed", "text"), [
    ("accuracy", 0.051, False, "5.1 points"), ("accuracy", 0.051, True, "+5.1 points"),
    ("accuracy", -0.051, True, "-5.1 points"), ("loss", 0.0456, False, "0.046 nats"),
    ("perplexity", math.log(1.1), True, "+10.0% of the perplexity"),
    ("perplexity", math.log(0.9), True, "-10.0% of the perplexity")])
def test_amounts(metric, value, signed, text):
    assert amount(metric, value, signed=signed) == text
