"""Training what a plan names, on TRL's `SFTTrainer`.

Users of TRL keep its datasets, logging, trackers, callbacks, checkpoints and hub upload
(`MidblockTrainer` is an `SFTTrainer`). What differs: the frozen prefix is neither differentiated nor
recomputed, logits are made for labelled tokens only, padding is left out, a non-finite loss stops the
run, and an interrupted run resumes to the result of an uninterrupted one.
"""

from __future__ import annotations

import contextlib
import json
import math
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from midblock.data import TokenRow, TokenRows
from midblock.errors import DataError, OutputError, SettingsError, TrainingError
from midblock.models import Anatomy, quiet
from midblock.models.attention import can_pack, dense_attention, worth_packing
from midblock.progress import Progress, silent
from midblock.provenance import peak_memory_bytes, sha256_of, write_json
from midblock.tuning.adapter import Attachment
from midblock.tuning.cache import PrefixCache
from midblock.tuning.kernels import has_plain_head, lean_lora, supervised_loss
from midblock.tuning.prefix import FrozenPrefix

__all__ = ["MidblockTrainer", "StepLog", "TrainResult", "TrainSettings", "batch_plan", "train"]

Schedule = Literal["linear", "cosine", "constant"]
Order = Literal["length", "random"]
_SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}
LEARNING_RATES = {"lora": 5e-4, "dora": 5e-4, "full": 5e-5}
COMPLETE = "midblock_complete.json"


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """How to train. What to train is the plan's; on which tokens, the rows'."""

    epochs: float = 2.0
    """Passes over the rows; fractions allowed. Ignored where ``steps`` is set."""
    steps: int | None = None
    """Optimizer steps, whatever the number of rows."""
    learning_rate: float | None = None
    """Peak learning rate. Unset: 5e-4 for LoRA and DoRA, 5e-5 for full-rank updates."""
    batch_size: int = 8
    """Rows in one forward."""
    accumulate: int = 1
    """Forwards in one optimizer step."""
    warmup: float = 0.05
    """Share of the steps over which the learning rate rises."""
    schedule: Schedule = "linear"
    """Of the learning rate after the rise."""
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm; 0: never."""
    gradient_checkpointing: bool = False
    """Keep fewer activations of the blocks that run, at the cost of a second forward of them."""
    seed: int = 0
    """Of the data order and of dropout."""
    order: Order = "length"
    """Rows of a batch: of like ``length`` (least padding), or drawn at ``random`` as trainers usually do."""
    lean: bool = True
    """The kernels of `midblock.tuning.kernels`; off: PEFT's and PyTorch's own (for comparison)."""

    def __post_init__(self) -> None:
        wrong = []
        if self.steps is not None and self.steps < 1:
            wrong.append(f"steps {self.steps} must be 1 or more")
        if self.steps is None and not (self.epochs > 0 and math.isfinite(self.epochs)):
            wrong.append(f"epochs {self.epochs} must be above 0")
        if self.learning_rate is not None and not (self.learning_rate > 0 and math.isfinite(self.learning_rate)):
            wrong.append(f"learning rate {self.learning_rate} must be a number above 0")
        if self.batch_size < 1 or self.accumulate < 1:
            wrong.append(f"batch size {self.batch_size} and accumulation {self.accumulate} must be 1 or more")
        if not 0 <= self.warmup < 1:
            wrong.append(f"warmup {self.warmup} is a share, 0 up to 1")
        if self.schedule not in _SCHEDULES:
            wrong.append(f"schedule {self.schedule!r} is not one of {', '.join(_SCHEDULES)}")
        if self.order not in ("length", "random"):
            wrong.append(f"order {self.order!r} is not length or random")
        if self.weight_decay < 0 or self.max_grad_norm < 0:
            wrong.append("weight decay and gradient norm must not be negative")
        if wrong:
            raise SettingsError(f"training settings: {'; '.join(wrong)}.")

    def num_steps(self, rows: int) -> int:
        """Optimizer steps for a number of rows."""
        if self.steps is not None:
            return self.steps
        per_epoch = math.ceil(math.ceil(rows / self.batch_size) / self.accumulate)
        return max(1, math.ceil(self.epochs * per_epoch))


@dataclass(frozen=True, slots=True)
class StepLog:
    """One optimizer step. Losses are means over labelled tokens, in nats."""

    step: int
    epoch: int
    loss: float
    tokens: int
    """Real tokens (padding left out) of the step."""
    supervised: int
    padded: int
    """Tokens that went through the blocks, padding included."""
    seconds: float


@dataclass
class TrainResult:
    """What training measured. The adapter itself is in the `Attachment`."""

    steps: list[StepLog]
    seconds: float
    """Time in steps, without saving and setting up."""
    peak_memory_bytes: int
    """Peak of the device where it counts memory, else of the process."""
    prefix: dict[str, Any]
    """`FrozenPrefix.describe`."""
    notes: list[str] = field(default_factory=list)
    resumed_from: int = 0
    """Step that this call started from; 0 without a checkpoint."""

    @property
    def tokens_per_second(self) -> float:
        """Real tokens per second over all steps of this call."""
        own = [s for s in self.steps if s.step > self.resumed_from]
        seconds = sum(s.seconds for s in own)
        return sum(s.tokens for s in own) / seconds if seconds else math.nan

    def tokens_per_second_of_epoch(self, epoch: int) -> float:
        """Real tokens per second of one epoch (the first fills the prefix cache)."""
        own = [s for s in self.steps if s.epoch == epoch]
        seconds = sum(s.seconds for s in own)
        return sum(s.tokens for s in own) / seconds if seconds else math.nan

    @property
    def losses(self) -> list[float]:
        """Loss of every step."""
        return [s.loss for s in self.steps]

    def final_loss(self, share: float = 0.1) -> float:
        """Mean loss of the last tenth of the steps."""
        tail = self.losses[-max(1, round(len(self.steps) * share)):]
        return sum(tail) / len(tail)

    def describe(self) -> dict[str, Any]:
        """JSON-ready summary without the single steps."""
        epochs = sorted({s.epoch for s in self.steps})
        return {"steps": len(self.steps), "seconds": self.seconds, "first_loss": self.losses[0],
                "final_loss": self.final_loss(), "tokens": sum(s.tokens for s in self.steps),
                "supervised_tokens": sum(s.supervised for s in self.steps),
                "padding_share": 1 - sum(s.tokens for s in self.steps) / max(1, sum(s.padded for s in self.steps)),
                "tokens_per_second": self.tokens_per_second,
                "tokens_per_second_by_epoch": {str(e + 1): self.tokens_per_second_of_epoch(e) for e in epochs},
                "peak_memory_bytes": self.peak_memory_bytes, "prefix": self.prefix,
                "resumed_from": self.resumed_from, "notes": self.notes}


# ---------------------------------------------------------------------------------------------
# data order


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


class _BatchOrder(Sampler[int]):
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

    def __iter__(self) -> Iterator[int]:
        order = list(range(self._full))
        random.Random(f"midblock order {self._seed} {self.epoch}").shuffle(order)
        for number in (*order, *range(self._full, len(self._batches))):
            yield from self._batches[number]


def _collator(pad_id: int) -> Callable[[list[dict[str, Any]]], dict[str, Tensor]]:
    def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
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


def _labels(row: TokenRow) -> list[int]:
    if not row.supervised:
        return list(row.ids)
    labels = [-100] * len(row.ids)
    for start, stop in row.supervised:
        labels[start:stop] = row.ids[start:stop]
    return labels


# ---------------------------------------------------------------------------------------------
# the trainer


class MidblockTrainer(SFTTrainer):
    """TRL's trainer with logits for labelled tokens only, no compute on padding where `can_pack` holds,
    batches of like length, and checkpoints that hold what is trained and nothing else.

    Use `train`, which builds it; the class is public for callbacks and subclasses.
    """

    def __init__(self, attachment: Attachment, *, order: _BatchOrder, plain_head: bool, **kwargs: Any) -> None:
        self._attachment = attachment
        self._order = order
        self._plain_head = plain_head
        self.packed = False
        """Whether rows go through the blocks without their padding."""
        self._pending: list[tuple[Tensor, int, int, int]] = []
        self.steps_per_epoch = 1
        model: Any = attachment.model
        super().__init__(model=model, **kwargs)
        self.model_accepts_loss_kwargs = True  # our loss divides by num_items_in_batch

    def _get_train_sampler(self, *_: Any, **__: Any) -> Sampler[int]:
        return self._order

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Checkpoints carry no card; `midblock.tuning.export` writes one for the result."""

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False,
                     num_items_in_batch: Tensor | int | None = None) -> Any:
        """Mean loss over labelled tokens; see `supervised_loss`."""
        if return_outputs or self.accelerator.num_processes > 1:
            # wrappers of several processes must see the call; outputs need the model's own forward
            return super().compute_loss(model, inputs, return_outputs=return_outputs,
                                        num_items_in_batch=num_items_in_batch)
        mask, labels = inputs["attention_mask"], inputs["labels"]
        packed = self.packed and worth_packing(self._attachment.anatomy, mask)
        loss = supervised_loss(self._attachment.anatomy, inputs, plain=self._plain_head, count=num_items_in_batch,
                               packed=packed)
        value = loss.detach()
        if not bool(torch.isfinite(value)):
            raise TrainingError(f"the loss became {value.item()} in step {self.state.global_step + 1} at a learning "
                                f"rate of {self._get_learning_rate():.3g}")
        if model.training:
            tokens = int(mask.sum())
            self._pending.append((value, tokens, int((labels != -100).sum()), tokens if packed else mask.numel()))
            self._total_train_tokens += self._pending[-1][1]
            self._metrics["train"]["num_tokens"] = [self._total_train_tokens]
        return loss

    def take_step(self) -> tuple[float, int, int, int]:
        """Loss, real, supervised and padded tokens since the last call."""
        pending, self._pending = self._pending, []
        return (sum(p[0].item() for p in pending), sum(p[1] for p in pending), sum(p[2] for p in pending),
                sum(p[3] for p in pending))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        _require_finite(self._attachment, self.state.global_step)
        with quiet():
            super()._save_checkpoint(model, trial)
        folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        # written last: a checkpoint without it was cut short and is not resumed from
        write_json(folder / COMPLETE, {"step": self.state.global_step})

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if self._attachment.is_peft:
            super()._save(output_dir, state_dict)
            return
        folder = Path(str(output_dir or self.args.output_dir))
        self._attachment.save(folder)
        torch.save(self.args, folder / "training_args.bin")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self._attachment.is_peft:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            self._attachment.load(resume_from_checkpoint)


def _require_finite(attachment: Attachment, step: int) -> None:
    for name, parameter in attachment.trainable.items():
        if not bool(torch.isfinite(parameter).all()):
            raise TrainingError(f"{name} has NaN or infinity after step {step}")


class _Watch(TrainerCallback):
    """Times steps, keeps their losses (across interruptions), reports progress, decides when to save."""

    def __init__(self, progress: Progress, save_seconds: float | None, log: Path | None) -> None:
        self.trainer: MidblockTrainer | None = None
        self.steps: list[StepLog] = []
        self._progress = progress
        self._save_seconds = save_seconds
        self._log = log
        self._began = self._saved = time.perf_counter()

    def restore(self, upto: int) -> None:
        """Steps of the interrupted run up to the checkpoint's."""
        if self._log is None or not self._log.is_file():
            return
        for line in self._log.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError, TypeError):  # a last line that was cut short
                entry = StepLog(**json.loads(line))
                if entry.step <= upto and (not self.steps or entry.step == self.steps[-1].step + 1):
                    self.steps.append(entry)
        self._log.write_text("".join(json.dumps(asdict(s)) + "\n" for s in self.steps), encoding="utf-8")

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl,
                       **kwargs: Any) -> None:
        self._saved = time.perf_counter()

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl,
                      **kwargs: Any) -> None:
        self._began = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl,
                    **kwargs: Any) -> None:
        assert self.trainer is not None
        loss, tokens, supervised, padded = self.trainer.take_step()
        now = time.perf_counter()
        epoch = (state.global_step - 1) // self.trainer.steps_per_epoch
        entry = StepLog(state.global_step, epoch, loss, tokens, supervised, padded,
                        now - self._began)
        self.steps.append(entry)
        if self._log is not None:
            with self._log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(entry)) + "\n")
        recent = self.steps[-20:]
        rate = sum(s.tokens for s in recent) / max(1e-9, sum(s.seconds for s in recent))
        self._progress("tune", state.global_step, state.max_steps, f"loss {loss:.3f}, {rate:,.0f} tokens/s")
        last = state.global_step >= state.max_steps
        if self._save_seconds is not None and (last or now - self._saved >= self._save_seconds):
            control.should_save = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl,
                **kwargs: Any) -> None:
        self._saved = time.perf_counter()


# ---------------------------------------------------------------------------------------------
# one run


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint of a run; what a killed process left half-written is removed."""
    found: list[tuple[int, Path]] = []
    for path in folder.glob("checkpoint-*"):
        number = path.name.removeprefix("checkpoint-")
        if not number.isdigit():
            continue
        if (path / COMPLETE).is_file():
            found.append((int(number), path))
        else:
            shutil.rmtree(path, ignore_errors=True)
    return max(found)[1] if found else None


@contextlib.contextmanager
def _random_state_kept() -> Iterator[None]:
    """Trainers seed every global generator; the caller's go on as if nothing had happened."""
    python, torch_state = random.getstate(), torch.get_rng_state()
    numpy_state = np.random.get_state()  # noqa: NPY002  the global generator is what trainers seed
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy_state)  # noqa: NPY002
        torch.set_rng_state(torch_state)


@contextlib.contextmanager
def _untouched(anatomy: Anatomy) -> Iterator[None]:
    """Undo what TRL does to a model that it trains: patched forward, config entries, tags, hooks."""
    lm = anatomy.causal_lm
    had_forward = lm.__dict__.get("forward")
    configs: list[Any] = [lm.config, lm.config.get_text_config(), getattr(lm, "generation_config", None)]
    entries = [(c, dict(vars(c))) for c in configs if c is not None]
    tags = list(getattr(lm, "model_tags", None) or []) or None
    try:
        yield
    finally:
        if had_forward is None:
            lm.__dict__.pop("forward", None)
        else:
            lm.forward = had_forward
        for config, values in entries:
            vars(config).clear()
            vars(config).update(values)
        lm.model_tags = tags
        if getattr(lm, "is_gradient_checkpointing", False):
            lm.gradient_checkpointing_disable()
        with contextlib.suppress(AttributeError):
            lm.disable_input_require_grads()


def _prefix_cache(cache: str | PrefixCache | None) -> tuple[str | PrefixCache | None, bool]:
    """The cache to try, and whether it may be given up where it cannot be exact."""
    return ("memory", True) if cache == "auto" else (cache, False)


def _device_peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_memory_bytes()


def train(attachment: Attachment, rows: TokenRows | Sequence[TokenRow], *, tokenizer: Any,
          settings: TrainSettings | None = None, cache: str | PrefixCache | None = "auto",
          folder: Path | str | None = None, resume: bool = False, save_steps: int | None = None,
          save_seconds: float = 60.0, progress: Progress = silent,
          callbacks: Sequence[TrainerCallback] = (), report_to: str | Sequence[str] = "none",
          **trl_options: Any) -> TrainResult:
    """Train what is attached.

    Args:
        attachment: From `attach`; its parameters are changed in place.
        rows: Tokenised examples; ``supervised`` spans say what the loss counts.
        tokenizer: The model's tokenizer (padding token, stored with checkpoints).
        settings: See `TrainSettings`.
        cache: ``auto`` (in memory where that is exact, else none), ``none``, ``memory``,
            ``disk:DIR``, or a `PrefixCache` shared with other runs.
        folder: Where checkpoints go; None keeps none.
        resume: Go on from the last complete checkpoint in ``folder`` (from the start if there is
            none). The result is that of an uninterrupted run.
        save_steps: Checkpoint after every so many steps; by default every ``save_seconds`` and
            at the end of the last step.
        progress: Called after every step with loss and tokens/s.
        callbacks: transformers' callbacks, for the user's own needs.
        report_to: Trackers, as for TRL.
        trl_options: Further `trl.SFTConfig` fields (``optim="adafactor"``, hub upload ...).

    Raises:
        TrainingError: loss or weights became non-finite; the last good checkpoint is kept and named.
        CacheRefusedError: a cache was asked for by name where it cannot be exact.
        DataError: no rows.
        OutputError: the disk is full.
    """
    settings = settings if settings is not None else TrainSettings()
    token_rows = list(rows)
    if not token_rows:
        raise DataError("there is no row to train on; use a data set that is not empty.")
    wanted, may_give_up = _prefix_cache(cache)
    notes: list[str] = []
    with contextlib.ExitStack() as stack:
        stack.enter_context(_random_state_kept())
        stack.enter_context(_untouched(attachment.anatomy))
        place = Path(folder) if folder is not None else Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="midblock-")))
        # the probe of the head runs the model's own forward, so before TRL patches that
        plain = has_plain_head(attachment.anatomy)
        watch = _Watch(progress, save_seconds if folder is not None and save_steps is None else None,
                       place / "steps.jsonl" if folder is not None else None)
        trainer = _build(attachment, token_rows, tokenizer, settings, place, plain, watch, callbacks,
                         save_steps if folder is not None else None, report_to, trl_options)
        start = last_checkpoint(place) if resume else None
        begun = int(start.name.removeprefix("checkpoint-")) if start is not None else 0
        if folder is not None:
            place.mkdir(parents=True, exist_ok=True)
            watch.restore(begun)
        if begun >= trainer.args.max_steps:
            trainer._load_from_checkpoint(str(start))
            return _result(watch, attachment, {}, notes, begun)
        if attachment.anatomy.embeddings.weight.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        if settings.lean:
            stack.enter_context(dense_attention(attachment.base))
            stack.enter_context(lean_lora(attachment.base))
            trainer.packed = plain and can_pack(attachment.anatomy)
        prefix = FrozenPrefix(attachment.base, cache=wanted, on_refusal="uncached" if may_give_up else "raise")
        attachment.model.train()  # dropout shows in this mode
        prefix.prepare()
        stack.enter_context(prefix)
        try:
            trainer.train(resume_from_checkpoint=None if start is None else str(start))
            _require_finite(attachment, trainer.state.global_step)
        except TrainingError as error:
            raise TrainingError(_what_is_kept(str(error), place if folder is not None else None)) from None
        except OSError as error:
            raise OutputError(f"cannot write a checkpoint to {place}: {error.strerror or error}.") from error
        attachment.model.eval()
        return _result(watch, attachment, prefix.describe(), notes + prefix.notes, begun)


def _result(watch: _Watch, attachment: Attachment, prefix: dict[str, Any], notes: list[str],
            begun: int) -> TrainResult:
    device = next(iter(attachment.trainable.values())).device
    return TrainResult(watch.steps, sum(s.seconds for s in watch.steps), _device_peak(device), prefix, notes, begun)


def _what_is_kept(problem: str, folder: Path | None) -> str:
    kept = last_checkpoint(folder) if folder is not None else None
    where = (f"the last good state is {kept}" if kept is not None else
             "no checkpoint had been written" if folder is not None else "nothing was kept: no folder was given")
    return f"{problem}; training stopped, {where}. Use a lower learning rate."


def _build(attachment: Attachment, rows: list[TokenRow], tokenizer: Any, settings: TrainSettings, place: Path,
           plain: bool, watch: _Watch, callbacks: Sequence[TrainerCallback], save_steps: int | None,
           report_to: str | Sequence[str], trl_options: dict[str, Any]) -> MidblockTrainer:
    from datasets import Dataset

    from midblock.data import pad_token_id

    order = _BatchOrder([len(r) for r in rows], settings.batch_size, settings.seed, settings.order)
    rate = settings.learning_rate
    steps = settings.num_steps(len(rows))
    device = next(iter(attachment.trainable.values())).device
    options: dict[str, Any] = {
        "output_dir": str(place), "max_steps": steps, "per_device_train_batch_size": settings.batch_size,
        "gradient_accumulation_steps": settings.accumulate,
        "learning_rate": LEARNING_RATES[attachment.plan.method] if rate is None else rate,
        "lr_scheduler_type": _SCHEDULES[settings.schedule], "warmup_steps": int(settings.warmup * steps),
        "weight_decay": settings.weight_decay, "max_grad_norm": settings.max_grad_norm,
        "gradient_checkpointing": settings.gradient_checkpointing,
        "seed": settings.seed, "data_seed": settings.seed,
        # weights are in the dtype they were loaded in; adapters are float32
        "bf16": False, "fp16": False, "use_cpu": device.type == "cpu",
        "packing": False, "max_length": None, "dataset_kwargs": {"skip_prepare_dataset": True},
        "save_strategy": "no" if save_steps is None else "steps", "save_total_limit": 2,
        "logging_steps": 10, "report_to": report_to, "disable_tqdm": True, "router_aux_loss_coef": 0.0,
        "dataloader_pin_memory": device.type == "cuda", **trl_options}
    if save_steps is not None:
        options["save_steps"] = save_steps
    try:
        arguments = SFTConfig(**options)
    except (TypeError, ValueError) as error:
        raise SettingsError(f"TRL does not accept these settings: {error}.") from None
    data = Dataset.from_dict({"input_ids": [list(r.ids) for r in rows], "labels": [_labels(r) for r in rows]})
    with quiet():
        trainer = MidblockTrainer(
            attachment, order=order, plain_head=plain, args=arguments, train_dataset=data,
            processing_class=tokenizer, data_collator=_collator(pad_token_id(tokenizer)),
            callbacks=[watch, *callbacks])
    trainer.steps_per_epoch = max(1, math.ceil(math.ceil(len(rows) / settings.batch_size) / settings.accumulate))
    _silence(trainer)
    watch.trainer = trainer
    return trainer


def _silence(trainer: MidblockTrainer) -> None:
    """Keep the trainer's own lines off stdout, which belongs to results."""
    from transformers import PrinterCallback, ProgressCallback

    for kind in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(kind)
