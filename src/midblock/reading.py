"""The one place where text from outside becomes values: paths, JSON, JSON lines, YAML, CSV tables.

Whatever a file holds, a caller gets a value of the kind that it asked for or one `MidblockError` that names
the file, what was found in it and what to do. Files are limited in size, values in depth, number and digits,
so that no input makes the program hang, run out of memory, or end inside a library. Pipes and devices are
refused: a reader of them may never end.

What midblock writes itself carries a digest (`sealed`); `read_sealed` refuses a file that was changed since.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import stat
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from io import BufferedReader
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar

from midblock.errors import MidblockError

if TYPE_CHECKING:
    import pandas as pd
    from pydantic import BaseModel

__all__ = ["FILE_LIMIT", "MAX_DEPTH", "MAX_DIGITS", "check_value", "file_digest", "lines_of", "open_file", "parse_json",
           "parse_yaml", "printable", "read_csv", "read_json", "read_jsonl", "read_sealed", "read_text", "read_yaml",
           "sealed", "shortened", "user_path", "validated"]

FILE_LIMIT = 64 * 2**20
"""Bytes of a file that is read whole, and of a line of one that is read by lines."""
YAML_LIMIT = 2**20
"""Bytes of a YAML file: its reader takes seconds for each megabyte."""
MAX_DEPTH = 100
"""Lists and objects inside each other."""
MAX_DIGITS = 300
"""Digits of a whole number; the largest float has 309."""
MAX_VALUES = 5_000_000
"""Values of one file; references let a small YAML file stand for any number of them."""

_SHOWN = 5  # faults of one file that a message names

Fault = type[MidblockError]
Model = TypeVar("Model", bound="BaseModel")


# ---------------------------------------------------------------------------------------------
# showing


def printable(text: str, *, lines: bool = False) -> str:
    r"""Text from outside as a terminal may show it: what would move, hide or forge text is written as an escape.

    That is control characters and escape sequences, marks that turn the direction of writing, separators of
    lines and paragraphs, and halves of surrogate pairs.

    Args:
        text: Any text.
        lines: Keep newlines and tabs.

    Example:
        >>> printable("a\x1b[31mred\nError: forged")
        'a\\x1b[31mred\\nError: forged'
    """
    if text.isprintable():
        return text
    return "".join(c.encode("unicode_escape").decode() if _hidden(c) and not (lines and c in "\n\t") else c
                   for c in text)


def _hidden(character: str) -> bool:
    # the joiners of emoji and of Indic scripts neither move nor forge anything
    return character not in "\u200c\u200d" and unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp")


def shortened(text: str, limit: int = 80) -> str:
    """``text`` printable on one line, its middle left out where it has more than ``limit`` characters."""
    if len(text) > limit:
        text = f"{text[:limit // 2]}...{text[-(limit // 2 - 3):]}"
    return printable(text)


# ---------------------------------------------------------------------------------------------
# files


def user_path(path: str | os.PathLike[str], *, error: Fault = MidblockError) -> Path:
    """A path as a user wrote it, with ``~`` and ``~name`` replaced.

    Raises:
        MidblockError: (of the kind ``error``) it holds a NUL, is not UTF-8, is too long for any system, or
            names a user that there is not.
    """
    text = os.fspath(path)
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise error(f"{printable(text)} is not a name in UTF-8; rename the file.") from None
    if "\0" in text:
        raise error(f"{printable(text)} is not a path: it holds a NUL character.")
    if size >= 4096 or any(len(part.encode()) > 255 for part in text.split("/")):
        raise error(f"{shortened(text)} is too long for a path ({size:,} bytes; 255 between two slashes).")
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise error(f"{printable(text)}: there is no user {text.split('/')[0][1:]!r} here; write the folder out.") \
            from None


def open_file(path: Path, *, error: Fault = MidblockError) -> BufferedReader:
    """A regular file, opened for reading.

    Raises:
        MidblockError: it is missing, not a regular file, or cannot be opened.
    """
    try:
        found = path.stat()
        if stat.S_ISDIR(found.st_mode):
            raise error(f"{path} is a folder, where a file was expected.")
        if not stat.S_ISREG(found.st_mode):
            raise error(f"{path} is not a regular file (a pipe or a device); write its content into a file.")
        return path.open("rb")
    except FileNotFoundError:
        raise error(f"{path}: there is no such file.") from None
    except (OSError, ValueError) as fault:
        raise error(f"{shortened(str(path))} cannot be read: {getattr(fault, 'strerror', None) or fault}.") from None


def file_digest(path: Path, *, error: Fault = MidblockError) -> str:
    """SHA-256 of a regular file's content, as hex.

    Raises:
        MidblockError: it is missing, not a regular file, or cannot be read.
    """
    with open_file(path, error=error) as stream:
        try:
            return hashlib.file_digest(stream, "sha256").hexdigest()
        except OSError as fault:
            raise error(f"{path} cannot be read: {fault.strerror or fault}.") from None


def read_text(path: Path, *, limit: int = FILE_LIMIT, error: Fault = MidblockError) -> str:
    """A whole file of UTF-8 text, with or without a byte order mark.

    Raises:
        MidblockError: it cannot be read, has more than ``limit`` bytes, or is not UTF-8.
    """
    try:
        with open_file(path, error=error) as stream:
            # read() makes room for all that it may read, however short the file is
            raw = stream.read(min(limit, os.fstat(stream.fileno()).st_size) + 1)
    except OSError as fault:
        raise error(f"{path} cannot be read: {fault.strerror or fault}.") from None
    if len(raw) > limit:
        raise error(f"{path} has more than {limit:,} bytes, too many for a file of this kind.")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as fault:
        raise error(f"{path} is not UTF-8 text ({fault.reason} at byte {fault.start}).") from None


# ---------------------------------------------------------------------------------------------
# JSON


def parse_json(text: str, *, where: str, error: Fault = MidblockError) -> Any:
    """The value of a JSON text.

    Args:
        text: The text.
        where: Its place (``file`` or ``file:line``), for messages.
        error: Kind of the error.

    Raises:
        MidblockError: not JSON, nested deeper than `MAX_DEPTH`, or with a number of more than `MAX_DIGITS` digits.
    """
    try:
        # every number goes through a function only where one of them may be too long
        long_number = len(text) > MAX_DIGITS and _LONG.search(text) is not None
        value = json.loads(text, parse_int=_whole) if long_number else json.loads(text)
    except json.JSONDecodeError as fault:
        raise error(f"{where} is not valid JSON: {fault.msg} (line {fault.lineno}, column {fault.colno}).") from None
    except ValueError as fault:
        raise error(f"{where} is not valid JSON: {fault}.") from None
    except RecursionError:
        raise error(f"{where} is nested too deeply; at most {MAX_DEPTH} levels are read.") from None
    if text.count("[") + text.count("{") > MAX_DEPTH:
        check_value(value, where=where, error=error)
    return value


_LONG = re.compile(rf"\d{{{MAX_DIGITS + 1}}}")


def _whole(digits: str) -> int:
    if len(digits.lstrip("-")) > MAX_DIGITS:
        raise ValueError(f"it holds a number of {len(digits):,} digits, more than {MAX_DIGITS}")
    return int(digits)


def check_value(value: Any, *, where: str, error: Fault = MidblockError) -> None:
    """Refuse a value that is nested too deeply or that has too many parts.

    Raises:
        MidblockError: more than `MAX_DEPTH` levels, more than `MAX_VALUES` values.
    """
    level, depth, seen = [value], 0, 0
    while level:
        depth += 1
        seen += len(level)
        if depth > MAX_DEPTH:
            raise error(f"{where} is nested too deeply; at most {MAX_DEPTH} levels are read.")
        if seen > MAX_VALUES:
            raise error(f"{where} stands for more than {MAX_VALUES:,} values.")
        level = [part for v in level if isinstance(v, dict | list)
                 for part in (v.values() if isinstance(v, dict) else v)]


def read_json(path: Path, *, kind: type | tuple[type, ...] = dict, limit: int = FILE_LIMIT,
              error: Fault = MidblockError) -> Any:
    """The value of a JSON file.

    Args:
        path: The file.
        kind: What it must hold: ``dict`` (the default), ``list``, or ``object`` for anything.
        limit: Its largest size in bytes.
        error: Kind of the error.

    Raises:
        MidblockError: it cannot be read, is not JSON within the limits, or holds something else.
    """
    value = parse_json(read_text(path, limit=limit, error=error), where=str(path), error=error)
    if not isinstance(value, kind):
        wanted = " or ".join(_KINDS.get(k, k.__name__) for k in (kind if isinstance(kind, tuple) else (kind,)))
        raise error(f"{path} holds {_KINDS.get(type(value), 'something else')}, where {wanted} was expected.")
    _check_text(value, str(path), error)
    return value


_KINDS = {dict: "an object", list: "a list", str: "a text", int: "a number", float: "a number", bool: "a yes or no",
          type(None): "null"}


def _check_text(value: Any, where: str, error: Fault) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise error(f"{where} holds half of a surrogate pair, which is not text; write the character whole.") from None


def read_jsonl(path: Path, *, error: Fault = MidblockError) -> Iterator[tuple[int, Any]]:
    """Line number and value of every line of a file of JSON lines; blank lines are passed over.

    Raises:
        MidblockError: it cannot be read; a line is not UTF-8, not JSON within the limits, or too long.
    """
    with open_file(path, error=error) as stream:
        yield from lines_of(stream, path, error=error)


def lines_of(stream: IO[bytes], path: Path, *, error: Fault = MidblockError) -> Iterator[tuple[int, Any]]:
    """As `read_jsonl`, from an open stream (a decompressed one, say)."""
    number = 0
    while raw := _line(stream, path, error):
        number += 1
        if len(raw) > FILE_LIMIT:
            raise error(f"{path}:{number}: the line has more than {FILE_LIMIT:,} bytes; one line is one object.")
        try:
            line = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
        except UnicodeDecodeError as fault:
            raise error(f"{path}:{number} is not UTF-8 text ({fault.reason}); convert the file to UTF-8.") from None
        if line:
            yield number, parse_json(line, where=f"{path}:{number}", error=error)


def _line(stream: IO[bytes], path: Path, error: Fault) -> bytes:
    try:
        return stream.readline(FILE_LIMIT + 1)
    except gzip.BadGzipFile:
        raise
    except OSError as fault:
        raise error(f"{path} cannot be read: {fault.strerror or fault}.") from None


# ---------------------------------------------------------------------------------------------
# YAML


def parse_yaml(text: str, *, where: str, error: Fault = MidblockError) -> Any:
    """The value of a YAML text as people write configurations.

    Masks stay text (YAML 1.1 reads ``01100`` as an octal number), ``5e-4`` is a number, dates stay text, and a
    key may stand only once.

    Raises:
        MidblockError: not YAML, or beyond the limits of depth, values, digits.

    Example:
        >>> parse_yaml("{mask: 01100, rate: 5e-4, n: 100}", where="here")
        {'mask': '01100', 'rate': 0.0005, 'n': 100}
    """
    import yaml

    try:
        value = yaml.load(text, Loader=_yaml_loader())
    except yaml.YAMLError as fault:
        raise error(f"{where} is not YAML: {' '.join(str(fault).split())}.") from None
    except RecursionError:
        raise error(f"{where} is nested too deeply; at most {MAX_DEPTH} levels are read.") from None
    # what the constructors of single values end with on a text that is none of their kind (`!!int x`)
    except (ValueError, TypeError, LookupError, ArithmeticError, AttributeError) as fault:
        raise error(f"{where} is not YAML that can be read: {shortened(str(fault))}.") from None
    check_value(value, where=where, error=error)
    _check_text(value, where, error)
    return value


def read_yaml(path: Path, *, error: Fault = MidblockError) -> Any:
    """The value of a YAML file (`parse_yaml`).

    Raises:
        MidblockError: it cannot be read, has more than 1 MiB, or is not YAML within the limits.
    """
    return parse_yaml(read_text(path, limit=YAML_LIMIT, error=error), where=str(path), error=error)


@cache
def _yaml_loader() -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        """YAML 1.1 without octal numbers and dates, with powers of ten, and with each key once."""

    changed = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float", "tag:yaml.org,2002:timestamp")
    Loader.yaml_implicit_resolvers = {
        k: [r for r in v if r[0] not in changed] for k, v in yaml.SafeLoader.yaml_implicit_resolvers.items()}
    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:int", re.compile(r"^[-+]?(?:0|[1-9][0-9_]*)$"), list("-+0123456789"))
    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(?:[0-9][0-9_]*\.[0-9]*(?:[eE][-+]?[0-9]+)?|\.[0-9]+(?:[eE][-+]?[0-9]+)?"
                   r"|[0-9][0-9_]*[eE][-+]?[0-9]+)$"), list("-+0123456789."))

    def mapping(loader: Loader, node: yaml.MappingNode, deep: bool = False) -> dict[str, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a word", key_node.start_mark)
            if key_node.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key_node.value!r} occurs twice", key_node.start_mark)
            seen.add(key_node.value)
        return {key if isinstance(key, str) else str(key): value
                for key, value in yaml.SafeLoader.construct_mapping(loader, node, deep=True).items()}

    def whole(loader: Loader, node: yaml.ScalarNode) -> int:
        return _whole(str(loader.construct_scalar(node)).replace("_", "").removeprefix("+"))

    # dates, sets, binary and ordered maps are no values of a configuration
    plain = {f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float", "str", "seq", "map")}
    Loader.yaml_constructors = {tag: make for tag, make in yaml.SafeLoader.yaml_constructors.items()
                                if tag in plain or tag is None}
    Loader.add_constructor("tag:yaml.org,2002:map", mapping)
    Loader.add_constructor("tag:yaml.org,2002:int", whole)
    return Loader


# ---------------------------------------------------------------------------------------------
# tables


def read_csv(path: Path, *, columns: Sequence[str] = (), numbers: Sequence[str] = (), text: Sequence[str] = (),
             error: Fault = MidblockError) -> pd.DataFrame:
    """A CSV table with a header.

    Args:
        path: The file.
        columns: Columns that must be there.
        numbers: Columns whose cells must be numbers or empty, where they are there.
        text: Columns that are kept as text (masks such as 01000), where they are there.
        error: Kind of the error.

    Raises:
        MidblockError: it cannot be read, is not CSV, lacks a column, or a number is none.
    """
    import io

    import pandas as pd

    content = read_text(path, limit=16 * FILE_LIMIT, error=error)
    try:
        frame = pd.read_csv(io.StringIO(content), dtype=dict.fromkeys(text, str), low_memory=False)
    except (ValueError, OverflowError, RecursionError) as fault:  # ParserError and EmptyDataError are ValueErrors
        raise error(f"{path} is not a table: {shortened(str(fault), 200)}.") from None
    if missing := [c for c in columns if c not in frame.columns]:
        raise error(f"{path} has no column {missing[0]!r}; it is not the table that was expected here.")
    for name in numbers:
        if name in frame.columns and not pd.api.types.is_numeric_dtype(frame[name]):
            converted = pd.to_numeric(frame[name], errors="coerce")
            wrong = frame[name][converted.isna() & frame[name].notna()]
            if len(wrong):
                raise error(f"{path}: row {wrong.index[0] + 2} has {shortened(str(wrong.iloc[0]))!r} in the column "
                            f"{name!r}, where a number was expected.")
            frame[name] = converted
    return frame


# ---------------------------------------------------------------------------------------------
# what midblock wrote itself

_SEAL = "digest"


def sealed(value: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a JSON object with the SHA-256 of its content under ``digest``.

    Args:
        value: Plain JSON values only (`midblock.results.json_ready`).
    """
    content = {key: part for key, part in value.items() if key != _SEAL}
    return {**content, _SEAL: _digest_of(content)}


def _digest_of(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, allow_nan=False).encode()).hexdigest()


def read_sealed(path: Path, *, advice: str, limit: int = 16 * FILE_LIMIT,
                error: Fault = MidblockError) -> dict[str, Any]:
    """A JSON object that was written with `sealed`.

    Args:
        path: The file.
        advice: What to do where it was changed, as the end of a sentence (``repeat the run``).
        limit: Its largest size in bytes.
        error: Kind of the error.

    Raises:
        MidblockError: it cannot be read, has no digest, or was changed since it was written.
    """
    value: dict[str, Any] = read_json(path, limit=limit, error=error)
    digest = value.pop(_SEAL, None)
    if not isinstance(digest, str):
        raise error(f"{path} carries no digest, so midblock did not write it; {advice}.")
    try:
        fits = digest == _digest_of(value)
    except ValueError:  # it holds NaN, which midblock never writes
        fits = False
    if not fits:
        raise error(f"{path} was changed after midblock wrote it (its digest does not fit); {advice}.")
    return value


def validated(model: type[Model], value: Any, *, where: str, error: Fault = MidblockError) -> Model:
    """``value`` as an instance of a pydantic model.

    Raises:
        MidblockError: it does not fit; every fault is named by its key.
    """
    from pydantic import ValidationError

    from midblock.settings.base import faults_of

    try:
        return model.model_validate(value)
    except ValidationError as fault:
        faults = faults_of(fault, unknown="key")
        more = [f"and {len(faults) - _SHOWN} more"] if len(faults) > _SHOWN else []
        raise error(f"{where} cannot be used: {'; '.join([*faults[:_SHOWN], *more])}.") from None
