r"""How the factors of a LoRA begin, beside PEFT's default: from the weights, from activations, or from gradients.

* ``pissa``: the weight's largest singular triplets (Meng et al., NeurIPS 2024, arXiv:2404.02948).
* ``olora``: its QR decomposition (Bueyuekakyuez, 2024, arXiv:2406.01775).
* ``corda``: its singular triplets in the metric of the activations (Yang et al., NeurIPS 2024, arXiv:2406.05223).
* ``eva``: A from the activations' principal directions, B zero (Paischer et al., 2024, arXiv:2410.07170; see
  `midblock.tuning.eva`, also for its ranks).
* ``lora-ga``: from the gradient of the weight (Wang et al., NeurIPS 2024, arXiv:2407.05000).

PEFT computes all but ``eva``, and all but ``eva`` take the product of the first factors out of the base weights, so
that the model begins as the base; the weights come back when the adapter is taken off, and what is exported is a plain
LoRA of twice the rank,

.. math:: \Delta W = s (B A - B_0 A_0) = s [B, -B_0] [A; A_0],

which loads on the unchanged base anywhere (PEFT's ``path_initial_model_for_weight_conversion``).
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from midblock.data import Batch
from midblock.errors import SettingsError
from midblock.models import Anatomy
from midblock.models.quiet import quiet
from midblock.settings.base import name_of
from midblock.settings.tune import Init
from midblock.tuning.eva import input_directions, model_inputs
from midblock.tuning.kernels import supervised_loss
from midblock.tuning.plan import Plan

__all__ = ["LEAVES_BASE", "NEEDS_ROWS", "Start", "doubled", "require_start", "started"]

NEEDS_ROWS = frozenset({"corda", "eva", "lora-ga"})
"""Starts that are computed from training rows."""
_PEFT_NAMES: dict[Init, Any] = {"default": True, "pissa": "pissa", "olora": "olora", "corda": "corda", "eva": True,
                                "lora-ga": "lora_ga"}
LEAVES_BASE = frozenset({"default", "eva"})
"""Starts that leave the base weights as they are."""
_LEFT_BEHIND = ("eigens", "_peft_loraga_grad", "rank", "corda_method", "sample_count", "covariance_matrix")


@dataclass(frozen=True)
class Start:
    """How an adapter begins, and the rows that it is computed from."""

    init: Init = "default"
    batches: Sequence[Batch] = ()


def require_start(init: Init, plan: Plan, model: nn.Module) -> None:
    """Refuse what cannot go together, before anything is spent.

    Raises:
        SettingsError: no plain LoRA, stacked experts, quantised or shared weights, or a layer that PEFT cannot start
            so.
    """
    if init == "default":
        return
    option = f"{name_of('init')} {init}"
    if plan.method != "lora" or any(m.experts for m in plan.modules):
        what = plan.method if plan.method != "lora" else "stacked experts"
        raise SettingsError(f"{option} starts plain LoRA of linear layers, and this plan has {what}; leave it out.")
    if init in LEAVES_BASE:
        return
    owners: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    for module in plan.modules:
        weight, layer = model.get_parameter(module.parameter), model.get_submodule(module.name)
        if not weight.is_floating_point():
            raise SettingsError(f"{option} takes singular values of the weights, and {module.name} is quantised "
                                f"({weight.dtype}); leave it out, or load the base in full.")
        if owners[id(weight)] > 1:
            raise SettingsError(f"{option} changes the weights that it starts from, and other layers share that of "
                                f"{module.name}; leave it out.")
        if init in ("olora", "corda") and not isinstance(layer, nn.Linear):
            raise SettingsError(f"{option} starts linear layers, and {module.name} is {type(layer).__name__}; use "
                                "pissa.")


@contextlib.contextmanager
def started(model: nn.Module, anatomy: Anatomy, plan: Plan, config: Any, start: Start, seed: int
            ) -> Iterator[tuple[Any, dict[str, Tensor]]]:
    """PEFT's model with the factors begun, and the original of every base weight that this changed, by name.

    On leaving, the base weights are what they were, bit for bit.
    """
    from peft import get_peft_model

    held = {} if start.init in LEAVES_BASE else {m.parameter: model.get_parameter(m.parameter) for m in plan.modules}
    originals = {n: (p.data, p.data.clone()) for n, p in held.items()}
    try:
        with torch.random.fork_rng(devices=[]), quiet(), contextlib.redirect_stdout(io.StringIO()), \
                warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of PEFT's hooks
            if start.init != "default":
                torch.manual_seed(seed)
                _configure(model, anatomy, config, start)
            directions = _eva(anatomy, plan, start) if start.init == "eva" else {}
            made: Any = get_peft_model(model, config)
            for name, vectors in directions.items():
                layer: Any = model.get_submodule(name)
                layer.lora_A["default"].weight.data.copy_(vectors)
        changed = {n: kept for n, (_, kept) in originals.items() if not torch.equal(held[n].data, kept)}
        yield made, changed
    finally:
        for name, (data, kept) in originals.items():
            data.copy_(kept)
            held[name].data = data
        for module in plan.modules if held else ():
            layer = model.get_submodule(module.name)
            for owner in (layer, getattr(layer, "base_layer", None)):
                for left in _LEFT_BEHIND:
                    if owner is not None and left in owner.__dict__:
                        delattr(owner, left)


def _configure(model: nn.Module, anatomy: Anatomy, config: Any, start: Start) -> None:
    """Tell PEFT the start, and compute what it needs of the rows."""
    from peft.tuners.lora.config import CordaConfig, LoraGAConfig

    config.init_lora_weights = _PEFT_NAMES[start.init]
    if start.init == "corda":
        from peft.tuners.lora.corda import preprocess_corda

        config.corda_config = CordaConfig(corda_method="ipm")
        # its hooks take one row at a time
        rows = [{k: v[i:i + 1, :n] for k, v in model_inputs(b).items()}
                for b in start.batches for i, n in enumerate(b.lengths.tolist())]
        preprocess_corda(model, config, run_model=lambda: _run(anatomy, rows, backward=False))
    elif start.init == "lora-ga":
        from peft.tuners.lora.loraga import preprocess_loraga

        config.lora_ga_config = LoraGAConfig()
        rows = [model_inputs(b) for b in start.batches]
        preprocess_loraga(model, config, train_step=lambda: _run(anatomy, rows, backward=True))


def _run(anatomy: Anatomy, inputs: Iterable[dict[str, Tensor]], *, backward: bool) -> None:
    for batch in inputs:
        with torch.set_grad_enabled(backward):
            loss = supervised_loss(anatomy, batch, plain=False)
        if backward:
            loss.backward()


def _eva(anatomy: Anatomy, plan: Plan, start: Start) -> dict[str, Tensor]:
    """The first A of every matrix, by name."""
    assert plan.rank is not None
    ranks = {m.name: m.rank or plan.rank for m in plan.modules}
    found = input_directions(anatomy, plan.modules, start.batches, ranks)
    for name, rank in ranks.items():
        if (known := min(found[name].tokens - 1, len(found[name].shares))) < rank:
            raise SettingsError(f"{name_of('init')} eva begins {name} with {rank} directions, and its inputs at the "
                                f"rows' {found[name].tokens} labelled tokens show {known}; give more or longer rows, "
                                "or a lower rank.")
    return {name: d.vectors for name, d in found.items()}


def doubled(state: dict[str, Tensor], first: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a plain LoRA of twice the rank whose product is the trained one less the first.

    Args:
        state: Trained factors by name, ``...lora_A...`` (r, in) and ``...lora_B...`` (out, r).
        first: The factors at the beginning.
    """
    found = {}
    for name, tensor in state.items():
        begun = first[name].to(tensor)
        found[name] = torch.cat([tensor, begun]) if "lora_A" in name else torch.cat([tensor, -begun], dim=1)
    return {n: t.contiguous() for n, t in found.items()}
