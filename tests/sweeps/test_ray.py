"""Sweeps on Ray: a node killed in the middle of a run, other packages, too small a cluster, no orphans."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from midblock.errors import SettingsError
from midblock.sweeps import Job, RayEngine, dump_config, parse_config, sweep
from midblock.sweeps.records import RunRecord
from sweep_helpers import assert_resumes, driver_with_a_result, outcome
from worker_helpers import Beginner, Lingering, Stranger

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'midblock[ray]'")
pytestmark = pytest.mark.slow
GIGABYTE = 1 << 30


@pytest.fixture
def cluster() -> Iterator[Any]:
    """Two nodes of one core each on this machine; the second one can be killed."""
    from ray.cluster_utils import Cluster

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    made = Cluster(initialize_head=True, head_node_args={
        "num_cpus": 1, "include_dashboard": False, "memory": 4 * GIGABYTE, "object_store_memory": 100 << 20})
    made.second = made.add_node(num_cpus=1, memory=4 * GIGABYTE, object_store_memory=100 << 20)
    made.wait_for_nodes()
    yield made
    ray.shutdown()
    made.shutdown()


def killed_at(mark: Path, cluster: Any, node: Any) -> tuple[list[str], threading.Thread]:
    """Kill a node as soon as the mark is there; what that says, and the thread that waits for it."""
    killed: list[str] = []

    def kill() -> None:
        until = time.monotonic() + 120
        while time.monotonic() < until and not mark.exists():
            time.sleep(0.1)
        if mark.exists():
            cluster.remove_node(node, allow_graceful=False)
            killed.append(mark.read_text())

    killer = threading.Thread(target=kill)
    killer.start()
    return killed, killer


def test_a_node_killed_in_the_middle_of_a_run_changes_nothing(
        cluster: Any, planned: dict[str, Any], engine_parts: tuple[Any, Any, Any, list[Job]], tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch) -> None:
    mark = tmp_path / "mark"
    monkeypatch.setenv("MIDBLOCK_TEST_MARK", str(mark))
    monkeypatch.setenv("MIDBLOCK_TEST_NODE", cluster.second.node_id)
    _, loaded, data, jobs = engine_parts
    config = parse_config({**planned["values"], "engine": "ray", "address": cluster.address, "cores": 1, "workers": 2})
    killed, killer = killed_at(mark, cluster, cluster.second)
    records: list[RunRecord] = []
    RayEngine(config, loaded, data, actor=Lingering, needs={j.key: GIGABYTE for j in jobs}).run(jobs, records.append)
    killer.join()
    assert killed
    assert killed[0] in {r.key for r in records}
    assert {r.key: outcome(r) for r in records} == planned["local"]
    assert not ray.is_initialized()


def test_the_only_node_that_is_large_enough_is_gone(
        cluster: Any, planned: dict[str, Any], engine_parts: tuple[Any, Any, Any, list[Job]], tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch) -> None:
    """An error, and no wait for ever."""
    mark = tmp_path / "mark"
    monkeypatch.setenv("MIDBLOCK_TEST_MARK", str(mark))
    large = cluster.add_node(num_cpus=1, memory=8 * GIGABYTE, object_store_memory=100 << 20)
    _, loaded, data, jobs = engine_parts
    config = parse_config({**planned["values"], "engine": "ray", "address": cluster.address, "cores": 1, "workers": 1})
    killed, killer = killed_at(mark, cluster, large)
    with pytest.raises(SettingsError, match=r"needs 1 cores, 6\.4 GB of memory .*the largest of 2: 1 cores, 4\.3 GB"):
        RayEngine(config, loaded, data, actor=Beginner, needs={j.key: 6 * GIGABYTE for j in jobs}).run(
            jobs, lambda record: None)
    killer.join()
    assert killed == ["begins"]


def test_what_a_cluster_cannot_do_is_told(cluster: Any, planned: dict[str, Any],
                                          engine_parts: tuple[Any, Any, Any, list[Job]]) -> None:
    _, loaded, data, jobs = engine_parts
    values = {**planned["values"], "engine": "ray", "address": cluster.address, "cores": 1}
    with pytest.raises(SettingsError, match=r"other packages than this process .*torch 0\.1 against"):
        RayEngine(parse_config(values), loaded, data, actor=Stranger).run(jobs, lambda record: None)
    big = {j.key: 64 * GIGABYTE for j in jobs}
    with pytest.raises(SettingsError, match=r"needs 1 cores, 68\.7 GB of memory .*the largest of 2: 1 cores, 4\.3 GB"):
        RayEngine(parse_config(values), loaded, data, needs=big).run(jobs, lambda record: None)
    with pytest.raises(SettingsError, match=r"needs 3 cores"):
        RayEngine(parse_config({**values, "cores": 3}), loaded, data).run(jobs, lambda record: None)


def test_an_address_that_does_not_answer(planned: dict[str, Any], engine_parts: tuple[Any, Any, Any, list[Job]],
                                         tmp_path: Path) -> None:
    _, loaded, data, jobs = engine_parts
    config = parse_config({**planned["values"], "engine": "ray", "address": "127.0.0.1:9"})
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SettingsError, match=r"the Ray cluster at 127\.0\.0\.1:9 does not answer"):
        RayEngine(config, loaded, data).run(jobs, lambda record: None)
    config = config.replace(address="nowhere")
    with pytest.raises(SettingsError, match="nowhere is not the address of a Ray cluster"):
        RayEngine(config, loaded, data).run(jobs, lambda record: None)
    with pytest.raises(SettingsError, match="nowhere is not the address of a Ray cluster"):
        sweep(config, out=tmp_path / "out")  # told before anything is loaded or written
    assert not (tmp_path / "out").exists()
    assert not ray.is_initialized()
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_nothing_outlives_the_driver_and_resume_goes_on(planned: dict[str, Any], tmp_path: Path, how: int) -> None:
    """A cluster of the sweep's own ends with it; what was finished is kept."""
    config = parse_config({**planned["values"], "engine": "ray", "cores": 1, "workers": 1})
    (tmp_path / "sweep.yaml").write_text(dump_config(config), encoding="utf-8")
    command = [sys.executable, "-m", "midblock", "sweep", str(tmp_path / "sweep.yaml"), "--out", str(tmp_path / "out"),
               "--quiet"]
    driver, before = driver_with_a_result(command, tmp_path / "out", 240)
    others = driver.children(recursive=True)
    assert any("raylet" in p.name() for p in others)
    driver.send_signal(how)
    driver.wait(60)
    # killed outright, the driver leaves it to Ray's own processes to notice, whose agents take their time
    _, alive = psutil.wait_procs(others, timeout=150 if how == signal.SIGKILL else 30)
    assert not alive
    (tmp_path / "sweep.yaml").write_text(dump_config(config.replace(engine="local")), encoding="utf-8")
    assert_resumes(command, tmp_path / "out", before, planned["local"])


def test_a_cluster_of_its_own(planned: dict[str, Any], tmp_path: Path) -> None:
    """From the configuration alone, resumed from another engine's records."""
    config = parse_config({**planned["values"], "engine": "ray", "cores": 1, "workers": 1})
    result = sweep(config, out=tmp_path / "out")
    assert {r.key: outcome(r) for r in result.records} == planned["local"]
    assert not ray.is_initialized()
