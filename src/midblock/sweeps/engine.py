"""Execution of a sweep's runs. One interface, `Engine`; `LocalEngine` works in this process."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import hashlib
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from midblock.errors import CacheRefusedError, OutputError, TrainingError
from midblock.progress import Progress, silent
from midblock.provenance import peak_memory_bytes
from midblock.settings.sweep import SweepConfig
from midblock.sweeps.arms import Job
from midblock.sweeps.data import VALIDATION, SweepData, token_rows
from midblock.sweeps.records import RunRecord
from midblock.sweeps.scoring import Scorer
from midblock.tuning import PrefixCache, TrainResult, check_engagement, frozen_digests, train
from midblock.tuning.adapter import Attachment, attach
from midblock.tuning.eva import start_batches
from midblock.tuning.initial import NEEDS_ROWS, Start

if TYPE_CHECKING:
    from midblock.models import LoadedModel

__all__ = ["Engine", "LocalEngine", "weights_digest"]

# tokens on which a trained arm must differ from the base
_PROBE_TOKENS = 32


class Engine(Protocol):
    """Runs jobs; where and in which order is its own affair."""

    def run(self, jobs: Sequence[Job], finished: Callable[[RunRecord], None], *,
            progress: Progress = silent) -> None:
        """Run every job and hand over each record as soon as it is there, failed ones too."""
        ...


# ---------------------------------------------------------------- the weights stay the same

def weights_digest(model: nn.Module) -> str:
    """Digest over every parameter and buffer, bit by bit."""
    digest = hashlib.sha256()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        data = tensor.detach().cpu().contiguous().reshape(-1)
        if data.numel():
            digest.update(data.view(torch.uint8).numpy().data)
    return digest.hexdigest()


@contextlib.contextmanager
def _peak_memory(device: torch.device) -> Iterator[Callable[[], int]]:
    """Peak memory within the context: of the device, or of the process (Linux can start it anew)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield lambda: int(torch.cuda.max_memory_allocated(device))
        return
    status = Path("/proc/self/status")
    fresh = False
    if sys.platform == "linux":
        gc.collect()
        with contextlib.suppress(OSError, AttributeError):  # what was freed goes back to the system (glibc)
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
            fresh = True

    def peak() -> int:
        if fresh:
            with contextlib.suppress(OSError, StopIteration, ValueError):
                line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
                return int(line.split()[1]) * 1024
        return peak_memory_bytes()

    yield peak


# ---------------------------------------------------------------- in this process

class LocalEngine:
    """One run after another on one loaded base.

    Arms share the base, the tokenised rows, the cache of the frozen prefix and the hidden states of
    the evaluation items. After every run the base's weights are compared with what they were, bit
    for bit.

    Args:
        config: The sweep.
        loaded: The base.
        data: From `load_sweep_data`.
    """

    def __init__(self, config: SweepConfig, loaded: LoadedModel, data: SweepData) -> None:
        self.config = config
        self.loaded = loaded
        self.data = data
        self.rows = token_rows(data.train, loaded.tokenizer, config.train)
        init = config.training.init
        self._start = Start(init, start_batches(self.rows, loaded, config.training.batch_size) if init in NEEDS_ROWS
                            else ())
        self.scorer = Scorer(loaded, data.tasks, data.items)
        self.cache = PrefixCache.from_spec(config.cache, limit_bytes=config.cache_limit)
        self._digest = weights_digest(loaded.model)
        self._probe = torch.tensor([self.rows.rows[0].ids[:_PROBE_TOKENS]], device=loaded.device)
        self._first_block: int | None = None
        self.trackers: Path | None = None
        """Where trackers that write files put them, one folder a run; by default where they do by themselves."""

    def run(self, jobs: Sequence[Job], finished: Callable[[RunRecord], None], *,
            progress: Progress = silent) -> None:
        """Run every job; see `Engine`.

        Raises:
            TrainingError: the base's weights are not what they were: nothing after it could be
                believed.
            OutputError: a result could not be written.
        """
        gc.collect()
        gc.freeze()  # models and libraries stay: collecting after each arm need not look at them
        try:
            self._run(jobs, finished, progress)
        finally:
            gc.unfreeze()

    def _run(self, jobs: Sequence[Job], finished: Callable[[RunRecord], None], progress: Progress) -> None:
        for number, job in enumerate(jobs):
            progress("sweep", number, len(jobs), _describe(job))
            self._free_prefixes(job)
            started = time.perf_counter()
            with _peak_memory(self.loaded.device) as peak:
                record = self._record(job, progress)
                record.peak_memory_bytes = peak()
            record.seconds = time.perf_counter() - started
            if weights_digest(self.loaded.model) != self._digest:
                raise TrainingError(f"the base's weights changed during {_describe(job)}; its result and all after it "
                                    "would be wrong, so the sweep stops. Results before it are kept.")
            finished(record)
        progress("sweep", len(jobs), len(jobs))

    def _free_prefixes(self, job: Job) -> None:
        """Free the cached prefix of the arms before, but for the last one's: the next goes on from there."""
        first = None if job.arm is None else job.arm.plan.first_block
        if first != self._first_block and self.cache is not None and self.cache.kind == "memory":
            self.cache.clear(keep=1)
        self._first_block = first

    def _record(self, job: Job, progress: Progress) -> RunRecord:
        plan = None if job.arm is None else job.arm.plan.to_dict()
        record = RunRecord(arm=job.name, learning_rate=job.learning_rate, seed=job.seed, status="done", plan=plan)
        try:
            if job.arm is None:
                self._score(record, None, progress)
            else:
                self._train_and_score(job, record, progress)
        except OutputError:
            raise  # a full disk is not the arm's fault
        except Exception as error:  # the boundary of an arm: whatever it was is the arm's result
            record.status, record.tasks = "failed", {}
            record.reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            record.traceback = traceback.format_exc()
            gc.collect()
            if self.loaded.device.type == "cuda":
                torch.cuda.empty_cache()
        return record

    def _train_and_score(self, job: Job, record: RunRecord, progress: Progress) -> None:
        assert job.arm is not None
        assert job.seed is not None
        assert job.learning_rate is not None
        plan = job.arm.plan
        with attach(self.loaded, plan, seed=job.seed, dropout=self.config.training.dropout,
                    start=Start() if plan.method == "full" else self._start) as attachment:
            before = frozen_digests(attachment)
            result = self._train(attachment, job, record, progress)
            record.training = {**result.describe(), "losses": result.losses,
                               "blocks": [asdict(s) for s in result.blocks]}
            record.notes += result.notes
            check_engagement(attachment, before, self._probe).require()
            self._score(record, plan.first_block, progress)

    def _train(self, attachment: Attachment, job: Job, record: RunRecord, progress: Progress) -> TrainResult:
        assert job.learning_rate is not None
        assert job.seed is not None
        settings = self.config.training.settings(job.learning_rate, job.seed)
        cache: PrefixCache | str = "none" if self.cache is None else self.cache

        def run(cache: PrefixCache | str) -> TrainResult:
            with self._tracked(job) as options:
                return train(attachment, self.rows, tokenizer=self.loaded.tokenizer, settings=settings, cache=cache,
                             watch_blocks=True, progress=progress, **options)

        try:
            return run(cache)
        except CacheRefusedError as error:  # raised before the first step
            record.notes.append(f"prefix cache off: {error}")
            return run("none")

    @contextlib.contextmanager
    def _tracked(self, job: Job) -> Iterator[dict[str, Any]]:
        """What a tracker needs: the run's name, for TensorBoard a folder of its own, for wandb an end."""
        if self.config.report_to is None:
            yield {}
            return
        name, before = "TENSORBOARD_LOGGING_DIR", os.environ.get("TENSORBOARD_LOGGING_DIR")
        if before is None and self.trackers is not None:
            os.environ[name] = str(self.trackers / job.key)
        of_the_caller = _open_wandb_run() is not None
        try:
            yield {"report_to": self.config.report_to, "run_name": f"{self.config.name} {job.key}"}
        finally:
            if before is None:
                os.environ.pop(name, None)
            if not of_the_caller and (open_run := _open_wandb_run()) is not None:
                open_run.finish()  # the next arm would go on in this one

    def _score(self, record: RunRecord, first_block: int | None, progress: Progress) -> None:
        for label in self.data.tasks:
            scored = self.scorer.score(label, first_block=first_block, progress=progress)
            if label == VALIDATION:
                record.validation_loss = scored.value
            else:
                record.tasks[label] = scored


def _open_wandb_run() -> Any:
    return getattr(sys.modules.get("wandb"), "run", None)


def _describe(job: Job) -> str:
    if job.arm is None:
        return "base"
    return f"{job.name}, learning rate {job.learning_rate:g}, seed {job.seed}"
