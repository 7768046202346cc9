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
    untouched = frame[(frame.metric == "share_unchanged") & (frame.stage == "low-base") & (frame.tensor != TENSOR)]
    assert (untouched["value"] == 1).all()
    assert (frame[(frame.metric == "change_rank") & (frame.stage == "low-base")]["value"].sum()) == 1


def test_what_has_no_value_says_why(folders):
    result = weights([folders[0], folders[0], folders[1]], names=["base", "same", "low"], rotations=True, spectra=False)
    reasons = {(r["metric"], r["stage"]): r["reason"] for r in result.table.reasons}
    assert "one of them is zero" in reasons["change_cosine", "low with same"]
    assert "change_rank" not in set(weights(folders[:2], spectra=False).frame["metric"])
