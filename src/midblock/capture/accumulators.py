"""What a metric keeps of the hidden states, whatever the order of execution.

An accumulator is fed (hidden h, batch, states of every stage) and never knows whether
batches or layers come first; the same ones serve the in-memory and the streamed pass.
They keep one number per sample, or one pooled vector per sample, and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from midblock.capture.arrivals import Arrivals, to_device
from midblock.data import Batch

__all__ = ["Accumulator", "PooledStates", "StoredStates", "TokenMetrics"]


class Accumulator(Protocol):
    """Fed once per (hidden, batch); its arrays can be saved and put back to resume a run."""

    def feed(self, h: int, batch: Batch, states: Mapping[str, Tensor]) -> None:
        """Take hidden h of a batch: stage name -> (B, T, d)."""
        ...

    def part(self, samples: Sequence[int]) -> dict[str, Tensor]:
        """What it knows of some samples, by array name (to save)."""
        ...

    def put(self, samples: Sequence[int], part: Mapping[str, Tensor]) -> None:
        """Put saved values back."""
        ...


class PooledStates:
    """Mean over non-padding tokens per sample: X of the dataset level.

    Args:
        stages: Names of the checkpoints.
        num_hidden: L+1.
        samples: Sample numbers (`Batch.indices`) to keep; others are ignored.
        width: d.

    Attributes:
        x: stage -> float32 (L+1, N, d) on the CPU; rows in the order of ``samples``.
    """

    def __init__(self, stages: Sequence[str], num_hidden: int, samples: Sequence[int], width: int) -> None:
        self.place = {sample: row for row, sample in enumerate(samples)}
        self._x = {s: torch.full((num_hidden, len(samples), width), torch.nan) for s in stages}
        self._arrivals = Arrivals()

    @property
    def x(self) -> dict[str, Tensor]:
        self._arrivals.settle()
        return self._x

    def feed(self, h: int, batch: Batch, states: Mapping[str, Tensor]) -> None:
        inside = [i for i, sample in enumerate(batch.indices) if sample in self.place]
        if not inside:
            return
        rows = torch.tensor([self.place[batch.indices[i]] for i in inside])
        mask = (batch.host or batch).attention_mask[inside].float()
        weights = (mask / mask.sum(dim=1, keepdim=True)).unsqueeze(1)
        for stage, z in states.items():
            pooled = (to_device(weights, z.device) @ _rows_of(z, inside).float()).squeeze(1)
            self._arrivals.put(self._x[stage], (h, rows), pooled)

    def part(self, samples: Sequence[int]) -> dict[str, Tensor]:
        rows = [self.place[s] for s in samples if s in self.place]
        return {stage: x[:, rows].contiguous() for stage, x in self.x.items()}

    def put(self, samples: Sequence[int], part: Mapping[str, Tensor]) -> None:
        rows = [self.place[s] for s in samples if s in self.place]
        for stage, x in part.items():
            self.x[stage][:, rows] = x


def _rows_of(z: Tensor, inside: Sequence[int]) -> Tensor:
    """Rows of a batch's states; all of them without a copy."""
    return z if len(inside) == z.shape[0] else z.index_select(0, to_device(torch.tensor(inside), z.device))


class TokenMetrics:
    """Token-level quantities, one number per sample, hidden and stage (or pair of stages).

    Args:
        stages: Names of the checkpoints.
        pairs: (later, earlier) stages to compare token by token.
        num_hidden: L+1.
        samples: Sample numbers to measure.
        single: metric -> function of states (B, T, d) and ``mask=`` (B, T) that gives (B).
        paired: metric -> the same of the states of the earlier and the later stage.

    Attributes:
        values: metric -> side -> float64 (L+1, n); sides are stage names, or "sft-base" for pairs.
    """

    def __init__(self, stages: Sequence[str], pairs: Sequence[tuple[str, str]], num_hidden: int,
                 samples: Sequence[int], *, single: Mapping[str, Callable[..., Tensor]],
                 paired: Mapping[str, Callable[..., Tensor]]) -> None:
        self.place = {sample: row for row, sample in enumerate(samples)}
        self.pairs = list(pairs)
        self._single, self._paired = single, paired

        def empty() -> Tensor:
            return torch.full((num_hidden, len(samples)), torch.nan, dtype=torch.float64)
        self._values: dict[str, dict[str, Tensor]] = {m: {s: empty() for s in stages} for m in single}
        self._values |= {m: {f"{a}-{b}": empty() for a, b in pairs} for m in paired}
        self._arrivals = Arrivals()

    @property
    def values(self) -> dict[str, dict[str, Tensor]]:
        self._arrivals.settle()
        return self._values

    def feed(self, h: int, batch: Batch, states: Mapping[str, Tensor]) -> None:
        inside = [i for i, sample in enumerate(batch.indices) if sample in self.place]
        if not inside:
            return
        rows = torch.tensor([self.place[batch.indices[i]] for i in inside])
        mask = (batch.host or batch).attention_mask[inside] > 0  # on the CPU, where lengths are read from it
        whole = {s: _rows_of(z, inside).float() for s, z in states.items()}
        for stage, z in whole.items():
            for metric, function in self._single.items():
                self._arrivals.put(self._values[metric][stage], (h, rows), function(z, mask=mask))
        for later, earlier in self.pairs:
            a, b = whole[earlier], whole[later]
            for metric, function in self._paired.items():
                self._arrivals.put(self._values[metric][f"{later}-{earlier}"], (h, rows),
                                   function(a, b.to(a.device), mask=mask))

    def part(self, samples: Sequence[int]) -> dict[str, Tensor]:
        rows = [self.place[s] for s in samples if s in self.place]
        return {f"{m}|{side}": v[:, rows].contiguous() for m, sides in self.values.items()
                for side, v in sides.items()}

    def put(self, samples: Sequence[int], part: Mapping[str, Tensor]) -> None:
        rows = [self.place[s] for s in samples if s in self.place]
        for key, values in part.items():
            metric, side = key.split("|")
            self.values[metric][side][:, rows] = values


class StoredStates:
    """Hidden states of some samples at some depths, without padding: what a later pass resumes from.

    Args:
        wanted: Stage -> which hidden 0..L.
        samples: Sample numbers to keep; others are ignored.
    """

    def __init__(self, wanted: Mapping[str, Collection[int]], samples: Sequence[int]) -> None:
        self.wanted = {stage: set(hs) for stage, hs in wanted.items()}
        self._samples = set(samples)
        self._kept: dict[str, Tensor] = {}

    def feed(self, h: int, batch: Batch, states: Mapping[str, Tensor]) -> None:
        for stage, hs in self.wanted.items():
            if h not in hs:
                continue
            for row, (sample, length) in enumerate(zip(batch.indices, batch.lengths.tolist(), strict=True)):
                if sample in self._samples:  # a copy: a view would keep the whole batch
                    self._kept[f"{stage}|{h}|{sample}"] = states[stage][row, :length].to("cpu", copy=True)

    def part(self, samples: Sequence[int]) -> dict[str, Tensor]:
        chosen = {str(s) for s in samples}
        return {key: z for key, z in self._kept.items() if key.rpartition("|")[2] in chosen}

    def put(self, samples: Sequence[int], part: Mapping[str, Tensor]) -> None:
        self._kept.update(part)

    def batch(self, stage: str, h: int, batch: Batch) -> Tensor:
        """Hidden h of a batch's rows, (B, T, d) on the batch's device, zero where there is padding."""
        rows = [self._kept[f"{stage}|{h}|{sample}"] for sample in batch.indices]
        found = torch.zeros((*batch.input_ids.shape, rows[0].shape[-1]), dtype=rows[0].dtype)
        for number, z in enumerate(rows):
            found[number, :len(z)] = z
        return found.to(batch.input_ids.device)
