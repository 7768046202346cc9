"""What every analysis begins with (models, samples, token rows), and one pass of them that feeds accumulators.

An analysis that reads hidden states is a `PassPart`: what it must be fed, and what it makes of it. It runs alone, or
with others on one pass over the same data (`run_together`). A pass can be interrupted and resumed.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from midblock import ranks
from midblock.capture import Lockstep, run_layer_major
from midblock.capture.accumulators import Accumulator
from midblock.data import Batch, Dataset, TokenRow, TokenRows, load_data, make_batches, pad_token_id, tokenize
from midblock.errors import DataError, OutputError
from midblock.metrics._inputs import FiniteChecks, finite_checks_together
from midblock.models import LoadedModel
from midblock.models.chain import comparisons, resolve_stages, stage_names
from midblock.models.inference import many_unembeddings
from midblock.models.state import STATE_MARKER, load_state, require_state_folder, save_state
from midblock.progress import Progress, silent
from midblock.removing import remove_marked
from midblock.results import Origin, Table
from midblock.writing import recomputed

__all__ = ["Inputs", "PassPart", "PassState", "Sampling", "draw", "encode", "feed_batches", "load_stages", "prepare",
           "run_together"]

R = TypeVar("R")

Stages = Sequence[LoadedModel | str] | LoadedModel | str

# what the arrays of a saved part mean: to be changed with any accumulator
_LAYOUT = "sums per sample, differences, tokens"


class Sampling(Protocol):
    """How samples are drawn, cut and batched: what the settings of all analyses have in common."""

    @property
    def samples(self) -> int: ...
    @property
    def max_length(self) -> int: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def seed(self) -> int: ...


@dataclass(frozen=True)
class Inputs:
    """Models of a chain, and the samples that all of them are run on.

    Attributes:
        stages: Stage name -> model, in the order of the chain.
        dataset: The samples drawn.
        encoded: Their token rows (the first stage's tokenizer).
        batch_size: Rows in a batch.
    """

    stages: dict[str, LoadedModel]
    dataset: Dataset
    encoded: TokenRows
    batch_size: int

    @property
    def names(self) -> list[str]:
        """Stage names."""
        return list(self.stages)

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """(later, earlier) stages that are compared."""
        return comparisons(self.names)

    @property
    def first(self) -> LoadedModel:
        """The first stage."""
        return next(iter(self.stages.values()))

    @property
    def rows(self) -> list[TokenRow]:
        """Token rows, in the order of the samples."""
        return self.encoded.rows

    def batches(self, rows: Sequence[TokenRow] | None = None) -> list[Batch]:
        """Batches of the rows, or of some of them, on the CPU."""
        return make_batches(self.rows if rows is None else rows, batch_size=self.batch_size,
                            pad_id=pad_token_id(self.first.tokenizer))

    @property
    def origin(self) -> Origin:
        """What is measured, in the words that name it again."""
        return Origin(tuple(m.spec for m in self.stages.values()), self.dataset.spec)

    def named(self, table: Table) -> Table:
        """The table with the data set's name in every row (column ``data``)."""
        for row in table.rows:
            row["data"] = self.dataset.name
        return table

    def counts(self, **more: Any) -> dict[str, Any]:
        """What ``run.json`` stores of the samples."""
        return {"samples": len(self.rows), **more, **self.encoded.describe()}


def load_stages(stages: Stages, sft: LoadedModel | str | None = None, names: Sequence[str] | None = None, *,
                least: int = 2, streams: bool = False) -> dict[str, LoadedModel]:
    """Stage name -> model of a chain given as models, MODEL specs, or a base and a tuned one.

    Args:
        stages: As for `prepare`.
        sft: As for `prepare`.
        names: As for `prepare`.
        least: Fewest stages.
        streams: Whether the caller can do with models whose blocks come one after another.

    Raises:
        SettingsError: fewer than ``least``, names that do not fit, or a streamed model where whole ones are needed.
        PairMismatchError: the checkpoints do not fit together.
    """
    models = resolve_stages(stages, sft, names, least=least)
    for model in models if not streams else ():
        model.require_whole()
    return dict(zip(stage_names(len(models), names), models, strict=True))


def draw(data: Dataset | str, settings: Sampling, samples: int | None = None) -> Dataset:
    """The samples of a data set or D spec that the settings ask for (or ``samples`` of them)."""
    dataset = load_data(data, seed=settings.seed) if isinstance(data, str) else data
    return dataset.sample(settings.samples if samples is None else samples, settings.seed)


def prepare(stages: Stages, sft: LoadedModel | str | None = None, *, data: Dataset | str, settings: Sampling,
            names: Sequence[str] | None = None, samples: int | None = None, least: int = 2, min_tokens: int = 2,
            min_rows: int = 1, need: str = "a next-token score", streams: bool = False) -> Inputs:
    """Models, samples and token rows of an analysis.

    Args:
        stages: The base (then give ``sft``), or a chain; loaded models or MODEL specs.
        sft: The tuned checkpoint, where ``stages`` is a single base.
        data: A data set or a D spec.
        settings: How to draw; ``supervised``, where they have it, counts completions only.
        names: Stage names; default base, sft, dpo, rlvr.
        samples: How many, where the settings' own number does not say it.
        least: Fewest stages.
        min_tokens: Shorter samples are left out.
        min_rows: Fewest samples that must be left.
        need: What needs them, for the error.
        streams: Whether the analysis can do with models whose blocks come one after another.

    Raises:
        SettingsError: too few stages, names that do not fit, or a streamed model where whole ones are needed.
        PairMismatchError: the checkpoints do not fit together.
        DataError: fewer than ``min_rows`` usable samples.
    """
    by_name = load_stages(stages, sft, names, least=least, streams=streams)
    return encode(by_name, draw(data, settings, samples), settings, min_tokens=min_tokens, min_rows=min_rows,
                  need=need)


def encode(stages: dict[str, LoadedModel], dataset: Dataset, settings: Sampling, *, min_tokens: int = 2,
           min_rows: int = 1, need: str = "a next-token score") -> Inputs:
    """Token rows of samples already drawn; see `prepare`."""
    tokenizer = next(iter(stages.values())).tokenizer
    encoded = tokenize(dataset, tokenizer, max_length=settings.max_length, min_tokens=min_tokens,
                       supervised=getattr(settings, "supervised", False))
    if len(encoded.rows) < min_rows:
        raise DataError(f"{dataset.source}: {len(encoded.rows)} usable samples (at least {min_tokens} tokens each) out "
                        f"of {len(dataset.examples)}; {need} needs at least {min_rows}.")
    return Inputs(stages, dataset, encoded, settings.batch_size)


class PassState:
    """Values of finished samples, kept on disk while a pass runs.

    Nothing is written before ``every`` seconds have gone by (or an interruption comes), so
    a short run leaves no intermediate file; `discard` removes what there is.
    """

    def __init__(self, folder: Path, every: float = 60.0) -> None:
        require_state_folder(folder)
        self.folder = folder
        self._every = every
        self._last = time.monotonic()
        self._pending: list[int] = []

    def restore(self, accumulators: Mapping[str, Accumulator]) -> set[int]:
        """Put saved values back; returns the sample numbers that are done.

        A part that is damaged, or of another version, is named in a warning and removed: its samples are run again.
        """
        done: set[int] = set()
        for path in sorted(self.folder.glob("part-*.safetensors")):
            try:
                arrays, state = load_state(path)
                if state.get("layout") != _LAYOUT:
                    raise OutputError(f"{path} was written by another version of midblock.")
                if state.get("accumulators") != sorted(accumulators):
                    raise OutputError(f"{path} holds other measurements than those that are wanted now.")
            except OutputError as error:
                recomputed(error, "Its samples are run again.")
                remove_marked(self.folder / STATE_MARKER, [path])
                continue
            samples = state["samples"]
            for name, accumulator in accumulators.items():
                own = {k.split("||", 1)[1]: v for k, v in arrays.items() if k.startswith(f"{name}||")}
                accumulator.put(samples, own)
            done.update(samples)
        return done

    def add(self, accumulators: Mapping[str, Accumulator], samples: Sequence[int], checks: FiniteChecks) -> None:
        """Count samples as done; write them when it is time."""
        self._pending.extend(samples)
        if time.monotonic() - self._last >= self._every:
            self.flush(accumulators, checks)

    def flush(self, accumulators: Mapping[str, Accumulator], checks: FiniteChecks) -> None:
        """Write what is not written yet, unless it came of states that are not finite."""
        checks.settle()
        if self._pending:
            number = 1 + max((int(p.stem[5:]) for p in self.folder.glob("part-*.safetensors")), default=-1)
            number += (ranks.rank() - number) % ranks.size()  # no two processes write under one name
            arrays = {f"{name}||{key}": value for name, accumulator in accumulators.items()
                      for key, value in accumulator.part(self._pending).items() if value.numel()}
            save_state(self.folder / f"part-{number:05d}.safetensors", arrays,
                       {"samples": self._pending, "layout": _LAYOUT, "accumulators": sorted(accumulators)})
        self._pending = []
        self._last = time.monotonic()

    def discard(self) -> None:
        """Remove the saved parts: the run is finished."""
        if ranks.follows():
            return
        if (self.folder / STATE_MARKER).is_file():
            remove_marked(self.folder / STATE_MARKER, list(self.folder.glob("part-*.safetensors")), folder=True)


def feed_batches(stages: Mapping[str, LoadedModel], batches: Sequence[Batch],
                 accumulators: Mapping[str, Accumulator], *, state: PassState | None = None,
                 progress: Progress = silent, what: str = "forward", heads: bool = False) -> None:
    """Run every batch through all stages in lockstep and feed hidden 0..L to the accumulators.

    With stages in memory batches come first, and at any time one hidden state per stage exists besides what the
    accumulators keep. With streamed stages layers come first (`midblock.capture.run_layer_major`): the same numbers,
    from two blocks in memory. Such a pass knows nothing of a sample before its end, so that it begins anew where it
    was interrupted.

    The processes of one job (`midblock.ranks`) share the batches; afterwards the accumulators of the first one hold
    all values.

    Args:
        stages: name -> model; all of one depth and width.
        batches: Batches on the CPU; moved to each model's device.
        accumulators: name -> accumulator.
        state: Where to save and restore finished samples.
        progress: Told the number of tokens done.
        what: What the progress is called.
        heads: Whether the accumulators read heads out.
    """
    done = ranks.first(lambda: state.restore(accumulators)) if state else set()
    tell = _Tokens(progress, what, batches, len(stages))
    todo = []
    for batch in batches:
        if done.issuperset(batch.indices):
            tell(batch)
        else:
            todo.append(batch)
    todo = ranks.share(todo)
    with torch.inference_mode(), finite_checks_together() as checks:
        if any(m.streamed is not None for m in stages.values()):
            _layers_first(stages, todo, accumulators, tell, heads=heads)
        else:
            _batches_first(stages, todo, accumulators, tell, checks, state=state, heads=heads)
    _bring_together(accumulators, [sample for batch in todo for sample in batch.indices])


def _bring_together(accumulators: Mapping[str, Accumulator], samples: Sequence[int]) -> None:
    """Let the first process's accumulators hold what each process has measured of its samples."""
    if ranks.size() == 1:
        return
    own = {} if ranks.rank() == 0 else {name: a.part(samples) for name, a in accumulators.items()}
    for theirs, parts in ranks.to_first((list(samples), own))[1:]:
        for name, part in parts.items():
            accumulators[name].put(theirs, part)


class _Tokens:
    """Progress of a pass in tokens."""

    def __init__(self, progress: Progress, what: str, batches: Sequence[Batch], stages: int) -> None:
        self._progress, self._what, self._stages = progress, what, stages
        self._total = sum(b.num_tokens for b in batches) * stages
        self._done = 0.0

    def __call__(self, batch: Batch, share: float = 1.0, note: str = "") -> None:
        """A batch is done, or a share of its blocks."""
        self._done += share * batch.num_tokens * self._stages
        self._progress(self._what, round(self._done), self._total,
                       note=note or f"{len(batch.indices)} x {batch.input_ids.shape[1]} tokens")


def _batches_first(stages: Mapping[str, LoadedModel], batches: Sequence[Batch],
                   accumulators: Mapping[str, Accumulator], tell: _Tokens, checks: FiniteChecks, *,
                   state: PassState | None, heads: bool) -> None:
    try:
        with many_unembeddings(m.anatomy for m in stages.values()) if heads else contextlib.nullcontext():
            for batch in batches:
                runs = {name: (m.model, m.anatomy, batch.to(m.device)) for name, m in stages.items()}
                for h, states in Lockstep(runs):
                    for accumulator in accumulators.values():
                        accumulator.feed(h, batch, states)
                if state:
                    state.add(accumulators, batch.indices, checks)
                tell(batch)
    except BaseException:
        if state:
            state.flush(accumulators, checks)
        raise


def _layers_first(stages: Mapping[str, LoadedModel], batches: Sequence[Batch],
                  accumulators: Mapping[str, Accumulator], tell: _Tokens, *, heads: bool) -> None:
    if not batches:
        return
    num_blocks = next(iter(stages.values())).anatomy.num_blocks
    keeps = sum(getattr(a, "keeps_states", 0) for a in accumulators.values())
    for h, number, states in run_layer_major(stages, batches, heads=heads, keeps=keeps):
        for accumulator in accumulators.values():
            accumulator.feed(h, batches[number], states)
        tell(batches[number], 1 / (num_blocks + 1), note=f"hidden {h} of {num_blocks}")


@dataclass
class PassPart(Generic[R]):
    """One analysis as a pass over the data sees it.

    Attributes:
        inputs: Its models and samples.
        groups: Token rows that it must be fed; rows of different groups do not share a batch.
        accumulators: name -> accumulator; each is fed its own stages and rows only, in whatever company they run.
        finish: Makes the result when every row has been fed.
        what: What progress calls it.
        heads: Whether accumulators unembed.
    """

    inputs: Inputs
    groups: list[list[TokenRow]]
    accumulators: dict[str, Accumulator]
    finish: Callable[[], R]
    what: str = "forward"
    heads: bool = False

    @property
    def batches(self) -> list[Batch]:
        """Its rows in batches, when it runs alone."""
        return [b for group in self.groups if group for b in self.inputs.batches(group)]

    def run(self, *, state_folder: Path | None = None, progress: Progress = silent) -> R:
        """A pass of its own, and the result.

        Args:
            state_folder: Where an interrupted pass keeps what it has, and resumes from.
            progress: Told how far the pass is, in tokens.
        """
        state = PassState(state_folder) if state_folder else None
        feed_batches(self.inputs.stages, self.batches, self.accumulators, state=state, progress=progress,
                     what=self.what, heads=self.heads)
        result = ranks.first(self.finish)
        if state:
            state.discard()
        return result


class _Own:
    """Accumulator that hands on the stages and samples of one part of a pass."""

    def __init__(self, accumulator: Accumulator, samples: set[int], stages: Sequence[str]) -> None:
        self._accumulator, self._samples, self._stages = accumulator, samples, list(stages)
        # one object for a batch at all depths: accumulators know it again
        self._known: dict[tuple[int, ...], tuple[list[int], Batch]] = {}
        self.keeps_states: int = getattr(accumulator, "keeps_states", 0)

    def feed(self, h: int, batch: Batch, states: Mapping[str, Tensor]) -> None:
        if batch.indices not in self._known:
            rows = [row for row, sample in enumerate(batch.indices) if sample in self._samples]
            self._known[batch.indices] = rows, batch if len(rows) == len(batch) else batch.only(rows)
        rows, own = self._known[batch.indices]
        if rows:
            self._accumulator.feed(h, own, {stage: states[stage] if own is batch else states[stage][rows]
                                            for stage in self._stages})

    def part(self, samples: Sequence[int]) -> dict[str, Tensor]:
        return self._accumulator.part([s for s in samples if s in self._samples])

    def put(self, samples: Sequence[int], part: Mapping[str, Tensor]) -> None:
        self._accumulator.put([s for s in samples if s in self._samples], part)


def run_together(parts: Mapping[str, PassPart[Any]], *, state_folder: Path | None = None,
                 progress: Progress = silent) -> None:
    """Feed several analyses of one chain and data set from one pass; then call each one's ``finish``.

    Rows of the first part stand in its own batches, so that its numbers are to the last digit those of a pass of its
    own; of the others only rows that no part before them has are added. Where a row stands in other company than it
    would alone, sums of its products may be rounded otherwise.

    Args:
        parts: Name -> part; their rows of one index hold the same tokens.
        state_folder: Where an interrupted pass keeps what it has, and resumes from; to be removed with
            `PassState.discard` when all results are safe.
        progress: Told how far the pass is, in tokens.

    Raises:
        ValueError: two parts have different tokens under one index.
    """
    seen: dict[int, tuple[int, ...]] = {}
    batches: list[Batch] = []
    stages: dict[str, LoadedModel] = {}
    accumulators: dict[str, Accumulator] = {}
    for name, part in parts.items():
        stages = {**part.inputs.stages, **stages}
        own = {row.index for group in part.groups for row in group}
        accumulators |= {f"{name}.{key}": _Own(value, own, part.inputs.names) for key, value in
                         part.accumulators.items()}
        for group in part.groups:
            if any(seen.get(row.index, row.ids) != row.ids for row in group):
                raise ValueError(f"{name} has other tokens under a sample's number than the parts before it")
            new = [row for row in group if row.index not in seen]
            seen.update((row.index, row.ids) for row in new)
            if new:
                batches += part.inputs.batches(new)
    if batches:
        feed_batches(stages, batches, accumulators, state=PassState(state_folder) if state_folder else None,
                     progress=progress, what="shared pass", heads=any(p.heads for p in parts.values()))
