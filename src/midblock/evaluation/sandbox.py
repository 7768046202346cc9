"""Running a program that a model wrote: another process, limits on time and memory, no network.

The program runs in a fresh interpreter (isolated mode, no environment, an empty temporary
folder as its working folder) under ``setrlimit`` for processor time, memory, file size and open
files, and its whole process group is killed when the wall clock runs out. On Linux, where the
kernel allows user namespaces, it has no network, sees no other process, dies with all its
children, and finds every file system read-only except its own folder. `Outcome.isolation`
names what was in force. This protects against accidents and careless programs; for programs by
an adversary use a virtual machine.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from midblock.errors import SettingsError

__all__ = ["Outcome", "run_program", "run_programs"]

_RUNNER = Path(__file__).with_name("sandbox_runner.py")


@dataclass(frozen=True)
class Outcome:
    """What became of a program.

    Attributes:
        passed: It ran to its end without an error.
        reason: ``passed``, ``timed out``, ``failed: ...`` (the last line of its error), or
            ``ended early`` (it stopped the interpreter).
        isolation: Protections in force besides the limits: ``network``, ``processes``, ``files``.
    """

    passed: bool
    reason: str
    isolation: tuple[str, ...] = field(default=())


def run_program(program: str, *, seconds: float = 10.0, memory_mb: int = 1024) -> Outcome:
    """Run Python source in the sandbox; it passes if it ends without an error.

    Args:
        program: The source, with its tests at the end.
        seconds: Limit of processor time (rounded up) and of wall-clock time.
        memory_mb: Limit of its address space in MiB.

    Raises:
        SettingsError: a limit is not positive, or this system has no such limits (Windows).

    Example:
        >>> run_program("assert 1 + 1 == 2").passed
        True
    """
    if seconds <= 0 or memory_mb < 64:
        raise SettingsError(f"limits of {seconds} s and {memory_mb} MiB: use more than 0 s and at least "
                            "64 MiB.")
    if sys.platform == "win32":
        raise SettingsError("running a model's code needs a system with process limits (Linux, macOS).")
    # the program cannot know this word, so that exiting or printing does not look like passing
    token = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="midblock-sandbox-") as folder:
        read_end, write_end = os.pipe()
        try:
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-B", str(_RUNNER), str(write_end), str(seconds), str(memory_mb),
                 folder],
                stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=folder,
                env={"LANG": "C.UTF-8", "HOME": folder, "TMPDIR": folder, "OMP_NUM_THREADS": "1"},
                pass_fds=(write_end,), start_new_session=True)
        finally:
            os.close(write_end)
        timed_out = False
        with os.fdopen(read_end, "rb") as report:
            try:
                process.communicate(f"{token}\n{program}".encode("utf-8", "surrogatepass"),
                                    timeout=seconds + 5.0)
            except subprocess.TimeoutExpired:
                timed_out = True
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            os.set_blocking(report.fileno(), False)
            text = (report.read(1 << 16) or b"").decode("utf-8", "replace")
    return _outcome(text.splitlines(), token, process.returncode, timed_out)


def _outcome(lines: Sequence[str], token: str, code: int, timed_out: bool) -> Outcome:
    isolation = tuple(word for line in lines if line.startswith("isolation ") for word in line.split()[1:])
    if f"passed {token}" in lines:
        return Outcome(True, "passed", isolation)
    if timed_out or "timeout" in lines or code in (-signal.SIGXCPU, 128 + signal.SIGXCPU):
        return Outcome(False, "timed out", isolation)
    failed = next((line.removeprefix("failed ") for line in lines if line.startswith("failed ")), None)
    return Outcome(False, f"failed: {failed}" if failed is not None else "ended early", isolation)


def run_programs(programs: Sequence[str], *, seconds: float = 10.0, memory_mb: int = 1024,
                 workers: int | None = None, done: Callable[[int, int], None] | None = None) -> list[Outcome]:
    """Run several programs, as many at a time as there are processors; outcomes keep their order.

    Args:
        done: Told how many are finished, and of how many.
    """
    outcomes: list[Outcome] = []
    with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
        for outcome in pool.map(lambda p: run_program(p, seconds=seconds, memory_mb=memory_mb), programs):
            outcomes.append(outcome)
            if done is not None:
                done(len(outcomes), len(programs))
    return outcomes
