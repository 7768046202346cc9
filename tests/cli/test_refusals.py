"""What is wrong in a call is told before torch and transformers are imported, which takes seconds."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from conftest import build_tiny_tokenizer
from families import FAMILIES

DATA = ["--data", "data.jsonl"]
# words, and what the message names
CALLS: list[tuple[list[str], str]] = [
    (["inspect", "./nowhere/model"], "nowhere"),
    (["pairs", "nosuch"], "nosuch"),
    (["profile", "tiny", "./nowhere", *DATA], "nowhere"),
    (["profile", "tiny", "tiny", "--data", "absent.jsonl"], "absent.jsonl"),
    (["profile", "tiny", *DATA], "at least 2"),
    (["lens", "tiny", *DATA, "--top-k", "0"], "--top-k"),
    (["swap", "tiny", "./nowhere", *DATA], "nowhere"),
    (["weights", "tiny"], "at least 2"),
    (["weights", "tiny", "./nowhere"], "nowhere"),
    (["merge", "tiny", "tiny", "--alphas", "0,x", *DATA], "0,x"),
    (["gradients", "./nowhere", *DATA], "nowhere"),
    (["steer", "tiny", "./nowhere", *DATA], "nowhere"),
    (["correlate", "absent"], "absent"),
    (["tune", "./nowhere", *DATA, "--mask", "1"], "nowhere"),
    (["tune", "tiny", "--data", "absent.jsonl", "--mask", "1"], "absent.jsonl"),
    (["evaluate", "tiny", "--task", "gsm9k"], "did you mean gsm8k"),
    (["evaluate", "./nowhere", "--task", "answer_loss", *DATA], "nowhere"),
    (["compare", "absent", "data.jsonl"], "absent"),
    (["sweep", "absent.yaml", "--dry-run"], "absent.yaml"),
    (["importance", "tiny", *DATA, "--apply", "best:0.3"], "best:0.3"),
    (["overlap", "absent", "missing"], "absent"),
    (["locate", "tiny", *DATA, "--samples", "2"], "--samples"),
    (["locate", "./nowhere"], "nowhere"),
    (["study", "tiny"], "at least 2"),
    (["report", "absent"], "absent"),
]
CODE = """
import io, json, sys, contextlib
from midblock.cli.app import run
told = []
for words in json.loads(sys.argv[1]):
    stream = io.StringIO()
    with contextlib.redirect_stderr(stream):
        code = run(words)
    told.append([code, stream.getvalue(), sorted({"torch", "transformers"} & set(sys.modules))])
print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str, list[str]]]:
    """What every call said, all in one process: what one imports stays for the next."""
    home = tmp_path_factory.mktemp("refusals")
    FAMILIES["llama"]().save_pretrained(home / "tiny")
    build_tiny_tokenizer().save_pretrained(home / "tiny")
    (home / "data.jsonl").write_text('{"prompt": "a", "completion": "b"}\n', encoding="utf-8")
    done = subprocess.run([sys.executable, "-c", CODE, json.dumps([words for words, _ in CALLS])], cwd=home,
                          capture_output=True, text=True, timeout=120, check=True)
    return {" ".join(words): tuple(found) for (words, _), found in zip(CALLS, json.loads(done.stdout), strict=True)}


@pytest.mark.parametrize(("words", "named"), CALLS, ids=lambda v: " ".join(v) if isinstance(v, list) else "")
def test_a_mistake_is_told_before_anything_heavy(words: list[str], named: str,
                                                 told: dict[str, tuple[int, str, list[str]]]) -> None:
    code, message, heavy = told[" ".join(words)]
    assert code == 2, message
    assert message.startswith("Error: "), message
    assert named in message
    assert not heavy, f"{words[0]} imported {', '.join(heavy)} before it refused"
