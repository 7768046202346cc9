"""A real terminal for tests: the program under a pseudo-terminal of a given width, and what its screen shows.

Importing torch takes seconds: one process imports what commands need, runs nothing itself, and forks a child for
each command (this file run as a program); the child's standard streams are the pseudo-terminal, or pipes.
"""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_TOKEN = re.compile(r"\x1b\[([0-9;?]*)([A-Za-z])|(\r)|(\n)|([^\x1b\r\n]+)")


@dataclass(frozen=True)
class Shown:
    """What a command left on the screen (or in its pipes), every byte it sent, and how it ended."""

    text: str
    raw: str
    code: int
    first_output: float
    """Seconds until the first byte."""


def screen(raw: str) -> str:
    """The lines that a terminal shows after these bytes: cursor moves and erased lines carried out."""
    lines, row, column = [""], 0, 0
    for match in _TOKEN.finditer(raw):
        argument, move, back, down, plain = match.groups()
        count = int(argument) if argument and argument.isdigit() else 1
        if move == "A":
            row = max(0, row - count)
        elif move == "B":
            row += count
        elif move == "K":
            lines[row] = "" if argument == "2" else lines[row][:column]
        elif back:
            column = 0
        elif down:
            row, column = row + 1, 0
        elif plain:
            lines[row] = lines[row][:column].ljust(column) + plain + lines[row][column + len(plain):]
            column += len(plain)
        while row >= len(lines):
            lines.append("")
    return "\n".join(line.rstrip() for line in lines)


class Terminal:
    """Runs commands in forks of a process that has imported what they need.

    Args:
        folder: Where commands run.
        environment: Further environment variables.
    """

    def __init__(self, folder: Path, environment: Mapping[str, str] | None = None) -> None:
        self._server = subprocess.Popen(
            [sys.executable, str(Path(__file__))], cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "TERM": "xterm", **(environment or {})})

    def run(self, words: Sequence[str], columns: int | None) -> Shown:
        """What ``midblock *words`` shows on a terminal of so many columns, or through a pipe."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps([list(words), columns]) + "\n")
        self._server.stdin.flush()
        raw, code, first = json.loads(self._server.stdout.readline())
        return Shown(screen(raw), raw, code, first)

    def close(self) -> None:
        """End the server."""
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait(30)


def _served(words: list[str], columns: int | None) -> tuple[str, int, float]:
    start = time.perf_counter()
    if columns is None:
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reading)
            os.dup2(writing, 1)
            os.dup2(writing, 2)
            _child(words)
        os.close(writing)
    else:
        child, reading = pty.fork()
        if child == 0:
            fcntl.ioctl(1, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
            _child(words)
    parts, first = [], 0.0
    while True:
        select.select([reading], [], [])
        try:
            chunk = os.read(reading, 65536)
        except OSError:  # Linux: the other end of the terminal is closed
            break
        if not chunk:
            break
        first = first or time.perf_counter() - start
        parts.append(chunk)
    os.close(reading)
    _, status = os.waitpid(child, 0)
    return b"".join(parts).decode().replace("\r\n", "\n"), os.waitstatus_to_exitcode(status), first


def _child(words: list[str]) -> None:
    os.environ.pop("COLUMNS", None)
    os.environ.pop("LINES", None)
    nowhere = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nowhere, 0)
    sys.stdout = os.fdopen(1, "w", encoding="utf-8", buffering=1)
    sys.stderr = os.fdopen(2, "w", encoding="utf-8", buffering=1)
    code = 1
    try:
        from midblock.cli.app import run

        code = run(words)
        sys.stdout.flush()
    finally:
        os._exit(code)


def _serve() -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    import matplotlib.figure  # noqa: F401
    import peft  # noqa: F401
    import scipy.stats  # noqa: F401
    import torch
    import transformers  # noqa: F401
    from transformers.models.llama import modeling_llama  # noqa: F401

    import midblock.cli.app
    import midblock.evaluation.run
    import midblock.report.study
    import midblock.sweeps.run
    import midblock.tuning.run  # noqa: F401

    torch.set_num_threads(1)
    for line in sys.stdin:
        words, columns = json.loads(line)
        answers.write(json.dumps(_served(words, columns)) + "\n")
        answers.flush()


if __name__ == "__main__":
    _serve()
