"""Writing a model as a folder of safetensors that appears whole or not at all."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from midblock.errors import AdapterError, CheckpointError
from midblock.models.checkpoints import Checkpoint
from midblock.models.quiet import quiet
from midblock.writing import atomic_folder, output_error, umask

__all__ = ["save_checkpoint"]


def save_checkpoint(model: nn.Module, tokenizer: Any, folder: Path | str, *,
                    finish: Callable[[Path], object] | None = None) -> Path:
    """Write a model and its tokenizer as a safetensors folder that appears whole or not at all.

    A tied head is stored once and stays tied; a head that training has untied is stored and the
    config says so. State left by a GGUF load, which would make the folder unreadable, is cleared.

    Args:
        model: A transformers model (merge an adapter first).
        tokenizer: Its tokenizer; None writes none.
        folder: Absent or empty.
        finish: Called with the folder as written so far, before it appears; it may write further files.

    Returns:
        The folder.

    Raises:
        OutputError: the folder is not empty, cannot be written, or the disk is full.
        AdapterError: the model still carries an unmerged adapter.
        CheckpointError: what was written does not hold the model's weights.
    """
    from transformers import PreTrainedModel

    folder = Path(folder).expanduser()
    if not isinstance(model, PreTrainedModel) or getattr(model, "_hf_peft_config_loaded", False):
        raise AdapterError(f"{type(model).__name__} is not a plain transformers model; merge the adapter first "
                           "(merge_and_unload), or save the adapter itself.")
    try:
        with atomic_folder(folder) as temporary:
            _clear_gguf_state(model)
            _state_tying(model)
            with quiet():
                model.save_pretrained(temporary, max_shard_size="5GB")
                if tokenizer is not None:
                    tokenizer.save_pretrained(temporary)
            _check_written(model, temporary)
            for path in temporary.iterdir():  # safetensors writes files that only their owner can read
                path.chmod(0o666 & ~umask())
            if finish is not None:
                finish(temporary)
    except SafetensorError as error:
        raise output_error(folder, error) from error
    return folder


def _clear_gguf_state(model: Any) -> None:
    quantizer = getattr(model, "hf_quantizer", None)
    method = getattr(getattr(quantizer, "quantization_config", None), "quant_method", None)
    if str(getattr(method, "value", method)) != "gguf":
        return
    model.hf_quantizer = None
    for attribute in ("is_quantized", "quantization_method"):
        if hasattr(model, attribute):
            delattr(model, attribute)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


def _state_tying(model: Any) -> None:
    """Make the config say whether head and embeddings share one weight, as they are now."""
    with contextlib.suppress(NotImplementedError):
        head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
        if head is None or embeddings is None:
            return
        tied = head.weight is embeddings.weight or head.weight.data_ptr() == embeddings.weight.data_ptr()
        for config in {id(c): c for c in (model.config, model.config.get_text_config(decoder=True))}.values():
            if getattr(config, "tie_word_embeddings", None) is not None:
                config.tie_word_embeddings = tied


def _check_written(model: Any, folder: Path) -> None:
    """Compare head and embeddings, where a wrong tying would show, with what was written."""
    written = Checkpoint(folder)
    state = model.state_dict()
    size = sum(t.numel() for t in {t.data_ptr(): t for t in state.values()}.values())
    if not written.names() or size == 0:
        raise CheckpointError(f"{folder.name}: no weights were written.")
    for name in written.names():
        if name in state and not torch.equal(written.read(name), state[name].detach().cpu()):
            raise CheckpointError(f"{name} was not written as it is in the model.")
    written.release()
