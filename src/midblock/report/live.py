"""The page of a sweep while it runs: what is finished, at every time."""

from __future__ import annotations

import logging
import time
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from midblock.report.collect import Run
from midblock.report.page import build_report, render
from midblock.results import json_ready
from midblock.writing import atomic_path

if TYPE_CHECKING:
    from midblock.settings.sweep import SweepConfig
    from midblock.sweeps import SweepState

__all__ = ["LiveReport"]

_LOG = logging.getLogger(__name__)
_SHARE = 0.05
"""At most this share of the time goes into pages."""
_REFRESH = 30


class LiveReport:
    """Writes ``report.html`` of a running sweep after its runs; one that cannot be made stops nothing before the end.

    Args:
        config: The sweep's.
        out: Its run folder.
    """

    def __init__(self, config: SweepConfig, out: Path | str) -> None:
        self._config, self._out = config, Path(out)
        self._possible = find_spec("plotly") is not None
        self._kept_up, self._next = True, 0.0

    def __call__(self, state: SweepState) -> None:
        """Write the page of the runs so far, unless the last one is too recent for its cost."""
        if not self._possible or not self._kept_up or not state.records or time.monotonic() < self._next:
            return
        begun = time.monotonic()
        try:
            self._write(state)
        except Exception as error:
            _LOG.warning("report.html is not kept up to date: %s: %s", type(error).__name__,
                         " ".join(str(error).split())[:200])
            self._kept_up = False
        self._next = time.monotonic() + (time.monotonic() - begun) / _SHARE

    def finish(self) -> bool:
        """The page of the finished sweep, from its folder; whether there is one.

        Raises:
            OutputError: it cannot be written; the sweep's results are.
        """
        if not self._possible:
            return False
        build_report([self._out], self._out / "report.html")
        return True

    def _write(self, state: SweepState) -> None:
        from midblock.sweeps import SweepResult, read_records
        from midblock.sweeps.planning import clock

        stored = read_records(self._out)
        result = SweepResult.of(self._config, state.plan, [stored[key] for key in state.records if key in stored])
        more: dict[str, Any] = {"pareto": result.statistics.pareto}
        if len(blocks := result.block_steps()):
            more["block_steps"] = blocks
        record = {"status": "running", "command": "sweep", "settings": json_ready(self._config.model_dump(mode="json")),
                  "models": {"base": {"spec": self._config.model}}, "data": {"name": self._config.train.data}}
        done, whole = len(state.records), len(state.plan.jobs)
        left = f"{done} of {whole} runs so far, about {clock(state.seconds_left)} left"
        frame = result.frame
        frame["layer"] = frame["layer"].astype(str)
        run = Run("sweep", self._out, record, frame, f"{left}. {result.summary()}", more)
        page, _ = render([run], title=f"{self._config.name or self._out.name}: {left}",
                         refresh=None if done == whole else _REFRESH)
        with atomic_path(self._out / "report.html") as temporary:
            temporary.write_text(page, encoding="utf-8")
