"""The sandbox: what passes, what fails and how, and what a program cannot do."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from pathlib import Path

import pytest

from midblock.errors import SettingsError
from midblock.evaluation import run_program
from midblock.evaluation.sandbox import run_programs

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs process limits")


@pytest.mark.parametrize("program", [
    "assert sorted([3, 1]) == [1, 3]",
    "def f(n):\n    return 1 if n < 2 else n * f(n - 1)\nassert f(5) == 120",
    "import collections, math, re, typing\nprint('output does not matter')",
    "if __name__ == '__main__':\n    x = 1\nassert x == 1",
    "assert 'é' == chr(233)",
])
def test_correct_programs_pass(program: str) -> None:
    outcome = run_program(program, seconds=5)
    assert outcome.passed
    assert outcome.reason == "passed"


@pytest.mark.parametrize(("program", "reason"), [
    ("assert 1 == 2, 'no'", "failed: AssertionError: no"),
    ("def f(:", "failed: SyntaxError"),
    ("1 / 0", "failed: ZeroDivisionError"),
    ("def f(): return f()\nf()", "failed: RecursionError"),
    ("import sys; sys.exit(0)", "failed: SystemExit"),
    ("x = bytearray(3 << 30)", "failed: MemoryError"),
    ("input()", "failed: EOFError"),
    ("open('big', 'wb').write(bytes(32 << 20))", "failed"),
])
def test_wrong_programs_fail_with_their_reason(program: str, reason: str) -> None:
    outcome = run_program(program, seconds=5)
    assert not outcome.passed
    assert outcome.reason.startswith(reason)


@pytest.mark.parametrize("program", [
    "import os\nos._exit(0)",
    "import os\nos.kill(os.getpid(), 9)",
    "import os, sys\nos.write(int(sys.argv[1]), b'passed 0\\n')\nos._exit(0)",
])
def test_stopping_the_interpreter_is_not_passing(program: str) -> None:
    assert not run_program(program + "\nassert False", seconds=5).passed


@pytest.mark.parametrize("program", [
    "while True: pass",
    "import time\ntime.sleep(60)",
    "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(60)",
    "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
])
def test_endless_programs_are_killed_in_time(program: str) -> None:
    started = time.monotonic()
    outcome = run_program(program, seconds=1)
    assert outcome.reason == "timed out"
    assert time.monotonic() - started < 8


def test_a_program_has_no_network_where_the_system_can_take_it_away() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        outcome = run_program(f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 2)", seconds=5)
    # without user namespaces the connection succeeds, and the outcome says that nothing shut it off
    assert outcome.passed == ("network" not in outcome.isolation)


def test_a_program_cannot_write_outside_its_folder(tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("before")
    outcome = run_program(f"open('own', 'w').write('x')\nopen({str(tmp_path / 'kept')!r}, 'w').write('after')",
                          seconds=5)
    if "files" not in outcome.isolation:
        pytest.skip("this system gives no read-only view of its files")
    assert outcome.reason.startswith("failed: OSError")
    assert (tmp_path / "kept").read_text() == "before"


def test_children_die_with_the_program(tmp_path: Path) -> None:
    pid_pipe = tmp_path / "fifo"
    os.mkfifo(pid_pipe)
    ends: list[bytes] = []
    # the child holds the pipe open until it dies: the reader's end of file is its death
    reader = threading.Thread(target=lambda: ends.append(pid_pipe.read_bytes()))
    reader.start()
    outcome = run_program(
        f"import os, time\nw = os.open({str(pid_pipe)!r}, os.O_WRONLY)\n"
        "if os.fork() == 0:\n    os.setsid()\n    time.sleep(60)\n", seconds=5)
    if "processes" not in outcome.isolation:
        pytest.skip("this system gives no process namespace")
    reader.join(timeout=10)
    assert outcome.passed
    assert ends == [b""]


def test_the_environment_is_not_handed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret-word")
    assert run_program("import os\nassert 'secret-word' not in os.environ.values()", seconds=5).passed


def test_many_programs_keep_their_order() -> None:
    seen: list[tuple[int, int]] = []
    outcomes = run_programs(["assert 1", "assert 0", "assert 1"], seconds=5, workers=2,
                            done=lambda done, total: seen.append((done, total)))
    assert [o.passed for o in outcomes] == [True, False, True]
    assert seen == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize("limits", [{"seconds": 0}, {"memory_mb": 1}])
def test_limits_must_be_sensible(limits: dict[str, int]) -> None:
    with pytest.raises(SettingsError, match="limits"):
        run_program("pass", **limits)
