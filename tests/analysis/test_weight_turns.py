"""How tuning turned weights, against the loaded matrices."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from families import FAMILIES
from midblock import metrics
from midblock.analysis.weights import weights
from midblock.models import Checkpoint, save_checkpoint

TENSOR = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    home = tmp_path_factory.mktemp("turns")
    base = FAMILIES["llama"]()
    low, full = copy.deepcopy(base), copy.deepcopy(base)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        q = low.model.layers[1].self_attn.q_proj.weight
        rows, columns = q.shape
        # a strong new direction, as LoRA at a high rate makes
        q += 9 * torch.randn(rows, 1, generator=generator) @ torch.randn(1, columns, generator=generator) / rows
        for parameter in full.parameters():
            parameter += 1e-3 * torch.randn(parameter.shape, generator=generator)
    return [save_checkpoint(m, None, home / name) for name, m in (("base", base), ("low", low), ("full", full))]


def value(frame, metric, stage):
    part = frame[(frame.metric == metric) & (frame.stage == stage) & (frame.tensor == TENSOR)]
    return part["value"].item()


def test_rows_equal_the_measures_of_the_loaded_matrices(folders):
    result = weights(folders, names=["base", "low", "full"], rotations=True, spectra=False)
    frame = result.frame
    base, low, full = (Checkpoint(f).read(TENSOR).double() for f in folders)
    assert value(frame, "share_unchanged", "low-base") == float((base == low).double().mean()) == 0
    assert value(frame, "change_rank", "low-base") == 1
    assert value(frame, "change_rank", "full-base") == np.linalg.matrix_rank((full - base).float().numpy())
    assert value(frame, "intruder_dimensions", "low-base") == 1
    assert value(frame, "intruder_dimensions", "full-base") == 0
    assert value(frame, "vector_rotation", "low-base") == pytest.approx(
        float(metrics.vector_rotation(base, low, k=10).mean()))
    assert value(frame, "change_cosine", "full with low") == pytest.approx(
        float(metrics.change_cosine(low - base, full - base)), abs=1e-9)
    assert value(frame, "principal_angles", "full with low") == pytest.approx(
        float(metrics.principal_angles(low - base, full - base, k=1).mean()), abs=1e-6)
    of_matrices = frame[frame.tensor.notna() & (frame.stage == "low-base")]
    untouched = of_matrices[(of_matrices.metric == "share_unchanged") & (of_matrices.tensor != TENSOR)]
    assert (untouched["value"] == 1).all()
    assert of_matrices[of_matrices.metric == "change_rank"]["value"].sum() == 1


def test_what_has_no_value_says_why(folders):
    result = weights([folders[0], folders[0], folders[1]], names=["base", "same", "low"], rotations=True, spectra=False)
    reasons = {(r["metric"], r["stage"]): r["reason"] for r in result.table.reasons}
    assert "one of them is zero" in reasons["change_cosine", "low with same"]
    assert "change_rank" not in set(weights(folders[:2], spectra=False).frame["metric"])


def test_groups_are_means_over_their_matrices_with_figures_and_words(folders):
    result = weights(folders, names=["base", "low", "full"], rotations=True, spectra=False)
    frame = result.frame
    own = frame[(frame.kind == "block") & (frame.layer == 1)]
    for stage, metric in (("low-base", "vector_rotation"), ("low-base", "share_unchanged"),
                          ("full-base", "change_rank"), ("full with low", "change_cosine")):
        for group, kinds in (("qkvo", {"q", "k", "v", "o"}), ("mlp", {"gate", "up", "down"}), ("all", None)):
            part = own[(own.stage == stage) & (own.metric == metric) & own.tensor.notna() & own.value.notna()]
            part = part if kinds is None else part[part.matrix.isin(kinds)]
            total, weight = 0.0, 0.0
            for value, n in zip(part["value"], part["n"], strict=True):
                each = n if metric == "share_unchanged" else 1
                total, weight = total + each * value, weight + each
            found = own[(own.stage == stage) & (own.metric == metric) & own.tensor.isna() & (own.matrix == group)]
            if weight == 0:
                assert found.empty
                continue
            assert found["value"].item() == pytest.approx(total / weight), (stage, metric, group)
            assert found["n"].item() == part["n"].sum()
    figures = result.figures()
    assert {"weights-rotations-low-base", "weights-rotations-full-with-low", "weights-intruders-low-base"} <= {*figures}
    words = "\n".join(result.details())
    assert "most in block 1" in words
    assert "bit for bit what they were" in words
    assert "full with low: cosine of the two changes" in words
    table = result.by_block("low-base", "intruder_dimensions").set_index("block")
    assert table.loc[1, "q"] == 1
    assert table.loc[0, "q"] == 0


def test_rotations_have_a_place_in_the_report(folders, tmp_path):
    pytest.importorskip("plotly")
    from midblock.provenance import RunFolder
    from midblock.report.charts import charts_of
    from midblock.report.collect import collect

    result = weights(folders, names=["base", "low", "full"], rotations=True, spectra=False)
    with RunFolder(tmp_path / "w", command="weights", settings={}) as made:
        made.record_inputs(models={n: {"spec": n, "name": n, "fingerprint": n, "blocks": result.num_blocks}
                                   for n in ("base", "low", "full")}, data={})
        made.write_table(result.table)
    charts = {(c["kind"], c["title"]): c for c in charts_of(collect([tmp_path])[0])}
    for title in ("Intruder dimensions", "Singular vectors kept", "Entries exactly unchanged", "Rank of the change",
                  "Cosine of two changes", "Principal angles of two changes"):
        assert charts["depth", title]["rows"], title
    heat = charts["heatmap", "Intruder dimensions of each matrix (low-base)"]
    assert ["q", 1, 1.0] in heat["rows"]
    assert len(heat["rows"]) == 7 * result.num_blocks
    relative = charts["heatmap", "Weight change, relative of each matrix (low-base)"]
    assert {row[0] for row in relative["rows"]} >= {"q", "k", "v", "o", "gate", "up", "down"}
