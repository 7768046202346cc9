"""Starts of LoRA from weights, activations and gradients: exact, within the plan, and exported as plain LoRA."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from families import FAMILIES, token_ids
from midblock.errors import SettingsError
from midblock.models import save_checkpoint
from midblock.tuning import attach, make_plan, tune
from midblock.tuning.initial import Start, doubled

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

STARTS = ("pissa", "olora", "corda", "eva", "lora-ga")


@pytest.fixture
def world(tmp_path: Path, tiny_tokenizer: Any) -> tuple[Path, str]:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"What is {i} and {i}? ", "completion": f"twice {i} of course"})
                            + "\n" for i in range(24)))
    return save_checkpoint(FAMILIES["llama"](), tiny_tokenizer, tmp_path / "base"), str(rows)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(token_ids()).logits


@pytest.mark.parametrize("init", STARTS)
def test_an_export_loads_on_the_unchanged_base_and_computes_what_was_trained(init: str, world: Any, tmp_path: Path
                                                                             ) -> None:
    folder, rows = world
    options: dict[str, Any] = {"mask": "0110", "rank": 2, "steps": 4, "batch_size": 4, "learning_rate": 1e-2,
                               "init": init, "seed": 3}
    from midblock.models import load_model

    base = load_model(str(folder))
    before = {n: p.detach().clone() for n, p in base.model.named_parameters()}
    plain_budget = make_plan(base, mask="0110", rank=2).params
    result = tune(base, rows, **options, cache="memory", merge=True, out=tmp_path / "cached")
    # the base is what it was, bit for bit, and the plan's budget holds
    assert all(torch.equal(before[n], p) for n, p in base.model.named_parameters())
    assert result.plan.params == plain_budget
    # with the prefix cache and without: the same
    again = tune(base, rows, **options, cache="none", out=tmp_path / "uncached")
    for name, tensor in result.state.items():
        torch.testing.assert_close(tensor, again.state[name], rtol=1e-4, atol=1e-6)
    adapted = logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), result.adapter))
    merged = logits(AutoModelForCausalLM.from_pretrained(result.merged))
    plain = logits(AutoModelForCausalLM.from_pretrained(folder))
    torch.testing.assert_close(adapted, merged, rtol=1e-4, atol=1e-4)
    assert (adapted - plain).abs().max() > 1e-3
    config = json.loads((result.adapter / "adapter_config.json").read_text())
    assert config["init_lora_weights"] is True
    assert config["r"] == (2 if init == "eva" else 4)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_start_from_weights_computes_the_base_and_its_factors_are_the_largest(init: str) -> None:
    model = FAMILIES["llama"]()
    want = logits(model)
    weight = model.model.layers[1].self_attn.q_proj.weight.detach().clone()
    with attach(model, make_plan(model, mask="0110", rank=4), start=Start(init)) as attachment:
        torch.testing.assert_close(logits(attachment.model), want, rtol=1e-4, atol=1e-4)
        with attachment.disabled():
            assert torch.equal(logits(attachment.model), want)
        layer = attachment.base.get_submodule("model.layers.1.self_attn.q_proj")
        product = layer.get_delta_weight("default").detach()
    if init == "pissa":
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        torch.testing.assert_close(product, u[:, :4] @ torch.diag(s[:4]) @ vh[:4], rtol=1e-4, atol=1e-5)
    assert torch.equal(model.model.layers[1].self_attn.q_proj.weight, weight)
    assert torch.equal(logits(model), want)


def test_eva_begins_with_the_principal_directions_of_the_inputs(world: Any) -> None:
    from midblock.data import load_data, make_batches, tokenize
    from midblock.models import load_model

    folder, rows = world
    base = load_model(str(folder))
    made = make_batches(tokenize(load_data(rows), base.tokenizer, max_length=64, supervised=True).rows, batch_size=8,
                        pad_id=0)
    plan = make_plan(base, mask="0010", rank=2, target_modules=["q"])
    with attach(base, plan, start=Start("eva", made)) as attachment:
        layer = attachment.base.get_submodule("model.layers.2.self_attn.q_proj")
        a, b = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
    assert not b.any()
    torch.testing.assert_close(a @ a.T, torch.eye(2), rtol=1e-4, atol=1e-4)


def test_the_doubled_factors_are_the_change() -> None:
    generator = torch.Generator().manual_seed(0)
    now, first = ({f"x.lora_{p}.weight": torch.randn(s, generator=generator) for p, s in (("A", (2, 5)), ("B", (3, 2)))}
                  for _ in range(2))
    both = doubled(now, first)
    want = now["x.lora_B.weight"] @ now["x.lora_A.weight"] - first["x.lora_B.weight"] @ first["x.lora_A.weight"]
    torch.testing.assert_close(both["x.lora_B.weight"] @ both["x.lora_A.weight"], want)


@pytest.mark.parametrize(("family", "init", "options", "match"), [
    ("llama", "pissa", {"method": "dora"}, "dora"), ("mixtral", "pissa", {"target_modules": ["experts"]}, "experts"),
    ("llama", "olora", {"method": "full", "rank": None}, "full"), ("gpt2", "olora", {}, "Conv1D")])
def test_what_cannot_go_together_is_told_in_words(family: str, init: str, options: dict[str, Any], match: str) -> None:
    model = FAMILIES[family]()
    plan = make_plan(model, **{"mask": "0110", "rank": 2, **options})
    with pytest.raises(SettingsError, match=match), attach(model, plan, start=Start(init)):  # type: ignore[arg-type]
        pass


def test_an_interrupted_run_with_a_start_goes_on_as_if_it_had_not_been(world: Any, tmp_path: Path) -> None:
    folder, rows = world
    options: dict[str, Any] = {"mask": "0110", "rank": 2, "batch_size": 4, "learning_rate": 1e-2, "init": "pissa",
                               "save_steps": 1}
    whole = tune(str(folder), rows, steps=4, **options, out=tmp_path / "whole")

    def stop(what: str, done: int, *_: Any, **__: Any) -> None:
        if (what, done) == ("tune", 2):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(str(folder), rows, steps=4, **options, out=tmp_path / "cut", progress=stop)
    resumed = tune(str(folder), rows, steps=4, **options, out=tmp_path / "cut", resume=True)
    for name, tensor in whole.state.items():
        torch.testing.assert_close(resumed.state[name], tensor, rtol=1e-5, atol=1e-7)
