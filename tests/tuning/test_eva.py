"""EVA's ranks: as plain transformers and NumPy give them, at the exact budget, and read by plain PEFT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_eva_state_dict
from transformers import AutoModelForCausalLM

from families import FAMILIES, token_ids
from midblock.data import TokenRows, load_data, tokenize
from midblock.errors import BudgetError, SettingsError
from midblock.models import load_model, save_checkpoint
from midblock.models.adapters import AdapterFile
from midblock.tuning import Plan, attach, make_plan, tune
from midblock.tuning.eva import CAP, eva_ranks, start_batches
from midblock.tuning.initial import Start

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

LINEAR = ("q", "k", "v", "o", "gate", "up", "down")


def write_rows(path: Path, count: int = 24) -> str:
    words = ["stone", "river", "house", "green", "seven", "dark", "morning", "north"]
    path.write_text("".join(json.dumps({"prompt": f"What is {i} and {i}? ", "completion":
                                        f"it is {2 * i}, {words[i % 8]} {words[i // 3 % 8]} of {i * i}"}) + "\n"
                            for i in range(count)))
    return str(path)


@pytest.fixture
def world(tmp_path: Path, tiny_tokenizer: Any) -> tuple[Any, TokenRows, str]:
    """A loaded tiny Llama, its training rows, and the file that they come from."""
    data = write_rows(tmp_path / "rows.jsonl")
    base = load_model(str(save_checkpoint(FAMILIES["llama"](), tiny_tokenizer, tmp_path / "base")))
    return base, tokenize(load_data(data), base.tokenizer, max_length=64, supervised=True), data


def spread(base: Any, rows: TokenRows, **options: Any) -> tuple[Plan, Plan]:
    plan = make_plan(base, **options)
    return plan, eva_ranks(plan, base, start_batches(rows, base, 8))


def recorded_inputs(model: Any, names: list[str], rows: TokenRows) -> dict[str, np.ndarray]:
    """What each matrix reads at the labelled tokens, one unpadded row at a time."""
    seen: dict[str, list[np.ndarray]] = {n: [] for n in names}
    for row in rows.rows:
        labelled = [t for start, stop in row.supervised for t in range(start, stop)]
        handles = [model.get_submodule(n).register_forward_hook(
            lambda _m, given, _out, n=n, labelled=labelled: seen[n].append(given[0][0, labelled].double().numpy()))
            for n in names]
        with torch.no_grad():
            model(input_ids=torch.tensor([row.ids]))
        for handle in handles:
            handle.remove()
    return {n: np.concatenate(parts) for n, parts in seen.items()}


def expected_ranks(inputs: dict[str, np.ndarray], plan: Plan, budget: int) -> dict[str, int]:
    """The rule again: largest share of variance first, until one direction more would be farther from the budget."""
    candidates = []
    for number, m in enumerate(plan.modules):
        centred = inputs[m.name] - inputs[m.name].mean(axis=0)
        squares = np.linalg.svd(centred, compute_uv=False)[:2 * plan.rank] ** 2
        candidates += [(share, -number, m) for share in squares / np.sum(centred**2)]
    ranks: dict[str, int] = {}
    total = 0
    # directions of q, k and v are those of one input: equal to the last digits
    for _, _, m in sorted(candidates, key=lambda c: (round(c[0], 12), c[1]), reverse=True):
        cost = m.inputs + m.outputs
        if abs(total + cost - budget) >= abs(total - budget):
            break
        ranks[m.name] = ranks.get(m.name, 0) + 1
        total += cost
    return ranks


@pytest.mark.parametrize("options", [
    {"mask": "11", "rank": 3}, {"mask": "0110", "rank": 4, "target_modules": LINEAR},
    {"mask": "1111", "budget": "match:1@2", "target_modules": ("attention", "down")}])
def test_ranks_are_those_of_a_plain_recomputation(options: dict[str, Any], world: Any) -> None:
    base, rows, _ = world
    plan, spreaded = spread(base, rows, **options)
    budget = plan.budget or plan.params
    names = [m.name for m in plan.modules]
    want = expected_ranks(recorded_inputs(base.model, names, rows), plan, budget)
    assert spreaded.own_ranks == want
    assert len(set(want.values())) > 1
    # the parameters that PEFT makes of it, and the budget
    assert spreaded.params == sum(want[m.name] * (m.inputs + m.outputs) for m in plan.modules if m.name in want)
    assert abs(spreaded.params - budget) <= max(m.inputs + m.outputs for m in plan.modules) / 2
    assert max(want.values()) <= CAP * plan.rank
    with attach(base, spreaded) as attachment:
        assert sum(p.numel() for p in attachment.trainable.values()) == spreaded.params
        for name, rank in want.items():
            assert base.model.get_submodule(name).lora_A["default"].weight.shape[0] == rank


def test_the_first_directions_are_the_singular_vectors_of_the_inputs(world: Any) -> None:
    base, rows, _ = world
    plan = make_plan(base, mask="0010", rank=3, target_modules=("q", "down"))
    inputs = recorded_inputs(base.model, [m.name for m in plan.modules], rows)
    with attach(base, plan, start=Start("eva", start_batches(rows, base, 4))) as attachment:
        for name, x in inputs.items():
            layer: Any = attachment.base.get_submodule(name)
            a = layer.lora_A["default"].weight.detach().double().numpy()
            _, _, directions = np.linalg.svd(x - x.mean(axis=0), full_matrices=False)
            np.testing.assert_allclose(np.abs(np.sum(a * directions[:3], axis=1)), 1, atol=1e-4)
            assert not layer.lora_B["default"].weight.any()


def test_where_every_direction_costs_the_same_the_ranks_are_pefts(tmp_path: Path, tiny_tokenizer: Any) -> None:
    model = FAMILIES["llama"](num_key_value_heads=4)  # q, k, v and o are all 32 by 32
    base = load_model(str(save_checkpoint(model, tiny_tokenizer, tmp_path / "base")))
    rows = tokenize(load_data(write_rows(tmp_path / "rows.jsonl", 64)), base.tokenizer, max_length=64, supervised=True)
    plan, spreaded = spread(base, rows, mask="1111", rank=4)
    from midblock.tuning.eva import model_inputs

    config = LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], init_lora_weights="eva")
    config.eva_config.tau = 0.999  # type: ignore[union-attr]
    theirs = {n: v.shape[0] for n, v in get_eva_state_dict(
        base.model, [model_inputs(b) for b in start_batches(rows, base, 64)], config, show_progress_bar=False).items()}
    ours = {m.name: spreaded.own_ranks.get(m.name, 0) for m in plan.modules}
    assert sum(ours.values()) == sum(theirs.values()) == 4 * 16
    # theirs orders equal shares of q, k and v at will
    by_input = [[sum(sorted(ranks[f"model.layers.{b}.self_attn.{n}_proj"] for n in group)) for b in range(4)
                 for group in ("qkv", "o")] for ranks in (ours, theirs)]
    assert np.abs(np.subtract(*by_input)).max() <= 2


@pytest.mark.parametrize(("scale", "factor"), [
    ("fixed-ratio", lambda r, plan: 2.0), ("rslora", lambda r, plan: plan.alpha / r**0.5),
    ("fixed-alpha", lambda r, plan: 128 / r)])
def test_the_scale_rule_holds_for_every_matrix_also_in_every_file(scale: Any, factor: Any, world: Any, tmp_path: Path
                                                                 ) -> None:
    base, _, data = world
    result = tune(base, data, mask="0110", rank=3, target_modules=("all-linear",), ranks="eva", scale=scale, steps=3,
                  batch_size=8, learning_rate=1e-2, gguf=True, merge=True, cache="memory", out=tmp_path / "out")
    plan = result.plan
    own = plan.own_ranks
    assert min(own.values()) < 3 < max(own.values())
    plain = AutoModelForCausalLM.from_pretrained(base.folder)
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base.folder), result.adapter).eval()
    merged = AutoModelForCausalLM.from_pretrained(result.merged)
    file = AdapterFile(result.adapter)
    reader = gguf.GGUFReader(tmp_path / "out" / "adapter.gguf")
    tensors = {t.name: torch.from_numpy(t.data.copy()) for t in reader.tensors}
    alpha = float(reader.fields["adapter.lora.alpha"].contents())
    assert alpha == max(own.values())
    for name, rank in own.items():
        layer: Any = peft.base_model.model.get_submodule(name)
        assert layer.scaling["default"] == pytest.approx(factor(rank, plan))
        change = layer.get_delta_weight("default").detach()
        torch.testing.assert_close(file.delta(f"{name}.weight"), change, rtol=1e-4, atol=1e-7)
        moved = merged.get_parameter(f"{name}.weight") - plain.get_parameter(f"{name}.weight")
        torch.testing.assert_close(moved, change, rtol=1e-3, atol=1e-6)
        if name.endswith(("v_proj", "down_proj")):  # q and k are stored in another order of rows
            block, leaf = name.split(".")[2], {"v_proj": "attn_v", "down_proj": "ffn_down"}[name.rpartition(".")[2]]
            a, b = (tensors[f"blk.{block}.{leaf}.weight.lora_{x}"] for x in "ab")
            assert a.shape[0] == rank
            torch.testing.assert_close((alpha / a.shape[0]) * b @ a, change, rtol=1e-4, atol=1e-7)  # llama.cpp's rule
    assert sum(1 for n in tensors if n.endswith("lora_a")) == len(own)
    want = peft(token_ids()).logits
    torch.testing.assert_close(merged(token_ids()).logits, want, rtol=1e-3, atol=1e-4)
    # matrices without a rank carry nothing, and the plan says so
    for gap in plan.missing:
        assert gap.why == "rank 0"
        assert "no rank for" in plan.summary()
    stored = json.loads((result.adapter / "midblock_plan.json").read_text())
    assert Plan.from_dict(stored) == plan
    assert {m["name"]: m["rank"] for m in stored["modules"]} == own
    assert f"ranks {min(own.values())} to {max(own.values())}" in result.summary()
    # padded to one rank the adapter computes the same
    padded = tune(base, data, mask="0110", rank=3, target_modules=("all-linear",), ranks="eva", scale=scale, steps=3,
                  batch_size=8, learning_rate=1e-2, pad_rank=True, out=tmp_path / "padded")
    config = json.loads((padded.adapter / "adapter_config.json").read_text())
    assert (config["r"], config["rank_pattern"], config["alpha_pattern"]) == (8, {}, {})
    one = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base.folder), padded.adapter).eval()
    torch.testing.assert_close(one(token_ids()).logits, want, rtol=1e-4, atol=1e-5)
    assert "--pad-rank" in "".join(result.notes)
    assert padded.notes == ["vLLM: --enable-lora --max-lora-rank 8"]


def test_ranks_go_together_with_a_start_that_changes_the_base(world: Any, tmp_path: Path) -> None:
    base, _, data = world
    before = {n: p.detach().clone() for n, p in base.model.named_parameters()}
    result = tune(base, data, mask="0110", rank=3, ranks="eva", init="pissa", steps=3, batch_size=8, merge=True,
                  learning_rate=1e-2, out=tmp_path / "out")
    assert all(torch.equal(before[n], p) for n, p in base.model.named_parameters())
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base.folder), result.adapter).eval()
    merged = AutoModelForCausalLM.from_pretrained(result.merged)
    torch.testing.assert_close(peft(token_ids()).logits, merged(token_ids()).logits, rtol=1e-3, atol=1e-4)
    for name, rank in result.plan.own_ranks.items():
        assert peft.base_model.model.get_submodule(name).r["default"] == 2 * rank


def test_a_matrix_without_rank_is_listed_and_not_trained(world: Any) -> None:
    base, rows, _ = world
    plan, spreaded = spread(base, rows, mask="1111", rank=1, target_modules=("o", "down"))
    lost = {m.name for m in plan.modules} - set(spreaded.own_ranks)
    assert lost
    listed = {(gap.block, kind) for gap in spreaded.missing for kind in gap.targets}
    assert listed == {(m.block, m.kind) for m in plan.modules if m.name in lost}
    assert spreaded.blocks == tuple(sorted({m.block for m in spreaded.modules}))
    assert sum(spreaded.params_of_block(b) for b in spreaded.blocks) == spreaded.params
    assert "no rank for" in spreaded.not_reached()
    with attach(base, spreaded):
        assert not any(hasattr(base.model.get_submodule(name), "lora_A") for name in lost)


def test_few_tokens_many_directions(world: Any, tmp_path: Path) -> None:
    base, _, _ = world
    data = write_rows(tmp_path / "few.jsonl", 1)
    with pytest.raises(BudgetError, match=r"ranks eva finds directions for .* labelled tokens"):
        tune(base, data, mask="1111", rank=30, ranks="eva", steps=1)
    with pytest.raises(SettingsError, match=r"init eva begins model\.layers.* with 32 directions"):
        tune(base, data, mask="1111", rank=32, init="eva", steps=1)
    # batches smaller than the rank are no hindrance
    more = write_rows(tmp_path / "more.jsonl", 12)
    result = tune(base, more, mask="0110", rank=16, init="eva", batch_size=1, steps=2)
    assert result.plan.rank == 16


@pytest.mark.parametrize(("family", "options", "match"), [
    ("llama", {"method": "dora"}, "ranks eva is for plain LoRA, and method is dora"),
    ("mixtral", {"target_modules": ["experts"]}, "has stacked experts"),
    ("llama", {"method": "full", "rank": None}, "ranks eva is for plain LoRA, and method is full")])
def test_what_eva_cannot_spread_is_told_in_words(family: str, options: dict[str, Any], match: str, tmp_path: Path,
                                                 tiny_tokenizer: Any) -> None:
    base = load_model(str(save_checkpoint(FAMILIES[family](), tiny_tokenizer, tmp_path / "base")))
    wanted = {"mask": "0110", "rank": 2, **options}
    with pytest.raises(SettingsError, match=match):
        tune(base, write_rows(tmp_path / "r.jsonl"), ranks="eva", steps=1, **wanted)
    if "method" in options:  # also of a plan that is made before
        with pytest.raises(SettingsError, match=f"has {options['method']}"):
            tune(base, write_rows(tmp_path / "r.jsonl"), plan=make_plan(base, **wanted), ranks="eva", steps=1)


def test_damaged_ranks_in_a_plan_file_are_refused(world: Any) -> None:
    base, rows, _ = world
    _, spreaded = spread(base, rows, mask="0110", rank=2)
    value = spreaded.to_dict()
    for rank, match in ((0, "rank"), (99, "with rank 99"), ("two", "rank")):
        damaged = json.loads(json.dumps(value))
        damaged["modules"][0]["rank"] = rank
        with pytest.raises(SettingsError, match=match):
            Plan.from_dict(damaged)
    with pytest.raises(SettingsError, match="a rank for each matrix already"):
        eva_ranks(spreaded, base, start_batches(rows, base, 8))


@pytest.mark.parametrize("family", ["gpt2", "phi3", "gemma3_nested"])
def test_other_families(family: str, tmp_path: Path, tiny_tokenizer: Any) -> None:
    """Transposed, fused and nested matrices: trained, written, and read by plain PEFT."""
    model = FAMILIES[family]()
    base = load_model(str(save_checkpoint(model, tiny_tokenizer, tmp_path / "base")))
    result = tune(base, write_rows(tmp_path / "r.jsonl"), mask="0110", rank=3, target_modules=("all-linear",),
                  ranks="eva", init="eva", steps=2, batch_size=8, learning_rate=1e-2, merge=True, out=tmp_path / "out")
    assert result.plan.own_ranks  # of this Gemma all are equal: the third share of each is above the fourth of any
    peft = PeftModel.from_pretrained(FAMILIES[family](), result.adapter).eval()
    with torch.no_grad():
        tuned = load_model(str(result.merged)).model(token_ids()).logits
        torch.testing.assert_close(peft(token_ids()).logits, tuned, rtol=1e-3, atol=1e-4)
        assert not torch.allclose(tuned, model(token_ids()).logits, atol=1e-4)
