"""A small word-piece-free tokenizer, trained here, and the folder of real benchmark data."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

LINES = [
    "Question: Mia has 12 shells. She finds 7 more. How many shells does Mia have now?",
    "Answer: 12 + 7 = 19\n#### 19", "User: Hi\nAssistant: Hello there", "The quick brown fox jumps over it.",
    "Instruction: name a colour\nResponse: blue is a colour", "one two three four five six seven eight nine",
]
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def build_tokenizer(*, bos: bool = False, pad: bool = False, chat: bool = False,
                    eos_at_end: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE with merges, so that tokens can span a careless boundary."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    backend.train_from_iterator(LINES * 3, trainer)
    if bos or eos_at_end:
        template = ("<s> " if bos else "") + "$A" + (" </s>" if eos_at_end else "")
        backend.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[(t, backend.token_to_id(t)) for t in ("<s>", "</s>")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>",
                                        pad_token="<pad>" if pad else None)
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


@pytest.fixture(scope="session")
def chat_tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer(chat=True)


@pytest.fixture(scope="session")
def make_tokenizer():
    return build_tokenizer


@pytest.fixture
def real_data() -> Path:
    """``MIDBLOCK_DATA`` as the environment gives it."""
    given = os.environ.get("MIDBLOCK_DATA")
    if not given:
        pytest.skip("MIDBLOCK_DATA is not set: no copy of the benchmarks here")
    return Path(given)


@pytest.fixture
def no_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither local benchmarks nor a network."""
    monkeypatch.delenv("MIDBLOCK_DATA", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
