"""A tiny saved model, tiny data files and a configuration for the tests of sweeps."""

from __future__ import annotations

import json
import math
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from conftest import build_tiny_tokenizer
from families import FAMILIES
from midblock.segments import segment_blocks
from midblock.sweeps import ArmInfo, RunRecord, SweepConfig, TaskScores, parse_config, read_records


def write_tiny_model(folder: Path, blocks: int = 5, **overrides: Any) -> Path:
    """A random Llama of ``blocks`` blocks with its tokenizer, as a checkpoint folder."""
    model = FAMILIES["llama"](seed=0, num_hidden_layers=blocks, **overrides)
    model.save_pretrained(folder)
    build_tiny_tokenizer().save_pretrained(folder)
    return folder


def write_rows(path: Path, first: int, count: int) -> Path:
    """Questions with answers that a tiny model can learn by heart: the answer is always alike."""
    rows = [{"prompt": f"the number {n} then", "completion": " one and one"} for n in range(first, first + count)]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return path


def write_texts(path: Path, count: int) -> Path:
    """General text for retention."""
    rows = [{"text": f"there are {n} stones on another shore and none of them is mine"} for n in range(count)]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return path


def tiny_values(folder: Path) -> dict[str, Any]:
    """Configuration values of a sweep of two arms and two seeds on files in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    model = folder / "model"
    if not model.exists():
        write_tiny_model(model)
    train = write_rows(folder / "train.jsonl", 0, 12)
    test = write_rows(folder / "test.jsonl", 100, 10)
    texts = write_texts(folder / "texts.jsonl", 6)
    return {
        "model": str(model), "dtype": "float32", "device": "cpu", "seeds": [0, 1],
        "train": {"data": str(train), "split": "all", "max_length": 64},
        "training": {"steps": 6, "batch_size": 4, "learning_rates": [0.01], "full_learning_rates": [0.003]},
        "arms": {"baseline": "11111", "masks": ["00100"]}, "budget": "match:11111@2",
        "evaluation": [{"task": "answer_loss", "data": str(test), "name": "answers"}],
        "retention": [{"task": "perplexity", "data": str(texts), "name": "texts", "max_length": 32}],
        "statistics": {"replicates": 200},
    }


def outcome(record: RunRecord) -> dict[str, Any]:
    """All of a record but times and memory."""
    return {"key": record.key, "status": record.status, "plan": record.plan,
            "losses": record.training.get("losses"),
            "tasks": {t: (s.items, s.scores, s.value) for t, s in record.tasks.items()}}


def driver_with_a_result(command: Sequence[str], out: Path, seconds: float) -> tuple[psutil.Popen, dict[str, int]]:
    """A sweep in a process of its own that has just written its first result; the results' names and times."""
    driver = psutil.Popen([*command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.monotonic() + seconds
    while not (done := list((out / "results").glob("*.json"))):
        assert time.monotonic() < until
        assert driver.poll() is None
        time.sleep(0.05)
    return driver, {p.name: p.stat().st_mtime_ns for p in done}


def assert_resumes(command: Sequence[str], out: Path, before: dict[str, int], local: dict[str, dict[str, Any]]) -> None:
    """Resumed, the sweep has what one process gives (`outcome` by key), and what was finished was not run again."""
    assert subprocess.run([*command, "--resume"], check=False).returncode == 0
    assert {k: outcome(r)["tasks"] for k, r in read_records(out).items()} == {k: v["tasks"] for k, v in local.items()}
    assert all((out / "results" / name).stat().st_mtime_ns == t for name, t in before.items())


# ---------------------------------------------------------------- planted results

ARMS = ["11111", "10000", "01000", "00100", "00010", "00001"]
PLANTED = {"11111": 0.5, "10000": 0.3, "01000": 0.6, "00100": 0.8, "00010": 0.6, "00001": 0.2}
ITEMS, SEEDS, STEPS = 150, 3, 40


def infos(names: Sequence[str] = ARMS, **changes: ArmInfo) -> dict[str, ArmInfo]:
    """Arms of a model of ten blocks; the baseline is 11111, the work is that of the blocks behind the first."""
    found = {}
    for name in names:
        mask = name.removeprefix("full-")
        blocks = tuple(segment_blocks(mask, 10))
        found[name] = ArmInfo(name, "full" if name.startswith("full") else "lora", mask, blocks, 10, 1000,
                              is_baseline=name == "11111", work=float(10 - blocks[0]))
    return found | changes


def scored(task: str, metric: str, scores: np.ndarray, tokens: float | None = None) -> TaskScores:
    """Scores of one run on one task."""
    return TaskScores(task, metric, metric == "accuracy", [f"i{k}" for k in range(len(scores))],
                      [float(s) for s in scores], None if tokens is None else [tokens] * len(scores),
                      float(np.mean(scores)), 0.0)


def settled(steps: int = STEPS) -> dict[str, Any]:
    """A training whose loss has settled."""
    return {"seconds": 1.0, "tokens_per_second": 5.0, "losses": [1.0 + 2.0 * math.exp(-k / 3) for k in range(steps)]}


def planted(rates: dict[str, float], *, seed: int = 0, forget: dict[str, float] | None = None,
            items: int = ITEMS, seeds: int = SEEDS, steps: int = STEPS) -> list[RunRecord]:
    """Right/wrong answers drawn with these rates over items of unequal difficulty, and retention losses."""
    rng = np.random.default_rng(seed)
    ease = rng.normal(0, 1, items)
    texts = rng.normal(3.0, 0.3, 40)

    def tasks(rate: float, rise: float) -> dict[str, TaskScores]:
        logit = math.log(rate / (1 - rate)) if rate > 0 else -np.inf
        right = rng.random(items) < 1 / (1 + np.exp(-(1.2 * logit + ease)))
        noise = rng.normal(0, 0.01, texts.size)
        return {"arithmetic": scored("arithmetic", "accuracy", right.astype(float)),
                "texts": scored("texts", "perplexity", texts + rise + noise * (rise != 0), tokens=20.0)}

    found = [RunRecord("base", None, None, "done", tasks=tasks(rates.get("base", 0.02), 0.0))]
    for arm, rate in rates.items():
        if arm != "base":
            found += [RunRecord(arm, 0.01, k, "done", training=settled(steps),
                                tasks=tasks(rate, (forget or {}).get(arm, 1e-6))) for k in range(seeds)]
    return found


def planted_config(folder: Path, **statistics: Any) -> SweepConfig:
    """The configuration that `planted` answers: arithmetic and texts, three seeds."""
    values = tiny_values(folder)
    values["evaluation"] = [{"task": "arithmetic"}]
    values["seeds"] = list(range(SEEDS))
    values["statistics"] = {"replicates": 500, **statistics}
    return parse_config(values)
