"""The change that an adapter makes, from its file and on a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as tf

from conftest import build_tiny_tokenizer
from families import FAMILIES, token_ids
from midblock.errors import AdapterError
from midblock.models import AdapterFile, load_model
from midblock.models.adapters import layer_factors, other_base
from model_helpers import saved

ADAPTERS = {
    "lora": ("llama", {"target_modules": ["q_proj", "down_proj"], "r": 4, "lora_alpha": 6}),
    "rslora": ("llama", {"target_modules": ["v_proj"], "r": 4, "lora_alpha": 6, "use_rslora": True}),
    "dora": ("llama", {"target_modules": ["v_proj", "o_proj"], "r": 2, "use_dora": True}),
    "patterns": ("llama", {"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 8,
                           "rank_pattern": {"layers.1.self_attn.q_proj": 2},
                           "alpha_pattern": {r".*\.2\.self_attn\.v_proj": 3}}),
    "conv1d": ("gpt2", {"target_modules": ["c_attn"], "r": 4, "fan_in_fan_out": True}),
    "embedding": ("llama", {"target_modules": ["embed_tokens"], "r": 4}),
    "tokens": ("llama", {"target_modules": ["q_proj"], "r": 2, "trainable_token_indices": [3, 5]}),
    "tokens of tied embeddings": ("llama_tied", {"target_modules": ["q_proj"], "r": 2,
                                                 "trainable_token_indices": {"embed_tokens": [3, 7]}}),
    "experts": ("mixtral", {"target_modules": ["q_proj"], "r": 2, "lora_alpha": 6, "target_parameters": [
        "mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}),
    "experts, one matrix": ("mixtral", {"target_modules": ["q_proj"], "r": 3, "use_rslora": True,
                                        "target_parameters": ["experts.down_proj"]}),
    "experts stored (in, out)": ("gpt_oss", {"target_modules": ["q_proj"], "r": 2, "target_parameters": [
        "mlp.experts.down_proj", "mlp.experts.gate_up_proj"]}),
    "tokens and saved modules": ("llama", {"target_modules": ["q_proj"], "r": 2, "trainable_token_indices": [1],
                                           "modules_to_save": ["lm_head"]}),
    "head in full": ("llama", {"target_modules": ["q_proj"], "r": 2, "modules_to_save": ["lm_head"]}),
}


def gpt_oss() -> tf.GptOssForCausalLM:
    torch.manual_seed(0)
    return tf.GptOssForCausalLM(tf.GptOssConfig(
        vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, num_local_experts=4, num_experts_per_tok=2, pad_token_id=0))


BUILDERS = {**FAMILIES, "gpt_oss": gpt_oss}


def trained(model: Any, **options: Any) -> Any:
    """A PEFT model whose adapter is as if trained (LoRA's B starts at zero)."""
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**options))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return wrapped


@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapter_delta_is_what_merging_adds(tmp_path: Path, kind: str) -> None:
    family, options = ADAPTERS[kind]
    model = BUILDERS[family]()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    wrapped = trained(model, **options)
    wrapped.save_pretrained(tmp_path / "adapter")
    merged = dict(wrapped.merge_and_unload().named_parameters())
    adapter = AdapterFile(tmp_path / "adapter")
    assert adapter.is_adapter
    assert adapter.num_blocks is None
    changed = [n for n in before if not torch.equal(before[n], merged[n])]
    assert changed
    assert sorted(adapter.adapted()) == sorted(changed)
    for name in changed:
        torch.testing.assert_close(adapter.delta(name, before[name]), merged[name] - before[name],
                                   rtol=1e-4, atol=1e-5)
    if kind in ("dora", "head in full"):
        with pytest.raises(AdapterError, match="needs the base weight"):  # and never a guess
            adapter.delta("lm_head.weight" if kind == "head in full" else changed[0])
    with pytest.raises(AdapterError, match="does not change"):
        adapter.delta("model.layers.0.mlp.up_proj.weight")


def test_delta_of_a_plain_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="not a LoRA adapter"):
        AdapterFile(saved(tmp_path / "m", "llama")).delta("model.norm.weight")


def test_square_experts_are_not_guessed(tmp_path: Path) -> None:
    model = FAMILIES["qwen3_moe"]()
    before = dict(model.named_parameters())
    trained(model, r=2, target_modules=["q_proj"], target_parameters=["experts.down_proj"]).save_pretrained(tmp_path)
    name = "model.layers.0.mlp.experts.down_proj"
    with pytest.raises(AdapterError, match="square"):
        AdapterFile(tmp_path).delta(name, before[name])


def test_experts_of_another_model(tmp_path: Path) -> None:
    trained(FAMILIES["mixtral"](), r=2, target_modules=["q_proj"],
            target_parameters=["experts.down_proj"]).save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match=r"\(32, 64\).*\(32, 80\).*another model"):
        AdapterFile(tmp_path).delta("model.layers.0.mlp.experts.down_proj", torch.zeros(4, 32, 80))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("rows", "options"), [
    (130, {}), (130, {"modules_to_save": ["embed_tokens", "lm_head"]}), (120, {}), (128, {})])
def test_an_adapter_of_a_resized_vocabulary_loads(tmp_path: Path, tied: bool, rows: int, options: dict) -> None:
    """Larger and smaller, with the tables saved because they were asked for or because PEFT saw them change."""
    if tied and options:
        options = {**options, "ensure_weight_tying": True, "modules_to_save": ["embed_tokens"]}
    base = saved(tmp_path / "m", "llama_tied" if tied else "llama")
    model = tf.AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(rows, mean_resizing=False)
    wrapped = trained(model, r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", **options)
    wrapped.save_pretrained(tmp_path / "a")
    with torch.no_grad():
        want = wrapped(token_ids()).logits
    for spec in ({"spec": base, "adapter": tmp_path / "a"}, {"spec": tmp_path / "a"}):
        loaded = load_model(**spec, device="cpu")
        assert loaded.anatomy.vocab_size == rows
        with torch.no_grad():
            torch.testing.assert_close(loaded.model(token_ids()).logits, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["experts", "experts stored (in, out)", "tokens", "tokens of tied embeddings",
                                  "head in full", "tokens and saved modules"])
def test_every_kind_of_adapter_loads_as_it_was_trained(tmp_path: Path, kind: str) -> None:
    family, options = ADAPTERS[kind]
    model = BUILDERS[family]()
    model.save_pretrained(tmp_path / "m")
    build_tiny_tokenizer().save_pretrained(tmp_path / "m")
    wrapped = trained(model, **options, task_type="CAUSAL_LM").eval()
    wrapped.save_pretrained(tmp_path / "a")
    loaded = load_model(tmp_path / "m", adapter=tmp_path / "a", device="cpu")
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(token_ids()).logits, wrapped(token_ids()).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("has_template", [True, False])
@pytest.mark.parametrize("merge", [True, False])
def test_the_adapters_tokenizer_and_template_win(tmp_path: Path, caplog: Any, merge: bool, has_template: bool) -> None:
    base = saved(tmp_path / "m")
    trained(FAMILIES["llama"](), r=2, target_modules=["q_proj"]).save_pretrained(tmp_path / "a")
    own = build_tiny_tokenizer()
    own.add_tokens(["<|a|>"], special_tokens=True)
    own.chat_template = "{{ messages[0]['content'] }}!" if has_template else None
    own.save_pretrained(tmp_path / "a")
    with caplog.at_level("INFO", logger="midblock"):
        loaded = load_model(base, adapter=tmp_path / "a", device="cpu", merge=merge)
    assert loaded.tokenizer.convert_tokens_to_ids("<|a|>") == 112
    text = loaded.tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert text == ("hi!" if has_template else "user: hi\n")
    what = "tokenizer and chat template are" if has_template else "tokenizer is"
    assert f"the adapter's own {what} used" in loaded.notes
    assert f"a: the adapter's own {what} used." in caplog.messages


def test_an_equal_tokenizer_beside_an_adapter_is_no_news(tmp_path: Path) -> None:
    base = saved(tmp_path / "m")
    trained(FAMILIES["llama"](), r=2, target_modules=["q_proj"]).save_pretrained(tmp_path / "a")
    build_tiny_tokenizer().save_pretrained(tmp_path / "a")
    assert not any("own" in note for note in load_model(base, adapter=tmp_path / "a", device="cpu").notes)


@pytest.mark.parametrize(("recorded", "warns"), [
    ("nobody/other-model", True), ("nobody/M", False), ("", False), ("copy", False), ("different", True),
    ("../copy", False)])
def test_another_recorded_base_is_a_warning(tmp_path: Path, monkeypatch: Any, caplog: Any, recorded: str,
                                            warns: bool) -> None:
    monkeypatch.chdir(tmp_path)
    base = saved(tmp_path / "m")
    saved(tmp_path / "copy")
    saved(tmp_path / "different", seed=1)
    wrapped = trained(FAMILIES["llama"](), r=2, target_modules=["q_proj"])
    wrapped.peft_config["default"].base_model_name_or_path = recorded
    wrapped.save_pretrained(tmp_path / "a")
    loaded = load_model(base, adapter=tmp_path / "a", device="cpu")
    warning = other_base(tmp_path / "a", str(base), base)
    assert (warning is not None) == warns == any("records" in m for m in caplog.messages)
    assert [note for note in loaded.notes if "records" in note] == ([warning] if warns else [])


def test_factors_of_a_layer_are_those_of_its_file(tmp_path: Path) -> None:
    wrapped = trained(FAMILIES["llama"](), r=3, lora_alpha=5, target_modules=["v_proj"])
    wrapped.save_pretrained(tmp_path)
    a, b = layer_factors(wrapped.base_model.model.model.layers[1].self_attn.v_proj)
    left, right = AdapterFile(tmp_path).factors("model.layers.1.self_attn.v_proj.weight")
    torch.testing.assert_close(b, left)
    torch.testing.assert_close(a, right)
    dora = trained(FAMILIES["llama"](), r=3, use_dora=True, target_modules=["v_proj"])
    with pytest.raises(AdapterError, match="one plain LoRA"):
        layer_factors(dora.base_model.model.model.layers[1].self_attn.v_proj)
