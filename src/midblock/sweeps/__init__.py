"""Sweeps: many arms under one budget, the same data and items, and statistics that can be believed (room 6)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from midblock.lazily import on_first_use

if TYPE_CHECKING:
    from midblock.settings.sweep import SweepConfig
    from midblock.sweeps.arms import Arm, Job, expand_arms, jobs_of
    from midblock.sweeps.config import dump_config, load_config, parse_config
    from midblock.sweeps.data import SweepData, load_sweep_data
    from midblock.sweeps.engine import Engine, LocalEngine
    from midblock.sweeps.engines import make_engine
    from midblock.sweeps.on_ray import RayEngine
    from midblock.sweeps.on_slurm import SlurmEngine
    from midblock.sweeps.outcome import SweepResult
    from midblock.sweeps.planning import SweepPlan, plan_sweep
    from midblock.sweeps.processes import ProcessesEngine
    from midblock.sweeps.records import RunRecord, TaskScores, read_records
    from midblock.sweeps.run import SweepState, dry_run, sweep
    from midblock.sweeps.scores import ArmInfo
    from midblock.sweeps.statistics import SweepStatistics, analyse

__all__ = ["Arm", "ArmInfo", "Engine", "Job", "LocalEngine", "ProcessesEngine", "RayEngine", "RunRecord",
           "SlurmEngine", "SweepConfig", "SweepData", "SweepPlan", "SweepResult", "SweepState", "SweepStatistics",
           "TaskScores", "analyse", "dry_run", "dump_config", "expand_arms", "jobs_of", "load_config",
           "load_sweep_data", "make_engine", "parse_config", "plan_sweep", "read_records", "sweep"]

__getattr__, __dir__ = on_first_use(__name__, __file__, __all__)
