"""``pydocs``: English prose that every CPython ships, for perplexity without a download.

The paragraphs come from the language reference that ``help()`` shows
(``pydoc_data.topics``) and from the docstrings of some modules of the standard library. They
differ a little between Python versions; the data set's fingerprint tells them apart.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

from midblock.data.examples import Example, hold_out_part
from midblock.errors import DataError

__all__ = ["PARAGRAPH_CHARS", "pydocs_examples"]

PARAGRAPH_CHARS = (150, 1500)
"""Shortest and longest paragraph used, in characters: about 35 to 350 tokens."""

# written in prose, pure Python, and part of every CPython since 3.11
_MODULES = ("argparse", "calendar", "codecs", "collections", "configparser", "contextlib", "csv", "difflib",
            "doctest", "enum", "fractions", "functools", "gettext", "heapq", "inspect", "ipaddress",
            "logging", "mailbox", "numbers", "optparse", "pathlib", "pickle", "pickletools", "pprint",
            "random", "sched", "shutil", "socketserver", "statistics", "subprocess", "tarfile", "tempfile",
            "textwrap", "threading", "timeit", "trace", "turtle", "typing", "unittest.case",
            "unittest.mock", "urllib.request", "weakref", "zipfile")
_NO_PROSE = re.compile(r">>>|::=|https?://|^\s*(?:def|class|import|from|@|\||\+[-=]+|[-*=]{3,})", re.M)


def pydocs_examples(split: str) -> list[Example]:
    """All paragraphs of one split, in a fixed order.

    Args:
        split: ``train`` or ``test`` (one paragraph in five, chosen by its content).

    Raises:
        DataError: this Python has been stripped of its documentation.
    """
    chosen = [Example(text=text, row={"text": text}, where=where)
              for where, text in _paragraphs() if hold_out_part(text) == split]
    if not chosen:
        raise DataError("pydocs: this Python ships no documentation text (pydoc_data is missing or "
                        "stripped); use a complete CPython, or a text file of your own as --data.")
    return chosen


@functools.cache
def _paragraphs() -> tuple[tuple[str, str], ...]:
    found: dict[str, str] = {}
    for where, document in _documents():
        for number, part in enumerate(re.split(r"\n[ \t]*\n", document), start=1):
            text = " ".join(part.split())
            if _is_prose(part, text):
                found.setdefault(text, f"{where}:{number}")
    return tuple((where, text) for text, where in found.items())


def _is_prose(part: str, text: str) -> bool:
    low, high = PARAGRAPH_CHARS
    return (low <= len(text) <= high and text[0].isupper() and text[-1] in ".:!?"
            and not _NO_PROSE.search(part)
            and sum(c.isalpha() or c == " " for c in text) >= 0.85 * len(text))


def _documents() -> Iterator[tuple[str, str]]:
    with contextlib.suppress(ImportError):  # some distributions leave it out
        from pydoc_data.topics import topics

        for name in sorted(topics):
            yield f"topic {name}", topics[name]
    for module in _MODULES:
        spec = importlib.util.find_spec(module)
        if spec is None or not spec.origin or not Path(spec.origin).is_file():
            continue
        # parsed, not imported: importing would run the module
        tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                document = ast.get_docstring(node)
                if document:
                    yield f"{module}.{getattr(node, 'name', '__doc__')}", document
