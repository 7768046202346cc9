"""Whether a command that ended well on a damaged input took it silently.

Each command is run once on the undamaged world (`make_references`). A case that ends with exit code 0 is then silent
where its result differs, nothing was said, and the damaged file is not a valid other input: a row that was changed to
another text is one, a row without its text is not. What midblock wrote itself is never a valid other input, so there
the result must be the equal one, whatever was said; only a report,
figures and a study may leave a run out that they name.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import math
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from campaign_cycles import differences
from campaign_world import CACHE, COMMANDS, Case

WRITTEN = ("out", "saved", "stopped", "runs", "report.html", CACHE, "rows")
"""What commands may write."""
_OWN = ("runs/", "stopped/", "rows/", f"{CACHE}/")
_SHOWN = ("inspect", "pairs", "report")  # commands whose result is what they print
_DATA = ("d.jsonl", "d.json", "d.csv", "d.parquet", "d.jsonl.gz", "chat.jsonl", "samples_a.jsonl", "samples_b.jsonl")


def make_references(world: Path, folder: Path) -> None:
    """Run every command on the undamaged world; each must end with exit code 0."""
    for number, (command, _) in enumerate(COMMANDS):
        place = folder / str(number)
        shutil.copytree(world, place)
        code, out, err = run_in(place, command.split())
        assert code == 0, (command, out, err)
        (place / "stdout").write_text(out)
        (place / "stderr").write_text(err)


def run_in(place: Path, words: list[str]) -> tuple[int | None, str, str]:
    """Exit code (None: an exception), stdout and stderr of a command that runs in a folder."""
    import traceback

    from midblock.cli.app import run

    out, err = io.StringIO(), io.StringIO()
    kept, environment = Path.cwd(), dict(os.environ)
    code: int | None = None
    os.chdir(place)
    os.environ["MIDBLOCK_CACHE"] = str(place / CACHE)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = run(words)
    except BaseException:
        err.write(traceback.format_exc())
    finally:
        os.chdir(kept)
        os.environ.clear()
        os.environ.update(environment)
    return code, out.getvalue(), err.getvalue()


def taken_silently(case: Case, place: Path, out: str, err: str, reference: Path) -> str:
    """What is wrong with a result of exit code 0; empty where nothing is.

    Args:
        case: The case.
        place: Its world afterwards.
        out: What was printed.
        err: What was said.
        reference: The world after the same command on undamaged files, with ``stdout`` and ``stderr``.
    """
    if case.target is None:
        return ""
    changed = _changes(case, place, out, reference)
    said = _new_lines(err, reference / "stderr") + _new_lines(out, reference / "stdout")
    if not changed:
        return ""
    if case.target.startswith(_OWN) and not (said and case.words[0] in ("report", "figures", "study")):
        return f"other result: {changed}"
    if said or _is_valid(place / case.target, reference / case.target):
        return ""
    return f"silent: {changed}"


def _changes(case: Case, place: Path, out: str, reference: Path) -> str:
    if case.words[0] in _SHOWN or "--dry-run" in case.words:
        return ", ".join(_new_lines(out, reference / "stdout")[:1])
    folder = case.words[case.words.index("--out") + 1]
    found = differences(reference / folder, place / folder)
    if (reference / "saved").exists():
        found += differences(reference / "saved", place / "saved")
    return ", ".join(found[:2])


def _new_lines(text: str, known: Path) -> list[str]:
    def plain(lines: Iterable[str]) -> list[str]:
        return [re.sub(r"\d+(\.\d+)?(e[-+]\d+)?", "#", line).strip() for line in lines]

    before = {*plain(known.read_text().splitlines())}
    return [line for line, form in zip(text.splitlines(), plain(text.splitlines()), strict=True)
            if form and form not in before]


def _is_valid(path: Path, original: Path) -> bool:
    """Whether a damaged input of the user's is a valid other one."""
    if not path.is_file() or path.is_symlink():
        return False
    try:
        if path.name in _DATA:
            rows = _rows(path)
            return all(_is_row(row, path.name) for row in rows) or all(_is_prompt(row) for row in rows)
        if path.suffix == ".safetensors":
            return _tensors(path) == _tensors(original)
        return _alike(json.loads(path.read_bytes()), json.loads(original.read_bytes()))
    except (ValueError, OSError, RecursionError, EOFError):
        return False


def _rows(path: Path) -> list[Any]:
    raw = path.read_bytes()
    if path.suffix == ".gz":
        import gzip

        raw = gzip.decompress(raw)
    if path.suffix == ".parquet":
        import pandas as pd

        return list(pd.read_parquet(path).to_dict("records"))
    if path.suffix == ".csv":
        return list(csv.DictReader(io.StringIO(raw.decode("utf-8-sig"))))
    if path.suffix == ".json":
        value = json.loads(raw.decode("utf-8-sig"))
        return value if isinstance(value, list) else [None]
    return [json.loads(line) for line in raw.decode("utf-8-sig").splitlines() if line.strip()]


def _is_row(row: Any, name: str) -> bool:
    if not isinstance(row, dict):
        return False
    if name.startswith("samples"):
        return isinstance(row.get("acc"), int | float) and math.isfinite(row["acc"]) and "doc_id" in row
    if name == "chat.jsonl":
        turns = row.get("messages")
        return isinstance(turns, list) and len(turns) > 1 and all(
            isinstance(t, dict) and t.get("role") in ("system", "user", "assistant", "tool")
            and _is_content(t.get("content")) for t in turns)
    return all(isinstance(row.get(k), str) and row[k].strip() for k in ("prompt", "completion"))


def _is_prompt(row: Any) -> bool:
    return isinstance(row, dict) and row.get("completion") is None and isinstance(row.get("prompt"), str)


def _is_content(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(part, str) for part in value))


def _tensors(path: Path) -> dict[str, Any]:
    import torch
    from safetensors.torch import load_file

    found = load_file(path)
    if not all(bool(torch.isfinite(t).all()) for t in found.values()):
        raise ValueError("not finite")
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in found.items()}


def _alike(value: Any, original: Any) -> bool:
    """Whether a value has the types of another; fields may be missing (defaults) and new ones are not looked at."""
    if isinstance(value, dict) and isinstance(original, dict):
        return all(_alike(value[k], original[k]) for k in original if k in value)
    if isinstance(value, list) and isinstance(original, list):
        return not original or all(_alike(part, original[0]) for part in value)
    number = (int, float)
    if isinstance(value, bool) or isinstance(original, bool):
        return isinstance(value, bool) and isinstance(original, bool)
    if isinstance(value, number) and isinstance(original, number):
        return math.isfinite(value) and (isinstance(value, int) or isinstance(original, float))
    return type(value) is type(original) or value is None or original is None
