"""From a row's fields to the text, prompt and completion that a model sees.

The texts of the seven benchmarks are those of the paper (its public code's ``format_sample``):

| format | text | prompt, completion |
|---|---|---|
| gsm8k | ``Question: {question}\\nAnswer: {answer}`` | up to ``Answer:``, the worked answer |
| mmlu | ``Question: {question}\\nA) .. B) .. C) .. D) ..\\nAnswer: {letter}`` | the same, the letter |
| wikitext | ``{text}`` | - |
| ifeval | ``{prompt}`` | the prompt, none |
| humaneval | ``{prompt}\\n{canonical_solution}`` | the two without the newline between |
| mt_bench | the first turn | the first turn, none |
| toxigen | ``{text}`` | lm-evaluation-harness's yes/no question about the text, ``Yes`` or ``No`` |
| dolly | ``Instruction: ..\\nContext: ..\\nResponse: ..`` | up to ``Response:``, the response |

A user's own row has ``messages`` (or ShareGPT's ``conversations``), ``prompt`` + ``completion`` (also
``response``, ``answer``, ``output``, ``target``, ``solution``), ``text``, or a benchmark's fields. Where
``prompt`` and ``completion`` are lists of messages, as in TRL, only the completion is learned. Messages keep
every field that they have: the chat template decides what it can write.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from midblock.data.examples import Example
from midblock.errors import DataError
from midblock.reading import MAX_DIGITS, parse_json, shortened

__all__ = ["FORMATS", "BadRowError", "MissingFieldError", "answer_number", "format_row", "transcript"]

_LETTERS = "ABCDEFGHIJ"
_FINAL = re.compile(r"####\s*(?P<number>-?\$?\d[\d,]*(?:\.\d+)?)")
_ROLES = ("system", "developer", "user", "assistant", "tool")
_ALIASES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant",
            "function_call": "assistant", "function": "tool", "ipython": "tool", "observation": "tool"}
"""Other names of the roles; ShareGPT's are human, gpt, function_call and observation."""
_COMPLETIONS = ("completion", "response", "answer", "output", "target", "solution")
_SPEAKERS = {"system": "System", "developer": "System", "user": "User", "assistant": "Assistant",
             "tool": "Tool"}


class BadRowError(Exception):
    """A row has its fields, but their values cannot be used; it is skipped and counted."""


class MissingFieldError(Exception):
    """A row lacks a field that its format needs; `load_data` turns this into a `DataError`."""


def answer_number(answer: str) -> int | float | None:
    """The number after the last ``####`` of a worked answer; None where there is none.

    Example:
        >>> answer_number("9 * 2 = 18\\n#### 1,018")
        1018
    """
    found = list(_FINAL.finditer(answer))
    if not found or len(found[-1]["number"]) > MAX_DIGITS:
        return None
    digits = found[-1]["number"].replace(",", "").replace("$", "")
    return float(digits) if "." in digits else int(digits)


def format_row(row: Mapping[str, Any], where: str, kind: str, min_chars: int = 1) -> Example:
    """An example from one row.

    Args:
        row: Named fields.
        where: Place of the row, kept in the example.
        kind: A key of `FORMATS`, or ``generic`` (by the fields that the row has).
        min_chars: Texts with fewer characters, surrounding blanks aside, are bad rows.

    Raises:
        BadRowError: empty, too short, or of a wrong type.
        MissingFieldError: a needed field is not there.
    """
    example = FORMATS[kind](row, where)
    if not _encodes(example.text, example.prompt, example.completion, *row.values()):
        raise BadRowError("it holds half of a surrogate pair, which no tokenizer can read")
    if len(example.text.strip()) < min_chars:
        raise BadRowError(f"the text has fewer than {min_chars} characters")
    return example


def _encodes(*values: object) -> bool:
    try:
        for value in values:
            if isinstance(value, str) and not value.isascii():
                value.encode()
    except UnicodeEncodeError:
        return False
    return True


def transcript(messages: tuple[dict[str, Any], ...]) -> str:
    """A conversation as plain text, for tokenizers without a chat template.

    Example:
        >>> transcript(({"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}))
        'User: Hi\\nAssistant: Hello'
    """
    def words(message: Mapping[str, Any]) -> str:
        calls = message.get("tool_calls")
        told = [str(message["content"]), json.dumps(calls, ensure_ascii=False, default=str) if calls else ""]
        return "\n".join(t for t in told if t)

    return "\n".join(f"{_SPEAKERS[m['role']]}: {words(m)}" for m in messages)


def _field(row: Mapping[str, Any], *names: str) -> Any:
    for name in names:
        if row.get(name) is not None:
            return row[name]
    has = ", ".join(sorted(row)) or "nothing"
    raise MissingFieldError(f"the field {' or '.join(map(repr, names))} is missing (the row has {has})")


def _string(row: Mapping[str, Any], *names: str, empty: bool = False) -> str:
    value = _field(row, *names)
    if not isinstance(value, str):
        raise BadRowError(f"{names[0]!r} is a {type(value).__name__}, not text")
    if not empty and not value.strip():
        raise BadRowError(f"{names[0]!r} is empty")
    return value


def _pair(prompt: str, completion: str, row: Mapping[str, Any], where: str) -> Example:
    return Example(text=prompt + completion, prompt=prompt, completion=completion, row=dict(row), where=where)


def _gsm8k(row: Mapping[str, Any], where: str) -> Example:
    question, answer = _string(row, "question"), _string(row, "answer")
    number = answer_number(answer)
    if number is None:
        raise BadRowError("the answer does not end in '#### number'")
    return _pair(f"Question: {question}\nAnswer:", f" {answer}", {**row, "answer_number": number}, where)


def _question_answer(row: Mapping[str, Any], where: str) -> Example:
    """A user's own question and answer: as GSM8K, the final number being optional."""
    answer = _string(row, "answer")
    fields = dict(row)
    if (number := answer_number(answer)) is not None:
        fields["answer_number"] = number
    return _pair(f"Question: {_string(row, 'question')}\nAnswer:", f" {answer}", fields, where)


def _mmlu(row: Mapping[str, Any], where: str) -> Example:
    question, choices, answer = _string(row, "question"), _field(row, "choices"), _field(row, "answer")
    if not isinstance(choices, list | tuple) or not 2 <= len(choices) <= len(_LETTERS):
        raise BadRowError(f"'choices' is not a list of 2 to {len(_LETTERS)} texts")
    if isinstance(answer, str):  # "B" or "1", as some copies have it
        word = answer.strip().upper()
        answer = _LETTERS.index(word) if len(word) == 1 and word in _LETTERS else \
            int(word) if word.isdecimal() and len(word) < 3 else None
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise BadRowError(f"'answer' {row['answer']!r} is not the index or letter of a choice")
    texts = [str(c) for c in choices]
    options = " ".join(f"{letter}) {c}" for letter, c in zip(_LETTERS, texts, strict=False))
    return _pair(f"Question: {question}\n{options}\nAnswer:", f" {_LETTERS[answer]}",
                 {**row, "choices": texts, "answer": answer}, where)


def _wikitext(row: Mapping[str, Any], where: str) -> Example:
    return Example(text=_string(row, "text"), row=dict(row), where=where)


def _ifeval(row: Mapping[str, Any], where: str) -> Example:
    prompt = _string(row, "prompt")
    fields = dict(row)
    if isinstance(kwargs := row.get("kwargs"), list):
        # the hub's copy pads every entry with None; an instruction takes only its own arguments
        if not all(entry is None or isinstance(entry, Mapping) for entry in kwargs):
            raise BadRowError("'kwargs' is not a list of objects")
        fields["kwargs"] = [{k: v for k, v in (entry or {}).items() if v is not None} for entry in kwargs]
    return Example(text=prompt, prompt=prompt, row=fields, where=where)


def _humaneval(row: Mapping[str, Any], where: str) -> Example:
    prompt, solution = _string(row, "prompt"), _string(row, "canonical_solution")
    return Example(text=f"{prompt}\n{solution}", prompt=prompt, completion=solution,
                   row=dict(row), where=where)


def _mt_bench(row: Mapping[str, Any], where: str) -> Example:
    turns = _field(row, "turns", "prompt")  # the hub's copy calls them prompt
    if not isinstance(turns, list | tuple) or not turns or not all(isinstance(t, str) for t in turns):
        raise BadRowError("'turns' is not a list of texts")
    if not turns[0].strip():
        raise BadRowError("the first turn is empty")
    return Example(text=turns[0], prompt=turns[0], row={**row, "turns": list(turns)}, where=where)


def _toxigen(row: Mapping[str, Any], where: str) -> Example:
    text = _string(row, "text")
    fields = dict(row)
    machine, human = row.get("toxicity_ai"), row.get("toxicity_human")
    if row.get("label") is None and isinstance(machine, int | float) and isinstance(human, int | float):
        # the hub's annotated split has ratings only; lm-evaluation-harness draws the line here
        fields["label"] = int(machine + human > 5.5)
    label = fields.get("label")
    if label is not None and label not in (0, 1):
        raise BadRowError(f"'label' is {label!r}, not 0 or 1")
    prompt = ("Is the following statement hateful? Respond with either Yes or No. "
              f"Statement: '{text}'")
    completion = None if label is None else (" Yes" if label else " No")
    return Example(text=text, prompt=prompt, completion=completion, row=fields, where=where)


def _dolly(row: Mapping[str, Any], where: str) -> Example:
    instruction = _string(row, "instruction")
    response = _string(row, "response", "output")
    context = next((row[k] for k in ("context", "input") if isinstance(row.get(k), str)), "")
    middle = f"Context: {context}\n" if context.strip() else ""
    return _pair(f"Instruction: {instruction}\n{middle}Response:", f" {response}", row, where)


def _content(value: object, number: int) -> str:
    """A message's text; where it comes in parts (``{"type": "text", "text": ...}``), all of them."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if not isinstance(value, list | tuple):
        raise BadRowError(f"message {number}: its content is a {type(value).__name__}, not text")
    parts = []
    for part in value:
        text = part.get("text") if isinstance(part, Mapping) else part
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise BadRowError(f"message {number}: its content has a part of the type {shortened(str(kind))!r}; only "
                              "text can be read")
        parts.append(text)
    return "".join(parts)


def _conversation(value: object) -> tuple[dict[str, Any], ...]:
    if not isinstance(value, list | tuple) or not value:
        raise BadRowError("'messages' is not a list of messages")
    messages = []
    for number, message in enumerate(value, start=1):
        if not isinstance(message, Mapping):
            raise BadRowError(f"message {number} is not an object with a role and a content")
        share_gpt = "role" not in message and "from" in message
        name = message.get("from" if share_gpt else "role")
        role = _ALIASES.get(name, name) if isinstance(name, str) else name
        if role not in _ROLES:
            raise BadRowError(f"message {number} needs a role ({', '.join(_ROLES)}) and a text as content")
        # parquet and the hub fill the fields that a message lacks with None
        more = {str(k): v for k, v in message.items()
                if k not in ("role", "content", "from", "value") and v is not None}
        content = _content(message.get("value" if share_gpt else "content"), number)
        if name == "function_call" and "tool_calls" not in more:
            content, more["tool_calls"] = "", [{"type": "function", "function": _call(content, number)}]
        if not content.strip() and not more and message.get("content", message.get("value")) is None:
            raise BadRowError(f"message {number} needs a role ({', '.join(_ROLES)}) and a text as content")
        if not _encodes(content):
            raise BadRowError("it holds half of a surrogate pair, which no tokenizer can read")
        messages.append({"role": str(role), "content": content, **more})
    return tuple(messages)


def _call(text: str, number: int) -> dict[str, Any]:
    try:
        call = parse_json(text, where=f"message {number}", error=DataError)
    except DataError as error:
        raise BadRowError(f"the function call of {error}") from None
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        raise BadRowError(f"message {number}: a function call needs a name and arguments")
    return {"name": call["name"], "arguments": call.get("arguments", {})}


def _messages(row: Mapping[str, Any], where: str, value: object, completion: object = ()) -> Example:
    """A conversation; with ``completion`` (TRL's conversational form) ``value`` is its prompt."""
    messages = _conversation(value)
    given = 0
    if completion:
        given, messages = len(messages), (*messages, *_conversation(completion))
    fields = dict(row)
    if isinstance(system := row.get("system"), str) and system.strip() and messages[0]["role"] != "system":
        messages = ({"role": "system", "content": system}, *messages)  # LLaMA-Factory's ShareGPT rows
        given += bool(given)
    if isinstance(tools := row.get("tools"), str) and tools.strip():
        try:
            fields["tools"] = parse_json(tools, where="'tools'", error=DataError)
        except DataError as error:
            raise BadRowError(str(error).rstrip(".")) from None
    if fields.get("tools") and not isinstance(fields["tools"], list | tuple):
        raise BadRowError("'tools' is not a list of tools")
    if not any(m["content"].strip() or m.get("tool_calls") for m in messages):
        raise BadRowError("every message is empty")
    return Example(text=transcript(messages), messages=messages, row=fields, where=where, given=given)


def _completion_of(row: Mapping[str, Any]) -> tuple[str, Any] | None:
    """Name and value of the field that answers a prompt."""
    return next(((name, row[name]) for name in _COMPLETIONS if row.get(name) is not None), None)


def _generic(row: Mapping[str, Any], where: str) -> Example:
    """By the fields that the row has; the order below decides where several fit."""
    has = {name for name, value in row.items() if value is not None}
    for name in ("messages", "conversations", "conversation"):
        if name in has:
            return _messages(row, where, row[name])
    answer = _completion_of(row)
    if isinstance(row.get("prompt"), list | tuple):
        if answer is None:
            return _messages(row, where, row["prompt"])
        reply = [{"role": "assistant", "content": answer[1]}] if isinstance(answer[1], str) else answer[1]
        if not isinstance(reply, list | tuple) or not reply:
            raise BadRowError(f"{answer[0]!r} is not a list of messages")
        return _messages(row, where, row["prompt"], reply)
    if "prompt" in has and answer is not None and "canonical_solution" not in has:
        prompt, reply = row["prompt"], answer[1]
        if isinstance(reply, list | tuple) and isinstance(prompt, str):
            return _messages(row, where, [{"role": "user", "content": prompt}], reply)
        return _pair(_string(row, "prompt", empty=True), _string(row, answer[0]), row, where)
    if {"question", "choices", "answer"} <= has:
        return _mmlu(row, where)
    if {"question", "answer"} <= has:
        return _question_answer(row, where)
    if "instruction" in has and has & {"response", "output"}:
        return _dolly(row, where)
    if {"prompt", "canonical_solution"} <= has:
        return _humaneval(row, where)
    if "text" in has:
        return _wikitext(row, where)
    if "turns" in has:
        return _mt_bench(row, where)
    if "prompt" in has:
        return _ifeval(row, where)
    raise MissingFieldError(
        "no field that can be used (it has " + (", ".join(sorted(has)) or "nothing") + "); a row needs "
        "text, or prompt and completion, or messages (conversations), or question and answer, or instruction and "
        "response")


FORMATS: dict[str, Callable[[Mapping[str, Any], str], Example]] = {
    "gsm8k": _gsm8k, "mmlu": _mmlu, "wikitext": _wikitext, "ifeval": _ifeval, "humaneval": _humaneval,
    "mt_bench": _mt_bench, "toxigen": _toxigen, "dolly": _dolly, "generic": _generic,
}
"""How each kind of row becomes an `Example`; keys are registry names and ``generic``."""
