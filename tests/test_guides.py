"""The configuration lines of the guides select the blocks that midblock's own plan selects."""

from __future__ import annotations

import doctest
import re
from pathlib import Path
from typing import Any

import yaml
from peft import LoraConfig, get_peft_model

import midblock
from families import FAMILIES
from midblock.sweeps import load_config

GUIDES = Path(__file__).resolve().parents[1] / "docs" / "guides"
BLOCKS = midblock.segment_blocks("01100", num_blocks=30)


def yaml_blocks(page: str) -> list[dict[str, Any]]:
    text = (GUIDES / page).read_text(encoding="utf-8")
    return [yaml.safe_load(block) for block in re.findall(r"^```yaml\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)]


def adapted(config: LoraConfig) -> set[str]:
    """Modules of a Llama of 30 blocks that the configuration adapts."""
    model = get_peft_model(FAMILIES["llama"](num_hidden_layers=30), config)
    return {name.partition("base_model.model.")[2] for name, module in model.named_modules()
            if hasattr(module, "lora_A") and len(module.lora_A)}


def wanted() -> set[str]:
    return {f"model.layers.{b}.self_attn.{m}_proj" for b in BLOCKS for m in "qkvo"}


def test_axolotls_lines_select_the_mask() -> None:
    (config, _) = yaml_blocks("other-trainers.md")
    # as axolotl hands them to PEFT
    assert adapted(LoraConfig(r=config["lora_r"], lora_alpha=config["lora_alpha"],
                              target_modules=config["lora_target_modules"],
                              layers_to_transform=config["peft_layers_to_transform"])) == wanted()


def test_llama_factorys_line_selects_the_mask() -> None:
    (_, config) = yaml_blocks("other-trainers.md")
    shown = config["lora_target"].split(",")
    assert shown == [f"layers.{BLOCKS[0]}.self_attn.{m}_proj" for m in "qkvo"]
    names = [name.replace("layers.6.", f"layers.{b}.") for b in BLOCKS for name in shown]
    assert adapted(LoraConfig(r=config["lora_rank"], target_modules=names)) == wanted()


def test_the_rank_of_both_spends_the_default_budget() -> None:
    model = FAMILIES["llama"](num_hidden_layers=30, hidden_size=64)  # wide enough for that rank
    plan = midblock.make_plan(model, mask="01100")
    for config in yaml_blocks("other-trainers.md"):
        rank = config.get("lora_r") or config["lora_rank"]
        assert plan.rank == rank
        assert config["lora_alpha"] == 2 * rank


def test_the_doctests_of_the_guides_are_true() -> None:
    for page in GUIDES.glob("*.md"):
        assert doctest.testfile(str(page), module_relative=False).failed == 0, page.name


def test_the_sweep_of_the_guide_is_a_valid_configuration(tmp_path: Path) -> None:
    text = (GUIDES / "honest-sweeps.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```yaml\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    (tmp_path / "mine.yaml").write_text(block, encoding="utf-8")
    config = load_config(tmp_path / "mine.yaml")
    assert tuple(config.seeds) == (0, 1, 2)
    assert config.arms.baseline == "11111"
