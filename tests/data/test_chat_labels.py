"""What is learned of a conversation, against the labels of TRL's own SFTTrainer.

Where labels differ from TRL's the test says so and why:

- an assistant's turn of which the template writes nothing (it does not know tool calls) is not learned;
- templates of image models take content in parts only: TRL hands them text, which they drop;
- a turn of an unknown template that is written otherwise once others follow becomes a row of its own, as it would
  be generated: TRL refuses such a template. Each such row is TRL's row for that turn alone.
- a last turn that the template does not end gets EOS, which TRL adds to plain text only;
- a character that several tokens write (an emoji) is learned whole at the end of a turn: the marks of transformers
  reach its first token only.
"""

from __future__ import annotations

from typing import Any

import pytest
from jinja2 import TemplateError

from chat_templates import LIKE, chat_tokenizer, shipped, shipped_names, shipped_with_marks, trainer_labels, unmarked
from midblock.data import Dataset, Example, tokenize
from midblock.data.formats import format_row

CALL = [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}]
TOOLS = [{"type": "function", "function": {
    "name": "weather", "description": "tells", "parameters": {
        "type": "object", "properties": {"city": {"type": "string"}}}}}]
ROWS: dict[str, dict[str, Any]] = {
    "one": {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello there"}]},
    "two": {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello there"},
                         {"role": "user", "content": "more"}, {"role": "assistant", "content": "sure."}]},
    "system": {"messages": [{"role": "system", "content": "be kind"}, {"role": "user", "content": "Hi"},
                            {"role": "assistant", "content": "Hello there"}]},
    "reasoning": {"messages": [{"role": "user", "content": "Hi"},
                               {"role": "assistant", "content": "Hello", "reasoning_content": "greet"},
                               {"role": "user", "content": "more"},
                               {"role": "assistant", "content": "sure.", "reasoning_content": "why"}]},
    "tools": {"tools": TOOLS, "messages": [
        {"role": "user", "content": "weather?"},
        {"role": "assistant", "content": "", "reasoning_content": "ask", "tool_calls": CALL},
        {"role": "tool", "name": "weather", "content": "72F"}, {"role": "assistant", "content": "72F."}]},
    "blanks": {"messages": [{"role": "user", "content": "one"}, {"role": "assistant", "content": "First."},
                            {"role": "user", "content": "two"}, {"role": "assistant", "content": " Second. \n"},
                            {"role": "user", "content": "three"}, {"role": "assistant", "content": "Third."}]},
    "user last": {"messages": [{"role": "user", "content": "one"}, {"role": "assistant", "content": "First."},
                               {"role": "user", "content": "two"}]},
    "thoughts in words": {"messages": [{"role": "user", "content": "17*3?"}, {
        "role": "assistant", "content": "<think>\n17*3\n</think>\n\n51"}]},
    "words and calls": {"tools": TOOLS, "messages": [
        {"role": "user", "content": "weather?"},
        {"role": "assistant", "content": "Let me look.", "tool_calls": CALL},
        {"role": "tool", "name": "weather", "content": "72F"}, {"role": "assistant", "content": "72F."},
        {"role": "user", "content": "still?"},
        {"role": "assistant", "content": "One moment.", "tool_calls": CALL},
        {"role": "tool", "name": "weather", "content": "73F"}, {"role": "assistant", "content": "73F."}]},
}
NAMES = shipped_with_marks()
DROPS_CALLS = {"llama3", "lfm2", "phi3", "phi3_5", "qwen2_5_vl", "deepseek_r1_distill"}
IMAGE_MODELS = {"idefics3", "smolvlm", "llava_next"}


def labelled(tokenizer, *rows: dict[str, Any], **options: Any) -> tuple[list[tuple[list[int], list[int]]], list[str]]:
    """Ids and labels as midblock makes them, and its notes."""
    data = Dataset("d", "all", "here", [format_row(r, f"f:{i}", "generic") for i, r in enumerate(rows, start=1)])
    made = tokenize(data, tokenizer, max_length=100_000, supervised=True, every_turn=True, **options)
    found = []
    for row in made:
        labels = [-100] * len(row.ids)
        for start, stop in row.supervised:
            labels[start:stop] = row.ids[start:stop]
        found.append((list(row.ids), labels))
    return found, made.notes


def shown(tokenizer, pair: tuple[list[int], list[int]]) -> str:
    """A row with what is learned between ⟦ and ⟧."""
    text, on = "", False
    for token, label in zip(*pair, strict=True):
        if (label != -100) != on:
            on = not on
            text += "⟦" if on else "⟧"
        text += tokenizer.decode([token])
    return text + ("⟧" if on else "")


def marked_labels(tokenizer, row: dict[str, Any]) -> tuple[list[int], list[int]]:
    """What SFTTrainer computes with ``assistant_only_loss`` (its `tokenize_fn`), without building a trainer."""
    from trl.chat_template_utils import get_training_chat_template, has_generation_markers

    template = None if has_generation_markers(tokenizer.chat_template) else get_training_chat_template(tokenizer)
    found = tokenizer.apply_chat_template(
        row["messages"], tokenize=True, return_dict=True, return_assistant_tokens_mask=True, chat_template=template,
        tools=row.get("tools"))
    return list(found["input_ids"]), [t if m else -100 for t, m in
                                      zip(found["input_ids"], found["assistant_masks"], strict=True)]


@pytest.mark.parametrize("name", [n for n in NAMES if n not in IMAGE_MODELS])
@pytest.mark.parametrize("key", ROWS)
def test_labels_are_trls_for_every_template_that_it_ships(name: str, key: str) -> None:
    tokenizer, row = chat_tokenizer(shipped(name)), ROWS[key]
    refused = ""
    try:
        theirs = marked_labels(tokenizer, row)
    except TemplateError as error:
        refused = str(error)
    if refused:  # no system role, no tools: refused by both, with the template's words
        data = [format_row(row, "f:1", "generic"), format_row(ROWS["one"], "f:2", "generic")]
        ours = tokenize(Dataset("d", "all", "here", data), tokenizer, max_length=10_000, supervised=True)
        assert refused[:20] in ours.skipped[0][1]
        return
    (ours, *more), notes = labelled(tokenizer, row)
    assert more == []
    if key == "tools" and name in DROPS_CALLS:
        assert ours[0] == theirs[0]
        assert shown(tokenizer, ours).count("⟦") == shown(tokenizer, theirs).count("⟦") - 1
        assert shown(tokenizer, ours).endswith("72F." + shown(tokenizer, ours).split("72F.")[-1])
        assert any("hold nothing" in n for n in notes)
        # this one reads the calls, but writes only those that come with a text
        assert name == "deepseek_r1_distill" or any("no use for messages' tool_calls" in n for n in notes)
    else:
        assert shown(tokenizer, ours) == shown(tokenizer, theirs)
        assert ours == theirs


@pytest.mark.parametrize("name", ["qwen3", "llama3", "gemma3", "glm4moe", "gptoss"])
def test_the_trainer_itself_makes_these_labels(name: str) -> None:
    tokenizer = chat_tokenizer(shipped(name))
    rows = [ROWS["one"], ROWS["two"]]
    assert labelled(tokenizer, *rows)[0] == trainer_labels(tokenizer, rows, assistant_only_loss=True)


@pytest.mark.parametrize("name", ["llama3", "gemma3", "glm4", "mistral"])
@pytest.mark.parametrize("key", ["one", "two"])
def test_prefixes_find_what_marks_say(name: str, key: str) -> None:
    """Templates of our own: TRL reads the marks, midblock the same template without them."""
    marked, plain = chat_tokenizer(LIKE[name]), chat_tokenizer(unmarked(LIKE[name]))
    (ids, labels), = trainer_labels(marked, [ROWS[key]], assistant_only_loss=True)
    (ours, *more), _ = labelled(plain, ROWS[key])
    assert more == []
    if name == "glm4":  # nothing ends the last turn: EOS does
        ids, labels = [*ids, plain.eos_token_id], [*labels, plain.eos_token_id]
    assert shown(plain, ours) == shown(marked, (ids, labels))
    assert ours == (ids, labels)
    assert labelled(marked, ROWS[key])[0] == [ours]


@pytest.mark.parametrize("name", ["llama3", "gemma3", "glm4", "mistral"])
def test_the_last_character_of_a_turn_is_learned_whole(name: str) -> None:
    row = {"messages": [{"role": "user", "content": "¿qué?"}, {"role": "assistant", "content": "Fine 🙂"},
                        {"role": "user", "content": "more"}, {"role": "assistant", "content": "你好"}]}
    marked, plain = chat_tokenizer(LIKE[name]), chat_tokenizer(unmarked(LIKE[name]))
    (ours,), _ = labelled(marked, row)
    assert ours == labelled(plain, row)[0][0]
    text = marked.decode([label for label in ours[1] if label != -100])
    assert "Fine 🙂" in text
    assert "你好" in text


def test_marks_in_two_pieces_keep_the_end_of_a_turn_whatever_stands_before_it() -> None:
    """This template marks words and end apart; after an emoji the end is no piece without words."""
    tokenizer = chat_tokenizer(shipped("diffusion_gemma"))
    (ids, labels), = labelled(tokenizer, {"messages": [{"role": "user", "content": "Hi"},
                                                       {"role": "assistant", "content": "Hello 🙂"}]})[0]
    assert tokenizer.decode([label for label in labels if label != -100]).strip() == "Hello 🙂<turn|>"
    assert labels[-2] == ids[-2] == tokenizer.convert_tokens_to_ids("<turn|>")


def test_a_completion_never_begins_within_a_special_token() -> None:
    """The prompt ends in <tool_response|>, where the whole goes on with <|turn>: they share a bracket."""
    tokenizer = chat_tokenizer(shipped("diffusion_gemma"))
    messages = [{"role": "user", "content": "weather?"},
                {"role": "assistant", "content": "Let me look.", "tool_calls": CALL},
                {"role": "tool", "name": "weather", "content": "21"}, {"role": "assistant", "content": "21 degrees."}]
    row = {"prompt": messages[:-1], "completion": messages[-1:], "tools": TOOLS}
    (ours,), _ = labelled(tokenizer, row)
    assert ours == trainer_labels(tokenizer, [row])[0]
    assert shown(tokenizer, ours).split("⟦")[1].startswith("<|turn>")


@pytest.mark.parametrize("name", LIKE)
@pytest.mark.parametrize("key", ["two", "reasoning"])
def test_each_turn_is_learned_as_it_would_be_generated(name: str, key: str) -> None:
    """Up to the end of each turn a row is TRL's row for "the conversation so far" + that turn (completion only)."""
    tokenizer = chat_tokenizer(unmarked(LIKE[name]))
    messages = [{("thinking" if name == "gptoss" and k == "reasoning_content" else k): v for k, v in m.items()}
                for m in ROWS[key]["messages"]]
    rows, _ = labelled(tokenizer, {"messages": messages})
    turns = []  # (ids up to the end of the turn, where it starts)
    for ids, labels in rows:
        learned = [i for i, label in enumerate(labels) if label != -100]
        ends = [i for i in learned if i + 1 not in learned]
        starts = [i for i in learned if i - 1 not in learned]
        turns += [(ids[:b + 1], a) for a, b in zip(starts, ends, strict=True)]
    expected = [trainer_labels(tokenizer, [{"prompt": messages[:k], "completion": [messages[k]]}])[0]
                for k, m in enumerate(messages) if m["role"] == "assistant"]
    assert len(turns) == len(expected)
    for (ids, start), (their_ids, their_labels) in zip(turns, expected, strict=True):
        if name == "glm4":  # the mark of the next role, or EOS, ends the turn
            assert tokenizer.decode(ids[-1:]) in ("<|user|>", "</s>")
            ids = ids[:-1]
        assert tokenizer.decode(ids) == tokenizer.decode(their_ids)
        assert start == sum(label == -100 for label in their_labels)
    assert len(rows) == (2 if name in ("qwen3", "gptoss") else 1)


def test_without_rows_of_their_own_other_turns_are_context_and_told() -> None:
    tokenizer = chat_tokenizer(unmarked(LIKE["qwen3"]))
    data = Dataset("d", "all", "here", [format_row(ROWS["reasoning"], "f:1", "generic")])
    rows = tokenize(data, tokenizer, max_length=10_000, supervised=True)
    row, = rows
    assert len(row.supervised) == 1
    assert any(n.startswith("1 turns of the assistant count as context only") for n in rows.notes)


@pytest.mark.parametrize("name", ["qwen3", "llama3", "gemma3", "glm4", "gptoss"])
@pytest.mark.parametrize("key", ["one", "two"])
def test_prompt_and_completion_mean_what_trl_means(name: str, key: str) -> None:
    tokenizer = chat_tokenizer(unmarked(LIKE[name]))
    messages = ROWS[key]["messages"]
    row = {"prompt": messages[:-1], "completion": messages[-1:]}
    (ids, labels), = trainer_labels(tokenizer, [row])
    (ours, *more), _ = labelled(tokenizer, row)
    assert more == []
    if name == "glm4":
        ids, labels = [*ids, tokenizer.eos_token_id], [*labels, tokenizer.eos_token_id]
    assert shown(tokenizer, ours) == shown(tokenizer, (ids, labels))
    assert ours == (ids, labels)


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in shipped_names() if n not in IMAGE_MODELS])
@pytest.mark.parametrize("key", ["two", "reasoning", "words and calls"])
def test_completions_are_the_trainers_for_every_template_that_trl_ships(name: str, key: str) -> None:
    row = {k: v for k, v in ROWS[key].items() if k != "messages"}
    row |= {"prompt": ROWS[key]["messages"][:-1], "completion": ROWS[key]["messages"][-1:]}
    tokenizer = chat_tokenizer(shipped(name))
    try:
        (ids, labels), = trainer_labels(tokenizer, [row])
    except (TemplateError, TypeError):  # the template does not take such a row, or TRL not the form of its calls
        return
    (ours, *more), _ = labelled(tokenizer, row)
    assert more == []
    if name == "glm4moe":  # nothing ends the turn: EOS does
        ids, labels = [*ids, tokenizer.eos_token_id], [*labels, tokenizer.eos_token_id]
    assert shown(tokenizer, ours) == shown(tokenizer, (ids, labels))
    assert ours == (ids, labels)


def test_image_models_templates_get_parts() -> None:
    for name in IMAGE_MODELS:
        tokenizer = chat_tokenizer(shipped(name))
        (row,), _ = labelled(tokenizer, ROWS["one"])
        assert "Hi" in tokenizer.decode(row[0])
        assert "Hello there" in shown(tokenizer, row).split("⟦")[1]


TEMPLATE = """{%- if tools %}<|tools|>{{ tools | tojson }}\n{%- endif %}{%- if enable_thinking is defined %}
{{- '<|thinking|>' ~ enable_thinking }}{%- endif %}{%- for m in messages %}{{- '<|' + m.role + '|>' }}
{%- if m.reasoning_content %}{{- '(' + m.reasoning_content + ')' }}{%- endif %}{{- m.content }}
{%- for c in m.tool_calls or [] %}{{- 'CALL ' + c.function.name + (c.function.arguments | tojson) }}{%- endfor %}
{{- '<|end|>' }}{%- endfor %}{%- if add_generation_prompt %}<|assistant|>{%- endif %}"""


def test_every_field_that_the_template_knows_is_handed_on() -> None:
    tokenizer = chat_tokenizer(TEMPLATE)
    row = {**ROWS["tools"], "enable_thinking": False, "source": "web", "max_length": 5,
           "chat_template_kwargs": {"unknown": 1}}
    (row_made,), notes = labelled(tokenizer, row)
    text = shown(tokenizer, row_made)
    assert text.startswith("<|tools|>[")
    assert "<|thinking|>False" in text
    assert "⟦(ask)CALL weather{" in text
    assert text.endswith("72F<|end|><|assistant|>⟦72F.<|end|>⟧")
    assert sorted(notes) == ["enable_thinking of 1 rows was handed to the chat template",
                             "the chat template has no use for unknown (in 1 conversations)",
                             "tools of 1 rows was handed to the chat template"]


def test_what_a_template_cannot_use_is_counted() -> None:
    tokenizer = chat_tokenizer(unmarked(LIKE["llama3"]))
    (row,), notes = labelled(tokenizer, ROWS["tools"])
    assert shown(tokenizer, row).count("⟦") == 1
    assert "the chat template has no use for tools (in 1 conversations)" in notes
    assert "the chat template has no use for messages' tool_calls (in 1 conversations)" in notes
    assert "the chat template has no use for messages' reasoning_content (in 1 conversations)" in notes
    assert any(n.startswith("1 turns of the assistant hold nothing") for n in notes)


@pytest.mark.parametrize("as_text", [True, False])
def test_arguments_of_calls_in_either_form(as_text: bool) -> None:
    joins = "{%- for m in messages %}{{- '<|' + m.role + '|>' + m.content }}{%- for c in m.tool_calls or [] %}" \
            "{{- 'CALL ' + c.function.arguments }}{%- endfor %}{{- '<|end|>' }}{%- endfor %}"
    walks = joins.replace("{{- 'CALL ' + c.function.arguments }}",
                          "{%- for k, v in c.function.arguments.items() %}{{- k + '=' + v }}{%- endfor %}")
    arguments = '{"city": "Rome"}' if as_text else {"city": "Rome"}
    row = {"messages": [{"role": "user", "content": "w?"}, {"role": "assistant", "content": "", "tool_calls": [
        {"type": "function", "function": {"name": "weather", "arguments": arguments}}]}]}
    for template, words in ((joins, 'CALL {"city": "Rome"}'), (walks, "city=Rome")):
        tokenizer = chat_tokenizer(template + "{%- if add_generation_prompt %}<|assistant|>{%- endif %}")
        (made,), _ = labelled(tokenizer, row)
        assert shown(tokenizer, made) == f"<|user|>w?<|end|><|assistant|>⟦{words}<|end|>⟧"


@pytest.mark.parametrize("flag", [{"weight": 0}, {"train": False}, {"loss": False}, {"training": 0}])
def test_turns_that_are_not_to_be_learned(flag: dict[str, Any]) -> None:
    for template in (LIKE["llama3"], unmarked(LIKE["llama3"])):
        tokenizer = chat_tokenizer(template)
        messages = [dict(m) for m in ROWS["two"]["messages"]]
        messages[1].update(flag)
        (made,), _ = labelled(tokenizer, {"messages": messages})
        text = shown(tokenizer, made)
        assert text.count("⟦") == 1
        assert text.endswith("⟦sure.<|eot_id|>⟧")


def test_marks_that_leave_out_the_end_of_a_turn_are_completed() -> None:
    template = LIKE["llama3"].replace("{{- m.content | trim + '<|eot_id|>' }}{%- endgeneration %}",
                                      "{{- m.content | trim }}{%- endgeneration %}{{- '<|eot_id|>' }}")
    tokenizer = chat_tokenizer(template)
    (made,), _ = labelled(tokenizer, ROWS["two"])
    assert made == labelled(chat_tokenizer(LIKE["llama3"]), ROWS["two"])[0][0]


def test_a_template_that_fails_in_any_way_leaves_the_row_out() -> None:
    for broken in ("{{ messages[7].content }}", "{{ 1 // 0 }}", "{{ messages.nothing.at_all }}",
                   "{% for x in 5 %}{% endfor %}", "{{ raise_exception('no') }}", "{{ messages | int + 'a' }}"):
        tokenizer = chat_tokenizer(
            "{%- if messages | length > 2 %}" + broken + "{%- endif %}" + unmarked(LIKE["llama3"]))
        data = Dataset("d", "all", "here", [format_row(ROWS[k], k, "generic") for k in ("one", "two")])
        rows = tokenize(data, tokenizer, max_length=10_000, supervised=True)
        assert [r.index for r in rows] == [0]
        assert rows.skipped[0][0] == "two"


def test_conversations_that_were_not_chat_are_as_before() -> None:
    tokenizer = chat_tokenizer(unmarked(LIKE["llama3"]))
    data = Dataset("d", "all", "here", [Example("p c", prompt="p", completion=" c", where="f:1")])
    row, = tokenize(data, tokenizer, max_length=100, supervised=True, chat=True)
    (expected,), _ = labelled(tokenizer, {"messages": [{"role": "user", "content": "p"},
                                                       {"role": "assistant", "content": "c"}]})
    assert list(row.ids) == expected[0]
