"""Results of runs: what was written comes back, what was changed is refused with the file's name."""

from __future__ import annotations

import json
import math

import pytest

from midblock.errors import OutputError
from midblock.reading import sealed
from midblock.sweeps import RunRecord, TaskScores, read_records
from midblock.sweeps.records import write_record


def record() -> RunRecord:
    scores = TaskScores("t", "loss", False, ["a", "b"], [0.25, math.nan], [3.0, 4.0], 0.25, 1.5, ["a note"])
    return RunRecord("00100", 0.01, 3, "done", plan={"mask": "00100"}, training={"losses": [1.0, 0.5]},
                     tasks={"t": scores}, validation_loss=0.5, seconds=2.0, peak_memory_bytes=7, notes=["n"])


def test_round_trip(tmp_path):
    path = write_record(tmp_path, record())
    assert path.name == "00100__lr0.01__seed3.json"
    base = RunRecord("base", None, None, "failed", reason="no room", traceback="...")
    write_record(tmp_path, base)
    found = read_records(tmp_path)
    assert found["base"] == base
    again = found[record().key]
    assert math.isnan(again.tasks["t"].scores[1])
    again.tasks["t"].scores[1] = 0.0
    wanted = record()
    wanted.tasks["t"].scores[1] = 0.0
    assert again == wanted
    assert read_records(tmp_path / "nowhere") == {}


def edited(path, change):
    stored = json.loads(path.read_text())
    change(stored)
    path.write_text(json.dumps(stored))


@pytest.mark.parametrize("change", [
    lambda r: r["tasks"]["t"]["scores"].__setitem__(0, 0.26),
    lambda r: r["tasks"]["t"].update(value=1.0),
    lambda r: r.update(seed=4),
    lambda r: r.update(status="failed"),
    lambda r: r.pop("digest"),
    lambda r: r.update(digest=7),
])
def test_an_edited_result_is_refused_by_name(tmp_path, change):
    path = write_record(tmp_path, record())
    edited(path, change)
    with pytest.raises(OutputError, match=r"00100__lr0\.01__seed3\.json .*--resume"):
        read_records(tmp_path)


def resealed(change):
    stored = json.loads(json.dumps(change))
    stored.pop("digest", None)
    return sealed(stored)


BROKEN = {
    "null": None, "empty": {}, "list": [], "number": 5, "text": "x",
    "text scores": lambda r: r["tasks"]["t"].update(scores=["high", "low"]),
    "null scores": lambda r: r["tasks"]["t"].update(scores=None),
    "scores for other items": lambda r: r["tasks"]["t"].update(scores=[0.1]),
    "tokens for other items": lambda r: r["tasks"]["t"].update(tokens=[1.0, 2.0, 3.0]),
    "a task that is a list": lambda r: r.update(tasks={"t": []}),
    "tasks null": lambda r: r.update(tasks=None),
    "no arm": lambda r: r.pop("arm"),
    "arm a list": lambda r: r.update(arm=["00100"]),
    "another arm": lambda r: r.update(arm="00001"),
    "an arm outside the folder": lambda r: r.update(arm="../../00100"),
    "status unknown": lambda r: r.update(status="half"),
    "seed a text": lambda r: r.update(seed="three"),
    "a format of the future": lambda r: r.update(format_version=99),
    "a format that is no number": lambda r: r.update(format_version=[1]),
    "no format": lambda r: r.pop("format_version"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_files_that_are_no_results_are_refused_by_name(tmp_path, kind):
    path = write_record(tmp_path, record())
    change = BROKEN[kind]
    if callable(change):
        stored = json.loads(path.read_text())
        change(stored)
        path.write_text(json.dumps(resealed(stored)))
    else:
        path.write_text(json.dumps(change))
    with pytest.raises(OutputError, match=r"00100__lr0\.01__seed3\.json"):
        read_records(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, '{"a": ' + "9" * 5000 + "}", "\x00"])
def test_files_that_are_no_json_are_refused_by_name(tmp_path, text):
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "base.json").write_text(text)
    with pytest.raises(OutputError, match=r"base\.json"):
        read_records(tmp_path)
