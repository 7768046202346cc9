"""Token rows: examples as token ids, cut to a length, with the spans that a loss counts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import TYPE_CHECKING, Any

from midblock.data.chat import ChatWriter, Marked, Pieces, Unusable
from midblock.data.examples import Dataset, Example
from midblock.errors import DataError, SettingsError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["TokenRow", "TokenRows", "pad_token_id", "tokenize"]

Spans = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class TokenRow:
    """One tokenised example.

    Attributes:
        index: Its place in the data set's ``examples``.
        ids: Token ids, without padding.
        supervised: Half-open ``(start, stop)`` ranges of ``ids`` that a training loss counts;
            empty means that no part is singled out, so that all tokens count.
        truncated: Whether the example had more tokens than ``ids``.
    """

    index: int
    ids: tuple[int, ...]
    supervised: Spans = ()
    truncated: bool = False

    @property
    def prompt_length(self) -> int:
        """Tokens before the first supervised one; 0 where all tokens count."""
        return self.supervised[0][0] if self.supervised else 0

    def __len__(self) -> int:
        return len(self.ids)


@dataclass
class TokenRows:
    """All rows of a data set, and what was lost on the way.

    Attributes:
        rows: In the order of the examples.
        truncated: How many of ``rows`` were cut to ``max_length``.
        too_short: Places of examples with fewer than ``min_tokens`` tokens (left out).
        skipped: ``(where, reason)`` of examples left out for any other reason.
        max_length: The limit in tokens.
        notes: What else a reader should know.
    """

    rows: list[TokenRow]
    truncated: int = 0
    too_short: list[str] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    max_length: int = 0
    notes: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[TokenRow]:
        return iter(self.rows)

    @property
    def num_tokens(self) -> int:
        """Tokens in all rows."""
        return sum(map(len, self.rows))

    def summary(self) -> str:
        """One line for people: rows, tokens, and everything that was cut or left out."""
        parts = [f"{len(self.rows):,} rows, {self.num_tokens:,} tokens"]
        if self.truncated:
            parts.append(f"{self.truncated:,} rows cut to {self.max_length} tokens")
        if self.too_short:
            parts.append(f"{len(self.too_short):,} too short (first: {self.too_short[0]})")
        if self.skipped:
            where, reason = self.skipped[0]
            parts.append(f"{len(self.skipped):,} left out (first: {where}: {reason})")
        return "; ".join([*parts, *self.notes])

    def describe(self) -> dict[str, Any]:
        """What ``run.json`` stores (at most 100 rows by name)."""
        return {"rows": len(self.rows), "tokens": self.num_tokens, "max_length": self.max_length,
                "truncated": self.truncated, "too_short": len(self.too_short),
                "too_short_rows": self.too_short[:100], "skipped": len(self.skipped),
                "skipped_rows": [{"where": w, "reason": r} for w, r in self.skipped[:100]],
                "notes": self.notes}


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Id to fill padded places with: the tokenizer's pad token, else its EOS, else 0.

    Padded places are masked in attention and carry no label, so that the choice changes no
    result; it only has to be a valid id.
    """
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0


def tokenize(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, *, max_length: int, min_tokens: int = 2,
             supervised: bool = False, chat: bool = False, add_eos: bool | None = None,
             every_turn: bool = False) -> TokenRows:
    """Token ids of every example.

    Without ``supervised`` a row is the example's text with the tokenizer's own special tokens.
    With it a row is prompt, completion and EOS, and the loss counts completion and EOS;
    conversations (``messages``) go through the tokenizer's chat template and the loss counts
    what the assistant writes, its end-of-turn token included (`midblock.data.chat`).

    The tokens of a prompt are exactly those that a generation would start from: where the
    tokens of the whole begin with the tokens of the prompt alone, the whole is used; where the
    tokenizer would merge characters across the boundary, the pieces are tokenised separately
    and joined.

    Args:
        dataset: The examples.
        tokenizer: A transformers tokenizer, fast or not, with or without a pad token.
        max_length: Rows are cut at the end to this many tokens; cuts are counted.
        min_tokens: Rows with fewer tokens are left out and named.
        supervised: Mark what a training loss counts. A row of which nothing is left to count
            (the prompt alone fills ``max_length``) is left out with that reason.
        chat: Put prompt and completion (or the text) into the tokenizer's chat template as
            a user's and the assistant's message.
        add_eos: End rows with EOS. None: yes for prompt + completion when ``supervised`` (and
            for a template that does not end the assistant's turn itself), else what the
            tokenizer does. False: nothing is added to what the tokenizer does.
        every_turn: For training: where the chat template writes a turn of the assistant differently once others
            follow, a conversation becomes several rows (of one ``index``), each of which ends with such a turn.
            Otherwise such a turn is context only; `TokenRows.notes` counts them.

    Raises:
        DataError: ``supervised`` and an example has neither completion nor messages; a chat
            template is needed and there is none; no row is left.
        SettingsError: ``max_length`` or ``min_tokens`` is too small.
    """
    if max_length < 2:
        raise SettingsError(f"a maximum length of {max_length} tokens was asked for; use 2 or more.")
    if not 1 <= min_tokens <= max_length:
        raise SettingsError(f"min_tokens={min_tokens} does not lie in 1..{max_length} (max_length).")
    result = TokenRows([], max_length=max_length)
    has_template = bool(getattr(tokenizer, "chat_template", None))
    writer = ChatWriter(tokenizer, add_eos, every_turn) if has_template else None
    places: list[int] = []
    pieces: list[Pieces | Marked] = []
    plain = 0
    for index, example in enumerate(dataset.examples):
        try:
            written = _write(example, writer, supervised, chat, add_eos)
        except Unusable as error:
            result.skipped.append((example.where, str(error)))
            continue
        plain += example.messages is not None and writer is None
        places += [index] * len(written)
        pieces += written
    if plain:
        result.notes.append(f"the tokenizer has no chat template: {plain:,} conversations were written as "
                            "plain 'User: ...' text")
    if writer is not None:
        result.notes += writer.notes()
    for index, (ids, spans) in zip(places, _encode(tokenizer, pieces), strict=True):
        example = dataset.examples[index]
        if len(ids) < min_tokens:
            result.too_short.append(example.where)
            continue
        kept = tuple((start, min(stop, max_length)) for start, stop in spans if start < max_length)
        # the first token of a row has nothing before it, so that no loss can count it
        if supervised and not any(stop > max(start, 1) for start, stop in kept):
            reason = (f"the prompt alone has {spans[0][0]} tokens, the limit is {max_length}"
                      if spans and spans[0][0] >= max_length else "no token is left for the loss to count")
            result.skipped.append((example.where, reason))
            continue
        cut = len(ids) > max_length
        result.truncated += cut
        result.rows.append(TokenRow(index, tuple(ids[:max_length]), kept, cut))
    if not result.rows:
        raise DataError(f"{dataset.name}: no row is left after tokenising: {len(result.too_short)} have "
                        f"fewer than {min_tokens} tokens, {len(result.skipped)} were left out"
                        + (f" (first: {result.skipped[0][0]}: {result.skipped[0][1]})"
                           if result.skipped else "") + "; raise the maximum length or use other data.")
    return result


def _write(example: Example, writer: ChatWriter | None, supervised: bool, chat: bool,
           add_eos: bool | None) -> list[Pieces | Marked]:
    has_completion = example.prompt is not None and example.completion is not None
    if supervised and example.messages is None and not has_completion:
        raise DataError(f"{example.where}: training needs a completion, this row has only "
                        f"{'a prompt' if example.prompt is not None else 'text'}; give prompt and "
                        "completion, question and answer, instruction and response, or messages.")
    if writer is not None and (chat or example.messages is not None):
        return writer.write(example if example.messages is not None else _as_conversation(example), supervised)
    if chat or (supervised and example.messages is not None):
        raise DataError(f"{example.where}: this needs a chat template and the tokenizer has none; "
                        + ("use a tokenizer with one, or give prompt and completion."
                           if example.messages is not None else "leave out the chat option."))
    if supervised:
        assert example.prompt is not None
        assert example.completion is not None
        return [Pieces((example.prompt, example.completion), (False, True), True, True if add_eos is None else add_eos)]
    return [Pieces((example.text,), (False,), True, bool(add_eos))]


def _as_conversation(example: Example) -> Example:
    if example.prompt is None:
        messages: tuple[dict[str, str], ...] = ({"role": "user", "content": example.text},)
    elif example.completion is None:
        messages = ({"role": "user", "content": example.prompt},)
    else:  # the blank that separates the completion from its prompt belongs to the plain form only
        messages = ({"role": "user", "content": example.prompt},
                    {"role": "assistant", "content": example.completion.removeprefix(" ")})
    return replace(example, messages=messages, given=0)


def _encode(tokenizer: PreTrainedTokenizerBase,
            items: Sequence[Pieces | Marked]) -> list[tuple[list[int], Spans]]:
    """Ids and supervised spans; one batched tokenizer call for all texts of a kind.

    Besides the whole text of an item the texts up to each inner boundary are tokenised, to learn
    where the boundary lies in tokens.
    """
    eos = tokenizer.eos_token_id
    prefixes: dict[bool, list[str]] = {True: [], False: []}
    places: list[list[int]] = []
    for item in items:
        if isinstance(item, Marked):
            places.append([])
            continue
        # boundaries matter only where a span must be found
        inner = range(1, len(item.texts)) if any(item.supervised) else range(0)
        store = prefixes[item.special]
        places.append(list(range(len(store), len(store) + len(inner) + 1)))
        store += ["".join(item.texts[:k]) for k in inner]
        store.append("".join(item.texts))
    encoded = {special: _batch(tokenizer, texts, special) for special, texts in prefixes.items()}

    found: list[tuple[list[int], Spans]] = []
    for item, where in zip(items, places, strict=True):
        if isinstance(item, Marked):
            found.append((list(item.ids), item.spans))
            continue
        *heads, whole = (encoded[item.special][i] for i in where)
        if heads and item.special:  # a tokenizer that ends texts with EOS must not do so in the middle
            heads = [_without_eos(h, eos) for h in heads]
            whole = _without_eos(whole, eos) if item.add_eos else whole
        if any(whole[: len(h)] != h for h in heads):
            # a token spans a boundary: tokenise the pieces by themselves
            pieces = [heads[0], *_batch(tokenizer, item.texts[1:], False)]
            heads = [list(chain.from_iterable(pieces[:k])) for k in range(1, len(pieces) + 1)]
            whole = heads.pop()
        bounds = [0, *map(len, heads), len(whole)]
        ids = list(whole)
        if item.add_eos and eos is not None and (not ids or ids[-1] != eos):
            ids.append(eos)
            bounds[-1] += 1
        spans = tuple((start, stop) for start, stop, counts
                      in zip(bounds, bounds[1:], item.supervised, strict=False) if counts and stop > start)
        found.append((ids, spans if any(item.supervised) else ()))
    return found


def _batch(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], special: bool) -> list[list[int]]:
    if not texts:
        return []
    # verbose=False: texts longer than the model's maximum are cut by `tokenize`, which counts them
    encoding = tokenizer(list(texts), add_special_tokens=special, padding=False, truncation=False,
                         return_attention_mask=False, verbose=False)
    return [list(ids) for ids in encoding["input_ids"]]


def _without_eos(ids: list[int], eos: int | None) -> list[int]:
    return ids[:-1] if eos is not None and len(ids) > 1 and ids[-1] == eos else ids
