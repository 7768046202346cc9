"""One small sweep, as one process runs it: what every other engine must give too."""

from __future__ import annotations

from typing import Any

import pytest

from midblock.models import load_model
from midblock.sweeps import Job, expand_arms, jobs_of, load_sweep_data, parse_config, sweep
from sweep_helpers import outcome, tiny_values


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("planned")
    values = tiny_values(folder)
    values["arms"] |= {"masks": ["00100", "00001"]}
    values |= {"workers": 2}
    config = parse_config(values)
    local = sweep(config, out=folder / "local")
    return {"values": values, "config": config, "local": {r.key: outcome(r) for r in local.records},
            "folder": folder}


@pytest.fixture
def engine_parts(planned: dict[str, Any]) -> tuple[Any, Any, Any, list[Job]]:
    config = planned["config"]
    loaded = load_model(config.model, dtype="float32", device="cpu")
    return config, loaded, load_sweep_data(config), jobs_of(expand_arms(config, loaded), config.seeds)
