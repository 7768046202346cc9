"""The campaign's world as a fixture: built once for all tests of a process."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from campaign import make_world

__all__ = ["world"]


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of the world, results of all commands on it beside it; ``$CAMPAIGN_WORLD`` names one that is there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(p for p in sys.path if p))
        if given := os.environ.get("CAMPAIGN_WORLD"):
            yield Path(given)
            return
        folder = tmp_path_factory.mktemp("campaign") / "world"
        make_world(folder)
        yield folder
