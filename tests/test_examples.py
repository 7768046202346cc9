"""The notebooks of examples/ run, and are kept as they ran."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "examples"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_is_kept_with_its_outputs(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    cells = [c for c in json.loads(text)["cells"] if c["cell_type"] == "code"]
    assert [c["execution_count"] for c in cells] == list(range(1, len(cells) + 1))  # from top to bottom, once
    assert any(c["outputs"] for c in cells)
    assert "/tmp/" not in text  # nothing of the machine that it ran on
    assert "/home/" not in text
    assert len(text) < 1_500_000


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_runs(path: Path, smollm2_folder: Path) -> None:
    pytest.importorskip("nbclient", reason="the extra 'notebooks' is not installed")
    spec = importlib.util.spec_from_file_location("execute", FOLDER / "execute.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert smollm2_folder.is_dir()
    module.execute(path)  # the first error of a cell ends it
