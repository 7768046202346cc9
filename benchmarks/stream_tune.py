"""Tune a block of a 4-bit model that is larger than the memory that is allowed, its frozen blocks read when they run.

A random model of Llama-3-8B's shape (32 blocks of d = 4096, 128,256 tokens), stored in 4 bit by bitsandbytes, is
written to a scratch folder, and tuned in a process whose data (everything that it may write to: heap, anonymous and
private mappings) is limited by RLIMIT_DATA, so that it ends with an error where it would need more. Printed: peak
memory, time and bytes read of the parts of a run.

    python benchmarks/stream_tune.py --scratch /disk/with/6GB --limit 4GB --mask 01000
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import _common as common

# isort: split
import torch

from midblock.sizes import parse_bytes

_NAME = "8b-4bit"
_CONFIG = {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
           "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192,
           "rope_theta": 500000.0, "dtype": "bfloat16", "architectures": ["LlamaForCausalLM"]}


def options() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--scratch", type=Path, required=True, help="folder for the model (emptied of it afterwards)")
    made.add_argument("--limit", default="4GB", help="data of the measured process (default: %(default)s)")
    made.add_argument("--mask", default="01000", help="what is tuned (default: %(default)s)")
    made.add_argument("--rank", type=int, default=8, help="of the LoRA (default: %(default)s)")
    made.add_argument("--rows", type=int, default=4, help="rows (default: %(default)s)")
    made.add_argument("--tokens", type=int, default=32, help="tokens of each (default: %(default)s)")
    made.add_argument("--batch-size", type=int, default=2, help="rows of a step (default: %(default)s)")
    made.add_argument("--epochs", type=int, default=2, help="passes over the rows (default: %(default)s)")
    made.add_argument("--blocks", type=int, default=32, help="blocks of the model (default: %(default)s)")
    made.add_argument("--compare", action="store_true", help="also in memory, without a limit")
    made.add_argument("--keep", action="store_true", help="leave the model where it is")
    made.add_argument("--run", help=argparse.SUPPRESS)
    return made


def write_model(folder: Path, blocks: int) -> int:
    """A random model in 4 bit (NF4, double quantisation), a file for each block; returns its bytes."""
    from bitsandbytes.nn import Params4bit
    from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

    from midblock.models import load_tokenizer, resolve_checkpoint

    stored = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                                bnb_4bit_compute_dtype=torch.bfloat16)
    config = LlamaConfig(**{**_CONFIG, "num_hidden_layers": blocks}, quantization_config=stored.to_dict())
    with torch.device("meta"):
        shapes = {n: tuple(p.shape) for n, p in LlamaForCausalLM(config).named_parameters()}
    parts: dict[str, list[str]] = {}
    for name in shapes:
        parts.setdefault(name.split(".")[2] if ".layers." in name else name, []).append(name)

    def files() -> Iterator[dict[str, torch.Tensor]]:
        for number, names in enumerate(parts.values()):
            generator = torch.Generator().manual_seed(number)
            tensors: dict[str, torch.Tensor] = {}
            for name in names:
                if len(shapes[name]) == 1:
                    tensors[name] = torch.ones(shapes[name], dtype=torch.bfloat16)
                    continue
                tensors[name] = torch.empty(shapes[name], dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
                if ".layers." in name:
                    held = Params4bit(tensors[name], requires_grad=False, quant_type="nf4", compress_statistics=True
                                      ).to("cpu")
                    tensors[name] = held.data
                    tensors |= {f"{name}.{key}": v for key, v in held.quant_state.as_dict(packed=True).items()}
            yield tensors

    return common.write_checkpoint(folder, config, load_tokenizer(resolve_checkpoint("smollm2")), files())


def measured(args: argparse.Namespace, job: dict[str, Any]) -> None:
    """One tuning in this process, under its limit; prints what it took as JSON."""
    from midblock.data import TokenRow, TokenRows
    from midblock.models import load_chain
    from midblock.tuning import tune

    if job["limit"]:
        resource.setrlimit(resource.RLIMIT_DATA, (job["limit"], job["limit"]))
    marks: list[tuple[str, float, int]] = [("begin", time.perf_counter(), common.read_bytes())]

    def mark(what: str) -> None:
        marks.append((what, time.perf_counter(), common.read_bytes()))

    loaded = load_chain([str(args.scratch / _NAME)], dtype="bfloat16", device="cpu", stream=job["stream"],
                        memory_limit=job["limit"] or None)[0]
    mark("load")
    generator = torch.Generator().manual_seed(1)
    rows = TokenRows([TokenRow(i, tuple(torch.randint(10, 40000, (args.tokens,), generator=generator).tolist()),
                               ((args.tokens // 2, args.tokens),)) for i in range(args.rows)])

    def progress(what: str, done: int, *_: Any, **__: Any) -> None:
        if what == "tune":
            mark(f"step {done}")

    result = tune(loaded, rows, mask=args.mask, rank=args.rank, epochs=args.epochs, batch_size=args.batch_size,
                  learning_rate=1e-3, progress=progress)
    mark("end")
    weights = loaded.streamed
    print(json.dumps({
        "peak": common.peak_bytes(), "marks": marks, "losses": result.training.losses,
        "prefix": result.training.prefix, "blocks": result.plan.blocks,
        "block": 0 if weights is None else weights.block_bytes,
        "digest": float(sum(t.double().abs().sum() for t in result.state.values()))}))


def run(args: argparse.Namespace, **job: Any) -> dict[str, Any]:
    """A measured run in a process of its own."""
    words = [sys.executable, *sys.argv, "--run", json.dumps(job)]
    # what an allocator reserves and does not use counts too: 64 MB an arena, 1 GB of Arrow's
    environment = {**os.environ, "MALLOC_ARENA_MAX": "2", "ARROW_DEFAULT_MEMORY_POOL": "system"}
    done = subprocess.run(words, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"{job}: {done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    args = options().parse_args()
    if args.run:
        measured(args, json.loads(args.run))
        return
    print(common.machine())
    limit = parse_bytes(args.limit)
    folder = args.scratch / _NAME
    started = time.perf_counter()
    size = (sum(p.stat().st_size for p in folder.glob("*.safetensors")) if folder.exists()
            else write_model(folder, args.blocks))
    print(f"\nModel: {size / 1e9:.2f} GB, there after {time.perf_counter() - started:.0f} s")
    try:
        rows: list[list[Any]] = []
        found = {name: run(args, stream=stream, limit=most) for name, stream, most in (
            (f"streamed, at most {args.limit}", "always", limit),
            *([("in memory, no limit", "never", 0)] if args.compare else []))}
        for name, one in found.items():
            marks = one["marks"]
            for (_, before, read), (what, after, now) in itertools.pairwise(marks):
                rows.append([name, what, f"{after - before:.1f} s", f"{(now - read) / 1e9:.2f} GB", ""])
            rows.append([name, "all", f"{marks[-1][1] - marks[0][1]:.1f} s",
                         f"{(marks[-1][2] - marks[0][2]) / 1e9:.2f} GB", common.mib(one["peak"])])
        common.table(f"Tuning of {args.mask} of a 4-bit model of {size / 1e9:.1f} GB, {args.rows} rows of "
                     f"{args.tokens} tokens, {args.batch_size} a step", rows,
                     ["run", "part", "time", "read", "peak memory"])
        one = next(iter(found.values()))
        print(f"\nBlocks {one['blocks']}; losses {[round(v, 4) for v in one['losses']]}; prefix {one['prefix']}")
        if args.compare:
            print(f"Same losses: {len({str(f['losses']) for f in found.values()}) == 1}; same adapter: "
                  f"{len({f['digest'] for f in found.values()}) == 1}")
    finally:
        if not args.keep:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
