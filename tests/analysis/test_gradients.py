"""Gradients per block against a slow loop over a copy of the model."""

from __future__ import annotations

import copy
import math

import numpy as np
import pandas as pd
import pytest
import torch

import midblock.analysis.gradients as gradients_module
from analysis_helpers import loaded, tiny_data
from conftest import build_tiny_tokenizer
from families import tiny
from midblock.analysis.gradients import (
    GradientSettings,
    GradientsResult,
    backward_batches,
    gradients,
    supervised_batches,
)
from midblock.analysis.weights import weights
from midblock.data import Dataset, Example
from midblock.errors import SettingsError, TrainingError
from midblock.models import LoadedModel, find_anatomy, save_checkpoint
from midblock.results import Table


def fresh(name: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> LoadedModel:
    """A model of its own: the cached ones must stay as they are."""
    shared = loaded(name, seed)
    model = copy.deepcopy(shared.model).to(dtype)
    return LoadedModel(model=model, tokenizer=shared.tokenizer, anatomy=find_anatomy(model), spec=name, name=name,
                       folder=None, dtype=dtype, device=shared.device)


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize("name", ["llama", "llama_tied", "gpt2", "mixtral"])
def test_every_quantity_equals_a_slow_loop(name):
    model = fresh(name)
    data = tiny_data(6)
    frame = gradients(model, data=data, samples=6, batch_size=2, max_length=64).frame
    batches, _ = supervised_batches(model, data.sample(6, 0), max_length=64, batch_size=2)
    assert len(batches) == 3
    norms, fisher, taylor = (np.zeros((3, 4)) for _ in range(3))
    q_norms = np.zeros((3, 4))
    for i, batch in enumerate(batches):
        slow = copy.deepcopy(model.model).requires_grad_(True)
        logits = slow(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        total = count = 0.0
        for row in range(len(batch)):
            for t in range(int(batch.lengths[row]) - 1):
                total = total - logits[row, t].float().log_softmax(-1)[batch.input_ids[row, t + 1]]
                count += 1
        (total / count).backward()
        for b, block in enumerate(find_anatomy(slow).blocks):
            grads = [(n, p.detach().numpy().astype(float), p.grad.numpy().astype(float))
                     for n, p in block.named_parameters() if p.grad is not None]
            fisher[i, b] = sum((g ** 2).sum() for _, _, g in grads)
            norms[i, b] = math.sqrt(fisher[i, b])
            taylor[i, b] = abs(sum((w * g).sum() for _, w, g in grads))
            q_norms[i, b] = math.sqrt(sum((g ** 2).sum() for n, _, g in grads if "q_proj.weight" in n))
    whole = frame[frame.matrix == "all"].set_index(["metric", "layer"])
    for metric, want in (("gradient_norm", norms), ("fisher", fisher), ("taylor", taylor)):
        for b in range(4):
            assert whole.loc[(metric, b), "value"] == pytest.approx(want[:, b].mean(), rel=1e-4), (metric, b)
            assert whole.loc[(metric, b), "n"] == 3
            assert whole.loc[(metric, b), "low"] < want[:, b].mean() < whole.loc[(metric, b), "high"]
    for b, block in enumerate(model.anatomy.blocks):
        size = math.sqrt(sum(p.double().square().sum().item() for p in block.parameters()))
        assert whole.loc[("gradient_norm_relative", b), "value"] == pytest.approx(norms[:, b].mean() / size, rel=1e-4)
    if q_norms.any():
        own = frame[(frame.matrix == "q") & (frame.metric == "gradient_norm")].set_index("layer")["value"]
        assert own.to_numpy() == pytest.approx(q_norms.mean(axis=0), rel=1e-4)


def test_the_loss_counts_completions_only():
    model = fresh("llama")
    examples = [Example(text=f"{a} and {a} are{b}", prompt=f"{a} and {a} are", completion=f" {b}")
                for a, b in (("one", "two"), ("two", "four"), ("three", "six"))]
    result = gradients(model, data=Dataset("sums", "all", "built in", examples), samples=3, batch_size=1)
    batches, _ = supervised_batches(model, Dataset("sums", "all", "built in", examples).sample(3, 0), max_length=256,
                                    batch_size=1)
    for batch, loss in zip(batches, result.losses["base"], strict=True):
        counted = batch.labels[0, 1:] != -100
        assert 0 < counted.sum() < counted.numel()
        with torch.no_grad():
            logp = model.model(input_ids=batch.input_ids).logits[0, :-1].log_softmax(-1)
        gold = logp.gather(1, batch.input_ids[0, 1:, None])[:, 0]
        assert loss == pytest.approx(-gold[counted].mean().item(), rel=1e-5)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_encoder_decoders_score_the_decoder_s_own_shifted_text(name):
    model = fresh(name)
    result = gradients(model, data=tiny_data(2), samples=2, batch_size=1, max_length=48)
    batches, _ = supervised_batches(model, tiny_data(2).sample(2, 0), max_length=48, batch_size=1)
    for batch, loss in zip(batches, result.losses["base"], strict=True):
        with torch.no_grad():  # transformers shifts the labels into the decoder's input itself
            want = model.model(input_ids=batch.input_ids, labels=batch.input_ids).loss.item()
        assert loss == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("name", ["llama", "llama_tied"])
def test_steps_train_as_a_plain_loop_and_put_the_weights_back(name):
    model = fresh(name)
    before = weights_of(model.model)
    flags = [p.requires_grad for p in model.model.parameters()]
    result = gradients(model, data=tiny_data(4), samples=4, batch_size=2, max_length=48, steps=3, learning_rate=1e-3)
    after = weights_of(model.model)
    assert all(torch.equal(before[n], after[n]) for n in before)
    assert [p.requires_grad for p in model.model.parameters()] == flags
    assert all(p.grad is None for p in model.model.parameters())

    batches, _ = supervised_batches(model, tiny_data(4).sample(4, 0), max_length=48, batch_size=2)
    order = np.random.default_rng(0).permutation(len(batches))
    plain = copy.deepcopy(model.model).requires_grad_(True)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-3, weight_decay=0.0)
    losses = []
    for i in range(3):
        batch = batches[order[i % len(order)]]
        loss = plain(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert result.losses["base"] == pytest.approx(losses, rel=1e-5)
    frame = result.frame
    change = frame[(frame.metric == "weight_change") & (frame.matrix == "all")].set_index("layer")["value"]
    relative = frame[(frame.metric == "weight_change_relative") & (frame.matrix == "all")].set_index("layer")["value"]
    trained = find_anatomy(plain)
    for b in range(4):
        pairs = list(zip(trained.blocks[b].parameters(), model.anatomy.blocks[b].parameters(), strict=True))
        squares = [(p.detach().double() - q.double()).square().sum().item() for p, q in pairs]
        size = math.sqrt(sum(q.double().square().sum().item() for _, q in pairs))
        assert change[b] == pytest.approx(sum(map(math.sqrt, squares)), rel=1e-4)
        assert relative[b] == pytest.approx(math.sqrt(sum(squares)) / size, rel=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3"])
def test_the_change_of_a_short_training_is_that_of_its_checkpoints(name, tmp_path, monkeypatch):
    """``weight_change`` means the same in `gradients --steps` and in `weights`, of matrices and of whole blocks."""
    model = fresh(name)
    base = save_checkpoint(model.model, None, tmp_path / "base")
    saved = []
    changes = gradients_module._changes

    def save_first(*args):  # while the weights are the trained ones
        saved.append(save_checkpoint(model.model, None, tmp_path / "sft"))
        changes(*args)

    monkeypatch.setattr(gradients_module, "_changes", save_first)
    own = gradients(model, data=tiny_data(4), samples=4, batch_size=2, max_length=48, steps=2, learning_rate=1e-2).frame
    other = weights(base, saved[0], spectra=False).frame
    for metric in ("weight_change", "weight_change_relative"):
        found = own[own.metric == metric].set_index(["layer", "matrix"])["value"]
        whole = other[(other.metric == metric) & (other.matrix == "all")].set_index("layer")["value"]
        for b in range(4):
            assert found[b, "all"] == pytest.approx(whole[b], rel=1e-4)
        single = other[(other.metric == metric) & (other.matrix == "o") & (other.kind == "block")]
        assert found.xs("o", level="matrix").tolist() == pytest.approx(single["value"].tolist(), rel=1e-4)


def test_small_updates_of_16_bit_weights_are_not_rounded_away():
    model = fresh("llama", dtype=torch.bfloat16)
    before = weights_of(model.model)
    frame = gradients(model, data=tiny_data(4), samples=4, batch_size=2, max_length=48, steps=2,
                      learning_rate=1e-6).frame
    change = frame[(frame.metric == "weight_change") & (frame.matrix == "q")]["value"]
    entries = model.anatomy.blocks[0].self_attn.q_proj.weight.numel()
    # AdamW moves each entry by at most the rate per update, and by nearly that in the first
    assert (change > 0.5e-6 * math.sqrt(entries)).all()
    assert (change < 2.5e-6 * math.sqrt(entries)).all()
    after = weights_of(model.model)
    assert all(torch.equal(before[n], after[n]) for n in before)


def test_weights_are_put_back_after_a_failure():
    model = fresh("llama")
    before = weights_of(model.model)
    with pytest.raises(TrainingError, match="learning rate"):
        gradients(model, data=tiny_data(4), samples=4, batch_size=2, max_length=48, steps=8, learning_rate=1e30)
    after = weights_of(model.model)
    assert all(torch.equal(before[n], after[n]) for n in before)
    assert all(p.grad is None for p in model.model.parameters())


def test_only_chosen_parameters_get_gradients():
    model = fresh("llama")
    batches, _ = supervised_batches(model, tiny_data(2), max_length=48, batch_size=2)
    chosen = list(model.anatomy.blocks[2].parameters())
    seen: list[set[int]] = []
    backward_batches(model, batches, lambda number, loss: seen.append(
        {id(p) for p in model.model.parameters() if p.grad is not None}), parameters=chosen)
    assert seen == [{id(p) for p in chosen}]


def test_a_chain_measures_each_stage_by_itself():
    base, sft = fresh("llama", 0), fresh("llama", 1)
    both = gradients([base, sft], data=tiny_data(4), samples=4, max_length=48)
    alone = gradients(sft, data=tiny_data(4), samples=4, max_length=48, names=["sft"])
    frame = both.frame
    pd.testing.assert_frame_equal(frame[frame.side == "sft"].reset_index(drop=True), alone.frame)
    assert "base: gradient_norm" in both.summary()
    assert "sft: gradient_norm" in both.summary()
    assert set(both.figures()) == {"gradients", "gradient-heatmap-base", "gradient-heatmap-sft"}


def test_a_matrix_of_zeros_has_no_relative_norm_and_says_so():
    model = fresh("gpt2")
    with torch.no_grad():
        model.model.transformer.h[1].attn.c_proj.weight.zero_()
    result = gradients(model, data=tiny_data(2), samples=2, max_length=48)
    reasons = [r for r in result.table.reasons if r["metric"] == "gradient_norm_relative"]
    assert [(r["layer"], r["reason"]) for r in reasons] == [(1, "the weights are all zero")]


def test_settings_out_of_range_are_refused_together():
    with pytest.raises(SettingsError, match=r"samples.*steps.*learning_rate"):
        gradients(loaded("llama"), data=tiny_data(2), samples=0, steps=-1, learning_rate=0.0)




def test_the_summary_names_zones_and_the_largest_block_of_its_table():
    table = Table()
    planted = [8.0, 6.0, 1.0, 2.0, 3.0, 9.5, 2.0, 1.0, 2.0, 0.25, 0.75]  # blocks 2 and 8 lie at 0.2 and 0.8
    for block, value in enumerate(planted):
        table.add("block", block, "gradient_norm", "sft", value, n=1, matrix="all")
        table.add("block", block, "gradient_norm", "sft", 100.0, n=1, matrix="q")
    summary = "\n".join(GradientsResult(table, ["sft"], len(planted), GradientSettings()).details())
    middle = sum(planted[2:9]) / 7
    assert summary == (f"sft: gradient_norm is largest at block 5 (depth 0.50: 9.5); early 7, middle {middle:.4g}, "
                       "late 0.5.")


def test_a_family_whose_own_loss_does_not_shift_is_measured_on_the_next_token() -> None:
    model = tiny("bart")  # BartForCausalLM compares a token with its own place
    one = LoadedModel(model=model, tokenizer=build_tiny_tokenizer(), anatomy=find_anatomy(model), spec="bart",
                      name="bart", folder=None, dtype=torch.float32, device=torch.device("cpu"))
    batches, _ = supervised_batches(one, tiny_data(2), max_length=64, batch_size=1)
    losses: list[float] = []
    backward_batches(one, batches, lambda _, loss: losses.append(loss))
    for batch, loss in zip(batches, losses, strict=True):
        with torch.no_grad():
            logits = model(input_ids=batch.input_ids, use_cache=False).logits[0]
        want = torch.nn.functional.cross_entropy(logits[:-1], batch.input_ids[0, 1:])
        assert loss == pytest.approx(float(want), rel=1e-5)
