"""Overlap of selections: groups, chance, the claim, and what cannot be compared."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from midblock.errors import OutputError, SettingsError
from midblock.provenance import RunFolder
from midblock.results import Table
from midblock.selection.overlap import Selection, overlap, overlap_of

UNITS = [f"model.layers.{b}.{m}" for b in range(20) for m in ("q", "k", "v", "o", "up")]


def _selection(folder: str, data: str, values: np.ndarray, *, seed: int = 0, step: int | None = 50,
               method: str = "ila_score") -> Selection:
    return Selection(folder, data, seed, step, method, dict(zip(UNITS, values.tolist(), strict=True)))


def test_independent_scores_overlap_as_chance_does() -> None:
    draw = np.random.default_rng(0)
    found = overlap_of([_selection(f"r{i}", f"d{i}", draw.random(100)) for i in range(6)], share=0.75)
    own = found.frame[found.frame["layer"] == "data (ila_score)"].set_index("metric")
    assert own.loc["jaccard", "value"] == pytest.approx(0.6, abs=0.05)
    assert own.loc["chance_jaccard", "value"] == pytest.approx(0.6, abs=0.005)
    assert own.loc["corrected", "value"] == pytest.approx(0, abs=0.12)
    assert own.loc["jaccard", "n"] == 15
    assert (found.pairs["p_holm"] > 0.05).all()
    text = found.summary()
    assert "overlap of 0.60" in text
    assert "less than claimed" in text


def test_equal_scores_confirm_the_claim() -> None:
    base = np.random.default_rng(0).random(100)
    found = overlap_of([_selection(f"r{i}", f"d{i}", base + 1e-6 * i) for i in range(3)])
    own = found.frame[found.frame["layer"] == "data (ila_score)"].set_index("metric")
    assert own.loc["jaccard", ["value", "low", "high"]].tolist() == [1.0, 1.0, 1.0]
    assert "more than claimed, above chance" in found.summary()
    assert np.array_equal(found.matrix(), np.ones((3, 3)))
    assert set(found.figures()) == {"overlap-jaccard", "overlap-corrected"}


def test_pairs_are_grouped_by_what_they_differ_in() -> None:
    draw = np.random.default_rng(1)
    made = [_selection("a", "x", draw.random(100)),
            _selection("b", "x", draw.random(100), seed=1, step=70),
            _selection("c", "y", draw.random(100), step=60),
            _selection("a", "x", draw.random(100), method="taylor"),
            _selection("a", "x", draw.random(100), step=10)]
    groups = {(r["a"], r["b"]): r["group"] for r in overlap_of(made).pairs.to_dict(orient="records")}
    found = list(groups.values())
    # (a,b): seed, although their last steps differ; (a,c): data; (a, taylor): method; (a, a@10): step
    assert found[0] == "seed (ila_score)"
    assert found[1] == "data (ila_score)"
    assert found[2] == "method"
    assert found[3] == "step (ila_score)"
    assert found[4] == "several (ila_score)"  # b against c


def test_what_cannot_be_compared() -> None:
    draw = np.random.default_rng(1)
    one = _selection("a", "x", draw.random(100))
    with pytest.raises(SettingsError, match="at least two"):
        overlap_of([one])
    with pytest.raises(SettingsError, match="share must be less than 1"):
        overlap_of([one, _selection("b", "y", draw.random(100))], share=1.0)
    other = Selection("b", "y", 0, 1, "ila_score", {"block 0": 1.0, "block 1": 2.0})
    with pytest.raises(SettingsError, match="one model"):
        overlap_of([one, other])


def _folder(path: Path, data: str, values: list[float], command: str = "importance") -> Path:
    table = Table()
    for metric, turn in (("ila_score", 1.0), ("taylor", -1.0)):
        for step in (10, 20):
            for b, value in enumerate(values):
                table.add("block", b, metric, "pair", turn * value * (1 if step == 20 else -1), n=1, matrix="all",
                          module="", unit=f"block {b}", step=step, final=step == 20, data=data, seed=0)
    with RunFolder(path, command=command, settings={"model": "tiny", "rank": 4}) as run:
        run.write_table(table)
    return path


def test_run_folders_are_read(tmp_path: Path) -> None:
    one = _folder(tmp_path / "one", "x", [1.0, 2.0, 3.0, 4.0])
    two = _folder(tmp_path / "two", "y", [1.0, 2.0, 4.0, 3.0])
    found = overlap([one, two], share=0.5)
    assert len(found.pairs) == 1
    assert found.pairs["jaccard"].tolist() == [1.0]
    steps = overlap([one], share=0.5, steps="all")
    assert steps.pairs["differ"].tolist() == ["step"]
    assert steps.pairs["jaccard"].tolist() == [0.0]
    methods = overlap([one], share=0.5, methods=["ila_score", "taylor"])
    assert methods.pairs["differ"].tolist() == ["method"]
    assert "not tested here" in methods.summary()
    with pytest.raises(SettingsError, match="twice"):
        overlap([one, one])
    with pytest.raises(SettingsError, match="none of the scores"):
        overlap([one, two], methods=["fisher"])
    with pytest.raises(OutputError, match="profile"):
        overlap([one, _folder(tmp_path / "three", "z", [1.0], command="profile")])
