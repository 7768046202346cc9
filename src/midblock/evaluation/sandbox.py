"""Testing a program that a model wrote: processes of their own, with nothing that the test does not need.

The program runs in a fresh interpreter without network, other processes, files of the user, capabilities, or
system calls beyond those of a computation; it cannot start a process, so the limits on its time and memory are
those of its whole tree, and nothing of it outlives the test. The test runs in a second process with the same
limits, calls the program through a pipe, gets plain data back, and alone can report that it passed.

All of that needs Linux with user name spaces and system call filters (x86_64 or aarch64). Elsewhere a program is
refused unless ``unsandboxed`` asks for it in words; then only limits on time, memory and file size hold.
`Outcome.isolation` names what was in force.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

from midblock.errors import SettingsError
from midblock.settings.base import name_of
from midblock.sizes import usable_cores

__all__ = ["ISOLATION", "Outcome", "ProgramTest", "require_sandbox", "run_test", "run_tests"]

ISOLATION = ("network", "processes", "files", "calls")
"""What a full sandbox takes away: the network, other processes, files, system calls."""
_RUNNER = Path(__file__).with_name("sandbox_runner.py")


@dataclass(frozen=True, slots=True)
class ProgramTest:
    """A test as HumanEval has it.

    Attributes:
        test: Source that defines ``check(candidate)``, which raises where the candidate is wrong.
        entry_point: The function of the program that is the candidate.
        prompt: Source whose helper functions the test may use; left out where it is no program by itself.
    """

    test: str
    entry_point: str
    prompt: str = ""


@dataclass(frozen=True)
class Outcome:
    """What became of a program.

    Attributes:
        passed: Its test ran to the end without an error.
        reason: ``passed``, ``timed out``, ``failed: ...`` (the error), or ``ended early`` (it stopped the
            interpreter or was killed).
        isolation: Protections in force besides the limits, of `ISOLATION`.
    """

    passed: bool
    reason: str
    isolation: tuple[str, ...] = field(default=())


def run_test(program: str, test: ProgramTest, *, seconds: float = 10.0, memory_mb: int = 1024,
             unsandboxed: bool = False) -> Outcome:
    """Run Python source and its test.

    Args:
        program: The source, which defines the test's entry point. Arguments and results are plain data: numbers,
            strings, bytes, lists, tuples, sets, dictionaries; anything else is equal to nothing.
        test: The test.
        seconds: Limit of wall-clock time, and of processor time (rounded up) of program and test each.
        memory_mb: Limit of the address space of each in MiB.
        unsandboxed: Run it also where the system gives no full sandbox.

    Raises:
        SettingsError: a limit is not positive, or this system gives no full sandbox.

    Example:
        >>> run_test("def one(): return 1", ProgramTest("def check(f): assert f() == 1", "one")).passed
        True
    """
    if seconds <= 0 or memory_mb < 64:
        raise SettingsError(f"limits of {seconds} s and {memory_mb} MiB: use more than 0 s and at least "
                            "64 MiB.")
    if sys.platform == "win32":
        raise SettingsError("running a model's code needs a system with process limits (Linux, macOS).")
    parts = program.encode("utf-8", "surrogatepass"), json.dumps(asdict(test)).encode()
    with tempfile.TemporaryDirectory(prefix="midblock-sandbox-") as folder:
        read_end, write_end = os.pipe()
        try:
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-B", str(_RUNNER), str(write_end), str(seconds), str(memory_mb),
                 folder, "" if unsandboxed else ",".join(ISOLATION)],
                stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=folder,
                env={"LANG": "C.UTF-8", "HOME": folder, "TMPDIR": folder, "OMP_NUM_THREADS": "1"},
                pass_fds=(write_end,), start_new_session=True)
        finally:
            os.close(write_end)
        timed_out = False
        with os.fdopen(read_end, "rb") as report:
            try:
                process.communicate(b"".join(len(p).to_bytes(8, "little") + p for p in parts), timeout=seconds + 5.0)
            except subprocess.TimeoutExpired:
                timed_out = True
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            os.set_blocking(report.fileno(), False)
            text = (report.read(1 << 16) or b"").decode("utf-8", "replace")
    outcome = _outcome(text.splitlines(), timed_out)
    if not unsandboxed and (missing := [word for word in ISOLATION if word not in outcome.isolation]):
        raise SettingsError(
            f"this system gives no full sandbox for a model's code: no isolation of {', '.join(missing)} (it needs "
            "Linux on x86_64 or aarch64 with user name spaces). Use a machine that has them, or a virtual machine "
            f"made for this and {name_of('allow_unsandboxed_code')}.")
    return outcome


def _outcome(lines: Sequence[str], timed_out: bool) -> Outcome:
    isolation = tuple(word for line in lines if line.startswith("isolation ") for word in line.split()[1:])
    if "passed" in lines:
        return Outcome(True, "passed", isolation)
    if timed_out or "timeout" in lines:
        return Outcome(False, "timed out", isolation)
    failed = next((line.removeprefix("failed ") for line in lines if line.startswith("failed ")), None)
    return Outcome(False, f"failed: {failed}" if failed is not None else "ended early", isolation)


@functools.cache
def require_sandbox() -> None:
    """Refuse a system without a full sandbox before anything else is done; a trial, remembered.

    Raises:
        SettingsError: see `run_test`.
    """
    run_test("def one(): return 1", ProgramTest("def check(f): assert f() == 1", "one"))


def run_tests(programs: Sequence[tuple[str, ProgramTest]], *, seconds: float = 10.0, memory_mb: int = 1024,
              unsandboxed: bool = False, workers: int | None = None,
              done: Callable[[int, int], None] | None = None) -> list[Outcome]:
    """Run several programs, as many at a time as there are processors; outcomes keep their order.

    Args:
        programs: Each with its test.
        seconds: See `run_test`, as for ``memory_mb`` and ``unsandboxed``.
        memory_mb: Of each.
        unsandboxed: Of all.
        workers: How many at a time.
        done: Told how many are finished, and of how many.
    """
    outcomes: list[Outcome] = []
    with ThreadPoolExecutor(workers or usable_cores()) as pool:
        for outcome in pool.map(lambda p: run_test(*p, seconds=seconds, memory_mb=memory_mb, unsandboxed=unsandboxed),
                                programs):
            outcomes.append(outcome)
            if done is not None:
                done(len(outcomes), len(programs))
    return outcomes
