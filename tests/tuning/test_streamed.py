"""Training with frozen blocks that are read when they run: forward and backward, each beside the model in memory."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from families import FAMILIES
from midblock.capture import model_inputs
from midblock.capture.interventions import learn_outputs
from midblock.data import Batch, TokenRow, TokenRows
from midblock.errors import ArchitectureError, CheckpointError, OutputError, SettingsError
from midblock.models import LoadedModel, load_chain
from midblock.models.forwards import forwards_replaced
from midblock.tuning import TrainSettings, make_plan, tune
from midblock.tuning.adapter import attach
from midblock.tuning.streamed import streamed_blocks
from model_helpers import edit_config, saved

QUANTISED = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None,
                               reason="the extra 'quantized' is not installed")
WIDE = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
RESUMED = [f for f in FAMILIES if f not in ("t5", "bart")]


def rows(count: int = 12, *, even: bool = False) -> TokenRows:
    generator = torch.Generator().manual_seed(5)
    made = []
    for i in range(count):
        half = torch.randint(3, 120, (4 if even else 3 + i % 4,), generator=generator).tolist()
        made.append(TokenRow(i, (*half, *half, 2), ((len(half), 2 * len(half) + 1),)))
    return TokenRows(made)


def batch_of(model: LoadedModel) -> Batch:
    ids = torch.randint(3, 120, (3, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[2, 6:] = 0
    return Batch(indices=(0, 1, 2), input_ids=ids, attention_mask=mask)


def one_model(folder: Path, stream: str, **options: Any) -> LoadedModel:
    return load_chain([str(folder)], device="cpu", stream=stream, **options)[0]


Way = Callable[[LoadedModel, list[int]], contextlib.AbstractContextManager[Any]]


def logits_and_gradients(model: LoadedModel, blocks: list[int], way: Way | None = None, *, training: bool = False
                         ) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits of a batch, and the gradient of every adapter tensor; B is not zero, so that A has a gradient too."""
    batch = batch_of(model)
    with contextlib.ExitStack() as stack:
        if way is not None:
            stack.enter_context(way(model, blocks))
        plan = make_plan(model, blocks=tuple(blocks), rank=2, target_modules=("attention",))
        attachment = stack.enter_context(attach(model, plan, seed=3))
        for number, parameter in enumerate(attachment.trainable.values()):
            with torch.no_grad():
                parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(number))
        attachment.model.train(training)
        torch.manual_seed(11)
        logits = attachment.model(**model_inputs(attachment.base, batch)).logits
        weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(4)).to(logits.dtype)
        (logits * weight).sum().backward()
        return logits.detach(), {n: p.grad.clone() for n, p in attachment.trainable.items() if p.grad is not None}


def differing(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> list[str]:
    assert ours.keys() == theirs.keys()
    return [n for n in ours if not torch.equal(ours[n], theirs[n])]


# -- forward and backward ------------------------------------------------------------------------------


@pytest.mark.parametrize("family", RESUMED)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_forward_is_that_of_the_model_in_memory(family: str, dtype: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / family, family)
    want, _ = logits_and_gradients(one_model(folder, "never", dtype=dtype), [1])
    got, _ = logits_and_gradients(one_model(folder, "always", dtype=dtype), [1], streamed_blocks)
    assert torch.equal(got, want)


@pytest.mark.parametrize("family", RESUMED)
@pytest.mark.parametrize("blocks", [[0], [1], [0, 2]])
def test_the_backward_is_that_of_the_model_in_memory(family: str, blocks: list[int], tmp_path: Path) -> None:
    folder = saved(tmp_path / family, family)
    _, want = logits_and_gradients(one_model(folder, "never"), blocks)
    _, got = logits_and_gradients(one_model(folder, "always"), blocks, streamed_blocks)
    assert all(bool(g.any()) for g in want.values())
    assert differing(got, want) == []


@contextlib.contextmanager
def reused_buffer(model: LoadedModel, resident: list[int]) -> Iterator[None]:
    """The trap: frozen blocks take turns in one buffer, and the graph of the forward pass reads it again later.

    PyTorch's own check for changed tensors does not see it, as kernels that keep raw weights do not.
    """
    anatomy = model.anatomy
    frozen = [b for b in range(anatomy.num_blocks) if b not in resident]
    stored = {b: [p.detach().clone() for p in anatomy.blocks[b].parameters()] for b in frozen}
    buffer = [torch.empty_like(t) for t in stored[frozen[0]]]
    kept = {b: [p.data for p in anatomy.blocks[b].parameters()] for b in frozen}

    def forward_of(b: int, original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            for place, weight in zip(buffer, stored[b], strict=True):
                place.data.copy_(weight)
            return original(*args, **kwargs)
        return forward

    try:
        for b in frozen:
            for parameter, place in zip(anatomy.blocks[b].parameters(), buffer, strict=True):
                parameter.data = place
        with forwards_replaced([anatomy.blocks[b] for b in frozen],
                               [forward_of(b, anatomy.blocks[b].forward) for b in frozen]):
            yield
    finally:
        for b in frozen:
            for parameter, data in zip(anatomy.blocks[b].parameters(), kept[b], strict=True):
                parameter.data = data


def test_a_reused_buffer_shows_in_the_backward_alone(tmp_path: Path) -> None:
    """The control: what these tests are for is seen by the second of them, and not by the first."""
    folder = saved(tmp_path / "m")
    logits, want = logits_and_gradients(one_model(folder, "never"), [1])
    trapped, wrong = logits_and_gradients(one_model(folder, "never"), [1], reused_buffer)
    assert torch.equal(trapped, logits)
    assert differing(wrong, want) == list(want)


@QUANTISED
@pytest.mark.parametrize("bits", ["4bit", "8bit"])
@pytest.mark.parametrize("stored", [False, True])
def test_quantised_blocks_forward_and_backward(bits: str, stored: bool, tmp_path: Path) -> None:
    options: dict[str, Any] = {f"load_{bits}": True, "dtype": "bfloat16"}
    folder = saved(tmp_path / "m", **WIDE)
    if stored:
        whole = one_model(folder, "never", **options)
        whole.model.save_pretrained(tmp_path / "stored")
        whole.tokenizer.save_pretrained(tmp_path / "stored")
        folder, options = tmp_path / "stored", {"dtype": "bfloat16"}
    logits, want = logits_and_gradients(one_model(folder, "never", **options), [1])
    model = one_model(folder, "always", **options)
    assert model.quantized == bits
    found, got = logits_and_gradients(model, [1], streamed_blocks)
    assert torch.equal(found, logits)
    assert differing(got, want) == []
    assert all(p.is_meta for block in model.anatomy.blocks for p in block.parameters())
    assert all(getattr(m, "quant_state", None) is None for m in model.model.modules())


@QUANTISED
def test_a_reused_buffer_of_4bit_weights_shows_in_the_backward_alone(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m", **WIDE)
    options: dict[str, Any] = {"load_4bit": True, "dtype": "bfloat16"}
    logits, want = logits_and_gradients(one_model(folder, "never", **options), [1])
    trapped, wrong = logits_and_gradients(one_model(folder, "never", **options), [1], reused_buffer)
    assert torch.equal(trapped, logits)
    assert differing(wrong, want) == list(want)


def test_dropout_of_streamed_blocks_draws_the_same_numbers_again(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m", "gpt2")
    edit_config(folder, attn_pdrop=0.3, resid_pdrop=0.3)
    plain, _ = logits_and_gradients(one_model(folder, "never"), [1])
    logits, want = logits_and_gradients(one_model(folder, "never"), [1], training=True)
    found, got = logits_and_gradients(one_model(folder, "always"), [1], streamed_blocks, training=True)
    assert not torch.equal(plain, logits)
    assert torch.equal(found, logits)
    assert differing(got, want) == []


def test_blocks_that_read_more_of_the_trained_ones_are_refused(tmp_path: Path) -> None:
    model = one_model(saved(tmp_path / "m"), "always")
    block = model.anatomy.blocks[3]
    extra: list[Tensor] = []

    def tell(module: Any, args: Any, output: Any) -> None:
        learn_outputs(module, output)
        extra.append(output if isinstance(output, Tensor) else output[0])

    handles = [model.anatomy.blocks[1].register_forward_hook(tell),
               block.register_forward_pre_hook(
                   lambda _m, args, kwargs: (args, {**kwargs, "shared": extra[-1]}), with_kwargs=True)]
    try:
        with pytest.raises(ArchitectureError, match=r"block 3 reads more of the trained blocks than hidden states"):
            logits_and_gradients(model, [1], streamed_blocks)
    finally:
        for handle in handles:
            handle.remove()


# -- tuning --------------------------------------------------------------------------------------------


def tuned(model: LoadedModel, **options: Any) -> Any:
    return tune(model, rows(), blocks=(1,), rank=2, settings=TrainSettings(epochs=3, batch_size=4, learning_rate=1e-2),
                **options)


@pytest.mark.parametrize("family", ["llama", "llama_tied", "gemma3", "qwen3_moe", "gpt2", "gemma3_nested"])
def test_tuning_gives_the_same_adapter(family: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / family, family)
    held = rows(6)
    whole, streamed = (tuned(one_model(folder, s), eval_data=held) for s in ("never", "always"))
    assert streamed.training.losses == whole.training.losses
    assert differing(streamed.state, whole.state) == []
    assert streamed.held_out["tuned"].value == pytest.approx(whole.held_out["tuned"].value, rel=1e-6)
    assert streamed.training.prefix["rows_computed"] == whole.training.prefix["rows_computed"]


def test_bfloat16_and_checkpointed_gradients_give_the_same_adapter(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m")
    for options in ({}, {"gradient_checkpointing": True}):
        whole, streamed = (tuned(one_model(folder, s, dtype="bfloat16"), **options) for s in ("never", "always"))
        assert streamed.training.losses == whole.training.losses
        assert differing(streamed.state, whole.state) == []


def test_a_start_from_the_weights_gives_the_same_adapter(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m")
    whole, streamed = (tuned(one_model(folder, s), init="pissa") for s in ("never", "always"))
    assert streamed.training.losses == whole.training.losses
    assert differing(streamed.state, whole.state) == []
    with pytest.raises(SettingsError, match="rows through the whole base"):
        tuned(one_model(folder, "always"), init="eva")


def test_the_model_is_afterwards_what_it_was(tmp_path: Path) -> None:
    model = one_model(saved(tmp_path / "m"), "always")
    tuned(model)
    assert all(p.is_meta for block in model.anatomy.blocks for p in block.parameters())
    assert all("forward" not in block.__dict__ for block in model.anatomy.blocks)
    assert "forward" not in model.anatomy.embeddings.__dict__
    assert "to" not in model.model.__dict__
    again = tuned(model)  # and it can be tuned once more
    assert again.check.ok


def test_with_a_cached_prefix_steps_read_the_frozen_suffix_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch
                                                                 ) -> None:
    from midblock.models.streaming import StreamedWeights
    from midblock.tuning.prefix import FrozenPrefix

    model = one_model(saved(tmp_path / "m", num_hidden_layers=6), "always")
    read: list[Any] = []
    load, fill = StreamedWeights.load, FrozenPrefix.fill
    filled: list[list[Any]] = []

    def watched_load(self: StreamedWeights, part: Any) -> None:
        if not self.holds(part):
            read.append(part)
        load(self, part)

    def watched_fill(self: FrozenPrefix, *args: Any, **kwargs: Any) -> None:
        read.clear()
        fill(self, *args, **kwargs)
        filled.append([p for p in read if p != "embeddings"])
        read.clear()

    ends: list[list[Any]] = []

    class Mark:
        """Told after every step."""

        def __call__(self, what: str, *_: Any, **__: Any) -> None:
            if what == "tune":
                ends.append(read.copy())

    monkeypatch.setattr(StreamedWeights, "load", watched_load)
    monkeypatch.setattr(FrozenPrefix, "fill", watched_fill)
    tune(model, rows(), blocks=(2, 3), rank=2, settings=TrainSettings(epochs=2, batch_size=4), progress=Mark())
    assert filled == [[0, 1]]  # the prefix once, for all rows
    steps = ends[-1]
    assert set(steps) == {4, 5}  # no embeddings either
    # forward 4 5, backward 5 is still there, 4 anew and kept for the next step
    assert len(steps) <= 2 * len(ends) + 2


def test_a_prefix_that_is_not_cached_is_streamed_in_every_step(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m")
    whole, streamed = (tuned(one_model(folder, s), cache="none") for s in ("never", "always"))
    assert streamed.training.losses == whole.training.losses
    assert differing(streamed.state, whole.state) == []


def test_rows_are_filled_in_groups_where_there_is_little_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from midblock.tuning.streamed import StreamedBlocks

    folder = saved(tmp_path / "m")
    want = tuned(one_model(folder, "never"))
    monkeypatch.setattr(StreamedBlocks, "left", lambda self: 0)
    got = tuned(one_model(folder, "always", scratch=tmp_path))
    assert got.training.losses == want.training.losses
    assert got.training.prefix["cache"]["kind"] == "disk"
    assert not list(tmp_path.glob("midblock-prefix-*"))


@QUANTISED
def test_a_4bit_base_is_tuned_alike(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m", **WIDE)
    options: dict[str, Any] = {"load_4bit": True, "dtype": "bfloat16"}
    whole, streamed = (tuned(one_model(folder, s, **options)) for s in ("never", "always"))
    assert streamed.training.losses == whole.training.losses
    assert differing(streamed.state, whole.state) == []


# -- bad input ---------------------------------------------------------------------------------------------


def test_a_limit_below_the_least_says_the_least(tmp_path: Path) -> None:
    model = one_model(saved(tmp_path / "m"), "always", memory_limit="100MB")
    with pytest.raises(SettingsError, match=r"100 MB is too little for this training.*at least [\d.]+ [MG]B"):
        tuned(model)
    assert all(p.is_meta for block in model.anatomy.blocks for p in block.parameters())


def test_a_scratch_disk_that_is_too_small_says_how_much_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch
                                                                  ) -> None:
    import shutil

    from midblock.tuning.streamed import StreamedBlocks

    monkeypatch.setattr(StreamedBlocks, "left", lambda self: 0)
    full = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: full)
    with pytest.raises(OutputError, match=r"[\d.]+ [kM]B are missing"):
        tuned(one_model(saved(tmp_path / "m"), "always", scratch=tmp_path))


def test_a_shard_that_disappears_in_the_middle(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m")
    model = one_model(folder, "always")

    def progress(what: str, *_: Any, **__: Any) -> None:
        if what == "tune":
            (folder / "model.safetensors").unlink(missing_ok=True)

    with pytest.raises(CheckpointError, match=r"model\.safetensors has disappeared"):
        tuned(model, progress=progress)
    assert all(p.is_meta for block in model.anatomy.blocks for p in block.parameters())


@pytest.mark.parametrize("options", [{"merge": True}, {"export_base": True}, {"method": "full", "rank": None}])
def test_what_writes_a_whole_checkpoint_is_refused(options: dict[str, Any], tmp_path: Path) -> None:
    model = one_model(saved(tmp_path / "m"), "always")
    with pytest.raises(SettingsError, match=r"whole checkpoint.*stream never"):
        tune(model, rows(), **{"blocks": (1,), "rank": 2, **options}, steps=1, out=tmp_path / "out")
