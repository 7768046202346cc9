"""Profiles repeated over seeds: means, tests and resuming against the single profiles."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from scipy import stats as scipy_stats

from analysis_helpers import loaded, tiny_data
from midblock.analysis import stability
from midblock.analysis.profile import ProfileResult, ProfileSettings, profile
from midblock.analysis.stability import profile_seeds
from midblock.errors import SettingsError
from midblock.models.state import STATE_MARKER, mark_state_folder
from midblock.quantities import unchanged
from midblock.results import Estimate, Table

SMALL = {"samples": 8, "token_samples": 4, "max_length": 48, "replicates": 40}
KEY = ["kind", "layer", "metric", "side", "stage"]


@pytest.fixture(scope="module")
def pair():
    return loaded("llama", 0), loaded("llama", 1)


@pytest.fixture(scope="module")
def repeated(pair):
    return profile_seeds(*pair, data=tiny_data(30), seeds=3, seed=5, **SMALL)


def test_means_intervals_and_tests_are_those_of_the_single_profiles(pair, repeated):
    frames = [profile(*pair, data=tiny_data(30), seed=seed, **SMALL).frame for seed in (5, 6, 7)]
    columns = [f.assign(stage=f["stage"].fillna("")).set_index(KEY)["value"] for f in frames]
    frame = repeated.frame.assign(stage=lambda f: f["stage"].fillna(""))
    assert len(frame) == len(frames[0])
    assert any(not columns[0].equals(c) for c in columns[1:])  # the seeds do draw differently
    tested = 0
    for _, row in frame.iterrows():
        values = np.array([c.loc[tuple(row[k] for k in KEY)] for c in columns])
        np.testing.assert_allclose([row["seed_5"], row["seed_6"], row["seed_7"]], values, equal_nan=True)
        defined = values[~np.isnan(values)]
        assert row["n"] == len(defined)
        if len(defined) < 2:
            continue
        assert row["value"] == pytest.approx(defined.mean())
        half = scipy_stats.t.ppf(0.975, len(defined) - 1) * defined.std(ddof=1) / len(defined) ** 0.5
        assert row["high"] - row["value"] == pytest.approx(half, rel=1e-6, abs=1e-12)
        if row["side"] in ("difference", "pair") and defined.std() > 1e-6:
            want = scipy_stats.ttest_1samp(defined, unchanged(row["metric"], row["side"]))
            assert row["t"] == pytest.approx(want.statistic, rel=1e-6)
            assert row["p"] == pytest.approx(want.pvalue, rel=1e-6)
            tested += 1
        elif row["side"] in ("base", "sft"):
            assert np.isnan(row["p"])
    assert tested > 50


def test_holm_runs_over_the_hidden_states_of_one_quantity(repeated):
    part = repeated.frame
    part = part[(part.metric == "cosine") & (part.side == "pair")]
    p = np.sort(part["p"].to_numpy(float))
    want = np.maximum.accumulate(np.minimum(1, p * np.arange(len(p), 0, -1)))
    np.testing.assert_allclose(np.sort(part["p_holm"].to_numpy(float)), want)
    assert len(p) == 5


def test_a_model_against_itself_is_never_significant():
    base = loaded("llama", 0)
    result = profile_seeds(base, base, data=tiny_data(20), seeds=3, **SMALL)
    frame = result.frame
    changes = frame[frame.side.isin(["difference", "pair"]) & frame["value"].notna()]
    assert (changes["p"] == 1).all()
    assert (result.regions()["significant"] == 0).all()
    assert "no change at any depth" in result.summary()
    assert ": none." in result.summary()


def test_summary_regions_and_figures(repeated, pair):
    regions = repeated.regions().set_index("metric")
    level = repeated.frame[(repeated.frame.metric == "cosine") & (repeated.frame.p_holm < 0.05)]
    assert regions.loc["cosine", "significant"] == len(level) > 0
    summary = repeated.summary()
    assert f"cosine {len(level)}" in summary
    assert "draws 27%" in summary
    assert "t intervals over the 3 seeds" in summary
    assert set(repeated.figures()) == set(profile(*pair, data=tiny_data(30), **SMALL).figures())
    assert repeated.counts["pooled_samples"] == 8
    assert repeated.counts["seeds"] == [5, 6, 7]


def test_an_interrupted_repetition_resumes_where_it_was(pair, tmp_path, monkeypatch):
    want = profile_seeds(*pair, data=tiny_data(20), seeds=2, **SMALL).frame
    calls: list[int] = []
    original = stability.profile

    def second_fails(*args, **kwargs):
        calls.append(kwargs["settings"].seed)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(stability, "profile", second_fails)
    state = tmp_path / "state"
    with pytest.raises(KeyboardInterrupt):
        profile_seeds(*pair, data=tiny_data(20), seeds=2, state_folder=state, **SMALL)
    assert {p.name for p in state.iterdir()} == {"seed-0.json", STATE_MARKER}
    got = profile_seeds(*pair, data=tiny_data(20), seeds=2, state_folder=state, **SMALL).frame
    assert calls == [0, 1, 1]
    np.testing.assert_allclose(got["value"].to_numpy(float), want["value"].to_numpy(float), equal_nan=True)
    np.testing.assert_allclose(got["p_holm"].to_numpy(float), want["p_holm"].to_numpy(float), equal_nan=True)
    assert not state.exists()


def test_views_are_augmented_anew_with_each_seed(pair):
    frame = profile_seeds(*pair, data=tiny_data(12), seeds=2, views=2, view_samples=6, samples=12, token_samples=2,
                          max_length=48, replicates=20).frame
    part = frame[(frame.metric == "infonce") & (frame.side == "base")]
    assert (part["seed_0"] != part["seed_1"]).any()


def test_mistakes_are_named(pair, tmp_path):
    with pytest.raises(SettingsError, match="at least 2"):
        profile_seeds(*pair, data=tiny_data(4), seeds=1)
    with pytest.raises(SettingsError, match="unknown setting sample; did you mean samples"):
        profile_seeds(*pair, data=tiny_data(4), seeds=2, sample=3)


def test_damaged_state_is_measured_again_and_told(pair, tmp_path, caplog):
    mark_state_folder(tmp_path)
    (tmp_path / "seed-0.json").write_text(json.dumps({"rows": 3}))
    again = profile_seeds(*pair, data=tiny_data(8), seeds=2, state_folder=tmp_path, **SMALL)
    fresh = profile_seeds(*pair, data=tiny_data(8), seeds=2, **SMALL)
    pd.testing.assert_frame_equal(again.frame, fresh.frame)
    assert "seed-0.json carries no digest" in caplog.text


@pytest.mark.parametrize("metric", ["cka_debiased", "cka", "cosine", "token_cosine"])
@pytest.mark.parametrize("away", [1, 100])
def test_rounding_is_no_change_and_more_than_rounding_is_one(metric, away):
    """Planted: every hidden state as far from 1 as rounding takes it, or a hundred times as far, with every seed."""
    counts = {"hidden_size": 64, "pooled_samples": 8}
    by_hand = {"token_cosine": 2**-23 * 8}.get(metric, 2**-52 * 512**0.5)
    tables = []
    for seed in range(3):
        table = Table()
        for h in range(5):
            table.add("hidden", h, metric, "pair", Estimate(1 - by_hand * away * (1 - 0.01 * seed), 0, 1, 8),
                      stage="sft-base")
        tables.append(table)
    combined = stability._combine(tables, [0, 1, 2], ProfileSettings(), ["base", "sft"],
                                  {"width": 64, "samples": 8})
    assert ((combined.frame()["p"] == 1).all()) == (away == 1)
    for table in (combined, tables[0]):
        regions = ProfileResult(table, ["base", "sft"], 5, ProfileSettings(), counts).regions()
        assert regions["largest at hidden"].isna().all() == (away == 1)
