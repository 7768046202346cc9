"""What a command prints: results on stdout, progress and warnings on stderr.

`say` and `print_table` speak to a person and fall silent under ``--json``; `emit_json` is the
only thing that writes to stdout then. Everything works without a terminal: the progress bar
becomes an occasional plain line. Names and values from files are made `printable` here, and
nowhere else: no file can move the cursor, hide text or forge a line.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from midblock.reading import printable

if TYPE_CHECKING:
    import pandas as pd
    from rich.console import Console
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

    from midblock.progress import Progress

__all__ = ["emit_json", "error", "format_figure", "is_json", "is_quiet", "note", "print_table", "progress_bar",
           "reset", "say", "say_command", "set_json", "set_mute", "set_quiet", "show_log", "step", "warn"]

_json: ContextVar[bool] = ContextVar("json", default=False)
_quiet: ContextVar[bool] = ContextVar("quiet", default=False)
_mute: ContextVar[bool] = ContextVar("mute", default=False)

_PIPE_WIDTH = 10_000  # a log or a pipe has no width
_BAR = 12  # columns of a bar
_BESIDE = _BAR + 4 + 9 + 7 + 5  # columns of bar, percentage, rate, time and gaps
_LINE_SHARE = 0.1  # without a terminal: a line each tenth of the work ...
_LEAST_SECONDS = 1.0  # ... but not sooner after the last one
_LINE_SECONDS = 20.0  # ... or when this long has passed without one


def set_json(on: bool) -> None:
    """Whether stdout belongs to `emit_json` alone (the ``--json`` option)."""
    _json.set(on)


def set_quiet(on: bool) -> None:
    """Whether progress is kept off stderr (the ``--quiet`` option)."""
    _quiet.set(on)


def is_json() -> bool:
    """Whether the command was called with ``--json``."""
    return _json.get()


def is_quiet() -> bool:
    """Whether the command was called with ``--quiet``, or another process speaks for this one."""
    return _quiet.get() or _mute.get()


def set_mute(on: bool) -> None:
    """Whether another process of the job speaks for this one: nothing is printed but what ends it."""
    _mute.set(on)


def reset() -> None:
    """Forget the options of an earlier command in this process."""
    set_json(False)
    set_quiet(False)
    set_mute(False)


def say(text: str = "") -> None:
    """Print text for a person on stdout; nothing under ``--json``."""
    if not is_json() and not _mute.get():
        text = printable(text, lines=True)
        print(_within(text, sys.stdout))


def say_command(label: str, line: str) -> None:
    """Print a command to paste on stdout; where it is too long it goes on after backslashes, as shells read it."""
    if not is_json() and not _mute.get():
        from midblock.cli.layout import continued

        print(continued(label, printable(line), _terminal_width(sys.stdout)))


class _Log(logging.Handler):
    """What the library logs (the dtype that auto took, a conversion), each line once, on stderr unless ``--quiet``."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.shown: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        line = record.getMessage()
        if line in self.shown:
            return
        if record.levelno >= logging.WARNING:
            warn(line)
        elif not is_quiet():
            _to_stderr(line)
        self.shown.add(line)


_log = _Log()


def show_log() -> None:
    """Show the library's log on stderr from now on."""
    logger = logging.getLogger("midblock")
    logger.setLevel(logging.INFO)
    if _log not in logger.handlers:
        logger.addHandler(_log)
    _log.shown.clear()


def warn(text: str) -> None:
    """Print one warning on stderr, also under ``--json`` and ``--quiet``."""
    if not _mute.get():
        _to_stderr(f"Warning: {text}")


def step(text: str) -> None:
    """Print one line about what begins now on stderr; nothing with ``--quiet``."""
    if not is_quiet():
        _to_stderr(text)


def error(text: str) -> None:
    """Print what ended the command on stderr: one line that begins with ``Error:``, further ones indented."""
    _to_stderr(f"Error: {text}")


def note(text: str, command: str = "") -> None:
    """Print how to go on after an interruption on stderr, and the command for it on a line of its own."""
    if _mute.get():
        return
    print(file=sys.stderr)
    _to_stderr(text)
    if command:
        from midblock.cli.layout import continued

        print(continued("  ", printable(command), _terminal_width(sys.stderr)), file=sys.stderr)


def _to_stderr(text: str) -> None:
    first, *rest = printable(text, lines=True).splitlines() or [""]
    # a line of a file's own making must not look like one of the program's
    whole = "\n".join([first, *(line if line.startswith(" ") else f"  {line}" for line in rest)])
    print(_within(whole, sys.stderr, further="  "), file=sys.stderr)


def _within(text: str, stream: Any, further: str = "") -> str:
    """Text whose lines fit the terminal of a stream, broken at words; as it is where there is none."""
    width = _terminal_width(stream)
    if width is None or all(len(line) <= width for line in text.split("\n")):
        return text
    from midblock.cli.layout import wrapped

    return wrapped(text, width, further)


def emit_json(value: Any) -> None:
    """Print ``value`` as JSON on stdout if ``--json`` was given; NaN and infinity become null."""
    if not is_json() or _mute.get():
        return
    from midblock.results import json_ready

    text = json.dumps(json_ready(value), indent=1, allow_nan=False, ensure_ascii=False)
    # what would act on a terminal, in JSON's own escapes
    print("".join(c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in text))


def format_figure(value: Any) -> str:
    """A cell as text: whole numbers with thousands separators, others with four digits.

    Example:
        >>> [format_figure(x) for x in (134515008, 0.123456, float("nan"), None, "01100")]
        ['134,515,008', '0.1235', '', '', '01100']
    """
    if value is None:
        return ""
    if hasattr(value, "item"):  # NumPy scalars
        value = value.item()
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        if math.isnan(value):
            return ""
        return f"{value:,.0f}" if value.is_integer() and abs(value) >= 1000 else f"{value:.4g}"
    return printable(str(value))


def print_table(frame: pd.DataFrame, title: str | None = None) -> None:
    """Print a data frame as a table on stdout; nothing under ``--json``.

    Undefined cells stay empty; nothing is cropped (`midblock.cli.layout`). Without a terminal the table is as wide
    as its content.
    """
    if is_json() or _mute.get():
        return
    import pandas as pd

    from midblock.cli.layout import Grid, fitted

    numeric = [pd.api.types.is_numeric_dtype(frame[name]) and not pd.api.types.is_bool_dtype(frame[name])
               for name in frame.columns]
    grid = Grid([printable(str(name)) for name in frame.columns],
                [[format_figure(v) for v in row] for row in frame.itertuples(index=False, name=None)], numeric)
    width = _terminal_width(sys.stdout) or _PIPE_WIDTH
    console = _console(sys.stdout, width=max(width, grid.total(broken=False)))
    if title:
        say(title)
    for part in fitted(grid, width):
        console.print(part, markup=False)
        console.print()


def _terminal_width(stream: Any) -> int | None:
    """Columns of the terminal behind a stream; None for a file or a pipe."""
    if not stream.isatty():
        return None
    if os.environ.get("COLUMNS", "").isdigit():
        return shutil.get_terminal_size().columns
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except (OSError, ValueError):
        return 80


def _console(stream: Any, width: int | None = None) -> Console:
    from rich.console import Console

    return Console(file=stream, width=width, highlight=False, soft_wrap=False)


@contextlib.contextmanager
def progress_bar(*, quiet: bool | None = None) -> Iterator[Progress]:
    """Give a `midblock.progress.Progress` callback that draws on stderr.

    On a terminal: a bar for each kind of work, with rate, time left and the note. Elsewhere: a
    plain line at each tenth of the work, or every 20 seconds. Nothing with ``--quiet``.

    Args:
        quiet: Overrides what ``--quiet`` said.
    """
    from midblock.progress import silent

    if is_quiet() if quiet is None else quiet:
        yield silent
    elif sys.stderr.isatty():
        with _rich_progress() as bar:
            yield _Bars(bar)
    else:
        yield PlainProgress(lambda line: print(printable(line), file=sys.stderr, flush=True))


def _rich_progress() -> RichProgress:
    from rich import progress
    from rich.cells import cell_len
    from rich.table import Column
    from rich.text import Text

    class Rate(progress.ProgressColumn):
        """Units done in a second, or nothing before the first is done."""

        def render(self, task: progress.Task) -> Any:
            speed = task.finished_speed or task.speed
            return f"{format_figure(float(f'{speed:.3g}'))}/s" if speed else ""

    class Note(progress.ProgressColumn):
        """What is being worked on; nothing where it does not fit whole."""

        def render(self, task: progress.Task) -> Any:
            longest = max((cell_len(t.description) for t in bar.tasks), default=0)
            return Text(note if cell_len(note := task.fields["note"]) <= console.width - longest - _BESIDE else "",
                        style="dim")

    def whole() -> Column:
        return Column(no_wrap=True)

    console = _console(sys.stderr)
    # stdout is left alone: it may be a pipe that carries the result
    bar = progress.Progress(
        progress.TextColumn("{task.description}", table_column=whole()), progress.BarColumn(bar_width=_BAR),
        progress.TaskProgressColumn(table_column=whole()), Rate(table_column=whole()),
        progress.TimeRemainingColumn(elapsed_when_finished=True, table_column=whole()), Note(table_column=whole()),
        console=console, redirect_stdout=False, redirect_stderr=True)
    return bar


class _Bars:
    """One rich task for each ``what``."""

    def __init__(self, bar: RichProgress) -> None:
        self._bar = bar
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, what: str, done: float, total: float, note: str = "") -> None:
        task = self._tasks.get(what)
        if task is None:
            # markup in a name ("[8, 16)") must show, not style
            task = self._tasks[what] = self._bar.add_task(printable(what).replace("[", r"\["), total=total, note="")
        elif done < self._bar.tasks[self._index(task)].completed:
            self._bar.reset(task, total=total)  # the same work begins again: a new epoch, a new seed
        self._bar.update(task, completed=done, total=total, note=printable(note))

    def _index(self, task: TaskID) -> int:
        return self._bar.task_ids.index(task)


class PlainProgress:
    """Progress as occasional lines of text, for logs and pipes.

    Args:
        write: Called with each line.
        clock: Seconds; for tests.
    """

    def __init__(self, write: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._write = write
        self._clock = clock
        self._what = ""
        self._started = self._last = 0.0
        self._first = self._shown = self._done = 0.0

    def __call__(self, what: str, done: float, total: float, note: str = "") -> None:
        now = self._clock()
        if what != self._what or done < self._done:
            self._what, self._started, self._last = what, now, now
            self._first, self._shown = done, (done / total if total else 0.0)
        self._done = done
        share = min(done / total, 1.0) if total else 1.0
        finished = share >= 1.0 and self._shown < 1.0
        since = now - self._last
        if not (finished or (share - self._shown >= _LINE_SHARE and since >= _LEAST_SECONDS)
                or since >= _LINE_SECONDS):
            return
        self._shown, self._last = share, now
        seconds = now - self._started
        line = f"{what}: {share:.0%} ({format_figure(done)}/{format_figure(total)})"
        if seconds > 0 and done > self._first:
            rate = (done - self._first) / seconds
            line += f", {rate:.3g}/s, " + (f"took {_clock_text(seconds)}" if finished
                                           else f"{_clock_text((total - done) / rate)} left")
        self._write(f"{line}, {note}" if note else line)


def _clock_text(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
