"""Running a model's blocks: every hidden state as it comes, from any block on, several models in lockstep.

All of it works on unmodified transformers models, through hooks on the blocks that
`midblock.models.find_anatomy` found:

* `run_blocks` calls a listener with hidden 0..L and stops before final norm and head; with ``start`` it
  resumes from a block (`midblock.capture.interventions.resume_at`).
* `Lockstep` suspends several forwards at every block (each is a greenlet), so that the
  same hidden of all stages, or of all batches, is there at once and nothing else is kept.

Hidden h is 0..L: 0 is the input of block 0, b+1 the output of block b, never normed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any
from weakref import WeakKeyDictionary

import torch
from greenlet import greenlet
from torch import Tensor, nn

from midblock.capture.interventions import hidden_of_call, hidden_of_output, resume_at
from midblock.data import Batch
from midblock.errors import ArchitectureError
from midblock.models import Anatomy

__all__ = ["Listener", "Lockstep", "model_inputs", "run_blocks", "text_inputs"]

Listener = Callable[[int, Tensor], None]

# Each greenlet has a context of its own, so suspended forwards keep their own listeners.
_listener: ContextVar[Listener | None] = ContextVar("midblock_listener", default=None)
_watchers: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()  # how many contexts share the hooks
_handles: WeakKeyDictionary[nn.Module, list[Any]] = WeakKeyDictionary()


class _LastHiddenReached(Exception):
    """Ends a forward after the last block: nothing behind it is needed."""


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

    An encoder-decoder gets the text in its encoder and, shifted right by one, in its decoder; of a row that has
    labels the encoder gets what stands before the first of them, the prompt.
    """
    return text_inputs(model, batch.input_ids, batch.attention_mask, batch.labels)


def text_inputs(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None) -> dict[str, Any]:
    """`model_inputs` of tensors (B, T)."""
    inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
    config: Any = model.config
    if getattr(config, "is_encoder_decoder", False):
        start = config.decoder_start_token_id
        start = config.pad_token_id if start is None else start
        first = torch.full_like(input_ids[:, :1], 0 if start is None else start)
        inputs["decoder_input_ids"] = torch.cat([first, input_ids[:, :-1]], dim=1)
        inputs["decoder_attention_mask"] = attention_mask
        if labels is not None:
            prompt = attention_mask * ((labels != -100).cumsum(dim=1) == 0)
            inputs["attention_mask"] = torch.where(prompt.any(dim=1, keepdim=True), prompt, attention_mask)
    return inputs


def run_blocks(model: nn.Module, anatomy: Anatomy, batch: Batch, *, listener: Listener | None = None,
               start: int = 0, hidden: Tensor | None = None, stop: int | None = None) -> Tensor:
    """Run all blocks (from ``start`` on, to before ``stop``) and return the hidden state behind them.

    Args:
        model: The whole model, in eval mode for deterministic results.
        anatomy: Its anatomy.
        batch: Token ids and mask (B, T) on the model's device.
        listener: Called with (h, Z (B, T, d)) for hidden ``start``..L. It must not keep Z if
            memory matters, and must not change it.
        start: First block to run; the ones before it are passed over.
        hidden: Input of block ``start`` (B, T, d); needed when ``start`` > 0.
        stop: Hidden state to stop at, 0..L; default L.

    Returns:
        Hidden ``stop`` (B, T, d), never normed.

    Raises:
        ArchitectureError: the model did not call its blocks as expected.
    """
    found: list[Tensor] = []
    last = len(anatomy.blocks) if stop is None else stop

    def tell(h: int, z: Tensor) -> None:
        if h < start:
            return
        if listener is not None:
            listener(h, z)
        if h == last:
            found.append(z)
            raise _LastHiddenReached

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
        raise ArchitectureError(f"{type(model).__name__} did not come to hidden {last} of the {len(anatomy.blocks)} "
                                f"blocks found in {anatomy.blocks_path}; its forward is not a plain chain of them.")
    return found[0]


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
