"""The program around the commands: help, version, and what every kind of failure looks like."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator

import pytest
import typer

from midblock import __version__
from midblock.cli.app import COMMANDS, app, run
from midblock.cli.options import Out, Resume
from midblock.errors import DataError


@pytest.fixture(autouse=True)
def _leave_no_settings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`run` quietens other packages through the environment; undo that after each test."""
    before = dict(os.environ)
    monkeypatch.delenv("MIDBLOCK_DEBUG", raising=False)
    with warnings.catch_warnings():
        yield
    for name in set(os.environ) - set(before):
        del os.environ[name]


@pytest.fixture
def failing() -> Iterator[Callable[[BaseException], None]]:
    """Give the program a command `fail` that raises what the test sets, and take it away again."""
    raised: list[BaseException] = []

    def fail(out: Out = None, resume: Resume = False) -> None:
        raise raised[0]

    app.command("fail")(fail)
    yield raised.append
    app.registered_commands.pop()


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"midblock {__version__}\n"


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_every_command_shows_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([command, "--help"]) == 0
    assert f"midblock {command}" in capsys.readouterr().out.split("Examples", 1)[1]


def test_no_command_prints_the_help_and_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([]) == 2
    caught = capsys.readouterr()
    assert "inspect" in caught.out + caught.err
    assert "Error" not in caught.out + caught.err


@pytest.mark.parametrize(("words", "expected"), [
    (["nonsense"], "nonsense"),
    (["--nonsense"], "--nonsense"),
    (["inspect"], "MODEL"),
    (["inspect", "m", "--segments", "0"], "--segments"),
    (["inspect", "m", "--segments", "many"], "--segments"),
    (["pairs", "--unknown"], "--unknown"),
])
def test_a_usage_error_is_one_line_and_exit_2(words: list[str], expected: str,
                                              capsys: pytest.CaptureFixture[str]) -> None:
    assert run(words) == 2
    caught = capsys.readouterr()
    assert caught.out == ""
    assert caught.err.startswith("Error: ")
    assert caught.err.count("\n") == 1
    assert expected in caught.err
    assert "--help" in caught.err


def test_a_users_mistake_is_one_line_and_exit_2(failing: Callable[[BaseException], None],
                                                capsys: pytest.CaptureFixture[str]) -> None:
    failing(DataError("x.jsonl, line 3: no field 'text'; add it."))
    assert run(["fail"]) == 2
    caught = capsys.readouterr()
    assert (caught.out, caught.err) == ("", "Error: x.jsonl, line 3: no field 'text'; add it.\n")


def test_debug_shows_the_traceback_of_a_mistake(failing: Callable[[BaseException], None],
                                                capsys: pytest.CaptureFixture[str],
                                                monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIDBLOCK_DEBUG", "1")
    failing(DataError("bad row"))
    assert run(["fail"]) == 2
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert err.endswith("Error: bad row\n")


def test_a_bug_keeps_its_traceback(failing: Callable[[BaseException], None]) -> None:
    failing(ZeroDivisionError("a bug"))
    with pytest.raises(ZeroDivisionError, match="a bug"):
        run(["fail"])


def test_ctrl_c_says_how_to_resume(failing: Callable[[BaseException], None],
                                   capsys: pytest.CaptureFixture[str]) -> None:
    failing(KeyboardInterrupt())
    assert run(["fail", "--out", "my runs/a"]) == 130
    assert "  midblock fail --out 'my runs/a' --resume\n" in capsys.readouterr().err  # no full stop: it is pasted
    assert run(["fail", "--out=a", "--resume"]) == 130
    assert "  midblock fail --out=a --resume\n" in capsys.readouterr().err


def test_ctrl_c_without_a_run_folder_names_no_resume(failing: Callable[[BaseException], None],
                                                     capsys: pytest.CaptureFixture[str]) -> None:
    failing(KeyboardInterrupt())
    assert run(["fail"]) == 130
    err = capsys.readouterr().err
    assert "--resume" not in err
    assert "repeat the command" in err


def _wrapped() -> Exception:
    try:
        raise OSError(errno.ENOSPC, "No space left on device", "out/x.bin")
    except OSError as error:
        outer = RuntimeError("could not save")
        outer.__cause__ = error
        return outer


@pytest.mark.parametrize("error", [
    OSError(errno.ENOSPC, "No space left on device", "out/x.bin"), _wrapped()], ids=["plain", "wrapped"])
def test_a_full_disk_is_one_clear_line(error: Exception, failing: Callable[[BaseException], None],
                                       capsys: pytest.CaptureFixture[str]) -> None:
    failing(error)
    assert run(["fail", "--out", "o"]) == 2
    err = capsys.readouterr().err
    assert err == ("Error: the disk is full (writing out/x.bin); free some space, then run: "
                   "midblock fail --out o --resume\n")


def test_another_os_error_is_a_bug(failing: Callable[[BaseException], None]) -> None:
    failing(PermissionError(errno.EACCES, "no"))
    with pytest.raises(PermissionError):
        run(["fail"])


def test_an_exit_code_of_a_command_is_kept(failing: Callable[[BaseException], None]) -> None:
    failing(typer.Exit(3))
    assert run(["fail"]) == 3


def test_other_packages_are_quietened_by_run_not_by_import() -> None:
    code = ("import os, midblock.cli.app as a; print('TRANSFORMERS_VERBOSITY' in os.environ); "
            "a.run(['--version']); print(os.environ['TRANSFORMERS_VERBOSITY'])")
    environment = {k: v for k, v in os.environ.items() if k != "TRANSFORMERS_VERBOSITY"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True,
                          check=True, timeout=60)
    assert done.stdout.splitlines() == ["False", f"midblock {__version__}", "error"]


def test_a_users_own_verbosity_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "debug")
    run(["--version"])
    assert os.environ["TRANSFORMERS_VERBOSITY"] == "debug"


def test_python_dash_m_and_exit_codes() -> None:
    done = subprocess.run([sys.executable, "-m", "midblock", "nonsense"], capture_output=True,
                          text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("Error: ")


@pytest.mark.slow
def test_help_comes_at_once() -> None:
    """Best of three, with Python's own start: nothing heavy is imported (the fast test names it)."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "midblock", "--help"], capture_output=True, check=True,
                       timeout=60)
        times.append(time.perf_counter() - start)
    assert min(times) < 1.0
