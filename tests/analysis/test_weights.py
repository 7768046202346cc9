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
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from families import FAMILIES
from midblock.analysis import weights as module
from midblock.analysis.weights import weights
from midblock.errors import AdapterError, CheckpointError, PairMismatchError, SettingsError
from midblock.models.anatomy import find_anatomy, kind_of
from midblock.models.checkpoints import Checkpoint, save_checkpoint


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
    monkeypatch.setattr(module, "_PIECE", 96)
    monkeypatch.setattr(module, "_JOB", 320)
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
    assert module._meta_anatomy(folders[0])[0] is None
    want, got = weights(*pair).frame, weights(*folders).frame
    assert got.drop(columns="tensor").equals(want.drop(columns="tensor"))


def adapter_folder(model, folder: Path, **config) -> tuple[Path, torch.nn.Module]:
    """A LoRA adapter with random B, and the merged model."""
    torch.manual_seed(3)
    wrapped = get_peft_model(copy.deepcopy(model), LoraConfig(r=4, lora_alpha=6, **config))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
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
    "transposed": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "fused": ("phi3", {"target_modules": ["qkv_proj"]}),
}


@pytest.mark.parametrize("case", ADAPTERS)
def test_an_adapter_equals_its_merged_model(case, tmp_path):
    family, config = ADAPTERS[case]
    model = FAMILIES[family]()
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
    delta = Checkpoint(adapter).delta("model.layers.2.self_attn.q_proj.weight")
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
    one, two = Checkpoint(first), Checkpoint(second)
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
    with pytest.raises(SettingsError, match="threads"):
        weights(*pair, workers=0)


def test_a_file_cut_while_it_is_read(pair, tmp_path, monkeypatch):
    copy_of = tmp_path / "cut"
    shutil.copytree(pair[1], copy_of)
    original = module._Summer.run

    def cut_first(self, progress):
        path = copy_of / "model.safetensors"
        with path.open("r+b") as stream:
            stream.truncate(path.stat().st_size // 2)
        return original(self, progress)

    monkeypatch.setattr(module._Summer, "run", cut_first)
    with pytest.raises(CheckpointError, match="cut while it was read"):
        weights(pair[0], copy_of)
