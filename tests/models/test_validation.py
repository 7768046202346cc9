"""What a checkpoint's own files say is checked before anything is built from them."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from families import FAMILIES
from midblock.errors import AdapterError, ArchitectureError, CheckpointError
from midblock.models.checkpoints import Checkpoint
from midblock.models.quiet import first_line, foreign
from midblock.models.validation import (
    check_adapter_halves,
    check_weight_dtypes,
    read_adapter_config,
    read_config,
    read_header,
    read_index,
)

GOOD = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 5,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 128, "hidden_act": "silu", "pad_token_id": 0,
        "rms_norm_eps": 1e-6, "architectures": ["LlamaForCausalLM"]}


@pytest.fixture
def written(tmp_path: Path):
    def write(value: Any, name: str = "config.json") -> Path:
        (tmp_path / name).write_text(value if isinstance(value, str) else json.dumps(value))
        return tmp_path / name
    return write


@pytest.mark.parametrize(("change", "words"), [
    ({"num_attention_heads": 3}, "hidden_size 32 is not divisible by num_attention_heads 3"),
    ({"num_key_value_heads": 3}, "num_attention_heads 4 is not divisible by num_key_value_heads 3"),
    ({"num_hidden_layers": "4"}, "num_hidden_layers is '4', where a whole number"),
    ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"), ({"num_hidden_layers": 4.0}, "is 4.0, where"),
    ({"num_hidden_layers": True}, "num_hidden_layers is True"),
    ({"num_attention_heads": 0}, "num_attention_heads is 0"),
    ({"vocab_size": 0}, "vocab_size is 0"), ({"vocab_size": [128]}, "vocab_size is"), ({"hidden_size": -32}, "is -32"),
    ({"intermediate_size": []}, "intermediate_size is"), ({"head_dim": {}}, "head_dim is {}"),
    ({"pad_token_id": 128}, "pad_token_id is 128, the vocabulary has 128"), ({"pad_token_id": "0"}, "a token id was"),
    ({"pad_token_id": [0]}, "pad_token_id is a list"), ({"eos_token_id": [1, "2"]}, "eos_token_id is"),
    ({"hidden_act": "sillu"}, "'sillu' is not an activation"), ({"hidden_act": 5}, "hidden_act is 5"),
    ({"rms_norm_eps": "x"}, "rms_norm_eps is 'x'"), ({"rope_theta": None, "rope_scaling": 5}, "rope_scaling is 5"),
    ({"architectures": "Llama"}, "a list of names"), ({"model_type": ["llama"]}, "model_type is"),
    ({"text_config": {**GOOD, "num_hidden_layers": "4"}}, "text_config.num_hidden_layers is '4'"),
    ({"text_config": []}, "text_config is [], where an object"),
    ({"quantization_config": "4bit"}, "quantization_config"),
    ({"layer_types": [1]}, "layer_types is [1]")])
def test_config_faults_are_named(written, change: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        read_config(written({**GOOD, **change}))
    assert words in str(caught.value)
    assert "config.json" in str(caught.value)


def test_all_config_faults_are_told_at_once(written) -> None:
    with pytest.raises(CheckpointError, match=r"hidden_act.*|num_hidden_layers.*;.*vocab_size"):
        read_config(written({**GOOD, "pad_token_id": "x", "rms_norm_eps": "y", "hidden_act": 5}))


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_configs_of_every_family_pass(written, family: str) -> None:
    config = json.loads(FAMILIES[family]().config.to_json_string(use_diff=False))
    assert read_config(written(config)) == json.loads(json.dumps(config))


@pytest.mark.parametrize("change", [
    {"base_model_name_or_path": 7}, {"r": 0}, {"r": -1}, {"r": "8"}, {"r": 10**9}, {"r": [8]}, {"lora_alpha": "x"},
    {"lora_alpha": True}, {"target_modules": 5}, {"target_modules": [1]}, {"rank_pattern": [1]},
    {"rank_pattern": {"q": "x"}}, {"alpha_pattern": {"q": None}}, {"use_rslora": "yes"}, {"peft_type": []}])
def test_adapter_faults_are_named(written, change: dict[str, Any]) -> None:
    good = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"], "base_model_name_or_path": "m"}
    assert read_adapter_config(written(good, "adapter_config.json")) == good
    with pytest.raises(AdapterError, match=rf"adapter_config\.json cannot be used: {next(iter(change))}"):
        read_adapter_config(written({**good, **change}, "adapter_config.json"))


@pytest.mark.parametrize("value", [[], 5, {}, {"weight_map": []}, {"weight_map": {}}, {"weight_map": {"a": 5}},
                                   {"weight_map": {"a": ["x"]}}, {"weight_map": {"a": None}},
                                   {"weight_map": {"a": "../x.safetensors"}}, {"weight_map": {"a": "/etc/x"}},
                                   {"weight_map": {"a": ""}}, {"weight_map": {"a": "x" * 300}},
                                   {"weight_map": {"a": "b\0"}}])
def test_an_index_names_files_of_its_folder(written, value: Any) -> None:
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json"):
        read_index(written(value, "model.safetensors.index.json"))


def header(entries: Any, data: bytes = bytes(64)) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + data


ONE = {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 64]}


@pytest.mark.parametrize("entries", [
    {"a": ONE, "b": ONE}, {"a": {**ONE, "data_offsets": [64, 0]}}, {"a": {**ONE, "data_offsets": [0.5, 64.5]}},
    {"a": {**ONE, "data_offsets": [-64, 0]}}, {"a": {**ONE, "data_offsets": ["0", "64"]}},
    {"a": {**ONE, "shape": "4x4"}}, {"a": {**ONE, "shape": ["4", "4"]}}, {"a": {**ONE, "shape": [-4, -4]}},
    {"a": {**ONE, "shape": [2**40, 2**40]}}, {"a": {**ONE, "dtype": "X"}}, {"a": {**ONE, "dtype": 5}}, {"a": []},
    {"a": None}, [], {"a": {**ONE, "data_offsets": [0, 32]}}, {"a": {**ONE, "data_offsets": [0, 2**62]}},
    {"__metadata__": {"a": 5}, "a": ONE}])
def test_headers_follow_the_librarys_rules(tmp_path: Path, entries: Any) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(header(entries))
    with pytest.raises(CheckpointError, match=r"model\.safetensors is truncated or damaged: safetensors refuses it"):
        read_header(path)


def test_a_good_header_is_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(header({"__metadata__": {"format": "pt"}, "a": ONE}))
    assert read_header(path) == {"a": ONE}
    for length in (0, 1, 2**63, 2**64 - 1, 100_000_001):
        path.write_bytes(struct.pack("<Q", length) + header({"a": ONE})[8:])
        with pytest.raises(CheckpointError, match="its header cannot be"):
            read_header(path)


def test_whole_numbers_are_not_weights() -> None:
    entries = {"q.weight": {"dtype": "I32"}, "q.scales": {"dtype": "F16"}}
    with pytest.raises(CheckpointError, match=r"q\.weight holds I32 numbers"):
        check_weight_dtypes(entries, {}, "m")
    check_weight_dtypes(entries, {"quantization_config": {"quant_method": "gptq"}}, "m")
    for dtype in ("F32", "BF16", "F16", "F64", "F8_E4M3"):
        check_weight_dtypes({"q.weight": {"dtype": dtype}}, {}, "m")
    check_weight_dtypes({"attn.bias": {"dtype": "U8"}, "inv_freq": {"dtype": "I64"}}, {}, "m")


def test_both_halves_of_a_lora_are_needed(tmp_path: Path) -> None:
    names = [f"base_model.model.layers.0.q_proj.lora_{h}.weight" for h in "AB"]
    check_adapter_halves(names, "a")
    check_adapter_halves(["x.lora_embedding_A", "x.lora_embedding_B", "lm_head.weight"], "a")
    for half in (names[:1], names[1:], ["x.lora_embedding_A"], ["x.lora_embedding_B"]):
        with pytest.raises(AdapterError, match="without its other half"):
            check_adapter_halves(half, "a")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2}))
    save_file({names[0]: torch.ones(2, 4)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match="without its other half"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("change", [
    {"bos_token_id": [1]}, {"tie_word_embeddings": [[1], {"b": 2}]}, {"attention_bias": 10**18}, {"head_dim": 7},
    {"use_cache": "two\nlines"}, {"attention_dropout": "much"}, {"mlp_bias": {}},
    {"initializer_range": None, "use_cache": 3}])
def test_what_transformers_refuses_in_a_config_is_one_error(written, change: dict[str, Any]) -> None:
    """Faults that midblock does not look for itself: transformers' own types of error, whatever they are."""
    from midblock.models.load import read_config as read_whole

    with pytest.raises((CheckpointError, ArchitectureError)) as caught:
        read_whole(written({**GOOD, **change}).parent, "m", False)
    assert "'m'" in str(caught.value) or "config.json" in str(caught.value)


@pytest.mark.parametrize("error", [ZeroDivisionError("0"), Exception("bare"), AssertionError(), RecursionError("deep"),
                                   UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad")])
def test_any_error_of_another_packages_reader_is_told_in_words(error: Exception) -> None:
    with pytest.raises(CheckpointError, match=type(error).__name__), \
            foreign(lambda e: CheckpointError(f"m cannot be read ({type(e).__name__}): {first_line(e)}")):
        raise error


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("cuda"), AdapterError("own words"),
                                   KeyboardInterrupt()])
def test_want_of_memory_and_own_errors_pass(error: BaseException) -> None:
    with pytest.raises(type(error)), foreign(lambda e: CheckpointError("m")):
        raise error
