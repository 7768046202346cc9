"""Gradients per block, without training or along a short real fine-tune (paper section 3.2, figure 4).

One backward pass per batch gives, for each block, the norm of its gradient, the norm relative to
the weights, the Fisher information (sum of squared gradients) and the first-order Taylor term
(sum of weight times gradient). With ``steps`` the model is really fine-tuned for that many
updates, the change of each block is measured, and the weights are put back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from midblock import stats
from midblock.analysis.gradients_streamed import backward_by_block
from midblock.analysis.passes import draw, load_stages
from midblock.analysis.weight_names import EXPERT_KINDS
from midblock.analysis.weight_sums import group_change
from midblock.capture import model_inputs
from midblock.capture.scoring import counted_tokens
from midblock.data import Batch, Dataset, make_batches, pad_token_id, tokenize
from midblock.errors import DataError
from midblock.models import LoadedModel, kind_of, require_full_weights, split_fused, text_config
from midblock.progress import Progress, silent
from midblock.quantities import label_of
from midblock.results import UNNAMED, Answer, Origin, Table, TableResult
from midblock.segments import zone_means, zones_in_words
from midblock.settings import GradientSettings
from midblock.training import MasterAdamW, Update, training_steps

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["GradientSettings", "GradientsResult", "backward_batches", "gradients", "parameters_by_block",
           "supervised_batches"]

METRICS = ("gradient_norm", "gradient_norm_relative", "fisher", "taylor")


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
                     parameters: Iterable[torch.nn.Parameter] | None = None, update: Update | None = None,
                     progress: Progress = silent) -> None:
    """Loss and gradients of every batch; ``use(number, loss)`` reads ``parameter.grad``.

    The model is in eval mode (no dropout); ``requires_grad`` of all parameters, their gradients and the
    mode are as before afterwards.

    Args:
        loaded: The model.
        batches: With labels. The loss is the mean over the counted tokens of the batch.
        use: Called after each backward pass.
        parameters: Only these get gradients. Default: all (floating) parameters.
        update: Changes the weights after each batch; None leaves them.
        progress: Told how many batches are done.

    Raises:
        TrainingError: a loss is not finite.
    """
    model = loaded.model
    everything = list(model.parameters())
    training, needed = model.training, [p.requires_grad for p in everything]
    chosen = {id(p) for p in (everything if parameters is None else parameters) if p.is_floating_point()}

    def loss(batch: Batch) -> Tensor:
        here = batch.to(loaded.device)
        return _loss(loaded, model(**model_inputs(model, here)).logits, here)

    model.eval()
    try:
        for parameter in everything:
            parameter.requires_grad_(id(parameter) in chosen)
        for step in training_steps(batches, loss, everything, update, on_gradients=use):
            progress("backward", step.number, len(batches), note=f"loss {step.loss:.3f}")
    finally:
        model.zero_grad(set_to_none=True)
        for parameter, flag in zip(everything, needed, strict=True):
            parameter.requires_grad_(flag)
        model.train(training)


def _loss(loaded: LoadedModel, logits: Tensor, batch: Batch) -> Tensor:
    """Not the model's own loss: some families do not shift the labels, or add a term for their experts' balance."""
    if loaded.model.config.is_encoder_decoder and batch.labels is not None:  # its first token has the encoder before it
        return F.cross_entropy(logits.float().flatten(0, 1), batch.labels.flatten())
    counted = counted_tokens(batch, logits.device, loaded.anatomy)
    return F.cross_entropy(counted.of(logits).float(), counted.target)


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
class GradientsResult(TableResult):
    """Gradient quantities per block and matrix, over batches."""

    table: Table
    """The tidy table; ``matrix`` is ``all`` for a whole block."""
    stages: list[str]
    num_blocks: int
    settings: GradientSettings
    counts: dict[str, Any] = field(default_factory=dict)
    losses: dict[str, list[float]] = field(default_factory=dict)
    origin: Origin = UNNAMED

    def answer(self) -> Answer:
        """Where the gradient is largest."""
        stage, frame = self.stages[0], self.frame
        part = frame[(frame["side"] == stage) & (frame["matrix"] == "all") & (frame["metric"] == METRICS[1])]
        top = part.loc[part["value"].idxmax()]
        means = zone_means(part["layer"], part["value"], self.num_blocks - 1)
        interval = "" if math.isnan(top["low"]) else f" [{top['low']:.3g}, {top['high']:.3g}]"
        return Answer(
            f"{stage}: the gradient relative to the weights is largest in block {int(top['layer'])} of 0 to "
            f"{self.num_blocks - 1}: {top['value']:.3g}{interval}, n = {int(top['n'])} batches (mean "
            f"{zones_in_words(means)}).",
            "A large gradient says where the loss pushes, not what tuning there gains; no score is shown to choose "
            "better than the fixed middle.",
            self.origin.words("locate", models=1))

    def details(self) -> list[str]:
        """Where gradients are largest, and where a fine-tune moved the weights."""
        frame = self.frame
        lines = []
        for stage in self.stages:
            whole = frame[(frame["side"] == stage) & (frame["matrix"] == "all")]
            for metric in (*METRICS[:2], "weight_change"):
                part = whole[whole["metric"] == metric].set_index("layer")["value"]
                if part.empty:
                    continue
                zones = zone_means(part.index, part, self.num_blocks - 1)
                top = int(part.idxmax())
                where = f"block {top} (depth {top / max(1, self.num_blocks - 1):.2f}: {part[top]:.4g})"
                lines.append(f"{stage}: {metric} is largest at {where}; {zones_in_words(zones, '.4g')}.")
        return lines

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
                                                        title=f"Gradient norm by matrix, {stage}", column_label="block",
                                                        label=label_of("gradient_norm"))
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
        ``steps`` also ``weight_change`` (sum of the matrices' Frobenius norms, as `weights` has it) and
        ``weight_change_relative`` (norm of the whole change over that of the weights before), n = number of updates.

    Raises:
        SettingsError: a setting out of range, or ``steps`` of a model that is read block by block.
        DataError: no usable sample.
        TrainingError: the loss became non-finite (the weights are put back).
    """
    chosen = GradientSettings.of(settings, overrides)
    by_name = load_stages(stages, None, names, least=1, streams=not chosen.steps)
    for loaded in by_name.values():
        require_full_weights(loaded, "a gradient of weights")
    dataset = draw(data, chosen)
    table = Table()
    counts: dict[str, Any] = {}
    losses: dict[str, list[float]] = {}
    for key, loaded in by_name.items():
        batches, counts = supervised_batches(loaded, dataset, max_length=chosen.max_length,
                                             batch_size=chosen.batch_size)
        if chosen.steps:
            order = np.random.default_rng(chosen.seed).permutation(len(batches))
            batches = [batches[order[i % len(order)]] for i in range(chosen.steps)]
        losses[key] = _measure(table, key, loaded, batches, chosen, progress)
    for row in table.rows:
        row["data"] = dataset.name
    return GradientsResult(table, list(by_name), loaded.anatomy.num_blocks, chosen, counts, losses,
                           Origin(tuple(m.spec for m in by_name.values()), dataset.spec))


def _measure(table: Table, key: str, loaded: LoadedModel, batches: Sequence[Batch], settings: GradientSettings,
             progress: Progress) -> list[float]:
    groups = parameters_by_block(loaded)
    matrices = {b: [m for block, m in groups if block == b] for b, _ in groups}
    inside = [p for named in groups.values() for _, p in named]
    seen: dict[tuple[int, str, str], list[float]] = {
        (b, m, metric): [] for b, names in matrices.items() for m in (*names, "all") for metric in METRICS}
    losses: list[float] = []
    trainer = MasterAdamW(loaded.model.parameters(), settings.learning_rate) if settings.steps else None
    squares: dict[tuple[int, str], float] = {}  # of the weights; they stand still unless there is training

    def parts(block: int, name: str) -> tuple[float, float, float]:
        parameter = loaded.anatomy.blocks[block].get_parameter(name)
        if trainer is not None or (block, name) not in squares:
            squares[block, name] = parameter.detach().double().square().sum().item()
        square = squares[block, name]
        if parameter.grad is None:  # an expert that no token was sent to
            return 0.0, square, 0.0
        gradient = parameter.grad.double()
        return (gradient.square().sum().item(), square,
                torch.linalg.vecdot(parameter.detach().double().flatten(), gradient.flatten()).item())

    def read_block(block: int, _: int = 0) -> None:
        square = weight = product = 0.0
        for matrix in matrices[block]:
            g, w, t = (sum(column) for column in zip(*(parts(block, n) for n, _ in groups[block, matrix]),
                                                     strict=True))
            _note(seen, block, matrix, g, w, t)
            square, weight, product = square + g, weight + w, product + t
        _note(seen, block, "all", square, weight, product)

    def read(number: int, loss: float) -> None:
        losses.append(loss)
        for block in matrices:
            read_block(block)

    if loaded.streamed is not None:
        losses = backward_by_block(loaded, batches, lambda logits, batch: _loss(loaded, logits, batch), read_block,
                                   progress=progress)
    elif trainer is None:
        backward_batches(loaded, batches, read, parameters=inside, progress=progress)
    else:
        with _weights_restored(loaded.model) as before:
            backward_batches(loaded, batches, read, update=trainer, progress=progress)
            _changes(table, key, loaded, groups, before, trainer.trained(), len(batches))
    for (block, matrix, metric), values in seen.items():
        interval = stats.mean_interval(values, settings.confidence)
        if math.isnan(interval.value):
            table.add_undefined("block", block, metric, key, "the weights are all zero", matrix=matrix)
        else:
            table.add("block", block, metric, key, interval, matrix=matrix)
    return losses


def _note(seen: dict[tuple[int, str, str], list[float]], block: int, matrix: str, square: float, weight: float,
          product: float) -> None:
    norm = math.sqrt(square)
    values = (norm, norm / math.sqrt(weight) if weight > 0 else math.nan, square, abs(product))
    for metric, value in zip(METRICS, values, strict=True):
        seen[block, matrix, metric].append(value)


def _changes(table: Table, key: str, loaded: LoadedModel, groups: dict[tuple[int, str], list[tuple[str, Any]]],
             before: dict[str, Tensor], after: dict[int, Tensor], steps: int) -> None:
    config = text_config(loaded.model)
    squares: dict[tuple[int, str], list[tuple[float, float]]] = {}  # of the change and of the weights before
    for (block, matrix), named in groups.items():
        prefix = loaded.anatomy.block_path(block)
        for name, parameter in named:
            if id(parameter) not in after:
                continue
            old = before[f"{prefix}.{name}"].double()
            change = after[id(parameter)].double() - old
            if matrix == "qkv" and old.ndim == 2 and (split := split_fused(name, old, config)) is not None:
                changes = split_fused(name, change, config) or {}  # fused q, k and v count one by one
                found = [(changes[q].square().sum().item(), split[q].square().sum().item()) for q in split]
            elif matrix in EXPERT_KINDS and old.ndim == 3:  # and a stack of experts as its experts
                found = list(zip(*(t.square().sum(dim=(1, 2)).tolist() for t in (change, old)), strict=True))
            else:
                found = [(change.square().sum().item(), old.square().sum().item())]
            for group in (matrix, "all"):
                squares.setdefault((block, group), []).extend(found)
    for (block, matrix), members in squares.items():
        absolute, relative = group_change(*zip(*members, strict=True))
        table.add("block", block, "weight_change", key, absolute, n=steps, matrix=matrix)
        if relative is not None:
            table.add("block", block, "weight_change_relative", key, relative, n=steps, matrix=matrix)
        else:
            table.add_undefined("block", block, "weight_change_relative", key, "the weights are all zero",
                                n=steps, matrix=matrix)
