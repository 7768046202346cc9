"""What the benchmark scripts share: machine line, timing, models, data and the printed table."""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
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
    add_machine(made)
    return made


def add_machine(made: argparse.ArgumentParser) -> None:
    """Options of every benchmark that runs a model: where, on how many threads, in which dtype."""
    made.add_argument("--threads", type=int, default=None, help="torch threads (default: torch's own choice)")
    made.add_argument("--device", default="auto", help="auto, cpu, cuda (default: %(default)s)")
    made.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 (default: %(default)s)")


def use_threads(threads: int | None) -> None:
    """Of this process and of those that it starts."""
    if threads:
        torch.set_num_threads(threads)
        os.environ["OMP_NUM_THREADS"] = str(threads)


def load_two(args: argparse.Namespace) -> list[Any]:
    """Base and tuned model; without ``--sft`` a perturbed copy of the base."""
    from midblock.models import load_chain

    use_threads(args.threads)
    specs = [args.base, args.sft or args.base]
    models = load_chain(specs, names=["base", "sft"], dtype=args.dtype, device=args.device)
    if args.sft is None:
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in models[1].model.parameters():
                if parameter.ndim > 1:
                    noise = torch.randn(parameter.shape, generator=generator)
                    noise *= 0.01 * float(parameter.float().std())
                    parameter += noise.to(parameter.device, parameter.dtype)
    return models


def read_bytes() -> int:
    """Bytes that this process asked the system to read, so far."""
    for line in Path("/proc/self/io").read_text().splitlines():
        if line.startswith("rchar"):
            return int(line.split()[1])
    return 0


def write_checkpoint(folder: Path, config: Any, tokenizer: Any, files: Iterable[dict[str, torch.Tensor]]) -> int:
    """A checkpoint whose files are written as their tensors are made, with its index; returns its bytes."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    place: dict[str, str] = {}
    for number, tensors in enumerate(files):
        name = f"model-{number:05d}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        place.update(dict.fromkeys(tensors, name))
    size = sum(p.stat().st_size for p in folder.glob("*.safetensors"))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": size},
                                                                     "weight_map": place}))
    return size


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


def machine(loaded: Any = None) -> str:
    """One line: date, processor with its instructions or GPU, cores, threads, load, dtype, versions."""
    from midblock.models.dtypes import device_name, dtype_name

    cpu = torch.device("cpu")
    device = cpu if loaded is None else loaded.device
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    return (f"{datetime.now(UTC):%Y-%m-%d}; {device_name(cpu)}, {os.cpu_count()} cores, {torch.get_num_threads()} "
            f"threads, load {load:.1f}{'' if device.type == 'cpu' else f'; {device_name(device)}'}"
            f"{'' if loaded is None else f'; {loaded.spec} in {dtype_name(loaded.dtype)}'}; "
            f"Python {platform.python_version()}, torch {torch.__version__}")


@dataclass
class Work:
    """Floating-point operations that work cannot do without, apart for the blocks and the head."""

    blocks: float = 0.0
    head: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.blocks + other.blocks, self.head + other.head)

    def __mul__(self, times: float) -> Work:
        return Work(self.blocks * times, self.head * times)


class Rates:
    """What this device's products reach on a model's own shapes, measured in this process: the physical limit.

    Args:
        loaded: The model, whose blocks' and head's linear layers are timed in its dtype.
        rows: Tokens in one product, as the work has them.
        backward: Time the product with the outputs' gradient too, as in training.
        seconds: About how long to measure each of the two.
    """

    def __init__(self, loaded: Any, rows: int, *, backward: bool = False, seconds: float = 2.0) -> None:
        from midblock.models.products import block_shapes, product_rate

        self.anatomy = loaded.anatomy
        head = {(self.anatomy.vocab_size, self.anatomy.hidden_size): 1}
        self.blocks, self.head = (product_rate(shapes, loaded.device, loaded.dtype, rows=rows, seconds=seconds,
                                               backward=backward) for shapes in (block_shapes(self.anatomy), head))

    def __str__(self) -> str:
        return (f"Products of the model's own shapes, measured here: {self.blocks / 1e9:,.0f} GFLOP/s in its blocks, "
                f"{self.head / 1e9:,.0f} in its head.")

    def forward(self, lengths: Sequence[int], *, head_tokens: int = 0) -> Work:
        """Of rows of these lengths through every block, and of some tokens through the head."""
        return Work(sum(self.block(lengths, b) for b in range(self.anatomy.num_blocks)),
                    2.0 * head_tokens * self.anatomy.vocab_size * self.anatomy.hidden_size)

    def block(self, lengths: Sequence[int], index: int) -> float:
        """Operations of one block: its linear layers, and causal attention (half of the scores)."""
        from midblock.tuning.estimate import met_by_a_token

        return (2.0 * sum(lengths) * met_by_a_token(self.anatomy, index)
                + 2.0 * self.anatomy.hidden_size * sum(n * n for n in lengths))

    def share(self, work: Work, seconds: float) -> str:
        """Share of the products' rate that was reached: (operations / rate) / time."""
        return f"{(work.blocks / self.blocks + work.head / self.head) / seconds:.2f}"


class Shares:
    """What part of the products' rate a training reaches, by the operations that it cannot do without.

    Args:
        model: A loaded model.
        rows: The training rows.
        batch: Rows in a batch.
    """

    def __init__(self, model: Any, rows: Sequence[Any], batch: int) -> None:
        from midblock.tuning import TrainSettings

        self.rates = Rates(model, batch * sum(map(len, rows)) // len(rows), backward=True)
        self.tokens = sum(map(len, rows))
        labelled = sum(b - a for r in rows for a, b in r.supervised)
        self._head = 4.0 * labelled * model.anatomy.vocab_size * model.anatomy.hidden_size
        self._model, self._rows, self._settings = model, rows, TrainSettings(batch_size=batch)
        self._work: dict[tuple[str, bool], Work] = {}

    def of(self, mask: str, *, cached: bool, rate: float) -> str:
        """Of LoRA on a mask, with or without its prefix cached, at these tokens/s."""
        from midblock.tuning import make_plan
        from midblock.tuning.estimate import estimate

        if (mask, cached) not in self._work:
            flops = estimate(make_plan(self._model, mask=mask), self._model.anatomy, self._rows, self._settings,
                             dtype=self._model.dtype, cached=cached).epoch_flops
            self._work[mask, cached] = Work(flops - self._head, self._head)
        return self.rates.share(self._work[mask, cached], self.tokens / rate)


def timed(work: Callable[[], Any], repeats: int, *, warm: bool = True) -> tuple[float, Any]:
    """(median seconds, last result) of a function, after one untimed call."""
    result = work() if warm else None
    seconds = []
    for _ in range(max(1, repeats)):
        synchronize()
        start = time.perf_counter()
        result = work()
        synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), result


def synchronize() -> None:
    """Wait for what a GPU still has to do."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def peak_bytes() -> int:
    """Largest resident size of this process so far; of a GPU's memory where one is used."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
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
