"""Every recipe plans offline from a config and the header of a checkpoint, without weights, and says what it should."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from conftest import build_tiny_tokenizer
from midblock.errors import DataError
from midblock.sweeps import dry_run, load_config

RECIPES = Path(__file__).parents[2] / "recipes"
PAPER = sorted(p for p in RECIPES.rglob("*.yaml") if p.stem.startswith(("olmo2", "mistral")))

# sizes of the published configs: hidden, intermediate, blocks, heads, key-value heads
SIZES = {
    "allenai/OLMo-2-0425-1B": (2048, 8192, 16, 16, 16), "allenai/OLMo-2-1124-7B": (4096, 11008, 32, 32, 32),
    "allenai/OLMo-2-1124-13B": (5120, 13824, 40, 40, 40), "allenai/OLMo-2-0325-32B": (5120, 27648, 64, 40, 8),
    "mistralai/Mistral-7B-v0.1": (4096, 14336, 32, 32, 8)}
# LoRA of rank 1 on q, k, v, o of one block: inputs and outputs of the four matrices
PER_RANK = {name: 2 * (2 * d) + 2 * (d + d * kv // heads) for name, (d, _, _, heads, kv) in SIZES.items()}


@pytest.fixture(scope="module")
def offline(tmp_path_factory):
    """Folders with a config and a tokenizer for each model, and a few rows of every benchmark."""
    root = tmp_path_factory.mktemp("hub")
    for name, (hidden, inner, blocks, heads, kv) in SIZES.items():
        folder = root / name
        folder.mkdir(parents=True)
        kind = ("olmo2", "Olmo2ForCausalLM") if "OLMo" in name else ("mistral", "MistralForCausalLM")
        build_tiny_tokenizer().save_pretrained(folder)
        # one tensor: its header says which dtype the checkpoint has
        save_file({"x": torch.zeros(1, dtype=torch.bfloat16)}, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps({
            "model_type": kind[0], "architectures": [kind[1]], "hidden_size": hidden, "intermediate_size": inner,
            "num_hidden_layers": blocks, "num_attention_heads": heads, "num_key_value_heads": kv,
            "vocab_size": 100352 if "OLMo" in name else 32000, "torch_dtype": "bfloat16"}))
    data = root / "data"

    def write(name, split, rows):
        (data / name).mkdir(parents=True, exist_ok=True)
        (data / name / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))

    for split, first in (("train", 0), ("test", 9000)):
        count = 2400 if split == "train" else 120
        write("gsm8k", split, [{"question": f"What is {n} and one?", "answer": f"It is {n + 1}.\n#### {n + 1}"}
                               for n in range(first, first + count)])
        write("mmlu", split, [{"question": f"What is {n}?", "subject": "numbers", "choices": ["a", "b", "c", "d"],
                               "answer": n % 4} for n in range(first, first + count)])
    write("toxigen", "annotated", [{"text": f"they say number {n // 2} is not a kind number at all", "label": n % 2,
                                    "target_group": "numbers", "toxicity_human": 1.0 + n % 2} for n in range(2400)])
    write("ifeval", "test", [{"key": n, "prompt": f"Write {n} words.", "instruction_id_list": [], "kwargs": []}
                             for n in range(5)])
    write("mt_bench", "test", [{"question_id": n, "category": "x", "turns": [f"Say {n}.", "Again."], "reference": []}
                               for n in range(5)])
    return root


def planned(recipe, offline, monkeypatch):
    monkeypatch.setenv("MIDBLOCK_DATA", str(offline / "data"))
    config = load_config(recipe)
    return config.model, dry_run(config.model_copy(update={"model": str(offline / config.model), "device": "cpu"}))


def test_the_twelve_of_the_paper_and_the_eight_of_its_code_are_there():
    assert len([p for p in PAPER if p.parent == RECIPES]) == 12
    assert len([p for p in PAPER if p.parent.name == "paper-code"]) == 8


@pytest.mark.parametrize("recipe", PAPER, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_every_recipe_plans_offline_without_weights(recipe, offline, monkeypatch):
    name, plan = planned(recipe, offline, monkeypatch)
    frame = plan.frame.drop_duplicates("arm").set_index("arm")
    rank = 8 if "32b" in recipe.stem and recipe.parent.name == "paper-code" else 64
    budget = PER_RANK[name] * rank * SIZES[name][2]
    baseline = "111" if recipe.stem.endswith(("k3",)) else "1" * 10 if recipe.stem.endswith("k10") else "11111"
    assert frame.loc[baseline, "params"] == budget
    assert (frame["params"] / budget).between(0.9, 1.1).all()  # whatever the method
    assert (frame["seconds"] > 0).all()
    if recipe.parent == RECIPES and "toxigen" not in recipe.stem:
        assert {"10001", "full-equal-10000", "full-equal-00100", "full-equal-00001"} <= set(frame.index)
    if recipe.parent.name == "paper-code":
        assert len(plan.arms) == 9
        assert frame["rank"].max() == {"1b": 341, "7b": 341, "13b": 320, "32b": 42}[recipe.stem.split("-")[1]]
        assert (frame["scaling"] * frame["rank"]).to_numpy() == pytest.approx(128.0)
        # 2,000 rows in batches of 4 x 8
        assert set(frame["steps"]) == {63}


def test_without_training_questions_of_mmlu_the_plan_says_so(offline, monkeypatch, tmp_path):
    (tmp_path / "mmlu").mkdir()
    (tmp_path / "mmlu" / "test.jsonl").write_text((offline / "data" / "mmlu" / "test.jsonl").read_text())
    monkeypatch.setenv("MIDBLOCK_DATA", str(tmp_path))
    config = load_config(RECIPES / "olmo2-7b-mmlu.yaml")
    with pytest.raises(DataError, match=r"MIDBLOCK_DATA/mmlu/train\.jsonl"):
        dry_run(config.model_copy(update={"model": str(offline / config.model), "device": "cpu"}))
