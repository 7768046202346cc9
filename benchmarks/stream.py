"""Profile a pair larger than the memory that is allowed, its blocks read one after another.

A random pair (bf16, sharded) is written to a scratch folder; each measured run is a process of its own whose address
space is limited (RLIMIT_AS), so that it ends with an error where it would need more. Printed: peak memory and time of
streamed profiles, bytes read against the files' size, the time of bare reading, and growth with samples and with depth.

    python benchmarks/stream.py --scratch /disk/with/13GB --limit 4GB
    python benchmarks/stream.py --scratch DIR --parameters 0.1e9 --compare     # small, beside the run in memory
"""

from __future__ import annotations

import argparse
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

BLOCKS = 28
_FOLDERS = ("base", "sft")


def options() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--scratch", type=Path, required=True, help="folder for the pair (emptied of it afterwards)")
    made.add_argument("--parameters", type=float, default=3e9, help="of one model, about (default: %(default)g)")
    made.add_argument("--limit", default="4GB", help="address space of each measured process (default: %(default)s)")
    made.add_argument("--samples", type=int, default=16, help="samples (default: %(default)s)")
    made.add_argument("--tokens", type=int, default=64, help="tokens of each (default: %(default)s)")
    made.add_argument("--batch-size", type=int, default=8, help="samples per forward pass (default: %(default)s)")
    made.add_argument("--compare", action="store_true", help="also in memory, without a limit")
    made.add_argument("--growth", action="store_true", help="also twice the samples, and half the depth")
    made.add_argument("--keep", action="store_true", help="leave the pair where it is, for another call")
    made.add_argument("--run", help=argparse.SUPPRESS)
    return made


def write_pair(folder: Path, parameters: float) -> int:
    """A random pair of a Llama of 28 blocks and about so many parameters; returns the bytes of one checkpoint."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from midblock.models import load_tokenizer, resolve_checkpoint

    tokenizer = load_tokenizer(resolve_checkpoint("smollm2"))
    width = 128 * max(2, round((parameters / BLOCKS / 11.5) ** 0.5 / 128))
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=width,
                         intermediate_size=128 * round(width * 8 / 3 / 128), num_hidden_layers=BLOCKS,
                         num_attention_heads=width // 64, num_key_value_heads=width // 128,
                         max_position_embeddings=2048, dtype="bfloat16", architectures=["LlamaForCausalLM"])
    with torch.device("meta"):
        shapes = {n: tuple(p.shape) for n, p in LlamaForCausalLM(config).named_parameters()}

    def shards(added: float) -> Iterator[dict[str, torch.Tensor]]:
        generator = torch.Generator().manual_seed(0)
        tensors: dict[str, torch.Tensor] = {}
        for weight, shape in shapes.items():
            tensors[weight] = torch.ones(shape, dtype=torch.bfloat16) if len(shape) == 1 else torch.empty(
                shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator).add_(added)
            if sum(t.nbytes for t in tensors.values()) > 500 << 20:
                yield tensors
                tensors = {}
        if tensors:
            yield tensors

    # the tuned one: the base with a little added
    return [common.write_checkpoint(folder / name, config, tokenizer, shards(added))
            for name, added in zip(_FOLDERS, (0.0, 0.001), strict=True)][-1]


def measured(args: argparse.Namespace, job: dict[str, Any]) -> None:
    """One profile in this process, under its limit; prints what it took as JSON."""
    from midblock.analysis.profile import profile
    from midblock.models import load_chain

    if job["limit"]:
        resource.setrlimit(resource.RLIMIT_AS, (job["limit"], job["limit"]))
    start, before = time.perf_counter(), common.read_bytes()
    specs = [str(args.scratch / name) for name in _FOLDERS]
    # an address space holds libraries and thread stacks too, which memory does not: hence a lower limit of memory
    chain = load_chain(specs, dtype="bfloat16", device="cpu", stream=job["stream"],
                       memory_limit=int(0.8 * job["limit"]) if job["limit"] else None)
    loaded = time.perf_counter()
    data = common.exact_length_data(chain[0], job["samples"], args.tokens)
    result = profile(chain, data=data, samples=job["samples"], token_samples=max(2, job["samples"] // 2),
                     max_length=args.tokens, batch_size=args.batch_size, replicates=100)
    done = time.perf_counter()
    parts = [m.streamed for m in chain if m.streamed is not None]
    print(json.dumps({
        "peak": common.peak_bytes(), "seconds": done - start, "load": loaded - start,
        "read": common.read_bytes() - before, "block": max((p.block_bytes for p in parts), default=0),
        "hidden": 2 * job["samples"] * args.tokens * chain[0].anatomy.hidden_size * 2,
        "table": result.frame.to_csv(index=False)}))


def run(args: argparse.Namespace, **job: Any) -> dict[str, Any]:
    """A measured run in a process of its own."""
    words = [sys.executable, __file__, "--scratch", str(args.scratch), "--tokens", str(args.tokens), "--batch-size",
             str(args.batch_size), "--run", json.dumps(job)]
    environment = {**os.environ, "MALLOC_ARENA_MAX": "2"}  # each arena reserves 64 MB of address space
    done = subprocess.run(words, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"{job}: {done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def bare_read(args: argparse.Namespace) -> tuple[float, int]:
    """Seconds and bytes of reading all files once, plainly."""
    start, size = time.perf_counter(), 0
    buffer = bytearray(64 << 20)
    for name in _FOLDERS:
        for path in sorted((args.scratch / name).glob("*.safetensors")):
            with path.open("rb", buffering=0) as stream:
                while got := stream.readinto(buffer):
                    size += got
    return time.perf_counter() - start, size


def set_blocks(args: argparse.Namespace, blocks: int) -> None:
    """So many of the blocks, by the config alone: the weights beyond are left aside."""
    for name in _FOLDERS:
        path = args.scratch / name / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "num_hidden_layers": blocks}))


def main() -> None:
    args = options().parse_args()
    if args.run:
        measured(args, json.loads(args.run))
        return
    print(common.machine())
    limit = parse_bytes(args.limit)
    started = time.perf_counter()
    there = [p.stat().st_size for p in (args.scratch / _FOLDERS[0]).glob("*.safetensors")]
    size = sum(there) or write_pair(args.scratch, args.parameters)
    print(f"\nPair: 2 x {size / 1e9:.2f} GB, there after {time.perf_counter() - started:.0f} s")
    try:
        seconds, read = bare_read(args)
        rows: list[list[Any]] = [["bare reading of both", "", f"{seconds:.1f} s", f"{read / 1e9:.2f} GB", "1.00", ""]]

        def add(what: str, found: dict[str, Any]) -> None:
            rows.append([what, common.mib(found["peak"]), f"{found['seconds']:.1f} s", f"{found['read'] / 1e9:.2f} GB",
                         f"{found['read'] / read:.2f}", common.mib(found["block"])])

        streamed = run(args, stream="always", limit=limit, samples=args.samples)
        add(f"streamed, {args.samples} samples, at most {args.limit}", streamed)
        if args.compare:
            whole = run(args, stream="never", limit=0, samples=args.samples)
            add("in memory, no limit", whole)
            print(f"\nSame table: {whole['table'] == streamed['table']}; streamed takes "
                  f"{streamed['seconds'] / whole['seconds']:.2f} times as long")
        if args.growth:
            add(f"streamed, {2 * args.samples} samples", run(args, stream="always", limit=limit,
                                                             samples=2 * args.samples))
            set_blocks(args, BLOCKS // 2)
            add("streamed, half the blocks", run(args, stream="always", limit=limit, samples=args.samples))
            set_blocks(args, BLOCKS)
        common.table(f"Streamed profile of 2 x {size / 1e9:.1f} GB, {args.tokens} tokens a sample", rows,
              ["run", "peak memory", "time", "read", "of the files", "one block"])
        print(f"\nHidden states: {common.mib(streamed['hidden'])}; loading (config, embeddings, norms, heads): "
              f"{streamed['load']:.1f} s of the streamed run")
    finally:
        if not args.keep:
            for name in _FOLDERS:
                shutil.rmtree(args.scratch / name, ignore_errors=True)


if __name__ == "__main__":
    main()
