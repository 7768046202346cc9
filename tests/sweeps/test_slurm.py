"""Sweeps as Slurm's jobs, through submitit's own local executor: dead workers, no orphans, other files refused."""

from __future__ import annotations

import contextlib
import signal
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from midblock.errors import MidblockError, SettingsError
from midblock.models import load_model
from midblock.sweeps import (
    Job,
    SlurmEngine,
    dump_config,
    expand_arms,
    jobs_of,
    load_sweep_data,
    parse_config,
    sweep,
)
from sweep_helpers import assert_resumes, driver_with_a_result, outcome, tiny_values

pytest.importorskip("submitit", reason="submitit is not installed: pip install 'midblock[slurm]'")
pytestmark = pytest.mark.slow


def workers_of(process: psutil.Process) -> list[psutil.Process]:
    """The processes that submitit started below a process, and that run a worker."""
    found = []
    for child in process.children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it ended meanwhile
            if "submitit.core._submit" in " ".join(child.cmdline()):
                found.append(child)
    return found


def local(planned: dict[str, Any], workers: int) -> Any:
    return parse_config({**planned["values"], "engine": "slurm", "workers": workers, "cores": 1,
                         "slurm": {"cluster": "local"}})


def test_a_killed_worker_changes_nothing(planned: dict[str, Any], tmp_path: Path) -> None:
    killed: list[int] = []

    def listener(state: Any) -> None:
        if len(state.records) == 1 and not killed:
            victim = workers_of(psutil.Process())[0]
            victim.kill()
            killed.append(victim.pid)

    result = sweep(local(planned, 2), out=tmp_path / "out", listener=listener)
    assert killed
    assert {r.key: outcome(r) for r in result.records} == planned["local"]
    assert not workers_of(psutil.Process())
    assert list((tmp_path / "out" / "workers").glob("*/log/*"))  # what the dead one said
    assert not list((tmp_path / "out" / "workers").glob("*/0*"))


def test_refusals_of_slurm_and_of_submitit(planned: dict[str, Any], engine_parts: tuple[Any, Any, Any, list[Job]],
                                           tmp_path: Path) -> None:
    _, loaded, data, jobs = engine_parts

    def run(**slurm: Any) -> None:
        config = parse_config({**planned["values"], "engine": "slurm", "slurm": slurm})
        SlurmEngine(config, loaded, data, folder=tmp_path).run(jobs, lambda record: None)

    with pytest.raises(SettingsError, match=r"submitit does not take slurm: .*partytion"):
        run(cluster="local", partytion="x")
    with pytest.raises(SettingsError, match="submitit does not take slurm: "):
        run(cluster="moon")
    with pytest.raises(SettingsError, match=r"(sbatch|srun)"):  # there is no Slurm here
        run()
    assert not (tmp_path / "workers").exists()
    with pytest.raises(SettingsError, match="submitit does not take slurm: "):  # the whole sweep: told before it loads
        sweep(parse_config({**planned["values"], "engine": "slurm"}), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_workers_with_other_files_are_refused(tmp_path: Path) -> None:
    values = tiny_values(tmp_path)
    config = parse_config({**values, "engine": "slurm", "cores": 1, "slurm": {"cluster": "local"}})
    loaded = load_model(config.model, dtype="float32", device="cpu")
    data = load_sweep_data(config)
    jobs = jobs_of(expand_arms(config, loaded), config.seeds)
    engine = SlurmEngine(config, loaded, data, folder=tmp_path)
    path = Path(values["train"]["data"])
    whole = path.read_text()
    path.write_text(whole.replace("number 3 ", "number 33 "), encoding="utf-8")
    with pytest.raises(SettingsError, match="other rows than this process"):
        engine.run(jobs, lambda record: None)
    path.unlink()
    with pytest.raises(MidblockError, match=r"train\.jsonl"):
        engine.run(jobs, lambda record: None)
    assert not workers_of(psutil.Process())


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_no_worker_outlives_the_driver_and_resume_goes_on(planned: dict[str, Any], tmp_path: Path, how: int) -> None:
    """A driver that is killed outright cannot cancel its jobs: they end when it has given no sign of life."""
    config = local(planned, 1)
    (tmp_path / "sweep.yaml").write_text(dump_config(config), encoding="utf-8")
    program = ("import sys, midblock.sweeps.on_slurm as s; s.PATIENCE_SECONDS = 12.0; "
               "from midblock.cli.app import run; sys.exit(run())")
    command = [sys.executable, "-c", program, "sweep", str(tmp_path / "sweep.yaml"), "--out", str(tmp_path / "out"),
               "--quiet"]
    driver, before = driver_with_a_result(command, tmp_path / "out", 240)
    workers = workers_of(driver)
    assert workers
    driver.send_signal(how)
    driver.wait(40)
    _, alive = psutil.wait_procs(workers, timeout=30)
    assert not alive
    assert_resumes(command, tmp_path / "out", before, planned["local"])
    assert not list((tmp_path / "out").glob("workers"))
