"""How often a sweep's verdict is wrong: simulated sweeps whose truth is known, at the sizes that people run.

    python benchmarks/verdicts.py                 # some minutes on one core
    python benchmarks/verdicts.py --sweeps 50     # a try

Each of five single segments and the all-layer baseline answers right with a probability that varies over items (on
the logit scale with a standard deviation of 1) and over seeds (0.15). Three truths:

* equal: all arms alike. A claim of the middle that is "supported", or any difference found, is false.
* worse: every other arm is worse than the baseline by exactly the margin (on average). "no worse" and "as good" are
  false.
* better: the middle is ten points better. What share of sweeps says so?
"""

from __future__ import annotations

import argparse
import math
import time

import numpy as np
import pandas as pd
from scipy import optimize

from midblock.segments import segment_blocks
from midblock.sweeps import ArmInfo, RunRecord, SweepResult, TaskScores, parse_config

ARMS = ("11111", "10000", "01000", "00100", "00010", "00001")
MARGIN = 0.02
SIZES = ((1, 8, 3), (1, 64, 40), (2, 30, 40), (2, 64, 40), (3, 64, 40), (3, 200, 40), (5, 200, 40))


def config(seeds: int, sides: int):
    return parse_config({
        "model": "simulated", "train": {"data": "arithmetic"}, "training": {"steps": 40}, "arms": {"singles": 5},
        "evaluation": [{"task": "arithmetic"}], "seeds": list(range(seeds)),
        "statistics": {"replicates": sides, "margins": {"accuracy": MARGIN}}})


def shift_for(rate: float, spread: float) -> float:
    """Logit whose mean probability over items and seeds is ``rate``."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    weights = weights / weights.sum()
    return float(optimize.brentq(lambda m: float(weights @ (1 / (1 + np.exp(-(m + spread * nodes))))) - rate, -9, 9))


def simulate(rates: dict[str, float], seeds: int, items: int, steps: int, rng: np.random.Generator) -> list[RunRecord]:
    ease = rng.normal(0, 1, items)
    losses = [1 + 2 * math.exp(-k / 3) for k in range(steps)]

    def record(arm: str, seed: int | None, rate: float) -> RunRecord:
        logit = shift_for(rate, math.hypot(1, 0.15)) + ease + (0 if seed is None else rng.normal(0, 0.15))
        right = (rng.random(items) < 1 / (1 + np.exp(-logit))).astype(float)
        scores = TaskScores("arithmetic", "accuracy", True, [str(i) for i in range(items)], right.tolist(), None,
                            float(right.mean()), 0.0)
        return RunRecord(arm, None if seed is None else 1e-3, seed, "done", tasks={"arithmetic": scores},
                         training={} if seed is None else {"losses": losses})

    return [record("base", None, 0.05)] + [record(a, s, r) for a, r in rates.items() for s in range(seeds)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweeps", type=int, default=200, help="simulated sweeps for each truth and size")
    parser.add_argument("--replicates", type=int, default=300, help="bootstrap replicates in each")
    wanted = parser.parse_args()
    started = time.perf_counter()
    infos = {a: ArmInfo(a, "lora", a, tuple(segment_blocks(a, 30)), 30, 1000, is_baseline=a == "11111",
                        work=30.0 - segment_blocks(a, 30)[0]) for a in ARMS}
    truths = {"equal": dict.fromkeys(ARMS, 0.5),
              "worse": {a: 0.5 if a == "11111" else 0.5 - MARGIN for a in ARMS},
              "better": {a: 0.6 if a == "00100" else 0.5 for a in ARMS}}
    rows = []
    for seeds, items, steps in SIZES:
        row = {"seeds": seeds, "items": items, "steps": steps}
        for truth, rates in truths.items():
            rng = np.random.default_rng(1)
            claimed = found = no_worse = told = small = 0
            for _ in range(wanted.sweeps):
                result = SweepResult(config(seeds, wanted.replicates), infos,
                                     simulate(rates, seeds, items, steps, rng))
                pairs = result.statistics.family("evaluation")
                middle = result.claims[result.claims["claim"].str.startswith("the middle beats")]
                claimed += bool(middle["verdict"].isin(["supported", "supported in part"]).any())
                found += bool(pairs["conclusion"].isin(["better", "worse"]).any())
                no_worse += bool(pairs[pairs["b"] == "11111"]["conclusion"].isin(["no worse", "as good"]).any())
                told += bool((pairs[pairs["a"] == "00100"]["conclusion"] == "better").any())
                small += result.summary().startswith("Too small to judge")
            share = {"claimed": claimed, "found": found, "no worse": no_worse, "told": told, "small": small}
            share = {k: v / wanted.sweeps for k, v in share.items()}
            if truth == "equal":
                row |= {"too small": share["small"], "false claim": share["claimed"],
                        "false difference": share["found"]}
            elif truth == "worse":
                row |= {"false no worse": share["no worse"]}
            else:
                row |= {"ten points found": share["told"]}
        rows.append(row)
    print(pd.DataFrame(rows).to_string(index=False))
    print(f"{wanted.sweeps} sweeps for each truth and size, {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
