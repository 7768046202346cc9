"""Chunked next-token scores against a loop over the full logits."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from families import FAMILIES, token_ids
from midblock.capture import counted_positions, model_inputs, run_blocks, score_batch, score_hidden, scoring
from midblock.data import Batch, make_batches
from midblock.data.tokens import TokenRow
from midblock.models import find_anatomy


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("head", [1, 7, 128])
def test_scores_equal_a_loop_over_logits(labelled, head, monkeypatch):
    monkeypatch.setattr(scoring, "head_rows", lambda vocab, device: head)
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
        scores = score_batch(model, anatomy, batch)
        logits = model(**model_inputs(model, batch)).logits.double()
    for row in range(3):
        losses, right = [], []
        for t in range(8):
            if mask[row, t + 1] == 0 or (labels is not None and labels[row, t + 1] == -100):
                continue
            top = logits[row, t]
            losses.append(math.log(sum(math.exp(v) for v in top.tolist())) - top[ids[row, t + 1]].item())
            right.append(int(top.argmax()) == int(ids[row, t + 1]))
        assert scores.tokens[row] == len(losses)
        assert scores.loss[row].item() == pytest.approx(sum(losses), rel=1e-5)
        assert scores.correct[row].item() == sum(right)


def test_last_position_and_padding_never_count():
    ids = token_ids(2, 6)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]])
    counts = counted_positions(Batch(indices=(0, 1), input_ids=ids, attention_mask=mask))
    assert counts.tolist() == [[True] * 5 + [False], [False, False, True, True, True, False]]


def test_a_row_without_counted_tokens_adds_up_to_nothing():
    model = FAMILIES["llama"]()
    anatomy = find_anatomy(model)
    ids = token_ids(2, 6)
    labels = ids.clone()
    labels[1] = -100
    with torch.inference_mode():
        batch = Batch(indices=(0, 1), input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels)
        scores = score_hidden(anatomy, run_blocks(model, anatomy, batch), batch)
    assert scores.tokens.tolist() == [5, 0]
    assert scores.loss[1] == scores.correct[1] == 0
    assert scores.loss[0] > 0


def test_the_first_of_equal_maxima_is_the_prediction():
    logits = torch.tensor([[1.0, 5, 5, 0], [5.0, 5, 0, 0], [0.0, 1, 2, 7], [3.0, 3, 3, 3]])
    ids = torch.tensor([[0, 1, 1, 3, 2]])  # next tokens: 1 (first of two), 1 (second of two), 3, 2 (third of four)
    batch = Batch(indices=(0,), input_ids=ids, attention_mask=torch.ones_like(ids))
    hidden = torch.cat([logits, logits[:1]]).unsqueeze(0)
    head = SimpleNamespace(unembed=lambda z: z, vocab_size=4,
                           causal_lm=SimpleNamespace(config=SimpleNamespace(is_encoder_decoder=False)))
    right = [True, False, True, False]
    assert right == (logits.argmax(dim=1) == ids[0, 1:]).tolist()
    losses = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
    for only in ([0], [1], [2], [3], [0, 1, 2, 3]):  # labels choose which positions count
        labels = torch.full_like(ids, -100)
        labels[0, [t + 1 for t in only]] = ids[0, [t + 1 for t in only]]
        scores = score_hidden(head, hidden, replace(batch, labels=labels))
        assert scores.correct.tolist() == [sum(right[t] for t in only)]
        assert scores.loss.item() == pytest.approx(losses[only].sum().item(), rel=1e-6, abs=1e-5)


def test_several_models_are_read_out_side_by_side():
    states = {"a": torch.arange(20.0).reshape(10, 2), "b": -torch.arange(20.0).reshape(10, 2)}
    seen = {"a": [], "b": []}
    for part, logits in scoring.chunks_of_all_logits({"a": lambda z: 2 * z, "b": lambda z: z + 1}, states, 1 << 18):
        assert part.stop - part.start == len(logits["a"]) == len(logits["b"]) <= scoring.head_rows(
            1 << 18, states["a"].device)
        for name, values in logits.items():
            seen[name].append(values.clone())
    assert torch.equal(torch.cat(seen["a"]), 2 * states["a"])
    assert torch.equal(torch.cat(seen["b"]), states["b"] + 1)


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_an_encoder_decoder_is_scored_as_its_own_forward_scores_it(family: str) -> None:
    model = FAMILIES[family]()
    anatomy = find_anatomy(model)
    rows = [TokenRow(0, [5, 6, 7, 8, 9, 10], ((3, 6),)), TokenRow(1, [11, 12, 13, 14], ((2, 4),))]
    batch, = make_batches(rows, batch_size=2, pad_id=0)
    scores = score_batch(model, anatomy, batch)
    for place, index in enumerate(batch.indices):
        ids, (first, stop) = torch.tensor(rows[index].ids), rows[index].supervised[0]
        start = torch.tensor([[model.config.decoder_start_token_id]])
        with torch.no_grad():  # the encoder reads the prompt only
            logits = model(input_ids=ids[None, :first], decoder_input_ids=torch.cat(
                [start, ids[None, :-1]], dim=1)).logits[0]
        want = torch.nn.functional.cross_entropy(logits[first:stop], ids[first:stop], reduction="sum")
        assert float(scores.loss[place]) == pytest.approx(float(want), rel=1e-5)
        assert float(scores.tokens[place]) == stop - first
