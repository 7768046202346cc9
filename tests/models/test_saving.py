"""What is saved is what the model is, whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoTokenizer

from conftest import build_tiny_tokenizer
from families import FAMILIES, token_ids
from midblock.errors import (
    AdapterError,
    OutputError,
)
from midblock.models import Checkpoint, load_model, save_checkpoint
from model_helpers import saved


@pytest.mark.parametrize("family", ["llama_tied", "gpt2", "gemma3", "t5", "llama"])
def test_tying_survives_a_save_and_load(tmp_path: Path, family: str) -> None:

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
        saved(tmp_path / "m", "llama")
    assert [p.name for p in tmp_path.rglob("*")] == ["m", "mine.txt"]


def test_saved_files_are_readable_as_the_umask_allows(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        folder = saved(tmp_path / "m", "llama")
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
