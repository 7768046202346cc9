"""`--backend vllm`, as far as it goes without vLLM: what lm-eval is told, what is refused, what becomes of answers."""

from __future__ import annotations

import ast
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from lm_eval.models.huggingface import HFLM
from peft import LoraConfig, get_peft_model

import midblock
from midblock.cli.app import run
from midblock.errors import MissingExtraError, SettingsError
from midblock.evaluation import evaluate
from midblock.evaluation.on_vllm import VllmModel, open_in_vllm
from midblock.settings.load import LoadSettings
from midblock.writing import write_json
from sweep_helpers import write_rows, write_tiny_model

absent = pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("vllm") / "base", blocks=2)


def adapter(base: Path, folder: Path, **options: Any) -> Path:
    """A LoRA as PEFT writes it; ``options`` are changed in its file."""
    model = midblock.load_model(str(base), dtype="float32", device="cpu").model
    get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"])).save_pretrained(folder)
    path = folder / "adapter_config.json"
    write_json(path, {**json.loads(path.read_text()), "base_model_name_or_path": str(base), **options})
    return folder


def opened(spec: Path, tuned: Path | None = None, tensor_parallel: int = 1, **load: Any) -> VllmModel:
    return open_in_vllm(str(spec), adapter=None if tuned is None else str(tuned), load=LoadSettings(**load),
                        tensor_parallel=tensor_parallel)


def words_of_lm_eval() -> set[str]:
    """Named arguments of lm-eval's ``VLLM``, read from its source: importing it needs vLLM."""
    found = find_spec("lm_eval.models.vllm_causallms")
    assert found is not None
    assert found.origin is not None
    (cls,) = (n for n in ast.parse(Path(found.origin).read_text()).body if isinstance(n, ast.ClassDef)
              and n.name == "VLLM")
    (init,) = (n for n in cls.body if isinstance(n, ast.FunctionDef) and n.name == "__init__")
    return {a.arg for a in (*init.args.args, *init.args.kwonlyargs)}


def test_lm_eval_is_told_the_base_the_adapter_and_a_rank_that_vllm_takes(base: Path, tmp_path: Path) -> None:
    tuned = adapter(base, tmp_path / "tuned", r=12, rank_pattern={"layers.1.self_attn.q_proj": 24})
    plain = opened(base, dtype="bfloat16", tensor_parallel=2)
    assert plain.options == {"pretrained": str(base), "dtype": "bfloat16", "trust_remote_code": False,
                             "tensor_parallel_size": 2, "batch_size": "auto"}
    served = [opened(base, tuned), opened(tuned)]  # an adapter's folder stands for it on its base
    for one in served:
        assert one.options == {**plain.options, "dtype": "auto", "tensor_parallel_size": 1,
                               "lora_local_path": str(tuned), "max_lora_rank": 32}
        assert set(one.options) <= words_of_lm_eval()
    assert served[0].describe()["fingerprint"] == served[1].describe()["fingerprint"] != plain.describe()["fingerprint"]


@pytest.mark.parametrize(("options", "why"), [
    ({"use_dora": True}, "it is a DoRA"), ({"r": 600}, "its rank 600 is above 512"),
    ({"target_parameters": ["mlp.experts.gate_up_proj"]}, "it adapts stacked experts")])
def test_adapters_that_vllm_does_not_serve(base: Path, tmp_path: Path, options: dict[str, Any], why: str) -> None:
    with pytest.raises(SettingsError, match=f"vLLM does not serve the adapter .*: {why}. Merge it"):
        opened(base, adapter(base, tmp_path / "tuned", **options))


def test_what_vllm_does_itself_is_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="vllm places and quantises weights itself"):
        opened(base, load_4bit=True)
    with pytest.raises(SettingsError, match="vllm places and quantises weights itself"):
        opened(base, device="cpu")
    with pytest.raises(SettingsError, match="scored from hidden states; leave out backend vllm"):
        evaluate(opened(base), "answer_loss", data=str(write_rows(tmp_path / "rows.jsonl", 0, 2)))
    with pytest.raises(SettingsError, match="tensor_parallel is for backend vllm"):
        midblock.evaluate_tasks(str(base), ["exact_match"], tensor_parallel=2)


@absent
def test_without_the_package(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = run(["evaluate", str(base), "--task", "exact_match", "--data", str(write_rows(tmp_path / "r.jsonl", 0, 2)),
                "--backend", "vllm", "--out", str(tmp_path / "out")])
    told = capsys.readouterr()
    assert code == 2
    error = "Error: --backend vllm needs the package vllm, which is not installed: pip install 'midblock[vllm]'"
    assert error in " ".join(told.err.split())
    assert not (tmp_path / "out").exists()
    with pytest.raises(MissingExtraError):
        opened(base).lm()


def test_answers_of_another_model_of_lm_eval_become_the_same_samples(base: Path, tmp_path: Path) -> None:
    """lm-eval's own PyTorch model stands where its vLLM model would: nothing but the answers' source differs."""
    rows = str(write_rows(tmp_path / "rows.jsonl", 0, 5))
    loaded = midblock.load_model(str(base), dtype="float32", device="cpu")
    served = opened(base)
    served._lm = HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=2)
    own, theirs = (evaluate(m, "exact_match", data=rows, max_new_tokens=5) for m in (loaded, served))
    assert theirs.items == own.items
    assert [s["resps"] for s in theirs.samples] == [s["resps"] for s in own.samples]
    assert theirs.scores.tolist() == own.scores.tolist()
    assert theirs.samples[0].keys() == own.samples[0].keys()
    assert theirs.settings["backend"] == "vllm"
