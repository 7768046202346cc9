"""Files written in one piece, sealed where they are read back."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from midblock.errors import OutputError
from midblock.writing import TEMPORARY, atomic_path, read_written, remove_leftovers, temporary_folder, write_sealed


def test_sealed_files_are_read_back_or_refused(tmp_path: Path) -> None:
    write_sealed(tmp_path / "r.json", {"score": 0.1, "items": (1, 2), "none": float("nan")})
    assert read_written(tmp_path / "r.json", advice="x") == {"score": 0.1, "items": [1, 2], "none": None}
    for text in ("null", "{}", "[]", (tmp_path / "r.json").read_text().replace("0.1", "0.9")):
        (tmp_path / "r.json").write_text(text)
        with pytest.raises(OutputError, match=r"r\.json .*evaluate again|r\.json holds"):
            read_written(tmp_path / "r.json", advice="evaluate again")


def test_leftovers_elsewhere_go_only_if_surely_ours_and_dead(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    host, old = socket.gethostname()[:64], time.time() - 7200
    names = {"dead": f"{TEMPORARY}{host}-{dead.pid}-a", "alive": f"{TEMPORARY}{host}-{os.getpid()}-b",
             "other host": f"{TEMPORARY}x{host}-{dead.pid}-c", "not ours": ".tmp-1", "user's": "model.safetensors",
             "no number": f"{TEMPORARY}{host}-x-d"}
    for name in names.values():
        (tmp_path / name).mkdir()
        (tmp_path / name / "w").write_text("x")
        os.utime(tmp_path / name / "w", (old, old))
        os.utime(tmp_path / name, (old, old))
    recent = tmp_path / f"{TEMPORARY}{host}-{dead.pid}-recent"
    recent.write_text("x")
    assert remove_leftovers(tmp_path) == [tmp_path / names["dead"]]
    assert {p.name for p in tmp_path.iterdir()} == {recent.name, *names.values()} - {names["dead"]}
    assert remove_leftovers(tmp_path / "nowhere") == []


def test_temporary_files_and_folders_leave_nothing(tmp_path: Path) -> None:
    with contextlib.suppress(RuntimeError), atomic_path(tmp_path / "a.json") as temporary:
        assert temporary.name.startswith(TEMPORARY)
        assert temporary.suffix == ".json"
        raise RuntimeError
    with temporary_folder(tmp_path / "model") as folder:
        (folder / "x").write_text("1")
        folder.rename(tmp_path / "model")
    with contextlib.suppress(RuntimeError), temporary_folder(tmp_path / "other"):
        raise RuntimeError
    assert [str(p.relative_to(tmp_path)) for p in sorted(tmp_path.rglob("*"))] == ["model", "model/x"]
    with pytest.raises(OutputError, match="cannot write"), atomic_path(tmp_path / "model" / "x" / "y"):
        pass
