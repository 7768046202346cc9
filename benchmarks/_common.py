"""What the benchmark scripts share: machine line, timing, models, data and the printed table."""

from __future__ import annotations

import argparse
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

# Python puts this folder first on its path, where profile.py would hide the standard library's module of that
# name, which torch imports: so every script imports this module before anything heavy.
_HERE = Path(__file__).resolve().parent
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != _HERE]

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as the midblock program does

import torch  # noqa: E402 (after the settings above)

from midblock.data import Dataset, Example  # noqa: E402


def parser(description: str | None, *, samples: int, tokens: int = 128) -> argparse.ArgumentParser:
    """Options of every benchmark: the pair, its size, repeats and threads."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--base", default="smollm2", help="MODEL spec of the base (default: %(default)s)")
    made.add_argument("--sft", default=None, help="MODEL spec of the tuned model (default: the base with seeded noise "
                                                  "of 1%% of each matrix' scale on its weights; times are the same)")
    made.add_argument("--samples", type=int, default=samples, help="samples (default: %(default)s)")
    made.add_argument("--tokens", type=int, default=tokens, help="tokens of each sample (default: %(default)s)")
    made.add_argument("--batch-size", type=int, default=8, help="samples per forward pass (default: %(default)s)")
    made.add_argument("--repeats", type=int, default=3, help="timed repeats; the median counts (default: %(default)s)")
    made.add_argument("--threads", type=int, default=None, help="torch threads (default: torch's own choice)")
    made.add_argument("--dtype", default="bfloat16", help="auto, float32, bfloat16 (default: %(default)s)")
    return made


def load_two(args: argparse.Namespace) -> list[Any]:
    """Base and tuned model; without ``--sft`` a perturbed copy of the base."""
    from midblock.models import load_chain

    if args.threads:
        torch.set_num_threads(args.threads)
    specs = [args.base, args.sft or args.base]
    models = load_chain(specs, names=["base", "sft"], dtype=args.dtype)
    if args.sft is None:
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in models[1].model.parameters():
                if parameter.ndim > 1:
                    noise = torch.randn(parameter.shape, generator=generator)
                    parameter += (0.01 * parameter.float().std() * noise).to(parameter.dtype)
    return models


def exact_length_data(loaded: Any, samples: int, tokens: int, source: str = "pydocs") -> Dataset:
    """Texts that the tokenizer turns into at least ``tokens`` tokens each, so that a limit makes all equal."""
    from midblock.data import load_data

    ids: list[int] = []
    for example in load_data(source).examples:
        ids += loaded.tokenizer(example.text, add_special_tokens=False)["input_ids"]
        if len(ids) > (tokens + 16) * samples:
            break
    while len(ids) < (tokens + 16) * samples:
        ids += ids
    step = tokens + 16  # decoding and encoding again can join tokens at the edges
    texts = [loaded.tokenizer.decode(ids[i * step:(i + 1) * step]) for i in range(samples)]
    return Dataset("exact", "all", source, [Example(text=t, where=f"{source}:{i}") for i, t in enumerate(texts)])


def machine() -> str:
    """One line: date, processor, cores, threads, load, versions."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    return (f"{datetime.now(UTC):%Y-%m-%d}; {model}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, load "
            f"{load:.1f}; Python {platform.python_version()}, torch {torch.__version__}")


def timed(work: Callable[[], Any], repeats: int, *, warm: bool = True) -> tuple[float, Any]:
    """(median seconds, last result) of a function, after one untimed call."""
    result = work() if warm else None
    seconds = []
    for _ in range(max(1, repeats)):
        start = time.perf_counter()
        result = work()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), result


def peak_bytes() -> int:
    """Largest resident size of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def table(title: str, rows: Sequence[Sequence[Any]], header: Sequence[str]) -> None:
    """Print a table that Markdown reads too."""
    cells = [[str(c) for c in header], *([str(c) for c in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    print(f"\n{title}\n")
    for number, row in enumerate(cells):
        print("| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |")
        if number == 0:
            print("|" + "|".join("-" * (w + 2) for w in widths) + "|")


def mib(size: float) -> str:
    """Bytes as MiB."""
    return f"{size / 2**20:,.0f} MiB"


def worst_disagreement(ours: dict[Any, float], theirs: dict[Any, float], floor: dict[str, float] | float = 1e-3
                       ) -> tuple[float, Any]:
    """Largest relative difference over common keys, and where; below ``floor`` it is taken relative to it."""
    if set(ours) != set(theirs):
        raise SystemExit(f"the two ways measured different things: {sorted(map(str, set(ours) ^ set(theirs)))[:5]}")
    worst: tuple[float, Any] = (0.0, None)
    for key, value in theirs.items():
        least = floor if isinstance(floor, float) else floor.get(key[0], 1e-3)
        off = abs(ours[key] - value) / max(abs(value), least)
        worst = max(worst, (off, key), key=lambda pair: pair[0])
    return worst
