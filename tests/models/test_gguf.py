"""GGUF files are converted once, exactly, and by one process."""

from __future__ import annotations

import json
import os
import shutil
import socket
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import midblock
from gguf_helpers import write_gguf
from midblock.errors import CheckpointError, OutputError
from midblock.models import Checkpoint, resolve_checkpoint
from midblock.models.gguf import precision_of
from midblock.models.resolve import embedded_gguf
from midblock.writing import TEMPORARY


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
    assert precision_of(folder) == precision
    assert Checkpoint(folder).main_dtype() == torch.float32  # exactly what is in the file, whatever it is loaded in


def _flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 4
    path.write_bytes(raw)


@pytest.mark.parametrize("damage", [
    lambda f: _flip(f / "model.safetensors"), lambda f: (f / "model.safetensors").unlink(),
    lambda f: os.truncate(f / "tokenizer.json", 40), lambda f: (f / "config.json").write_text("{}"),
    lambda f: _flip(f / "midblock.json"),
    lambda f: (f / "midblock.json").write_text("[]"), lambda f: (f / "midblock.json").write_text('{"precision": 1}')])
def test_a_damaged_conversion_is_said_and_done_again(tmp_path: Path, cache: Path, damage: Callable[[Path], object],
                                                     caplog: pytest.LogCaptureFixture) -> None:
    write_gguf(tmp_path / "m.gguf")
    folder = resolve_checkpoint(tmp_path / "m.gguf")
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    damage(folder)
    assert resolve_checkpoint(tmp_path / "m.gguf") == folder
    assert f"{folder} is damaged" in caplog.text
    assert "m.gguf is converted again." in caplog.text
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    caplog.clear()
    resolve_checkpoint(tmp_path / "m.gguf")
    assert not caplog.text


def test_a_folder_that_was_not_converted_is_never_removed(tmp_path: Path, cache: Path) -> None:
    write_gguf(tmp_path / "m.gguf")
    folder = resolve_checkpoint(tmp_path / "m.gguf")
    (folder / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"holds mine\.txt, which midblock did not write; remove the folder"):
        resolve_checkpoint(tmp_path / "m.gguf")
    assert (folder / "mine.txt").read_text() == "mine"
    (folder / "mine.txt").unlink()
    (folder / "midblock.json").unlink()
    with pytest.raises(OutputError, match=r"lacks midblock\.json; remove the folder"):
        resolve_checkpoint(tmp_path / "m.gguf")
    assert (folder / "model.safetensors").is_file()


def test_gguf_with_other_content_is_converted_anew(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(path)
    first = resolve_checkpoint(path)
    data = bytearray(path.read_bytes())
    data[-5] ^= 0x40
    path.write_bytes(data)
    assert resolve_checkpoint(path) != first


@pytest.mark.parametrize(("content", "says"), [
    (b"not a model", "not a GGUF file"), (b"GGUF" + struct.pack("<IQQ", 3, 2**40, 1), "cannot be converted")])
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
    stale = folder.parent / f"{TEMPORARY}{socket.gethostname()[:64]}-99999999-abc123"
    stale.mkdir()
    (stale / "model.safetensors").write_bytes(b"half")
    for each in (stale / "model.safetensors", stale):
        os.utime(each, (0, 0))
    assert resolve_checkpoint(path) == folder
    assert not stale.exists()


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


@pytest.mark.slow
def test_embedded_model(smollm2_folder: Path) -> None:
    found = Checkpoint(smollm2_folder)
    assert (found.num_blocks, len(found), found.main_dtype()) == (30, 272, torch.float32)
    assert found.shape("model.embed_tokens.weight") == (49152, 576)
    reader = gguf.GGUFReader(embedded_gguf())
    tensor = next(t for t in reader.tensors if t.name == "blk.13.ffn_up.weight")
    np.testing.assert_array_equal(found.read("model.layers.13.mlp.up_proj.weight").numpy(),
                                  gguf.dequantize(tensor.data, tensor.tensor_type))
    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder)
    assert "<|im_start|>" in tokenizer.chat_template
    assert tokenizer.tokenize("  12 34") == ["\u0120\u0120", "1", "2", "\u0120", "3", "4"]
    assert (smollm2_folder / "generation_config.json").is_file()
