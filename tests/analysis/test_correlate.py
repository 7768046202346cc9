"""Correlations from run folders against scipy on values written by hand."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats as scipy_stats

from midblock.analysis.correlate import correlate
from midblock.errors import DataError, OutputError, SettingsError
from midblock.provenance import RunFolder, read_run
from midblock.results import Table
from midblock.writing import write_sealed

BLOCKS = 10
RNG = np.random.default_rng(0)
HIDDEN = {m: RNG.normal(size=BLOCKS + 1) for m in ("cka", "prompt_entropy")}
WEIGHT = RNG.normal(size=BLOCKS) + HIDDEN["cka"][1:]


def write_run(folder: Path, command: str, table: Table, *, data: str | None = None, blocks: int | None = None,
              fingerprint: str = "f") -> Path:
    with RunFolder(folder, command=command, settings={}) as run:
        model = {"fingerprint": fingerprint, **({"blocks": blocks} if blocks else {})}
        run.record_inputs(models={"base": model}, data={"name": data} if data else {})
        run.write_table(table)
    return folder


def profile_table(shift: float = 0.0, data: str = "gsm8k", metrics=HIDDEN) -> Table:
    table = Table()
    for metric, values in metrics.items():
        side = "pair" if metric == "cka" else "difference"
        for h, value in enumerate(values):
            table.add("hidden", h, metric, side, value + shift * (h % 3), n=50, stage="sft-base", data=data)
            if side == "difference":
                table.add("hidden", h, metric, "base", 5.0 + value**2, n=50, data=data)
    return table


def weights_table() -> Table:
    table = Table()
    for b, value in enumerate(WEIGHT):
        for matrix, factor in (("qkvo", 1.0), ("mlp", -1.0), ("all", 3.0), ("norm", 2.0)):
            table.add("block", b, "weight_change", "difference", factor * value, stage="sft-base", matrix=matrix)
        table.add("block", b, "weight_change", "difference", value**2, stage="sft-base", matrix="q",
                  tensor=f"model.layers.{b}.q")
    table.add("model", "embeddings", "weight_change", "difference", 9.0, stage="sft-base", matrix="embeddings",
              tensor="model.embed_tokens.weight")
    return table


@pytest.fixture
def profile_run(tmp_path):
    return write_run(tmp_path / "profile", "profile", profile_table())


@pytest.fixture
def weights_run(tmp_path):
    return write_run(tmp_path / "weights", "weights", weights_table())


def pair(result, a: str, b: str, method: str) -> pd.Series:
    part = result.pairs[result.pairs["method"] == method]
    row = part[((part.a == a) & (part.b == b)) | ((part.a == b) & (part.b == a))]
    assert len(row) == 1, list(part[["a", "b"]].itertuples(index=False))
    return row.iloc[0]


def test_block_b_stands_beside_hidden_b_plus_1(profile_run, weights_run):
    result = correlate([profile_run, weights_run])
    for method, test in (("pearson", scipy_stats.pearsonr), ("spearman", scipy_stats.spearmanr)):
        for metric, values in HIDDEN.items():
            row = pair(result, metric, "weight_change [qkvo]", method)
            want = test(values[1:], WEIGHT)
            assert row["r"] == pytest.approx(want.statistic)
            assert row["p"] == pytest.approx(want.pvalue)
            assert row["n"] == BLOCKS
        row = pair(result, "cka", "prompt_entropy", method)  # also without hidden 0
        assert row["r"] == pytest.approx(test(HIDDEN["cka"][1:], HIDDEN["prompt_entropy"][1:]).statistic)
    assert pair(result, "weight_change [qkvo]", "weight_change [mlp]", "pearson")["r"] == pytest.approx(-1)
    assert set(result.layers) == {"hidden", "block", "cka", "prompt_entropy", "weight_change [qkvo]",
                                  "weight_change [mlp]"}
    assert list(result.layers["block"]) == list(range(BLOCKS))
    assert result.num_blocks == BLOCKS


def test_embeddings_are_a_point_for_hidden_pairs_only(profile_run, weights_run):
    result = correlate([profile_run, weights_run], embeddings=True)
    row = pair(result, "cka", "prompt_entropy", "pearson")
    assert row["n"] == BLOCKS + 1
    assert row["r"] == pytest.approx(scipy_stats.pearsonr(*HIDDEN.values()).statistic)
    assert pair(result, "cka", "weight_change [qkvo]", "pearson")["n"] == BLOCKS


def test_holm_runs_over_all_pairs_of_a_method(profile_run, weights_run):
    result = correlate([profile_run, weights_run])
    for method in ("pearson", "spearman"):
        part = result.pairs[result.pairs["method"] == method]
        assert len(part) == 6
        p = np.sort(part["p"].to_numpy(float))
        want = np.maximum.accumulate(np.minimum(1, p * np.arange(6, 0, -1)))
        np.testing.assert_allclose(np.sort(part["p_holm"].to_numpy(float)), want)


def test_segments_meet_the_means_of_their_blocks(profile_run, tmp_path):
    swapped = [0.5, -0.2, 0.9, 0.1, 0.4]
    table = Table()
    for i, value in enumerate(swapped):
        mask = "0" * i + "1" + "0" * (4 - i)
        table.add("segment", mask, "loss", "difference", value, recipient="base", head="base")
        table.add("segment", mask, "loss", "difference", -2 * value, recipient="sft", head="base")
        table.add("segment", mask, "loss", "base", 7.0, recipient="base", head="base")
    table.add("segment", "01100", "loss", "difference", 99.0, recipient="base", head="base")
    table.add("segment", "00000", "loss", "base", 99.0, recipient="base", head="base")
    swap = write_run(tmp_path / "swap", "swap", table)
    result = correlate([profile_run, swap])
    means = HIDDEN["cka"][1:].reshape(5, 2).mean(axis=1)
    row = pair(result, "cka", "loss [base]", "pearson")
    assert row["r"] == pytest.approx(scipy_stats.pearsonr(means, swapped).statistic)
    assert row["n"] == 5
    assert row["points"] == "5 segments"
    assert pair(result, "loss [base]", "loss [sft]", "pearson")["r"] == pytest.approx(-1)
    assert pair(result, "cka", "prompt_entropy", "pearson")["n"] == BLOCKS
    assert list(result.layers["loss [base]"]) == [v for v in swapped for _ in range(2)]


def test_folders_of_one_kind_are_averaged_or_kept_by_data(tmp_path):
    first = write_run(tmp_path / "a", "profile", profile_table(data="gsm8k"))
    second = write_run(tmp_path / "b", "profile", profile_table(shift=1.0, data="mmlu"))
    averaged = correlate([first, second])
    np.testing.assert_allclose(averaged.layers["cka"],
                               [v + 0.5 * (h % 3) for h, v in enumerate(HIDDEN["cka"]) if h > 0])
    kept = correlate([first, second], by_data=True)
    assert set(kept.layers) == {"hidden", "block", "cka [gsm8k]", "cka [mmlu]", "prompt_entropy [gsm8k]",
                                "prompt_entropy [mmlu]"}
    np.testing.assert_allclose(kept.layers["cka [gsm8k]"], HIDDEN["cka"][1:])
    repeated = correlate([first, first])
    np.testing.assert_allclose(repeated.layers["cka"], HIDDEN["cka"][1:])


def test_all_sides_metrics_and_matrices_select(profile_run, weights_run):
    names = set(correlate([profile_run, weights_run], all_sides=True).layers)
    assert names >= {"prompt_entropy [sft-base]", "prompt_entropy [base]"}
    only = correlate([profile_run, weights_run], metrics=["cka", "weight_change"], matrices=["norm", "q"])
    assert set(only.layers) == {"hidden", "block", "cka", "weight_change [norm]", "weight_change [q]"}
    np.testing.assert_allclose(only.layers["weight_change [q]"], WEIGHT**2)
    with pytest.raises(SettingsError, match=r"no metric 'cke'.*cka"):
        correlate([profile_run], metrics=["cke"])
    single = correlate([profile_run], methods=["spearman"])
    assert set(single.pairs["method"]) == {"spearman"}
    assert set(single.figures()) == {"correlation-spearman"}


def test_own_values_stand_in_where_a_run_has_no_changes(profile_run, tmp_path):
    table = Table()
    for b in range(BLOCKS):
        table.add("block", b, "gradient_norm", "base", float(b), matrix="all")
        table.add("block", b, "gradient_norm", "base", 5.0, matrix="q")
    result = correlate([profile_run, write_run(tmp_path / "g", "gradients", table)])
    assert list(result.layers["gradient_norm"]) == list(range(BLOCKS))


def test_strengths_make_quantities_of_their_own(profile_run, tmp_path):
    table = Table()
    for b in range(BLOCKS):
        for strength in (0.5, 2.0):
            table.add("block", b, "loss", "difference", strength * b**2, strength=strength)
    result = correlate([profile_run, write_run(tmp_path / "steer", "steer", table)])
    np.testing.assert_allclose(result.layers["loss [2.0]"], [2.0 * b**2 for b in range(BLOCKS)])


def test_undefined_layers_are_left_out_pair_by_pair(weights_run, tmp_path):
    values = HIDDEN["cka"].copy()
    values[4] = math.nan
    constant = np.full(BLOCKS + 1, 2.0)
    run = write_run(tmp_path / "p", "profile", profile_table(metrics={"cka": values, "flat": constant}))
    result = correlate([run, weights_run])
    row = pair(result, "cka", "weight_change [qkvo]", "pearson")
    keep = ~np.isnan(values[1:])
    assert row["n"] == BLOCKS - 1
    assert row["r"] == pytest.approx(scipy_stats.pearsonr(values[1:][keep], WEIGHT[keep]).statistic)
    flat = pair(result, "flat", "cka", "pearson")
    assert math.isnan(flat["r"])
    assert "constant" in flat["reason"]
    assert any("constant" in r["reason"] for r in result.table.reasons)
    assert "undefined" in result.summary()


def test_matrix_frame_and_figures(profile_run, weights_run):
    result = correlate([profile_run, weights_run])
    square = result.matrix("pearson")
    assert (np.diag(square) == 1).all()
    assert np.allclose(square, square.T)
    assert set(result.figures()) == {"correlation-pearson", "correlation-spearman"}
    frame = result.frame
    assert set(frame["metric"]) == {"pearson", "spearman"}
    assert list(frame)[:8] == ["kind", "layer", "metric", "side", "value", "low", "high", "n"]
    best = result.strongest(1).iloc[0]  # qkvo and mlp are one quantity on two scales here
    assert abs(best["r"]) == np.sort(result.pairs[result.pairs["method"] == "spearman"]["r"].abs())[-2]
    assert "too optimistic" in result.summary()


def test_partial_layers_keep_the_models_depth(profile_run, tmp_path):
    table = Table()
    for b in range(3, 7):
        table.add("block", b, "loss", "difference", float(b * b))
    run = write_run(tmp_path / "some", "steer", table, blocks=BLOCKS)
    result = correlate([profile_run, run])
    assert pair(result, "cka", "loss", "pearson")["n"] == 4
    assert result.num_blocks == BLOCKS


def test_different_models_are_noted_and_different_depths_refused(profile_run, tmp_path):
    other = write_run(tmp_path / "other", "weights", weights_table(), fingerprint="g")
    assert "different models under the name 'base'" in correlate([profile_run, other]).summary()
    deeper = Table()
    for h in range(BLOCKS + 3):
        deeper.add("hidden", h, "cosine", "pair", float(h))
    with pytest.raises(DataError, match="different depth"):
        correlate([profile_run, write_run(tmp_path / "deeper", "profile", deeper)])


def test_mistakes_are_named(profile_run, tmp_path):
    with pytest.raises(SettingsError, match="at least one"):
        correlate([])
    with pytest.raises(SettingsError, match="pearson"):
        correlate([profile_run], methods=["kendall"])
    with pytest.raises(OutputError, match=r"run\.json"):
        correlate([tmp_path])
    empty = write_run(tmp_path / "empty", "profile", profile_table())
    (empty / "table.csv").unlink()
    with pytest.raises(OutputError, match=r"no table\.csv"):
        correlate([empty])
    (empty / "table.csv").write_text("a,b\n1,2\n")
    with pytest.raises(OutputError, match="was changed"):
        correlate([empty])
    other = Table()
    other.add("hidden", 0, "cka", "pair", 1.0)
    with RunFolder(tmp_path / "other", command="profile", settings={}) as run:
        run.write_table(other.frame().drop(columns="side"))
    with pytest.raises(OutputError, match="no column 'side'"):
        correlate([tmp_path / "other"])
    alone = Table()
    for h in range(4):
        alone.add("hidden", h, "cka", "pair", float(h))
    with pytest.raises(DataError, match="needs two"):
        correlate([write_run(tmp_path / "alone", "profile", alone)])
    broken = write_run(tmp_path / "broken", "profile", profile_table())
    write_sealed(broken / "run.json", {**read_run(broken), "status": "failed"})
    with pytest.raises(DataError, match="failed"):
        correlate([broken])
