"""Token rows: spans, boundaries, lengths, chat templates; and batches of them."""

from __future__ import annotations

import random

import pytest
import torch

from midblock.data import Dataset, Example, TokenRow, make_batches, pad_token_id, tokenize
from midblock.errors import DataError, SettingsError


def dataset(*examples: Example) -> Dataset:
    return Dataset("d", "all", "here", [Example(e.text, e.prompt, e.completion, e.messages, {}, f"f:{i}")
                                        for i, e in enumerate(examples, start=1)])


def pair(prompt: str, completion: str) -> Example:
    return Example(prompt + completion, prompt, completion)


def chat(*turns: tuple[str, str]) -> Example:
    return Example(" ".join(t for _, t in turns), messages=tuple({"role": r, "content": t} for r, t in turns))


def supervised_text(tokenizer, row: TokenRow) -> str:
    return "|".join(tokenizer.decode(row.ids[a:b]) for a, b in row.supervised)


def test_plain_text_is_what_the_tokenizer_gives(make_tokenizer) -> None:
    texts = ["one two three", "The quick brown fox", "Question: how many shells?"]
    for options in ({}, {"bos": True}, {"bos": True, "eos_at_end": True}):
        tokenizer = make_tokenizer(**options)
        rows = tokenize(dataset(*map(Example, texts)), tokenizer, max_length=64)
        assert [list(r.ids) for r in rows] == [tokenizer(t)["input_ids"] for t in texts]
        assert [r.index for r in rows] == [0, 1, 2]
        assert all(r.supervised == () and r.prompt_length == 0 for r in rows)
        ended = tokenize(dataset(*map(Example, texts)), tokenizer, max_length=64, add_eos=True)
        assert all(r.ids.count(tokenizer.eos_token_id) == 1 for r in ended)
        assert all(r.ids[-1] == tokenizer.eos_token_id for r in ended)


@pytest.mark.parametrize("options", [{}, {"bos": True}, {"bos": True, "eos_at_end": True}])
def test_prompt_and_completion(make_tokenizer, options: dict) -> None:
    tokenizer = make_tokenizer(**options)
    example = pair("Question: How many shells?\nAnswer:", " 12 + 7 = 19\n#### 19")
    row, = tokenize(dataset(example), tokenizer, max_length=128, supervised=True)
    prompt = tokenizer(example.prompt)["input_ids"]
    if options.get("eos_at_end"):
        prompt = prompt[:-1]
    assert list(row.ids[: row.prompt_length]) == prompt
    assert row.supervised == ((len(prompt), len(row.ids)),)
    assert row.ids.count(tokenizer.eos_token_id) == 1
    assert row.ids[-1] == tokenizer.eos_token_id
    assert supervised_text(tokenizer, row) == " 12 + 7 = 19\n#### 19</s>"
    without, = tokenize(dataset(example), make_tokenizer(), max_length=128, supervised=True, add_eos=False)
    assert tokenizer.eos_token_id not in without.ids


def test_boundary_inside_a_token(tokenizer) -> None:
    # "shells" is one token for this tokenizer; the prompt ends in the middle of it
    example = pair("Mia has 12 she", "lls.")
    whole, alone = tokenizer(example.text)["input_ids"], tokenizer(example.prompt)["input_ids"]
    assert whole[: len(alone)] != alone
    row, = tokenize(dataset(example), tokenizer, max_length=64, supervised=True)
    assert list(row.ids[: row.prompt_length]) == alone
    assert supervised_text(tokenizer, row) == "lls.</s>"
    assert tokenizer.decode(row.ids) == example.text + "</s>"


def test_empty_prompt(tokenizer) -> None:
    row, = tokenize(dataset(pair("", "one two")), tokenizer, max_length=64, supervised=True)
    assert row.supervised == ((0, len(row.ids)),)


def test_truncation_is_counted_and_spans_are_cut(tokenizer) -> None:
    data = dataset(pair("one two", " three four five six seven eight nine"),
                   pair("one two three four five six", " x"), pair("one", " two"))
    full = tokenize(data, tokenizer, max_length=100, supervised=True)
    assert full.truncated == 0
    limit = full.rows[1].prompt_length
    rows = tokenize(data, tokenizer, max_length=limit, supervised=True)
    assert rows.truncated == sum(r.truncated for r in rows) == 1
    assert rows.rows[0].ids == full.rows[0].ids[:limit]
    assert rows.rows[0].supervised == ((full.rows[0].prompt_length, limit),)
    assert rows.skipped == [("f:2", f"the prompt alone has {limit} tokens, the limit is {limit}")]
    assert [r.index for r in rows] == [0, 2]
    assert f"1 rows cut to {limit} tokens" in rows.summary()
    assert rows.describe()["skipped_rows"][0]["where"] == "f:2"


def test_too_short_and_nothing_left(tokenizer) -> None:
    data = dataset(Example("x"), Example("one two three"))
    rows = tokenize(data, tokenizer, max_length=64)
    assert (rows.too_short, len(rows)) == (["f:1"], 1)
    assert len(tokenize(data, tokenizer, max_length=64, min_tokens=1)) == 2
    with pytest.raises(DataError, match="no row is left"):
        tokenize(dataset(Example("x")), tokenizer, max_length=64)
    for wrong in ({"max_length": 1}, {"max_length": 8, "min_tokens": 9}, {"max_length": 8, "min_tokens": 0}):
        with pytest.raises(SettingsError):
            tokenize(data, tokenizer, **wrong)


def test_training_needs_a_completion(tokenizer) -> None:
    for example, has in ((Example("words"), "text"), (Example("p", prompt="p"), "a prompt")):
        with pytest.raises(DataError, match=rf"f:1: training needs a completion, this row has only {has}"):
            tokenize(dataset(example), tokenizer, max_length=64, supervised=True)


def test_conversation_counts_what_the_assistant_writes(chat_tokenizer) -> None:
    example = chat(("system", "be kind"), ("user", "Hi"), ("assistant", "Hello there"),
                   ("user", "name a colour"), ("assistant", "blue"))
    row, = tokenize(dataset(example), chat_tokenizer, max_length=256, supervised=True)
    rendered = chat_tokenizer.apply_chat_template([dict(m) for m in example.messages], tokenize=False)
    assert chat_tokenizer.decode(row.ids) == rendered
    assert supervised_text(chat_tokenizer, row) == "Hello there<|im_end|>\n|blue<|im_end|>\n"
    start = chat_tokenizer.apply_chat_template([dict(m) for m in example.messages[:2]], tokenize=True,
                                               add_generation_prompt=True, return_dict=True)["input_ids"]
    assert list(row.ids[: row.prompt_length]) == list(start)


def test_template_that_rewrites_earlier_turns(make_tokenizer) -> None:
    tokenizer = make_tokenizer(chat=True)
    # as reasoning models do: the last assistant turn is written differently from earlier ones
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
        "{% if m['role'] == 'assistant' and loop.last %}think {% endif %}{{ m['content'] }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
    example = chat(("user", "Hi"), ("assistant", "Hello"), ("user", "more"), ("assistant", "there"))
    row, = tokenize(dataset(example), tokenizer, max_length=256, supervised=True)
    assert supervised_text(tokenizer, row) == "think there<|im_end|>\n"
    rows = tokenize(dataset(example), tokenizer, max_length=256, supervised=True, every_turn=True)
    assert [supervised_text(tokenizer, r) for r in rows] == ["think Hello<|im_end|>\n", "think there<|im_end|>\n"]
    assert [r.index for r in rows] == [0, 0]


def test_template_without_end_of_turn_gets_eos(make_tokenizer) -> None:
    tokenizer = make_tokenizer(chat=True)
    tokenizer.chat_template = ("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
                               "{% if add_generation_prompt %}assistant: {% endif %}")
    row, = tokenize(dataset(chat(("user", "Hi"), ("assistant", "Hello"))), tokenizer, max_length=64,
                    supervised=True)
    assert supervised_text(tokenizer, row) == "Hello\n</s>"


def test_conversations_that_cannot_be_used(make_tokenizer, chat_tokenizer, tokenizer) -> None:
    fine = chat(("user", "Hi"), ("assistant", "Hello"))
    rows = tokenize(dataset(chat(("user", "Hi")), fine), chat_tokenizer, max_length=64, supervised=True)
    assert rows.skipped == [("f:1", "no message of the assistant to learn from")]
    strict = make_tokenizer(chat=True)
    strict.chat_template = ("{% for m in messages %}{% if m['role'] == 'system' %}"
                            "{{ raise_exception('no system role') }}{% endif %}"
                            "{{ m['content'] }} </s>{% endfor %}")
    rows = tokenize(dataset(chat(("system", "x"), ("user", "Hi")), fine), strict, max_length=64)
    assert "no system role" in rows.skipped[0][1]
    with pytest.raises(DataError, match="needs a chat template and the tokenizer has none"):
        tokenize(dataset(fine), tokenizer, max_length=64, supervised=True)
    plain = tokenize(dataset(fine), tokenizer, max_length=64)
    assert "no chat template: 1 conversations" in plain.notes[0]
    assert tokenizer.decode(plain.rows[0].ids) == fine.text


def test_chat_wraps_other_rows(chat_tokenizer, tokenizer) -> None:
    data = dataset(pair("How many?", " 12 shells"))
    row, = tokenize(data, chat_tokenizer, max_length=64, supervised=True, chat=True)
    assert chat_tokenizer.decode(row.ids) == ("<|im_start|>user\nHow many?<|im_end|>\n"
                                              "<|im_start|>assistant\n12 shells<|im_end|>\n")
    assert supervised_text(chat_tokenizer, row) == "12 shells<|im_end|>\n"
    text, = tokenize(dataset(Example("words here")), chat_tokenizer, max_length=64, chat=True)
    assert chat_tokenizer.decode(text.ids) == "<|im_start|>user\nwords here<|im_end|>\n"
    with pytest.raises(DataError, match="leave out the chat option"):
        tokenize(data, tokenizer, max_length=64, chat=True)


def test_pad_token(make_tokenizer) -> None:
    with_pad, without = make_tokenizer(pad=True), make_tokenizer()
    assert pad_token_id(with_pad) == with_pad.pad_token_id
    assert without.pad_token_id is None
    assert pad_token_id(without) == without.eos_token_id


def random_rows(n: int, seed: int = 0) -> list[TokenRow]:
    rng = random.Random(seed)
    rows = []
    for i in range(n):
        ids = tuple(rng.randint(5, 99) for _ in range(rng.randint(2, 30)))
        start = rng.randint(0, len(ids) - 1)
        rows.append(TokenRow(i, ids, ((start, len(ids)),)))
    return rows


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("sort", [True, False])
@pytest.mark.parametrize("max_tokens", [None, 64, 7])
def test_every_row_once_and_unchanged(side: str, sort: bool, max_tokens: int | None) -> None:
    rows = random_rows(53)
    batches = make_batches(rows, batch_size=8, pad_id=0, sort_by_length=sort, max_tokens=max_tokens,
                           padding_side=side)
    assert sorted(i for b in batches for i in b.indices) == list(range(53))
    for batch in batches:
        assert len(batch) <= 8
        assert batch.input_ids.shape == batch.attention_mask.shape == batch.labels.shape
        assert max_tokens is None or len(batch) == 1 or batch.input_ids.numel() <= max_tokens
        assert batch.input_ids.shape[1] == max(len(rows[i]) for i in batch.indices)
        assert batch.lengths.tolist() == [len(rows[i]) for i in batch.indices]
        assert batch.num_tokens == sum(len(rows[i]) for i in batch.indices)
        for r, index in enumerate(batch.indices):
            row, mask = rows[index], batch.attention_mask[r].bool()
            assert tuple(batch.input_ids[r][mask].tolist()) == row.ids
            assert bool((batch.input_ids[r][~mask] == 0).all())
            assert mask.nonzero().flatten().tolist() == list(
                range(len(row)) if side == "right" else range(len(mask) - len(row), len(mask)))
            expected = [-100] * row.prompt_length + list(row.ids[row.prompt_length:])
            assert batch.labels[r][mask].tolist() == expected
            assert bool((batch.labels[r][~mask] == -100).all())
    flat = [i for b in batches for i in b.indices]
    if sort:
        lengths = [len(rows[i]) for i in flat]
        assert lengths == sorted(lengths, reverse=True)
        assert flat == [i for _, i in sorted((-len(rows[i]), i) for i in range(53))]
    else:
        assert flat == list(range(53))


def test_labels_only_where_supervised() -> None:
    batch, = make_batches([TokenRow(0, (1, 2, 3))], batch_size=4, pad_id=0)
    assert batch.labels is None
    assert batch.to("cpu").labels is None
    spans, = make_batches([TokenRow(0, (1, 2, 3, 4, 5), ((1, 2), (3, 5)))], batch_size=4, pad_id=0)
    assert spans.labels is not None
    assert spans.labels.tolist() == [[-100, 2, -100, 4, 5]]
    assert spans.to(torch.device("cpu")).labels is not None


def test_batch_settings() -> None:
    rows = random_rows(3)
    for wrong in ({"batch_size": 0}, {"batch_size": 1, "max_tokens": 0},
                  {"batch_size": 1, "padding_side": "top"}):
        with pytest.raises(SettingsError):
            make_batches(rows, pad_id=0, **wrong)
    with pytest.raises(DataError, match="no row"):
        make_batches([], batch_size=1, pad_id=0)
    with pytest.raises(DataError, match="without any token"):
        make_batches([TokenRow(0, ())], batch_size=1, pad_id=0)
