"""Simulations behind docs/statistics.md: how often the tests err, how often the intervals hold the truth.

    python benchmarks/simulations.py                    # all tables, as in the documentation
    python benchmarks/simulations.py --rounds 100       # a quick look

Scores are simulated as sweeps have them: every arm answers the same items, every seed trains every arm anew.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import _common as common

# isort: split
import numpy as np
import torch

from midblock import metrics, stats
from midblock.analysis.measures import Depth
from midblock.quantities import find
from midblock.results import Table
from midblock.settings import ProfileSettings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1000, help="simulated studies per cell (default: %(default)s)")
    args = parser.parse_args()
    print(common.machine())
    for title, columns, rows in (
            ("Inverted U: share of studies that claim one at level 0.05", ("shape", "depths", *SEED_COLUMNS),
             inverted_u(args.rounds)),
            ("Intervals of arms: share that hold the true mean (95%)", ("scores", "arms", "seed sd", *SEED_COLUMNS[:3]),
             arms(args.rounds)),
            ("Share of the full gain: share of intervals that hold it (95%)", ("true share", "seed sd", "2", "3", "5"),
             gains(args.rounds)),
            ("Dataset-level measures: share of intervals that hold the expected value at N samples (95%)",
             ("measure", "N", "d", "mean direction", "covers"), spectra(max(args.rounds // 5, 20)))):
        print(f"\n### {title}\n\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}", flush=True)
        for row in rows:
            print("| " + " | ".join(f"{c:.3f}" if isinstance(c, float) else str(c) for c in row) + " |", flush=True)


SEED_COLUMNS = ("2 seeds", "3 seeds", "5 seeds")


def sweep(rng: np.random.Generator, truth: np.ndarray, seeds: int, seed_sd: float, items: int = 100) -> np.ndarray:
    """(seeds, items, arms): an item's difficulty, its affinity to an arm, chance of a training and of an answer."""
    size = len(truth)
    return np.asarray(truth + rng.normal(0, 0.4, (1, items, 1)) + rng.normal(0, 0.25, (1, items, size))
                      + rng.normal(0, seed_sd, (seeds, 1, size)) + rng.normal(0, 0.3, (seeds, items, size)))


def inverted_u(rounds: int) -> Iterator[tuple[object, ...]]:
    """The worst over two sizes of the effect and three of the seeds' standard deviation."""
    for depths in (5, 10):
        x = (np.arange(depths) + 0.5) / depths
        shapes = {"flat": 0 * x, "rises, then flat": np.minimum(x, 0.4) / 0.4,
                  "flat, then falls": -np.maximum(x, 0.5) / 0.5,
                  "only rises": x, "inverted U (power)": 1 - ((x - 0.45) / 0.5) ** 2}
        for name, truth in shapes.items():
            row = []
            for seeds in (2, 3, 5):
                rates = []
                for effect in (0.2, 0.5):
                    for seed_sd in (0.0, 0.03, 0.08):
                        rng = np.random.default_rng([depths, seeds, int(100 * seed_sd)])
                        found = (stats.inverted_u_test(x, sweep(rng, effect * truth, seeds, seed_sd))
                                 for _ in range(rounds))
                        rates.append(np.mean([f.p < 0.05 for f in found]))
                row.append(float(min(rates) if "power" in name else max(rates)))
            yield name, depths, *row


def right_or_wrong(rng: np.random.Generator, seeds: int, seed_sd: float, size: int, items: int = 150) -> np.ndarray:
    """(arms, seeds, items) of an accuracy of 0.35: a probit of the item, the arm's affinity and the training."""
    total = np.sqrt(1 + 1.2**2 + 0.9**2 + seed_sd**2)
    latent = (-0.3853 * total + rng.normal(0, 1.2, items) + rng.normal(0, 0.9, (size, 1, items))
              + rng.normal(0, seed_sd, (size, seeds, 1)) + rng.normal(0, 1, (size, seeds, items)))
    return (latent > 0).astype(np.float64)


def arms(rounds: int) -> Iterator[tuple[object, ...]]:
    for size in (6, 1):
        for seed_sd in (0.0, 0.15, 0.4, 0.8):
            row = []
            for seeds in (2, 3, 5):
                rng = np.random.default_rng([size, seeds, int(100 * seed_sd)])
                hits = 0
                for _ in range(rounds):
                    tables = right_or_wrong(rng, seeds, seed_sd, size)
                    found = stats.arm_intervals({str(i): t for i, t in enumerate(tables)})["0"]
                    hits += found.low <= 0.35 <= found.high
                row.append(hits / rounds)
            yield "right or wrong", size, seed_sd, *row


def gains(rounds: int) -> Iterator[tuple[object, ...]]:
    for share in (0.6, 0.98):
        for seed_sd in (0.0, 0.1):
            row = []
            for seeds in (2, 3, 5):
                rng = np.random.default_rng([int(100 * share), seeds, int(100 * seed_sd)])
                hits = 0
                for _ in range(rounds):
                    item = rng.normal(0, 0.4, 100)
                    trained = item[None, :, None] + sweep(rng, np.array([share, 1.0]), seeds, seed_sd)
                    base = item + rng.normal(0, 0.3, 100)  # the untuned model: no training, so no seeds
                    found = stats.share_of_gain(trained[:, :, 0], trained[:, :, 1], base)
                    hits += found.low <= share <= found.high or np.isnan(found.low)  # without bounds: all shares
                row.append(hits / rounds)
            yield share, seed_sd, *row


def spectra(rounds: int) -> Iterator[tuple[object, ...]]:
    """The estimand is the value expected of N samples: these measures depend on N."""
    settings = ProfileSettings(replicates=400)
    for n, d in ((100, 40), (100, 300), (200, 300)):
        for mean in (0.0, 0.5):
            scale = torch.arange(1, d + 1, dtype=torch.float64).pow(-0.7)
            generator = torch.Generator().manual_seed(n + d)

            def draw(n: int = n, d: int = d, scale: torch.Tensor = scale, mean: float = mean,
                     generator: torch.Generator = generator) -> torch.Tensor:
                return torch.randn(n, d, generator=generator, dtype=torch.float64) * scale + mean

            weights = torch.from_numpy(stats.bootstrap_weights(n, settings.replicates, 0))
            names = ("dataset_entropy", "effective_rank", "rank_deficiency", "spectral_norm")
            truth: dict[str, list[float]] = {name: [] for name in names}
            hits = dict.fromkeys(names, 0)
            studies = []
            for _ in range(rounds):
                x = draw()
                table = Table()
                Depth(table, 0, ["base"], [], settings, weights).pooled({"base": x})
                studies.append({row["metric"]: row for row in table.rows})
            for _ in range(2 * rounds):
                spectrum = metrics.Spectrum(metrics.singular_values(draw(), method="gram").square(), n, d)
                for name in names:
                    truth[name].append(float(find(name).load()(spectrum, **find(name).arguments(settings))))
            for study in studies:
                for name in names:
                    hits[name] += study[name]["low"] <= np.mean(truth[name]) <= study[name]["high"]
            for name in names:
                yield name, n, d, "yes" if mean else "no", hits[name] / rounds


if __name__ == "__main__":
    main()
