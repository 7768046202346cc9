"""Run folders as a report reads them: only what a finished run saved, and why others are left out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from midblock.errors import MidblockError, OutputError
from midblock.provenance import check_whole
from midblock.reading import read_csv, read_json, read_jsonl, read_text, user_path
from midblock.results import BASE_COLUMNS

__all__ = ["LeftOut", "Run", "collect", "sweeps_in"]

_PLAIN_NAMES = ("model", "adapter", "merged", "checkpoint")
_FURTHER = ("pareto", "comparisons", "layers", "trace", "difference_tokens", "kl_tokens", "direction_tokens",
            "block_steps")
_CONTAINERS = ("study", "demo")  # whose results are the runs in their folders
_DEEPEST = 3  # folders of run folders inside each other


@dataclass(frozen=True)
class LeftOut:
    """A folder that is not in the report, and why."""

    folder: str
    reason: str


@dataclass(frozen=True)
class Run:
    """One finished run.

    Attributes:
        command: Such as ``profile``.
        folder: Where it lies.
        record: Its ``run.json``.
        frame: Its ``table.csv``.
        summary: Its reading in words; empty where it has none.
        more: Further tables by name: ``arms``, ``pareto``, ``comparisons`` of a sweep, ``steps`` of a training.
    """

    command: str
    folder: Path
    record: dict[str, Any]
    frame: pd.DataFrame
    summary: str
    more: dict[str, pd.DataFrame] = field(default_factory=dict)

    @property
    def models(self) -> dict[str, dict[str, Any]]:
        """Stage name -> what is known of the model."""
        found = self.record.get("models") or {}
        return {k: v for k, v in found.items() if isinstance(v, dict)}

    @property
    def pair(self) -> str:
        """The models in words, as the choice of a pair shows them."""
        names = [_model_name(str(m.get("spec") or m.get("name") or stage)) for stage, m in self.models.items()]
        return " → ".join(dict.fromkeys(names)) or self.folder.name

    @property
    def data(self) -> str:
        """Name of the data set; empty where the command reads none."""
        found = self.record.get("data") or {}
        return str(found.get("name") or "")

    @property
    def num_blocks(self) -> int | None:
        """Depth of the model, where it is recorded."""
        blocks = [m["blocks"] for m in self.models.values() if isinstance(m.get("blocks"), int)]
        return blocks[0] if blocks else None


def sweeps_in(runs: Sequence[Run]) -> list[tuple[str, Run]]:
    """Sweeps with the name of their model; several of one model are told apart by their folders."""
    sweeps = [run for run in runs if run.command == "sweep"]
    names = [run.pair for run in sweeps]
    return [(name if names.count(name) == 1 else f"{name} ({run.folder.name})", run)
            for name, run in zip(names, sweeps, strict=True)]


def _model_name(spec: str) -> str:
    """A MODEL spec as people say it: hub ids as they are, of a path what tells it from others."""
    parts = [p for p in spec.replace("\\", "/").split("/") if p]
    if len(parts) < 2 or (len(parts) == 2 and not spec.startswith((".", "/", "~"))):
        return spec
    return "/".join(parts[-2:]) if parts[-1] in _PLAIN_NAMES else parts[-1]


def collect(folders: Sequence[Path | str]) -> tuple[list[Run], list[LeftOut]]:
    """Every finished run in the folders and below them.

    A folder without ``run.json`` is searched for run folders. What is unfinished, damaged, edited or of a newer format
    is named with its reason.

    Raises:
        OutputError: a folder is absent, or nothing is left to report.
    """
    runs: list[Run] = []
    left_out: list[LeftOut] = []
    seen: set[Path] = set()
    for given in folders:
        folder = user_path(given, error=OutputError)
        if not folder.is_dir():
            raise OutputError(f"{folder} is not a folder; name run folders or a folder that holds some.")
        for found in _run_folders(folder, _DEEPEST):
            if found.resolve() in seen:
                continue
            seen.add(found.resolve())
            try:
                if (run := _read(found)) is not None:
                    runs.append(run)
            except MidblockError as error:
                left_out.append(LeftOut(str(found), str(error)))
    if not runs:
        why = "; ".join(f"{o.folder}: {o.reason}" for o in left_out[:3]) or "they hold no run.json"
        raise OutputError(f"there is no finished run in {', '.join(map(str, folders))} ({why}); "
                          "run `midblock profile`, `weights`, `lens`, `swap` or `sweep` with --out first.")
    return runs, left_out


def _run_folders(folder: Path, deepest: int) -> list[Path]:
    found = [folder] if (folder / "run.json").is_file() else []
    if deepest:
        for below in sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")):
            found += _run_folders(below, deepest - 1)
    return found


def _read(folder: Path) -> Run | None:
    """The run in a folder; None where it only holds others."""
    record = check_whole(folder)
    command = record.get("command")
    if command in _CONTAINERS:
        return None
    if not isinstance(command, str) or not isinstance(record.get("status"), str):
        raise OutputError("its run.json is not one of midblock's")
    if record["status"] != "finished":
        raise OutputError(f"the run is not finished (status {record['status']}); continue it with --resume")
    table = folder / "table.csv"
    if not table.is_file():
        raise OutputError(f"a run of {command} without table.csv has nothing to draw")
    frame = read_csv(table, columns=BASE_COLUMNS, numbers=("value", "low", "high", "n"),
                     text=("mask", "layer", "kind", "metric", "side"), error=OutputError)
    summaries = [p for p in (folder / "summary.txt", folder / "verdict.txt") if p.is_file()]
    summary = read_text(summaries[0], error=OutputError).strip() if summaries else ""
    # arms and masks stay text: 00100 is no number
    more = {name: read_csv(path, text=("arm", "versus", "a", "b", "mask"), error=OutputError) for name in _FURTHER
            if (path := folder / f"{name}.csv").is_file() and path.stat().st_size > 1}
    steps = folder / "checkpoints" / "steps.jsonl"
    if steps.is_file():
        rows = [row for _, row in read_jsonl(steps, error=OutputError) if isinstance(row, dict)]
        more["steps"] = pd.json_normalize(json.loads(json.dumps(rows)))
    plan = folder / "plan.json"
    if plan.is_file():
        record = {**record, "plan": read_json(plan, error=OutputError)}
    return Run(command, folder, record, frame, summary, more)
