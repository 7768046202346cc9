"""Every command on a real terminal of 80 and of 100 columns and through a pipe: nothing is cropped, nothing is broken.

What each shows is kept in ``snapshots/``, with every figure as ``#``. To write them anew after a change that was meant:
``MIDBLOCK_SNAPSHOTS=write pytest tests/cli/test_snapshots.py``.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from conftest import build_tiny_tokenizer
from families import FAMILIES
from midblock.cli.app import COMMANDS
from terminal import Shown, Terminal

SNAPSHOTS = Path(__file__).parent / "snapshots"
WIDTHS = (80, 100, None)
DATA = ["--data", "data.jsonl"]
SMALL = ["--samples", "8", "--max-length", "48"]
SWEEP = """
name: tiny
model: base
seeds: [0]
train: {data: data.jsonl, samples: 8, max_length: 48}
training: {steps: 2, batch_size: 4}
arms: {baseline: '111', singles: [3]}
budget: 'match:111@2'
evaluation: [{task: answer_loss, data: test.jsonl, samples: 6, max_length: 48}]
"""
# name of the snapshot -> words; OUT is a folder of its own
CALLS: dict[str, list[str]] = {
    "inspect": ["inspect", "base"],
    "pairs": ["pairs", "olmo"],
    "profile": ["profile", "base", "sft", *DATA, *SMALL, "--token-samples", "4", "--replicates", "50", "--out", "OUT"],
    "profile-itself": ["profile", "base", "base", *DATA, *SMALL, "--token-samples", "4", "--replicates", "50", "--out",
                       "OUT"],
    "lens": ["lens", "base", "sft", *DATA, *SMALL, "--every", "2", "--out", "OUT"],
    "swap": ["swap", "base", "sft", *DATA, *SMALL, "--segments", "4", "--out", "OUT"],
    "weights": ["weights", "base", "sft", "--out", "OUT"],
    "weights-itself": ["weights", "base", "base", "--out", "OUT"],
    "merge": ["merge", "base", "sft", "--alphas", "0,.5,1,.5", *DATA, *SMALL, "--out", "OUT"],
    "gradients": ["gradients", "base", *DATA, *SMALL, "--out", "OUT"],
    "steer": ["steer", "base", "sft", *DATA, *SMALL, "--blocks", "1:3", "--out", "OUT"],
    "correlate": ["correlate", "kept/profile", "kept/weights", "--out", "OUT"],
    "tune": ["tune", "base", *DATA, *SMALL, "--mask", "0110", "--rank", "2", "--steps", "2", "--out", "OUT"],
    "tune-dry-run": ["tune", "base", *DATA, *SMALL, "--mask", "0110", "--rank", "2", "--dry-run"],
    "evaluate": ["evaluate", "base", "--adapter", "kept/tune/adapter", "--compare-base", "--task", "answer_loss", *DATA,
                 *SMALL, "--out", "OUT"],
    "compare": ["compare", "a.jsonl", "b.jsonl"],
    "sweep": ["sweep", "sweep.yaml", "--out", "OUT"],
    "sweep-dry-run": ["sweep", "sweep.yaml", "--dry-run"],
    "importance": ["importance", "base", *DATA, *SMALL, "--max-steps", "3", "--score-steps", "3", "--rank", "2",
                   "--apply", "top:0.3", "--out", "OUT"],
    "overlap": ["overlap", "kept/importance", "kept/importance-1", "--out", "OUT"],
    "locate": ["locate", "base", *DATA, *SMALL, "--out", "OUT"],
    "locate-validate": ["locate", "--validate", "kept/sweep", "--samples", "8", "--max-length", "48", "--out", "OUT"],
    "study": ["study", "base", "sft", *DATA, "--only", "weights,lens", "--lens-samples", "4", "--max-length", "48",
              "--out", "OUT"],
    "report": ["report", "kept", "--out", "OUT.html"],
    "figures": ["figures", "kept", "--columns", "two", "--out", "OUT"],
}
KEPT = ("profile", "weights", "tune", "importance", "sweep")
"""Commands whose runs others read, in ``kept``."""

pytestmark = [pytest.mark.slow, pytest.mark.e2e]


def save_model(folder: Path, seed: int) -> None:
    FAMILIES["llama"](seed=seed).save_pretrained(folder)
    build_tiny_tokenizer().save_pretrained(folder)


@pytest.fixture(scope="module")
def terminal(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Terminal, Path]]:
    """A terminal in a folder with a tiny pair, data, logs, a sweep's configuration, and the runs that others read."""
    home = tmp_path_factory.mktemp("home")
    for seed, name in enumerate(("base", "sft")):
        save_model(home / name, seed)
    rows = [{"prompt": f"what is {i} and {i + 3} plus one? ", "completion": f"it is {2 * i + 4}, of course."}
            for i in range(40)]
    for name, part in (("data", rows[:30]), ("test", rows[30:])):
        (home / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in part), encoding="utf-8")
    (home / "sweep.yaml").write_text(SWEEP, encoding="utf-8")
    for name, right in (("a", range(30)), ("b", range(22))):
        (home / f"{name}.jsonl").write_text("".join(
            json.dumps({"doc_id": i, "doc_hash": f"h{i}", "acc": float(i in right), "metrics": ["acc"]}) + "\n"
            for i in range(40)), encoding="utf-8")
    made = Terminal(home)
    try:
        for name in KEPT:
            words = [w.replace("OUT", f"kept/{name}") for w in CALLS[name]]
            assert made.run(words, None).code == 0, name
        again = [w.replace("OUT", "kept/importance-1") for w in CALLS["importance"]]
        assert made.run([*again, "--seed", "1"], None).code == 0
        made.run(CALLS["inspect"], None)  # what it counted is remembered from here on
        yield made, home
    finally:
        made.close()


def shown(terminal: tuple[Terminal, Path], name: str, columns: int | None) -> Shown:
    # the same folder at every width, so that paths are the same words
    made, home = terminal
    out = f"run-{name}"
    if (home / out).exists():
        (home / out).rename(home / f"{out}-before-{columns}")
    (home / f"{out}.html").unlink(missing_ok=True)
    return made.run([w.replace("OUT", out) for w in CALLS[name]], columns)


def masked(text: str) -> str:
    """Text without its figures, and without what only their widths decide."""
    text = re.sub(r"(?<![\w./-])[-+~]?\d+(,\d{3})*(\.\d+)?(e[-+]?\d+)?(?![\w/])", "#", text)
    text = re.sub(r"\d+(\.\d+)?(?=/s\b|%)", "#", text)
    text = re.sub(r"─+", "─", text)
    return re.sub(r"[ \t]+", " ", text).strip()


def words_of(text: str) -> set[str]:
    text = re.sub(r"\(every row: [^)]*\)", "", text)  # what a narrow table says once
    return set(masked(text).replace(" \\\n", " ").split())


@pytest.mark.parametrize("name", CALLS)
def test_a_command_at_every_width(name: str, terminal: tuple[Terminal, Path]) -> None:
    found = {width: shown(terminal, name, width) for width in WIDTHS}
    assert {width: s.code for width, s in found.items()} == dict.fromkeys(WIDTHS, 0), found[None].text
    piped = found[None].text
    for width, seen in found.items():
        place = f"{name} at {width or 'a pipe'}"
        assert "…" not in seen.raw, place
        assert "Traceback" not in seen.text, place
        if width is not None:
            long = [line for line in seen.text.splitlines() if len(line) > width]
            assert not long, f"{place}: {long}"
            broken = words_of(seen.text) - words_of(piped) - {"\\"} - _progress(seen.text)
            assert not broken, f"{place}: {sorted(broken)}"
            assert not re.search(r"\d,\n\s*\d{3}\b", seen.text), place
    endings = [line for line in piped.strip().splitlines()[-3:] if line.strip()]
    assert len(endings) <= 3
    path = SNAPSHOTS / f"{name}.txt"
    text = "".join(f"== {f'{width} columns' if width else 'piped'}\n{_kept(s.text)}\n\n" for width, s in found.items())
    if os.environ.get("MIDBLOCK_SNAPSHOTS") == "write":
        SNAPSHOTS.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    assert path.is_file(), f"no snapshot of {name} yet: MIDBLOCK_SNAPSHOTS=write pytest {Path(__file__).name}"
    kept = path.read_text(encoding="utf-8")
    assert " ".join(kept.split()) == " ".join(text.split()), f"{name} shows something else than {path.name}"


def _progress(text: str) -> set[str]:
    """Words of bars, which a pipe does not show."""
    return {w for line in text.splitlines() if "━" in line or "╸" in line for w in masked(line).split()}


def _kept(text: str) -> str:
    """What a snapshot holds: no bars, no progress lines, no times."""
    lines = [line for line in text.splitlines()
             if "━" not in line and not re.match(r".+: \d+% \(", line) and "GFLOP/s" not in line]
    return masked("\n".join(lines))


def test_every_command_is_among_them() -> None:
    assert set(COMMANDS) - {words[0] for words in CALLS.values()} <= {"demo"}, "a command without a snapshot"
