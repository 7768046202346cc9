"""Starting the program as several processes of one job, as torchrun and accelerate launch do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PROGRAM = """
import contextlib, io, json, os, sys
import midblock.cli.app as app
app._PATIENCE_SECONDS = 0.0  # the launcher ends nobody here
told = []
for words in json.load(open(sys.argv[1])):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = app.run(words)
    told.append({"code": code, "stdout": out.getvalue(), "stderr": err.getvalue()})
with open(f"{sys.argv[2]}-{os.environ.get('RANK', '0')}.json", "w") as file:
    json.dump(told, file)
"""


def environment() -> dict[str, str]:
    """One thread each, and no trace of a job that the tests themselves may be part of."""
    dropped = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    return {**{k: v for k, v in os.environ.items() if k not in dropped}, "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).resolve().parent), os.environ.get("PYTHONPATH", "")])}


def torchrun(processes: int, *words: str) -> list[str]:
    """The line that starts a module or a script as several processes of this machine."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), *words]


def accelerate(processes: int, *words: str, config: Path | None = None) -> list[str]:
    """The same by accelerate."""
    own = ["--config_file", str(config)] if config is not None else [
        "--multi_gpu", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    return [sys.executable, "-m", "accelerate.commands.launch", *own, "--num_processes", str(processes),
            "--main_process_port", "0", *words]


def run(line: Sequence[str], timeout: float = 900) -> subprocess.CompletedProcess[str]:
    """Run to the end."""
    return subprocess.run(line, env=environment(), capture_output=True, text=True, timeout=timeout, check=False)


def run_all(launcher: Sequence[str], commands: Sequence[Sequence[str]], folder: Path, processes: int
            ) -> list[list[dict[str, Any]]]:
    """Several commands one after another in the same processes, which saves starting Python for each.

    Args:
        launcher: The line before the script, from `torchrun` or `accelerate`; or the interpreter alone.
        commands: Words of each command.
        folder: For the script and what it tells.
        processes: How many.

    Returns:
        For each process what each command gave: ``code``, ``stdout``, ``stderr``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "program.py").write_text(PROGRAM, encoding="utf-8")
    (folder / "commands.json").write_text(json.dumps([list(c) for c in commands]), encoding="utf-8")
    done = run([*launcher, str(folder / "program.py"), str(folder / "commands.json"), str(folder / "told")])
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"told-{rank}.json").read_text()) for rank in range(processes)]
