"""`inspect` and `pairs` as a person calls them."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from families import FAMILIES
from midblock.cli.app import run
from midblock.models.pairs import known_pairs


@pytest.fixture(autouse=True)
def _leave_no_settings() -> Iterator[None]:
    before = dict(os.environ)
    with warnings.catch_warnings():
        yield
    for name in set(os.environ) - set(before):
        del os.environ[name]


@pytest.fixture
def tied(tmp_path: Path) -> Path:
    """A tiny tied Llama of four blocks on disk."""
    FAMILIES["llama_tied"]().save_pretrained(tmp_path / "tied")
    return tmp_path / "tied"


def test_inspect_counts_what_the_model_has(tied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", str(tied), "--segments", "3", "--json"]) == 0
    caught = capsys.readouterr()
    found = json.loads(caught.out)
    model = FAMILIES["llama_tied"]()
    assert found["parameters"] == sum(p.numel() for p in model.parameters())
    assert (found["tied"], found["head_parameters"], found["dtype"]) == (True, 0, "float32")
    assert [b["parameters"] for b in found["blocks"]] == [
        sum(p.numel() for p in block.parameters()) for block in model.model.layers]
    assert [(s["mask"], s["first"], s["stop"]) for s in found["segments"]] == [
        ("100", 0, 1), ("010", 1, 2), ("001", 2, 4)]
    assert "\x1b" not in caught.out


def test_inspect_for_people(tied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", str(tied), "--segments", "2"]) == 0
    out = capsys.readouterr().out
    assert "LlamaForCausalLM, float32" in out
    assert "tied to the embeddings" in out
    assert [line.split()[:2] for line in out.splitlines() if line.endswith("%")] == [["10", "0-1"], ["01", "2-3"]]


def test_inspect_reads_no_weights(tied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """NaN weights, which loading refuses, do not matter here."""
    import torch
    from safetensors.torch import load_file, save_file

    weights = {k: torch.full_like(v, float("nan")) for k, v in load_file(tied / "model.safetensors").items()}
    save_file(weights, tied / "model.safetensors", metadata={"format": "pt"})
    assert run(["inspect", str(tied)]) == 0
    caught = capsys.readouterr()
    assert "Warning" not in caught.err
    assert "4 segments" in caught.out  # the default of 5 gives way to a shallow model


def _no_model(folder: Path) -> str:
    return str(folder / "absent")


def _no_config(folder: Path) -> str:
    (folder / "empty").mkdir()
    return str(folder / "empty")


def _truncated(folder: Path) -> str:
    FAMILIES["llama"]().save_pretrained(folder / "cut")
    path = folder / "cut" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    return str(folder / "cut")


@pytest.mark.parametrize(("make", "expected"), [
    (_no_model, "absent"), (_no_config, "config.json"), (_truncated, "model.safetensors")])
def test_a_bad_model_is_one_line(make: object, expected: str, tmp_path: Path,
                                 capsys: pytest.CaptureFixture[str]) -> None:
    assert callable(make)
    model = make(tmp_path)
    capsys.readouterr()  # what writing the checkpoint printed
    assert run(["inspect", model]) == 2
    caught = capsys.readouterr()
    assert caught.out == ""
    assert caught.err.startswith("Error: ")
    assert caught.err.count("\n") == 1
    assert expected in caught.err


def test_more_segments_than_blocks(tied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", str(tied), "--segments", "5"]) == 2
    assert "4 blocks" in capsys.readouterr().err


def test_pairs_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["pairs", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found) == len(known_pairs())
    pure = {p["family"] for p in found if p["suitable"]}
    assert pure == {"OLMo-2", "Mistral"}


def test_pairs_of_a_family_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["pairs", "olmo"]) == 0
    out = capsys.readouterr().out
    assert "allenai/OLMo-2-1124-7B-SFT" in out
    assert "Mistral" not in out
    assert run(["pairs", "nosuch"]) == 2
    assert "known: DeepSeek" in capsys.readouterr().err


@pytest.mark.slow
def test_inspect_of_the_embedded_model(smollm2_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", "smollm2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["num_blocks"], found["hidden_size"], found["tied"]) == (30, 576, True)
    assert found["parameters"] == 134_515_008
    assert len(found["segments"]) == 5
