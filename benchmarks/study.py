"""A study against its commands one by one: the time of each, and what both find.

The commands are run as a user runs them, each a process of its own that imports, loads and draws anew; the study is
one process. The tuned model is written by this script (seeded noise of 1% of each matrix' scale on all blocks), unless
--sft names one. Tables must agree: to the last digit where parts stand in the same batches, else to rounding.

    python benchmarks/study.py                 # 48 pooled samples, 16 at the token level, of 128 tokens
    python benchmarks/study.py --samples 200 --token-samples 50 --tokens 256
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import _common as common

# isort: split
import pandas as pd

PARTS = ("weights", "profile", "lens", "swap", "gradients", "locate", "correlate")
_TARGET = 0.6


def midblock(*words: object) -> float:
    """Run the program; seconds."""
    begun = time.perf_counter()
    subprocess.run([sys.executable, "-m", "midblock", *map(str, words), "--quiet"], check=True,
                   stdout=subprocess.DEVNULL)
    return time.perf_counter() - begun


def difference(own: Path, studied: Path) -> float:
    """Largest relative difference of the values of two tables."""
    one, other = (pd.read_csv(p / "table.csv") for p in (own, studied))
    text = [c for c in one if one[c].dtype == object]
    if len(one) != len(other) or not one[text].equals(other[text]):
        raise SystemExit(f"{own.name}: the tables have other rows")
    a, b = one["value"], other["value"]
    scale = a.abs().groupby(one["metric"]).transform("max").clip(lower=1e-12)
    return float(((a - b).abs() / scale).max())


def main() -> None:
    made = common.parser(__doc__, samples=48)
    made.add_argument("--token-samples", type=int, default=16,
                      help="samples of token level, lens and swap (default: %(default)s)")
    made.add_argument("--gradient-samples", type=int, default=8,
                      help="samples of gradients and locate (default: %(default)s)")
    args = made.parse_args()
    models = common.load_two(args)
    print(common.machine(models[0]))
    rates = common.Rates(models[0], args.batch_size * args.tokens)
    print(rates)
    with tempfile.TemporaryDirectory(prefix="midblock-study-") as folder:
        home = Path(folder)
        from midblock.models import save_checkpoint

        pair: list[Any] = [args.base, args.sft]
        if args.sft is None:
            pair = [home / "base", home / "sft"]
            for model, path in zip(models, pair, strict=True):
                save_checkpoint(model.model, model.tokenizer, path)
        data = home / "rows.jsonl"
        texts = common.exact_length_data(models[0], args.samples, args.tokens).examples
        data.write_text("".join(json.dumps({"text": e.text}) + "\n" for e in texts))
        dtype = str(models[0].dtype).removeprefix("torch.")
        spec = f"{models[0].spec}, {dtype}"
        del models
        few, least = args.token_samples, args.gradient_samples
        shared = ["--max-length", args.tokens, "--batch-size", args.batch_size]
        place = ["--dtype", dtype, "--device", args.device]
        own = {
            "weights": ["weights", *pair],
            "profile": ["profile", *pair, "--data", data, "--samples", args.samples, "--token-samples", few, *shared,
                        *place],
            "lens": ["lens", *pair, "--data", data, "--samples", few, *shared, *place],
            "swap": ["swap", *pair, "--data", data, "--samples", few, *shared, *place],
            "gradients": ["gradients", *pair, "--data", data, "--samples", least, *shared, *place],
            "locate": ["locate", pair[0], "--data", data, "--samples", least, "--gradient-samples", least, *shared,
                       *place],
            "correlate": ["correlate", *(home / p for p in PARTS[:5])],
        }
        alone = {part: midblock(*own[part], "--out", home / part) for part in PARTS}
        whole = midblock("study", *pair, "--data", data, "--samples", args.samples, "--token-samples", few,
                         "--lens-samples", few, "--swap-samples", few, "--gradient-samples", least, *shared, *place,
                         "--out", home / "study")
        record = json.loads((home / "study" / "run.json").read_text())
        inside = record["seconds_of_parts"]
        off = {part: difference(home / part, home / "study" / part) for part in PARTS if part != "correlate"}
        rows = [[part, f"{alone[part]:.1f}", f"{inside[part]:.1f}", f"{off[part]:.1e}" if part in off else ""]
                for part in PARTS]
        rows.append(["shared pass", "", f"{inside['pass']:.1f}", ""])
        # weights are compared beside the others
        rows.append(["start, loading, report", "", f"{whole - sum(inside.values()) + inside['weights']:.1f}", ""])
        rows.append(["together", f"{sum(alone.values()):.1f}", f"{whole:.1f}", ""])
        common.table(f"study: {args.samples} samples of {args.tokens} tokens, {few} at the token level ({spec})", rows,
                     ["part", "its command, s", "in the study, s", "largest difference of a value"])
        # two bodies over all samples, and every hidden state of the lens' samples through both heads
        states = 2 * (rates.anatomy.num_blocks + 1)
        body = rates.forward([args.tokens] * args.samples).blocks * 2
        head = rates.forward([], head_tokens=states * few * (args.tokens - 1)).head
        share = rates.share(common.Work(body, head), inside["pass"])
        print(f"\nThe shared pass reaches {share} of the rate of these products.")
        ratio = whole / sum(alone.values())
        print(f"\nThe study takes {ratio:.2f} of the commands' time (target: at most {_TARGET}).")


if __name__ == "__main__":
    main()
