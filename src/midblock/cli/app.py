"""The `midblock` program: its commands, and what happens when one of them fails.

Importing this module is light: each command file imports its part of the library when it runs.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import shlex
import sys
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from typing import Annotated

import typer

from midblock import __version__, extras, ranks
from midblock.cli import console
from midblock.cli.answers import again, remember
from midblock.cli.endings import Ended, check_words, foreseen, signals_end_as_interrupts
from midblock.errors import MidblockError, SettingsError

__all__ = ["COMMANDS", "app", "run"]

# Modules of this package, each with a command of its name; `midblock --help` lists them in this order.
COMMANDS = (
    "inspect",
    "pairs",
    "profile",
    "lens",
    "swap",
    "weights",
    "merge",
    "gradients",
    "steer",
    "correlate",
    "tune",
    "evaluate",
    "compare",
    "sweep",
    "importance",
    "overlap",
    "locate",
    "study",
    "report",
    "figures",
    "demo",
)

SEVERAL = ("profile", "lens", "swap", "evaluate", "tune")
"""Commands that several processes of one job share (`midblock.ranks`)."""

USER_MISTAKE = 2
INTERRUPTED = 130
_PATIENCE_SECONDS = 5.0

app = typer.Typer(
    name="midblock", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help: the same in a terminal, a pipe and docs/cli.md
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"midblock {__version__}")
        raise typer.Exit()


@app.callback()
def _main(
    version: Annotated[bool, typer.Option(
        "--version", callback=_print_version, is_eager=True, help="Print the version and stop.")] = False,
) -> None:
    """Find where fine-tuning acts in a language model, tune only there, and prove the choice."""
    if os.environ.get("MIDBLOCK_STYLE"):  # a fault in it must show before long work, not when figures are drawn
        from midblock.figures.style import check_style

        check_style()


for _name in COMMANDS:
    _command = getattr(importlib.import_module(f"midblock.cli.{_name}"), _name)
    app.command(_name, epilog=_command.epilog)(_command)


def run(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code: 0, 2 for a user's mistake, 130 for Ctrl-C, 143 for SIGTERM.

    SIGTERM and SIGHUP end a run as Ctrl-C does, with its state saved. A mistake is one clear line
    on stderr; with ``MIDBLOCK_DEBUG=1`` its traceback comes first and third-party warnings stay on. Anything
    unforeseen is a bug and keeps its traceback.

    Args:
        argv: The words after ``midblock``; by default those of this process.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    debug = os.environ.get("MIDBLOCK_DEBUG", "") not in ("", "0")
    # OpenMP's threads (libgomp's, which PyTorch brings) otherwise keep their cores for milliseconds after each product,
    # so that no other thread can use them; read when torch is imported, which only commands do
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    if not debug:
        _quiet_third_parties()
    console.reset()
    remember(words)
    signalled: list[Ended] = []
    console.show_log()
    job = ranks.asked()
    console.set_mute(job is not None and job[0] > 0)
    try:
        check_words(words)
        with signals_end_as_interrupts(signalled), contextlib.nullcontext() if job is None else _one_of(words, *job):
            code = app(args=words, prog_name="midblock", standalone_mode=False)
    except MidblockError as error:
        return _fail(str(error), error.exit_code, debug)
    except typer.TyperException as error:  # a word that no command or option knows
        message = error.format_message()
        if "\n" in message or not message:  # no command was named: the message is the whole help
            print(message, file=sys.stderr)
            return USER_MISTAKE
        return _fail(f"{message} See `{_help_for(words)}`.", USER_MISTAKE, debug)
    except ModuleNotFoundError as error:
        absent = extras.missing(error, f"midblock {words[0]}")
        if absent is None:
            raise
        return _fail(str(absent), absent.exit_code, debug)
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except Exception as error:
        if (what := foreseen(error)) is None:
            raise
        return _fail(f"{what}{_again(words) or 'repeat the command.'}", USER_MISTAKE, debug)
    if code == INTERRUPTED:  # of a signal too: typer makes one of every KeyboardInterrupt
        how, code = (f"Ended by {signalled[0].name}", signalled[0].exit_code) if signalled else ("Interrupted", code)
        again = _again(words)
        console.note(f"{how}; to continue, run:" if again else f"{how}; to go on, repeat the command.",
                     again.removeprefix("run: "))
    return code if isinstance(code, int) else 0


@contextlib.contextmanager
def _one_of(words: Sequence[str], rank: int, size: int) -> Iterator[None]:
    """One process of a job (``torchrun``, ``accelerate launch``): joins the others for a command that is shared."""
    shared = [w for w in words if not w.startswith("-")][:1]
    if shared and shared[0] in COMMANDS and shared[0] not in SEVERAL:
        raise SettingsError(f"midblock {shared[0]} runs in one process, and this job has {size}; start it without "
                            f"torchrun or accelerate launch. {', '.join(SEVERAL)} share their work over processes; a "
                            "sweep has engines of its own (engine: processes, ray, slurm).")
    if not {"-h", "--help"} & {*words} and shared:
        with ranks.joined():
            yield
    else:
        yield


def _fail(message: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    if (job := ranks.asked()) is not None and job[0] > 0:
        # a mistake that all processes make is told by the first one, whose end the launcher then makes ours
        time.sleep(_PATIENCE_SECONDS)
        message = f"process {job[0]} of {job[1]}: {message}"
    console.error(message)
    return code


def _quiet_third_parties() -> None:
    """Keep other packages' progress bars and advice off the screen; a user's own setting wins."""
    for name, value in {
        "TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error",
        "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
        "BITSANDBYTES_NOWELCOME": "1",
    }.items():
        os.environ.setdefault(name, value)
    others = r"(transformers|torch|peft|trl|accelerate|datasets|huggingface_hub|lm_eval|gguf)(\.|$)"
    for kind in (UserWarning, FutureWarning, DeprecationWarning):
        warnings.filterwarnings("ignore", category=kind, module=others)


def _can_resume(words: Sequence[str]) -> bool:
    group = typer.main.get_command(app)
    command = getattr(group, "commands", {}).get(words[0]) if words else None
    known = {option for p in command.params for option in p.opts} if command is not None else set()
    out_given = any(w == "--out" or w.startswith("--out=") for w in words)
    return "--resume" in known and (out_given or "--out" not in known)


def _again(words: Sequence[str]) -> str:
    """How to continue, without a full stop, so that the line can be pasted; empty where there is no way."""
    if not _can_resume(words):
        return ""
    return f"run: {shlex.join(['midblock', *again(words)])}"


def _help_for(words: Sequence[str]) -> str:
    command = next((w for w in words if w in COMMANDS), None)
    return f"midblock {command} --help" if command else "midblock --help"


if __name__ == "__main__":
    sys.exit(run())
