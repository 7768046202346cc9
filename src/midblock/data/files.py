"""Rows of local files (.jsonl, .json, .csv, .parquet, each also .gz), each with its place."""

from __future__ import annotations

import csv
import gzip
import io
import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

from midblock import extras
from midblock.errors import DataError, SettingsError
from midblock.reading import FILE_LIMIT, lines_of, open_file, parse_json, shortened

__all__ = ["FILE_SUFFIXES", "file_format", "find_split", "read_rows", "splits_in"]

FILE_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
# a CSV cell holds these as JSON
_LIST_FIELDS = ("messages", "conversations", "choices", "turns", "tools")
_WHOLE_LIMIT = 16 * FILE_LIMIT  # bytes of a file that can only be read whole
MAX_ROWS = 2_000_000
"""Rows of one file, unless ``$MIDBLOCK_MAX_ROWS`` says otherwise; all are held, about 1.5 KB each beside their text."""


def _max_rows() -> int:
    given = os.environ.get("MIDBLOCK_MAX_ROWS") or str(MAX_ROWS)
    if not re.fullmatch(r"[0-9]{1,15}", given, re.ASCII) or int(given) < 1:
        raise SettingsError(f"MIDBLOCK_MAX_ROWS={shortened(given)} is not a number of rows; write {MAX_ROWS}.")
    return int(given)


def file_format(path: Path) -> str:
    """``.jsonl``, ``.json``, ``.csv`` or ``.parquet``, seen through a final ``.gz``.

    Raises:
        DataError: any other suffix.
    """
    suffixes = [s.lower() for s in path.suffixes]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
    if suffixes and suffixes[-1] in FILE_SUFFIXES:
        return suffixes[-1]
    raise DataError(f"{path}: the format of this file is not known from its name; "
                    f"use {', '.join(FILE_SUFFIXES)}, each with or without .gz.")


def splits_in(folder: Path) -> dict[str, Path]:
    """Data files of a folder by split name: ``train.jsonl.gz`` is the split ``train``.

    Where a split exists in several formats, the order of `FILE_SUFFIXES` decides, plain
    before compressed.
    """
    found: dict[str, Path] = {}
    for suffix in FILE_SUFFIXES:
        for ending in (suffix, suffix + ".gz"):
            for path in sorted(folder.glob(f"*{ending}")):
                if path.is_file():
                    found.setdefault(path.name[: -len(ending)], path)
    return found


def find_split(folder: Path, split: str) -> Path | None:
    """The file of one split in a folder, or None."""
    return splits_in(folder).get(split) if folder.is_dir() else None


def read_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield ``(where, row)`` for every row of a data file, in order.

    ``where`` is ``file:line`` (the line of the file for .jsonl and .csv, the number of the
    row, from 1, for .json and .parquet). Blank lines are no rows.

    Raises:
        DataError: missing, unreadable, truncated, not UTF-8, not valid JSON or CSV, or a row
            that is no object. The message names file and line. Or more rows than ``$MIDBLOCK_MAX_ROWS``.
        SettingsError: ``$MIDBLOCK_MAX_ROWS`` is no number of rows.
    """
    kind = file_format(path)
    reader = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv, ".parquet": _read_parquet}[kind]
    limit = _max_rows()
    try:
        with open_file(path, error=DataError) as raw, _decompressed(path, raw) as stream:
            for number, row in enumerate(reader(path, stream), start=1):
                if number > limit:
                    raise DataError(f"{path} has more than {limit:,} rows, and all rows are held in memory (about 1.5 "
                                    f"GB for a million, beside their text). Draw some (shuf -n {limit // 2}), or set "
                                    f"MIDBLOCK_MAX_ROWS={10 * limit} where there is memory for so many.")
                yield row
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: the gzip file is truncated or corrupt ({error}); fetch it again.") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); "
                        "convert the file to UTF-8.") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}.") from None


def _decompressed(path: Path, raw: IO[bytes]) -> IO[bytes]:
    return cast(IO[bytes], gzip.GzipFile(fileobj=raw)) if path.suffix.lower() == ".gz" else raw


def _object(where: str, row: object) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise DataError(f"{where}: a row must be an object with named fields, "
                        f"this is a {type(row).__name__}.")
    return {str(key): value for key, value in row.items()}


def _whole(path: Path, stream: IO[bytes]) -> bytes:
    raw = stream.read(_WHOLE_LIMIT + 1)
    if len(raw) > _WHOLE_LIMIT:
        raise DataError(f"{path} holds more than {_WHOLE_LIMIT:,} bytes; write it as .jsonl, which is read by lines.")
    return raw


def _read_jsonl(path: Path, stream: IO[bytes]) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, value in lines_of(stream, path, error=DataError):
        yield f"{path}:{number}", _object(f"{path}:{number}", value)


def _read_json(path: Path, stream: IO[bytes]) -> Iterator[tuple[str, dict[str, Any]]]:
    text = _whole(path, stream).decode("utf-8-sig")
    try:
        value = parse_json(text, where=str(path), error=DataError)
    except DataError as error:
        if "Extra data" not in str(error):
            raise
        # JSON lines under the name .json, as many tools write
        yield from _read_jsonl(path, io.BytesIO(text.encode()))
        return
    if isinstance(value, dict):
        lists = [v for v in value.values() if isinstance(v, list)]
        # {"data": [...]}: one list of objects among the fields; otherwise the object is itself the row
        value = lists[0] if len(lists) == 1 and all(isinstance(r, dict) for r in lists[0]) \
            and not {"messages", "conversations"} & value.keys() else [value]
    if not isinstance(value, list):
        raise DataError(f"{path}: expected a list of objects, found a {type(value).__name__}.")
    for number, row in enumerate(value, start=1):
        where = f"{path}:{number}"
        yield where, _object(where, row)


def _read_csv(path: Path, stream: IO[bytes]) -> Iterator[tuple[str, dict[str, Any]]]:
    csv.field_size_limit(FILE_LIMIT)
    reader = csv.DictReader(_lines(path, stream), strict=True)
    try:
        for row in reader:
            where = f"{path}:{reader.line_num}"
            if None in row:
                raise DataError(f"{where}: this row has more cells than the header "
                                f"({len(reader.fieldnames or ())}); quote cells that contain commas.")
            yield where, {k: _cell(k, v, where) for k, v in row.items() if v is not None}
    except csv.Error as error:
        raise DataError(f"{path}:{reader.line_num}: not valid CSV ({error}).") from None


def _lines(path: Path, stream: IO[bytes]) -> Iterator[str]:
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
    while line := text.readline(FILE_LIMIT + 1):
        if len(line) > FILE_LIMIT:
            raise DataError(f"{path}: a line has more than {FILE_LIMIT:,} characters.")
        yield line


def _cell(name: str, value: str, where: str) -> Any:
    if name in _LIST_FIELDS and value.lstrip().startswith(("[{", "[") if name in ("choices", "turns") else "[{"):
        return parse_json(value, where=f"{where}: the cell {name!r}", error=DataError)
    return value


def _read_parquet(path: Path, stream: IO[bytes]) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ModuleNotFoundError as error:
        raise extras.missing(error, f"{path}: reading .parquet") or error from None
    try:
        source = io.BytesIO(_whole(path, stream)) if path.suffix.lower() == ".gz" else stream
        number = 0
        for batch in parquet.ParquetFile(source).iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield f"{path}:{number}", row
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: not a readable parquet file ({error}).") from None
