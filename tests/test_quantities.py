"""Records of measures: complete, and enough to add a measure with one function and one record."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

from analysis_helpers import loaded, tiny_data
from midblock import quantities as of
from midblock.analysis.profile import profile
from midblock.errors import SettingsError
from midblock.quantities import Quantity, find, label_of, matrix_order, quantities, register, unchanged

SIZES = {"samples": 8, "token_samples": 4, "max_length": 48, "replicates": 40}


@pytest.fixture
def fresh_registry(monkeypatch):
    monkeypatch.setattr(of, "_KNOWN", dict(of._KNOWN))


@pytest.mark.parametrize("quantity", quantities(), ids=lambda q: q.name)
def test_a_record_is_complete_and_its_functions_exist(quantity):
    assert quantity.label[:1].isupper() or quantity.label.startswith("Di")
    assert "_" not in quantity.axis
    assert quantity.formula
    assert quantity.source, "a paper, or: definition"
    assert quantity.reading
    assert not quantity.label.endswith(")"), "the unit has a field of its own"
    for part in ("function", "resampled", "jackknife"):
        if getattr(quantity, part):
            function = quantity.load(part)
            taken = set(inspect.signature(function).parameters)
            assert set(quantity.options) | set(quantity.fixed) <= taken, f"{part} does not take its options"
            assert function.__doc__


def test_options_are_fields_of_the_profiles_settings():
    from midblock.analysis.profile import ProfileSettings

    for quantity in quantities():
        assert quantity.arguments(ProfileSettings()).keys() == quantity.options.keys() | quantity.fixed.keys()


def test_what_profile_measures_has_a_value_of_no_change_that_it_finds():
    model = loaded("llama")
    frame = profile(model, model, data=tiny_data(8), **SIZES).frame
    changes = frame[frame["side"].isin(["difference", "pair"])]
    assert {q.name for q in quantities(level="dataset")} <= set(changes["metric"])
    for row in changes.dropna(subset=["value"]).itertuples():
        assert row.value == pytest.approx(unchanged(row.metric, row.side), abs=1e-6), row.metric


def test_labels_of_unknown_names_are_words():
    assert label_of("curvature") == "Curvature (mean angle / π)"
    assert label_of("curvature", unit="") == "Curvature"
    assert label_of("my_own_metric") == "My own metric"
    assert label_of("my_own_metric", unit="m") == "My own metric (m)"


def test_matrices_have_one_order():
    assert matrix_order(["down", "norm", "q", "gate", "x", "q"]) == ["q", "gate", "down", "norm", "x"]
    assert len(set(of.MATRICES)) == len(of.MATRICES)


def test_records_need_no_torch():
    code = "import sys, midblock.quantities, midblock.figures; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.usefixtures("fresh_registry")
def test_a_measure_of_ones_own_is_a_function_and_a_record():
    def participation_ratio(x):
        """(sum of eigenvalues)^2 / sum of their squares."""
        gram = x @ x.mT
        return gram.trace() ** 2 / gram.square().sum()

    def largest_entry(z, mask):
        """Per sample."""
        return z.abs().amax(-1).masked_fill(~mask, 0).amax(-1)

    def moved(x, y):
        """Per sample of two models."""
        return (y - x).abs().sum(-1)

    register(Quantity(name="participation_ratio", label="Participation ratio", level="dataset", unit="dimensions",
                      family="information", function=participation_ratio))
    register(Quantity(name="largest_entry", label="Largest entry", level="token", family="geometry",
                      function=largest_entry))
    register(Quantity(name="moved", label="Moved", level="dataset", family="change", paired=True, function=moved))
    pair = loaded("llama", 0), loaded("llama", 1)
    result = profile(*pair, data=tiny_data(8), **SIZES)
    frame = result.frame
    ratio = frame[(frame["metric"] == "participation_ratio") & (frame["layer"] == 2)].set_index("side")
    # the same from the eigenvalues of the effective rank's own spectrum
    assert set(ratio.index) == {"base", "sft", "difference"}
    assert (ratio["low"] < ratio["value"]).all()
    assert ratio.loc["difference", "value"] == pytest.approx(ratio.loc["sft", "value"] - ratio.loc["base", "value"])
    own = frame[frame["metric"] == "largest_entry"]
    assert len(own) == 5 * 3
    assert (own["n"] == 4).all()
    sums = frame[frame["metric"] == "moved"]
    assert set(sums["side"]) == {"pair"}
    distances = frame[frame["metric"] == "change_intensity"]["value"].to_numpy()
    assert (sums["value"].to_numpy() >= distances - 1e-9).all(), "the 1-norm is at least the 2-norm"
    assert np.isfinite(sums[["low", "high"]].to_numpy()).all()
    axes = [a.get_ylabel().replace("\n", " ") for a in result.figures()["information"].axes]
    assert any("articipation ratio" in label for label in axes)


@pytest.mark.usefixtures("fresh_registry")
def test_an_undefined_or_too_small_measure_is_an_empty_cell_with_its_reason():
    def picky(x):
        """Never defined."""
        from midblock.errors import UndefinedMetricError

        raise UndefinedMetricError("not today")

    register(Quantity(name="picky", label="Picky", level="dataset", family="geometry", function=picky))
    register(Quantity(name="many", label="Many", level="dataset", family="geometry", function=torch.mean, least=99))
    result = profile(loaded("llama"), loaded("llama", 1), data=tiny_data(8), **SIZES)
    reasons = {r["metric"]: r["reason"] for r in result.table.reasons}
    assert reasons["picky"] == "not today"
    assert re.search("at least 99", reasons["many"])


@pytest.mark.usefixtures("fresh_registry")
def test_mistakes_are_named():
    with pytest.raises(SettingsError, match="known already"):
        register(Quantity(name="cka", label="CKA", level="dataset", family="alignment"))
    register(Quantity(name="cka", label="Mine", level="dataset", family="alignment"), replace=True)
    assert find("cka").label == "Mine"
    with pytest.raises(SettingsError, match="lower-case"):
        Quantity(name="My metric", label="x", level="dataset", family="alignment")
    with pytest.raises(SettingsError, match="family 'nowhere'"):
        Quantity(name="x", label="x", level="dataset", family="nowhere")
    with pytest.raises(SettingsError, match="no quantity 'nothing'"):
        find("nothing")
    with pytest.raises(SettingsError, match="no jackknife"):
        find("curvature").load("jackknife")
