"""Signals end a run as Ctrl-C does; what the system refuses is one line, a bug keeps its traceback."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from midblock.cli import app, console
from midblock.cli.endings import Ended, check_words, foreseen, signals_end_as_interrupts
from midblock.errors import SettingsError

RUN = """
import signal, sys, time, pathlib
import typer
from midblock.cli import app
from midblock.provenance import RunFolder

def wait(out: pathlib.Path = typer.Option(...), resume: bool = typer.Option(False, "--resume")) -> None:
    with RunFolder(out, command="wait", settings={}, resume=resume) as run:
        run.write_text("started", "x")
        print("in", flush=True)
        while True:
            time.sleep(0.05)

signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever started the tests may ignore these
signal.signal(signal.SIGHUP, signal.SIG_DFL)
app.app.command("wait")(wait)
sys.exit(app.run(["wait", "--out", sys.argv[1]]))
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)])
def test_a_signal_saves_the_state_and_says_how_to_go_on(tmp_path: Path, number: signal.Signals, code: int) -> None:
    process = subprocess.Popen([sys.executable, "-c", RUN, str(tmp_path / "out")], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "in\n"
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert f"to continue, run:\n  midblock wait --out {tmp_path / 'out'} --resume\n" in err
    assert "Traceback" not in err
    from midblock.provenance import read_run

    assert read_run(tmp_path / "out")["status"] == "interrupted"
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"run.json", "started"}


def test_an_ignored_signal_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signalled: list[Ended] = []
    try:
        with signals_end_as_interrupts(signalled):
            within = signal.getsignal(signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.01)
        after = signal.getsignal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert within is after is signal.SIG_IGN
    assert not signalled


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="there is no timer")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_in_a_destructor_is_not_lost(number: int, capfd: pytest.CaptureFixture[str]) -> None:
    class Ending:
        def __del__(self) -> None:
            os.kill(os.getpid(), number)
            time.sleep(0.01)

    hook = sys.unraisablehook
    ended = False
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def work() -> None:
        nonlocal ended
        with signals_end_as_interrupts():
            ending = Ending()
            del ending
            time.sleep(5)
            ended = True

    try:
        with pytest.raises(KeyboardInterrupt):
            work()
    finally:
        signal.signal(signal.SIGINT, before)
    assert not ended
    assert "Traceback" not in capfd.readouterr().err
    assert sys.unraisablehook is hook
    assert signal.getsignal(signal.SIGALRM) is signal.SIG_DFL


def test_the_second_signal_does_not_cut_the_saving_short() -> None:
    saved = []

    def work() -> None:
        with signals_end_as_interrupts():
            try:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(1)
            finally:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.01)
                saved.append(True)

    with pytest.raises(Ended) as caught:
        work()
    assert saved == [True]
    assert caught.value.exit_code == 143
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_other_threads_change_no_signal() -> None:
    found = []

    def inside() -> None:
        with signals_end_as_interrupts():
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert found == [signal.SIG_DFL]


@pytest.mark.parametrize("words", [["inspect", "a\0b"], ["inspect", "~nosuchuser/m"], ["tune", "--data=~nosuchuser/d"],
                                   ["tune", "m", "--cache", "disk:~nosuchuser/c"], ["inspect", "\udcff"]])
def test_words_that_name_nothing(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run(words) == 2
    err = capsys.readouterr().err
    assert err.startswith("Error: ")
    assert len(err.splitlines()) == 1


def test_ordinary_words_pass() -> None:
    check_words(["inspect", "~/x", "ünï", "a b\tc", "--mask=01100", "hf:name", "日本"])
    with pytest.raises(SettingsError):
        check_words(["~nosuchuser"])


@pytest.mark.parametrize(("error", "words"), [
    (OSError(errno.ENOSPC, "No space left on device", "a/b"), "disk is full (writing a/b)"),
    (RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed"), "disk is full"),
    (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"), "disk is full"),
    (MemoryError(), "not enough memory"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "not enough memory"),
    (PermissionError(errno.EACCES, "Permission denied", "/secret"), "/secret: Permission denied"),
    (OSError(errno.ENAMETOOLONG, "File name too long", "x" * 3000), "File name too long"),
    (RuntimeError("Could not determine home directory."), "begins with ~")])
def test_what_the_system_refuses_is_told(error: Exception, words: str) -> None:
    told = foreseen(error)
    assert told is not None
    assert words in told
    wrapped = ValueError("above")
    wrapped.__cause__ = error
    assert (foreseen(wrapped) is not None) == (isinstance(error, MemoryError) or "disk" in words or "memory" in words)


@pytest.mark.parametrize("error", [ValueError("x"), OSError("no number"), KeyError("home"), RuntimeError("x")])
def test_a_bug_stays_a_bug(error: Exception) -> None:
    assert foreseen(error) is None


def test_an_error_cannot_forge_another(capsys: pytest.CaptureFixture[str]) -> None:
    console.error("row a\nError: forged\x1b[2J\r\u202eabc has 2 faults:\n  one")
    err = capsys.readouterr().err
    assert [line for line in err.splitlines() if line.startswith("Error:")] == ["Error: row a"]
    assert err.replace("\n", "").isprintable()
    console.warn("\x1b]0;title\x07")
    console.say("table \x9b31m\nsecond")
    caught = capsys.readouterr()
    assert caught.err == "Warning: \\x1b]0;title\\x07\n"
    assert caught.out == "table \\x9b31m\nsecond\n"


def test_tables_and_json_show_what_is_hidden(capsys: pytest.CaptureFixture[str]) -> None:
    import json

    import pandas as pd

    console.print_table(pd.DataFrame({"name\x1b": ["a\x1b[31m\nb"]}), "title\x07")
    shown = capsys.readouterr().out
    assert all(c.isprintable() or c == "\n" for c in shown)
    assert "a\\x1b[31m\\nb" in shown
    console.set_json(True)
    try:
        console.emit_json({"name": "a\x1b\u202e\ud83d naïve \U000e0041"})
    finally:
        console.reset()
    shown = capsys.readouterr().out
    assert all(c.isprintable() or c == "\n" for c in shown)
    assert "naïve" in shown
    assert json.loads(shown) == {"name": "a\x1b\u202e\ud83d naïve \U000e0041"}
