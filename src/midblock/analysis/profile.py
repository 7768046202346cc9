"""Layer-wise profile of a base and its tuned checkpoints (paper sections 3.3, 3.4, 4.2; figures 1, 2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch

from midblock import metrics, stats
from midblock.analysis.measures import Depth, functions
from midblock.analysis.passes import Inputs, PassPart, Stages, prepare
from midblock.capture.accumulators import Accumulator, PooledStates, TokenMetrics
from midblock.data import Dataset, augment_dataset, tokenize
from midblock.errors import DataError
from midblock.models import LoadedModel
from midblock.models.chain import comparisons, side_of
from midblock.progress import Progress, silent
from midblock.quantities import FAMILIES, label_of, moved, quantities
from midblock.results import UNNAMED, Answer, Origin, Table, TableResult
from midblock.segments import ZONES, where_most, zone_means, zones_in_words
from midblock.settings import ProfileSettings

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["ProfileResult", "ProfileSettings", "profile", "profile_part"]


@dataclass
class ProfileResult(TableResult):
    """Every measurement at every hidden state, with intervals."""

    table: Table
    """The tidy table (`midblock.results`), with the columns ``stage`` and ``data``."""
    stages: list[str]
    num_hidden: int
    settings: ProfileSettings
    counts: dict[str, Any] = field(default_factory=dict)
    """Samples used, truncated and left out, tokens per stage."""
    layers: pd.DataFrame = field(default_factory=pd.DataFrame)
    """Debiased CKA of every hidden state of one stage with every one of another: columns ``stage``, ``layer`` (of the
    earlier stage), ``other`` (of the later) and ``cka_debiased``."""
    origin: Origin = UNNAMED

    @property
    def sums(self) -> dict[str, int]:
        """How long the sums behind the values are, for `midblock.quantities.moved`."""
        return {"width": self.counts["hidden_size"], "samples": self.counts["pooled_samples"]}

    def regions(self) -> pd.DataFrame:
        """Means over early, middle and late hidden states (`segments.zone`), and the largest.

        One row per metric: of the pair score, or of the difference between the stages.
        """
        frame = self.frame
        own = frame[frame["side"].isin(self.stages)]
        sizes = own["value"].abs().groupby([own["layer"], own["metric"]]).max()
        frame = frame[frame["side"].isin(["difference", "pair"])]
        rows = []
        for (stage, metric), part in frame.groupby(["stage", "metric"], sort=False):
            # the largest change: farthest from "no change", and farther than rounding takes it
            away = pd.Series([moved(str(metric), side, value, size=sizes.get((h, metric), 0.0), **self.sums)
                              for h, side, value in zip(part["layer"], part["side"], part["value"], strict=True)],
                             index=part.index)
            peak = part.loc[away.idxmax()] if away.notna().any() and away.max() > 0 else None
            rows.append({"stage": stage, "metric": metric, "side": part["side"].iloc[0],
                         **zone_means(part["layer"], part["value"], self.num_hidden - 1),
                         "largest at hidden": None if peak is None else int(peak["layer"]),
                         "there": None if peak is None else peak["value"]})
        return pd.DataFrame(rows)

    def answer(self) -> Answer:
        """Where hidden states changed most."""
        pair = comparisons(self.stages)[0]
        stage, last, n = side_of(pair), self.num_hidden - 1, self.counts["pooled_samples"]
        regions = self.regions()
        part = regions[regions["stage"] == stage].set_index("metric")
        if part["largest at hidden"].isna().all():
            return Answer(f"{stage}: no change at any of {self.num_hidden} hidden states, n = {n} samples.",
                          "Both models compute the same on these samples: there is nothing to locate.")
        row = part.loc["change_intensity_relative"]
        if pd.isna(row["largest at hidden"]):
            row = part.loc[part["largest at hidden"].first_valid_index()]
        h, frame = int(row["largest at hidden"]), self.frame
        found = frame[(frame["stage"] == stage) & (frame["metric"] == row.name) & (frame["layer"] == h)].iloc[0]
        means = {str(zone): row[zone] for zone in ZONES}
        return Answer(
            f"{stage}: hidden states moved most at hidden {h} of {last}: {label_of(str(row.name), unit='').lower()} "
            f"{found['value']:.3g} [{found['low']:.3g}, {found['high']:.3g}], n = {int(found['n'])} samples "
            f"(mean {zones_in_words(means)}).",
            f"By that measure {where_most(means, 'hidden states')}. Where states move says what tuning did; swap "
            "measures which blocks carry it.",
            self.origin.words("swap"))

    def details(self) -> list[str]:
        """Where the largest change sits, per comparison."""
        lines = []
        regions = self.regions()
        for pair in comparisons(self.stages):
            part = regions[regions["stage"] == side_of(pair)].set_index("metric")
            moved = part["largest at hidden"].dropna()
            if moved.empty:
                lines.append(f"{side_of(pair)}: no change at any depth.")
                continue
            words = []
            for metric in ("cosine", "cka_debiased", "change_intensity_relative", "prompt_entropy", "effective_rank"):
                if metric in moved.index:
                    h = int(moved[metric])
                    words.append(f"{metric} at hidden {h} (depth {h / (self.num_hidden - 1):.2f}: "
                                 f"{part.loc[metric, 'there']:.4g})")
            lines.append(f"{side_of(pair)}: largest change of " + ", ".join(words) + ".")
            means = {str(zone): part.loc["cosine", zone] for zone in ZONES}
            lines.append(f"{side_of(pair)}: mean cosine similarity {zones_in_words(means, '.4f')}.")
        lines.append("Sample-level intervals are t intervals of the mean; dataset-level ones resample samples "
                     f"({self.settings.resampling} bootstrap, {self.settings.replicates} replicates).")
        return lines

    def tables(self) -> dict[str, pd.DataFrame]:
        """``layers``."""
        return {"layers": self.layers}

    def figures(self) -> dict[str, Figure]:
        """One figure per family of metrics and comparison, and the likeness of every two hidden states."""
        from midblock.figures import depth_lines, heatmap

        frame = self.frame
        made: dict[str, Figure] = {}
        for pair in comparisons(self.stages):
            later, earlier = pair
            chosen = frame[frame["side"].isin([later, earlier]) | (frame["stage"] == side_of(pair))]
            for family, title in FAMILIES.items():
                present = [q.name for q in quantities(family=family) if (chosen["metric"] == q.name).any()]
                if present:
                    key = family if len(self.stages) == 2 else f"{family}-{side_of(pair)}"
                    made[key] = depth_lines(chosen, present, title=f"{title}: {later} against {earlier}")
            if not self.layers.empty:
                own = self.layers[self.layers["stage"] == side_of(pair)]
                square = own.pivot_table(index="layer", columns="other", values="cka_debiased", dropna=False)
                key = "layers" if len(self.stages) == 2 else f"layers-{side_of(pair)}"
                made[key] = heatmap(square.to_numpy(), list(square.index), list(square.columns), limits=(0.0, 1.0),
                                    title=f"Likeness of hidden states: {earlier} with {later}",
                                    label="debiased CKA (1 = same shape)", row_label=f"hidden state of {earlier}",
                                    column_label=f"hidden state of {later}", footnote=f"n = {own['n'].max()} samples")
        return made


def profile(stages: Sequence[LoadedModel | str] | LoadedModel | str, sft: LoadedModel | str | None = None, *,
            data: Dataset | str, names: Sequence[str] | None = None, state_folder: Path | None = None,
            progress: Progress = silent, settings: ProfileSettings | None = None, **overrides: Any
            ) -> ProfileResult:
    """Measure every quantity of states (`midblock.quantities`) at every hidden state.

    One pass over all checkpoints in lockstep: at any time one hidden state per checkpoint is
    in memory, and only per-sample numbers and pooled vectors are kept.

    Args:
        stages: The base (then give ``sft``), or a whole chain of two or more checkpoints;
            loaded models or MODEL specs.
        sft: The tuned checkpoint, where ``stages`` is a single base.
        data: A data set or a D spec.
        names: Stage names; default base, sft, dpo, rlvr.
        state_folder: Where an interrupted pass keeps what it has, and resumes from.
        progress: Told how far the pass is, in tokens.
        settings: What to measure and how.
        **overrides: Single fields of `ProfileSettings`, instead of or on top of ``settings``.

    Returns:
        Rows of kind ``hidden``, layer 0..L, for each stage's own value (side = its name), the
        difference and the direct pair scores (column ``stage`` says which comparison).

    Raises:
        SettingsError: a setting out of range.
        PairMismatchError: the checkpoints do not fit together.
        DataError: too few usable samples.

    Source: "A Layer-wise Analysis of Supervised Fine-Tuning", equations 2 to 10.
    """
    return profile_part(stages, sft, data=data, names=names, progress=progress, settings=settings,
                        **overrides).run(state_folder=state_folder, progress=progress)


def profile_part(stages: Stages, sft: LoadedModel | str | None = None, *, data: Dataset | str,
                 names: Sequence[str] | None = None, progress: Progress = silent,
                 settings: ProfileSettings | None = None, **overrides: Any) -> PassPart[ProfileResult]:
    """`profile` as a part of a pass that others may share; arguments and errors are its own."""
    chosen = ProfileSettings.of(settings, overrides)
    wanted = max(chosen.samples, chosen.token_samples)
    inputs = prepare(stages, sft, data=data, settings=chosen, names=names, samples=wanted, min_tokens=3, min_rows=2,
                     need="the pooled level", streams=True)
    keys, pairs, dataset, encoded = inputs.names, inputs.pairs, inputs.dataset, inputs.encoded
    anatomy, tokenizer = inputs.first.anatomy, inputs.first.tokenizer
    num_hidden = anatomy.num_blocks + 1
    token_ids = [r.index for r in encoded.rows[:chosen.token_samples]]
    pooled_ids = [r.index for r in encoded.rows[:chosen.samples]]
    split = len(token_ids)
    # token-level samples batch among themselves: their metrics then run on whole batches
    groups = [encoded.rows[:split], encoded.rows[split:wanted]]
    accumulators: dict[str, Accumulator] = {}
    pooled = accumulators["pooled"] = PooledStates(keys, num_hidden, pooled_ids, anatomy.hidden_size)
    tokens = TokenMetrics(
        keys, pairs, num_hidden, token_ids, single=functions("token", False, chosen),
        paired=functions("token", True, chosen))
    if token_ids:
        accumulators["tokens"] = tokens
    view_rows, views = _views(dataset, [r.index for r in encoded.rows], tokenizer, chosen, keys, num_hidden,
                              anatomy.hidden_size)
    if views is not None:
        accumulators["views"] = views
        groups.append(view_rows)

    def finish() -> ProfileResult:
        table = _table(inputs, chosen, pooled, tokens if token_ids else None, views, progress)
        lengths = [len(r.ids) for r in encoded.rows[:wanted]]
        counts = {"pooled_samples": len(pooled_ids), "token_samples": len(token_ids),
                  "requested": wanted, "truncated": encoded.truncated, "too_short": list(encoded.too_short),
                  "skipped": [list(s) for s in dataset.skipped], "tokens_per_stage": sum(lengths),
                  "batches": len(part.batches), "hidden_size": anatomy.hidden_size}
        return ProfileResult(table, keys, num_hidden, chosen, counts, _layers(pooled, pairs), inputs.origin)

    part = PassPart(inputs, groups, accumulators, finish)
    return part


def _table(inputs: Inputs, chosen: ProfileSettings, pooled: PooledStates, tokens: TokenMetrics | None,
           views: PooledStates | None, progress: Progress) -> Table:
    """Every quantity at every hidden state, from what the accumulators kept."""
    anatomy = inputs.first.anatomy
    num_hidden = anatomy.num_blocks + 1
    table = Table()
    # with multinomial weights an exact replicate has only 63% distinct rows, and so less rank than the
    # sample: the Bayesian bootstrap keeps every row
    weights = stats.bootstrap_weights(len(pooled.place), chosen.replicates, chosen.seed,
                                      kind="multinomial" if chosen.resampling == "first-order" else "dirichlet")
    for h in range(num_hidden):
        depth = Depth(table, h, inputs.names, inputs.pairs, chosen, torch.from_numpy(weights))
        if tokens is not None:
            depth.tokens({m: {side: values[h] for side, values in sides.items()} for m, sides in tokens.values.items()})
        depth.pooled({stage: x[h].double() for stage, x in pooled.x.items()})
        if views is not None:
            depth.views({stage: x[h].double().reshape(chosen.views, -1, anatomy.hidden_size).transpose(0, 1)
                         for stage, x in views.x.items()})
        progress("metrics", h + 1, num_hidden)
    return inputs.named(table)


_LAYER_SAMPLES = 400
"""Samples of the likeness of every two hidden states: it keeps a Gram matrix of each of them."""


def _layers(pooled: PooledStates, pairs: Sequence[tuple[str, str]]) -> pd.DataFrame:
    x = {stage: states[:, :_LAYER_SAMPLES] for stage, states in pooled.x.items()}
    n = next(iter(x.values())).shape[1]
    rows = []
    for later, earlier in pairs if n >= 4 else ():
        square = metrics.layer_cka(x[earlier], x[later])
        rows += [{"stage": side_of((later, earlier)), "layer": h, "other": other, "cka_debiased": value, "n": n}
                 for h, row in enumerate(square.tolist()) for other, value in enumerate(row)]
    return pd.DataFrame(rows)


_VIEW_STEP = 1 << 40  # sample number of view v of sample i: (v + 1) * _VIEW_STEP + i

# -- augmented views -----------------------------------------------------------------------------


def _views(dataset: Dataset, usable: Sequence[int], tokenizer: Any, settings: ProfileSettings,
           keys: Sequence[str], num_hidden: int, width: int) -> tuple[list[Any], PooledStates | None]:
    """Token rows and accumulator of the augmented views, which get sample numbers of their own."""
    if not settings.views:
        return [], None
    chosen = list(usable)[:settings.view_samples]
    originals = replace(dataset, examples=[dataset.examples[i] for i in chosen], fingerprint="")
    rows, ids = [], []
    for view in range(settings.views):
        encoded = tokenize(augment_dataset(originals, view, settings.seed), tokenizer,
                           max_length=settings.max_length, min_tokens=1)
        if len(encoded.rows) != len(chosen):
            raise DataError(f"{dataset.source}: an augmented view left a sample without tokens; "
                            "use longer samples or --views 0.")
        for row, sample in zip(encoded.rows, chosen, strict=True):
            number = (view + 1) * _VIEW_STEP + sample
            rows.append(replace(row, index=number))
            ids.append(number)
    return rows, PooledStates(keys, num_hidden, ids, width)
