"""What is going to be trained: mask (or blocks, or single modules) + budget -> plan.

A plan names every module by its full path, knows the exact number of trainable parameters from
the real shapes, and can be written as a `peft.LoraConfig` that matches those modules and no other.

Parameter counts, for a matrix of ``in`` inputs and ``out`` outputs:

* LoRA of rank r (Hu et al., ICLR 2022): r * (in + out)
* DoRA of rank r (Liu et al., ICML 2024): r * (in + out) + out, the magnitudes
* full: in * out

The update of LoRA is multiplied by alpha / r, of rsLoRA (Kalajdzievski, 2023) by alpha / sqrt(r).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import pandas as pd
from torch import nn

from midblock.errors import AdapterError, BlockRangeError, BudgetError, SettingsError
from midblock.models import Anatomy, LoadedModel, find_anatomy, projections
from midblock.segments import blocks_from_spec, format_blocks, segment_blocks

if TYPE_CHECKING:
    from peft import LoraConfig

    from midblock.models.anatomy import Projection

__all__ = ["DEFAULT_TARGETS", "REFERENCE_RANK", "Method", "ModulePlan", "Plan", "Scale", "budget_of",
           "full_blocks_for_budget", "load_plan", "lora_config", "make_plan", "random_block_set",
           "require_plan_fits"]

Method = Literal["lora", "dora", "full"]
Scale = Literal["fixed-ratio", "rslora", "fixed-alpha"]

METHODS: tuple[Method, ...] = ("lora", "dora", "full")
SCALES: tuple[Scale, ...] = ("fixed-ratio", "rslora", "fixed-alpha")

REFERENCE_RANK = 16
"""Rank on all blocks whose parameters are the default budget."""
DEFAULT_TARGETS = ("q", "k", "v", "o")
"""The attention matrices, under whatever names (or fused into whichever matrix) a family has them."""
EARLIER_ALPHA = 128.0
"""Alpha of the paper's public code, whatever the rank (``scale="fixed-alpha"``)."""

_GROUPS = {"attention": ("q", "k", "v", "o"), "mlp": ("gate", "up", "down"),
           "all-linear": ("q", "k", "v", "o", "gate", "up", "down")}
# a fused matrix is meant when all of its parts are
_FUSED = {"qkv": {"q", "k", "v"}, "kv": {"k", "v"}, "gate_up": {"gate", "up"}}


@dataclass(frozen=True, slots=True)
class ModulePlan:
    """One matrix to be adapted.

    Attributes:
        name: Full module path in the model, such as ``model.layers.6.self_attn.q_proj``.
        block: Index of its block.
        kind: What it is (`midblock.models.kind_of`).
        inputs: Width of its input.
        outputs: Width of its output.
    """

    name: str
    block: int
    kind: str
    inputs: int
    outputs: int

    @property
    def cost_per_rank(self) -> int:
        """Parameters of LoRA at rank 1."""
        return self.inputs + self.outputs


@dataclass(frozen=True)
class Plan:
    """What is trained, exactly. Made by `make_plan`; written to JSON by `to_dict`."""

    method: Method
    num_blocks: int
    """Blocks of the model, L."""
    blocks: tuple[int, ...]
    """Blocks that hold a trainable parameter, ascending."""
    modules: tuple[ModulePlan, ...]
    """The adapted matrices in the order of the model."""
    rank: int | None
    """LoRA rank; None for full-rank updates."""
    alpha: float | None
    scale: Scale
    params: int
    """Trainable parameters, exact."""
    budget: int | None
    """What was asked for; None where the rank was given."""
    model_params: int
    """Parameters of the model (tied ones once)."""
    targets: tuple[str, ...]
    mask: str | None = None
    whole_blocks: bool = False
    """Full method: every parameter of the blocks (norms and biases too), not matrices alone."""
    origin: str = ""
    """How the blocks or modules were chosen, for people."""

    @property
    def scaling(self) -> float | None:
        """Factor of the low-rank product B A; None for full-rank updates."""
        if self.rank is None or self.alpha is None:
            return None
        return self.alpha / (math.sqrt(self.rank) if self.scale == "rslora" else self.rank)

    @property
    def mismatch(self) -> int | None:
        """Trainable parameters minus the budget; None without a budget."""
        return None if self.budget is None else self.params - self.budget

    @property
    def rank_step(self) -> int | None:
        """Parameters of one more rank: the mismatch is at most half of it."""
        return None if self.rank is None else sum(m.cost_per_rank for m in self.modules)

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
        return sum(_cost(m, self.method, self.rank) for m in self.modules if m.block == block)

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
                         "rank": self.rank if self.rank is not None else "full",
                         "parameters": self.params // len(self.blocks) if self.whole_blocks
                         else self.params_of_block(block)})
        return pd.DataFrame(rows)

    def summary(self) -> str:
        """A few lines for people."""
        how = {"lora": "LoRA", "dora": "DoRA", "full": "full-rank update"}[self.method]
        lines = [f"{how} of blocks {format_blocks(self.blocks)} of {self.num_blocks}"
                 + (f" (mask {self.mask})" if self.mask else "") + f"  {self.depth_map()}"]
        if self.rank is not None:
            lines.append(f"rank {self.rank}, alpha {self.alpha:g}, update scaled by {self.scaling:g}"
                         + (" (rsLoRA)" if self.scale == "rslora" else ""))
        line = f"{self.params:,} trainable parameters, {self.share:.3%} of the model's {self.model_params:,}"
        if self.budget is not None:
            line += f"; budget {self.budget:,}, mismatch {self.mismatch:+,}"
            if self.rank_step is not None:
                line += f" (one rank is {self.rank_step:,})"
        lines.append(line)
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; `from_dict` reads it back."""
        return {"format": 1, **asdict(self), "modules": [asdict(m) for m in self.modules],
                "blocks": list(self.blocks), "targets": list(self.targets),
                "scaling": self.scaling, "mismatch": self.mismatch, "share": self.share}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Plan:
        """The plan that `to_dict` wrote.

        Raises:
            SettingsError: it is not such a dictionary.
        """
        try:
            known = {k: v for k, v in value.items() if k in cls.__dataclass_fields__}
            known["modules"] = tuple(ModulePlan(**m) for m in value["modules"])
            known["blocks"] = tuple(int(b) for b in value["blocks"])
            known["targets"] = tuple(value["targets"])
            return cls(**known)
        except (KeyError, TypeError, ValueError) as error:
            raise SettingsError(f"this is not a plan as midblock writes it ({type(error).__name__}: {error}); "
                                "make one with `midblock tune ... --dry-run --json` or `importance`.") from None

    def save(self, path: Path | str) -> None:
        """Write the plan as a JSON file that ``tune --plan`` accepts."""
        from midblock.provenance import write_json

        write_json(Path(path), self.to_dict())

    def lora_config(self, model: nn.Module | None = None, *, dropout: float = 0.0,
                    task_type: str | None = "CAUSAL_LM") -> LoraConfig:
        """The plan as a plain `peft.LoraConfig`; see `lora_config`."""
        return _config_of(self, model, dropout, task_type)


def _cost(module: ModulePlan, method: Method, rank: int | None) -> int:
    if method == "full":
        return module.inputs * module.outputs
    assert rank is not None
    return rank * module.cost_per_rank + (module.outputs if method == "dora" else 0)


def load_plan(path: Path | str) -> Plan:
    """A plan file: what `Plan.save` or ``midblock importance`` wrote.

    A JSON object with the key ``plan`` holding the plan is accepted as well.

    Raises:
        SettingsError: no such file, not JSON, or not a plan.
    """
    try:
        value = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"plan file {path}: {error.strerror or error}.") from None
    except ValueError as error:
        raise SettingsError(f"plan file {path} is not JSON: {error}.") from None
    if isinstance(value, dict) and isinstance(value.get("plan"), dict):
        value = value["plan"]
    if not isinstance(value, dict):
        raise SettingsError(f"plan file {path} holds no JSON object.")
    return Plan.from_dict(value)


# ---------------------------------------------------------------------------------------------
# which modules


def _anatomy_of(model: nn.Module | Anatomy | LoadedModel) -> tuple[Anatomy, int]:
    """Anatomy and parameter count (4-bit weights count as what they stand for) of any form of a model."""
    anatomy = model if isinstance(model, Anatomy) else (
        model.anatomy if isinstance(model, LoadedModel) else find_anatomy(model))
    return anatomy, anatomy.causal_lm.num_parameters()


def _found(parts: Mapping[str, Projection]) -> str:
    linear = [f"{p.module} ({p.kind}, {p.out_in[1]}->{p.out_in[0]})" for p in parts.values() if p.linear]
    stacked = [f"{p.name} (stacked experts {tuple(p.shape)})" for p in parts.values()
               if not p.linear and len(p.shape) > 2]
    return "; ".join(linear + stacked) or "nothing"


def _matches(part: Projection, target: str) -> bool:
    if part.kind.startswith("cross_") and "." not in target:  # a decoder's view of its encoder: by kind only
        return part.kind == target
    names = (part.module, part.name)  # stacked experts are parameters without a module of their own
    return part.kind == target or any(n == target or n.endswith(f".{target}") for n in names)


def _is_expert(module: str) -> bool:
    return re.search(r"(?:^|\.)experts?(?:\.|$)", module) is not None


def _select(parts: Mapping[str, Projection], targets: Sequence[str], where: str) -> list[Projection]:
    """Linear layers of one block that the targets mean, in the order of the model.

    Raises:
        SettingsError: a target means nothing there, only stacked experts, or half of a fused matrix.
    """
    wanted: list[str] = []
    for target in targets:
        wanted += _GROUPS.get(target, (target,))
    every_kind = {p.kind for p in parts.values() if p.linear}
    chosen: dict[str, Projection] = {}
    for target in dict.fromkeys(wanted):
        hits = [p for p in parts.values() if _matches(p, target) and p.kind not in ("norm", "bias", "adapter")]
        linear = [p for p in hits if p.linear and not _is_expert(p.module)]
        if not linear and not hits:
            fused = [kind for kind, pieces in _FUSED.items() if target in pieces and kind in every_kind]
            if fused and _FUSED[fused[0]] <= set(wanted):
                linear = [p for p in parts.values() if p.kind == fused[0] and p.linear
                          and not _is_expert(p.module)]
            elif fused:
                raise SettingsError(
                    f"target {target!r} of {where} is one part of the fused matrix {fused[0]!r}; name "
                    f"{fused[0]!r} or all of {', '.join(sorted(_FUSED[fused[0]]))}. Found: {_found(parts)}.")
            elif target in ("gate", "up") and ("up" in every_kind or "gate" in every_kind) \
                    and any(g in targets for g in ("mlp", "all-linear")):
                continue  # a family without a gated MLP; the group means what is there
        if not linear and hits:
            raise SettingsError(
                f"target {target!r} of {where} matches only experts of a mixture ({hits[0].name} and "
                f"{len(hits) - 1} more), which are not adapted one by one: their indices are not block indices. "
                f"Name attention matrices (attention) instead. Found: {_found(parts)}.")
        if not linear:
            if target in ("gate", "up", "down") and any(g in targets for g in ("mlp", "all-linear")):
                continue
            raise SettingsError(f"target {target!r} matches no linear layer of {where}. Found: {_found(parts)}.")
        chosen.update({p.module: p for p in linear})
    return [p for p in parts.values() if p.module in chosen and p.linear]


def _modules_of_blocks(anatomy: Anatomy, blocks: Iterable[int], targets: Sequence[str]) -> list[ModulePlan]:
    if isinstance(targets, str) or not targets:
        raise SettingsError(f"target modules {targets!r}: give a list of names, such as q_proj, v_proj, or of "
                            "attention, mlp, all-linear.")
    planned: list[ModulePlan] = []
    last: SettingsError | None = None
    for block in blocks:
        path = anatomy.block_path(block)
        try:
            parts = _select(projections(anatomy.blocks[block]), targets, path)
        except SettingsError as error:
            last = error  # hybrid models have blocks without attention; at least one must have it
            continue
        planned += [_module_plan(f"{path}.{p.module}", block, p, anatomy.blocks[block]) for p in parts]
    if last is not None and (not planned or not _is_hybrid(anatomy)):
        raise last
    return planned


def _is_hybrid(anatomy: Anatomy) -> bool:
    """Whether blocks differ in what they are made of (state-space beside attention blocks)."""
    return len({frozenset(p.kind for p in projections(b).values()) for b in anatomy.blocks}) > 1


def _module_plan(name: str, block: int, part: Projection, owner: nn.Module) -> ModulePlan:
    module = owner.get_submodule(part.module)
    outputs, inputs = part.out_in
    if isinstance(module, nn.Linear):  # quantised weights are stored in another shape
        outputs, inputs = module.out_features, module.in_features
    return ModulePlan(name, block, part.kind, inputs, outputs)


def _modules_by_name(anatomy: Anatomy, names: Iterable[str]) -> list[ModulePlan]:
    """Named modules, checked one by one.

    Raises:
        SettingsError: a name is no linear layer of a decoder block; the layers found are listed.
    """
    known: dict[str, ModulePlan] = {}
    for block, module in enumerate(anatomy.blocks):
        for part in projections(module).values():
            if part.linear and part.kind not in ("norm", "bias", "adapter"):
                name = f"{anatomy.block_path(block)}.{part.module}"
                known[name] = _module_plan(name, block, part, module)
    chosen = list(dict.fromkeys(n.removeprefix("base_model.model.") for n in names))
    unknown = [n for n in chosen if n not in known]
    if unknown or not chosen:
        what = f"{unknown[0]!r}" + (f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else "") \
            if unknown else "an empty list of modules"
        first = [n for n in known if n.startswith(f"{anatomy.block_path(0)}.")]
        raise SettingsError(f"{what} is no linear layer of a decoder block of this model. Its block 0 has: "
                            f"{', '.join(first) or 'none'}.")
    order = {name: i for i, name in enumerate(known)}
    return [known[n] for n in sorted(chosen, key=order.__getitem__)]


def random_block_set(n: int, num_blocks: int, seed: int) -> list[int]:
    """``n`` different blocks drawn at random, ascending.

    Raises:
        BlockRangeError: ``n`` is not 1..``num_blocks``.

    Example:
        >>> random_block_set(3, 10, seed=0) == random_block_set(3, 10, seed=0)
        True
    """
    if not 1 <= n <= num_blocks:
        raise BlockRangeError(f"{n} random blocks were asked for, but the model has {num_blocks}; use 1 to "
                              f"{num_blocks}.")
    return sorted(int(b) for b in np.random.default_rng(seed).choice(num_blocks, size=n, replace=False))


# ---------------------------------------------------------------------------------------------
# budgets and ranks

_MATCH = re.compile(r"^match:([01]+)@(\d+)$")
_NUMBER = re.compile(r"^(\d+(?:\.\d+)?)\s*([kKmM]?)$")


def budget_of(model: nn.Module | Anatomy | LoadedModel, budget: int | str | None = None, *,
              targets: Sequence[str] = DEFAULT_TARGETS) -> int:
    """A budget in trainable parameters.

    Args:
        model: A model, `LoadedModel` or `Anatomy`.
        budget: A number; text such as ``"921600"``, ``"900k"`` or ``"1.5M"``; ``"match:11111@16"``,
            the parameters of LoRA of rank 16 under the mask 11111; None: ``match:1@16``, all blocks.
        targets: Target modules, for ``match``.

    Raises:
        BudgetError: it is none of these, or below 1.
    """
    anatomy, _ = _anatomy_of(model)
    if budget is None:
        budget = f"match:1@{REFERENCE_RANK}"
    if isinstance(budget, str):
        if found := _MATCH.match(budget.strip()):
            mask, rank = found.group(1), int(found.group(2))
            if rank < 1:
                raise BudgetError(f"budget {budget!r}: a rank of 0 trains nothing; use 1 or more.")
            blocks = segment_blocks(mask, anatomy.num_blocks)
            return rank * sum(m.cost_per_rank for m in _modules_of_blocks(anatomy, blocks, targets))
        if not (number := _NUMBER.match(budget.strip())):
            raise BudgetError(f"budget {budget!r} is neither a number of parameters (921600, 900k, 1.5M) nor "
                              "match:MASK@RANK (match:11111@16).")
        budget = round(float(number.group(1)) * {"": 1, "k": 10**3, "m": 10**6}[number.group(2).lower()])
    if budget < 1:
        raise BudgetError(f"a budget of {budget} trainable parameters was asked for; use 1 or more.")
    return int(budget)


def _solve_rank(modules: Sequence[ModulePlan], budget: int, method: Method) -> int:
    """The rank whose parameters come nearest to the budget (the lower of two equally near).

    Raises:
        BudgetError: rank 1 is already too much, or the matrices have no such rank.
    """
    step = sum(m.cost_per_rank for m in modules)
    fixed = sum(m.outputs for m in modules) if method == "dora" else 0
    smallest = step + fixed
    if budget < smallest:
        raise BudgetError(
            f"a budget of {budget:,} trainable parameters is smaller than rank 1 of the {len(modules)} matrices "
            f"chosen, which takes {smallest:,}; raise the budget, or choose fewer blocks or matrices.")
    rank = math.ceil((budget - fixed) / step - 0.5)
    full = max(min(m.inputs, m.outputs) for m in modules)
    if rank > full:
        raise BudgetError(
            f"a budget of {budget:,} trainable parameters needs rank {rank} on the {len(modules)} matrices chosen, "
            f"but none has more than rank {full} ({full * step + fixed:,} parameters); lower the budget, choose "
            "more blocks or matrices, or train them with method full.")
    return max(rank, 1)


def full_blocks_for_budget(model: nn.Module | Anatomy | LoadedModel, budget: int, *,
                           targets: Sequence[str] = DEFAULT_TARGETS) -> int:
    """How many blocks a full-rank update may have to come nearest to a budget (at least 1)."""
    anatomy, _ = _anatomy_of(model)
    each = sum(m.inputs * m.outputs for m in _modules_of_blocks(anatomy, [0], targets))
    return min(anatomy.num_blocks, max(1, round(budget / each)))


def make_plan(model: nn.Module | Anatomy | LoadedModel, *, mask: str | None = None,
              blocks: str | Sequence[int] | None = None, random_blocks: tuple[int, int] | None = None,
              modules: Sequence[str] | None = None, rank: int | None = None,
              budget: int | str | None = None, target_modules: Sequence[str] = DEFAULT_TARGETS,
              method: Method = "lora", scale: Scale = "fixed-ratio", alpha_over_rank: float = 2.0,
              alpha: float | None = None) -> Plan:
    """Solve what to train.

    Exactly one of ``mask``, ``blocks``, ``random_blocks`` and ``modules`` says where. The rank is
    given, or solved so that the parameters come as near to the budget as ranks allow; with
    neither, the budget is what LoRA of rank 16 takes on all blocks.

    Args:
        model: A model (PEFT-wrapped or not, also on the meta device), `LoadedModel` or `Anatomy`.
        mask: One digit per depth segment from input to output, such as ``01100``.
        blocks: Block indices or half-open ranges, such as ``8:16``.
        random_blocks: (number of blocks, seed).
        modules: Full module names, such as ILA selects.
        rank: LoRA rank.
        budget: See `budget_of`.
        target_modules: Kinds (q, k, v, o, gate, up, down, qkv ...), groups (attention, mlp,
            all-linear), or module names as the model has them. For ``method="full"`` also ``all``:
            every parameter of the blocks.
        method: ``lora``, ``dora``, or ``full`` (the chosen matrices themselves are trained; their
            number of parameters follows from the blocks, so neither rank nor budget applies).
        scale: ``fixed-ratio`` keeps alpha/rank (default); ``rslora`` divides by sqrt(rank), alpha
            chosen so that rank 16 has the same factor; ``fixed-alpha`` keeps alpha at 128 (the paper's
            public code), so that the factor falls as the rank rises.
        alpha_over_rank: Factor of the update (at rank 16 for rsLoRA).
        alpha: Overrides the alpha that ``scale`` implies.

    Raises:
        BlockRangeError: the mask or blocks do not fit.
        BudgetError: the budget is below rank 1 or above full rank.
        SettingsError: targets match nothing (what was found is listed), or options exclude each other.
    """
    if method not in METHODS:
        raise SettingsError(f"method {method!r} is not one of {', '.join(METHODS)}.")
    if scale not in SCALES:
        raise SettingsError(f"scale {scale!r} is not one of {', '.join(SCALES)}.")
    ways = [name for name, value in (("mask", mask), ("blocks", blocks), ("random_blocks", random_blocks),
                                     ("modules", modules)) if value is not None]
    if len(ways) != 1:
        raise SettingsError("say where to train in exactly one way: a mask (01100), blocks (8:16), random blocks "
                            f"or module names; got {' and '.join(ways) if ways else 'none'}.")
    if rank is not None and budget is not None:
        raise SettingsError(f"both a rank ({rank}) and a budget ({budget}) were given; a budget solves the rank, "
                            "so give one of them.")
    if rank is not None and rank < 1:
        raise BudgetError(f"a rank of {rank} trains nothing; use 1 or more.")
    if alpha_over_rank <= 0 or (alpha is not None and alpha <= 0):
        raise SettingsError("alpha and alpha/rank must be above 0.")
    anatomy, model_params = _anatomy_of(model)
    targets = tuple(target_modules) if not isinstance(target_modules, str) else (target_modules,)
    whole = method == "full" and targets == ("all",)
    if modules is not None:
        planned = _modules_by_name(anatomy, modules)
        origin = f"{len(planned)} named modules"
        targets = tuple(dict.fromkeys(m.kind for m in planned))
    else:
        if random_blocks is not None:
            chosen = random_block_set(random_blocks[0], anatomy.num_blocks, random_blocks[1])
            origin = f"{random_blocks[0]} random blocks, seed {random_blocks[1]}"
        else:
            chosen = blocks_from_spec(mask, blocks, anatomy.num_blocks)
            origin = f"mask {mask}" if mask is not None else f"blocks {format_blocks(chosen)}"
        planned = ([] if whole else _modules_of_blocks(anatomy, chosen, targets))
        if whole:
            planned = [_module_plan(f"{anatomy.block_path(b)}.{p.module}", b, p, anatomy.blocks[b]) for b in chosen
                       for p in projections(anatomy.blocks[b]).values() if p.linear and p.kind != "norm"]
    common: dict[str, Any] = {
        "num_blocks": anatomy.num_blocks, "blocks": tuple(sorted({m.block for m in planned})),
        "modules": tuple(planned), "model_params": model_params, "targets": targets, "mask": mask,
        "origin": origin, "scale": scale}
    if method == "full":
        if rank is not None or budget is not None:
            raise SettingsError(
                "a full-rank update has neither a rank nor a budget: its parameters follow from the blocks. "
                "Choose as many blocks as the budget takes (`midblock.tuning.full_blocks_for_budget`).")
        if whole:
            params = sum(p.numel() for b in common["blocks"] for p in anatomy.blocks[b].parameters())
        else:
            params = sum(m.inputs * m.outputs for m in planned)
        return Plan(method="full", rank=None, alpha=None, params=params, budget=None, whole_blocks=whole, **common)
    wanted: int | None = None
    if rank is None:
        if modules is not None and budget is None:
            # the same kinds of matrices in all blocks at the reference rank
            wanted = REFERENCE_RANK * sum(
                m.cost_per_rank for m in _all_of_kinds(anatomy, {m.kind for m in planned}))
        else:
            wanted = budget_of(anatomy, budget, targets=targets)
        rank = _solve_rank(planned, wanted, method)
    full = max(min(m.inputs, m.outputs) for m in planned)
    if rank > full:
        raise BudgetError(f"rank {rank} was asked for, but none of the matrices chosen has more than rank {full}.")
    if alpha is None:
        alpha = {"fixed-ratio": alpha_over_rank * rank, "fixed-alpha": EARLIER_ALPHA,
                 "rslora": alpha_over_rank * math.sqrt(REFERENCE_RANK)}[scale]
    params = sum(_cost(m, method, rank) for m in planned)
    return Plan(method=method, rank=rank, alpha=float(alpha), params=params, budget=wanted, **common)


def _all_of_kinds(anatomy: Anatomy, kinds: set[str]) -> list[ModulePlan]:
    return [_module_plan(f"{anatomy.block_path(b)}.{p.module}", b, p, block)
            for b, block in enumerate(anatomy.blocks) for p in projections(block).values()
            if p.linear and p.kind in kinds]


def require_plan_fits(plan: Plan, model: nn.Module | Anatomy | LoadedModel) -> Plan:
    """Check that a plan (from a file, or made for another copy) belongs to this model.

    Returns:
        The plan, with this model's own parameter count.

    Raises:
        AdapterError: another number of blocks, or a module that is missing or has another shape.
    """
    anatomy, model_params = _anatomy_of(model)
    if plan.num_blocks != anatomy.num_blocks:
        raise AdapterError(f"the plan is for a model of {plan.num_blocks} blocks, this one has "
                           f"{anatomy.num_blocks}; make the plan with this model.")
    try:
        here = {m.name: m for m in _modules_by_name(anatomy, [m.name for m in plan.modules])}
    except SettingsError as error:
        raise AdapterError(f"the plan belongs to another model: {error}") from None
    for module in plan.modules:
        other = here[module.name]
        if (other.inputs, other.outputs) != (module.inputs, module.outputs):
            raise AdapterError(f"the plan belongs to another model: {module.name} is {module.inputs}->"
                               f"{module.outputs} in the plan and {other.inputs}->{other.outputs} here.")
    return replace(plan, model_params=model_params)


# ---------------------------------------------------------------------------------------------
# as a PEFT config


def lora_config(model: nn.Module | Anatomy | LoadedModel, *, mask: str | None = None,
                blocks: str | Sequence[int] | None = None, random_blocks: tuple[int, int] | None = None,
                modules: Sequence[str] | None = None, rank: int | None = None,
                budget: int | str | None = None, target_modules: Sequence[str] = DEFAULT_TARGETS,
                method: Method = "lora", scale: Scale = "fixed-ratio", alpha_over_rank: float = 2.0,
                alpha: float | None = None, dropout: float = 0.0,
                task_type: str | None = "CAUSAL_LM") -> LoraConfig:
    """The plan as a plain `peft.LoraConfig`, for anyone's own trainer.

    Arguments as for `make_plan`. The config is proven on the model with PEFT's own matcher: it
    adapts exactly the modules of the plan (no vision tower, no expert that shares an index with a
    block).

    Example:
        >>> import transformers
        >>> config = transformers.LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8,
        ...     num_hidden_layers=5, num_attention_heads=2)
        >>> made = lora_config(transformers.LlamaForCausalLM(config), mask="01100", rank=4)
        >>> made.layers_to_transform, sorted(made.target_modules), made.r
        ([1, 2], ['k_proj', 'o_proj', 'q_proj', 'v_proj'], 4)
    """
    if method == "full":
        raise SettingsError("a full-rank update is no LoraConfig: set requires_grad on the chosen matrices, or "
                            "use midblock.tune(method='full').")
    plan = make_plan(model, mask=mask, blocks=blocks, random_blocks=random_blocks, modules=modules, rank=rank,
                     budget=budget, target_modules=target_modules, method=method, scale=scale,
                     alpha_over_rank=alpha_over_rank, alpha=alpha)
    anatomy, _ = _anatomy_of(model)
    whole = model if isinstance(model, nn.Module) else anatomy.causal_lm
    return _config_of(plan, whole, dropout, task_type)


def _config_of(plan: Plan, model: nn.Module | None, dropout: float, task_type: str | None) -> LoraConfig:
    from peft import LoraConfig

    if plan.method == "full" or plan.rank is None or plan.alpha is None:
        raise SettingsError("a full-rank plan has no LoraConfig.")
    alpha = int(plan.alpha) if float(plan.alpha).is_integer() else plan.alpha
    common: dict[str, Any] = {
        "r": plan.rank, "lora_alpha": alpha, "lora_dropout": dropout, "bias": "none", "task_type": task_type,
        "use_dora": plan.method == "dora", "use_rslora": plan.scale == "rslora"}
    wanted = {m.name for m in plan.modules}
    # Conv1D (GPT-2) stores (in, out): PEFT must be told
    if model is not None and any(type(m).__name__ == "Conv1D" for n, m in _named(model) if n in wanted):
        common["fan_in_fan_out"] = True
    readable = _readable_form(plan)
    if readable is not None and (model is None or _matched(LoraConfig(**common, **readable), model) == wanted):
        return LoraConfig(**common, **readable)
    config = LoraConfig(**common, target_modules=_pattern(plan))
    if model is not None and (matched := _matched(config, model)) != wanted:
        extra, missing = sorted(matched - wanted), sorted(wanted - matched)
        raise AdapterError(f"PEFT would not adapt what the plan names: it misses {missing[:3]} and adds {extra[:3]} "
                           f"({len(missing)} and {len(extra)} modules).")
    return config


def _named(model: nn.Module) -> Iterable[tuple[str, nn.Module]]:
    """Modules under the names that PEFT sees (its own prefix left out)."""
    return ((n.removeprefix("base_model.model."), m) for n, m in model.named_modules())


def _matched(config: LoraConfig, model: nn.Module) -> set[str]:
    from peft.tuners.tuners_utils import check_target_module_exists

    names = {n for n, m in _named(model) if not n.endswith("base_layer") and ".lora_" not in n}
    return {n for n in names if check_target_module_exists(config, n) is True
            or isinstance(check_target_module_exists(config, n), re.Match)}


def _readable_form(plan: Plan) -> dict[str, Any] | None:
    """Leaf names, block indices and the name of the block list; None if these cannot say it."""
    split = [re.match(rf"^(.*?)\.{m.block}\.(.+)$", m.name) for m in plan.modules]
    if not all(split):
        return None
    lists = {cast("re.Match[str]", s).group(1) for s in split}
    leaves = list(dict.fromkeys(cast("re.Match[str]", s).group(2).rpartition(".")[2] for s in split))
    if len(lists) != 1:
        return None
    return {"target_modules": leaves, "layers_to_transform": list(plan.blocks),
            "layers_pattern": lists.pop().rpartition(".")[2]}


def _pattern(plan: Plan) -> str:
    """A regular expression that matches the plan's full module names and nothing else."""
    by_block: dict[tuple[str, str], list[int]] = {}
    for module in plan.modules:
        found = re.match(rf"^(.*?)\.{module.block}\.(.+)$", module.name)
        assert found is not None
        by_block.setdefault((found.group(1), found.group(2)), []).append(module.block)
    grouped: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for (path, leaf), indices in by_block.items():
        grouped.setdefault((path, tuple(indices)), []).append(leaf)
    parts = [rf"{re.escape(path)}\.(?:{'|'.join(map(str, indices))})\.(?:{'|'.join(map(re.escape, leaves))})"
             for (path, indices), leaves in grouped.items()]
    return rf"(?:{'|'.join(parts)})"
