"""Settings of `midblock weights`."""

from __future__ import annotations

from typing import Any

from pydantic import field_validator

from midblock.settings.base import Settings, setting

__all__ = ["WeightsSettings"]


class WeightsSettings(Settings):
    """What is measured of weights and by how many threads; `weights` takes the same names as keyword arguments."""

    spectra: bool | None = setting(None, help=(
        "Also the spectral norm and the effective rank of every matrix's difference. Default: where that takes a "
        "minute or two at most (up to some 300M parameters; adapters of any size)."))
    rotations: bool = setting(False, help=(
        "Also how tuning turned each matrix (minutes): entries exactly unchanged, rank of the change, singular vectors "
        "kept, intruder dimensions; of three checkpoints or more, the cosine and angles between their changes."))
    workers: int | None = setting(None, ge=1, metavar="N", help=(
        "Threads that read. Default: one for each core, at most 8."))

    @field_validator("spectra", mode="before")
    @classmethod
    def _auto(cls, value: Any) -> Any:
        return None if value == "auto" else value
