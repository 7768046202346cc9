"""Training what a plan names.

`train` runs `midblock.tuning.sft.MidblockTrainer`, an `SFTTrainer` of TRL, around which nothing stays changed: the
caller's random numbers and the model's forward, config and hooks are as before. The frozen prefix is neither
differentiated nor recomputed, and an interrupted run resumes to the result of an uninterrupted one.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from midblock import ranks
from midblock.data import TokenRow, TokenRows, pad_token_id
from midblock.errors import DataError, SettingsError, TrainingError
from midblock.models import Anatomy
from midblock.models.attention import can_pack, dense_attention
from midblock.models.forwards import forwards_kept
from midblock.progress import Progress, silent
from midblock.provenance import peak_memory_bytes
from midblock.settings.base import name_of
from midblock.settings.tune import TrainSettings
from midblock.tuning import sharding
from midblock.tuning.adapter import Attachment
from midblock.tuning.cache import PrefixCache
from midblock.tuning.checkpoints import (
    last_checkpoint,
    load_random_state,
    random_state,
    require_no_others,
    stored_steps,
)
from midblock.tuning.estimate import step_bytes
from midblock.tuning.kernels import has_plain_head, lean_lora
from midblock.tuning.prefix import FrozenPrefix
from midblock.tuning.steps import BlockStep, StepLog, TrainResult
from midblock.tuning.streamed import StreamedBlocks, stays_put
from midblock.writing import output_error, output_errors

if TYPE_CHECKING:
    from transformers import TrainerCallback

    from midblock.tuning.block_watch import BlockWatch
    from midblock.tuning.sft import Watch

__all__ = ["train"]


@contextlib.contextmanager
def _random_state_kept() -> Iterator[None]:
    """Trainers seed every global generator; the caller's go on as if nothing had happened."""
    before = random_state()
    try:
        yield
    finally:
        load_random_state(before)


@contextlib.contextmanager
def _untouched(anatomy: Anatomy) -> Iterator[None]:
    """Undo what TRL does to a model that it trains: patched forward, config entries, tags, hooks."""
    lm = anatomy.causal_lm
    configs: list[Any] = [lm.config, lm.config.get_text_config(), getattr(lm, "generation_config", None)]
    entries = [(c, dict(vars(c))) for c in configs if c is not None]
    tags = list(getattr(lm, "model_tags", None) or []) or None
    try:
        with forwards_kept([lm]):
            yield
    finally:
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
          watch_blocks: bool = False, streamed: StreamedBlocks | None = None, **trl_options: Any) -> TrainResult:
    """Train what is attached.

    The processes of one job (``torchrun``, ``accelerate launch``) train together: each takes a part of every batch, so
    that losses are those of one process, and keeps the prefix of its own rows. Where accelerate's configuration asks
    for FSDP2 each also holds a part only of the frozen blocks meanwhile.

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
        watch_blocks: Measure at some steps the gradient, the update and the drift of every block
            (`TrainResult.blocks`; trackers are told). The training's numbers are the same. Not of a streamed model,
            which each measurement would read as a whole.
        streamed: Of a model whose frozen blocks are read when they run, from `streamed_blocks`.
        trl_options: Further `trl.SFTConfig` fields (``optim="adafactor"``, hub upload ...).

    Raises:
        TrainingError: loss or weights became non-finite; the last good checkpoint is kept and named.
        CacheRefusedError: a cache was asked for by name where it cannot be exact.
        DataError: no rows.
        SettingsError: several processes that cannot share a batch or the base.
        OutputError: the disk is full, or the folder holds checkpoints and ``resume`` was not asked for.
    """
    from midblock.tuning.block_watch import BlockWatch
    from midblock.tuning.sft import Watch, build_trainer, require_finite

    settings = settings if settings is not None else TrainSettings()
    token_rows = list(rows)
    if not token_rows:
        raise DataError("there is no row to train on; use a data set that is not empty.")
    wanted, may_give_up = _prefix_cache(cache)
    notes: list[str] = []
    with contextlib.ExitStack() as stack:
        stack.enter_context(ranks.joined())
        shards = ranks.size() > 1 and sharding.asked()
        if settings.batch_size < ranks.size():
            raise SettingsError(f"a batch of {settings.batch_size} rows cannot be shared by {ranks.size()} processes; "
                                f"use {name_of('batch_size')} {ranks.size()} or more: it counts the rows of all.")
        if ranks.size() > 1 and streamed is not None:
            raise SettingsError("a base whose blocks are streamed is tuned by one process; give each process the base "
                                f"({name_of('stream')} never), or start one process.")
        if ranks.size() > 1:
            notes.append(f"trained by {ranks.size()} processes, each with {'a part' if shards else 'the whole'} of the "
                         "frozen blocks")
        if folder is not None and not resume:
            ranks.first(lambda: require_no_others(Path(folder)))
        stack.enter_context(_random_state_kept())
        stack.enter_context(_untouched(attachment.anatomy))
        if streamed is not None:
            stack.enter_context(stays_put(attachment.model))
            working = step_bytes(attachment.plan, attachment.anatomy, token_rows, settings,
                                 dtype=streamed.loaded.dtype)
            streamed.require_room(working)
            if may_give_up and min(attachment.plan.blocks) > 0:
                wanted = stack.enter_context(streamed.cache(token_rows, working))
        place = Path(folder) if folder is not None else Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="midblock-")))
        writes = folder is not None and not ranks.follows()
        # the probe of the head runs the model's own forward, so before TRL patches that
        plain = has_plain_head(attachment.anatomy)
        watch = Watch(progress, save_seconds if folder is not None and save_steps is None else None,
                      place / "steps.jsonl" if writes else None)
        # the update of a DoRA is read from its base weight, of which a process holds a part
        watches = watch_blocks and streamed is None and not (shards and attachment.plan.method == "dora")
        blocks = BlockWatch(attachment, token_rows, pad_token_id(tokenizer), place / "blocks.jsonl" if writes else None
                            ) if watches else None
        with sharding.not_by_accelerate():
            trainer = build_trainer(
                attachment, token_rows, tokenizer, settings, place, plain=plain, watch=watch,
                callbacks=[*callbacks, *([] if blocks is None else [blocks])],
                save_steps=save_steps if folder is not None else None, report_to=report_to, trl_options=trl_options)
        start: Path | None = None
        if resume:
            start, damaged = ranks.first(lambda: last_checkpoint(place))
            notes += damaged
        begun = int(start.name.removeprefix("checkpoint-")) if start is not None else 0
        with output_errors(place):
            if folder is not None:
                place.mkdir(parents=True, exist_ok=True)
                watch.restore([] if start is None else [StepLog(**s) for s in stored_steps(start)])
            if blocks is not None:
                blocks.trainer, trainer.blocks = trainer, blocks
                blocks.restore([] if start is None else [BlockStep(**s) for s in stored_steps(start, "blocks")])
        if begun >= trainer.args.max_steps:
            trainer._load_from_checkpoint(str(start))
            return _result(watch, blocks, attachment, {}, notes, begun)
        if attachment.anatomy.embeddings.weight.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        if settings.lean:
            stack.enter_context(dense_attention(attachment.base))
            stack.enter_context(lean_lora(attachment.base))
            trainer.packed = plain and can_pack(attachment.anatomy)
        prefix = FrozenPrefix(attachment.base if streamed is None else streamed.loaded, cache=wanted,
                              on_refusal="uncached" if may_give_up else "raise")
        attachment.model.train()  # dropout shows in this mode
        prefix.prepare()
        if shards:
            prefix.together(lambda here: any(ranks.everybody(here)))
            stack.enter_context(sharding.sharded(attachment.anatomy, list(attachment.trainable.values())))
        stack.enter_context(prefix)
        if streamed is not None:
            streamed.settle()
            prefix.fill(trainer.first_forwards(settings.num_steps(len(token_rows)) * settings.accumulate),
                        room=max(0, streamed.left() - working) // 2)
        collate = trainer.data_collator

        def announced(rows: list[dict[str, Any]]) -> dict[str, Any]:
            batch: dict[str, Any] = collate(rows)
            prefix.expect(batch)  # accelerate asks for a batch one step ahead
            return batch

        trainer.data_collator = announced
        try:
            trainer.train(resume_from_checkpoint=None if start is None else str(start))
            require_finite(attachment, trainer.state.global_step)
        except TrainingError as error:
            raise TrainingError(_what_is_kept(str(error), place if folder is not None else None)) from None
        except OSError as error:
            raise output_error(place, error) from error
        attachment.model.eval()
        return _result(watch, blocks, attachment, prefix.describe(), notes + prefix.notes, begun)


def _result(watch: Watch, blocks: BlockWatch | None, attachment: Attachment, prefix: dict[str, Any],
            notes: list[str], begun: int) -> TrainResult:
    device = next(iter(attachment.trainable.values())).device
    return TrainResult(watch.steps, sum(s.seconds for s in watch.steps), _device_peak(device), prefix, notes, begun,
                       [] if blocks is None else blocks.steps)


def _what_is_kept(problem: str, folder: Path | None) -> str:
    kept = last_checkpoint(folder)[0] if folder is not None else None
    where = (f"the last good state is {kept}" if kept is not None else
             "no checkpoint had been written" if folder is not None else "nothing was kept: no folder was given")
    return f"{problem}; training stopped, {where}. Use a lower learning rate."
