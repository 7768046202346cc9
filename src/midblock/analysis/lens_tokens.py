"""What tuning changed, in tokens: what the mean change of the states speaks for, and where predictions moved most.

Activation difference lens [1]: delta_h is the mean over the counted tokens of sft's hidden state h minus base's;
through the base's final norm and head it is a distribution softmax(W_U norm(delta_h)), whose likely tokens often name
what a narrow fine-tuning was about. It is read as a direction: the final norm takes its length away.

The tokens with the largest KL(earlier || later) of the next-token distributions are those at which tuning shows.

References:
    [1] Minder et al., "Narrow Finetuning Leaves Clearly Readable Traces in Activation Differences",
        arXiv:2510.13900, 2025.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from midblock import stats
from midblock.capture.arrivals import Arrivals
from midblock.capture.scoring import CountedTokens, chunks_of_logits, counted_tokens
from midblock.data import Batch, TokenRow
from midblock.models import Anatomy, LoadedModel
from midblock.models.chain import side_of

__all__ = ["LargestKL", "MeanDifferences", "difference_tokens", "tokens_of_directions"]

_REPLICATES = 200
_CONTEXT = 12  # tokens before a position that are shown


class MeanDifferences:
    """Accumulator: each sample's sum over its counted tokens of later - earlier, at every chosen hidden state.

    Args:
        pairs: (later, earlier) stages.
        hidden: Hidden states, ascending.
        samples: Sample numbers.
        anatomy: Of one of the stages.

    Attributes:
        sums: ``sft-base`` -> float32 (H, N, d) on the CPU, in the order of ``hidden`` and ``samples``.
    """

    def __init__(self, pairs: Sequence[tuple[str, str]], hidden: Sequence[int], samples: Sequence[int],
                 anatomy: Anatomy) -> None:
        self._pairs, self._level = list(pairs), {h: i for i, h in enumerate(hidden)}
        self._place = {sample: i for i, sample in enumerate(samples)}
        self._sums = {side_of(p): torch.zeros(len(hidden), len(samples), anatomy.hidden_size) for p in pairs}
        self._anatomy, self._arrivals = anatomy, Arrivals()

    @property
    def sums(self) -> dict[str, Tensor]:
        self._arrivals.settle()
        return self._sums

    def feed(self, h: int, batch: Batch, states: Mapping[str, Tensor]) -> None:
        if h not in self._level:
            return
        place = torch.tensor([self._place[i] for i in batch.indices])
        for later, earlier in self._pairs:
            counted = counted_tokens(batch, states[earlier].device, self._anatomy)
            change = counted.of(states[later]).to(states[earlier].device).float() - counted.of(states[earlier]).float()
            total = torch.zeros(len(batch.indices), change.shape[1], device=change.device)
            self._arrivals.put(self._sums[side_of((later, earlier))], (self._level[h], place),
                               total.index_add_(0, counted.row, change))

    def part(self, samples: Sequence[int]) -> dict[str, Tensor]:
        rows = [self._place[s] for s in samples]
        return {side: v[:, rows].contiguous() for side, v in self.sums.items()}

    def put(self, samples: Sequence[int], part: Mapping[str, Tensor]) -> None:
        rows = [self._place[s] for s in samples]
        for side, value in part.items():
            self._sums[side][:, rows] = value


class LargestKL:
    """Each sample's counted tokens with the largest KL, and what both models would have said there.

    Args:
        pairs: (later, earlier) stages.
        samples: Sample numbers.
        size: How many of each sample.

    Attributes:
        found: ``sft-base`` -> float64 (N, size, 4) on the CPU: KL in nats, position, the earlier stage's most likely
            token and the later one's; NaN where a sample has fewer tokens.
    """

    def __init__(self, pairs: Sequence[tuple[str, str]], samples: Sequence[int], size: int) -> None:
        self._size, self._place = size, {sample: i for i, sample in enumerate(samples)}
        self._found = {side_of(p): torch.full((len(samples), size, 4), torch.nan, dtype=torch.float64) for p in pairs}
        self._arrivals = Arrivals()

    @property
    def found(self) -> dict[str, Tensor]:
        self._arrivals.settle()
        return self._found

    def keep(self, side: str, batch: Batch, counted: CountedTokens, kl: Tensor, earlier: Tensor, later: Tensor) -> None:
        """Take the KL (n,) and both most likely tokens (n,) of a batch's counted positions."""
        shape = batch.input_ids.shape
        columns = torch.full((shape[0] * shape[1], 3), torch.nan, dtype=torch.float64, device=kl.device)
        columns[counted.places] = torch.stack([kl.double(), earlier.double(), later.double()], dim=1)
        wide = columns.view(*shape, 3)
        best = wide[..., 0].nan_to_num(nan=-1.0).topk(min(self._size, shape[1]), dim=1).indices
        chosen = wide.gather(1, best.unsqueeze(-1).expand(-1, -1, 3))
        chosen = torch.cat([chosen[..., :1], best.unsqueeze(-1).double(), chosen[..., 1:]], dim=-1)
        place = torch.tensor([self._place[i] for i in batch.indices])
        self._arrivals.put(self._found[side], (place, slice(0, chosen.shape[1])), chosen)

    def part(self, samples: Sequence[int]) -> dict[str, Tensor]:
        """What it knows of some samples, by comparison."""
        rows = [self._place[s] for s in samples]
        return {side: v[rows] for side, v in self.found.items()}

    def put(self, samples: Sequence[int], part: Mapping[str, Tensor]) -> None:
        """Put saved values back."""
        rows = [self._place[s] for s in samples]
        for side, value in part.items():
            self._found[side][rows] = value

    def frame(self, rows: Sequence[TokenRow], tokenizer: Any) -> pd.DataFrame:
        """The tokens of all samples with the largest KL, largest first, ``size`` of each comparison.

        Returns:
            Columns ``stage``, ``kl``, ``sample``, ``position``, ``context`` (the text up to and with the token there),
            ``next`` (the token that follows), ``earlier`` and ``later`` (what both models find most likely).
        """
        by_place = {self._place[r.index]: r for r in rows}
        made = []
        for side, found in self.found.items():
            kl = found[..., 0].nan_to_num(nan=-1.0).flatten()
            for flat in kl.argsort(descending=True, stable=True)[:self._size].tolist():
                sample, number = divmod(flat, self._size)
                value, position, *best = found[sample, number].tolist()
                if not value >= 0:
                    break
                row, at = by_place[sample], int(position)
                made.append({"stage": side, "kl": value, "sample": row.index, "position": at,
                             "context": tokenizer.decode(row.ids[max(0, at + 1 - _CONTEXT):at + 1]),
                             "next": tokenizer.decode([row.ids[at + 1]]),
                             "earlier": tokenizer.decode([int(best[0])]), "later": tokenizer.decode([int(best[1])])})
        return pd.DataFrame(made, columns=["stage", "kl", "sample", "position", "context", "next", "earlier", "later"])


def tokens_of_directions(model: LoadedModel, directions: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Tokens that directions in a model's hidden states speak for: the largest of softmax(W_U norm(v)).

    Args:
        model: Whose final norm and head.
        directions: (R, d).
        k: How many tokens of each.

    Returns:
        Token ids (R, k), likeliest first, and their probabilities (R, k) in float64; both on the CPU.
    """
    ids, values = [], []
    for logits in _log_probabilities(model, directions):
        top = logits.topk(k, dim=1)
        ids.append(top.indices.cpu())
        values.append(top.values.double().exp().cpu())
    return torch.cat(ids), torch.cat(values)


def _log_probabilities(model: LoadedModel, directions: Tensor) -> Iterator[Tensor]:
    """Log-probabilities (n, V) of some directions at a time, float32."""
    # scaled, so that a small difference does not vanish in the norm's epsilon
    unit = directions.float() / directions.float().norm(dim=1, keepdim=True).clamp_min(1e-30) * directions.shape[1]**0.5
    streamed = model.streamed
    with torch.inference_mode(), contextlib.nullcontext() if streamed is None else streamed.part(streamed.head):
        for _, logits in chunks_of_logits(model.anatomy.unembed, unit.to(model.device, model.dtype),
                                          model.anatomy.vocab_size):
            yield logits.float().log_softmax(dim=1)


def difference_tokens(sums: Tensor, tokens: Tensor, model: LoadedModel, hidden: Sequence[int], k: int, *,
                      per_sample: bool, confidence: float, seed: int) -> pd.DataFrame:
    """The activation difference lens of one comparison, with intervals from resampled samples.

    Args:
        sums: Of `MeanDifferences`, (H, N, d).
        tokens: Counted tokens of each sample, (N,).
        model: The earlier stage.
        hidden: Numbers of the hidden states, (H,).
        k: Tokens of each.
        per_sample: Mean of the samples' own means, not over all tokens.
        confidence: Of the intervals (percentiles of 200 bootstrap replicates of the samples).
        seed: Of the resampling.

    Returns:
        Columns ``layer``, ``rank`` (from 1), ``token``, ``id``, ``probability``, ``low``, ``high``, ``n``. A hidden
        state without any difference has no rows; with one sample there is no interval.
    """
    counted = tokens > 0
    sums, tokens = sums[:, counted].double(), tokens[counted].double()
    n = len(tokens)
    if per_sample:
        sums, tokens = sums / tokens[:, None], torch.ones_like(tokens)
    weights = torch.ones(1, n, dtype=torch.float64)
    if n > 1:
        weights = torch.cat([weights, torch.from_numpy(stats.bootstrap_weights(n, _REPLICATES, seed))])
    rows = []
    for level, h in enumerate(hidden):
        if not n or not bool(sums[level].any()):
            continue
        deltas = (weights @ sums[level]) / (weights @ tokens)[:, None]
        ids, _ = tokens_of_directions(model, deltas[:1], k)
        drawn = torch.cat([logits[:, ids[0].to(logits.device)].double().exp().cpu()
                           for logits in _log_probabilities(model, deltas)]).numpy()
        tail = (1 - confidence) / 2
        low, high = (np.quantile(drawn[1:], q, axis=0) if n > 1 else np.full(k, np.nan) for q in (tail, 1 - tail))
        for rank, token in enumerate(ids[0].tolist()):
            rows.append({"layer": h, "rank": rank + 1, "token": model.tokenizer.decode([token]), "id": token,
                         "probability": float(drawn[0, rank]), "low": float(low[rank]), "high": float(high[rank]),
                         "n": n})
    return pd.DataFrame(rows, columns=["layer", "rank", "token", "id", "probability", "low", "high", "n"])
