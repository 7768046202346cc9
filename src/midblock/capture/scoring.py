"""Next-token scores of a hidden state, in chunks: never a (tokens x vocabulary) tensor for all.

The read-out (final norm and head) is by far the widest matrix product of a small model;
it runs only on positions whose next token counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from midblock.data import Batch

__all__ = ["TokenScores", "chunk_rows", "chunks_of_logits", "counted_positions", "next_token_scores", "sample_means"]

# logits of one chunk: 2**24 float32 numbers are 64 MiB
_CHUNK_NUMBERS = 1 << 24


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


def chunk_rows(vocab_size: int) -> int:
    """How many positions go through the head at once, so that their logits stay small."""
    return max(1, _CHUNK_NUMBERS // vocab_size)


def chunks_of_logits(read_out: Callable[[Tensor], Tensor], rows: Tensor, vocab_size: int
                     ) -> Iterator[tuple[slice, Tensor]]:
    """Float32 logits (n, V) of hidden rows (N, d), a bounded chunk at a time, with their slice."""
    step = chunk_rows(vocab_size)
    for lo in range(0, rows.shape[0], step):
        part = slice(lo, min(lo + step, rows.shape[0]))
        yield part, read_out(rows[part]).float()


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
        gold = logits.gather(1, target[part, None]).squeeze(1)
        loss[part] = logits.logsumexp(dim=1) - gold
        # the first of equal maxima wins, as argmax does
        correct[part] = logits.argmax(dim=1) == target[part]
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
