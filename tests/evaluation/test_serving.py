"""A server with the real tiny model on this machine: is the adapter applied, left out, or counted twice?"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import build_tiny_tokenizer
from families import FAMILIES
from midblock.cli.app import run
from midblock.errors import ServingError, SettingsError
from midblock.evaluation.serving import ServedRow, check_serving, compare_served, local_logprobs
from midblock.models import load_model


class Served:
    """A completions API over plain transformers; ``scale`` multiplies the adapter's update."""

    def __init__(self, folder: Path, adapter: Path | None, *, scale: float = 1.0, echo: bool = True,
                 token_ids: bool = True, chat_form: bool = False) -> None:
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        model: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
        if adapter is not None:
            model = PeftModel.from_pretrained(model, str(adapter))
            for module in model.modules():
                if hasattr(module, "lora_A"):
                    module.scaling = {k: v * scale for k, v in module.scaling.items()}
        self.model, self.echo, self.token_ids, self.chat_form = model, echo, token_ids, chat_form
        self.tokenizer = build_tiny_tokenizer()
        self.names = ["tiny-adapter"]

    def answer(self, asked: dict[str, Any]) -> tuple[int, Any]:
        if asked.get("echo") and not self.echo:
            return 400, {"error": "echo is not supported"}
        ids = list(asked["prompt"])
        with torch.no_grad():
            for _ in range(asked["max_tokens"]):
                ids.append(int(self.model(torch.tensor([ids])).logits[0, -1].argmax()))
            logs = torch.log_softmax(self.model(torch.tensor([ids])).logits[0].float(), -1)
        values = [None, *(float(logs[i, t]) for i, t in enumerate(ids[1:]))]
        start = 0 if asked.get("echo") else len(asked["prompt"])
        words = [f"token_id:{t}" if self.token_ids and asked.get("return_tokens_as_token_ids")
                 else self.tokenizer.decode([t]) for t in ids[start:]]
        logprobs: dict[str, Any] = {"tokens": words, "token_logprobs": values[start:]}
        if self.chat_form:
            logprobs = {"content": [{"token": w, "logprob": v} for w, v in zip(words, values[start:], strict=True)]}
        return 200, {"choices": [{"text": "", "logprobs": logprobs}]}


@contextmanager
def serving(served: Any) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def _send(self, code: int, value: Any) -> None:
            text = value if isinstance(value, bytes) else json.dumps(value).encode()
            self.send_response(code)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def do_GET(self) -> None:
            self._send(200, {"data": [{"id": n} for n in served.names]})

        def do_POST(self) -> None:
            self._send(*served.answer(json.loads(self.rfile.read(int(self.headers["Content-Length"])))))

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny model and an adapter of it."""
    from peft import LoraConfig, get_peft_model

    folder = tmp_path_factory.mktemp("served")
    model = FAMILIES["llama"]()
    model.save_pretrained(folder / "base")
    build_tiny_tokenizer().save_pretrained(folder / "base")
    model.name_or_path = str(folder / "base")
    tuned = get_peft_model(model, LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj", "down_proj"]))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02, generator=generator)
    tuned.save_pretrained(folder / "adapter")
    return folder / "base", folder / "adapter"


SMALL = {"serving_samples": 4, "serving_tokens": 24}


@pytest.mark.parametrize("how", [{}, {"echo": False}, {"echo": False, "token_ids": False},
                                 {"echo": False, "chat_form": True}])
@pytest.mark.parametrize(("adapter", "scale", "verdict", "share"), [
    (True, 1.0, "applied", 1.0), (False, 1.0, "not applied", 0.0)])
def test_the_adapter_is_seen_or_missed(pair: tuple[Path, Path], how: dict[str, bool], adapter: bool, scale: float,
                                       verdict: str, share: float) -> None:
    with serving(Served(pair[0], pair[1] if adapter else None, scale=scale, **how)) as url:
        found = check_serving(url, str(pair[0]), adapter=str(pair[1]), **SMALL)
    assert found.verdict == verdict
    assert found.share.value == pytest.approx(share, abs=1e-3)
    assert found.echoed == how.get("echo", True)
    assert found.distance("served", "tuned" if adapter else "base") < 1e-5
    assert ("NOT applied" in found.summary()) == (not adapter)


def test_a_scaling_that_counts_twice_is_told(pair: tuple[Path, Path]) -> None:
    with serving(Served(pair[0], pair[1], scale=2.0)) as url:
        found = check_serving(f"{url}/v1/", str(pair[0]), adapter=str(pair[1]), **SMALL)
    assert found.verdict == "something else"
    assert found.share.low > 1.25
    assert "times" in found.summary()
    assert set(found.figures()) == {"serving"}


@pytest.mark.parametrize("scale", [0.84, 1.18])
def test_an_adapter_that_is_nearly_this_one_is_not_this_one(pair: tuple[Path, Path], scale: float) -> None:
    """Another run on the same rows, or another scaling: near in distance, but its share of the change is not 1."""
    with serving(Served(pair[0], pair[1], scale=scale)) as url:
        found = check_serving(url, str(pair[0]), adapter=str(pair[1]), **SMALL)
    assert found.share.value == pytest.approx(scale, abs=0.05)
    assert found.distance("served", "tuned") < 0.5 * found.distance("tuned", "base")
    assert found.verdict == "something else"


def test_local_logprobs_are_those_of_plain_transformers(pair: tuple[Path, Path]) -> None:
    loaded = load_model(str(pair[0]))
    ids = tuple(range(5, 25))
    got = local_logprobs(loaded, [ServedRow(ids, 7, (0.0,) * 13)])[0]
    logs = torch.log_softmax(loaded.model(torch.tensor([ids])).logits[0].detach().double(), -1)
    want = [float(logs[i - 1, ids[i]]) for i in range(7, 20)]
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_the_share_is_that_of_a_loop() -> None:
    draw = np.random.default_rng(0)
    base = [draw.normal(size=n) for n in (3, 5, 4)]
    tuned = [b + draw.normal(size=b.size) for b in base]
    served = [0.3 * t + 0.7 * b for b, t in zip(base, tuned, strict=True)]
    rows = [ServedRow(tuple(range(s.size + 1)), 1, tuple(s)) for s in served]
    found = compare_served(rows, base, tuned)
    assert found.share.value == pytest.approx(0.3)
    assert found.share.low == pytest.approx(0.3)  # every token has that share
    assert found.verdict == "something else"
    with pytest.raises(SettingsError, match="changes no log-probability"):
        compare_served(rows, base, base)


class Broken:
    """Answers that are none."""

    names = ("a", "b")

    def __init__(self, code: int, value: Any) -> None:
        self.reply = code, value

    def answer(self, asked: dict[str, Any]) -> tuple[int, Any]:
        return self.reply


@pytest.mark.parametrize(("code", "value", "message"), [
    (500, {"error": "no"}, "answered 500"), (200, b"<html>", "not valid JSON"), (200, [], "JSON object"),
    (200, {}, "could be matched"),
    (200, {"choices": [{"logprobs": {"tokens": [1], "token_logprobs": "x"}}]}, "could be matched"),
    (200, {"choices": [{"logprobs": {"tokens": ["q"], "token_logprobs": [None]}}]}, "matched"),
])
def test_servers_that_answer_otherwise_are_one_line(pair: tuple[Path, Path], code: int, value: Any, message: str,
                                                   capsys: pytest.CaptureFixture[str]) -> None:
    with serving(Broken(code, value)) as url:
        assert run(["evaluate", str(pair[0]), "--adapter", str(pair[1]), "--check-serving", url, "--served-name", "a",
                    "--serving-samples", "2", "--quiet"]) == 2
    caught = capsys.readouterr()
    assert message in caught.err
    assert "Traceback" not in caught.err


def test_names_and_addresses_are_checked(pair: tuple[Path, Path]) -> None:
    with serving(Broken(200, {})) as url:
        with pytest.raises(SettingsError, match=r"a, b.*served_name"):
            check_serving(url, str(pair[0]), adapter=str(pair[1]))
        with pytest.raises(SettingsError, match="no model 'c'"):
            check_serving(url, str(pair[0]), adapter=str(pair[1]), served_name="c")
    with pytest.raises(ServingError, match="cannot be reached"):
        check_serving(url, str(pair[0]), adapter=str(pair[1]))
    with pytest.raises(SettingsError, match="not the address"):
        check_serving("file:///etc/passwd", str(pair[0]), adapter=str(pair[1]))


def test_the_command_writes_its_table(pair: tuple[Path, Path], tmp_path: Path,
                                      capsys: pytest.CaptureFixture[str]) -> None:
    with serving(Served(pair[0], pair[1])) as url:
        assert run(["evaluate", str(pair[0]), "--adapter", str(pair[1]), "--check-serving", url, "--serving-samples",
                    "3", "--serving-tokens", "16", "--out", str(tmp_path / "out"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["verdict"] == "applied"
    assert (tmp_path / "out" / "tokens.csv").read_text().count("\n") == 3 * 15 + 1
    assert run(["evaluate", str(pair[0]), "--check-serving", "http://localhost:1", "--quiet"]) == 2
    assert "--adapter" in capsys.readouterr().err
