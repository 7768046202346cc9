"""The engine that a configuration names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from midblock.extras import require
from midblock.settings.sweep import SweepConfig
from midblock.sweeps.arms import jobs_of
from midblock.sweeps.data import SweepData
from midblock.sweeps.engine import Engine, LocalEngine
from midblock.sweeps.planning import SweepPlan

if TYPE_CHECKING:
    from midblock.models import LoadedModel

__all__ = ["make_engine", "needs_of", "require_engine"]

_PACKAGES = {"ray": "ray", "slurm": "submitit"}
_BESIDE_GPU = 2 << 30


def require_engine(config: SweepConfig) -> None:
    """Stop before anything is loaded where an engine's package is absent, or its cluster.

    Raises:
        MissingExtraError: it is not installed.
        SettingsError: nothing answers at the address; submitit does not take the settings.
    """
    if config.engine in _PACKAGES:
        require(_PACKAGES[config.engine], f"engine {config.engine}")
    if config.engine == "ray":
        from midblock.sweeps.on_ray import require_answer

        require_answer(config.address)
    elif config.engine == "slurm":
        from midblock.sweeps.on_slurm import make_executor

        make_executor(config, Path())


def needs_of(plan: SweepPlan, loaded: LoadedModel) -> dict[str, int]:
    """Bytes of host memory that each run needs, by key: the plan's estimate, or what stands beside a GPU.

    The untuned model needs what the smallest arm does.
    """
    weights = sum(p.numel() * p.itemsize for p in loaded.model.parameters())
    by_arm = {str(arm): weights + _BESIDE_GPU if loaded.device.type == "cuda" else int(peak)
              for arm, peak in zip(plan.frame["arm"], plan.frame["peak_bytes"], strict=True)}
    least = min(by_arm.values(), default=weights + _BESIDE_GPU)
    return {job.key: by_arm.get(job.name, least) for job in jobs_of(plan.arms, plan.seeds)}


def make_engine(config: SweepConfig, loaded: LoadedModel, data: SweepData, *, folder: Path, plan: SweepPlan,
                trust: Mapping[str, bool]) -> Engine:
    """The engine.

    Args:
        config: Names it.
        loaded: The base.
        data: From `load_sweep_data`.
        folder: The sweep's run folder.
        plan: What the runs need.
        trust: ``trust_remote_code`` and ``allow_pickle`` for workers.

    Raises:
        MissingExtraError: its package is not installed.
    """
    trackers = folder / "trackers"
    if config.engine == "local":
        engine = LocalEngine(config, loaded, data)
        engine.trackers = trackers
        return engine
    needs = needs_of(plan, loaded)
    if config.engine == "processes":
        from midblock.sweeps.processes import ProcessesEngine

        return ProcessesEngine(config, loaded, data, trust=trust, needs=needs, trackers=trackers)
    if config.engine == "ray":
        from midblock.sweeps.on_ray import RayEngine

        return RayEngine(config, loaded, data, trust=trust, needs=needs, trackers=trackers)
    from midblock.sweeps.on_slurm import SlurmEngine

    return SlurmEngine(config, loaded, data, folder=folder, trust=trust, needs=needs, trackers=trackers)
