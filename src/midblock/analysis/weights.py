"""Weight change between checkpoints, read straight from their safetensors (paper eq. 1, figure 4).

No model is built: `midblock.analysis.weight_names` finds the tensors that correspond, `midblock.analysis.weight_sums`
reads them side by side.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pandas as pd
import torch
from torch import Tensor

from midblock.analysis.weight_names import ATTENTION_KINDS, Stage, Weight, correspondence, stage_of
from midblock.analysis.weight_sums import (
    Pair,
    Summer,
    Sums,
    group_change,
    norm_and_rank,
    similar_runs,
    single_threads,
    spectra_cost,
)
from midblock.analysis.weight_turns import Turn, turns
from midblock.errors import SettingsError
from midblock.models import LoadedModel, split_fused
from midblock.models.chain import comparisons, side_of, stage_names
from midblock.progress import Progress, silent
from midblock.quantities import label_of, matrix_order
from midblock.results import UNNAMED, Answer, Origin, Table, TableResult
from midblock.segments import ZONES, depth, format_blocks, where_most, zone_means, zones_in_words
from midblock.settings.weights import WeightsSettings
from midblock.sizes import usable_cores

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["GROUPS", "WeightsResult", "weights"]

#: Groups of a block's matrices that get rows of their own; ``qkvo`` is the paper's equation 1.
GROUPS: dict[str, frozenset[str]] = {
    "qkvo": ATTENTION_KINDS,
    "mlp": frozenset({"gate", "up", "down", "gate_up", "router"}),
    "norm": frozenset({"norm"}),
}
_ALL_GROUPS = {**GROUPS, "cross": frozenset(f"cross_{k}" for k in GROUPS["qkvo"])}

TURNED = ("vector_rotation", "intruder_dimensions", "share_unchanged", "change_rank")
"""What rotations measure of one change; ``TWO_CHANGES``: of two side by side."""
TWO_CHANGES = ("change_cosine", "principal_angles")
_ROUNDED = 0.17
"""Norm of what rounding changes, of normally distributed weights' own, in units of the dtype's epsilon."""
_AUTO_SPECTRA = 2e12  # operations: under a minute or two on two cores


@dataclass
class WeightsResult(TableResult):
    """Weight change of every matrix, group and block."""

    table: Table
    """The tidy table, with the columns ``stage``, ``matrix`` and ``tensor``."""
    stages: list[str]
    num_blocks: int
    counts: dict[str, Any] = field(default_factory=dict)
    """Bytes and weights compared, tying, what was left out, notes, whether spectra were taken."""
    origin: Origin = UNNAMED

    def by_block(self, stage: str | None = None, metric: str = "weight_change") -> pd.DataFrame:
        """One row a block, one column a group or kind of matrix, of one comparison.

        Where a block has several matrices of a kind (norms, experts), their mean stands for them.

        Args:
            stage: ``sft-base``; default the first comparison.
            metric: ``weight_change``, ``weight_change_relative``, ``weight_change_spectral_norm`` or
                ``weight_change_effective_rank``.
        """
        stage = stage or side_of(comparisons(self.stages)[0])
        frame = self.frame
        part = frame[(frame["kind"] == "block") & (frame["stage"] == stage) & (frame["metric"] == metric)]
        single_norm = (part["matrix"] == "norm") & part["tensor"].notna()  # not the group of that name
        part = part[~single_norm]
        wide = part.pivot_table(index="layer", columns="matrix", values="value", aggfunc="mean", sort=False)
        first = [g for g in (*GROUPS, "all") if g in wide]
        wide = wide[[*first, *matrix_order([c for c in wide if c not in (*first, "bias")])]]
        wide.columns.name = None
        wide.insert(0, "depth", [round(depth(int(b), self.num_blocks), 3) for b in wide.index])
        return wide.reset_index(names="block")

    def regions(self) -> pd.DataFrame:
        """Mean change of early (depth < 0.2), middle and late (> 0.8) blocks, and the largest, per group.

        Blocks that did not change are left out of the means; a zone without any other is empty.
        """
        frame = self.frame
        frame = frame[(frame["kind"] == "block") & frame["tensor"].isna() & (frame["side"] == "difference")]
        rows = []
        for (stage, metric, matrix), part in frame.groupby(["stage", "metric", "matrix"], sort=False):
            peak = part.loc[part["value"].idxmax()] if (part["value"] > 0).any() else None
            moved = part[part["value"] > 0]
            rows.append({"stage": stage, "metric": metric, "matrix": matrix,
                         **zone_means(moved["layer"].astype(int), moved["value"], self.num_blocks - 1),
                         "largest at block": None if peak is None else int(peak["layer"]),
                         "there": None if peak is None else float(peak["value"])})
        return pd.DataFrame(rows)

    def changed(self, stage: str | None = None) -> list[int]:
        """The blocks in which any weight differs, of one comparison (default the first)."""
        stage = stage or side_of(comparisons(self.stages)[0])
        frame = self.frame
        own = frame[(frame["kind"] == "block") & (frame["stage"] == stage) & (frame["metric"] == "weight_change")
                    & (frame["value"] > 0)]
        return sorted({int(b) for b in own["layer"]})

    def answer(self) -> Answer:
        """Which blocks changed, how much, and where most."""
        stage = side_of(comparisons(self.stages)[0])
        blocks = self.changed(stage)
        if not blocks:
            outside = self._outside(stage)
            return Answer(f"{stage}: {f'only {outside} changed, no block' if outside else 'no weight differs'} "
                          f"(all of {self.num_blocks} blocks compared).",
                          "There is nothing to locate in the blocks of this pair.")
        row = self.regions().set_index(["stage", "metric", "matrix"]).loc[(stage, "weight_change_relative", "all")]
        which = "all" if len(blocks) == self.num_blocks else f"{len(blocks)} of {self.num_blocks}"
        means = {str(zone): row[zone] for zone in ZONES}
        rounded = self.counts.get("rounding", {}).get(stage)
        return Answer(
            f"{stage}: {which} blocks changed ({format_blocks(blocks)}), relative to their weights by "
            f"{zones_in_words(means)}; most in block {int(row['largest at block'])} ({row['there']:.3g}); "
            + ("every weight was compared." if rounded is None else
               f"about {rounded:.1g} of that is rounding (the checkpoints are stored in different precision)."),
            f"By the weights {where_most(means, 'blocks' if which == 'all' else 'changed blocks')}. That says what "
            "tuning moved, not which blocks are best to tune.",
            self.origin.words("profile", "--data", "arithmetic", data=False))

    def _outside(self, stage: str) -> str:
        frame = self.frame
        own = frame[(frame["stage"] == stage) & (frame["metric"] == "weight_change") & (frame["kind"] == "model")
                    & (frame["value"] > 0)]
        return ", ".join(own["layer"].unique())

    def details(self) -> list[str]:
        """Where the weights moved most, absolutely and relative to their size, per comparison."""
        lines = []
        regions = self.regions().set_index(["stage", "metric", "matrix"])
        frame = self.frame
        for pair in comparisons(self.stages):
            stage = side_of(pair)
            own = frame[(frame["stage"] == stage) & (frame["metric"] == "weight_change")]
            if not (own["value"] > 0).any():
                lines.append(f"{stage}: no weight differs.")
                continue
            for metric, what in (("weight_change", "change of q, k, v and o (sum of Frobenius norms)"),
                                 ("weight_change_relative", "the same relative to the weights' own norm")):
                if (stage, metric, "qkvo") not in regions.index:
                    continue
                row = regions.loc[(stage, metric, "qkvo")]
                if pd.isna(row["largest at block"]):
                    lines.append(f"{stage}: {what}: none.")
                    continue
                b = int(row["largest at block"])
                lines.append(f"{stage}: {what}: largest in block {b} (depth {depth(b, self.num_blocks):.2f}: "
                             f"{row['there']:.4g}); mean {zones_in_words({z: row[z] for z in ZONES}, '.4g')}.")
            ranks = frame[(frame["stage"] == stage) & (frame["kind"] == "block")
                          & (frame["metric"] == "weight_change_effective_rank")].groupby("matrix")["value"].mean()
            if len(ranks := ranks.dropna()):
                lines.append(f"{stage}: mean effective rank of the difference: "
                             + ", ".join(f"{matrix} {rank:.1f}" for matrix, rank in ranks.items()) + ".")
            blocks = self.changed(stage)
            lines.append(f"{stage}: {len(blocks)} of {self.num_blocks} blocks changed"
                         f"{f' ({format_blocks(blocks)})' if blocks else ''}; outside them: "
                         f"{self._outside(stage) or 'nothing'}.")
        lines += self._turned()
        if self.counts.get("tied"):
            lines.append("The head is tied to the embeddings and stands under their name.")
        return [*lines, *self.counts.get("notes", [])]

    def _turned(self) -> list[str]:
        """What the rotations say, per comparison; nothing where they were not taken."""
        frame = self.frame
        own = frame[(frame["kind"] == "block") & (frame["matrix"] == "all") & frame["tensor"].isna()]
        lines = []
        for stage, part in own[own["metric"].isin([*TURNED, *TWO_CHANGES])].groupby("stage", sort=False):
            means = part.groupby("metric")["value"].mean()
            if "intruder_dimensions" in means:
                intruders = part[part["metric"] == "intruder_dimensions"].set_index("layer")["value"]
                zones = zone_means(intruders.index.astype(int), intruders, self.num_blocks - 1)
                where = f", most in block {intruders.idxmax()}" if intruders.max() > 0 else ""
                lines.append(
                    f"{stage}: of the 10 first singular vectors of a matrix {means['intruder_dimensions']:.2g} are "
                    f"intruders, new to the base ({zones_in_words(zones, '.2g')}{where}); mean largest cosine with "
                    f"the base's {means['vector_rotation']:.3g}; {means['share_unchanged']:.1%} of the entries are bit "
                    "for bit what they were.")
            if "change_cosine" in means:
                lines.append(f"{stage}: cosine of the two changes {means['change_cosine']:.3g}"
                             + (f", principal angles of their strongest directions {means['principal_angles']:.3g} "
                                "radians (π/2: unrelated)" if "principal_angles" in means else "") + ".")
        return lines

    def figures(self) -> dict[str, Figure]:
        """Change by block and group, absolute and relative, the relative change as a heatmap, and the rotations."""
        from midblock.figures import depth_lines, heatmap

        blocks = self.frame[self.frame["kind"] == "block"]
        frame = blocks[blocks["side"] == "difference"]
        made = {}
        for pair in comparisons(self.stages):
            stage = side_of(pair)
            own = frame[frame["stage"] == stage]
            suffix = "" if len(self.stages) == 2 else f"-{stage}"
            groups = own[own["tensor"].isna() & own["matrix"].isin(GROUPS)]
            if len(groups):
                made[f"weights{suffix}"] = depth_lines(
                    groups, ["weight_change", "weight_change_relative"], hue="matrix",
                    num_layers=self.num_blocks - 1, title=f"Weight change: {pair[0]} against {pair[1]}")
            for metric, name, words in (("weight_change_relative", "matrices", "Relative weight change"),
                                        ("intruder_dimensions", "intruders", "Intruder dimensions")):
                if not ((blocks["metric"] == metric) & (blocks["stage"] == stage)).any():
                    continue
                kinds = self.by_block(stage, metric).drop(columns=["depth", *GROUPS, "all"],
                                                          errors="ignore").set_index("block")
                if kinds.shape[1]:
                    made[f"weights-{name}{suffix}"] = heatmap(
                        kinds.T.to_numpy(), list(kinds.columns), list(kinds.index),
                        title=f"{words} by matrix: {pair[0]} against {pair[1]}", label=label_of(metric),
                        row_label="matrix", column_label="block")
        turned = blocks[blocks["tensor"].isna() & blocks["matrix"].isin(GROUPS)
                        & blocks["metric"].isin([*TURNED, *TWO_CHANGES])]
        for stage, part in turned.groupby("stage", sort=False):
            shown = [m for m in (*TURNED, *TWO_CHANGES) if (part["metric"] == m).any()]
            suffix = "" if len(self.stages) == 2 else f"-{str(stage).replace(' ', '-')}"
            made[f"weights-rotations{suffix}"] = depth_lines(  # one colour a group, whatever the measure compares
                part.assign(side="pair"), shown, hue="matrix", num_layers=self.num_blocks - 1,
                title=f"How the weights turned: {stage}")
        return made


# ---------------------------------------------------------------------------------------------
# the call


def weights(stages: Sequence[LoadedModel | str | Path] | LoadedModel | str | Path,
            sft: LoadedModel | str | Path | None = None, *, names: Sequence[str] | None = None,
            progress: Progress = silent, settings: WeightsSettings | None = None, **overrides: Any) -> WeightsResult:
    """Compare the weights of two or more checkpoints, matrix by matrix, straight from their files.

    ``weight_change`` of a matrix is ||W_later - W_earlier||_F. Of a group (column ``matrix``: ``qkvo``
    is the paper's equation 1; ``mlp``, ``norm``, ``all`` are all MLP matrices, norms, or everything in
    a block) it is the sum of its members' norms. ``weight_change_relative`` is the Frobenius norm of
    the difference over that of the earlier stage's weights, for a group over all of it at once.

    Args:
        stages: The base (then give ``sft``), or a chain: MODEL specs, folders, or loaded models (whose
            files are read). Every stage but the first may be a folder with a LoRA adapter of
            the first (rsLoRA, DoRA, embeddings and modules saved in full included).
        sft: The tuned checkpoint, where ``stages`` is a single base.
        names: Stage names; default base, sft, dpo, rlvr.
        progress: Told how many megabytes have been read.
        settings: Whether spectra are taken (``weight_change_spectral_norm``, ``weight_change_effective_rank``: an
            eigendecomposition for each matrix), rotations (`weight_turns`), and by how many threads.
        **overrides: Single fields of `WeightsSettings`.

    Returns:
        Rows of kind ``block`` for every matrix (columns ``matrix``, its role, and ``tensor``, its name) and
        group (no ``tensor``), and of kind ``model`` (layer ``embeddings``, ``final_norm``, ``head``,
        ``other``) outside the blocks. ``n`` is the number of entries compared. Nothing is sampled, so
        there are no intervals. Fused qkv matrices have rows for q, k and v as well.

    Raises:
        PairMismatchError: weights that one side lacks, or of another shape.
        AdapterError: an adapter of another model or kind.
        CheckpointError: a damaged file, quantised weights, or NaN or infinity (the tensor is named).

    Source: "A Layer-wise Analysis of Supervised Fine-Tuning", equation 1.
    """
    specs = list(stages) if isinstance(stages, Sequence) and not isinstance(stages, str) else [stages]
    if sft is not None:
        specs.append(sft)
    if len(specs) < 2:
        raise SettingsError("at least two checkpoints are compared: give a base and a tuned one.")
    chosen = WeightsSettings.of(settings, overrides)
    workers = chosen.workers or min(usable_cores(), 8)
    keys = stage_names(len(specs), names)
    chain: list[Stage] = []
    for key, spec in zip(keys, specs, strict=True):
        chain.append(stage_of(key, spec, chain[0] if chain else None))
    plan = correspondence(chain)
    pairs = [(keys.index(later), keys.index(earlier)) for later, earlier in comparisons(keys)]
    sums = Summer(chain, plan, pairs, workers).run(progress)
    spectra = chosen.spectra
    if spectra is None:
        spectra = spectra_cost(plan, chain, pairs) <= _AUTO_SPECTRA
    table = Table()
    # files list blocks as 0, 1, 10, 11, ...: readers want them in order, blocks before the rest
    measured = sorted(zip(plan.weights, sums, strict=True),
                      key=lambda m: plan.num_blocks if m[0].block is None else m[0].block)
    _table(table, keys, plan.config, pairs, measured)
    if spectra:
        _spectra_rows(table, chain, pairs, measured, workers, progress)
    if chosen.rotations:
        _turn_rows(table, turns(chain, pairs, [w for w, _ in measured], workers, progress))
    for stage in chain:
        stage.release()
    rounding, notes = _rounding(chain, plan.weights, pairs)
    counts = {"weights": len(plan.weights), "entries": sum(w.numel for w in plan.weights),
              "bytes": sum(s.source.nbytes for s in chain), "tied": plan.tied, "left_out": plan.left_out,
              "notes": [*plan.notes, *notes], "spectra": spectra, "rounding": rounding}
    named = Origin(tuple(s.spec if isinstance(s, LoadedModel) else str(s) for s in specs))
    return WeightsResult(table, keys, plan.num_blocks, counts, named)


def _rounding(chain: Sequence[Stage], weights: Sequence[Weight], pairs: Sequence[Pair]
              ) -> tuple[dict[str, float], list[str]]:
    """Of comparisons of checkpoints that are stored in different precision: the relative change that rounding alone
    makes, and that in words."""
    found: dict[str, float] = {}
    notes = []
    matrix = next((w for w in weights if w.block is not None and len(w.shape) > 1), None)
    for later, earlier in pairs:
        if matrix is None:
            continue
        stored = {chain[i].name: chain[i].operand(matrix).dtype for i in (later, earlier)}
        if len(set(stored.values())) > 1:
            stage = side_of((chain[later].name, chain[earlier].name))
            found[stage] = _ROUNDED * max(torch.finfo(dtype).eps for dtype in stored.values())
            words = " and ".join(f"{name} in {str(dtype).removeprefix('torch.')}" for name, dtype in stored.items())
            notes.append(f"{stage}: {words} are compared: rounding by itself changes weights by about "
                         f"{found[stage]:.1g} of their norm, also in blocks that tuning left alone (`tune "
                         "--export-base` writes the base in the tuned model's precision).")
    return found, notes


def _place(weight: Weight) -> tuple[Literal["block", "model"], int | str]:
    return ("model", weight.kind) if weight.block is None else ("block", weight.block)


def _table(table: Table, keys: Sequence[str], config: Any, pairs: Sequence[Pair],
           measured: Sequence[tuple[Weight, Sums]]) -> None:
    for pair in pairs:
        stage = side_of((keys[pair[0]], keys[pair[1]]))
        groups: dict[tuple[int, str], list[_Part]] = {}
        for weight, found in measured:
            parts = _parts(weight, found.difference[pair], found.own[pair[1]], config)
            for part in parts:
                _change_rows(table, _place(weight), [part], stage, part.matrix, part.tensor)
            if weight.block is None:
                continue
            # a fused matrix counts as its parts where they are known, else as one
            counted = [p for p in parts if p.matrix != weight.kind] or parts
            for group in ("all", *(g for g, kinds in _ALL_GROUPS.items() if weight.kind in kinds)):
                groups.setdefault((weight.block, group), []).extend(counted)
        for (block, group), members in sorted(groups.items()):
            _change_rows(table, ("block", block), members, stage, group, None)
    for i in sorted({earlier for _, earlier in pairs}):
        for weight, found in measured:
            table.add(*_place(weight), "weight_norm", keys[i], math.sqrt(float(found.own[i].sum())),
                      n=weight.numel, stage=None, matrix=weight.kind, tensor=weight.name)


@dataclass(frozen=True, slots=True)
class _Part:
    """A matrix, or one of those that a fused one holds: sums of squares and number of entries."""

    matrix: str
    tensor: str
    change: float
    own: float
    entries: int


def _change_rows(table: Table, place: tuple[Literal["block", "model"], int | str], members: Sequence[_Part],
                 stage: str, matrix: str, tensor: str | None) -> None:
    """Absolute and relative change of one matrix or of a group of them."""
    cell: dict[str, Any] = {"stage": stage, "matrix": matrix, "tensor": tensor,
                            "n": sum(m.entries for m in members)}
    absolute, relative = group_change((m.change for m in members), (m.own for m in members))
    table.add(*place, "weight_change", "difference", absolute, **cell)
    if relative is not None:
        table.add(*place, "weight_change_relative", "difference", relative, **cell)
    else:
        table.add_undefined(*place, "weight_change_relative", "difference",
                            "every weight of the earlier stage is zero", **cell)


def _parts(weight: Weight, difference: Tensor, own: Tensor, config: Any) -> list[_Part]:
    """A weight, and after it q, k and v where it fuses them; of a stack of experts each one."""
    if weight.fused == "experts":
        return [_Part(weight.kind, f"{weight.name}[{i}]", change, before, weight.numel // weight.shape[0])
                for i, (change, before) in enumerate(zip(difference.tolist(), own.tolist(), strict=True))]
    found = [_Part(weight.kind, weight.name, float(difference.sum()), float(own.sum()), weight.numel)]
    if weight.fused is not None:
        changed, norms = split_fused(weight.name, difference, config), split_fused(weight.name, own, config)
        assert changed is not None
        assert norms is not None
        inputs = weight.numel // difference.numel()
        found += [_Part(part, weight.name, float(changed[part].sum()), float(norms[part].sum()),
                        changed[part].numel() * inputs) for part in changed]
    return found


def _turn_rows(table: Table, found: Iterable[Turn]) -> None:
    """Rows of every matrix, and of each group of a block the mean over its matrices, entries weighing alike."""
    members: dict[tuple[Any, ...], list[tuple[float, int]]] = {}
    for weight, metric, side, compared, value in found:
        cell: dict[str, Any] = {"n": weight.numel, "stage": compared, "matrix": weight.kind, "tensor": weight.name}
        if isinstance(value, str):
            table.add_undefined(*_place(weight), metric, side, value, **cell)
            continue
        table.add(*_place(weight), metric, side, value, **cell)
        for group in ("all", *(g for g, kinds in _ALL_GROUPS.items() if weight.kind in kinds)):
            if weight.block is not None:
                members.setdefault((weight.block, metric, side, compared, group), []).append((value, weight.numel))
    for (block, metric, side, compared, group), values in members.items():
        sizes = [n if metric == "share_unchanged" else 1 for _, n in values]
        mean = sum(v * n for (v, _), n in zip(values, sizes, strict=True)) / sum(sizes)
        table.add("block", block, metric, side, mean, n=sum(n for _, n in values), stage=compared, matrix=group,
                  tensor=None)


def _spectra_rows(table: Table, chain: Sequence[Stage], pairs: Sequence[Pair],
                  measured: Sequence[tuple[Weight, Sums]], workers: int, progress: Progress) -> None:
    matrices = [(w, s) for w, s in measured if len(w.shape) == 2]
    # a Gram matrix, its decomposition and the workspace: three of the smaller side's squares a thread
    largest = max((min(w.shape) for w, _ in matrices), default=1)
    workers = max(1, min(workers, (1 << 30) // (24 * largest * largest)))
    done = 0
    with single_threads(workers, "spectra") as pool:
        for pair in pairs:
            stage = side_of((chain[pair[0]].name, chain[pair[1]].name))
            for group in similar_runs(matrices):
                spectra = pool.map(lambda m, p=pair: norm_and_rank(chain, m[0], p, m[1]), group)
                for (weight, _), (norm, rank) in zip(group, spectra, strict=True):
                    place = _place(weight)
                    cell: dict[str, Any] = {"n": weight.numel, "stage": stage, "matrix": weight.kind,
                                            "tensor": weight.name}
                    table.add(*place, "weight_change_spectral_norm", "difference", norm, **cell)
                    if rank is None:
                        table.add_undefined(*place, "weight_change_effective_rank", "difference",
                                            "the weight did not change", **cell)
                    else:
                        table.add(*place, "weight_change_effective_rank", "difference", rank, **cell)
                    done += 1
                    progress("spectra (matrices)", done, len(matrices) * len(pairs), note=weight.name)
                for checkpoint in chain:  # mapped pages count as this process's memory until they are let go
                    checkpoint.release()
