"""Loading one model: what loads, in which dtype, and every refusal."""

from __future__ import annotations

import json
import re
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import build_tiny_tokenizer
from families import FAMILIES, VOCAB, token_ids
from midblock.errors import (
    AdapterError,
    ArchitectureError,
    CheckpointError,
    ModelNotFoundError,
    SettingsError,
    UnsafeCheckpointError,
)
from midblock.models import (
    check_finite_weights,
    choose_dtype,
    load_model,
    load_pair,
    save_checkpoint,
)
from model_helpers import edit_config, edit_weights, saved


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_loads_with_equal_logits(tmp_path: Path, family: str,
                                              capfd: pytest.CaptureFixture[str]) -> None:
    model = FAMILIES[family]()
    save_checkpoint(model, build_tiny_tokenizer(), tmp_path / family)
    loaded = load_model(tmp_path / family, device="cpu")
    ids = token_ids()
    extra = {"decoder_input_ids": ids} if family in ("t5", "bart") else {}
    with torch.no_grad():
        assert torch.equal(loaded.model(input_ids=ids, **extra).logits, model(input_ids=ids, **extra).logits)
    assert not loaded.model.training
    assert loaded.name == family
    assert loaded.notes == ()
    assert capfd.readouterr() == ("", "")


def test_describe_is_json_and_complete(tmp_path: Path) -> None:
    loaded = load_model(saved(tmp_path / "m"), device="cpu")
    told = json.loads(json.dumps(loaded.describe()))
    assert told["blocks"] == 4
    assert told["parameters"] == sum(p.numel() for p in loaded.model.parameters())
    assert told["dtype"] == "float32"
    assert len(told["fingerprint"]) == 64
    assert told["class"] == "LlamaForCausalLM"


@pytest.mark.parametrize(("stored", "asked", "gets"), [
    (torch.float32, "auto", torch.float32), (torch.float16, "auto", None), (torch.bfloat16, "auto", None),
    (torch.bfloat16, "bfloat16", torch.bfloat16), (torch.bfloat16, "float32", torch.float32),
    (torch.float32, torch.bfloat16, torch.bfloat16), (torch.float32, "float16", torch.float16)])
def test_dtype(tmp_path: Path, stored: torch.dtype, asked: str | torch.dtype, gets: torch.dtype | None) -> None:
    """Without a dtype: what the rule takes on this machine."""
    gets = gets or choose_dtype("auto", stored=stored, device=torch.device("cpu")).dtype
    loaded = load_model(saved(tmp_path / "m", dtype=stored), dtype=asked, device="cpu")
    assert loaded.dtype == gets
    assert {p.dtype for p in loaded.model.parameters()} == {gets}


@pytest.mark.parametrize(("option", "value"), [
    ("dtype", "float64"), ("dtype", "half"), ("device", "gpu"), ("device", "cuda:99"), ("device", "xla")])
def test_unknown_dtype_and_device_come_before_any_file(option: str, value: str) -> None:
    with pytest.raises(SettingsError, match=value):
        load_model("no/such", **{option: value})


def test_pickle_loads_when_asked(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m")
    weights = load_file(folder / "model.safetensors")
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UnsafeCheckpointError, match="pickle"):
        load_model(folder, device="cpu")
    loaded = load_model(folder, device="cpu", allow_pickle=True)
    assert torch.equal(loaded.model.model.norm.weight, weights["model.norm.weight"])
    assert len(loaded.fingerprint) == 64


@pytest.mark.parametrize("allow", [False, True])
def test_a_pickled_adapter_beside_a_model_is_not_read(tmp_path: Path, allow: bool) -> None:
    folder = saved(tmp_path / "m")
    tuned = peft.get_peft_model(load_model(folder, device="cpu").model, peft.LoraConfig(target_modules=["q_proj"]))
    tuned.save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_config.json").rename(folder / "adapter_config.json")
    torch.save({}, folder / "adapter_model.bin")
    with pytest.raises(UnsafeCheckpointError, match=r"adapter_model\.bin.*--allow-pickle"):
        load_model(folder, device="cpu", allow_pickle=allow)


def test_model_that_does_not_exist() -> None:
    with pytest.raises(ModelNotFoundError, match="nobody/nothing"):
        load_model("nobody/nothing")


def test_remote_code_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m")
    edit_config(folder, model_type="strange", auto_map={"AutoConfig": "c.C", "AutoModelForCausalLM": "m.M"})
    (folder / "c.py").write_text("raise SystemExit('this code must not run')")
    with pytest.raises(UnsafeCheckpointError, match="--trust-remote-code"):
        load_model(folder)


def test_remote_code_runs_only_when_asked(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m")
    edit_config(folder, model_type="strange_llama",
                auto_map={"AutoConfig": "strange.StrangeConfig",
                          "AutoModelForCausalLM": "strange.StrangeForCausalLM"})
    (folder / "strange.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class StrangeConfig(LlamaConfig):\n    model_type = 'strange_llama'\n"
        "class StrangeForCausalLM(LlamaForCausalLM):\n    config_class = StrangeConfig\n")
    with pytest.raises(UnsafeCheckpointError):
        load_model(folder, device="cpu")
    loaded = load_model(folder, device="cpu", trust_remote_code=True)
    assert type(loaded.model).__name__ == "StrangeForCausalLM"
    assert loaded.anatomy.num_blocks == 4


def test_unknown_architecture(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m")
    edit_config(folder, model_type="unheard_of")
    with pytest.raises(ArchitectureError, match="unheard_of"):
        load_model(folder)


def test_config_of_no_model(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m")
    (folder / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="model_type"):
        load_model(folder)


def test_truncated_file_is_named(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-64])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is truncated"):
        load_model(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_weight_is_named(tmp_path: Path, value: float) -> None:
    folder = saved(tmp_path / "m")

    def spoil(weights: dict[str, torch.Tensor]) -> None:
        weights["model.layers.2.mlp.up_proj.weight"][3, 4] = value

    edit_weights(folder, spoil)
    with pytest.raises(CheckpointError, match=r"model\.layers\.2\.mlp\.up_proj\.weight \(1 of 2048\)"):
        load_model(folder, device="cpu")
    assert load_model(folder, device="cpu", check_finite=False).anatomy.num_blocks == 4


def test_large_finite_weights_are_not_taken_for_infinite() -> None:
    module = torch.nn.Linear(64, 64)
    with torch.no_grad():
        module.weight.fill_(3e38)
    assert not torch.isfinite(module.weight.sum())
    check_finite_weights(module)


@pytest.mark.parametrize("family", ["llama", "llama_tied", "gpt2", "mixtral"])
def test_missing_weight_is_named(tmp_path: Path, family: str) -> None:
    folder = saved(tmp_path / "m", family)
    victim = next(n for n in load_file(folder / "model.safetensors") if ".1." in n and n.endswith("weight"))
    edit_weights(folder, lambda weights: weights.pop(victim))
    with pytest.raises(CheckpointError, match=f"lacks weights.*{re.escape(victim)}"):
        load_model(folder, device="cpu")


def test_untied_head_missing(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m")
    edit_weights(folder, lambda weights: weights.pop("lm_head.weight"))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight"):
        load_model(folder, device="cpu")


def test_weights_of_a_deeper_model(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m")
    edit_config(folder, num_hidden_layers=3)
    loaded = load_model(folder, device="cpu")  # as multi-token prediction leaves a checkpoint
    assert loaded.anatomy.num_blocks == 3
    assert loaded.notes == ("blocks 3 left aside: they lie past the 3 blocks that the config describes (multi-token "
                            "prediction, say)",)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_nested", "opt"])
def test_blocks_behind_the_last_one_are_left_aside_and_said(tmp_path: Path, family: str) -> None:
    """As of multi-token prediction; the model is the one that the config describes."""
    folder = saved(tmp_path / "m", family)
    want = load_model(folder, device="cpu")

    def add(weights: dict[str, torch.Tensor]) -> None:
        inside = [n for n in weights if re.search(r"\b(layers|h)\.3\.", n) and "vision" not in n]
        assert inside
        for name in inside:
            for further in (4, 5):
                weights[re.sub(r"(layers|h)\.3\.", rf"\1.{further}.", name)] = weights[name].clone()

    edit_weights(folder, add)
    loaded = load_model(folder, device="cpu")
    assert loaded.anatomy.num_blocks == 4
    assert any("blocks 4:6 left aside" in note for note in loaded.notes), loaded.notes
    with torch.no_grad():
        assert torch.equal(loaded.model(token_ids()).logits, want.model(token_ids()).logits)


def test_weights_within_a_block_without_a_place_are_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m")
    edit_weights(folder, lambda weights: weights.update(
        {"model.layers.1.self_attn.extra_proj.weight": torch.zeros(2, 2)}))
    with pytest.raises(CheckpointError, match=r"no place for.*layers\.1\.self_attn\.extra_proj"):
        load_model(folder, device="cpu")


def test_weights_of_another_tower_are_not_the_texts(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m")
    edit_weights(folder, lambda w: w.update({f"vision_model.model.layers.{b}.mlp.fc1.weight": torch.zeros(2, 2)
                                             for b in (0, 7)}))
    loaded = load_model(folder, device="cpu")
    assert len(loaded.notes) == 1
    assert "vision_model" in loaded.notes[0]


def test_weights_of_a_wider_model(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m")
    edit_config(folder, intermediate_size=48)
    with pytest.raises(CheckpointError, match=r"down_proj\.weight is \(32, 64\), the config asks for \(32, 48\)"):
        load_model(folder, device="cpu")


def test_weights_outside_the_blocks_are_noted(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m")
    edit_weights(folder, lambda weights: weights.update({"value_head.weight": torch.zeros(1, 32)}))
    assert "value_head.weight" in load_model(folder, device="cpu").notes[0]


def test_no_tokenizer(tmp_path: Path) -> None:
    save_checkpoint(FAMILIES["llama"](), None, tmp_path / "m")
    with pytest.raises(CheckpointError, match="no tokenizer"):
        load_model(tmp_path / "m", device="cpu")


def test_damaged_tokenizer(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m")
    (folder / "tokenizer.json").write_text('{"version": "1.0", "model": 3}')
    with pytest.raises(CheckpointError, match="tokenizer"):
        load_model(folder, device="cpu")


def test_tokenizer_with_more_ids_than_rows(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m", vocab_size=64)
    with pytest.raises(CheckpointError, match="ids up to 111, its embeddings only 64 rows"):
        load_model(folder, device="cpu")


def test_end_token_pads_where_no_padding_token_is_set(tmp_path: Path) -> None:
    tokenizer = build_tiny_tokenizer()
    tokenizer.pad_token = None
    loaded = load_model(saved(tmp_path / "m", tokenizer=tokenizer), device="cpu")
    assert loaded.tokenizer.pad_token_id == loaded.tokenizer.eos_token_id == 2


def adapter(base: Path, folder: Path, *, base_name: str | None = None, seed: int = 7) -> Path:
    model = load_model(base, device="cpu").model
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "o_proj"], r=2))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    wrapped.peft_config["default"].base_model_name_or_path = base_name if base_name is not None else str(base)
    wrapped.save_pretrained(folder)
    return folder


def test_adapter_folder_loads_its_base_and_merges(tmp_path: Path) -> None:
    base = saved(tmp_path / "base")
    folder = adapter(base, tmp_path / "adapter")
    by_folder = load_model(folder, device="cpu")
    by_option = load_model(base, adapter=folder, device="cpu")
    wrapped = load_model(folder, merge=False, device="cpu")
    plain = load_model(base, device="cpu")
    ids = token_ids()
    with torch.no_grad():
        expected = wrapped.model(input_ids=ids).logits
        for loaded in (by_folder, by_option):
            torch.testing.assert_close(loaded.model(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)
            assert not any("lora" in n for n, _ in loaded.model.named_parameters())
        assert (plain.model(input_ids=ids).logits - expected).abs().max() > 0.01
    assert isinstance(wrapped.model, peft.PeftModel)
    assert wrapped.anatomy.block_path(1) == "base_model.model.model.layers.1"
    assert by_folder.fingerprint == by_option.fingerprint != plain.fingerprint
    assert by_folder.adapter == folder
    base_side, sft_side = load_pair(base, folder, device="cpu")
    assert base_side.model is not sft_side.model


def test_adapter_of_another_model(tmp_path: Path) -> None:
    folder = adapter(saved(tmp_path / "base"), tmp_path / "adapter")
    narrow = saved(tmp_path / "narrow", hidden_size=16)
    with pytest.raises(AdapterError, match="trained on another model"):
        load_model(narrow, adapter=folder, device="cpu")
    shallow = saved(tmp_path / "shallow", num_hidden_layers=2)
    with pytest.raises(AdapterError, match=r"layers\.2"):
        load_model(shallow, adapter=folder, device="cpu")


def test_adapter_with_damage(tmp_path: Path) -> None:
    base = saved(tmp_path / "base")
    folder = adapter(base, tmp_path / "adapter")
    weights = load_file(folder / "adapter_model.safetensors")
    lost = sorted(weights)[0]
    save_file({n: t for n, t in weights.items() if n != lost}, folder / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match="without its other half"):
        load_model(folder, device="cpu")
    module = lost.split(".lora_")[0]
    save_file({n: t for n, t in weights.items() if not n.startswith(module)}, folder / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match="missing adapter keys"):
        load_model(folder, device="cpu")


def test_adapter_without_base(tmp_path: Path) -> None:
    base = saved(tmp_path / "base")
    with pytest.raises(ModelNotFoundError, match="base model of the adapter"):
        load_model(adapter(base, tmp_path / "a1", base_name="nobody/gone"), device="cpu")
    folder = adapter(base, tmp_path / "a2", base_name="")
    with pytest.raises(AdapterError, match="names no base model"):
        load_model(folder, device="cpu")
    assert load_model(base, adapter=folder, device="cpu").adapter == folder
    with pytest.raises(SettingsError, match="itself an adapter"):
        load_model(folder, adapter=folder)
    with pytest.raises(AdapterError, match=r"no adapter_config\.json"):
        load_model(base, adapter=base)


@pytest.mark.slow
def test_embedded_model_loads_and_speaks(smollm2_folder: Path) -> None:
    loaded = load_model("smollm2", device="cpu")
    assert loaded.folder == smollm2_folder
    assert loaded.dtype in (torch.float32, torch.bfloat16)
    assert (loaded.anatomy.num_blocks, loaded.anatomy.hidden_size, loaded.anatomy.tied) == (30, 576, True)
    ids = loaded.tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        logits = loaded.model(input_ids=ids).logits
    assert loaded.tokenizer.decode(logits[0, -1].argmax()) == " Paris"


def test_vocabulary_constant_matches_the_builders() -> None:
    assert FAMILIES["llama"]().config.vocab_size == VOCAB
