"""Only files that midblock wrote and marked are removed; whatever else lies there stays."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from midblock.errors import OutputError
from midblock.removing import LOCK, TEMPORARY, remove_empty, remove_marked, remove_named
from midblock.writing import replace_own, temporary_folder


@pytest.mark.parametrize("name", ["model.safetensors", "run.json", f"x{TEMPORARY}1", "..", ".midblock", ""])
def test_a_file_of_another_name_is_not_temporary(tmp_path: Path, name: str) -> None:
    path = tmp_path / "below" / name
    (tmp_path / "below").mkdir()
    if name and not path.exists():
        path.write_text("mine")
    with pytest.raises(ValueError, match="not a temporary file"):
        remove_named(path)
    assert path.exists()


def test_temporary_files_folders_links_and_locks_go(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "x").write_text("mine")
    (tmp_path / f"{TEMPORARY}file").write_text("")
    (tmp_path / f"{TEMPORARY}folder" / "deep").mkdir(parents=True)
    (tmp_path / f"{TEMPORARY}link").symlink_to(mine)
    (tmp_path / LOCK).write_text("")
    for path in [*tmp_path.glob(f"{TEMPORARY}*"), tmp_path / LOCK, tmp_path / f"{TEMPORARY}absent"]:
        remove_named(path)
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]
    assert (mine / "x").read_text() == "mine"


def marked(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "marker.json").write_text("{}")
    (folder / "below").mkdir()
    for name in ("a", "b", "below/c"):
        (folder / name).write_text("ours")
    return folder / "marker.json"


def test_nothing_goes_without_a_marker_or_outside_its_folder(tmp_path: Path) -> None:
    marker = marked(tmp_path / "own")
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "own" / "way").symlink_to(tmp_path)
    for path in (tmp_path / "mine", tmp_path / "own" / ".." / "mine", tmp_path / "own" / "way" / "mine"):
        with pytest.raises(ValueError, match="not in the folder"):
            remove_marked(marker, [path])
    marker.rename(tmp_path / "elsewhere.json")
    for again in (None, tmp_path / "elsewhere.json"):  # none, and a link in its place
        if again:
            marker.symlink_to(again)
        with pytest.raises(OutputError, match=r"own has no marker\.json"):
            remove_marked(marker, [tmp_path / "own" / "a"], folder=True)
    assert (tmp_path / "mine").read_text() == (tmp_path / "mine").read_text() == "mine"
    assert (tmp_path / "own" / "a").exists()


def test_a_folder_goes_only_if_nothing_else_lies_there(tmp_path: Path) -> None:
    ours = ["a", "b", "below/c", "marker.json"]
    marker = marked(tmp_path / "own")
    assert remove_marked(marker, [tmp_path / "own" / n for n in ours], folder=True) is None
    assert not (tmp_path / "own").exists()
    marker = marked(tmp_path / "own")
    (tmp_path / "own" / "below" / "notes.txt").write_text("mine")
    (tmp_path / "own" / "link").symlink_to(tmp_path)
    assert remove_marked(marker, [tmp_path / "own" / n for n in [*ours, "link"]], folder=True) == "below/notes.txt"
    assert sorted(p.name for p in (tmp_path / "own").rglob("*")) == ["below", "link", "marker.json", "notes.txt"]
    remove_empty(tmp_path / "own" / "below")
    assert (tmp_path / "own" / "below" / "notes.txt").read_text() == "mine"


def write(folder: Path, **files: str) -> list[Path]:
    with temporary_folder(folder / "x") as made:
        for name, text in files.items():
            (made / name).write_text(text)
        return replace_own(made, folder, "ours.json")


def test_files_are_replaced_only_where_an_earlier_call_wrote_them(tmp_path: Path) -> None:
    folder = tmp_path / "figures"
    assert write(folder, a="1", b="1") == [folder / "a", folder / "b"]
    write(folder, a="2")
    assert {p.name: p.read_text() for p in folder.iterdir() if p.name in "ab"} == {"a": "2", "b": "1"}
    (folder / "b").write_text("edited")
    (folder / "c").write_text("mine")
    for name in "bc":
        with pytest.raises(OutputError, match=f"{name} is there, and is not as midblock wrote it"):
            write(folder, a="3", **{name: "3"})
    assert {p.name: p.read_text() for p in folder.iterdir() if p.name in "abc"} == {
        "a": "2", "b": "edited", "c": "mine"}
    assert not [p for p in folder.iterdir() if p.name.startswith(TEMPORARY)]


def test_a_crash_while_files_are_replaced_does_not_shut_the_next_call_out(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, real, left = tmp_path / "figures", os.replace, 2
    write(folder, a="1", b="1")

    def dying(old: str, new: str) -> None:
        nonlocal left
        if Path(new).name in "ab":
            left -= 1
            if left == 0:
                raise KeyboardInterrupt
        real(old, new)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", dying)
        with pytest.raises(KeyboardInterrupt):
            write(folder, a="2", b="2")
    assert (folder / "a").read_text() + (folder / "b").read_text() == "21"
    write(folder, a="3", b="3")
    assert (folder / "a").read_text() + (folder / "b").read_text() == "33"
