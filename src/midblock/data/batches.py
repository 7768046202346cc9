"""Padded batches of token rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from midblock.data.tokens import TokenRow, TokenRows
from midblock.errors import DataError, SettingsError

__all__ = ["Batch", "make_batches"]

IGNORE = -100  # the label that PyTorch's cross entropy leaves out


@dataclass
class Batch:
    """B rows, padded to the longest, T tokens.

    Attributes:
        indices: `TokenRow.index` of each row.
        input_ids: (B, T) int64.
        attention_mask: (B, T) int64, 1 on real tokens.
        labels: (B, T) int64, the ids where a loss counts them and -100 elsewhere, not yet
            shifted (transformers shifts them); None if no row is supervised.
    """

    indices: tuple[int, ...]
    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor | None = None
    host: Batch | None = field(default=None, repr=False, compare=False)
    """The batch on the CPU that this one was copied from: what is known of it there need not be asked of a device."""

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def lengths(self) -> Tensor:
        """Real tokens per row, (B,) int64."""
        return self.attention_mask.sum(dim=1)

    @property
    def num_tokens(self) -> int:
        """Real tokens in the batch."""
        return int((self.host or self).attention_mask.sum())

    def only(self, places: Sequence[int]) -> Batch:
        """Some of its rows, as wide as before."""
        rows = list(places)
        return replace(self, indices=tuple(self.indices[i] for i in rows), input_ids=self.input_ids[rows],
                       attention_mask=self.attention_mask[rows],
                       labels=None if self.labels is None else self.labels[rows],
                       host=None if self.host is None else self.host.only(rows))

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on a device; to a GPU without waiting."""
        there = torch.device(device)
        if self.input_ids.device == there:
            return self

        def moved(tensor: Tensor) -> Tensor:
            if there.type == "cuda" and tensor.device.type == "cpu":
                return tensor.pin_memory().to(there, non_blocking=True)
            return tensor.to(there)
        host = self if self.input_ids.device.type == "cpu" else self.host
        return replace(self, input_ids=moved(self.input_ids), attention_mask=moved(self.attention_mask),
                       labels=None if self.labels is None else moved(self.labels),
                       host=None if there.type == "cpu" else host)


def make_batches(rows: TokenRows | Iterable[TokenRow], *, batch_size: int, pad_id: int,
                 sort_by_length: bool = True, max_tokens: int | None = None,
                 padding_side: Literal["right", "left"] = "right") -> list[Batch]:
    """Every row in exactly one batch.

    Args:
        rows: Tokenised examples.
        batch_size: Largest number of rows B.
        pad_id: Fills padded places (`pad_token_id`).
        sort_by_length: Rows of like length together, the longest first, so that little is
            padded and a lack of memory shows in the first batch. Equal lengths keep their
            order. Otherwise batches follow the order given.
        max_tokens: Largest B*T, padding included; a longer row gets a batch of its own.
        padding_side: ``right``; ``left`` for generation.

    Raises:
        SettingsError: ``batch_size`` or ``max_tokens`` is below 1, or another padding side.
        DataError: there is no row, or one has no token.

    Example:
        >>> rows = [TokenRow(0, (5, 6)), TokenRow(1, (7, 8, 9))]
        >>> batch, = make_batches(rows, batch_size=2, pad_id=0)
        >>> batch.indices, batch.input_ids.tolist()
        ((1, 0), [[7, 8, 9], [5, 6, 0]])
    """
    if batch_size < 1:
        raise SettingsError(f"a batch size of {batch_size} was asked for; use 1 or more.")
    if max_tokens is not None and max_tokens < 1:
        raise SettingsError(f"{max_tokens} tokens per batch were asked for; use 1 or more.")
    if padding_side not in ("right", "left"):
        raise SettingsError(f"padding side {padding_side!r} is not known; use right or left.")
    ordered = list(rows)
    if not ordered:
        raise DataError("there is no row to make a batch of; use a data set that is not empty.")
    if any(not row.ids for row in ordered):
        raise DataError("a row without any token cannot be batched; tokenise with min_tokens of 1 or more.")
    if sort_by_length:
        ordered.sort(key=len, reverse=True)
    batches: list[Batch] = []
    group: list[TokenRow] = []
    longest = 0
    for row in ordered:
        grown = max(longest, len(row))
        if group and (len(group) == batch_size
                      or (max_tokens is not None and grown * (len(group) + 1) > max_tokens)):
            batches.append(_pad(group, pad_id, padding_side))
            group, grown = [], len(row)
        group.append(row)
        longest = grown
    batches.append(_pad(group, pad_id, padding_side))
    return batches


def _pad(group: list[TokenRow], pad_id: int, side: str) -> Batch:
    width = max(map(len, group))
    ids = torch.full((len(group), width), pad_id, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, IGNORE) if any(row.supervised for row in group) else None
    for r, row in enumerate(group):
        offset = width - len(row) if side == "left" else 0
        values = torch.tensor(row.ids, dtype=torch.int64)
        ids[r, offset:offset + len(row)] = values
        mask[r, offset:offset + len(row)] = 1
        if labels is not None:
            # beside supervised rows, a row that singles nothing out counts as a whole
            for start, stop in row.supervised or ((0, len(row)),):
                labels[r, offset + start:offset + stop] = values[start:stop]
    return Batch(tuple(row.index for row in group), ids, mask, labels)
