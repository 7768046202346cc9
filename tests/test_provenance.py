"""Run folders: one process at a time, nothing half-written left behind, nothing edited taken for a result."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest

from midblock.errors import OutputError
from midblock.provenance import RunFolder, held, read_run, read_table
from midblock.results import Estimate, Table
from midblock.writing import TEMPORARY, write_sealed


def finished(path: Path, command: str = "profile") -> Path:
    table = Table()
    table.add("hidden", 1, "cka", "pair", Estimate(0.5, 0.4, 0.6, 8))
    table.add("segment", "01000", "cka", "pair", 0.25)
    with RunFolder(path, command=command, settings={"samples": 8}) as run:
        run.write_table(table)
    return path


def test_a_finished_run_is_read_back(tmp_path: Path) -> None:
    folder = finished(tmp_path / "run")
    assert read_run(folder, finished=True)["settings"] == {"samples": 8}
    frame = read_table(folder, columns=["kind", "value"])
    assert frame["layer"].tolist() == ["1", "01000"]
    assert frame["value"].tolist() == [0.5, 0.25]
    assert {p.name for p in folder.iterdir()} == {"run.json", "table.csv"}


def test_a_later_result_leaves_nothing_of_the_earlier_one(tmp_path: Path) -> None:
    folder, other = tmp_path / "run", tmp_path / "other.csv"
    other.write_text("not of this run")
    frame = Table().frame()
    with RunFolder(folder, command="sweep", settings={}) as run:
        names = [run.write_table(frame, name).name for name in ("table.csv", "gone.csv")]
        run.file("figures/gone.svg").write_text("<svg/>")
        run.publish([*names, "figures/gone.svg", "../other.csv"])
    with RunFolder(folder, command="sweep", settings={}, resume=True) as run:
        run.publish([run.write_table(frame).name], counts={"arms": 1})
    assert {p.relative_to(folder).as_posix() for p in folder.rglob("*.*")} == {"run.json", "table.csv"}
    told = read_run(folder, finished=True)
    assert (told["files"], list(told["digests"]), told["counts"]) == (["table.csv"], ["table.csv"], {"arms": 1})
    assert other.exists()


@pytest.mark.parametrize("edit", [
    lambda text: text.replace('"samples": 8', '"samples": 9'), lambda text: text.replace("finished", "running"),
    lambda text: "[]", lambda text: "5", lambda text: "null", lambda text: "{}", lambda text: "",
    lambda text: text[:-20], lambda text: "[" * 50_000, lambda text: '{"command": 5, "settings": []}',
    lambda text: text + "\0", lambda text: text.replace('"format_version": 2', '"format_version": "2"')])
def test_an_edited_run_json_is_refused_by_name(tmp_path: Path, edit) -> None:
    path = finished(tmp_path / "run") / "run.json"
    path.write_text(edit(path.read_text()))
    for read in (read_run, read_table):
        with pytest.raises(OutputError, match=r"run\.json"):
            read(tmp_path / "run")


@pytest.mark.parametrize("content", [
    [], {"settings": []}, {"settings": {}, "command": 5}, {"models": 3}, {"status": None},
    {"digests": {"table.csv": 5}}, {"format_version": 99}, {"format_version": 1}, {"format_version": "x"}])
def test_a_run_json_of_another_shape_is_refused(tmp_path: Path, content) -> None:
    good = {"status": "finished", "command": "profile", "settings": {}, "models": {}, "data": {}}
    if isinstance(content, dict):
        write_sealed(tmp_path / "run.json", {**good, **content})
    else:
        (tmp_path / "run.json").write_text(json.dumps(content))
    with pytest.raises(OutputError, match=r"run\.json"):
        read_run(tmp_path)


@pytest.mark.parametrize("edit", [lambda t: t.replace("0.5", "0.9"), lambda t: t + "hidden,2,cka,pair,1,1,1,8\n",
                                  lambda t: t[: len(t) // 2], lambda t: ""])
def test_an_edited_table_is_refused_by_name(tmp_path: Path, edit) -> None:
    path = finished(tmp_path / "run") / "table.csv"
    path.write_text(edit(path.read_text()))
    with pytest.raises(OutputError, match=r"table\.csv was changed after midblock wrote it"):
        read_table(tmp_path / "run")
    path.unlink()
    with pytest.raises(OutputError, match=r"has no table\.csv; a profile run writes it"):
        read_table(tmp_path / "run")


def test_an_unfinished_run_is_refused_where_results_are_needed(tmp_path: Path) -> None:
    with contextlib.suppress(RuntimeError), RunFolder(tmp_path / "run", command="sweep", settings={}) as run:
        run.write_text("some.txt", "x")
        raise RuntimeError
    assert read_run(tmp_path / "run")["status"] == "failed"
    with pytest.raises(OutputError, match=r"not finished \(its status is 'failed'\).*--resume"):
        read_run(tmp_path / "run", finished=True)


def test_two_runs_in_one_folder_are_refused(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "run", command="tune", settings={}) as run:
        run.write_text("some.txt", "x")
        for resume in (False, True):
            with pytest.raises(OutputError, match=r"in use by another run|is not empty"):
                RunFolder(tmp_path / "run", command="tune", settings={}, resume=resume)
    with RunFolder(tmp_path / "run", command="tune", settings={}, resume=True) as again:
        assert again.resumed


HOLD = ("import sys, time; from midblock.provenance import RunFolder\n"
        "with RunFolder(sys.argv[1], command='tune', settings={}) as run:\n"
        "    run.write_text('some.txt', 'x'); print('in', flush=True); time.sleep(120)")


def test_two_processes_and_a_killed_one(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "in\n"
        with pytest.raises(OutputError, match="in use by another run"):
            RunFolder(tmp_path / "run", command="tune", settings={}, resume=True)
    finally:
        holder.kill()
        holder.wait()
    leftover = tmp_path / "run" / "model" / f"{TEMPORARY}elsewhere-1-x" / "deep"
    leftover.mkdir(parents=True)
    (leftover / "weights").write_bytes(b"x" * 1000)
    (tmp_path / "run" / f"{TEMPORARY}elsewhere-1-y.json").write_text("{")
    (tmp_path / "run" / ".mine").write_text("the user's own")
    with RunFolder(tmp_path / "run", command="tune", settings={}, resume=True) as run:
        assert run.resumed
    assert {str(p.relative_to(tmp_path / "run")) for p in (tmp_path / "run").rglob("*")} == {
        "run.json", "some.txt", "model", ".mine"}


def test_a_mistake_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(OutputError), RunFolder(tmp_path / "run", command="tune", settings={}):
        raise OutputError("a mistake")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / ("x" * 300), "a\0b", "~nosuchuser/x", tmp_path / "file" / "below"):
        with pytest.raises(OutputError):
            RunFolder(path, command="tune", settings={})
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def _contend(folder: str, results: str) -> None:
    got = overlaps = 0
    for _ in range(200):
        with contextlib.suppress(OutputError), held(Path(folder)):
            got += 1
            try:
                os.close(os.open(f"{folder}/inside", os.O_CREAT | os.O_EXCL))
                os.unlink(f"{folder}/inside")
            except FileExistsError:
                overlaps += 1
    Path(results).write_text(f"{got} {overlaps}")


def test_no_two_processes_ever_hold_a_folder(tmp_path: Path) -> None:
    """Its lock is removed with each release, so that a waiting process may have opened one that is gone."""
    (tmp_path / "run").mkdir()
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_contend, args=(str(tmp_path / "run"), str(tmp_path / f"r{n}")))
               for n in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    counts = [tuple(map(int, (tmp_path / f"r{n}").read_text().split())) for n in range(4)]
    assert all(got > 0 for got, _ in counts)
    assert [overlaps for _, overlaps in counts] == [0] * 4
    assert list((tmp_path / "run").iterdir()) == []
