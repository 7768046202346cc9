"""Streamed analyses: the tables of those in memory, over the families."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from analysis_helpers import tiny_data
from conftest import build_tiny_tokenizer
from families import FAMILIES
from midblock.analysis.gradients import gradients
from midblock.analysis.lens import lens
from midblock.analysis.profile import profile
from midblock.analysis.swap import swap
from midblock.capture import BlockByBlock
from midblock.data import Dataset, Example
from midblock.errors import SettingsError
from midblock.evaluation import evaluate
from midblock.models import find_anatomy, load_chain, save_checkpoint
from midblock.report.study import study
from midblock.selection.locate import locate
from midblock.settings.load import StreamedChainSettings
from model_helpers import saved

SIZES = {"samples": 10, "batch_size": 4, "max_length": 24}


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "t5"])
def test_profile_and_lens_are_the_same_streamed(family: str, tmp_path: Path) -> None:
    specs = [str(saved(tmp_path / str(seed), family, seed=seed)) for seed in range(2)]
    data = tiny_data(10)
    tables = []
    for stream in ("never", "always"):
        chain = load_chain(specs, device="cpu", stream=stream)
        tables.append((profile(chain, data=data, token_samples=4, views=2, view_samples=4, replicates=20,
                               **SIZES).frame, lens(chain, data=data, trace=1, **SIZES).frame))
    for whole, streamed in zip(*tables, strict=True):
        pd.testing.assert_frame_equal(streamed, whole, check_exact=True)


def partly_tuned(folder: Path, family: str) -> list[str]:
    """A base and a copy of it whose blocks 1 and 2 alone are others."""
    base = FAMILIES[family](seed=0)
    save_checkpoint(base, build_tiny_tokenizer(), folder / "base")
    with torch.no_grad():
        for block in find_anatomy(base).blocks[1:3]:
            for parameter in block.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(7)))
    save_checkpoint(base, build_tiny_tokenizer(), folder / "sft")
    return [str(folder / "base"), str(folder / "sft")]


def in_order(frame: pd.DataFrame) -> pd.DataFrame:
    keys = ["recipient", "donor", "head", "layer", "metric", "side"]
    return frame.sort_values(keys).reset_index(drop=True)


@pytest.mark.parametrize("family", ["llama_tied", "gemma3", "qwen3_moe", "gpt2", "cohere"])
@pytest.mark.parametrize("partly", [False, True])
def test_swap_is_the_same_streamed(family: str, partly: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    specs = partly_tuned(tmp_path, family) if partly else [
        str(saved(tmp_path / str(seed), family, seed=seed)) for seed in range(2)]
    steps = 0
    step = BlockByBlock.step

    def counted(self: BlockByBlock, name: str, b: int, batch: Any, hidden: Any, donor: Any = None) -> Any:
        nonlocal steps
        steps += donor is not None  # the trials have no donor
        return step(self, name, b, batch, hidden, donor)

    monkeypatch.setattr(BlockByBlock, "step", counted)
    frames = [in_order(swap(load_chain(specs, device="cpu", stream=stream), data=tiny_data(10), segments=4,
                            cumulative=True, **SIZES).frame) for stream in ("never", "always")]
    pd.testing.assert_frame_equal(frames[1], frames[0], check_exact=True)
    if partly:  # one chain until block 1, two behind it, four from block 2 on; for each of three batches
        assert steps == 3 * (1 + 2 + 4 + 4)


def test_swap_of_a_chain_with_states_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    specs = [str(saved(tmp_path / str(seed), seed=seed)) for seed in range(3)]
    whole = swap(load_chain(specs, device="cpu"), data=tiny_data(10), segments=2, **SIZES).frame
    monkeypatch.setattr("midblock.capture.blockwise.free_memory", lambda device: 0)
    streamed = swap(load_chain(specs, device="cpu", stream="always", scratch=tmp_path), data=tiny_data(10), segments=2,
                    **SIZES).frame
    pd.testing.assert_frame_equal(in_order(streamed), in_order(whole), check_exact=True)


def test_scores_of_blocks_are_the_same_streamed(tmp_path: Path) -> None:
    spec = str(saved(tmp_path / "a"))
    whole, streamed = (locate(load_chain([spec], device="cpu", stream=s)[0], data=tiny_data(10), budget=4000, rank=2)
                       for s in ("never", "always"))
    pd.testing.assert_frame_equal(streamed.frame, whole.frame, check_exact=True)
    assert {"gradient_norm", "taylor"} <= set(streamed.frame["metric"])
    assert streamed.proposal == whole.proposal


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in ("t5", "bart")])
def test_gradients_are_the_same_streamed(family: str, tmp_path: Path) -> None:
    specs = [str(saved(tmp_path / str(seed), family, seed=seed)) for seed in range(2)]
    whole, streamed = (gradients(load_chain(specs, device="cpu", stream=s), data=tiny_data(10), samples=8, batch_size=3)
                       for s in ("never", "always"))
    pd.testing.assert_frame_equal(streamed.frame, whole.frame, check_exact=True)
    assert streamed.losses == whole.losses


def test_gradients_with_states_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = str(saved(tmp_path / "a"))
    whole = gradients(load_chain([spec], device="cpu"), data=tiny_data(10), samples=8, batch_size=3)
    monkeypatch.setattr("midblock.capture.blockwise.free_memory", lambda device: 0)
    chain = load_chain([spec], device="cpu", stream="always", scratch=tmp_path)
    streamed = gradients(chain, data=tiny_data(10), samples=8, batch_size=3)
    pd.testing.assert_frame_equal(streamed.frame, whole.frame, check_exact=True)
    assert all(p.is_meta and p.grad is None for b in chain[0].anatomy.blocks for p in b.parameters())


@pytest.mark.parametrize("task", ["perplexity", "answer_loss"])
def test_losses_of_tasks_are_the_same_streamed(task: str, tmp_path: Path) -> None:
    spec = str(saved(tmp_path / "a"))
    rows = Dataset("rows", "all", "here", [
        Example(text=f"say {n} one and one", prompt=f"say {n} ", completion="one and one", where=f"here:{n}")
        for n in range(9)])
    whole, streamed = (evaluate(load_chain([spec], device="cpu", stream=s)[0], task, data=rows, batch_size=4)
                       for s in ("never", "always"))
    assert np.array_equal(streamed.scores, whole.scores)
    assert streamed.estimate == whole.estimate


def test_analyses_that_need_all_of_a_model_say_so(tmp_path: Path) -> None:
    chain = load_chain([str(saved(tmp_path / "a"))], device="cpu", stream="always")
    rows = Dataset("rows", "all", "here", [Example(text="1 + 1", prompt="1 + 1", completion="2", where="here:1")])
    for call in (lambda: gradients(chain, data=tiny_data(4), steps=2),
                 lambda: evaluate(chain[0], "exact_match", data=rows)):
        with pytest.raises(SettingsError, match=r"whole model in memory.*stream never"):
            call()


def test_a_study_is_the_same_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    specs = [str(saved(tmp_path / str(seed), seed=seed)) for seed in range(2)]
    lines = [json.dumps({"text": f"there are {n} stones and {n + 1} trees on the long shore"}) for n in range(12)]
    (tmp_path / "d.jsonl").write_text("\n".join(lines))
    tables: dict[str, dict[str, pd.DataFrame]] = {}
    for stream in ("never", "always"):
        out = tmp_path / f"study-{stream}"
        study(specs, data=[str(tmp_path / "d.jsonl")], out=out, load=StreamedChainSettings(stream=stream, device="cpu"),
              samples=8, token_samples=4, lens_samples=4, swap_samples=4, gradient_samples=4, segments=2,
              max_length=24, batch_size=4)
        tables[stream] = {p.parent.name: pd.read_csv(p) for p in out.rglob("table.csv")}
    assert {"profile", "lens", "swap", "gradients", "locate"} <= set(tables["never"])
    assert tables["never"].keys() == tables["always"].keys()
    for part, whole in tables["never"].items():
        keys = [c for c in ("kind", "recipient", "donor", "head", "layer", "metric", "side", "matrix") if c in whole]
        frames = [f.sort_values(keys, kind="stable").reset_index(drop=True) for f in (whole, tables["always"][part])]
        pd.testing.assert_frame_equal(*frames, check_exact=False, rtol=1e-5, atol=1e-7)
