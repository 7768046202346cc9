"""Configuration: YAML as people write it, all faults at once, arms with equal budgets, the dry run."""

from __future__ import annotations

from pathlib import Path

import pytest

from midblock.data import Dataset, Example
from midblock.errors import BudgetError, DataError, SettingsError
from midblock.sweeps import dry_run, dump_config, expand_arms, jobs_of, load_config, load_sweep_data, parse_config
from midblock.sweeps.arms import _within_budget
from midblock.sweeps.data import split_off, token_rows
from midblock.tuning import make_plan
from sweep_helpers import tiny_values

RECIPES = sorted(p for p in (Path(__file__).parents[2] / "recipes").rglob("*.yaml")
                 if p.name != "paper.yaml" and p.parent.name != "accelerate")


def test_a_key_twice_is_refused(tmp_path):
    path = tmp_path / "twice.yaml"
    path.write_text("model: a\nmodel: b\n")
    with pytest.raises(SettingsError, match="'model' occurs twice"):
        load_config(path)


def test_all_faults_at_once_with_their_keys(tmp_path):
    values = tiny_values(tmp_path)
    values["typo"] = 1
    values["train"]["samples"] = "many"
    values["training"]["warmup"] = 2
    values["arms"]["masks"] = ["00100", "012"]
    values["evaluation"].append({"task": "arithmetc"})
    values["seeds"] = []
    with pytest.raises(SettingsError) as caught:
        parse_config(values)
    message = str(caught.value)
    for part in ("6 faults", "unknown key typo", "train.samples must be a whole number, got 'many'",
                 "training.warmup must be less than 1, got 2", "arms.masks.1: mask '012'",
                 "evaluation.1: task 'arithmetc' is not known; did you mean arithmetic", "seeds: "):
        assert part in message, part


def test_faults_between_keys(tmp_path):
    values = tiny_values(tmp_path)
    values["training"]["learning_rates"] = [0.1, 0.01]
    values["retention"] = [{"task": "arithmetic"}]
    values["seeds"] = [1, 1]
    values["evaluation"].append(dict(values["evaluation"][0]))
    with pytest.raises(SettingsError) as caught:
        parse_config(values)
    message = str(caught.value)
    for part in ("train.validation", "retention.0.task: arithmetic is no perplexity", "seeds: [1, 1]",
                 "two tasks are called 'answers'"):
        assert part in message, part


def test_overrides(tmp_path):
    values = tiny_values(tmp_path)
    path = tmp_path / "sweep.yaml"
    path.write_text(dump_config(parse_config(values)))
    config = load_config(path, ["training.steps=3", "evaluation.0.samples=4", "seeds=[7]", "arms.masks=[01000]"])
    assert config.training.steps == 3
    assert config.evaluation[0].samples == 4
    assert config.seeds == [7]
    assert config.arms.masks == ["01000"]
    with pytest.raises(SettingsError, match=r"2 faults(.|\n)*evaluation.9(.|\n)*KEY=VALUE"):
        load_config(path, ["evaluation.9.samples=4", "nonsense"])
    with pytest.raises(SettingsError, match=r"training\.stepz: unknown key"):
        load_config(path, ["training.stepz=3"])


def test_seeds_of_one_arm_are_no_less_alike_than_two_arms(tmp_path):
    values = tiny_values(tmp_path)
    values["statistics"] |= {"expected_correlation": 0.7}
    with pytest.raises(SettingsError, match=r"expected_seed_correlation 0\.6 is below expected_correlation 0\.7"):
        parse_config(values)
    values["statistics"]["expected_seed_correlation"] = 0.7
    assert parse_config(values).statistics.expected_correlation == 0.7


def test_dump_reads_back(tmp_path):
    config = parse_config(tiny_values(tmp_path))
    path = tmp_path / "dumped.yaml"
    path.write_text(dump_config(config))
    assert load_config(path) == config


BAD_YAML = ["{a: 1}: 2", "[1, 2]: 3", "? [a]\n: b", "model: !!int x", "model: " + "9" * 5000, "a: " + "[" * 5000,
            "seeds: [" + "9" * 400 + "]", "- model", "7", "", "model: &a [*a]", "model: !!python/object:os.system {}",
            "arms: {masks: [" + "1" * 100_001 + "]}", "arms: {singles: 1000000000000000}", "model: !!float x"]


@pytest.mark.parametrize("text", BAD_YAML, ids=range(len(BAD_YAML)))
def test_yaml_that_is_no_configuration(tmp_path, text):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(SettingsError, match=r"bad\.yaml") as caught:
        load_config(path)
    assert len(str(caught.value)) < 2000


@pytest.mark.parametrize("value", ["[" * 3000, "!!int x", "9" * 5000, "{a: 1}: 2"])
def test_overrides_that_are_no_values(tmp_path, value):
    path = tmp_path / "sweep.yaml"
    path.write_text(dump_config(parse_config(tiny_values(tmp_path))))
    for key in ("seeds", "evaluation." + "9" * 5000 + ".samples"):
        with pytest.raises(SettingsError):
            load_config(path, [f"{key}={value}"])


def test_engines(tmp_path):
    values = tiny_values(tmp_path)
    assert parse_config(values).engine == parse_config({**values, "engine": "local"}).engine == "local"
    assert parse_config({**values, "engine": "processes", "workers": 3}).workers == 3
    with pytest.raises(SettingsError, match=r"engine 'cluster' is not one of local, processes"):
        parse_config({**values, "engine": "cluster"})
    with pytest.raises(SettingsError, match="workers must be"):
        parse_config({**values, "workers": -1})


def test_equal_texts_stay_on_one_side_of_the_split():
    texts = ["a", "b", "c", "a", "d", "b", "e", "b"]
    rows = Dataset("d", "train", "here", [Example(t, row={"n": n}) for n, t in enumerate(texts)])
    train, validation = split_off(rows, 2)
    assert [e.text for e in validation] == ["b", "b", "b"]  # the last text, with its copies, is enough
    assert [e.text for e in train] == ["a", "c", "a", "d", "e"]
    train, validation = split_off(rows, 4)
    assert [e.text for e in validation] == ["b", "b", "e", "b"]
    assert split_off(rows, 0) == (rows, None)
    assert train.fingerprint != rows.fingerprint != validation.fingerprint
    with pytest.raises(DataError, match="8 rows, 8 of them are wanted for validation"):
        split_off(rows, 8)


def test_loss_on_all_tokens_or_on_answers(tmp_path):
    from conftest import build_tiny_tokenizer

    values = tiny_values(tmp_path)
    data = load_sweep_data(parse_config(values)).train
    answers = token_rows(data, build_tiny_tokenizer(), parse_config(values).train)
    values["train"]["all_tokens"] = True
    everything = token_rows(data, build_tiny_tokenizer(), parse_config(values).train)
    assert all(r.supervised for r in answers)
    assert not any(r.supervised for r in everything)
    assert [r.ids for r in everything] == [r.ids for r in answers]  # both end with the end of sequence


@pytest.mark.parametrize(("recipe"), RECIPES, ids=lambda p: p.stem)
def test_recipes_are_valid(recipe):
    prefix = "" if recipe.parent.name == "recipes" else f"{recipe.parent.name}-"
    assert load_config(recipe).name == prefix + recipe.stem


def _llama(blocks: int = 10):
    from families import FAMILIES

    return FAMILIES["llama"](seed=0, num_hidden_layers=blocks)


def test_every_kind_of_arm_once_at_the_budget(tmp_path):
    values = tiny_values(tmp_path)
    values["arms"] = {"baseline": "11111", "singles": [5], "pairs": 5, "triples": 5, "masks": ["00100", "01110"],
                      "random": {"blocks": 2, "draws": 2}, "full": ["00100"],
                      "explicit": [{"name": "mine", "blocks": "3:6", "rank": 4, "learning_rate": 0.5}]}
    values["budget"] = "match:11111@2"
    arms = {a.name: a for a in expand_arms(parse_config(values), _llama())}
    assert list(arms) == ["11111", "10000", "01000", "00100", "00010", "00001", "11000", "01100", "00110", "00011",
                          "11100", "01110", "00111", "random2-0", "random2-1", "full-00100", "mine"]
    budget = arms["11111"].plan.params
    for name, arm in arms.items():
        if arm.plan.method == "lora" and name != "mine":
            assert abs(arm.plan.params - budget) <= arm.plan.rank_step / 2
            assert arm.plan.scaling == 2.0  # alpha/rank is held over arms
    assert arms["mine"].learning_rates == (0.5,)
    assert arms["mine"].plan.rank == 4
    assert arms["00100"].plan.blocks == (4, 5)
    assert arms["11111"].is_baseline


def test_an_arm_with_other_target_modules_has_the_sweeps_budget(tmp_path):
    values = tiny_values(tmp_path)
    values["arms"] |= {"eva": ["11111"], "explicit": [
        {"name": "all", "mask": "11111", "target_modules": "all-linear"},
        {"name": "own", "mask": "11111", "target_modules": "all-linear", "budget": "match:11111@2"}]}
    values["budget"] = "match:11111@6"
    arms = {a.name: a.plan for a in expand_arms(parse_config(values), _llama())}
    assert arms["all"].budget == arms["11111"].budget == arms["eva-11111"].budget == arms["11111"].params
    assert arms["all"].rank < 6
    assert arms["own"].rank == 2


def test_full_rank_arms_of_equal_size_take_as_many_matrices_as_the_budget(tmp_path):
    values = tiny_values(tmp_path)
    values["arms"] = {"full_equal": ["00100", "10001"], "full_equal_random": {"blocks": 4, "draws": 2}}
    values["budget"] = "match:11111@2"
    arms = {a.name: a for a in expand_arms(parse_config(values), _llama())}
    budget = arms["11111"].plan.params
    assert list(arms) == ["11111", "full-equal-00100", "full-equal-10001", "full-equal-random4-0",
                          "full-equal-random4-1"]
    for name, arm in arms.items():
        plan = arm.plan
        assert plan.params == (budget if name == "11111" else sum(m.inputs * m.outputs for m in plan.modules))
        smallest = min(m.inputs * m.outputs for m in plan.modules)
        assert abs(plan.params - budget) <= smallest
    assert arms["full-equal-00100"].method == "full-equal"
    assert arms["full-equal-00100"].plan.mask == "00100"
    assert arms["full-equal-random4-0"].is_random
    assert set(arms["full-equal-00100"].plan.blocks) <= {4, 5}


def test_matrices_are_spread_over_blocks_and_kinds():
    whole = make_plan(_llama(), mask="11000", method="full", target_modules=["q", "k", "v", "o"])
    sizes = {m.kind: m.inputs * m.outputs for m in whole.modules}
    kinds = list(dict.fromkeys(m.kind for m in whole.modules))
    for count in (1, 2, 3, 4):
        wanted = kinds[:count]
        plan = _within_budget(whole, sum(sizes[k] for k in wanted))
        assert [(m.block, m.kind) for m in plan.modules] == list(enumerate(wanted))
        assert plan.blocks == tuple(range(count))
        assert plan.mismatch == 0
    assert _within_budget(whole, 10**9).modules == whole.modules
    smallest = sizes[kinds[0]]
    assert len(_within_budget(whole, smallest // 2).modules) >= 1
    with pytest.raises(BudgetError, match="less than half of one matrix"):
        _within_budget(whole, min(sizes.values()) // 2 - 1)


@pytest.mark.parametrize("name", ["..", ".hidden", "two words", "base", "x" * 300])
def test_plan_files_whose_name_cannot_be_an_arm(tmp_path, name):
    values = tiny_values(tmp_path)
    path = tmp_path / f"{name[:200]}.json"
    path.write_text("{}")
    values["arms"]["plans"] = [str(path)]
    with pytest.raises(SettingsError, match=r"arms\.plans"):
        expand_arms(parse_config(values), _llama())


def test_fixed_alpha_lets_the_scale_fall(tmp_path):
    values = tiny_values(tmp_path)
    values["scale"] = "fixed-alpha"
    values["arms"]["singles"] = 5
    arms = {a.name: a.plan for a in expand_arms(parse_config(values), _llama())}
    assert arms["11111"].scaling == pytest.approx(5 * arms["00100"].scaling)


def test_arms_that_do_not_fit_are_all_listed(tmp_path):
    values = tiny_values(tmp_path)
    values["arms"] |= {"singles": 50, "random": {"blocks": 99}}
    values["statistics"]["comparisons"] = [["11111", "nobody"]]
    with pytest.raises(SettingsError) as caught:
        expand_arms(parse_config(values), _llama())
    for part in ("arms.singles", "99 random blocks", "no arm 'nobody'"):
        assert part in str(caught.value)


def test_jobs_go_from_shallow_to_deep_so_that_prefixes_are_shared(tmp_path):
    values = tiny_values(tmp_path)
    values["arms"] |= {"singles": 5, "full": ["00100"]}
    jobs = jobs_of(expand_arms(parse_config(values), _llama()), [0, 1])
    assert jobs[0].arm is None
    starts = [j.arm.plan.first_block for j in jobs[1:]]
    assert starts == sorted(starts)
    assert len(jobs) == 1 + 2 * 7
    assert len({j.key for j in jobs}) == len(jobs)


def test_dry_run_reads_no_weights(tmp_path):
    values = tiny_values(tmp_path)
    values["arms"]["full"] = ["00100"]
    (tmp_path / "model" / "model.safetensors").rename(tmp_path / "weights")
    # the header says what number format the weights have; an empty file of one tensor is enough
    import torch
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "model" / "model.safetensors")
    plan = dry_run(parse_config(values))
    assert list(plan.frame["arm"]) == ["11111", "00100", "full-00100"]
    assert (plan.frame["steps"] == 6).all()
    assert (plan.frame["seconds"] > 0).all()
    assert (plan.frame["peak_bytes"] > 0).all()
    assert plan.frame["mismatch"].iloc[0] == 0
    row = plan.detectable.iloc[0]
    paired = [v for k, v in row.items() if str(k).startswith("paired")]
    unpaired = [v for k, v in row.items() if str(k).startswith("unpaired")]
    assert paired[0] < paired[1] < unpaired[1]  # correction costs, and so does leaving out the pairing
    assert plan.comparisons == 2
    assert len(plan.jobs) == 1 + 3 * 2
    assert "7 runs" in plan.summary()


def test_training_costs_less_behind_a_deep_prefix(tmp_path):
    values = tiny_values(tmp_path)
    values["arms"]["singles"] = 5
    frame = dry_run(parse_config(values)).frame.set_index("arm")
    assert frame.loc["00001", "peak_bytes"] < frame.loc["10000", "peak_bytes"]
    assert frame.loc["00001", "seconds"] < frame.loc["11111", "seconds"]
