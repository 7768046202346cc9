r"""EVA: the directions in which a matrix's inputs vary, and a rank of its own for each matrix.

Of the inputs x of a matrix at the labelled tokens of training rows, C = E[(x - E x)(x - E x)'] has eigenvalues
:math:`\lambda_1 \ge \lambda_2 \ge \dots` and eigenvectors :math:`v_k`; :math:`\lambda_k / \operatorname{tr} C` is the
share of the variance that direction k explains. A begins as :math:`v_1 \dots v_r`. Ranks are spread by these shares:
all directions of all matrices, at most `CAP` times the plan's rank of each, the largest shares first (Paischer et al.,
2024, "One Initialization to Rule them All", arXiv:2410.07170).

EVA's budget is a number of directions. Here it is trainable parameters, so that an arm with EVA's ranks stands beside
the others at their budget: directions are taken in that order up to the number whose parameters come nearest to it.

PEFT has the method too (`peft.tuners.lora.eva`), counted in directions, with an incremental decomposition that it
repeats until it settles, and without end where every batch has fewer labelled tokens than directions. The sums here
are exact: one pass over the rows in float64.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from midblock.data import Batch, TokenRows, make_batches, pad_token_id
from midblock.errors import BudgetError, SettingsError
from midblock.models import Anatomy, LoadedModel
from midblock.settings.base import name_of
from midblock.tuning.kernels import supervised_loss
from midblock.tuning.plan import Missing, ModulePlan, Plan

__all__ = ["CAP", "Directions", "eva_ranks", "input_directions", "model_inputs", "require_eva", "start_batches"]

CAP = 2.0
"""No matrix gets more than this many times the plan's rank (PEFT's and the authors' rho)."""
START_ROWS = 64
"""Training rows that directions, ranks and other starts of an adapter are computed from."""
_BYTES = 1 << 30  # of the sums that one pass over the rows holds


@dataclass(frozen=True)
class Directions:
    """How the inputs of one matrix vary."""

    shares: Tensor
    """(d,) float64, descending: the share of the variance along each direction."""
    vectors: Tensor
    """(k, d) float32, orthonormal rows; the largest entry of each is positive."""
    tokens: int
    """Labelled tokens that they are computed from; at most one direction less is known."""


def start_batches(rows: TokenRows, model: LoadedModel, batch_size: int) -> list[Batch]:
    """The first `START_ROWS` training rows, in batches on the model's device."""
    made = make_batches(rows.rows[:START_ROWS], batch_size=batch_size, pad_id=pad_token_id(model.tokenizer))
    return [batch.to(model.device) for batch in made]


def require_eva(plan: Plan) -> None:
    """Refuse a plan whose ranks cannot be spread.

    Raises:
        SettingsError: no plain LoRA, stacked experts, or ranks of its own already.
    """
    what = (plan.method if plan.method != "lora" else "stacked experts" if any(m.experts for m in plan.modules)
            else "a rank for each matrix already" if plan.own_ranks else None)
    if what is not None:
        raise SettingsError(f"{name_of('ranks')} eva spreads the rank of a plain LoRA over linear layers, and this "
                            f"plan has {what}; leave it out.")


def eva_ranks(plan: Plan, model: LoadedModel, batches: Sequence[Batch]) -> Plan:
    """A plan with EVA's rank for each of its matrices, at its budget (or its parameters, where the rank was given).

    A matrix without a direction among the chosen ones is not trained; the plan lists it.

    Args:
        plan: LoRA of one rank.
        model: The base, without an adapter.
        batches: Training rows (`start_batches`).

    Raises:
        SettingsError: `require_eva`, or the inputs of a matrix cannot be read.
        BudgetError: the rows have too few labelled tokens for so many directions.
    """
    require_eva(plan)
    assert plan.rank is not None
    most = {m.name: min(round(CAP * plan.rank), m.inputs, m.outputs) for m in plan.modules}
    found = input_directions(model.anatomy, plan.modules, batches, dict.fromkeys(most, 0))
    budget = plan.params if plan.budget is None else plan.budget
    offered = [(share, m) for m in plan.modules
               for share in found[m.name].shares[:min(most[m.name], found[m.name].tokens - 1)].tolist()]
    ranks: dict[str, int] = {}
    spent = 0
    for _, module in sorted(offered, key=lambda o: -o[0]):  # equal shares in the order of the model
        if 2 * spent + module.cost_per_rank >= 2 * budget:  # without it as near to the budget as with it, or nearer
            break
        ranks[module.name] = ranks.get(module.name, 0) + 1
        spent += module.cost_per_rank
    tokens = min(d.tokens for d in found.values())
    if budget - spent > max(m.cost_per_rank for m in plan.modules):
        raise BudgetError(f"{name_of('ranks')} eva finds directions for {spent:,} of {budget:,} parameters: the rows "
                          f"that it reads have {tokens} labelled tokens. Give more or longer rows, or a lower rank.")
    modules = tuple(replace(m, rank=ranks[m.name]) for m in plan.modules if m.name in ranks)
    lost: dict[int, dict[str, None]] = {}
    for m in plan.modules:
        if m.name not in ranks:
            lost.setdefault(m.block, {})[m.kind] = None
    return replace(
        plan, modules=modules, params=spent, blocks=tuple(sorted({m.block for m in modules})),
        missing=(*plan.missing, *(Missing(block=b, targets=tuple(kinds), why="rank 0") for b, kinds in lost.items())),
        origin=f"{plan.origin}, ranks by EVA from {sum(map(len, batches))} rows ({tokens} labelled tokens)")


# ---------------------------------------------------------------------------------------------
# what matrices read


def model_inputs(batch: Batch) -> dict[str, Tensor]:
    """What a model's forward takes of a batch; every real token is labelled where no row says which."""
    labels = batch.labels
    if labels is None:
        labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
    return {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "labels": labels}


class _Sums:
    """Of the inputs (n, d) seen so far: their number, sum and sum of squares, in float64."""

    def __init__(self) -> None:
        self.tokens = 0
        self.total: Any = 0
        self.square: Any = 0

    def add(self, rows: Tensor) -> None:
        rows = rows.double()
        self.tokens += len(rows)
        self.total = self.total + rows.sum(0)
        self.square = self.square + rows.T @ rows

    def directions(self, wanted: int) -> Directions:
        tokens = max(1, self.tokens)
        mean = self.total / tokens
        values, vectors = torch.linalg.eigh(self.square / tokens - torch.outer(mean, mean))
        values, vectors = values.flip(0).clamp(min=0), vectors.flip(1).T[:wanted]
        largest = vectors.gather(1, vectors.abs().argmax(1, keepdim=True)) if wanted else vectors[:, :1]
        shares = values / values.sum().clamp(min=torch.finfo(values.dtype).tiny)
        return Directions(shares.cpu(), (vectors * largest.sign()).float(), self.tokens)


def input_directions(anatomy: Anatomy, modules: Iterable[ModulePlan], batches: Sequence[Batch],
                     wanted: Mapping[str, int]) -> dict[str, Directions]:
    """How the inputs of some matrices vary over the labelled tokens of some rows.

    Args:
        anatomy: Of the base, which runs as it is.
        modules: Linear layers; the rows are read once, more often where their sums (d, d) take much memory.
        batches: The rows.
        wanted: How many directions to return of each, by name.

    Raises:
        SettingsError: a matrix is not run, or reads something else than one vector for each token.
    """
    found: dict[str, Directions] = {}
    for part in _parts(modules):
        found |= _in_one_pass(anatomy, part, batches, wanted)
    return found


def _parts(modules: Iterable[ModulePlan]) -> Iterator[list[ModulePlan]]:
    part: list[ModulePlan] = []
    for module in modules:
        if part and sum(8 * m.inputs**2 for m in (*part, module)) > _BYTES:
            yield part
            part = []
        part.append(module)
    yield part


def _in_one_pass(anatomy: Anatomy, modules: Sequence[ModulePlan], batches: Sequence[Batch],
                 wanted: Mapping[str, int]) -> dict[str, Directions]:
    sums: dict[str, _Sums] = {}
    owner: dict[str, str] = {}  # q, k and v read one tensor: its sums belong to the first
    labelled: Tensor
    last: tuple[Tensor | None, str] = (None, "")

    def listen(name: str) -> Any:
        def hear(_module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
            nonlocal last
            x: Tensor = given[0] if given else next(iter(named.values()))
            if x is last[0]:
                owner[name] = last[1]
                return
            rows = x.reshape(-1, x.shape[-1])
            if len(rows) != labelled.numel():
                raise SettingsError(f"EVA reads one vector for each token, and {name} was given {len(rows)} vectors "
                                    f"for {labelled.numel()} tokens; leave it out of the target modules.")
            last, owner[name] = (x, name), name
            sums.setdefault(name, _Sums()).add(rows[labelled])
        return hear

    handles = [anatomy.causal_lm.get_submodule(m.name).register_forward_pre_hook(listen(m.name), with_kwargs=True)
               for m in modules]
    try:
        with torch.no_grad():
            for batch in batches:
                inputs = model_inputs(batch)
                labelled, last = (inputs["labels"] != -100).reshape(-1), (None, "")
                supervised_loss(anatomy, inputs, plain=False)
    finally:
        for handle in handles:
            handle.remove()
    if unread := [m.name for m in modules if m.name not in owner]:
        raise SettingsError(f"EVA reads what a matrix is given, and {unread[0]} is not called as a layer; leave it out "
                            "of the target modules.")
    most: dict[str, int] = {}
    for m in modules:
        most[owner[m.name]] = max(most.get(owner[m.name], 0), wanted[m.name])
    if odd := [name for name in most if not torch.isfinite(sums[name].square).all()]:
        raise SettingsError(f"the inputs of {odd[0]} are not finite on these rows, so that EVA cannot order their "
                            "directions; try another dtype.")
    made = {name: sums[name].directions(k) for name, k in most.items()}
    return {m.name: replace(d, vectors=d.vectors[:wanted[m.name]])
            for m in modules for d in (made[owner[m.name]],)}
