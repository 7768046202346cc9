"""Settings of `midblock tune`: what is trained (where, how large), on which rows, and how."""

from __future__ import annotations

import math
from typing import Any, Literal, Self

from pydantic import field_validator, model_validator

from midblock.settings import sampling
from midblock.settings.base import Settings, name_of, setting

__all__ = [
    "DEFAULT_TARGETS",
    "LEARNING_RATES",
    "PAPER_ALPHA",
    "REFERENCE_BUDGET",
    "REFERENCE_RANK",
    "Init",
    "LoopSettings",
    "Method",
    "Order",
    "PlanSettings",
    "Ranks",
    "RowSettings",
    "Scale",
    "Schedule",
    "StartSettings",
    "TrainSettings",
    "TuneSettings",
    "WhereSettings",
]

Method = Literal["lora", "dora", "full"]
Scale = Literal["fixed-ratio", "rslora", "fixed-alpha"]
Schedule = Literal["linear", "cosine", "constant"]
Order = Literal["length", "random"]
Init = Literal["default", "pissa", "olora", "corda", "eva", "lora-ga"]
Ranks = Literal["equal", "eva"]

REFERENCE_RANK = 16
"""LoRA rank on all blocks whose parameters are the default budget."""
REFERENCE_BUDGET = f"match:1@{REFERENCE_RANK}"
"""The default budget, as one writes it."""
DEFAULT_TARGETS = ("q", "k", "v", "o")
"""The attention matrices, under whatever names (or fused into whichever matrix) a family has them."""
PAPER_ALPHA = 128.0
"""Alpha of the paper's public code, whatever the rank (scale ``fixed-alpha``)."""
LEARNING_RATES: dict[Method, float] = {"lora": 5e-4, "dora": 5e-4, "full": 5e-5}
"""Peak learning rates where none is given."""


class WhereSettings(Settings):
    """Where to train: exactly one of mask, blocks, random_blocks and modules, and which matrices there."""

    mask: str | None = setting(None, metavar="01100", help=(
        "Depth segments to train, one digit each from input to output."))
    blocks: str | tuple[int, ...] | None = setting(None, metavar="8:16", help=(
        "Blocks to train: 8:16 (16 excluded), 3, 0:4,12:16."))
    random_blocks: int | tuple[int, int] | None = setting(None, metavar="N", help=(
        "Train N blocks drawn with the seed (in Python also (N, seed)): the control for a mask of as many blocks."))
    modules: tuple[str, ...] | None = setting(None, cli=False, help="Full names of the matrices, such as ILA selects.")
    target_modules: tuple[str, ...] = setting(DEFAULT_TARGETS, min_length=1, metavar="NAMES", help=(
        "Matrices in each block: q,k,v,o,gate,up,down, module names, or attention, mlp, experts, all-linear "
        "(with method full also all)."))

    @field_validator("blocks", "random_blocks", mode="before")
    @classmethod
    def _whole_numbers(cls, value: Any) -> Any:
        if value is None or isinstance(value, str | int):
            return value
        try:
            return tuple(int(v) for v in value)
        except (TypeError, ValueError):
            return value

    @field_validator("random_blocks")
    @classmethod
    def _enough(cls, value: int | tuple[int, int] | None) -> int | tuple[int, int] | None:
        if value is not None and (value if isinstance(value, int) else value[0]) < 1:
            raise ValueError(f"must be at least 1, got {value}")
        return value

    @property
    def ways(self) -> list[str]:
        """Which of mask, blocks, random_blocks and modules are given."""
        return [n for n in ("mask", "blocks", "random_blocks", "modules") if getattr(self, n) is not None]

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if len(self.ways) > 1:
            raise ValueError("say where to train in exactly one way, a mask (01100), blocks (8:16), random blocks or "
                             f"module names; got {' and '.join(map(name_of, self.ways))}")
        return self


class PlanSettings(WhereSettings):
    """Where to train, and how large: `make_plan` and `lora_config` take the same names as keyword arguments."""

    method: Method = setting("lora", help="lora, dora, or full (train the matrices themselves).")
    rank: int | None = setting(None, ge=1, metavar="R", help="LoRA rank.")
    budget: int | str | None = setting(None, metavar="PARAMS", help=(
        "Trainable parameters; the rank is solved. A number (900k, 1.5M) or match:MASK@RANK. "
        f"Default: {REFERENCE_BUDGET}, what rank {REFERENCE_RANK} takes on all blocks."))
    scale: Scale = setting("fixed-ratio", help=(
        f"fixed-ratio: alpha/rank is kept; rslora: alpha/sqrt(rank); fixed-alpha: alpha {PAPER_ALPHA:g} whatever the "
        "rank (the paper's public code)."))
    alpha_over_rank: float = setting(2.0, gt=0, metavar="X", help=(
        f"Factor of the update (rslora: at rank {REFERENCE_RANK})."))
    alpha: float | None = setting(None, gt=0, metavar="A", help="Alpha itself, in place of alpha over rank.")

    @model_validator(mode="after")
    def _one_size(self) -> Self:
        sizes = [name_of(n) for n in ("rank", "budget") if getattr(self, n) is not None]
        if self.method == "full" and sizes:
            raise ValueError(f"a full-rank update has neither a rank nor a budget, got {' and '.join(sizes)}: its "
                             "parameters follow from the blocks (`midblock.tuning.full_blocks_for_budget` says how "
                             "many a budget takes)")
        if len(sizes) == 2:
            raise ValueError(f"both a rank ({self.rank}) and a budget ({self.budget}) were given; a budget solves the "
                             "rank, so give one of them")
        return self


class RowSettings(Settings):
    """Which rows are learned, and what of them."""

    samples: int | None = sampling.samples(None)
    max_length: int = sampling.max_length(512)
    chat: bool = setting(False, help="Write rows with the tokenizer's chat template.")
    all_tokens: bool = setting(False, help=(
        "Learn every token of a row instead of completions only (for plain text)."))


class LoopSettings(Settings):
    """How training steps are made, for one run or for all runs of a sweep."""

    epochs: float = setting(2.0, gt=0, metavar="E", help="Passes over the rows; fractions allowed.")
    steps: int | None = setting(None, ge=1, metavar="N", help="Optimizer steps, in place of epochs.")
    schedule: Schedule = setting("linear", help="Of the learning rate after its rise.")
    warmup: float = setting(0.05, ge=0, lt=1, help="Share of the steps over which the learning rate rises.")
    weight_decay: float = setting(0.0, ge=0, help="AdamW's.")
    max_grad_norm: float = setting(1.0, ge=0, help="Gradients are scaled down to this norm; 0: never.")
    batch_size: int = sampling.batch_size(8, "Rows in one forward.")
    accumulate: int = setting(1, ge=1, metavar="N", help="Forwards in one optimizer step.")
    order: Order = setting("length", help=(
        "Rows of a batch: of like length (least padding), or drawn at random as trainers usually do."))
    gradient_checkpointing: bool = setting(False, help="Less memory, a second forward of the blocks that run.")

    def steps_per_epoch(self, rows: int) -> int:
        """Optimizer steps of one pass over a number of rows."""
        return max(1, math.ceil(math.ceil(rows / self.batch_size) / self.accumulate))

    def num_steps(self, rows: int) -> int:
        """Optimizer steps for a number of rows."""
        return self.steps if self.steps is not None else max(1, math.ceil(self.epochs * self.steps_per_epoch(rows)))

    def num_epochs(self, rows: int) -> float:
        """Passes over the rows."""
        return self.epochs if self.steps is None else self.steps / self.steps_per_epoch(rows)


class TrainSettings(LoopSettings):
    """How to train. What to train is the plan's; on which tokens, the rows'."""

    learning_rate: float | None = setting(None, gt=0, metavar="LR", help=(
        f"Peak learning rate ({LEARNING_RATES['lora']:g}; {LEARNING_RATES['full']:g} with method full)."))
    seed: int = sampling.seed("Of the draw, the order, the adapter's start, dropout and random blocks.")
    lean: bool = setting(True, cli=False, help=(
        "The kernels of `midblock.tuning.kernels`; off: PEFT's and PyTorch's own (for comparison)."))

    def peak_rate(self, method: Method) -> float:
        """The peak learning rate."""
        return LEARNING_RATES[method] if self.learning_rate is None else self.learning_rate


class StartSettings(Settings):
    """What a LoRA takes from the weights and from training rows before it is trained."""

    init: Init = setting("default", help=(
        "How LoRA's factors begin: A random and B zero (default), from the weights (pissa, olora), or also from "
        "training rows (corda, eva, lora-ga)."))
    ranks: Ranks = setting("equal", help=(
        "One rank in all matrices (equal), or the same parameters spread over them as EVA does, by the variance of "
        "what each matrix reads of training rows."))


class TuneSettings(TrainSettings, RowSettings, StartSettings, PlanSettings):
    """Everything that `tune` can be told; it takes the same names as keyword arguments."""

    dropout: float = setting(0.0, ge=0, le=0.9, help="Of LoRA's input.")
    cache: str = setting("auto", metavar="auto|none|memory|disk:DIR", help=(
        "Where the frozen prefix's output is kept. auto: in memory where that is exact."))
    cache_limit: int | str | None = setting(None, metavar="SIZE", help="Byte limit of the cache, such as 4GB.")
    eval_data: str | None = setting(None, metavar="D", help=(
        "Held-out rows whose loss is compared before and after (the test split of D)."))
    eval_samples: int = setting(64, ge=2, metavar="N", help="How many of them.")
    merge: bool = setting(False, help="Also write base + adapter as a plain checkpoint in OUT/model.")
    export_base: bool = setting(False, help=(
        "Also write the base as a plain checkpoint in OUT/base, which the adapter then names as its base."))
    gguf: bool = setting(False, help=(
        "Also write the adapter as OUT/adapter.gguf for llama.cpp, with a Modelfile for Ollama."))
    push: str | None = setting(None, metavar="REPO", pattern=r"^[\w.-]+/[\w.-]+$", help=(
        "Upload adapter and card to this repository of the Hugging Face hub, private where it is new."))
    pad_rank: bool = setting(False, help="Write the adapter at the next rank that vLLM takes, with zeros.")
    save_steps: int | None = setting(None, ge=1, metavar="N", help="Checkpoint every N steps (default: every minute).")
    report_to: str = setting("none", metavar="NAME", help="A tracker, as for transformers (tensorboard, wandb, ...).")

    @model_validator(mode="after")
    def _plain_lora(self) -> Self:
        for name, usual in (("init", "default"), ("ranks", "equal")):
            if self.method != "lora" and getattr(self, name) != usual:
                raise ValueError(f"{name_of(name)} {getattr(self, name)} is for plain LoRA, and {name_of('method')} is "
                                 f"{self.method}; leave one of them out")
        return self
