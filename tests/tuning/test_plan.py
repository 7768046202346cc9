"""Plans: exact counts against PEFT, solved ranks, configs that match what they name and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict

from families import FAMILIES
from midblock.errors import AdapterError, BlockRangeError, BudgetError, SettingsError
from midblock.models import find_anatomy
from midblock.tuning import (
    Plan,
    budget_of,
    full_blocks_for_budget,
    load_plan,
    lora_config,
    make_plan,
    random_block_set,
    require_plan_fits,
)
from midblock.tuning.plan import Missing, ModulePlan

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_counts_and_modules_are_those_of_peft(family: str, method: str) -> None:
    model = FAMILIES[family]()
    plan = make_plan(model, mask="0110", rank=3, method=method)
    made = get_peft_model(model, plan.lora_config(model))
    trainable = {n: p for n, p in made.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in trainable.values()) == plan.params == sum(map(plan.params_of_block, plan.blocks))
    adapted = {n.split(".lora_")[0].removeprefix("base_model.model.") for n in trainable}
    assert adapted == {m.name for m in plan.modules}
    anatomy = find_anatomy(model)
    assert {anatomy.block_of(n) for n in adapted} == {1, 2} == set(plan.blocks)


@pytest.mark.parametrize("family", ["llama", "gemma3_nested", "gpt2", "t5", "qwen3_moe"])
def test_the_config_survives_json_and_plain_peft_reads_the_adapter(family: str, tmp_path: Path) -> None:
    model = FAMILIES[family]()
    config = lora_config(model, mask="0010", rank=2)
    again = LoraConfig(**{k: v for k, v in json.loads(json.dumps(config.to_dict(), default=list)).items()
                          if k in LoraConfig.__dataclass_fields__ and k not in ("peft_type", "auto_mapping")})
    first = get_peft_model(model, config)
    names = set(get_peft_model_state_dict(first, save_embedding_layers=False))
    first.save_pretrained(tmp_path, save_embedding_layers=False)
    second = get_peft_model(FAMILIES[family](), again)
    assert set(get_peft_model_state_dict(second, save_embedding_layers=False)) == names
    loaded = PeftModel.from_pretrained(FAMILIES[family](), tmp_path)
    assert set(get_peft_model_state_dict(loaded, save_embedding_layers=False)) == names


def test_every_mask_of_equal_budget_is_within_one_rank_step() -> None:
    model = FAMILIES["llama"](num_hidden_layers=10)
    assert budget_of(model) == make_plan(model, mask="11111", rank=16).params
    budget = budget_of(model, "match:11111@3", targets=["attention", "mlp"])
    for mask in ("10000", "01000", "01100", "01110", "0010000000", "010", "11111"):
        plan = make_plan(model, mask=mask, budget=budget, target_modules=["attention", "mlp"])
        assert plan.mismatch is not None
        assert plan.rank_step is not None
        assert abs(plan.mismatch) <= plan.rank_step / 2
        assert plan.scaling == 2.0
        assert plan.budget == budget
    assert make_plan(model, mask="11110").budget == budget_of(model)


def test_the_rank_is_the_nearest_and_the_lower_of_two_equally_near() -> None:
    model = FAMILIES["llama"]()
    step = make_plan(model, mask="0010", rank=1).params
    for wanted, rank in ((step, 1), (round(2.4 * step), 2), (2 * step + step // 2, 2), (round(2.6 * step), 3)):
        assert make_plan(model, mask="0010", budget=wanted).rank == rank


@pytest.mark.parametrize(("budget", "error"), [
    (1, "smaller than rank 1"), (10**9, "needs rank"), (0, "use 1 or more"), ("lots", "neither a number"),
    ("match:11111", "neither a number"), ("match:1@0", "rank of 0")])
def test_budgets_that_cannot_be_met(budget: int | str, error: str) -> None:
    with pytest.raises(BudgetError, match=error):
        make_plan(FAMILIES["llama"](), mask="0010", budget=budget)


def test_written_budgets() -> None:
    model = FAMILIES["llama"]()
    assert budget_of(model, "2.5k") == 2500
    assert budget_of(model, "match:0010@4") == make_plan(model, blocks=[2], rank=4).params


@pytest.mark.parametrize("options", [
    {"mask": "0120"}, {"mask": "00000"}, {"mask": "010101010"}, {"blocks": "2:9"}, {"blocks": [7]},
    {"random_blocks": (5, 0)}])
def test_blocks_that_do_not_fit(options: dict) -> None:
    with pytest.raises(BlockRangeError):
        make_plan(FAMILIES["llama"](), **options)


@pytest.mark.parametrize("options", [
    {}, {"mask": "0010", "blocks": "1"}, {"mask": "0010", "rank": 4, "budget": 4000}, {"mask": "0010", "method": "ia3"},
    {"mask": "0010", "scale": "none"}, {"mask": "0010", "method": "full", "rank": 4}, {"mask": "0010", "alpha": -1.0},
    {"mask": "0010", "target_modules": []}])
def test_options_that_exclude_each_other(options: dict) -> None:
    with pytest.raises(SettingsError):
        make_plan(FAMILIES["llama"](), **options)


def test_targets_that_match_nothing_list_what_was_found() -> None:
    with pytest.raises(SettingsError, match=r"'Wqkv' of .* matches no linear layer.*self_attn\.q_proj \(q, 32->32\)"):
        make_plan(FAMILIES["llama"](), mask="0010", target_modules=["Wqkv"])
    with pytest.raises(SettingsError, match=r"part of the fused matrix 'qkv'.*qkv_proj"):
        make_plan(FAMILIES["phi3"](), mask="0010", target_modules=["q", "v"])
    with pytest.raises(SettingsError, match=r"vision_tower.*no linear layer of a decoder block"):
        make_plan(FAMILIES["gemma3_nested"](), modules=["model.vision_tower.encoder.layers.0.self_attn.q_proj"])


def test_experts_kept_as_modules_are_not_taken_for_blocks() -> None:
    class Experts(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = torch.nn.ModuleList(tf.models.llama.modeling_llama.LlamaMLP(config) for _ in range(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return sum(e(x) for e in self.experts) / 4

    model = FAMILIES["llama"]()
    config = model.config
    for block in model.model.layers:
        block.mlp = Experts()
    with pytest.raises(SettingsError, match="indices are not block indices"):
        make_plan(model, mask="0010", target_modules=["gate_proj"])
    plan = make_plan(model, mask="0010", rank=2)
    assert {m.name for m in plan.modules} == {f"model.layers.2.self_attn.{x}_proj" for x in "qkvo"}


@pytest.mark.parametrize(("targets", "leaves"), [
    (["q_proj"], {"q_proj"}), (["self_attn.v_proj"], {"v_proj"}), (["mlp"], {"gate_proj", "up_proj", "down_proj"}),
    (["all-linear"], {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"})])
def test_targets(targets: list[str], leaves: set[str]) -> None:
    plan = make_plan(FAMILIES["llama"](), blocks="1:3", rank=2, target_modules=targets)
    assert {m.name.rpartition(".")[2] for m in plan.modules} == leaves
    assert plan.params == 2 * sum(m.inputs + m.outputs for m in plan.modules)


def test_groups_mean_what_a_family_has() -> None:
    plan = make_plan(FAMILIES["gpt2"](), blocks="1", rank=2, target_modules=["all-linear"])
    assert {m.name.rpartition(".h.1.")[2] for m in plan.modules} == {"attn.c_attn", "attn.c_proj", "mlp.c_fc",
                                                                    "mlp.c_proj"}
    assert {(m.inputs, m.outputs) for m in plan.modules} == {(32, 96), (32, 32), (32, 128), (128, 32)}


def test_single_modules_and_plan_files(tmp_path: Path) -> None:
    model = FAMILIES["llama"]()
    chosen = ["model.layers.3.mlp.up_proj", "model.layers.0.self_attn.q_proj", "model.layers.3.self_attn.q_proj"]
    plan = make_plan(model, modules=chosen, rank=2)
    assert plan.blocks == (0, 3)
    assert [m.name for m in plan.modules] == [chosen[1], chosen[2], chosen[0]]
    config = plan.lora_config(model)
    assert config.target_modules == set(chosen)  # leaves and layers cannot say this set
    adapted = {n.split(".lora_A")[0].removeprefix("base_model.model.")
               for n, _ in get_peft_model(model, config).named_parameters() if "lora_A" in n}
    assert adapted == set(chosen)
    path = tmp_path / "plan.json"
    plan.save(path)
    assert load_plan(path) == plan == Plan.from_dict(json.loads(json.dumps(plan.to_dict())))
    path.write_text(json.dumps({"plan": plan.to_dict(), "note": "of an importance run"}))
    assert load_plan(path) == plan


def test_without_a_budget_named_modules_get_what_rank_16_takes_on_all_of_their_kind() -> None:
    model = FAMILIES["llama"]()
    plan = make_plan(model, modules=["model.layers.3.self_attn.q_proj", "model.layers.1.self_attn.q_proj"])
    assert plan.budget == 16 * 4 * 64
    assert plan.rank == 32


@pytest.mark.parametrize("content", ["", "[]", '{"blocks": [1]}', "{"])
def test_files_that_are_no_plan(content: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(content)
    with pytest.raises(SettingsError, match="plan"):
        load_plan(path)
    with pytest.raises(SettingsError, match="plan file"):
        load_plan(tmp_path / "absent.json")


def edited(**changes: Any) -> dict[str, Any]:
    return {**make_plan(FAMILIES["llama"](), mask="0110", rank=2).to_dict(), **changes}


PLAN_FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "rank -1": ({"rank": -1}, "rank"), "rank x": ({"rank": "x"}, "rank"), "rank 1e9": ({"rank": 1e9}, "more than rank"),
    "rank 2.5": ({"rank": 2.5}, "rank"), "rank of 5,000 digits": ({"rank": 10**200}, "rank"),
    "no rank": ({"rank": None}, "rank None"), "alpha nan": ({"alpha": "nan"}, "alpha"),
    "alpha 0": ({"alpha": 0}, "alpha"),
    "another method": ({"method": "ia3"}, "method"), "full with a rank": ({"method": "full"}, "method full"),
    "a block that is not there": ({"blocks": [1, 2, 99]}, "names blocks"), "a block less": ({"blocks": [1]}, "names"),
    "blocks as text": ({"blocks": "1:3"}, "blocks"), "no modules": ({"modules": []}, "modules"),
    "modules of numbers": ({"modules": [1, 2]}, "modules"), "a model of 1 block": ({"num_blocks": 1}, "names blocks"),
    "a list for a name": ({"mask": ["0110"]}, "mask"),
    "fewer parameters than none": ({"model_params": -5}, "model_params"),
}


@pytest.mark.parametrize("name", PLAN_FAULTS)
def test_plans_that_cannot_be(name: str, tmp_path: Path) -> None:
    changes, match = PLAN_FAULTS[name]
    (tmp_path / "plan.json").write_text(json.dumps(edited(**changes)))
    with pytest.raises(SettingsError, match=match):
        load_plan(tmp_path / "plan.json")


def test_counts_of_a_plan_file_are_made_anew(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(json.dumps(edited(rank=4, params=5)))
    assert load_plan(tmp_path / "plan.json").params == make_plan(FAMILIES["llama"](), mask="0110", rank=4).params
    moved = edited()
    for module in moved["modules"]:
        module["block"] += 1
    moved["blocks"] = [2, 3]
    (tmp_path / "plan.json").write_text(json.dumps(moved))
    with pytest.raises(AdapterError, match="is in block 2 in the plan and in block 1 here"):
        require_plan_fits(load_plan(tmp_path / "plan.json"), FAMILIES["llama"]())


def test_plans_of_other_models_are_refused() -> None:
    plan = make_plan(FAMILIES["llama"](), mask="0010", rank=2)
    assert require_plan_fits(plan, FAMILIES["qwen2"]()).params == plan.params  # the same names and shapes
    with pytest.raises(AdapterError, match="this one has 8"):
        require_plan_fits(plan, FAMILIES["llama"](num_hidden_layers=8))
    with pytest.raises(AdapterError, match="another model"):
        require_plan_fits(plan, FAMILIES["gpt2"]())
    with pytest.raises(AdapterError, match="32->32 in the plan and 64->64 here"):
        require_plan_fits(plan, FAMILIES["llama"](hidden_size=64))


def test_scales() -> None:
    model = FAMILIES["llama"]()
    for rank in (4, 16):
        assert make_plan(model, mask="0010", rank=rank).scaling == 2.0
        assert make_plan(model, mask="0010", rank=rank, scale="fixed-alpha").scaling == 128 / rank
        rslora = make_plan(model, mask="0010", rank=rank, scale="rslora")
        assert rslora.scaling == pytest.approx(2.0 * (16 / rank) ** 0.5)
        made = get_peft_model(FAMILIES["llama"](), rslora.lora_config(model))
        layer = made.base_model.model.model.layers[2].self_attn.q_proj
        assert layer.scaling["default"] == pytest.approx(rslora.scaling)
    assert make_plan(model, mask="0010", rank=4, alpha=10).scaling == 2.5


def test_full_rank_counts() -> None:
    model = FAMILIES["llama"]()
    plan = make_plan(model, mask="0010", method="full")
    block = model.model.layers[2]
    assert plan.params == sum(p.numel() for n, p in block.named_parameters() if "self_attn" in n)
    whole = make_plan(model, mask="0010", method="full", target_modules=["all"])
    assert whole.params == sum(p.numel() for p in block.parameters())
    assert full_blocks_for_budget(model, 3 * plan.params + 5) == 3
    with pytest.raises(SettingsError, match="no LoraConfig"):
        lora_config(model, mask="0010", method="full")


def test_random_blocks_depend_on_the_seed_alone() -> None:
    assert random_block_set(6, 30, 1) == random_block_set(6, 30, 1) != random_block_set(6, 30, 2)
    plan = make_plan(FAMILIES["llama"](num_hidden_layers=30), random_blocks=(6, 1), rank=2)
    assert list(plan.blocks) == random_block_set(6, 30, 1)


def test_summary_and_table() -> None:
    plan = make_plan(FAMILIES["llama"](), mask="0110", rank=4)
    assert ".##." in plan.summary()
    assert "rank 4, alpha 8, update scaled by 2" in plan.summary()
    table = plan.table()
    assert table["parameters"].sum() == plan.params
    assert list(table["block"]) == [1, 2]


def test_a_plan_needs_no_weights() -> None:
    with torch.device("meta"):
        model = tf.LlamaForCausalLM(FAMILIES["llama"]().config)
    assert make_plan(find_anatomy(model), mask="0110").params == make_plan(FAMILIES["llama"](), mask="0110").params


# ---------------------------------------------------------------------------------------------
# what a plan says of itself, to the letter


def q_and_down(block: int) -> tuple[ModulePlan, ModulePlan]:
    return (ModulePlan(f"model.layers.{block}.self_attn.q_proj", block, "q", 30, 20),
            ModulePlan(f"model.layers.{block}.mlp.down_proj", block, "down", 900, 100))


def planted_plan(**changes: Any) -> Plan:
    values = {"method": "lora", "num_blocks": 6, "blocks": (1, 2, 4), "rank": 3, "alpha": 6.0, "scale": "fixed-ratio",
              "modules": tuple(m for b in (1, 2, 4) for m in q_and_down(b)), "params": 9450, "budget": 9_000,
              "model_params": 1_000_000, "targets": ("q", "down"), "mask": "011010"}
    return Plan(**{**values, **changes})


FIRST = "blocks 1:3,4 of 6 (mask 011010)  .##.#."
COUNT = "9,450 trainable parameters, 0.945% of the model's 1,000,000"


@pytest.mark.parametrize(("changes", "lines"), [
    ({}, [f"LoRA of {FIRST}", "rank 3, alpha 6, update scaled by 2",
          f"{COUNT}; budget 9,000, mismatch +450 (one rank is 3,150)"]),
    ({"method": "dora", "mask": None}, ["DoRA of blocks 1:3,4 of 6  .##.#.", "rank 3, alpha 6, update scaled by 2",
                                        f"{COUNT}; budget 9,000, mismatch +450 (one rank is 3,150)"]),
    ({"scale": "rslora", "rank": 4, "alpha": 8.0, "budget": None},
     [f"LoRA of {FIRST}", "rank 4, alpha 8, update scaled by 4 (rsLoRA)", COUNT]),
    ({"method": "full", "rank": None, "alpha": None}, [f"full-rank update of {FIRST}",
                                                       f"{COUNT}; budget 9,000, mismatch +450"]),
    ({"budget": None, "missing": (Missing(0, ("q", "k")), Missing(3, ("v",)), Missing(5, ("q", "k")))},
     [f"LoRA of {FIRST}", "rank 3, alpha 6, update scaled by 2", COUNT,
      "not reached: blocks 0,5 have no q, k; block 3 has no v"]),
])
def test_a_plan_in_words(changes: dict[str, Any], lines: list[str]) -> None:
    assert planted_plan(**changes).summary().split("\n") == lines


def test_the_table_of_a_plan() -> None:
    assert planted_plan().table().to_dict("records") == [
        {"block": b, "matrices": "q_proj down_proj", "rank": 3, "parameters": 3150} for b in (1, 2, 4)]
    full = planted_plan(method="full", rank=None, alpha=None)
    assert full.table().to_dict("records") == [
        {"block": b, "matrices": "q_proj down_proj", "rank": "full", "parameters": 90_600} for b in (1, 2, 4)]
    whole = planted_plan(method="full", rank=None, alpha=None, whole_blocks=True, params=301)
    assert list(whole.table()["parameters"]) == [100] * 3
    uneven = planted_plan(modules=(*q_and_down(1), q_and_down(2)[0], *q_and_down(4)))
    assert list(uneven.table()["parameters"]) == [3150, 150, 3150]
    assert list(uneven.table()["matrices"]) == ["q_proj down_proj", "q_proj", "q_proj down_proj"]


@pytest.mark.parametrize(("changes", "error"), [
    ({"num_blocks": 4}, "p is not a plan that can be trained: it names blocks 1:3,4 of 4, its matrices are in blocks "
                        "1:3,4; make it anew."),
    ({"blocks": [1, 2]}, "p is not a plan that can be trained: it names blocks 1:3 of 6, its matrices are in blocks "
                         "1:3,4; make it anew."),
    ({"rank": None}, "p is not a plan that can be trained: method lora with rank None and alpha 6.0; make it anew."),
    ({"rank": 101}, "p asks for rank 101, but none of its matrices has more than rank 100."),
    ({"rank": 0, "scale": "x"}, "p is not a plan as midblock writes it (rank must be at least 1, got 0; scale 'x' is "
                                "not one of fixed-ratio, rslora, fixed-alpha); make one with `midblock tune ... "
                                "--dry-run --json` or `midblock importance`."),
])
def test_why_a_written_plan_cannot_be_used(changes: dict[str, Any], error: str) -> None:
    with pytest.raises(SettingsError) as caught:
        Plan.from_dict({**planted_plan().to_dict(), **changes}, where="p")
    assert str(caught.value) == error


def test_a_written_plan_counts_by_its_own_method() -> None:
    for method, params in (("lora", 9450), ("dora", 9450 + 3 * 120)):
        assert Plan.from_dict({**planted_plan(method=method).to_dict(), "params": 1}).params == params
    full = {**planted_plan(rank=None, alpha=None).to_dict(), "method": "full", "params": 1}
    assert Plan.from_dict(full).params == 3 * 90_600
    assert Plan.from_dict({**planted_plan(blocks=(5,), modules=q_and_down(5)).to_dict(), "rank": 100}).rank == 100
    with pytest.raises(SettingsError, match=r"^this is not a plan"):
        Plan.from_dict({})


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_the_rank_of_a_budget_is_the_nearest_of_all(method: str) -> None:
    """Every budget against every rank, counted one by one; DoRA's magnitudes are paid whatever the rank."""
    model = FAMILIES["llama"]()
    counts = {r: make_plan(model, mask="0110", rank=r, method=method).params for r in range(1, 9)}
    for budget in range(counts[1], counts[8], 97):
        nearest = min(counts, key=lambda r: (abs(counts[r] - budget), r))
        assert make_plan(model, mask="0110", budget=budget, method=method).rank == nearest
    assert make_plan(model, mask="0110", budget=counts[1], method=method).rank == 1
    with pytest.raises(BudgetError, match=f"which takes {counts[1]:,}; raise"):
        make_plan(model, mask="0110", budget=counts[1] - 1, method=method)
    top = make_plan(model, mask="0110", method=method, rank=(full := max(
        min(m.inputs, m.outputs) for m in make_plan(model, mask="0110", rank=1).modules)))
    with pytest.raises(BudgetError, match=rf"rank {full} \({top.params:,} parameters\); lower the budget, choose more "
                                          "blocks or matrices, or train them with method full"):
        make_plan(model, mask="0110", method=method, budget=top.params + 2 * counts[1])


def test_random_blocks_are_different_ones_and_may_be_one_or_all() -> None:
    for seed in range(20):
        assert random_block_set(7, 7, seed) == list(range(7))
        assert len(set(random_block_set(5, 7, seed))) == 5
    assert {random_block_set(1, 4, seed)[0] for seed in range(50)} == set(range(4))
    for wrong in (0, 8):
        with pytest.raises(BlockRangeError, match=f"{wrong} random blocks were asked for, but the model has 7; use 1 "
                                                  "to 7"):
            random_block_set(wrong, 7, 0)


def test_a_budget_of_rank_one_and_texts_that_are_none() -> None:
    model = FAMILIES["llama"]()
    assert budget_of(model, "match:1@1") == make_plan(model, mask="1", rank=1).params
    with pytest.raises(BudgetError, match=r"900k, 1\.5M\) nor match:MASK@RANK \(match:11111@16\)\."):
        budget_of(model, "much")
    assert full_blocks_for_budget(model, 1) == 1
