"""Which rows make a batch, in which order batches come, and what the trainer is given of them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler

from midblock.data import TokenRow
from midblock.errors import SettingsError
from midblock.settings.tune import Order
from midblock.writing import sha256_of

__all__ = ["BatchOrder", "RankBatches", "RankSampler", "batch_plan", "collator", "labels_of"]


def batch_plan(lengths: Sequence[int], batch_size: int, seed: int, order: Order = "length") -> list[list[int]]:
    """Rows of like length in each batch, the same batches in every epoch (only their order changes).

    Ties are broken by seed and place. Fixed batches make a cached row equal to what its batch would
    compute again, bit for bit; fairseq orders data in the same way. A batch that is not full comes
    last. With ``order="random"`` batches are drawn without regard to length (and fixed as well).

    Example:
        >>> batches = batch_plan([5, 9, 5, 9, 7], 2, seed=0)
        >>> [sorted(b) for b in batches]
        [[0, 2], [3, 4], [1]]
    """
    by_length = order == "length"
    places = sorted(range(len(lengths)), key=lambda i: (lengths[i] if by_length else 0,
                                                        sha256_of("row", str(seed), str(i))))
    return [places[lo:lo + batch_size] for lo in range(0, len(places), batch_size)]


class BatchOrder(Sampler[int]):
    """Indices batch by batch; the order of full batches is drawn from (seed, epoch)."""

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int, order: Order = "length") -> None:
        self._batches = batch_plan(lengths, batch_size, seed, order)
        self._full = len(self._batches) - (len(self._batches[-1]) < batch_size)
        self._seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return sum(map(len, self._batches))

    @property
    def num_batches(self) -> int:
        """Batches in an epoch."""
        return len(self._batches)

    def batches(self) -> Iterator[list[int]]:
        """The epoch's batches."""
        order = list(range(self._full))
        random.Random(f"midblock order {self._seed} {self.epoch}").shuffle(order)
        for number in (*order, *range(self._full, len(self._batches))):
            yield self._batches[number]

    def __iter__(self) -> Iterator[int]:
        for batch in self.batches():
            yield from batch


class RankBatches(Sampler[list[int]]):
    """One process's part of each batch of a `BatchOrder`: every n-th row, so that a row stays on its process.

    A part that would be empty is an empty list: all processes take the same steps. (`collator` makes one row without
    labels of it.)

    Args:
        order: Of all rows.
        rank: Number of the process.
        processes: How many.

    Example:
        >>> order = BatchOrder([3, 3, 3], 2, seed=0)
        >>> [sorted(a + b) for a, b in zip(RankBatches(order, 0, 2), RankBatches(order, 1, 2))] == [
        ...     sorted(b) for b in order.batches()]
        True
    """

    def __init__(self, order: BatchOrder, rank: int, processes: int) -> None:
        self._order, self._rank, self._processes = order, rank, processes

    def set_epoch(self, epoch: int) -> None:
        self._order.set_epoch(epoch)

    def __len__(self) -> int:
        return self._order.num_batches

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self._order.batches():
            yield batch[self._rank::self._processes]


class RankSampler(Sampler[int]):
    """Keeps every row on one process, so that each process's prefix cache holds the rows that it will see again.

    accelerate deals the batches of one sampler out in turn: the first to process 0, the second to process 1 ...
    Batches come here in that order, each from its process's own rows, shuffled anew in every epoch. A process whose
    rows do not fill the last batch repeats some of its own, as `torch.utils.data.DistributedSampler` does.

    Args:
        rows: How many rows there are.
        batch_size: Of one process (``per_device_train_batch_size``).
        processes: How many (``accelerator.num_processes``, ``args.world_size``).
        seed: Of the order.

    Raises:
        SettingsError: fewer rows than processes, or a number below 1.

    Example:
        >>> sampler = RankSampler(6, batch_size=1, processes=2)
        >>> [i % 2 for i in sampler]  # rows 0, 2, 4 belong to process 0
        [0, 1, 0, 1, 0, 1]
    """

    def __init__(self, rows: int, batch_size: int, processes: int, seed: int = 0) -> None:
        if min(batch_size, processes) < 1 or rows < processes:
            raise SettingsError(f"{rows} rows cannot be dealt to {processes} processes in batches of {batch_size}; "
                                "there must be a row for each.")
        self._own = [list(range(p, rows, processes)) for p in range(processes)]
        self._batch, self._seed = batch_size, seed
        self._rounds = -(-max(map(len, self._own)) // batch_size)
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Which order the next iteration takes; trainers call it."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self._rounds * self._batch * len(self._own)

    def __iter__(self) -> Iterator[int]:
        dealt = []
        for rank, own in enumerate(self._own):
            order = own.copy()
            random.Random(f"midblock rank {self._seed} {self.epoch} {rank}").shuffle(order)
            whole = self._rounds * self._batch
            dealt.append((order * -(-whole // len(order)))[:whole])
        self.epoch += 1  # for loops that do not say which epoch it is
        for start in range(0, self._rounds * self._batch, self._batch):
            for order in dealt:
                yield from order[start:start + self._batch]


def collator(pad_id: int) -> Callable[[list[dict[str, Any]]], dict[str, Tensor]]:
    """A function from rows to a batch: ids, mask and labels (B, T), padded on the right.

    Of no rows it makes one of two tokens without labels.
    """
    def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        rows = rows or [{"input_ids": [pad_id] * 2, "labels": [-100] * 2}]
        width = max(len(r["input_ids"]) for r in rows)
        ids = torch.full((len(rows), width), pad_id, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        labels = torch.full_like(ids, -100)
        for i, row in enumerate(rows):
            n = len(row["input_ids"])
            ids[i, :n] = torch.tensor(row["input_ids"])
            labels[i, :n] = torch.tensor(row["labels"])
            mask[i, :n] = 1
        labels[:, 0] = -100  # nothing stands before a first token that could predict it
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return collate


def labels_of(row: TokenRow) -> list[int]:
    """The row's tokens where they are learned, -100 elsewhere."""
    if not row.supervised:
        return list(row.ids)
    labels = [-100] * len(row.ids)
    for start, stop in row.supervised:
        labels[start:stop] = row.ids[start:stop]
    return labels
