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
from typing import TYPE_CHECKING

from campaign_mutations import OPTIONS, damage

from midblock.removing import LOCK

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextlib.contextmanager
def interrupted_after(calls: int) -> Iterator[None]:
    """Within the context the commands' progress raises KeyboardInterrupt when it is told something for that time."""
    from midblock import progress
    from midblock.cli import console

    kept, quiet = console.progress_bar, progress.silent
    left = calls

    def tell(label: str, count: float, total: float, note: str = "") -> None:
        nonlocal left
        left -= 1
        if left <= 0:
            raise KeyboardInterrupt

    console.progress_bar = lambda **options: contextlib.nullcontext(tell)  # type: ignore[assignment,return-value]
    progress.silent = tell  # what a quiet sweep tells
    try:
        yield
    finally:
        console.progress_bar, progress.silent = kept, quiet


TUNE = "tune m --data d.jsonl --mask 00100 --rank 2 --dtype float32 --batch-size 4 --max-length 32 --quiet"
PROFILE = ("profile m m-sft --data d.jsonl --samples 6 --max-length 32 --token-samples 4 --replicates 20 "
            "--batch-size 2 --quiet")
IMPORTANCE = ("importance m --data d.jsonl --max-steps 4 --score-steps 3 --rank 2 --check-every 2 --window 2 "
               "--batch-size 4 --max-length 32 --quiet")
EVALUATE = "evaluate m --task perplexity --data d.jsonl --samples 4 --max-length 32 --quiet"
STUDY = "study m m-sft --data d.jsonl --only weights,lens --lens-samples 4 --max-length 32 --quiet"
CACHE = "cache"
"""The folder below the world that is midblock's cache: converted models."""


def build_models(folder: Path) -> PreTrainedModel:
    """Write ``m``, a tiny Llama of 5 blocks, and ``m-sft``, a changed copy; returns the latter."""
    import torch

    from conftest import build_tiny_tokenizer
    from families import FAMILIES
    from midblock.models import save_checkpoint

    model = FAMILIES["llama"](seed=0, num_hidden_layers=5)
    save_checkpoint(model, build_tiny_tokenizer(), folder / "m")
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    save_checkpoint(model, build_tiny_tokenizer(), folder / "m-sft")
    return model


def build(folder: Path) -> None:
    """Fill an empty folder; takes about a minute.

    ``m``, ``m-sft``: a tiny Llama of 5 blocks and a changed copy; ``shards``: the latter in shards; ``adapter``: a
    LoRA of it; ``tiny.gguf`` (converted in ``cache``); ``d.*`` and ``chat.jsonl``: rows; ``plan.json``;
    ``sweep.yaml``, ``study.yaml``; ``rows``: a cache of prefixes; ``runs/*``: finished runs; ``stopped/*``:
    interrupted ones.
    """
    import gzip

    import pandas as pd

    from conftest import build_tiny_tokenizer
    from gguf_helpers import write_gguf
    from midblock.cli.app import run

    def ok(words: str, code: int = 0) -> None:
        found = run(words.split())
        assert found == code, (words, found)

    model = build_models(folder)
    model.save_pretrained(folder / "shards", max_shard_size="60KB")
    build_tiny_tokenizer().save_pretrained(folder / "shards")
    assert len(list((folder / "shards").glob("*.safetensors"))) > 1
    write_gguf(folder / "tiny.gguf")
    rows = [
        {"prompt": f"what is {i} and {i * i}? ", "completion": f"it is {i + i * i}, of course."} for i in range(12)
    ]
    lines = "".join(json.dumps(r) + "\n" for r in rows)
    (folder / "d.jsonl").write_text(lines)
    (folder / "d.jsonl.gz").write_bytes(gzip.compress(lines.encode(), mtime=0))
    (folder / "d.json").write_text(json.dumps(rows))
    pd.DataFrame(rows).to_parquet(folder / "d.parquet")
    (folder / "d.csv").write_text(
        "prompt,completion\n" + "".join(f"{r['prompt']},{r['completion'][:5]}\n" for r in rows)
    )
    for name, right in (("a", 9), ("b", 4)):
        (folder / f"samples_{name}.jsonl").write_text("".join(
            json.dumps({"doc_id": n, "doc_hash": f"h{n}", "doc": {"q": str(n)}, "filter": "none", "metrics": ["acc"],
                        "acc": float(n < right)}) + "\n" for n in range(12)))
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
    sweep = {
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
    }
    (folder / "sweep.yaml").write_text(json.dumps(sweep, indent=1))
    (folder / "study.yaml").write_text(json.dumps({
        "pairs": [["m", "m-sft"], ["m-sft", "m"]], "data": ["d.jsonl"], "only": ["weights", "lens"],
        "lens_samples": 4, "max_length": 32}, indent=1))
    kept, cache = Path.cwd(), os.environ.get("MIDBLOCK_CACHE")
    os.chdir(folder)
    os.environ["MIDBLOCK_CACHE"] = str(folder / CACHE)
    try:
        ok("inspect tiny.gguf")
        ok(f"{TUNE} --steps 2 --out runs/tune --cache disk:rows")
        shutil.copytree("runs/tune/adapter", "adapter")
        ok(f"{PROFILE} --out runs/profile")
        ok("weights m m-sft --quiet --out runs/weights")
        for seed in ("0", "1"):
            ok(f"{IMPORTANCE} --seed {seed} --apply top:0.25 --out runs/importance-{seed}")
        shutil.copy(next(Path("runs/importance-0/plans").glob("ila*.json")), "plan.json")
        ok(f"{EVALUATE} --out runs/evaluate")
        ok("sweep sweep.yaml --out runs/sweep --quiet")
        ok(f"{STUDY} --out runs/study")
        for words, calls in ((f"{TUNE} --steps 6 --save-steps 1 --out stopped/tune", 4),
                             (f"{PROFILE} --out stopped/profile", 2),
                             (f"{IMPORTANCE} --out stopped/importance", 5),
                             ("sweep sweep.yaml --out stopped/sweep --quiet", 8)):
            with interrupted_after(calls):
                ok(words, code=130)
        assert list(Path("stopped/profile").rglob("part-*.safetensors"))
    finally:
        os.chdir(kept)
        os.environ.pop("MIDBLOCK_CACHE")
        if cache is not None:
            os.environ["MIDBLOCK_CACHE"] = cache


@dataclass(frozen=True)
class Case:
    """One command on one damaged input."""

    words: list[str]
    target: str | None
    """The damaged file; None: an option has a strange value."""


ONE = "tune m --dtype float32 --batch-size 4 --max-length 32 --quiet --steps 1 --out out"
_MODEL = ("{m}/config.json {m}/model.safetensors {m}/tokenizer.json {m}/tokenizer_config.json "
          "{m}/generation_config.json {m}/config.json {m}/model.safetensors")
_M, _SFT = _MODEL.format(m="m"), _MODEL.format(m="m-sft")
FAST = "--samples 4 --max-length 32 --quiet --out out"
COMMANDS: list[tuple[str, str]] = [
    ("inspect m", "m/config.json m/model.safetensors m/config.json"),
    ("inspect shards", "shards/model.safetensors.index.json shards/*"),
    ("inspect tiny.gguf", "tiny.gguf cache/converted/*"),
    ("pairs", ""),
    ("weights m m-sft --quiet --out out",
     "m-sft/model.safetensors m/config.json m-sft/config.json m/model.safetensors"),
    ("weights m m-sft --no-spectra --quiet --out out", "m-sft/model.safetensors"),
    ("weights m shards --no-spectra --quiet --out out", "shards/model.safetensors.index.json shards/*"),
    ("weights m adapter --quiet --out out", "adapter/adapter_config.json adapter/adapter_model.safetensors"),
    (f"lens m m-sft --data d.jsonl {FAST}", f"d.jsonl {_SFT}"),
    (f"lens m --data d.json {FAST}", "d.json"),
    (f"lens m --data d.csv {FAST}", "d.csv"),
    (f"lens m --data d.parquet {FAST}", "d.parquet"),
    (f"lens m --data d.jsonl.gz {FAST}", "d.jsonl.gz"),
    ("weights tiny.gguf tiny.gguf --no-spectra --quiet --out out", "cache/converted/*"),
    (f"profile m m-sft --data d.jsonl --replicates 20 --token-samples 2 {FAST}",
     "d.jsonl m/config.json m/tokenizer.json"),
    (f"{PROFILE} --out stopped/profile --resume", "stopped/profile/*"),
    (f"swap m m-sft --data d.jsonl {FAST}", "m-sft/config.json d.jsonl"),
    (f"merge m m-sft --alphas 0,1,1,1,0 --data d.jsonl --save saved {FAST}",
     "m-sft/config.json m-sft/model.safetensors"),
    (f"gradients m --data d.jsonl {FAST}", "d.jsonl m/config.json"),
    (f"steer m m-sft --data d.jsonl {FAST}", "d.jsonl m-sft/config.json"),
    ("correlate runs/profile runs/weights --quiet --out out",
     "runs/profile/run.json runs/profile/table.csv runs/weights/table.csv runs/weights/run.json"),
    (f"{ONE} --mask 00100 --rank 2 --data d.jsonl", f"d.jsonl {_M}"),
    (f"{ONE} --mask 00100 --rank 2 --data chat.jsonl", "chat.jsonl chat.jsonl m/tokenizer_config.json"),
    (f"{ONE} --plan plan.json --data d.jsonl", "plan.json"),
    (f"{TUNE} --steps 2 --cache disk:rows --out out", "rows/*"),
    (f"{TUNE} --steps 6 --save-steps 1 --out stopped/tune --resume", "stopped/tune/*"),
    (f"evaluate m --adapter adapter --task perplexity --data d.jsonl {FAST}",
     "adapter/adapter_config.json adapter/adapter_model.safetensors adapter/adapter_config.json"),
    (f"evaluate m --task answer_loss --data d.jsonl {FAST}", "d.jsonl m/config.json"),
    (f"{EVALUATE} --out runs/evaluate --resume", "runs/evaluate/*"),
    ("compare samples_a.jsonl samples_b.jsonl --quiet --out out", "samples_a.jsonl samples_b.jsonl"),
    ("sweep sweep.yaml --dry-run", "sweep.yaml sweep.yaml sweep.yaml d.jsonl m/config.json"),
    ("sweep sweep.yaml --out runs/sweep --resume --quiet", "runs/sweep/* runs/sweep/results/*"),
    ("sweep sweep.yaml --out stopped/sweep --resume --quiet", "stopped/sweep/*"),
    (f"importance m --data d.jsonl --max-steps 2 --score-steps 2 --rank 2 {FAST}", "d.jsonl m/config.json"),
    (f"{IMPORTANCE} --out stopped/importance --resume", "stopped/importance/*"),
    ("overlap runs/importance-0 runs/importance-1 --quiet --out out",
     "runs/importance-0/run.json runs/importance-0/table.csv runs/importance-1/table.csv"),
    (f"locate m {FAST}", "m/config.json m/model.safetensors"),
    ("locate --validate runs/sweep --quiet --out out", "runs/sweep/run.json runs/sweep/table.csv"),
    (f"{STUDY} --out runs/study --resume", "runs/study/*"),
    ("study study.yaml --quiet --out out", "study.yaml"),
    ("report runs --out report.html", "runs/*/run.json runs/*/table.csv"),
    ("figures runs --columns one --quiet --out out", "runs/*/run.json runs/*/table.csv"),
]


def case_of(seed: int, number: int, world: Path) -> Case:
    """The case of a number; equal in every run with the seed."""
    rng = random.Random(f"{seed}:{number}")
    command, targets = COMMANDS[number % len(COMMANDS)]
    words = command.split()
    if rng.random() < 0.2 or not targets:
        return Case(_strange_option(words, rng), None)
    target = rng.choice(targets.split())
    if "*" in target:
        files = sorted(p for p in world.glob(f"{target.removesuffix('/*')}/**/*" if target.endswith("/*") else target)
                       if p.is_file() and not {"figures", LOCK} & {*p.relative_to(world).parts})
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
    value = rng.choice(OPTIONS)
    if not known:
        return [*words, value]
    option = rng.choice(known)
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
