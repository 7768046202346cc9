"""A second process for what a study does beside its models: changes of weights, read from files, and drawing.

A study's own process computes on all cores but for moments; what needs no model in memory fills them. Nothing depends
on it: where the process cannot be had, or is lost, the same calls run here.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from midblock.figures.style import figure_style, save_figure, style_layers

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Beside", "Promise", "serve"]

_BEGIN = "import sys; sys.path[:] = {path!r}; from midblock.report.beside import serve; serve()"
_PATIENCE = 10.0
"""Seconds that an interrupted process has to note that it was interrupted."""
_NICE = 5


class _LostError(Exception):
    """The process ended before it answered."""


class Promise:
    """A call that runs beside; `result` waits for it, and makes it here where the process was lost."""

    def __init__(self, request: bytes, future: Future[Any]) -> None:
        self._request, self._future = request, future

    @property
    def done(self) -> bool:
        """Whether `result` has not to wait."""
        return self._future.done()

    def result(self) -> Any:
        """What the call returned.

        Raises:
            Exception: what it raised.
        """
        try:
            return self._future.result()
        except _LostError:
            function, args = pickle.loads(self._request)
            return function(*args)


class Beside:
    """The second process, as a context; calls run in it one after another."""

    def __init__(self) -> None:
        begin = _BEGIN.format(path=[p or os.getcwd() for p in sys.path])
        self._process = subprocess.Popen([sys.executable, "-c", begin], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._requests, self._answers = self._process.stdin, self._process.stdout
        self._line = ThreadPoolExecutor(1, thread_name_prefix="beside")

    def __enter__(self) -> Beside:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
                 ) -> None:
        process = self._process
        if error is not None:
            self._line.shutdown(wait=False, cancel_futures=True)
            with contextlib.suppress(OSError):
                process.send_signal(signal.SIGINT if os.name == "posix" else signal.SIGTERM)
        else:
            self._line.shutdown()
            with contextlib.suppress(OSError):
                self._requests.close()
        try:
            process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        self._line.shutdown()
        for stream in (self._requests, self._answers):
            with contextlib.suppress(OSError):
                stream.close()

    def call(self, function: Callable[..., Any], *args: Any) -> Promise:
        """Run a function of a module in the other process.

        Raises:
            Exception: arguments that cannot be pickled.
        """
        request = pickle.dumps((function, args))
        return Promise(request, self._line.submit(self._ask, request))

    def save_figure(self, fig: Figure, folder: Path, name: str) -> Promise:
        """`midblock.figures.save_figure` in the other process, in the style of this moment."""
        return self.call(_save_styled, style_layers(), fig, folder, name)

    def _ask(self, request: bytes) -> Any:
        try:
            self._requests.write(request)
            self._requests.flush()
            fine, value, told = pickle.load(self._answers)
        except (OSError, EOFError, ValueError, pickle.UnpicklingError):
            raise _LostError from None
        for level, line in told:
            logging.getLogger("midblock").log(level, "%s", line)
        if not fine:
            raise value
        return value


def _save_styled(layers: tuple[Path, ...], fig: Figure, folder: Path, name: str) -> list[Path]:
    with figure_style(*layers):
        return save_figure(fig, folder, name)


class _Told(logging.Handler):
    """Lines of the library's log, for the process that shows them."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[tuple[int, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append((record.levelno, record.getMessage()))


def serve() -> None:
    """Answer the calls that come in on standard input until it ends: the other side of `Beside`."""
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a call prints must not get between the answers
    warnings.simplefilter("ignore")
    if hasattr(os, "nice"):
        os.nice(_NICE)
    log = logging.getLogger("midblock")
    log.setLevel(logging.INFO)
    log.propagate = False
    with contextlib.suppress(KeyboardInterrupt, BrokenPipeError):
        while True:
            try:
                function, args = pickle.load(requests)
            except Exception:  # the input has ended, or asks for what only the other process knows and then does itself
                return
            told = _Told()
            log.addHandler(told)
            try:
                answer = (True, function(*args), told.lines)
            except Exception as error:
                answer = (False, error, told.lines)
            log.removeHandler(told)
            answers.write(_packed(answer))
            answers.flush()


def _packed(answer: tuple[bool, Any, list[tuple[int, str]]]) -> bytes:
    """An answer as bytes; an error that cannot be sent as it is goes in words."""
    try:
        packed = pickle.dumps(answer)
        pickle.loads(packed)
        return packed
    except Exception:
        _, value, told = answer
        return pickle.dumps((False, RuntimeError(f"{type(value).__name__}: {value}"), told))
