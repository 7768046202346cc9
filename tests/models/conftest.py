"""A cache of its own for a test that looks into it."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MIDBLOCK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"
