"""A small world of models, data, plans and finished and interrupted runs, and the commands that read them."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from campaign_mutations import OPTIONS, damage

FAST = ["--samples", "4", "--max-length", "32", "--quiet"]


@contextlib.contextmanager
def interrupted_after(what: str, done: int) -> Iterator[None]:
    """Within the context the commands' progress raises KeyboardInterrupt once ``what`` has come so far."""
    from midblock.cli import console

    kept = console.progress_bar

    @contextlib.contextmanager
    def stopping(**options: Any) -> Iterator[Any]:
        def tell(label: str, count: float, total: float, note: str = "") -> None:
            if label == what and count >= done:
                raise KeyboardInterrupt

        yield tell

    console.progress_bar = stopping
    try:
        yield
    finally:
        console.progress_bar = kept


def build(folder: Path) -> None:
    """Fill an empty folder; takes about half a minute.

    ``m``, ``m-sft``: a tiny Llama of 5 blocks and a changed copy; ``adapter``: a LoRA of it; ``d.jsonl``,
    ``chat.jsonl``, ``d.csv``, ``d.json``: rows; ``plan.json``; ``sweep.yaml``; ``runs/*``: finished runs;
    ``stopped/*``: interrupted ones.
    """
    import torch

    from conftest import build_tiny_tokenizer
    from families import FAMILIES
    from midblock.cli.app import run
    from midblock.models import save_checkpoint

    def ok(*words: str, code: int = 0) -> None:
        found = run([*words])
        assert found == code, (words, found)

    model = FAMILIES["llama"](seed=0, num_hidden_layers=5)
    save_checkpoint(model, build_tiny_tokenizer(), folder / "m")
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    save_checkpoint(model, build_tiny_tokenizer(), folder / "m-sft")
    rows = [
        {"prompt": f"what is {i} and {i * i}? ", "completion": f"it is {i + i * i}, of course."} for i in range(12)
    ]
    (folder / "d.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (folder / "d.json").write_text(json.dumps(rows))
    (folder / "d.csv").write_text(
        "prompt,completion\n" + "".join(f"{r['prompt']},{r['completion'][:5]}\n" for r in rows)
    )
    chats = [
        {
            "tools": [{"type": "function", "function": {"name": "w"}}],
            "messages": [
                {"role": "user", "content": f"hello {i}"},
                {
                    "role": "assistant",
                    "content": "yes",
                    "reasoning_content": "why",
                    "tool_calls": [{"type": "function", "function": {"name": "w", "arguments": {"i": i}}}],
                },
                {"role": "tool", "content": "72F"},
                {"role": "assistant", "content": f"it is {i}"},
            ],
        }
        for i in range(6)
    ]
    (folder / "chat.jsonl").write_text("".join(json.dumps(r) + "\n" for r in chats))
    (folder / "sweep.yaml").write_text(
        json.dumps(
            {
                "model": "m",
                "dtype": "float32",
                "device": "cpu",
                "seeds": [0, 1],
                "train": {"data": "d.jsonl", "split": "all", "max_length": 32},
                "training": {"steps": 2, "batch_size": 4, "learning_rates": [0.01], "full_learning_rates": [0.003]},
                "arms": {"baseline": "11111", "singles": 5},
                "budget": "match:11111@2",
                "evaluation": [{"task": "perplexity", "data": "chat.jsonl", "name": "answers", "max_length": 32}],
                "statistics": {"replicates": 100},
            },
            indent=1,
        )
    )
    kept = Path.cwd()
    os.chdir(folder)
    try:
        tune = [
            "tune",
            "m",
            "--data",
            "d.jsonl",
            "--mask",
            "00100",
            "--rank",
            "2",
            "--dtype",
            "float32",
            "--batch-size",
            "4",
            "--max-length",
            "32",
            "--quiet",
        ]
        ok(*tune, "--steps", "2", "--out", "runs/tune")
        shutil.copytree("runs/tune/adapter", "adapter")
        ok(
            "profile",
            "m",
            "m-sft",
            "--data",
            "d.jsonl",
            "--samples",
            "6",
            "--token-samples",
            "4",
            "--replicates",
            "20",
            "--quiet",
            "--out",
            "runs/profile",
        )
        ok("weights", "m", "m-sft", "--quiet", "--out", "runs/weights")
        for seed in ("0", "1"):
            ok(
                "importance",
                "m",
                "--data",
                "d.jsonl",
                "--max-steps",
                "4",
                "--score-steps",
                "3",
                "--rank",
                "2",
                "--check-every",
                "2",
                "--window",
                "2",
                "--batch-size",
                "4",
                "--max-length",
                "32",
                "--seed",
                seed,
                "--apply",
                "top:0.25",
                "--quiet",
                "--out",
                f"runs/importance-{seed}",
            )
        shutil.copy(next(Path("runs/importance-0/plans").glob("ila*.json")), "plan.json")
        ok(
            "evaluate",
            "m",
            "--task",
            "perplexity",
            "--data",
            "d.jsonl",
            "--samples",
            "4",
            "--max-length",
            "32",
            "--quiet",
            "--out",
            "runs/evaluate",
        )
        ok("sweep", "sweep.yaml", "--out", "runs/sweep", "--quiet")
        with interrupted_after("tune", 3):
            ok(*tune, "--steps", "6", "--save-steps", "1", "--out", "stopped/tune", code=130)
    finally:
        os.chdir(kept)


@dataclass(frozen=True)
class Case:
    """One command on one damaged input."""

    words: list[str]
    target: str | None
    """The damaged file; None: an option has a strange value."""


def _tune(*more: str) -> list[str]:
    return [
        "tune",
        "m",
        "--dtype",
        "float32",
        "--batch-size",
        "4",
        "--max-length",
        "32",
        "--quiet",
        "--steps",
        "1",
        *more,
        "--out",
        "out",
    ]


_MASKED = ["--mask", "00100", "--rank", "2"]
_MODEL_FILES = [
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "config.json",
    "model.safetensors",
]
COMMANDS: list[tuple[list[str], list[str]]] = [
    (["inspect", "m"], ["m/config.json", "m/model.safetensors", "m/config.json"]),
    (
        ["weights", "m", "m-sft", "--quiet", "--out", "out"],
        ["m-sft/model.safetensors", "m/config.json", "m-sft/config.json", "m/model.safetensors"],
    ),
    (["weights", "m", "m-sft", "--no-spectra", "--quiet", "--out", "out"], ["m-sft/model.safetensors"]),
    (
        ["weights", "m", "adapter", "--quiet", "--out", "out"],
        ["adapter/adapter_config.json", "adapter/adapter_model.safetensors"],
    ),
    (
        ["lens", "m", "m-sft", "--data", "d.jsonl", *FAST, "--out", "out"],
        ["d.jsonl", *(f"m-sft/{f}" for f in _MODEL_FILES)],
    ),
    (["lens", "m", "--data", "d.json", *FAST, "--out", "out"], ["d.json"]),
    (["lens", "m", "--data", "d.csv", *FAST, "--out", "out"], ["d.csv"]),
    (
        [
            "profile",
            "m",
            "m-sft",
            "--data",
            "d.jsonl",
            *FAST,
            "--replicates",
            "10",
            "--token-samples",
            "2",
            "--out",
            "out",
        ],
        ["d.jsonl", "m/config.json", "m/tokenizer.json"],
    ),
    (["swap", "m", "m-sft", "--data", "d.jsonl", *FAST, "--out", "out"], ["m-sft/config.json", "d.jsonl"]),
    (
        ["merge", "m", "m-sft", "--data", "d.jsonl", *FAST, "--out", "out", "--save", "saved"],
        ["m-sft/config.json", "m-sft/model.safetensors"],
    ),
    (["gradients", "m", "--data", "d.jsonl", *FAST, "--out", "out"], ["d.jsonl", "m/config.json"]),
    (
        ["gradients", "m", "m-sft", "--data", "d.jsonl", *FAST, "--profile", "runs/profile", "--out", "out"],
        ["runs/profile/run.json", "runs/profile/table.csv"],
    ),
    (["steer", "m", "m-sft", "--data", "d.jsonl", *FAST, "--out", "out"], ["d.jsonl", "m-sft/config.json"]),
    (
        ["correlate", "runs/profile", "runs/weights", "--quiet", "--out", "out"],
        ["runs/profile/run.json", "runs/profile/table.csv", "runs/weights/table.csv", "runs/weights/run.json"],
    ),
    (_tune("--data", "d.jsonl", *_MASKED), ["d.jsonl", *(f"m/{f}" for f in _MODEL_FILES)]),
    (_tune("--data", "chat.jsonl", *_MASKED), ["chat.jsonl", "chat.jsonl", "m/tokenizer_config.json"]),
    (_tune("--data", "d.jsonl", "--plan", "plan.json"), ["plan.json", "plan.json", "plan.json"]),
    (
        [
            "tune",
            "m",
            "--data",
            "d.jsonl",
            *_MASKED,
            "--dtype",
            "float32",
            "--batch-size",
            "4",
            "--max-length",
            "32",
            "--quiet",
            "--steps",
            "6",
            "--save-steps",
            "1",
            "--out",
            "stopped/tune",
            "--resume",
        ],
        ["stopped/tune/*", "stopped/tune/*"],
    ),
    (
        ["evaluate", "m", "--adapter", "adapter", "--task", "perplexity", "--data", "d.jsonl", *FAST, "--out", "out"],
        ["adapter/adapter_config.json", "adapter/adapter_model.safetensors", "adapter/adapter_config.json"],
    ),
    (
        ["evaluate", "m", "--task", "answer_loss", "--data", "d.jsonl", *FAST, "--out", "out"],
        ["d.jsonl", "m/config.json"],
    ),
    (
        ["evaluate", "m", "--task", "perplexity", "--data", "d.jsonl", *FAST, "--out", "runs/evaluate", "--resume"],
        ["runs/evaluate/*"],
    ),
    (["sweep", "sweep.yaml", "--dry-run"], ["sweep.yaml", "sweep.yaml", "sweep.yaml", "d.jsonl", "m/config.json"]),
    (["sweep", "sweep.yaml", "--out", "runs/sweep", "--resume", "--quiet"], ["runs/sweep/*", "runs/sweep/results/*"]),
    (
        [
            "importance",
            "m",
            "--data",
            "d.jsonl",
            *FAST,
            "--max-steps",
            "2",
            "--score-steps",
            "2",
            "--rank",
            "2",
            "--out",
            "out",
        ],
        ["d.jsonl", "m/config.json"],
    ),
    (
        ["overlap", "runs/importance-0", "runs/importance-1", "--quiet", "--out", "out"],
        ["runs/importance-0/run.json", "runs/importance-0/table.csv", "runs/importance-1/table.csv"],
    ),
    (["locate", "m", *FAST, "--out", "out"], ["m/config.json", "m/model.safetensors"]),
    (
        ["locate", "--validate", "runs/sweep", "--quiet", "--out", "out"],
        ["runs/sweep/run.json", "runs/sweep/table.csv"],
    ),
]
_FREE = {"--out", "--quiet", "--no-spectra", "--dry-run", "--resume"}


def case_of(seed: int, number: int, world: Path) -> Case:
    """The case of a number; equal in every run with the seed."""
    rng = random.Random(f"{seed}:{number}")
    words, targets = COMMANDS[number % len(COMMANDS)]
    words = list(words)
    if rng.random() < 0.2:
        return Case(_strange_option(words, rng), None)
    target = rng.choice(targets)
    if target.endswith("/*"):
        files = sorted(p for p in (world / target[:-2]).rglob("*") if p.is_file() and "figures" not in p.parts)
        target = str(rng.choice(files).relative_to(world))
    return Case(words, target)


def _strange_option(words: list[str], rng: random.Random) -> list[str]:
    """One option's value replaced, or an option added that the command has."""
    import typer

    from midblock.cli import app

    command = typer.main.get_command(app.app).commands[words[0]]  # type: ignore[attr-defined]
    known = sorted(
        {o for p in command.params for o in p.opts if o.startswith("--")}
        - {
            "--help",
            "--json",
            "--quiet",
            "--trust-remote-code",
            "--allow-code-execution",
            "--allow-unsandboxed-code",
            "--version",
            "--paper",
        }
    )
    flags = {o for p in command.params if getattr(p, "is_flag", False) for o in p.opts}
    option = rng.choice(known)
    value = rng.choice(OPTIONS)
    if option in flags:
        return [*words, option]
    if option in words:
        words[words.index(option) + 1] = value
        return words
    return [*words, option, value]


def apply(case: Case, seed: int, number: int, place: Path) -> str:
    """Damage what the case names; returns what was done."""
    if case.target is None:
        return "strange option"
    return damage(place / case.target, random.Random(f"{seed}:{number}:damage"))
