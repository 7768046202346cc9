"""Local files: every format, every way a file or a row can be wrong."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from midblock.data import load_data
from midblock.errors import DataError, SettingsError

ROWS = [{"prompt": f"What is {i} plus {i}?", "completion": f" It is {2 * i}."} for i in range(1, 7)]


def write(path: Path, text: str | bytes) -> Path:
    raw = text.encode() if isinstance(text, str) else text
    if path.suffix == ".gz":
        raw = gzip.compress(raw)
    path.write_bytes(raw)
    return path


def lines(rows: list[dict]) -> str:
    return "".join(json.dumps(r) + "\n" for r in rows)


def as_csv(rows: list[dict]) -> str:
    return "prompt,completion\n" + "".join(f'"{r["prompt"]}","{r["completion"]}"\n' for r in rows)


@pytest.mark.parametrize(("name", "text"), [
    ("a.jsonl", lines(ROWS)), ("a.jsonl.gz", lines(ROWS)), ("a.json", json.dumps(ROWS)),
    ("a.json.gz", json.dumps({"version": "1", "data": ROWS})), ("a.json", lines(ROWS)),
    ("a.csv", as_csv(ROWS)), ("a.csv.gz", "\ufeff" + as_csv(ROWS)), ("a.jsonl", "\ufeff" + lines(ROWS)),
    ("a.jsonl", "\n" + lines(ROWS).replace("\n", "\r\n\r\n"))])
def test_formats_give_the_same_examples(tmp_path: Path, name: str, text: str) -> None:
    data = load_data(str(write(tmp_path / name, text)))
    assert [(e.prompt, e.completion) for e in data] == [(r["prompt"], r["completion"]) for r in ROWS]
    assert [e.text for e in data] == [r["prompt"] + r["completion"] for r in ROWS]
    assert (data.name, data.split) == ("a", "all")
    assert data.examples[0].where.startswith(str(tmp_path / name) + ":")
    assert data.fingerprint == load_data(str(write(tmp_path / "b.jsonl", lines(ROWS)))).fingerprint


@pytest.mark.parametrize("name", ["a.parquet", "a.parquet.gz"])
def test_parquet(tmp_path: Path, name: str) -> None:
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    plain = tmp_path / "plain.parquet"
    pandas.DataFrame(ROWS).to_parquet(plain)
    path = write(tmp_path / name, plain.read_bytes())
    data = load_data(path)
    assert [e.prompt for e in data] == [r["prompt"] for r in ROWS]
    assert data.examples[2].where == f"{path}:3"
    with pytest.raises(DataError, match=r"bad\.parquet: not a readable parquet"):
        load_data(write(tmp_path / "bad.parquet", b"PAR1 nothing here"))


def test_place_counts_lines_of_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", "\n\n" + lines(ROWS[:1]) + "\n" + lines(ROWS[1:2]))
    assert [e.where for e in load_data(path)] == [f"{path}:3", f"{path}:5"]


@pytest.mark.parametrize(("row", "text", "prompt", "completion"), [
    ({"text": "plain words"}, "plain words", None, None),
    ({"question": "2+2?", "answer": "4"}, "Question: 2+2?\nAnswer: 4", "Question: 2+2?\nAnswer:", " 4"),
    ({"instruction": "Say hi", "context": "", "response": "hi"}, "Instruction: Say hi\nResponse: hi",
     "Instruction: Say hi\nResponse:", " hi"),
    ({"instruction": "Sum up", "input": "Long.", "output": "Short."},
     "Instruction: Sum up\nContext: Long.\nResponse: Short.",
     "Instruction: Sum up\nContext: Long.\nResponse:", " Short."),
    ({"turns": ["first", "second"]}, "first", "first", None),
    ({"prompt": "only this"}, "only this", "only this", None),
    ({"question": "Pick", "choices": ["x", "y"], "answer": "B"}, "Question: Pick\nA) x B) y\nAnswer: B",
     "Question: Pick\nA) x B) y\nAnswer:", " B"),
])
def test_fields_decide_the_format(tmp_path: Path, row: dict, text: str, prompt: str | None,
                                  completion: str | None) -> None:
    example, = load_data(write(tmp_path / "a.jsonl", lines([row])))
    assert (example.text, example.prompt, example.completion) == (text, prompt, completion)
    assert set(row) <= set(example.row)


def test_messages_in_both_forms(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    rows = [{"messages": turns}, {"prompt": turns[:1], "completion": turns[1:]}]
    first, second = load_data(write(tmp_path / "a.jsonl", lines(rows)))
    assert first.messages == second.messages == tuple(turns)
    assert first.text == "User: Hi\nAssistant: Hello"
    assert first.prompt is None


def test_a_single_json_object_is_one_row(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "Hi"}]
    example, = load_data(write(tmp_path / "a.json", json.dumps({"messages": turns})))
    assert example.messages == tuple(turns)


@pytest.mark.parametrize(("name", "content", "message"), [
    ("a.jsonl", '{"text": "one"}\n{"text": \n', r"a\.jsonl:2: not valid JSON"),
    ("a.jsonl", '{"text": "one"}\n["two"]\n', r"a\.jsonl:2: a row must be an object"),
    ("a.jsonl", '{"text": "one"}\n{"body": "two"}\n',
     r"a\.jsonl:2: no field that can be used \(it has body\)"),
    ("a.jsonl", '{"text": null}\n', r"a\.jsonl:1: no field"),
    ("a.jsonl", b'{"text": "one"}\n{"text": "\xff"}\n', r"a\.jsonl:2: not UTF-8"),
    ("a.jsonl", "", r"a\.jsonl: the data set is empty: it has no rows"),
    ("a.jsonl", '{"text": "  "}\n{"text": 3}\n', r"all 2 rows are unusable.*a\.jsonl:1.*'text' is empty"),
    ("a.json", "[{]", r"a\.json:1: not valid JSON"),
    ("a.json", '"words"', r"a\.json: expected a list of objects"),
    ("a.json", b'{"text": "\xff"}', r"a\.json: not UTF-8"),
    ("a.csv", "text\none,two\n", r"a\.csv:2: this row has more cells than the header"),
    ("a.csv", 'text\n"one" x\n', r"a\.csv:\d: not valid CSV"),
    ("a.csv", "messages\n[1;2]\n", r"a\.csv:2: the cell 'messages' is not valid JSON"),
    ("a.csv", "words\none\n", r"a\.csv:2: no field"),
    ("a.csv", b"text\n\xff\xff\n", r"a\.csv: not UTF-8"),
    ("a.txt", "words", "neither a known data set nor a file"),
])
def test_bad_files(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_data(str(write(tmp_path / name, content)))


def test_truncated_and_false_gzip(tmp_path: Path) -> None:
    whole = gzip.compress(lines(ROWS * 50).encode())
    wrong = (whole[:-20], whole[: len(whole) // 2], b"no gzip at all", whole[:10] + b"x" * 40)
    for number, raw in enumerate(wrong):
        path = tmp_path / f"cut{number}.jsonl.gz"
        path.write_bytes(raw)
        with pytest.raises(DataError, match=rf"cut{number}\.jsonl\.gz: the gzip file is truncated"):
            load_data(path)


def test_missing_file_and_empty_spec(tmp_path: Path, no_data: None) -> None:
    with pytest.raises(DataError, match=r"absent\.jsonl: there is no such file"):
        load_data(tmp_path / "absent.jsonl")
    with pytest.raises(DataError, match="empty"):
        load_data("  ")
    with pytest.raises(DataError, match=r"Did you mean gsm8k\?"):
        load_data("gsm9k")


def test_malformed_rows_are_named_and_counted(tmp_path: Path) -> None:
    rows = [{"text": "fine words"}, {"text": ""}, {"text": ["no"]}, {"prompt": "p", "completion": ""},
            {"messages": [{"role": "robot", "content": "x"}]}, {"messages": []},
            {"question": "q", "choices": ["one"], "answer": 0},
            {"question": "q", "choices": ["one", "two"], "answer": 2}, {"turns": []}, {"text": "more words"}]
    path = write(tmp_path / "a.jsonl", lines(rows))
    data = load_data(path)
    assert [e.text for e in data] == ["fine words", "more words"]
    assert [where for where, _ in data.skipped] == [f"{path}:{n}" for n in range(2, 10)]
    assert all(reason for _, reason in data.skipped)
    assert "8 rows of a skipped" in data.note
    assert data.describe()["skipped"] == 8


def test_parts_of_one_file_share_no_prompt(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{i % 60}", "completion": f" c{i}"} for i in range(180)]
    path = write(tmp_path / "a.jsonl", lines(rows))
    train, test = load_data(f"{path}:train"), load_data(f"{path}:test")
    assert {e.prompt for e in train}.isdisjoint(e.prompt for e in test)
    assert len(train) + len(test) == 180
    assert 0 < len(test) < len(train)
    assert load_data(path, split="train").split == "all"  # a file has no splits unless its spec asks
    with pytest.raises(DataError, match="no split 'dev'"):
        load_data(f"{path}:dev")
    one = write(tmp_path / "one.jsonl", lines(rows[:1]))
    with pytest.raises(DataError, match="part is empty"):
        load_data(one).hold_out()


def test_folder_of_splits(tmp_path: Path, no_data: None) -> None:
    write(tmp_path / "train.jsonl.gz", lines(ROWS[:4]))
    write(tmp_path / "test.csv", as_csv(ROWS[4:]))
    assert len(load_data(tmp_path)) == 2
    assert len(load_data(tmp_path, split="train")) == 4
    assert load_data(f"{tmp_path}:train", split="test").split == "train"
    with pytest.raises(DataError, match=r"no split 'dev'; the folder has test, train"):
        load_data(f"{tmp_path}:dev")


def test_sampling(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", lines([{"text": f"text {i}"} for i in range(40)]))
    draw = load_data(path, samples=10, seed=3)
    load_data(path, samples=7, seed=1)
    assert draw.examples == load_data(path, samples=10, seed=3).examples
    assert len({e.text for e in draw}) == 10
    assert draw.examples[:4] == load_data(path, samples=4, seed=3).examples
    assert draw.examples != load_data(path, samples=10, seed=4).examples
    assert draw.fingerprint != load_data(path).fingerprint
    assert draw.note == ""
    everything = load_data(path, samples=99, seed=0)
    assert (len(everything), everything.requested, everything.available) == (40, 99, 40)
    assert "99 samples were asked for" in everything.note
    for wrong in (0, -1, 2.5, True):
        with pytest.raises(SettingsError, match="samples"):
            load_data(path, samples=wrong)
