"""Checks that the functions of this package share: plain float64 arrays in, clear errors out."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from midblock.errors import SettingsError, UndefinedMetricError

__all__ = ["FloatArray", "binary_vector", "check_confidence", "check_paired", "matrix", "vector"]

FloatArray = npt.NDArray[np.float64]


def vector(values: npt.ArrayLike, what: str, *, drop_nan: bool = False) -> FloatArray:
    """``values`` as a float64 vector (n,) without infinity; NaN is dropped or refused.

    Raises:
        SettingsError: not one-dimensional.
        UndefinedMetricError: infinite entries, or NaN where it is not dropped.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1:
        raise SettingsError(f"{what} must be one-dimensional, but has shape {array.shape}.")
    if drop_nan:
        array = array[~np.isnan(array)]
    if not np.isfinite(array).all():
        bad = int((~np.isfinite(array)).sum())
        raise UndefinedMetricError(f"{what} holds {bad} non-finite of {array.size} values; "
                                   "remove or repair them first.")
    return array


def check_paired(a: FloatArray, b: FloatArray) -> None:
    """Refuse two vectors that cannot be scores of the same items."""
    if a.shape != b.shape:
        raise SettingsError(f"a paired comparison needs the same items on both sides, "
                            f"but found {a.size} and {b.size}.")
    if a.size == 0:
        raise UndefinedMetricError("a paired comparison of 0 items has no value.")


def binary_vector(values: npt.ArrayLike, what: str) -> FloatArray:
    """``values`` as a vector of 0.0 and 1.0.

    Raises:
        SettingsError: any other value.
    """
    array = vector(values, what)
    if not np.isin(array, (0.0, 1.0)).all():
        raise SettingsError(f"{what} must hold only right (1) and wrong (0), but holds "
                            f"{array[~np.isin(array, (0.0, 1.0))][0]:g}; use binary=False.")
    return array


def matrix(scores: npt.ArrayLike, what: str, *, missing_seeds: bool = False) -> FloatArray:
    """``scores`` as (seeds, items); a vector counts as one seed.

    With ``missing_seeds`` a row may be NaN throughout: that seed failed for this arm.

    Raises:
        SettingsError: not one or two dimensions, or a row that is NaN only in part.
        UndefinedMetricError: empty, or non-finite entries.
    """
    array = np.asarray(scores, dtype=np.float64)
    if array.ndim == 1:
        array = array[None, :]
    if array.ndim != 2:
        raise SettingsError(f"{what} must have shape (seeds, items), but has {array.shape}.")
    if array.size == 0:
        raise UndefinedMetricError(f"{what} holds no scores (shape {array.shape}).")
    missing = np.isnan(array)
    if missing_seeds:
        partly = missing.any(axis=1) & ~missing.all(axis=1)
        if partly.any():
            raise SettingsError(f"{what}: seed {int(np.flatnonzero(partly)[0])} lacks some items' scores; "
                                "score every item, or leave the whole seed NaN.")
        array_checked = array[~missing.all(axis=1)]
    else:
        array_checked = array
    if not np.isfinite(array_checked).all():
        raise UndefinedMetricError(f"{what} holds non-finite scores; remove or repair them first.")
    return array


def check_confidence(confidence: float) -> None:
    """Refuse a confidence level outside 0..1."""
    if not 0.0 < confidence < 1.0:
        raise SettingsError(f"confidence {confidence!r} must lie between 0 and 1, such as 0.95.")
