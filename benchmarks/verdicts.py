"""How often a sweep's verdict is wrong: simulated sweeps whose truth is known, at the sizes that people run.

    python benchmarks/verdicts.py                 # half an hour on one core
    python benchmarks/verdicts.py --sweeps 20     # a try

Each of five single segments and the all-layer baseline answers right with a probability that varies over items (on
the logit scale with a standard deviation of 1) and over seeds (0.15). Three truths:

* equal: all arms alike. A claim of the middle that is "supported", or any difference found, is false.
* worse: every other arm is worse than the baseline by exactly the margin (on average). "no worse" and "as good" are
  false.
* better: the middle is ten points better. What share of sweeps says so?

Sweeps that are too small (one seed, few items, few steps, a floor, a ceiling, a loss that still falls) must conclude
nothing, whatever the truth: of them every finding counts.
"""

from __future__ import annotations

import argparse
import functools
import math
import time
from dataclasses import dataclass

import _common as common

# isort: split
import numpy as np
from scipy import optimize

from midblock import stats
from midblock.segments import segment_blocks
from midblock.sweeps import ArmInfo, RunRecord, SweepResult, TaskScores, parse_config

ARMS = ("11111", "10000", "01000", "00100", "00010", "00001")
MARGIN = 0.02


@dataclass(frozen=True)
class Size:
    """A kind of sweep."""

    seeds: int
    items: int
    steps: int
    level: float = 0.5
    """Accuracy of the baseline."""
    steep: bool = False
    """The training loss still falls when it ends."""
    small: bool = True

    @property
    def note(self) -> str:
        found = (("a floor", self.level < 0.1), ("a ceiling", self.level > 0.9), ("loss still falls", self.steep))
        return ", ".join(word for word, there in found if there)


SIZES = (Size(1, 8, 3), Size(1, 64, 40), Size(3, 8, 40), Size(3, 200, 3), Size(3, 64, 40, level=0.01),
         Size(3, 64, 40, level=0.99), Size(3, 200, 40, steep=True),
         *(Size(s, n, 40, small=False) for s, n in ((2, 30), (2, 64), (3, 64), (3, 200), (5, 200))))


def config(seeds: int, replicates: int):
    return parse_config({
        "model": "simulated", "train": {"data": "arithmetic"}, "training": {"steps": 40}, "arms": {"singles": 5},
        "evaluation": [{"task": "arithmetic"}], "seeds": list(range(seeds)),
        "statistics": {"replicates": replicates, "margins": {"accuracy": MARGIN}}})


@functools.cache
def shift_for(rate: float, spread: float) -> float:
    """Logit whose mean probability over items and seeds is ``rate``."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    weights = weights / weights.sum()
    return float(optimize.brentq(lambda m: float(weights @ (1 / (1 + np.exp(-(m + spread * nodes))))) - rate, -12, 12))


def simulate(rates: dict[str, float], size: Size, rng: np.random.Generator) -> list[RunRecord]:
    ease = rng.normal(0, 1, size.items)
    losses = [2 - k / size.steps if size.steep else 1 + 2 * math.exp(-k / 3) for k in range(size.steps)]

    def record(arm: str, seed: int | None, rate: float) -> RunRecord:
        logit = shift_for(rate, math.hypot(1, 0.15)) + ease + (0 if seed is None else rng.normal(0, 0.15))
        right = (rng.random(size.items) < 1 / (1 + np.exp(-logit))).astype(float)
        scores = TaskScores("arithmetic", "accuracy", True, [str(i) for i in range(size.items)], right.tolist(), None,
                            float(right.mean()), 0.0)
        return RunRecord(arm, None if seed is None else 1e-3, seed, "done", tasks={"arithmetic": scores},
                         training={} if seed is None else {"losses": losses})

    return [record("base", None, min(0.05, size.level))] + [record(a, s, r) for a, r in rates.items()
                                                            for s in range(size.seeds)]


def share(values: list[bool]) -> str:
    found = stats.wilson_interval(sum(values), len(values))
    return f"{found.value:.3f} [{found.low:.3f}, {found.high:.3f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweeps", type=int, default=300, help="simulated sweeps for each truth and size")
    parser.add_argument("--replicates", type=int, default=300, help="bootstrap replicates in each")
    wanted = parser.parse_args()
    started = time.perf_counter()
    print(common.machine())
    infos = {a: ArmInfo(a, "lora", a, tuple(segment_blocks(a, 30)), 30, 1000, is_baseline=a == "11111",
                        work=30.0 - segment_blocks(a, 30)[0]) for a in ARMS}
    columns = ("seeds", "items", "steps", "", "too small", "any finding", "false claim", "false difference",
               "false no worse", "ten points found")
    print(f"\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}", flush=True)
    for size in SIZES:
        level = size.level
        truths = {"equal": dict.fromkeys(ARMS, level),
                  "worse": {a: level if a == "11111" else max(level - MARGIN, level / 2) for a in ARMS},
                  "better": {a: min(level + 0.1, 2 * level, (1 + level) / 2) if a == "00100" else level for a in ARMS}}
        told: dict[str, list[bool]] = {c: [] for c in columns[4:]}
        for truth, rates in truths.items():
            rng = np.random.default_rng(1)
            for _ in range(wanted.sweeps):
                result = SweepResult(config(size.seeds, wanted.replicates), infos, simulate(rates, size, rng))
                pairs = result.statistics.family("evaluation")
                supported = result.claims[result.claims["verdict"].isin(["supported", "supported in part"])]
                told["any finding"].append(len(supported) > 0 or bool((~result.statistics.comparisons[
                    "conclusion"].isin(["open", "too small"])).any()))
                told["too small"].append(result.summary().startswith("Too small to judge"))
                if truth == "equal":
                    told["false claim"].append(bool(supported["claim"].str.startswith("the middle beats").any()))
                    told["false difference"].append(bool(pairs["conclusion"].isin(["better", "worse"]).any()))
                elif truth == "worse":
                    told["false no worse"].append(bool(
                        pairs[pairs["b"] == "11111"]["conclusion"].isin(["no worse", "as good"]).any()))
                else:
                    told["ten points found"].append(bool(
                        (pairs[(pairs["a"] == "00100") & (pairs["b"] == "11111")]["conclusion"] == "better").any()))
        shown = [share(told[c]) if size.small == (c in ("too small", "any finding")) else "" for c in columns[4:]]
        print(f"| {' | '.join(map(str, (size.seeds, size.items, size.steps, size.note, *shown)))} |", flush=True)
    print(f"\n{wanted.sweeps} sweeps for each truth and size, {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
