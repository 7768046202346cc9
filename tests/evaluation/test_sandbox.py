"""The sandbox: what passes, what fails and how, and what a program cannot do."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from midblock.errors import SettingsError
from midblock.evaluation import Outcome, ProgramTest, run_test
from midblock.evaluation.sandbox import ISOLATION, run_tests
from midblock.evaluation.sandbox_runner import CALLS, Opaque, pack, unpack

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs process limits")

ONE = ProgramTest("def check(candidate):\n    assert candidate() == 1, 'no'", "f")


def _full_sandbox() -> bool:
    return set(run_test("def f(): return 1", ONE, unsandboxed=True).isolation) == set(ISOLATION)


@pytest.fixture(scope="module")
def sandboxed() -> None:
    if not _full_sandbox():
        pytest.skip("this system gives no full sandbox")


def told(program: str, seconds: float = 5) -> str:
    """What ``f()`` of a program returns, as text, or how it failed."""
    test = ProgramTest("def check(candidate):\n    raise Exception(repr(candidate()))", "f")
    outcome = run_test(textwrap.dedent(program), test, seconds=seconds)
    assert not outcome.passed
    return outcome.reason.removeprefix("failed: ").removeprefix("Exception: ")


def ended(program: str, seconds: float = 5) -> Outcome:
    return run_test(textwrap.dedent(program), ONE, seconds=seconds, unsandboxed=True)


# ---------------------------------------------------------------- passing and failing

@pytest.mark.parametrize("program", [
    "def f(): return 1",
    "def f(): return sorted([3, 1])[0]",
    "import collections, math, re, typing, decimal, hashlib\nprint('output does not matter')\ndef f(): return 1",
    "if __name__ == '__main__':\n    x = 1\ndef f(): return x",
    "def f(): return len('é')",
    "import threading\ndef f():\n    r = []\n    t = threading.Thread(target=r.append, args=(1,))\n    t.start()\n"
    "    t.join()\n    return r[0]",
    "def f():\n    open('own', 'w').write('1')\n    return int(open('own').read())",
])
def test_correct_programs_pass(program: str) -> None:
    outcome = ended(program)
    assert outcome.passed, outcome
    assert outcome.reason == "passed"


@pytest.mark.parametrize(("program", "reason"), [
    ("def f(): return 2", "failed: AssertionError: no"),
    ("def f(:", "failed: SyntaxError"),
    ("1 / 0", "failed: ZeroDivisionError"),
    ("def f(): return f()", "failed: RecursionError"),
    ("import sys; sys.exit(0)", "failed: SystemExit"),
    ("def f(): raise KeyError('a key')", "failed: KeyError: 'a key'"),
    ("class Own(Exception): pass\ndef f(): raise Own('x')", "failed: Own: x"),
    ("def f(): return bytearray(3 << 30)", "failed: MemoryError"),
    ("def f(): return input()", "failed: EOFError"),
    ("def f(): open('big', 'wb').write(bytes(32 << 20))", "failed"),
    ("def g(): return 1", "failed: KeyError: 'f'"),
])
def test_wrong_programs_fail_with_their_reason(program: str, reason: str) -> None:
    outcome = ended(program)
    assert not outcome.passed
    assert outcome.reason.startswith(reason), outcome


def test_the_test_uses_the_prompts_helpers_and_not_the_programs() -> None:
    test = ProgramTest("def check(candidate):\n    assert candidate(2) == helper(2)\n    assert f(3) == 6", "f",
                       prompt="def helper(x):\n    return 2 * x\ndef f(x):\n    '''Twice.'''\n")
    assert run_test("def f(x): return 2 * x", test, unsandboxed=True).passed
    assert not run_test("def helper(x): return x\ndef f(x): return x", test, unsandboxed=True).passed


def test_many_programs_keep_their_order() -> None:
    seen: list[tuple[int, int]] = []
    outcomes = run_tests([(f"def f(): return {i}", ONE) for i in (1, 0, 1)], seconds=5, workers=2, unsandboxed=True,
                         done=lambda done, total: seen.append((done, total)))
    assert [o.passed for o in outcomes] == [True, False, True]
    assert seen == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize("limits", [{"seconds": 0}, {"memory_mb": 1}])
def test_limits_must_be_sensible(limits: dict[str, int]) -> None:
    with pytest.raises(SettingsError, match="limits"):
        run_test("pass", ONE, **limits)  # type: ignore[arg-type]


# ---------------------------------------------------------------- plain data

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary()
    | st.complex_numbers(allow_nan=False),
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text() | st.integers(), inner)
    | st.sets(st.integers() | st.text()) | st.frozensets(st.integers()), max_leaves=12)


@settings(max_examples=200, deadline=None)
@given(PLAIN)
def test_plain_data_come_back_as_they_were(value: Any) -> None:
    import json

    back = unpack(json.loads(json.dumps(pack(value))))
    assert back == value
    assert repr(type(back)) == repr(type(value))


def test_classes_are_reduced_to_what_they_hold() -> None:
    class Liar(int):
        def __eq__(self, other: object) -> bool:
            return True
        __hash__ = int.__hash__

    assert unpack(pack(Liar(3))) == 3
    assert unpack(pack(Liar(3))) != 4
    assert isinstance(unpack(pack(object())), Opaque)
    assert unpack(pack(object())) != unpack(pack(object()))


# ---------------------------------------------------------------- pretending to pass

@pytest.mark.parametrize("program", [
    "import os\nos._exit(0)",
    "def f():\n    import os\n    os._exit(0)",
    "def f():\n    import os\n    os.kill(os.getpid(), 9)",
    # whatever file it can reach gets every line that could mean success
    "import os\nfor n in range(3, 64):\n    try: os.write(n, b'passed\\n')\n    except OSError: pass\n"
    "def f(): return 2",
    "import os\ndef f():\n    for n in range(3, 64):\n        try: os.write(n, b'\\npassed\\npassed\\n')\n"
    "        except OSError: pass\n    os._exit(0)",
    # a value that says it is equal to everything, and one whose class says what it is
    "class E:\n    def __eq__(self, other): return True\ndef f(): return E()",
    "class E(int):\n    def __eq__(self, other): return True\n    __hash__ = None\ndef f(): return E(2)",
    # every name in every frame above, and everything that the collector knows, called or written
    "import sys, os, gc\ndef f():\n    frame = sys._getframe()\n    while frame:\n"
    "        for v in list(frame.f_locals.values()) + list(frame.f_globals.values()):\n"
    "            if isinstance(v, int) and 2 < v < 4096:\n                try: os.write(v, b'passed\\n')\n"
    "                except OSError: pass\n            if isinstance(v, str): open('found', 'a').write(v)\n"
    "        frame = frame.f_back\n    return 2",
    "import builtins\nbuiltins.AssertionError = type('A', (BaseException,), {})\ndef f(): return 2",
])
def test_pretending_is_not_passing(program: str) -> None:
    assert not ended(program).passed


def test_neither_the_test_nor_a_way_to_report_is_within_reach(sandboxed: None) -> None:
    assert "no word of it" in told("""
        import gc, os, sys
        def f():
            frame, words = sys._getframe(), []
            while frame:
                words += [repr(frame.f_locals), repr(frame.f_globals)]
                frame = frame.f_back
            words += [repr(o) for o in gc.get_objects() if isinstance(o, (dict, list, tuple))]
            # turned round, so that this program itself is not the finding
            wanted = ''.join(reversed('(etadidnac(rper'))
            return 'found' if any(wanted in w for w in words) else 'no word of it'
        """)
    # standard streams, and the two ends to and from the judge
    files = told("""
        import os
        def f():
            open_ = []
            for n in range(4096):
                try: os.fstat(n); open_.append(n)
                except OSError: pass
            return len(open_)
        """)
    assert files == "5"


# ---------------------------------------------------------------- time

@pytest.mark.parametrize("program", [
    "while True: pass",
    "import time\ntime.sleep(60)",
    "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(60)",
    "def f():\n    while True:\n        try:\n            while True: pass\n        except BaseException: pass",
])
def test_endless_programs_are_killed_in_time(program: str) -> None:
    started = time.monotonic()
    outcome = ended(program, seconds=1)
    assert outcome.reason == "timed out"
    assert time.monotonic() - started < 8


# ---------------------------------------------------------------- escapes (each bounded by its own limits)

def test_no_network_not_even_to_this_machine(sandboxed: None) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        said = told(f"import socket\ndef f():\n    return socket.create_connection(('127.0.0.1', {port}), 2)")
    assert "PermissionError" in said
    assert "PermissionError" in told("import socket\ndef f(): return socket.socket(40, 1)")  # to a machine's host


def test_only_the_library_can_be_read(sandboxed: None, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret word")
    secret.chmod(0o644)
    places = [str(secret), "/etc/passwd", "/proc/self/environ", "/tmp", str(Path.home() / ".ssh"), str(Path.cwd()),
              __file__]
    assert told(f"import os\ndef f(): return [os.path.exists(p) for p in {places!r}]") == str([False] * len(places))
    # not by the folder that it was started in either, nor by climbing
    assert told("import os\ndef f():\n    os.chdir('../../../..')\n    return os.path.exists('etc/passwd')") == "False"


def test_nothing_outside_its_folder_can_be_written_again(sandboxed: None) -> None:
    library = os.__file__
    for attempt in (f"open({library!r}, 'a')", "open('/new', 'w')", "open('/lib/new', 'w')", "open('/dev/new', 'w')"):
        assert told(f"def f(): return {attempt}").startswith(("OSError: [Errno 30]", "PermissionError")), attempt
    remount = """
        import ctypes, os
        def f():
            libc = ctypes.CDLL(None, use_errno=True)
            found = []
            for call in ((b'none', b'/', None, 0x20 | 0x1000, None), (b'none', b'/lib', None, 0x20 | 0x1000, None),
                         (b'tmpfs', b'/sandbox', b'tmpfs', 0, b'size=8g'), (b'proc', b'/sandbox', b'proc', 0, None)):
                found.append((libc.mount(*call), ctypes.get_errno()))
            # a name space of one's own would give all capabilities back
            found.append((libc.unshare(0x10000000), ctypes.get_errno()))
            found.append((libc.setns(3, 0), ctypes.get_errno()))
            found.append((libc.umount2(b'/sandbox', 2), ctypes.get_errno()))
            found.append((libc.chroot(b'/sandbox'), ctypes.get_errno()))
            return found
        """
    assert told(remount) == str([(-1, 1)] * 8)


def test_no_capability_is_left(sandboxed: None) -> None:
    # setting the host name and the clock, changing owners, taking another's id: each needs one
    said = told("""
        import ctypes, os
        def f():
            libc, found = ctypes.CDLL(None, use_errno=True), []
            found.append(libc.sethostname(b'x', 1))
            found.append(libc.setuid(1))
            found.append(libc.mknod(b'node', 0o20666, 0x103))
            found.append(libc.prctl(23, 21, 0, 0, 0))  # is CAP_SYS_ADMIN in the bounding set?
            header, data = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
            found.append(libc.capset(header, data))
            return found
        """)
    assert said == str([-1] * 5)


def test_it_starts_no_process_and_few_threads(sandboxed: None) -> None:
    for attempt in ("os.fork()", "os.posix_spawn('/bin/true', ['true'], {})", "os.system('true')",
                    "os.execv('/bin/true', ['true'])", "__import__('subprocess').run(['true'])"):
        said = told(f"import os\ndef f():\n    found = {attempt}\n    assert found not in (-1, 32512), 'none'\n"
                    "    return 'started'")
        assert "started" not in said, attempt
    said = told("""
        import threading, time
        def f():
            threading.stack_size(65536)
            made = 0
            try:
                for _ in range(500):
                    threading.Thread(target=time.sleep, args=(3,), daemon=True).start()
                    made += 1
            except RuntimeError: pass
            return made
        """)
    assert int(said) < 64


def test_memory_that_no_process_limit_counts_is_bounded(sandboxed: None) -> None:
    said = told("""
        def f():
            written = 0
            try:
                for number in range(40):
                    with open(f'part{number}', 'wb') as stream:
                        written += stream.write(bytes(8 << 20))
            except OSError: pass
            return written >> 20
        """)
    assert 0 < int(said) <= 64
    assert "PermissionError" in told("import os\ndef f(): return os.memfd_create('x')")
    shared = "import ctypes\ndef f():\n    return ctypes.CDLL(None).shmget(0, 1 << 30, 0o1600)"
    assert told(shared) == "-1"


def test_it_reaches_no_other_process(sandboxed: None) -> None:
    assert told("import os\ndef f(): return os.getppid()") == "1"  # a world of its own
    for attempt in ("os.kill(1, 9)", "os.kill(-1, 9)", "os.kill(os.getpid() + 1, 19)"):
        assert "PermissionError" in told(f"import os\ndef f(): return {attempt}"), attempt
    assert told("""
        import ctypes, os
        def f():
            libc = ctypes.CDLL(None)
            return [libc.ptrace(16, os.getpid() + 1, 0, 0), libc.process_vm_readv(os.getpid() + 1, 0, 0, 0, 0, 0),
                    libc.syscall(434, os.getpid() + 1, 0)]
        """) == "[-1, -1, -1]"


def test_nothing_outlives_midblock_itself(sandboxed: None, tmp_path: Path) -> None:
    """Killed at once, it cannot clean up: the kernel ends what it started."""
    script = tmp_path / "hold.py"
    script.write_text("from midblock.evaluation import ProgramTest, run_test\n"
                      "run_test('import time\\ntime.sleep(60)', ProgramTest('def check(f): pass', 'f'), seconds=60)\n")
    before = _runners()
    process = subprocess.Popen([sys.executable, str(script)])
    try:
        deadline = time.monotonic() + 60
        while len(_runners() - before) < 4 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert len(_runners() - before) >= 4  # runner, process 1, candidate, judge
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    deadline = time.monotonic() + 10
    while _runners() - before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _runners() - before


def _runners() -> set[int]:
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if b"sandbox_runner.py" in (entry / "cmdline").read_bytes():
                    found.add(int(entry.name))
            except OSError:
                continue
    return found


def test_the_environment_is_not_handed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret-word")
    assert "secret-word" not in told("import os\ndef f(): return dict(os.environ)")


def test_children_of_a_program_without_sandbox_end_with_it(tmp_path: Path) -> None:
    """Where calls are filtered there are none; where they are not, those below are ended."""
    outcome = ended("import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(30)\n    os._exit(0)\n"
                    "def f(): return 1")
    if "calls" in outcome.isolation:
        assert outcome.reason.startswith("failed: PermissionError")
    else:
        assert outcome.passed


# ---------------------------------------------------------------- systems without

def test_without_a_full_sandbox_it_is_refused_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from midblock.evaluation import sandbox

    monkeypatch.setattr(sandbox, "ISOLATION", (*ISOLATION, "flying"))  # no system gives that
    with pytest.raises(SettingsError, match=r"no full sandbox.*flying.*allow_unsandboxed_code"):
        run_test("def f(): return 1", ONE)
    assert run_test("def f(): return 1", ONE, unsandboxed=True).passed


@pytest.mark.skipif(not Path("/usr/include/asm-generic/unistd.h").is_file(), reason="needs the system's headers")
def test_call_numbers_are_those_of_the_systems_headers() -> None:
    import re

    generic = dict(re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)",
                              Path("/usr/include/asm-generic/unistd.h").read_text()))
    generic["newfstatat"] = generic["fstatat"]
    tables = [(2, generic)]
    if (native := Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h")).is_file():
        tables.append((1, dict(re.findall(r"#define __NR_(\w+)\s+(\d+)", native.read_text()))))
    for column, table in tables:
        for call in CALLS.split(","):
            name, number = call.split()[0], call.split()[column]
            assert number == table.get(name, "-"), name
