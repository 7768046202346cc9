"""How often `midblock locate --validate` names a useless score, in simulated studies.

Nine scores of pure noise (independent blocks, or neighbours alike) are judged on sweeps with real effects of the
segments, two tasks and three seeds each. ``cases as independent`` is the rule of the first version: a t test over all
cases below three sweeps, over sweeps from three on, Holm over scores. Run from the repository's root::

    python benchmarks/locate_validate.py --studies 2000
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import _common  # noqa: F401 (first: it takes this folder off the path)

# isort: split
import numpy as np

from midblock import stats
from midblock.selection.evidence import fixed_middle, judge, regrets_of, segment_means

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from study_helpers import simulated_study


def first_rule(gains: Sequence[Mapping[int, Any]], scores: Sequence[Mapping[str, Any]], blocks: Sequence[int]) -> bool:
    """Whether the first version named a winner."""
    p, lower = [], []
    for name in scores[0]:
        differences = []
        for by_k, by_name, count in zip(gains, scores, blocks, strict=True):
            for k, (g, best) in by_k.items():
                both = np.stack([segment_means(by_name[name], k), fixed_middle(k, count)])
                own, middle = regrets_of(both, g, best)
                differences.append(own - middle)
        values = np.concatenate(differences) if len(gains) < 3 else np.array([d.mean() for d in differences])
        p.append(1.0 if np.ptp(values) == 0 else stats.one_sample_t(values).p)
        lower.append(values.mean() < 0)
    return bool(((stats.holm(p) < 0.05) & np.array(lower)).any())


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--studies", type=int, default=2000)
    given = parser.parse_args()
    print(f"{given.studies} studies each; share of studies in which a score of noise is named\n")
    print("| effects of segments | scores | sweeps | named | cases as independent |")
    print("|---|---|---|---|---|")
    for profile, smooth, sweeps in itertools.product(("late", "middle", "flat", "random"), (False, True),
                                                     (1, 2, 3, 4, 6)):
        draw = np.random.default_rng([sweeps, smooth, *profile.encode()])
        named = before = 0
        for _ in range(given.studies):
            study = simulated_study(draw, sweeps=sweeps, profile=profile, smooth=smooth)
            named += judge(*study).winner is not None
            before += first_rule(*study)
        print(f"| {profile} | {'neighbours alike' if smooth else 'independent'} | {sweeps} | "
              f"{named / given.studies:.3f} | {before / given.studies:.3f} |", flush=True)


if __name__ == "__main__":
    main()
