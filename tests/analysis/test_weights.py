"""Streamed weight change against plain differences of the loaded weights, on all families."""

from __future__ import annotations

import copy
import json
import math
import re
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as tf
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from families import FAMILIES
from midblock.analysis import weight_names, weight_sums
from midblock.analysis.weights import weights
from midblock.errors import AdapterError, ArchitectureError, CheckpointError, PairMismatchError, SettingsError
from midblock.models import AdapterFile, Checkpoint, find_anatomy, kind_of, save_checkpoint

SIZES = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 5,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.1,
         "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def perturbed(model, seed: int = 1, scale: float = 0.01):
    """A copy with noise on every parameter; tied weights stay tied."""
    tuned = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    return tuned


def saved(model, folder: Path) -> Path:
    return save_checkpoint(model, None, folder)


def stored(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint(folder)
    return {name: checkpoint.read(name).clone() for name in checkpoint.names()}


def stored_block(name: str) -> int | None:
    """Block of a stored name; the only other numbered lists are the towers named here."""
    match = re.search(r"\.(?:layers|h|block)\.(\d+)\.", name)
    return int(match.group(1)) if match and not re.search(r"vision|encoder\.", name) else None


def cell(frame, metric: str, **where) -> float:
    part = frame[frame.metric == metric]
    for column, value in where.items():
        part = part[part[column].isna()] if value is None else part[part[column] == value]
    assert len(part) == 1, part
    return part["value"].item()


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    root = tmp_path_factory.mktemp("pair")
    base = FAMILIES["llama"]()
    return saved(base, root / "base"), saved(perturbed(base), root / "sft")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_agrees_with_the_stored_tensors(family, tmp_path):
    model = FAMILIES[family]()
    base, sft = saved(model, tmp_path / "base"), saved(perturbed(model), tmp_path / "sft")
    result = weights(base, sft, spectra=True)
    frame = result.frame
    before, after = stored(base), stored(sft)
    anatomy = find_anatomy(model)
    assert result.num_blocks == anatomy.num_blocks == 4
    changes = frame[(frame.metric == "weight_change") & frame.tensor.notna()]
    assert set(changes["tensor"]) == {n for n, t in before.items() if t.is_floating_point()}
    expected: dict[int, float] = {}
    for name, tensor in before.items():
        difference = (after[name].double() - tensor.double()).numpy()
        kind = kind_of(name)
        rows = changes[changes["tensor"] == name]
        norm = float(np.sqrt((difference**2).sum()))
        whole = rows[~rows["matrix"].isin(["q", "k", "v"])] if kind == "qkv" else rows
        assert whole["value"].item() == pytest.approx(norm, rel=2e-6)
        assert whole["n"].item() == tensor.numel()
        assert cell(frame, "weight_norm", side="base", tensor=name) == pytest.approx(
            tensor.double().norm().item(), rel=2e-6)
        block = stored_block(name)
        if block is None:
            assert (rows["kind"] == "model").all()
        else:
            assert (rows["kind"] == "block").all()
            assert (rows["layer"] == block).all()
            expected[block] = expected.get(block, 0.0) + norm ** 2
        if tensor.ndim == 2:
            s = np.linalg.svd(difference, compute_uv=False)
            if norm == 0:  # a buffer
                assert math.isnan(cell(frame, "weight_change_effective_rank", tensor=name))
                continue
            p = s[s > 0] / s.sum()
            assert cell(frame, "weight_change_spectral_norm", tensor=name) == pytest.approx(s[0], rel=1e-6)
            assert cell(frame, "weight_change_effective_rank", tensor=name) == pytest.approx(
                math.exp(-(p * np.log(p)).sum()), rel=1e-5)
    for block, square in expected.items():
        own = sum(t.double().square().sum().item() for n, t in before.items() if stored_block(n) == block)
        assert cell(frame, "weight_change_relative", kind="block", layer=block, matrix="all") == pytest.approx(
            math.sqrt(square / own), rel=2e-6)
    places = set(frame[frame.kind == "model"]["layer"])
    assert "embeddings" in places
    assert ("final_norm" in places) == (anatomy.final_norm is not None)
    assert ("head" in places) == (not anatomy.tied)
    assert result.summary()


def test_equation_1_is_the_sum_over_q_k_v_o(pair):
    before, after = stored(pair[0]), stored(pair[1])
    frame = weights(*pair).frame
    for block in range(4):
        total = sum(float(np.linalg.norm((after[n] - before[n]).double().numpy()))
                    for n in (f"model.layers.{block}.self_attn.{m}_proj.weight" for m in "qkvo"))
        assert cell(frame, "weight_change", kind="block", layer=block, matrix="qkvo") == pytest.approx(total)


@pytest.mark.parametrize("family", ["phi3", "gpt_neox", "gpt2"])
def test_fused_attention_gives_the_parts_rows_and_equation_1_uses_them(family, tmp_path):
    model = FAMILIES[family]()
    base = saved(model, tmp_path / "base")
    tuned = copy.deepcopy(model)
    block = find_anatomy(tuned).blocks[1]
    name = next(n for n, _ in block.named_parameters() if kind_of(n) == "qkv")
    parameter = dict(block.named_parameters())[name]
    marks = {"q": 0.5, "k": 0.25, "v": 0.125}
    with torch.no_grad():  # the parts by their layout, written out by hand
        if family == "gpt2":
            for i, part in enumerate("qkv"):
                parameter[:, 32 * i:32 * (i + 1)] += marks[part]
            sizes = dict.fromkeys("qkv", 32 * 32)
        elif family == "phi3":  # 4 heads and 2 key-value heads of 8
            for part, rows in zip("qkv", (slice(0, 32), slice(32, 48), slice(48, 64)), strict=True):
                parameter[rows] += marks[part]
            sizes = {"q": 32 * 32, "k": 16 * 32, "v": 16 * 32}
        else:  # q, k, v of one head after another
            for head in range(4):
                for i, part in enumerate("qkv"):
                    parameter[24 * head + 8 * i:24 * head + 8 * (i + 1)] += marks[part]
            sizes = dict.fromkeys("qkv", 32 * 32)
    frame = weights(base, saved(tuned, tmp_path / "sft")).frame
    found = {part: cell(frame, "weight_change", kind="block", layer=1, matrix=part) for part in "qkv"}
    want = {part: marks[part] * math.sqrt(sizes[part]) for part in "qkv"}
    assert found == pytest.approx(want, rel=1e-5)
    assert cell(frame, "weight_change", kind="block", layer=1, matrix="qkvo") == pytest.approx(
        sum(want.values()), rel=1e-5)
    assert cell(frame, "weight_change", kind="block", layer=1, matrix="qkv") == pytest.approx(
        math.sqrt(sum(v * v for v in want.values())), rel=1e-5)
    assert cell(frame, "weight_change", kind="block", layer=2, matrix="qkvo") == 0


def test_a_model_against_itself_shows_no_change(pair):
    result = weights(pair[0], pair[0], spectra=True)
    frame = result.frame
    assert (frame[frame.metric.isin(["weight_change", "weight_change_relative",
                                     "weight_change_spectral_norm"])]["value"] == 0).all()
    assert frame[frame.metric == "weight_change_effective_rank"]["value"].isna().all()
    assert {r["reason"] for r in result.table.reasons} == {"the weight did not change"}
    assert "no weight differs" in result.summary()


def test_small_pieces_and_many_threads_give_the_same_sums(pair, monkeypatch):
    want = weights(*pair, workers=1).frame
    monkeypatch.setattr(weight_sums, "_PIECE", 96)
    monkeypatch.setattr(weight_sums, "_JOB", 320)
    steps = []
    got = weights(*pair, workers=3, progress=lambda what, done, total, note="": steps.append((done, total))).frame
    np.testing.assert_allclose(got["value"].to_numpy(float), want["value"].to_numpy(float), rtol=1e-6)
    assert len(steps) > 50
    assert steps[-1][0] == pytest.approx(steps[-1][1])
    assert steps == sorted(steps)


def test_sharded_against_whole_and_mixed_dtypes(pair, tmp_path):
    """Shards, bfloat16, float16 and float64 files, each against the float32 base."""
    before = stored(pair[0])
    names = sorted(before)
    sharded = tmp_path / "sharded"
    sharded.mkdir()
    shutil.copy(pair[0] / "config.json", sharded)
    after = {n: t.double() + 0.01 for n, t in before.items()}
    dtypes = [torch.bfloat16, torch.float16, torch.float64]
    after = {n: after[n].to(dtypes[i % 3]) for i, n in enumerate(names)}
    files = {}
    for shard in range(3):
        part = {n: after[n].contiguous() for n in names[shard::3]}
        file = f"model-{shard + 1:05d}-of-00003.safetensors"
        save_file(part, sharded / file)
        files |= dict.fromkeys(part, file)
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    frame = weights(pair[0], sharded).frame
    for name in names:
        want = (after[name].double() - before[name].double()).norm().item()
        assert cell(frame, "weight_change", tensor=name) == pytest.approx(want, rel=2e-6)


def test_the_rounding_of_another_precision_is_named_and_its_size_is_right(tmp_path):
    torch.manual_seed(0)
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES))
    whole = saved(model, tmp_path / "whole")
    rounded = saved(copy.deepcopy(model).to(torch.bfloat16), tmp_path / "rounded")
    result = weights(whole, rounded)
    assert any("sft in bfloat16 and base in float32 are compared: rounding" in line for line in result.details())
    assert "about 0.001 of that is rounding" in result.answer().found
    frame = result.frame
    own = frame[(frame.metric == "weight_change_relative") & (frame.matrix == "all")]["value"]
    assert 0.0009 < own.min() <= own.max() < 0.002
    assert weights(whole, whole).counts["rounding"] == {}


def test_tied_and_untied_heads_compare_with_each_other(tmp_path):
    model = FAMILIES["llama_tied"]()
    base = saved(model, tmp_path / "base")
    untied = copy.deepcopy(model)
    untied.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() + 0.5)
    untied.config.tie_word_embeddings = False
    sft = saved(untied, tmp_path / "sft")
    assert "lm_head.weight" not in Checkpoint(base)
    assert "lm_head.weight" in Checkpoint(sft)
    result = weights(base, sft)
    size = model.lm_head.weight.numel()
    assert not result.counts["tied"]
    assert cell(result.frame, "weight_change", layer="head") == pytest.approx(0.5 * math.sqrt(size), rel=1e-6)
    assert cell(result.frame, "weight_change", layer="embeddings") == 0
    assert weights(base, base).counts["tied"]


def test_a_prefix_on_one_side_is_understood(pair, tmp_path):
    renamed = tmp_path / "renamed"
    renamed.mkdir()
    shutil.copy(pair[1] / "config.json", renamed)
    save_file({f"language_model.{n}": t for n, t in stored(pair[1]).items()}, renamed / "model.safetensors")
    want, got = weights(*pair).frame, weights(pair[0], renamed).frame
    assert got["value"].equals(want["value"])
    assert got["tensor"].equals(want["tensor"])
    # the prefix on the base's side: names differ, blocks and values do not
    other = weights(renamed, pair[0]).frame
    for block in range(4):
        where = {"kind": "block", "layer": block, "matrix": "qkvo"}
        assert cell(other, "weight_change", **where) == pytest.approx(cell(want, "weight_change", **where))


def test_an_architecture_that_transformers_does_not_know_is_read_by_its_names(pair, tmp_path):
    folders = []
    for source in pair:
        folder = tmp_path / source.name
        shutil.copytree(source, folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "model_type": "unheard_of"}))
        folders.append(folder)
    assert weight_names._described(folders[0])[0] is None
    want, got = weights(*pair).frame, weights(*folders).frame
    assert got.drop(columns="tensor").equals(want.drop(columns="tensor"))


def adapter_folder(model, folder: Path, **config) -> tuple[Path, torch.nn.Module]:
    """A LoRA adapter with random B, and the merged model."""
    torch.manual_seed(3)
    wrapped = get_peft_model(copy.deepcopy(model), LoraConfig(r=4, lora_alpha=6, **config))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name or "modules_to_save" in name or "trainable_tokens" in name:
                parameter.add_(0.05 * torch.randn(parameter.shape))
    wrapped.save_pretrained(folder)
    return folder, wrapped.merge_and_unload()


ADAPTERS = {
    "plain": ("llama", {"target_modules": ["q_proj", "o_proj", "down_proj"]}),
    "rslora and patterns": ("llama", {"target_modules": ["q_proj", "v_proj"], "use_rslora": True,
                                      "rank_pattern": {"layers.1.self_attn.q_proj": 2},
                                      "alpha_pattern": {"layers.2.self_attn.v_proj": 11}}),
    "dora": ("llama", {"target_modules": ["q_proj", "up_proj"], "use_dora": True}),
    "embeddings and saved modules": ("llama", {"target_modules": ["k_proj", "embed_tokens"],
                                               "modules_to_save": ["lm_head"]}),
    "single tokens": ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": [3, 7, 11]}),
    "stacked experts": ("gpt_oss", {"target_modules": ["q_proj"], "target_parameters": [
        "mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}),
    "transposed": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "fused": ("phi3", {"target_modules": ["qkv_proj"]}),
}


def gpt_oss() -> tf.GptOssForCausalLM:
    """A family whose files store experts as one stack, (in, out)."""
    torch.manual_seed(0)
    return tf.GptOssForCausalLM(tf.GptOssConfig(
        vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, num_local_experts=4, num_experts_per_tok=2, pad_token_id=0))


def test_an_adapter_of_experts_that_the_base_stores_one_by_one_equals_its_merged_model(tmp_path):
    model = FAMILIES["mixtral"]()
    base = saved(model, tmp_path / "base")
    adapter, merged = adapter_folder(model, tmp_path / "adapter", target_modules=["q_proj"],
                                     target_parameters=["experts.gate_up_proj", "experts.down_proj"])
    keys = ["kind", "layer", "metric", "matrix", "tensor", "side"]
    both = weights(base, adapter).frame.merge(weights(base, saved(merged, tmp_path / "merged")).frame, on=keys,
                                              suffixes=("", "_merged"), how="outer", indicator=True)
    assert (both["_merge"] == "both").all()
    changes = both[both["metric"] == "weight_change"]
    assert (changes[changes["tensor"].str.contains("experts", na=False)]["value"] > 0).all()
    np.testing.assert_allclose(changes["value"], changes["value_merged"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("case", ADAPTERS)
def test_an_adapter_equals_its_merged_model(case, tmp_path):
    family, config = ADAPTERS[case]
    model = {**FAMILIES, "gpt_oss": gpt_oss}[family]()
    base = saved(model, tmp_path / "base")
    adapter, merged = adapter_folder(model, tmp_path / "adapter", **config)
    full = saved(merged, tmp_path / "merged")
    got, want = weights(base, adapter, spectra=True).frame, weights(base, full, spectra=True).frame
    keys = ["kind", "layer", "metric", "matrix", "tensor", "side"]
    both = got.merge(want, on=keys, suffixes=("", "_merged"), how="outer", indicator=True)
    assert (both["_merge"] == "both").all()
    changes = both[both["metric"].isin(["weight_change", "weight_change_relative",
                                        "weight_change_spectral_norm"])]
    # the merged weights are rounded to float32, the product is not
    np.testing.assert_allclose(changes["value"], changes["value_merged"], rtol=1e-4, atol=1e-6)
    assert (changes[changes["metric"] == "weight_change"]["value"] > 0).sum() >= 4
    if case == "plain":
        ranks = got[(got.metric == "weight_change_effective_rank") & got["value"].notna()]
        assert len(ranks) == 12
        assert ranks["value"].between(1, 4).all()
        untouched = got[(got.metric == "weight_change") & (got.matrix == "k")]
        assert (untouched["value"] == 0).all()


def test_a_chain_compares_with_the_first_and_the_one_before(pair, tmp_path):
    model = FAMILIES["llama"]()
    dpo = saved(perturbed(model, seed=5), tmp_path / "dpo")
    adapter, _ = adapter_folder(model, tmp_path / "adapter", target_modules=["q_proj"])
    result = weights([*pair, dpo, adapter], names=["base", "sft", "dpo", "lora"])
    frame = result.frame
    assert list(dict.fromkeys(frame["stage"].dropna())) == ["sft-base", "dpo-base", "dpo-sft", "lora-base",
                                                            "lora-dpo"]
    for later, earlier, stage in ((pair[1], pair[0], "sft-base"), (dpo, pair[1], "dpo-sft")):
        alone = weights(earlier, later).frame
        alone = alone[alone.side == "difference"]["value"].to_numpy(float)
        np.testing.assert_allclose(frame[frame.stage == stage]["value"].to_numpy(float), alone, rtol=1e-6)
    merged = stored(pair[0])
    delta = AdapterFile(adapter).delta("model.layers.2.self_attn.q_proj.weight")
    want = (merged["model.layers.2.self_attn.q_proj.weight"] + delta
            - stored(dpo)["model.layers.2.self_attn.q_proj.weight"]).double().norm().item()
    assert cell(frame, "weight_change", stage="lora-dpo", layer=2, matrix="q") == pytest.approx(want, rel=1e-5)
    assert set(result.figures()) == {f"weights{kind}-{stage}" for kind in ("", "-matrices") for stage in
                                     ("sft-base", "dpo-base", "dpo-sft", "lora-base", "lora-dpo")}


def test_two_adapters_of_one_base_are_compared_without_the_base(tmp_path):
    model = FAMILIES["llama"]()
    base = saved(model, tmp_path / "base")
    first, _ = adapter_folder(model, tmp_path / "first", target_modules=["q_proj"])
    second, _ = adapter_folder(model, tmp_path / "second", target_modules=["q_proj", "v_proj"])
    frame = weights([base, first, second]).frame
    name = "model.layers.0.self_attn.{}_proj.weight"
    one, two = AdapterFile(first), AdapterFile(second)
    want_q = (two.delta(name.format("q")) - one.delta(name.format("q"))).double().norm().item()
    want_v = two.delta(name.format("v")).double().norm().item()
    where = {"stage": "dpo-sft", "kind": "block", "layer": 0}
    assert cell(frame, "weight_change", matrix="q", **where) == pytest.approx(want_q, rel=1e-5, abs=1e-7)
    assert cell(frame, "weight_change", matrix="v", **where) == pytest.approx(want_v, rel=1e-5)


def test_python_memory_does_not_hold_the_tensors(tmp_path):
    """Pieces, not tensors: the widened buffers stay below a tenth of one large matrix."""
    model = FAMILIES["llama"](vocab_size=65536, hidden_size=128, num_hidden_layers=1)
    base, sft = saved(model, tmp_path / "base"), saved(perturbed(model), tmp_path / "sft")
    del model
    sizes = []
    original = torch.empty

    def watched(*args, **kwargs):
        made = original(*args, **kwargs)
        sizes.append(0 if made.is_meta else made.numel() * made.element_size())
        return made

    tracemalloc.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", watched)
        weights(base, sft, workers=1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    matrix = 65536 * 128 * 4
    assert sum(s for s in sizes if s > 4096) < matrix / 10
    assert peak < matrix


def test_regions_and_by_block_read_back_the_table(pair):
    result = weights(*pair)
    blocks = result.by_block()
    assert list(blocks["block"]) == [0, 1, 2, 3]
    assert list(blocks)[:6] == ["block", "depth", "qkvo", "mlp", "norm", "all"]
    assert set(list(blocks)[6:]) == {"q", "k", "v", "o", "gate", "up", "down"}
    row = result.regions().set_index(["metric", "matrix"]).loc[("weight_change", "qkvo")]
    assert row["largest at block"] == int(blocks["qkvo"].idxmax())
    assert row["early"] == pytest.approx(blocks["qkvo"][0])
    assert row["late"] == pytest.approx(blocks["qkvo"][3])
    assert set(result.figures()) == {"weights", "weights-matrices"}


# -- bad input -----------------------------------------------------------------------------------


def rewritten(source: Path, target: Path, change) -> Path:
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_non_finite_weights_are_named(pair, tmp_path, value, side):
    name = "model.layers.2.mlp.up_proj.weight"
    bad = rewritten(pair[side], tmp_path / "bad", lambda t: t[name].view(-1).__setitem__(5, value))
    with pytest.raises(CheckpointError, match=r"up_proj.*NaN or infinity"):
        weights(*((bad, pair[1]) if side == 0 else (pair[0], bad)))


def test_other_sizes_and_missing_weights_are_named(pair, tmp_path):
    wider = saved(FAMILIES["llama"](intermediate_size=96), tmp_path / "wider")
    with pytest.raises(PairMismatchError, match=r"mlp.*has the shape"):
        weights(pair[0], wider)
    deeper = saved(FAMILIES["llama"](num_hidden_layers=5), tmp_path / "deeper")
    with pytest.raises(PairMismatchError, match=r"also has .*layers\.4"):
        weights(pair[0], deeper)
    with pytest.raises(PairMismatchError, match=r"lacks .*layers\.4"):
        weights(deeper, pair[0])
    other = saved(FAMILIES["gpt2"](), tmp_path / "gpt2")
    with pytest.raises(PairMismatchError, match="one architecture"):
        weights(pair[0], other)


def test_quantised_integers_are_refused(pair, tmp_path):
    def to_int(tensors):
        tensors["model.layers.0.mlp.up_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"].to(torch.int8)

    bad = rewritten(pair[0], tmp_path / "int8", to_int)
    with pytest.raises(CheckpointError, match="quantised"):
        weights(pair[0], bad)
    config = json.loads((pair[0] / "config.json").read_text())
    marked = rewritten(pair[0], tmp_path / "marked", lambda t: None)
    (marked / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(CheckpointError, match="gptq"):
        weights(pair[0], marked)


def test_stored_buffers_are_left_out_and_named(pair, tmp_path):
    def add(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)

    older = rewritten(pair[1], tmp_path / "older", add)
    result = weights(pair[0], older)
    assert result.counts["left_out"] == ["model.layers.0.self_attn.rotary_emb.inv_freq"]
    assert "inv_freq" in result.summary()
    assert not result.frame["tensor"].astype(str).str.contains("inv_freq").any()


def test_adapters_that_do_not_belong_are_refused(pair, tmp_path):
    other, _ = adapter_folder(FAMILIES["llama"](intermediate_size=96), tmp_path / "other",
                              target_modules=["up_proj"])
    with pytest.raises(AdapterError, match="another model"):
        weights(pair[0], other)
    strange, _ = adapter_folder(FAMILIES["gpt2"](), tmp_path / "strange", target_modules=["c_attn"],
                                fan_in_fan_out=True)
    with pytest.raises(AdapterError, match="lacks"):
        weights(pair[0], strange)
    with pytest.raises(AdapterError, match="first checkpoint must be the base"):
        weights(other, pair[0])
    config = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps({**config, "peft_type": "IA3"}))
    with pytest.raises(AdapterError, match="IA3"):
        weights(pair[0], other)


def test_settings_are_checked(pair):
    with pytest.raises(SettingsError, match="two checkpoints"):
        weights(pair[0])
    with pytest.raises(SettingsError, match="workers must be at least 1"):
        weights(*pair, workers=0)


def test_a_file_cut_while_it_is_read(pair, tmp_path, monkeypatch):
    copy_of = tmp_path / "cut"
    shutil.copytree(pair[1], copy_of)
    original = weight_sums.Summer.run

    def cut_first(self, progress):
        path = copy_of / "model.safetensors"
        with path.open("r+b") as stream:
            stream.truncate(path.stat().st_size // 2)
        return original(self, progress)

    monkeypatch.setattr(weight_sums.Summer, "run", cut_first)
    with pytest.raises(CheckpointError, match="cut while it was read"):
        weights(pair[0], copy_of)


def with_blocks_added(folder: Path, to: Path, new: list[int]) -> Path:
    """A checkpoint that carries blocks past its config's depth, as multi-token prediction does."""
    shutil.copytree(folder, to)
    state = load_file(to / "model.safetensors")
    extra = {n.replace("layers.3.", f"layers.{b}."): t.clone()
             for n, t in state.items() if ".layers.3." in n for b in new}
    save_file(state | extra, to / "model.safetensors", metadata={"format": "pt"})
    return to


@pytest.mark.parametrize("new", [[4], [4, 5]])
@pytest.mark.parametrize("where", ["both", "base", "sft"])
def test_blocks_past_the_configs_depth_are_set_aside_and_named(pair, tmp_path, new, where):
    folders = [with_blocks_added(pair[i], tmp_path / side, new) if where in ("both", side) else pair[i]
               for i, side in enumerate(("base", "sft"))]
    result = weights(*folders, spectra=False)
    want = weights(*pair, spectra=False).frame
    assert result.frame.equals(want)
    assert result.num_blocks == 4
    note = next(n for n in result.counts["notes"] if "past the 4 blocks" in n)
    assert f"of blocks {'4:6' if len(new) > 1 else '4'} lie" in note
    assert f"{len(new) * 9} weights" in note
    assert note in result.summary()


def test_a_missing_block_is_refused(pair, tmp_path):
    folder = tmp_path / "cut"
    shutil.copytree(pair[0], folder)
    state = {n: t for n, t in load_file(folder / "model.safetensors").items() if ".layers.2." not in n}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ArchitectureError, match=r"lack \[2\]"):
        weights(folder, folder)


@pytest.mark.parametrize(("old", "new"), [("model.layers.", "backbone.layers."), ("model.", "language_model.decoder."),
                                          ("model.layers.", "transformer.blocks.")])
def test_stored_names_may_have_another_prefix_than_the_module_tree(pair, tmp_path, old, new):
    folders = []
    for source in pair:
        folder = tmp_path / source.name
        shutil.copytree(source, folder)
        state = {n.replace(old, new, 1) if n.startswith(old) else n: t
                 for n, t in load_file(folder / "model.safetensors").items()}
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        folders.append(folder)
    got, want = weights(*folders, spectra=False), weights(*pair, spectra=False)
    assert got.by_block().equals(want.by_block())
    assert set(got.frame[got.frame.kind == "model"]["layer"]) >= {"embeddings", "head"}


HYBRIDS = {
    "lfm2": lambda: tf.Lfm2ForCausalLM(tf.Lfm2Config(
        **SIZES, layer_types=["conv", "conv", "full_attention", "conv", "full_attention"])),
    "bamba": lambda: tf.BambaForCausalLM(tf.BambaConfig(
        **SIZES, attn_layer_indices=[2, 4], mamba_n_heads=8, mamba_d_head=8, mamba_n_groups=1, mamba_d_state=8,
        mamba_chunk_size=8)),
    "nemotron_h": lambda: tf.NemotronHForCausalLM(tf.NemotronHConfig(
        **SIZES, head_dim=8, layers_block_type=["mamba", "mlp", "attention", "mamba", "attention"], mamba_num_heads=8,
        mamba_head_dim=8, n_groups=1, ssm_state_size=8, chunk_size=8)),
    "qwen3_next": lambda: tf.Qwen3NextForCausalLM(tf.Qwen3NextConfig(
        **SIZES, head_dim=8, linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=8,
        linear_value_head_dim=8, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=16,
        shared_expert_intermediate_size=16, decoder_sparse_step=1,
        layer_types=["linear_attention", "linear_attention", "full_attention", "linear_attention", "full_attention"])),
}


@pytest.mark.parametrize("name", HYBRIDS)
def test_hybrids_are_measured_and_a_note_says_that_sums_rest_on_other_matrices(name, tmp_path):
    torch.manual_seed(0)
    model = HYBRIDS[name]()
    base, sft = saved(model, tmp_path / "base"), saved(perturbed(model), tmp_path / "sft")
    result = weights(base, sft, spectra=False)
    assert result.num_blocks == 5
    frame = result.frame
    whole = frame[(frame.metric == "weight_change") & (frame.matrix == "all")].set_index("layer")["value"]
    assert (whole > 0).all()
    assert list(whole.index) == list(range(5))
    before, after = stored(base), stored(sft)
    total = sum(float(np.linalg.norm((after[n].double() - t.double()).numpy())) for n, t in before.items()
                if re.search(r"layers\.2\.", n) and t.ndim < 3)
    assert whole[2] >= total * (1 - 1e-6)
    if name == "qwen3_next":  # linear attention counts with its in and out projections
        parts = frame[(frame.metric == "weight_change") & (frame.layer == 0) & frame.matrix.isin(["linear_in", "o"])]
        assert len(parts) == 2
        assert cell(frame, "weight_change", kind="block", layer=0, matrix="qkvo") == pytest.approx(parts["value"].sum())
    if name == "nemotron_h":
        assert {"q", "k", "v", "o"} <= set(frame[frame.layer == 2]["matrix"])
    note = next(n for n in result.counts["notes"] if "rest on other matrices" in n)
    assert "weight_change_relative" in note
    assert re.search(r"in blocks [\d:,]*2", note)


def test_a_model_of_equal_blocks_has_no_such_note(pair):
    assert not any("other matrices" in n for n in weights(*pair, spectra=False).counts["notes"])


@pytest.mark.parametrize("workers", [1, 3])
def test_a_stack_of_experts_counts_as_its_experts_one_by_one(tmp_path, workers, monkeypatch):
    model = tf.GptOssForCausalLM(tf.GptOssConfig(
        **{**SIZES, "num_hidden_layers": 4}, head_dim=8, num_local_experts=3, num_experts_per_tok=1, sliding_window=8))
    base, sft = saved(model, tmp_path / "base"), saved(perturbed(model), tmp_path / "sft")
    before, after = stored(base), stored(sft)
    stacks = [n for n, t in before.items() if t.ndim == 3]
    assert stacks
    monkeypatch.setattr(weight_sums, "_PIECE", 96)  # pieces begin and end within experts
    monkeypatch.setattr(weight_sums, "_JOB", 700)
    frame = weights(base, sft, spectra=False, workers=workers).frame
    for name in stacks:
        block = stored_block(name)
        for e in range(3):
            difference = (after[name][e].double() - before[name][e].double()).numpy()
            where = {"tensor": f"{name}[{e}]", "kind": "block", "layer": block}
            assert cell(frame, "weight_change", **where) == pytest.approx(np.sqrt((difference**2).sum()), rel=2e-6)
            own = before[name][e].double().norm().item()
            assert cell(frame, "weight_change_relative", **where) == pytest.approx(
                np.sqrt((difference**2).sum()) / own, rel=2e-6)
    for block in range(4):
        total = 0.0
        for name, tensor in before.items():
            if stored_block(name) == block:
                change = (after[name].double() - tensor.double()).numpy()
                total += sum(np.linalg.norm(c) for c in change) if tensor.ndim == 3 else np.linalg.norm(change)
        assert cell(frame, "weight_change", kind="block", layer=block, matrix="all") == pytest.approx(total, rel=2e-6)


@pytest.mark.parametrize("larger", ["base", "sft"])
@pytest.mark.parametrize("spectra", [False, True])
def test_vocabularies_of_different_size_are_compared_over_their_common_rows(pair, tmp_path, larger, spectra):
    """Two tokens were added on one side: embeddings and head have 2 more rows there."""
    folder = tmp_path / "larger"
    source = pair[0] if larger == "base" else pair[1]
    shutil.copytree(source, folder)
    state = load_file(folder / "model.safetensors")
    vocabulary = [n for n in state if n in ("model.embed_tokens.weight", "lm_head.weight")]
    for name in vocabulary:
        state[name] = torch.cat([state[name], torch.full_like(state[name][:2], 9.0)])
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": config["vocab_size"] + 2}))
    stages = (folder, pair[1]) if larger == "base" else (pair[0], folder)
    got, want = weights(*stages, spectra=spectra), weights(*pair, spectra=spectra)
    changes = [f[f["side"] == "difference"].reset_index(drop=True) for f in (got.frame, want.frame)]
    assert changes[0].drop(columns="value").equals(changes[1].drop(columns="value"))
    np.testing.assert_allclose(changes[0]["value"], changes[1]["value"], rtol=1e-6)
    rows = config["vocab_size"]
    for name in vocabulary:
        assert any(n.startswith(f"{name} is compared over the first {rows} rows") and f"{larger} {rows + 2}" in n
                   for n in got.counts["notes"])


def test_an_adapter_with_an_enlarged_vocabulary_is_measured(tmp_path):
    model = FAMILIES["llama"]()
    base = saved(model, tmp_path / "base")
    torch.manual_seed(3)
    grown = copy.deepcopy(model)
    grown.resize_token_embeddings(model.config.vocab_size + 2)
    wrapped = get_peft_model(grown, LoraConfig(r=2, target_modules=["q_proj"],
                                               modules_to_save=["embed_tokens", "lm_head"]))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                parameter.add_(0.1)
    wrapped.save_pretrained(tmp_path / "adapter")
    frame = weights(base, tmp_path / "adapter", spectra=False).frame
    size = model.config.vocab_size * 32
    for layer in ("embeddings", "head"):
        assert cell(frame, "weight_change", layer=layer) == pytest.approx(0.1 * math.sqrt(size), rel=1e-4)
        assert frame[(frame.metric == "weight_change") & (frame.layer == layer)]["n"].item() == size
    assert (frame[(frame.metric == "weight_change") & (frame.matrix == "q")]["value"] > 0).all()
