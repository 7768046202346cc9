"""Named data sets: the paper's formats, MIDBLOCK_DATA, the hub when there is no network."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from midblock.data import DATASETS, load_data
from midblock.errors import DataError, SettingsError

SAMPLES = {
    "gsm8k": ({"question": "Q?", "answer": "2+2=<<2+2=4>>4\n#### 1,004"},
              "Question: Q?\nAnswer: 2+2=<<2+2=4>>4\n#### 1,004", "Question: Q?\nAnswer:"),
    "mmlu": ({"question": "Q?", "subject": "s", "choices": ["a", "b", "c", "d"], "answer": 2},
             "Question: Q?\nA) a B) b C) c D) d\nAnswer: C", "Question: Q?\nA) a B) b C) c D) d\nAnswer:"),
    "wikitext": ({"text": "A paragraph of words ."}, "A paragraph of words .", None),
    "ifeval": ({"key": 1, "prompt": "Write.", "instruction_id_list": ["a:b"],
                "kwargs": [{"n": 3, "m": None}]}, "Write.", "Write."),
    "humaneval": ({"task_id": "HumanEval/0", "prompt": "def f():\n", "canonical_solution": "    return 1\n",
                   "test": "", "entry_point": "f"}, "def f():\n\n    return 1\n", "def f():\n"),
    "mt_bench": ({"question_id": 81, "category": "c", "turns": ["One", "Two"], "reference": []}, "One",
                 "One"),
    "toxigen": ({"text": "they are kind people", "target_group": "g", "toxicity_human": 1.0, "label": 0},
                "they are kind people", "Is the following statement hateful? Respond with either Yes or No. "
                                        "Statement: 'they are kind people'"),
    "dolly": ({"instruction": "I", "context": "C", "response": "R", "category": "x"},
              "Instruction: I\nContext: C\nResponse: R", "Instruction: I\nContext: C\nResponse:"),
}


def put(root: Path, folder: str, split: str, rows: list[dict]) -> Path:
    path = root / folder / f"{split}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def test_registry_lists_what_the_design_names() -> None:
    assert list(DATASETS) == ["gsm8k", "mmlu", "wikitext", "ifeval", "humaneval", "mt_bench", "toxigen",
                              "dolly", "arithmetic", "pydocs"]
    assert [n for n, info in DATASETS.items() if info.builtin] == ["arithmetic", "pydocs"]


@pytest.mark.parametrize("name", list(SAMPLES))
def test_paper_formats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    row, text, prompt = SAMPLES[name]
    path = put(tmp_path, DATASETS[name].folders[-1], "test", [row])
    monkeypatch.setenv("MIDBLOCK_DATA", str(tmp_path))
    data = load_data(name)
    example, = data
    assert (example.text, example.prompt) == (text, prompt)
    assert (data.name, data.split, data.source) == (name, "test", str(path))
    assert example.where == f"{path}:1"
    if example.completion is not None and name not in ("humaneval", "toxigen"):
        assert example.prompt is not None
        assert example.prompt + example.completion == example.text


def test_fields_are_kept_and_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, (row, _, _) in SAMPLES.items():
        put(tmp_path, name, "test", [row])
    monkeypatch.setenv("MIDBLOCK_DATA", str(tmp_path))

    def row_of(name: str) -> dict:
        return dict(load_data(name).examples[0].row)

    assert row_of("gsm8k")["answer_number"] == 1004
    assert row_of("mmlu")["answer"] == 2
    assert row_of("ifeval")["kwargs"] == [{"n": 3}]
    assert row_of("mt_bench")["turns"] == ["One", "Two"]
    assert load_data("toxigen").examples[0].completion == " No"


def test_field_names_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, "mt_bench", "test", [{"prompt_id": 1, "prompt": ["One", "Two"], "reference": []}])
    put(tmp_path, "toxigen", "test", [
        {"text": "some longer words", "toxicity_ai": 4.0, "toxicity_human": 2.0},
        {"text": "other longer words", "toxicity_ai": 1.0, "toxicity_human": 2.0}])
    monkeypatch.setenv("MIDBLOCK_DATA", str(tmp_path))
    assert load_data("mt_bench").examples[0].text == "One"
    assert [e.row["label"] for e in load_data("toxigen")] == [1, 0]


def test_bad_rows_of_benchmarks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = SAMPLES["gsm8k"][0]
    path = put(tmp_path, "gsm8k", "test", [good, {**good, "answer": "no number"}])
    put(tmp_path, "gsm8k", "train", [good, {"question": "Q?"}])
    put(tmp_path, "wikitext2", "test", [{"text": "short"}, {"text": "long enough to keep"}])
    monkeypatch.setenv("MIDBLOCK_DATA", str(tmp_path))
    assert load_data("gsm8k").skipped == [(f"{path}:2", "the answer does not end in '#### number'")]
    with pytest.raises(DataError, match=r"train\.jsonl:2: the field 'answer' is missing"):
        load_data("gsm8k", split="train")
    wikitext = load_data("wikitext")
    assert len(wikitext) == 1
    assert "fewer than 10 characters" in wikitext.skipped[0][1]


def test_split_in_the_spec_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = SAMPLES["gsm8k"][0]
    put(tmp_path, "gsm8k", "train", [row])
    put(tmp_path, "gsm8k", "test", [row, row])
    monkeypatch.setenv("MIDBLOCK_DATA", str(tmp_path))
    assert [len(load_data(*s[:1], **s[1])) for s in (
        ("gsm8k", {}), ("gsm8k", {"split": "train"}), ("gsm8k:train", {"split": "test"}), ("GSM8K:test", {}))
    ] == [2, 1, 1, 2]


def test_toxigen_parts_of_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"text": f"statement number {i % 40}", "label": i % 2} for i in range(100)]
    put(tmp_path, "toxigen", "annotated", rows)
    monkeypatch.setenv("MIDBLOCK_DATA", str(tmp_path))
    train, test = load_data("toxigen:train"), load_data("toxigen")
    assert {e.text for e in train}.isdisjoint(e.text for e in test)
    assert len(train) + len(test) == len(load_data("toxigen:annotated")) == 100


def test_folder_of_midblock_data_that_is_in_no_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, "own", "train", [{"text": "words"}])
    monkeypatch.setenv("MIDBLOCK_DATA", str(tmp_path))
    monkeypatch.chdir(tmp_path / "own")
    assert len(load_data("own:train")) == 1


@pytest.mark.parametrize(("spec", "message"), [
    ("gsm8k", r"openai/gsm8k:main:test cannot be loaded.*MIDBLOCK_DATA is not set.*gsm8k/test\.jsonl"),
    ("hf:some/where:config:train", "hf:some/where:config:train cannot be loaded"),
    ("hf:some/where", "hf:some/where:test cannot be loaded"),
    ("hf:some/where:train", "hf:some/where:train cannot be loaded"),
    ("hf:", "write hf:NAME"), ("hf:a:b:c:d", "write hf:NAME"),
    ("ifeval:train", "ifeval has no split 'train'; it has test"),
])
def test_hub_without_network(no_data: None, spec: str, message: str) -> None:
    # HF_HUB_OFFLINE is read when huggingface_hub is first imported
    constants = pytest.importorskip("huggingface_hub.constants")
    if not constants.HF_HUB_OFFLINE:
        pytest.skip("run with HF_HUB_OFFLINE=1: this test must not reach for the network")
    with pytest.raises(DataError, match=message):
        load_data(spec)


def test_hub_reads_through_datasets(tmp_path: Path, no_data: None) -> None:
    """A local folder is a repository for `datasets`, so the real loader runs without a network."""
    repository = tmp_path / "repo"
    repository.mkdir()
    for split, n in (("train", 3), ("test", 2)):
        (repository / f"{split}.jsonl").write_text(
            "".join(json.dumps({"text": f"{split} words {i}"}) + "\n" for i in range(n)))
    data = load_data(f"hf:{repository}:train")
    assert [e.text for e in data] == ["train words 0", "train words 1", "train words 2"]
    assert data.source.startswith("hf:")
    assert len(load_data(f"hf:{repository}")) == 2
    with pytest.raises(DataError, match="cannot be loaded"):
        load_data(f"hf:{repository}:validation")


def test_midblock_data_must_be_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIDBLOCK_DATA", str(tmp_path / "absent"))
    with pytest.raises(DataError, match=r"MIDBLOCK_DATA=.* is not a folder"):
        load_data("gsm8k")


def test_option_only_for_arithmetic() -> None:
    with pytest.raises(SettingsError, match="takes no option"):
        load_data("gsm8k@3")


@pytest.mark.parametrize(("spec", "rows"), [
    ("gsm8k", 1319), ("gsm8k:train", 7473), ("mmlu", 1500), ("mmlu:dev", 285), ("wikitext", 2855),
    ("wikitext:validation", 2457), ("ifeval", 541), ("humaneval", 164), ("mt_bench", 80),
    ("toxigen:annotated", 6514), ("dolly", 200), ("dolly:train", 2000)])
def test_real_copies(real_data: Path, spec: str, rows: int) -> None:
    data = load_data(spec)
    assert len(data) + len(data.skipped) == rows
    assert len(data.skipped) < rows / 100
    assert all(e.text.strip() for e in data)
    if spec.startswith("gsm8k"):
        assert all(isinstance(e.row["answer_number"], int | float) for e in data)


def test_real_toxigen_parts(real_data: Path) -> None:
    train, test = load_data("toxigen:train"), load_data("toxigen:test")
    assert {e.text for e in train}.isdisjoint(e.text for e in test)
    assert {e.row["label"] for e in test} == {0, 1}
    assert len(test) > 1000
