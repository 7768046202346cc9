"""Validation of locators on sweeps: planted gains, signs, regrets, failed arms, the verdict."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from midblock.errors import OutputError, SettingsError
from midblock.models import save_checkpoint
from midblock.provenance import RunFolder
from midblock.results import Table
from midblock.selection.validate import (
    Case,
    SweepGains,
    predictions,
    read_sweep,
    summarise,
    validate,
    validate_cases,
)
from midblock.settings.locate import BLOCK_SCORES
from selection_helpers import planted

L = 10


def _sweep(path: Path, gains: dict[str, dict[int, float]], *, metric: str = "accuracy", base: float = 0.1,
           model: str = "tiny", rate: dict[str, float] | None = None, command: str = "sweep") -> Path:
    """A sweep's folder: arm -> seed -> its score over the base's (losses: below it)."""
    table = Table()
    sign = 1 if metric == "accuracy" else -1
    chosen = rate or {}

    def add(arm: str, seed: int | None, value: float, **more: Any) -> None:
        extra = {"arm": arm, "mask": "00000" if arm == "base" else arm, "role": "evaluation", "task": "t", "seed": seed,
                 "method": "none" if arm == "base" else "lora", "params": 1, **more}
        side = "base" if arm == "base" else "sft"
        if math.isnan(value):
            table.add_undefined("segment", extra["mask"], metric, side, "it failed", **extra)
        else:
            table.add("segment", extra["mask"], metric, side, value, n=100, **extra)
    add("base", None, base)
    for arm, by_seed in gains.items():
        values = [base + sign * g for g in by_seed.values()]
        add(arm, None, float(np.mean(values)), learning_rate=chosen.get(arm, 1e-3))
        for seed, gain in by_seed.items():
            add(arm, seed, base + sign * gain, learning_rate=1e-3)
            if rate:  # a rate of the grid that was not chosen: its score must not be read
                add(arm, seed, base + 100, learning_rate=5e-3)
    table.add("segment", "10000", metric, "difference", 0.2, n=100, arm="10000", mask="10000", role="evaluation",
              task="t", seed=None, method="lora", versus="base")
    with RunFolder(path, command=command, settings={"model": model, "train": {"data": "arithmetic"}, "dtype": "auto"}
                   ) as run:
        run.write_table(table)
    return path


SINGLES = ["10000", "01000", "00100", "00010", "00001"]


def _gains(values: list[float], seeds: int = 2, **more: float) -> dict[str, dict[int, float]]:
    return {m: {s: v + 0.001 * s for s in range(seeds)} for m, v in {**dict(zip(SINGLES, values, strict=True)),
                                                                    **more}.items()}


def test_gains_are_read_per_seed(tmp_path: Path) -> None:
    found = read_sweep(_sweep(tmp_path / "a", _gains([0.1, 0.2, 0.3, 0.2, 0.1], **{"11111": 0.25, "01100": 0.4})))
    assert [c.seed for c in found.cases] == [0, 1]
    assert found.cases[0].gains == pytest.approx((0.1, 0.2, 0.3, 0.2, 0.1))
    assert found.cases[0].uniform == pytest.approx(0.25)
    assert found.cases[0].best == pytest.approx(0.3)  # the double segment is no single one
    assert (found.model, found.data) == ("tiny", "arithmetic")


def test_losses_are_turned_and_rates_chosen(tmp_path: Path) -> None:
    found = read_sweep(_sweep(tmp_path / "a", _gains([0.1, 0.2, 0.3, 0.2, 0.1]), metric="loss", base=2.0,
                              rate=dict.fromkeys(SINGLES, 1e-3)))
    assert found.cases[0].gains == pytest.approx((0.1, 0.2, 0.3, 0.2, 0.1))
    assert math.isnan(found.cases[0].uniform)


def test_a_failed_arm_leaves_its_case_out_and_says_so(tmp_path: Path) -> None:
    gains = _gains([0.1, 0.2, 0.3, 0.2, 0.1])
    gains["00100"][1] = math.nan
    found = read_sweep(_sweep(tmp_path / "a", gains))
    assert [c.seed for c in found.cases] == [0]
    assert "00100" in found.left_out[0]
    for arm in gains.values():
        arm[0] = math.nan
    with pytest.raises(SettingsError, match="every single segment"):
        read_sweep(_sweep(tmp_path / "b", gains))


def test_other_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="not of a sweep"):
        read_sweep(_sweep(tmp_path / "a", _gains([0.1] * 5), command="profile"))
    with pytest.raises(OutputError, match=r"run\.json"):
        read_sweep(tmp_path / "nothing")
    with pytest.raises(SettingsError, match="at least one"):
        validate([])
    with pytest.raises(SettingsError, match="twice"):
        validate([tmp_path / "a", tmp_path / "a"])


def test_predictions_are_means_over_segments() -> None:
    found = predictions({"x": list(map(float, range(L)))}, 5, L)
    assert found["x"].tolist() == [0.5, 2.5, 4.5, 6.5, 8.5]
    assert found["fixed-middle"].tolist() == [0, 1, 1, 1, 0]
    assert predictions({}, 3, L)["fixed-middle"].tolist() == pytest.approx([1 / 3, 1.0, 0.5])


def _cases(gains: list[float], sweeps: int, noise: float = 0.01) -> list[Case]:
    draw = np.random.default_rng(0)
    return [Case(f"s{i}", "t", "lora", seed, tuple((np.array(gains) + draw.normal(0, noise, 5)).tolist()), 0.2)
            for i in range(sweeps) for seed in range(2)]


def _judge(cases: list[Case], scores: dict[str, list[float]], data: dict[str, str] | None = None) -> Any:
    """All sweeps on one model, each on data of its own unless told otherwise."""
    names = dict.fromkeys(c.sweep for c in cases)
    sweeps = [SweepGains(Path(n), "m", (data or {}).get(n, n), "auto", tuple(c for c in cases if c.sweep == n), ())
              for n in names]
    return summarise(sweeps, dict.fromkeys(names, scores), dict.fromkeys(names, L))


def _of(result: Any, score: str, metric: str) -> Any:
    frame = result.frame
    return frame[(frame["score"] == score) & (frame["metric"] == metric)].iloc[0]


def test_a_score_that_predicts_is_found_and_beats_the_middle() -> None:
    late = [0.1, 0.15, 0.2, 0.3, 0.5]  # the last segment is best; the middle is not
    rising = list(np.repeat(late, 2))
    found = _judge(_cases(late, 4), {"fisher": rising, "taylor": rising[::-1]})
    assert _of(found, "fisher", "rank_correlation")["value"] > 0.95
    assert _of(found, "taylor", "rank_correlation")["value"] < -0.95
    assert _of(found, "fisher", "regret")["value"] == pytest.approx(0, abs=1e-9)
    assert _of(found, "taylor", "regret")["value"] == pytest.approx(0.4, abs=0.03)
    assert _of(found, "random", "regret")["value"] == pytest.approx(0.5 - np.mean(late), abs=0.03)
    assert _of(found, "uniform", "regret")["value"] == pytest.approx(0.3, abs=0.03)
    assert _of(found, "fixed-middle", "regret")["value"] == pytest.approx(0.5 - np.mean(late[1:4]), abs=0.03)
    assert found.best == "fisher"
    assert "fisher chooses better" in found.summary()
    assert _of(found, "fisher", "regret")["over"] == "sweeps"
    assert _of(found, "fisher", "regret_difference")["value"] == pytest.approx(-(0.5 - np.mean(late[1:4])), abs=0.03)


def test_if_no_score_beats_the_middle_it_stays_and_it_is_said() -> None:
    middle = [0.1, 0.3, 0.31, 0.3, 0.1]
    draw = np.random.default_rng(1)
    found = _judge(_cases(middle, 4), {"fisher": draw.random(L).tolist(), "taylor": list(np.repeat(middle[::-1], 2))})
    assert found.best == "fixed-middle"
    assert "No score is shown to choose better" in found.summary()


@pytest.mark.parametrize("sweeps", [1, 2, 3, 4])
def test_seeds_tasks_and_repeated_sweeps_are_one_observation(sweeps: int) -> None:
    """A score that always finds the best segment wins over three independent sweeps and never over fewer."""
    late = [0.1, 0.15, 0.2, 0.3, 0.5]
    rising = {"fisher": list(np.repeat(late, 2))}
    draws = [np.array(late) + 0.01 * np.random.default_rng(i).normal(size=5) for i in range(sweeps)]
    cases = [Case(f"s{i}", f"t{t}", "lora", seed, tuple(draws[i]), math.nan)
             for i in range(sweeps) for t in range(4) for seed in range(5)]
    found = _judge(cases, rising)
    assert found.evidence.sweeps == sweeps
    row = _of(found, "fisher", "regret_difference")
    assert row["n"] == sweeps
    if sweeps < 3:
        assert found.best == "fixed-middle"
        assert f"{3 - sweeps} more" in found.verdict
        assert math.isnan(row["low"])
        assert math.isnan(_of(found, "fisher", "regret")["low"])
    else:
        assert found.best == "fisher"
        assert row["high"] < 0
    # the same sweeps on one data set are one observation, however many there are
    again = _judge(cases, rising, data={f"s{i}": "same" for i in range(sweeps)})
    assert again.evidence.sweeps == 1
    assert again.best == "fixed-middle"
    assert "2 more" in again.verdict


def test_more_scores_need_more_sweeps() -> None:
    """Nine guesses find the best of five segments three times running by chance in 7% of studies."""
    late = [0.1, 0.15, 0.2, 0.3, 0.5]
    scores = {name: list(np.repeat(late, 2)) for name in BLOCK_SCORES}
    three = _judge(_cases(late, 3), scores)
    assert three.best == "fixed-middle"
    assert "1 more" in three.verdict
    assert _judge(_cases(late, 4), scores).best != "fixed-middle"


def test_intervals_stay_where_the_values_can_be() -> None:
    shapes = [[0.1, 0.15, 0.2, 0.3, 0.5], [0.5, 0.3, 0.2, 0.15, 0.1], [0.1, 0.3, 0.2, 0.5, 0.15]]
    cases = [Case(f"s{i}", "t", "lora", 0, tuple(gains), math.nan) for i, gains in enumerate(shapes)]
    found = _judge(cases, {"fisher": list(np.repeat(shapes[0], 2))})
    for metric, low, high in (("rank_correlation", -1, 1), ("regret", 0, math.inf)):
        row = _of(found, "fisher", metric)
        assert low <= row["low"] < row["value"] < row["high"] <= high
    assert _of(found, "fisher", "rank_correlation")["high"] == 1


def test_noise_predicts_nothing() -> None:
    draw = np.random.default_rng(2)
    values = []
    for _ in range(60):
        cases = [Case("s", "t", "lora", 0, tuple(draw.random(5).tolist()), math.nan)]
        frame = validate_cases(cases, {"s": {"fisher": draw.random(L).tolist()}}, {"s": L})
        own = frame[(frame["score"] == "fisher")].set_index("metric")["value"]
        chance = frame[(frame["score"] == "random") & (frame["metric"] == "regret")]["value"].iloc[0]
        values.append((own["rank_correlation"], own["regret"] - chance))
    assert np.abs(np.mean(values, axis=0)).max() < 0.15


def test_an_undefined_score_is_a_gap_with_a_reason() -> None:
    found = _judge(_cases([0.1, 0.2, 0.3, 0.2, 0.1], 1), {"fisher": [math.nan] * L, "weight_snr": [1.0] * L})
    assert math.isnan(_of(found, "fisher", "regret")["value"])
    assert any("undefined for some block" in r["reason"] for r in found.table.reasons)
    # a constant score has no ranks, and chooses as chance does
    assert math.isnan(_of(found, "weight_snr", "rank_correlation")["value"])
    assert _of(found, "weight_snr", "regret")["value"] == pytest.approx(_of(found, "random", "regret")["value"])
    assert set(found.figures()) == {"validate-regret", "validate-rank-correlation"}


def test_scores_are_computed_for_the_sweeps_own_model(tmp_path: Path) -> None:
    model = planted(2)
    save_checkpoint(model.model, model.tokenizer, tmp_path / "model")
    gains = {m: {0: v} for m, v in zip(["1000", "0100", "0010", "0001"], [0.0, 0.01, 0.5, 0.02], strict=True)}
    sweep = _sweep(tmp_path / "sweep", gains, model=str(tmp_path / "model"))
    found = validate([sweep], samples=8, gradient_samples=4, scores=("gradient_norm", "block_influence"))
    for score in ("gradient_norm", "block_influence"):
        assert _of(found, score, "regret")["value"] == 0.0  # the planted block was the best arm
    assert _of(found, "fixed-middle", "regret")["value"] > 0
    assert found.best == "fixed-middle"  # one case proves nothing
