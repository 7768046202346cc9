"""`sweep`: plan, run, analyse and write, resumable at every finished run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from midblock.models import LoadedModel, load_model
from midblock.progress import Progress, silent
from midblock.provenance import RunFolder
from midblock.settings.base import as_keys
from midblock.settings.sweep import SweepConfig
from midblock.sweeps.arms import Job
from midblock.sweeps.config import dump_config, load_config
from midblock.sweeps.data import SweepData, load_sweep_data
from midblock.sweeps.engine import Engine, LocalEngine
from midblock.sweeps.outcome import SweepResult
from midblock.sweeps.planning import SweepPlan, outline_of, plan_sweep
from midblock.sweeps.processes import ProcessesEngine
from midblock.sweeps.records import RunRecord, read_records, write_record
from midblock.tuning import Plan
from midblock.tuning.estimate import outline

__all__ = ["SweepState", "dry_run", "sweep"]


@dataclass(frozen=True)
class SweepState:
    """How far a sweep is, for a live table."""

    records: dict[str, RunRecord]
    """Finished runs by key, in order."""
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
        resume: Go on in ``out``; finished runs are kept, failed ones are tried again. Arms, seeds and statistics
            may be others than before: a finished sweep is extended so, and only what is new is trained.
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
    if not resume:
        RunFolder.check_free(out)
    data = load_sweep_data(config)
    trust = {"trust_remote_code": trust_remote_code, "allow_pickle": allow_pickle}
    if loaded is None:
        loaded = load_model(config.model, **config.placement(), trust_remote_code=trust_remote_code,
                            allow_pickle=allow_pickle)
    plan = plan_sweep(config, outline_of(loaded), data, loaded)
    with RunFolder(out, command="sweep", settings=config.model_dump(mode="json"), given=given, resume=resume,
                   may_differ=("name", "arms", "seeds", "statistics", "report_to", "engine", "workers")) as run:
        run.record_inputs(models={"base": loaded.describe()}, data=data.describe())
        run.write_text("config.yaml", dump_config(config))
        run.write_table(plan.frame, "plan.csv")
        stored = read_records(run.path) if run.resumed else {}
        records = {job.key: stored[job.key] for job in plan.jobs if job.key in stored and _stands(stored[job.key], job)}
        todo = [job for job in plan.jobs if job.key not in records]
        tell = listener if listener is not None else _ignore
        tell(SweepState(dict(records), plan, _left(plan, records, set())))
        fresh: set[str] = set()

        def finished(record: RunRecord) -> None:
            write_record(run.path, record)
            records[record.key] = record
            fresh.add(record.key)
            tell(SweepState(dict(records), plan, _left(plan, records, fresh)))

        if todo:
            made = _engine(config, loaded, data, trust) if engine is None else engine(config, loaded, data)
            if isinstance(made, LocalEngine | ProcessesEngine):
                made.trackers = run.path / "trackers"
            made.run(todo, finished, progress=progress)
        result = SweepResult.of(config, plan, [records[j.key] for j in plan.jobs])
        result.write(run)
        return result


def _engine(config: SweepConfig, loaded: LoadedModel, data: SweepData, trust: dict[str, bool]) -> Engine:
    if config.engine == "local":
        return LocalEngine(config, loaded, data)
    return ProcessesEngine(config, loaded, data, trust=trust)


def _stands(record: RunRecord, job: Job) -> bool:
    """Whether a stored result answers a run: done, and with the plan that the run has now."""
    plan = None if job.arm is None else job.arm.plan
    stored = None if record.plan is None else Plan.from_dict(record.plan, where=f"the result of {record.key}")
    return record.status == "done" and stored == plan


def _ignore(state: SweepState) -> None:
    pass


def _left(plan: SweepPlan, records: dict[str, RunRecord], fresh: set[str]) -> float:
    """Time left: the estimates of what is to come, scaled by how the runs of this call compared with theirs."""
    ahead = sum(s for key, s in plan.seconds.items() if key not in records)
    done = [k for k in fresh if records[k].status == "done"]
    expected = sum(plan.seconds[k] for k in done)
    if expected <= 0:
        return ahead
    return ahead * sum(records[k].seconds for k in done) / expected

