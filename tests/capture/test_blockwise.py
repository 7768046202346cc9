"""Block by block: the same states in layer-major order, two blocks in memory, refusals in words, limits."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from families import FAMILIES, token_ids
from midblock.capture import HiddenStates, block_by_block, run_blocks, run_layer_major
from midblock.data import Batch
from midblock.errors import ArchitectureError, CheckpointError, OutputError, SettingsError
from midblock.models import LoadedModel, load_chain, load_model
from model_helpers import edit_config, saved


def make_batches(count: int = 3) -> list[Batch]:
    batches = []
    for number in range(count):
        ids = token_ids(2, 9 + number, seed=number)
        mask = torch.ones_like(ids)
        mask[1, 6:] = 0
        batches.append(Batch(indices=(2 * number, 2 * number + 1), input_ids=ids, attention_mask=mask))
    return batches


@pytest.fixture
def pair(tmp_path: Path) -> tuple[list[str], list[LoadedModel]]:
    specs = [str(saved(tmp_path / name, "llama", seed=seed)) for seed, name in enumerate(("base", "sft"))]
    return specs, load_chain(specs, device="cpu", stream="always")


def states_of(model: LoadedModel, batches: list[Batch]) -> dict[tuple[int, int], torch.Tensor]:
    found: dict[tuple[int, int], torch.Tensor] = {}
    with torch.inference_mode():
        for number, batch in enumerate(batches):
            run_blocks(model.model, model.anatomy, batch,
                       listener=lambda h, z, n=number: found.__setitem__((h, n), z.clone()))
    return found


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "t5"])
@pytest.mark.parametrize("streamed", [True, False])
def test_layer_major_states_are_the_plain_forward_s(family: str, streamed: bool, tmp_path: Path) -> None:
    folder = saved(tmp_path / family, family)
    whole = load_model(folder, device="cpu")
    batches = make_batches()
    want = states_of(whole, batches)
    model = load_model(folder, device="cpu", streamed=True) if streamed else whole
    order = []
    with torch.inference_mode():
        for h, number, states in run_layer_major({"base": model}, batches):
            assert torch.equal(states["base"], want[h, number]), (h, number)
            order.append((h, number))
    assert order == [(h, n) for h in range(whole.anatomy.num_blocks + 1) for n in range(3)]
    assert not any(block._forward_pre_hooks or "forward" in block.__dict__ for block in model.anatomy.blocks)


def test_a_model_whose_blocks_share_more_is_refused(tmp_path: Path) -> None:
    model = load_model(saved(tmp_path / "t5", "t5"), device="cpu", streamed=True)
    with torch.inference_mode(), pytest.raises(ArchitectureError, match=r"block by block: block 1 .*stream never"):
        list(run_layer_major({"base": model}, make_batches()))


def test_two_blocks_are_in_memory_and_none_afterwards(pair: tuple[list[str], list[LoadedModel]]) -> None:
    _, models = pair
    most = 0

    def present() -> list[tuple[int, int]]:
        return [(i, b) for i, m in enumerate(models) for b, block in enumerate(m.anatomy.blocks)
                if any(not p.is_meta for p in block.parameters())]

    with torch.inference_mode():
        for h, _, _ in run_layer_major(dict(zip(("base", "sft"), models, strict=True)), make_batches()):
            most = max(most, len(present()))
            if h > 1:
                assert all(p.is_meta for p in models[0].anatomy.embeddings.parameters())
    assert most <= 2  # of both models together: the current one and the next
    assert not present()


def test_an_early_end_leaves_nothing(pair: tuple[list[str], list[LoadedModel]]) -> None:
    _, models = pair
    named = dict(zip(("base", "sft"), models, strict=True))
    with torch.inference_mode():
        passes = run_layer_major(named, make_batches())
        for h, _, _ in passes:
            if h == 2:
                break
        passes.close()  # type: ignore[attr-defined]
        assert all(p.is_meta for m in models for block in m.anatomy.blocks for p in block.parameters())
        assert len(list(run_layer_major(named, make_batches()))) == 15  # and it can be run again


def test_a_step_with_the_other_model_s_block(pair: tuple[list[str], list[LoadedModel]]) -> None:
    from midblock.capture import swap_blocks

    specs, models = pair
    base, sft = load_chain(specs, device="cpu")
    batch = make_batches(1)[0]
    named = dict(zip(("base", "sft"), models, strict=True))
    with torch.inference_mode():
        with swap_blocks(base.anatomy, sft.anatomy, [1, 2]):
            want = run_blocks(base.model, base.anatomy, batch)
        with block_by_block(named) as runner:
            with runner.inputs("base"):
                z = runner.start("base", batch)
            with runner.inputs("sft"):
                pass
            for b in range(runner.num_blocks):
                with runner.block(b, "base"), runner.block(b, "sft"):
                    z = runner.step("base", b, batch, z, donor="sft" if b in (1, 2) else None)
    assert torch.equal(z, want)


# -- files that go -----------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["removed", "truncated", "replaced"])
def test_a_shard_that_changes_in_the_middle(pair: tuple[list[str], list[LoadedModel]], damage: str) -> None:
    specs, models = pair
    path = Path(specs[1]) / "model.safetensors"
    with torch.inference_mode():
        states = run_layer_major(dict(zip(("base", "sft"), models, strict=True)), make_batches())
        while next(states)[:2] != (1, 0):
            pass
        if damage == "removed":
            path.unlink()
        elif damage == "truncated":
            path.write_bytes(path.read_bytes()[:-64])
        else:
            shutil.copy(Path(specs[0]) / "model.safetensors", path.with_suffix(".new"))
            path.with_suffix(".new").replace(path)
        with pytest.raises(CheckpointError, match=r"model\.safetensors has disappeared, or is not"):
            list(states)
    assert all(p.is_meta for block in models[1].anatomy.blocks for p in block.parameters())


# -- memory and disk -----------------------------------------------------------------------------------


def test_states_on_disk_are_the_same(pair: tuple[list[str], list[LoadedModel]], tmp_path: Path,
                                     monkeypatch: pytest.MonkeyPatch) -> None:
    specs, models = pair
    batches = make_batches()
    want = [states_of(m, batches) for m in load_chain(specs, device="cpu")]
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    seen: list[HiddenStates] = []
    made = HiddenStates.__init__

    def remember(self: HiddenStates, *args: Any) -> None:
        made(self, *args)
        seen.append(self)

    monkeypatch.setattr(HiddenStates, "__init__", remember)
    monkeypatch.setattr("midblock.capture.blockwise.free_memory", lambda device: 0)
    for model in models:
        assert model.streamed is not None
        model.streamed.scratch = scratch
    with torch.inference_mode():
        for h, number, states in run_layer_major(dict(zip(("base", "sft"), models, strict=True)), batches):
            for i, z in enumerate(states.values()):
                assert torch.equal(z, want[i][h, number])
    assert [s.on_disk for s in seen] == [True]
    assert not list(scratch.iterdir())


def test_a_limit_below_the_least_says_the_least(pair: tuple[list[str], list[LoadedModel]]) -> None:
    _, models = pair
    named = dict(zip(("base", "sft"), models, strict=True))
    assert models[0].streamed is not None
    models[0].streamed.memory_limit = 100 << 20
    with torch.inference_mode(), pytest.raises(SettingsError, match=r"100 MB is too little.*at least [\d.]+ [MG]B"):
        next(run_layer_major(named, make_batches()))
    models[0].streamed.memory_limit = int(psutil.Process().memory_info().rss) + (1 << 30)
    with torch.inference_mode():
        assert len(list(run_layer_major(named, make_batches()))) == 15


def test_a_scratch_disk_that_is_too_small_says_how_much_is_missing(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    with pytest.raises(OutputError, match=r"[\d.]+ GB are missing.*scratch"):
        HiddenStates(tmp_path, free + (10 << 30))
    with pytest.raises(OutputError, match="name another folder"):
        HiddenStates(tmp_path / "absent", 1)


def test_hidden_states_keep_shapes_and_dtypes(tmp_path: Path) -> None:
    with HiddenStates(tmp_path, 1 << 20) as states:
        for turn in range(2):
            seeded = torch.Generator().manual_seed(turn)
            tensors = {("a", i): torch.randn(2, 3 + i, 4, generator=seeded).to(kind)
                       for i, kind in enumerate((torch.float32, torch.bfloat16, torch.float16))}
            for key, z in tensors.items():
                states.put(key, z)
            for key, z in tensors.items():
                assert torch.equal(states.get(key), z)
        with pytest.raises(ValueError, match="in place of"):
            states.put(("a", 0), torch.zeros(2, 3, 5))


def test_weights_that_are_not_finite_are_refused_when_their_block_comes(tmp_path: Path) -> None:
    from model_helpers import edit_weights

    folder = saved(tmp_path / "nan", "llama")
    edit_weights(folder, lambda w: w["model.layers.2.mlp.up_proj.weight"].fill_(float("nan")))
    model = load_model(folder, device="cpu", streamed=True)
    with torch.inference_mode(), pytest.raises(CheckpointError, match=r"infinity: model\.layers\.2\.mlp\.up_proj"):
        list(run_layer_major({"base": model}, make_batches()))


def test_config_and_weights_that_do_not_fit_are_told_before_the_pass(tmp_path: Path) -> None:
    from model_helpers import edit_weights

    lacking = saved(tmp_path / "lacking", "llama")
    edit_weights(lacking, lambda w: w.pop("model.layers.3.self_attn.q_proj.weight"))
    with pytest.raises(CheckpointError, match=r"lacks weights .*model\.layers\.3\.self_attn\.q_proj\.weight"):
        load_model(lacking, device="cpu", streamed=True)
    wide = saved(tmp_path / "wide", "llama")
    edit_config(wide, intermediate_size=48)
    with pytest.raises(CheckpointError, match="do not fit the config"):
        load_model(wide, device="cpu", streamed=True)
