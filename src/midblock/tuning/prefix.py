"""The frozen prefix: no gradient, no stored activation and, with a cache, no compute before the first
trainable block, under any trainer.

Nothing before the first trainable block needs a gradient. `FrozenPrefix` looks for that block at
every forward, runs the blocks before it without grad and cuts the graph there: also where a trainer
has called ``enable_input_require_grads`` (TRL does, with PEFT and gradient checkpointing), which
otherwise sends the backward pass through every frozen block. With a cache the output of the prefix is
computed once per sample and read in every later epoch, seed and arm with the same first block; an arm
that begins later goes on from there.

The blocks of the prefix are replaced on the instance (`midblock.models.forwards`)
while the model's own forward runs, which computes its masks and position embeddings as ever.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from midblock.capture import block_by_block, why_not_resume
from midblock.capture.interventions import hidden_of_output, passing_over, with_hidden
from midblock.errors import ArchitectureError, CacheRefusedError, SettingsError
from midblock.models import LoadedModel, find_anatomy
from midblock.models.attention import attends_by_row
from midblock.models.forwards import forwards_replaced, replace_forward
from midblock.models.placement import place_of
from midblock.settings.base import name_of
from midblock.tuning.cache import PrefixCache
from midblock.tuning.prefix_identity import (
    first_trainable_block,
    needs_leaf,
    not_checkpointed,
    prefix_identity,
    prefix_stamp,
    require_cacheable,
)
from midblock.tuning.prefix_rows import RowInputs, row_inputs, rows_in
from midblock.tuning.sharding import at_rest, passed_over

__all__ = ["FrozenPrefix"]

_installed: WeakKeyDictionary[nn.Module, FrozenPrefix] = WeakKeyDictionary()


class _PrefixDone(Exception):
    """Ends a forward after the prefix: nothing behind it is needed."""


class FrozenPrefix:
    """Within the context, training forwards of ``model`` do not differentiate, store or (with a cache)
    compute anything before the first trainable block.

    Works under transformers' Trainer, TRL's SFTTrainer and hand-written loops. After the first training forward,
    forwards without grad that keep no keys and values (a trainer's evaluation, a reference pass with the adapter
    disabled) read the cache too; generation is left alone. Losses and gradients stay what they are without it. Leave
    gradient checkpointing and the trainer's own options as you like.

    Several processes each cache the rows that they see: give them a sampler that keeps a row on its process (one
    without reshuffling over processes), or one ``disk:DIR`` for all.

    Args:
        model: A transformers causal LM, a PEFT model around one, or a `LoadedModel`, before or after its adapters
            are attached. A streamed one is told by its files in the cache's keys.
        cache: ``"none"`` (or None), ``"memory"``, ``"disk:DIR"``, or a `PrefixCache` to share.
        limit_bytes: Byte limit of a cache made here (a number or ``"4GB"``).
        on_refusal: ``uncached``: where the cache cannot be exact, go on without it and say so in
            ``notes``.

    Raises:
        CacheRefusedError: at the first training forward, where there is no frozen prefix or the
            cache cannot be exact: random layers in the prefix, packed rows or positions that
            restart, router logits asked for, an encoder-decoder, blocks that share more than
            hidden states. Ways out: ``cache="none"`` or ``on_refusal="uncached"``.
        SettingsError: another `FrozenPrefix` is active on this model.

    Example:
        ``with FrozenPrefix(trainer.model, cache="memory"): trainer.train()``
    """

    def __init__(self, model: nn.Module | LoadedModel, cache: str | PrefixCache | None = "none", *,
                 limit_bytes: int | str | None = None,
                 on_refusal: Literal["raise", "uncached"] = "raise") -> None:
        self.anatomy = model.anatomy if isinstance(model, LoadedModel) else find_anatomy(model)
        self.cache = (cache if isinstance(cache, PrefixCache) or cache is None
                      else PrefixCache.from_spec(cache, limit_bytes=limit_bytes))
        self.start: int | None = None
        """First trainable block of the last training forward."""
        self.rows_cached = self.rows_computed = self.rows_extended = self.rows_bypassed = self.rows_damaged = 0
        self._notes: list[str] = []
        self._give_up = on_refusal == "uncached"
        self._active = self._looking = False
        self._checked: int | None = None
        self._probed = False
        self._namespace: tuple[tuple[Any, ...], str] | None = None
        self._anyone: Callable[[bool], bool] | None = None
        self._labels_on_padding = self._has_labels = False
        self._outer: dict[str, Tensor] = {}
        self._turn: Callable[[Callable[..., Any], dict[str, Any]], None] | None = None
        """Takes a forward over, in place of all that is done else."""
        self._loaded = model if isinstance(model, LoadedModel) and model.streamed is not None else None
        self._weights = None if self._loaded is None else self._loaded.fingerprint
        self._restore: list[Callable[[], bool]] = []
        self._parameters = [n for n in inspect.signature(type(self.anatomy.body).forward).parameters if n != "self"]

    def __enter__(self) -> FrozenPrefix:
        if _installed.get(self.anatomy.body) is not None:
            raise SettingsError("another FrozenPrefix is active on this model; leave its context first.")
        _installed[self.anatomy.body] = self
        self._active = True
        self._replace(self.anatomy.body, self._body_forward)
        if self.anatomy.causal_lm is not self.anatomy.body:
            self._replace(self.anatomy.causal_lm, self._lm_forward)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self._active = False
        _installed.pop(self.anatomy.body, None)
        for restore in reversed(self._restore):
            restore()  # where somebody wrapped ours, it stays below theirs and hands everything on
        self._restore.clear()

    def _replace(self, module: nn.Module, handler: Callable[..., Any]) -> None:
        original = module.forward

        @functools.wraps(original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            aside = self._looking or not self._active
            return original(*args, **kwargs) if aside else handler(original, args, kwargs)

        self._restore.append(replace_forward(module, forward))

    def describe(self) -> dict[str, Any]:
        """What ``run.json`` stores: first trainable block, rows read and computed, the cache."""
        return {"start": self.start, "rows_from_cache": self.rows_cached, "rows_computed": self.rows_computed,
                "rows_extended": self.rows_extended,
                "rows_bypassed": self.rows_bypassed, "rows_damaged": self.rows_damaged,
                "cache": None if self.cache is None else self.cache.describe()}

    @property
    def notes(self) -> list[str]:
        """What a user should know: why the cache is off, how many of its rows were damaged."""
        if not self.rows_damaged:
            return self._notes
        where = "" if self.cache is None or self.cache.folder is None else f" of {self.cache.folder}"
        return [*self._notes, f"{self.rows_damaged} rows of the prefix cache{where} were damaged and computed anew"]

    def prepare(self) -> int | None:
        """Run now the checks that the first training forward would run.

        Returns:
            The first trainable block (None: nothing is trainable).

        Raises:
            CacheRefusedError: as for the class, as far as it shows without a batch.
        """
        start = first_trainable_block(self.anatomy)
        if start and self.cache is not None and self._checked != start:
            try:
                with self._aside():
                    require_cacheable(self.anatomy, start)
            except CacheRefusedError as error:
                self._refused(error)
            self._checked = start
        return start

    def together(self, anyone: Callable[[bool], bool]) -> None:
        """Run the prefix in all processes of a job or in none: their blocks are about to be sharded.

        What the prefix is, is taken down now, while its weights are whole; they must not change.

        Args:
            anyone: Whether a condition holds in any process.
        """
        self._anyone = anyone
        if (start := self.prepare()) and self.cache is not None:
            self._current_namespace(start)

    def expect(self, batch: Mapping[str, Any]) -> None:
        """A batch (ids and mask, padded on the right) comes next: a cache on disk reads its rows meanwhile."""
        if self.start and self.cache is not None and self._namespace is not None:
            config = self.anatomy.causal_lm.config.get_text_config(decoder=True)
            with contextlib.suppress(CacheRefusedError):  # said when it comes
                self.cache.expect(self._namespace[1], row_inputs(dict(batch), {}, config, by_row=False).rows)

    @contextlib.contextmanager
    def _aside(self) -> Iterator[None]:
        """Forwards within are our own trials, and none of a trainer's."""
        self._looking = True
        try:
            yield
        finally:
            self._looking = False

    def _refused(self, error: CacheRefusedError) -> None:
        if not self._give_up:
            raise CacheRefusedError(f"{error} Set {name_of('cache')} to none: blocks before the first trained one get "
                                    "no gradient then either.") from error
        self.cache = None
        self._notes.append(f"prefix cache off: {error}")

    # ------------------------------------------------------------------ the two forwards

    def _lm_forward(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        labels, mask = kwargs.get("labels"), kwargs.get("attention_mask")
        self._has_labels = labels is not None
        # a loss on padding would read hidden states that the cache does not keep
        self._labels_on_padding = (
            isinstance(labels, Tensor) and isinstance(mask, Tensor) and labels.shape == mask.shape
            and bool(((labels != -100) & (mask == 0)).any()))
        # A model with other modalities builds masks and embeddings before its text body is called
        self._outer = {k: v for k, v in kwargs.items() if isinstance(v, Tensor) and k != "labels"}
        try:
            return original(*args, **kwargs)
        finally:
            self._labels_on_padding = self._has_labels = False
            self._outer = {}

    def _body_forward(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = {**dict(zip(self._parameters, args, strict=False)), **kwargs}
        if self._turn is not None:
            self._turn(original, call)
            raise _PrefixDone
        training = torch.is_grad_enabled()
        start = self.prepare() if training else self.start
        if training:
            self.start = start
        if not start:
            return original(*args, **kwargs)
        if call.get("past_key_values") is not None:
            return original(*args, **kwargs)  # generation: the key-value cache needs every block
        config = self.anatomy.causal_lm.config.get_text_config(decoder=True)
        if not training:
            return self._evaluate(original, args, kwargs, call, start, config)
        if call.get("use_cache", getattr(config, "use_cache", False)):
            call["use_cache"] = False  # nothing reads keys and values of a training forward
        if self.cache is None or self._labels_on_padding or self._watched(call, config):
            self.rows_bypassed += 0 if self.cache is None else rows_in(call)
            with self._without_grad(start):
                return original(**call)
        try:
            hidden = self._prefix_of(original, call, start, config)
        except CacheRefusedError as error:
            self._refused(error)
            with self._without_grad(start):
                return original(**call)
        with self._given(start, hidden):
            return original(**call)

    def _evaluate(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any],
                  call: dict[str, Any], start: int, config: Any) -> Any:
        """A forward without gradient: from the cache where nobody asks for keys, values or states of the prefix."""
        keeps = call.get("use_cache", getattr(config, "use_cache", False)) and not self._has_labels
        if self.cache is None or keeps or self._labels_on_padding or self._watched(call, config):
            return original(*args, **kwargs)
        call["use_cache"] = False
        try:
            hidden = self._prefix_of(original, call, start, config)
        except CacheRefusedError:
            return original(*args, **kwargs)
        with self._given(start, hidden):
            return original(**call)

    @staticmethod
    def _watched(call: dict[str, Any], config: Any) -> bool:
        return any(call.get(key, getattr(config, key, False)) for key in
                   ("output_hidden_states", "output_attentions"))

    # ------------------------------------------------------------------ without a cache

    def _without_grad(self, start: int) -> Any:
        """The prefix's blocks run without grad; the last one hands on a leaf."""
        blocks = self.anatomy.blocks[:start]

        def frozen(block: nn.Module, forward: Callable[..., Any], last: bool) -> Callable[..., Any]:
            def run(*args: Any, **kwargs: Any) -> Any:
                with torch.no_grad(), not_checkpointed([block]):
                    output = forward(*args, **kwargs)
                return self._with_leaf(output, start) if last else output
            return run

        return forwards_replaced(blocks, [frozen(b, b.forward, i == start - 1) for i, b in enumerate(blocks)])

    def _with_leaf(self, output: Any, start: int) -> Any:
        if not needs_leaf(self.anatomy, start):
            return output
        return with_hidden(output, hidden_of_output(output).detach().requires_grad_(True))

    # ------------------------------------------------------------------ with a cache

    @contextlib.contextmanager
    def _given(self, start: int, hidden: Tensor, *more: tuple[nn.Module, Callable[..., Any]]) -> Iterator[None]:
        """Within the context block ``start`` reads ``hidden`` and the blocks before it do nothing; further forwards
        may be replaced with them. What embeddings give is not read, so they need not be in memory."""
        given = hidden.requires_grad_(True) if needs_leaf(self.anatomy, start) else hidden
        pairs = [*zip(self.anatomy.blocks[:start], passing_over(self.anatomy, start, given), strict=True), *more]
        if next(self.anatomy.embeddings.parameters()).is_meta:
            pairs.append((self.anatomy.embeddings, lambda *_, **__: hidden.detach()))
        with forwards_replaced([module for module, _ in pairs], [forward for _, forward in pairs]), passed_over(
                self.anatomy.blocks[:start]):
            yield

    def _current_namespace(self, start: int) -> str:
        if self._anyone is not None and self._namespace is not None:
            return self._namespace[1]
        stamp = (start, *prefix_stamp(self.anatomy, start, self._weights))
        if self._namespace is None or self._namespace[0] != stamp:
            self._namespace = (stamp, prefix_identity(self.anatomy, start, self._weights))
            if self.cache is not None:
                self.cache.starts.add(start)
        return self._namespace[1]

    def _prefix_of(self, original: Callable[..., Any], call: dict[str, Any], start: int, config: Any) -> Tensor:
        """Hidden ``start`` of a batch (B, T, d), zero on padding."""
        assert self.cache is not None
        inputs = row_inputs(call, self._outer, config, by_row=attends_by_row(self.anatomy.causal_lm.config))
        namespace = self._current_namespace(start)
        damaged = self.cache.damaged
        width = self.anatomy.hidden_size
        states = [self.cache.get(namespace, key, inputs.shape(i, width)) for i, key in enumerate(inputs.rows)]
        missing = [i for i, state in enumerate(states) if state is None]
        self.rows_cached += len(states) - len(missing)
        self.rows_computed += len(missing)
        if self._anyone is not None and self._anyone(bool(missing)) and not missing:
            missing = [0]  # another process runs the prefix, and gathers its blocks from this one
        if missing:
            if not self._probed and self.anatomy.body.training:
                self._probe(original, inputs.part(call, missing[:1]), start)
            part = call if len(missing) == len(states) else inputs.part(call, missing)
            with self._aside():
                origin, before = (0, None) if self._anyone is not None else self._nearest(inputs, missing, start)
            computed = self._compute(original, part, start, origin, before)
            self.rows_extended += len(missing) if origin else 0
            self.rows_damaged += self.cache.damaged - damaged
            for i, state in zip(missing, inputs.apart(computed, missing), strict=True):
                states[i] = state
                self.cache.put(namespace, inputs.rows[i], state)
        first = states[0]
        assert first is not None
        device = self._device_of(min(start, self.anatomy.num_blocks - 1))
        return inputs.together([s for s in states if s is not None], range(len(states)), device)

    def _probe(self, original: Callable[..., Any], call: dict[str, Any], start: int) -> None:
        """What no attribute tells (noise in a forward) shows when the same row runs twice."""
        if not torch.equal(
                *(self._compute(original, call, start) for _ in range(2))):
            raise self._noisy()
        self._probed = True

    def _noisy(self) -> CacheRefusedError:
        return CacheRefusedError(f"the prefix of {type(self.anatomy.causal_lm).__name__} is not deterministic: two "
                                 "forwards of one row differ in training mode.")

    def _nearest(self, inputs: RowInputs, rows: list[int], start: int) -> tuple[int, Tensor | None]:
        """The deepest hidden state before ``start`` that the cache has of all these rows; 0 if none."""
        assert self.cache is not None
        for origin in sorted(self.cache.starts, reverse=True):
            if not 0 < origin < start or (
                    namespace := prefix_identity(self.anatomy, origin, self._weights)) not in self.cache:
                continue
            if why_not_resume(self.anatomy.causal_lm, self.anatomy, [origin])[origin] is not None:
                continue
            width = self.anatomy.hidden_size
            states = [self.cache.peek(namespace, inputs.rows[i], inputs.shape(i, width)) for i in rows]
            if all(state is not None for state in states):
                return origin, inputs.together([s for s in states if s is not None], rows, self._device_of(origin))
        return 0, None

    def _device_of(self, block: int) -> torch.device:
        return next((p.device for p in self.anatomy.blocks[block].parameters() if not p.is_meta),
                    place_of(self.anatomy))

    def _compute(self, original: Callable[..., Any], call: dict[str, Any], start: int, origin: int = 0,
                 before: Tensor | None = None) -> Tensor:
        """Hidden ``start``, from the tokens or from hidden ``origin``."""
        reached: list[Tensor] = []
        blocks = self.anatomy.blocks[:start]
        last = blocks[-1].forward

        def stop(*args: Any, **kwargs: Any) -> Any:
            reached.append(hidden_of_output(last(*args, **kwargs)))
            raise _PrefixDone

        replaced = forwards_replaced([blocks[-1]], [stop]) if before is None else self._given(
            origin, before, (blocks[-1], stop))
        try:
            with contextlib.suppress(_PrefixDone), torch.no_grad(), not_checkpointed(blocks), replaced:
                original(**call)
        finally:
            at_rest(blocks[-1])
        if not reached:
            raise ArchitectureError(f"{type(self.anatomy.body).__name__} did not run its block {start - 1}.")
        return reached[0]

    # ------------------------------------------------------------------ block by block

    def fill(self, forwards: Sequence[Callable[[], object]], *, room: int) -> None:
        """Compute the prefix of all rows now, block by block: every batch passes block b before any enters b + 1.

        A streamed model's blocks are read once for all rows, or for as many as there is room for; the rows are what
        `_prefix_of` would compute of the same batches, bit for bit.

        Args:
            forwards: Each makes the training forward of one batch.
            room: Bytes of hidden states that may be in memory at a time.

        Raises:
            CacheRefusedError: as for the class.
        """
        start = self.prepare()
        if not start or self.cache is None or self._loaded is None:
            return
        taken: set[str] = set()
        waiting = list(forwards)
        try:
            while waiting:
                with self._aside(), torch.no_grad():
                    waiting = waiting[self._fill_some(waiting, start, room, taken):]
        except CacheRefusedError as error:
            self._refused(error)
        self._probed = True

    def _fill_some(self, forwards: Sequence[Callable[[], object]], start: int, room: int, taken: set[str]) -> int:
        """`fill` for the first batches that there is room for; returns how many."""
        assert self.cache is not None
        assert self._loaded is not None
        namespace = self._current_namespace(start)
        config = self.anatomy.causal_lm.config.get_text_config(decoder=True)
        by_row = attends_by_row(self.anatomy.causal_lm.config)
        # forward, where its rows lie, the rows that are new, their hidden state
        begun: list[tuple[Callable[[], object], RowInputs, list[int], Tensor]] = []
        seen = size = 0

        def embed(original: Callable[..., Any], call: dict[str, Any]) -> None:
            nonlocal size
            assert self.cache is not None
            if self._labels_on_padding or self._watched(call, config):
                return
            call["use_cache"] = False
            inputs = row_inputs(call, self._outer, config, by_row=by_row)
            new = [i for i, key in enumerate(inputs.rows) if key not in taken and self.cache.peek(
                namespace, key, inputs.shape(i, self.anatomy.hidden_size)) is None]
            if not new:
                return
            taken.update(inputs.rows[i] for i in new)
            part = call if len(new) == len(inputs.rows) else inputs.part(call, new)
            hidden = self._compute(original, part, 1)
            if not begun and self.anatomy.body.training and not torch.equal(
                    hidden, self._compute(original, part, 1)):
                raise self._noisy()
            begun.append((forward, inputs, new, hidden))
            size += hidden.nbytes

        with block_by_block({"base": self._loaded}) as runner:
            with runner.inputs("base"), runner.block(0, "base"):
                while seen < len(forwards) and (size <= room or not begun):
                    forward = forwards[seen]
                    self._take_turn(forward, embed)
                    seen += 1
            for b in range(1, start):
                with runner.block(b, "base"):
                    for number, (forward, inputs, new, before) in enumerate(begun):

                        def step(original: Callable[..., Any], call: dict[str, Any]) -> None:
                            call["use_cache"] = False
                            part = call if len(new) == len(inputs.rows) else inputs.part(call, new)  # noqa: B023
                            hidden = self._compute(original, part, b + 1, b, before)  # noqa: B023
                            begun[number] = (forward, inputs, new, hidden)  # noqa: B023

                        self._take_turn(forward, step)
        for _, inputs, new, hidden in begun:
            self.rows_computed += len(new)
            for i, state in zip(new, inputs.apart(hidden, new), strict=True):
                self.cache.put(namespace, inputs.rows[i], state)
        return seen

    def _take_turn(self, forward: Callable[[], object], turn: Callable[[Callable[..., Any], dict[str, Any]], None]
                   ) -> None:
        """Run a forward up to the blocks, and there what is given."""
        self._turn, self._looking = turn, False
        try:
            with contextlib.suppress(_PrefixDone):
                forward()
        finally:
            self._turn, self._looking = None, True
