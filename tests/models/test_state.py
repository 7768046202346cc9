"""State in a file is read back exactly, or refused."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest
import torch

from midblock.analysis.passes import PassState
from midblock.errors import OutputError
from midblock.models.state import STATE_MARKER, load_state, save_state


def tensors() -> dict[str, torch.Tensor]:
    return {"a": torch.arange(12.0).reshape(3, 4), "half": torch.ones(5, dtype=torch.bfloat16),
            "whole": torch.tensor([1, 2]), "none": torch.zeros(0, 4), "one": torch.tensor(2.5)}


def test_state_is_read_back(tmp_path: Path) -> None:
    state = {"step": 3, "curve": [[1, 0.1], [2, math.inf]], "name": "naïve", "stopped": None}
    save_state(tmp_path / "s.safetensors", {**tensors(), "t": torch.arange(6.0).reshape(2, 3).T}, state)
    found, back = load_state(tmp_path / "s.safetensors")
    assert back == state
    for name, tensor in tensors().items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    assert torch.equal(found["t"], torch.arange(6.0).reshape(2, 3).T)


def test_any_flipped_bit_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    save_state(path, tensors(), {"step": 3, "items": list(range(20))})
    raw = path.read_bytes()
    draw = random.Random(0)
    for place in {8, 9, len(raw) - 1, *draw.sample(range(8, len(raw)), 60)}:
        damaged = bytearray(raw)
        damaged[place] ^= 1 << draw.randrange(8)
        path.write_bytes(bytes(damaged))
        with pytest.raises(OutputError, match=r"s\.safetensors (cannot be read|is not what midblock wrote)"):
            load_state(path)


@pytest.mark.parametrize("raw", [b"", b"x", b"\0" * 100, b"not a safetensors file at all"])
def test_other_files_are_refused(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "s.safetensors"
    path.write_bytes(raw)
    with pytest.raises(OutputError, match=r"s\.safetensors cannot be read"):
        load_state(path)
    with pytest.raises(OutputError, match="cannot be read"):
        load_state(tmp_path / "nowhere")
    from safetensors.torch import save_file

    save_file({"a": torch.ones(2)}, path)
    with pytest.raises(OutputError, match="is not what midblock wrote"):
        load_state(path)


@pytest.mark.parametrize("name", ["part-00000.safetensors", "importance.safetensors", "seed-0.json", "notes.txt"])
def test_a_folder_that_holds_something_else_is_not_taken_for_state(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(OutputError, match="which no interrupted run of midblock left there"):
        save_state(tmp_path / name, tensors(), {})
    with pytest.raises(OutputError, match="which no interrupted run of midblock left there"):
        PassState(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "mine"


def test_what_others_put_into_a_state_folder_stays(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    save_state(folder / "part-00000.safetensors", tensors(), {})
    (folder / "notes.txt").write_text("mine")
    PassState(folder).discard()
    assert sorted(p.name for p in folder.iterdir()) == [STATE_MARKER, "notes.txt"]
    (folder / "notes.txt").unlink()
    PassState(folder).discard()
    assert not folder.exists()
    PassState(folder).discard()  # nothing to do
