"""Training a block of a model that does not fit into memory: frozen blocks are read when they run.

The trained blocks, the final norm and the head stay in memory. A frozen block's weights are there while the block
computes, and those of the block that is expected next are read meanwhile. A gradient goes through a frozen block by
running it once more: its input is kept in the forward pass, and in the backward pass the weights are read again, the
block runs with a graph, and graph and weights are gone when the gradient of the input is known. Nothing holds on to a
weight from forward to backward. (A kernel that keeps its weight in a graph, such as that of a 4-bit product, and finds
a reused buffer there gives the right loss and a wrong gradient.)

With a cached prefix, the blocks before the first trained one are read once (`FrozenPrefix.fill`), and then only frozen
blocks behind it.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from midblock.capture.interventions import hidden_of_call, hidden_of_output, with_hidden
from midblock.data import TokenRow
from midblock.errors import ArchitectureError, SettingsError
from midblock.models import LoadedModel
from midblock.models.forwards import forwards_replaced
from midblock.models.memory import free_memory, resident_memory
from midblock.models.quiet import quiet
from midblock.models.streaming import PartReader, StreamedWeights
from midblock.settings import TuneSettings, name_of
from midblock.sizes import size_text
from midblock.tuning.cache import PrefixCache
from midblock.tuning.initial import NEEDS_ROWS
from midblock.tuning.plan import Plan

__all__ = ["StreamedBlocks", "refuse_streamed", "stays_put", "streamed_blocks"]


class StreamedBlocks:
    """The frozen blocks of a streamed model while it is trained; made by `streamed_blocks`.

    Attributes:
        loaded: The model.
        streamed: Numbers of the blocks that come and go.
    """

    def __init__(self, loaded: LoadedModel, resident: Collection[int], weights: StreamedWeights) -> None:
        self.loaded, self._weights = loaded, weights
        self.streamed = [b for b in range(loaded.anatomy.num_blocks) if b not in resident]
        self._first = min(resident)
        self._reader = PartReader(weights)

    def forwards(self) -> list[Callable[..., Any]]:
        """The forwards of the streamed blocks."""
        return [self._forward_of(b, self.loaded.anatomy.blocks[b].forward) for b in self.streamed]

    def _forward_of(self, b: int, original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if not self._reader.expects(b) and self._weights.is_there(b):  # somebody else reads it, for many batches
                return original(*args, **kwargs)
            hidden = hidden_of_call(args, kwargs)
            call = _Call(self, b, original, args, kwargs)
            if not (torch.is_grad_enabled() and hidden.requires_grad):
                with self.block(b, self._behind(b)):
                    return original(*args, **kwargs)
            call.require_one_way()
            found: Tensor = _Recomputed.apply(hidden, call)
            output, call.output = call.output, None  # the graph keeps the call
            return with_hidden(output, found)
        return forward

    def _behind(self, b: int) -> int | None:
        return next((other for other in self.streamed if other > b), None)

    def expected(self, b: int, *, backward: bool) -> int | None:
        """The block that training needs after one: the next, or on the way back the one before it.

        The last one is needed first on the way back, and the first one behind a cached prefix in the next step.
        """
        if not backward:
            return b if self._behind(b) is None else self._behind(b)
        return max((other for other in self.streamed if self._first < other < b), default=b)

    def block(self, b: int, then: int | None = None) -> contextlib.AbstractContextManager[None]:
        """See `PartReader.part`."""
        return self._reader.part(b, then)

    def settle(self) -> None:
        """Leave no streamed block in memory."""
        self._reader.settle()

    def close(self) -> None:
        """End what is still under way."""
        self._reader.close()

    # -- memory -----------------------------------------------------------------------------------------

    def left(self) -> int:
        """Bytes that may still be taken beside the blocks that come and go."""
        limit = self._weights.memory_limit
        room = free_memory(torch.device("cpu"))
        if limit is not None:
            room = min(room, limit - resident_memory())
        on_gpu = self.loaded.device.type != "cpu"
        embeddings = 0 if self._weights.holds("embeddings") else self._weights.part_bytes("embeddings")
        return room - (0 if on_gpu else max(2 * self._weights.block_bytes, embeddings))

    def require_room(self, working: int) -> None:
        """Refuse a memory limit that is too small for the training.

        Args:
            working: Bytes that a step takes: activations, gradients, the optimizer's state.

        Raises:
            SettingsError: it is; says the least.
        """
        limit = self._weights.memory_limit
        if limit is None or (missing := working - self.left()) <= 0:
            return
        raise SettingsError(
            f"a memory limit of {size_text(limit)} is too little for this training, which needs at least "
            f"{size_text(limit + missing)}: {size_text(resident_memory())} for the program, trained blocks and head, "
            f"{size_text(working)} for a step, the rest for the blocks that come and go. Raise it to that, train fewer "
            "blocks, or use smaller batches.")

    @contextlib.contextmanager
    def cache(self, rows: Sequence[TokenRow], working: int) -> Iterator[PrefixCache]:
        """A prefix cache for these rows: in memory where they take half of the room at most, else in scratch files.

        Args:
            rows: The rows that are trained on.
            working: See `require_room`.

        Raises:
            OutputError: the scratch disk has too little room (says how much is missing).
        """
        from midblock.capture.hidden_states import require_disk

        size = sum(map(len, rows)) * self.loaded.anatomy.hidden_size * self.loaded.dtype.itemsize
        if size <= max(0, self.left() - working) // 2:
            yield PrefixCache("memory", limit_bytes=size + 1)
            return
        scratch = self._weights.scratch or Path(tempfile.gettempdir())
        on_disk = size + (size >> 3) + (len(rows) << 12)  # each row is a file, with a header and a digest
        require_disk(scratch, on_disk)
        with tempfile.TemporaryDirectory(prefix="midblock-prefix-", dir=scratch) as folder:
            yield PrefixCache("disk", folder=Path(folder) / "cache", limit_bytes=on_disk)


@contextlib.contextmanager
def streamed_blocks(loaded: LoadedModel, resident: Collection[int]) -> Iterator[StreamedBlocks]:
    """Within the context a streamed model can be trained: some of its blocks stay in memory, the others are read when
    they run, forward and backward.

    Args:
        loaded: A model whose parts are read from its files.
        resident: Blocks that are trained.

    Raises:
        CheckpointError: a part cannot be read.
    """
    weights = loaded.streamed
    if weights is None:
        raise ValueError(f"{loaded.name} is in memory as a whole")
    anatomy = loaded.anatomy
    parts = [*sorted(resident), weights.head]
    kept = [part for part in parts if not weights.holds(part)]
    embed = anatomy.embeddings.forward

    def embeddings(*args: Any, **kwargs: Any) -> Any:
        with weights.embedding_rows(args[0]) as ids:
            return embed(ids, *args[1:], **kwargs)

    with contextlib.ExitStack() as stack:
        stack.enter_context(quiet())  # each block would show a bar of its own
        for part in kept:
            stack.callback(weights.let_go, part)
            weights.hold(part)
        blocks = StreamedBlocks(loaded, resident, weights)
        stack.callback(blocks.close)
        modules = [anatomy.blocks[b] for b in blocks.streamed]
        stack.enter_context(forwards_replaced([*modules, anatomy.embeddings], [*blocks.forwards(), embeddings]))
        stack.enter_context(stays_put(loaded.model))
        yield blocks


def refuse_streamed(plan: Plan, wanted: TuneSettings, *, streamed: bool) -> None:
    """Refuse what needs a whole model in memory.

    Raises:
        SettingsError: a result that is a whole checkpoint, or a start that is computed from rows.
    """
    if streamed and (by_rows := {wanted.init, wanted.ranks} & NEEDS_ROWS):
        raise SettingsError(f"{by_rows.pop()} runs rows through the whole base before training, and this one is read "
                            "block by block; choose another start, or load the base whole, with stream never.")
    if streamed and (plan.method == "full" or wanted.merge or wanted.export_base):
        what = "method full" if plan.method == "full" else name_of("merge" if wanted.merge else "export_base")
        raise SettingsError(f"{what} writes a whole checkpoint, and this base is read block by block; train a LoRA and "
                            "merge it where there is memory for the base (PEFT's merge_and_unload), or load the base "
                            "whole, with stream never.")


@contextlib.contextmanager
def stays_put(model: nn.Module) -> Iterator[None]:
    """Within the context a trainer cannot move the model: its parts are where they belong, or not in memory."""
    model.__dict__["to"] = lambda *args, **kwargs: model
    try:
        yield
    finally:
        del model.__dict__["to"]


class _Call:
    """One call of a streamed block, to be made again in the backward pass with the same random numbers."""

    def __init__(self, blocks: StreamedBlocks, b: int, original: Callable[..., Any], args: tuple[Any, ...],
                 kwargs: dict[str, Any]) -> None:
        self.blocks, self.number = blocks, b
        self._original, self._args, self._kwargs = original, args, kwargs
        self._hidden = hidden_of_call(args, kwargs)
        self._device = self._hidden.device
        self._autocast = (torch.get_autocast_dtype(self._device.type)
                          if torch.is_autocast_enabled(self._device.type) else None)
        self._random = self._random_state()
        self.output: Any = None
        """What the block returned, without a graph."""

    def _random_state(self) -> list[Tensor]:
        return [torch.get_rng_state(), *([torch.cuda.get_rng_state(self._device)]
                                         if self._device.type == "cuda" else [])]

    def require_one_way(self) -> None:
        """Refuse a block that is given more than hidden states that depend on what is trained.

        Raises:
            ArchitectureError: it is; their gradient would be lost.
        """
        if any(isinstance(t, Tensor) and t.requires_grad and t is not self._hidden
               for t in tree_leaves((self._args, self._kwargs))):
            raise ArchitectureError(f"{self.blocks.loaded.name} cannot be trained block by block: block {self.number} "
                                    "reads more of the trained blocks than hidden states. Load it whole, with stream "
                                    "never.")

    def run(self, hidden: Tensor) -> Any:
        """The block's return value for other hidden states; its weights must be there."""
        if self._args:
            return self._original(hidden, *self._args[1:], **self._kwargs)
        return self._original(**{**self._kwargs, "hidden_states": hidden})

    def gradient(self, hidden: Tensor, grad: Tensor) -> Tensor:
        """Gradient of the hidden states, from that of what the block made of them."""
        cuda = [self._device] if self._device.type == "cuda" else []
        with torch.random.fork_rng(cuda), torch.enable_grad(), torch.autocast(
                self._device.type, self._autocast, enabled=self._autocast is not None):
            torch.set_rng_state(self._random[0])
            for state in self._random[1:]:
                torch.cuda.set_rng_state(state, self._device)
            given = hidden.detach().requires_grad_(True)
            found, = torch.autograd.grad(hidden_of_output(self.run(given)), given, grad)
        return found


class _Recomputed(torch.autograd.Function):
    """A streamed block whose graph is made in the backward pass."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, call: _Call) -> Tensor:
        ctx.save_for_backward(hidden)
        ctx.call = call
        with call.blocks.block(call.number, call.blocks.expected(call.number, backward=False)):
            call.output = call.run(hidden)
        return hidden_of_output(call.output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        call: _Call = ctx.call
        with call.blocks.block(call.number, call.blocks.expected(call.number, backward=True)):
            return call.gradient(ctx.saved_tensors[0], grads[0]), None
