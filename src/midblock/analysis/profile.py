"""Layer-wise profile of a base and its tuned checkpoints (paper sections 3.3, 3.4, 4.2; figures 1, 2)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from midblock import metrics, stats
from midblock.analysis.passes import PassState, feed_batches, prepare
from midblock.analysis.stages import comparisons, side_of
from midblock.capture.accumulators import Accumulator, PooledStates, TokenMetrics
from midblock.data import Dataset, augment_dataset, tokenize
from midblock.errors import DataError, UndefinedMetricError
from midblock.models import LoadedModel
from midblock.progress import Progress, silent
from midblock.results import Interval, Table
from midblock.segments import zone_means
from midblock.settings import ProfileSettings

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["FAMILIES", "METRICS", "ProfileResult", "ProfileSettings", "profile"]

#: Figures: one per family of metrics.
FAMILIES: dict[str, tuple[str, ...]] = {
    "information": ("prompt_entropy", "dataset_entropy", "effective_rank",
                    "effective_rank_normalized", "rank_deficiency", "sparsity"),
    "spectrum": ("spectral_norm", "condition_number"),
    "geometry": ("curvature", "l2_norm", "gini", "intrinsic_dimension"),
    "alignment": ("cka", "cka_debiased", "cosine", "token_cosine", "mean_shift", "mean_shift_relative",
                  "change_intensity", "change_intensity_relative"),
    "views": ("infonce", "lidar", "dime"),
}
METRICS: tuple[str, ...] = tuple(m for family in FAMILIES.values() for m in family)
#: Metrics that compare two stages directly; all others are taken per stage and subtracted.
PAIR_METRICS = frozenset(FAMILIES["alignment"])

@dataclass
class ProfileResult:
    """Every measurement at every hidden state, with intervals."""

    table: Table
    stages: list[str]
    num_hidden: int
    settings: ProfileSettings
    counts: dict[str, Any] = field(default_factory=dict)
    """Samples used, truncated and left out, tokens per stage."""

    @property
    def frame(self) -> pd.DataFrame:
        """The tidy table (columns of DESIGN section 8, and ``stage`` and ``data``)."""
        return self.table.frame()

    def regions(self) -> pd.DataFrame:
        """Means over early, middle and late hidden states (`segments.zone`), and the largest.

        One row per metric: of the pair score, or of the difference between the stages.
        """
        frame = self.frame
        frame = frame[frame["side"].isin(["difference", "pair"])]
        rows = []
        for (stage, metric), part in frame.groupby(["stage", "metric"], sort=False):
            # the largest change: farthest from "no change", which is 1 for similarities
            unchanged = 1.0 if metric in ("cka", "cka_debiased", "cosine", "token_cosine") else 0.0
            away = (part["value"] - unchanged).abs()
            peak = part.loc[away.idxmax()] if away.notna().any() and away.max() > 0 else None
            rows.append({"stage": stage, "metric": metric, "side": part["side"].iloc[0],
                         **zone_means(part["layer"], part["value"], self.num_hidden - 1),
                         "largest at hidden": None if peak is None else int(peak["layer"]),
                         "there": None if peak is None else peak["value"]})
        return pd.DataFrame(rows)

    def summary(self) -> str:
        """In words: where the largest change sits, per comparison."""
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
            late, middle = part.loc["cosine", "late"], part.loc["cosine", "middle"]
            lines.append(f"{side_of(pair)}: largest change of " + ", ".join(words) + ".")
            lines.append(f"{side_of(pair)}: mean cosine similarity early {part.loc['cosine', 'early']:.4f}, "
                         f"middle {middle:.4f}, late {late:.4f}.")
        lines.append("Sample-level intervals are t intervals of the mean; dataset-level ones resample samples "
                     f"({self.settings.resampling} bootstrap, {self.settings.replicates} replicates).")
        return "\n".join(lines)

    def figures(self) -> dict[str, Figure]:
        """One figure per family of metrics and comparison: stages over depth, difference with interval."""
        from midblock.figures import depth_lines

        frame = self.frame
        made: dict[str, Figure] = {}
        for pair in comparisons(self.stages):
            later, earlier = pair
            chosen = frame[frame["side"].isin([later, earlier]) | (frame["stage"] == side_of(pair))]
            for family, names in FAMILIES.items():
                present = [m for m in names if (chosen["metric"] == m).any()]
                if present:
                    key = family if len(self.stages) == 2 else f"{family}-{side_of(pair)}"
                    made[key] = depth_lines(chosen, present, title=f"{family}: {later} against {earlier}")
        return made


def profile(stages: Sequence[LoadedModel | str] | LoadedModel | str, sft: LoadedModel | str | None = None, *,
            data: Dataset | str, names: Sequence[str] | None = None, state_folder: Path | None = None,
            progress: Progress = silent, settings: ProfileSettings | None = None, **overrides: Any
            ) -> ProfileResult:
    """Measure every quantity of DESIGN section 3 (but weight change) at every hidden state.

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
    chosen = ProfileSettings.of(settings, overrides)
    wanted = max(chosen.samples, chosen.token_samples)
    inputs = prepare(stages, sft, data=data, settings=chosen, names=names, samples=wanted, min_tokens=3, min_rows=2,
                     need="the pooled level")
    keys, pairs, dataset, encoded = inputs.names, inputs.pairs, inputs.dataset, inputs.encoded
    anatomy, tokenizer = inputs.first.anatomy, inputs.first.tokenizer
    num_hidden = anatomy.num_blocks + 1
    token_ids = [r.index for r in encoded.rows[:chosen.token_samples]]
    pooled_ids = [r.index for r in encoded.rows[:chosen.samples]]
    split = len(token_ids)
    # token-level samples batch among themselves: their metrics then run on whole batches
    batches = [b for part in (encoded.rows[:split], encoded.rows[split:wanted]) if part
               for b in inputs.batches(part)]
    accumulators: dict[str, Accumulator] = {}
    pooled = accumulators["pooled"] = PooledStates(keys, num_hidden, pooled_ids, anatomy.hidden_size)
    tokens = accumulators["tokens"] = TokenMetrics(
        keys, pairs, num_hidden, token_ids, alpha=chosen.alpha, eps=chosen.sparsity_eps,
        relative_eps=chosen.sparsity_relative, unit_rows=chosen.unit_rows, normalize=chosen.normalize)
    view_rows, views = _views(dataset, [r.index for r in encoded.rows], tokenizer, chosen, keys, num_hidden,
                              anatomy.hidden_size)
    if views is not None:
        accumulators["views"] = views
        batches += inputs.batches(view_rows)
    state = PassState(state_folder) if state_folder else None
    feed_batches(inputs.stages, batches, accumulators, state=state, progress=progress)

    table = Table()
    # with multinomial weights an exact replicate has only 63% distinct rows, and so less rank than the
    # sample: the Bayesian bootstrap keeps every row
    weights = stats.bootstrap_weights(len(pooled_ids), chosen.replicates, chosen.seed,
                                      kind="multinomial" if chosen.resampling == "first-order" else "dirichlet")
    for h in range(num_hidden):
        _token_rows(table, h, tokens, keys, pairs, chosen)
        _pooled_rows(table, h, pooled, keys, pairs, weights, chosen)
        if views is not None:
            _view_rows(table, h, views, keys, pairs, chosen)
        progress("metrics", h + 1, num_hidden)
    if state:
        state.discard()
    inputs.named(table)
    lengths = [len(r.ids) for r in encoded.rows[:wanted]]
    counts = {"pooled_samples": len(pooled_ids), "token_samples": len(token_ids),
              "requested": wanted, "truncated": encoded.truncated, "too_short": list(encoded.too_short),
              "skipped": [list(s) for s in dataset.skipped], "tokens_per_stage": sum(lengths),
              "batches": len(batches)}
    return ProfileResult(table, keys, num_hidden, chosen, counts)


# -- token level ---------------------------------------------------------------------------------


def _token_rows(table: Table, h: int, tokens: TokenMetrics, keys: Sequence[str],
                pairs: Sequence[tuple[str, str]], settings: ProfileSettings) -> None:
    for metric in TokenMetrics.SINGLE:
        values = {s: tokens.values[metric][s][h].numpy() for s in keys}
        for stage in keys:
            _mean_row(table, h, metric, stage, values[stage], settings)
        for later, earlier in pairs:
            _mean_row(table, h, metric, "difference", values[later] - values[earlier], settings,
                      stage=side_of((later, earlier)))
    for metric in TokenMetrics.PAIRED:
        for pair in pairs:
            _mean_row(table, h, metric, "pair", tokens.values[metric][side_of(pair)][h].numpy(), settings,
                      stage=side_of(pair))


def _mean_row(table: Table, h: int, metric: str, side: str, values: np.ndarray[Any, Any],
              settings: ProfileSettings, **extra: Any) -> None:
    interval = stats.mean_interval(values, confidence=settings.confidence)
    if math.isnan(interval.value):
        table.add_undefined("hidden", h, metric, side, "no sample has a value (fewer than 3 tokens, or all zero)",
                            **extra)
    else:
        table.add("hidden", h, metric, side, interval, **extra)


# -- dataset level -------------------------------------------------------------------------------


def _pooled_rows(table: Table, h: int, pooled: PooledStates, keys: Sequence[str],
                 pairs: Sequence[tuple[str, str]], weights: np.ndarray[Any, Any],
                 settings: ProfileSettings) -> None:
    x = {s: pooled.x[s][h].double() for s in keys}
    w = torch.from_numpy(weights).double()
    values: dict[str, dict[str, float]] = {}
    replicates: dict[str, dict[str, Tensor]] = {}
    reasons: dict[str, dict[str, str]] = {}
    for stage in keys:
        values[stage], replicates[stage], reasons[stage] = _spectral(x[stage], w, settings)
        _intrinsic(x[stage], w, values[stage], replicates[stage], reasons[stage])
    n = next(iter(x.values())).shape[0]
    metric_names = list(dict.fromkeys(m for s in keys for m in (*values[s], *reasons[s])))
    for metric in metric_names:
        for stage in keys:
            if metric in reasons[stage]:
                table.add_undefined("hidden", h, metric, stage, reasons[stage][metric], n=n)
            else:
                _replicate_row(table, h, metric, stage, values[stage][metric], replicates[stage][metric], n, settings)
        for later, earlier in pairs:
            extra: dict[str, Any] = {"stage": side_of((later, earlier))}
            missing = [reasons[s][metric] for s in (later, earlier) if metric in reasons[s]]
            if missing:
                table.add_undefined("hidden", h, metric, "difference", missing[0], n=n, **extra)
            else:
                _replicate_row(table, h, metric, "difference", values[later][metric] - values[earlier][metric],
                               replicates[later][metric] - replicates[earlier][metric], n, settings, **extra)
    for metric, per_row in (("l2_norm", metrics.row_norms), ("gini", metrics.gini_rows)):
        rows = {s: per_row(x[s]).numpy() for s in keys}
        for stage in keys:
            _mean_row(table, h, metric, stage, rows[stage], settings)
        for later, earlier in pairs:
            _mean_row(table, h, metric, "difference", rows[later] - rows[earlier], settings,
                      stage=side_of((later, earlier)))
    for pair in pairs:
        _alignment_rows(table, h, x[pair[1]], x[pair[0]], w, settings, side_of(pair))


def _replicate_row(table: Table, h: int, metric: str, side: str, value: float, draws: Tensor, n: int,
                   settings: ProfileSettings, **extra: Any) -> None:
    interval = stats.percentile_interval(value, draws.numpy(), settings.confidence)
    table.add("hidden", h, metric, side, Interval(value, interval.low, interval.high, n), **extra)


def _spectrum_values(eigenvalues: Tensor, n: int, d: int, settings: ProfileSettings) -> dict[str, Tensor]:
    """Every spectral quantity of (..., k) eigenvalues of XX'; see `metrics` for the formulas."""
    s = eigenvalues.sqrt()
    top = s.amax(dim=-1)
    rank = metrics.effective_rank_from_singular_values(s, energy=settings.energy)
    return {
        "dataset_entropy": metrics.normalized_entropy_from_spectrum(
            eigenvalues, rows=n, dim=d, alpha=settings.alpha, normalize=settings.normalize),
        "effective_rank": rank,
        "effective_rank_normalized": rank / min(n, d),
        "rank_deficiency": metrics.rank_deficiency_from_singular_values(s, max_rank=min(n, d),
                                                                        tol=settings.rank_tol),
        "spectral_norm": top,
        "condition_number": top / s.amin(dim=-1),
    }


def _spectral(x: Tensor, w: Tensor, settings: ProfileSettings
              ) -> tuple[dict[str, float], dict[str, Tensor], dict[str, str]]:
    n, d = x.shape
    names = ("dataset_entropy", "effective_rank", "effective_rank_normalized", "rank_deficiency", "spectral_norm",
             "condition_number")
    if not bool(x.any()):
        return {}, {}, dict.fromkeys(names, "every pooled hidden state is zero")
    point, draws = (_spectrum_values(e, n, d, settings) for e in _resampled(x, w, settings))
    if settings.unit_rows:  # the earlier code scales rows for the entropy alone
        scaled = (_spectrum_values(e, n, d, settings) for e in _resampled(metrics.unit_norm_rows(x), w, settings))
        point["dataset_entropy"], draws["dataset_entropy"] = (v["dataset_entropy"] for v in scaled)
    reasons: dict[str, str] = {}
    # the Gram matrix squares the spectrum: below sqrt(eps) of the largest, zero cannot be told
    if not bool(point["condition_number"] < 1 / math.sqrt(torch.finfo(x.dtype).eps)):
        reasons["condition_number"] = ("the smallest singular value is zero to working precision "
                                       "(repeated or linearly dependent samples)")
    return ({k: float(v) for k, v in point.items() if k not in reasons},
            {k: v for k, v in draws.items() if k not in reasons}, reasons)


def _resampled(x: Tensor, w: Tensor, settings: ProfileSettings) -> tuple[Tensor, Tensor]:
    """Eigenvalues (k,) of XX' and of its bootstrap replicates (B, k)."""
    spectrum = metrics.gram_spectrum(x)
    if settings.resampling == "first-order":
        return spectrum.values, metrics.first_order_spectra(spectrum.vectors, spectrum.values, w)
    return spectrum.values, torch.stack([metrics.gram_spectrum(x * row.sqrt().unsqueeze(1)).values for row in w])


def _intrinsic(x: Tensor, w: Tensor, values: dict[str, float], draws: dict[str, Tensor],
               reasons: dict[str, str]) -> None:
    try:
        estimate = metrics.intrinsic_dimension(x)
    except UndefinedMetricError as error:
        reasons["intrinsic_dimension"] = str(error)
        return
    values["intrinsic_dimension"] = float(estimate.mle)
    draws["intrinsic_dimension"] = metrics.intrinsic_dimension_from_log_ratios(estimate.log_ratios, w)


def _alignment_rows(table: Table, h: int, base: Tensor, sft: Tensor, w: Tensor, settings: ProfileSettings,
                    stage: str) -> None:
    n = base.shape[0]
    gram_base, gram_sft = base @ base.mT, sft @ sft.mT
    extra: dict[str, Any] = {"stage": stage}

    def add(metric: str, compute: Callable[[], Interval]) -> None:
        try:
            table.add("hidden", h, metric, "pair", compute(), **extra)
        except UndefinedMetricError as error:
            table.add_undefined("hidden", h, metric, "pair", str(error), n=n, **extra)

    def resampled(value: Tensor, draws: Tensor) -> Interval:
        # repeated rows push replicates of CKA and of norms upwards: their mean is put back on the value
        interval = stats.percentile_interval(float(value), (draws - draws.mean() + value).numpy(),
                                             settings.confidence)
        return Interval(float(value), interval.low, interval.high, n)

    def debiased() -> Interval:
        value = float(metrics.cka_debiased_from_grams(gram_base, gram_sft))
        left_out = metrics.cka_jackknife(gram_base, gram_sft).numpy()
        interval = stats.jackknife_interval(value, left_out, settings.confidence)
        return Interval(value, interval.low, interval.high, n)

    add("cka", lambda: resampled(metrics.cka_from_grams(gram_base, gram_sft),
                                 metrics.cka_bootstrap(gram_base, gram_sft, w)))
    if n >= 5:
        add("cka_debiased", debiased)
    else:
        table.add_undefined("hidden", h, "cka_debiased", "pair", "the debiased CKA needs at least 5 samples", n=n,
                            **extra)
    _mean_row(table, h, "cosine", "pair", metrics.cosine_similarity(base, sft).numpy(), settings, **extra)
    distances = metrics.row_changes(base, sft)
    _mean_row(table, h, "change_intensity", "pair", distances.numpy(), settings, **extra)
    shift, shift_draws = metrics.mean_shift(base, sft), metrics.mean_shift_bootstrap(base, sft, w)
    add("mean_shift", lambda: resampled(shift, shift_draws))
    norm = base.mean(dim=0).norm()
    if float(norm) == 0:
        for metric in ("mean_shift_relative", "change_intensity_relative"):
            table.add_undefined("hidden", h, metric, "pair", "the mean of the base's hidden states is zero", n=n,
                                **extra)
        return
    norm_draws = (w @ base).norm(dim=1) / w.sum(dim=1)
    add("mean_shift_relative", lambda: resampled(shift / norm, shift_draws / norm_draws))
    add("change_intensity_relative",
        lambda: resampled(distances.mean() / norm, (w @ distances) / w.sum(dim=1) / norm_draws))


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


def _view_rows(table: Table, h: int, views: PooledStates, keys: Sequence[str],
               pairs: Sequence[tuple[str, str]], settings: ProfileSettings) -> None:
    count = settings.views
    generator_seed = settings.seed

    def quantities(x: Tensor) -> dict[str, float]:
        return {
            "infonce": float(metrics.infonce(x[0], x[1]).loss),
            "lidar": float(metrics.lidar(x.transpose(0, 1))),
            "dime": float(metrics.dime(x[0], x[1], alpha=settings.alpha,
                                       generator=torch.Generator().manual_seed(generator_seed))),
        }

    groups = 10
    values: dict[str, dict[str, float]] = {}
    left_out: dict[str, dict[str, np.ndarray[Any, Any]]] = {}
    n = 0
    for stage in keys:
        x = views.x[stage][h].double().reshape(count, -1, views.x[stage].shape[-1])
        n = x.shape[1]
        values[stage] = quantities(x)
        folds = min(groups, n)
        parts = [quantities(x[:, [i for i in range(n) if i % folds != g]]) for g in range(folds)]
        left_out[stage] = {m: np.array([p[m] for p in parts]) for m in values[stage]}
    for metric in values[keys[0]]:
        sides: list[tuple[str, float, np.ndarray[Any, Any], dict[str, Any]]] = [
            (s, values[s][metric], left_out[s][metric], {}) for s in keys]
        sides += [("difference", values[a][metric] - values[b][metric], left_out[a][metric] - left_out[b][metric],
                   {"stage": side_of((a, b))}) for a, b in pairs]
        for side, value, others, extra in sides:
            interval = stats.jackknife_interval(value, others, settings.confidence)
            table.add("hidden", h, metric, side, Interval(value, interval.low, interval.high, n), **extra)
