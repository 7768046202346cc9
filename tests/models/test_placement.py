"""Quantised weights and several devices: what is loaded, what is refused, and in which words."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GptOssConfig, GptOssForCausalLM

from families import FAMILIES
from midblock.analysis.gradients import gradients
from midblock.analysis.lens import lens
from midblock.analysis.merge import merge
from midblock.analysis.profile import profile
from midblock.analysis.swap import swap
from midblock.data import Dataset, Example
from midblock.errors import MissingExtraError, SettingsError
from midblock.evaluation import evaluate
from midblock.models import find_anatomy, load_chain, load_model, save_checkpoint
from midblock.models.placement import check_spread, require_full_weights
from midblock.settings import LoadSettings
from midblock.settings.sweep import PlaceSettings
from midblock.tuning import make_plan, tune
from model_helpers import edit_config

QUANTISED = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None,
                               reason="the extra 'quantized' is not installed")
WIDE = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture
def folder(tmp_path: Path, tiny_tokenizer: Any) -> Path:
    return save_checkpoint(FAMILIES["llama"](seed=1, **WIDE), tiny_tokenizer, tmp_path / "base")


@pytest.fixture
def texts() -> Dataset:
    return Dataset("texts", "all", "here", [Example(text=f"there are {n} stones and {n + 1} trees on the shore",
                                                    where=f"here:{n}") for n in range(8)])


# ---------------------------------------------------------------------------------------------
# refusals, which need neither a second device nor bitsandbytes


def test_two_quantisations_and_two_ways_of_placing_exclude_each_other() -> None:
    with pytest.raises(SettingsError, match="load_4bit and load_8bit exclude each other"):
        LoadSettings(load_4bit=True, load_8bit=True)
    with pytest.raises(SettingsError, match="device_map chooses the devices itself; leave out device cuda:1"):
        PlaceSettings(device_map="auto", device="cuda:1")
    with pytest.raises(SettingsError, match="device_map 'balanced' is not one of auto"):
        PlaceSettings(device_map="balanced")
    with pytest.raises(SettingsError, match="exclude each other"):
        load_model("smollm2", load_4bit=True, load_8bit=True)


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_without_bitsandbytes_one_line_says_what_to_install(bits: str, folder: Path,
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    from midblock import extras

    find = extras.find_spec
    monkeypatch.setattr(extras, "find_spec", lambda name: None if name == "bitsandbytes" else find(name))
    with pytest.raises(MissingExtraError, match=rf"load_{bits} needs .*pip install 'midblock\[quantized\]'"):
        load_model(folder, **{f"load_{bits}": True})


def test_a_block_split_over_devices_is_refused() -> None:
    model = FAMILIES["llama"]()
    check_spread(model, find_anatomy(model), "m")
    block = model.model.layers[2]
    block.mlp.down_proj.weight = torch.nn.Parameter(block.mlp.down_proj.weight.to("meta"), requires_grad=False)
    with pytest.raises(SettingsError, match="block 2 is split over cpu and meta"):
        check_spread(model, find_anatomy(model, verify=False), "m")


@pytest.mark.parametrize(("places", "told"), [({"a": 0, "b": 1}, None), ({"": "cpu"}, None),
                                              ({"a": 0, "b": "cpu", "c": "cpu"}, "2 of its parts would be left on cpu"),
                                              ({"a": "cpu", "b": "disk"}, "2 of its parts .* on cpu and disk")])
def test_parts_outside_of_the_devices_are_refused(places: dict[str, Any], told: str | None) -> None:
    model: Any = FAMILIES["llama"]()
    model.hf_device_map = places
    if told is None:
        check_spread(model, find_anatomy(model), "m")
        return
    with pytest.raises(SettingsError, match=told):
        check_spread(model, find_anatomy(model), "m")


def test_device_map_auto_computes_the_same(folder: Path, texts: Dataset) -> None:
    """On one device nothing is spread, but the model goes through accelerate's way of loading."""
    spread = load_model(folder, device_map="auto", dtype="float32")
    whole = load_model(folder, dtype="float32", device=str(spread.device))
    ids = torch.arange(5, 15)[None].to(spread.device)
    with torch.inference_mode():
        assert torch.equal(spread.model(ids).logits, whole.model(ids).logits)
    ours, theirs = (lens([m, m], data=texts, samples=4).frame["value"] for m in (spread, whole))
    assert ours.equals(theirs)
    ours, theirs = (swap([m, m], data=texts, samples=4, segments=2).frame["value"] for m in (spread, whole))
    assert ours.equals(theirs)


# ---------------------------------------------------------------------------------------------
# checkpoints that are stored quantised


def _as_fp8(folder: Path, target: Path, block: int = 32) -> dict[str, torch.Tensor]:
    """The same checkpoint in fp8 with a scale for each block of the matrix; returns what it then holds."""
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    stored, held = {}, {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if "layers" not in name or weight.ndim != 2:
            stored[name] = held[name] = weight
            continue
        rows, columns = (n // block for n in weight.shape)
        tiles = weight.reshape(rows, block, columns, block)
        scale = tiles.abs().amax(dim=(1, 3), keepdim=True) / 448
        small = (tiles / scale).to(torch.float8_e4m3fn)
        stored[name] = small.reshape(weight.shape)
        stored[f"{name}_scale_inv"] = scale.reshape(rows, columns)
        held[name] = (small.float() * scale).reshape(weight.shape)
    save_file(stored, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((target / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [block, block],
                                     "activation_scheme": "dynamic", "fmt": "e4m3"}
    (target / "config.json").write_text(json.dumps(config))
    return held


def test_a_checkpoint_in_fp8_is_loaded_whole(folder: Path, tmp_path: Path) -> None:
    held = _as_fp8(folder, tmp_path / "fp8")
    loaded = load_model(tmp_path / "fp8", dtype="float32")
    assert loaded.quantized is None
    assert any("stored in fp8, loaded in float32" in note for note in loaded.notes)
    for name, parameter in loaded.model.named_parameters():
        want = held[name]
        assert (parameter - want).abs().max() <= 2.0**-8 * want.abs().max(), name  # it may pass through bfloat16


_FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
"""The sixteen numbers of e2m1 (OCP Microscaling Formats, table 5)."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_in_mxfp4_is_loaded_whole(dtype: torch.dtype, tmp_path: Path, tiny_tokenizer: Any) -> None:
    config = GptOssConfig(
        vocab_size=128, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=256,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, sliding_window=64,
        layer_types=["sliding_attention", "full_attention"],
        rope_parameters={"rope_type": "default", "rope_theta": 1e4})
    GptOssForCausalLM(config).save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    stored, held = load_file(tmp_path / "model.safetensors"), {}
    generator = torch.Generator().manual_seed(1)
    for name in [n for n in stored if n.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, wide, out = stored.pop(name).shape
        codes = torch.randint(16, (experts, out, wide // 32, 32), generator=generator)
        power = torch.randint(118, 124, (experts, out, wide // 32), generator=generator)
        values = _FP4[codes] * torch.exp2(power.float() - 127)[..., None]
        held[name] = values.reshape(experts, out, wide).transpose(1, 2)
        stored[f"{name}_blocks"] = (codes[..., 0::2] | codes[..., 1::2] << 4).to(torch.uint8)
        stored[f"{name}_scales"] = power.to(torch.uint8)
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    edit_config(tmp_path, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": [
        "model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]})
    loaded = load_model(tmp_path, dtype=str(dtype).removeprefix("torch."), device="cpu")
    assert any("stored in mxfp4, loaded in" in note for note in loaded.notes)
    found = dict(loaded.model.named_parameters())
    assert len(held) == 4
    for name, want in held.items():
        assert found[name].dtype == dtype
        assert torch.equal(found[name].float(), want), name


def test_a_checkpoint_in_fp8_is_read_block_by_block(folder: Path, texts: Dataset, tmp_path: Path,
                                                   tiny_tokenizer: Any) -> None:
    other = save_checkpoint(FAMILIES["llama"](seed=2, **WIDE), tiny_tokenizer, tmp_path / "other")
    specs = [str(tmp_path / n) for n in ("fp8-base", "fp8-sft")]
    for plain, spec in zip((folder, other), specs, strict=True):
        _as_fp8(plain, Path(spec))
    frames = [profile(load_chain(specs, device="cpu", dtype=dtype, stream=stream), data=texts, samples=8,
                      token_samples=4, batch_size=4).frame
              for dtype in ("float32", "bfloat16") for stream in ("never", "always")]
    assert frames[1].equals(frames[0])
    assert frames[3].equals(frames[2])
    model = load_model(specs[0], dtype="float32", streamed=True)
    assert model.quantized is None
    assert model.streamed is not None
    assert model.streamed.block_bytes > model.streamed.part_bytes(0) > model.streamed.stored_bytes(0)


# ---------------------------------------------------------------------------------------------
# bitsandbytes


@QUANTISED
@pytest.mark.parametrize("bits", ["4bit", "8bit"])
@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe"])
def test_quantised_blocks_come_one_after_another(family: str, stored: bool, bits: str, texts: Dataset, tmp_path: Path,
                                                 tiny_tokenizer: Any) -> None:
    """Quantised while they are read, or as they are stored: the same tables as in memory."""
    wide = WIDE if family == "llama" else {}
    specs = [str(save_checkpoint(FAMILIES[family](seed=s, **wide), tiny_tokenizer, tmp_path / str(s)))
             for s in range(2)]
    options: dict[str, Any] = {f"load_{bits}": True}
    if stored:
        for number, spec in enumerate(specs):
            held = load_model(spec, dtype="float32", **options)
            specs[number] = f"{spec}-{bits}"
            held.model.save_pretrained(specs[number])
            held.tokenizer.save_pretrained(specs[number])
        options = {}
    tables = []
    for stream in ("never", "always"):
        chain = load_chain(specs, device="cpu", dtype="float32", stream=stream, **options)
        assert {m.quantized for m in chain} == {bits}
        tables.append((profile(chain, data=texts, samples=8, token_samples=4, batch_size=4).frame,
                       lens(chain, data=texts, samples=4).frame))
        if stream == "always":
            model = chain[0]
            assert model.streamed is not None
            assert model.streamed.block_bytes > model.streamed.part_bytes(0)
            assert all(p.is_meta for block in model.anatomy.blocks for p in block.parameters())
            assert all(getattr(m, "quant_state", None) is None for m in model.model.modules())
    for whole, streamed in zip(*tables, strict=True):
        assert streamed.equals(whole)


@QUANTISED
def test_weights_that_are_not_finite_are_found_while_they_are_read(folder: Path, texts: Dataset) -> None:
    from midblock.errors import CheckpointError

    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    model = load_model(folder, load_4bit=True, streamed=True)
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.up_proj\.weight \(1 of"):
        lens([model], data=texts, samples=4)


@QUANTISED
@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_what_is_tuned_on_quantised_weights_is_measured_on_them(bits: str, folder: Path, texts: Dataset,
                                                               tmp_path: Path, tiny_tokenizer: Any) -> None:
    load: dict[str, Any] = {f"load_{bits}": True, "dtype": "float32"}
    base = load_model(folder, **load)
    assert base.quantized == base.describe()["quantized"] == bits
    assert base.anatomy.causal_lm.num_parameters() == load_model(folder).model.num_parameters()
    rows = Dataset("rows", "all", "here", [
        Example(text=f"say {n} one and one", prompt=f"say {n} ", completion="one and one", where=f"here:{n}")
        for n in range(8)])
    result = tune(base, rows, mask="0110", rank=2, steps=4, learning_rate=0.05, batch_size=4, cache="none",
                  out=tmp_path / "out")
    first, second = load_chain([str(folder), str(result.adapter)], **load)
    assert second.quantized == bits
    ids = torch.arange(5, 25)[None]
    from peft import PeftModel

    with torch.inference_mode():
        theirs = PeftModel.from_pretrained(load_model(folder, **load).model, str(result.adapter)).eval()(ids).logits
        ours = second.model(ids).logits
        assert torch.allclose(ours, theirs, atol=1e-5 * float(theirs.abs().max()))
        assert not torch.allclose(ours, first.model(ids).logits, atol=1e-3)
    assert not profile([first, second], data=texts, samples=8, token_samples=4).frame.empty
    read = lens([first, second], data=texts, samples=4).frame
    last = read[(read["metric"] == "loss") & (read["layer"] == first.anatomy.num_blocks)].set_index("side")["value"]
    swapped = swap([first, second], data=texts, samples=4, segments=2).frame
    own = swapped[(swapped["metric"] == "loss") & (swapped["layer"] == "00")
                  & (swapped["head"] == swapped["recipient"])].set_index("side")["value"]
    assert last["base"] == pytest.approx(own["base"], rel=1e-5)
    assert last["sft"] == pytest.approx(own["sft"], rel=1e-5)
    assert evaluate(second, "answer_loss", data=rows).value > 0
    for call in (lambda: gradients([first], data=texts), lambda: merge([first, second], alphas=[0.0, 1.0], data=texts),
                 lambda: tune(base, rows, mask="0110", method="full", steps=1)):
        with pytest.raises(SettingsError, match=r"full weights|full-rank"):
            call()


@QUANTISED
def test_what_is_quantised_already_is_not_quantised_anew(folder: Path, tmp_path: Path) -> None:
    _as_fp8(folder, tmp_path / "fp8")
    with pytest.raises(SettingsError, match="the checkpoint is quantised already"):
        load_model(tmp_path / "fp8", load_8bit=True)


@QUANTISED
def test_weights_that_are_not_finite_are_found_before_quantisation_hides_them(folder: Path) -> None:
    from midblock.errors import CheckpointError

    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.up_proj\.weight \(1 of"):
        load_model(folder, load_4bit=True)


def test_full_weights_are_not_refused(folder: Path) -> None:
    loaded = load_model(folder)
    require_full_weights(loaded, "anything")
    assert make_plan(loaded, mask="0110", method="full").method == "full"
