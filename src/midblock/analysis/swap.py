"""Layer swapping: segments of the tuned model in the base, and the reverse (paper section 4.3, figure 6).

Nothing is copied: a swapped block is the other model's block, called in its place
(`swap_blocks`). A swap leaves everything before its first block unchanged, so it is run from
there on hidden states already computed (`midblock.capture.resume_at`), and both heads
read the same last hidden state. K single swaps thus cost (K+1)/2 body passes instead of 2K, and fewer where
the tuning left blocks, embeddings or head alone (`midblock.models.shared_parts`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from midblock import stats
from midblock.analysis.lens import exponential
from midblock.analysis.stages import comparisons, resolve_stages, side_of, stage_names
from midblock.capture import forwards_replaced, next_token_scores, run_blocks, sample_means, verify_resume
from midblock.data import Batch, Dataset, load_data, make_batches, pad_token_id, tokenize
from midblock.errors import DataError, SettingsError
from midblock.models import Anatomy, LoadedModel, SharedParts, shared_parts
from midblock.models.cores import Cores
from midblock.models.inference import many_read_outs
from midblock.progress import Progress, silent
from midblock.results import Table
from midblock.segments import all_masks_single, segment_blocks

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["SwapResult", "SwapSettings", "cumulative_masks", "swap", "swap_blocks"]


@contextlib.contextmanager
def swap_blocks(recipient: Anatomy, donor: Anatomy, blocks: Sequence[int]) -> Iterator[None]:
    """Within the context the recipient runs the donor's blocks at these places; restored also after an error.

    Args:
        recipient: Anatomy of the model that is run.
        donor: Anatomy of the model whose blocks are lent.
        blocks: Blocks 0..L-1.

    Raises:
        ValueError: a block that one of the models does not have.
    """
    if any(not 0 <= b < min(recipient.num_blocks, donor.num_blocks) for b in blocks):
        raise ValueError(f"blocks {list(blocks)} do not fit {recipient.num_blocks} and {donor.num_blocks} blocks")
    replaced = [(recipient.blocks[b], donor.blocks[b]) for b in dict.fromkeys(blocks)]
    lent = [other.forward for _, other in replaced]  # taken first: a model may swap with itself
    with forwards_replaced([own for own, _ in replaced], lent):
        yield


def cumulative_masks(num_segments: int, *, from_output: bool = False) -> list[str]:
    """Masks that grow from one end by a segment at a time.

    Example:
        >>> cumulative_masks(3), cumulative_masks(3, from_output=True)
        (['100', '110', '111'], ['001', '011', '111'])
    """
    masks = ["1" * i + "0" * (num_segments - i) for i in range(1, num_segments + 1)]
    return [m[::-1] for m in masks] if from_output else masks


@dataclass(frozen=True, kw_only=True)
class SwapSettings:
    """Which segments are swapped and what is scored."""

    segments: int = 5
    """K equal depth segments; each alone is swapped."""
    masks: tuple[str, ...] = ()
    """Masks to swap instead of the K singles."""
    cumulative: bool = False
    """Also swap segments cumulatively from the input and from the output side."""
    samples: int = 50
    """Samples."""
    max_length: int = 256
    """Tokens per sample; longer ones are cut and counted."""
    batch_size: int = 8
    """Samples per forward pass."""
    seed: int = 0
    """Seed of the draw."""
    supervised: bool = False
    """Count only completion tokens where the data has prompts and completions."""
    confidence: float = 0.95
    """Confidence of every interval."""

    def __post_init__(self) -> None:
        faults = [f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}"
                  for name in ("segments", "samples", "batch_size") if getattr(self, name) < 1]
        if faults:
            raise SettingsError("; ".join(faults) + ".")

    def all_masks(self) -> list[str]:
        """The masks to swap, without repeats."""
        chosen = list(self.masks) or all_masks_single(self.segments)
        if self.cumulative:
            k = len(chosen[0])
            chosen += [*cumulative_masks(k), *cumulative_masks(k, from_output=True)]
        return list(dict.fromkeys(chosen))


@dataclass
class SwapResult:
    """Scores of every swap with both heads, paired with the unswapped model."""

    table: Table
    stages: list[str]
    settings: SwapSettings
    counts: dict[str, Any] = field(default_factory=dict)

    @property
    def frame(self) -> pd.DataFrame:
        """The tidy table."""
        return self.table.frame()

    def summary(self) -> str:
        """In words: which swap helps or harms most, per recipient and head."""
        frame = self.frame
        lines = []
        for later, earlier in comparisons(self.stages):
            for recipient, donor in ((earlier, later), (later, earlier)):
                part = frame[(frame["metric"] == "loss") & (frame["side"] == "difference")
                             & (frame["recipient"] == recipient) & (frame["donor"] == donor)
                             & (frame["head"] == recipient)]
                best, worst = part.loc[part["value"].idxmin()], part.loc[part["value"].idxmax()]

                def told(row: Any) -> str:
                    return f"{row['layer']} ({row['value']:+.4f} nats [{row['low']:+.4f}, {row['high']:+.4f}])"
                lines.append(f"{donor} segments in {recipient} ({recipient} head): the loss falls most or rises least "
                             f"with {told(best)}, rises most with {told(worst)}; n = {int(best['n'])} samples.")
        return "\n".join(lines)

    def figures(self) -> dict[str, Figure]:
        """Paired change of loss and accuracy by mask, for each recipient and head."""
        from midblock.figures import segment_bars

        frame = self.frame
        frame = frame[frame["side"] == "difference"]
        made = {}
        for metric in ("loss", "accuracy"):
            part = frame[frame["metric"] == metric].assign(
                series=lambda f: f["donor"] + " in " + f["recipient"] + ", " + f["head"] + " head")
            made[f"swap-{metric}"] = segment_bars(part, metric=metric, hue="series",
                                                  title=f"Change of {metric} when a segment is swapped")
        return made


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
        head (side ``difference``), over samples.

    Raises:
        ArchitectureError: the family cannot be resumed from a block.
        BlockRangeError: a mask that does not fit.
        DataError: no usable sample.
    """
    chosen = replace(settings or SwapSettings(), **overrides)
    models = resolve_stages(stages, sft, names)
    keys = stage_names(len(models), names)
    num_blocks = models[0].anatomy.num_blocks
    masks = {m: segment_blocks(m, num_blocks) for m in chosen.all_masks()}
    if len({len(m) for m in masks}) != 1:
        raise SettingsError(f"masks of one length are needed, got {', '.join(masks)}.")
    for model in models:
        verify_resume(model.model, model.anatomy)
    dataset = load_data(data, seed=chosen.seed) if isinstance(data, str) else data
    dataset = dataset.sample(chosen.samples, chosen.seed)
    tokenizer = models[0].tokenizer
    encoded = tokenize(dataset, tokenizer, max_length=chosen.max_length, min_tokens=2, supervised=chosen.supervised)
    if not encoded.rows:
        raise DataError(f"{dataset.source}: no sample has the 2 tokens that a next-token score needs.")
    batches = make_batches(encoded.rows, batch_size=chosen.batch_size, pad_id=pad_token_id(tokenizer))
    directions = [d for later, earlier in comparisons(keys) for d in ((earlier, later), (later, earlier))]
    nothing = "0" * len(next(iter(masks)))
    place = {row.index: i for i, row in enumerate(encoded.rows)}
    parts = shared_parts([m.anatomy for m in models])
    runs = _plan(parts, keys, directions, {nothing: [], **masks})
    total = sum(num_blocks - run.start for run in runs) * len(batches)
    tasks = [(b, number) for b in range(len(batches)) for number in range(len(runs))]
    # hidden states that later runs of a batch resume from; they may be run by another thread
    states: dict[tuple[int, int], Future[dict[int, Tensor]]] = {task: Future() for task in tasks}
    scores: dict[tuple[str, str, str, str, str], np.ndarray[Any, Any]] = {}
    done = 0

    def perform(own: list[LoadedModel], task: tuple[int, int]) -> _Scored:
        b, number = task
        by_name = dict(zip(keys, own, strict=True))
        try:
            with torch.inference_mode():
                last, kept = _performed(by_name, runs, number, batches[b], lambda source: states[b, source].result())
                states[task].set_result(kept)
                found = _scored(runs[number], batches[b], last, by_name, keys, parts)
        except BaseException as error:
            if not states[task].done():
                states[task].set_exception(error)  # nobody waits forever
            raise
        cores.tell(lambda: advance(runs[number]))
        return found

    def advance(run: _Run) -> None:
        nonlocal done
        done += num_blocks - run.start
        progress("swap", done, total, note=f"{run.donor} in {run.recipient}")

    with many_read_outs((m.anatomy for m in models), blocks=True), Cores(models, len(tasks)) as cores:
        for (b, number), found in zip(tasks, cores.each(perform, tasks), strict=True):
            rows = [place[i] for i in batches[b].indices]
            for key, means in found:
                scores.setdefault(key, np.full(len(place), np.nan))[rows] = means
            for earlier in range(number + 1):  # what no later run needs
                if not any(later.source == earlier for later in runs[number + 1:]):
                    states.pop((b, earlier), None)
    table = _table(scores, [nothing, *masks], nothing, chosen)
    for row in table.rows:
        row["data"] = dataset.name
    return SwapResult(table, keys, chosen, {"samples": len(place), **encoded.describe()})


# (recipient, donor, mask, head, metric) and the mean of each row of the batch
_Scored = list[tuple[tuple[str, str, str, str, str], np.ndarray[Any, Any]]]


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


def _performed(by_name: Mapping[str, LoadedModel], runs: Sequence[_Run], number: int, batch: Batch,
               states_of: Callable[[int], Mapping[int, Tensor]]) -> tuple[Tensor, dict[int, Tensor]]:
    """The last hidden state of a run, and those that later runs resume from."""
    run = runs[number]
    own = by_name[run.recipient]
    wanted = {later.start for later in runs if later.source == number}
    kept: dict[int, Tensor] = {}

    def remember(h: int, z: Tensor) -> None:
        if h in wanted:
            kept[h] = z

    before = states_of(run.source)[run.start].to(own.device) if run.source is not None else None
    with swap_blocks(own.anatomy, by_name[run.donor].anatomy, run.blocks):
        last = run_blocks(own.model, own.anatomy, batch.to(own.device), start=run.start, hidden=before,
                          listener=remember)
    return last, kept


def _scored(run: _Run, batch: Batch, last: Tensor, by_name: Mapping[str, LoadedModel], keys: Sequence[str],
            parts: SharedParts) -> _Scored:
    """Every swap that a run answers, with both heads; heads that are equal read out once."""
    found: dict[int, dict[str, np.ndarray[Any, Any]]] = {}
    scored: _Scored = []
    for recipient, donor, mask in run.serves:
        for head in (recipient, donor):
            owner = parts.read_outs[keys.index(head)]
            if owner not in found:
                anatomy, device = by_name[head].anatomy, by_name[head].device
                read = next_token_scores(anatomy.read_out, last.to(device), batch.to(device), anatomy.vocab_size)
                found[owner] = {metric: sample_means(read.row, value, len(batch.indices))[0].cpu().numpy()
                                for metric, value in (("loss", read.loss), ("accuracy", read.correct.float()))}
            scored += [((recipient, donor, mask, head, metric), means) for metric, means in found[owner].items()]
    return scored


def _table(scores: Mapping[tuple[str, str, str, str, str], np.ndarray[Any, Any]], masks: Sequence[str], nothing: str,
           settings: SwapSettings) -> Table:
    table = Table()
    groups = dict.fromkeys((recipient, donor, head) for recipient, donor, _, head, _ in scores)
    for recipient, donor, head in groups:
        extra: dict[str, Any] = {"recipient": recipient, "donor": donor, "head": head,
                 "stage": side_of((donor, recipient))}
        for mask in masks:
            for metric in ("loss", "accuracy"):
                values = scores[recipient, donor, mask, head, metric]
                interval = stats.mean_interval(values, settings.confidence)
                table.add("segment", mask, metric, recipient, interval, **extra)
                if metric == "loss":
                    table.add("segment", mask, "perplexity", recipient, exponential(interval), **extra)
                if mask == nothing:
                    continue
                paired = stats.mean_interval(values - scores[recipient, donor, nothing, head, metric],
                                             settings.confidence)
                table.add("segment", mask, metric, "difference", paired, **extra)
                if metric == "loss":
                    table.add("segment", mask, "perplexity_ratio", "pair", exponential(paired), **extra)
    return table
