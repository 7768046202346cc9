"""From the states at one depth to rows of a table: every registered quantity, with its interval.

What a quantity needs (per sample, per data set, of one model or of two) and how its replicates are made is in its
record (`midblock.quantities`); nothing here knows one by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from midblock import metrics, stats
from midblock.errors import UndefinedMetricError
from midblock.models.chain import side_of
from midblock.quantities import Level, Quantity, quantities
from midblock.results import Estimate, Table

__all__ = ["Depth", "MeasureSettings", "Spectra", "functions"]

_FOLDS = 10
"""Groups of samples left out in turn, for quantities that bring no replicates of their own."""


class MeasureSettings(Protocol):
    """What of a command's settings is needed here; quantities may name further fields."""

    @property
    def confidence(self) -> float: ...
    @property
    def resampling(self) -> Literal["first-order", "exact"]: ...


def functions(level: Level, paired: bool, settings: Any) -> dict[str, Callable[..., Any]]:
    """Name -> function of the quantities of a level, with the settings' options bound."""
    return {q.name: partial(q.load(), **q.arguments(settings)) for q in quantities(level=level, paired=paired)
            if q.function}


@dataclass(frozen=True)
class _Taken:
    """A value and what its interval is made of."""

    value: float
    parts: np.ndarray[Any, Any]
    how: Literal["rows", "replicates", "left out", "none"]
    """``parts`` are values per sample, bootstrap replicates, values without some samples, or there are none."""
    n: int

    def __sub__(self, other: _Taken) -> _Taken:
        return _Taken(self.value - other.value, self.parts - other.parts, self.how, self.n)

    def centred(self) -> _Taken:
        """Replicates moved so that their mean is the value."""
        return _Taken(self.value, self.parts - self.parts.mean() + self.value, self.how, self.n)

    def estimate(self, confidence: float) -> Estimate:
        if self.how == "rows":
            return stats.mean_interval(self.parts, confidence)
        if self.how == "none":
            return Estimate(self.value, n=self.n)
        make = stats.percentile_interval if self.how == "replicates" else stats.jackknife_interval
        found = make(self.value, self.parts, confidence)
        return Estimate(self.value, found.low, found.high, self.n)


@dataclass
class Depth:
    """Rows of one hidden state.

    Args:
        table: Where they go.
        h: Its number.
        stages: Names of the checkpoints.
        pairs: (later, earlier) stages that are compared.
        settings: Of the command.
        weights: (B, N) bootstrap weights of the pooled samples.
    """

    table: Table
    h: int
    stages: Sequence[str]
    pairs: Sequence[tuple[str, str]]
    settings: MeasureSettings
    weights: Tensor

    def tokens(self, values: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Rows of the token level: metric -> side -> (n) values per sample."""
        for metric, sides in values.items():
            taken = {side: _rows(of) for side, of in sides.items()}
            if set(self.stages) <= set(taken):
                self._single(metric, taken)
            else:
                for pair in self.pairs:
                    self._add(metric, "pair", taken[side_of(pair)], stage=side_of(pair))

    def pooled(self, x: Mapping[str, Tensor]) -> None:
        """Rows of the data-set level: stage -> (N, d) float64."""
        spectra = {stage: Spectra(of, self.weights, self.settings) for stage, of in x.items()}
        for q in quantities(level="dataset", paired=False):
            if q.function:
                self._single(q.name, {s: self.taken(q, (x[s],), spectra[s] if q.spectrum else None)
                                      for s in self.stages})
        for q in quantities(level="dataset", paired=True):
            for later, earlier in self.pairs if q.function else ():
                found = self.taken(q, (x[earlier], x[later]))
                # repeated rows push replicates of similarities and of norms one way: their mean is put back
                centred = found.centred() if isinstance(found, _Taken) and found.how == "replicates" else found
                self._add(q.name, "pair", centred, stage=side_of((later, earlier)))

    def views(self, x: Mapping[str, Tensor]) -> None:
        """Rows of augmented views: stage -> (N, V, d) float64."""
        for q in quantities(level="views"):
            self._single(q.name, {s: self.taken(q, (x[s],)) for s in self.stages})

    # -- one quantity

    def _single(self, metric: str, taken: Mapping[str, _Taken | str]) -> None:
        for stage in self.stages:
            self._add(metric, stage, taken[stage])
        for later, earlier in self.pairs:
            a, b = taken[later], taken[earlier]
            self._add(metric, "difference", a if isinstance(a, str) else b if isinstance(b, str) else a - b,
                      stage=side_of((later, earlier)))

    def _add(self, metric: str, side: str, found: _Taken | str, **extra: Any) -> None:
        place: tuple[Literal["hidden"], int, str, str] = ("hidden", self.h, metric, side)
        if isinstance(found, str):
            self.table.add_undefined(*place, found, n=self.weights.shape[1], **extra)
            return
        estimate = found.estimate(self.settings.confidence)
        if math.isnan(estimate.value):
            self.table.add_undefined(*place, "no sample has a value (fewer than 3 tokens, or all zero)", **extra)
        else:
            self.table.add(*place, estimate, **extra)

    def taken(self, q: Quantity, x: tuple[Tensor, ...], spectra: Spectra | None = None) -> _Taken | str:
        """The quantity of (N, ...) features of one or two models, or why it has no value."""
        n = x[0].shape[0]
        if n < q.least:
            return f"{q.label} needs at least {q.least} samples"
        function = partial(q.load(), **q.arguments(self.settings))
        try:
            if spectra is not None and q.interval == "none":
                return _Taken(float(function(spectra.of(q)[0])), np.empty(0), "none", n)
            if spectra is not None and q.interval == "groups":
                parts = np.array([float(function(part)) for part in spectra.without_groups(q)])
                return _Taken(float(function(spectra.of(q)[0])), parts, "left out", n)
            if spectra is not None:
                point, draws = spectra.of(q)
                return _Taken(float(function(point)), function(draws).numpy(), "replicates", n)
            value = torch.as_tensor(function(*x))
            if value.ndim:
                return _rows(value)
            if q.resampled:
                replicates = q.load("resampled")(*x, self.weights, **q.arguments(self.settings))
                return _Taken(float(value), replicates.numpy(), "replicates", n)
            left_out = (q.load("jackknife")(*x, **q.arguments(self.settings)).numpy() if q.jackknife else
                        np.array([float(function(*part)) for part in _without_groups(x, n)]))
            return _Taken(float(value), left_out, "left out", n)
        except UndefinedMetricError as error:
            return str(error)


def _rows(values: Tensor) -> _Taken:
    parts = values.numpy()
    return _Taken(float(values.nanmean()), parts, "rows", int(np.isfinite(parts).sum()))


def _without_groups(x: tuple[Tensor, ...], n: int) -> Iterator[tuple[Tensor, ...]]:
    folds = min(_FOLDS, n)
    for g in range(folds):
        kept = torch.arange(n) % folds != g
        yield tuple(of[kept] for of in x)


class Spectra:
    """Spectrum of features (N, d) and of their bootstrap replicates; made once for all quantities."""

    def __init__(self, x: Tensor, weights: Tensor, settings: MeasureSettings) -> None:
        self._x, self._weights, self._settings = x, weights, settings
        self._made: dict[bool, tuple[metrics.Spectrum, metrics.Spectrum]] = {}
        self._parts: dict[bool, list[metrics.Spectrum]] = {}

    def without_groups(self, q: Quantity) -> list[metrics.Spectrum]:
        """Without a tenth of the samples in turn."""
        unit = self._unit(q)
        if unit not in self._parts:
            x = metrics.unit_norm_rows(self._x) if unit else self._x
            self._parts[unit] = [metrics.Spectrum(metrics.singular_values(part, method="gram").square(), *part.shape)
                                 for (part,) in _without_groups((x,), len(x))]
        return self._parts[unit]

    def _unit(self, q: Quantity) -> bool:
        return q.unit_rows and bool(getattr(self._settings, "unit_rows", False))

    def of(self, q: Quantity) -> tuple[metrics.Spectrum, metrics.Spectrum]:
        """Of the rows, or of rows scaled to norm 1 where the settings and the quantity ask for it."""
        unit = self._unit(q)
        if unit not in self._made:
            x = metrics.unit_norm_rows(self._x) if unit else self._x
            if not bool(x.any()):
                raise UndefinedMetricError("every pooled hidden state is zero")
            found = metrics.gram_spectrum(x)
            if self._settings.resampling == "first-order":
                draws = metrics.first_order_spectra(found.vectors, found.values, self._weights)
            else:
                draws = torch.stack([metrics.gram_spectrum(x * w.sqrt().unsqueeze(1)).values for w in self._weights])
            self._made[unit] = metrics.Spectrum(found.values, *x.shape), metrics.Spectrum(draws, *x.shape)
        return self._made[unit]
