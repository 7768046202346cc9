"""ILA: exact gates, planted truth, the epsilon-stable stop, resuming, plans."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from analysis_helpers import loaded
from midblock.analysis.gradients import supervised_batches
from midblock.errors import OutputError, SettingsError
from midblock.selection.choice import chosen_units, make_plans, parse_choice, write_plans
from midblock.selection.gates import Gates, ScoreOptimizer, gated, update_norms, update_worths
from midblock.selection.ila import ImportanceResult, _table, importance
from midblock.selection.ila_stages import ScoreSet, loss_slope
from midblock.selection.units import SCORES, top_units, units_of
from midblock.settings import ImportanceSettings
from midblock.tuning import load_plan, make_plan, require_plan_fits
from midblock.tuning.adapter import attach
from midblock.tuning.plan import ModulePlan
from selection_helpers import QUICK, alphabet, lead, planted


def _fill(attachment: Any, seed: int = 0) -> None:
    """Give every B random values, so that every update is there."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in attachment.trainable.items():
            if "lora_B" in name:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_gates_scale_updates_and_nothing_else(family: str) -> None:
    model = loaded(family)
    plan = make_plan(model, mask="1", rank=3, target_modules=["all-linear"])
    batches, _ = supervised_batches(model, alphabet(4), max_length=16, batch_size=4)
    inputs = {"input_ids": batches[0].input_ids, "attention_mask": batches[0].attention_mask}
    before = {n: p.clone() for n, p in model.model.named_parameters()}
    bare = model.model(**inputs).logits
    with attach(model, plan) as attachment:
        _fill(attachment)
        full = model.model(**inputs).logits
        unit_of = units_of(plan, "matrix")
        gates = Gates(list(unit_of), unit_of)
        with gated(attachment, gates), torch.no_grad():
            assert torch.allclose(model.model(**inputs).logits, full, atol=1e-5)
            gates.values = torch.zeros(len(unit_of))
            assert torch.equal(model.model(**inputs).logits, bare)
        assert torch.equal(model.model(**inputs).logits, full)
        assert not torch.allclose(full, bare, atol=1e-3)
        assert all(p.requires_grad for p in attachment.trainable.values())
    assert all(torch.equal(p, before[n]) for n, p in model.model.named_parameters())


@pytest.mark.parametrize("unit", ["matrix", "block"])
def test_worths_and_norms_equal_those_of_dense_updates(unit: Any) -> None:
    model = loaded("llama")
    plan = make_plan(model, mask="1", rank=3, target_modules=["all-linear"])
    batches, _ = supervised_batches(model, alphabet(4), max_length=16, batch_size=4)
    unit_of = units_of(plan, unit)
    units = list(dict.fromkeys(unit_of.values()))
    with attach(model, plan) as attachment:
        _fill(attachment)
        gates = Gates(units, unit_of)
        updates = {}
        for module in unit_of:
            layer: Any = attachment.base.get_submodule(module)
            updates[module] = layer.get_delta_weight("default").detach().clone()
        worth = {at: update_worths(attachment, gates, batches, at=at)[0] for at in (0.0, 1.0)}
        norms = update_norms(attachment, gates)
    # the same by dense gradients of the base's own weights
    for at in (0.0, 1.0):
        weights = {m: model.model.get_parameter(f"{m}.weight") for m in unit_of}
        with torch.no_grad():
            for module, weight in weights.items():
                weight.add_(updates[module], alpha=at)
        loss = model.model(input_ids=batches[0].input_ids, attention_mask=batches[0].attention_mask,
                           labels=batches[0].labels).loss
        grads = dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))
        with torch.no_grad():
            for module, weight in weights.items():
                weight.sub_(updates[module], alpha=at)
        for i, name in enumerate(units):
            mine = [m for m, u in unit_of.items() if u == name]
            want = sum(float((grads[m] * updates[m]).sum()) for m in mine)
            assert float(worth[at][i]) == pytest.approx(want, abs=2e-5, rel=1e-3)
            size = sum(float(updates[m].square().sum()) for m in mine) ** 0.5
            assert float(norms[i]) == pytest.approx(size, rel=1e-5)


def test_gates_refuse_other_adapters() -> None:
    model = loaded("llama")
    plan = make_plan(model, mask="1", rank=2, method="dora")
    unit_of = units_of(plan, "matrix")
    with attach(model, plan) as attachment, pytest.raises(SettingsError, match="plain LoRA"), \
            gated(attachment, Gates(list(unit_of), unit_of)):
        pass


def test_a_score_without_influence_stays_behind() -> None:
    """One second moment for all: Adam's own would move the second score as far as the first."""
    scores = torch.zeros(2, dtype=torch.float64)
    optimizer = ScoreOptimizer(scores, 0.1)
    for _ in range(50):
        optimizer.step(torch.tensor([-1.0, -1e-3], dtype=torch.float64))
    assert scores[0] == pytest.approx(5.0, rel=0.02)
    assert scores[1] < 0.01


@pytest.mark.parametrize("block", [0, 2, 3])
def test_the_planted_block_is_found(block: int) -> None:
    found = importance(planted(block), data=alphabet(), unit="block", **QUICK)
    assert found.curve[-1][1] < found.curve[0][1] - 1.5  # the task was learned
    best, margin = lead(list(found.scores().values()))
    assert best == block
    assert margin > 1.0
    # by the first-order worth at the base weights too; the size of an update misleads here
    assert lead(list(found.scores("taylor_base").values()))[0] == block
    assert lead(list(found.scores("update_norm").values()))[0] != block


def test_matrices_of_the_planted_block_are_chosen() -> None:
    found = importance(planted(2), data=alphabet(), **QUICK)
    best = top_units(found.scores(), 0.2)
    inside = sum(".layers.2." in unit for unit in best)
    assert inside >= 0.8 * len(best)
    random = top_units(found.scores("random"), 0.2)
    assert sum(".layers.2." in unit for unit in random) < 0.8 * len(random)


def test_nothing_planted_gives_no_clear_winner() -> None:
    for seed in (0, 1):
        found = importance(planted(None, seed), data=alphabet(), unit="block", seed=seed, **QUICK)
        values = list(found.scores().values())
        assert lead(values)[1] < 0.8
        assert min(values) > 0.5 * max(values)


def test_the_stop_is_epsilon_stability() -> None:
    assert loss_slope([(0, 1.0)], 2) is None
    assert loss_slope([(0, 9.0), (10, 3.0), (20, 2.0), (30, 1.0)], 3) == pytest.approx(-0.1)
    loose = importance(planted(1), data=alphabet(), **{**QUICK, "epsilon": 10.0})
    assert loose.curve[-1][0] == 20  # three looks: at 0, 10 and 20
    assert "epsilon-stable" in loose.stopped
    strict = importance(planted(1), data=alphabet(), **{**QUICK, "max_steps": 30, "epsilon": 1e-9})
    assert strict.curve[-1][0] == 30
    assert strict.stopped.startswith("not stable")
    assert "not stable" in strict.summary()


def test_a_penalty_lowers_scores() -> None:
    free = importance(planted(1), data=alphabet(), unit="block", **QUICK)
    held = importance(planted(1), data=alphabet(), unit="block", penalty=0.2, **QUICK)
    assert sum(held.scores().values()) < sum(free.scores().values()) - 1
    assert lead(list(held.scores().values()))[0] == 1


def test_runs_are_seeded_and_steps_compared() -> None:
    short = {**QUICK, "max_steps": 20, "score_steps": 5}
    one = importance(planted(1), data=alphabet(), at_steps=(10,), **short)
    two = importance(planted(1), data=alphabet(), at_steps=(10,), **short)
    other = importance(planted(1), data=alphabet(), seed=1, **short)
    assert one.frame.equals(two.frame)
    assert one.scores() != other.scores()
    assert sorted(set(one.frame["step"])) == [10, 20]
    # looking at step 10 did not change what came after
    plain = importance(planted(1), data=alphabet(), **short)
    assert plain.scores() == one.scores()


@pytest.mark.parametrize("stop_at", [("stage 1", 7), ("stage 1", 13), ("stage 2", 4)])
def test_an_interrupted_run_ends_as_an_uninterrupted_one(tmp_path: Path, stop_at: tuple[str, int],
                                                         caplog: pytest.LogCaptureFixture) -> None:
    short = {**QUICK, "max_steps": 20, "score_steps": 8, "at_steps": (10,)}
    whole = importance(planted(1), data=alphabet(), **short)
    done = {"stage 1": 0, "stage 2": 0}

    def interrupt(what: str, step: float, total: float, note: str = "") -> None:
        name = what.split(":")[0]
        done[name] += 1
        if (name, done[name]) == stop_at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        importance(planted(1), data=alphabet(), state_folder=tmp_path, save_seconds=0.0, progress=interrupt, **short)
    seen: list[str] = []
    again = importance(planted(1), data=alphabet(), state_folder=tmp_path, save_seconds=0.0,
                       progress=lambda what, *_: seen.append(what), **short)
    assert again.frame.equals(whole.frame)
    assert again.curve == whole.curve
    assert len(seen) < 20 + 2 * 8
    # a finished run is not trained again; another one is refused
    seen.clear()
    assert importance(planted(1), data=alphabet(), state_folder=tmp_path, progress=lambda what, *_: seen.append(what),
                      **short).frame.equals(whole.frame)
    assert not seen
    with pytest.raises(OutputError, match="other settings"):
        importance(planted(1), data=alphabet(), state_folder=tmp_path, **{**short, "rank": 3})
    written = bytearray((tmp_path / "importance.safetensors").read_bytes())
    written[-3] ^= 1
    (tmp_path / "importance.safetensors").write_bytes(bytes(written))
    # damaged progress is said, and learned anew
    for content, why in ((bytes(written), "its digest does not fit"), (b"cut short", "cannot be read")):
        (tmp_path / "importance.safetensors").write_bytes(content)
        caplog.clear()
        anew = importance(planted(1), data=alphabet(), state_folder=tmp_path, **short)
        assert anew.frame.equals(whole.frame)
        assert why in caplog.text
        assert "Everything is learned anew." in caplog.text


@pytest.mark.parametrize("short", [13, 20])
def test_a_stage_that_was_not_stable_goes_on_where_more_steps_are_allowed(tmp_path: Path, short: int) -> None:
    wanted = {**QUICK, "epsilon": 1e-9, "score_steps": 5, "check_every": 10}
    first = importance(planted(1), data=alphabet(), state_folder=tmp_path, **{**wanted, "max_steps": short})
    assert first.stopped.startswith("not stable")
    longer = {**wanted, "max_steps": 40}
    seen: list[str] = []
    on = importance(planted(1), data=alphabet(), state_folder=tmp_path, progress=lambda what, *_: seen.append(what),
                    **longer)
    assert sum("stage 1" in what for what in seen) == 40 - short
    whole = importance(planted(1), data=alphabet(), **longer)
    assert on.curve == whole.curve
    assert on.scores() == whole.scores()
    # what the shorter one found is kept as scores on the way
    assert [(s.step, s.final) for s in on.sets] == [(short, False), (40, True)]
    assert on.sets[0].scores["ila_score"] == list(first.scores().values())
    # fewer steps than were taken change nothing
    seen.clear()
    same = importance(planted(1), data=alphabet(), state_folder=tmp_path, progress=lambda what, *_: seen.append(what),
                      **{**wanted, "max_steps": short})
    assert not seen
    assert same.scores() == on.scores()


def test_a_stable_stage_does_not_go_on(tmp_path: Path) -> None:
    wanted = {**QUICK, "epsilon": 10.0, "score_steps": 5}
    first = importance(planted(1), data=alphabet(), state_folder=tmp_path, **wanted)
    seen: list[str] = []
    again = importance(planted(1), data=alphabet(), state_folder=tmp_path, progress=lambda what, *_: seen.append(what),
                       **{**wanted, "max_steps": 500})
    assert not seen
    assert again.frame.equals(first.frame)


def test_plans_of_a_choice_and_its_controls(tmp_path: Path) -> None:
    model = planted(2)
    found = importance(model, data=alphabet(), **{**QUICK, "max_steps": 20, "score_steps": 5})
    plans, missing = make_plans(model, found, parse_choice("top:0.3"))
    names = ("ila", "taylor", "taylor-base", "update-norm", "random")
    assert set(plans) | set(missing) == {f"{n}-top30" for n in names}
    own = plans["ila-top30"]
    assert own.rank == 4
    assert {m.name for m in own.modules} == set(top_units(found.scores(), 0.3))
    for plan in plans.values():
        assert plan.rank_step is not None
        assert abs(plan.params - own.params) <= plan.rank_step / 2
    for name, path in write_plans(tmp_path, plans).items():
        assert require_plan_fits(load_plan(path), model).modules == plans[name].modules
        assert "alphabet" in load_plan(path).origin
    kept, _ = make_plans(model, found, parse_choice("freeze-bottom:0.25"))
    assert len(kept["ila-freeze25"].modules) == 21
    worst = sorted(found.scores().values())[:7]
    assert all(found.scores()[m.name] >= max(worst) for m in kept["ila-freeze25"].modules)


@pytest.mark.parametrize("text", ["top", "top:1.5", "top:0", "best:0.3", "freeze-bottom:x"])
def test_a_choice_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(SettingsError, match=r"top:0\.3"):
        parse_choice(text)


def test_choices_keep_the_order_of_the_model() -> None:
    scores = {"a": 1.0, "b": 3.0, "c": 2.0, "d": 0.0}
    assert chosen_units(scores, parse_choice("top:0.5")) == ["b", "c"]
    assert chosen_units(scores, parse_choice("freeze-bottom:0.25")) == ["a", "b", "c"]
    assert chosen_units(scores, parse_choice("top:0.01")) == ["b"]


def test_settings_out_of_range_are_all_named() -> None:
    with pytest.raises(SettingsError) as caught:
        ImportanceSettings(rank=0, epsilon=0.0, window=1)
    for fault in ("rank must be at least 1", "epsilon must be more than 0", "window must be at least 2"):
        assert fault in str(caught.value)
    with pytest.raises(SettingsError, match="at_steps"):
        ImportanceSettings(max_steps=10, at_steps=(20,))


def _planted_result(values: dict[int, float], losses: list[float]) -> ImportanceResult:
    """A result on 11 blocks of one matrix each, with a score per block and the controls' turned round."""
    modules = tuple(ModulePlan(f"layers.{b}.q_proj", b, "q", 4, 4) for b in values)
    plan = replace(make_plan(loaded("llama"), mask="1", rank=1), modules=modules, num_blocks=11, rank=1)
    unit_of = {m.name: m.name for m in modules}
    scores = {metric: [v if metric == "ila_score" else -v for v in values.values()] for metric in SCORES}
    found = ScoreSet(20, True, scores, {}, losses)
    settings = ImportanceSettings()
    return ImportanceResult(_table(plan, unit_of, [found], settings, "d"), plan, unit_of, [found],
                            [(0, 3.0), (10, 2.0), (20, 1.0)], "epsilon-stable", settings, "d")


def test_the_summary_says_what_the_table_holds() -> None:
    """Zones, best blocks, losses and overlaps with planted values: exchanging any two would show."""
    values = {0: 1.0, 1: 3.0, 2: 10.0, 3: 20.0, 4: 30.0, 5: 50.0, 6: 20.0, 7: 20.0, 8: 10.0, 9: 7.0, 10: 9.0}
    found = _planted_result(values, [5.0, *[3.0] * 18, 1.0])
    text = found.summary()
    frame = found.frame
    own = frame[frame["metric"] == "ila_score"].set_index("layer")["value"]
    assert own.to_dict() == values
    # early: depth 0 and 0.1; late: 0.9 and 1; the borders 0.2 and 0.8 are the middle's
    assert f"early, middle and late blocks: 2.00, {np.mean(list(values.values())[2:9]):.2f}, 8.00;" in text
    assert "highest blocks: 5, 4, 3, 6, 7." in text
    assert "3.000 -> 1.000 nats in 20 steps" in text
    assert "mean loss of the first tenth 4.000, of the last 2.000 nats" in text
    assert "taylor 0.00, taylor_base 0.00, update_norm 0.00, random 0.00" in text  # turned round: the other end
    same = replace(found, sets=[replace(found.final, scores={m: list(values.values()) for m in SCORES})])
    assert "taylor 1.00" in same.summary()


def test_figures_and_table_are_complete() -> None:
    found = importance(planted(1), data=alphabet(), **{**QUICK, "max_steps": 10, "score_steps": 3})
    assert set(found.figures()) == {"importance-ila_score", "importance-taylor", "importance-taylor_base",
                                    "importance-update_norm", "importance-random", "importance-stage1",
                                    "importance-stage2"}
    frame = found.frame
    assert len(frame) == 5 * 28
    assert np.isfinite(frame["value"]).all()
    assert set(frame["kind"]) == {"block"}
