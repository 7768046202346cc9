"""The profile against quantities taken one sample at a time, and its invariances."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from analysis_helpers import loaded, tiny_data
from midblock import metrics
from midblock.analysis.profile import profile
from midblock.capture import run_blocks
from midblock.data import make_batches, pad_token_id, tokenize
from midblock.errors import DataError, PairMismatchError, SettingsError
from midblock.models.state import mark_state_folder
from midblock.quantities import quantities

SIZES = {"samples": 8, "token_samples": 5, "max_length": 64, "replicates": 50}


@pytest.fixture(scope="module")
def pair():
    return loaded("llama", 0), loaded("llama", 1)


@pytest.fixture(scope="module")
def frame(pair):
    return profile(*pair, data=tiny_data(8), **SIZES).frame


def states_one_by_one(model, data, max_length=64):
    """sample -> list of hidden 0..L, (T, d) float64, from forwards of one unpadded sample each."""
    found = []
    for row in tokenize(data, model.tokenizer, max_length=max_length).rows:
        batch, = make_batches([row], batch_size=1, pad_id=pad_token_id(model.tokenizer))
        states = []
        with torch.inference_mode():
            run_blocks(model.model, model.anatomy, batch, listener=lambda h, z, s=states: s.append(z[0].double()))
        found.append(states)
    return found


def cell(frame, h, metric, side):
    return frame[(frame.layer == h) & (frame.metric == metric) & (frame.side == side)]["value"].item()


def test_every_metric_is_there_at_every_hidden_finite_and_with_an_interval(frame):
    assert set(frame["metric"]) == {q.name for level in ("token", "dataset") for q in quantities(level=level)}
    for _, part in frame.groupby(["metric", "side"]):
        assert sorted(part["layer"]) == list(range(5))
    assert np.isfinite(frame["value"]).all()
    without = frame["metric"].isin([q.name for q in quantities(level="dataset") if q.interval == "none"])
    assert set(frame["metric"][without]) == {"condition_number"}  # withheld: no interval holds it
    assert frame.loc[without, ["low", "high"]].isna().all(axis=None)
    assert np.isfinite(frame.loc[~without, ["low", "high"]].to_numpy()).all()
    assert (frame["low"] <= frame["high"])[~without].all()
    assert (frame["n"] > 0).all()


def test_values_equal_those_of_single_samples(pair, frame):
    data = tiny_data(8).sample(8, 0)
    base, sft = (states_one_by_one(m, data) for m in pair)
    for h in range(5):
        x = {"base": torch.stack([s[h].mean(0) for s in base]), "sft": torch.stack([s[h].mean(0) for s in sft])}
        for side, states in (("base", base), ("sft", sft)):
            entropy = np.mean([float(metrics.matrix_entropy(s[h])) for s in states[:5]])
            assert cell(frame, h, "prompt_entropy", side) == pytest.approx(entropy, rel=1e-4)
            curvature = np.mean([float(metrics.curvature(s[h])) for s in states[:5]])
            assert cell(frame, h, "curvature", side) == pytest.approx(curvature, rel=1e-4)
            sparse = np.mean([float((s[h].abs() < 1e-2).double().mean()) for s in states[:5]])
            assert cell(frame, h, "sparsity", side) == pytest.approx(sparse, abs=2e-3)
            assert cell(frame, h, "effective_rank", side) == pytest.approx(
                float(metrics.effective_rank(x[side])), rel=1e-4)
            assert cell(frame, h, "dataset_entropy", side) == pytest.approx(
                float(metrics.dataset_entropy(x[side])), rel=1e-4)
            s = np.linalg.svd(x[side].numpy(), compute_uv=False)
            assert cell(frame, h, "spectral_norm", side) == pytest.approx(s[0], rel=1e-4)
            assert cell(frame, h, "condition_number", side) == pytest.approx(s[0] / s[-1], rel=1e-2)
        a, b = x["base"], x["sft"]
        assert cell(frame, h, "cka", "pair") == pytest.approx(float(metrics.cka(a, b)), rel=1e-4)
        assert cell(frame, h, "cka_debiased", "pair") == pytest.approx(float(metrics.cka_debiased(a, b)), abs=1e-4)
        cosine = torch.nn.functional.cosine_similarity(a, b).mean().item()
        assert cell(frame, h, "cosine", "pair") == pytest.approx(cosine, rel=1e-4)
        shift = (b.mean(0) - a.mean(0)).norm().item()
        assert cell(frame, h, "mean_shift", "pair") == pytest.approx(shift, rel=1e-4)
        assert cell(frame, h, "mean_shift_relative", "pair") == pytest.approx(shift / a.mean(0).norm().item(), rel=1e-4)
        assert cell(frame, h, "change_intensity", "pair") == pytest.approx((b - a).norm(dim=1).mean().item(), rel=1e-4)


def test_difference_is_the_difference_of_the_sides(frame):
    for metric in ("prompt_entropy", "curvature", "effective_rank", "dataset_entropy", "gini", "l2_norm"):
        for h in range(5):
            change = cell(frame, h, metric, "sft") - cell(frame, h, metric, "base")
            assert cell(frame, h, metric, "difference") == pytest.approx(change, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_batch_size_never_changes_a_value(pair, frame, batch_size):
    other = profile(*pair, data=tiny_data(8), batch_size=batch_size, **SIZES).frame
    assert list(other["metric"]) == list(frame["metric"])
    # the smallest singular value of a condition number carries the rounding of the forward
    steady = frame["metric"] != "condition_number"
    np.testing.assert_allclose(other["value"][steady], frame["value"][steady], rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "mixtral", "t5"])
def test_a_model_against_itself_shows_no_change(family):
    model = loaded(family)
    frame = profile(model, model, data=tiny_data(6), **{**SIZES, "samples": 6}).frame
    assert (frame[frame.side == "difference"][["value", "low", "high"]].fillna(0) == 0).all(axis=None)
    for metric, same in (("cka", 1), ("cka_debiased", 1), ("cosine", 1), ("token_cosine", 1), ("mean_shift", 0),
                         ("change_intensity", 0), ("mean_shift_relative", 0)):
        values = frame[frame.metric == metric]["value"]
        assert len(values) == model.anatomy.num_blocks + 1
        np.testing.assert_allclose(values, same, atol=1e-7)


def test_every_hidden_state_is_compared_with_every_other(pair, frame):
    result = profile(*pair, data=tiny_data(8), **SIZES)
    square = result.layers.pivot_table(index="layer", columns="other", values="cka_debiased").to_numpy()
    assert square.shape == (5, 5)
    own = frame[(frame.metric == "cka_debiased") & (frame.side == "pair")].sort_values("layer")["value"]
    np.testing.assert_allclose(square.diagonal(), own, atol=1e-6)
    base, sft = (states_one_by_one(m, tiny_data(8).sample(8, 0)) for m in pair)
    one, other = torch.stack([s[1].mean(0) for s in base]), torch.stack([s[3].mean(0) for s in sft])
    assert square[1, 3] == pytest.approx(float(metrics.cka_debiased(one, other)), abs=1e-4)
    assert result.figures()["layers"].axes[0].get_ylabel() == "hidden state of base"


def test_chain_compares_each_stage_with_the_first_and_the_one_before():
    chain = [loaded("qwen2", s) for s in range(3)]
    result = profile(chain, data=tiny_data(6), **{**SIZES, "samples": 6})
    pairs = result.frame[result.frame.side == "pair"]
    assert set(pairs["stage"]) == {"sft-base", "dpo-base", "dpo-sft"}
    direct = profile(chain[0], chain[2], data=tiny_data(6), **{**SIZES, "samples": 6}).frame
    want = direct[direct.side == "pair"]["value"].to_numpy()
    np.testing.assert_allclose(pairs[pairs.stage == "dpo-base"]["value"].to_numpy(), want, rtol=1e-9)
    assert "dpo-sft" in result.summary()


def test_views_give_the_three_augmentation_metrics(pair):
    frame = profile(*pair, data=tiny_data(8), views=3, view_samples=8, **SIZES).frame
    for metric in (q.name for q in quantities(level="views")):
        part = frame[frame.metric == metric]
        assert set(part["side"]) == {"base", "sft", "difference"}
        assert np.isfinite(part["value"]).all()
    again = profile(*pair, data=tiny_data(8), views=3, view_samples=8, **SIZES).frame
    assert frame["value"].equals(again["value"])


def test_earlier_codes_formulas_change_what_they_should(pair, frame):
    other = profile(*pair, data=tiny_data(8), unit_rows=True, energy=True, sparsity_relative=True, **SIZES).frame
    for metric, changed in (("prompt_entropy", True), ("effective_rank", True), ("sparsity", True), ("cka", False),
                            ("curvature", False)):
        same = np.allclose(frame[frame.metric == metric]["value"], other[other.metric == metric]["value"])
        assert same is not changed


def test_exact_bootstrap_gives_intervals_of_like_width(pair, frame):
    exact = profile(*pair, data=tiny_data(8), exact_bootstrap=True, **SIZES).frame
    assert frame["value"].equals(exact["value"])
    chosen = (frame.metric == "spectral_norm") & (frame.side == "base")
    width, other = ((f["high"] - f["low"])[chosen].to_numpy() for f in (frame, exact))
    assert (np.abs(np.log(width / other)) < 0.7).all()


def test_interrupted_pass_resumes_to_the_same_numbers(pair, frame, tmp_path):
    class Stop(Exception):
        pass

    def stop_early(what, done, total, note=""):
        if what == "forward" and done > total / 3:
            raise Stop

    with pytest.raises(Stop):
        profile(*pair, data=tiny_data(8), batch_size=2, state_folder=tmp_path, progress=stop_early, **SIZES)
    assert list(tmp_path.glob("part-*.safetensors"))
    first = []
    resumed = profile(*pair, data=tiny_data(8), batch_size=2, state_folder=tmp_path,
                      progress=lambda what, done, total, note="": first.append((what, note)), **SIZES).frame
    whole = profile(*pair, data=tiny_data(8), batch_size=2, **SIZES).frame
    assert resumed["value"].equals(whole["value"])
    assert not list(tmp_path.glob("part-*")), "a finished run leaves no intermediate file"


def test_a_damaged_part_is_named_and_run_again(pair, tmp_path, caplog):
    mark_state_folder(tmp_path)
    (tmp_path / "part-00000.safetensors").write_bytes(b"not a tensor file")
    again = profile(*pair, data=tiny_data(4), state_folder=tmp_path, **SIZES).frame
    whole = profile(*pair, data=tiny_data(4), **SIZES).frame
    assert again["value"].equals(whole["value"])
    assert "part-00000.safetensors cannot be read" in caplog.text
    assert "Its samples are run again." in caplog.text
    assert not list(tmp_path.glob("part-*"))


def test_short_run_writes_no_intermediate_file(pair, tmp_path):
    profile(*pair, data=tiny_data(6), state_folder=tmp_path / "state", **{**SIZES, "samples": 6})
    assert not (tmp_path / "state").exists()


def test_bad_settings_are_named_together(pair):
    with pytest.raises(SettingsError, match=r"samples must.*views must"):
        profile(*pair, data=tiny_data(4), samples=0, views=1)
    with pytest.raises(SettingsError, match="no_such"):
        profile(*pair, data=tiny_data(4), no_such=1)


def test_too_few_usable_samples_is_an_error(pair):
    with pytest.raises(DataError, match="at least 2"):
        profile(*pair, data=tiny_data(1), **SIZES)


def test_models_that_do_not_fit_are_refused(pair):
    with pytest.raises(PairMismatchError):
        profile(pair[0], loaded("gpt2"), data=tiny_data(4), **SIZES)


def test_regions_and_summary_name_the_largest_change(pair):
    result = profile(*pair, data=tiny_data(8), **SIZES)
    regions = result.regions().set_index("metric")
    values = result.frame[result.frame.metric == "cosine"].sort_values("layer")["value"].to_numpy()
    assert regions.loc["cosine", "largest at hidden"] == int(np.argmin(values))
    assert regions.loc["cosine", "late"] == pytest.approx(values[4])
    assert f"hidden {int(np.argmin(values))}" in result.summary()
