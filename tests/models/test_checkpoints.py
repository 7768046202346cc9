"""Checkpoints on disk: reading and content hashes."""

from __future__ import annotations

import json
import os
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from conftest import build_tiny_tokenizer
from families import FAMILIES
from midblock.errors import (
    CheckpointError,
)
from midblock.models import Checkpoint, fingerprint, save_checkpoint
from model_helpers import saved


def test_reads_what_transformers_wrote(tmp_path: Path) -> None:
    model = FAMILIES["llama"]()
    folder = save_checkpoint(model, build_tiny_tokenizer(), tmp_path / "m")
    found = Checkpoint(folder)
    state = model.state_dict()
    assert set(found.names()) == set(state)
    for name in found.names():
        assert found.shape(name) == tuple(state[name].shape)
        assert found.dtype(name) == torch.float32
        torch.testing.assert_close(found.read(name), state[name], rtol=0, atol=0)
    assert found.nbytes == sum(t.numel() * 4 for t in state.values())
    assert "lm_head.weight" in found
    with pytest.raises(CheckpointError, match="no tensor 'absent'"):
        found.read("absent")
    with pytest.raises(CheckpointError, match="no tensor 'absent'"):
        found.shape("absent")


def shard(folder: Path, size: str = "40KB") -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(folder, max_shard_size=size)
    (folder / "model.safetensors").unlink(missing_ok=True)


def test_sharded_equals_whole(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m", "qwen2")
    whole = {n: Checkpoint(folder).read(n).clone() for n in Checkpoint(folder).names()}
    shard(folder)
    found = Checkpoint(folder)
    assert len(found.files) > 2
    assert set(found.names()) == set(whole)
    for name, value in whole.items():
        assert torch.equal(found.read(name), value)
    found.release()
    assert torch.equal(found.read("model.norm.weight"), whole["model.norm.weight"])


def test_missing_shard_and_missing_weight(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m", "llama")
    shard(folder)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.extra.weight"] = next(iter(index["weight_map"].values()))
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"model\.extra\.weight"):
        Checkpoint(folder)
    lost = sorted(folder.glob("model-*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(CheckpointError, match=lost.name):
        Checkpoint(folder)


@pytest.mark.parametrize("damage", ["truncated", "header", "empty", "longer", "not-a-dict"])
def test_damaged_file_is_named(tmp_path: Path, damage: str) -> None:
    folder = saved(tmp_path / "m", "llama")
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes({"truncated": data[:-100], "header": data[:8] + b"\xff" * 200 + data[208:], "empty": b"",
                      "longer": data + b"x", "not-a-dict": struct.pack("<Q", 2) + b"[]"}[damage])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is (truncated|damaged)"):
        Checkpoint(folder)


def test_config_that_is_no_json(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m", "llama")
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json is not valid JSON"):
        Checkpoint(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_from_names_agree_with_the_model(tmp_path: Path, family: str) -> None:
    model = FAMILIES[family]()
    found = Checkpoint(save_checkpoint(model, None, tmp_path / family))
    per_block = {b: [n for n in found.names() if found.block_of(n) == b] for b in range(4)}
    from midblock.models import find_anatomy

    for b, block in enumerate(find_anatomy(model).blocks):
        elements = sum(np.prod(found.shape(n)) for n in per_block[b])
        assert elements == sum(p.numel() for p in block.parameters())


def test_names_without_one_list_of_blocks(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m", "llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 9}))
    with pytest.raises(CheckpointError, match="list of 9 blocks"):
        Checkpoint(folder).block_of("model.layers.0.mlp.up_proj.weight")


def test_fingerprint_follows_content(tmp_path: Path, cache: Path) -> None:
    first = saved(tmp_path / "a", "llama")
    shutil.copytree(first, tmp_path / "b")
    assert fingerprint(first) == fingerprint(tmp_path / "b")
    path = tmp_path / "b" / "model.safetensors"
    weights = load_file(path)
    weights["model.norm.weight"][3] += 1e-3
    save_file(weights, path, metadata={"format": "pt"})
    assert fingerprint(tmp_path / "b") != fingerprint(first)


def test_fingerprint_sees_a_change_that_keeps_size_and_is_stored(tmp_path: Path, cache: Path) -> None:
    folder = saved(tmp_path / "a", "llama")
    path = folder / "model.safetensors"
    os.utime(path, (1_600_000_000, 1_600_000_000))
    before = fingerprint(folder)
    assert len(list((cache / "digests").iterdir())) >= 1
    assert fingerprint(folder) == before
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert fingerprint(folder) != before


def test_hub_cache_blob_names_are_trusted(tmp_path: Path, cache: Path) -> None:
    folder = saved(tmp_path / "snapshots" / "x")
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    import hashlib

    real = folder / "model.safetensors"
    digest = hashlib.sha256(real.read_bytes()).hexdigest()
    plain = fingerprint(folder)
    real.rename(blobs / digest)
    real.symlink_to(blobs / digest)
    assert fingerprint(folder) == plain
