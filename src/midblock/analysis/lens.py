"""Logit lens: what each hidden state already says about the next token (paper section 4.3, figure 3).

Hidden h is unembedded by the model's own final norm and head. The last hidden then gives
the model's own output exactly. The paper's public code norms the last hidden state twice
(transformers' ``hidden_states[-1]`` is already normed), which is what lowers its last
point; ``paper_code=True`` reproduces that, under the side name ``<stage> (normed twice)``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from torch import Tensor

from midblock import metrics
from midblock.analysis.lens_tokens import LargestKL, MeanDifferences, difference_tokens
from midblock.analysis.passes import Inputs, PassPart, Stages, prepare
from midblock.analysis.scores import TokenMean, exponential
from midblock.capture.accumulators import Accumulator
from midblock.capture.arrivals import Arrivals
from midblock.capture.scoring import CountedTokens, chunks_of_all_logits, counted_tokens, sums_by_row
from midblock.data import Batch, Dataset
from midblock.models import LoadedModel, shared_parts, shared_unembeddings
from midblock.models.chain import comparisons, side_of
from midblock.progress import Progress, silent
from midblock.results import UNNAMED, Answer, Estimate, Origin, Table, TableResult
from midblock.settings.lens import LensSettings

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["LensResult", "lens", "lens_part"]

_OWN = ("loss", "accuracy", "entropy", "gold_probability", "gold_rank")
_SHARED = ("kl", "top1_agreement", "top_k_overlap")
TWICE = " (normed twice)"


class _LensSums:
    """Accumulator: sums over each sample's counted tokens of every quantity at every hidden state, and traces.

    Attributes:
        values: "metric|side" -> float64 (L+1, n).
        tokens: Counted tokens of each sample, float64 (n,).
        traces: (sample, h, stage) -> most likely next token of each counted position.
    """

    def __init__(self, stages: Mapping[str, LoadedModel], pairs: Sequence[tuple[str, str]], hidden: Sequence[int],
                 samples: Sequence[int], settings: LensSettings) -> None:
        self.place = {sample: row for row, sample in enumerate(samples)}
        self._stages, self._pairs, self._hidden, self._settings = dict(stages), list(pairs), set(hidden), settings
        self.last = next(iter(stages.values())).anatomy.num_blocks
        self._counted: tuple[Batch, CountedTokens] | None = None
        self._arrivals = Arrivals()
        self.largest = LargestKL(self._pairs, samples, settings.kl_tokens)
        sides = list(stages) + ([s + TWICE for s in stages] if settings.paper_code else [])

        def empty() -> Tensor:
            return torch.full((self.last + 1, len(samples)), torch.nan, dtype=torch.float64)
        self._values = {f"{m}|{s}": empty() for m in _OWN for s in sides}
        self._values |= {f"{m}|{side_of(p)}": empty() for m in _SHARED for p in self._pairs}
        self.tokens = torch.zeros(len(samples), dtype=torch.float64)
        self.traced = list(samples)[:settings.trace]
        self._traces: dict[str, Tensor] = {}

    @property
    def values(self) -> dict[str, Tensor]:
        self._arrivals.settle()
        return self._values

    @property
    def traces(self) -> dict[str, Tensor]:
        self._arrivals.settle()
        return self._traces

    @functools.cached_property
    def _unembeddings(self) -> dict[str, int]:
        """Equal numbers: equal final norms and heads. Asked only while heads are in memory."""
        return dict(zip(self._stages, shared_unembeddings([m.anatomy for m in self._stages.values()]), strict=True))

    @functools.cached_property
    def _chains(self) -> dict[str, tuple[int, ...]]:
        """Everything before block 0, then every block: equal numbers mean equal parts."""
        shared = shared_parts([m.anatomy for m in self._stages.values()])
        chains = [(first, *blocks) for first, blocks in zip(shared.inputs, shared.blocks, strict=True)]
        return dict(zip(self._stages, chains, strict=True))

    def feed(self, h: int, batch: Batch, states: Mapping[str, Tensor]) -> None:
        if h not in self._hidden:
            return
        device = next(iter(states.values())).device
        if self._counted is None or self._counted[0] is not batch:
            self._counted = (batch, counted_tokens(batch, device, next(iter(self._stages.values())).anatomy))
        counted = self._counted[1]
        rows = {s: counted.of(z) for s, z in states.items()}
        got: dict[str, list[Tensor]] = {}
        tops: dict[str, list[Tensor]] = {s: [] for s in states}
        vocab = max(m.anatomy.vocab_size for m in self._stages.values())
        unembeddings: dict[str, Callable[[Tensor], Tensor]] = {
            s: m.anatomy.unembed for s, m in self._stages.items()}
        if h == self.last and self._settings.paper_code:
            for stage, model in self._stages.items():
                rows[stage + TWICE] = rows[stage]
                unembeddings[stage + TWICE] = lambda z, own=model.anatomy: own.unembed(own.normed(z))  # type: ignore[misc]
        twins = self._twins(h, rows)
        alone = {side: rows[side] for side in dict.fromkeys(twins.values())}
        for part, logits in chunks_of_all_logits({side: unembeddings[side] for side in alone}, alone, vocab):
            logits = {side: values.to(device) for side, values in logits.items()}  # of models over several devices
            self._chunk(logits, twins, counted.target[part], got, tops)
            del logits  # before the next ones are made
        place = torch.tensor([self.place[i] for i in batch.indices])
        for key, parts in got.items():
            self._arrivals.put(self._values[key], (h, place),
                               sums_by_row(counted.row, torch.cat(parts), len(batch.indices)))
        self.tokens[place] = counted.tokens
        best = {stage: torch.cat(parts) for stage, parts in tops.items()}
        ends = [0, *counted.tokens.long().cumsum(0).tolist()]  # positions come row by row
        for position, sample in enumerate(batch.indices):
            if sample in self.traced:
                for stage, found in best.items():
                    own = found[ends[position]:ends[position + 1]]
                    target = self._traces[f"{sample}|{h}|{stage}"] = torch.empty(len(own), dtype=torch.int64)
                    self._arrivals.put(target, slice(None), own)
        if h == self.last and self._settings.kl_tokens:
            for pair in self._pairs:
                self.largest.keep(side_of(pair), batch, counted, torch.cat(got[f"kl|{side_of(pair)}"]),
                                  best[pair[1]], best[pair[0]])

    def _twins(self, h: int, rows: Mapping[str, Tensor]) -> dict[str, str]:
        """Side -> the first side with equal states, final norm and head: before the first tuned block, say.

        Of states on an accelerator that is known from the weights below h, so that the device need not be asked.
        """
        by_weights = (next(iter(rows.values())).device.type != "cpu"
                      and all(m.streamed is None for m in self._stages.values()))

        def same(a: str, b: str) -> bool:
            one, other = (side.removesuffix(TWICE) for side in (a, b))
            if (a.endswith(TWICE) != b.endswith(TWICE) or self._unembeddings[one] != self._unembeddings[other]
                    or rows[a].device != rows[b].device):
                return False
            if by_weights:
                return self._chains[one][:h + 1] == self._chains[other][:h + 1]
            return torch.equal(rows[a], rows[b])
        found: dict[str, str] = {}
        for side in rows:
            found[side] = next((own for own in dict.fromkeys(found.values()) if same(own, side)), side)
        return found

    def _chunk(self, logits: Mapping[str, Tensor], twins: Mapping[str, str], target: Tensor,
               got: dict[str, list[Tensor]], tops: dict[str, list[Tensor]]) -> None:
        # the models that each is compared with, as a tuned one with its base: KL(earlier || later)
        against = {side: list(dict.fromkeys(twins[later] for later, earlier in self._pairs if twins[earlier] == side))
                   for side in logits}
        sums = {side: metrics.row_sums(values, target, [logits[q] for q in against[side]])
                for side, values in logits.items()}
        scored = {side: metrics.statistics_of(of) for side, of in sums.items()}
        for side, twin in twins.items():
            own = scored[twin]
            for metric, value in (("loss", own.loss), ("entropy", own.entropy),
                                  ("gold_probability", own.probability), ("gold_rank", own.rank.float())):
                got.setdefault(f"{metric}|{side}", []).append(value)
        for later, earlier in self._pairs:
            p, q = twins[earlier], twins[later]
            got.setdefault(f"kl|{side_of((later, earlier))}", []).append(
                metrics.kl_of(sums[p], sums[q], against[p].index(q)))
        # alone, a model needs its most likely token only
        size = self._settings.top_k if self._pairs else 1
        found = {side: metrics.top_k(values, sums[side].maxima, size if side in self._stages else 1)
                 for side, values in logits.items()}
        best = {side: found[own] for side, own in twins.items()}
        for side in twins:
            got.setdefault(f"accuracy|{side}", []).append((best[side][:, 0] == target).float())
        for stage in self._stages:
            tops[stage].append(best[stage][:, 0])
        for later, earlier in self._pairs:
            side = side_of((later, earlier))
            got.setdefault(f"top1_agreement|{side}", []).append(
                (best[later][:, 0] == best[earlier][:, 0]).float())
            got.setdefault(f"top_k_overlap|{side}", []).append(metrics.top_k_overlap(best[later], best[earlier]))

    def part(self, samples: Sequence[int]) -> dict[str, Tensor]:
        rows = [self.place[s] for s in samples if s in self.place]
        saved = {k: v[:, rows].contiguous() for k, v in self.values.items()}
        saved["tokens"] = self.tokens[rows]
        chosen = {str(s) for s in samples}
        saved |= {f"kl-tokens|{side}": v for side, v in self.largest.part(samples).items()}
        return saved | {f"trace|{k}": v for k, v in self.traces.items() if k.split("|")[0] in chosen}

    def put(self, samples: Sequence[int], part: Mapping[str, Tensor]) -> None:
        rows = [self.place[s] for s in samples if s in self.place]
        for key, value in part.items():
            if key == "tokens":
                self.tokens[rows] = value
            elif key.startswith("trace|"):
                self._traces[key.removeprefix("trace|")] = value
            elif key.startswith("kl-tokens|"):
                self.largest.put(samples, {key.removeprefix("kl-tokens|"): value})
            else:
                self._values[key][:, rows] = value


_SAME_NATS = 1e-6
"""Predictions whose KL divergence is below this are the same."""


@dataclass
class LensResult(TableResult):
    """Read-out of every hidden state, per stage and between stages."""

    table: Table
    stages: list[str]
    num_hidden: int
    settings: LensSettings
    counts: dict[str, Any] = field(default_factory=dict)
    traces: list[dict[str, Any]] = field(default_factory=list)
    """One row per traced sample, position, hidden and stage: position, token, next, predicted."""
    difference_tokens: pd.DataFrame = field(default_factory=pd.DataFrame)
    """Tokens that the mean difference of the states speaks for (`lens_tokens.difference_tokens`), per ``stage``."""
    kl_tokens: pd.DataFrame = field(default_factory=pd.DataFrame)
    """Tokens of the data with the largest KL of the last hidden state (`lens_tokens.LargestKL.frame`)."""
    origin: Origin = UNNAMED

    def emergence(self, stage: str, share: float = 0.5) -> int | None:
        """First hidden state whose accuracy reaches ``share`` of the last one's."""
        frame = self.frame
        part = frame[(frame["metric"] == "accuracy") & (frame["side"] == stage)].sort_values("layer")
        if part.empty or not part["value"].iloc[-1] > 0:
            return None
        reached = part[part["value"] >= share * part["value"].iloc[-1]]
        return int(reached["layer"].iloc[0])

    def _at(self, metric: str, side: str, layer: int, column: str = "side") -> Estimate:
        frame = self.frame
        row = frame[(frame["metric"] == metric) & (frame[column] == side) & (frame["layer"] == layer)].iloc[0]
        return Estimate(row["value"], row["low"], row["high"], int(row["n"]))

    def answer(self) -> Answer:
        """How well the last hidden state predicts, from where on, and what tuning changed there."""
        last, first = self.num_hidden - 1, self.stages[0]
        own, where = self._at("accuracy", first, last), self.emergence(self.stages[-1])
        at = "" if where is None else (f"Half of the last accuracy is there from hidden {where} of {last} on"
                                       f"{' (of those read)' if self.settings.every > 1 else ''}. ")
        means = f"{at}The lens shows where predictions form, not which blocks to tune."
        base = f"{first} {own.value:.3g} [{own.low:.3g}, {own.high:.3g}]"
        if len(self.stages) == 1:
            return Answer(f"Next-token accuracy of the last hidden state: {base}, n = {own.n} samples.", means,
                          self.origin.words("locate"))
        pair = comparisons(self.stages)[0]
        kl = self.frame[(self.frame["metric"] == "kl") & (self.frame["stage"] == side_of(pair))]["value"]
        if not (kl.abs() > _SAME_NATS).any():
            return Answer(f"{side_of(pair)}: no change in the predictions of any hidden state read, n = {own.n} "
                          f"samples; accuracy at the last: {base}.",
                          "Both models predict the same on these samples: there is nothing to locate.")
        tuned = self._at("accuracy", pair[0], last)
        change = self.frame[(self.frame["metric"] == "accuracy") & (self.frame["side"] == "difference")
                            & (self.frame["stage"] == side_of(pair)) & (self.frame["layer"] == last)].iloc[0]
        return Answer(f"Next-token accuracy of the last hidden state: {base}, {pair[0]} {tuned.value:.3g}, change "
                      f"{change['value']:+.3g} [{change['low']:+.3g}, {change['high']:+.3g}], n = {own.n} samples.",
                      means, self.origin.words("swap"))

    def details(self) -> list[str]:
        """Where the prediction emerges, and where the stages part."""
        frame, at = self.frame, self._at
        last = self.num_hidden - 1
        lines = []
        if self.settings.every > 1:
            read = sorted(int(h) for h in frame["layer"].unique())
            lines.append(f"Read: {len(read)} of {self.num_hidden} hidden states (one in {self.settings.every}, and the "
                         "last). What happens between two of them was not looked at.")
        for stage in self.stages:
            final, where = at("accuracy", stage, last), self.emergence(stage)
            lines.append(f"{stage}: next-token accuracy {final.value:.4f} [{final.low:.4f}, {final.high:.4f}] at the "
                         f"last hidden state ({final.n} samples)"
                         + ("." if where is None else
                            f"; half of it is reached at hidden {where} (depth {where / last:.2f})."))
            if self.settings.paper_code:
                twice = at("accuracy", stage + TWICE, last)
                lines.append(f"{stage}: with the last hidden state normed twice, as the paper's code does, "
                             f"{twice.value:.4f} [{twice.low:.4f}, {twice.high:.4f}].")
        for pair in comparisons(self.stages):
            kl = frame[(frame["metric"] == "kl") & (frame["stage"] == side_of(pair))]
            top = kl.loc[kl["value"].idxmax()]
            if not top["value"] > _SAME_NATS:
                lines.append(f"{side_of(pair)}: the same predictions at every hidden state read.")
                continue
            final = at("top1_agreement", side_of(pair), last, "stage")
            lines.append(f"{side_of(pair)}: largest KL({pair[1]} || {pair[0]}) {top['value']:.4g} nats at hidden "
                         f"{int(top['layer'])}; the most likely token agrees on {final.value:.1%} of positions at "
                         "the last.")
            lines += self._token_lines(side_of(pair))
        return lines

    def tables(self) -> dict[str, pd.DataFrame]:
        """``trace``, ``difference_tokens`` and ``kl_tokens``."""
        return {"trace": pd.DataFrame(self.traces), "difference_tokens": self.difference_tokens,
                "kl_tokens": self.kl_tokens}

    def _token_lines(self, stage: str) -> list[str]:
        lines = []
        spoken, moved = (f[f["stage"] == stage] if len(f) else f for f in (self.difference_tokens, self.kl_tokens))
        if len(spoken):
            at = int(spoken.loc[spoken["probability"].idxmax(), "layer"])
            own = spoken[spoken["layer"] == at]
            lines.append(f"{stage}: the mean difference speaks most clearly at hidden {at}, for "
                         + ", ".join(f"{t!r} ({p:.2g})" for t, p in zip(own["token"], own["probability"], strict=True))
                         + ".")
        if len(moved):
            common = moved["next"].value_counts().head(3)
            lines.append(f"{stage}: predictions moved most (KL {moved['kl'].iloc[0]:.3g} nats) after "
                         f"{moved['context'].iloc[0][-40:]!r}: {moved['earlier'].iloc[0]!r} became "
                         f"{moved['later'].iloc[0]!r}; of the {len(moved)} such tokens most are followed by "
                         + ", ".join(f"{t!r} ({n})" for t, n in common.items()) + ".")
        return lines

    def figures(self) -> dict[str, Figure]:
        """Accuracy, loss, entropy and gold token over depth; agreement over depth; tokens of the mean difference."""
        from midblock.figures import depth_lines, heatmap

        frame = self.frame
        made: dict[str, Figure] = {}
        for pair in comparisons(self.stages) or [(self.stages[0], self.stages[0])]:
            suffix = f"-{side_of(pair)}" if len(self.stages) > 2 else ""
            sides = [*pair, *(s + TWICE for s in pair)]
            wanted = frame["side"].isin(sides)
            if "stage" in frame:  # with one model nothing is compared
                wanted |= frame["stage"] == side_of(pair)
            chosen = frame[wanted]
            # a curve: the state before the last one is the same either way
            before = chosen["layer"] == max((h for h in chosen["layer"] if h < self.num_hidden - 1), default=-1)
            twice = [chosen[before & (chosen["side"] == s)].assign(side=s + TWICE) for s in dict.fromkeys(pair)
                     if (chosen["side"] == s + TWICE).any()]
            chosen = pd.concat([chosen, *twice], ignore_index=True)
            made[f"lens{suffix}"] = depth_lines(chosen, ["accuracy", "loss", "entropy", "gold_probability"],
                                                title="Logit lens: predictions of each hidden state")
            if (chosen["metric"] == "kl").any():
                made[f"agreement{suffix}"] = depth_lines(chosen, list(_SHARED),
                                                         title=f"Agreement of {pair[0]} with {pair[1]}")
            spoken = self.difference_tokens
            spoken = spoken[spoken["stage"] == side_of(pair)] if len(spoken) else spoken
            if len(spoken):
                wide = spoken.sort_values("layer", ascending=False).pivot(index="layer", columns="rank")
                wide = wide.sort_index(ascending=False)
                made[f"difference-tokens{suffix}"] = heatmap(
                    wide["probability"].to_numpy(), list(wide.index), list(wide["probability"].columns),
                    title=f"Tokens that the mean difference {side_of(pair)} speaks for", label="probability",
                    row_label="hidden state", column_label="rank", limits=(0.0, 1.0), texts=wide["token"].to_numpy())
        return made


def lens(stages: Sequence[LoadedModel | str] | LoadedModel | str, sft: LoadedModel | str | None = None, *,
         data: Dataset | str, names: Sequence[str] | None = None, state_folder: Path | None = None,
         progress: Progress = silent, settings: LensSettings | None = None, **overrides: Any) -> LensResult:
    """Read every hidden state out as next-token prediction.

    Logits exist for a bounded number of positions at a time; all stages go through the blocks
    in lockstep, so that their agreement is measured at once.

    Args:
        stages: One model, a base (then give ``sft``), or a chain.
        sft: The tuned checkpoint, where ``stages`` is a single base.
        data: A data set or a D spec.
        names: Stage names; default base, sft, dpo, rlvr.
        state_folder: Where an interrupted pass keeps what it has, and resumes from.
        progress: Told how far the pass is, in tokens.
        settings: What to unembed and score.
        **overrides: Single fields of `LensSettings`.

    Returns:
        Rows of kind ``hidden``: ``loss`` (nats), ``accuracy``, ``perplexity``, ``entropy`` (nats),
        ``gold_probability`` and ``gold_rank`` (0 = most likely) per stage; their differences; and
        ``kl`` (nats, earlier from later), ``top1_agreement``, ``top_k_overlap`` per comparison. Each is the
        mean over all counted tokens, with an interval from resampled samples, or with
        ``per_sample_mean`` the mean of the samples' own means (column ``mean_over``: ``tokens``, ``samples``);
        perplexity is exp(loss), and the ratio of two is exp of the loss' difference.

    Raises:
        SettingsError: a setting out of range.
        DataError: no usable sample.
    """
    return lens_part(stages, sft, data=data, names=names, settings=settings,
                     **overrides).run(state_folder=state_folder, progress=progress)


def lens_part(stages: Stages, sft: LoadedModel | str | None = None, *, data: Dataset | str,
              names: Sequence[str] | None = None, settings: LensSettings | None = None, **overrides: Any
              ) -> PassPart[LensResult]:
    """`lens` as a part of a pass that others may share; arguments and errors are its own."""
    chosen = LensSettings.of(settings, overrides)
    inputs = prepare(stages, sft, data=data, settings=chosen, names=names, least=1, streams=True)
    last = inputs.first.anatomy.num_blocks
    hidden = sorted({*range(0, last + 1, chosen.every), last})
    found = _LensSums(inputs.stages, inputs.pairs, hidden, [r.index for r in inputs.rows], chosen)
    accumulators: dict[str, Accumulator] = {"lens": found}
    differences = MeanDifferences(inputs.pairs, hidden, [r.index for r in inputs.rows],
                                  inputs.first.anatomy)
    if chosen.difference_tokens:
        accumulators["differences"] = differences

    def finish() -> LensResult:
        table = inputs.named(_table(found, inputs.names, inputs.pairs, hidden, chosen))
        return LensResult(table, inputs.names, last + 1, chosen,
                          inputs.counts(counted_tokens=int(found.tokens.sum())),
                          _trace_rows(found, inputs.rows, inputs.first.tokenizer),
                          _spoken(differences, found.tokens, inputs, hidden, chosen),
                          found.largest.frame(inputs.rows, inputs.first.tokenizer), inputs.origin)

    return PassPart(inputs, [inputs.rows], accumulators, finish, what="logit lens", heads=True)


def _spoken(differences: MeanDifferences, tokens: Tensor, inputs: Inputs, hidden: Sequence[int],
            settings: LensSettings) -> pd.DataFrame:
    """`difference_tokens` of every comparison."""
    if not settings.difference_tokens or not inputs.pairs:
        return pd.DataFrame()
    made = []
    for later, earlier in inputs.pairs:
        model = inputs.stages[earlier]
        frame = difference_tokens(
            differences.sums[side_of((later, earlier))], tokens, model, hidden,
            min(settings.difference_tokens, model.anatomy.vocab_size), per_sample=settings.per_sample_mean,
            confidence=settings.confidence, seed=settings.seed)
        frame.insert(0, "stage", side_of((later, earlier)))
        made.append(frame)
    return pd.concat(made, ignore_index=True)


def _table(found: _LensSums, keys: Sequence[str], pairs: Sequence[tuple[str, str]], hidden: Sequence[int],
           settings: LensSettings) -> Table:
    table = Table()
    mean = TokenMean(per_sample=settings.per_sample_mean, confidence=settings.confidence, seed=settings.seed)

    def add(h: int, metric: str, side: str, sums: Tensor, **extra: Any) -> Estimate:
        interval = mean(sums.numpy(), found.tokens.numpy())
        table.add("hidden", h, metric, side, interval, mean_over=mean.over, **extra)
        return interval

    def value(metric: str, side: str, h: int) -> Tensor:
        return found.values[f"{metric}|{side}"][h]

    for h in hidden:
        sides = list(keys)
        if settings.paper_code and h == found.last:
            sides += [k + TWICE for k in keys]
        for side in sides:
            for metric in _OWN:
                interval = add(h, metric, side, value(metric, side, h))
                if metric == "loss":
                    table.add("hidden", h, "perplexity", side, exponential(interval), mean_over=mean.over)
        for later, earlier in pairs:
            extra: dict[str, Any] = {"stage": side_of((later, earlier))}
            for metric in _OWN:
                interval = add(h, metric, "difference", value(metric, later, h) - value(metric, earlier, h), **extra)
                if metric == "loss":  # the ratio of perplexities, exactly paired
                    table.add("hidden", h, "perplexity_ratio", "pair", exponential(interval), mean_over=mean.over,
                              **extra)
            for metric in _SHARED:
                add(h, metric, "pair", value(metric, side_of((later, earlier)), h), **extra)
    return table


def _trace_rows(found: _LensSums, rows: Sequence[Any], tokenizer: Any) -> list[dict[str, Any]]:
    made = []
    ids = {r.index: r for r in rows}
    for key, predicted in sorted(found.traces.items(), key=lambda kv: tuple(map(int, kv[0].split("|")[:2]))):
        sample, h, stage = key.split("|", 2)
        row = ids[int(sample)]
        spans = row.supervised or ((0, len(row.ids)),)
        positions = [t - 1 for start, stop in spans for t in range(max(1, start), stop)]
        for position, token in zip(positions, predicted.tolist(), strict=True):
            made.append({"sample": int(sample), "hidden": int(h), "stage": stage, "position": position,
                         "token": tokenizer.decode([row.ids[position]]),
                         "next": tokenizer.decode([row.ids[position + 1]]),
                         "predicted": tokenizer.decode([token])})
    return made
