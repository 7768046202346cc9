"""Whatever stands in a file: a value of the kind that was asked for, or one clear error, quickly."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from midblock import reading
from midblock.errors import DataError, MidblockError, SettingsError
from midblock.results import json_ready

NESTED = [("[", "]"), ('{"a":', "}")]


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="a file that opens and cannot be read is Linux's")
def test_a_file_that_opens_and_cannot_be_read_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/proc/self/mem")
    for read in (reading.read_text, reading.file_digest, reading.read_json, lambda p: [*reading.read_jsonl(p)],
                 reading.read_yaml, reading.read_csv):
        with pytest.raises(MidblockError, match="link cannot be read: Input/output error"):
            read(tmp_path / "link")


@pytest.mark.parametrize("levels", [101, 5_000, 100_000])
@pytest.mark.parametrize(("opened", "closed"), NESTED)
def test_deep_nesting_is_refused_in_words(tmp_path: Path, levels: int, opened: str, closed: str) -> None:
    path = tmp_path / "deep.json"
    path.write_text(opened * levels + "1" + closed * levels)
    for read in (reading.read_json, reading.read_yaml):
        began = time.process_time()
        with pytest.raises(MidblockError, match=r"deep\.json is nested too deeply|deep\.json has more than"):
            read(path)
        assert time.process_time() - began < 10


@pytest.mark.parametrize(("opened", "closed"), NESTED)
def test_nesting_within_the_limit_is_read(tmp_path: Path, opened: str, closed: str) -> None:
    path = tmp_path / "fine.json"
    path.write_text(opened * 90 + "1" + closed * 90)
    value = reading.read_json(path, kind=object)
    assert value == reading.read_yaml(path)
    depth = 0
    while not isinstance(value, int):
        value, depth = (value[0] if isinstance(value, list) else value["a"]), depth + 1
    assert depth == 90


@pytest.mark.parametrize("digits", [301, 4_400, 5_000])
@pytest.mark.parametrize("sign", ["", "-"])
def test_long_numbers_are_refused(tmp_path: Path, digits: int, sign: str) -> None:
    for name, read in (("n.json", reading.read_json), ("n.yaml", reading.read_yaml)):
        (tmp_path / name).write_text(f'{{"a": {sign}{"7" * digits}}}')
        with pytest.raises(MidblockError, match="digits"):
            read(tmp_path / name)


def test_numbers_within_the_limit_are_exact(tmp_path: Path) -> None:
    (tmp_path / "n.json").write_text('{"a": -' + "7" * 300 + ', "b": 0.5}')
    assert reading.read_json(tmp_path / "n.json") == {"a": -int("7" * 300), "b": 0.5}
    assert reading.read_yaml(tmp_path / "n.json") == {"a": -int("7" * 300), "b": 0.5}
    assert float(-int("7" * 300)) == pytest.approx(-7.0 / 9 * 10**300)


@pytest.mark.parametrize("text", [
    "? [a, b]\n: 1", "? {a: 1}\n: 2", "!!int x", "!!int ''", "!!float x", "!!bool maybe", "!!timestamp x",
    "!!binary '*'", "!!python/object:os.system {}", "&a [*a]", "a: 1\na: 2", "[1", "\x00", "a: !!int 0x",
    "!!int " + "9" * 5000, "<<: 5", "<<: [1]", "a: *nowhere", "'\\ud83d'", '"\\ud83d"', "%YAML 9.9\n---\na: 1"])
def test_strange_yaml_is_a_value_or_one_error(text: str) -> None:
    fault = ""
    try:
        value = reading.parse_yaml(text, where="config.yaml", error=DataError)
        json.dumps(value, ensure_ascii=False).encode()
    except DataError as error:
        fault = str(error)
    assert fault == "" or (fault.startswith("config.yaml ") and len(fault.splitlines()) == 1)


def test_references_that_multiply_are_refused_quickly() -> None:
    lines = ["a0: &a0 [1,1,1,1,1,1,1,1,1,1]"] + [
        f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 30)]
    with pytest.raises(MidblockError, match="stands for more than"):
        reading.parse_yaml("\n".join(lines), where="bomb.yaml")


def test_yaml_keeps_what_people_mean() -> None:
    text = "mask: 01100\nrate: 5e-4\nn: 1_000\nday: 2026-11-25\n1: one\nx: &b {k: 1}\ny: {<<: *b, m: 2}"
    assert reading.parse_yaml(text, where="w") == {
        "mask": "01100", "rate": 5e-4, "n": 1000, "day": "2026-11-25", "1": "one", "x": {"k": 1}, "y": {"k": 1, "m": 2}}


@pytest.mark.parametrize("text", ["", "{", "[]", "5", "null", "nul", '"a"', "{} {}", "\ufeff[", "{'a': 1}"])
def test_json_of_another_kind_names_the_file(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=r"x\.json (is not valid JSON|holds .* where an object was expected)"):
        reading.read_json(path, error=DataError)


def test_what_is_not_a_readable_file_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, words in ((tmp_path / "pipe", "not a regular file"), (Path("/dev/zero"), "not a regular file"),
                        (tmp_path, "is a folder"), (tmp_path / "no", "no such file"),
                        (tmp_path / ("x" * 300), "cannot be read"), (tmp_path / "x" / "y", "no such file")):
        with pytest.raises(MidblockError, match=words):
            reading.read_json(path)
    (tmp_path / "big").write_bytes(b" " * 1001)
    with pytest.raises(MidblockError, match="more than 1,000 bytes"):
        reading.read_text(tmp_path / "big", limit=1000)
    (tmp_path / "latin").write_bytes("é".encode("latin-1"))
    with pytest.raises(MidblockError, match="not UTF-8"):
        reading.read_text(tmp_path / "latin")


@pytest.mark.parametrize("path", ["a\0b", "x" * 300, "a/" * 3000, "~nosuchuser/x", "bad\udcff.jsonl"])
def test_paths_that_no_system_takes(path: str) -> None:
    with pytest.raises(SettingsError) as caught:
        reading.user_path(path, error=SettingsError)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 300


def test_home_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert reading.user_path("~/x") == tmp_path / "x"
    assert reading.user_path(Path("plain")) == Path("plain")


def test_jsonl_names_the_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text('\ufeff{"a": 1}\n\n[2]\n{"a": \n', encoding="utf-8")
    rows = reading.read_jsonl(path)
    assert [next(rows), next(rows)] == [(1, {"a": 1}), (3, [2])]
    with pytest.raises(MidblockError, match=r"r\.jsonl:4 is not valid JSON"):
        next(rows)
    monkeypatch.setattr(reading, "FILE_LIMIT", 50)
    path.write_text('{"a": 1}\n"' + "x" * 60 + '"\n')
    with pytest.raises(MidblockError, match=r"r\.jsonl:2: the line has more than 50 bytes"):
        list(reading.read_jsonl(path))


@pytest.mark.parametrize(("text", "words"), [
    ("", "not a table"), ("a,b\n1,2\n", "no column 'value'"), ("value,layer\nx,1\n", "row 2 has 'x'"),
    ("value,layer\n1,1\n2,1,3,4\n", "not a table"), ('value,layer\n"1,1\n', "not a table"),
    ("value,layer\n1,1\n,2\n1e5x,3\n", "row 4 has '1e5x'")])
def test_tables(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "table.csv").write_text(text)
    with pytest.raises(MidblockError, match=words):
        reading.read_csv(tmp_path / "table.csv", columns=["value"], numbers=["value"], text=["layer"])


def test_a_table_keeps_masks_and_empty_cells(tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_text("value,layer\n1.5,01000\n,3\n")
    frame = reading.read_csv(tmp_path / "table.csv", columns=["value"], numbers=["value", "n"], text=["layer", "mask"])
    assert frame["layer"].tolist() == ["01000", "3"]
    assert frame["value"].isna().tolist() == [False, True]


@pytest.mark.parametrize("text", ["a\x1b[31m", "a\nError: b", "\x07", "\x9b31m", "\u202eabc", "\u2066x", "a\u2028b",
                                  "\r", "\ud83d", "\u200fx", "\x7f", "\ufeff", "\U000e0041"])
def test_nothing_hidden_reaches_a_terminal(text: str) -> None:
    shown = reading.printable(text)
    assert shown.isprintable()
    assert shown.encode().decode() == shown
    assert "\\" in shown


@pytest.mark.parametrize("text", ["plain", "naïve 模型 עברית", "👩‍👩‍👧", "a b"])
def test_text_is_shown_as_it_is(text: str) -> None:
    assert reading.printable(text) == text


@settings(deadline=None)
@given(st.text(st.characters()))
def test_printable_is_idempotent_and_safe(text: str) -> None:
    shown = reading.printable(text)
    assert reading.printable(shown) == shown
    assert not any(ord(c) < 32 or 127 <= ord(c) < 160 for c in shown)
    assert reading.printable(text, lines=True).count("\n") == text.count("\n")


words = st.text(st.characters(codec="utf-8"))
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | words,
    lambda parts: st.lists(parts) | st.dictionaries(words, parts), max_leaves=20)


@settings(deadline=None, max_examples=50)
@given(st.dictionaries(words.filter(lambda k: k != "digest"), json_values))
def test_a_sealed_file_is_read_back(tmp_path_factory: pytest.TempPathFactory, value: dict[str, object]) -> None:
    path = tmp_path_factory.mktemp("sealed") / "run.json"
    path.write_text(json.dumps(reading.sealed(json_ready(value)), indent=1))
    assert reading.read_sealed(path, advice="repeat the run") == value


@pytest.mark.parametrize("change", [
    lambda v: v.update(score=0.9), lambda v: v.pop("score"), lambda v: v.update(more=1), lambda v: v.pop("digest"),
    lambda v: v.update(digest=5), lambda v: v.update(digest=[]), lambda v: v.update(score=float("nan")),
    lambda v: v["items"].reverse()])
def test_an_edited_file_is_refused(tmp_path: Path, change) -> None:
    value = reading.sealed({"score": 0.25, "items": [1, 2], "name": "x"})
    path = tmp_path / "result.json"
    change(value)
    path.write_text(json.dumps(value))
    with pytest.raises(MidblockError, match=r"result\.json (was changed after|carries no digest).*; repeat the run\."):
        reading.read_sealed(path, advice="repeat the run")


def test_faults_of_a_model_are_named_by_key() -> None:
    class Size(BaseModel):
        heads: int
        width: int

    message = r"c\.json cannot be used: heads must be a whole number, got 'x'; width is missing"
    with pytest.raises(DataError, match=message):
        reading.validated(Size, {"heads": "x"}, where="c.json", error=DataError)


def test_reading_needs_no_heavy_package() -> None:
    import subprocess

    code = ("import sys, midblock.reading; "
            "print([m for m in ('pandas', 'yaml', 'pydantic', 'torch') if m in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


def test_a_digest_is_taken_of_regular_files_only(tmp_path: Path) -> None:
    import hashlib
    import os

    plain = tmp_path / "plain"
    plain.write_bytes(b"content" * 1000)
    assert reading.file_digest(plain) == hashlib.sha256(b"content" * 1000).hexdigest()
    (tmp_path / "endless").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("endless", "pipe", "folder", "absent"):
        with pytest.raises(DataError, match=name):
            reading.file_digest(tmp_path / name, error=DataError)
