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


USER, REPLY = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
CALL = {"type": "function", "function": {"name": "w", "arguments": {"a": 1}}}


@pytest.mark.parametrize(("row", "messages"), [
    ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}, [USER, REPLY]),
    ({"conversations": [USER, REPLY]}, [USER, REPLY]),
    ({"conversation": [{"from": "user", "value": "Hi"}, {"from": "assistant", "value": "Hello"}]}, [USER, REPLY]),
    ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}], "system": "be kind"},
     [{"role": "system", "content": "be kind"}, USER, REPLY]),
    ({"conversations": [{"from": "human", "value": "Hi"},
                        {"from": "function_call", "value": '{"name": "w", "arguments": {"a": 1}}'},
                        {"from": "observation", "value": "72F"}, {"from": "gpt", "value": "Hello"}]},
     [USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}, {"role": "tool", "content": "72F"}, REPLY]),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]}, REPLY]},
     [USER, REPLY]),
    ({"messages": [{**USER, "name": None, "tool_calls": None},
                   {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning_content": "why"}]},
     [USER, {"role": "assistant", "content": "", "tool_calls": [CALL], "reasoning_content": "why"}]),
    ({"prompt": [USER], "response": "Hello"}, [USER, REPLY]), ({"prompt": "Hi", "completion": [REPLY]}, [USER, REPLY]),
    ({"prompt": [USER]}, [USER]),
])
def test_conversations_as_people_write_them(tmp_path: Path, row: dict, messages: list[dict]) -> None:
    example, = load_data(write(tmp_path / "a.jsonl", lines([row])))
    assert list(example.messages) == messages
    assert example.given == (0 if "prompt" not in row or len(messages) == 1 else 1)


@pytest.mark.parametrize("name", ["response", "answer", "output", "target", "solution", "completion"])
def test_a_prompt_and_its_answer_by_any_name(tmp_path: Path, name: str) -> None:
    example, = load_data(write(tmp_path / "a.jsonl", lines([{"prompt": "2+2?", name: "4", "source": "x"}])))
    assert (example.prompt, example.completion, example.text) == ("2+2?", "4", "2+2?4")


def test_tools_as_text_are_read(tmp_path: Path) -> None:
    row = {"messages": [USER, REPLY], "tools": '[{"type": "function", "function": {"name": "w"}}]'}
    example, = load_data(write(tmp_path / "a.jsonl", lines([row])))
    assert example.row["tools"] == [{"type": "function", "function": {"name": "w"}}]


@pytest.mark.parametrize(("row", "why"), [
    ({"messages": [{"role": "user", "content": [{"type": "image", "image": "x"}]}, REPLY]},
     "a part of the type 'image'"),
    ({"messages": [{"role": "user", "content": 5}]}, "its content is a int"),
    ({"messages": [{"role": "user"}]}, "needs a role"), ({"messages": ["Hi"]}, "message 1 is not an object"),
    ({"messages": [{"role": ["user"], "content": "x"}]}, "needs a role"),
    ({"messages": [USER, REPLY], "tools": "[{"}, "'tools' is not valid JSON"),
    ({"messages": [USER, REPLY], "tools": 5}, "'tools' is not a list"),
    ({"conversations": [{"from": "function_call", "value": "w(1)"}]}, "the function call of message 1"),
    ({"conversations": [{"from": "function_call", "value": "[]"}]}, "needs a name and arguments"),
    ({"prompt": [USER], "completion": {}}, "'completion' is not a list of messages"),
    ({"prompt": ["Hi"], "completion": [REPLY]}, "message 1 is not an object"),
    ({"text": "nice \ud83d"}, "half of a surrogate pair"), ({"prompt": "\udc00", "completion": "x"}, "half of a"),
    ({"messages": [{"role": "user", "content": "\ud83d"}]}, "half of a surrogate pair"),
    ({"text": "fine", "note": "\udfff"}, "half of a surrogate pair"),
    ({"question": "q", "choices": ["a", "b"], "answer": "9" * 5000}, "is not the index"),
    ({"prompt": "p", "answer": 4}, "'answer' is a int"),
])
def test_rows_that_cannot_be_used_are_named(tmp_path: Path, row: dict, why: str) -> None:
    data = load_data(write(tmp_path / "a.jsonl", lines([row, {"text": "fine words"}])))
    assert [e.text for e in data] == ["fine words"]
    assert data.skipped[0][0].endswith("a.jsonl:1")
    assert why in data.skipped[0][1]


@pytest.mark.parametrize(("answer", "number"), [
    ("x = 5\n#### $x=$", None), ("#### $1,018", 1018), ("#### -3.5", -3.5), ("#### ", None), ("#### $", None),
    ("#### " + "9" * 5000, None), ("#### -$7", -7), ("#### 1\n#### two", 1)])
def test_final_numbers(tmp_path: Path, answer: str, number: float | None) -> None:
    example, = load_data(write(tmp_path / "a.jsonl", lines([{"question": "q", "answer": answer}])))
    assert example.row.get("answer_number") == number


def test_a_surrogate_deep_in_a_row_stops_nothing(tmp_path: Path) -> None:
    data = load_data(write(tmp_path / "a.jsonl", lines([{"text": "fine", "more": {"deep": ["\ud83d"]}}])))
    assert len(data) == 1
    assert len(data.fingerprint) == 64


def test_files_that_would_fill_the_memory_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from midblock import reading
    from midblock.data import files

    for limit in (reading, files):
        monkeypatch.setattr(limit, "FILE_LIMIT", 1000)
    monkeypatch.setattr(files, "_WHOLE_LIMIT", 5000)
    monkeypatch.setenv("MIDBLOCK_MAX_ROWS", "10")
    long = "x" * 20_000
    for name, text, words in (("a.jsonl", f'{{"text": "{long}"}}\n', "more than 1,000 bytes"),
                              ("a.jsonl.gz", f'{{"text": "{long}"}}\n', "more than 1,000 bytes"),
                              ("a.json", f'[{{"text": "{long}"}}]', "more than 5,000 bytes"),
                              ("a.json.gz", f'[{{"text": "{long}"}}]', "more than 5,000 bytes"),
                              ("a.csv", f"text\n{long}\n", "more than 1,000 characters"),
                              ("a.csv.gz", f"text\n{long}\n", "more than 1,000 characters"),
                              ("b.jsonl", lines([{"text": "x"}] * 11), "more than 10 rows")):
        with pytest.raises(DataError, match=words):
            load_data(write(tmp_path / name, text))
    assert len(load_data(write(tmp_path / "c.jsonl", lines([{"text": "x"}] * 10)))) == 10
    monkeypatch.setenv("MIDBLOCK_MAX_ROWS", "11")
    assert len(load_data(tmp_path / "b.jsonl")) == 11
    for wrong in ("0", "-1", "x", "1e3", "9" * 400):
        monkeypatch.setenv("MIDBLOCK_MAX_ROWS", wrong)
        with pytest.raises(SettingsError, match="is not a number of rows"):
            load_data(tmp_path / "b.jsonl")


def test_what_is_not_a_file(tmp_path: Path, no_data: None) -> None:
    import os

    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "folder.jsonl").mkdir()
    for spec in (str(tmp_path / "pipe.jsonl"), f"{tmp_path / 'folder.jsonl'}:train", "x" * 300 + ".jsonl",
                 "~nosuchuser/a.jsonl", "a\0b.jsonl", "\udcff.jsonl", "~nosuchuser", "x" * 5000):
        with pytest.raises(DataError) as caught:
            load_data(spec)
        assert len(str(caught.value)) < 6000


def test_a_single_json_object_is_one_row(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "Hi"}]
    example, = load_data(write(tmp_path / "a.json", json.dumps({"messages": turns})))
    assert example.messages == tuple(turns)


@pytest.mark.parametrize(("name", "content", "message"), [
    ("a.jsonl", '{"text": "one"}\n{"text": \n', r"a\.jsonl:2 is not valid JSON"),
    ("a.jsonl", '{"text": "one"}\n["two"]\n', r"a\.jsonl:2: a row must be an object"),
    ("a.jsonl", '{"text": "one"}\n{"body": "two"}\n',
     r"a\.jsonl:2: no field that can be used \(it has body\)"),
    ("a.jsonl", '{"text": null}\n', r"a\.jsonl:1: no field"),
    ("a.jsonl", b'{"text": "one"}\n{"text": "\xff"}\n', r"a\.jsonl:2 is not UTF-8"),
    ("a.jsonl", "", r"a\.jsonl: the data set is empty: it has no rows"),
    ("a.jsonl", '{"text": "  "}\n{"text": 3}\n', r"all 2 rows are unusable.*a\.jsonl:1.*'text' is empty"),
    ("a.json", "[{]", r"a\.json is not valid JSON: .* \(line 1, column 3\)"),
    ("a.json", '"words"', r"a\.json: expected a list of objects"),
    ("a.json", b'{"text": "\xff"}', r"a\.json: not UTF-8"),
    ("a.csv", "text\none,two\n", r"a\.csv:2: this row has more cells than the header"),
    ("a.csv", 'text\n"one" x\n', r"a\.csv:\d: not valid CSV"),
    ("a.csv", "messages\n[{1;2]\n", r"a\.csv:2: the cell 'messages' is not valid JSON"),
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


def test_odd_rows_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pair = {"prompt": "p", "completion": "c"}
    load_data(write(tmp_path / "a.jsonl", lines([pair, pair, {"prompt": "p"}, {"prompt": "p", "completion": 5}])))
    assert f"1 rows of a were left out (first: {tmp_path / 'a.jsonl'}:4: 'completion' is a int, not text)." \
        in caplog.text
    assert f"1 rows of a have a prompt and no completion (first: {tmp_path / 'a.jsonl'}:3), unlike the others" \
        in caplog.text
    caplog.clear()
    load_data(write(tmp_path / "b.jsonl", lines([pair, {"text": "t"}])))
    load_data(write(tmp_path / "c.jsonl", lines([{"prompt": "p"}, {"prompt": "q"}])))
    assert not caplog.text


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
    assert "8 rows of a were left out" in data.note
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
