"""Gradients per block, without training or along a short real fine-tune (paper section 3.2, figure 4).

One backward pass per batch gives, for each block, the norm of its gradient, the norm relative to
the weights, the Fisher information (sum of squared gradients) and the first-order Taylor term
(sum of weight times gradient). With ``steps`` the model is really fine-tuned for that many
updates, the change of each block is measured, and the weights are put back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from midblock import stats
from midblock.analysis.stages import resolve_stages, stage_names
from midblock.capture import model_inputs
from midblock.data import Batch, Dataset, load_data, make_batches, pad_token_id, tokenize
from midblock.errors import DataError, SettingsError, TrainingError
from midblock.models import LoadedModel, kind_of
from midblock.progress import Progress, silent
from midblock.results import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["GradientSettings", "GradientsResult", "backward_batches", "gradients", "parameters_by_block",
           "supervised_batches"]

METRICS = ("gradient_norm", "gradient_norm_relative", "fisher", "taylor")


@dataclass(frozen=True, kw_only=True)
class GradientSettings:
    """How many batches, and whether to train."""

    samples: int = 32
    """Samples; each batch is one observation of the gradient."""
    batch_size: int = 4
    """Samples per batch."""
    max_length: int = 256
    """Tokens per sample; longer ones are cut and counted."""
    seed: int = 0
    """Seed of the draw and of the order."""
    steps: int = 0
    """Updates of a real full-parameter fine-tune along which gradients are taken; 0: none."""
    learning_rate: float = 5e-5
    """AdamW's learning rate for those updates."""
    confidence: float = 0.95
    """Confidence of every interval."""

    def __post_init__(self) -> None:
        faults = [f"--{name.replace('_', '-')} must be at least {least}, got {getattr(self, name)}"
                  for name, least in (("samples", 1), ("batch_size", 1), ("max_length", 2), ("steps", 0))
                  if getattr(self, name) < least]
        if not self.learning_rate > 0:
            faults.append(f"--learning-rate must be positive, got {self.learning_rate}")
        if faults:
            raise SettingsError("; ".join(faults) + ".")


def parameters_by_block(loaded: LoadedModel) -> dict[tuple[int, str], list[tuple[str, torch.nn.Parameter]]]:
    """(block, matrix) -> named parameters; matrix is q, k, v, o, gate, up, down, norm, bias ... or other.

    Kinds come from `midblock.models.kind_of`.
    """
    groups: dict[tuple[int, str], list[tuple[str, torch.nn.Parameter]]] = {}
    for index, block in enumerate(loaded.anatomy.blocks):
        for name, parameter in block.named_parameters():
            groups.setdefault((index, kind_of(name)), []).append((name, parameter))
    return groups


def supervised_batches(loaded: LoadedModel, dataset: Dataset, *, max_length: int, batch_size: int
                       ) -> tuple[list[Batch], dict[str, Any]]:
    """Training batches: loss on completions where the data has them, else on all tokens.

    Raises:
        DataError: no usable sample.
    """
    supervised = all(e.completion is not None or e.messages for e in dataset.examples)
    encoded = tokenize(dataset, loaded.tokenizer, max_length=max_length, supervised=supervised)
    if not encoded.rows:
        raise DataError(f"{dataset.source}: no sample is left after tokenising: {encoded.summary()}.")
    batches = make_batches(encoded.rows, batch_size=batch_size, pad_id=pad_token_id(loaded.tokenizer))
    for batch in batches:
        if batch.labels is None:
            batch.labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
    return batches, encoded.describe()


def backward_batches(loaded: LoadedModel, batches: Sequence[Batch], use: Callable[[int, float], None], *,
                     progress: Progress = silent) -> None:
    """Loss and gradients of every batch; ``use(number, loss)`` reads ``parameter.grad`` and may update.

    The model is in eval mode (no dropout); ``requires_grad`` of all parameters, their gradients and the
    mode are as before afterwards.

    Raises:
        TrainingError: a loss is not finite.
    """
    model = loaded.model
    training, needed = model.training, [p.requires_grad for p in model.parameters()]
    model.eval()
    try:
        model.requires_grad_(True)
        for number, batch in enumerate(batches):
            here = batch.to(loaded.device)
            model.zero_grad(set_to_none=True)
            loss = model(**model_inputs(model, here), labels=here.labels).loss
            if not bool(torch.isfinite(loss)):
                raise TrainingError(f"the loss of batch {number} is {loss.item()}; use a smaller learning rate, or "
                                    "float32 weights (--dtype float32).")
            loss.backward()
            use(number, float(loss))
            progress("backward", number + 1, len(batches), note=f"loss {float(loss):.3f}")
    finally:
        model.zero_grad(set_to_none=True)
        for parameter, flag in zip(model.parameters(), needed, strict=True):
            parameter.requires_grad_(flag)
        model.train(training)


@contextmanager
def _weights_restored(model: torch.nn.Module) -> Iterator[dict[str, Tensor]]:
    """Yield a copy of all parameters, and put them back bit for bit, also after an error."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    try:
        yield before
    finally:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(before[name])


@dataclass
class GradientsResult:
    """Gradient quantities per block and matrix, over batches."""

    table: Table
    stages: list[str]
    num_blocks: int
    settings: GradientSettings
    counts: dict[str, Any] = field(default_factory=dict)
    losses: dict[str, list[float]] = field(default_factory=dict)

    @property
    def frame(self) -> pd.DataFrame:
        """The tidy table; ``matrix`` is ``all`` for a whole block."""
        return self.table.frame()

    def summary(self) -> str:
        """In words: where gradients are largest, and where a fine-tune moved the weights."""
        frame = self.frame
        lines = []
        for stage in self.stages:
            whole = frame[(frame["side"] == stage) & (frame["matrix"] == "all")]
            for metric in (*METRICS[:2], "weight_change"):
                part = whole[whole["metric"] == metric].set_index("layer")["value"]
                if part.empty:
                    continue
                depth = part.index.to_numpy() / max(1, self.num_blocks - 1)
                zones = [part[(depth >= lo) & (depth <= hi)].mean() for lo, hi in ((0, 0.2), (0.2, 0.8), (0.8, 1))]
                top = int(part.idxmax())
                lines.append(f"{stage}: {metric} is largest at block {top} (depth {top / max(1, self.num_blocks - 1):.2f}: "
                             f"{part[top]:.4g}); early {zones[0]:.4g}, middle {zones[1]:.4g}, late {zones[2]:.4g}.")
        return "\n".join(lines)

    def figures(self) -> dict[str, Figure]:
        """Each quantity over depth, and a heatmap of block by matrix."""
        from midblock.figures import depth_lines, heatmap

        frame = self.frame
        whole = frame[frame["matrix"] == "all"]
        made = {"gradients": depth_lines(whole, list(dict.fromkeys(whole["metric"])), title="Gradients per block")}
        for stage in self.stages:
            part = frame[(frame["side"] == stage) & (frame["metric"] == "gradient_norm") & (frame["matrix"] != "all")]
            wide = part.pivot_table(index="matrix", columns="layer", values="value", sort=False)
            made[f"gradient-heatmap-{stage}"] = heatmap(wide.to_numpy(), list(wide.index), list(wide.columns),
                                                        title=f"Gradient norm, {stage}")
        return made


def gradients(stages: Sequence[LoadedModel | str] | LoadedModel | str, *, data: Dataset | str,
              names: Sequence[str] | None = None, progress: Progress = silent,
              settings: GradientSettings | None = None, **overrides: Any) -> GradientsResult:
    """Gradient norm per block over batches, optionally along a short real fine-tune.

    Args:
        stages: One model or several (loaded, or MODEL specs); each is measured by itself.
        data: A data set or a D spec; the loss counts completions where it has them.
        names: Stage names.
        progress: Told how many batches are done.
        settings: How many batches, and whether to train.
        **overrides: Single fields of `GradientSettings`.

    Returns:
        Rows of kind ``block`` with column ``matrix`` (``all`` = whole block): ``gradient_norm``,
        ``gradient_norm_relative`` (to the weights' norm), ``fisher`` (sum of squared gradients) and
        ``taylor`` (absolute sum of weight times gradient): mean over batches with a t interval. With
        ``steps`` also ``weight_change`` (Frobenius norm of the change made), n = number of updates.

    Raises:
        SettingsError: a setting out of range.
        DataError: no usable sample.
        TrainingError: the loss became non-finite (the weights are put back).
    """
    chosen = replace(settings or GradientSettings(), **overrides)
    models = resolve_stages(stages, None, names, least=1)
    keys = stage_names(len(models), names)
    dataset = load_data(data, seed=chosen.seed) if isinstance(data, str) else data
    dataset = dataset.sample(chosen.samples, chosen.seed)
    table = Table()
    counts: dict[str, Any] = {}
    losses: dict[str, list[float]] = {}
    for key, loaded in zip(keys, models, strict=True):
        batches, counts = supervised_batches(loaded, dataset, max_length=chosen.max_length,
                                             batch_size=chosen.batch_size)
        if chosen.steps:
            order = np.random.default_rng(chosen.seed).permutation(len(batches))
            batches = [batches[order[i % len(order)]] for i in range(chosen.steps)]
        losses[key] = _measure(table, key, loaded, batches, chosen, progress)
    for row in table.rows:
        row["data"] = dataset.name
    return GradientsResult(table, keys, models[0].anatomy.num_blocks, chosen, counts, losses)


def _measure(table: Table, key: str, loaded: LoadedModel, batches: Sequence[Batch], settings: GradientSettings,
             progress: Progress) -> list[float]:
    groups = parameters_by_block(loaded)
    matrices = {b: [m for block, m in groups if block == b] for b, _ in groups}
    seen: dict[tuple[int, str, str], list[float]] = {}
    losses: list[float] = []
    optimizer = torch.optim.AdamW(loaded.model.parameters(), lr=settings.learning_rate, weight_decay=0.0) \
        if settings.steps else None

    def read(number: int, loss: float) -> None:
        losses.append(loss)
        for block, names in matrices.items():
            square = weight = product = 0.0
            for matrix in names:
                parts = [(p.grad.double().square().sum().item() if p.grad is not None else 0.0,
                          p.detach().double().square().sum().item(),
                          (p.detach().double() * p.grad.double()).sum().item() if p.grad is not None else 0.0)
                         for _, p in groups[block, matrix]]
                g, w, t = (sum(column) for column in zip(*parts, strict=True))
                _note(seen, block, matrix, g, w, t)
                square, weight, product = square + g, weight + w, product + t
            _note(seen, block, "all", square, weight, product)
        if optimizer is not None:
            optimizer.step()

    if optimizer is None:
        backward_batches(loaded, batches, read, progress=progress)
    else:
        with _weights_restored(loaded.model) as before:
            backward_batches(loaded, batches, read, progress=progress)
            _changes(table, key, loaded, groups, before, len(batches))
    for (block, matrix, metric), values in seen.items():
        table.add("block", block, metric, key, stats.mean_interval(values, settings.confidence), matrix=matrix)
    return losses


def _note(seen: dict[tuple[int, str, str], list[float]], block: int, matrix: str, square: float, weight: float,
          product: float) -> None:
    norm = math.sqrt(square)
    values = (norm, norm / math.sqrt(weight) if weight > 0 else math.nan, square, abs(product))
    for metric, value in zip(METRICS, values, strict=True):
        seen.setdefault((block, matrix, metric), []).append(value)


def _changes(table: Table, key: str, loaded: LoadedModel, groups: dict[tuple[int, str], list[tuple[str, Any]]],
             before: dict[str, Tensor], steps: int) -> None:
    total: dict[int, float] = {}
    for (block, matrix), named in groups.items():
        prefix = loaded.anatomy.block_path(block)
        square = sum((p.detach().double() - before[f"{prefix}.{name}"].double()).square().sum().item()
                     for name, p in named)
        total[block] = total.get(block, 0.0) + square
        table.add("block", block, "weight_change", key, math.sqrt(square), n=steps, matrix=matrix)
    for block, square in total.items():
        table.add("block", block, "weight_change", key, math.sqrt(square), n=steps, matrix="all")
