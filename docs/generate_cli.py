"""The page of commands, from the program's own help: docs/hooks.py adds it to the site, so that it cannot go stale.

    python docs/generate_cli.py     writes it as docs/cli.md, for reading without the site
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from pathlib import Path

PAGE = Path(__file__).with_name("cli.md")
INTRODUCTION = """\
# Commands

Results go to stdout, progress and warnings to stderr. A mistake in a call is one line on stderr and
exit code 2; Ctrl-C exits with 130. `MIDBLOCK_DEBUG=1` shows tracebacks, `MIDBLOCK_DATA=DIR` names a
folder of data sets and `MIDBLOCK_CACHE=DIR` the folder of converted models and caches.
"""


def help_of(words: list[str]) -> str:
    """The help that `midblock WORDS --help` prints, 100 columns wide."""
    from midblock.cli.app import run

    os.environ["COLUMNS"] = "100"
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        code = run([*words, "--help"])
    if code != 0:
        raise SystemExit(f"`midblock {' '.join(words)} --help` failed with exit code {code}")
    return "\n".join(line.rstrip() for line in text.getvalue().strip().splitlines())


def page() -> str:
    """The whole page."""
    from midblock.cli.app import COMMANDS

    parts = [INTRODUCTION, f"```text\n{help_of([])}\n```\n"]
    for name in COMMANDS:
        parts.append(f"## {name}\n\n```text\n{help_of([name])}\n```\n")
    return "\n".join(parts)


def main() -> int:
    """Write the page; the exit code."""
    PAGE.write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
