"""What every worker of a sweep does, wherever it runs: load, say who it is, run what it is given."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from midblock.errors import SettingsError
from midblock.provenance import package_versions
from midblock.settings.sweep import SweepConfig
from midblock.sweeps.arms import Job
from midblock.sweeps.data import SweepData, load_sweep_data
from midblock.sweeps.engine import LocalEngine, weights_digest
from midblock.sweeps.records import RunRecord

if TYPE_CHECKING:
    from midblock.models import LoadedModel

__all__ = ["Servant", "Task", "compare", "identity"]


@dataclass(frozen=True)
class Task:
    """What a worker is told when it starts; every kind of worker is told the same."""

    values: dict[str, Any]
    """The configuration, with the device of this worker."""
    trust: dict[str, bool]
    """``trust_remote_code`` and ``allow_pickle``."""
    threads: int
    """Of PyTorch: sums of floating-point numbers depend on it."""
    folder: str
    """Where the main process works; relative paths of the configuration begin there."""
    trackers: str | None = None
    """Folder of what ``report_to`` writes."""


class Servant:
    """One worker: a `midblock.sweeps.LocalEngine` of its own.

    Raises:
        MidblockError: the model or the data cannot be loaded here.
    """

    def __init__(self, task: Task) -> None:
        from midblock.models import load_model

        if Path(task.folder).is_dir():
            os.chdir(task.folder)
        torch.set_num_threads(task.threads)
        self.config = SweepConfig(**task.values)
        self.data = load_sweep_data(self.config)
        self.loaded = load_model(self.config.model, **{**self.config.placement(), **task.trust})
        self._engine = LocalEngine(self.config, self.loaded, self.data)
        self._engine.trackers = None if task.trackers is None else Path(task.trackers)

    def identity(self) -> dict[str, Any]:
        """See `identity`."""
        return identity(self.loaded, self.data)

    def run(self, job: Job) -> RunRecord:
        """The record of a run, also of one that failed.

        Raises:
            TrainingError, OutputError: as `midblock.sweeps.LocalEngine.run`.
        """
        found: list[RunRecord] = []
        self._engine.run([job], found.append)
        return found[0]


def identity(loaded: LoadedModel, data: SweepData) -> dict[str, Any]:
    """What must be equal in all processes for their results to be of one sweep."""
    return {"packages": package_versions(), "weights": weights_digest(loaded.model),
            "data": data.describe()["fingerprint"]}


def compare(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Refuse a worker that is not like this process.

    Args:
        ours: `identity` here.
        theirs: Of the worker.

    Raises:
        SettingsError: other packages, weights or rows; what differs is named.
    """
    if theirs["packages"] != ours["packages"]:
        differing = sorted(n for n in {*ours["packages"], *theirs["packages"]}
                           if ours["packages"].get(n) != theirs["packages"].get(n))
        told = ", ".join(f"{n} {theirs['packages'].get(n, 'absent')} against {ours['packages'].get(n, 'absent')}"
                         for n in differing[:4])
        raise SettingsError(f"a worker has other packages than this process ({told}); results of both would not be of "
                            "one sweep. Give all workers one environment.")
    for what, word in (("weights", "weights of the base"), ("data", "rows")):
        if theirs[what] != ours[what]:
            raise SettingsError(f"a worker found other {word} than this process (their digests differ); results of "
                                "both would not be of one sweep. Did the files change since the sweep began?")
