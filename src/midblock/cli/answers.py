"""How every command ends: what was found, what it means for the choice of blocks, and the next command to paste."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING

from typer.main import get_current_context  # type: ignore[attr-defined]

from midblock.cli import console

if TYPE_CHECKING:
    from midblock.results import Answer

__all__ = ["again", "in_earnest", "next_words", "remember", "show_answer"]

_CARRIED = ("trust_remote_code", "allow_pickle", "tokenizer", "dtype", "device", "supervised", "names")
"""Options of this call that the next command must repeat to see the same models and data."""


_words: ContextVar[tuple[str, ...]] = ContextVar("words", default=())


def remember(words: Sequence[str]) -> None:
    """The words of this call after ``midblock``."""
    _words.set(tuple(words))


def in_earnest() -> tuple[str, ...]:
    """This call without ``--dry-run``: what to run after one."""
    return tuple(w for w in _words.get() if w != "--dry-run")


def show_answer(answer: Answer, out: Path | None = None, *, found: bool = True) -> None:
    """Print the last lines of a command; nothing under ``--json``.

    Args:
        answer: What the library says.
        out: The run folder of this call; what comes next is written beside it.
        found: Whether what was found is told here (else the command has told it just before).
    """
    console.say()
    if found:
        console.say(answer.found)
    if answer.means:
        console.say(answer.means)
    if answer.next:
        console.say_command("Next: ", shlex.join(["midblock", *next_words(answer.next, out)]))


def next_words(words: Sequence[str], out: Path | None) -> list[str]:
    """The words of the next command with this call's own options for models, and a folder of its own.

    Args:
        words: As the library says them, the command's name first.
        out: The run folder of this call.
    """
    found = list(words)
    context = get_current_context(silent=True)
    if context is None or context.parent is None:
        return found
    group = context.parent.command
    following = getattr(group, "commands", {}).get(words[0])
    if following is None:
        return found
    if "--resume" in words and _words.get()[:1] == tuple(words[:1]):
        return again(_words.get(), words[words.index("--resume") + 1:], out)
    takes = {p.name: p for p in following.params}
    for name in _CARRIED:
        source = context.get_parameter_source(name) if name in context.params else None
        if name in takes and source is not None and source.name == "COMMANDLINE" and takes[name].opts[0] not in found:
            value = context.params[name]
            if name == "names" and str(value).count(",") + 1 != _models_in(words):
                continue
            found += [takes[name].opts[0], *([] if value is True else [str(getattr(value, "value", value))])]
    if "out" in takes and "--out" not in found and "--dry-run" not in found and words[0] != "report":
        found += ["--out", str(_free(_home(out) / words[0]))]
    return found


def again(words: Sequence[str], more: Sequence[str] = (), out: Path | None = None) -> list[str]:
    """A call once more with ``--resume``.

    Args:
        words: The call.
        more: Further options, which take the place of its own.
        out: Its run folder, where the call may not say.
    """
    own = {w for w in more if w.startswith("--")}
    kept: list[str] = []
    given = iter(words)
    for word in given:
        if word.partition("=")[0] in own:
            if "=" not in word:
                next(given, None)
        else:
            kept.append(word)
    resume = [] if "--resume" in kept else ["--resume"]
    folder = [] if out is None or any(w.partition("=")[0] == "--out" for w in kept) else ["--out", str(out)]
    return [*kept, *resume, *more, *folder]


def _models_in(words: Sequence[str]) -> int:
    return next((i for i, w in enumerate(words) if w.startswith("--")), len(words)) - 1


def _home(out: Path | None) -> Path:
    return Path("runs") if out is None else out.parent


def _free(folder: Path) -> Path:
    """The folder, or its name with the first number that is free."""
    return next(f for f in (folder, *(folder.with_name(f"{folder.name}-{i}") for i in range(2, 10_000)))
                if not f.exists())
