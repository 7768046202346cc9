"""`tune`: plan, train, check and export in one call."""

from __future__ import annotations

import importlib.util
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from torch import Tensor

from midblock import stats
from midblock.capture import score_batch
from midblock.data import Dataset, TokenRows, load_data, make_batches, pad_token_id, tokenize
from midblock.errors import DataError, SettingsError
from midblock.models import LoadedModel, load_model, quiet
from midblock.progress import Progress, silent
from midblock.results import Estimate, Table
from midblock.tuning.adapter import Attachment, attach
from midblock.tuning.cache import PrefixCache
from midblock.tuning.check import EngagementReport, check_engagement, frozen_digests
from midblock.tuning.export import (
    VLLM_RANKS,
    export_adapter,
    merged_weights,
    model_card,
    pad_adapter,
    save_merged,
    vllm_note,
    with_weights,
)
from midblock.tuning.plan import DEFAULT_TARGETS, Method, Plan, Scale, make_plan, require_plan_fits
from midblock.tuning.trainer import TrainResult, TrainSettings, train

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["TuneResult", "load_4bit", "tune"]

# tokens on which the check compares logits
_CHECK_ROWS, _CHECK_TOKENS = 4, 128


@dataclass
class TuneResult:
    """What `tune` made and measured."""

    plan: Plan
    training: TrainResult
    check: EngagementReport
    rows: TokenRows
    table: Table
    state: dict[str, Tensor] = field(repr=False)
    """The adapter's tensors (or the trained weights), on the CPU."""
    adapter: Path | None = None
    """Folder of the PEFT adapter."""
    merged: Path | None = None
    """Folder of the merged checkpoint."""
    merge_difference: float | None = None
    """Largest difference of a logit between merged checkpoint and adapter + base."""
    held_out: dict[str, Estimate] = field(default_factory=dict)
    """Mean loss per held-out row: base, tuned, difference."""
    notes: list[str] = field(default_factory=list)

    @property
    def frame(self) -> pd.DataFrame:
        """Tidy table: trainable parameters and updates per matrix, losses, speed."""
        return self.table.frame()

    def summary(self) -> str:
        """A few lines for people."""
        run = self.training
        lines = [self.plan.summary(), f"data: {self.rows.summary()}"]
        speed = f"{run.tokens_per_second:,.0f} tokens/s"
        epochs = sorted({s.epoch for s in run.steps if s.step > run.resumed_from})
        if run.prefix.get("rows_from_cache") and len(epochs) > 1:
            speed += (f" (first epoch {run.tokens_per_second_of_epoch(epochs[0]):,.0f}, cached "
                      f"{run.tokens_per_second_of_epoch(epochs[-1]):,.0f})")
        lines.append(f"{len(run.steps)} steps in {run.seconds:.0f} s, {speed}, peak memory "
                     f"{run.peak_memory_bytes / 2**20:,.0f} MiB; loss {run.losses[0]:.3f} -> {run.final_loss():.3f}")
        if self.held_out:
            base, tuned, change = (self.held_out[k] for k in ("base", "tuned", "difference"))
            lines.append(f"held-out loss {base.value:.3f} -> {tuned.value:.3f}, change {change.value:+.3f} "
                         f"[{change.low:+.3f}, {change.high:+.3f}] (n={change.n})")
        lines.append(self.check.summary())
        return "\n".join([*lines, *self.notes])

    def figures(self) -> dict[str, Figure]:
        """Loss over steps, and the size of the update over depth."""
        from midblock.figures import depth_lines, lines

        steps = pd.DataFrame({"step": [s.step for s in self.training.steps], "value": self.training.losses})
        made = {"loss": lines(steps, "step", title="Training loss", y_label="Loss (nats per labelled token)")}
        updates = self.frame.query("metric == 'relative_update' and kind == 'block'")
        if not updates.empty:
            made["update"] = depth_lines(updates, ["relative_update"], hue="matrix", kind="block",
                                         num_layers=self.plan.num_blocks - 1, shade=self.plan.blocks,
                                         title="Update of each matrix, relative to its norm")
        return made

    def describe(self) -> dict[str, Any]:
        """What ``run.json`` stores."""
        return {"plan": self.plan.to_dict(), "training": self.training.describe(), "check": self.check.describe(),
                "tokens": self.rows.describe(), "adapter": None if self.adapter is None else self.adapter.name,
                "merged": None if self.merged is None else self.merged.name,
                "merge_difference": self.merge_difference, "held_out": self.held_out, "vllm": vllm_note(self.plan),
                "notes": self.notes}


def tune(model: str | LoadedModel, data: str | Dataset | TokenRows, *, plan: Plan | None = None,
         mask: str | None = None, blocks: str | Sequence[int] | None = None,
         random_blocks: tuple[int, int] | None = None, modules: Sequence[str] | None = None,
         rank: int | None = None, budget: int | str | None = None,
         target_modules: Sequence[str] = DEFAULT_TARGETS, method: Method = "lora",
         scale: Scale = "fixed-ratio", alpha_over_rank: float = 2.0, alpha: float | None = None,
         dropout: float = 0.0, samples: int | None = None, max_length: int = 512, chat: bool = False,
         all_tokens: bool = False, settings: TrainSettings | None = None, seed: int | None = None,
         cache: str | PrefixCache | None = "auto", eval_data: str | Dataset | None = None,
         eval_samples: int = 64, out: Path | str | None = None, resume: bool = False, merge: bool = False,
         pad_rank: bool = False, save_steps: int | None = None, progress: Progress = silent,
         **trl_options: Any) -> TuneResult:
    """Tune chosen blocks of a model and prove what was done.

    The model given is, afterwards, what it was before, bit for bit: use the adapter folder, the
    merged folder or ``state``.

    Args:
        model: A MODEL spec or a loaded model.
        data: A data spec (its train split), a data set, or token rows.
        plan: What to train; or give the arguments of `make_plan` (``mask`` ... ``alpha``).
        dropout: Of LoRA's input.
        samples: Rows drawn from the data.
        max_length: Rows are cut after this many tokens; cuts are counted in the result.
        chat: Write prompt and completion with the tokenizer's chat template.
        all_tokens: Learn every token; otherwise completions (and what the assistant says) only.
        settings: See `TrainSettings`.
        seed: Of everything random; overrides ``settings.seed``.
        cache: Of the frozen prefix: ``auto``, ``none``, ``memory``, ``disk:DIR``, a `PrefixCache`.
        eval_data: Held-out rows whose loss is compared before and after (a spec's test split).
        eval_samples: How many of them.
        out: Folder for checkpoints, ``adapter/`` and ``model/``; None writes nothing.
        resume: Go on from the last checkpoint in ``out``.
        merge: Also write base + update as a plain checkpoint (always done for full-rank updates).
        pad_rank: Write the adapter at the next rank that vLLM takes.
        save_steps: Checkpoint every so many steps (default: every minute).
        progress: Callback.
        trl_options: Further fields of `trl.SFTConfig`.

    Raises:
        BlockRangeError, BudgetError, SettingsError: the plan cannot be made.
        DataError: a row without a completion (file and line named), no rows.
        TrainingError: non-finite loss; the last good checkpoint is kept.
        AdapterError: the plan belongs to another model, or the engagement check failed.
    """
    loaded = model if isinstance(model, LoadedModel) else load_model(model)
    settings = settings if settings is not None else TrainSettings()
    if seed is not None:
        settings = replace(settings, seed=seed)
    if plan is None:
        plan = make_plan(loaded, mask=mask, blocks=blocks, random_blocks=random_blocks, modules=modules, rank=rank,
                         budget=budget, target_modules=target_modules, method=method, scale=scale,
                         alpha_over_rank=alpha_over_rank, alpha=alpha)
    plan = require_plan_fits(plan, loaded)
    _check_exports(plan, loaded, merge, pad_rank)
    rows, data_name = _token_rows(data, loaded, samples, max_length, chat, all_tokens, settings.seed)
    held = (None if eval_data is None else
            _token_rows(eval_data, loaded, eval_samples, max_length, chat, all_tokens, settings.seed, "test")[0])
    folder = None if out is None else Path(out)
    table = Table()
    notes: list[str] = []
    with attach(loaded, plan, seed=settings.seed, dropout=dropout) as attachment:
        before = frozen_digests(attachment)
        losses = {} if held is None else {"base": _row_losses(attachment, loaded, held, progress)}
        trained = train(attachment, rows, tokenizer=loaded.tokenizer, settings=settings, cache=cache,
                        folder=None if folder is None else folder / "checkpoints", resume=resume,
                        save_steps=save_steps, progress=progress, **trl_options)
        ids, mask_ids = _check_tokens(rows, loaded)
        report = check_engagement(attachment, before, ids, attention_mask=mask_ids).require()
        if held is not None:
            losses["tuned"] = _row_losses(attachment, loaded, held, progress)
        result = TuneResult(plan, trained, report, rows, table, attachment.state(), notes=notes)
        if losses:
            result.held_out = {
                **{k: stats.mean_interval(v) for k, v in losses.items()},
                "difference": stats.mean_interval([b - a for a, b in zip(losses["base"], losses["tuned"],
                                                                       strict=True)])}
        _fill(table, result)
        notes += trained.notes
        card = _card(result, loaded, settings, data_name)
        if folder is not None and attachment.is_peft:
            if resume and (folder / "adapter").exists():
                shutil.rmtree(folder / "adapter")
            result.adapter = export_adapter(attachment, folder / "adapter", base_name=_base_name(loaded),
                                            card=card(False))
            if pad_rank:
                assert plan.rank is not None
                pad_adapter(result.adapter, next(r for r in VLLM_RANKS if r >= plan.rank))
            if note := vllm_note(plan):
                notes.append(note)
        wants_merged = folder is not None and (merge or not attachment.is_peft)
        weights = merged_weights(attachment) if wants_merged else {}
        logits = _logits(attachment.model, ids, mask_ids) if wants_merged else None
    if folder is not None and wants_merged and logits is not None:
        if resume and (folder / "model").exists():
            shutil.rmtree(folder / "model")
        with with_weights(loaded.model, weights):
            difference = (_logits(loaded.model, ids, mask_ids) - logits).abs()[mask_ids.bool()]
        result.merge_difference = float(difference.max())
        result.merged = save_merged(loaded, weights, folder / "model", card=card(True))
    return result


def load_4bit(spec: str, **options: Any) -> LoadedModel:
    """A base with 4-bit weights (NF4), for LoRA on top of them (QLoRA).

    Raises:
        SettingsError: bitsandbytes is not installed.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise SettingsError("a 4-bit base needs the package bitsandbytes, which is not installed; "
                            "run: pip install 'midblock[quantized]'.")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    loaded = load_model(spec, **options)
    assert loaded.folder is not None
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                                bnb_4bit_compute_dtype=loaded.dtype)
    with quiet():
        small = AutoModelForCausalLM.from_pretrained(loaded.folder, quantization_config=config, dtype=loaded.dtype,
                                                     device_map={"": str(loaded.device)})
    small.eval()
    linear: Any
    for linear in small.modules():
        # on a CPU bitsandbytes would repack weights for inference at the first forward without gradients,
        # for good, and training would then silently get no gradient through them
        if hasattr(linear, "support_avx512bf16_for_cpu"):
            linear.support_avx512bf16_for_cpu = False
    from midblock.models import find_anatomy

    return replace(loaded, model=small, anatomy=find_anatomy(small))


# ---------------------------------------------------------------------------------------------
# parts


def _check_exports(plan: Plan, loaded: LoadedModel, merge: bool, pad_rank: bool) -> None:
    if merge and plan.method != "full" and not all(
            loaded.model.get_submodule(m.name).weight.is_floating_point() for m in plan.modules):  # type: ignore
        raise SettingsError("--merge cannot write the update into quantised weights; train without it and merge the "
                            "adapter into the base in 16 bit (PEFT's merge_and_unload), or leave out --load-4bit.")
    if pad_rank and plan.method != "lora":
        raise SettingsError(f"--pad-rank is for LoRA adapters; the method is {plan.method}.")
    if pad_rank and plan.rank is not None and plan.rank > VLLM_RANKS[-1]:
        raise SettingsError(f"rank {plan.rank} is above the largest that vLLM takes ({VLLM_RANKS[-1]}); merge the "
                            "adapter instead (--merge).")


def _token_rows(data: str | Dataset | TokenRows, loaded: LoadedModel, samples: int | None, max_length: int,
                chat: bool, all_tokens: bool, seed: int, split: str = "train") -> tuple[TokenRows, str]:
    if isinstance(data, TokenRows):
        return data, f"{len(data)} token rows"
    dataset = load_data(data, split=split) if isinstance(data, str) else data
    if samples is not None:
        dataset = dataset.sample(samples, seed)
    rows = tokenize(dataset, loaded.tokenizer, max_length=max_length, supervised=not all_tokens, chat=chat,
                    add_eos=True if all_tokens else None)
    return rows, f"{dataset.name} ({dataset.split}), {rows.summary()}"


def _check_tokens(rows: TokenRows, loaded: LoadedModel) -> tuple[Tensor, Tensor]:
    cut = [replace(r, ids=r.ids[:_CHECK_TOKENS], supervised=()) for r in rows.rows[:_CHECK_ROWS]]
    batch = make_batches(cut, batch_size=_CHECK_ROWS, pad_id=pad_token_id(loaded.tokenizer))[0].to(loaded.device)
    return batch.input_ids, batch.attention_mask


def _logits(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    model.eval()
    with torch.no_grad():
        return model(**inputs).logits.float()  # type: ignore[no-any-return]


def _row_losses(attachment: Attachment, loaded: LoadedModel, rows: TokenRows, progress: Progress) -> list[float]:
    """Mean loss per row over what a training loss would count, in the order of the rows."""
    anatomy = attachment.anatomy
    attachment.model.eval()
    found: dict[int, float] = {}
    batches = make_batches(rows, batch_size=8, pad_id=pad_token_id(loaded.tokenizer))
    with torch.inference_mode():
        for number, batch in enumerate(batches):
            batch = batch.to(loaded.device)
            scores = score_batch(anatomy.causal_lm, anatomy, batch)
            found.update(zip(batch.indices, (scores.loss / scores.tokens).tolist(), strict=True))
            progress("held-out loss", number + 1, len(batches))
    values = [found[r.index] for r in rows]
    if any(math.isnan(v) for v in values):
        raise DataError("a held-out row has no token that a loss counts.")
    return values


def _fill(table: Table, result: TuneResult) -> None:
    plan, run = result.plan, result.training
    for block in plan.blocks:
        amount = plan.params // len(plan.blocks) if plan.whole_blocks else plan.params_of_block(block)
        table.add("block", block, "trainable_parameters", "sft", float(amount), n=1)
    for update in result.check.updates:
        if update.block >= 0:
            table.add("block", update.block, "relative_update", "difference", update.relative, n=1,
                      matrix=update.name.rpartition(".")[2])
    layer = plan.mask or "-"
    for metric, value, n in (("final_loss", run.final_loss(), len(run.steps)),
                             ("tokens_per_second", run.tokens_per_second, len(run.steps)),
                             ("seconds", run.seconds, len(run.steps)),
                             ("peak_memory_bytes", float(run.peak_memory_bytes), 1),
                             ("trainable_parameters", float(plan.params), 1)):
        table.add("model", layer, metric, "sft", value, n=n)
    for side, name in (("base", "base"), ("sft", "tuned"), ("difference", "difference")):
        if name in result.held_out:
            table.add("model", layer, "loss", side, result.held_out[name])


def _base_name(loaded: LoadedModel) -> str:
    """The base as PEFT should find it again: specs as they are, folders absolute."""
    return str(Path(loaded.spec).expanduser().resolve()) if Path(loaded.spec).expanduser().exists() else loaded.spec


def _card(result: TuneResult, loaded: LoadedModel, settings: TrainSettings, data: str) -> Any:
    run = result.training
    facts = {
        "steps": len(run.steps), "batch size": settings.batch_size * settings.accumulate,
        "learning rate": f"{settings.learning_rate or 'default'} ({settings.schedule})", "seed": settings.seed,
        "loss (nats per labelled token)": f"{run.losses[0]:.4f} at first, {run.final_loss():.4f} at last",
        "speed": f"{run.tokens_per_second:,.0f} tokens/s", "peak memory": f"{run.peak_memory_bytes / 2**20:,.0f} MiB",
        "number format": str(loaded.dtype).removeprefix("torch.")}
    results = ""
    if result.held_out:
        change = result.held_out["difference"]
        results = (f"Held-out loss {result.held_out['base'].value:.4f} before and "
                   f"{result.held_out['tuned'].value:.4f} after: {change.value:+.4f}, 95% interval "
                   f"[{change.low:+.4f}, {change.high:+.4f}], {change.n} rows.")

    def card(merged: bool) -> str:
        return model_card(result.plan, base_name=_base_name(loaded), data=data, training=facts,
                          check=result.check.summary(), results=results, merged=merged)
    return card
