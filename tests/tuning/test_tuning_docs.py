"""The snippets of docs/tuning.md run as they stand."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from families import FAMILIES
from midblock.models import load_model, save_checkpoint
from midblock.tuning import TrainResult

PAGE = Path(__file__).resolve().parents[2] / "docs" / "tuning.md"
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


def snippets() -> list[str]:
    return re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.fixture
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("_in_a_folder")
def test_the_snippet_for_trl(tiny_tokenizer: Any, capsys: pytest.CaptureFixture[str]) -> None:
    from datasets import Dataset

    code = snippets()[0].replace('SFTConfig(output_dir="out"', 'SFTConfig(output_dir="out", bf16=False, use_cpu=True')
    dataset = Dataset.from_list([{"prompt": f"Say {i}: ", "completion": f"it is {i}"} for i in range(16)])
    names: dict[str, Any] = {"model": FAMILIES["llama"](num_hidden_layers=5, hidden_size=64),
                             "tokenizer": tiny_tokenizer, "dataset": dataset}
    exec(code, names)
    prefix = names["prefix"]
    assert prefix.start == 1
    assert prefix.rows_cached == 2 * 16
    assert "'start': 1" in capsys.readouterr().out


@pytest.mark.usefixtures("_in_a_folder")
def test_the_snippets_for_python(tiny_tokenizer: Any, capsys: pytest.CaptureFixture[str]) -> None:
    from midblock.data import TokenRow

    save_checkpoint(FAMILIES["llama"](num_hidden_layers=5, hidden_size=64), tiny_tokenizer, "tiny")
    names: dict[str, Any] = {"base": load_model("tiny"), "rows": [
        TokenRow(i, (5, 6, 7, 8, 9, 2), ((2, 6),)) for i in range(12)]}
    whole = snippets()[2].replace('"smollm2"', '"tiny"').replace("samples=400", "samples=16, rank=4")
    exec(f"import midblock\n{whole}", names)
    assert "engagement check: all 8 matrices moved" in capsys.readouterr().out
    exec(snippets()[3].replace("mask=mask)", "mask=mask, rank=4)"), names)
    assert isinstance(names["trained"], TrainResult)
    assert names["trained"].prefix["rows_from_cache"] == 24
    assert len(names["state"]) == 16
