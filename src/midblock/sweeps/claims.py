"""The paper's findings as hypotheses, each with what a sweep says of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import pandas as pd

from midblock.sweeps.arms import METHODS
from midblock.sweeps.scores import ArmInfo
from midblock.sweeps.statistics import SweepStatistics

__all__ = ["CLAIMS", "Claim", "claims"]

Group = Callable[[ArmInfo], bool]


def _middle(arm: ArmInfo) -> bool:
    return not arm.method.startswith("full") and arm.region == "middle"


def _early(arm: ArmInfo) -> bool:
    return arm.region == "early"


def _late(arm: ArmInfo) -> bool:
    return arm.region == "late"


def _random(arm: ArmInfo) -> bool:
    return arm.is_random


def _baseline(arm: ArmInfo) -> bool:
    return arm.is_baseline


@dataclass(frozen=True)
class Claim:
    """One hypothesis: the arms of ``left`` against those of ``right``."""

    text: str
    family: str
    left: Group
    right: Group
    supports: tuple[str, ...]
    """Conclusions of left against right that support it."""


CLAIMS = (
    Claim("the middle beats all layers", "evaluation", _middle, _baseline, ("better",)),
    Claim("the middle is no worse than all layers", "evaluation", _middle, _baseline,
          ("better", "as good", "no worse")),
    Claim("the middle beats the last segment", "evaluation", _middle, _late, ("better",)),
    Claim("the middle beats the first segment", "evaluation", _middle, _early, ("better",)),
    Claim("the middle beats random blocks", "evaluation", _middle, _random, ("better",)),
    Claim("the middle forgets less than all layers", "retention", _middle, _baseline, ("better",)),
    Claim("the middle forgets no more than all layers", "retention", _middle, _baseline,
          ("better", "as good", "no worse")),
)
"""Each rests on the comparisons of one family of Holm's correction (`midblock.sweeps.comparisons`)."""

_TURNED = {"better": "worse", "worse": "better", "as good": "as good", "too small": "too small", "open": "open",
           # b no worse than a says nothing of a against b
           "no worse": "open"}


def claims(stats: SweepStatistics, infos: Mapping[str, ArmInfo], alpha: float) -> pd.DataFrame:
    """One row per task and claim that the sweep's arms can speak to.

    Columns ``task``, ``claim``, ``family`` (whose Holm correction it rests on), ``verdict`` (supported, supported in
    part, contradicted, not shown, mixed, too small to judge), and the arms (or pairs) ``for``, ``against``,
    ``undecided``. The inverted U over single segments, a test of its own, is a claim as well.
    """
    rows = []
    for task in stats.matrices:
        for claim in CLAIMS:
            if found := _judge(stats.family(claim.family, task), claim, infos):
                rows.append({"task": task, "claim": claim.text, "family": claim.family, **found})
        rows += _shapes(stats, infos, task, alpha)
    return pd.DataFrame(rows, columns=["task", "claim", "family", "verdict", "for", "against", "undecided"])


def _judge(rows: pd.DataFrame, claim: Claim, infos: Mapping[str, ArmInfo]) -> dict[str, str]:
    supporting: list[str] = []
    opposed: list[str] = []
    undecided: list[str] = []
    small = False
    for a, b, conclusion in zip(rows["a"], rows["b"], rows["conclusion"], strict=True):
        if a not in infos or b not in infos:
            continue
        if claim.left(infos[a]) and claim.right(infos[b]):
            left, right, said = a, b, conclusion
        elif claim.left(infos[b]) and claim.right(infos[a]):
            left, right, said = b, a, _TURNED[conclusion]
        else:
            continue
        small |= said == "too small"
        place = supporting if said in claim.supports else opposed if said == "worse" else undecided
        place.append(left if infos[right].is_baseline else f"{left} against {right}")
    if not (supporting or opposed or undecided):
        return {}
    return {"verdict": _verdict(bool(supporting), bool(opposed), bool(undecided), small),
            "for": ", ".join(supporting), "against": ", ".join(opposed), "undecided": ", ".join(undecided)}


def _verdict(supporting: bool, opposed: bool, undecided: bool, small: bool) -> str:
    if supporting and opposed:
        return "mixed"
    if supporting:
        return "supported in part" if undecided else "supported"
    if opposed:
        return "not shown" if undecided else "contradicted"
    return "too small to judge" if small else "not shown"


def _shapes(stats: SweepStatistics, infos: Mapping[str, ArmInfo], task: str, alpha: float) -> list[dict[str, str]]:
    found = []
    for _, row in stats.inverted_u[stats.inverted_u["task"] == task].iterrows():
        how = METHODS[str(row["method"])]
        own = (row["method"], row["segments"])  # the arms on the curve; what others lack says nothing of its shape
        small = any((task, name) in stats.missing for name, info in infos.items()
                    if info.segment is not None and info.segment[:2] == own)
        shown = not small and row["p_holm"] < alpha
        found.append({"task": task, "claim": f"{how} arms rise and then fall over {row['segments']} segments",
                      "family": "inverted U", "verdict": "too small to judge" if small else
                      "supported" if shown else "not shown",
                      "for": f"peak near depth {row['peak']:.2f}" if shown else "", "against": "",
                      "undecided": "" if shown else f"best: {row['best']}"})
    return found
