"""Packages whose names are imported on first use, so that a command begins at once and loads only what it needs."""

from __future__ import annotations

import ast
import functools
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["exports", "on_first_use"]


@functools.cache
def exports(file: str) -> dict[str, str]:
    """Name -> module of what a package's ``__init__.py`` imports under ``if TYPE_CHECKING:``.

    Args:
        file: Path of the ``__init__.py``; every such import is written ``from module import name``.
    """
    found: dict[str, str] = {}
    for node in ast.parse(Path(file).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            for line in node.body:
                if isinstance(line, ast.ImportFrom) and line.module:
                    found |= {alias.asname or alias.name: line.module for alias in line.names}
    return found


def on_first_use(package: str, file: str, names: list[str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """``__getattr__`` and ``__dir__`` of a package that imports its public names on first use (PEP 562).

    What type checkers read under ``if TYPE_CHECKING:`` is the one list of where each name comes from.

    Args:
        package: Its ``__name__``.
        file: Its ``__file__``.
        names: Its ``__all__``.
    """
    def get(name: str) -> Any:
        known = exports(file) if name in names else {}
        if name not in known:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(known[name]), name)

    return get, lambda: sorted(names)
