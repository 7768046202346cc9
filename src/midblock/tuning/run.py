"""`tune`: plan, train, check and export in one call."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from torch import Tensor

from midblock import ranks, stats
from midblock.capture import score_batches
from midblock.data import Dataset, TokenRows, load_data, make_batches, pad_token_id, tokenize
from midblock.data.registry import task_words
from midblock.errors import DataError, SettingsError
from midblock.extras import require
from midblock.models import LoadedModel, find_anatomy, kind_of, load_model, save_checkpoint
from midblock.models.skeleton import model_skeleton
from midblock.progress import Progress, silent
from midblock.results import UNNAMED, Answer, Estimate, Origin, Table, TableResult
from midblock.segments import format_blocks
from midblock.settings import PlanSettings, Settings, TuneSettings, name_of
from midblock.tuning.adapter import Attachment, attach
from midblock.tuning.cache import PrefixCache
from midblock.tuning.check import (
    EngagementReport,
    check_engagement,
    frozen_digests,
    logits_of,
    require_gradients,
)
from midblock.tuning.estimate import step_bytes
from midblock.tuning.eva import eva_ranks, require_eva, start_batches
from midblock.tuning.export import (
    VLLM_RANKS,
    export_adapter,
    merged_weights,
    model_card,
    save_merged,
    vllm_note,
    with_weights,
)
from midblock.tuning.exported import free, noting
from midblock.tuning.gguf_adapter import require_gguf, write_gguf
from midblock.tuning.hub import push_adapter, require_hub
from midblock.tuning.initial import LEAVES_BASE, NEEDS_ROWS, Start
from midblock.tuning.plan import Plan
from midblock.tuning.planning import make_plan, require_plan_fits
from midblock.tuning.steps import TrainResult
from midblock.tuning.streamed import refuse_streamed, streamed_blocks
from midblock.tuning.trainer import train
from midblock.writing import cache_dir

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["TuneResult", "base_name", "plan_of_spec", "prefix_cache", "refuse_quantised", "require_tracker",
           "token_rows", "tune"]

# tokens on which the check compares logits
_CHECK_ROWS, _CHECK_TOKENS = 4, 128
# tokens of the one backward pass before training
_TRIAL_TOKENS = 16


@dataclass
class TuneResult(TableResult):
    """What `tune` made and measured."""

    plan: Plan
    training: TrainResult
    check: EngagementReport
    rows: TokenRows
    table: Table
    """Tidy table: trainable parameters and updates per matrix, losses, speed."""
    state: dict[str, Tensor] = field(repr=False)
    """The adapter's tensors (or the trained weights), on the CPU."""
    adapter: Path | None = None
    """Folder of the PEFT adapter."""
    written_rank: int | None = None
    """Largest rank of the adapter as it is written: twice the plan's where its start changed the base weights."""
    padded: bool = False
    """Whether all matrices are written at that rank."""
    merged: Path | None = None
    """Folder of the merged checkpoint."""
    gguf: Path | None = None
    """The adapter for llama.cpp."""
    pushed: str | None = None
    """Address of the repository that the adapter was uploaded to."""
    merge_difference: float | None = None
    """Largest difference of a logit between merged checkpoint and adapter + base."""
    held_out: dict[str, Estimate] = field(default_factory=dict)
    """Mean loss per held-out row: base, tuned, difference."""
    notes: list[str] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict, repr=False)
    """Merged weights by name until they are written."""
    tuned_logits: Tensor | None = field(default=None, repr=False)
    """Logits of the check's tokens until the merged weights are compared with them."""
    origin: Origin = UNNAMED

    def answer(self) -> Answer:
        """How far the loss fell, what the check proved, and how to score the result."""
        run, plan = self.training, self.plan
        where = f"blocks {format_blocks(plan.blocks)} of {plan.num_blocks}"
        if self.held_out:
            base, tuned, change = (self.held_out[k] for k in ("base", "tuned", "difference"))
            found = (f"Tuned {where}: held-out loss {base.value:.3f} -> {tuned.value:.3f} nats a row, change "
                     f"{change.value:+.3f} [{change.low:+.3f}, {change.high:+.3f}], n = {change.n} rows.")
        else:
            found = (f"Tuned {where}: training loss {run.losses[0]:.3f} -> {run.final_loss():.3f} nats a token in "
                     f"{len(run.steps)} steps, n = {len(self.rows)} rows; no held-out rows were scored (--eval-data).")
        made = self.adapter or self.merged
        words: tuple[str, ...] = ()
        if made is not None and self.origin.data:
            words = ("evaluate", str(made), *(("--compare-base",) if self.adapter else ()),
                     *task_words(self.origin.data, answers=self.answers))
        return Answer(found, "Only the chosen weights moved (checked). Whether these blocks are a good choice shows "
                      "beside all blocks at an equal budget, on the same items.", words)

    @property
    def answers(self) -> bool:
        """Whether the rows have completions, or are texts learned in full."""
        return any(row.supervised for row in self.rows.rows)

    def details(self) -> list[str]:
        """What was trained, how fast, and what the check found."""
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
        return [*lines, *self.notes]

    def tables(self) -> dict[str, pd.DataFrame]:
        """``block_steps``: gradient norm, update norm and drift of every block at some of the steps."""
        return {"block_steps": pd.DataFrame([asdict(s) for s in self.training.blocks])}

    def figures(self) -> dict[str, Figure]:
        """Loss over steps, and the size of the update over depth."""
        from midblock.figures import depth_lines, lines

        steps = pd.DataFrame({"step": [s.step for s in self.training.steps], "value": self.training.losses})
        made = {"loss": lines(steps, "step", title="Training loss", y_label="Loss (nats per labelled token)")}
        updates = self.frame.query("metric == 'relative_update' and kind == 'block'")
        if not updates.empty:
            made["update"] = depth_lines(updates, ["relative_update"], hue="matrix", kind="block",
                                         num_layers=self.plan.num_blocks - 1, shade=self.plan.blocks,
                                         title="How far each matrix was moved")
        return made

    def describe(self) -> dict[str, Any]:
        """What ``run.json`` stores."""
        return {"plan": self.plan.to_dict(), "training": self.training.describe(), "check": self.check.describe(),
                "tokens": self.rows.describe(), "adapter": None if self.adapter is None else self.adapter.name,
                "gguf": None if self.gguf is None else self.gguf.name, "pushed": self.pushed,
                "merged": None if self.merged is None else self.merged.name,
                "merge_difference": self.merge_difference, "held_out": self.held_out,
                "vllm": vllm_note(self.plan, self.written_rank, padded=self.padded),
                "notes": self.notes}


def tune(model: str | LoadedModel, data: str | Dataset | TokenRows, settings: Settings | None = None, *,
         plan: Plan | None = None, cache: str | PrefixCache | None = None, eval_data: str | Dataset | None = None,
         out: Path | str | None = None, resume: bool = False, progress: Progress = silent,
         trl_options: Mapping[str, Any] | None = None, **overrides: Any) -> TuneResult:
    """Tune chosen blocks of a model and prove what was done.

    The model given is, afterwards, what it was before, bit for bit: use the adapter folder, the
    merged folder or ``state``.

    Args:
        model: A MODEL spec or a loaded model.
        data: A data spec (its train split), a data set, or token rows.
        settings: A `TuneSettings`, or part of one (`TrainSettings`).
        plan: What to train, in place of ``mask`` ... ``alpha``.
        cache: Of the frozen prefix, also as a `PrefixCache` to share.
        eval_data: Held-out rows whose loss is compared before and after (a spec's test split, or a data set).
        out: Folder for checkpoints, ``adapter/`` and ``model/``; None writes nothing.
        resume: Go on from the last checkpoint in ``out``.
        progress: Callback.
        trl_options: Further fields of `trl.SFTConfig`.
        **overrides: Single fields of `midblock.settings.TuneSettings`: ``mask``, ``rank``, ``samples``, ``epochs`` ...

    Raises:
        BlockRangeError, BudgetError, SettingsError: the plan cannot be made; told before a spec is loaded.
        DataError: a row without a completion (file and line named), no rows.
        TrainingError: non-finite loss; the last good checkpoint is kept.
        AdapterError: the plan belongs to another model, a matrix gets no gradient, or the engagement check failed.
        MissingExtraError: trl is not installed.
    """
    with ranks.joined():
        return _tune(model, data, settings, plan=plan, cache=cache, eval_data=eval_data, out=out, resume=resume,
                     progress=progress, trl_options=trl_options, **overrides)


def _tune(model: str | LoadedModel, data: str | Dataset | TokenRows, settings: Settings | None = None, *,
          plan: Plan | None, cache: str | PrefixCache | None, eval_data: str | Dataset | None,
          out: Path | str | None, resume: bool, progress: Progress, trl_options: Mapping[str, Any] | None,
          **overrides: Any) -> TuneResult:
    require("trl", "midblock tune")
    wanted = TuneSettings(**{**({} if settings is None else settings.given()), **overrides})
    if wanted.push:
        require_hub()
    store = prefix_cache(wanted.cache if cache is None else cache, wanted.cache_limit)
    if isinstance(model, LoadedModel):
        loaded, solved = model, None
    else:
        solved = plan_of_spec(model, wanted, plan)
        loaded = load_model(model)
    plan = make_plan(loaded, wanted) if plan is None and solved is None else require_plan_fits(
        plan or solved, loaded)  # type: ignore[arg-type]
    refuse_quantised(plan, wanted, quantised=loaded.quantized is not None)
    refuse_streamed(plan, wanted, streamed=loaded.streamed is not None)
    if wanted.ranks == "eva":
        require_eva(plan)
    rows, data_name = _token_rows(data, loaded, wanted)
    read = start_batches(rows, loaded, wanted.batch_size) if {wanted.init, wanted.ranks} & NEEDS_ROWS else []
    if wanted.ranks == "eva":
        plan = eva_ranks(plan, loaded, read)
    _check_exports(plan, loaded, wanted)
    held = wanted.eval_data if eval_data is None else eval_data
    held_rows = None if held is None else _token_rows(
        held, loaded, wanted.replace(samples=wanted.eval_samples), split="test")[0]
    folder = None if out is None else Path(out)
    if folder is None and (wanted.gguf or wanted.push):
        raise SettingsError(f"{name_of('gguf' if wanted.gguf else 'push')} needs a folder to write the adapter to; "
                            "give out.")
    with contextlib.ExitStack() as stack:
        streamed = None if loaded.streamed is None else stack.enter_context(streamed_blocks(loaded, plan.blocks))
        attachment = stack.enter_context(attach(loaded, plan, seed=wanted.seed, dropout=wanted.dropout,
                                                start=Start(wanted.init, read)))
        if streamed is not None:  # before the first pass over the model
            streamed.require_room(step_bytes(plan, loaded.anatomy, rows.rows, wanted, dtype=loaded.dtype))
        before = frozen_digests(attachment)
        ids, mask_ids = _check_tokens(rows, loaded)
        require_gradients(attachment, ids[:1, :_TRIAL_TOKENS], mask_ids[:1, :_TRIAL_TOKENS])
        if streamed is not None:
            streamed.settle()
        base_losses = None if held_rows is None else _row_losses(attachment, loaded, held_rows, progress)
        trained = train(attachment, rows, tokenizer=loaded.tokenizer, settings=wanted, cache=store,
                        folder=None if folder is None else folder / "checkpoints", resume=resume,
                        save_steps=wanted.save_steps, progress=progress, report_to=wanted.report_to, watch_blocks=True,
                        streamed=streamed, **(trl_options or {}))
        if streamed is not None:
            streamed.settle()  # only what stays in memory is compared with what it was
        report = check_engagement(attachment, before, ids, attention_mask=mask_ids).require()
        spec = data if isinstance(data, str) else getattr(data, "spec", "")
        result = TuneResult(plan, trained, report, rows, Table(), attachment.plain_state(), notes=list(trained.notes),
                            origin=Origin((loaded.spec,), spec))
        if held_rows is not None and base_losses is not None:
            result.held_out = _held_out(base_losses, _row_losses(attachment, loaded, held_rows, progress))
        _fill(result)
        if folder is not None and not ranks.follows():
            _export(result, attachment, loaded, wanted, folder, data_name, ids, mask_ids, resume=resume)
    if folder is not None and wanted.export_base and result.adapter is not None:
        free(folder, "base", resume=resume)
        save_checkpoint(loaded.model, loaded.tokenizer, folder / "base", finish=noting(folder, "base"))
    if folder is not None and result.weights:
        _write_merged(result, loaded, wanted, folder, data_name, ids, mask_ids, resume=resume)
    if wanted.push and result.adapter is not None:
        result.pushed = push_adapter(result.adapter, wanted.push)
    return result


def prefix_cache(cache: str | PrefixCache | None, limit: int | str | None) -> str | PrefixCache | None:
    """The cache that ``train`` is given; a wrong word, size or folder is told before anything is loaded.

    Raises:
        SettingsError, OutputError: as `PrefixCache`.
    """
    if cache is None or isinstance(cache, PrefixCache) or (cache == "auto" and limit is None):
        return cache
    made = PrefixCache.from_spec("memory" if cache == "auto" else cache, limit_bytes=limit)
    return "none" if made is None else made  # an empty cache has length 0


def require_tracker(name: str) -> None:
    """Stop before anything is loaded where a tracker is unknown or its package is absent.

    Raises:
        SettingsError: it cannot be used.
    """
    if name == "none":
        return
    from transformers.integrations.integration_utils import get_reporting_integration_callbacks

    try:
        for callback in get_reporting_integration_callbacks([name]):
            callback()
    except (ValueError, RuntimeError, ImportError) as error:
        raise SettingsError(f"{name_of('report_to')} {name} cannot be used: {' '.join(str(error).split())}") from None


def plan_of_spec(spec: str, settings: PlanSettings, plan: Plan | None = None, **options: Any) -> Plan:
    """The plan on a model of which only the config is read.

    Args:
        spec: A MODEL spec.
        settings: Where and how large.
        plan: A plan to check instead.
        **options: ``trust_remote_code``, ``allow_pickle``.

    Raises:
        SettingsError, AdapterError: it reaches nothing, or does not fit.
    """
    skeleton, _, _ = model_skeleton(spec, **options)
    anatomy = find_anatomy(skeleton)
    return make_plan(anatomy, settings) if plan is None else require_plan_fits(plan, anatomy)


# ---------------------------------------------------------------------------------------------
# parts


def refuse_quantised(plan: Plan, wanted: TuneSettings, *, quantised: bool) -> None:
    """Refuse what weights in 4 or 8 bit cannot do; told before anything is loaded where the settings say so.

    Raises:
        SettingsError: full-rank training of them, or writing into them.
    """
    if quantised and plan.method == "full":
        raise SettingsError("full-rank training changes the weights themselves, which are quantised; use a LoRA, or "
                            "load the base in full.")
    if quantised and (wanted.merge or wanted.export_base):
        option = name_of("merge" if wanted.merge else "export_base")
        raise SettingsError(f"{option} cannot write quantised weights as a plain checkpoint; train without it and "
                            "merge the adapter into the base in 16 bit (PEFT's merge_and_unload), or load the base in "
                            "full.")


def _check_exports(plan: Plan, loaded: LoadedModel, wanted: TuneSettings) -> None:
    if wanted.gguf:
        require_gguf(plan, loaded)
    if wanted.push and plan.method == "full":
        raise SettingsError(f"{name_of('push')} uploads an adapter, and a full-rank update is none; upload OUT/model "
                            "with `hf upload`.")
    if wanted.pad_rank and (plan.method != "lora" or any(m.experts for m in plan.modules)):
        raise SettingsError(f"{name_of('pad_rank')} is for LoRA adapters of linear layers; the method is "
                            f"{plan.method}.")
    written = (plan.largest_rank or 0) * (1 if wanted.init in LEAVES_BASE else 2)
    if wanted.pad_rank and written > VLLM_RANKS[-1]:
        raise SettingsError(f"rank {written} is above the largest that vLLM takes ({VLLM_RANKS[-1]}); merge the "
                            f"adapter instead ({name_of('merge')}).")


def _token_rows(data: str | Dataset | TokenRows, loaded: LoadedModel, wanted: TuneSettings, split: str = "train"
                ) -> tuple[TokenRows, str]:
    if isinstance(data, TokenRows):
        return data, f"{len(data)} token rows"
    dataset = load_data(data, split=split) if isinstance(data, str) else data
    # a held-out row has one loss, so only training rows may become several
    rows = token_rows(dataset, loaded.tokenizer, wanted, every_turn=split == "train")
    return rows, f"{dataset.name} ({dataset.split}), {rows.summary()}"


def token_rows(dataset: Dataset, tokenizer: Any, wanted: TuneSettings, *, every_turn: bool = True) -> TokenRows:
    """The rows of a data set that are learned.

    Args:
        dataset: The data set.
        tokenizer: The model's.
        wanted: How many rows, how long, what is learned.
        every_turn: See `midblock.data.tokenize`.

    Raises:
        DataError: a row has no completion (file and line are named).
    """
    return tokenize(dataset.sample(wanted.samples, wanted.seed), tokenizer, max_length=wanted.max_length,
                    supervised=not wanted.all_tokens, chat=wanted.chat, add_eos=True if wanted.all_tokens else None,
                    every_turn=every_turn)


def _held_out(base: list[float], tuned: list[float]) -> dict[str, Estimate]:
    return {"base": stats.mean_interval(base), "tuned": stats.mean_interval(tuned),
            "difference": stats.mean_interval([b - a for a, b in zip(base, tuned, strict=True)])}


def _export(result: TuneResult, attachment: Attachment, loaded: LoadedModel, wanted: TuneSettings, folder: Path,
            data: str, ids: Tensor, mask: Tensor, *, resume: bool) -> None:
    """The adapter's folder; of a merged checkpoint what it needs of the attachment."""
    plan = result.plan
    if attachment.is_peft:
        free(folder, "adapter", resume=resume)
        assert attachment.written_rank is not None
        rank = next(r for r in VLLM_RANKS if r >= attachment.written_rank) if wanted.pad_rank else None
        result.written_rank, result.padded = rank or attachment.written_rank, wanted.pad_rank
        base = str((folder / "base").resolve()) if wanted.export_base else base_name(loaded)
        result.adapter = export_adapter(attachment, folder / "adapter", base_name=base, rank=rank,
                                        card=_card(result, loaded, wanted, data, base=base),
                                        finish=noting(folder, "adapter"))
        if wanted.gguf:
            result.gguf = write_gguf(result.adapter, loaded, folder / "adapter.gguf", base=base)
        if note := vllm_note(plan, result.written_rank, padded=result.padded):
            result.notes.append(note)
    if wanted.merge or not attachment.is_peft:
        result.weights = merged_weights(attachment)
        result.tuned_logits = logits_of(attachment.model, ids, mask)


def _write_merged(result: TuneResult, loaded: LoadedModel, wanted: TuneSettings, folder: Path, data: str, ids: Tensor,
                  mask: Tensor, *, resume: bool) -> None:
    assert result.tuned_logits is not None
    free(folder, "model", resume=resume)
    with with_weights(loaded.model, result.weights):
        difference = (logits_of(loaded.model, ids, mask) - result.tuned_logits).abs()[mask.bool()]
    result.merge_difference = float(difference.max())
    result.merged = save_merged(loaded, result.weights, folder / "model", plan=result.plan,
                                card=_card(result, loaded, wanted, data), finish=noting(folder, "model"))
    result.weights, result.tuned_logits = {}, None


def _check_tokens(rows: TokenRows, loaded: LoadedModel) -> tuple[Tensor, Tensor]:
    cut = [replace(r, ids=r.ids[:_CHECK_TOKENS], supervised=()) for r in rows.rows[:_CHECK_ROWS]]
    batch = make_batches(cut, batch_size=_CHECK_ROWS, pad_id=pad_token_id(loaded.tokenizer))[0].to(loaded.device)
    return batch.input_ids, batch.attention_mask


def _row_losses(attachment: Attachment, loaded: LoadedModel, rows: TokenRows, progress: Progress) -> list[float]:
    """Mean loss per row over what a training loss would count, in the order of the rows."""
    attachment.model.eval()
    found: dict[int, float] = {}
    batches = ranks.share(make_batches(rows, batch_size=8, pad_id=pad_token_id(loaded.tokenizer)))
    with torch.inference_mode():
        for number, (batch, scores) in enumerate(score_batches(loaded, batches)):
            found.update(zip(batch.indices, (scores.loss.cpu() / scores.tokens).tolist(), strict=True))
            progress("held-out loss", number + 1, len(batches))
    found = {index: loss for own in ranks.everybody(found) for index, loss in own.items()}
    values = [found[r.index] for r in rows]
    if any(math.isnan(v) for v in values):
        raise DataError("a held-out row has no token that a loss counts.")
    return values


def _fill(result: TuneResult) -> None:
    plan, run, table = result.plan, result.training, result.table
    for block in plan.blocks:
        amount = plan.params // len(plan.blocks) if plan.whole_blocks else plan.params_of_block(block)
        table.add("block", block, "trainable_parameters", "sft", float(amount), n=1)
    for update in result.check.updates:
        if update.block >= 0:
            table.add("block", update.block, "relative_update", "difference", update.relative, n=1,
                      matrix=kind_of(update.name))
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


def base_name(loaded: LoadedModel) -> str:
    """The base as PEFT and transformers find it again: a hub id as it is, anything else as an absolute folder.

    What midblock converted (a GGUF file, the embedded model) is the converted folder in its cache; `export_base`
    writes a copy beside the adapter.
    """
    folder = loaded.folder
    if folder is None:
        return loaded.spec
    own = Path(loaded.spec).expanduser()
    if own.exists() or folder.resolve().is_relative_to(cache_dir().resolve()):
        return str(folder.resolve())
    return loaded.spec


def _card(result: TuneResult, loaded: LoadedModel, wanted: TuneSettings, data: str, base: str | None = None) -> str:
    """The model card of an adapter on ``base``, or of the merged checkpoint."""
    run = result.training
    facts = {
        "steps": len(run.steps), "batch size": wanted.batch_size * wanted.accumulate,
        "learning rate": f"{wanted.peak_rate(result.plan.method):g} ({wanted.schedule})", "seed": wanted.seed,
        "loss (nats per labelled token)": f"{run.losses[0]:.4f} at first, {run.final_loss():.4f} at last",
        "speed": f"{run.tokens_per_second:,.0f} tokens/s", "peak memory": f"{run.peak_memory_bytes / 2**20:,.0f} MiB",
        "dtype": str(loaded.dtype).removeprefix("torch.")}
    return model_card(result.plan, base_name=base or base_name(loaded), data=data, training=facts,
                      check=result.check.summary(), held_out=result.held_out, merged=base is None,
                      written_rank=result.written_rank, padded=result.padded)
