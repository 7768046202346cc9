"""Steering and patching against explicit loops over blocks, and cached against uncached decoding."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from analysis_helpers import loaded, tiny_data
from midblock.analysis.directions import direction_of, load_vectors, save_vectors
from midblock.analysis.steer import generate, generations, patch, steer
from midblock.capture import model_inputs, patched, run_blocks, steered
from midblock.data import Dataset, Example, make_batches, pad_token_id, tokenize
from midblock.errors import BlockRangeError, DataError, OutputError, SettingsError


@pytest.fixture(scope="module")
def pair():
    return loaded("llama", 0), loaded("llama", 1)


def batch_of(model, count=3, max_length=48):
    rows = tokenize(tiny_data(count), model.tokenizer, max_length=max_length).rows
    return make_batches(rows, batch_size=count, pad_id=pad_token_id(model.tokenizer))[0]


def states_of(model, batch):
    kept = []
    run_blocks(model.model, model.anatomy, batch, listener=lambda h, z: kept.append(z.clone()))
    return kept


def arithmetic_like(n):
    return Dataset("sums", "all", "built in", [
        Example(text=f"{i} and {i} make{2 * i} in all", prompt=f"{i} and {i} make", completion=f"{2 * i} in all")
        for i in range(10, 10 + n)])


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "t5", "bart", "mixtral"])
def test_steering_shifts_the_output_of_its_block_and_is_taken_away(name):
    model = loaded(name)
    batch = batch_of(model)
    vector = torch.randn(model.anatomy.hidden_size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        before = states_of(model, batch)
        with steered(model.anatomy, {1: vector, 3: 2 * vector}, alpha=-0.5):
            during = states_of(model, batch)
        after = states_of(model, batch)
    for h in (0, 1):
        assert torch.equal(before[h], during[h])
    torch.testing.assert_close(during[2], before[2] - 0.5 * vector)
    assert not torch.allclose(during[4], before[4])
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_steering_is_taken_away_after_an_error(pair):
    base, _ = pair
    hooks = [len(b._forward_hooks) for b in base.anatomy.blocks]

    def fail() -> None:
        with steered(base.anatomy, {0: torch.ones(32)}, 1.0):
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        fail()
    assert [len(b._forward_hooks) for b in base.anatomy.blocks] == hooks


def test_patching_replaces_only_the_named_positions(pair):
    base, sft = pair
    batch = batch_of(base)
    with torch.inference_mode():
        own, gift = states_of(base, batch), states_of(sft, batch)
        mask = torch.zeros_like(batch.input_ids, dtype=torch.bool)
        mask[0, 2] = mask[2, 5] = True
        for positions, chosen in ((mask, mask), ([1, 3], None), (None, torch.ones_like(mask))):
            if chosen is None:
                chosen = torch.zeros_like(mask)
                chosen[:, [1, 3]] = True
            with patched(base.anatomy, {2: (positions, gift[3])}):
                got = states_of(base, batch)
            assert torch.equal(got[3][chosen], gift[3][chosen])
            assert torch.equal(got[3][~chosen], own[3][~chosen])
        assert torch.equal(states_of(base, batch)[4], own[4])


def test_a_patch_of_another_shape_is_refused(pair):
    base, _ = pair
    batch = batch_of(base)
    with (torch.inference_mode(), pytest.raises(ValueError, match="shape"),
          patched(base.anatomy, {0: (None, torch.zeros(1, 2, 32))})):
        states_of(base, batch)
    with pytest.raises(ValueError, match="hidden size"), steered(base.anatomy, {0: torch.zeros(3)}):
        pass
    with pytest.raises(BlockRangeError, match="0-3"), steered(base.anatomy, {4: torch.zeros(32)}):
        pass


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_cached_decoding_equals_greedy_decoding_without_a_cache(name):
    model = loaded(name)
    vector = 3 * torch.randn(32, generator=torch.Generator().manual_seed(4))
    prompt = "the quick brown"
    ids = model.tokenizer(prompt, return_tensors="pt")["input_ids"]
    start = ids.shape[1]
    with torch.inference_mode(), steered(model.anatomy, {1: vector}, 1.5):
        for _ in range(12):
            logits = model.model(input_ids=ids, use_cache=False).logits[0, -1]
            ids = torch.cat([ids, logits.argmax().reshape(1, 1)], dim=1)
            if ids[0, -1].item() == model.tokenizer.eos_token_id:
                break
    want = model.tokenizer.decode(ids[0, start:], skip_special_tokens=True)
    assert generate(model, prompt, vectors={1: vector}, alpha=1.5, max_new_tokens=12) == want
    assert generate(model, prompt, max_new_tokens=12) != want


def test_directions_equal_a_numpy_decomposition():
    generator = torch.Generator().manual_seed(1)
    base = torch.randn(9, 6, generator=generator)
    sft = base + torch.randn(9, 6, generator=generator) * torch.tensor([4.0, 2, 1, 1, 1, 1]) + 0.7
    difference = (sft - base).double().numpy()
    mean = difference.mean(axis=0)
    for centered in (False, True):
        _, s, vt = np.linalg.svd(difference - mean * centered, full_matrices=False)
        for k in (1, 2, 3):
            vector, share = direction_of(base, sft, f"pc{k}", centered=centered)
            want = s[k - 1] / 3 * vt[k - 1]
            want = want if want @ mean >= 0 else -want
            assert vector.numpy() == pytest.approx(want, rel=1e-4, abs=1e-6)
            assert share == pytest.approx(s[k - 1] ** 2 / (s ** 2).sum())
    vector, share = direction_of(base, sft, "mean")
    assert vector.numpy() == pytest.approx(mean, rel=1e-5)
    unit = mean / np.linalg.norm(mean)
    assert share == pytest.approx(((difference @ unit) ** 2).sum() / (difference ** 2).sum())
    drawn, _ = direction_of(base, sft, "random", seed=3)
    assert drawn.norm().item() == pytest.approx(np.linalg.norm(mean), rel=1e-5)
    assert not torch.allclose(drawn, direction_of(base, sft, "random", seed=4)[0])


def test_directions_beyond_the_rank_and_unknown_ones_are_refused():
    base = torch.zeros(3, 5)
    with pytest.raises(SettingsError, match="0 principal directions"):
        direction_of(base, base, "pc1")
    with pytest.raises(SettingsError, match="2 principal directions"):
        direction_of(base, torch.eye(3, 5), "pc3", centered=True)
    with pytest.raises(SettingsError, match="pc0"):
        direction_of(base, base, "pc0")


def split_of(n, seed=0):
    order = np.random.default_rng(seed).permutation(n)
    return order[:(n + 1) // 2], order[(n + 1) // 2:]


@pytest.mark.parametrize("name", ["llama", "t5"])
@pytest.mark.parametrize("together", [False, True])
def test_the_direction_comes_from_one_half_and_the_other_is_scored(name, together):
    base, sft = loaded(name, 0), loaded(name, 1)
    data = tiny_data(7)
    result = steer(base, sft, data=data, samples=7, max_length=48, batch_size=2, blocks=(1, 3), alphas=(0, 0.5),
                   together=together)
    rows = tokenize(data.sample(7, 0), base.tokenizer, max_length=48).rows
    fitted, scored = split_of(7)
    single = [make_batches([r], batch_size=1, pad_id=0)[0] for r in rows]
    with torch.inference_mode():
        pooled = {s: [[z[0].mean(dim=0) for z in states_of(m, b)] for b in single]
                  for s, m in (("base", base), ("sft", sft))}
        vectors = {b: torch.stack([pooled["sft"][i][b + 1] - pooled["base"][i][b + 1] for i in fitted]).mean(dim=0)
                   for b in (1, 3)}
        for b in (1, 3):
            torch.testing.assert_close(result.vectors["sft-base", b], vectors[b], rtol=1e-4, atol=1e-5)
        groups = {"1,3": vectors} if together else {b: {b: vectors[b]} for b in (1, 3)}
        loss: dict = {}
        for place, own in {"none": {}, **groups}.items():
            with steered(base.anatomy, own, 0.5):
                for i in scored:
                    logits, target = base.model(**model_inputs(base.model, single[i])).logits[0], single[i].input_ids[0]
                    # t5's decoder reads the text shifted right: its state at a place is of that token
                    logits, target = logits[1:] if name == "t5" else logits[:-1], target[1:]
                    loss.setdefault(place, []).append(torch.nn.functional.cross_entropy(logits, target).item())
    tokens = np.array([single[i].input_ids.shape[1] - 1 for i in scored])

    def pooled_mean(values):
        return (np.array(values) * tokens).sum() / tokens.sum()

    frame = result.frame[result.frame.metric == "loss"]
    assert len(frame[(frame.kind != "model") & (frame.side == "base")]) == 2 * len(groups)
    for place in groups:
        row = frame[(frame.layer == place) & (frame.alpha == 0.5)].set_index("side")
        assert row.loc["base", "value"] == pytest.approx(pooled_mean(loss[place]), rel=1e-4)
        paired = pooled_mean(loss[place]) - pooled_mean(loss["none"])
        assert row.loc["difference", "value"] == pytest.approx(paired, rel=1e-3, abs=1e-6)
        assert row.loc["difference", "low"] < paired < row.loc["difference", "high"]
        assert row.loc["difference", "n"] == 3
        still = frame[(frame.layer == place) & (frame.alpha == 0)].set_index("side")
        assert still.loc["difference", ["value", "low", "high"]].tolist() == [0, 0, 0]
    assert result.counts["direction_samples"] == 4
    assert result.counts["scored_samples"] == 3


def test_held_out_cosine_and_both_unchanged_models_are_reported(pair):
    base, sft = pair
    frame = steer(base, sft, data=tiny_data(8), samples=8, max_length=48, blocks=(2,)).frame
    cosine = frame[frame.metric == "direction_cosine"].iloc[0]
    assert cosine["n"] == 4
    rows = tokenize(tiny_data(8).sample(8, 0), base.tokenizer, max_length=48).rows
    fitted, scored = split_of(8)
    with torch.inference_mode():
        shift = torch.stack([
            states_of(sft, b)[3][0].mean(dim=0) - states_of(base, b)[3][0].mean(dim=0)
            for b in (make_batches([r], batch_size=1, pad_id=0)[0] for r in rows)])
    want = torch.cosine_similarity(shift[scored], shift[fitted].mean(dim=0), dim=1).mean().item()
    assert cosine["value"] == pytest.approx(want, abs=1e-5)
    whole = frame[(frame.kind == "model") & (frame.metric == "loss")].set_index("side")["value"]
    assert whole["difference"] == pytest.approx(whole["sft"] - whole["base"])


def test_a_model_against_itself_is_not_moved(pair):
    base, _ = pair
    result = steer(base, base, data=tiny_data(6), samples=6, max_length=48)
    frame = result.frame
    assert (frame[frame.side == "difference"]["value"] == 0).all()
    assert {r["reason"] for r in result.table.reasons} == {"the stages do not differ here"}
    moved = patch(base, base, data=tiny_data(6), samples=6, max_length=48).frame
    assert moved[moved.side == "difference"]["value"].abs().max() < 1e-5


def test_patching_everything_at_the_last_block_leaves_only_the_head(pair):
    base, sft = pair
    frame = patch(base, sft, data=tiny_data(5), samples=5, max_length=48, blocks=(3,), alphas=(1.0,)).frame
    row = frame[(frame.kind == "block") & (frame.metric == "loss") & (frame.side == "base") & (frame.alpha == 1)]
    losses = []
    with torch.inference_mode():
        for r in tokenize(tiny_data(5).sample(5, 0), base.tokenizer, max_length=48).rows:
            batch = make_batches([r], batch_size=1, pad_id=0)[0]
            logits = base.anatomy.unembed(states_of(sft, batch)[-1])[0, :-1]
            losses += torch.nn.functional.cross_entropy(logits, batch.input_ids[0, 1:], reduction="none").tolist()
    assert row["value"].item() == pytest.approx(np.mean(losses), rel=1e-5)
    assert row["n"].item() == 5


@pytest.mark.parametrize("positions", ["prompt", "completion", "last-prompt"])
@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_patching_named_positions_equals_a_loop(pair, positions, alpha):
    base, sft = pair
    data = arithmetic_like(4)
    frame = patch(base, sft, data=data, positions=positions, supervised=True, samples=4, blocks=(1,), alphas=(alpha,),
                  batch_size=3).frame
    row = frame[(frame.kind == "block") & (frame.metric == "loss") & (frame.side == "base")
                & (frame.alpha == alpha)]
    losses = []
    with torch.inference_mode():
        for r in tokenize(data.sample(4, 0), base.tokenizer, max_length=256, supervised=True).rows:
            batch = make_batches([r], batch_size=1, pad_id=0)[0]
            start = r.supervised[0][0]
            places = {"prompt": range(start), "completion": range(start, len(r.ids)),
                      "last-prompt": [start - 1]}[positions]
            own, gift = states_of(base, batch)[2], states_of(sft, batch)[2]
            mixed = own.clone()
            for t in places:
                mixed[0, t] = (1 - alpha) * own[0, t] + alpha * gift[0, t]
            with patched(base.anatomy, {1: (None, mixed)}):
                logits = base.model(**model_inputs(base.model, batch)).logits[0]
            counted = range(start, len(r.ids))
            losses += [-logits[t - 1].log_softmax(-1)[r.ids[t]].item() for t in counted]
    assert row["value"].item() == pytest.approx(np.mean(losses), rel=1e-4)


def test_a_chain_steers_each_comparison(pair):
    base, sft = pair
    third = loaded("llama", 2)
    result = steer([base, sft, third], data=tiny_data(6), samples=6, max_length=48, blocks=(2,), alphas=(1.0,))
    assert set(result.vectors) == {("sft-base", 2), ("dpo-base", 2), ("dpo-sft", 2)}
    together = result.vectors["sft-base", 2] + result.vectors["dpo-sft", 2]
    torch.testing.assert_close(together, result.vectors["dpo-base", 2], rtol=1e-4, atol=1e-5)
    frame = result.frame
    assert set(frame[frame.stage == "dpo-sft"].side) >= {"sft", "dpo", "difference"}
    assert len(result.details()) == 2 * 3  # the best place, and what the direction speaks for
    assert len(result.figures()) == 6


def test_generations_cover_every_variant_and_vectors_survive_a_file(pair, tmp_path):
    base, sft = pair
    result = steer(base, sft, data=tiny_data(6), samples=6, max_length=48, blocks=(1, 2), alphas=(0, 1.0, 4.0))
    made = generations([base, sft], result, ["the old"], max_new_tokens=6)
    assert len(made) == 2 + 2 * 2
    plain = made[(made.model == "base") & (made.alpha == 0)]["text"].item()
    assert plain == generate(base, "the old", max_new_tokens=6)
    strong = made[(made.blocks == "2") & (made.alpha == 4)]["text"].item()
    assert strong == generate(base, "the old", vectors={2: result.vectors["sft-base", 2]}, alpha=4, max_new_tokens=6)
    path = save_vectors(tmp_path / "v.safetensors", result.vectors, direction="mean")
    again = load_vectors(path)
    assert set(again) == set(result.vectors)
    assert all(torch.equal(again[k], result.vectors[k]) for k in again)
    path.write_bytes(b"nothing")
    with pytest.raises(OutputError, match="steering vectors"):
        load_vectors(path)


def test_mistakes_are_refused(pair, monkeypatch):
    base, sft = pair
    with pytest.raises(SettingsError, match=r"samples must be.*alphas must be"):
        steer(base, sft, data=tiny_data(4), samples=2, alphas=(0.0,))
    with pytest.raises(SettingsError, match="direction"):
        steer(base, sft, data=tiny_data(4), direction="median")
    with pytest.raises(BlockRangeError, match="0-3"):
        steer(base, sft, data=tiny_data(4), blocks=(4,))
    with pytest.raises(DataError, match="at least 4"):
        steer(base, sft, data=tiny_data(3))
    with pytest.raises(SettingsError, match="supervised"):
        patch(base, sft, data=tiny_data(4), positions="prompt")
    monkeypatch.setattr(base.tokenizer, "chat_template", None)
    with pytest.raises(DataError, match="chat template"):
        generate(base, "x", chat=True)
