"""Putting a plan on a loaded model, and taking it off again with the base weights as they were.

`attach` is what a sweep uses: one loaded base, one adapter after another. Every random number that
starts an adapter comes from a seed and the name of its module, so that arms with a module in common
start it alike whatever else they train.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from midblock.errors import AdapterError, MidblockError, SettingsError
from midblock.models import Anatomy, LoadedModel, find_anatomy
from midblock.models.forwards import replace_forward
from midblock.tuning.initial import Start, doubled, require_start, started
from midblock.tuning.plan import ModulePlan, Plan
from midblock.tuning.planning import require_plan_fits
from midblock.writing import atomic_path, sha256_of

__all__ = ["Attachment", "adapted_layer", "attach"]

WEIGHTS_FILE = "tuned_weights.safetensors"


@dataclass
class Attachment:
    """A model with something trainable on it, as a plan says. Made by `attach`."""

    plan: Plan
    anatomy: Anatomy
    model: nn.Module
    """What a trainer trains: the `peft.PeftModel`, or for full-rank updates the model itself."""
    base: nn.Module
    """The model as it was loaded, now with the adapter inside."""
    trainable: dict[str, nn.Parameter] = field(repr=False)
    """By name in ``model``."""
    _original: dict[str, Tensor] = field(default_factory=dict, repr=False)
    """What the trained weights of a full-rank update were, or the base weights that a start of LoRA changed."""
    _first: dict[str, Tensor] = field(default_factory=dict, repr=False)
    """The factors at the beginning, where their product was taken out of the base weights."""

    @property
    def is_peft(self) -> bool:
        """Whether the plan is a PEFT adapter (LoRA or DoRA)."""
        return self.plan.method != "full"

    def state(self) -> dict[str, Tensor]:
        """Copies of what was trained, on the CPU: PEFT's adapter tensors, or the full matrices."""
        if self.is_peft:
            from peft import get_peft_model_state_dict

            found = get_peft_model_state_dict(self.model, save_embedding_layers=False)
        else:
            found = {n: p.detach() for n, p in self.trainable.items()}
        return {n: t.detach().to("cpu", copy=True) for n, t in found.items()}

    @property
    def starts_from_weights(self) -> bool:
        """Whether the first factors' product was taken out of the base weights."""
        return bool(self._first)

    @property
    def written_rank(self) -> int | None:
        """Largest rank of `plain_state`; None for full-rank updates."""
        return None if self.plan.largest_rank is None else self.plan.largest_rank * (2 if self._first else 1)

    def plain_state(self) -> dict[str, Tensor]:
        """`state` as a plain LoRA on the unchanged base: of twice the rank where the start changed that."""
        return doubled(self.state(), self._first) if self._first else self.state()

    def original(self, parameter: str) -> Tensor | None:
        """A base weight as it was, where the start of LoRA changed it."""
        return self._original.get(parameter) if self.is_peft else None

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Put a state from `state` back.

        Raises:
            AdapterError: its names or shapes are not those of this plan.
        """
        mine = self.state()
        if mine.keys() != state.keys() or any(mine[n].shape != state[n].shape for n in mine):
            differing = sorted(set(mine) ^ set(state)) or [n for n in mine if mine[n].shape != state[n].shape]
            raise AdapterError(f"this state belongs to another plan: {differing[0]} differs "
                               f"({len(differing)} tensors do).")
        if self.is_peft:
            from peft import set_peft_model_state_dict

            set_peft_model_state_dict(self.model, dict(state))
            return
        with torch.no_grad():
            for name, parameter in self.trainable.items():
                parameter.copy_(state[name])

    def save(self, folder: Path | str) -> Path:
        """Write a PEFT adapter folder, or for full-rank updates the trained weights by name."""
        folder = Path(folder)
        if self.is_peft:
            self.model.save_pretrained(folder)  # type: ignore[operator]
        else:
            folder.mkdir(parents=True, exist_ok=True)
            with atomic_path(folder / WEIGHTS_FILE) as temporary:
                save_file({n: t.contiguous() for n, t in self.state().items()}, temporary)
        return folder

    def load(self, folder: Path | str) -> None:
        """Read back what `save` wrote for full-rank updates."""
        self.load_state(load_file(Path(folder) / WEIGHTS_FILE))

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """Within the context the model computes what the base computes."""
        changed = {n: self._weight(n) for n in self._original}
        now = {n: p.data for n, p in changed.items()}
        try:
            for name, parameter in changed.items():
                parameter.data = self._original[name]
            if self.is_peft:
                with self.model.disable_adapter():  # type: ignore[operator]
                    yield
            else:
                yield
        finally:
            for name, parameter in changed.items():
                parameter.data = now[name]

    def _weight(self, name: str) -> nn.Parameter:
        if not self.is_peft:
            return self.trainable[name]
        layer: Any = self.base.get_submodule(name.rpartition(".")[0])
        return layer.base_layer.get_parameter(name.rpartition(".")[2])  # type: ignore[no-any-return]


@contextlib.contextmanager
def attach(model: LoadedModel | nn.Module, plan: Plan, *, seed: int = 0, dropout: float = 0.0,
           start: Start | None = None) -> Iterator[Attachment]:
    """Put a plan on a model; on leaving, the model is what it was, bit for bit.

    Args:
        model: A `LoadedModel` or a transformers model without adapters.
        plan: From `make_plan`.
        seed: Of the adapters' initial values, together with each module's name.
        dropout: Of LoRA's input; 0 allows the lean kernels.
        start: How LoRA's factors begin; None: A random, B zero.

    Raises:
        SettingsError: a start that does not go together with the plan or the base.
        AdapterError: the plan belongs to another model, or the model carries an adapter already.
    """
    base = model.model if isinstance(model, LoadedModel) else model
    anatomy = model.anatomy if isinstance(model, LoadedModel) else find_anatomy(base)
    if any(hasattr(m, "merged_adapters") for m in base.modules()):
        raise AdapterError(f"{type(base).__name__} carries an adapter already; merge it first "
                           "(load_model merges one by default).")
    plan = require_plan_fits(plan, anatomy)
    start = start or Start()
    require_start(start.init, plan, base)
    flags = {p: p.requires_grad for p in base.parameters()}
    modes = {m: m.training for m in base.modules()}
    try:
        with _attached(base, anatomy, plan, seed, dropout, start) as attachment:
            yield attachment
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
            parameter.grad = None
        for module, mode in modes.items():
            module.training = mode


@contextlib.contextmanager
def _attached(base: nn.Module, anatomy: Anatomy, plan: Plan, seed: int, dropout: float,
              start: Start) -> Iterator[Attachment]:
    if plan.method == "full":
        with _full_rank(base, anatomy, plan) as (trainable, original):
            yield Attachment(plan, anatomy, base, base, trainable, original)
        return
    config = plan.lora_config(base, dropout=dropout)
    with contextlib.ExitStack() as stack:
        try:
            model, changed = stack.enter_context(started(base, anatomy, plan, config, start, seed))
        except MidblockError:
            raise
        except (ValueError, NotImplementedError) as error:  # PEFT's own refusals, of a kind of layer or of a family
            raise AdapterError(f"PEFT cannot adapt these matrices of {type(base).__name__}: "
                               f"{' '.join(str(error).split())} Choose other target modules.") from None
        stack.callback(_take_off, model, base)
        if start.init == "default":
            _seed_adapters(model, seed)
        trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
        found = sum(p.numel() for p in trainable.values())
        if found != plan.params:
            raise AdapterError(f"PEFT made {found:,} trainable parameters where the plan has {plan.params:,}.")
        for name, rank in plan.own_ranks.items():
            layer: Any = base.get_submodule(name)
            if layer.r["default"] != rank:
                raise AdapterError(f"PEFT made {name} of rank {layer.r['default']} where the plan has {rank}.")
        attachment = Attachment(plan, anatomy, model, base, trainable, changed)
        if changed:
            attachment._first = attachment.state()
        yield attachment


def _take_off(model: Any, base: nn.Module) -> None:
    model.unload()
    # PEFT leaves its config behind, and save_pretrained would then write an adapter
    for name in ("peft_config", "_hf_peft_config_loaded", "active_adapter"):
        base.__dict__.pop(name, None)


def adapted_layer(base: nn.Module, module: ModulePlan) -> Any:
    """PEFT's layer of one matrix of the plan, in a model that has the adapter."""
    if not module.experts:
        return base.get_submodule(module.name)
    owner, _, leaf = module.name.rpartition(".")
    layer: Any = base.get_submodule(owner)
    while layer.parameter_name != leaf:  # PEFT wraps the module once for each parameter
        layer = layer.base_layer
    return layer


def _seed_adapters(model: nn.Module, seed: int) -> None:
    """A of each adapter from (seed, module name), uniform in +-1/sqrt(in) as PEFT draws it; B stays 0.

    Rows are drawn one after another, so that a larger rank begins with the rows of a smaller one.
    """
    for name, parameter in model.named_parameters():
        if ".lora_A." not in name:
            continue
        module = name.split(".lora_A.")[0].removeprefix("base_model.model.")
        generator = torch.Generator().manual_seed(int(sha256_of("lora_A", str(seed), module)[:15], 16))
        bound = parameter.shape[1] ** -0.5
        values = torch.empty(parameter.shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator)
        with torch.no_grad():
            parameter.copy_(values)


@contextlib.contextmanager
def _full_rank(base: nn.Module, anatomy: Anatomy, plan: Plan
               ) -> Iterator[tuple[dict[str, nn.Parameter], dict[str, Tensor]]]:
    """The chosen weights in float32 and trainable; forwards cast them to the activations' dtype.

    Updates of a usual learning rate are below the resolution of a bfloat16 weight and would be lost.
    """
    base.requires_grad_(False)
    if plan.whole_blocks:
        names = [f"{anatomy.block_path(b)}.{n}" for b in plan.blocks
                 for n, _ in anatomy.blocks[b].named_parameters()]
    else:
        names = [m.parameter for m in plan.modules]
    trainable = {n: base.get_parameter(n) for n in names}
    if odd := next((n for n, p in trainable.items() if not p.is_floating_point()), None):
        raise SettingsError(f"{odd} is quantised ({trainable[odd].dtype}); a full-rank update needs float weights. "
                            "Use method lora on a quantised base.")
    original = {n: p.data for n, p in trainable.items()}
    owners = {n.rpartition(".")[0] for n in names}
    try:
        for parameter in trainable.values():
            parameter.data = parameter.data.float().clone()
            parameter.requires_grad_(True)
        with _casting(base.get_submodule(o) for o in owners):
            yield trainable, original
    finally:
        for name, parameter in trainable.items():
            parameter.data = original[name]


@contextlib.contextmanager
def _casting(owners: Iterator[nn.Module]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for module in owners:
            if "forward" not in module.__dict__:
                stack.callback(replace_forward(module, _cast_forward(module)))
        yield


def _cast_forward(module: Any) -> Callable[..., Tensor]:
    original = module.forward
    linear = type(module) is nn.Linear
    conv1d = type(module).__name__ == "Conv1D" and hasattr(module, "nf")
    stacks = [n for n, p in module.named_parameters(recurse=False) if p.ndim > 2]
    inside = False

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        nonlocal inside
        if linear or conv1d:
            weight = module.weight.to(x.dtype)
            bias = None if module.bias is None else module.bias.to(x.dtype)
            return F.linear(x, weight.t() if conv1d else weight, bias)
        if stacks and not inside:  # fused experts read their parameters in ways of their own
            inside = True
            try:
                return torch.func.functional_call(  # type: ignore[no-any-return]
                    module, {n: getattr(module, n).to(x.dtype) for n in stacks}, (x, *args), kwargs)
            finally:
                inside = False
        return original(x, *args, **kwargs).to(x.dtype)  # type: ignore[no-any-return]
    return forward
