"""Next-token scores of a hidden state, in chunks: never a (tokens x vocabulary) tensor for all.

The read-out (final norm and head) is by far the widest matrix product of a small model;
it runs only on positions whose next token counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from midblock import metrics
from midblock.data import Batch

__all__ = ["TokenScores", "chunks_of_all_logits", "chunks_of_logits", "counted_positions", "head_rows",
           "next_token_scores", "sample_means"]

# The head is read out for many positions at once, because its weights are streamed from memory each time.
_HEAD_NUMBERS = 3 << 22
_HEAD_ROWS = 128
_ACCELERATOR_NUMBERS = 1 << 24


def counted_positions(batch: Batch) -> Tensor:
    """Positions t whose next token t+1 counts: real, and labelled where the batch has labels.

    Returns:
        Boolean mask (B, T); the last column is always False.
    """
    counts = torch.zeros_like(batch.input_ids, dtype=torch.bool)
    counts[:, :-1] = (batch.attention_mask[:, :-1] > 0) & (batch.attention_mask[:, 1:] > 0)
    if batch.labels is not None:
        counts[:, :-1] &= batch.labels[:, 1:] != -100
    return counts


def head_rows(vocab_size: int, device: torch.device) -> int:
    """How many positions go through the head at once, so that their logits stay small."""
    if device.type != "cpu":
        return max(1, _ACCELERATOR_NUMBERS // vocab_size)
    return max(_HEAD_ROWS, _HEAD_NUMBERS // vocab_size)


def chunks_of_logits(read_out: Callable[[Tensor], Tensor], rows: Tensor, vocab_size: int
                     ) -> Iterator[tuple[slice, Tensor]]:
    """Logits (n, V) of hidden rows (N, d) in the model's own number format, some rows at a time, with their slice."""
    for part, logits in chunks_of_all_logits({"": read_out}, {"": rows}, vocab_size):
        yield part, logits.pop("")


def chunks_of_all_logits(read_outs: Mapping[str, Callable[[Tensor], Tensor]], rows: Mapping[str, Tensor],
                         vocab_size: int) -> Iterator[tuple[slice, dict[str, Tensor]]]:
    """Logits (n, V) of hidden rows in the models' own number format, for several models at once.

    Args:
        read_outs: Model -> final norm and head, (n, d) -> (n, V).
        rows: Model -> hidden rows (N, d), equally many.
        vocab_size: V, to bound the chunks.

    Yields:
        The slice of rows, and model -> their logits.
    """
    first = next(iter(rows.values()))
    wide = head_rows(vocab_size, first.device)
    for lo in range(0, first.shape[0], wide):
        whole = slice(lo, min(lo + wide, first.shape[0]))
        yield whole, {name: read_outs[name](part[whole]) for name, part in rows.items()}


@dataclass
class TokenScores:
    """Scores of every counted position of a batch, flat in (row, position) order.

    Attributes:
        row: Row of the batch each score belongs to, (N,).
        loss: Negative log-likelihood of the next token in nats, (N,).
        correct: Whether the most likely token is the next token, (N,).
    """

    row: Tensor
    loss: Tensor
    correct: Tensor


def next_token_scores(read_out: Callable[[Tensor], Tensor], hidden: Tensor, batch: Batch, vocab_size: int
                      ) -> TokenScores:
    """Loss and correctness of every counted next token when ``hidden`` is read out.

    Args:
        read_out: Final norm and head: (n, d) -> (n, V).
        hidden: (B, T, d).
        batch: Its tokens; labels, where present, say what counts.
        vocab_size: V, to bound the chunks.
    """
    mask = counted_positions(batch)
    rows = hidden[mask]
    target = batch.input_ids.roll(-1, dims=1)[mask]
    loss = torch.empty(rows.shape[0], dtype=torch.float32, device=rows.device)
    correct = torch.empty(rows.shape[0], dtype=torch.bool, device=rows.device)
    for part, logits in chunks_of_logits(read_out, rows, vocab_size):
        sums = metrics.row_sums(logits, target[part])
        correct[part] = metrics.top_k(logits, sums.maxima, 1)[:, 0] == target[part]
        loss[part] = sums.loss
        del logits  # before the next ones are made
    return TokenScores(mask.nonzero()[:, 0], loss, correct)


def sample_means(row: Tensor, values: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """Mean of ``values`` per row of the batch, and how many there were: two (B,) float64 tensors.

    A row with nothing counted has mean NaN.
    """
    total = torch.zeros(num_rows, dtype=torch.float64, device=values.device)
    count = torch.zeros_like(total)
    total.index_add_(0, row, values.double())
    count.index_add_(0, row, torch.ones_like(values, dtype=torch.float64))
    return total / torch.where(count > 0, count, torch.nan), count
