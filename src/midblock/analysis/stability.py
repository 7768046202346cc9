"""A profile repeated with other samples and augmentations: is the change at a depth there every time?

Each seed draws its own samples from the data set (and its own augmentations, where views are
asked for). Per hidden state the seeds' values give a mean, a t interval and a one-sample t test
against no change; Holm's adjustment is over the hidden states of one quantity.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from midblock import stats
from midblock.analysis.profile import ProfileResult, profile
from midblock.data import Dataset, load_data
from midblock.errors import OutputError, SettingsError
from midblock.models import LoadedModel
from midblock.models.chain import comparisons, resolve_stages, side_of, stage_names
from midblock.models.state import STATE_MARKER, mark_state_folder
from midblock.progress import Progress, silent
from midblock.quantities import moved, unchanged
from midblock.removing import remove_marked
from midblock.results import UNNAMED, Answer, Estimate, Origin, Table, TableResult
from midblock.settings import ProfileSettings
from midblock.writing import read_written, recomputed, write_sealed

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["StabilityResult", "profile_seeds"]


@dataclass
class StabilityResult(TableResult):
    """Means over seeds of every measurement of a profile, and tests against no change."""

    table: Table
    """The tidy table; columns ``t``, ``p``, ``p_holm`` and ``seed_N`` (each seed's own value)."""
    stages: list[str]
    num_hidden: int
    settings: ProfileSettings
    seeds: list[int]
    counts: dict[str, Any] = field(default_factory=dict)
    """As of a profile (the least over the seeds), and those of each seed."""
    layers: pd.DataFrame = field(default_factory=pd.DataFrame)

    def tables(self) -> dict[str, pd.DataFrame]:
        """``layers``."""
        return {"layers": self.layers}
    """As of a profile, the mean over the seeds."""
    origin: Origin = UNNAMED

    def _as_profile(self) -> ProfileResult:
        return ProfileResult(self.table, self.stages, self.num_hidden, self.settings, self.counts, self.layers,
                             self.origin)

    def regions(self) -> pd.DataFrame:
        """As `ProfileResult.regions`, of the means over seeds, and where the change is significant.

        ``significant`` counts hidden states with Holm p below 1 - confidence.
        """
        regions = self._as_profile().regions()
        frame = self.frame
        level = 1 - self.settings.confidence
        found = frame[frame["p_holm"] < level].groupby(["stage", "metric"]).size()
        regions["significant"] = [int(found.get((s, m), 0)) for s, m in
                                  zip(regions["stage"], regions["metric"], strict=True)]
        return regions

    def answer(self) -> Answer:
        """As of a profile; the n of its interval counts seeds."""
        own = self._as_profile().answer()
        return replace(own, found=own.found.replace(" samples (mean", " seeds (mean"))

    def details(self) -> list[str]:
        """Where the change is, and at how many depths it is there with every seed."""
        lines = self._as_profile().details()[:-1]
        regions = self.regions()
        level = 1 - self.settings.confidence
        for pair in comparisons(self.stages):
            part = regions[regions["stage"] == side_of(pair)].set_index("metric")["significant"]
            shown = [f"{metric} {count}" for metric, count in part.items() if count]
            lines.append(f"{side_of(pair)}: hidden states (of {self.num_hidden}) that differ from no change over "
                         f"{len(self.seeds)} seeds (t test, Holm p < {level:.2g}): {', '.join(shown) or 'none'}.")
        share = self.counts.get("share_drawn", 0.0)
        if share > 0.2:
            lines.append(f"Each seed draws {share:.0%} of the data set, so that the draws share samples: the intervals "
                         "speak about draws from this data set and are too short for new data.")
        return [*lines, f"Intervals are t intervals over the {len(self.seeds)} seeds."]

    def figures(self) -> dict[str, Figure]:
        """The figures of a profile, with means and intervals over the seeds."""
        return self._as_profile().figures()


def profile_seeds(stages: Sequence[LoadedModel | str] | LoadedModel | str, sft: LoadedModel | str | None = None, *,
                  data: Dataset | str, seeds: int = 3, names: Sequence[str] | None = None,
                  state_folder: Path | None = None, progress: Progress = silent,
                  settings: ProfileSettings | None = None, **overrides: Any) -> StabilityResult:
    """Repeat `profile` with other samples and augmentations; mean, interval and t test per hidden.

    Args:
        stages: The base (then give ``sft``), or a chain; loaded models or MODEL specs.
        sft: The tuned checkpoint, where ``stages`` is a single base.
        data: A data set or a D spec; every seed draws from it anew.
        seeds: How many; they are ``settings.seed``, ``settings.seed`` + 1 ...
        names: Stage names.
        state_folder: Where finished seeds and an interrupted one are kept, and resumed from.
        progress: Told how far each seed's pass is.
        settings: As for `profile`.
        **overrides: Single fields of `ProfileSettings`.

    Returns:
        The rows of a profile; ``value`` is the mean over seeds, ``low``..``high`` its t interval and
        ``n`` the number of seeds. Differences are tested against 0, pair scores against the value of "no change" of
        their quantity (1 for similarities).

    Raises:
        SettingsError: fewer than 2 seeds, or a setting out of range.
        PairMismatchError: the checkpoints do not fit together.
        DataError: too few usable samples.
        OutputError: a saved seed cannot be read.
    """
    if isinstance(seeds, bool) or seeds < 2:
        raise SettingsError(f"{seeds} seeds were asked for; a test over seeds needs at least 2 (the paper: 3).")
    chosen = ProfileSettings.of(settings, overrides)
    models = resolve_stages(stages, sft, names)
    keys = stage_names(len(models), names)
    dataset = load_data(data, seed=chosen.seed) if isinstance(data, str) else data
    numbers = [chosen.seed + k for k in range(seeds)]
    if state_folder is not None:
        mark_state_folder(state_folder)
    tables: list[Table] = []
    counts: list[dict[str, Any]] = []
    likeness: list[pd.DataFrame] = []
    for k, number in enumerate(numbers):
        done = state_folder / f"seed-{number}.json" if state_folder else None
        kept = _read_seed(done) if done is not None and done.is_file() else None
        if kept is not None:
            table, count, layers = kept
        else:
            result = profile(models, data=dataset, names=keys,
                             progress=_named(progress, f"seed {k + 1} of {seeds}"),
                             state_folder=state_folder / f"seed-{number}" if state_folder else None,
                             settings=chosen.replace(seed=number))
            table, count, layers = result.table, result.counts, result.layers
            if done is not None:
                write_sealed(done, {"rows": table.rows, "reasons": table.reasons, "counts": count,
                                    "layers": layers.to_dict(orient="records")})
        tables.append(table)
        counts.append(count)
        likeness.append(layers)
    if state_folder is not None:
        remove_marked(state_folder / STATE_MARKER, [state_folder / f"seed-{number}.json" for number in numbers],
                      folder=True)
    wanted = max(chosen.samples, chosen.token_samples)
    least = {name: int(min(c[name] for c in counts)) for name in ("pooled_samples", "token_samples")}
    total = {**counts[0], **least, "truncated": max(c.get("truncated", 0) for c in counts),
             "seeds": numbers, "share_drawn": min(1.0, wanted / max(1, len(dataset.examples))), "by_seed": counts}
    found = StabilityResult(Table(), keys, models[0].anatomy.num_blocks + 1, chosen, numbers, total,
                            origin=Origin(tuple(m.spec for m in models), dataset.spec))
    together = pd.concat(likeness)
    if not together.empty:
        together = together.groupby(["stage", "layer", "other"], sort=False, as_index=False).agg(
            {"cka_debiased": "mean", "n": "min"})
    return replace(found, layers=together, table=_combine(tables, numbers, chosen, keys, found._as_profile().sums))


def _named(progress: Progress, which: str) -> Progress:
    def tell(what: str, done: float, total: float, note: str = "") -> None:
        progress(f"{what}, {which}", done, total, note)

    return tell


def _read_seed(path: Path) -> tuple[Table, dict[str, Any], pd.DataFrame] | None:
    """What an interrupted run measured with one seed; None where the file is damaged, which is said."""
    try:
        stored = read_written(path, advice="it is measured again")
        rows = [{k: math.nan if v is None and k in ("value", "low", "high") else v for k, v in row.items()}
                for row in stored["rows"]]
        return Table(rows, stored["reasons"]), stored["counts"], pd.DataFrame(stored["layers"])
    except (OutputError, ValueError, KeyError, TypeError, AttributeError) as error:
        recomputed(error, "This seed is measured again.")
        return None


def _combine(tables: Sequence[Table], seeds: Sequence[int], settings: ProfileSettings, stages: Sequence[str],
             sums: Mapping[str, int]) -> Table:
    """One row for each row of the profiles: mean over seeds, interval, and test where it is a change."""
    values: dict[tuple[Any, ...], list[float]] = {}
    first: dict[tuple[Any, ...], dict[str, Any]] = {}
    reasons: dict[tuple[Any, ...], str] = {}
    for number, table in enumerate(tables):
        for row in table.rows:
            key = (row["kind"], row["layer"], row["metric"], row["side"], row.get("stage"))
            first.setdefault(key, row)
            values.setdefault(key, [math.nan] * len(tables))[number] = float(row["value"])
        for reason in table.reasons:
            key = (reason["kind"], reason["layer"], reason["metric"], reason["side"], reason.get("stage"))
            reasons.setdefault(key, str(reason["reason"]))
    tests: dict[tuple[Any, ...], stats.TTest] = {}
    families: dict[tuple[Any, ...], list[tuple[Any, ...]]] = {}
    sizes: dict[tuple[int, str], float] = {}
    for (_, layer, metric, side, _), found in values.items():
        if side in stages:
            sizes[layer, metric] = max(sizes.get((layer, metric), 0.0), *map(abs, found))
    for key, found in values.items():
        _, layer, metric, side, stage = key
        if side in ("difference", "pair"):
            same = unchanged(metric, side)
            size = sizes.get((layer, metric), 0.0)
            near = [v if moved(metric, side, v, size=size, **sums) else same for v in found]
            tests[key] = stats.one_sample_t(near, same, settings.confidence)
            families.setdefault((metric, side, stage), []).append(key)
    adjusted: dict[tuple[Any, ...], float] = {}
    for members in families.values():
        found_p = stats.holm(np.array([tests[key].p for key in members]))
        adjusted.update(zip(members, map(float, found_p), strict=True))
    combined = Table()
    for key, found in values.items():
        kind, layer, metric, side, _ = key
        extra = {name: value for name, value in first[key].items()
                 if name not in ("kind", "layer", "metric", "side", "value", "low", "high", "n")}
        test = tests.get(key)
        extra |= {"t": test.t if test else math.nan, "p": test.p if test else math.nan,
                  "p_holm": adjusted.get(key, math.nan)}
        extra |= {f"seed_{number}": value for number, value in zip(seeds, found, strict=True)}
        interval = stats.mean_interval(found, settings.confidence)
        if interval.n == 0:
            combined.add_undefined(kind, layer, metric, side, reasons.get(key, "no seed has a value"), **extra)
        else:
            combined.add(kind, layer, metric, side,
                         Estimate(interval.value, interval.low, interval.high, interval.n), **extra)
    return combined
