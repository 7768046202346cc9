"""Swaps by sharing and resuming against models with the weights really copied."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from analysis_helpers import loaded, tiny_data
from midblock.analysis.swap import cumulative_masks, swap, swap_blocks
from midblock.capture import model_inputs, next_token_scores, run_blocks
from midblock.data import make_batches, pad_token_id, tokenize
from midblock.errors import BlockRangeError
from midblock.models import find_anatomy
from midblock.segments import segment_blocks


@pytest.fixture(scope="module")
def pair():
    return loaded("llama", 0), loaded("llama", 1)


def copied_loss(recipient, donor, blocks, head, dataset) -> list[float]:
    """Mean next-token loss per sample of a real copy of the recipient with the donor's weights."""
    model = copy.deepcopy(recipient.model)
    for b in blocks:
        model.model.layers[b].load_state_dict(donor.model.model.layers[b].state_dict())
    model.model.norm.load_state_dict(head.model.model.norm.state_dict())
    model.lm_head.load_state_dict(head.model.lm_head.state_dict())
    losses = []
    rows = tokenize(dataset, recipient.tokenizer, max_length=64).rows
    for row in rows:
        ids = torch.tensor([row.ids])
        with torch.inference_mode():
            losses.append(model(input_ids=ids, labels=ids).loss.item())
    return losses


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
                assert row["value"].item() == pytest.approx(sum(want) / len(want), rel=1e-5)
                assert row["n"].item() == 5


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
        assert not torch.allclose(base.anatomy.read_out(want), swapped)
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
        return next_token_scores(*args)

    monkeypatch.setattr("midblock.analysis.swap.next_token_scores", counted)
    settings = {"data": tiny_data(4), "masks": ("10", "01"), "samples": 4, "batch_size": 4, "max_length": 64}
    frame = swap(base, adapter_tuned, **settings).frame
    assert len(calls) == 2 * 3
    by_head = frame[frame.side != "difference"].set_index(["recipient", "layer", "metric", "side", "head"])["value"]
    assert (by_head.xs("base", level="head") == by_head.xs("sft", level="head")).all()
    changed = frame[(frame.side == "difference") & (frame.metric == "loss")]["value"]
    assert (changed.abs() > 1e-4).all()
    calls.clear()
    swap(base, sft, **settings)
    assert len(calls) == 2 * 3 * 2


def test_a_mask_that_does_not_fit_is_refused(pair):
    with pytest.raises(BlockRangeError, match="4 blocks"):
        swap(*pair, data=tiny_data(3), masks=("100000",), samples=3)
