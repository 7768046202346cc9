"""Swaps by sharing and resuming against models with the weights really copied."""

from __future__ import annotations

import copy
import sys
import time
from dataclasses import replace

import pytest
import torch

from analysis_helpers import loaded, tiny_data
from midblock.analysis.swap import cumulative_masks, swap, swap_blocks
from midblock.capture import model_inputs, next_token_scores, run_blocks
from midblock.data import make_batches, pad_token_id, tokenize
from midblock.errors import BlockRangeError
from midblock.models import SharedParts, find_anatomy
from midblock.segments import segment_blocks

swap_module = sys.modules["midblock.analysis.swap"]  # the package has a function of this name


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
        assert row["value"].item() == pytest.approx(sum(want) / len(want), rel=1e-5)


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


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_threads_change_no_score(family, monkeypatch):
    base, sft = loaded(family, 0), loaded(family, 1)
    chosen = {"data": tiny_data(7), "segments": 2, "samples": 7, "batch_size": 3, "max_length": 64}
    frames, told = [], {1: [], 2: []}
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            frames.append(swap(base, sft, **chosen, progress=lambda what, done, total, note="", to=told[threads]:
                               to.append((done, total))).frame)
    finally:
        torch.set_num_threads(before)
    one, two = frames
    assert one.drop(columns=["value", "low", "high"]).equals(two.drop(columns=["value", "low", "high"]))
    assert two["value"].to_numpy() == pytest.approx(one["value"].to_numpy(), rel=1e-5, abs=1e-6)
    assert [d for d, _ in told[2]] == sorted(d for d, _ in told[2])
    assert told[2][-1] == told[1][-1]
    assert told[2][-1][0] == told[2][-1][1]


def test_an_error_in_one_thread_ends_all(pair, monkeypatch):
    base, sft = pair
    calls = []

    def fails(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return next_token_scores(*args)

    monkeypatch.setattr(swap_module, "next_token_scores", fails)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(KeyboardInterrupt):
            swap(base, sft, data=tiny_data(8), segments=2, samples=8, batch_size=2, max_length=64)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert not any("forward" in m.__dict__ for model in pair for m in model.model.modules())


def test_a_failed_run_fails_those_that_wait_for_it(pair, monkeypatch):
    base, sft = pair

    def fails(*args, **kwargs):
        time.sleep(0.2)  # so that the other thread waits
        raise MemoryError

    monkeypatch.setattr(swap_module, "run_blocks", fails)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(MemoryError):
            swap(base, sft, data=tiny_data(8), masks=("01",), samples=8, batch_size=2, max_length=64)
    finally:
        torch.set_num_threads(before)
