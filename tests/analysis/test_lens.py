"""The lens against transformers' own outputs and a slow read-out of every hidden state."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch

from analysis_helpers import loaded, tiny_data
from families import DECODER_ONLY
from midblock.analysis.lens import TWICE, _LensSums, lens
from midblock.capture import model_inputs, run_blocks
from midblock.capture.scoring import chunks_of_all_logits
from midblock.data import make_batches, pad_token_id, tokenize
from midblock.errors import SettingsError
from midblock.models import find_anatomy
from midblock.settings import LensSettings


def one_sample_batches(model, data, max_length=64):
    rows = tokenize(data, model.tokenizer, max_length=max_length).rows
    return [make_batches([r], batch_size=1, pad_id=pad_token_id(model.tokenizer))[0] for r in rows]


@pytest.mark.parametrize("name", DECODER_ONLY)
def test_last_hidden_gives_the_models_own_loss(name):
    model = loaded(name)
    data = tiny_data(4)
    frame = lens(model, data=data, samples=4, max_length=64, batch_size=3).frame
    row = frame[(frame.layer == model.anatomy.num_blocks) & (frame.metric == "loss") & (frame.side == "base")]
    losses = []
    with torch.inference_mode():
        for batch in one_sample_batches(model, data.sample(4, 0)):
            logits = model.model(**model_inputs(model.model, batch)).logits[0, :-1].double()
            losses += torch.nn.functional.cross_entropy(logits, batch.input_ids[0, 1:], reduction="none").tolist()
    assert row["value"].item() == pytest.approx(sum(losses) / len(losses), rel=1e-5)


@pytest.mark.parametrize("per_sample_mean", [False, True])
def test_every_hidden_and_metric_equals_the_slow_way(per_sample_mean):
    base, sft = loaded("llama", 0), loaded("llama", 1)
    data = tiny_data(5)
    frame = lens(base, sft, data=data, samples=5, max_length=64, batch_size=2, top_k=4,
                 per_sample_mean=per_sample_mean).frame
    want: dict[tuple, list[float]] = {}
    with torch.inference_mode():
        for batch in one_sample_batches(base, data.sample(5, 0)):
            states = {"base": [], "sft": []}
            for side, model in (("base", base), ("sft", sft)):
                run_blocks(model.model, model.anatomy, batch,
                           listener=lambda h, z, kept=states[side]: kept.append(z.clone()))
            target = batch.input_ids[0, 1:]
            for h in range(5):
                logp = {s: m.anatomy.unembed(states[s][h])[0, :-1].double().log_softmax(-1)
                        for s, m in (("base", base), ("sft", sft))}
                for side, lp in logp.items():
                    gold = lp.gather(1, target[:, None])
                    for metric, value in (("loss", -gold[:, 0]), ("entropy", -(lp.exp() * lp).sum(-1)),
                                          ("accuracy", (lp.argmax(-1) == target).double()),
                                          ("gold_probability", gold[:, 0].exp()),
                                          ("gold_rank", (lp > gold).sum(-1).double())):
                        want.setdefault((h, metric, side), []).append(value.tolist())
                kl = (logp["base"].exp() * (logp["base"] - logp["sft"])).sum(-1)
                want.setdefault((h, "kl", "pair"), []).append(kl.tolist())
                tops = {s: lp.topk(4, dim=-1).indices for s, lp in logp.items()}
                want.setdefault((h, "top1_agreement", "pair"), []).append(
                    (tops["base"][:, 0] == tops["sft"][:, 0]).double().tolist())
                want.setdefault((h, "top_k_overlap", "pair"), []).append(
                    [len(set(a) & set(b)) / 4 for a, b in zip(tops["base"].tolist(), tops["sft"].tolist(),
                                                              strict=True)])
    assert len(want) == 5 * (2 * 5 + 3)
    for (h, metric, side), samples in want.items():
        row = frame[(frame.layer == h) & (frame.metric == metric) & (frame.side == side)]
        if per_sample_mean:
            value = sum(sum(tokens) / len(tokens) for tokens in samples) / 5
        else:
            value = sum(map(sum, samples)) / sum(map(len, samples))
        assert row["value"].item() == pytest.approx(value, rel=1e-3, abs=1e-6), (h, metric, side)
        assert row["mean_over"].item() == ("samples" if per_sample_mean else "tokens")


@pytest.mark.parametrize("paper_code", [False, True])
def test_hidden_states_that_tuning_left_alone_are_read_out_once(monkeypatch, paper_code):
    """Blocks before the first tuned one give both models the same states, and one head serves both."""
    base = loaded("llama")
    model = copy.deepcopy(base.model)
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight.mul_(1.3)
    sft = replace(base, model=model, anatomy=find_anatomy(model))
    settings = {"data": tiny_data(4), "samples": 4, "max_length": 64, "batch_size": 4, "paper_code": paper_code}
    sides = []

    def counted(unembeddings, rows, vocab):
        sides.append(sorted(rows))
        return chunks_of_all_logits(unembeddings, rows, vocab)

    monkeypatch.setattr("midblock.analysis.lens.chunks_of_all_logits", counted)
    shared = lens(base, sft, **settings).frame
    twice = [f"base{TWICE}", f"sft{TWICE}"] if paper_code else []
    assert sides == [["base"]] * 3 + [["base", "sft"], sorted(["base", "sft", *twice])]
    monkeypatch.setattr("midblock.analysis.lens.shared_unembeddings", lambda models: (0, 1))
    alone = lens(base, sft, **settings).frame
    assert shared[["layer", "metric", "side"]].equals(alone[["layer", "metric", "side"]])
    assert shared["value"].tolist() == pytest.approx(alone["value"].tolist(), rel=1e-6, abs=1e-6, nan_ok=True)
    assert (shared[(shared.metric == "kl") & (shared.layer < 3)]["value"] == 0).all()
    assert (shared[(shared.metric == "kl") & (shared.layer >= 3)]["value"] > 1e-6).all()


def test_on_an_accelerator_equal_states_are_known_from_the_weights():
    """The meta device stands for one: whatever asked it for a value would raise."""
    base = loaded("llama")
    model = copy.deepcopy(base.model)
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight.mul_(1.3)
    sft = replace(base, model=model, anatomy=find_anatomy(model))
    sums = _LensSums({"base": base, "sft": sft}, [("sft", "base")], range(5), [0], LensSettings())
    rows = {side: torch.empty(3, 32, device="meta") for side in ("base", "sft")}
    assert [len(set(sums._twins(h, rows).values())) for h in range(5)] == [1, 1, 1, 2, 2]


def test_perplexity_is_the_exponential_of_the_loss_and_differences_are_paired():
    base, sft = loaded("qwen2", 0), loaded("qwen2", 1)
    frame = lens(base, sft, data=tiny_data(5), samples=5, max_length=64).frame.set_index(["layer", "metric", "side"])
    for h in range(5):
        for side in ("base", "sft"):
            assert frame.loc[(h, "perplexity", side), "value"] == pytest.approx(
                math.exp(frame.loc[(h, "loss", side), "value"]))
        change = frame.loc[(h, "loss", "sft"), "value"] - frame.loc[(h, "loss", "base"), "value"]
        assert frame.loc[(h, "loss", "difference"), "value"] == pytest.approx(change)
        assert frame.loc[(h, "perplexity_ratio", "pair"), "value"] == pytest.approx(math.exp(change))


def test_a_model_against_itself_agrees_everywhere():
    model = loaded("gemma3")
    frame = lens(model, model, data=tiny_data(3), samples=3, max_length=64).frame
    assert (frame[frame.metric == "top1_agreement"]["value"] == 1).all()
    assert (frame[frame.metric == "top_k_overlap"]["value"] == 1).all()
    assert frame[frame.metric == "kl"]["value"].abs().max() < 1e-5
    assert (frame[frame.side == "difference"]["value"] == 0).all()


def test_paper_code_norms_the_last_hidden_twice():
    model = loaded("llama")
    data = tiny_data(3)
    frame = lens(model, data=data, samples=3, max_length=64, paper_code=True).frame
    twice = frame[(frame.side == "base" + TWICE) & (frame.metric == "loss")]
    assert twice["layer"].tolist() == [model.anatomy.num_blocks]
    losses = []
    with torch.inference_mode():
        for batch in one_sample_batches(model, data.sample(3, 0)):
            output = model.model(**model_inputs(model.model, batch), output_hidden_states=True)
            logits = model.model.lm_head(model.model.model.norm(output.hidden_states[-1]))[0, :-1]
            losses += torch.nn.functional.cross_entropy(logits, batch.input_ids[0, 1:], reduction="none").tolist()
    assert twice["value"].item() == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    own = frame[(frame.side == "base") & (frame.metric == "loss") & (frame.layer == model.anatomy.num_blocks)]
    assert abs(twice["value"].item() - own["value"].item()) > 1e-3


def test_the_curve_of_the_paper_code_leaves_the_own_one_at_the_last_hidden():
    result = lens(loaded("llama"), data=tiny_data(2), samples=2, max_length=64, paper_code=True)
    panel = next(ax for ax in result.figures()["lens"].axes if "Loss" in ax.get_ylabel())
    drawn = {tuple(line.get_xdata()): line.get_ydata() for line in panel.lines if len(line.get_xdata()) > 1}
    whole, end = drawn[0, 1, 2, 3, 4], drawn[3, 4]
    assert end[0] == whole[3]
    assert end[1] != whole[4]


def test_trace_names_the_predicted_token_at_every_depth():
    model = loaded("llama")
    result = lens(model, data=tiny_data(3), samples=3, max_length=64, trace=1)
    traced = [r for r in result.traces if r["hidden"] == 4]
    batch = one_sample_batches(model, tiny_data(3).sample(3, 0))[0]
    with torch.inference_mode():
        best = model.model(**model_inputs(model.model, batch)).logits[0, :-1].argmax(-1)
    assert [r["predicted"] for r in traced] == [model.tokenizer.decode([t]) for t in best.tolist()]
    assert {r["hidden"] for r in result.traces} == set(range(5))


def test_every_nth_hidden_keeps_the_last():
    model = loaded("llama")
    frame = lens(model, data=tiny_data(2), samples=2, max_length=64, every=3).frame
    assert sorted(frame["layer"].unique()) == [0, 3, 4]


def test_settings_out_of_range_are_refused_together():
    with pytest.raises(SettingsError, match=r"samples must be.*top_k must be"):
        lens(loaded("llama"), data=tiny_data(2), samples=0, top_k=0)
