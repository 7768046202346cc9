"""Profile against the two bare forward passes on the same batches.

Prints the time of the passes through the models' bodies (embeddings to final norm) and through the
full models with their heads, the time of the whole profile with all default metrics, their ratio,
tokens/s, bytes written, and (each in a fresh process) the peak memory of the two models running bare
and of the profile.

    python benchmarks/profile.py                                     # 200 pooled, 50 token-level samples
    python benchmarks/profile.py --samples 8 --token-samples 4       # a quick look
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import _common as common

# isort: split
import torch

from midblock.analysis.profile import profile
from midblock.capture import model_inputs
from midblock.data import make_batches, pad_token_id, tokenize


def bare(models: list[Any], batches: list[Any], *, head: bool) -> None:
    """Both models over all batches; nothing is kept."""
    with torch.inference_mode():
        for batch in batches:
            for loaded in models:
                module = loaded.model if head else loaded.anatomy.body
                module(**model_inputs(loaded.model, batch))


def folder_bytes(folder: Path) -> int:
    """Size of all files in a folder."""
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def child_peak(part: str, argv: list[str]) -> int:
    """Peak memory in bytes of this script run as ``--only part`` in a fresh process."""
    done = subprocess.run([sys.executable, __file__, *argv, "--only", part, "--repeats", "1"], check=True,
                          capture_output=True, text=True)
    return int(json.loads(done.stdout.splitlines()[-1])["peak"])


def main() -> None:
    made = common.parser(__doc__, samples=200)
    made.add_argument("--token-samples", type=int, default=50, help="token-level samples (default: %(default)s)")
    made.add_argument("--only", choices=["bare", "bare-head", "profile"], help="one part, for its peak memory")
    args = made.parse_args()
    models = common.load_two(args)
    data = common.exact_length_data(models[0], args.samples, args.tokens)
    rows = tokenize(data.sample(args.samples, 0), models[0].tokenizer, max_length=args.tokens, min_tokens=3).rows
    batches = make_batches(rows, batch_size=args.batch_size, pad_id=pad_token_id(models[0].tokenizer))
    settings: dict[str, Any] = {"samples": args.samples, "token_samples": args.token_samples,
                                "max_length": args.tokens, "batch_size": args.batch_size}

    def measure() -> tuple[Any, int]:
        from midblock.provenance import RunFolder
        from midblock.report import save_result

        with tempfile.TemporaryDirectory() as place:
            with RunFolder(Path(place) / "run", command="profile", settings=settings) as run:
                found = profile(models, data=data, names=["base", "sft"], state_folder=run.path / "state", **settings)
                save_result(run, found)
            return found, folder_bytes(Path(place))

    def measure_only() -> Any:
        return profile(models, data=data, names=["base", "sft"], **settings)

    if args.only:
        if args.only == "profile":
            measure_only()
        else:
            bare(models, batches, head=args.only == "bare-head")
        print(json.dumps({"peak": common.peak_bytes()}))
        return

    print(common.machine(models[0]))
    lengths = [len(row) for row in rows]
    tokens = 2 * sum(lengths)
    rates = common.Rates(models[0], args.batch_size * args.tokens)
    print(rates)
    bodies, heads = rates.forward(lengths) * 2, rates.forward(lengths, head_tokens=sum(lengths)) * 2
    body_seconds, _ = common.timed(lambda: bare(models, batches, head=False), args.repeats)
    head_seconds, _ = common.timed(lambda: bare(models, batches, head=True), args.repeats)
    own_seconds, result = common.timed(measure_only, args.repeats)
    written_seconds, (_, written) = common.timed(measure, 1, warm=False)
    argv = sys.argv[1:]
    peaks = {part: child_peak(part, argv) for part in ("bare", "bare-head", "profile")}
    weights = sum(p.numel() * p.element_size() for m in models for p in m.model.parameters())
    common.table(
        f"profile: {len(rows)} pooled and {args.token_samples} token-level samples of {args.tokens} tokens, "
        f"{len(result.frame)} figures at hidden 0..{result.num_hidden - 1} ({models[0].spec}, "
        f"{str(models[0].dtype).removeprefix('torch.')})",
        [["two bare passes, bodies only", f"{body_seconds:.2f}", f"{tokens / body_seconds:,.0f}",
          f"{own_seconds / body_seconds:.2f}", rates.share(bodies, body_seconds), common.mib(peaks["bare"])],
         ["two bare passes, full models with heads", f"{head_seconds:.2f}", f"{tokens / head_seconds:,.0f}",
          f"{own_seconds / head_seconds:.2f}", rates.share(heads, head_seconds), common.mib(peaks["bare-head"])],
         ["midblock profile, all default metrics", f"{own_seconds:.2f}", f"{tokens / own_seconds:,.0f}", "1",
          rates.share(bodies, own_seconds), common.mib(peaks["profile"])],
         ["the same with table, figures and run.json", f"{written_seconds:.2f}", f"{tokens / written_seconds:,.0f}",
          f"{own_seconds / written_seconds:.2f}", rates.share(bodies, written_seconds), ""]],
        ["work", "seconds", "tokens/s", "profile takes times that", "share of the products' rate", "peak memory"])
    print(f"\nWeights of the two models: {common.mib(weights)}. Profile's peak over the bare bodies: "
          f"{common.mib(peaks['profile'] - peaks['bare'])} (target: at most 500 MiB). Bytes written: {written:,} "
          f"(no intermediate files). Profile over the full bare passes: {own_seconds / head_seconds:.2f}, over "
          f"bodies alone: {own_seconds / body_seconds:.2f} (target: at most 1.15); bodies "
          f"reach {rates.share(bodies, body_seconds)} of the products' rate (target: at least 0.80).")


if __name__ == "__main__":
    main()
