"""Exports: what plain PEFT and transformers read back computes what was trained."""

from __future__ import annotations

import base64
import importlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from xml.etree import ElementTree

import gguf
import huggingface_hub
import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from families import FAMILIES, token_ids
from midblock.errors import AdapterError, CheckpointError, OutputError, SettingsError
from midblock.models import load_model, save_checkpoint
from midblock.settings import TrainSettings
from midblock.tuning import attach, make_plan, merged_weights, tune, vllm_note, with_weights
from midblock.tuning.export import VLLM_RANKS, export_adapter, pad_adapter
from midblock.tuning.run import base_name
from midblock.writing import cache_dir

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

FAST = TrainSettings(epochs=3, batch_size=4, learning_rate=1e-2)


@pytest.fixture
def problems(tmp_path: Path) -> str:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"What is {i} and {i}? ", "completion": f"twice {i}"}) + "\n"
                            for i in range(24)))
    return str(path)


def folder_of(family: str, tmp_path: Path, tokenizer: Any, **overrides: Any) -> Path:
    return save_checkpoint(FAMILIES[family](**overrides), tokenizer, tmp_path / f"base-{family}")


def trained(model: nn.Module, method: str = "lora", **options: Any) -> Any:
    """An attachment whose weights are far from their beginnings, as after a long training."""
    if method != "full":
        options.setdefault("rank", 4)
    return attach(model, make_plan(model, mask="0010", method=method, **options))


def shake(attachment: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    for parameter in attachment.trainable.values():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(token_ids()).logits


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_nested", "phi3"])
def test_adapters_are_read_and_merged_by_plain_peft(family: str, method: str, tmp_path: Path) -> None:
    model = FAMILIES[family]()
    with trained(model, method) as attachment:
        shake(attachment)
        want = logits(attachment.model)
        weights = merged_weights(attachment)
        export_adapter(attachment, tmp_path / "adapter", base_name="some/base", card="# card")
    loaded = PeftModel.from_pretrained(FAMILIES[family](), tmp_path / "adapter")
    assert torch.allclose(logits(loaded), want, atol=1e-5)
    assert torch.allclose(logits(loaded.merge_and_unload()), want, atol=1e-4)
    with with_weights(model, weights):
        assert torch.allclose(logits(model), want, atol=1e-4)
    assert not torch.allclose(logits(model), want, atol=1e-2)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "some/base"
    assert (tmp_path / "adapter" / "README.md").read_text() == "# card"


@pytest.mark.parametrize("scale", ["fixed-ratio", "rslora"])
def test_a_padded_rank_computes_the_same(scale: str, tmp_path: Path) -> None:
    model = FAMILIES["llama"]()
    with trained(model, rank=5, scale=scale) as attachment:
        shake(attachment)
        want = logits(attachment.model)
        export_adapter(attachment, tmp_path / "adapter", base_name="b")
    pad_adapter(tmp_path / "adapter", 8)
    loaded = PeftModel.from_pretrained(FAMILIES["llama"](), tmp_path / "adapter")
    assert loaded.peft_config["default"].r == 8
    assert torch.allclose(logits(loaded), want, atol=1e-5)
    with pytest.raises(AdapterError, match="cannot be written at rank 4"):
        pad_adapter(tmp_path / "adapter", 4)


def test_what_vllm_takes() -> None:
    model = FAMILIES["llama"]()
    assert vllm_note(make_plan(model, mask="0010", rank=16)) == "vLLM: --enable-lora --max-lora-rank 16"
    assert "max-lora-rank 32 (rank 20" in str(vllm_note(make_plan(model, mask="0010", rank=20)))
    assert "no DoRA" in str(vllm_note(make_plan(model, mask="0010", rank=4, method="dora")))
    assert vllm_note(make_plan(model, mask="0010", method="full")) is None
    assert VLLM_RANKS == (8, 16, 32, 64, 128, 256, 320, 512)


def test_export_into_a_used_folder_or_of_a_full_update_is_refused(tmp_path: Path) -> None:
    model = FAMILIES["llama"]()
    (tmp_path / "note").write_text("mine")
    with trained(model) as attachment, pytest.raises(OutputError, match="not an empty folder"):
        export_adapter(attachment, tmp_path, base_name="b")
    with trained(model, "full") as attachment, pytest.raises(AdapterError, match="no PEFT adapter"):
        export_adapter(attachment, tmp_path / "x", base_name="b")


# ---------------------------------------------------------------------------------------------
# the whole of `tune`


@pytest.mark.parametrize("family", ["llama_tied", "gpt2"])
def test_tune_writes_an_adapter_and_a_merged_checkpoint(family: str, problems: str, tmp_path: Path,
                                                        tiny_tokenizer: Any) -> None:
    base = load_model(folder_of(family, tmp_path, tiny_tokenizer), dtype="float32")
    before = logits(base.model)
    result = tune(base, problems, mask="0110", rank=4, settings=FAST, out=tmp_path / "out", merge=True,
                  eval_data=problems, eval_samples=6)
    assert result.check.ok
    assert torch.equal(logits(base.model), before)
    assert result.training.prefix["rows_from_cache"] > 0
    assert result.held_out["difference"].value < 0
    assert result.adapter is not None
    assert result.merged is not None
    assert result.merge_difference is not None
    assert result.merge_difference < 1e-4
    adapted = logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base.folder), result.adapter))
    merged = logits(AutoModelForCausalLM.from_pretrained(result.merged))
    assert torch.allclose(merged, adapted, atol=1e-4)
    assert not torch.allclose(merged, before, atol=1e-3)
    # and by midblock itself, from the adapter's folder alone
    assert torch.allclose(logits(load_model(result.adapter, dtype="float32").model), adapted, atol=1e-4)
    card = (result.adapter / "README.md").read_text()
    assert ".##." in card
    assert "mask `0110`" in card
    assert f"{result.plan.params:,} trainable parameters" in card
    assert "Held-out loss" in card
    frame = result.frame
    assert frame.query("metric == 'trainable_parameters' and kind == 'block'")["value"].sum() == result.plan.params
    assert set(result.figures()) == {"loss", "update"}
    assert not any(f.startswith(".") for f in (p.name for p in (tmp_path / "out").iterdir()))


def test_full_updates_are_written_as_a_checkpoint(problems: str, tmp_path: Path, tiny_tokenizer: Any) -> None:
    base = load_model(folder_of("llama", tmp_path, tiny_tokenizer), dtype="bfloat16")
    result = tune(base, problems, blocks="2", method="full", out=tmp_path / "out",
                  settings=TrainSettings(epochs=3, batch_size=4, learning_rate=5e-3))
    assert result.adapter is None
    assert result.merged is not None
    again = AutoModelForCausalLM.from_pretrained(result.merged)
    assert again.dtype == torch.bfloat16
    changed = [n for n, t in again.state_dict().items() if not torch.equal(t, base.model.state_dict()[n])]
    assert sorted(changed) == [f"model.layers.2.self_attn.{x}_proj.weight" for x in "koqv"]


def test_tune_resumes_into_the_same_folder(problems: str, tmp_path: Path, tiny_tokenizer: Any) -> None:
    base = load_model(folder_of("llama", tmp_path, tiny_tokenizer), dtype="float32")
    first = tune(base, problems, mask="0010", rank=2, settings=FAST, out=tmp_path / "out", save_steps=4)
    second = tune(base, problems, mask="0010", rank=2, settings=FAST, out=tmp_path / "out", save_steps=4, resume=True)
    assert second.training.losses == first.training.losses
    assert all(torch.equal(first.state[n], second.state[n]) for n in first.state)


@pytest.mark.parametrize("name", ["adapter", "model", "base"])
def test_what_was_changed_in_an_export_is_not_removed(problems: str, tmp_path: Path, tiny_tokenizer: Any, name: str
                                                      ) -> None:
    base = load_model(folder_of("llama", tmp_path, tiny_tokenizer), dtype="float32")
    options: dict[str, Any] = {"mask": "0010", "rank": 2, "settings": FAST, "out": tmp_path / "out", "save_steps": 4,
                               "merge": True, "export_base": True}
    tune(base, problems, **options)
    files = {p.name: p.read_bytes() for p in (tmp_path / "out" / name).glob("[!R]*")}  # its card holds times
    tune(base, problems, **options, resume=True)  # what is as it was written is written again
    assert {p.name: p.read_bytes() for p in (tmp_path / "out" / name).glob("[!R]*")} == files
    for other in ("notes.txt", "config.json" if name != "adapter" else "README.md"):
        path = tmp_path / "out" / name / other
        kept = path.read_bytes() if path.exists() else None
        path.write_text("mine")
        with pytest.raises(OutputError, match=rf"{other} is not as midblock wrote it; move it"):
            tune(base, problems, **options, resume=True)
        assert path.read_text() == "mine"
        path.unlink() if kept is None else path.write_bytes(kept)


def test_an_export_that_a_kill_cut_is_made_again(problems: str, tmp_path: Path, tiny_tokenizer: Any,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    base = load_model(folder_of("llama", tmp_path, tiny_tokenizer), dtype="float32")
    options: dict[str, Any] = {"mask": "0010", "rank": 2, "settings": FAST, "out": tmp_path / "out", "save_steps": 4,
                               "merge": True, "export_base": True}
    real = os.replace
    for name in ("adapter", "base", "model"):  # just before and just after each folder appears
        for late in (False, True):
            def dying(old: Any, new: Any, name: str = name, late: bool = late) -> None:
                if Path(new) == tmp_path / "out" / name:
                    if late:
                        real(old, new)
                    raise KeyboardInterrupt
                real(old, new)

            with monkeypatch.context() as patch:
                patch.setattr(os, "replace", dying)
                with pytest.raises(KeyboardInterrupt):
                    tune(base, problems, **options, resume=(tmp_path / "out").exists())
    found = tune(base, problems, **options, resume=True)
    assert found.merged is not None
    assert all((tmp_path / "out" / name).is_dir() for name in ("adapter", "base", "model"))


def test_an_adapter_loads_in_a_fresh_process_by_its_own_name(problems: str, tmp_path: Path, tiny_tokenizer: Any,
                                                             monkeypatch: pytest.MonkeyPatch) -> None:
    folder_of("llama", tmp_path, tiny_tokenizer)
    monkeypatch.chdir(tmp_path)
    base = load_model("base-llama", dtype="float32")  # a path that holds here only
    result = tune(base, problems, mask="0110", rank=4, settings=FAST, out=tmp_path / "out", export_base=True,
                  eval_data=problems)
    assert result.adapter is not None
    name = json.loads((result.adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert name == str((tmp_path / "out" / "base").resolve())
    code = (f"import sys; sys.modules['midblock'] = None; import torch; from peft import AutoPeftModelForCausalLM as M;"
            f"m = M.from_pretrained({str(result.adapter)!r});"
            "print('SUM', m(torch.arange(3, 13)[None]).logits.double().sum().item())")
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True,
                          cwd="/", timeout=300)
    loaded = load_model(result.adapter, dtype="float32").model
    want = loaded(torch.arange(3, 13)[None]).logits.double().sum().item()
    assert float(done.stdout.split("SUM")[1]) == pytest.approx(want, abs=1e-3)
    card = ModelCard.load(result.adapter / "README.md")
    assert card.data.base_model == name
    assert "| learning rate | 0.01 (" in card.text
    results = {r.metric_name: r.metric_value for r in card.data.eval_results}
    assert results["held-out loss, after tuning (nats a row)"] == pytest.approx(
        result.held_out["tuned"].value, abs=1e-6)
    picture = ElementTree.parse(result.adapter / "depth.svg").getroot()
    filled = [r.get("fill") != "#e4e4e4" for r in picture.iter("{http://www.w3.org/2000/svg}rect")]
    assert filled == [b in result.plan.blocks for b in range(result.plan.num_blocks)]
    assert "](depth.svg)" in card.text
    snippet = re.search(r"```python\n(.*?)```", (result.adapter / "README.md").read_text(), flags=re.DOTALL)
    assert snippet is not None
    names: dict[str, Any] = {}
    exec(snippet.group(1).replace("this folder", str(result.adapter)), names)
    assert torch.allclose(logits(names["model"]), logits(loaded), atol=1e-4)


def test_the_base_is_named_as_it_can_be_found(tmp_path: Path, tiny_tokenizer: Any) -> None:
    base = load_model(folder_of("llama", tmp_path, tiny_tokenizer), dtype="float32")
    assert base_name(base) == str((tmp_path / "base-llama").resolve())
    converted = cache_dir() / "converted" / "smollm2"
    assert base_name(replace(base, spec="smollm2", folder=converted)) == str(converted.resolve())
    assert base_name(replace(base, spec="org/model", folder=tmp_path / "hub" / "snapshot")) == "org/model"


def test_a_merged_checkpoint_that_cannot_be_written_leaves_nothing(tmp_path: Path, tiny_tokenizer: Any) -> None:
    model = FAMILIES["llama"]()
    target = tmp_path / "used"
    target.mkdir()
    (target / "x").write_text("mine")
    with trained(model) as attachment:
        weights = merged_weights(attachment)
    with with_weights(model, weights), pytest.raises((OutputError, CheckpointError)):
        save_checkpoint(model, tiny_tokenizer, target)
    assert [p.name for p in target.iterdir()] == ["x"]


# ---------------------------------------------------------------------------------------------
# GGUF and the hub


def gguf_of(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    reader = gguf.GGUFReader(path)
    return ({n: f.contents() for n, f in reader.fields.items()},
            {t.name: torch.from_numpy(np.array(t.data)).reshape(*reversed(t.shape.tolist())) for t in reader.tensors})


@pytest.mark.parametrize(("family", "scale"), [("llama", "fixed-ratio"), ("qwen2", "rslora"), ("phi3", "fixed-ratio")])
def test_a_gguf_adapter_is_the_change_that_peft_computes(family: str, scale: str, problems: str, tmp_path: Path,
                                                         tiny_tokenizer: Any) -> None:
    folder = folder_of(family, tmp_path, tiny_tokenizer)
    result = tune(str(folder), problems, mask="0110", rank=2, steps=2, scale=scale, alpha=6.0, learning_rate=1e-2,
                  target_modules=["all-linear"], gguf=True, out=tmp_path / "out")
    fields, tensors = gguf_of(result.gguf)
    assert fields["general.type"] == "adapter"
    assert fields["adapter.type"] == "lora"
    assert fields["general.architecture"] == family
    rank = 2
    assert fields["adapter.lora.alpha"] == rank  # alpha is folded in: llama.cpp multiplies by alpha / r = 1
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), result.adapter)
    names = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output",
             "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down", "qkv_proj": "attn_qkv",
             "gate_up_proj": "ffn_up"}
    compared = 0
    for name, module in plain.base_model.model.named_modules():
        if not getattr(module, "lora_A", None):
            continue
        block, leaf = int(re.search(r"\.(\d+)\.", name)[1]), name.rpartition(".")[2]
        stem = f"blk.{block}.{names[leaf]}.weight"
        got = tensors.pop(f"{stem}.lora_b") @ tensors.pop(f"{stem}.lora_a")
        want = module.get_delta_weight("default").detach()
        if family == "llama" and leaf in ("q_proj", "k_proj"):
            # llama.cpp's row of head h, place 2 i + half is transformers' row of half, place i
            heads = {"q_proj": 4, "k_proj": 2}[leaf]
            width = want.shape[0] // heads
            order = [h * width + half * (width // 2) + i for h in range(heads) for i in range(width // 2)
                     for half in range(2)]
            want = want[order]
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)
        compared += 1
    assert compared
    assert not tensors
    assert (tmp_path / "out" / "Modelfile").read_text().splitlines()[1:] == [f"FROM {folder}", "ADAPTER ./adapter.gguf"]


@pytest.mark.parametrize(("family", "options", "match"), [
    ("gpt2", {}, "tensor names"), ("llama", {"method": "dora"}, "dora"), ("mixtral", {"target_modules": ["experts"]},
                                                                         "stacked experts")])
def test_what_gguf_cannot_hold_is_told_before_training(family: str, options: dict[str, Any], match: str, problems: str,
                                                       tmp_path: Path, tiny_tokenizer: Any) -> None:
    folder = folder_of(family, tmp_path, tiny_tokenizer)
    with pytest.raises(SettingsError, match=match):
        tune(str(folder), problems, mask="0110", rank=2, steps=1, gguf=True, out=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


class Hub(BaseHTTPRequestHandler):
    """Just enough of the hub's interface to take one commit."""

    seen: ClassVar[list[tuple[str, Any]]] = []
    refuse = False

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.seen.append((self.path, body))
        if self.path.endswith("/preupload/main"):
            answer: Any = {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                                     for f in json.loads(body)["files"]]}
        elif "/commit/" in self.path:
            answer = {"commitUrl": f"{self.server_url}/me/tuned/commit/1", "commitOid": "1", "success": True}
        else:
            answer = {"url": f"{self.server_url}/me/tuned", "name": "me/tuned", "id": "1"}
        self.answer(403 if self.refuse else 200, answer)

    def do_GET(self) -> None:
        self.answer(200, {"id": "me/tuned", "siblings": []})

    def answer(self, status: int, value: Any) -> None:
        text = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    @property
    def server_url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Hub.seen, Hub.refuse = [], False
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_address[1]}"
    for name in ("constants", "hf_api", "utils._http", "_commit_api"):
        module = importlib.import_module(f"huggingface_hub.{name}")
        for key, value in (("ENDPOINT", address), ("HF_HUB_OFFLINE", False)):
            if hasattr(module, key):
                monkeypatch.setattr(module, key, value)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: huggingface_hub.hf_api.HfApi(endpoint=address))
    yield address
    server.shutdown()
    server.server_close()


def test_push_uploads_the_adapter_and_its_card_in_one_commit(hub: str, problems: str, tmp_path: Path,
                                                             tiny_tokenizer: Any) -> None:
    folder = folder_of("llama", tmp_path, tiny_tokenizer)
    result = tune(str(folder), problems, mask="0110", rank=2, steps=1, push="me/tuned", out=tmp_path / "out")
    assert result.pushed == f"{hub}/me/tuned"
    made = json.loads(next(body for path, body in Hub.seen if path == "/api/repos/create"))
    assert made["name"] == "tuned"
    assert made.get("private") is True or made.get("visibility") == "private"
    commits = [body for path, body in Hub.seen if "/commit/" in path]
    assert len(commits) == 1
    files = {line["value"]["path"]: base64.b64decode(line["value"]["content"])
             for line in map(json.loads, commits[0].splitlines()) if line["key"] == "file"}
    assert files.keys() == {p.name for p in result.adapter.iterdir()}
    named = {"README.md", "adapter_config.json"}  # they hold the name of the base
    assert all(files[p.name] == p.read_bytes() for p in result.adapter.iterdir() if p.name not in named)
    assert not [name for name, content in files.items() if str(tmp_path).encode() in content]
    mine = json.loads((result.adapter / "adapter_config.json").read_text())
    assert json.loads(files["adapter_config.json"]) == {**mine, "base_model_name_or_path": folder.name}
    card = ModelCard(files["README.md"].decode())
    assert f"# LoRA adapter for {folder.name}" in card.content
    assert card.data.library_name == "peft"
    assert card.data.base_model is None  # a folder of this machine is no name on the hub


def test_a_refused_upload_keeps_the_adapter_and_says_how_to_go_on(hub: str, problems: str, tmp_path: Path,
                                                                 tiny_tokenizer: Any) -> None:
    Hub.refuse = True
    folder = folder_of("llama", tmp_path, tiny_tokenizer)
    with pytest.raises(OutputError, match="hf upload me/tuned"):
        tune(str(folder), problems, mask="0110", rank=2, steps=1, push="me/tuned", out=tmp_path / "out")
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").exists()


def test_push_without_a_token_or_a_hub_is_told_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path
                                                                         ) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(SettingsError, match="HF_HUB_OFFLINE"):
        tune("nowhere", "nothing", mask="1", push="me/tuned", out=tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(SettingsError, match="hf auth login"):
        tune("nowhere", "nothing", mask="1", push="me/tuned", out=tmp_path)
    with pytest.raises(SettingsError, match="push"):
        tune("nowhere", "nothing", mask="1", push="no repository", out=tmp_path)


def test_the_command_line_looks_for_a_token_before_it_loads_anything(monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
                                                                     capsys: pytest.CaptureFixture[str]) -> None:
    from huggingface_hub import constants

    from midblock.cli.app import run

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert run(["tune", "nowhere", "--data", "nothing", "--mask", "1", "--push", "me/x", "--out", str(tmp_path)]) == 2
    told = capsys.readouterr().err
    assert "--push uploads to the Hugging Face hub" in told
    assert "Loading" not in told
