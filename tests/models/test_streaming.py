"""Models whose parts are read one by one: the weights of a whole model, and when a chain is streamed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from families import FAMILIES
from midblock.errors import SettingsError, UnsafeCheckpointError
from midblock.models import load_chain, load_model, memory
from model_helpers import edit_config, saved


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_parts_are_those_of_the_whole_model(family: str, dtype: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / family, family)
    whole, model = (load_model(folder, device="cpu", dtype=dtype, streamed=s) for s in (False, True))
    assert model.streamed is not None
    assert model.anatomy.tied == whole.anatomy.tied
    for part in ("embeddings", "head", *range(whole.anatomy.num_blocks)):
        model.streamed.load(part)  # type: ignore[arg-type]
    theirs = dict(model.model.named_parameters())
    for name, parameter in whole.model.named_parameters():
        if theirs[name].is_meta:  # a tower that text does not pass
            assert family == "gemma3_nested"
            assert "vision" in name or "projector" in name
            continue
        assert torch.equal(theirs[name], parameter), name
        assert theirs[name].dtype == parameter.dtype
    buffers = dict(model.model.named_buffers())
    for name, buffer in whole.model.named_buffers():
        assert torch.equal(buffers[name], buffer), name
        assert buffers[name].dtype == buffer.dtype


def test_dropped_parts_come_back(tmp_path: Path) -> None:
    model = load_model(saved(tmp_path / "m", "llama_tied"), device="cpu", streamed=True)
    assert model.streamed is not None
    head, embeddings = model.anatomy.head, model.anatomy.embeddings
    assert head.weight.is_meta  # type: ignore[union-attr]
    with model.streamed.part(model.streamed.head), model.streamed.part("embeddings"):
        assert head.weight is embeddings.weight
        assert not head.weight.is_meta  # type: ignore[union-attr]
    assert head.weight.is_meta  # type: ignore[union-attr]
    before = model.streamed.bytes_read
    model.streamed.load(0)
    assert model.streamed.bytes_read - before == model.streamed.stored_bytes(0) == model.streamed.part_bytes(0)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in ("t5", "bart")])
def test_embeddings_of_some_tokens_are_read_alone(family: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / family, family)
    whole, model = (load_model(folder, device="cpu", dtype="bfloat16", streamed=s) for s in (False, True))
    assert model.streamed is not None
    ids = torch.tensor([[7, 3, 7, 100], [3, 3, 5, 9]])
    before = model.streamed.bytes_read
    with torch.inference_mode(), model.streamed.embedding_rows(ids) as places:
        found = model.anatomy.embeddings(places)
    assert torch.equal(found, whole.anatomy.embeddings(ids))
    weight = next(whole.anatomy.embeddings.parameters())
    assert model.streamed.bytes_read - before == 5 * weight.shape[1] * 4  # stored in float32
    assert all(p.is_meta for p in model.anatomy.embeddings.parameters())
    with model.streamed.part("embeddings"), model.streamed.embedding_rows(ids) as places:
        assert torch.equal(places, ids)  # it is there


def test_rows_beyond_the_table_are_left_to_the_model(tmp_path: Path) -> None:
    model = load_model(saved(tmp_path / "m"), device="cpu", streamed=True)
    assert model.streamed is not None
    with pytest.raises(IndexError), model.streamed.embedding_rows(torch.tensor([[1, 128]])) as places:
        model.anatomy.embeddings(places)


def test_auto_decides_by_sizes_and_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                            caplog: pytest.LogCaptureFixture) -> None:
    specs = [str(saved(tmp_path / n, seed=i)) for i, n in enumerate("ab")]
    assert [m.streamed for m in load_chain(specs, device="cpu", stream="auto")] == [None, None]
    monkeypatch.setattr("midblock.models.chain.free_memory", lambda device: 1 << 20)
    chain = load_chain(specs, device="cpu", stream="auto")
    assert all(m.streamed is not None for m in chain)
    assert "do not fit into the 1 MB that are free" in caplog.text
    assert "one after another" in chain[1].describe()["notes"][-1]
    assert chain[0].describe()["streamed"]
    assert load_chain(specs, device="cpu", stream="never")[0].streamed is None


def test_a_limit_decides_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    spec = str(saved(tmp_path / "a"))
    limit = memory.resident_memory() + (100 << 20)
    assert load_chain([spec], device="cpu", stream="auto", memory_limit=limit)[0].streamed is not None
    assert "under the limit" in caplog.text
    assert load_chain([spec], device="cpu", stream="auto", memory_limit="100GB")[0].streamed is None
    with pytest.raises(SettingsError, match="not a size"):
        load_chain([spec], device="cpu", stream="always", memory_limit="much")
    with pytest.raises(SettingsError, match="auto, always or never"):
        load_chain([spec], device="cpu", stream="perhaps")


def test_what_is_streamed_has_the_faster_dtype_also_where_it_would_not_fit(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = str(saved(tmp_path / "a", dtype=torch.bfloat16))
    monkeypatch.setattr("midblock.models.dtypes.product_rates",
                        lambda config, device, narrow: {"float32": 9e10, "bfloat16": 3e9})
    monkeypatch.setattr("midblock.models.dtypes._memory_bytes", lambda device, spread=False: 1e4)
    monkeypatch.setattr("midblock.models.chain.free_memory", lambda device: 1 << 13)
    assert load_chain([spec], device="cpu", stream="never")[0].dtype == torch.bfloat16
    streamed = load_chain([spec], device="cpu", stream="auto")[0]
    assert streamed.dtype == torch.float32
    assert streamed.streamed is not None


def test_what_cannot_be_streamed_is_refused_or_loaded_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved(tmp_path / "a")
    edit_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    monkeypatch.setattr("midblock.models.chain.free_memory", lambda device: 1 << 20)
    with pytest.raises(SettingsError, match=r"block by block: it is quantised in a way.*stream never"):
        load_model(folder, device="cpu", streamed=True)
    pickled = saved(tmp_path / "b")
    from safetensors.torch import load_file

    torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    with pytest.raises(UnsafeCheckpointError):
        load_model(pickled, device="cpu", streamed=True)
    with pytest.raises(SettingsError, match="pickled"):
        load_model(pickled, device="cpu", streamed=True, allow_pickle=True)
    assert load_chain([str(pickled)], device="cpu", stream="auto", allow_pickle=True)[0].streamed is None


def test_stages_of_unequal_vocabularies_keep_the_common_rows(tmp_path: Path) -> None:
    specs = [str(saved(tmp_path / "a")), str(saved(tmp_path / "b", seed=1, vocab_size=136))]
    whole, streamed = (load_chain(specs, device="cpu", stream=s) for s in ("never", "always"))
    assert streamed[1].anatomy.vocab_size == whole[1].anatomy.vocab_size == 128
    assert torch.equal(streamed[1].anatomy.head.weight, whole[1].anatomy.head.weight)  # type: ignore[arg-type]


def test_sharded_checkpoints(tmp_path: Path) -> None:
    folder = saved(tmp_path / "a")
    whole = load_model(folder, device="cpu")
    sharded = tmp_path / "sharded"
    whole.model.save_pretrained(sharded, max_shard_size="20KB")
    whole.tokenizer.save_pretrained(sharded)
    assert len(json.loads((sharded / "model.safetensors.index.json").read_text())["weight_map"]) > 10
    model = load_model(sharded, device="cpu", streamed=True)
    assert model.streamed is not None
    for b in range(4):
        with model.streamed.part(b):
            for name, parameter in model.anatomy.blocks[b].named_parameters():
                assert torch.equal(parameter, whole.anatomy.blocks[b].get_parameter(name))


def test_what_a_container_leaves(tmp_path: Path) -> None:
    for name, text in (("memory.max", "1000"), ("memory.current", "700"),
                       ("memory.stat", "anon 400\ninactive_file 200\nactive_file 100\n")):
        (tmp_path / name).write_text(text)
    assert memory._container(tmp_path) == [600]
    (tmp_path / "memory.max").write_text("max")
    assert memory._container(tmp_path) == []
