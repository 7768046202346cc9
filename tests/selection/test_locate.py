"""Locate: scores against slow loops, planted truth, rules and proposals."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from analysis_helpers import loaded, tiny_data
from midblock import metrics, stats
from midblock.analysis.gradients import supervised_batches
from midblock.capture import run_blocks, run_layer_major
from midblock.errors import BudgetError, SettingsError
from midblock.results import Origin, Table
from midblock.segments import segment_blocks
from midblock.selection.locate import RELIABLE, locate, mask_of, propose, reliability, scores_of, width_for
from midblock.selection.scores import AdjacentStates, block_scores
from midblock.settings.locate import BLOCK_SCORES, DEFAULT_RULE, RULES, ScoreSettings
from midblock.tuning import make_plan
from selection_helpers import alphabet, lead, planted


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_forward_scores_against_a_loop(family: str) -> None:
    model, data = loaded(family), tiny_data(8)
    table, similarity, _ = block_scores(model, data, samples=8, max_length=64, batch_size=3)
    scores = scores_of(table, 4)
    batches, _ = supervised_batches(model, data.sample(8, 0), max_length=64, batch_size=1)
    influence, angle, pooled = [], [], []
    for batch in batches:
        states: list[torch.Tensor] = []
        with torch.inference_mode():
            run_blocks(model.model, model.anatomy, batch, listener=lambda h, z, s=states: s.append(z[0].clone()))
        cosine = [torch.cosine_similarity(a, b, dim=-1).double() for a, b in itertools.pairwise(states)]
        influence.append([float((1 - c).mean()) for c in cosine])
        angle.append([float((torch.arccos(c.clamp(-1, 1)) / torch.pi).mean()) for c in cosine])
        pooled.append(torch.stack([z.mean(dim=0) for z in states]))
    assert scores["block_influence"] == pytest.approx(np.mean(influence, axis=0).tolist(), rel=1e-4, abs=1e-6)
    assert scores["angular_distance"] == pytest.approx(np.mean(angle, axis=0).tolist(), rel=1e-3)
    x = torch.stack(pooled, dim=1)
    assert similarity is not None
    for b in range(4):
        assert scores["cka_novelty"][b] == pytest.approx(1 - float(metrics.cka_debiased(x[b], x[b + 1])), abs=1e-4)
        change = float(torch.log(metrics.effective_rank(x[b + 1]) / metrics.effective_rank(x[b])))
        assert scores["rank_plateau"][b] == pytest.approx(-abs(change), abs=1e-4)
    assert set(scores) == set(BLOCK_SCORES) - {"eva_share"}


def test_scores_do_not_depend_on_batches_or_order() -> None:
    model, data = loaded("llama"), tiny_data(8)
    one, _, _ = block_scores(model, data, samples=8, batch_size=8, scores=("block_influence", "cka_novelty"))
    two, _, _ = block_scores(model, data, samples=8, batch_size=3, scores=("block_influence", "cka_novelty"))
    for name, values in scores_of(one, 4).items():
        assert values == pytest.approx(scores_of(two, 4)[name], rel=1e-4)
    # layer by layer, as a streamed model is run
    batches, _ = supervised_batches(model, data, max_length=128, batch_size=3)
    samples = sorted(i for b in batches for i in b.indices)
    streamed = AdjacentStates(["base"], 4, samples)
    with torch.inference_mode():
        for h, number, states in run_layer_major({"base": model}, batches):
            streamed.feed(h, batches[number], {k: z.clone() for k, z in states.items()})
    assert streamed.values["block_influence"]["base"].mean(dim=1).tolist() == pytest.approx(
        scores_of(one, 4)["block_influence"], rel=1e-4)
    kept = AdjacentStates(["base"], 4, samples)
    kept.put(samples, streamed.part(samples))
    assert torch.equal(kept.values["angular_distance"]["base"], streamed.values["angular_distance"]["base"])


@pytest.mark.parametrize("block", [0, 2, 3])
def test_gradient_scores_find_the_planted_block(block: int) -> None:
    table, _, _ = block_scores(planted(block), alphabet())
    scores = scores_of(table, 4)
    for name in ("gradient_norm", "gradient_norm_relative", "fisher", "taylor", "block_influence"):
        best, margin = lead(scores[name])
        assert best == block, name
        assert margin > 0.3 * max(scores[name]), name
    # what was planted is not in the weights' spectra, and a score of them must not say so
    empty, _, _ = block_scores(planted(None), alphabet())
    assert scores["weight_snr"] == pytest.approx(scores_of(empty, 4)["weight_snr"])


def test_without_a_planted_block_gradients_name_none() -> None:
    winners = []
    for seed in range(4):
        table, _, _ = block_scores(planted(None, seed), alphabet(), scores=("gradient_norm",))
        best, margin = lead(scores_of(table, 4)["gradient_norm"])
        winners.append(best)
        assert margin < 0.3 * max(scores_of(table, 4)["gradient_norm"])
    assert len(set(winners)) > 1


def test_the_model_is_left_as_it_was() -> None:
    model = planted(1)
    before = {n: p.clone() for n, p in model.model.named_parameters()}
    flags = [p.requires_grad for p in model.model.parameters()]
    locate(model, data=alphabet())
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in model.model.named_parameters())
    assert [p.requires_grad for p in model.model.parameters()] == flags


def test_weights_alone_need_no_data() -> None:
    found = locate(planted(1))
    assert set(found.frame["metric"]) == {"weight_snr"}
    assert set(found.proposals) == {"fixed-middle", "uniform", "random", "weight_snr"}
    assert "cka-borders" in found.refused
    with pytest.raises(SettingsError, match="taylor"):
        locate(planted(1), rule="taylor")
    with pytest.raises(SettingsError, match="cka-borders"):
        locate(planted(1), rule="cka-borders")


def test_the_proposal_can_be_pasted() -> None:
    found = locate(planted(2), data=alphabet(), rule="gradient_norm", share=0.25)
    own = found.proposal
    assert own.blocks == (2, 3)
    assert own.mask == "0010"
    named = replace(found, origin=Origin(("smollm2",), "my data.jsonl"))
    assert named.answer().command == "midblock tune smollm2 --data 'my data.jsonl' --blocks 2 --dry-run"
    assert not found.answer().next  # made in Python: there are no names to paste
    assert make_plan(planted(2), blocks=own.spec, rank=2).blocks == (2,)
    assert make_plan(planted(2), mask=own.mask, rank=2).blocks == (2,)
    assert set(found.figures()) == {"locate-scores", "locate-cka"}


def test_the_default_is_the_papers_middle() -> None:
    assert DEFAULT_RULE == "fixed-middle"
    found = propose("fixed-middle", width_for(30, 0.6), 30)
    assert (found.blocks, found.mask) == ((6, 24), "01110")
    assert propose("fixed-middle", width_for(32, 0.4), 32).blocks == (10, 23)  # 0.3 to 0.7 of the depth


def test_rules_choose_windows() -> None:
    scores = {"taylor": [0.0, 5.0, 0.0, 3.0, 3.0, 0.0]}
    assert propose("taylor", 1, 6, scores=scores).blocks == (1, 2)
    assert propose("taylor", 2, 6, scores=scores).blocks == (3, 5)
    assert propose("taylor", 6, 6, scores=scores).blocks == (0, 6)
    assert propose("uniform", 2, 6).blocks == (0, 6)
    drawn = {propose("random", 2, 6, seed=s).blocks for s in range(40)}
    assert drawn == {(b, b + 2) for b in range(5)}
    assert propose("random", 2, 6, seed=1) == propose("random", 2, 6, seed=1)
    group = np.repeat([0, 1, 2], [2, 4, 1])  # hidden 0..6: groups [0, 2), [2, 6), [6, 7)
    similarity = (group[:, None] == group[None, :]).astype(float)
    assert propose("cka-borders", 4, 6, similarity=similarity).blocks == (2, 6)
    assert propose("cka-borders", 2, 6, similarity=similarity).blocks == (3, 5)
    with pytest.raises(SettingsError, match="not known"):
        propose("best", 2, 6)
    with pytest.raises(SettingsError, match="undefined"):
        propose("taylor", 2, 6, scores={"taylor": [float("nan")] * 6})
    assert set(BLOCK_SCORES) < set(RULES)


@pytest.mark.parametrize("num_blocks", [3, 7, 30])
def test_every_range_has_a_mask(num_blocks: int) -> None:
    for lo in range(num_blocks):
        for hi in range(lo + 1, num_blocks + 1):
            assert segment_blocks(mask_of((lo, hi), num_blocks), num_blocks) == list(range(lo, hi))


def test_a_budget_sets_the_width() -> None:
    model = planted(1)
    plan = make_plan(model, mask="1", rank=4)
    each = plan.params_of_block(0)
    for blocks in (1, 2, 4):
        found = locate(model, budget=blocks * each + 1, rank=4)
        lo, hi = found.proposal.blocks
        assert hi - lo == blocks
        assert make_plan(model, blocks=found.proposal.spec, rank=4).params <= blocks * each + 1
    with pytest.raises(BudgetError, match="below one block"):
        locate(model, budget=each - 1, rank=4)
    with pytest.raises(SettingsError, match="both"):
        locate(model, budget=each, share=0.5)
    with pytest.raises(SettingsError, match="share"):
        width_for(4, 1.5)


def test_settings_out_of_range_are_named() -> None:
    with pytest.raises(SettingsError, match=r"samples must be at least 4.*beauty"):
        ScoreSettings(samples=2, scores=("beauty",))


def test_few_samples_are_called_noise_and_many_are_not() -> None:
    """Random data on a model whose blocks act alike say nothing about blocks; planted blocks are seen at once."""
    few = locate(loaded("llama"), data=tiny_data(16), samples=4, gradient_samples=4, batch_size=2)
    assert "Mostly noise" in few.summary()
    assert {"cka_novelty", "rank_plateau"} <= {n for n, r in few.reliability.items() if r < RELIABLE}
    clear = locate(planted(2), data=alphabet(), samples=16, gradient_samples=16, batch_size=2)
    assert clear.reliability["block_influence"] > 0.9
    assert clear.reliability["gradient_norm"] > 0.9
    assert "block_influence 0" not in clear.summary().split("Mostly noise")[-1]
    assert "weight_snr" not in clear.reliability


def test_reliability_is_the_share_of_the_variance_that_is_not_noise() -> None:
    """Scores of known noise: the estimate is near true variance / (true + error variance)."""
    draw = np.random.default_rng(4)
    blocks, n, true, noise = 400, 9, 1.0, 2.0
    table = Table()
    for b, level in enumerate(draw.normal(0, true, blocks)):
        table.add("block", b, "fisher", "base", stats.mean_interval(level + draw.normal(0, noise, n)))
    want = true ** 2 / (true ** 2 + noise ** 2 / n)
    assert reliability(table.frame(), {})["fisher"] == pytest.approx(want, abs=0.06)


def test_evas_share_is_what_its_ranks_cost_in_a_block() -> None:
    model, data = loaded("llama"), tiny_data(8)
    found, _, counts = block_scores(model, data, gradient_samples=8, batch_size=2, scores=("eva_share",))
    values = scores_of(found, 4)["eva_share"]
    assert sum(values) == pytest.approx(1)
    batches, _ = supervised_batches(model, data.sample(8, 0), max_length=128, batch_size=2)
    plan = make_plan(model, mask="1", rank=16)
    # the shares of variance that the inputs of q, k, v and o have along each direction, largest first
    inputs: dict[str, list[torch.Tensor]] = {m.name: [] for m in plan.modules}
    handles = [model.model.get_submodule(name).register_forward_pre_hook(
        lambda _, args, kept=kept: kept.append(args[0].detach())) for name, kept in inputs.items()]
    masks = []
    with torch.no_grad():
        for batch in batches:
            model.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
            masks.append(batch.labels != -100)
    for handle in handles:
        handle.remove()
    offered = []
    for module in plan.modules:
        rows = torch.cat([x[m] for x, m in zip(inputs[module.name], masks, strict=True)]).double().numpy()
        variance = np.sort(np.linalg.svd(rows - rows.mean(axis=0), compute_uv=False) ** 2)[::-1]
        most = min(32, module.inputs, module.outputs, len(rows) - 1)
        offered += [(share, module) for share in (variance / variance.sum())[:most]]
    spent = np.zeros(4)
    for _, module in sorted(offered, key=lambda o: -o[0]):
        if 2 * spent.sum() + module.cost_per_rank >= 2 * plan.params:
            break
        spent[module.block] += module.cost_per_rank
    assert values == pytest.approx((spent / spent.sum()).tolist(), abs=0.02)  # equal shares may swap at the border
    assert counts["rows"] == 8
    assert 0 <= counts["split_half"]["eva_share"] <= 1

    few, _, counts = block_scores(model, data.sample(1, 0), gradient_samples=1, max_length=3, scores=("eva_share",))
    assert all(np.isnan(v) for v in scores_of(few, 4)["eva_share"])
    assert "labelled tokens" in few.reasons[0]["reason"]
    assert counts["split_half"]["eva_share"] == 0


def test_a_rule_computes_its_own_score() -> None:
    model, data = loaded("llama"), tiny_data(8)
    result = locate(model, data=data, samples=8, gradient_samples=8, scores=("taylor",), rule="eva_share")
    assert set(result.frame["metric"]) == {"taylor", "eva_share"}
    assert "rule eva_share" in result.answer().found
    assert "n = 8 samples" in result.answer().found
    alone = locate(model, data=data, gradient_samples=8, scores=("taylor",))
    assert "n = 8 samples" in alone.answer().found
