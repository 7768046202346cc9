"""The rooms of docs/architecture.md hold: imports point down only, and the command line stays light."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGE = REPOSITORY / "src" / "midblock"
# these two are the package's face, not part of a room: one exports lazily, the other starts the program
FACE = {"midblock", "midblock.__main__"}


def rooms() -> dict[str, int]:
    """Module name below `midblock` -> room number, read from the table in docs/architecture.md."""
    text = (REPOSITORY / "docs" / "architecture.md").read_text(encoding="utf-8")
    found = {}
    for number, modules in re.findall(r"^\| (\d+) \| ([^|]+) \|", text, flags=re.MULTILINE):
        for name in re.findall(r"`(\w+)`", modules):
            found[name] = int(number)
    return found


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def exports() -> dict[str, str]:
    """Names that `midblock/__init__.py` exports -> the module that each comes from."""
    import midblock
    from midblock import lazily

    return {**lazily.exports(midblock.__file__), **{name: f"midblock.{name}" for name in midblock._MODULES}}


def imported_modules(source: str, module: str, is_package: bool) -> Iterator[tuple[int, str]]:
    """Line and name of every module of midblock that a source imports, also inside functions."""
    package = module.split(".") if is_package else module.split(".")[:-1]
    lazy = exports()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "midblock":
                    yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            origin = node.module or ""
            if node.level:
                above = package[: len(package) - node.level + 1]
                origin = ".".join([*above, origin] if origin else above)
            if origin == "midblock":
                for alias in node.names:
                    yield node.lineno, lazy.get(alias.name, f"midblock.{alias.name}")
            elif origin.startswith("midblock."):
                yield node.lineno, origin
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "import_module":
            name = node.args[0] if node.args else None
            if isinstance(name, ast.Constant) and str(name.value).startswith("midblock."):
                yield node.lineno, str(name.value)
        elif (isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
              and node.value.id == "midblock" and node.attr in lazy):
            yield node.lineno, lazy[node.attr]


def upward_imports(source: str, module: str, is_package: bool = False) -> list[str]:
    """Imports of a source that point up the list of rooms, or to a module that is in no room."""
    known = rooms()
    own = known[module.split(".")[1]]
    wrong = []
    for line, target in imported_modules(source, module, is_package):
        if target in ("midblock", "midblock.__version__"):
            continue
        room = known.get(target.split(".")[1])
        if room is None:
            wrong.append(f"{module}:{line} imports {target}, which is in no room")
        elif room > own:
            wrong.append(f"{module}:{line} (room {own}) imports {target} (room {room})")
    return wrong


SOURCES = [p for p in sorted(PACKAGE.rglob("*.py")) if module_name(p) not in FACE]


LONG = {"evaluation/sandbox_runner.py": "one program without imports of ours, started by its path in an empty world"}


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_no_file_is_too_long_to_live_in(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").count("\n")
    name = path.relative_to(PACKAGE).as_posix()
    assert (lines > 500) == (name in LONG), f"{name} has {lines} lines: divide it, or give the reason in LONG"


def test_the_table_of_rooms_is_read() -> None:
    found = rooms()
    assert found["cli"] == 8
    assert found["errors"] == 0
    assert found["metrics"] < found["models"] < found["capture"] < found["analysis"]


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_every_module_is_in_a_room(path: Path) -> None:
    assert module_name(path).split(".")[1] in rooms()


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_imports_point_down(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert upward_imports(source, module_name(path), path.name == "__init__.py") == []


@pytest.mark.parametrize("source", [
    "import midblock.cli.app",
    "from midblock.analysis.profile import profile",
    "from midblock.analysis import profile",
    "from midblock import analysis",
    "from midblock import profile",
    "from ..analysis import profile",
    "from .. import analysis",
    "def f():\n    from midblock.tuning import plan",
    "if TYPE_CHECKING:\n    import midblock.report",
    "importlib.import_module('midblock.sweeps')",
    "import midblock\nmidblock.profile",
    "import midblock.nowhere",
])
def test_an_upward_import_is_caught(source: str) -> None:
    assert len(upward_imports(source, "midblock.models.load")) == 1


@pytest.mark.parametrize("source", [
    "import torch",
    "from midblock import __version__",
    "from midblock.errors import MidblockError",
    "from midblock.data import load_data",
    "from . import anatomy",
    "from .anatomy import find_anatomy",
    "from midblock import load_model",
])
def test_a_downward_import_is_allowed(source: str) -> None:
    assert upward_imports(source, "midblock.models.load") == []


HEAVY = ("torch", "transformers", "pandas", "numpy", "scipy", "matplotlib", "peft", "trl", "datasets")


@pytest.mark.parametrize("code", ["import midblock", "import midblock.cli.app",
                                  "from midblock.cli.app import run; run(['--help'])",
                                  "from midblock.cli.app import run; run(['inspect', '--help'])"])
def test_the_command_line_imports_nothing_heavy(code: str) -> None:
    check = f"import sys; {code}; print('HEAVY', [m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True,
                          timeout=60)
    assert done.stdout.splitlines()[-1] == "HEAVY []"


@pytest.mark.parametrize("room", ["errors", "segments", "results", "provenance", "progress"])
def test_the_lowest_room_does_not_need_torch(room: str) -> None:
    check = f"import sys; import midblock.{room}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True,
                          timeout=60)
    assert done.stdout.strip() == "False"


# ---------------------------------------------------------------------------------------------
# only `removing` removes, and only `writing` renames into a place

REMOVING = {"unlink", "rmtree", "rmdir", "remove", "removedirs", "replace", "rename", "renames", "move"}
MAY_REMOVE = {"removing.py": {"unlink", "rmtree", "rmdir"}, "writing.py": {"replace"}}


def removals(source: str) -> list[tuple[int, str]]:
    """Line and name of every call that removes a file or puts one in the place of another.

    ``a.replace(b)`` and ``a.rename(b)`` with one plain argument are a path's; those of texts take two, those of frames
    and settings keywords. ``remove`` is the system's only as a function of ``os``: lists have one too.
    """
    found = []
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module in ("os", "shutil"):
            found += [(node.lineno, a.name) for a in node.names if a.name in REMOVING]
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        name, of = node.func.attr, node.func.value
        system = isinstance(of, ast.Name) and of.id in ("os", "shutil")
        path = name in ("unlink", "rmdir") or (
            name in ("replace", "rename") and len(node.args) == 1 and not node.keywords)
        if name in REMOVING and (system or path):
            found.append((node.lineno, name))
    return found


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_nothing_is_removed_but_in_one_place(path: Path) -> None:
    name = path.relative_to(PACKAGE).as_posix()
    found = {(line, call) for line, call in removals(path.read_text(encoding="utf-8"))
             if call not in MAY_REMOVE.get(name, ())}
    assert not found, f"{name} removes files by itself: use midblock.removing or midblock.writing"


@pytest.mark.parametrize("source", [
    "path.unlink()", "Path(p).unlink(missing_ok=True)", "shutil.rmtree(p)", "os.remove(p)", "os.unlink(p)",
    "folder.rmdir()", "os.replace(a, b)", "a.replace(b)", "a.rename(b)", "os.rename(a, b)", "shutil.move(a, b)",
    "from os import unlink", "from shutil import rmtree as gone"])
def test_a_removal_is_seen(source: str) -> None:
    assert len(removals(source)) == 1


@pytest.mark.parametrize("source", [
    "text.replace('a', 'b')", "frame.rename(columns=x)", "settings.replace(seed=1)", "names.remove(x)",
    "replace(found, layers=x)", "remove_named(path)"])
def test_what_removes_no_file_is_not_seen(source: str) -> None:
    assert removals(source) == []
