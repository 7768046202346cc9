"""Models run block by block: all batches pass block b before any enters b + 1.

A block's weights are then needed once in a pass, for all batches. Where they are read from the files
(`midblock.models.streaming`), two blocks of each model are in memory at a time: the one that computes, and the next,
which a thread reads meanwhile. A step is the model's own forward, resumed at one block
(`midblock.capture.interventions.resume_at`). That this is exact is tried at every block, on a small batch that goes
through the model's own forward beside it.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from midblock.capture.forward import Lockstep, run_blocks
from midblock.capture.hidden_states import HiddenStates
from midblock.capture.interventions import learn_outputs, resume_at, swap_blocks
from midblock.capture.scoring import RowScores, score_batch, score_hidden
from midblock.data import Batch
from midblock.errors import ArchitectureError, MidblockError, SettingsError
from midblock.models import LoadedModel, text_config
from midblock.models.dtypes import config_value
from midblock.models.forwards import forwards_replaced
from midblock.models.memory import free_memory, resident_memory
from midblock.models.quiet import first_line, quiet
from midblock.sizes import size_text

__all__ = ["BlockByBlock", "block_by_block", "room_for_hidden_states", "run_layer_major", "score_batches"]


class BlockByBlock:
    """Models whose blocks come one after another; made by `block_by_block`.

    Attributes:
        num_blocks: L of all of them.
    """

    def __init__(self, models: Mapping[str, LoadedModel], reader: ThreadPoolExecutor) -> None:
        self._models = dict(models)
        depths = {m.anatomy.num_blocks for m in self._models.values()}
        if len(depths) != 1:
            raise ValueError(f"models in lockstep need equal depth, got {sorted(depths)}")
        self.num_blocks = depths.pop()
        self._reader = reader
        self._order = [(b, name) for b in range(self.num_blocks) for name, m in self._models.items()
                       if m.streamed is not None]
        self._coming: dict[tuple[int, str], Future[None]] = {}
        self._begun = False
        self._trials = {name: _Trial(name, m) for name, m in self._models.items()}

    @contextlib.contextmanager
    def inputs(self, name: str) -> Iterator[None]:
        """A model's embeddings are there within the context, for `start`."""
        model = self._models[name]
        with contextlib.nullcontext() if model.streamed is None else model.streamed.part("embeddings"):
            self._trials[name].start()
            yield
        if name == [*self._models][-1] and self._order and not self._begun:
            self._read(self._order[0])

    @contextlib.contextmanager
    def heads(self) -> Iterator[None]:
        """All models' heads are there within the context."""
        with contextlib.ExitStack() as stack:
            for model in self._models.values():
                if model.streamed is not None:
                    stack.enter_context(model.streamed.part(model.streamed.head))
            yield

    @contextlib.contextmanager
    def block(self, b: int, name: str) -> Iterator[None]:
        """Block b of a model is there within the context, and was tried; the next one is read meanwhile.

        Raises:
            CheckpointError: it cannot be read.
            ArchitectureError: running it alone is not what the model does.
        """
        model, self._begun = self._models[name], True
        if model.streamed is not None:
            self._read((b, name))
            self._coming.pop((b, name)).result()
            after = self._order.index((b, name)) + 1
            if after < len(self._order):
                self._read(self._order[after])
        try:
            self._trials[name].check(b, self)
            yield
        finally:
            if model.streamed is not None:
                model.streamed.drop(b)

    @contextlib.contextmanager
    def blocks(self, b: int) -> Iterator[None]:
        """Block b of every model is there within the context."""
        with contextlib.ExitStack() as stack:
            for name in self._models:
                stack.enter_context(self.block(b, name))
            yield

    def _read(self, place: tuple[int, str]) -> None:
        b, name = place
        streamed = self._models[name].streamed
        assert streamed is not None
        if place not in self._coming:
            self._coming[place] = self._reader.submit(streamed.load, b)

    def start(self, name: str, batch: Batch) -> Tensor:
        """Hidden 0 (B, T, d) of a batch on the model's device; within `inputs`."""
        model = self._models[name]
        return run_blocks(model.model, model.anatomy, batch, stop=0)

    def step(self, name: str, b: int, batch: Batch, hidden: Tensor, donor: str | None = None) -> Tensor:
        """Hidden b + 1 of hidden b; within `block` of the model, or of the donor whose block runs in its place.

        Args:
            name: The model whose forward it is.
            b: The block.
            batch: On the model's device.
            hidden: (B, T, d), on any device.
            donor: Another model whose block b is run.
        """
        model = self._models[name]
        hidden = hidden.to(model.device)
        with contextlib.ExitStack() as stack:
            if model.streamed is not None and not model.streamed.holds("embeddings"):
                # what the embeddings give is not read: block b gets the hidden state
                stack.enter_context(forwards_replaced([model.anatomy.embeddings], [lambda *_, **__: hidden]))
            if donor is not None and donor != name:
                stack.enter_context(swap_blocks(model.anatomy, self._models[donor].anatomy, [b]))
            if b == 0:  # the state is given here too: embeddings need not be there any more
                stack.enter_context(resume_at(model.anatomy, 0, hidden))
            return run_blocks(model.model, model.anatomy, batch, start=b, hidden=hidden, stop=b + 1)

    def close(self) -> None:
        """End what is still under way."""
        for future in self._coming.values():
            future.cancel()
        for trial in self._trials.values():
            trial.close()
        self._reader.shutdown(wait=True, cancel_futures=True)
        for b, name in self._coming:
            streamed = self._models[name].streamed
            assert streamed is not None
            streamed.drop(b)


class _Trial:
    """A small batch in the model's own forward, suspended at each block, beside which the step is tried."""

    def __init__(self, name: str, model: LoadedModel) -> None:
        self._name, self._model = name, model
        ids = torch.arange(2, 12, device=model.device).reshape(2, 5) % model.anatomy.vocab_size
        self._batch = Batch(indices=(0, 1), input_ids=ids, attention_mask=torch.ones_like(ids))
        self._forward = iter(Lockstep({"": (model.model, model.anatomy, self._batch)}))
        self._hidden: Tensor | None = None

    def start(self) -> None:
        self._hidden = self._next("its embeddings")

    def check(self, b: int, models: BlockByBlock) -> None:
        block = self._model.anatomy.blocks[b]
        handle = block.register_forward_hook(lambda module, args, output: learn_outputs(module, output), prepend=True)
        try:
            want = self._next(f"block {b}")
        finally:
            handle.remove()
        assert self._hidden is not None
        try:
            got = models.step(self._name, b, self._batch, self._hidden)
        except (MemoryError, torch.OutOfMemoryError, MidblockError):
            raise
        except Exception as error:
            raise self._refused(b, f"needs more than the hidden states before it ({first_line(error)})") from error
        if not torch.equal(got, want):
            off = (got - want).abs().max().item()
            raise self._refused(b, f"shares more than hidden states with others: alone it differs by {off:.3g}")
        self._hidden = want

    def _next(self, what: str) -> Tensor:
        try:
            _, states = next(self._forward)
        except (MemoryError, torch.OutOfMemoryError, MidblockError):
            raise
        except Exception as error:
            raise ArchitectureError(f"{self._name} cannot be run block by block: at {what} its forward needs "
                                    f"weights of other parts ({first_line(error)}). Load it whole, with stream "
                                    "never.") from error
        return states[""]

    def _refused(self, b: int, reason: str) -> ArchitectureError:
        return ArchitectureError(f"{self._name} cannot be run block by block: block {b} {reason}. Load it whole, "
                                 "with stream never.")

    def close(self) -> None:
        self._forward.close()  # type: ignore[attr-defined]


@contextlib.contextmanager
def block_by_block(models: Mapping[str, LoadedModel]) -> Iterator[BlockByBlock]:
    """Run models block by block within the context.

    Args:
        models: Name -> model, of equal depth; some may be in memory as a whole.
    """
    reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="midblock-weights")
    with quiet():
        made = BlockByBlock(models, reader)
        try:
            yield made
        finally:
            made.close()


def run_layer_major(models: Mapping[str, LoadedModel], batches: Sequence[Batch], *, heads: bool = False,
                    keeps: int = 0) -> Iterator[tuple[int, int, dict[str, Tensor]]]:
    """Advance every batch to hidden h before any goes on: yields (h, batch number, states on the models' devices).

    Enter ``torch.inference_mode()`` (or ``no_grad``) around all of it.

    Args:
        models: Name -> model, of equal depth.
        batches: On the CPU.
        heads: Whether the consumer unembeds.
        keeps: Hidden states of each batch and model that the consumer keeps until the next one comes.

    Raises:
        SettingsError: a memory limit that is too small for any pass (says the least).
        OutputError: no room on disk for hidden states that do not fit into memory.
        ArchitectureError: a model that cannot be run block by block.
        CheckpointError: weights that cannot be read.
    """
    with contextlib.ExitStack() as stack:
        kept = stack.enter_context(room_for_hidden_states(models, batches, heads=heads, keeps=keeps))
        runner = stack.enter_context(block_by_block(models))
        if heads:
            stack.enter_context(runner.heads())
        last = [*models][-1]
        for name, model in models.items():
            with runner.inputs(name):
                for number, batch in enumerate(batches):
                    kept.put((name, number), runner.start(name, batch.to(model.device)))
        for number in range(len(batches)):
            yield 0, number, {n: kept.get((n, number)).to(m.device) for n, m in models.items()}
        for b in range(runner.num_blocks):
            for name, model in models.items():
                with runner.block(b, name):
                    for number, batch in enumerate(batches):
                        z = runner.step(name, b, batch.to(model.device), kept.get((name, number)))
                        kept.put((name, number), z)
                        if name == last:  # all of them have come to b + 1
                            others = {n: kept.get((n, number)).to(m.device) for n, m in models.items() if n != last}
                            yield b + 1, number, {**others, last: z}


def score_batches(model: LoadedModel, batches: Sequence[Batch]) -> Iterator[tuple[Batch, RowScores]]:
    """Next-token scores of every batch, in order, whether the model is in memory or its blocks come one after another.

    Enter ``torch.inference_mode()`` (or ``no_grad``) around all of it.

    Args:
        model: The model.
        batches: On the CPU.

    Yields:
        The batch on the model's device, and its scores.

    Raises:
        MidblockError: as `run_layer_major`, where blocks come one after another.
    """
    if model.streamed is None:
        for batch in batches:
            here = batch.to(model.device)
            yield here, score_batch(model.model, model.anatomy, here)
        return
    for h, number, states in run_layer_major({"": model}, batches, heads=True) if batches else ():
        if h == model.anatomy.num_blocks:
            here = batches[number].to(model.device)
            yield here, score_hidden(model.anatomy, states[""], here)


# -- memory ------------------------------------------------------------------------------------------


def room_for_hidden_states(models: Mapping[str, LoadedModel], batches: Sequence[Batch], *, heads: bool = False,
                           keeps: int = 0, states: int | None = None, blocks_at_once: int = 1) -> HiddenStates:
    """Where hidden states are kept: in memory if they fit under the limit, else on disk.

    Args:
        models: Name -> model.
        batches: All of them.
        heads: Whether heads are in memory beside the blocks.
        keeps: See `run_layer_major`.
        states: How many hidden states of each batch exist at most; default one per model.
        blocks_at_once: Blocks that compute together; one more is read meanwhile.

    Raises:
        SettingsError: a memory limit below the least that can work (says the least).
        OutputError: no room on disk.
    """
    streamed = [m.streamed for m in models.values() if m.streamed is not None]
    limits = [s.memory_limit for s in streamed if s.memory_limit is not None]
    own = hidden_bytes(models, batches)
    hidden = own if states is None else own // len(models) * states
    now = resident_memory()
    blocks = (blocks_at_once + 1) * max((s.block_bytes for s in streamed), default=0)
    head = sum(s.part_bytes(s.head) for s in streamed) if heads else 0
    first = max((s.part_bytes("embeddings") for s in streamed), default=0)
    working = _working_bytes(models, batches, heads) + keeps * own
    on_gpu = any(m.device.type != "cpu" for m in models.values())
    least = now + working + (0 if on_gpu else max(blocks, first) + head)
    if limits and least > min(limits):
        raise SettingsError(
            f"a memory limit of {size_text(min(limits))} is too little for this pass, which needs at least "
            f"{size_text(least)}: {size_text(now)} for the program and what is measured, {size_text(working)} to work "
            f"on a batch, {size_text(least - now - working)} for blocks, embeddings and heads. Raise it to "
            "that, or use smaller batches or fewer samples.")
    room = min(limits) if limits else now + int(0.8 * free_memory(torch.device("cpu")))
    if least + hidden <= room:
        return HiddenStates()
    scratch = next((s.scratch for s in streamed if s.scratch is not None), None)
    return HiddenStates(scratch or Path(tempfile.gettempdir()), hidden)


def hidden_bytes(models: Mapping[str, LoadedModel], batches: Sequence[Batch]) -> int:
    """Bytes of one hidden state of every batch and model."""
    positions = sum(b.input_ids.numel() for b in batches)
    return sum(positions * m.anatomy.hidden_size * m.dtype.itemsize for m in models.values())


def _working_bytes(models: Mapping[str, LoadedModel], batches: Sequence[Batch], heads: bool) -> int:
    """Bytes of what a block, or a head, makes of the largest batch; generous."""
    most = 0
    for model in models.values():
        config: Any = text_config(model.model)
        width = model.anatomy.hidden_size
        inner = config_value(config, "intermediate_size")
        inner = inner if isinstance(inner, int) else 4 * width
        heads_of = config_value(config, "num_attention_heads")
        many = heads_of if isinstance(heads_of, int) else 32
        for batch in batches:
            rows, length = batch.input_ids.shape
            numbers = rows * length * (8 * width + 3 * inner) + rows * length * length * (2 + many // 8)
            most = max(most, numbers * max(4, model.dtype.itemsize))
    return most + (1 << 26) + ((1 << 28) if heads else 0)
