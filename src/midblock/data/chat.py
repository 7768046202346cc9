"""Conversations through a tokenizer's chat template: what is written, and which part of it is learned.

A turn of the assistant is learned as it would be generated: from where a generation would start up to and
including the token that ends it. Three ways lead there, the first that is open is taken:

1. **Marks.** A template with ``{% generation %}`` marks says by itself what the assistant writes. For the
   templates that it knows TRL ships such a variant, which also writes earlier turns as they were generated
   (`trl.chat_template_utils.get_training_chat_template`); labels are then TRL's own.
2. **Prefixes.** What follows "the conversation so far, with a generation prompt" in the whole is the turn.
3. **Rows of its own.** A template may write a turn differently once others follow (it drops the reasoning). Such
   a turn is not to be found in the whole; with ``every_turn`` it becomes a row that ends with it.

Everything that a row or a message holds is handed to the template. What the template has no use for is counted.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from midblock.data.examples import Example
from midblock.errors import DataError
from midblock.reading import parse_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["ChatWriter", "Marked", "Pieces", "Unusable"]

Message = Mapping[str, Any]

_LEARN_FLAGS = ("train", "training", "weight", "loss")
"""Fields of a message that say whether it is learned (false or 0: not); ``weight`` is OpenAI's."""
_OWN_VARIABLES = {
    "messages", "tools", "documents", "add_generation_prompt", "raise_exception", "strftime_now", "conversation",
    "chat_template", "continue_final_message", "tokenize", "padding", "truncation", "max_length", "return_tensors",
    "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs"}
"""What the caller of a template, or transformers, says; no row may."""
_GENERATION = re.compile(r"\{%[-+]?\s*(?:end)?generation\s*[-+]?%\}")


class Unusable(Exception):
    """An example cannot be written as asked; it is left out and the reason is kept."""


@dataclass(frozen=True, slots=True)
class Pieces:
    """A text in consecutive pieces, with those that a loss counts."""

    texts: tuple[str, ...]
    supervised: tuple[bool, ...]
    special: bool
    """Whether the tokenizer adds its special tokens (a rendered chat template has them already)."""
    add_eos: bool


@dataclass(frozen=True, slots=True)
class Marked:
    """Token ids of a conversation whose template marks what the assistant writes."""

    ids: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]


@dataclass
class ChatWriter:
    """Writes conversations with one tokenizer's template, and counts what the template leaves out.

    Args:
        tokenizer: It has a chat template.
        add_eos: End rows with EOS. None: where the template does not end the assistant's turn itself.
        every_turn: Turns that the whole conversation does not show become rows of their own.
    """

    tokenizer: PreTrainedTokenizerBase
    add_eos: bool | None = None
    every_turn: bool = False
    unused: Counter[str] = field(default_factory=Counter)
    handed: Counter[str] = field(default_factory=Counter)
    not_shown: int = 0
    """Assistant turns that are context only, because the template writes them in another form."""
    empty: int = 0
    """Assistant turns with nothing to learn in what the template writes of them."""

    def __post_init__(self) -> None:
        template = str(self.tokenizer.get_chat_template())
        self._template = template
        self._variables = _variables(template)
        self._special = sorted((str(t) for t in self.tokenizer.get_added_vocab()), key=len, reverse=True)
        self._eos = str(self.tokenizer.eos_token or "")
        self._in_parts = self._takes_parts()
        self._marked = _with_marks(self.tokenizer, template)

    # -- what is written ---------------------------------------------------------------------

    def write(self, example: Example, supervised: bool) -> list[Pieces | Marked]:
        """The rows of one conversation (one, but for ``every_turn``).

        Raises:
            Unusable: the template refuses it, or nothing of it can be learned.
        """
        assert example.messages is not None
        messages = example.messages
        keywords = self._keywords(example)
        self._count(example, keywords)
        if not supervised:
            whole = self._render(messages, keywords)
            return [Pieces((whole,), (False,), False, bool(self.add_eos) and self._open_end(whole, messages[-1]))]
        if example.given:
            return [self._completion(messages, example.given, keywords)]
        learned = [k for k, m in enumerate(messages) if m["role"] == "assistant" and _is_learned(m)]
        if not learned:
            raise Unusable("no message of the assistant to learn from")
        if self._marked is not None and len(learned) == sum(m["role"] == "assistant" for m in messages):
            marked = self._by_marks(messages, keywords)
            if marked is not None:
                return [marked]
        return self._by_prefixes(messages, learned, keywords)

    def notes(self) -> list[str]:
        """What a reader should know of all that was written."""
        found = [f"the chat template has no use for {name} (in {count:,} conversations)"
                 for name, count in sorted(self.unused.items())]
        found += [f"{name} of {count:,} rows was handed to the chat template" for name, count in
                  sorted(self.handed.items())]
        if self.not_shown:
            found.append(f"{self.not_shown:,} turns of the assistant count as context only: the chat template writes "
                         "them differently once others follow")
        if self.empty:
            found.append(f"{self.empty:,} turns of the assistant hold nothing in what the chat template writes, and "
                         "are not learned")
        return found

    # -- three ways --------------------------------------------------------------------------

    def _completion(self, messages: Sequence[Message], given: int, keywords: Mapping[str, Any]) -> Pieces:
        """Prompt and completion as TRL means them: all that follows the prompt is learned."""
        whole = self._render(messages, keywords)
        start = self._common(self._render(messages[:given], keywords, generation=True), whole)
        if not _bare(whole[start:], self._special):
            raise Unusable("the chat template writes nothing of the completion")
        return Pieces((whole[:start], whole[start:]), (False, True), False, self._wants_eos(whole, messages[-1]))

    def _by_marks(self, messages: Sequence[Message], keywords: Mapping[str, Any]) -> Marked | None:
        template, own = self._marked or ("", True)
        try:
            found = self._apply(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True,
                                **{**keywords, "chat_template": template})
        except _TEMPLATE_FAULTS:
            return None
        ids, mask = list(found["input_ids"]), _whole_characters(found)
        if not any(mask):
            return None
        added = set(self.tokenizer.get_added_vocab().values())
        marked = _spans(mask)
        spans = [(a, b) for a, b in marked if _bare(str(self.tokenizer.decode(ids[a:b])), self._special)]
        self.empty += len(marked) - len(spans)
        if not spans:
            raise Unusable("the chat template writes nothing of what the assistant says")
        if own:  # marks that leave out the token which ends the turn would teach never to end
            spans = [(a, b + 1 if b < len(ids) and ids[b] in added and not any(
                i in added for i in _trimmed(ids[a:b], self.tokenizer)[-1:]) else b) for a, b in spans]
        eos = self.tokenizer.eos_token_id
        last = _trimmed(ids[spans[-1][0]:spans[-1][1]], self.tokenizer)
        wants = self.add_eos is not False and spans[-1][1] == len(ids) and messages[-1]["role"] == "assistant"
        if wants and eos is not None and not (last and last[-1] in added):
            ids.append(int(eos))
            spans[-1] = (spans[-1][0], len(ids))
        return Marked(tuple(ids), tuple(spans))

    def _by_prefixes(self, messages: Sequence[Message], learned: Sequence[int],
                     keywords: Mapping[str, Any]) -> list[Pieces | Marked]:
        rows: list[Pieces | Marked] = []
        left, end = list(learned), len(messages)
        refused = ""
        while left:
            try:
                text = self._render(messages[:end], keywords)
                spans = {k: span for k in left if (span := self._turn(messages, k, end, text, keywords)) is not None}
            except Unusable as error:
                if end == len(messages):
                    raise
                refused, spans, text = str(error), {}, ""
            shown = {k: s for k, s in spans.items() if _bare(text[slice(*s)], self._special)}
            self.empty += len(spans) - len(shown)
            if shown:
                rows.append(self._pieces(text, [shown[k] for k in sorted(shown)], messages[end - 1]))
            left = [k for k in left if k not in spans and (k + 1 < end or end == len(messages))]
            if not self.every_turn or not left:
                break
            end = left[-1] + 1
            if end == len(messages):  # the last turn is not to be found even where nothing follows it
                left.pop()
                end = left[-1] + 1 if left else end
        if not rows:
            raise Unusable(refused or f"the chat template does not show where message {learned[-1] + 1} begins and "
                                      "ends, or writes nothing of it")
        self.not_shown += len(left)
        return rows[::-1]

    def _turn(self, messages: Sequence[Message], k: int, end: int, text: str,
              keywords: Mapping[str, Any]) -> tuple[int, int] | None:
        """Where turn ``k`` begins and ends in the text of ``messages[:end]``; None if it is not there as generated."""
        after = text if k + 1 == end else self._render(messages[:k + 1], keywords)
        if not text.startswith(after):  # some write EOS at the very end, after the mark that ends the turn
            after = after.removesuffix(self._eos)
        if not after or not text.startswith(after):
            return None
        if k == 0:
            try:
                before = self._render([], keywords, generation=True)
            except Unusable:
                before = ""
        else:
            before = self._render(messages[:k], keywords, generation=True)
        start = self._common(before, after)
        if start < len(before) and k:
            # the prompt may end in words that a finished turn has not (an empty block of reasoning)
            plain = self._render(messages[:k], keywords)
            if not after.startswith(plain) or start < len(plain):
                return None
        stop = len(after)
        if not after.rstrip().endswith(tuple(self._special)):  # no terminator: what follows ends the turn
            stop += next((len(t) for t in self._special if text.startswith(t, stop)), 0)
        return (start, stop) if stop > start else None

    def _pieces(self, text: str, spans: Sequence[tuple[int, int]], last: Message) -> Pieces:
        texts: list[str] = []
        counted: list[bool] = []
        done = 0
        for start, stop in spans:
            texts += [text[done:start], text[start:stop]]
            counted += [False, True]
            done = stop
        ends = done == len(text)
        if not ends:
            texts.append(text[done:])
            counted.append(False)
        return Pieces(tuple(texts), tuple(counted), False, ends and self._wants_eos(text, last))

    def _common(self, a: str, b: str) -> int:
        """How many characters two texts begin with in common; no special token of the second is cut in two."""
        if b.startswith(a):
            return len(a)
        same = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), len(b))
        return min((same - k for t in self._special for k in range(1, min(len(t), same + 1))
                    if b.startswith(t, same - k)), default=same)

    # -- the template ------------------------------------------------------------------------

    def _wants_eos(self, text: str, last: Message) -> bool:
        return self.add_eos is not False and self._open_end(text, last)

    def _open_end(self, text: str, last: Message) -> bool:
        """Whether the text ends in the assistant's words, without a mark that ends the turn."""
        text = text.rstrip()
        if last["role"] != "assistant" or text.endswith(tuple(self._special)):
            return False
        content = str(last["content"]).rstrip()
        return text.endswith(content) if content else True

    def _render(self, messages: Sequence[Message], keywords: Mapping[str, Any], *, generation: bool = False) -> str:
        try:
            return str(self._apply(messages, tokenize=False, **{**keywords, "add_generation_prompt": generation}))
        except _TEMPLATE_FAULTS as error:
            raise Unusable(f"the chat template refuses the conversation ({error})") from None

    def _apply(self, messages: Sequence[Message], **options: Any) -> Any:
        copies = _copy(messages, self._in_parts)
        try:
            return self.tokenizer.apply_chat_template(copies, **options)
        except _TEMPLATE_FAULTS:
            # some templates join the arguments of a call as text, others walk through them
            if not any(m.get("tool_calls") for m in messages):
                raise
            return self.tokenizer.apply_chat_template(
                [_with_other_arguments(m) for m in _copy(messages, self._in_parts)], **options)

    def _takes_parts(self) -> bool:
        """Whether the template reads content only as a list of parts, as those of image models do."""
        probe = "probe of midblock"
        for parts in (False, True):
            try:
                shown = str(self.tokenizer.apply_chat_template(
                    _copy([{"role": "user", "content": probe}], parts), tokenize=False))
            except _TEMPLATE_FAULTS:
                continue
            if probe in shown:
                return parts
        return False

    def _keywords(self, example: Example) -> dict[str, Any]:
        row = example.row
        found = {name: row[name] for name in sorted(self._variables - _OWN_VARIABLES)
                 if row.get(name) is not None and name not in _CONSUMED}
        given = row.get("chat_template_kwargs")
        if isinstance(given, Mapping):
            found.update({str(k): v for k, v in given.items() if k not in _OWN_VARIABLES})
        for name in ("tools", "documents"):
            if isinstance(row.get(name), list | tuple) and row[name]:
                found[name] = list(row[name])
        return found

    def _count(self, example: Example, keywords: Mapping[str, Any]) -> None:
        assert example.messages is not None
        # names that the template mentions nowhere cannot act on what it writes
        names = {f"messages' {name}": name for m in example.messages for name, value in m.items()
                 if name not in ("role", "content", *_LEARN_FLAGS) and value not in ("", [], {})}
        names |= {name: name for name in keywords}
        for shown, name in names.items():
            if not re.search(rf"\b{re.escape(name)}\b", self._template):
                self.unused[shown] += 1
            elif name in keywords:
                self.handed[shown] += 1


_CONSUMED = {"messages", "conversations", "conversation", "prompt", "completion", "text", "content", "role"}


def _faults() -> tuple[type[Exception], ...]:
    from jinja2 import TemplateError

    # what jinja raises itself, and what the expressions of a template end with on values of another kind
    return (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)


_TEMPLATE_FAULTS = _faults()


def _copy(messages: Sequence[Message], parts: bool) -> list[dict[str, Any]]:
    """Copies, since some templates change what they are given; with ``parts`` content is a list of one text."""
    copies = [{k: v for k, v in m.items() if k not in _LEARN_FLAGS} for m in messages]
    for message in copies if parts else ():
        message["content"] = [{"type": "text", "text": message["content"]}]
    return copies


def _with_other_arguments(message: dict[str, Any]) -> dict[str, Any]:
    """The message with the arguments of its calls as text where they are an object, and the other way round."""
    def other(arguments: object) -> object:
        if not isinstance(arguments, str):
            return json.dumps(arguments, ensure_ascii=False)
        try:
            return parse_json(arguments, where="arguments", error=DataError)
        except DataError:
            return arguments

    def changed(call: object) -> object:
        if not isinstance(call, Mapping):
            return call
        inner = call.get("function")
        if isinstance(inner, Mapping) and "arguments" in inner:
            return {**call, "function": {**inner, "arguments": other(inner["arguments"])}}
        return {**call, "arguments": other(call["arguments"])} if "arguments" in call else call

    calls = message.get("tool_calls")
    return {**message, "tool_calls": [changed(c) for c in calls]} if isinstance(calls, list | tuple) else message


def _is_learned(message: Message) -> bool:
    return all(message.get(flag, True) not in (False, 0) for flag in _LEARN_FLAGS)


def _bare(text: str, special: Sequence[str]) -> str:
    """What is left of a text without special tokens and blanks."""
    for token in special:
        text = text.replace(token, "")
    return text.strip()


def _whole_characters(found: Any) -> list[int]:
    """The mask of what the assistant writes; transformers ends it with the first token of a turn's last character."""
    mask = list(found["assistant_masks"])
    for i in range(1, len(mask)):
        if mask[i - 1] and not mask[i]:
            before, here = found.token_to_chars(i - 1), found.token_to_chars(i)
            mask[i] = int(before is not None and here is not None and here.start < before.end)
    return mask


def _spans(mask: Sequence[int]) -> list[tuple[int, int]]:
    edges = [i for i in range(len(mask) + 1)
             if bool(mask[i] if i < len(mask) else 0) != bool(mask[i - 1] if i else 0)]
    return list(zip(edges[::2], edges[1::2], strict=True))


def _trimmed(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids without those at the end that are blanks."""
    kept = list(ids)
    while kept and not str(tokenizer.decode([kept[-1]])).strip():
        kept.pop()
    return kept


@lru_cache(maxsize=32)
def _variables(template: str) -> frozenset[str]:
    """Names that a template takes from its caller."""
    from jinja2 import TemplateError, meta
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"])
    try:
        return frozenset(meta.find_undeclared_variables(environment.parse(_GENERATION.sub("", template))))
    except (TemplateError, RecursionError):
        return frozenset()


def _with_marks(tokenizer: PreTrainedTokenizerBase, template: str) -> tuple[str, bool] | None:
    """A template with marks for what the assistant writes, and whether it is the tokenizer's own."""
    if not getattr(tokenizer, "is_fast", False):  # masks need the places of characters
        return None
    if _GENERATION.search(template):
        return template, True
    try:
        from trl.chat_template_utils import get_training_chat_template
    except ImportError:
        return None
    try:
        found = get_training_chat_template(tokenizer)
    except _TEMPLATE_FAULTS:  # ValueError: TRL does not know this template
        return None
    return (found, False) if found else None
