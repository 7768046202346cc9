"""Changing what a model's blocks do while it runs, on unmodified transformers models.

* `swap_blocks`: another model's blocks run in their places.
* `steered`, `patched`: a block's output is shifted, or replaced at chosen positions.
* `resume_at`: the blocks before one are passed over, and it reads given hidden states; the model still
  computes its own masks and position embeddings. `midblock.capture.resume` tries where that is exact.

Each is a context that gives the model back as it was, also after an error.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.utils.generic import ModelOutput

from midblock.errors import ArchitectureError, BlockRangeError
from midblock.models import Anatomy
from midblock.models.forwards import forwards_replaced

__all__ = ["hidden_of_call", "hidden_of_output", "learn_outputs", "outputs_changed", "passing_over", "patched",
           "resume_at", "steered", "swap_blocks", "with_hidden"]

# block -> function from hidden states to what the block would return with them
_returns: WeakKeyDictionary[nn.Module, Callable[[Tensor], Any]] = WeakKeyDictionary()


def hidden_of_call(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """Hidden states among a block's call arguments."""
    value = args[0] if args else kwargs.get("hidden_states")
    if not isinstance(value, Tensor):
        raise ArchitectureError("a block was called without a hidden-states tensor as its first argument "
                                f"or as hidden_states= (found {type(value).__name__}).")
    return value


def hidden_of_output(output: Any) -> Tensor:
    """Hidden states in a block's return value (a tensor, or the first of several values)."""
    value = output
    if isinstance(output, ModelOutput):
        value = next(iter(output.values()), None)
    elif isinstance(output, tuple | list):
        value = output[0] if output else None
    if not isinstance(value, Tensor):
        raise ArchitectureError(f"a block returned {type(value).__name__}, not hidden states.")
    return value


def with_hidden(output: Any, hidden: Tensor) -> Any:
    """A block's return value with other hidden states."""
    if isinstance(output, ModelOutput):
        return type(output)(**{**output, next(iter(output)): hidden})
    if isinstance(output, tuple | list):
        return getattr(type(output), "_make", type(output))((hidden, *output[1:]))
    return hidden


# -- resuming --------------------------------------------------------------------------------------


def learn_outputs(block: nn.Module, output: Any) -> None:
    """Remember how a block hands its hidden states on, so that it can be passed over.

    Of further values only plain ones (None, numbers, text) are repeated; tensors depend on the
    input, and None stands for them. Whether the model is right with that is for a trial to say.
    """
    plain = (bool, int, float, str, type(None))
    if isinstance(output, ModelOutput):
        kept, kind = {k: v if isinstance(v, plain) else None for k, v in output.items()}, type(output)
        _returns[block] = lambda hidden: kind(**{**kept, next(iter(kept)): hidden})
    elif isinstance(output, tuple | list):
        rest = [v if isinstance(v, plain) else None for v in output[1:]]
        make = getattr(type(output), "_make", type(output))  # named tuples take their values one by one
        _returns[block] = lambda hidden: make((hidden, *rest))
    else:
        _returns[block] = lambda hidden: hidden


def passing_over(anatomy: Anatomy, start: int, hidden: Tensor) -> list[Callable[..., Any]]:
    """Forwards for the blocks before ``start`` with which block ``start`` is called with ``hidden``.

    The last of them hands the given hidden on, as if nothing had happened: gradient
    checkpointing keeps it for its second forward.

    Raises:
        ArchitectureError: how the blocks return their hidden states is unknown; see `learn_outputs`.
    """
    blocks = anatomy.blocks[:start]
    if any(block not in _returns for block in blocks):
        raise ArchitectureError(f"resuming from block {start} was not tried: call verify_resume(model, anatomy) first.")

    def passed_over(block: nn.Module) -> Callable[..., Any]:
        make = _returns[block]
        return lambda *args, **kwargs: make(hidden_of_call(args, kwargs))

    made = _returns[blocks[-1]]
    return [*map(passed_over, blocks[:-1]), lambda *args, **kwargs: made(hidden)]


@contextlib.contextmanager
def resume_at(anatomy: Anatomy, start: int, hidden: Tensor) -> Iterator[None]:
    """Within the context the blocks before ``start`` do nothing and block ``start`` reads ``hidden``.

    `midblock.capture.verify_resume` proves that this is exact; call it first.

    Raises:
        ArchitectureError: it was not called.
        ValueError: ``start`` is not 0..L-1.
    """
    if not 0 <= start < len(anatomy.blocks):
        raise ValueError(f"start {start} is not a block (0..{len(anatomy.blocks) - 1})")
    if start == 0:
        def feed(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

        # prepended: a listener on the same block must see the replaced hidden
        handle = anatomy.blocks[0].register_forward_pre_hook(feed, with_kwargs=True, prepend=True)
        try:
            yield
        finally:
            handle.remove()
        return
    with forwards_replaced(anatomy.blocks[:start], passing_over(anatomy, start, hidden)):
        yield


# -- other blocks, other outputs ---------------------------------------------------------------------


@contextlib.contextmanager
def swap_blocks(recipient: Anatomy, donor: Anatomy, blocks: Sequence[int]) -> Iterator[None]:
    """Within the context the recipient runs the donor's blocks at these places; restored also after an error.

    Args:
        recipient: Anatomy of the model that is run.
        donor: Anatomy of the model whose blocks are lent.
        blocks: Blocks 0..L-1.

    Raises:
        ValueError: a block that one of the models does not have.
    """
    if any(not 0 <= b < min(recipient.num_blocks, donor.num_blocks) for b in blocks):
        raise ValueError(f"blocks {list(blocks)} do not fit {recipient.num_blocks} and {donor.num_blocks} blocks")
    places = list(dict.fromkeys(blocks))
    lent = [donor.blocks[b].forward for b in places]  # taken first: a model may swap with itself
    with forwards_replaced([recipient.blocks[b] for b in places], lent):
        yield


@contextlib.contextmanager
def outputs_changed(anatomy: Anatomy, changes: Mapping[int, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """Within the context the output of each given block goes through a function; removed also after an error."""
    if wrong := [b for b in changes if not 0 <= b < anatomy.num_blocks]:
        raise BlockRangeError(f"blocks {wrong} do not fit a model of {anatomy.num_blocks} blocks "
                              f"(0-{anatomy.num_blocks - 1}).")

    def hook_of(change: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            return with_hidden(output, change(hidden_of_output(output)))
        return hook

    # prepended: whoever listens to the block's output must see it changed
    handles = [anatomy.blocks[b].register_forward_hook(hook_of(change), prepend=True)
               for b, change in changes.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def steered(anatomy: Anatomy, vectors: Mapping[int, Tensor], alpha: float = 1.0) -> Iterator[None]:
    """Within the context ``alpha * vector`` is added to the output of each given block, at every position.

    It works for scoring and, since each new token passes the same blocks, for generation with a
    key-value cache. The model is as before afterwards, also after an error.

    Args:
        anatomy: Anatomy of the model to steer.
        vectors: Block -> (d,).
        alpha: Strength; negative ones steer the other way.

    Raises:
        BlockRangeError: a block that the model does not have.
        ValueError: a vector of another width.
    """
    for block, vector in vectors.items():
        if tuple(vector.shape) != (anatomy.hidden_size,):
            raise ValueError(f"the vector of block {block} has shape {tuple(vector.shape)}; the model's hidden size is "
                             f"{anatomy.hidden_size}.")

    def adding(vector: Tensor) -> Callable[[Tensor], Tensor]:
        scaled = alpha * vector.float()
        return lambda z: z + scaled.to(z.device, z.dtype)

    with outputs_changed(anatomy, {b: adding(v) for b, v in vectors.items()}):
        yield


@contextlib.contextmanager
def patched(anatomy: Anatomy, patches: Mapping[int, tuple[Tensor | Sequence[int] | None, Tensor]]) -> Iterator[None]:
    """Within the context hidden states at chosen places are replaced by given ones.

    Args:
        anatomy: Anatomy of the model to patch.
        patches: Block -> (positions, states): its output is replaced by ``states`` (B, T, d) at
            ``positions``: a boolean mask (B, T), token places 0..T-1 in every row, or None for all.

    Raises:
        BlockRangeError: a block that the model does not have.
        ValueError: (during the forward) states or positions of another shape than the output.
    """
    def replacing(block: int, positions: Tensor | Sequence[int] | None, states: Tensor) -> Callable[[Tensor], Tensor]:
        def change(z: Tensor) -> Tensor:
            if states.shape != z.shape:
                raise ValueError(f"the patch of block {block} has shape {tuple(states.shape)}, its output "
                                 f"{tuple(z.shape)}.")
            new = states.to(z.device, z.dtype)
            if positions is None:
                return new
            if isinstance(positions, Tensor) and positions.dtype == torch.bool:
                mask = positions.to(z.device)
                if mask.shape != z.shape[:2]:
                    raise ValueError(f"the patch of block {block} has a mask of shape {tuple(mask.shape)}, its output "
                                     f"{tuple(z.shape)}.")
            else:
                mask = torch.zeros(z.shape[:2], dtype=torch.bool, device=z.device)
                mask[:, torch.as_tensor(positions, device=z.device)] = True
            return torch.where(mask.unsqueeze(-1), new, z)
        return change

    with outputs_changed(anatomy, {b: replacing(b, *patch) for b, patch in patches.items()}):
        yield
