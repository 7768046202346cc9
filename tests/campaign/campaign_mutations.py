"""Seeded damage of every kind of file that a command reads, and values that no option should take."""

from __future__ import annotations

import copy
import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

Mutation = tuple[str, bytes]
"""What was done, and the file's new content."""

NASTY: list[Any] = [
    None,
    True,
    False,
    -1,
    0,
    1,
    10**9,
    2**63,
    10**18,
    -0.5,
    0.0,
    float("nan"),
    float("inf"),
    1e308,
    "",
    "x",
    "4",
    "nan",
    "0",
    "-1",
    "\x1b[31mred",
    "two\nError: forged",
    "\u202eturned",
    "../../etc/passwd",
    "~nosuchuser/x",
    "/dev/zero",
    "a" * 5000,
    "\ud83d",
    [],
    {},
    [[]],
    [None],
    ["x"],
    [0],
    {"a": 1},
    {"": None},
    [1, 2, 3],
    [[1], {"b": 2}],
]
RAW = [
    "9" * 5000,
    "-" + "8" * 400,
    "1e999",
    "[" * 300 + "]" * 300,
    "[" * 5000 + "]" * 5000,
    '{"a":' * 5000 + "1" + "}" * 5000,
    "NaN",
    "Infinity",
    "tru",
    "'x'",
    '"\\ud800"',
    "01",
    "1.",
    "{,}",
]
_MARK = "@@raw@@"


def _paths(value: Any, here: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [here]
    if isinstance(value, dict):
        for key, part in value.items():
            found += _paths(part, (*here, key))
    elif isinstance(value, list):
        for i, part in enumerate(value[:20]):
            found += _paths(part, (*here, i))
    return found


def _at(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


def mutate_value(value: Any, rng: random.Random) -> tuple[str, str]:
    """A JSON value with one part replaced, removed, renamed or doubled; as text."""
    value = copy.deepcopy(value)
    paths = _paths(value)
    path = rng.choice(paths[1:] or paths)
    where = ".".join(map(str, path)) or "all"
    what = rng.choice(("replace", "replace", "replace", "remove", "rename", "raw", "wrap", "double", "type"))
    if not path:
        return f"{where} replaced", json.dumps(rng.choice(NASTY))
    parent, key = _at(value, path[:-1]), path[-1]
    old = parent[key]
    if what == "remove":
        del parent[key]
    elif what == "rename" and isinstance(parent, dict):
        parent[f"{key}x"] = parent.pop(key)
    elif what == "wrap":
        parent[key] = rng.choice(([old], {"value": old}, [old, old], str(old)))
    elif what == "type" and isinstance(old, int | float) and not isinstance(old, bool):
        parent[key] = rng.choice(
            (str(old), [old], old + 0.5, -old, old * 1000 + 7, old + 1, max(0, old - 1), old / 3)
        )
    elif what == "raw":
        parent[key] = _MARK
        raw = rng.choice(RAW)
        return f"{where} = {raw[:20]}", json.dumps(value).replace(f'"{_MARK}"', raw)
    elif what == "double" and isinstance(parent, dict):
        text = json.dumps(value)
        return f"{where} twice", text.replace(
            "{", f"{{{json.dumps(str(key))}: {json.dumps(rng.choice(NASTY[:20]))}, ", 1
        )
    else:
        parent[key] = rng.choice(NASTY)
        return f"{where} = {str(parent[key])[:30]!r}", json.dumps(value)
    return f"{where} {what}", json.dumps(value)


def mutate_bytes(raw: bytes, rng: random.Random) -> Mutation:
    """Damage that any file can suffer."""
    what = rng.choice(
        (
            "cut",
            "cut",
            "empty",
            "flip",
            "flip",
            "zeros",
            "garbage",
            "nul",
            "latin",
            "bom",
            "twice",
            "tail",
            "text",
            "hole",
        )
    )
    at = rng.randrange(max(1, len(raw)))
    if what == "cut":
        return f"cut at {at}", raw[:at]
    if what == "empty":
        return "empty", b""
    if what == "flip" and raw:
        flipped = bytearray(raw)
        flipped[at] ^= 1 << rng.randrange(8)
        return f"bit of byte {at} flipped", bytes(flipped)
    if what == "zeros":
        return "zeros", bytes(len(raw))
    if what == "garbage":
        return "garbage", rng.randbytes(max(16, min(len(raw), 4096)))
    if what == "nul":
        return f"NUL at {at}", raw[:at] + b"\0" + raw[at:]
    if what == "latin":
        return f"not UTF-8 at {at}", raw[:at] + b"\xff\xe9" + raw[at:]
    if what == "bom":
        return "byte order mark", b"\xef\xbb\xbf" + raw
    if what == "twice":
        return "twice", raw + raw
    if what == "tail":
        return "tail", raw + b"]}\n\x1b[31m"
    if what == "hole":
        return f"hole at {at}", raw[:at] + raw[at + 50 :]
    return "text", b"Error: forged\nnothing of the kind\n"


def mutate_json(raw: bytes, rng: random.Random) -> Mutation:
    """A JSON file."""
    if rng.random() < 0.25:
        return mutate_bytes(raw, rng)
    what, text = mutate_value(json.loads(raw), rng)
    return what, text.encode("utf-8", "surrogatepass")


def mutate_jsonl(raw: bytes, rng: random.Random) -> Mutation:
    """A file of JSON lines: one row changed, or many."""
    if rng.random() < 0.2:
        return mutate_bytes(raw, rng)
    lines = raw.decode().splitlines()
    row = rng.randrange(len(lines))
    what, text = mutate_value(json.loads(lines[row]), rng)
    if rng.random() < 0.3:  # all rows alike, so that none is left
        return f"all rows: {what}", (text.replace("\n", " ") + "\n").encode("utf-8", "surrogatepass") * len(lines)
    lines[row] = text
    return f"row {row + 1}: {what}", ("\n".join(lines) + "\n").encode("utf-8", "surrogatepass")


_YAML = [
    "? [a, b]\n: 1\n",
    "!!int x\n",
    "a: &a [*a]\n",
    "&a a: 1\n",
    "<<: 5\n",
    "model: !!python/object:os.system {}\n",
    "- 1\n",
    "5\n",
    "null\n",
    "[" * 3000,
    "x: " * 200,
    "a: {" * 500,
    "model: *nowhere\n",
    "n: " + "9" * 5000 + "\n",
    "\t- x\n",
    "a: b: c\n",
    "? {a: 1}\n: 2\n",
    "!!binary '*'\n",
    "model: 'open\n",
    "%YAML 9\n",
    "l0: &l0 [1,1,1,1,1,1,1,1,1]\n"
    + "".join(f"l{i}: &l{i} [{','.join([f'*l{i - 1}'] * 9)}]\n" for i in range(1, 25)),
]


def mutate_yaml(raw: bytes, rng: random.Random) -> Mutation:
    """A YAML file; JSON is YAML."""
    import yaml

    chance = rng.random()
    if chance < 0.15:
        return mutate_bytes(raw, rng)
    if chance < 0.35:
        extra = rng.choice(_YAML)
        return f"yaml {extra[:25]!r}", raw + extra.encode() if rng.random() < 0.6 else extra.encode()
    what, text = mutate_value(yaml.safe_load(raw), rng)
    return what, text.encode("utf-8", "surrogatepass")


def mutate_csv(raw: bytes, rng: random.Random) -> Mutation:
    """A table."""
    lines = raw.decode().splitlines()
    what = rng.choice(("bytes", "column", "cell", "cell", "header", "short", "long", "quote", "rows", "row"))
    header = lines[0].split(",")
    row = rng.randrange(1, len(lines)) if len(lines) > 1 else 0
    if what == "column":
        gone = rng.randrange(len(header))
        return f"column {header[gone]} removed", "\n".join(
            ",".join(c for i, c in enumerate(x.split(",")) if i != gone) for x in lines
        ).encode()
    if what == "cell":
        cells = lines[row].split(",")
        at = rng.randrange(len(cells))
        cells[at] = str(rng.choice([*NASTY[:28], "01" * 50_000, "9" * 400])).replace("\n", " ")
        lines[row] = ",".join(cells)
        return f"row {row} {header[min(at, len(header) - 1)]} = {cells[at][:20]!r}", "\n".join(lines).encode(
            "utf-8", "surrogatepass"
        )
    if what == "header":
        return "no header", "\n".join(lines[1:]).encode()
    if what == "short":
        lines[row] = lines[row].split(",")[0]
    elif what == "long":
        lines[row] += ",1,2,3,4,5,6,7"
    elif what == "quote":
        lines[row] = '"' + lines[row]
    elif what == "rows":
        return "header only", lines[0].encode()
    elif what == "row":
        lines.append(lines[row])
    else:
        return mutate_bytes(raw, rng)
    return f"row {row} {what}", "\n".join(lines).encode()


def mutate_safetensors(raw: bytes, rng: random.Random) -> Mutation:
    """A file of tensors: the header's entries, its length, the data."""
    length = int.from_bytes(raw[:8], "little")
    header, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    what = rng.choice(
        ("value", "value", "value", "length", "bytes", "data", "offsets", "nan", "dtype", "shape", "name")
    )
    names = [n for n in header if n != "__metadata__"]
    name = rng.choice(names)
    if what == "bytes":
        return mutate_bytes(raw, rng)
    if what == "length":
        value = rng.choice((0, 1, length - 1, length + 1, 2**63, 2**64 - 1, len(raw), 100_000_001))
        return f"length {value}", struct.pack("<Q", value) + raw[8:]
    if what == "nan":
        start, end = header[name]["data_offsets"]
        return f"NaN in {name}", raw[: 8 + length + start] + b"\xff" * (end - start) + raw[8 + length + end :]
    if what == "data":
        return mutate_bytes(raw[8 + length :], rng)[0] + " of the data", raw[: 8 + length] + mutate_bytes(data, rng)[
            1
        ]
    if what == "offsets":
        other = rng.choice(names)
        header[name]["data_offsets"] = rng.choice(
            (
                header[other]["data_offsets"],
                header[name]["data_offsets"][::-1],
                [-8, 8],
                ["0", "8"],
                [0.5, 8.5],
                [0],
                [0, 2**62],
                None,
                "0:8",
                [[0], [8]],
                [True, False],
                {},
            )
        )
        text = json.dumps(header)
    elif what == "dtype":
        header[name]["dtype"] = rng.choice(("I32", "F16", "F64", "BOOL", "X", 5, None, [], "F8_E4M3", "U8", "f32"))
        text = json.dumps(header)
    elif what == "shape":
        header[name]["shape"] = rng.choice(
            ([], [0], [-1, 4], ["4", "8"], [1e3, 2], [2**40, 2**40], None, "4x8", [[4]], 7)
        )
        text = json.dumps(header)
    elif what == "name":
        header[rng.choice(("x", "", "a" * 5000, "\x1b[31m", "model.layers.99.mlp.up_proj.weight", name + ".0"))] = (
            header.pop(name)
        )
        text = json.dumps(header)
    else:
        what, text = mutate_value(header, rng)
    packed = text.encode("utf-8", "surrogatepass")
    packed += b" " * (-len(packed) % 8)
    return f"header: {what} ({name})", struct.pack("<Q", len(packed)) + packed + data


KINDS: dict[str, Callable[[bytes, random.Random], Mutation]] = {
    ".json": mutate_json,
    ".jsonl": mutate_jsonl,
    ".yaml": mutate_yaml,
    ".csv": mutate_csv,
    ".safetensors": mutate_safetensors,
}


def damage(path: Path, rng: random.Random) -> str:
    """Damage a file in its place; returns what was done."""
    chance = rng.random()
    raw = path.read_bytes()
    if chance < 0.02:
        path.unlink()
        return "missing"
    if chance < 0.04:
        path.unlink()
        path.mkdir()
        return "a folder"
    if chance < 0.055:
        import os

        path.unlink()
        os.mkfifo(path)
        return "a pipe"
    if chance < 0.07:
        path.unlink()
        path.symlink_to(rng.choice(("/dev/zero", str(path), "/proc/self/mem", "/nowhere")))
        return f"a link to {path.readlink()}"
    what, content = KINDS.get(path.suffix, mutate_bytes)(raw, rng)
    path.unlink()  # the file may be shared with the untouched copy
    path.write_bytes(content)
    return what


OPTIONS = [
    "-1",
    "0",
    "1",
    "2",
    "0.5",
    "-0.0",
    "nan",
    "inf",
    "-inf",
    "1e308",
    "1e-320",
    "1e9",
    "4294967296",
    "9" * 30,
    "9" * 5000,
    "",
    " ",
    "x",
    "01100",
    "2",
    "00000",
    "11111",
    "9" * 100,
    "0" * 100_001,
    "1" * 1001,
    "[]",
    "{}",
    "null",
    "1,2",
    "1,,2",
    "a:b",
    "8-2",
    "0-99",
    "~nosuchuser/x",
    "/dev/null",
    "/dev/zero",
    "/proc/self/mem",
    "/",
    "..",
    "a" * 300,
    "a/" * 2500,
    "\x1b[31m\nError: forged",
    "\u202ex",
    "ünï",
    "--help",
    "nosuch",
    "disk:/dev/null/x",
    "disk:~nosuchuser/x",
    "hf:x:y:z:w",
    "99999G",
    "0.0001",
    "5%",
    "1e3",
    "0x10",
    "²",
    "١",
    "1_000",
    "True",
    "none",
]
