"""Next-token scores of hidden states: run the blocks, pick the positions that count, unembed, compare.

Logits come in chunks, never as a (tokens x vocabulary) tensor for all. Final norm and head are by far
the widest matrix product of a small model; they run only on positions whose next token counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from midblock import metrics
from midblock.capture.arrivals import to_device
from midblock.capture.forward import run_blocks
from midblock.data import Batch
from midblock.models import Anatomy

__all__ = ["CountedTokens", "RowScores", "chunks_of_all_logits", "chunks_of_logits", "counted_positions",
           "counted_tokens", "head_rows", "score_batch", "score_hidden", "sums_by_row"]

# Many positions go through the head at once, because its weights are streamed from memory each time.
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


@dataclass(frozen=True)
class CountedTokens:
    """Where a batch's next tokens count, found on the host and sent to a device.

    Attributes:
        places: Index into (B T,) of the state that predicts each, (n,). A decoder's state at t has read token t; an
            encoder-decoder's decoder reads its text shifted right by one (`model_inputs`), so there it is the next.
        row: Row of the batch of each, (n,).
        position: Column of each, (n,), on the CPU.
        target: The next token of each, (n,).
        tokens: How many count in each row, (B,) float64, on the CPU.
    """

    places: Tensor
    row: Tensor
    position: Tensor
    target: Tensor
    tokens: Tensor

    def of(self, hidden: Tensor) -> Tensor:
        """Of hidden states (B, T, d) those that predict these tokens, (n, d)."""
        return hidden.flatten(0, 1).index_select(0, self.places.to(hidden.device))


def counted_tokens(batch: Batch, device: torch.device, anatomy: Anatomy) -> CountedTokens:
    """`CountedTokens` of a batch, for hidden states of a model on a device."""
    here = batch.host or batch
    mask = counted_positions(here)
    row, position = mask.nonzero(as_tuple=True)
    target = here.input_ids.roll(-1, dims=1)[mask]
    state = position + int(bool(anatomy.causal_lm.config.is_encoder_decoder))
    places, moved_row, target = (to_device(t, device) for t in (row * mask.shape[1] + state, row, target))
    return CountedTokens(places, moved_row, position.cpu(), target, mask.sum(dim=1).double())


def head_rows(vocab_size: int, device: torch.device) -> int:
    """How many positions go through the head at once, so that their logits stay small."""
    if device.type != "cpu":
        return max(1, _ACCELERATOR_NUMBERS // vocab_size)
    return max(_HEAD_ROWS, _HEAD_NUMBERS // vocab_size)


def chunks_of_logits(unembed: Callable[[Tensor], Tensor], rows: Tensor, vocab_size: int
                     ) -> Iterator[tuple[slice, Tensor]]:
    """Logits (n, V) of hidden rows (N, d) in the model's own dtype, some rows at a time, with their slice."""
    for part, logits in chunks_of_all_logits({"": unembed}, {"": rows}, vocab_size):
        yield part, logits.pop("")


def chunks_of_all_logits(unembeddings: Mapping[str, Callable[[Tensor], Tensor]], rows: Mapping[str, Tensor],
                         vocab_size: int) -> Iterator[tuple[slice, dict[str, Tensor]]]:
    """Logits (n, V) of hidden rows in the models' own dtype, for several models at once.

    Args:
        unembeddings: Model -> final norm and head, (n, d) -> (n, V).
        rows: Model -> hidden rows (N, d), equally many.
        vocab_size: V, to bound the chunks.

    Yields:
        The slice of rows, and model -> their logits.
    """
    first = next(iter(rows.values()))
    wide = head_rows(vocab_size, first.device)
    for lo in range(0, first.shape[0], wide):
        whole = slice(lo, min(lo + wide, first.shape[0]))
        yield whole, {name: unembeddings[name](part[whole]) for name, part in rows.items()}


@dataclass(frozen=True)
class RowScores:
    """What the counted next tokens of each row of a batch add up to.

    Attributes:
        tokens: How many count, (B,), on the CPU.
        loss: Sum of their negative log-likelihoods in nats, (B,).
        correct: How many of them the model finds most likely, (B,); both on the device of the hidden states.

    All are float64; a mean over tokens is one of the sums over ``tokens``.
    """

    tokens: Tensor
    loss: Tensor
    correct: Tensor


def score_batch(model: nn.Module, anatomy: Anatomy, batch: Batch) -> RowScores:
    """Run all blocks on a batch (on the model's device) and score its next tokens."""
    return score_hidden(anatomy, run_blocks(model, anatomy, batch), batch)


def score_hidden(anatomy: Anatomy, hidden: Tensor, batch: Batch) -> RowScores:
    """Score every counted next token of a batch whose hidden states are unembedded by final norm and head.

    Args:
        anatomy: Whose final norm and head.
        hidden: (B, T, d), such as hidden L.
        batch: Its tokens; labels, where present, say what counts.
    """
    counted = counted_tokens(batch, hidden.device, anatomy)
    rows = counted.of(hidden)
    loss = torch.empty(rows.shape[0], dtype=torch.float32, device=rows.device)
    correct = torch.empty_like(loss)
    for part, logits in chunks_of_logits(anatomy.unembed, rows, anatomy.vocab_size):
        target = counted.target[part].to(logits.device)  # of a model over several devices the head may be elsewhere
        sums = metrics.row_sums(logits, target)
        correct[part] = (metrics.top_k(logits, sums.maxima, 1)[:, 0] == target).float()
        loss[part] = sums.loss
        del logits  # before the next ones are made
    size = len(batch.indices)
    return RowScores(counted.tokens, sums_by_row(counted.row, loss, size), sums_by_row(counted.row, correct, size))


def sums_by_row(row: Tensor, values: Tensor, num_rows: int) -> Tensor:
    """Sum of ``values`` (N,) per row of the batch (``row`` (N,) says which): (B,) in float64."""
    total = torch.zeros(num_rows, dtype=torch.float64, device=values.device)
    return total.index_add_(0, row, values.double())
