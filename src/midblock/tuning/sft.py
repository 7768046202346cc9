"""`midblock tune`'s trainer: TRL's `SFTTrainer` with the frozen prefix's savings and checkpoints without pickle.

Users of TRL keep its datasets, logging, trackers, callbacks and hub upload. What differs: logits are made for
labelled tokens only, padding is left out, batches hold rows of like length, a non-finite loss stops the run, and
checkpoints hold what is trained and nothing else. This module imports TRL; `midblock.tuning.trainer` does so when a
training starts.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from midblock import ranks
from midblock.data import TokenRow
from midblock.errors import SettingsError, TrainingError
from midblock.models.attention import worth_packing
from midblock.models.quiet import quiet
from midblock.progress import Progress
from midblock.settings.tune import TrainSettings
from midblock.tuning import checkpoints
from midblock.tuning.adapter import Attachment
from midblock.tuning.batching import BatchOrder, RankBatches, collator, labels_of
from midblock.tuning.block_watch import BlockWatch
from midblock.tuning.kernels import supervised_loss
from midblock.tuning.steps import StepLog
from midblock.writing import write_json

__all__ = ["MidblockTrainer", "Watch", "build_trainer", "require_finite"]

_SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}


class _Parts(DataLoader[Any]):
    def set_epoch(self, epoch: int) -> None:
        """The trainer says which epoch begins."""
        self.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]


class MidblockTrainer(SFTTrainer):
    """Use `midblock.tuning.train`, which builds it; the class is public for callbacks and subclasses."""

    def __init__(self, attachment: Attachment, *, order: BatchOrder, plain_head: bool, watch: Watch, **kwargs: Any
                 ) -> None:
        self._attachment = attachment
        self._order = order
        self._plain_head = plain_head
        self._watch = watch
        self.blocks: BlockWatch | None = None
        self.packed = False
        """Whether rows go through the blocks without their padding."""
        # loss, real and supervised tokens (3,); padded tokens, 0: as many as are real
        self._pending: list[tuple[Tensor, int]] = []
        self.steps_per_epoch = 1
        model: Any = attachment.model
        super().__init__(model=model, **kwargs)
        self.model_accepts_loss_kwargs = True  # our loss divides by num_items_in_batch
        # several processes: their models are not wrapped, as `_average_gradients` does what a wrapper would
        self.is_distributed_loading_by_transformers = ranks.size() > 1

    def _get_train_sampler(self, *_: Any, **__: Any) -> Sampler[int]:
        return self._order

    def first_forwards(self, steps: int) -> list[Callable[[], Tensor]]:
        """The forward of each batch of the first epoch, of at most so many; they are made when they are called."""
        rows = list(self._order)
        size = self.args.per_device_train_batch_size
        data: Any = self.train_dataset

        def forward_of(part: list[int]) -> Callable[[], Tensor]:
            return lambda: self.compute_loss(
                self._attachment.model, self._prepare_inputs(self.data_collator([data[i] for i in part])))

        return [forward_of(rows[lo:lo + size]) for lo in range(0, len(rows), size)][:steps]

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Batches; of several processes each gets its part of every one, so that a step is that of one process."""
        if ranks.size() == 1:
            return super().get_train_dataloader()
        return _Parts(self.train_dataset,  # type: ignore[arg-type]
                      batch_sampler=RankBatches(self._order, ranks.rank(), ranks.size()),
                      collate_fn=self.data_collator, pin_memory=self.args.dataloader_pin_memory)

    def _sync_replicated_trainable_parameters(self, model: nn.Module) -> None:
        """Nothing to do: what is trained starts from a seed, alike in every process."""

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """A forward and backward pass; after the last of a step the processes' gradients become one."""
        loss: Tensor = super().training_step(*args, **kwargs)
        if ranks.size() > 1 and self.accelerator.sync_gradients:
            self._average_gradients()
        return loss

    def _average_gradients(self) -> None:
        """Mean over processes of what is trained, in buckets; experts that no token reached anywhere have none."""
        from torch import distributed

        trained = list(self._attachment.trainable.values())
        there = torch.tensor([p.grad is not None for p in trained], dtype=torch.uint8, device=trained[0].device)
        distributed.all_reduce(there, distributed.ReduceOp.MAX)
        bucket: list[Tensor] = []
        for parameter, wanted in zip(trained, there.tolist(), strict=True):
            if not wanted:
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            bucket.append(parameter.grad)
            if sum(g.numel() for g in bucket) >= _BUCKET:
                _mean(bucket, distributed)
                bucket = []
        _mean(bucket, distributed)

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Checkpoints carry no card; `midblock.tuning.export` writes one for the result."""

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False,
                     num_items_in_batch: Tensor | int | None = None) -> Any:
        """Mean loss over labelled tokens; see `supervised_loss`."""
        if return_outputs:  # outputs need the model's own forward
            return super().compute_loss(model, inputs, return_outputs=return_outputs,
                                        num_items_in_batch=num_items_in_batch)
        mask, labels = inputs["attention_mask"], inputs["labels"]
        packed = self.packed and worth_packing(self._attachment.anatomy, mask)
        loss = supervised_loss(self._attachment.anatomy, inputs, plain=self._plain_head, count=num_items_in_batch,
                               packed=packed)
        value = loss.detach()
        # elsewhere asking would leave the device idle before the backward pass; and processes must fail together
        if value.device.type == "cpu" and ranks.size() == 1:
            self._require_finite_loss(value.item(), self.state.global_step + 1)
        if model.training:
            labelled = (labels != -100).sum()
            tokens = mask.sum()
            if ranks.size() > 1:  # a part without rows is one row without labels
                tokens = tokens * (labelled > 0)
            counted = torch.stack([value.double(), tokens.double(), labelled.double()])
            self._pending.append((counted, 0 if packed else mask.numel()))
        return loss * ranks.size()  # gradients, and what trackers are told, are means over processes

    def _require_finite_loss(self, value: float, step: int) -> None:
        if not math.isfinite(value):
            raise TrainingError(f"the loss became {value} in step {step} at a learning rate of "
                                f"{self._get_learning_rate():.3g}")

    def take_step(self) -> tuple[float, int, int, int]:
        """Loss, real, supervised and padded tokens since the last call; the one wait for the device in a step.

        Raises:
            TrainingError: the loss is not finite.
        """
        pending, self._pending = self._pending, []
        counted = torch.stack([p[0] for p in pending]).tolist() if pending else []
        padded = sum(p[1] or int(c[1]) for p, c in zip(pending, counted, strict=True))
        found = ranks.everybody((counted, padded))
        counted, padded = [c for own, _ in found for c in own], sum(of for _, of in found)
        for loss, _, _ in counted:
            self._require_finite_loss(loss, self.state.global_step)
        loss, tokens, supervised = (sum(c[i] for c in counted) for i in range(3))
        self._total_train_tokens += int(tokens)
        self._metrics["train"]["num_tokens"] = [self._total_train_tokens]
        return float(loss), int(tokens), int(supervised), padded

    # ------------------------------------------------------------------ checkpoints

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        require_finite(self._attachment, self.state.global_step)
        folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        ranks.first(lambda: checkpoints.begin(folder))
        with quiet():
            super()._save_checkpoint(model, trial)
        ranks.everybody(None)  # each process writes its random state
        ranks.first(lambda: checkpoints.complete(
            folder, self.state.global_step, [asdict(s) for s in self._watch.steps],
            [] if self.blocks is None else [asdict(s) for s in self.blocks.steps]))

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if ranks.follows():
            return
        folder = Path(str(output_dir or self.args.output_dir))
        self._attachment.save(folder)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)
        write_json(folder / "training_args.json", self.args.to_dict())

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self._attachment.is_peft:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            self._attachment.load(resume_from_checkpoint)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if ranks.follows():
            return
        assert self.optimizer is not None
        assert self.lr_scheduler is not None
        checkpoints.save_tree({"optimizer": self.optimizer.state_dict(), "scheduler": self.lr_scheduler.state_dict()},
                              Path(output_dir) / "optimizer")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        assert self.optimizer is not None
        assert self.lr_scheduler is not None
        state = checkpoints.load_tree(Path(checkpoint) / "optimizer")
        self.optimizer.load_state_dict(state["optimizer"])
        self.lr_scheduler.load_state_dict(state["scheduler"])

    def _save_rng_state(self, output_dir: str) -> None:
        checkpoints.save_tree(checkpoints.random_state(), Path(output_dir) / f"random_{self.args.process_index}")

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            own = Path(checkpoint) / f"random_{self.args.process_index}"
            # a job of more processes than the interrupted one
            checkpoints.load_random_state(checkpoints.load_tree(
                own if own.with_suffix(".json").is_file() else own.with_name("random_0")))


_BUCKET = 25_000_000
"""Numbers that are sent together."""


def _mean(gradients: Sequence[Tensor], distributed: Any) -> None:
    """Replace gradients by their means over processes."""
    if not gradients:
        return
    flat = torch.cat([g.reshape(-1).float() for g in gradients])
    distributed.all_reduce(flat)
    flat /= ranks.size()
    for gradient, own in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(own.view_as(gradient))


def require_finite(attachment: Attachment, step: int) -> None:
    """Raise `TrainingError` where a trained tensor is not finite."""
    for name, parameter in attachment.trainable.items():
        if not bool(torch.isfinite(parameter).all()):
            raise TrainingError(f"{name} has NaN or infinity after step {step}")


class Watch(TrainerCallback):
    """Times steps, keeps their losses (across interruptions), reports progress, decides when to save."""

    def __init__(self, progress: Progress, save_seconds: float | None, log: Path | None) -> None:
        self.trainer: MidblockTrainer | None = None
        self.steps: list[StepLog] = []
        self._progress = progress
        self._save_seconds = save_seconds
        self._log = log
        self._began = self._saved = time.perf_counter()

    def restore(self, steps: Sequence[StepLog]) -> None:
        """Steps of the interrupted run, as its checkpoint holds them; the log file is written anew."""
        self.steps = list(steps)
        if self._log is not None:
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
        entry = StepLog(state.global_step, epoch, loss, tokens, supervised, padded, now - self._began)
        self.steps.append(entry)
        if self._log is not None:
            with self._log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(entry)) + "\n")
        recent = self.steps[-20:]
        rate = sum(s.tokens for s in recent) / max(1e-9, sum(s.seconds for s in recent))
        self._progress("tune", state.global_step, state.max_steps, f"loss {loss:.3f}, {rate:,.0f} tokens/s")
        last = state.global_step >= state.max_steps
        if self._save_seconds is not None and ranks.first(
                lambda: last or now - self._saved >= (self._save_seconds or 0.0)):
            control.should_save = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl,
                **kwargs: Any) -> None:
        self._saved = time.perf_counter()


def build_trainer(attachment: Attachment, rows: list[TokenRow], tokenizer: Any, settings: TrainSettings, place: Path, *,
                  plain: bool, watch: Watch, callbacks: Sequence[TrainerCallback], save_steps: int | None,
                  report_to: str | Sequence[str], trl_options: dict[str, Any]) -> MidblockTrainer:
    """The trainer of one run.

    Raises:
        SettingsError: TRL does not accept an option.
    """
    from datasets import Dataset
    from transformers import PrinterCallback, ProgressCallback

    from midblock.data import pad_token_id

    order = BatchOrder([len(r) for r in rows], settings.batch_size, settings.seed, settings.order)
    steps = settings.num_steps(len(rows))
    device = next(iter(attachment.trainable.values())).device
    options: dict[str, Any] = {
        # of several processes each takes a part of the batch
        "output_dir": str(place), "max_steps": steps, "per_device_train_batch_size": settings.batch_size,
        "gradient_accumulation_steps": settings.accumulate,
        "learning_rate": settings.peak_rate(attachment.plan.method),
        "lr_scheduler_type": _SCHEDULES[settings.schedule], "warmup_steps": int(settings.warmup * steps),
        "weight_decay": settings.weight_decay, "max_grad_norm": settings.max_grad_norm,
        "gradient_checkpointing": settings.gradient_checkpointing,
        "seed": settings.seed, "data_seed": settings.seed,
        # weights are in the dtype they were loaded in; adapters are float32
        "bf16": False, "fp16": False, "use_cpu": device.type == "cpu",
        "packing": False, "max_length": None, "dataset_kwargs": {"skip_prepare_dataset": True},
        "save_strategy": "no" if save_steps is None else "steps",
        "save_total_limit": None,  # `checkpoints.complete` removes old ones, and only those that it made
        "logging_steps": 10, "report_to": report_to, "disable_tqdm": True, "router_aux_loss_coef": 0.0,
        "dataloader_pin_memory": device.type == "cuda", **trl_options}
    if save_steps is not None:
        options["save_steps"] = save_steps
    try:
        arguments = SFTConfig(**options)
        data = Dataset.from_dict({"input_ids": [list(r.ids) for r in rows], "labels": [labels_of(r) for r in rows]})
        with quiet():
            trainer = MidblockTrainer(
                attachment, order=order, plain_head=plain, watch=watch, args=arguments, train_dataset=data,
                processing_class=tokenizer, data_collator=collator(pad_token_id(tokenizer)),
                callbacks=[watch, *callbacks])
    except (TypeError, ValueError) as error:
        raise SettingsError(f"TRL does not accept these settings: {' '.join(str(error).split())}.") from None
    except (ImportError, RuntimeError) as error:
        if report_to in ("none", ["none"], []):
            raise
        raise SettingsError(f"the tracker {report_to} cannot be used: {' '.join(str(error).split())}") from None
    trainer.steps_per_epoch = settings.steps_per_epoch(len(rows))
    for kind in (PrinterCallback, ProgressCallback):  # stdout belongs to results
        trainer.remove_callback(kind)
    watch.trainer = trainer
    return trainer
