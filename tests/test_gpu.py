"""Every command on a GPU: the CPU's numbers to 1e-4 in float32, and no wait for the device inside a batch loop.

Marked ``gpu`` and skipped without one. MIDBLOCK_TEST_DEVICE names another device to compare with the CPU (``cpu``
itself shows that these tests run).
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from conftest import build_tiny_tokenizer
from families import FAMILIES
from midblock.analysis.lens import lens
from midblock.analysis.passes import feed_batches
from midblock.analysis.profile import profile
from midblock.analysis.swap import swap
from midblock.capture.accumulators import PooledStates, TokenMetrics
from midblock.cli.app import run
from midblock.data import load_data, make_batches, tokenize
from midblock.models import load_chain, load_model, save_checkpoint
from midblock.tuning import TrainSettings, attach, make_plan, train

DEVICE = os.environ.get("MIDBLOCK_TEST_DEVICE", "cuda")
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning"),
              pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="no GPU")]
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a tuned model that differs a little everywhere, rows and texts."""
    folder = tmp_path_factory.mktemp("gpu")
    base = FAMILIES["llama"](seed=0, num_hidden_layers=5)
    save_checkpoint(base, build_tiny_tokenizer(), folder / "base")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in base.parameters():
            parameter += 0.1 * parameter.std() * torch.randn(parameter.shape, generator=generator)
    save_checkpoint(base, build_tiny_tokenizer(), folder / "sft")
    for name, first in (("rows", 0), ("test", 50)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(
            {"prompt": f"Say {i}: ", "completion": f"it is {i + 1}"}) + "\n" for i in range(first, first + 24)))
    (folder / "sweep.yaml").write_text(json.dumps({
        "model": str(folder / "base"), "train": {"data": str(folder / "rows.jsonl"), "split": "all"},
        "training": {"steps": 4, "batch_size": 4, "learning_rates": [0.01]}, "budget": "match:11111@2",
        "arms": {"baseline": "11111", "masks": ["00100"]}, "statistics": {"replicates": 200},
        "evaluation": [{"task": "answer_loss", "data": str(folder / "test.jsonl"), "name": "answers"}]}))
    return folder


COMMANDS: dict[str, list[str]] = {
    "profile": ["profile", "BASE", "SFT", "--data", "ROWS", "--samples", "16", "--token-samples", "8", "--views", "2"],
    "lens": ["lens", "BASE", "SFT", "--data", "ROWS", "--samples", "8", "--trace", "2"],
    "swap": ["swap", "BASE", "SFT", "--data", "ROWS", "--samples", "8"],
    "gradients": ["gradients", "BASE", "SFT", "--data", "ROWS", "--samples", "8"],
    "merge": ["merge", "BASE", "SFT", "--data", "ROWS", "--samples", "8", "--alphas", "0,0.5,1,0.5,0"],
    "steer": ["steer", "BASE", "SFT", "--data", "ROWS", "--samples", "8"],
    "patch": ["steer", "BASE", "SFT", "--data", "ROWS", "--samples", "8", "--patch", "all"],
    "locate": ["locate", "BASE", "--data", "ROWS", "--samples", "8", "--gradient-samples", "8"],
    "tune": ["tune", "BASE", "--data", "ROWS", "--mask", "01100", "--rank", "2", "--epochs", "2"],
    "tune full": ["tune", "BASE", "--data", "ROWS", "--mask", "00100", "--method", "full", "--steps", "4"],
    "evaluate": ["evaluate", "BASE", "--task", "answer_loss", "--data", "ROWS"],
    "generate": ["evaluate", "BASE", "--task", "exact_match", "--data", "ROWS", "--max-new-tokens", "4"],
    "importance": ["importance", "BASE", "--data", "ROWS", "--max-steps", "4"],
}
# of timing and memory, and of a choice among nearly equal things
_OTHER = ("seconds", "tokens_per_second", "peak_memory_bytes")


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_gives_the_cpus_numbers(name: str, world: Path, tmp_path: Path) -> None:
    places = {"BASE": str(world / "base"), "SFT": str(world / "sft"), "ROWS": str(world / "rows.jsonl")}
    frames = []
    for device in ("cpu", DEVICE):
        out = tmp_path / f"on-{len(frames)}"
        words = [places.get(w, w) for w in COMMANDS[name]]
        assert run([*words, "--dtype", "float32", "--device", device, "--out", str(out), "--quiet"]) == 0
        frames.append(pd.read_csv(out / "table.csv"))
        assert json.loads((out / "run.json").read_text())["status"] == "finished"
    one, other = (f[~f["metric"].isin(_OTHER)].reset_index(drop=True) for f in frames)
    assert list(one["metric"]) == list(other["metric"])
    size = one["value"].abs().groupby(one["metric"]).transform("max").clip(lower=1e-3)
    off = (one["value"] - other["value"]).abs() / size
    assert off.max() <= TOLERANCE, one.assign(other=other["value"], off=off).nlargest(5, "off")


def test_a_sweep_gives_the_cpus_numbers(world: Path, tmp_path: Path) -> None:
    frames = []
    for number, device in enumerate(("cpu", DEVICE)):
        out = tmp_path / str(number)
        assert run(["sweep", str(world / "sweep.yaml"), "--set", f"device={device}", "--set", "dtype=float32",
                    "--out", str(out), "--quiet"]) == 0
        records = [json.loads(p.read_text()) for p in sorted((out / "results").glob("*.json"))]
        assert all(r["status"] == "done" for r in records), [r["reason"] for r in records]
        frames.append([r["tasks"]["answers"]["scores"] for r in records])
    assert np.allclose(*map(np.array, frames), rtol=TOLERANCE, atol=TOLERANCE)


# ---------------------------------------------------------------------------------------------
# no wait for the device inside a batch loop


@contextlib.contextmanager
def waits_are_errors() -> Iterator[None]:
    """PyTorch raises where an operation makes the host wait for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture
def pair(world: Path) -> list[Any]:
    return load_chain([str(world / "base"), str(world / "sft")], dtype="float32", device=DEVICE)


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch's debug mode is of CUDA")


@needs_cuda
def test_accumulators_of_a_pass_never_wait(pair: list[Any], world: Path) -> None:
    """Spectra are left out: cuSOLVER's eigenvalues wait for their own error code."""
    from midblock import metrics

    stages = {"base": pair[0], "sft": pair[1]}
    rows = tokenize(load_data(str(world / "rows.jsonl"), split="all"), pair[0].tokenizer, max_length=64).rows
    batches = make_batches(rows, batch_size=4, pad_id=0)
    ids = [r.index for r in rows]
    accumulators = {
        "pooled": PooledStates(list(stages), 6, ids, pair[0].anatomy.hidden_size),
        "tokens": TokenMetrics(list(stages), [("sft", "base")], 6, ids,
                               single={"sparsity": metrics.sparsity, "curvature": metrics.curvature},
                               paired={"token_cosine": metrics.token_cosine})}
    feed_batches(stages, batches[:1], accumulators)  # warm up: kernels, workspaces
    batches = [b.to("cpu") for b in batches]
    with waits_are_errors():
        try:
            feed_batches(stages, batches[1:], accumulators)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert accumulators["pooled"].x["base"].isfinite().all()


WAITING: dict[str, Callable[..., Any]] = {"profile": profile, "lens": lens, "swap": swap}


@needs_cuda
@pytest.mark.parametrize("name", WAITING)
def test_the_number_of_waits_does_not_grow_with_the_hidden_states(name: str, pair: list[Any], world: Path) -> None:
    """Waits of a whole call: at most a few for each batch and matrix entropy, however many tokens there are."""
    data = load_data(str(world / "rows.jsonl"), split="all")
    settings: dict[str, Any] = {"data": data, "batch_size": 4, "max_length": 64}

    def waits(samples: int) -> int:
        extra = {"token_samples": 0} if name == "profile" else {}
        import warnings

        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                WAITING[name](pair, samples=samples, **settings, **extra)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return sum("synchroniz" in str(w.message) for w in caught)

    waits(8)
    assert waits(24) <= waits(8) + 16  # four batches more


@needs_cuda
def test_a_training_step_waits_once(world: Path) -> None:
    loaded = load_model(world / "base", dtype="float32", device=DEVICE)
    rows = tokenize(load_data(str(world / "rows.jsonl"), split="all"), loaded.tokenizer, max_length=64,
                    supervised=True).rows
    counts = []
    for steps in (4, 8):
        import warnings

        with attach(loaded, make_plan(loaded, mask="11111", rank=2), seed=0) as attachment:
            torch.cuda.set_sync_debug_mode("warn")
            try:
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always")
                    train(attachment, rows, tokenizer=loaded.tokenizer, cache="none",
                          settings=TrainSettings(steps=steps, batch_size=4))
            finally:
                torch.cuda.set_sync_debug_mode("default")
        counts.append(sum("synchroniz" in str(w.message) for w in caught))
    # one for the loss; transformers itself copies each batch to the device
    assert counts[1] - counts[0] <= 4 * 6
