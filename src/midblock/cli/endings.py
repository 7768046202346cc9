"""How a command ends that does not end by itself: a signal, a full disk, too little memory, a system's refusal."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from midblock.errors import SettingsError
from midblock.reading import shortened, user_path

__all__ = ["Ended", "check_words", "foreseen", "signals_end_as_interrupts"]

_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))
# what libraries say that write or allocate by themselves, and so raise types of their own
_DISK_WORDS = ("No space left on device", "PytorchStreamWriter failed writing", "inline_container.cc")
_MEMORY_WORDS = ("can't allocate memory", "out of memory", "Unable to allocate")


class Ended(KeyboardInterrupt):
    """A signal that ends the process; whatever keeps its state at Ctrl-C keeps it here.

    Args:
        number: Of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.name = signal.Signals(number).name
        self.exit_code = 128 + number


@contextlib.contextmanager
def signals_end_as_interrupts(raised: list[Ended] | None = None) -> Iterator[None]:
    """Within the context SIGTERM (a cluster's time limit) and SIGHUP (a lost terminal) raise `Ended`, once.

    A signal that is already handled or ignored (``nohup``) stays so. Nothing changes outside the main thread. What a
    signal raises while an object is being destroyed Python drops; it is then raised again a moment later.

    Args:
        raised: What is raised is appended to it.
    """
    def end(number: int, frame: object) -> None:
        for other in changed:  # a second one must not cut the saving short
            signal.signal(other, signal.SIG_IGN)
        if number == getattr(signal, "SIGHUP", None):
            _leave_terminal()
        ended = Ended(number)
        if raised is not None:
            raised.append(ended)
        raise ended

    lost: list[BaseException] = []
    report = sys.unraisablehook

    def dropped(what: Any) -> None:
        if not isinstance(what.exc_value, KeyboardInterrupt) or not hasattr(signal, "setitimer"):
            report(what)
            return
        lost.append(what.exc_value)
        signal.signal(signal.SIGALRM, once_more)
        signal.setitimer(signal.ITIMER_REAL, 0.02)

    def once_more(number: int, frame: object) -> None:
        raise lost[-1]

    changed: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        changed = {n: signal.getsignal(n) for n in _SIGNALS if signal.getsignal(n) == signal.SIG_DFL}
        for number in changed:
            signal.signal(number, end)
        sys.unraisablehook = dropped
    try:
        yield
    finally:
        if sys.unraisablehook is dropped:
            sys.unraisablehook = report
        if lost:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
        for number, handler in changed.items():
            signal.signal(number, handler)


def _leave_terminal() -> None:
    """Write to nowhere what would go to a terminal that is gone: an error there would hide the interruption."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in (sys.stdout, sys.stderr):
            if stream is not None and stream.isatty():
                os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def check_words(words: Sequence[str]) -> None:
    """Refuse words of a command line that cannot name anything on this system.

    Raises:
        SettingsError: a word with a NUL, one that is not UTF-8, or ``~name`` without such a user.
    """
    for word in words:
        value = word.rpartition("=")[2] if word.startswith("--") else word
        value = value.removeprefix("disk:")
        if not value.isprintable() or value.startswith("~"):
            try:
                value.encode()
            except UnicodeEncodeError:
                raise SettingsError(f"{shortened(value)} is not UTF-8 text; rename the file, or write it anew.") \
                    from None
            if "\0" in value or value.startswith("~"):
                user_path(value, error=SettingsError)


def foreseen(error: BaseException) -> str | None:
    """What to tell a user of an error that the system caused; None for a bug.

    Args:
        error: What ended the command.
    """
    causes = list(_causes(error))
    files = [os.fsdecode(e.filename) for e in causes
             if isinstance(e, OSError) and isinstance(e.filename, str | bytes)]
    if any(isinstance(e, OSError) and e.errno in (errno.ENOSPC, errno.EDQUOT) for e in causes) or \
            any(word in str(e) for e in causes for word in _DISK_WORDS):
        return f"the disk is full{f' (writing {shortened(files[0])})' if files else ''}; free some space, then "
    if any(isinstance(e, MemoryError) or any(w in str(e) for w in _MEMORY_WORDS) for e in causes):
        return "there is not enough memory; use a smaller --batch-size, --max-length or model, then "
    if isinstance(error, OSError) and files:
        return f"{shortened(files[0], 200)}: {error.strerror or error}; mend that, then "
    if isinstance(error, RuntimeError) and "home directory" in str(error):
        return "a path begins with ~ and names a user that is not here; write the folder out, then "
    return None


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__
