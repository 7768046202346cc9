"""`load_data`: from a spec on the command line to examples.

| spec | rows |
|---|---|
| ``gsm8k``, ``gsm8k:train`` | a data set of `DATASETS`, with or without a split |
| ``arithmetic``, ``arithmetic@3``, ``arithmetic@3:train`` | generated, N steps (default 2) |
| ``pydocs``, ``pydocs:train`` | built in |
| ``rows.jsonl``, ``rows.csv.gz``, ``rows.jsonl:test`` | a file; ``:train``/``:test`` take one part of it |
| ``folder``, ``folder:train`` | a folder with ``train.jsonl``, ``test.csv.gz`` ... |
| ``hf:NAME``, ``hf:NAME:SPLIT``, ``hf:NAME:CONFIG:SPLIT`` | the Hugging Face hub or its cache |

Named data sets are looked for in ``$MIDBLOCK_DATA/NAME/SPLIT.jsonl[.gz]`` first (and the other
file formats), then on the hub. A name that is in no list but is a folder of
``$MIDBLOCK_DATA`` works as well.
"""

from __future__ import annotations

import difflib
import logging
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from midblock import extras
from midblock.data.arithmetic import DEFAULT_STEPS, MAX_STEPS, arithmetic_examples
from midblock.data.examples import Dataset, Example
from midblock.data.files import FILE_SUFFIXES, file_format, find_split, read_rows, splits_in
from midblock.data.formats import BadRowError, MissingFieldError, format_row
from midblock.data.pydocs import pydocs_examples
from midblock.data.registry import DATASETS, DatasetInfo
from midblock.errors import DataError, SettingsError
from midblock.reading import user_path

__all__ = ["load_data"]

_LOG = logging.getLogger("midblock")

_PARTS = ("train", "test")
_HUB_SPLITS = ("train", "test", "validation", "valid", "val", "dev", "auxiliary_train", "all")
_FILE = re.compile(
    rf"(?P<path>.+(?:{'|'.join(re.escape(s) for s in FILE_SUFFIXES)})(?:\.gz)?)(?::(?P<split>\w+))?", re.I)
_NAMED = re.compile(r"(?P<name>[\w.-]+?)(?:@(?P<option>[^:]*))?(?::(?P<split>[\w.-]+))?")


def load_data(spec: str | os.PathLike[str], *, split: str | None = None, samples: int | None = None,
              seed: int = 0) -> Dataset:
    """Examples of a data set.

    Args:
        spec: See the table of this module.
        split: The split to use where the spec names none: ``train`` for tuning, ``test`` (the
            default) for measuring. A split in the spec wins. A single file has no splits: all
            of it is used unless its spec ends in ``:train`` or ``:test`` (parts of about 4 to 1
            by content, that share no prompt).
        samples: How many rows, drawn without replacement (`Dataset.sample`); None takes all.
        seed: Of that draw. Generated problems do not depend on it.

    Raises:
        DataError: nothing found under the spec, no such split, a file that cannot be read, a
            row without any needed field (file and line), no usable row at all.
        SettingsError: ``samples`` is not positive, or a difficulty that does not exist.

    Example:
        >>> data = load_data("arithmetic@1:test", samples=2, seed=0)
        >>> len(data), data.split, data.examples[0].row["steps"]
        (2, 'test', 1)
    """
    if samples is not None and (isinstance(samples, bool) or not isinstance(samples, int) or samples < 1):
        raise SettingsError(f"{samples!r} samples were asked for; ask for 1 or more.")
    text = os.fspath(spec).strip()
    if not text:
        raise DataError("the data spec is empty; name a data set (such as gsm8k or arithmetic) or a file.")
    return replace(_resolve(text, split), spec=text).sample(samples, seed)


def _resolve(text: str, split: str | None) -> Dataset:
    if text.startswith("hf:"):
        return _from_hub_spec(text, split)
    named = _NAMED.fullmatch(text)
    if named and named["name"].lower() in DATASETS:
        info = DATASETS[named["name"].lower()]
        wanted = named["split"] or split or "test"
        if named["option"] is not None and info.name != "arithmetic":
            raise SettingsError(f"data {text!r}: {info.name} takes no option after '@'; "
                                "only arithmetic@N has one.")
        if info.name == "arithmetic":
            return _arithmetic(text, named["option"], wanted)
        if info.name == "pydocs":
            _check_part(text, wanted)
            return Dataset("pydocs", wanted, "built in", pydocs_examples(wanted))
        return _named(info, wanted)
    file = _FILE.fullmatch(text)
    if file and (file["split"] or not user_path(text, error=DataError).is_dir()):
        return _from_file(user_path(file["path"], error=DataError), file["split"])
    return _from_folder(text, split)


# ---------------------------------------------------------------- built in

def _check_part(text: str, split: str) -> None:
    if split not in _PARTS:
        raise DataError(f"data {text!r}: there is no split {split!r}; it has train and test.")


def _arithmetic(text: str, option: str | None, split: str) -> Dataset:
    _check_part(text, split)
    if option is not None and not option.isdecimal():
        raise SettingsError(f"data {text!r}: {option!r} is no number of steps; write arithmetic@N with "
                            f"N from 1 to {MAX_STEPS}.")
    steps = DEFAULT_STEPS if option is None else int(option)
    return Dataset("arithmetic" if option is None else f"arithmetic@{steps}", split, "built in",
                   arithmetic_examples(split, steps))


# ---------------------------------------------------------------- files

def _data_root() -> Path | None:
    given = os.environ.get("MIDBLOCK_DATA")
    if not given:
        return None
    root = user_path(given, error=DataError)
    if not root.is_dir():
        raise DataError(f"MIDBLOCK_DATA={given} is not a folder; set it to the folder that holds "
                        "NAME/SPLIT.jsonl, or unset it.")
    return root


def _from_file(path: Path, part: str | None) -> Dataset:
    file_format(path)
    if part is not None:
        _check_part(f"{path}:{part}", part)
    name = path.name.split(".")[0]
    data = _dataset(name, "all", str(path), read_rows(path), "generic", 1, "all")
    return data if part is None else data.part(part)


def _from_folder(text: str, split: str | None) -> Dataset:
    folder, wanted = user_path(text, error=DataError), split or "test"
    if not folder.is_dir() and ":" in text:
        head, _, wanted = text.rpartition(":")
        folder = user_path(head, error=DataError)
    root = _data_root()
    if not folder.is_dir() and root is not None and (root / folder).is_dir():
        folder = root / folder
    if not folder.is_dir():
        raise _unknown(text, root)
    splits = splits_in(folder)
    if wanted not in splits:
        has = f"has {', '.join(sorted(splits))}" if splits else "holds no data file"
        raise DataError(f"{folder}: there is no split {wanted!r}; the folder {has}. Name a split that "
                        f"is there ({folder}:SPLIT), or a file.")
    return _dataset(folder.name, wanted, str(splits[wanted]), read_rows(splits[wanted]), "generic", 1, "all")


def _unknown(text: str, root: Path | None) -> DataError:
    close = difflib.get_close_matches(re.split("[:@]", text)[0].lower(), DATASETS, n=1)
    hint = f" Did you mean {close[0]}?" if close else ""
    tried = f", here or in MIDBLOCK_DATA={root}" if root is not None else ""
    return DataError(f"data {text!r} is neither a known data set nor a file or folder{tried}.{hint} Known: "
                     f"{', '.join(DATASETS)}; files end in {', '.join(FILE_SUFFIXES)} (also .gz); "
                     "hf:NAME reads the Hugging Face hub.")


def _dataset(name: str, split: str, source: str, rows: Iterable[tuple[str, dict[str, Any]]], kind: str,
             min_chars: int, part: str) -> Dataset:
    """Format all rows; ``part`` train or test keeps that part of the rows' contents, ``all`` everything."""
    examples: list[Example] = []
    skipped: list[tuple[str, str]] = []
    for where, row in rows:
        try:
            examples.append(format_row(row, where, kind, min_chars))
        except BadRowError as error:
            skipped.append((where, str(error)))
        except MissingFieldError as error:
            raise DataError(f"{where}: {error}.") from None
    if not examples:
        why = (f"all {len(skipped)} rows are unusable, the first ({skipped[0][0]}) because "
               f"{skipped[0][1]}" if skipped else "it has no rows")
        raise DataError(f"{source}: the data set is empty: {why}.")
    data = Dataset(name, split, source, examples, skipped)
    for told in data.odd_rows():
        _LOG.warning("%s.", told)
    return data if part == "all" else data.part(part)


# ---------------------------------------------------------------- named data sets and the hub

def _named(info: DatasetInfo, wanted: str) -> Dataset:
    root = _data_root()
    local: set[str] = set()
    for folder in (root / name for name in info.folders) if root is not None else ():
        if path := find_split(folder, wanted):
            return _dataset(info.name, wanted, str(path), read_rows(path), info.name, info.min_chars, "all")
        if info.partition_of and wanted in _PARTS and (path := find_split(folder, info.partition_of)):
            return _dataset(info.name, wanted, f"{path} (content-hashed {wanted} part)", read_rows(path),
                            info.name, info.min_chars, wanted)
        local |= set(splits_in(folder)) if folder.is_dir() else set()
    hub = info.hub_splits.get(wanted)
    found = (f"MIDBLOCK_DATA={root} holds " + (f"its splits {', '.join(sorted(local))} only" if local
             else "no such data set")) if root is not None else "MIDBLOCK_DATA is not set"
    if hub is None or info.hub is None:
        offered = sorted({*local, *info.hub_splits, *(_PARTS if info.partition_of in local else ())})
        raise DataError(f"{info.name} has no split {wanted!r}; it has {', '.join(offered)} "
                        f"(write {info.name}:{offered[0]}); {found}.")
    hint = (f"{found}; put the file at MIDBLOCK_DATA/{info.folders[0]}/{wanted}.jsonl, or connect to the "
            "hub once to fill its cache")
    rows = _hub_rows(info.hub, info.hub_config, hub.name, hint)
    source = ":".join(("hf", info.hub, info.hub_config or "", hub.name))
    if hub.partition:
        source += f" (content-hashed {wanted} part)"
    return _dataset(info.name, wanted, source, rows, info.name, info.min_chars,
                    wanted if hub.partition else "all")


def _from_hub_spec(text: str, split: str | None) -> Dataset:
    name, *rest = text.removeprefix("hf:").split(":")
    if not name or len(rest) > 2:
        raise DataError(f"data {text!r}: write hf:NAME, hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT.")
    config: str | None = None
    wanted = split or "test"
    if len(rest) == 2:
        config, wanted = rest[0] or None, rest[1] or wanted
    elif rest and rest[0] in _HUB_SPLITS:
        wanted = rest[0]
    elif rest:
        config = rest[0] or None
    rows = _hub_rows(name, config, wanted, "use a local file instead, or connect to the hub once to fill "
                                           "its cache")
    return _dataset(name.rpartition("/")[2], wanted, ":".join(("hf", name, config or "", wanted)), rows,
                    "generic", 1, "all")


def _hub_rows(name: str, config: str | None, split: str, hint: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of a split on the hub, or in the cache of an earlier download."""
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise extras.missing(error, f"hf:{name}") or error from None
    try:
        loaded = datasets.load_dataset(name, config, split=split)
    # OSError: no network, offline mode, unknown or private repository. ValueError: unknown config or
    # split. DatasetsError: files that the library cannot read.
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        what = ":".join(("hf", name, *([config] if config else []), split))
        raise DataError(f"{what} cannot be loaded from the Hugging Face hub ({reason}); {hint}.") from None
    return ((f"hf:{name}:{split}:{number}", dict(row)) for number, row in enumerate(loaded, start=1))
