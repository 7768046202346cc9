"""Sweeps end to end on a tiny model: shared work is exact, failures are rows, kill -9 loses one run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from midblock.errors import DataError, OutputError, SettingsError, TrainingError
from midblock.evaluation import evaluate
from midblock.models import load_model
from midblock.provenance import read_run
from midblock.sweeps import (
    LocalEngine,
    dry_run,
    dump_config,
    expand_arms,
    jobs_of,
    load_sweep_data,
    parse_config,
    read_records,
    sweep,
)
from midblock.sweeps import engine as engine_module
from midblock.sweeps.engine import weights_digest
from midblock.tuning import Plan
from sweep_helpers import outcome, tiny_values, write_rows


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    folder = tmp_path_factory.mktemp("swept")
    values = tiny_values(folder)
    values["arms"] |= {"full": ["00010"], "random": {"blocks": 2}}
    config = parse_config(values)
    states = []
    result = sweep(config, out=folder / "out", listener=states.append)
    return folder / "out", config, result, states


def test_everything_is_written(swept):
    out, _, result, states = swept
    for name in ("run.json", "config.yaml", "plan.csv", "table.csv", "comparisons.csv", "ranking.csv", "pareto.csv",
                 "arms.csv", "claims.csv", "samples.jsonl", "verdict.txt",
                 "figures/score-answers.svg", "figures/score-texts.pdf",
                 "figures/gain-retention-answers.pdf"):
        assert (out / name).stat().st_size > 0, name
    run = read_run(out)
    assert run["status"] == "finished"
    assert run["command"] == "sweep"
    assert run["models"]["base"]["fingerprint"]
    table = pd.read_csv(out / "table.csv", dtype={"layer": str, "mask": str, "arm": str, "task": str})
    assert {"kind", "layer", "metric", "side", "value", "low", "high", "n", "arm", "mask", "seed", "task", "method",
            "params", "tokens_per_second", "seconds", "peak_memory"} <= set(table.columns)
    base = table[table["side"] == "base"]
    assert set(base["layer"]) == {"00000"}
    assert set(table[table["side"] == "sft"]["arm"]) == {"11111", "00100", "random2-0", "full-00010"}
    # how much of the baseline's gain each other arm reaches
    whole = table[table["seed"].isna() & (table["task"] == "answers") & table["side"].isin(["base", "sft"])]
    loss = dict(zip(whole["arm"], whole["value"], strict=True))
    shares = whole[whole["share"].notna()].set_index("arm")
    assert set(shares.index) == {"00100", "random2-0", "full-00010"}
    for arm in shares.index:
        want = (loss[arm] - loss["base"]) / (loss["11111"] - loss["base"])
        assert shares.loc[arm, "share"] == pytest.approx(want, rel=1e-6)
        assert not shares.loc[arm, "share_low"] > shares.loc[arm, "share_high"]
    assert table[table["role"] == "retention"]["share"].isna().all()
    lines = [json.loads(x) for x in (out / "samples.jsonl").read_text().splitlines()]
    assert len(lines) == (1 + 4 * 2) * (10 + 6)
    assert set(lines[0]) == {"arm", "learning_rate", "seed", "task", "item", "score"}
    assert (out / "verdict.txt").read_text().strip() == result.summary()
    assert len(states) == 10
    assert states[-1].runs_left == 0
    assert states[-1].seconds_left == pytest.approx(0, abs=1e-9)  # sums of many estimates
    assert states[3].seconds_left > 0


def test_the_time_left_follows_the_clock_however_many_runs_go_on_at_once(tmp_path):
    """Runs that say they took a day each, as those of very many workers would, and yet are there at once."""
    write_rows(tmp_path / "train.jsonl", 0, 20)

    class Many(LocalEngine):
        def run(self, jobs, finished, **told):
            super().run(jobs, lambda r: finished(replace(r, seconds=86_400.0)), **told)

    left = []
    start = time.monotonic()
    sweep(parse_config(tiny_values(tmp_path)), out=tmp_path / "out", engine=Many,
          listener=lambda s: left.append(s.seconds_left))
    # after a run of two, what is left takes a time like that of the whole; a day a run would be days
    assert max(left[1:]) < 100 * (time.monotonic() - start)


def test_every_arm_learns_and_has_its_own_figures(swept):
    _, _, result, _ = swept
    by_arm = {}
    for record in result.records:
        by_arm.setdefault(record.arm, []).append(record.tasks["answers"].value)
    base = by_arm.pop("base")[0]
    assert all(v < base for values in by_arm.values() for v in values)
    # seeds start and order differently, so they end differently
    assert all(len(set(v)) == 2 for v in by_arm.values())
    for record in result.records[1:]:
        assert record.plan["params"] > 0
        assert len(record.training["losses"]) == 6
        assert record.training["tokens_per_second"] > 0
        assert record.peak_memory_bytes > 0


def test_scores_equal_those_of_a_run_by_itself(swept, tmp_path):
    """Shared prefixes, cached evaluation states and earlier arms change nothing: train one arm alone."""
    _, config, result, _ = swept
    alone = config.model_copy(update={"cache": "none"})
    loaded = load_model(config.model, dtype="float32", device="cpu")
    arms = [a for a in expand_arms(config, loaded) if a.name in ("00100", "full-00010")]
    for job in jobs_of(arms, [1])[1:]:
        found = []
        LocalEngine(alone, loaded, load_sweep_data(config)).run([job], found.append)
        swept_one = next(r for r in result.records if r.arm == job.name and r.seed == 1)
        assert np.allclose(found[0].training["losses"], swept_one.training["losses"], rtol=1e-5)
        for task in ("answers", "texts"):
            assert np.allclose(found[0].tasks[task].scores, swept_one.tasks[task].scores, rtol=1e-4)


def test_scoring_passes_over_shared_blocks_and_equals_evaluate(swept):
    _, config, _, _ = swept
    loaded = load_model(config.model, dtype="float32", device="cpu")
    engine = LocalEngine(config, loaded, load_sweep_data(config))
    whole = evaluate(loaded, "answer_loss", data=engine.data.items["answers"])
    first = engine.scorer.score("answers", first_block=2)
    assert engine.scorer.blocks_passed_over == 0
    again = engine.scorer.score("answers", first_block=2)
    deeper = engine.scorer.score("answers", first_block=4)
    assert engine.scorer.blocks_passed_over == 2 * 10 * 2  # two scorings of ten items pass over two blocks
    for scores in (first, again, deeper):
        assert scores.scores == [float(s) for s in whole.scores]
        assert scores.items == list(whole.items)


def test_the_prefix_is_computed_once_for_arms_that_share_it(tmp_path):
    values = tiny_values(tmp_path)
    values["arms"] = {"baseline": "00100", "full": ["00100"]}
    result = sweep(parse_config(values), out=tmp_path / "out")
    computed = [r.training["prefix"]["rows_computed"] for r in result.records[1:]]
    assert computed == [12, 0, 0, 0]  # twelve rows, once for two arms and two seeds


def test_a_deeper_arm_goes_on_from_the_prefix_of_the_one_before(tmp_path):
    values = tiny_values(tmp_path)
    values["arms"] = {"baseline": "11111", "singles": 5}
    values["training"]["order"] = "random"
    result = sweep(parse_config(values), out=tmp_path / "out")
    prefix = {(r.arm, r.seed): r.training["prefix"] for r in result.records[1:]}
    first_seed = {arm: p for (arm, seed), p in prefix.items() if seed == 0}
    assert [first_seed[a]["rows_extended"] for a in ("01000", "00100", "00010", "00001")] == [0, 12, 12, 12]
    assert all(p["rows_computed"] == 0 for (arm, seed), p in prefix.items() if seed == 1)
    alone = sweep(parse_config(values | {"cache": "none"}), out=tmp_path / "alone")
    for got, want in zip(result.records[1:], alone.records[1:], strict=True):
        assert got.training["losses"] == pytest.approx(want.training["losses"], rel=1e-5)


def test_a_failed_arm_is_a_row_and_the_others_go_on(tmp_path, monkeypatch):
    values = tiny_values(tmp_path)
    values["arms"]["explicit"] = [{"name": "burns", "mask": "00001", "learning_rate": 0.02}]
    original = engine_module.train

    def train(attachment, rows, **options):
        if attachment.plan.mask == "00001":
            # the state after a real overflow; training itself must notice and stop
            with torch.no_grad():
                next(iter(attachment.trainable.values())).fill_(float("nan"))
        return original(attachment, rows, **options)

    monkeypatch.setattr(engine_module, "train", train)
    result = sweep(parse_config(values), out=tmp_path / "out")
    failed = {r.key: r for r in result.failed}
    assert set(failed) == {"burns__lr0.02__seed0", "burns__lr0.02__seed1"}
    assert all("TrainingError" in r.reason and "Traceback" in r.traceback for r in failed.values())
    assert not any(r.tasks for r in failed.values())
    assert len(result.records) == 7
    assert "2 of 7 runs failed and have no score: burns__lr0.02__seed0, burns__lr0.02__seed1." in result.summary()
    run = read_run(tmp_path / "out")
    assert run["status"] == "finished"
    assert set(run["results"]["failed"]) == set(failed)
    monkeypatch.undo()
    # resuming tries failed runs again and keeps the others
    kept = (tmp_path / "out" / "results" / "base.json").stat().st_mtime_ns
    again = sweep(parse_config(values), out=tmp_path / "out", resume=True)
    assert (tmp_path / "out" / "results" / "base.json").stat().st_mtime_ns == kept
    assert not again.failed
    assert {r.seed for r in again.records if r.arm == "burns"} == {0, 1}


def test_an_arm_that_moves_nothing_fails(tmp_path):
    values = tiny_values(tmp_path)
    values["training"]["full_learning_rates"] = [1e-30]
    values["arms"]["full"] = ["00100"]
    result = sweep(parse_config(values), out=tmp_path / "out")
    assert {r.arm for r in result.failed} == {"full-00100"}
    assert "did not move" in result.failed[0].reason


def test_the_base_survives_every_arm_and_damage_stops_the_sweep(tmp_path, monkeypatch):
    values = tiny_values(tmp_path)
    values["arms"]["full"] = ["00010"]
    config = parse_config(values)
    loaded = load_model(config.model, dtype="float32", device="cpu")
    before = weights_digest(loaded.model)
    sweep(config, out=tmp_path / "out", loaded=loaded)
    assert weights_digest(loaded.model) == before
    assert all(not p.requires_grad or p.grad is None for p in loaded.model.parameters())

    original = engine_module.train

    def careless(attachment, rows, **options):
        with torch.no_grad():
            attachment.anatomy.final_norm.weight.add_(1e-3)
        return original(attachment, rows, **options)

    monkeypatch.setattr(engine_module, "train", careless)
    with pytest.raises(TrainingError, match=r"base's weights changed during 11111, learning rate 0.01, seed 0"):
        sweep(config, out=tmp_path / "damaged")
    assert set(read_records(tmp_path / "damaged")) == {"base"}  # nothing that could be wrong was kept


def test_digest_sees_a_single_bit():
    model = torch.nn.Linear(3, 3)
    before = weights_digest(model)
    with torch.no_grad():
        model.weight.view(torch.int32)[0, 0] ^= 1
    assert weights_digest(model) != before


def test_learning_rate_grid_is_settled_on_validation_rows(tmp_path):
    values = tiny_values(tmp_path)
    values["train"]["validation"] = 4
    values["training"]["learning_rates"] = [0.01, 0.0001]
    values["seeds"] = [0]
    result = sweep(parse_config(values), out=tmp_path / "out")
    assert result.statistics.rates == {"11111": 0.01, "00100": 0.01}
    losses = {r.key: r.validation_loss for r in result.records}
    assert losses["11111__lr0.01__seed0"] < losses["11111__lr0.0001__seed0"]


def test_training_on_evaluation_items_is_refused(tmp_path):
    values = tiny_values(tmp_path)
    values["evaluation"][0]["data"] = values["train"]["data"]
    with pytest.raises(DataError, match="12 of the 12 items of answers also occur in the training rows"):
        sweep(parse_config(values), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_folder_must_be_free_and_settings_the_same(swept, tmp_path):
    out, config, _, _ = swept
    with pytest.raises(OutputError, match="--resume"):
        sweep(config, out=out)
    with pytest.raises(SettingsError, match="budget was"):
        sweep(config.model_copy(update={"budget": "match:11111@1"}), out=out, resume=True)


def test_a_finished_sweep_is_extended_by_arms_and_seeds(tmp_path):
    values = tiny_values(tmp_path)
    values["arms"], values["seeds"] = {"masks": ["10", "11"]}, [0]
    out = tmp_path / "out"
    sweep(parse_config(values), out=out)
    before = {p.name: p.stat().st_mtime_ns for p in (out / "results").iterdir()}
    more = {**values, "arms": {"masks": ["01", "10", "11"]}, "seeds": [0, 1]}
    extended = sweep(parse_config(more), out=out, resume=True)
    assert {p.name: p.stat().st_mtime_ns for p in (out / "results").iterdir() if p.name in before} == before
    whole = sweep(parse_config(more), out=tmp_path / "whole")
    assert [r.key for r in extended.records] == [r.key for r in whole.records]
    for one, other in zip(extended.records, whole.records, strict=True):
        assert {k: t.scores for k, t in one.tasks.items()} == {k: t.scores for k, t in other.tasks.items()}
    # an arm of the same name with another plan is not the one that was run
    other = {**values, "arms": {"explicit": [{"name": "10", "mask": "01"}]}}
    again = sweep(parse_config(other), out=out, resume=True)
    changed = next(r for r in again.records if r.arm == "10")
    assert changed.plan["mask"] == "01"


def test_resume_of_a_finished_sweep_trains_nothing(swept):
    out, config, result, _ = swept
    before = {p.name: p.stat().st_mtime_ns for p in (out / "results").iterdir()}
    again = sweep(config, out=out, resume=True)
    assert {p.name: p.stat().st_mtime_ns for p in (out / "results").iterdir()} == before
    assert again.summary() == result.summary()


def test_kill_9_loses_at_most_the_running_run(tmp_path):
    values = tiny_values(tmp_path)
    values["arms"] |= {"singles": 3}
    config_file = tmp_path / "sweep.yaml"
    config_file.write_text(dump_config(parse_config(values)))
    out = tmp_path / "out"
    script = (f"from midblock.sweeps import sweep\nsweep({str(config_file)!r}, out={str(out)!r})\n")
    environment = {**os.environ, "PYTHONPATH": str(Path(engine_module.__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-c", script], env=environment, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while len(list((out / "results").glob("[!.]*.json"))) < 2:
        assert process.poll() is None, "the sweep ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    left = read_records(out)  # every file that is there is whole
    assert 2 <= len(left) < 11
    times = {k: (out / "results" / f"{k}.json").stat().st_mtime_ns for k in left}
    assert read_run(out)["status"] == "running"
    resumed = sweep(config_file, out=out, resume=True)
    assert {k: (out / "results" / f"{k}.json").stat().st_mtime_ns for k in left} == times
    assert len(resumed.records) == 11
    assert not resumed.failed
    # and the whole is that of an uninterrupted sweep, down to the words of the verdict
    whole = sweep(config_file, out=tmp_path / "whole")
    assert (out / "verdict.txt").read_text() == (tmp_path / "whole" / "verdict.txt").read_text()
    for one, other in zip(resumed.records, whole.records, strict=True):
        assert one.key == other.key
        for task in one.tasks:
            assert np.allclose(one.tasks[task].scores, other.tasks[task].scores, rtol=1e-4)


# ---------------------------------------------------------------- EVA's ranks, starts of LoRA


def test_arms_with_evas_ranks_stand_beside_the_others_at_their_budget(tmp_path):
    values = tiny_values(tmp_path)
    values["arms"] |= {"eva": ["11111"], "explicit": [{"name": "mine", "mask": "00110", "ranks": "eva"}]}
    values["seeds"] = [0]
    config = parse_config(values)
    assert {a.name: a.rank for a in expand_arms(config, load_model(values["model"]))} == {
        "11111": 2, "00100": 10, "eva-11111": "by EVA", "mine": "by EVA"}
    result = sweep(config, out=tmp_path / "out")
    assert not result.failed
    records = {r.arm: r for r in result.records}
    budget = records["11111"].plan["params"]
    for name in ("eva-11111", "mine"):
        plan = Plan.from_dict(records[name].plan)
        assert plan.own_ranks
        assert plan.budget == budget
        assert abs(plan.params - budget) <= max(m.cost_per_rank for m in plan.modules) / 2
        assert records[name].training["losses"][-1] < records[name].training["losses"][0]
    table = pd.read_csv(tmp_path / "out" / "plan.csv", dtype=str).set_index("arm")
    own = Plan.from_dict(records["eva-11111"].plan).own_ranks.values()
    assert min(own) < 2 < max(own)
    assert table.loc["eva-11111", "rank"] == f"{min(own)}-{max(own)}"
    assert table.loc["eva-11111", "method"] == "lora-eva"
    tidy = pd.read_csv(tmp_path / "out" / "table.csv", dtype={"mask": str})
    assert set(tidy[tidy["arm"] == "eva-11111"]["method"]) == {"lora-eva"}
    # resumed, nothing is trained again
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out" / "results").iterdir()}
    sweep(config, out=tmp_path / "out", resume=True)
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out" / "results").iterdir()} == before


def test_a_sweep_of_arms_that_begin_from_the_weights(tmp_path):
    values = tiny_values(tmp_path)
    values["training"]["init"] = "pissa"
    values["arms"] |= {"full": ["00100"]}
    values["seeds"] = [0]
    begun = sweep(parse_config(values), out=tmp_path / "out")
    values["training"]["init"] = "eva"
    others = sweep(parse_config(values), out=tmp_path / "eva")
    assert not begun.failed
    assert not others.failed
    losses = [{r.arm: r.training["losses"] for r in result.records if r.training} for result in (begun, others)]
    # another start, another way down; a full-rank arm has none
    assert losses[0]["00100"][-1] != losses[1]["00100"][-1]
    assert losses[0]["full-00100"] == losses[1]["full-00100"]
    values["training"]["init"] = "pissa"
    values["arms"]["explicit"] = [{"name": "d", "mask": "00100", "method": "dora"}]
    with pytest.raises(SettingsError, match="init pissa starts plain LoRA"):
        sweep(parse_config(values), out=tmp_path / "bad")


def test_a_grid_is_searched_on_the_first_seeds_and_the_others_train_what_they_chose(tmp_path):
    values = tiny_values(tmp_path)
    values["seeds"] = [3, 1, 2]
    values["train"]["validation"] = 4
    values["training"] |= {"learning_rates": [1e-5, 0.01], "rate_seeds": 1}
    values["arms"]["full"] = ["00100"]  # one rate only: nothing to search
    write_rows(tmp_path / "train.jsonl", 0, 20)
    config = parse_config(values)
    states = []
    result = sweep(config, out=tmp_path / "out", listener=lambda s: states.append((s.runs_left, s.seconds_left)))
    runs = {(r.arm, r.learning_rate, r.seed) for r in result.records[1:]}
    assert runs == {(arm, rate, 3) for arm in ("11111", "00100") for rate in (1e-5, 0.01)} \
        | {(arm, 0.01, seed) for arm in ("11111", "00100") for seed in (1, 2)} \
        | {("full-00100", 0.003, seed) for seed in (3, 1, 2)}
    assert result.statistics.rates == {"11111": 0.01, "00100": 0.01, "full-00100": 0.003}
    assert all(m.seeds("11111") == 3 for m in result.statistics.matrices.values())
    assert [runs_left for runs_left, _ in states] == list(range(12, -1, -1))
    assert states[-1][1] == pytest.approx(0, abs=1e-9)

    # what a search run and a later one leave behind is found again, and only what is lost is done anew
    kept = read_records(tmp_path / "out")
    for key in ("00100__lr1e-05__seed3", "00100__lr0.01__seed2"):
        (tmp_path / "out" / "results" / f"{key}.json").unlink()
    again = []
    resumed = sweep(config, out=tmp_path / "out", resume=True, listener=lambda s: again.append(s.runs_left))
    assert again == [3, 2, 0]  # until the search is over, the first rate of the grid stands for what it finds
    assert {r.key: outcome(r) for r in resumed.records} == {key: outcome(r) for key, r in kept.items()}

    # a grid grows too, and only what is new is trained; how arms are trained stays
    values["training"]["learning_rates"] = [0.01, 0.03]
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "results").iterdir()}
    grown = sweep(parse_config(values), out=tmp_path / "out", resume=True)
    assert before.items() <= {p: p.stat().st_mtime_ns for p in (tmp_path / "out" / "results").iterdir()}.items()
    assert {r.learning_rate for r in grown.records if r.arm == "00100" and r.seed == 3} == {0.01, 0.03}
    best = grown.statistics.rates["00100"]
    assert {r.learning_rate for r in grown.records if r.arm == "00100" and r.seed != 3} == {best}
    values["training"]["steps"] = 7
    with pytest.raises(SettingsError, match=r"training\.steps was 6, now 7"):
        sweep(parse_config(values), out=tmp_path / "out", resume=True)


def test_every_seed_searches_where_rate_seeds_are_as_many_or_none(tmp_path):
    values = tiny_values(tmp_path)
    values["train"]["validation"] = 4
    write_rows(tmp_path / "train.jsonl", 0, 20)
    values["training"]["learning_rates"] = [0.001, 0.01]
    found = set()
    for number in (0, 2, 5):
        values["training"]["rate_seeds"] = number
        plan = dry_run(parse_config(values))
        found.add(tuple(j.key for j in plan.jobs))
        assert len(plan.jobs) == 1 + 2 * 2 * 2
        assert all(plan.is_settled(j) for j in plan.jobs)
    assert len(found) == 1
