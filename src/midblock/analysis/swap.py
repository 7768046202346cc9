"""Layer swapping: segments of the tuned model in the base, and the reverse (paper section 4.3, figure 6).

Nothing is copied: a swapped block is the other model's block, called in its place
(`midblock.capture.swap_blocks`). A swap leaves everything before its first block unchanged, so it is run from
there on hidden states already computed (`midblock.capture.resume_at`), and both heads
read the same last hidden state. K single swaps thus cost (K+1)/2 body passes instead of 2K, and fewer where
the tuning left blocks, embeddings or head alone (`midblock.models.shared_parts`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from midblock import ranks
from midblock.analysis.passes import Inputs, PassPart, Stages, prepare
from midblock.analysis.scores import SampleScores, TokenMean, add_changes, add_scores
from midblock.analysis.swap_streamed import swap_block_by_block
from midblock.capture import RowScores, run_blocks, score_hidden, swap_blocks, why_not_resume
from midblock.capture.accumulators import StoredStates
from midblock.data import Batch, Dataset
from midblock.errors import SettingsError
from midblock.models import LoadedModel, SharedParts, shared_parts
from midblock.models.chain import comparisons, side_of
from midblock.models.inference import many_unembeddings
from midblock.progress import Progress, silent
from midblock.quantities import label_of
from midblock.results import UNNAMED, Answer, Origin, Table, TableResult
from midblock.settings.swap import SwapSettings

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

__all__ = ["SwapResult", "swap", "swap_part"]


_SAME_NATS = 1e-9
"""Scores under two heads that differ by less are drawn once."""


@dataclass
class SwapResult(TableResult):
    """Scores of every swap with both heads, paired with the unswapped model."""

    table: Table
    stages: list[str]
    settings: SwapSettings
    counts: dict[str, Any] = field(default_factory=dict)
    origin: Origin = UNNAMED

    def changes(self, metric: str = "loss", *, recipient: str | None = None, donor: str | None = None) -> pd.DataFrame:
        """Paired changes of one recipient with its own head, one row a mask.

        Args:
            metric: ``loss``, ``accuracy`` or ``perplexity``.
            recipient: Default the first stage.
            donor: Default the second stage.
        """
        recipient, donor = recipient or self.stages[0], donor or self.stages[1]
        frame = self.frame
        return frame[(frame["metric"] == metric) & (frame["side"] == "difference") & (frame["head"] == recipient)
                     & (frame["recipient"] == recipient) & (frame["donor"] == donor)]

    def answer(self) -> Answer:
        """Which tuned segment, placed in the base, lowers the loss most, and which carry part of the gain."""
        base, tuned = self.stages[:2]
        part = self.changes()
        n = int(part["n"].iloc[0])
        if not part["value"].abs().gt(0).any():
            return Answer(f"No change: every segment of {tuned} in {base} leaves the loss as it is, n = {n} samples.",
                          "Both models compute the same on these samples: there is nothing to locate.")
        best = part.loc[part["value"].idxmin()]
        carrying = list(part.loc[part["high"] < 0, "layer"])
        found = (f"{tuned}'s segment {best['layer']} in {base} changes the loss most: {best['value']:+.4f} nats a "
                 f"token [{best['low']:+.4f}, {best['high']:+.4f}], n = {n} samples.")
        again = self.origin.words("swap", "--samples", str(4 * n))
        if not carrying:
            return Answer(found, "No swapped segment lowers the loss beyond chance on so few samples; take more.",
                          again)
        if len(carrying) == len(part) > 1 and _indistinct(part):
            means = "Every segment carries part of what tuning gained, none clearly most: no block stands out here."
        else:
            means = (f"{', '.join(carrying)} carr{'ies' if len(carrying) == 1 else 'y'} part of what tuning gained: "
                     "candidates for --mask, which only a sweep can prove.")
        return Answer(found, means, self.origin.words("tune", "--mask", str(best["layer"]), "--dry-run", models=1))

    def details(self) -> list[str]:
        """Which swap helps or harms most, per recipient and head."""
        frame = self.frame
        lines = []
        for later, earlier in comparisons(self.stages):
            for recipient, donor in ((earlier, later), (later, earlier)):
                part = frame[(frame["metric"] == "loss") & (frame["side"] == "difference")
                             & (frame["recipient"] == recipient) & (frame["donor"] == donor)
                             & (frame["head"] == recipient)]
                if not part["value"].abs().gt(0).any():
                    lines.append(f"{donor} segments in {recipient} ({recipient} head): none changes the loss.")
                    continue
                best, worst = part.loc[part["value"].idxmin()], part.loc[part["value"].idxmax()]

                def told(row: Any) -> str:
                    return f"{row['layer']} ({row['value']:+.4f} nats [{row['low']:+.4f}, {row['high']:+.4f}])"
                lines.append(f"{donor} segments in {recipient} ({recipient} head): the loss falls most or rises least "
                             f"with {told(best)}, rises most with {told(worst)}; n = {int(best['n'])} samples.")
        return lines

    def figures(self) -> dict[str, Figure]:
        """Paired change of loss and accuracy by mask, for each recipient and head."""
        from midblock.figures import segment_bars

        frame = self.frame
        frame = frame[frame["side"] == "difference"]
        made = {}
        for metric in ("loss", "accuracy"):
            part = frame[frame["metric"] == metric]
            heads = part.groupby(["recipient", "donor", "layer"])["value"].agg(lambda v: float(np.ptp(v)))
            if (heads < _SAME_NATS).all():  # tied or unchanged heads: one of the two says it
                part = part[part["head"] == part["recipient"]]
                part = part.assign(series=part["donor"] + " in " + part["recipient"])
            else:
                part = part.assign(series=part["donor"] + " in " + part["recipient"] + ", " + part["head"] + " head")
            made[f"swap-{metric}"] = segment_bars(
                part, metric=metric, hue="series", label_title="segments swapped (input side first)",
                value_label=label_of(metric, change=True),
                title=f"{label_of(metric, unit='')} with segments of another model, against the model as it is")
        return made


def _indistinct(part: pd.DataFrame) -> bool:
    """Whether every interval overlaps that of the best."""
    best = part.loc[part["value"].idxmin()]
    return bool((part["low"] <= best["high"]).all())


def swap(stages: Sequence[LoadedModel | str] | LoadedModel | str, sft: LoadedModel | str | None = None, *,
         data: Dataset | str, names: Sequence[str] | None = None, progress: Progress = silent,
         settings: SwapSettings | None = None, **overrides: Any) -> SwapResult:
    """Score every segment of one model placed into the other, both ways and with either head.

    Args:
        stages: The base (then give ``sft``), or a chain (each comparison of it is swapped).
        sft: The tuned checkpoint, where ``stages`` is a single base.
        data: A data set or a D spec.
        names: Stage names.
        progress: Told how many blocks have been run.
        settings: What to swap and score.
        **overrides: Single fields of `SwapSettings`.

    Returns:
        Rows of kind ``segment`` (layer = mask; zeros = nothing swapped) with columns ``recipient``,
        ``donor``, ``head``: ``loss`` (nats), ``accuracy`` and ``perplexity`` of the swapped model (side = the
        recipient's name), and their paired difference from the unswapped recipient with the same
        head (side ``difference``). Means are over all counted tokens, intervals from resampled
        samples (`midblock.analysis.scores`).

    Raises:
        BlockRangeError: a mask that does not fit.
        DataError: no usable sample.
    """
    chosen = SwapSettings.of(settings, overrides)
    inputs = prepare(stages, sft, data=data, settings=chosen, names=names, streams=True)
    return _prepared(inputs, chosen).measure(progress)


def swap_part(stages: Stages, sft: LoadedModel | str | None = None, *, data: Dataset | str,
              names: Sequence[str] | None = None, progress: Progress = silent,
              settings: SwapSettings | None = None, limit_bytes: int | None = None, **overrides: Any
              ) -> PassPart[SwapResult]:
    """`swap` on a pass that others share: the models as they are then need no pass of their own.

    The pass stores their hidden states where swaps begin, and the last ones, which the swaps go on from. Arguments and
    errors are those of `swap`.

    Args:
        stages: As `swap`.
        sft: As `swap`.
        data: As `swap`.
        names: As `swap`.
        progress: As `swap`.
        settings: As `swap`.
        limit_bytes: Most that may be stored; where more would be, nothing is and the models are run anew.
        **overrides: As `swap`.
    """
    chosen = SwapSettings.of(settings, overrides)
    ready = _prepared(prepare(stages, sft, data=data, settings=chosen, names=names, streams=True), chosen)
    inputs = ready.inputs
    wanted = ready.borders()
    rows = sum(len(row) for row in inputs.rows) * sum(map(len, wanted.values()))
    size = rows * inputs.first.anatomy.hidden_size * inputs.first.dtype.itemsize
    if not wanted or (limit_bytes is not None and size > limit_bytes):
        return PassPart(inputs, [], {}, lambda: ready.measure(progress))
    stored = StoredStates(wanted, [row.index for row in inputs.rows])
    return PassPart(inputs, [inputs.rows], {"stored": stored}, lambda: ready.measure(progress, stored))


@dataclass
class _Prepared:
    """Everything that is known before a model is run."""

    inputs: Inputs
    settings: SwapSettings
    masks: list[str]
    parts: SharedParts | None = None
    runs: list[_Run] = field(default_factory=list)
    not_resumed: list[str] = field(default_factory=list)
    swaps: dict[tuple[str, str, str], list[int]] = field(default_factory=dict)
    """Of streamed models: (recipient, donor, mask) -> blocks, which are swapped block by block."""

    def borders(self) -> dict[str, set[int]]:
        """Stage -> hidden states of the model as it is that swaps begin from, and its last."""
        last = self.inputs.first.anatomy.num_blocks
        return {run.recipient: {last, *self._wanted(number)} for number, run in enumerate(self.runs) if not run.blocks}

    def _wanted(self, number: int) -> set[int]:
        return {later.start for later in self.runs if later.source == number}

    def measure(self, progress: Progress, stored: StoredStates | None = None) -> SwapResult:
        """Run what is not stored, score everything."""
        inputs, stages = self.inputs, self.inputs.stages
        if self.parts is None:
            return self._result(swap_block_by_block(inputs, self.swaps, progress))
        last_hidden = inputs.first.anatomy.num_blocks
        scores: dict[tuple[str, str, str, str], SampleScores] = {}
        batches = ranks.share(inputs.batches())
        ahead = [0 if stored is not None and not run.blocks else last_hidden - run.start for run in self.runs]
        total, done = max(1, sum(ahead) * len(batches)), 0
        with torch.inference_mode(), many_unembeddings(m.anatomy for m in stages.values()):
            for batch in batches:
                states: list[dict[int, Tensor]] = []  # per run, what later ones resume from
                for number, run in enumerate(self.runs):
                    wanted = self._wanted(number)
                    if stored is not None and not run.blocks:
                        last = stored.batch(run.recipient, last_hidden, batch).to(stages[run.recipient].device)
                        states.append({h: stored.batch(run.recipient, h, batch) for h in wanted})
                    else:
                        last, kept = _last_hidden(run, batch, stages, states, wanted)
                        states.append(kept)
                    for key, found in _scored(run, batch, last, stages, self.parts).items():
                        scores.setdefault(key, SampleScores([r.index for r in inputs.rows])).put(batch, found)
                    done += ahead[number]
                    progress("swap", done, total, note=f"{run.donor} in {run.recipient}")
        return self._result(scores)

    def _result(self, scores: dict[tuple[str, str, str, str], SampleScores]) -> SwapResult:
        """The table, from the scores that all processes have found."""
        inputs = self.inputs
        for theirs in ranks.to_first(scores)[1:]:
            for key, found in theirs.items():
                scores.setdefault(key, SampleScores([r.index for r in inputs.rows])).add(found)

        def made() -> SwapResult:
            table = inputs.named(_table(scores, self.masks, self.masks[0], self.settings))
            return SwapResult(table, inputs.names, self.settings,
                              inputs.counts(**({"not_resumed": self.not_resumed} if self.not_resumed else {})),
                              inputs.origin)
        return ranks.first(made)


def _prepared(inputs: Inputs, chosen: SwapSettings) -> _Prepared:
    """The runs that answer every swap.

    Raises:
        BlockRangeError: a mask that does not fit.
        SettingsError: masks of different length.
    """
    keys, models = inputs.names, list(inputs.stages.values())
    num_blocks = models[0].anatomy.num_blocks
    masks = {m: chosen.blocks_of(m, num_blocks) for m in chosen.all_masks()}
    if len({len(m) for m in masks}) != 1:
        raise SettingsError(f"masks of one length are needed, got {', '.join(masks)}.")
    directions = [d for later, earlier in inputs.pairs for d in ((earlier, later), (later, earlier))]
    nothing = "0" * len(next(iter(masks)))
    if any(m.streamed is not None for m in models):
        return _Prepared(inputs, chosen, [nothing, *masks], swaps={
            (recipient, donor, mask): blocks for recipient, donor in directions
            for mask, blocks in {nothing: [], **masks}.items()})
    parts = shared_parts([m.anatomy for m in models])
    runs = _plan(parts, keys, directions, {nothing: [], **masks})
    return _Prepared(inputs, chosen, [nothing, *masks], parts, runs, _drop_inexact_resumes(runs, inputs.stages))


@dataclass
class _Run:
    """One chain of blocks that is really run, and every swap that it answers."""

    recipient: str
    donor: str
    blocks: list[int]
    parts: tuple[int, ...]
    """Whose input and blocks are run, as numbers of `SharedParts`."""
    serves: list[tuple[str, str, str]]
    """(recipient, donor, mask)."""
    source: int | None = None
    """The earlier run with the longest common beginning."""
    start: int = 0


def _plan(parts: SharedParts, keys: Sequence[str], directions: Sequence[tuple[str, str]],
          masks: Mapping[str, Sequence[int]]) -> list[_Run]:
    """The fewest block runs: equal chains once, every other one from where it leaves an earlier one.

    Blocks that two models have in common make swaps equal (a segment that the tuning left alone) or
    let one model's run begin behind them.
    """
    runs: dict[tuple[int, ...], _Run] = {}
    for recipient, donor in directions:
        own, other = keys.index(recipient), keys.index(donor)
        for mask, blocks in masks.items():
            swapped = set(blocks)
            chain = (parts.inputs[own], *(b[other if i in swapped else own]
                                          for i, b in enumerate(zip(*parts.blocks, strict=True))))
            run = runs.setdefault(chain, _Run(recipient, donor, list(blocks), chain, []))
            run.serves.append((recipient, donor, mask))
    made = list(runs.values())
    for number, run in enumerate(made):
        for i, earlier in enumerate(made[:number]):
            common = next(n for n, (a, b) in enumerate(zip(run.parts, earlier.parts, strict=True)) if a != b)
            if common - 1 > run.start:  # the first part is the input: hidden h stands behind h + 1 parts
                run.source, run.start = i, common - 1
    return made


def _drop_inexact_resumes(runs: Sequence[_Run], stages: Mapping[str, LoadedModel]) -> list[str]:
    """Let the runs that cannot be resumed exactly begin at block 0; why, for ``run.json``."""
    reasons = []
    for run in runs:
        model = stages[run.recipient]
        if run.source is not None and (reason := why_not_resume(model.model, model.anatomy, [run.start])[run.start]):
            reasons.append(f"{run.recipient} from block {run.start}: {reason}")
            run.source, run.start = None, 0
    return list(dict.fromkeys(reasons))


def _last_hidden(run: _Run, batch: Batch, stages: Mapping[str, LoadedModel], states: Sequence[Mapping[int, Tensor]],
                 wanted: set[int]) -> tuple[Tensor, dict[int, Tensor]]:
    """Hidden L of a run, and the hidden states that later runs resume from."""
    own = stages[run.recipient]
    kept: dict[int, Tensor] = {}

    def remember(h: int, z: Tensor) -> None:
        if h in wanted:
            kept[h] = z

    before = None if run.source is None else states[run.source][run.start].to(own.device)
    with swap_blocks(own.anatomy, stages[run.donor].anatomy, run.blocks):
        last = run_blocks(own.model, own.anatomy, batch.to(own.device), start=run.start, hidden=before,
                          listener=remember)
    return last, kept


def _scored(run: _Run, batch: Batch, last: Tensor, stages: Mapping[str, LoadedModel], parts: SharedParts
            ) -> dict[tuple[str, str, str, str], RowScores]:
    """Every swap that a run answers, with both heads; equal heads are applied once.

    Returns:
        (recipient, donor, mask, head) -> scores of the batch's rows.
    """
    owner_of = dict(zip(stages, parts.unembeddings, strict=True))
    by_owner: dict[int, RowScores] = {}
    scored = {}
    for recipient, donor, mask in run.serves:
        for head in (recipient, donor):
            owner, device = owner_of[head], stages[head].device
            if owner not in by_owner:
                by_owner[owner] = score_hidden(stages[head].anatomy, last.to(device), batch.to(device))
            scored[recipient, donor, mask, head] = by_owner[owner]
    return scored


def _table(scores: Mapping[tuple[str, str, str, str], SampleScores], masks: Sequence[str], nothing: str,
           settings: SwapSettings) -> Table:
    table = Table()
    mean = TokenMean(per_sample=settings.per_sample_mean, confidence=settings.confidence, seed=settings.seed)
    for recipient, donor, head in dict.fromkeys((recipient, donor, head) for recipient, donor, _, head in scores):
        extra: dict[str, Any] = {"recipient": recipient, "donor": donor, "head": head,
                                 "stage": side_of((donor, recipient))}
        unswapped = scores[recipient, donor, nothing, head]
        for mask in masks:
            own = scores[recipient, donor, mask, head]
            add_scores(table, "segment", mask, recipient, own, mean, **extra)
            if mask != nothing:
                add_changes(table, "segment", mask, own, unswapped, mean, **extra)
    return table
