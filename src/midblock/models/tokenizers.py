"""Tokenizers of checkpoints: found, read, compared, and held against the embeddings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from midblock.errors import CheckpointError
from midblock.models.anatomy import Anatomy
from midblock.models.quiet import first_line, foreign

__all__ = ["check_vocabulary", "differences", "has_tokenizer", "load_tokenizer"]

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "spiece.model",
                    "vocab.txt", "sentencepiece.bpe.model", "tekken.json")


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a tokenizer of its own."""
    return any((folder / name).is_file() for name in _TOKENIZER_FILES)


def differences(base: PreTrainedTokenizerBase, own: PreTrainedTokenizerBase) -> str:
    """What an adapter's tokenizer has of its own, with its verb; empty where nothing."""
    parts = [word for word, differs in (
        ("tokenizer", base.get_vocab() != own.get_vocab()),
        ("chat template", own.chat_template is not None and base.chat_template != own.chat_template)) if differs]
    return f"{' and '.join(parts)} {'are' if len(parts) > 1 else 'is'}" if parts else ""


def load_tokenizer(folder: Path, *, spec: str | None = None,
                   trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint folder; without a padding token its end token pads.

    Raises:
        CheckpointError: the folder has no tokenizer, or it cannot be read.
    """
    spec = spec or str(folder)
    if not has_tokenizer(folder):
        raise CheckpointError(f"model {spec!r} has no tokenizer in its folder (looked for {_TOKENIZER_FILES[0]}, "
                              f"{_TOKENIZER_FILES[2]} and others); copy the tokenizer files of its base model there.")
    with foreign(lambda error: CheckpointError(
            f"model {spec!r}: its tokenizer cannot be loaded ({type(error).__name__}): {first_line(error)}")):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, anatomy: Anatomy, spec: str) -> None:
    """Refuse a tokenizer with ids beyond the embeddings.

    Raises:
        CheckpointError: its highest id has no row.
    """
    highest = max(tokenizer.get_vocab().values(), default=-1)
    weight: Any = anatomy.embeddings.weight
    rows = int(getattr(anatomy.embeddings, "num_embeddings", weight.shape[0]))
    if highest >= rows:
        raise CheckpointError(f"model {spec!r}: its tokenizer has ids up to {highest}, its embeddings only "
                              f"{rows} rows; tokenizer and weights are not of one model.")
