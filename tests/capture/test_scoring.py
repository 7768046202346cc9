"""Chunked next-token scores against a loop over the full logits."""

from __future__ import annotations

import math

import pytest
import torch

from families import FAMILIES, token_ids
from midblock.capture import counted_positions, model_inputs, next_token_scores, run_blocks, sample_means, scoring
from midblock.data import Batch
from midblock.models.anatomy import find_anatomy


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("chunk_numbers", [1, 1000, 1 << 24])
def test_scores_equal_a_loop_over_logits(labelled, chunk_numbers, monkeypatch):
    monkeypatch.setattr(scoring, "_CHUNK_NUMBERS", chunk_numbers)
    model = FAMILIES["llama"]()
    anatomy = find_anatomy(model)
    ids = token_ids(3, 9)
    mask = torch.ones_like(ids)
    mask[2, 5:] = 0
    labels = None
    if labelled:
        labels = torch.where(mask > 0, ids, -100)
        labels[:, :4] = -100
    batch = Batch(indices=(0, 1, 2), input_ids=ids, attention_mask=mask, labels=labels)
    with torch.inference_mode():
        scores = next_token_scores(anatomy.read_out, run_blocks(model, anatomy, batch), batch, anatomy.vocab_size)
        logits = model(**model_inputs(model, batch)).logits.double()
    means, counts = sample_means(scores.row, scores.loss, 3)
    for row in range(3):
        losses, right = [], []
        for t in range(8):
            if mask[row, t + 1] == 0 or (labels is not None and labels[row, t + 1] == -100):
                continue
            top = logits[row, t]
            losses.append(math.log(sum(math.exp(v) for v in top.tolist())) - top[ids[row, t + 1]].item())
            right.append(int(top.argmax()) == int(ids[row, t + 1]))
        assert counts[row] == len(losses)
        assert means[row].item() == pytest.approx(sum(losses) / len(losses), rel=1e-5)
        assert scores.correct[scores.row == row].sum().item() == sum(right)


def test_last_position_and_padding_never_count():
    ids = token_ids(2, 6)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]])
    counts = counted_positions(Batch(indices=(0, 1), input_ids=ids, attention_mask=mask))
    assert counts.tolist() == [[True] * 5 + [False], [False, False, True, True, True, False]]


def test_a_row_without_counted_tokens_has_no_mean():
    means, counts = sample_means(torch.tensor([0, 0]), torch.tensor([1.0, 3.0]), 2)
    assert means[0] == 2
    assert math.isnan(means[1])
    assert counts.tolist() == [2, 0]
