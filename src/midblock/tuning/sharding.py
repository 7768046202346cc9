"""Blocks of a frozen base sharded over the processes of a job (FSDP2, `torch.distributed.fsdp.fully_shard`).

Each process holds its part of every block and gathers a block when it runs it; what is trained, the embeddings and the
head stay whole in every process. Adapters are therefore float32 on a base of any dtype, and are saved whole, whatever
accelerate calls the kind of state dict. Blocks that the frozen prefix passes over are not gathered (`passed_over`).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from torch import nn

from midblock.errors import SettingsError
from midblock.models import Anatomy

__all__ = ["asked", "at_rest", "not_by_accelerate", "passed_over", "sharded"]


def asked() -> bool:
    """Whether the launcher's configuration asks for FSDP2.

    Raises:
        SettingsError: it asks for the first FSDP.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return False
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise SettingsError("the configuration of accelerate asks for FSDP in its first version; set fsdp_version: 2 "
                            "(recipes/accelerate/fsdp2.yaml), or use plain data parallelism.")
    return True


@contextlib.contextmanager
def not_by_accelerate() -> Iterator[None]:
    """Within the context accelerate does not see that FSDP2 is asked for: a trainer made here wraps nothing."""
    word = os.environ.pop("ACCELERATE_USE_FSDP", None)
    try:
        yield
    finally:
        if word is not None:
            os.environ["ACCELERATE_USE_FSDP"] = word


@contextlib.contextmanager
def sharded(anatomy: Anatomy, trained: Collection[nn.Parameter]) -> Iterator[None]:
    """Within the context every process holds its part of the blocks; afterwards the model is what it was.

    All processes must enter and leave, and run the same forwards in between.

    Args:
        anatomy: Of a model that is whole in every process.
        trained: Parameters that stay whole.

    Raises:
        SettingsError: weights that cannot be divided (4 or 8 bit).
    """
    from torch.distributed.fsdp import fully_shard

    kept = {id(p) for p in trained}
    inside = [(module, name, p) for block in anatomy.blocks for module in block.modules()
              for name, p in module.named_parameters(recurse=False) if id(p) not in kept]
    if odd := next((p for _, _, p in inside if not p.is_floating_point()), None):
        raise SettingsError(f"weights of {odd.dtype} cannot be sharded with FSDP2; tune a quantised base with plain "
                            "data parallelism (each process holds it whole).")
    shared = {id(p) for _, _, p in inside}
    outside = {p for p in anatomy.body.parameters() if id(p) not in shared}
    modules = [*anatomy.blocks, anatomy.body]
    part: Any
    try:
        for block in anatomy.blocks:
            fully_shard(block, ignored_params={p for p in block.parameters() if id(p) in kept})
        fully_shard(anatomy.body, ignored_params=outside)
        for _, _, parameter in inside:  # whoever else holds it must not hold its memory
            parameter.data = parameter.data.new_empty(0)
        yield
    finally:
        for module in modules:
            part = module
            if hasattr(part, "reshard"):
                part.reshard()
        for module, name, parameter in inside:
            part = module._parameters[name]
            if part is not parameter:
                parameter.data = part.full_tensor().detach()
                module._parameters[name] = parameter
        for module in modules:
            _as_it_was(module)


def _as_it_was(module: nn.Module) -> None:
    """Undo what `fully_shard` does to a module besides its parameters: hooks, class, state, marks."""
    from torch.distributed import _composable_state as states
    from torch.distributed._composable.contract import REGISTRY_KEY, STATE_KEY
    from torch.distributed.fsdp import FSDPModule

    if not isinstance(module, FSDPModule):
        return
    state = _state_of(module)
    state._pre_forward_hook_handle.remove()
    state._post_forward_hook_handle.remove()
    cls: Any = type(module)
    module.__class__ = cls.__mro__[2]  # FSDP<Class>, FSDPModule, Class
    for key in (REGISTRY_KEY, STATE_KEY):
        module.__dict__.pop(key, None)
    states._module_state_mapping.pop(module, None)
    for inner in module.modules():
        for mark in ("_is_fsdp_managed_module", "_fsdp_use_orig_params"):
            inner.__dict__.pop(mark, None)


@contextlib.contextmanager
def passed_over(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Within the context calls of these blocks gather nothing: their forward is replaced by one without weights."""
    states = [state for block in blocks if (state := _state_of(block)) is not None]
    kept = [state._fsdp_param_groups for state in states]
    try:
        for state in states:
            state._fsdp_param_groups = []
        yield
    finally:
        for state, groups in zip(states, kept, strict=True):
            state._fsdp_param_groups = groups


def at_rest(block: nn.Module) -> None:
    """Give back what a block has gathered for a forward that an exception broke off."""
    if (state := _state_of(block)) is not None:
        from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState

        state._training_state = TrainingState.IDLE
        for group in state._fsdp_param_groups:
            group._training_state = TrainingState.IDLE
        sharded_block: Any = block
        sharded_block.reshard()


def _state_of(block: Any) -> Any:
    """What FSDP2 keeps of a block; None where it is not sharded."""
    return block._get_fsdp_state() if hasattr(block, "_get_fsdp_state") else None
