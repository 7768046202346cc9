"""The two built-in sources and the seeded views of a text."""

from __future__ import annotations

import re

import pytest

from midblock.data import (
    Dataset,
    Example,
    answer_number,
    augment,
    augment_dataset,
    generate_arithmetic,
    load_data,
)
from midblock.errors import DataError, SettingsError


@pytest.mark.parametrize("steps", [1, 2, 3, 6])
def test_worked_answers_are_right(steps: int) -> None:
    for example in generate_arithmetic(steps, "train", 300):
        row = example.row
        *equations, final = row["answer"].split("\n")
        assert len(equations) == steps == row["steps"]
        value = None
        for equation in equations:
            a, op, b, result = re.fullmatch(r"(\d+) ([-+*/]) (\d+) = (\d+)", equation).groups()  # type: ignore[union-attr]
            assert value is None or str(value) in (a, b)
            # evaluated anew, by Python
            assert eval(f"{a} {op} {b}") == int(result)
            assert 2 <= int(result) <= 200
            value = int(result)
        assert final == f"#### {value}"
        assert row["answer_number"] == value == answer_number(row["answer"])
        assert example.prompt == f"Question: {row['question']}\nAnswer:"
        assert example.completion == f" {row['answer']}"
        assert row["question"].count("?") == 1
        assert row["question"].endswith("?")
        # every number that the answer needs is in the question, or is a times word
        given = [int(n) for n in re.findall(r"\d+", row["question"])]
        words = {"doubles": 2, "twice": 2, "triples": 3, "three times": 3, "four times": 4}
        for word, number in words.items():
            given += [number] * row["question"].count(word)
        assert len(given) == steps + 1


def test_train_and_test_share_no_computation() -> None:
    train, test = load_data("arithmetic:train"), load_data("arithmetic", split="test")
    assert (len(train), len(test)) == (8000, 2000)
    assert {e.row["computation"] for e in train}.isdisjoint(e.row["computation"] for e in test)
    questions = [e.row["question"] for e in (*train, *test)]
    assert len(set(questions)) == len(questions)
    # all four operations and every kind of opening occur, so that guessing one rule does not solve it
    for op in "+-*/":
        assert sum(f" {op} " in e.row["computation"] for e in test) > 50


def test_arithmetic_is_reproducible() -> None:
    first = generate_arithmetic(2, "test", 20, seed=1)
    assert first == generate_arithmetic(2, "test", 20, seed=1)
    assert first != generate_arithmetic(2, "test", 20, seed=2)
    assert first[:5] == generate_arithmetic(2, "test", 5, seed=1)
    assert load_data("arithmetic").examples == load_data("arithmetic@2:test", seed=7).examples
    # a golden value: a change of the generator changes everybody's figures and must be meant
    assert load_data("arithmetic").fingerprint[:16] == "c59909dc6cee9ed8"


def test_arithmetic_bad_specs() -> None:
    for spec in ("arithmetic@0", "arithmetic@9", "arithmetic@hard", "arithmetic@"):
        with pytest.raises(SettingsError, match="steps"):
            load_data(spec)
    with pytest.raises(DataError, match="no split 'dev'"):
        load_data("arithmetic:dev")


def test_pydocs() -> None:
    train, test = load_data("pydocs:train"), load_data("pydocs")
    assert len(train) > 300
    assert len(test) > 60
    assert {e.text for e in train}.isdisjoint(e.text for e in test)
    for example in (*train, *test):
        assert 150 <= len(example.text) <= 1500
        assert "\n" not in example.text
        assert ">>>" not in example.text
    assert load_data("pydocs").fingerprint == test.fingerprint
    with pytest.raises(DataError, match="no split"):
        load_data("pydocs:dev")


TEXT = "The quick brown fox jumps over the lazy sleeping dog near\nthe old stone bridge at night"


def test_augment_is_seeded_and_changes() -> None:
    views = [augment(TEXT, view, 0, drop=0.2, swap=0.2, typo=0.2) for view in range(8)]
    assert views == [augment(TEXT, view, 0, drop=0.2, swap=0.2, typo=0.2) for view in range(8)]
    assert len(set(views)) == 8
    assert augment(TEXT, 0, 1) != augment(TEXT, 0, 2)
    assert augment(TEXT, 0, 0, drop=0, swap=0, typo=0) == TEXT


def test_augment_rates() -> None:
    long = " ".join(f"word{i:04d}" for i in range(4000))
    kept = augment(long, 0, 0, drop=0.3, swap=0, typo=0).split()
    assert 0.66 < len(kept) / 4000 < 0.74  # 0.7 with a standard error of 0.007
    assert kept == sorted(kept)
    swapped = augment(long, 0, 0, drop=0, swap=0.5, typo=0).split()
    assert sorted(swapped) == long.split() != swapped
    assert all(abs(i - int(w[4:])) <= 1 for i, w in enumerate(swapped))
    misspelt = augment(long, 0, 0, drop=0, swap=0, typo=1).split()
    assert [sorted(w) for w in misspelt] == [sorted(w) for w in long.split()]
    assert all(w[0] == "w" for w in misspelt)


def test_augment_edges() -> None:
    assert augment("", 0, 0) == ""
    assert augment("  \n", 0, 0) == "  \n"
    assert augment("one", 0, 0, drop=1.0) == "one"
    assert len(augment("one two three", 0, 0, drop=1.0, typo=0).split()) == 1
    with pytest.raises(SettingsError, match="rate drop"):
        augment("x", 0, 0, drop=1.5)
    with pytest.raises(SettingsError, match="view"):
        augment("x", -1, 0)


def test_augment_dataset_keeps_order_and_places() -> None:
    data = Dataset("d", "all", "here", [Example(TEXT + f" {i}", prompt="p", completion="c", where=f"f:{i}")
                                        for i in range(5)])
    view = augment_dataset(data, 1, 0, drop=0.3)
    assert [e.where for e in view] == [e.where for e in data]
    assert [e.text for e in view] != [e.text for e in data]
    assert all(e.prompt is None for e in view)
    assert view.fingerprint != data.fingerprint
