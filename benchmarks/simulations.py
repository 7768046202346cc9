"""Simulations behind docs/statistics.md: how often the tests err, how often the intervals hold the truth.

    python benchmarks/simulations.py                          # all tables, as in the documentation
    python benchmarks/simulations.py --only arms,gains        # some of them
    python benchmarks/simulations.py --rounds 100             # a quick look

Scores are simulated as sweeps have them: every arm answers the same items, every seed trains every arm anew. Each share
stands with its own 95% interval over the simulated studies.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import _common as common

# isort: split
import numpy as np
import numpy.typing as npt
import torch
from scipy import stats as scipy_stats

from midblock import metrics, stats
from midblock.analysis.measures import Depth, Spectra
from midblock.quantities import find
from midblock.results import Table
from midblock.settings import ProfileSettings
from midblock.settings.sweep import StatisticsConfig

FloatArray = npt.NDArray[np.float64]
Rows = Iterator[tuple[object, ...]]
SEEDS = (2, 3, 5)
SEED_COLUMNS = tuple(f"{n} seeds" for n in SEEDS)
ALPHA = 0.05


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2000, help="simulated studies per cell (default: %(default)s)")
    parser.add_argument("--only", default=",".join(TABLES), help="tables, with commas: %(default)s")
    args = parser.parse_args()
    print(common.machine())
    for name in args.only.split(","):
        title, columns, make = TABLES[name]
        started = time.perf_counter()
        print(f"\n### {name}: {title}\n\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}", flush=True)
        for row in make(args.rounds):
            print("| " + " | ".join(f"{c:.3g}" if isinstance(c, float) else str(c) for c in row) + " |", flush=True)
        print(f"\n{args.rounds} rounds, {time.perf_counter() - started:.0f} s", flush=True)


def share(rounds: Sequence[float]) -> str:
    """Mean over simulated studies with its 95% interval (Wilson's where every study says the same)."""
    values = np.asarray(rounds, dtype=np.float64)
    mean, half = float(values.mean()), 1.96 * float(values.std()) / len(values) ** 0.5
    low, high = mean - half, mean + half
    if half == 0:
        found = stats.wilson_interval(int(mean > 0.5) * len(values), len(values))
        low, high = found.low, found.high
    return f"{mean:.3f} [{max(low, 0):.3f}, {min(high, 1):.3f}]"


# ---------------------------------------------------------------- scores


def sweep(rng: np.random.Generator, truth: FloatArray, seeds: int, seed_sd: float | FloatArray, items: int = 100
          ) -> FloatArray:
    """(seeds, items, arms): an item's difficulty, its affinity to an arm, chance of a training and of an answer."""
    size = len(truth)
    return np.asarray(truth + rng.normal(0, 0.4, (1, items, 1)) + rng.normal(0, 0.25, (1, items, size))
                      + rng.normal(0, seed_sd, (seeds, 1, size)) + rng.normal(0, 0.3, (seeds, items, size)))


def right_or_wrong(rng: np.random.Generator, rates: Sequence[float], seeds: int, seed_sd: float, items: int
                   ) -> FloatArray:
    """(arms, seeds, items) of given accuracies: a probit of the item, the arm's affinity and the training."""
    total = np.sqrt(1 + 1.2**2 + 0.9**2 + seed_sd**2)
    size = len(rates)
    latent = (total * scipy_stats.norm.ppf(rates)[:, None, None] + rng.normal(0, 1.2, items)
              + rng.normal(0, 0.9, (size, 1, items)) + rng.normal(0, seed_sd, (size, seeds, 1))
              + rng.normal(0, 1, (size, seeds, items)))
    return np.asarray(latent > 0, dtype=np.float64)


# ---------------------------------------------------------------- tables


def inverted_u(rounds: int) -> Rows:
    """The worst over two sizes of the effect and three of the seeds' standard deviation."""
    for depths in (5, 10):
        x = (np.arange(depths) + 0.5) / depths
        shapes = {"flat": 0 * x, "rises, then flat": np.minimum(x, 0.4) / 0.4,
                  "flat, then falls": -np.maximum(x, 0.5) / 0.5,
                  "only rises": x, "inverted U (power)": 1 - ((x - 0.45) / 0.5) ** 2}
        for name, truth in shapes.items():
            row = []
            for seeds in SEEDS:
                rates = []
                for effect, seed_sd in itertools.product((0.2, 0.5), (0.0, 0.03, 0.08)):
                    rng = np.random.default_rng([depths, seeds, int(100 * seed_sd)])
                    rates.append([float(stats.inverted_u_test(x, sweep(rng, effect * truth, seeds, seed_sd)).p < ALPHA)
                                  for _ in range(rounds)])
                row.append(share((min if "power" in name else max)(rates, key=np.mean)))
            yield name, depths, *row


def arms(rounds: int) -> Rows:
    """Six arms count as six answers of one round; one arm alone is cheap and has twenty times the rounds."""
    for what, size, seed_sd in itertools.product(("right or wrong", "any number"), (6, 1), (0.0, 0.15, 0.4, 0.8)):
        row = []
        for seeds in SEEDS:
            rng = np.random.default_rng([size, seeds, int(100 * seed_sd)])
            held: list[float] = []
            for _ in range(rounds if size > 1 else 10):
                truth = 0.0 if what == "any number" else 0.35
                if size == 1:
                    held += alone(rng, what, truth, seeds, seed_sd, 2 * rounds).tolist()
                    continue
                tables = (np.moveaxis(sweep(rng, np.zeros(size), seeds, seed_sd / 4), 2, 0) if what == "any number" else
                          right_or_wrong(rng, [truth] * size, seeds, seed_sd, 150))
                found = stats.arm_intervals({str(i): t for i, t in enumerate(tables)})
                held.append(float(np.mean([f.low <= truth <= f.high for f in found.values()])))
            row.append(share(held))
        yield what, size, seed_sd if what != "any number" else seed_sd / 4, *row
    for seed_sd in (0.0375, 0.1):
        row = []
        for seeds in SEEDS:
            rng = np.random.default_rng([seeds, int(100 * seed_sd)])
            held = []
            for _ in range(rounds):
                scores = sweep(rng, np.zeros(6), seeds, np.array([2.5 * seed_sd] + [seed_sd] * 5))
                found = stats.arm_intervals({str(i): scores[:, :, i] for i in range(6)})["0"]
                held.append(float(found.low <= 0 <= found.high))
            row.append(share(held))
        yield "any number", "one of six, 2.5 times the sd", seed_sd, *row


def alone(rng: np.random.Generator, what: str, truth: float, seeds: int, seed_sd: float, studies: int) -> FloatArray:
    """Whether the 95% interval of one arm holds the truth, in many studies at once.

    The formula of `stats.crossed_mean`, held to it on five of them.
    """
    def chance(sd: float, *shape: int) -> FloatArray:
        return rng.normal(0, sd, (studies, *shape))

    if what == "any number":
        y = chance(np.hypot(0.4, 0.25), 1, 100) + chance(seed_sd / 4, seeds, 1) + chance(0.3, seeds, 100)
    else:
        latent = chance(np.hypot(1.2, 0.9), 1, 150) + chance(seed_sd, seeds, 1) + chance(1, seeds, 150)
        total = np.sqrt(1 + 1.2**2 + 0.9**2 + seed_sd**2)
        y = np.asarray(latent > -total * scipy_stats.norm.ppf(truth), dtype=np.float64)
    items = y.shape[2]
    by_seed, by_item, mean = y.mean(axis=2), y.mean(axis=1), y.mean(axis=(1, 2))
    ms_seed = items * ((by_seed - mean[:, None]) ** 2).sum(axis=1) / (seeds - 1)
    ms_item = seeds * ((by_item - mean[:, None]) ** 2).sum(axis=1) / (items - 1)
    left = y - by_seed[:, :, None] - by_item[:, None, :] + mean[:, None, None]
    of_items = np.maximum(ms_item - (left**2).sum(axis=(1, 2)) / ((seeds - 1) * (items - 1)), 0)
    of_seeds = ms_seed * (ms_seed / (ms_seed + of_items / (8 * (seeds - 1) ** 0.5))) ** 2
    t_seed, t_item = (scipy_stats.t.ppf(0.975, df) for df in (seeds - 1, items - 1))
    half = np.sqrt((of_seeds * t_seed**2 + of_items * t_item**2) / (seeds * items))
    assert np.allclose(half[:5], [stats.crossed_mean(table).half_width() for table in y[:5]])
    return np.asarray(np.abs(mean - truth) <= half, dtype=np.float64)


def gains(rounds: int) -> Rows:
    for what, true, seed_sd in itertools.product(("any number", "right or wrong"), (0.6, 0.98), (0.0, 0.1, 0.4)):
        row = []
        for seeds in SEEDS:
            rng = np.random.default_rng([int(100 * true), seeds, int(100 * seed_sd)])
            held, bounded = [], []
            for _ in range(rounds):
                found = stats.share_of_gain(*_trained(rng, what, true, seeds, seed_sd))
                bounded.append(float(not np.isnan(found.low)))
                held.append(float(not bounded[-1] or found.low <= true <= found.high))  # without bounds: all shares
            row.append(f"{share(held)}, {1 - np.mean(bounded):.2f}")
        yield what, true, seed_sd, *row


def gain_shown(rounds: int) -> Rows:
    """At least a wanted share is shown where the lower bound is at or above it."""
    for wanted, true in ((0.8, 0.8), (0.8, 0.9), (0.8, 1.0), (0.9, 0.9), (0.9, 1.0)):
        for items, seed_sd in itertools.product((200, 1000), (0.15, 0.4)):
            row = []
            for seeds in SEEDS:
                rng = np.random.default_rng([int(100 * true), items, seeds, int(100 * seed_sd)])
                row.append(share([float(stats.share_of_gain(*_trained(
                    rng, "right or wrong", true, seeds, seed_sd, items)).low >= wanted) for _ in range(rounds)]))
            yield wanted, true, items, seed_sd, *row


def _trained(rng: np.random.Generator, what: str, true: float, seeds: int, seed_sd: float, items: int = 0
             ) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Scores of an arm, of all layers and of the untuned model."""
    if what == "right or wrong":  # from 10% to 50%
        items = items or 200
        total = np.sqrt(1 + 1.2**2 + 0.9**2 + seed_sd**2)
        item = rng.normal(0, 1.2, items)
        rates = scipy_stats.norm.ppf([0.1 + 0.4 * true, 0.5])[:, None, None] * total
        trained = (rates + item + rng.normal(0, 0.9, (2, 1, items)) + rng.normal(0, seed_sd, (2, seeds, 1))
                   + rng.normal(0, 1, (2, seeds, items))) > 0
        base = scipy_stats.norm.ppf(0.1) * np.sqrt(1 + 1.2**2 + 0.9**2) + item + rng.normal(0, np.hypot(1, 0.9), items)
        return trained[0].astype(np.float64), trained[1].astype(np.float64), (base > 0).astype(np.float64)
    items = items or 100
    item = rng.normal(0, 0.4, items)
    scores = item[None, :, None] + sweep(rng, np.array([true, 1.0]), seeds, seed_sd / 4, items)
    return scores[:, :, 0], scores[:, :, 1], item + rng.normal(0, 0.3, items)


def equivalence(rounds: int) -> Rows:
    """At a true difference of exactly the margin to the worse side, and of none; the family is every arm but the first
    against it, corrected as a sweep corrects it. A false claim counts once a family."""
    for arms_in, items, margin, seed_sd in itertools.product((2, 6), (200, 1000), (0.05, 0.1), (0.0, 0.15, 0.4)):
        if (items, margin) == (1000, 0.1):
            continue
        cells: dict[str, list[str]] = {"false": [], "no worse": [], "as good": []}
        for seeds in (1, *SEEDS):
            tests = arms_in - 1
            rng = np.random.default_rng([arms_in, items, seeds, int(100 * seed_sd)])
            false, no_worse, as_good = [], [], []
            for truth in (margin, 0.0):
                rates = [0.5] + [0.5 - truth] * tests
                for _ in range(rounds):
                    tables = right_or_wrong(rng, rates, seeds, seed_sd, items)
                    found = stats.compare_arms(
                        {str(i): t for i, t in enumerate(tables)}, baseline="0", binary=True,
                        confidence=1 - 2 * ALPHA / tests)
                    above = found["low"].to_numpy(dtype=np.float64) >= -margin
                    below = found["high"].to_numpy(dtype=np.float64) <= margin
                    if truth:
                        false.append(float(above.any()))
                    else:
                        no_worse.append(float(above.mean()))
                        as_good.append(float((above & below).mean()))
            for name, values in (("false", false), ("no worse", no_worse), ("as good", as_good)):
                cells[name].append(share(values))
        for name, row in cells.items():
            yield name, arms_in - 1, items, margin, seed_sd, *row


def planned(rounds: int) -> Rows:
    """What the dry run announces for a power of 80%, and the power that the tests have there."""
    wanted = StatisticsConfig()
    rho, rho_seed, seed_sd = wanted.expected_correlation, wanted.expected_seed_correlation, wanted.expected_seed_sd
    for items, arms in itertools.product((200, 1000), (2, 6)):
        tests = arms - 1
        guess = {"binary": False, "correlation": rho, "seed_correlation": rho_seed, "seed_sd": seed_sd, "arms": arms,
                 "comparisons": tests}
        cells = []
        for seeds in SEEDS:
            margin = stats.equivalence_margin(items, seeds, **guess)
            delta = stats.minimum_detectable_difference(items, seeds, **guess)
            rng = np.random.default_rng([items, tests, seeds])
            seen, within = [], []
            for _ in range(rounds):
                y = (rng.normal(0, rho**0.5, (1, 1, items)) + rng.normal(0, (rho_seed - rho) ** 0.5, (arms, 1, items))
                     + rng.normal(0, (1 - rho_seed) ** 0.5, (arms, seeds, items))
                     + rng.normal(0, seed_sd, (arms, seeds, 1)))
                named = {str(i): t for i, t in enumerate(y)}
                found = stats.compare_arms(named, baseline="0", binary=False, confidence=1 - 2 * ALPHA / tests)
                within.append(float(((found["low"] >= -margin) & (found["high"] <= margin)).mean()))
                named["0"] = named["0"] - delta
                found = stats.compare_arms(named, baseline="0", binary=False, confidence=1 - ALPHA / tests)
                seen.append(float((found["low"] > 0).mean()))
            cells.append((f"{delta:.2f}: {share(seen)}", f"{margin:.2f}: {share(within)}"))
        yield "difference", items, tests, *(seen for seen, _ in cells)
        yield "as good within", items, tests, *(within for _, within in cells)


SPECTRAL = ("dataset_entropy", "effective_rank", "rank_deficiency", "spectral_norm")
STATES_FILE = Path(tempfile.gettempdir()) / "midblock-smollm2-states.pt"


def spectra(rounds: int) -> Rows:
    """The estimand is the value expected of N samples: these measures depend on N."""
    settings = ProfileSettings(replicates=400)
    kinds: list[tuple[int, int, str, Callable[[], torch.Tensor]]] = []
    for (n, d), kind in itertools.product(((100, 40), (100, 300), (200, 300), (400, 300)), STATES):
        kinds.append((n, d, kind, STATES[kind](n, d, torch.Generator().manual_seed(n + d))))
    for h, pool in smollm2_states().items():
        for n in (100, 200, 400):
            kinds.append((n, pool.shape[1], f"SmolLM2, hidden {h}", _of_pool(pool, n)))
    rounds = max(rounds // 10, 20)
    for n, d, kind, draw in kinds:
        weights = torch.from_numpy(stats.bootstrap_weights(n, settings.replicates, 0))
        truth: dict[str, list[float]] = {name: [] for name in SPECTRAL}
        studies = []
        for turn in range(4 * rounds):
            x = draw()
            spectrum = metrics.Spectrum(metrics.singular_values(x, method="gram").square(), n, d)
            for name in SPECTRAL:
                truth[name].append(float(find(name).load()(spectrum, **find(name).arguments(settings))))
            if turn < rounds:
                table = Table()
                depth, spectrum_of = Depth(table, 0, ["base"], [], settings, weights), Spectra(x, weights, settings)
                studies.append({name: depth.taken(find(name), (x,), spectrum_of).estimate(0.95) for name in SPECTRAL})
        for name in SPECTRAL:
            mean, spread = float(np.mean(truth[name])), float(np.std(truth[name]))
            found = [s[name] for s in studies]
            covers = share([float(f.low <= mean <= f.high) for f in found])
            width = f"{np.mean([f.high - f.low for f in found]) / (2 * 1.96 * spread):.2f}" if spread else ""
            yield name, n, d, kind, f"{mean:.3g}", covers, width


def smollm2_states(rows: int = 1600, tokens: int = 32) -> dict[int, torch.Tensor]:
    """Mean over tokens of hidden states 5 and 25 of SmolLM2, (rows, 576) each."""
    from midblock.data import load_data
    from midblock.models import load_model

    if STATES_FILE.exists():
        return dict(torch.load(STATES_FILE))
    loaded = load_model("smollm2")
    ids = [loaded.tokenizer(e.text)["input_ids"][:tokens] for e in load_data("wikitext").examples]
    ids = [i for i in ids if len(i) == tokens]
    chosen = torch.tensor([ids[i] for i in np.random.default_rng(0).permutation(len(ids))[:rows]])
    kept: dict[int, list[torch.Tensor]] = {5: [], 25: []}
    for h in kept:
        loaded.model.model.layers[h - 1].register_forward_hook(
            lambda _m, _i, out, h=h: kept[h].append((out[0] if isinstance(out, tuple) else out).float().mean(1)))
    with torch.inference_mode():
        for batch in chosen.split(64):
            loaded.model.model(input_ids=batch)
    found = {h: torch.cat(states).double() for h, states in kept.items()}
    torch.save(found, STATES_FILE)
    return found


def _of_pool(pool: torch.Tensor, n: int) -> Callable[[], torch.Tensor]:
    generator = torch.Generator().manual_seed(n)
    return lambda: pool[torch.randperm(len(pool), generator=generator)[:n]]


def _decaying(mean: float) -> Callable[[int, int, torch.Generator], Callable[[], torch.Tensor]]:
    def of(n: int, d: int, generator: torch.Generator) -> Callable[[], torch.Tensor]:
        scale = torch.arange(1, d + 1, dtype=torch.float64).pow(-0.7)
        return lambda: torch.randn(n, d, generator=generator, dtype=torch.float64) * scale + mean
    return of


def _clusters(n: int, d: int, generator: torch.Generator) -> Callable[[], torch.Tensor]:
    """Eight kinds of samples, as the subjects of a benchmark are, about a common mean."""
    scale = torch.arange(1, d + 1, dtype=torch.float64).pow(-0.7)
    centres = 2 * torch.randn(8, d, generator=generator, dtype=torch.float64) * scale + 0.3
    return lambda: (torch.randn(n, d, generator=generator, dtype=torch.float64) * scale
                    + centres[torch.randint(8, (n,), generator=generator)])


STATES: Mapping[str, Callable[[int, int, torch.Generator], Callable[[], torch.Tensor]]] = {
    "decaying spectrum": _decaying(0.0), "and a shared mean": _decaying(0.5), "eight clusters": _clusters}

TABLES: Mapping[str, tuple[str, Sequence[str], Callable[[int], Rows]]] = {
    "inverted-u": ("share of studies that claim one at level 0.05", ("shape", "depths", *SEED_COLUMNS),
                   inverted_u),
    "arms": ("share of arms' intervals that hold the true mean (95%)", ("scores", "arms", "seed sd", *SEED_COLUMNS),
             arms),
    "gains": ("share of intervals that hold the share of the full gain (95%), and share of them without bounds",
              ("scores", "true share", "seed sd", *SEED_COLUMNS), gains),
    "gain-shown": ("how often an arm is shown to reach at least a share of the full gain",
                   ("at least", "true share", "items", "seed sd", *SEED_COLUMNS), gain_shown),
    "equivalence": ("no worse, as good: false claims at a difference of the margin, and power where arms are equal",
                    ("claim", "comparisons", "items", "margin", "seed sd", "1 seed", *SEED_COLUMNS), equivalence),
    "planned": ("what --dry-run announces for 80% power, in standard deviations of the scores, and the power there",
                ("what", "items", "comparisons", *SEED_COLUMNS), planned),
    "spectra": ("share of intervals that hold the expected value at N samples (95%), and their mean width over that of "
                "an ideal interval", ("measure", "N", "d", "states", "expected", "covers", "width"), spectra),
}


if __name__ == "__main__":
    main()
