"""EVA's ranks as an arm of a sweep on the real embedded model, at the size of a smoke test."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM

from midblock.sweeps import load_config, sweep
from midblock.tuning import Plan, attach

RECIPE = Path(__file__).parents[2] / "recipes" / "smollm2-eva.yaml"
SMALL = ["train.samples=24", "training.steps=3", "seeds=[0]", "arms.masks=[]", "arms.explicit=[]",
         "evaluation=[{task: answer_loss, data: arithmetic, samples: 8}]", "retention=[]"]


@pytest.mark.slow
def test_arms_with_evas_ranks_on_smollm2(smollm2_folder: Path, tmp_path: Path) -> None:
    config = load_config(RECIPE, [*SMALL, f"model={smollm2_folder}"])
    result = sweep(config, out=tmp_path / "out")
    assert not result.failed
    plans = {r.arm: Plan.from_dict(r.plan) for r in result.records if r.plan is not None}
    assert set(plans) == {"11111", "eva-11111", "eva-01100"}
    for name in ("eva-11111", "eva-01100"):
        plan = plans[name]
        # widest matrices: q and o, 576 by 576
        assert abs(plan.params - plans["11111"].params) <= 576
        assert len(set(plan.own_ranks.values())) > 5
    assert set(plans["eva-01100"].blocks) <= set(range(6, 18))
    shown = pd.read_csv(tmp_path / "out" / "arms.csv", dtype={"arm": str}).set_index("arm")
    assert shown.loc["eva-11111", "params"] == plans["eva-11111"].params
    # what an arm trains is what plain PEFT makes of its config
    plain = AutoModelForCausalLM.from_pretrained(smollm2_folder)
    made = PeftModel(plain, plans["eva-01100"].lora_config(plain))
    assert sum(p.numel() for p in made.parameters() if p.requires_grad) == plans["eva-01100"].params
    with attach(AutoModelForCausalLM.from_pretrained(smollm2_folder), plans["eva-01100"]) as attachment:
        assert sum(p.numel() for p in attachment.trainable.values()) == plans["eva-01100"].params
