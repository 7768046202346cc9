"""Settings of `midblock locate`, and what the block scores are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import field_validator, model_validator

from midblock.settings.base import Settings, name_of, setting
from midblock.settings.sampling import batch_size, max_length, samples, seed
from midblock.settings.tune import REFERENCE_RANK

__all__ = ["BLOCK_SCORES", "DEFAULT_RULE", "DEFAULT_SHARE", "RULES", "BlockScore", "LocateSettings", "ScoreSettings"]

Needs = Literal["forward", "backward", "weights", "inputs"]


@dataclass(frozen=True, slots=True)
class BlockScore:
    """What a score measures and what it costs."""

    needs: Needs
    meaning: str
    default: bool = True
    """Whether it is computed without being named."""


BLOCK_SCORES: dict[str, BlockScore] = {
    "block_influence": BlockScore("forward", "1 - cos of each token's state before and after the block (ShortGPT)"),
    "angular_distance": BlockScore("forward", "angle between them, / pi"),
    "cka_novelty": BlockScore("forward", "1 - debiased CKA of the hidden states before and after the block"),
    "rank_plateau": BlockScore("forward", "minus |change of ln effective rank| over the block"),
    "weight_snr": BlockScore("weights", "energy of singular values above the noise edge, over that below"),
    "gradient_norm": BlockScore("backward", "norm of the gradient"),
    "gradient_norm_relative": BlockScore("backward", "norm of the gradient, / norm of the weights"),
    "fisher": BlockScore("backward", "sum of squared gradients"),
    "taylor": BlockScore("backward", "|sum of weight times gradient|"),
    "eva_share": BlockScore("inputs", "share of a budget that EVA's ranks give the block", default=False),
}
"""Score -> what it is."""

DEFAULT_SHARE = 0.6
"""Share of the blocks that is proposed where neither share nor budget is given: that of the paper's middle."""
DEFAULT_RULE = "fixed-middle"
"""The rule that the evidence supports: see "locate" in docs/results.md. Change it only with that page."""
RULES: dict[str, str] = {
    "fixed-middle": "the window in the middle of the depth (the paper's 20%-80% at share 0.6)",
    "cka-borders": "the window around the middle one of three groups of like hidden states (CKA change points)",
    "uniform": "all blocks, the budget spread over them",
    "random": "a random window",
    **{name: f"the window with the highest mean {name}: {s.meaning}" for name, s in BLOCK_SCORES.items()},
}
"""Rule -> what it does."""


class ScoreSettings(Settings):
    """How much is measured for the scores of blocks."""

    samples: int = samples(32, "Samples of the forward pass.", least=4)
    gradient_samples: int = setting(16, ge=1, metavar="N", help=(
        "Samples of the backward pass; each batch is one observation of the gradient."))
    max_length: int = max_length(128)
    batch_size: int = batch_size(4)
    seed: int = seed("Seed of the draw.")
    scores: tuple[str, ...] = setting(
        tuple(name for name, score in BLOCK_SCORES.items() if score.default), min_length=1, metavar="A,B,...", help=(
            "Compute these scores. Default: all but eva_share, which decomposes what every matrix reads."))

    @field_validator("scores")
    @classmethod
    def _known_scores(cls, scores: tuple[str, ...]) -> tuple[str, ...]:
        if unknown := [s for s in scores if s not in BLOCK_SCORES]:
            raise ValueError(f"{', '.join(unknown)}: choose among {', '.join(BLOCK_SCORES)}")
        return scores

    def wants(self, needs: Needs) -> list[str]:
        """The chosen scores that need this."""
        return [s for s in self.scores if BLOCK_SCORES[s].needs == needs]


class LocateSettings(ScoreSettings):
    """What `locate` measures and proposes; it takes the same names as keyword arguments."""

    rule: str = setting(DEFAULT_RULE, metavar="NAME", help=f"{', '.join(list(RULES)[:4])}, or the name of a score.")
    share: float | None = setting(None, gt=0, le=1, metavar="P", help=(
        f"Share of the blocks to choose. Default: {DEFAULT_SHARE}."))
    budget: str | int | None = setting(None, metavar="PARAMS", help=(
        "In place of a share: most trainable parameters at this rank (900k)."))
    rank: int = setting(REFERENCE_RANK, ge=1, metavar="R", help="LoRA rank behind a budget.")
    target_modules: tuple[str, ...] = setting(("q", "k", "v", "o"), min_length=1, metavar="NAMES", help=(
        "Matrices behind a budget, separated by commas."))

    @field_validator("rule")
    @classmethod
    def _known_rule(cls, rule: str) -> str:
        if rule not in RULES:
            raise ValueError(f"{rule!r} is not known; choose among {', '.join(RULES)}")
        return rule

    def wants(self, needs: Needs) -> list[str]:
        """The chosen scores that need this, and the rule's own."""
        own = BLOCK_SCORES.get(self.rule)
        return list(dict.fromkeys([*super().wants(needs), *([self.rule] if own and own.needs == needs else [])]))

    @model_validator(mode="after")
    def _one_width(self) -> LocateSettings:
        if self.share is not None and self.budget is not None:
            raise ValueError(f"both {name_of('share')} and {name_of('budget')} were given; give one of them")
        return self
