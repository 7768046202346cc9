"""`sweep`: plan, run, analyse and write, resumable at every finished run."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from midblock.models import LoadedModel, load_model
from midblock.progress import Progress, silent
from midblock.provenance import RunFolder
from midblock.settings.base import as_keys
from midblock.settings.sweep import ENGINE_FIELDS, SweepConfig
from midblock.sweeps.arms import Job, jobs_of
from midblock.sweeps.config import dump_config, load_config
from midblock.sweeps.data import SweepData, load_sweep_data
from midblock.sweeps.engine import Engine
from midblock.sweeps.engines import make_engine, require_engine
from midblock.sweeps.outcome import SweepResult
from midblock.sweeps.planning import SweepPlan, outline_of, plan_sweep
from midblock.sweeps.records import RunRecord, read_records, write_record
from midblock.tuning import Plan
from midblock.tuning.estimate import outline

__all__ = ["SweepState", "dry_run", "sweep"]


_GROWS = ("arms", "seeds", "training.learning_rates", "training.full_learning_rates", "training.rate_seeds")
"""Settings that say which runs there are: a finished sweep is extended by others, and what is there is kept."""


@dataclass(frozen=True)
class SweepState:
    """How far a sweep is, for a live table."""

    records: Mapping[str, RunRecord]
    """Outlines of the finished runs (`RunRecord.outline`) by key, in order; the whole ones are in the run folder."""
    plan: SweepPlan
    seconds_left: float
    """Estimate from the runs so far."""

    @property
    def runs_left(self) -> int:
        """Runs to come."""
        return len(self.plan.jobs) - len(self.records)


@as_keys()
def dry_run(config: SweepConfig | Path | str, *, trust_remote_code: bool = False,
            allow_pickle: bool = False) -> SweepPlan:
    """What a sweep would do: reads config, tokenizer and data, no weights.

    Raises:
        SettingsError: faults in the configuration, or arms that do not fit the model.
        DataError: data that cannot be used.
    """
    config = config if isinstance(config, SweepConfig) else load_config(config)
    found = outline(config.model, config, trust_remote_code=trust_remote_code, allow_pickle=allow_pickle)
    return plan_sweep(config, found, load_sweep_data(config))


@as_keys()
def sweep(config: SweepConfig | Path | str, *, out: Path | str, resume: bool = False,
          given: dict[str, object] | None = None, loaded: LoadedModel | None = None,
          trust_remote_code: bool = False, allow_pickle: bool = False, progress: Progress = silent,
          listener: Callable[[SweepState], None] | None = None,
          engine: Callable[[SweepConfig, LoadedModel, SweepData], Engine] | None = None) -> SweepResult:
    """Train and score every arm of a configuration and compare them.

    Args:
        config: A configuration or the path of one.
        out: Run folder: ``config.yaml``, ``results/*.json`` (one per run, written when it ends),
            ``table.csv``, ``comparisons.csv``, ``samples.jsonl``, ``verdict.txt``, figures.
        resume: Go on in ``out``; finished runs are kept, failed ones are tried again. Arms, seeds, learning rates and
            statistics may be others than before: a finished sweep is extended so, and only what is new is trained.
        given: The settings as the user gave them, for run.json.
        loaded: The base, if it is loaded already.
        progress: Told what is being done.
        listener: Called after every run.
        engine: Makes the engine; default the one that the configuration names.

    Raises:
        SettingsError: faults in the configuration, arms that do not fit, or other settings than
            those of the run to resume.
        OutputError: ``out`` is not empty, or cannot be written.
        DataError: data that cannot be used.
        TrainingError: the base's weights did not survive a run.
    """
    config = config if isinstance(config, SweepConfig) else load_config(config)
    require_engine(config)
    if not resume:
        RunFolder.check_free(out)
    data = load_sweep_data(config)
    trust = {"trust_remote_code": trust_remote_code, "allow_pickle": allow_pickle}
    if loaded is None:
        loaded = load_model(config.model, **config.placement(), trust_remote_code=trust_remote_code,
                            allow_pickle=allow_pickle)
    plan = plan_sweep(config, outline_of(loaded), data, loaded)
    with RunFolder(out, command="sweep", settings=config.model_dump(mode="json"), given=given, resume=resume,
                   may_differ=(*_GROWS, "name", "statistics", "report_to", *ENGINE_FIELDS)) as run:
        run.record_inputs(models={"base": loaded.describe()}, data=data.describe())
        run.write_text("config.yaml", dump_config(config))
        run.write_table(plan.frame, "plan.csv")
        known = _known(run.path, plan) if run.resumed else {}
        plan = plan.decided(known)
        records = _of(plan, known)
        tell = listener if listener is not None else _ignore
        speed = _Speed(plan)
        shown = MappingProxyType(records)
        tell(SweepState(shown, plan, speed.time_left(plan, records)))

        def finished(record: RunRecord) -> None:
            write_record(run.path, record)
            records[record.key] = record.outline()
            speed.finished(record)
            tell(SweepState(shown, plan, speed.time_left(plan, records)))

        made: Engine | None = None
        while todo := [job for job in plan.jobs if job.key not in records and plan.is_settled(job)]:
            if made is None:
                made = engine(config, loaded, data) if engine is not None else make_engine(
                    config, loaded, data, folder=run.path, plan=plan, trust=trust)
            made.run(todo, finished, progress=progress)
            plan = plan.decided(records)
            records |= _of(plan, known)
        whole = read_records(run.path)
        result = SweepResult.of(config, plan, [whole[j.key] for j in plan.jobs])
        result.write(run)
        return result


def _known(folder: Path, plan: SweepPlan) -> dict[str, RunRecord]:
    """Outlines of the stored runs that the plan may want, in its order."""
    stored = read_records(folder)
    return {job.key: stored[job.key].outline() for job in jobs_of(plan.arms, plan.seeds)
            if job.key in stored and _stands(stored[job.key], job)}


def _of(plan: SweepPlan, known: Mapping[str, RunRecord]) -> dict[str, RunRecord]:
    return {job.key: known[job.key] for job in plan.jobs if job.key in known}


def _stands(record: RunRecord, job: Job) -> bool:
    """Whether a stored result answers a run: done, and with the plan that the run has now."""
    plan = None if job.arm is None else job.arm.plan
    stored = None if record.plan is None else Plan.from_dict(record.plan, where=f"the result of {record.key}")
    return record.status == "done" and stored == plan


def _ignore(state: SweepState) -> None:
    pass


class _Speed:
    """How the time of this call compares with the estimates of its runs, however many go on at once."""

    def __init__(self, plan: SweepPlan) -> None:
        self._seconds = plan.seconds
        self._started = time.monotonic()
        self._expected = 0.0

    def finished(self, record: RunRecord) -> None:
        """A run of this call is over."""
        if record.status == "done":
            self._expected += self._seconds[record.key]

    def time_left(self, plan: SweepPlan, records: Collection[str]) -> float:
        """Seconds of the runs that have no record yet."""
        ahead = sum(plan.seconds[job.key] for job in plan.jobs if job.key not in records)
        return ahead * ((time.monotonic() - self._started) / self._expected if self._expected > 0 else 1.0)
