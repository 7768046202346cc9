"""What is going to be trained, exactly: every matrix by its full name, the rank, the number of parameters.

`midblock.tuning.make_plan` solves a plan; `load_plan` reads one from a file; `midblock.tuning.lora_config` writes it as
a `peft.LoraConfig`.

Parameter counts, for a matrix of ``in`` inputs and ``out`` outputs:

* LoRA of rank r (Hu et al., ICLR 2022): r * (in + out); of the E stacked matrices of fused experts E times that
* DoRA of rank r (Liu et al., ICML 2024): r * (in + out) + out, the magnitudes
* full: in * out

The update of LoRA is multiplied by alpha / r, of rsLoRA (Kalajdzievski, 2023) by alpha / sqrt(r). Where matrices have
ranks of their own (`midblock.tuning.eva`), r is the matrix's, and alpha grows with it under the scale ``fixed-ratio``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import pandas as pd
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from midblock.errors import SettingsError
from midblock.reading import read_json, user_path
from midblock.segments import format_blocks
from midblock.settings.base import faults_of
from midblock.settings.tune import Method, Scale

if TYPE_CHECKING:
    from peft import LoraConfig
    from torch import nn

__all__ = ["Missing", "ModulePlan", "Plan", "load_plan"]

_CONFIG = ConfigDict(extra="ignore", allow_inf_nan=False)
_Count = Annotated[int, Field(ge=0, lt=2**63)]
_Size = Annotated[int, Field(ge=1, lt=2**31)]


@dataclass(frozen=True, slots=True, config=_CONFIG)
class ModulePlan:
    """One matrix to be adapted, or the stacked matrices of all experts.

    Attributes:
        name: Full module path in the model, such as ``model.layers.6.self_attn.q_proj``; of stacked experts the
            parameter's path.
        block: Index of its block.
        kind: What it is (`midblock.models.kind_of`).
        inputs: Width of its input.
        outputs: Width of its output.
        experts: How many matrices are stacked in one parameter; 0 for a linear layer.
        rank: Its own LoRA rank; None: the plan's.
    """

    name: str
    block: _Count
    kind: str
    inputs: _Size
    outputs: _Size
    experts: _Count = 0
    rank: _Size | None = None

    @property
    def cost_per_rank(self) -> int:
        """Parameters of LoRA at rank 1."""
        return max(1, self.experts) * (self.inputs + self.outputs)

    @property
    def weights(self) -> int:
        """Numbers of the matrix itself."""
        return max(1, self.experts) * self.inputs * self.outputs

    @property
    def parameter(self) -> str:
        """Full name of the weight."""
        return self.name if self.experts else f"{self.name}.weight"

    def cost(self, method: Method, rank: int | None) -> int:
        """Trainable parameters under a method; ``rank`` is the plan's."""
        if method == "full":
            return self.weights
        rank = self.rank or rank
        assert rank is not None
        return rank * self.cost_per_rank + (self.outputs if method == "dora" else 0)


@dataclass(frozen=True, slots=True, config=_CONFIG)
class Missing:
    """Targets that were asked for in a block and are not trained there."""

    block: _Count
    targets: tuple[str, ...]
    why: Literal["absent", "rank 0"] = "absent"
    """They mean nothing there, though elsewhere in the model they do; or the spread of ranks gives them none."""


@dataclass(frozen=True, config=_CONFIG)
class Plan:
    """What is trained, exactly. Made by `make_plan`; written to JSON by `to_dict`."""

    method: Method
    num_blocks: _Size
    """Blocks of the model, L."""
    blocks: tuple[_Count, ...]
    """Blocks that hold a trainable parameter, ascending."""
    modules: Annotated[tuple[ModulePlan, ...], Field(min_length=1)]
    """The adapted matrices in the order of the model."""
    rank: Annotated[int, Field(ge=1, lt=2**31)] | None
    """LoRA rank, where matrices have ranks of their own the one that takes as many parameters; None for full-rank
    updates."""
    alpha: Annotated[float, Field(gt=0)] | None
    """At `rank`."""
    scale: Scale
    params: _Count
    """Trainable parameters, exact."""
    budget: _Count | None
    """What was asked for; None where the rank was given."""
    model_params: _Count
    """Parameters of the model (tied ones once)."""
    targets: tuple[str, ...]
    mask: str | None = None
    whole_blocks: bool = False
    """Full method: every parameter of the blocks (norms and biases too), not matrices alone."""
    origin: str = ""
    """How the blocks or modules were chosen, for people."""
    missing: tuple[Missing, ...] = ()
    """What was asked for and is not reached: blocks that lack some or all of the targets."""

    @property
    def scaling(self) -> float | None:
        """Factor of the low-rank product B A at `rank`; None for full-rank updates."""
        return self._scaling(self.rank)

    def _scaling(self, rank: int | None) -> float | None:
        if rank is None or self.rank is None or self.alpha is None:
            return None
        if self.scale == "rslora":
            return self.alpha / math.sqrt(rank)
        return self.alpha / (self.rank if self.scale == "fixed-ratio" else rank)

    @property
    def own_ranks(self) -> dict[str, int]:
        """Rank of every matrix by name, where matrices have ranks of their own; else empty."""
        if self.rank is None or all(m.rank is None for m in self.modules):
            return {}
        return {m.name: m.rank or self.rank for m in self.modules}

    def alpha_of(self, rank: int) -> float:
        """Alpha of a matrix of this rank, so that the rule of `scale` holds for it too."""
        assert self.rank is not None
        assert self.alpha is not None
        return self.alpha * rank / self.rank if self.scale == "fixed-ratio" else self.alpha

    @property
    def largest_rank(self) -> int | None:
        """The largest rank of a matrix; None for full-rank updates."""
        return max(self.own_ranks.values(), default=self.rank)

    @property
    def rank_words(self) -> str | None:
        """``16``, or ``3-32`` where matrices have ranks of their own; None for full-rank updates."""
        own = set(self.own_ranks.values())
        if len(own) > 1:
            return f"{min(own)}-{max(own)}"
        return None if self.rank is None else str(self.largest_rank)

    @property
    def mismatch(self) -> int | None:
        """Trainable parameters minus the budget; None without a budget."""
        return None if self.budget is None else self.params - self.budget

    @property
    def rank_step(self) -> int | None:
        """Parameters of one more rank (of the widest matrix, where each has its own); the mismatch is at most half."""
        if self.rank is None:
            return None
        costs = [m.cost_per_rank for m in self.modules]
        return max(costs) if self.own_ranks else sum(costs)

    @property
    def share(self) -> float:
        """Trainable parameters as a share of the model's."""
        return self.params / self.model_params

    @property
    def first_block(self) -> int:
        """The first trainable block: the number of blocks in the frozen prefix."""
        return self.blocks[0]

    def params_of_block(self, block: int) -> int:
        """Trainable parameters in one block (LoRA and DoRA, or full matrices).

        Not defined for whole-block plans, whose other parameters are not listed.
        """
        return sum(m.cost(self.method, self.rank) for m in self.modules if m.block == block)

    def depth_map(self) -> str:
        """The blocks from input to output: ``#`` trained, ``.`` frozen.

        Example:
            A plan of blocks 6..11 of 30 gives ``......######..................``.
        """
        chosen = set(self.blocks)
        return "".join("#" if b in chosen else "." for b in range(self.num_blocks))

    def table(self) -> pd.DataFrame:
        """One row per trained block: its matrices and its trainable parameters."""
        rows = []
        for block in self.blocks:
            inside = [m for m in self.modules if m.block == block]
            rows.append({"block": block, "matrices": " ".join(m.name.rpartition(".")[2] for m in inside),
                         "rank": "full" if self.rank is None else self.rank if not self.own_ranks
                         else " ".join(str(m.rank or self.rank) for m in inside),
                         "parameters": self.params // len(self.blocks) if self.whole_blocks
                         else self.params_of_block(block)})
        return pd.DataFrame(rows)

    def not_reached(self) -> str:
        """What was asked for and is not trained, in words; empty where everything is.

        Example:
            ``blocks 0:2 have no q, k, v, o; block 4 has no rank for gate``
        """
        by_targets: dict[tuple[str, tuple[str, ...]], list[int]] = {}
        for gap in self.missing:
            by_targets.setdefault((gap.why, gap.targets), []).append(gap.block)
        return "; ".join(f"{'blocks' if len(blocks) > 1 else 'block'} {format_blocks(blocks)} "
                         f"{'have' if len(blocks) > 1 else 'has'} no {'rank for ' * (why == 'rank 0')}"
                         f"{', '.join(targets)}"
                         for (why, targets), blocks in by_targets.items())

    def summary(self) -> str:
        """A few lines for people."""
        how = {"lora": "LoRA", "dora": "DoRA", "full": "full-rank update"}[self.method]
        lines = [f"{how} of blocks {format_blocks(self.blocks)} of {self.num_blocks}"
                 + (f" (mask {self.mask})" if self.mask else "") + f"  {self.depth_map()}"]
        if self.rank is not None:
            own = sorted(set(self.own_ranks.values()) or {self.rank})
            scales = list(dict.fromkeys(f"{self._scaling(r):g}" for r in (own[0], own[-1])))
            lines.append((f"ranks {own[0]} to {own[-1]} (one rank for all would be {self.rank})" if self.own_ranks
                          else f"rank {self.rank}") + f", alpha {self.alpha:g}, update scaled by {' to '.join(scales)}"
                         + (" (rsLoRA)" if self.scale == "rslora" else ""))
        line = f"{self.params:,} trainable parameters, {self.share:.3%} of the model's {self.model_params:,}"
        if self.budget is not None:
            line += f"; budget {self.budget:,}, mismatch {self.mismatch:+,}"
            if self.rank_step is not None:
                line += f" (one rank{' of the widest matrix' * bool(self.own_ranks)} is {self.rank_step:,})"
        lines.append(line)
        if gaps := self.not_reached():
            lines.append(f"not reached: {gaps}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; `from_dict` reads it back."""
        value = {"format": 1, **asdict(self), "scaling": self.scaling, "mismatch": self.mismatch, "share": self.share}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in value.items()}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any], *, where: str = "this") -> Plan:
        """The plan that `to_dict` wrote, its counts made anew.

        Args:
            value: The dictionary.
            where: Its source, for messages.

        Raises:
            SettingsError: it is not such a dictionary; every fault is named.
        """
        try:
            plan: Plan = TypeAdapter(cls).validate_python(dict(value))
        except ValidationError as error:
            raise SettingsError(f"{where} is not a plan as midblock writes it ({'; '.join(faults_of(error))}); make "
                                "one with `midblock tune ... --dry-run --json` or `midblock importance`.") from None
        blocks = tuple(sorted({m.block for m in plan.modules}))
        if plan.blocks != blocks or blocks[-1] >= plan.num_blocks:
            raise SettingsError(f"{where} is not a plan that can be trained: it names blocks "
                                f"{format_blocks(plan.blocks)} of {plan.num_blocks}, its matrices are in blocks "
                                f"{format_blocks(blocks)}; make it anew.")
        if (plan.method == "full") != (plan.rank is None) or (plan.rank is None) != (plan.alpha is None):
            raise SettingsError(f"{where} is not a plan that can be trained: method {plan.method} with rank "
                                f"{plan.rank} and alpha {plan.alpha}; make it anew.")
        if plan.rank is not None and plan.rank > (full := max(min(m.inputs, m.outputs) for m in plan.modules)):
            raise SettingsError(f"{where} asks for rank {plan.rank}, but none of its matrices has more than rank "
                                f"{full}.")
        if odd := next((m for m in plan.modules if m.rank and (plan.rank is None or m.rank > min(m.inputs, m.outputs))),
                       None):
            raise SettingsError(f"{where} is not a plan that can be trained: {odd.name} ({odd.inputs}->{odd.outputs}) "
                                f"with rank {odd.rank} and method {plan.method}; make it anew.")
        if plan.whole_blocks:
            return plan
        return replace(plan, params=sum(m.cost(plan.method, plan.rank) for m in plan.modules))

    def save(self, path: Path | str) -> None:
        """Write the plan as a JSON file that ``tune --plan`` accepts."""
        from midblock.writing import write_json

        write_json(Path(path), self.to_dict())

    def lora_config(self, model: nn.Module | None = None, *, dropout: float = 0.0,
                    task_type: str | None = "CAUSAL_LM") -> LoraConfig:
        """The plan as a plain `peft.LoraConfig`; see `midblock.lora_config`."""
        from midblock.tuning.peft_config import config_of

        return config_of(self, model, dropout, task_type)


def load_plan(path: Path | str) -> Plan:
    """A plan file: what `Plan.save` or ``midblock importance`` wrote.

    A JSON object with the key ``plan`` holding the plan is accepted as well.

    Raises:
        SettingsError: no such file, not JSON, or not a plan.
    """
    where = user_path(path, error=SettingsError)
    try:
        value = read_json(where, error=SettingsError)
    except SettingsError as error:
        raise SettingsError(f"plan file: {error}") from None
    inner = value.get("plan")
    return Plan.from_dict(inner if isinstance(inner, dict) else value, where=f"plan file {where}")
