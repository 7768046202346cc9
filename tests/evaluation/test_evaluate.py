"""`evaluate` against plain lm-eval and against slow loops, on tiny models."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.loggers import EvaluationTracker
from lm_eval.models.huggingface import HFLM
from torch.utils._python_dispatch import TorchDispatchMode

from analysis_helpers import loaded, tiny_data
from conftest import build_tiny_tokenizer
from families import FAMILIES
from midblock.data import Dataset, Example
from midblock.errors import DataError, OutputError, SettingsError
from midblock.evaluation import (
    EvalResult,
    compare,
    evaluate,
    item_ids,
    perplexity_interval,
    read_result,
    task_data,
    write_lm_eval_files,
    write_result,
)
from midblock.evaluation.harness import MemoryLM, StopRows, run_lm_eval
from midblock.evaluation.run import _exact_match, _humaneval
from midblock.models import LoadedModel, find_anatomy
from midblock.progress import silent
from midblock.results import Estimate
from midblock.writing import write_sealed


def requests(kind: str, arguments: Sequence[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]


def plain(name: str, batch_size: int = 1) -> HFLM:
    """lm-eval's own model class, as anyone would use it."""
    return HFLM(pretrained=loaded(name).model, tokenizer=build_tiny_tokenizer(), batch_size=batch_size,
                softmax_dtype="float32")


PAIRS = [("the sum of two and two is", " four"), ("the sum of two and two is", " five"),
         ("Question: a or b?\nAnswer:", " A"), ("Question: a or b?\nAnswer:", " B"),
         ("", "an empty context"), ("x", "yz"), ("a longer context " * 8, " and its end"),
         ("trailing blank ", "word"), ("beyond the limit " * 20, " end")]
PROMPTS = ["the sum of", "Question: what is the number of the beast?\nAnswer:", "a", "one two three four " * 4,
           "beyond the limit " * 20]


# ---------------------------------------------------------------- the model interface

@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "granite", "mixtral"])
def test_likelihoods_equal_those_of_plain_lm_eval(name: str) -> None:
    asked = requests("loglikelihood", PAIRS)
    want = plain(name).loglikelihood(asked, disable_tqdm=True)
    for batch_size in (1, 4):
        got = MemoryLM(loaded(name), batch_size=batch_size).loglikelihood(asked)
        np.testing.assert_allclose([g[0] for g in got], [w[0] for w in want], rtol=2e-5, atol=2e-5)
        assert [g[1] for g in got] == [w[1] for w in want]


def test_a_greedy_continuation_is_recognised() -> None:
    lm = MemoryLM(loaded("llama"), batch_size=2)
    ids = lm.tok_encode("the sum of")
    with torch.inference_mode():
        best = int(loaded("llama").model(torch.tensor([ids])).logits[0, -1].argmax())
    other = (best + 1) % 100
    got = lm._loglikelihood_tokens([(("", ""), ids, [best]), (("", ""), ids, [other])])
    assert [g[1] for g in got] == [True, False]


@pytest.mark.parametrize("name", ["llama", "gemma3", "gemma2", "gpt2", "opt", "gpt_neox", "mixtral", "phi3"])
def test_generation_equals_that_of_plain_lm_eval(name: str) -> None:
    options = {"until": ["e", "Question:"], "max_gen_toks": 24, "do_sample": False}
    asked = requests("generate_until", [(p, options) for p in PROMPTS])
    want = plain(name).generate_until(asked, disable_tqdm=True)
    assert MemoryLM(loaded(name), batch_size=1).generate_until(asked) == want
    assert MemoryLM(loaded(name), batch_size=3).generate_until(asked) == want


def test_no_copy_of_the_head_is_made_for_every_row() -> None:
    model = loaded("llama")
    frozen = [p for p in model.model.parameters() if p.requires_grad]
    seen: list[bool] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten.linear.default and args[1].shape[0] == model.anatomy.vocab_size:
                seen.append(args[0].is_contiguous())
            return func(*args, **(kwargs or {}))

    asked = requests("generate_until", [(p, {"until": [], "max_gen_toks": 2}) for p in PROMPTS])
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        with Watch():
            MemoryLM(model, batch_size=8).generate_until(asked)
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)
    assert len(seen) >= 2
    assert all(seen)


def test_an_encoder_decoder_generates_and_scores() -> None:
    options = {"until": ["zzz"], "max_gen_toks": 6}
    asked = requests("generate_until", [(p, options) for p in PROMPTS[:3]])
    one = MemoryLM(loaded("bart"), batch_size=1).generate_until(asked)
    assert MemoryLM(loaded("bart"), batch_size=3).generate_until(asked) == one
    pairs = requests("loglikelihood", PAIRS[:3])
    got = MemoryLM(loaded("bart"), batch_size=1).loglikelihood(pairs)
    assert [g[0] for g in got] == pytest.approx([w[0] for w in plain("bart").loglikelihood(pairs)], rel=1e-5)


def test_each_row_stops_at_its_own_string() -> None:
    tokenizer = build_tiny_tokenizer()
    ids = tokenizer(["PP ab#cd", "PP abcd;", "PP abcde"], return_tensors="pt")["input_ids"]
    criterion = StopRows(tokenizer, ["#c", ";"], {2}, prompt_width=3, rows=3)
    seen = [criterion(ids[:, :width], None).tolist() for width in range(4, ids.shape[1] + 1)]
    assert seen == [[False] * 3, [False] * 3, [False] * 3, [True, False, False], [True, True, False]]
    # what the prompt holds does not stop anything
    assert not StopRows(tokenizer, ["PP"], {2}, prompt_width=3, rows=3)(ids, None).any()
    ids[1, -1] = 2
    assert StopRows(tokenizer, [], {2}, prompt_width=3, rows=3)(ids, None).tolist() == [False, True, False]
    # enough rows are done: all stop, and `done` still says which are
    shared = StopRows(tokenizer, [], {2}, prompt_width=3, rows=3, share=0.3)
    assert shared(ids, None).tolist() == [True] * 3
    assert shared.done.tolist() == [False, True, False]


def test_rows_that_are_done_end_the_batch() -> None:
    """Plain HFLM goes on until every row has met the same stop string, and computes all rows."""
    options = {"until": list("abcdefghijklmnopqrstuvwxyz"), "max_gen_toks": 60}
    asked = requests("generate_until", [(p, options) for p in PROMPTS[:4]])
    rows: list[int] = []
    handle = loaded("llama").anatomy.blocks[0].register_forward_hook(lambda m, a, out: rows.append(len(a[0])))
    try:
        want = plain("llama", batch_size=4).generate_until(asked, disable_tqdm=True)
        theirs, rows[:] = list(rows), []
        assert MemoryLM(loaded("llama"), batch_size=8).generate_until(asked) == want
    finally:
        handle.remove()
    assert sum(theirs) == 4 * 60
    assert sum(rows) < 60
    assert rows[0] == 4
    assert rows == sorted(rows, reverse=True)


def test_a_penalty_in_the_checkpoint_does_not_bend_greedy_answers() -> None:
    model = FAMILIES["llama"]()
    own = model.generation_config
    own.repetition_penalty, own.do_sample, own.temperature = 5.0, True, 3.0
    subject = LoadedModel(model=model, tokenizer=build_tiny_tokenizer(), anatomy=find_anatomy(model), spec="x",
                          name="x", folder=None, dtype=torch.float32, device=torch.device("cpu"))
    options = {"until": [], "max_gen_toks": 20}
    asked = requests("generate_until", [(PROMPTS[0], options)])
    assert MemoryLM(subject, batch_size=1).generate_until(asked) == \
        MemoryLM(loaded("llama"), batch_size=1).generate_until(asked)
    assert model.generation_config is own
    assert own.repetition_penalty == 5.0


def test_the_model_keeps_its_mode_also_after_an_error() -> None:
    model = FAMILIES["llama"]().train()
    subject = LoadedModel(model=model, tokenizer=build_tiny_tokenizer(), anatomy=find_anatomy(model), spec="x",
                          name="x", folder=None, dtype=torch.float32, device=torch.device("cpu"))
    evaluate(subject, "arithmetic", samples=2, max_new_tokens=2)
    assert model.training
    with pytest.raises(SettingsError, match="256"):
        evaluate(subject, "arithmetic", samples=2, max_new_tokens=256)
    assert model.training
    evaluate(subject, "pydocs", samples=2, max_length=64)
    assert model.training


def test_a_tokenizer_without_pad_token_is_left_as_it_was() -> None:
    tokenizer = build_tiny_tokenizer()
    tokenizer.pad_token = None
    subject = loaded("llama")
    subject = LoadedModel(**{**{f: getattr(subject, f) for f in ("model", "anatomy", "spec", "name", "folder",
                                                                "dtype", "device")}, "tokenizer": tokenizer})
    evaluate(subject, "arithmetic", samples=2, max_new_tokens=3)
    assert tokenizer.pad_token is None


# ---------------------------------------------------------------- scores against slow loops

def losses_by_hand(subject: LoadedModel, prompt: str, text: str) -> tuple[float, int]:
    """Total loss and number of counted tokens of one unpadded row, from the model's own logits."""
    tokenizer = subject.tokenizer
    ids = tokenizer(prompt + text)["input_ids"]
    first = max(1, len(tokenizer(prompt)["input_ids"])) if prompt else 1
    if prompt:
        ids = [*ids, tokenizer.eos_token_id]
    with torch.inference_mode():
        logits = subject.model(torch.tensor([ids])).logits[0].double()
    logp = torch.log_softmax(logits, dim=-1)
    picked = [-float(logp[t - 1, ids[t]]) for t in range(first, len(ids))]
    return sum(picked), len(picked)


@pytest.mark.parametrize("batch_size", [1, 5])
def test_perplexity_counts_every_token_once_and_no_padding(batch_size: int) -> None:
    subject, data = loaded("llama"), tiny_data(7)
    result = evaluate(subject, "perplexity", data=data, batch_size=batch_size)
    want = [losses_by_hand(subject, "", e.text) for e in data.examples]
    assert result.value == pytest.approx(math.exp(sum(w[0] for w in want) / sum(w[1] for w in want)), rel=1e-5)
    np.testing.assert_allclose(result.scores, [w[0] / w[1] for w in want], rtol=1e-5)
    assert result.tokens is not None
    assert result.tokens.tolist() == [w[1] for w in want]
    assert result.estimate.low < result.value < result.estimate.high
    assert result.items == item_ids(data.examples)
    assert not result.higher_is_better


def test_answer_loss_counts_the_answer_and_its_end() -> None:
    subject = loaded("llama")
    data = task_data("answer_loss", "arithmetic", samples=5, seed=1)
    result = evaluate(subject, "answer_loss", data=data)
    want = [losses_by_hand(subject, str(e.prompt), str(e.completion)) for e in data.examples]
    np.testing.assert_allclose(result.scores, [w[0] / w[1] for w in want], rtol=1e-5)
    assert result.value == pytest.approx(np.mean([w[0] / w[1] for w in want]), rel=1e-5)


def question(number: int, right: int) -> Example:
    choices = ["red", "green", "blue"]
    prompt = f"Question: colour {number}?\nA) red B) green C) blue\nAnswer:"
    return Example(text=f"{prompt} {'ABC'[right]}", prompt=prompt, completion=f" {'ABC'[right]}",
                   row={"choices": choices, "answer": right, "subject": "colours"}, where=f"row {number}")


def test_multiple_choice_takes_the_likeliest_letter() -> None:
    subject = loaded("llama")
    data = Dataset("q", "all", "built in", [question(i, i % 3) for i in range(9)])
    result = evaluate(subject, "multiple_choice", data=data, batch_size=4)
    for example, score in zip(data.examples, result.scores, strict=True):
        ids = subject.tokenizer(example.prompt)["input_ids"]
        # " A" is a blank and a letter here, so the continuation has two tokens
        totals = []
        for letter in "ABC":
            more = subject.tokenizer(f"{example.prompt} {letter}")["input_ids"]
            with torch.inference_mode():
                logp = subject.model(torch.tensor([more])).logits[0].log_softmax(-1)
            totals.append(sum(float(logp[t - 1, more[t]]) for t in range(len(ids), len(more))))
        assert score == float(int(np.argmax(totals)) == example.row["answer"])
    assert 0 < result.value < 1
    assert result.samples[0]["doc"]["subject"] == "colours"


def trained(data: Dataset, steps: int = 150) -> LoadedModel:
    """A tiny model that has learnt the answers of ``data`` by heart."""
    model = FAMILIES["llama"](seed=3)
    tokenizer = build_tiny_tokenizer()
    rows = [tokenizer(e.text)["input_ids"] + [tokenizer.eos_token_id] for e in data.examples]
    width = max(map(len, rows))
    ids = torch.tensor([r + [0] * (width - len(r)) for r in rows])
    labels = torch.where(ids > 0, ids, -100)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        model(input_ids=ids, attention_mask=(ids > 0).long(), labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    return LoadedModel(model=model, tokenizer=tokenizer, anatomy=find_anatomy(model), spec="x", name="x",
                       folder=None, dtype=torch.float32, device=torch.device("cpu"))


def sums(pairs: Sequence[tuple[int, int]]) -> Dataset:
    examples = []
    for a, b in pairs:
        prompt, answer = f"Question: {a} and {b}?\nAnswer:", f" {a} + {b}\n#### {a + b}"
        examples.append(Example(text=prompt + answer, prompt=prompt, completion=answer,
                                row={"answer_number": a + b}, where=f"{a}+{b}"))
    return Dataset("sums", "all", "built in", examples)


def test_a_model_that_learnt_the_answers_scores_one_and_another_nothing() -> None:
    torch.manual_seed(0)
    data = sums([(1, 2), (3, 4), (5, 1), (2, 7)])
    good = evaluate(trained(data), "exact_match", data=data, max_new_tokens=30)
    bad = evaluate(loaded("llama"), "exact_match", data=data, max_new_tokens=30)
    assert (good.value, bad.value) == (1.0, 0.0)
    assert good.notes == ()  # every answer ended by itself
    assert "30 new tokens" in bad.notes[0]
    assert (good.estimate.low, good.estimate.n) == (pytest.approx(0.5101, abs=1e-3), 4)
    difference = compare(good, bad)
    assert difference.estimate.value == 1.0
    assert difference.p == pytest.approx(0.125)  # exact McNemar, 4 to 0
    loss = evaluate(trained(data), "answer_loss", data=data), evaluate(loaded("llama"), "answer_loss", data=data)
    assert compare(*loss).estimate.high < 0


# ---------------------------------------------------------------- scoring of given answers

class Says(LM):
    """Answers with given texts, to test what becomes of an answer."""

    def __init__(self, answers: Sequence[str]) -> None:
        super().__init__()
        self.answers = list(answers)

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        return self.answers

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
        raise AssertionError("nothing to score")

    loglikelihood_rolling = loglikelihood


@pytest.mark.parametrize(("answer", "right"), [
    (" 5 + 6 = 11\n#### 1018", True), ("#### 1,018", True), (" work\n#### 1018.", True),
    ("#### 1018\n\nThe end", True), ("#### 1019", False), (" 1018", False), ("", False),
    ("#### 10180", False), ("#### 1018\n#### 7", True), ("#### -1018", False)])
def test_what_counts_is_the_first_number_after_the_marks(answer: str, right: bool) -> None:
    example = Example(text="", prompt="Question: q\nAnswer:", completion=" a\n#### 1,018", row={}, where="1")
    build, metric, chosen = _exact_match(Dataset("d", "all", "x", [example]), None, 50)
    found = run_lm_eval(Says([answer]), "t", build)  # type: ignore[arg-type]
    record = next(s for s in found["samples"]["t"] if s["filter"] == chosen)
    assert float(record[metric]) == float(right)


@pytest.mark.parametrize(("answer", "right"), [(" Paris\n", True), ("Paris", True), ("paris", False),
                                               ("Paris.", False), ("", False)])
def test_answers_without_a_number_match_as_a_whole(answer: str, right: bool) -> None:
    example = Example(text="", prompt="Capital?", completion=" Paris", row={}, where="1")
    build, metric, _ = _exact_match(Dataset("d", "all", "x", [example]), None, 50)
    found = run_lm_eval(Says([answer]), "t", build)  # type: ignore[arg-type]
    assert float(found["samples"]["t"][0][metric]) == float(right)


def test_humaneval_passes_what_passes_its_tests() -> None:
    row = {"task_id": "T/0", "entry_point": "double", "prompt": "def double(x):\n    '''Twice x.'''\n",
           "canonical_solution": "    return 2 * x\n", "test": "def check(f):\n    assert f(3) == 6\n"}
    examples = [Example(text=f"{row['prompt']}{i}", prompt=row["prompt"], row={**row, "task_id": f"T/{i}"})
                for i in range(3)]
    build, metric, _ = _humaneval(Dataset("h", "test", "x", examples), 50, False, silent)
    found = run_lm_eval(Says(["    return 2 * x\n", "    return x\n", "    while True: import os; os._exit(0)"]),
                        "h", build, allow_code=True)  # type: ignore[arg-type]
    assert [s[metric] for s in found["samples"]["h"]] == [1.0, 0.0, 0.0]
    assert found["results"]["h"]["pass@1,create_test"] == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="unsafe"):
        run_lm_eval(Says([""] * 3), "h", build)  # type: ignore[arg-type]


# ---------------------------------------------------------------- items, comparison, files

def test_items_are_named_by_content_alone() -> None:
    data = tiny_data(4)
    names = item_ids(data.examples)
    assert len(set(names)) == 4
    assert item_ids(data.examples[::-1]) == names[::-1]
    assert item_ids([data.examples[0]] * 2)[1] == f"{names[0]}-2"
    one = evaluate(loaded("llama"), "perplexity", data=data)
    two = evaluate(loaded("qwen2"), "perplexity", data=data)
    assert one.items == two.items


def result_of(metric: str, scores: Sequence[float], *, items: str = "abcd", tokens: Sequence[float] | None = None,
              task: str = "t") -> EvalResult:
    return EvalResult(task=task, metric=metric, higher_is_better=metric == "accuracy", items=tuple(items),
                      scores=np.array(scores), estimate=Estimate(float(np.mean(scores)), n=len(scores)),
                      tokens=None if tokens is None else np.array(tokens))


def test_results_are_paired_by_item_whatever_their_order() -> None:
    a = result_of("loss", [1.0, 2.0, 3.0, 4.0])
    b = result_of("loss", [3.9, 2.8, 1.7, 9.0], items="dcbe")
    difference = compare(a, b)
    assert difference.n == 3
    assert difference.estimate.value == pytest.approx(np.mean([2 - 1.7, 3 - 2.8, 4 - 3.9]))


def test_a_perplexity_difference_weighs_tokens() -> None:
    a = result_of("perplexity", [1.0, 2.0], items="ab", tokens=[10, 30])
    b = result_of("perplexity", [1.0, 1.0], items="ab", tokens=[10, 30])
    assert compare(a, b).estimate.value == pytest.approx(math.exp((10 + 60) / 40) - math.e)
    same = compare(a, a)
    assert (same.estimate.value, same.estimate.low, same.estimate.high, same.p) == (0.0, 0.0, 0.0, 1.0)


@pytest.mark.parametrize("other", [result_of("loss", [1.0] * 4), result_of("accuracy", [1.0] * 4, task="u"),
                                   result_of("accuracy", [1.0] * 4, items="wxyz")])
def test_what_cannot_be_compared_is_refused(other: EvalResult) -> None:
    with pytest.raises(DataError, match=r"compare|share no item"):
        compare(result_of("accuracy", [1.0, 0.0, 1.0, 0.0]), other)


def test_the_perplexity_interval_covers_and_shrinks() -> None:
    rng = np.random.default_rng(0)
    hits, widths = 0, []
    for trial in range(100):
        tokens = rng.integers(20, 60, 60)
        drawn = perplexity_interval(rng.normal(2.0, 0.3, 60), tokens, seed=trial)
        hits += drawn.low <= math.exp(2.0) <= drawn.high
        widths.append(drawn.high - drawn.low)
    assert 86 <= hits <= 100
    few = perplexity_interval(rng.normal(2.0, 0.3, 10), np.full(10, 40))
    assert few.high - few.low > np.mean(widths)


def test_a_result_survives_its_file(tmp_path: Path) -> None:
    result = evaluate(loaded("llama"), "arithmetic", samples=3, max_new_tokens=4)
    write_result(tmp_path / "r.json", result)
    back = read_result(tmp_path / "r.json")
    for name in ("task", "metric", "higher_is_better", "items", "estimate", "notes", "seconds", "results", "settings"):
        assert getattr(back, name) == getattr(result, name)
    np.testing.assert_array_equal(back.scores, result.scores)
    assert back.tokens is None
    write_sealed(tmp_path / "bad.json", {"scores": "x"})
    with pytest.raises(OutputError, match="not a result"):
        read_result(tmp_path / "bad.json")
    text = (tmp_path / "r.json").read_text()
    (tmp_path / "bad.json").write_text(text.replace('"seconds": ', '"seconds": 1'))
    with pytest.raises(OutputError, match=r"bad\.json was changed after"):
        read_result(tmp_path / "bad.json")
    with pytest.raises(OutputError, match="no such"):
        read_result(tmp_path / "none.json")


@pytest.mark.parametrize("task", ["arithmetic", "perplexity", "multiple_choice"])
def test_files_have_lm_evals_own_shapes(task: str, tmp_path: Path) -> None:
    data = {"arithmetic": None, "perplexity": tiny_data(3),
            "multiple_choice": Dataset("q", "all", "x", [question(i, 1) for i in range(3)])}[task]
    result = evaluate(loaded("llama"), task, data=data, samples=3,
                      **({"max_new_tokens": 4} if task == "arithmetic" else {}))
    write_lm_eval_files(tmp_path, [result], model_name="tiny")
    ours = [json.loads(line) for line in (tmp_path / f"samples_{task}.jsonl").read_text().splitlines()]
    tracker = EvaluationTracker(output_path=str(tmp_path / "theirs"))
    tracker.general_config_tracker.model_name_sanitized, tracker.date_id = "tiny", "now"
    tracker.save_results_samples(task, [dict(s) for s in result.samples])
    theirs = [json.loads(line) for line in
              (tmp_path / "theirs" / "tiny" / f"samples_{task}_now.jsonl").read_text().splitlines()]
    assert ours == theirs
    assert len({line["item"] for line in ours}) == 3
    stored = json.loads((tmp_path / "results.json").read_text())
    assert set(stored) >= {"results", "configs", "versions", "n-shot", "higher_is_better", "n-samples", "config",
                           "task_hashes", "model_name", "lm_eval_version"}
    figures = stored["results"][task]
    assert result.value in [figures.get(k) for k in
                            ("exact_match,strict-match", "acc,none", "perplexity,none")]


def test_few_shot_examples_come_before_the_question_and_from_the_train_split() -> None:
    result = evaluate(loaded("llama"), "arithmetic@1", samples=2, shots=2, max_new_tokens=2)
    train = {e.prompt for e in task_data("arithmetic@1", "arithmetic@1:train", samples=None, seed=0).examples}
    for sample in result.samples:
        *shown, asked = str(sample["arguments"][0][0]).split("\n\n")
        assert len(shown) == 2
        assert asked == sample["doc"]["prompt"]
        assert asked not in train
        assert {s.split("\nAnswer:")[0] + "\nAnswer:" for s in shown} <= train


def test_the_chat_template_frames_the_prompt() -> None:
    result = evaluate(loaded("llama"), "arithmetic", samples=1, chat=True, max_new_tokens=2)
    prompt = str(result.samples[0]["arguments"][0][0])
    assert prompt.startswith("user: Question:")
    assert prompt.endswith("assistant: ")


@pytest.mark.parametrize("name", ["gpt2", "gemma3_nested", "olmo2", "mixtral", "cohere"])
def test_families_score_every_kind_of_task(name: str) -> None:
    subject = loaded(name)
    assert evaluate(subject, "arithmetic", samples=2, max_new_tokens=3).n == 2
    assert evaluate(subject, "perplexity", data=tiny_data(2)).value > 1
    choices = Dataset("q", "all", "x", [question(i, 1) for i in range(2)])
    assert evaluate(subject, "multiple_choice", data=choices).n == 2


def test_progress_reaches_its_total() -> None:
    seen: list[tuple[str, float, float]] = []
    evaluate(loaded("llama"), "arithmetic", samples=3, max_new_tokens=2, batch_size=2,
             progress=lambda what, done, total, note="": seen.append((what, done, total)))
    assert seen == [("arithmetic", 2, 3), ("arithmetic", 3, 3)]


# ---------------------------------------------------------------- mistakes

@pytest.mark.parametrize(("task", "options", "message"), [
    ("gsm8x", {}, "did you mean gsm8k"), ("mmlu@3", {}, "not known"), ("answer_loss", {}, "--data"),
    ("perplexity", {}, "--data"), ("humaneval", {}, "allow_code_execution"),
    ("pydocs", {"max_new_tokens": 5}, "generates nothing"), ("arithmetic", {"max_length": 5}, "max_length"),
    ("pydocs", {"shots": 2}, "few-shot"), ("arithmetic", {"shots": -1}, "shots must be at least 0"),
    ("arithmetic", {"batch_size": 0}, "batch_size must be at least 1"),
    ("arithmetic", {"samples": 0}, "samples must be at least 1"),
    ("pydocs", {"max_length": 100_000}, "at most 256"), ("arithmetic", {"max_new_tokens": 300}, "256 in all"),
    ("exact_match", {"data": tiny_data(2), "shots": 1}, "few-shot"),
])
def test_mistakes_are_told_with_what_to_do(task: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises((SettingsError, DataError), match=message):
        evaluate(loaded("llama"), task, **{"samples": 2, **options})


@pytest.mark.parametrize(("task", "example", "message"), [
    ("exact_match", Example(text="t", where="f:1"), "f:1.*prompt and completion"),
    ("multiple_choice", Example(text="t", prompt="p", where="f:2"), "f:2.*choices"),
    ("answer_loss", Example(text="t", where="f:3"), "f:3.*completion"),
    ("humaneval", Example(text="t", row={"task_id": "x"}, where="f:4"), "f:4.*'prompt'"),
])
def test_rows_that_do_not_fit_are_named(task: str, example: Example, message: str) -> None:
    data = Dataset("d", "all", "x", [example])
    with pytest.raises(DataError, match=message):
        evaluate(loaded("llama"), task, data=data, allow_code_execution=True)


def test_numbers_in_some_rows_only_are_refused() -> None:
    mixed = [*sums([(1, 2)]).examples, Example(text="pq", prompt="p", completion=" q", where="f:9")]
    with pytest.raises(DataError, match=r"f:9.*####"):
        evaluate(loaded("llama"), "exact_match", data=Dataset("d", "all", "x", mixed))


def test_no_chat_template_is_said() -> None:
    subject = loaded("llama")
    tokenizer = build_tiny_tokenizer()
    tokenizer.chat_template = None
    bare = LoadedModel(**{**{f: getattr(subject, f) for f in ("model", "anatomy", "spec", "name", "folder",
                                                             "dtype", "device")}, "tokenizer": tokenizer})
    with pytest.raises(SettingsError, match="no chat template"):
        evaluate(bare, "arithmetic", chat=True)


@pytest.mark.skipif(all(importlib.util.find_spec(n) for n in ("langdetect", "immutabledict")),
                    reason="the packages are there")
def test_ifeval_without_its_packages_says_what_to_install() -> None:
    with pytest.raises(SettingsError, match=r"lm-eval\[ifeval\]"):
        evaluate(loaded("llama"), "ifeval", data=tiny_data(1))
