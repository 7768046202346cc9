"""Execution of a sweep's runs. One interface, `Engine`; `LocalEngine` works in this process."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import hashlib
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from midblock.data import Dataset, TokenRows, load_data, tokenize
from midblock.errors import (
    CacheRefusedError,
    DataError,
    OutputError,
    SettingsError,
    TrainingError,
)
from midblock.progress import Progress, silent
from midblock.provenance import peak_memory_bytes
from midblock.sweeps.arms import Job
from midblock.sweeps.config import DataConfig, SweepConfig, TaskConfig
from midblock.sweeps.records import RunRecord
from midblock.sweeps.scoring import Scorer, load_task_data
from midblock.tuning import PrefixCache
from midblock.tuning.adapter import Attachment, attach
from midblock.tuning.trainer import TrainResult, train

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from midblock.models import LoadedModel

__all__ = ["Engine", "LocalEngine", "SweepData", "load_sweep_data", "weights_digest"]

VALIDATION = "validation"
# tokens on which a trained arm must differ from the base
_PROBE_TOKENS = 32


class Engine(Protocol):
    """Runs jobs; where and in which order is its own affair."""

    def run(self, jobs: Sequence[Job], finished: Callable[[RunRecord], None], *,
            progress: Progress = silent) -> None:
        """Run every job and hand over each record as soon as it is there, failed ones too."""
        ...


# ---------------------------------------------------------------- data, once for all arms

class SweepData:
    """Everything that runs are trained and scored on.

    Attributes:
        train: Training rows' data set.
        validation: Rows that choose among learning rates; None without a grid.
        tasks: Task settings by label, evaluation first.
        items: Items by label.
    """

    def __init__(self, config: SweepConfig) -> None:
        self.train, self.validation = _training_data(config.train)
        self.tasks: dict[str, TaskConfig] = {t.label: t for t in (*config.evaluation, *config.retention)}
        self.items: dict[str, Dataset] = {label: load_task_data(t) for label, t in self.tasks.items()}
        evaluated = {t.label for t in config.evaluation}
        for label in evaluated:
            _refuse_overlap(self.train, self.items[label], label)
        if self.validation is not None:
            _refuse_overlap(self.train, self.validation, "validation")

    def describe(self) -> dict[str, Any]:
        """What ``run.json`` stores."""
        from midblock.provenance import sha256_of

        parts = {"train": self.train, **({VALIDATION: self.validation} if self.validation is not None else {}),
                 **self.items}
        return {"fingerprint": sha256_of(*(d.fingerprint for d in parts.values())),
                "parts": {name: d.describe() for name, d in parts.items()}}


def load_sweep_data(config: SweepConfig) -> SweepData:
    """Load all rows of a sweep, once.

    Raises:
        DataError: rows cannot be loaded, or an evaluation item occurs in the training rows.
    """
    return SweepData(config)


def _training_data(wanted: DataConfig) -> tuple[Dataset, Dataset | None]:
    held = wanted.validation
    samples = None if wanted.samples is None else wanted.samples + held
    rows = load_data(wanted.data, split=wanted.split, samples=samples, seed=wanted.seed)
    if not held:
        return rows, None
    count = len(rows) - held
    if count < 1:
        raise DataError(f"train: {rows.name} ({rows.split}) has {len(rows)} rows, {held} of them are wanted for "
                        "validation; ask for fewer.")
    return _part(rows, 0, count), _part(rows, count, len(rows))


def _part(rows: Dataset, start: int, stop: int) -> Dataset:
    from dataclasses import replace

    return replace(rows, examples=rows.examples[start:stop], fingerprint="")


def _refuse_overlap(train: Dataset, items: Dataset, label: str) -> None:
    def content(data: Dataset) -> set[str]:
        return {e.text if e.prompt is None else e.prompt for e in data}

    if shared := content(train) & content(items):
        raise DataError(f"{len(shared)} of the {len(items)} items of {label} also occur in the training rows "
                        f"({train.name}, {train.split}); a score on them would show memory. Use another split.")


def token_rows(data: Dataset, tokenizer: PreTrainedTokenizerBase, wanted: DataConfig) -> TokenRows:
    """Training rows; the loss counts completions where the data have them, else every token."""
    supervised = all(e.messages is not None or e.completion is not None for e in data)
    return tokenize(data, tokenizer, max_length=wanted.max_length, supervised=supervised, chat=wanted.chat)


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


def _logits(loaded: LoadedModel, ids: Tensor) -> Tensor:
    with torch.inference_mode():
        logits: Tensor = loaded.model(input_ids=ids, use_cache=False).logits.float()
    return logits


def _engaged(attachment: Attachment, before: dict[str, Tensor]) -> None:
    """Every trained tensor moved.

    Raises:
        TrainingError: some did not; the arm would be scored as something it is not.
    """
    after = attachment.state()
    # LoRA's A moves only once B has; B tells whether the module learned
    watched = [n for n in after if not attachment.is_peft or "lora_A" not in n]
    still = [n for n in watched if torch.equal(after[n], before[n])]
    if still:
        raise TrainingError(f"{len(still)} of {len(watched)} trained tensors did not move ({still[0]}); the learning "
                            "rate or the number of steps is too small for a result.")


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
        tasks, items = dict(data.tasks), dict(data.items)
        if data.validation is not None:
            has_answers = all(e.completion is not None for e in data.validation)
            tasks[VALIDATION] = TaskConfig(
                task="answer_loss" if has_answers else "perplexity", data=config.train.data,
                max_length=config.train.max_length, chat=config.train.chat)
            items[VALIDATION] = data.validation
        self.scorer = Scorer(loaded, tasks, items)
        self.cache = PrefixCache.from_spec(config.cache, limit_bytes=config.cache_limit)
        self._digest = weights_digest(loaded.model)
        self._probe = torch.tensor([self.rows.rows[0].ids[:_PROBE_TOKENS]], device=loaded.device)
        self._first_block: int | None = None

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
            progress("sweep", number, len(jobs), _words(job))
            self._turn_to(job)
            started = time.perf_counter()
            with _peak_memory(self.loaded.device) as peak:
                record = self._record(job, progress)
                record.peak_memory_bytes = peak()
            record.seconds = time.perf_counter() - started
            if weights_digest(self.loaded.model) != self._digest:
                raise TrainingError(f"the base's weights changed during {_words(job)}; its result and all after it "
                                    "would be wrong, so the sweep stops. Results before it are kept.")
            finished(record)
        progress("sweep", len(jobs), len(jobs))

    def _turn_to(self, job: Job) -> None:
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
        with attach(self.loaded, plan, seed=job.seed,
                    dropout=self.config.training.dropout) as attachment:
            before, logits = attachment.state(), _logits(self.loaded, self._probe)
            result = self._train(attachment, job, record, progress)
            record.training = {**result.describe(), "losses": result.losses}
            record.notes += result.notes
            _engaged(attachment, before)
            if torch.equal(logits, _logits(self.loaded, self._probe)):
                raise TrainingError("training moved the weights but not the logits; the update is too small for "
                                    f"{str(self.loaded.dtype).removeprefix('torch.')}.")
            del before, logits
            self._score(record, plan.first_block, progress)

    def _train(self, attachment: Attachment, job: Job, record: RunRecord, progress: Progress) -> TrainResult:
        assert job.learning_rate is not None
        assert job.seed is not None
        settings = self.config.training.settings(job.learning_rate, job.seed)
        cache: PrefixCache | str = "none" if self.cache is None else self.cache
        try:
            return train(attachment, self.rows, tokenizer=self.loaded.tokenizer, settings=settings, cache=cache,
                         progress=progress)
        except CacheRefusedError as error:  # raised before the first step
            record.notes.append(f"prefix cache off: {error}")
            return train(attachment, self.rows, tokenizer=self.loaded.tokenizer, settings=settings, cache="none",
                         progress=progress)

    def _score(self, record: RunRecord, first_block: int | None, progress: Progress) -> None:
        if VALIDATION in self.scorer.tasks:
            record.validation_loss = self.scorer.score(VALIDATION, first_block=first_block,
                                                       progress=progress).value
        for label in self.data.tasks:
            record.tasks[label] = self.scorer.score(label, first_block=first_block, progress=progress)


def _words(job: Job) -> str:
    if job.arm is None:
        return "base"
    return f"{job.name}, learning rate {job.learning_rate:g}, seed {job.seed}"


def make_engine(config: SweepConfig, loaded: LoadedModel, data: SweepData) -> Engine:
    """The engine that the configuration names.

    Raises:
        SettingsError: there is no such engine.
    """
    if config.engine == "local":
        return LocalEngine(config, loaded, data)
    raise SettingsError(f"engine {config.engine!r} is not known; there is: local.")
