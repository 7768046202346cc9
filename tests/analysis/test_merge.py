"""Merged models against copies whose weights are really interpolated."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as tf

from analysis_helpers import loaded, tiny_data
from families import FAMILIES
from midblock.analysis.merge import (
    alphas_label,
    interpolate_,
    interpolated,
    merge,
    save_merged,
)
from midblock.capture import model_inputs, run_blocks
from midblock.data import make_batches, pad_token_id, tokenize
from midblock.errors import BlockRangeError, DataError, OutputError, PairMismatchError, SettingsError
from midblock.models import find_anatomy, load_model
from midblock.segments import segment_bounds
from midblock.settings import MergeSettings
from midblock.settings.merge import parse_alphas

ALPHAS = (0.0, 0.5, 1.0, 0.25)


def batch_of(model, size: int = 3):
    rows = tokenize(tiny_data(size), model.tokenizer, max_length=64)
    return make_batches(rows, batch_size=size, pad_id=pad_token_id(model.tokenizer))[0]


def merged_copy(base, sft, alphas, rest):
    """A copy of the base with W = base + a (sft - base), computed in float64."""
    model = copy.deepcopy(base.model)
    other = dict(sft.model.named_parameters())
    bounds = segment_bounds(len(alphas), 4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            block = base.anatomy.block_of(name)
            alpha = rest if block is None else next(a for a, (lo, hi) in zip(alphas, bounds, strict=True)
                                                    if lo <= block < hi)
            parameter.copy_(parameter.double() + alpha * (other[name].double() - parameter.double()))
    return model


def bits(model) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def logits(model, inputs):
    with torch.inference_mode():
        return model(**inputs).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_runs_as_its_interpolated_copy(family):
    base, sft = loaded(family, 0), loaded(family, 1)
    inputs = model_inputs(base.model, batch_of(base))
    before, pointers = bits(base.model), [p.data_ptr() for p in base.model.parameters()]
    for rest in (None, 0.0, 0.7):
        want = logits(merged_copy(base, sft, ALPHAS, sum(ALPHAS) / 4 if rest is None else rest), inputs)
        with interpolated(base, sft, ALPHAS, rest) as model:
            got = logits(model.model, inputs)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * want.abs().max().item())
    assert [p.data_ptr() for p in base.model.parameters()] == pointers
    assert all(torch.equal(before[n], p) for n, p in base.model.named_parameters())


def test_ends_are_the_two_models_exactly():
    base, sft = loaded("llama", 0), loaded("llama", 1)
    inputs = model_inputs(base.model, batch_of(base))
    with interpolated(base, sft, (0.0, 0.0)):
        assert torch.equal(logits(base.model, inputs), logits(copy.deepcopy(base.model), inputs))
    with interpolated(base, sft, (1.0, 1.0)):
        assert torch.equal(logits(base.model, inputs), logits(sft.model, inputs))
    with interpolated(base, sft, (1.0,), 0.0):
        assert not torch.equal(logits(base.model, inputs), logits(sft.model, inputs))


def test_only_the_running_block_has_weights_of_its_own():
    base, sft = loaded("llama", 0), loaded("llama", 1)
    own = {n: p.data_ptr() for n, p in base.model.named_parameters()}
    theirs = {n: p.data_ptr() for n, p in sft.model.named_parameters()}
    seen: list[tuple[int, set[int | None]]] = []

    def look(index):
        def hook(*_):
            new = {base.anatomy.block_of(n) for n, p in base.model.named_parameters()
                   if p.data_ptr() not in (own[n], theirs[n])}
            seen.append((index, new))
        return hook

    with interpolated(base, sft, (0.5, 0.5, 1.0, 0.25), 0.0):
        handles = [b.register_forward_pre_hook(look(i)) for i, b in enumerate(base.anatomy.blocks)]
        try:
            logits(base.model, model_inputs(base.model, batch_of(base)))
            with torch.inference_mode():
                run_blocks(base.model, base.anatomy, batch_of(base))
        finally:
            for handle in handles:
                handle.remove()
        assert {n: p.data_ptr() for n, p in base.model.named_parameters() if ".layers.2." not in n} == {
            n: p for n, p in own.items() if ".layers.2." not in n}
    assert seen == [(0, {0}), (1, {1}), (2, set()), (3, {3})] * 2


def test_restored_after_an_error_within_a_block():
    base, sft = loaded("llama", 0), loaded("llama", 1)
    before = bits(base.model)

    def fail(*_):
        raise RuntimeError("in the middle")

    handle = base.anatomy.blocks[2].mlp.register_forward_hook(fail)
    try:
        with pytest.raises(RuntimeError, match="in the middle"), interpolated(base, sft, (0.5,)):
            logits(base.model, model_inputs(base.model, batch_of(base)))
    finally:
        handle.remove()
    assert all(torch.equal(before[n], p) for n, p in base.model.named_parameters())
    assert not base.anatomy.blocks[2]._forward_pre_hooks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_interpolation_rounds_once(dtype):
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(37, 53, generator=generator, dtype=torch.float64).to(dtype)
    sft = (base.double() + 0.1 * torch.randn(37, 53, generator=generator, dtype=torch.float64)).to(dtype)
    for alpha in (0.0, 0.3, 0.5, 1.0, 1.5):
        got = interpolate_(torch.empty_like(base), base, sft, alpha)
        want = (base.double() + alpha * (sft.double() - base.double())).to(dtype)
        # of the larger end, which a small result may have cancelled from
        # (a 16-bit result is rounded once, from float32; a wide one at each step of the arithmetic)
        steps = 1 if dtype.itemsize == 2 else 3
        spacing = steps * torch.finfo(dtype).eps * torch.stack([base, sft, want]).double().abs().amax(dim=0)
        assert ((got.double() - want.double()).abs() <= spacing).all()
    assert torch.equal(interpolate_(torch.empty_like(base), base, sft, 1.0), sft)
    assert torch.equal(interpolate_(torch.empty_like(base), base, sft, 0.0), base)
    assert torch.equal(interpolate_(base.clone(), base, sft, 0.3), interpolate_(torch.empty_like(base), base, sft, 0.3))


@pytest.mark.parametrize("per_sample_mean", [False, True])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_scores_equal_those_of_copies(batch_size, per_sample_mean):
    base, sft = loaded("llama", 0), loaded("llama", 1)
    data = tiny_data(6)
    settings = [(0.0, 0.5, 1.0, 0.5), (0.5,)]
    frame = merge(base, sft, alphas=settings, data=data, samples=6, max_length=64, batch_size=batch_size,
                  per_sample_mean=per_sample_mean).frame
    rows = tokenize(data.sample(6, 0), base.tokenizer, max_length=64).rows
    tokens = np.array([len(row.ids) - 1 for row in rows])

    def mean(values: np.ndarray) -> float:
        return float(values.mean() if per_sample_mean else (values * tokens).sum() / tokens.sum())

    def losses(model) -> np.ndarray:
        found = []
        for row in rows:
            ids = torch.tensor([row.ids])
            with torch.inference_mode():
                found.append(model(input_ids=ids, labels=ids).loss.item())
        return np.array(found)

    ends = {"base": losses(base.model), "sft": losses(sft.model)}
    for setting in settings:
        want = losses(merged_copy(base, sft, setting, sum(setting) / len(setting)))
        part = frame[frame["layer"] == alphas_label(setting)]
        row = part[(part.metric == "loss") & (part.side == "merged")].iloc[0]
        assert row["value"] == pytest.approx(mean(want), rel=1e-4)
        assert row["n"] == 6
        assert row["mean_over"] == ("samples" if per_sample_mean else "tokens")
        assert row["alpha_rest"] == pytest.approx(sum(setting) / len(setting))
        perplexity = part[(part.metric == "perplexity")].iloc[0]
        assert perplexity["value"] == pytest.approx(np.exp(mean(want)), rel=1e-4)
        for end, values in ends.items():
            row = part[(part.metric == "loss") & (part.side == "difference") & (part.against == end)].iloc[0]
            assert row["value"] == pytest.approx(mean(want - values), abs=1e-4)
            assert row["low"] < row["value"] < row["high"]
            if per_sample_mean:
                half = 2.5706 * (want - values).std(ddof=1) / 6**0.5
                assert row["high"] - row["value"] == pytest.approx(half, rel=1e-2)
    for end, values in ends.items():
        row = frame[(frame.kind == "model") & (frame.layer == end) & (frame.metric == "loss")].iloc[0]
        assert row["value"] == pytest.approx(mean(values), rel=1e-5)


def test_ends_score_as_the_models_themselves():
    base, sft = loaded("llama", 0), loaded("llama", 1)
    frame = merge(base, sft, alphas=[(0, 0), (1, 1)], data=tiny_data(4), samples=4, max_length=48).frame
    zero = frame[(frame.side == "difference")].set_index(["layer", "against", "metric"])["value"]
    assert zero[("0,0", "base", "loss")] == 0
    assert zero[("1,1", "sft", "loss")] == 0
    assert zero[("0,0", "sft", "loss")] == -zero[("1,1", "base", "loss")] != 0


@pytest.mark.parametrize("family", ["llama", "llama_tied", "gpt2", "mixtral", "gemma3_nested"])
def test_saved_checkpoint_gives_the_scored_logits(family, tmp_path):
    base, sft = loaded(family, 0), loaded(family, 1)
    inputs = model_inputs(base.model, batch_of(base))
    before = bits(base.model)
    with interpolated(base, sft, ALPHAS):
        want = logits(base.model, inputs)
    folder = save_merged(base, sft, ALPHAS, tmp_path / "merged")
    assert all(torch.equal(before[n], p) for n, p in base.model.named_parameters())
    again = load_model(folder)
    assert again.anatomy.tied == base.anatomy.tied
    assert torch.equal(logits(again.model, inputs), want)
    assert [p.name for p in tmp_path.iterdir()] == ["merged"]


def test_merge_writes_one_folder_for_each_setting(tmp_path):
    base, sft = loaded("llama", 0), loaded("llama", 1)
    settings = [(0.0, 1.0), (0.5, 0.5)]
    result = merge(base, sft, alphas=settings, data=tiny_data(3), samples=3, max_length=48,
                   save=tmp_path / "out", alpha_rest=0.0)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["0.5_0.5", "0_1"]
    assert result.counts["written"] == [str(tmp_path / "out" / "0_1"), str(tmp_path / "out" / "0.5_0.5")]
    assert "Written" in result.summary()
    inputs = model_inputs(base.model, batch_of(base))
    for setting, name in zip(settings, ("0_1", "0.5_0.5"), strict=True):
        with interpolated(base, sft, setting, 0.0):
            want = logits(base.model, inputs)
        assert torch.equal(logits(load_model(tmp_path / "out" / name).model, inputs), want)
    only = merge(base, sft, alphas=(0.5,), save=tmp_path / "single")
    assert (tmp_path / "single" / "config.json").is_file()
    assert only.frame.empty
    assert only.figures() == {}


def test_base_is_restored_when_saving_fails(tmp_path, monkeypatch):
    base, sft = loaded("llama", 0), loaded("llama", 1)
    before = bits(base.model)

    def full(*args, **kwargs):
        raise OutputError("the disk is full")

    monkeypatch.setattr("midblock.analysis.merge.save_checkpoint", full)
    with pytest.raises(OutputError, match="disk is full"):
        save_merged(base, sft, (0.5,), tmp_path / "merged")
    assert all(torch.equal(before[n], p) for n, p in base.model.named_parameters())
    assert list(tmp_path.iterdir()) == []


def test_a_chain_merges_every_comparison():
    chain = [loaded("llama", seed) for seed in (0, 1, 2)]
    result = merge(chain, alphas=(0.5, 0.0), data=tiny_data(3), samples=3, max_length=48)
    frame = result.frame
    assert list(dict.fromkeys(frame["stage"])) == ["sft-base", "dpo-base", "dpo-sft"]
    assert set(frame[(frame.stage == "dpo-sft") & (frame.side == "difference")]["against"]) == {"dpo", "sft"}
    assert len(result.figures()) == 6
    assert sum("lowest loss" in line for line in result.details()) == 3
    assert len(result.scores()) == 9


def test_mistakes_are_named(tmp_path):
    base, sft = loaded("llama", 0), loaded("llama", 1)
    with pytest.raises(SettingsError, match="alphas"):
        parse_alphas("0,x")
    with pytest.raises(SettingsError, match="alphas"):
        parse_alphas("0,nan")
    with pytest.raises(SettingsError, match="nothing to do"):
        merge(base, sft, alphas=(0.5,))
    with pytest.raises(SettingsError, match="at least one list"):
        merge(base, sft, alphas=(), data=tiny_data(2))
    with pytest.raises(BlockRangeError, match="5 segments"):
        merge(base, sft, alphas=(0, 0, 0, 0, 1), data=tiny_data(2))
    with pytest.raises(SettingsError, match="samples must be at least 1"):
        MergeSettings(samples=0)
    with pytest.raises(SettingsError, match="unknown setting sample; did you mean samples"):
        merge(base, sft, alphas=(0.5,), data=tiny_data(2), sample=3)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(OutputError, match="not an empty folder"):
        merge(base, sft, alphas=(0.5,), data=tiny_data(2), save=tmp_path / "full")
    short = dataclasses.replace(tiny_data(1), examples=[dataclasses.replace(tiny_data(1).examples[0], text="a")])
    with pytest.raises(DataError, match="2 tokens"):
        merge(base, sft, alphas=(0.5,), data=short)
    untied = copy.copy(loaded("llama", 1))
    with pytest.raises(PairMismatchError, match=r"correspond.*lm_head"), interpolated(
            loaded("llama_tied", 0), untied, (0.5,)):
        pass


def zamba2(seed: int):
    """One attention block that several depths share."""
    torch.manual_seed(seed)
    model = tf.Zamba2ForCausalLM(tf.Zamba2Config(
        vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        layers_block_type=["hybrid", "mamba", "mamba", "hybrid"], num_mem_blocks=1, mamba_d_state=8, mamba_ngroups=1,
        n_mamba_heads=8, mamba_headdim=8, chunk_size=8, adapter_rank=4, pad_token_id=0)).eval()
    return dataclasses.replace(loaded("llama"), model=model, anatomy=find_anatomy(model), name=f"zamba2 {seed}")


@pytest.mark.parametrize("alphas", [(0.5, 0.0, 1.0, 0.5), (1.0, 0.3, 0.3, 1.0), (0.7,)])
def test_blocks_that_share_a_weight_are_scored_as_they_are_saved(alphas, tmp_path):
    base, sft = zamba2(0), zamba2(1)
    inputs = model_inputs(base.model, batch_of(base))
    before = bits(base.model)
    with interpolated(base, sft, alphas):
        want = logits(base.model, inputs)
    assert all(torch.equal(before[n], p) for n, p in base.model.named_parameters())
    again = load_model(save_merged(base, sft, alphas, tmp_path / "merged"))
    assert torch.equal(logits(again.model, inputs), want)


def test_different_shares_of_one_weight_are_refused(tmp_path):
    base, sft = zamba2(0), zamba2(1)
    with pytest.raises(SettingsError, match=r"blocks 0,3 share .*alphas differ \(0, 0.5\)"):
        merge(base, sft, alphas=(0.5, 0.5, 0.5, 0.0), save=tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_saved_merge_of_the_real_model(smollm2_folder: Path, tmp_path):
    base, sft = load_model(smollm2_folder, dtype="bfloat16"), load_model(smollm2_folder, dtype="bfloat16")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in sft.model.parameters():
            parameter.add_((0.002 * torch.randn(parameter.shape, generator=generator)).to(parameter.dtype))
    ids = torch.arange(5, 45).reshape(2, 20)
    before = bits(base.model)
    with interpolated(base, sft, (0.0, 0.5, 1.0, 0.5, 0.0)):
        want = logits(base.model, {"input_ids": ids})
    folder = save_merged(base, sft, (0.0, 0.5, 1.0, 0.5, 0.0), tmp_path / "merged")
    assert torch.equal(logits(load_model(folder).model, {"input_ids": ids}), want)
    assert all(torch.equal(before[n], p) for n, p in base.model.named_parameters())
