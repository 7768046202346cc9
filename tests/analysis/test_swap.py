"""Swaps by sharing and resuming against models with the weights really copied."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import transformers as tf

from analysis_helpers import loaded, tiny_data
from midblock.analysis.swap import swap
from midblock.capture import model_inputs, run_blocks, score_hidden, swap_blocks
from midblock.data import make_batches, pad_token_id, tokenize
from midblock.errors import BlockRangeError
from midblock.models import SharedParts, find_anatomy
from midblock.segments import segment_blocks
from midblock.settings.swap import cumulative_masks


@pytest.fixture(scope="module")
def pair():
    return loaded("llama", 0), loaded("llama", 1)


def copied_loss(recipient, donor, blocks, head, dataset) -> float:
    """Mean loss over all next tokens of a real copy of the recipient with the donor's weights, sample by sample."""
    model = copy.deepcopy(recipient.model)
    for b in blocks:
        model.model.layers[b].load_state_dict(donor.model.model.layers[b].state_dict())
    model.model.norm.load_state_dict(head.model.model.norm.state_dict())
    model.lm_head.load_state_dict(head.model.lm_head.state_dict())
    total = count = 0
    for row in tokenize(dataset, recipient.tokenizer, max_length=64).rows:
        ids = torch.tensor([row.ids])
        with torch.inference_mode():
            total += model(input_ids=ids, labels=ids).loss.item() * (len(row.ids) - 1)
        count += len(row.ids) - 1
    return total / count


@pytest.mark.parametrize("batch_size", [1, 4])
def test_every_swap_equals_a_copied_model(pair, batch_size):
    base, sft = pair
    data = tiny_data(5)
    result = swap(base, sft, data=data, masks=("10", "01"), samples=5, batch_size=batch_size, max_length=64)
    frame = result.frame
    models = {"base": base, "sft": sft}
    for recipient, donor in (("base", "sft"), ("sft", "base")):
        for mask in ("00", "10", "01"):
            blocks = [] if mask == "00" else segment_blocks(mask, 4)
            for head in ("base", "sft"):
                want = copied_loss(models[recipient], models[donor], blocks, models[head], data.sample(5, 0))
                row = frame[(frame.recipient == recipient) & (frame["head"] == head) & (frame.layer == mask)
                            & (frame.metric == "loss") & (frame.side == recipient)]
                assert row["value"].item() == pytest.approx(want, rel=1e-5)
                assert row["n"].item() == 5


def test_the_last_blocks_of_a_segment_alone_are_swapped(pair):
    base, sft = pair
    data = tiny_data(4)
    frame = swap(base, sft, data=data, segments=2, depth=1, samples=4, max_length=64).frame
    for mask, blocks in (("10", [1]), ("01", [3])):
        row = frame[(frame.recipient == "base") & (frame["head"] == "base") & (frame.layer == mask)
                    & (frame.metric == "loss") & (frame.side == "base")]
        assert row["value"].item() == pytest.approx(copied_loss(base, sft, blocks, base, data.sample(4, 0)), rel=1e-5)
    with pytest.raises(BlockRangeError, match="depth 3: a segment of mask 10 has only 2 blocks"):
        swap(base, sft, data=data, segments=2, depth=3, samples=4)


def test_difference_is_paired_with_the_same_head(pair):
    base, sft = pair
    frame = swap(base, sft, data=tiny_data(6), segments=2, samples=6, max_length=64).frame
    for metric in ("loss", "accuracy"):
        part = frame[(frame.recipient == "base") & (frame["head"] == "sft") & (frame.metric == metric)]
        value = part[(part.side == "base")].set_index("layer")["value"]
        change = part[part.side == "difference"].set_index("layer")["value"]
        for mask in ("10", "01"):
            assert change[mask] == pytest.approx(value[mask] - value["00"], abs=1e-9)


def test_swapping_a_model_with_itself_changes_nothing(pair):
    base, _ = pair
    frame = swap(base, base, data=tiny_data(4), segments=4, samples=4, max_length=64).frame
    assert (frame[frame.side == "difference"]["value"] == 0).all()


def test_swap_blocks_restores_also_after_an_error(pair):
    base, sft = pair
    rows = tokenize(tiny_data(2), base.tokenizer, max_length=64).rows
    batch, = make_batches(rows, batch_size=2, pad_id=pad_token_id(base.tokenizer))
    with torch.inference_mode():
        want = run_blocks(base.model, base.anatomy, batch)
        with swap_blocks(base.anatomy, sft.anatomy, range(4)):
            swapped = base.model(**model_inputs(base.model, batch)).logits

        def fail() -> None:
            with swap_blocks(base.anatomy, sft.anatomy, range(4)):
                raise RuntimeError("on purpose")

        with pytest.raises(RuntimeError, match="on purpose"):
            fail()
        assert not torch.allclose(base.anatomy.unembed(want), swapped)
        torch.testing.assert_close(run_blocks(base.model, base.anatomy, batch), want, rtol=0, atol=0)
    assert all("forward" not in b.__dict__ for b in (*base.anatomy.blocks, *sft.anatomy.blocks))


def test_cumulative_masks_end_with_everything(pair):
    base, sft = pair
    assert cumulative_masks(3)[-1] == cumulative_masks(3, from_output=True)[-1] == "111"
    frame = swap(base, sft, data=tiny_data(3), segments=2, cumulative=True, samples=3, max_length=64).frame
    loss = frame[(frame.metric == "loss") & (frame["head"] == "sft")].set_index(["layer", "side"])["value"]
    full, own = loss["11", "base"], loss["00", "sft"]
    # all blocks and the head are sft's; only the embeddings are the base's, and differ
    assert full != pytest.approx(own, rel=1e-9)


def test_equal_heads_are_scored_once_and_different_ones_are_not(pair, monkeypatch):
    base, sft = pair
    adapted = copy.deepcopy(base.model)
    with torch.no_grad():
        for block in adapted.model.layers:
            block.mlp.up_proj.weight.mul_(1.1)
    adapter_tuned = replace(base, model=adapted, anatomy=find_anatomy(adapted))
    calls = []

    def counted(*args):
        calls.append(1)
        return score_hidden(*args)

    monkeypatch.setattr("midblock.analysis.swap.score_hidden", counted)
    settings = {"data": tiny_data(4), "masks": ("10", "01"), "samples": 4, "batch_size": 4, "max_length": 64}
    frame = swap(base, adapter_tuned, **settings).frame
    # base, sft and the two halves joined either way: the first half of sft in base is the second of base in sft
    assert len(calls) == 4
    by_head = frame[frame.side != "difference"].set_index(["recipient", "layer", "metric", "side", "head"])["value"]
    assert (by_head.xs("base", level="head") == by_head.xs("sft", level="head")).all()
    changed = frame[(frame.side == "difference") & (frame.metric == "loss")]["value"]
    assert (changed.abs() > 1e-4).all()
    calls.clear()
    swap(base, sft, **settings)
    assert len(calls) == 2 * 3 * 2


def tuned_middle(base, blocks):
    """A copy of the model with other weights in these blocks only."""
    model = copy.deepcopy(base.model)
    with torch.no_grad():
        for b in blocks:
            model.model.layers[b].mlp.up_proj.weight.mul_(1.3)
    return replace(base, model=model, anatomy=find_anatomy(model))


def test_segments_that_tuning_left_alone_are_not_run_again(pair, monkeypatch):
    base, _ = pair
    sft = tuned_middle(base, [1])
    begun = []

    def counted(*args, **kwargs):
        begun.append(kwargs["start"])
        return run_blocks(*args, **kwargs)

    monkeypatch.setattr("midblock.analysis.swap.run_blocks", counted)
    data = tiny_data(4)
    frame = swap(base, sft, data=data, segments=4, samples=4, batch_size=4, max_length=64).frame
    assert begun == [0, 1]  # the base, and the tuned model from the only block that differs
    for recipient, donor, mask, blocks in (("base", "sft", "0100", [1]), ("base", "sft", "1000", [0]),
                                           ("sft", "base", "0100", [1]), ("sft", "base", "0001", [3])):
        models = {"base": base, "sft": sft}
        want = copied_loss(models[recipient], models[donor], blocks, base, data.sample(4, 0))
        row = frame[(frame.recipient == recipient) & (frame["head"] == recipient) & (frame.layer == mask)
                    & (frame.metric == "loss") & (frame.side == recipient)]
        assert row["value"].item() == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("cumulative", [False, True])
def test_the_plan_of_runs_gives_the_same_scores_as_runs_from_the_start(pair, monkeypatch, cumulative):
    base, other = pair
    stages = [base, tuned_middle(base, [1, 2]), other]
    settings = {"data": tiny_data(5), "names": ["base", "sft", "dpo"], "segments": 4, "samples": 5, "batch_size": 2,
                "max_length": 64, "cumulative": cumulative}
    shared = swap(stages, **settings).frame
    monkeypatch.setattr("midblock.analysis.swap.shared_parts", lambda models: SharedParts(
        (0, 1, 2), tuple((i,) * 4 for i in range(3)), (0, 1, 2)))
    alone = swap(stages, **settings).frame
    columns = ["layer", "metric", "side", "recipient", "donor", "head"]
    merged = shared.merge(alone, on=columns, how="outer", indicator=True)
    assert (merged["_merge"] == "both").all()
    torch.testing.assert_close(torch.tensor(merged["value_x"].to_numpy()), torch.tensor(merged["value_y"].to_numpy()),
                               rtol=1e-6, atol=1e-6)


def test_a_mask_that_does_not_fit_is_refused(pair):
    with pytest.raises(BlockRangeError, match="4 blocks"):
        swap(*pair, data=tiny_data(3), masks=("100000",), samples=3)


def gemma4_with_shared_keys_and_values(seed):
    torch.manual_seed(seed)
    return tf.Gemma4ForCausalLM(tf.Gemma4TextConfig(
        vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, initializer_range=0.1, sliding_window=8, hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=128, num_kv_shared_layers=2, pad_token_id=0,
        layer_types=["sliding_attention", "full_attention", "sliding_attention", "full_attention"])).eval()


@pytest.mark.parametrize("family", ["t5", "gemma4"])
def test_models_that_cannot_be_resumed_are_run_whole_and_that_is_recorded(family, monkeypatch):
    base = loaded("t5" if family == "t5" else "llama", 0)
    sft = loaded("t5" if family == "t5" else "llama", 1)
    if family == "gemma4":
        base, sft = (replace(m, model=made, anatomy=find_anatomy(made)) for m, made in (
            (base, gemma4_with_shared_keys_and_values(0)), (sft, gemma4_with_shared_keys_and_values(1))))
        monkeypatch.setattr("midblock.models.chain.check_fit", lambda models: None)
    data = tiny_data(4)
    result = swap(base, sft, data=data, segments=2, samples=4, batch_size=2, max_length=64)
    assert any("cannot" not in reason and "block 2" in reason for reason in result.counts["not_resumed"])
    for recipient, donor, name in ((base, sft, "base"), (sft, base, "sft")):
        for mask in ("10", "01"):
            model = copy.deepcopy(recipient.model)
            anatomy = find_anatomy(model)
            for b in segment_blocks(mask, 4):
                anatomy.blocks[b].load_state_dict(donor.anatomy.blocks[b].state_dict())
            total = count = 0
            for row in tokenize(data.sample(4, 0), base.tokenizer, max_length=64).rows:
                batch, = make_batches([row], batch_size=1, pad_id=0)
                with torch.inference_mode():
                    logits, target = model(**model_inputs(model, batch)).logits[0], batch.input_ids[0]
                # t5's decoder reads the text shifted right: its state at a place is of that token
                logits, target = logits[1:] if family == "t5" else logits[:-1], target[1:]
                total += torch.nn.functional.cross_entropy(logits, target, reduction="sum").item()
                count += len(logits)
            row = result.frame[(result.frame.recipient == name) & (result.frame["head"] == name)
                               & (result.frame.layer == mask) & (result.frame.metric == "loss")
                               & (result.frame.side == name)]
            assert row["value"].item() == pytest.approx(total / count, rel=1e-5)
