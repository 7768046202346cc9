"""The family matrix: what is recorded of all families, and some of them run anew."""

from __future__ import annotations

import pytest

import family_matrix
from families import NOT_BUILT, causal_types

RECORDS = family_matrix.read_records()


def test_every_causal_family_of_transformers_has_a_record() -> None:
    assert set(RECORDS) == set(family_matrix.families())
    assert len([r for r in RECORDS.values() if "results" in r]) > 150
    assert set(NOT_BUILT) <= set(causal_types())


@pytest.mark.parametrize("family", [f for f, r in RECORDS.items() if "results" in r])
def test_no_command_ends_in_a_traceback_or_another_number(family: str) -> None:
    results = RECORDS[family]["results"]
    assert set(results) == set(family_matrix.COMMANDS)
    assert not [r for r in results.values() if not (r == "ok" or r.startswith(("refused: ", "off: ")))]


def test_the_page_is_of_the_records() -> None:
    assert family_matrix.PAGE.read_text(encoding="utf-8") == family_matrix.page(RECORDS)


@pytest.mark.slow
@pytest.mark.parametrize("family", [
    "llama", "bamba", "deepseek_v32", "gemma4_text", "llama4_text", "laguna", "t5", "whisper", "zamba"])
def test_a_family_runs_as_recorded(family: str) -> None:
    assert family_matrix.examine(family)["results"] == RECORDS[family]["results"]
