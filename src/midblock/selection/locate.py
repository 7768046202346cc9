"""Where to tune, without training: scores of the blocks, and a rule that turns them into a contiguous range."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.stats import t as t_distribution

from midblock import metrics
from midblock.data import Dataset, load_data
from midblock.errors import BlockRangeError, BudgetError, SettingsError
from midblock.models import LoadedModel, load_model
from midblock.progress import Progress, silent
from midblock.results import UNNAMED, Answer, Origin, Table, TableResult
from midblock.segments import MIDDLE, format_blocks, segment_blocks, segment_bounds
from midblock.selection.scores import ForwardPass, block_scores
from midblock.settings.base import name_of
from midblock.settings.locate import BLOCK_SCORES, DEFAULT_RULE, DEFAULT_SHARE, RULES, LocateSettings
from midblock.tuning.planning import budget_of, make_plan

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from midblock.analysis.gradients import GradientsResult

__all__ = ["LocateResult", "Proposal", "locate", "mask_of", "propose", "scores_of", "width_for"]


@dataclass(frozen=True)
class Proposal:
    """A contiguous range of blocks."""

    rule: str
    blocks: tuple[int, int]
    """Half-open."""
    num_blocks: int
    reason: str

    @property
    def mask(self) -> str:
        """The shortest mask that selects exactly these blocks."""
        return mask_of(self.blocks, self.num_blocks)

    @property
    def spec(self) -> str:
        """As ``--blocks`` reads it."""
        return format_blocks(range(*self.blocks))

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"rule": self.rule, "blocks": list(self.blocks), "spec": self.spec, "mask": self.mask,
                "reason": self.reason}


def mask_of(blocks: tuple[int, int], num_blocks: int) -> str:
    """The shortest mask that selects exactly a half-open range of blocks (at most one digit a block).

    Example:
        >>> mask_of((6, 24), 30), mask_of((0, 1), 3)
        ('01110', '10')
    """
    lo, hi = blocks
    for digits in range(1, num_blocks + 1):
        bounds = segment_bounds(digits, num_blocks)
        if any(a == lo for a, _ in bounds) and any(b == hi for _, b in bounds):
            mask = "".join("1" if lo <= a and b <= hi else "0" for a, b in bounds)
            if "1" in mask and segment_blocks(mask, num_blocks) == list(range(lo, hi)):
                return mask
    raise BlockRangeError(f"blocks [{lo}, {hi}) are no range of a model of {num_blocks} blocks.")


def width_for(num_blocks: int, share: float | None = None, *, costs: Sequence[int] | None = None,
              budget: int | None = None) -> int:
    """How many blocks a share or a budget takes.

    Args:
        num_blocks: L.
        share: Of the blocks, 0..1; the nearest whole number of blocks, at least 1.
        costs: Trainable parameters of each block, (L,).
        budget: Most trainable parameters; needs ``costs`` and excludes ``share``.

    Raises:
        SettingsError: both or neither given, or a share outside 0..1.
        BudgetError: the budget is below one block.

    Example:
        >>> width_for(30, 0.6), width_for(3, costs=[5, 5, 5], budget=12)
        (18, 2)
    """
    if (share is None) == (budget is None):
        raise SettingsError("give exactly one of a share of the blocks and a budget of parameters.")
    if share is not None:
        if not 0 < share <= 1:
            raise SettingsError(f"a share of {share} was asked for; use more than 0 and at most 1.")
        return max(1, math.floor(share * num_blocks + 0.5))
    assert budget is not None
    if costs is None:
        raise SettingsError("a budget needs the parameters of each block.")
    width = int(budget // max(costs))
    if width < 1:
        raise BudgetError(f"a budget of {budget:,} trainable parameters is below one block, which takes "
                          f"{max(costs):,} at this rank; raise the budget or lower {name_of('rank')}.")
    return min(num_blocks, width)


def _around(centre: float, width: int, num_blocks: int) -> tuple[int, int]:
    """The window of a width whose centre lies nearest, inside 0..L."""
    lo = min(max(0, math.floor(centre - width / 2 + 0.5)), num_blocks - width)
    return lo, lo + width


def propose(rule: str, width: int, num_blocks: int, *, scores: Mapping[str, Sequence[float]] | None = None,
            similarity: npt.NDArray[np.float64] | None = None, seed: int = 0) -> Proposal:
    """Turn scores into a contiguous range of ``width`` blocks.

    Args:
        rule: One of `RULES`.
        width: Blocks to choose.
        num_blocks: L.
        scores: Score -> one value per block; needed for a rule of that name.
        similarity: CKA between hidden 0..L; needed for ``cka-borders``.
        seed: Of the random rule.

    Raises:
        SettingsError: no such rule, or what it needs was not measured or is undefined.

    Example:
        >>> propose("taylor", 2, 4, scores={"taylor": [0.0, 1.0, 3.0, 0.5]}).blocks
        (1, 3)
    """
    if rule not in RULES:
        raise SettingsError(f"rule {rule!r} is not known; choose among {', '.join(RULES)}.")
    if rule == "uniform":
        return Proposal(rule, (0, num_blocks), num_blocks, "all blocks share the budget")
    if rule == "random":
        lo = int(np.random.default_rng(seed).integers(0, num_blocks - width + 1))
        return Proposal(rule, (lo, lo + width), num_blocks, f"drawn with seed {seed}")
    if rule == "fixed-middle":
        found = _around(sum(MIDDLE) / 2 * num_blocks, width, num_blocks)
        return Proposal(rule, found, num_blocks, "the middle of the depth, as the paper finds; no score was needed")
    if rule == "cka-borders":
        if similarity is None or not np.isfinite(similarity).all() or num_blocks < 2:
            raise SettingsError("rule cka-borders needs the CKA between all hidden states, which is not there or "
                                "undefined; give --data with at least 4 different samples.")
        lo, hi = metrics.change_points(similarity, 3)
        # hidden h is what block h reads: the middle group of states lo..hi-1 belongs to blocks lo..hi-1
        found = _around((lo + min(hi, num_blocks)) / 2, width, num_blocks)
        return Proposal(rule, found, num_blocks, f"hidden states change most at {lo} and {hi} (CKA); the window lies "
                                                 "around the middle of the three groups")
    values = np.asarray((scores or {}).get(rule, []), dtype=np.float64)
    if values.shape != (num_blocks,) or not np.isfinite(values).all():
        raise SettingsError(f"rule {rule} needs a finite {rule} of each of the {num_blocks} blocks, which was not "
                            "measured or is undefined.")
    means = np.convolve(values, np.ones(width) / width, mode="valid")
    lo = int(np.argmax(means))
    return Proposal(rule, (lo, lo + width), num_blocks,
                    f"highest mean {rule} of all windows of {width} blocks: {means[lo]:.4g}, mean over all blocks "
                    f"{values.mean():.4g}")


RELIABLE = 0.7
"""Share of a score's variance over blocks that must be more than noise for the score to be read."""


def reliability(frame: pd.DataFrame, split_half: Mapping[str, float]) -> dict[str, float]:
    """How much of each score's variance over the blocks is not noise of the samples, 0..1.

    For a score with intervals 1 - mean(standard error squared) / variance over blocks, for the others the agreement
    of two halves of the samples. Scores of weights alone have no such noise and are left out.

    Args:
        frame: The table of `block_scores`.
        split_half: Score -> reliability from halves.
    """
    found = {}
    for score, part in frame.groupby("metric", sort=False):
        if BLOCK_SCORES[str(score)].needs == "weights":
            continue
        if part["low"].isna().all():
            found[str(score)] = split_half.get(str(score), 0.0)
            continue
        n = part["n"].to_numpy(dtype=np.float64)
        error = (part["high"] - part["low"]).to_numpy() / 2 / t_distribution.ppf(0.975, n - 1)
        spread = float(np.var(part["value"], ddof=1))
        found[str(score)] = max(0.0, 1 - float(np.mean(error ** 2)) / spread) if spread > 0 else 0.0
    return found


@dataclass
class LocateResult(TableResult):
    """Scores per block and what each rule proposes."""

    table: Table
    proposals: dict[str, Proposal]
    """Rule -> its range; rules that could not be applied are in ``refused``."""
    refused: dict[str, str]
    rule: str
    """The chosen rule."""
    similarity: npt.NDArray[np.float64] | None
    """Debiased CKA between hidden 0..L."""
    num_blocks: int
    counts: dict[str, Any] = field(default_factory=dict)
    origin: Origin = UNNAMED

    @property
    def reliability(self) -> dict[str, float]:
        """See `reliability`."""
        return reliability(self.frame, self.counts.get("split_half", {}))

    @property
    def proposal(self) -> Proposal:
        """What the chosen rule proposes."""
        return self.proposals[self.rule]

    def proposal_table(self) -> pd.DataFrame:
        """One row per rule."""
        return pd.DataFrame([{"rule": name, "blocks": p.spec, "mask": p.mask, "reason": p.reason}
                             for name, p in self.proposals.items()])

    def answer(self) -> Answer:
        """The proposal, and how far the scores can be trusted."""
        own, told = self.proposal, self.reliability
        noisy = [name for name, r in told.items() if r < RELIABLE]
        samples = self.counts.get("rows")
        n = f", n = {samples} samples" if samples else ", from the weights alone"
        found = f"Proposal (rule {self.rule}): tune blocks {own.spec} of {self.num_blocks} (mask {own.mask}){n}."
        if told and len(noisy) == len(told):
            means = "With so few samples every score of states or gradients is noise: none of them may choose blocks."
        elif noisy:
            means = f"{len(noisy)} of {len(told)} scores are noise at this many samples ({', '.join(noisy)}); none " \
                    "is shown to choose better than the fixed middle."
        else:
            means = "None of these scores is shown to choose better than the fixed middle; `locate --validate` " \
                    "checks them on your sweeps."
        where = self.origin if self.counts else replace(self.origin, data="arithmetic")  # scored by its weights alone
        return Answer(found, means, where.words("tune", "--blocks", own.spec, "--dry-run", models=1))

    def details(self) -> list[str]:
        """The proposal's reason, how far the other rules agree, and which scores are noise."""
        own = self.proposal
        lines = [f"{self.rule}: {own.reason}."]
        inside = set(range(*own.blocks))
        others = [(n, p) for n, p in self.proposals.items() if n not in (self.rule, "random", "uniform")]
        if others:
            told = ", ".join(f"{n} {p.spec} ({len(inside & set(range(*p.blocks)))} of {len(inside)} shared)"
                             for n, p in others)
            lines.append(f"Other rules: {told}.")
        noisy = {name: r for name, r in self.reliability.items() if r < RELIABLE}
        if noisy:
            told = ", ".join(f"{name} {r:.2f}" for name, r in noisy.items())
            lines.append(f"Mostly noise with so few samples: {told} (the share of the differences between blocks that "
                         f"is not noise; do not read a score below {RELIABLE:g}). Raise {name_of('samples')} and "
                         f"{name_of('gradient_samples')}.")
        if self.rule == DEFAULT_RULE:
            lines.append("No score is trusted by default: none has been shown to choose better than the fixed middle "
                         "(docs/results.md). Check on your own sweeps with `midblock locate --validate SWEEP_DIR`.")
        lines += [f"{name}: {reason}" for name, reason in self.refused.items()]
        return lines

    def figures(self) -> dict[str, Figure]:
        """Scores over depth, and CKA between all hidden states."""
        from midblock.figures import depth_lines, heatmap
        from midblock.figures.style import count_note

        frame = self.frame
        made = {"locate-scores": depth_lines(frame, list(dict.fromkeys(frame["metric"])),
                                             title="Scores per block without training")}
        if self.similarity is not None and np.isfinite(self.similarity).any():
            names = list(range(self.num_blocks + 1))
            made["locate-cka"] = heatmap(
                self.similarity, names, names, title="Likeness of every two hidden states",
                label="debiased CKA (1 = same shape)", row_label="hidden state", column_label="hidden state",
                footnote=count_note(frame[frame["metric"] == "block_influence"]))
        return made


def scores_of(table: Table, num_blocks: int) -> dict[str, list[float]]:
    """Score -> value per block, NaN where undefined."""
    found: dict[str, list[float]] = {}
    for row in table.rows:
        found.setdefault(row["metric"], [math.nan] * num_blocks)[int(row["layer"])] = row["value"]
    return found


def locate(model: LoadedModel | str, *, data: Dataset | str | None = None, progress: Progress = silent,
           settings: LocateSettings | None = None, forward: ForwardPass | None = None,
           backward: GradientsResult | None = None, **overrides: Any) -> LocateResult:
    """Score every block without training and propose a contiguous range.

    Args:
        model: A model or a MODEL spec.
        data: A data set or a D spec; without it only the weights are scored.
        progress: Told how far it is.
        settings: See `LocateSettings`.
        forward: What a pass shared with others found already (`midblock.selection.scores.forward_part`).
        backward: `gradients` of this model on the same samples, in the same batches.
        **overrides: Single fields of the settings.

    Raises:
        SettingsError: a setting out of range, or a rule whose score was not measured.
        BudgetError: the budget is below one block.
    """
    chosen = LocateSettings.of(settings, overrides)
    loaded = load_model(model) if isinstance(model, str) else model
    blocks = loaded.anatomy.num_blocks
    if chosen.budget is None:
        width = width_for(blocks, DEFAULT_SHARE if chosen.share is None else chosen.share)
    else:
        targets = chosen.target_modules
        plan = make_plan(loaded, blocks=range(blocks), rank=chosen.rank, target_modules=targets)
        width = width_for(blocks, costs=[plan.params_of_block(b) for b in range(blocks)],
                          budget=budget_of(loaded.anatomy, chosen.budget, targets=targets))
    dataset = load_data(data, seed=chosen.seed) if isinstance(data, str) else data
    table, similarity, counts = block_scores(loaded, dataset, settings=chosen, progress=progress,
                                             forward=forward, backward=backward)
    scores = scores_of(table, blocks)
    proposals: dict[str, Proposal] = {}
    refused: dict[str, str] = {}
    for name in RULES:
        unread = name == "cka-borders" and dataset is not None and not chosen.wants("forward")
        if name != chosen.rule and (unread or (name in BLOCK_SCORES and name not in scores)):
            continue  # nobody asked for what it needs
        try:
            proposals[name] = propose(name, width, blocks, scores=scores, similarity=similarity, seed=chosen.seed)
        except SettingsError as error:
            if name == chosen.rule:
                raise
            refused[name] = str(error)
    return LocateResult(table, proposals, refused, chosen.rule, similarity, blocks, counts,
                        Origin((loaded.spec,), "" if dataset is None else dataset.spec))
