"""Tokens of the mean difference and tokens with the largest KL, against slow loops and planted directions."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from analysis_helpers import loaded, tiny_data
from midblock.analysis.lens import lens
from midblock.analysis.lens_tokens import tokens_of_directions
from midblock.analysis.steer import steer
from midblock.capture import run_blocks
from midblock.data import make_batches, tokenize
from midblock.models import find_anatomy

SETTINGS = {"samples": 6, "max_length": 64, "batch_size": 4}


def changed(base, change):
    """A copy of a model with one parameter changed in place."""
    model = copy.deepcopy(base.model)
    with torch.no_grad():
        change(model)
    return replace(base, model=model, anatomy=find_anatomy(model))


def states_of(model, row):
    """Hidden 0..L of one sample, (T, d) each."""
    kept = []
    batch, = make_batches([row], batch_size=1, pad_id=0)
    with torch.inference_mode():
        run_blocks(model.model, model.anatomy, batch, listener=lambda h, z: kept.append(z[0].clone()))
    return kept


@pytest.mark.parametrize("per_sample_mean", [False, True])
def test_both_tables_equal_the_slow_way(per_sample_mean):
    base, sft = loaded("llama", 0), loaded("llama", 1)
    data = tiny_data(6)
    result = lens(base, sft, data=data, **SETTINGS, difference_tokens=3, kl_tokens=7, per_sample_mean=per_sample_mean)
    rows = tokenize(data.sample(6, 0), base.tokenizer, max_length=64).rows
    differences: list[list[torch.Tensor]] = [[] for _ in range(5)]
    divergences = []
    for row in rows:
        mine, theirs = states_of(base, row), states_of(sft, row)
        for h in range(5):
            differences[h].append(theirs[h][:-1] - mine[h][:-1])
        with torch.inference_mode():
            p, q = (m.anatomy.unembed(z[-1])[:-1].double().log_softmax(-1) for m, z in ((base, mine), (sft, theirs)))
        for t, value in enumerate((p.exp() * (p - q)).sum(-1).tolist()):
            divergences.append((value, row.index, t, int(p[t].argmax()), int(q[t].argmax())))
    found = result.difference_tokens
    assert set(found["stage"]) == {"sft-base"}
    assert len(found) == 5 * 3
    for h in range(5):
        mean = (torch.stack([d.mean(0) for d in differences[h]]).mean(0) if per_sample_mean
                else torch.cat(differences[h]).mean(0))
        direction = mean / mean.norm() * math.sqrt(mean.numel())
        with torch.inference_mode():
            want = base.anatomy.unembed(direction[None])[0].double().softmax(-1)
        top = want.topk(3)
        own = found[found["layer"] == h].sort_values("rank")
        assert own["id"].tolist() == top.indices.tolist()
        assert own["probability"].tolist() == pytest.approx(top.values.tolist(), rel=1e-4)
        assert (own["low"] <= own["high"]).all()
        assert own["n"].tolist() == [6, 6, 6]
    divergences.sort(reverse=True)
    moved = result.kl_tokens
    assert moved["kl"].tolist() == pytest.approx([d[0] for d in divergences[:7]], rel=1e-4)
    assert list(zip(moved["sample"], moved["position"], strict=True)) == [(d[1], d[2]) for d in divergences[:7]]
    for (_, sample, t, before, after), seen in zip(divergences, moved.itertuples(), strict=False):
        row = next(r for r in rows if r.index == sample)
        assert seen.earlier == base.tokenizer.decode([before])
        assert seen.later == base.tokenizer.decode([after])
        assert seen.next == base.tokenizer.decode([row.ids[t + 1]])
        assert seen.context == base.tokenizer.decode(row.ids[max(0, t - 11):t + 1])


def test_a_planted_direction_is_named_with_certainty_and_only_from_where_it_is():
    """Every output of block 1 is moved along the head's row of one token."""
    base, token = loaded("gpt2", 0), 40
    row = base.model.lm_head.weight[token].detach()
    sft = changed(base, lambda model: model.transformer.h[1].mlp.c_proj.bias.add_(3 * row / row.norm()))
    result = lens(base, sft, data=tiny_data(6), **SETTINGS)
    found = result.difference_tokens
    assert found["layer"].min() == 2
    first = found[found["layer"] == 2].iloc[0]
    assert first["id"] == token
    norm = base.model.transformer.ln_f
    direction = torch.nn.functional.layer_norm(row * math.sqrt(row.numel()) / row.norm(), row.shape,
                                               norm.weight.detach(), norm.bias.detach())
    want = (base.model.lm_head.weight.detach() @ direction).double().softmax(0)[token].item()
    assert first["probability"] == pytest.approx(want, rel=1e-3)
    # all samples say the same, so the interval is a point
    assert first["high"] - first["low"] < 1e-3 * first["probability"]
    assert "the mean difference speaks most clearly" in result.summary()
    assert {"difference_tokens", "kl_tokens"} <= set(result.tables())
    assert "difference-tokens" in result.figures()
    steered = steer(base, sft, data=tiny_data(8), samples=8, max_length=64, blocks=(1,), alphas=(1.0,))
    assert steered.tokens.iloc[0]["id"] == token
    assert steered.tokens.iloc[0]["probability"] == pytest.approx(want, rel=1e-3)
    assert "The direction of block 1 speaks for" in steered.summary()


def test_equal_models_have_no_difference_and_zero_switches_off():
    base = loaded("qwen2", 0)
    same = lens(base, base, data=tiny_data(4), samples=4, max_length=64)
    assert same.difference_tokens.empty
    assert same.kl_tokens["kl"].max() < 1e-6
    off = lens(base, loaded("qwen2", 1), data=tiny_data(4), samples=4, max_length=64, difference_tokens=0, kl_tokens=0)
    assert off.difference_tokens.empty
    assert off.kl_tokens.empty
    assert lens(base, data=tiny_data(4), samples=4, max_length=64).kl_tokens.empty


def test_an_interrupted_pass_gives_the_same_tokens(tmp_path, monkeypatch):
    from midblock.analysis import passes

    base, sft = loaded("llama", 0), loaded("llama", 1)
    settings = {"data": tiny_data(6), **SETTINGS, "kl_tokens": 4}
    whole = lens(base, sft, **settings)
    feed, calls = passes.Lockstep, []

    def stops(runs):
        calls.append(runs)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return feed(runs)

    monkeypatch.setattr(passes, "Lockstep", stops)
    with pytest.raises(KeyboardInterrupt):
        lens(base, sft, **settings, state_folder=tmp_path / "state")
    monkeypatch.setattr(passes, "Lockstep", feed)
    again = lens(base, sft, **settings, state_folder=tmp_path / "state")
    for name in ("difference_tokens", "kl_tokens"):
        one, other = getattr(whole, name), getattr(again, name)
        assert one.drop(columns=one.select_dtypes("number").columns).equals(
            other.drop(columns=other.select_dtypes("number").columns))
        assert np.allclose(one.select_dtypes("number"), other.select_dtypes("number"), rtol=1e-6, equal_nan=True)


def test_tokens_of_directions_do_not_depend_on_length():
    model = loaded("gpt2", 0)
    directions = torch.randn(3, model.anatomy.hidden_size, generator=torch.Generator().manual_seed(0))
    ids, values = tokens_of_directions(model, directions, 4)
    tiny_ids, tiny_values = tokens_of_directions(model, 1e-6 * directions, 4)
    assert torch.equal(ids, tiny_ids)
    assert torch.allclose(values, tiny_values, rtol=1e-5)
    assert (values.diff(dim=1) <= 0).all()
