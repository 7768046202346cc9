"""One pass of a data set over all stages, feeding accumulators; it can be interrupted and resumed."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from midblock.capture import Lockstep
from midblock.capture.accumulators import Accumulator
from midblock.data import Batch
from midblock.errors import OutputError
from midblock.models import LoadedModel
from midblock.models.inference import many_read_outs
from midblock.progress import Progress, silent
from midblock.provenance import atomic_path

__all__ = ["PassState", "feed_batches"]


class PassState:
    """Values of finished samples, kept on disk while a pass runs.

    Nothing is written before ``every`` seconds have gone by (or an interruption comes), so
    a short run leaves no intermediate file; `discard` removes what there is.
    """

    def __init__(self, folder: Path, every: float = 60.0) -> None:
        self.folder = folder
        self._every = every
        self._last = time.monotonic()
        self._pending: list[int] = []

    def restore(self, accumulators: Mapping[str, Accumulator]) -> set[int]:
        """Put saved values back; returns the sample numbers that are done.

        Raises:
            OutputError: a saved part cannot be read (remove the folder and start anew).
        """
        done: set[int] = set()
        for path in sorted(self.folder.glob("part-*.safetensors")):
            try:
                with safe_open(path, framework="pt") as stored:
                    samples = json.loads(stored.metadata()["samples"])
                    arrays = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118 (not a dict)
            except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
                raise OutputError(f"cannot resume from {path}: {error}; name a new --out folder.") from error
            for name, accumulator in accumulators.items():
                own = {k.split("||", 1)[1]: v for k, v in arrays.items() if k.startswith(f"{name}||")}
                accumulator.put(samples, own)
            done.update(samples)
        return done

    def add(self, accumulators: Mapping[str, Accumulator], samples: Sequence[int]) -> None:
        """Count samples as done; write them when it is time."""
        self._pending.extend(samples)
        if time.monotonic() - self._last >= self._every:
            self.flush(accumulators)

    def flush(self, accumulators: Mapping[str, Accumulator]) -> None:
        """Write what is not written yet."""
        if self._pending:
            number = len(list(self.folder.glob("part-*.safetensors")))
            arrays = {f"{name}||{key}": value for name, accumulator in accumulators.items()
                      for key, value in accumulator.part(self._pending).items() if value.numel()}
            with atomic_path(self.folder / f"part-{number:05d}.safetensors") as temporary:
                save_file(arrays, temporary, metadata={"samples": json.dumps(self._pending)})
        self._pending = []
        self._last = time.monotonic()

    def discard(self) -> None:
        """Remove the saved parts: the run is finished."""
        for path in self.folder.glob("part-*.safetensors"):
            path.unlink(missing_ok=True)
        if self.folder.is_dir() and not any(self.folder.iterdir()):
            self.folder.rmdir()


def feed_batches(stages: Mapping[str, LoadedModel], batches: Sequence[Batch],
                 accumulators: Mapping[str, Accumulator], *, state: PassState | None = None,
                 progress: Progress = silent, what: str = "forward", heads: bool = False) -> None:
    """Run every batch through all stages in lockstep and feed hidden 0..L to the accumulators.

    At any time only one hidden state per stage exists besides what the accumulators keep.

    Args:
        stages: name -> model; all of one depth and width.
        batches: Batches on the CPU; moved to each model's device.
        accumulators: name -> accumulator.
        state: Where to save and restore finished samples.
        progress: Told the number of tokens done.
        heads: Whether the accumulators read heads out.
    """
    done = state.restore(accumulators) if state else set()
    total = sum(int(b.attention_mask.sum()) for b in batches) * len(stages)
    tokens = 0
    try:
        with torch.inference_mode(), (many_read_outs(m.anatomy for m in stages.values()) if heads
                                     else contextlib.nullcontext()):
            for batch in batches:
                if not done.issuperset(batch.indices):
                    runs = {name: (m.model, m.anatomy, batch.to(m.device)) for name, m in stages.items()}
                    for h, states in Lockstep(runs):
                        for accumulator in accumulators.values():
                            accumulator.feed(h, batch, states)
                    if state:
                        state.add(accumulators, batch.indices)
                tokens += int(batch.attention_mask.sum()) * len(stages)
                progress(what, tokens, total, note=f"{len(batch.indices)} x {batch.input_ids.shape[1]} tokens")
    except BaseException:
        if state:
            state.flush(accumulators)
        raise
