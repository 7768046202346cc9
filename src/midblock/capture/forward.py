"""Running a model's blocks: every hidden state as it comes, resume from a block, lockstep.

All three work on unmodified transformers models, through hooks on the blocks that
`midblock.models.find_anatomy` found:

* `run_blocks` calls a listener with hidden 0..L and stops before final norm and head.
* `resume_at` makes the blocks before ``start`` pass-through and replaces the input of block
  ``start``; the model still computes its own masks and position embeddings.
* `Lockstep` suspends several forwards at every block (each is a greenlet), so that the
  same hidden of all stages, or of all batches, is there at once and nothing else is kept.

Hidden h is 0..L: 0 is the input of block 0, b+1 the output of block b, never normed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any
from weakref import WeakKeyDictionary

import torch
from greenlet import greenlet
from torch import Tensor, nn

from midblock.data import Batch
from midblock.errors import ArchitectureError
from midblock.models.anatomy import Anatomy

__all__ = ["Listener", "Lockstep", "block_returns_tuple", "forwards_replaced", "hidden_of_call", "hidden_of_output",
           "model_inputs", "replace_hidden", "resume_at", "run_blocks", "run_layer_major", "verify_resume"]

Listener = Callable[[int, Tensor], None]

# Each greenlet has a context of its own, so suspended forwards keep their own listeners.
_listener: ContextVar[Listener | None] = ContextVar("midblock_listener", default=None)
_watchers: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()  # how many contexts share the hooks
_handles: WeakKeyDictionary[nn.Module, list[Any]] = WeakKeyDictionary()


class _LastHiddenReached(Exception):
    """Ends a forward after the last block: nothing behind it is needed."""


def hidden_of_call(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """Hidden states among a block's call arguments."""
    value = args[0] if args else kwargs.get("hidden_states")
    if not isinstance(value, Tensor):
        raise ArchitectureError("a block was called without a hidden-states tensor as its first argument "
                                f"or as hidden_states= (found {type(value).__name__}).")
    return value


def replace_hidden(args: tuple[Any, ...], kwargs: dict[str, Any], hidden: Tensor) -> tuple[Any, Any]:
    """The same call arguments with other hidden states."""
    if args:
        return (hidden, *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": hidden}


def hidden_of_output(output: Any) -> Tensor:
    """Hidden states in a block's return value (a tensor, or the first of a tuple)."""
    value = output[0] if isinstance(output, tuple | list) else output
    if not isinstance(value, Tensor):
        raise ArchitectureError(f"a block returned {type(value).__name__}, not hidden states.")
    return value


@contextlib.contextmanager
def _watch(anatomy: Anatomy) -> Iterator[None]:
    """Hooks on all blocks that tell the current context's listener; nested use shares them."""
    owner = anatomy.body
    if not _watchers.get(owner):
        _handles[owner] = _install_hooks(anatomy)
    _watchers[owner] = _watchers.get(owner, 0) + 1
    try:
        yield
    finally:
        _watchers[owner] -= 1
        if not _watchers[owner]:
            for handle in _handles.pop(owner):
                handle.remove()


def _install_hooks(anatomy: Anatomy) -> list[Any]:
    last = len(anatomy.blocks) - 1

    def before(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if (listener := _listener.get()) is not None:
                listener(index, hidden_of_call(args, kwargs))
        return hook

    def after(module: nn.Module, args: Any, output: Any) -> None:
        if (listener := _listener.get()) is not None:
            listener(last + 1, hidden_of_output(output))
            raise _LastHiddenReached

    handles: list[Any] = [block.register_forward_pre_hook(before(i), with_kwargs=True)
                          for i, block in enumerate(anatomy.blocks)]
    handles.append(anatomy.blocks[last].register_forward_hook(after))
    return handles


def model_inputs(model: nn.Module, batch: Batch) -> dict[str, Any]:
    """Keyword arguments for ``model(...)``.

    An encoder-decoder gets the text in its encoder and, shifted right by one, in its decoder.
    """
    inputs: dict[str, Any] = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask,
                              "use_cache": False}
    config: Any = model.config
    if getattr(config, "is_encoder_decoder", False):
        start = config.decoder_start_token_id
        start = config.pad_token_id if start is None else start
        first = torch.full_like(batch.input_ids[:, :1], 0 if start is None else start)
        inputs["decoder_input_ids"] = torch.cat([first, batch.input_ids[:, :-1]], dim=1)
        inputs["decoder_attention_mask"] = batch.attention_mask
    return inputs


def run_blocks(model: nn.Module, anatomy: Anatomy, batch: Batch, *, listener: Listener | None = None,
               start: int = 0, hidden: Tensor | None = None) -> Tensor:
    """Run all blocks (from ``start`` on) and return hidden L.

    Args:
        model: The whole model, in eval mode for deterministic results.
        anatomy: Its anatomy.
        batch: Token ids and mask (B, T) on the model's device.
        listener: Called with (h, Z (B, T, d)) for hidden ``start``..L. It must not keep Z if
            memory matters, and must not change it.
        start: First block to run; the ones before it are passed over.
        hidden: Input of block ``start`` (B, T, d); needed when ``start`` > 0.

    Returns:
        Hidden L (B, T, d): the output of the last block before any final norm.

    Raises:
        ArchitectureError: the model did not call its blocks as expected.
    """
    found: list[Tensor] = []
    last = len(anatomy.blocks)

    def tell(h: int, z: Tensor) -> None:
        if h < start:
            return
        if listener is not None:
            listener(h, z)
        if h == last:
            found.append(z)

    token = _listener.set(tell)
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(_watch(anatomy))
            if start > 0:
                if hidden is None:
                    raise ValueError("resuming from a block needs its input: pass hidden=")
                stack.enter_context(resume_at(anatomy, start, hidden))
            with contextlib.suppress(_LastHiddenReached):
                model(**model_inputs(model, batch))
    finally:
        _listener.reset(token)
    if not found:
        raise ArchitectureError(f"{type(model).__name__} did not run the last of the {last} blocks found in "
                                f"{anatomy.blocks_path}; its forward is not a plain chain of them.")
    return found[0]


_RETURNS_TUPLE = "_midblock_returns_tuple"


def block_returns_tuple(anatomy: Anatomy) -> bool:
    """Whether blocks return a tuple; `verify_resume` learns it from one forward and remembers it.

    Raises:
        ArchitectureError: the model was not verified.
    """
    block = anatomy.blocks[0]
    known = getattr(block, _RETURNS_TUPLE, None)
    if known is not None:
        return bool(known)
    raise ArchitectureError("resume_at was used before verify_resume(model, anatomy) was called.")


@contextlib.contextmanager
def resume_at(anatomy: Anatomy, start: int, hidden: Tensor) -> Iterator[None]:
    """Within the context the blocks before ``start`` do nothing and block ``start`` reads ``hidden``.

    Call `verify_resume` once per model first: it proves that this is exact there.

    Raises:
        ArchitectureError: the model was not verified.
        ValueError: ``start`` is not 0..L-1.
    """
    if not 0 <= start < len(anatomy.blocks):
        raise ValueError(f"start {start} is not a block (0..{len(anatomy.blocks) - 1})")
    tuples = block_returns_tuple(anatomy)
    if start == 0:
        def feed(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return replace_hidden(args, kwargs, hidden)

        # prepended: a listener on the same block must see the replaced hidden
        handle = anatomy.blocks[0].register_forward_pre_hook(feed, with_kwargs=True, prepend=True)
        try:
            yield
        finally:
            handle.remove()
        return

    def passed_over(*args: Any, **kwargs: Any) -> Any:
        value = hidden_of_call(args, kwargs)
        return (value,) if tuples else value

    def fed(*args: Any, **kwargs: Any) -> Any:
        return (hidden,) if tuples else hidden

    # The last block passed over returns the given hidden, so that block ``start`` is called with it
    # as if nothing had happened: gradient checkpointing keeps it for its second forward.
    with forwards_replaced(anatomy.blocks[:start], [passed_over] * (start - 1) + [fed]):
        yield


@contextlib.contextmanager
def forwards_replaced(blocks: Sequence[nn.Module], forwards: Sequence[Callable[..., Any]]) -> Iterator[None]:
    """Within the context each block's ``forward`` is the given function; restored also after errors."""
    before = [b.__dict__.get("forward") for b in blocks]
    try:
        for block, forward in zip(blocks, forwards, strict=True):
            block.forward = forward
        yield
    finally:
        for block, previous in zip(blocks, before, strict=True):
            if previous is None:
                block.__dict__.pop("forward", None)
            else:
                block.forward = previous


def verify_resume(model: nn.Module, anatomy: Anatomy) -> None:
    """Prove on a tiny batch that resuming gives the same hidden L; remembered per model.

    Raises:
        ArchitectureError: it does not (a block hands more than hidden states to the next
            one, such as T5's position bias, or blocks share state).
    """
    first = anatomy.blocks[0]
    if getattr(first, _RETURNS_TUPLE, None) is not None:
        return
    outputs: list[Any] = []
    handle = first.register_forward_hook(lambda module, args, output: outputs.append(output))
    device = next(anatomy.embeddings.parameters()).device
    ids = torch.arange(2, 12, device=device).reshape(2, 5) % anatomy.vocab_size
    batch = Batch(indices=(0, 1), input_ids=ids, attention_mask=torch.ones_like(ids))
    states: dict[int, Tensor] = {}
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            want = run_blocks(model, anatomy, batch, listener=lambda h, z: states.__setitem__(h, z.clone()))
            handle.remove()
            output = outputs[0]
            extra = output[1:] if isinstance(output, tuple) else ()
            if any(isinstance(e, Tensor) for e in extra):
                raise ArchitectureError(
                    f"cannot resume {type(model).__name__} from a block: its blocks hand further tensors to "
                    "the next block besides hidden states (a shared position bias, say).")
            setattr(first, _RETURNS_TUPLE, isinstance(output, tuple))
            for start in {1, len(anatomy.blocks) // 2, len(anatomy.blocks) - 1} - {0, len(anatomy.blocks)}:
                got = run_blocks(model, anatomy, batch, start=start, hidden=states[start])
                if not torch.equal(got, want):
                    delattr(first, _RETURNS_TUPLE)
                    raise ArchitectureError(
                        f"cannot resume {type(model).__name__} from block {start}: the last hidden state "
                        f"differs by {(got - want).abs().max().item():.3g}; its blocks share more than "
                        "hidden states.")
    finally:
        handle.remove()
        model.train(training)


class Lockstep:
    """Several forwards that all stop at hidden 0, then 1, ... L.

    Enter ``torch.inference_mode()`` (or ``no_grad``) ONCE around all of it: grad mode
    belongs to the thread, and a forward suspended inside such a context would leak it.

    Args:
        runs: name -> (model, anatomy, batch), all with the same number of blocks.

    Example:
        ``for h, states in Lockstep({"base": (...), "sft": (...)}): feed(h, states)``
    """

    def __init__(self, runs: Mapping[str, tuple[nn.Module, Anatomy, Batch]]) -> None:
        self._runs = dict(runs)
        depths = {a.num_blocks for _, a, _ in self._runs.values()}
        if len(depths) != 1:
            raise ValueError(f"models in lockstep need equal depth, got {sorted(depths)}")
        self.num_blocks = depths.pop()

    def __iter__(self) -> Iterator[tuple[int, dict[str, Tensor]]]:
        anatomies = {id(a.body): a for _, a, _ in self._runs.values()}
        with contextlib.ExitStack() as stack:
            for anatomy in anatomies.values():
                stack.enter_context(_watch(anatomy))
            workers = {name: self._start(*run) for name, run in self._runs.items()}
            try:
                for h in range(self.num_blocks + 1):
                    yield h, {name: _advance(worker, h) for name, worker in workers.items()}
            finally:
                for worker in workers.values():
                    if not worker.dead:
                        worker.parent = greenlet.getcurrent()
                        worker.throw()

    @staticmethod
    def _start(model: nn.Module, anatomy: Anatomy, batch: Batch) -> greenlet:
        def work() -> None:
            me = greenlet.getcurrent()
            run_blocks(model, anatomy, batch, listener=lambda h, z: me.parent.switch((h, z)))
        return greenlet(work)


def _advance(worker: greenlet, h: int) -> Tensor:
    # whoever asks becomes the parent that the worker hands its hidden to
    worker.parent = greenlet.getcurrent()
    result = worker.switch()
    if not isinstance(result, tuple):
        raise ArchitectureError(f"a forward ended before hidden {h}.")
    reached, z = result
    if reached != h:
        raise ArchitectureError(f"a model ran block {reached} where {h} was due; its blocks do not run in order.")
    state: Tensor = z
    return state


def run_layer_major(runs: Sequence[Mapping[str, tuple[nn.Module, Anatomy, Batch]]]
                    ) -> Iterator[tuple[int, int, dict[str, Tensor]]]:
    """Advance every batch to hidden h before any goes on: yields (h, batch number, states).

    This is the order of the streamed pass: block b's weights are needed once, for all batches.
    """
    iterators = [iter(Lockstep(run)) for run in runs]
    try:
        for _ in range(Lockstep(runs[0]).num_blocks + 1):
            for number, iterator in enumerate(iterators):
                h, states = next(iterator)
                yield h, number, states
    finally:
        for iterator in iterators:
            iterator.close()  # type: ignore[attr-defined]
