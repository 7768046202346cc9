"""Whole passes side by side on a CPU's cores, instead of each operation divided among them.

A forward is some dozens of operations for each block, most of them short. Divided among cores each of them ends with a
wait for the slowest core; passes that have nothing to do with one another need not wait.
"""

from __future__ import annotations

import contextvars
import copy
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Self, TypeVar

import torch

from midblock.models.anatomy import find_anatomy
from midblock.models.load import LoadedModel

__all__ = ["Cores", "twin"]

# each worker holds activations of its own; above this cores share the work of a pass again
_MOST = 4

_Task = TypeVar("_Task")
_Found = TypeVar("_Found")


def twin(model: LoadedModel) -> LoadedModel:
    """The model with modules of its own and the same weights: hooks on one do not reach the other.

    Raises:
        TypeError, RuntimeError: a module keeps something that cannot be copied.
    """
    tensors = (*model.model.parameters(), *model.model.buffers())
    modules = copy.deepcopy(model.model, {id(t): t for t in tensors})
    return replace(model, model=modules, anatomy=find_anatomy(modules))


class Cores:
    """Threads that run tasks at once, each with twins of the models and its share of PyTorch's threads.

    On accelerators, for weights that are not all in memory, and with one thread or task, tasks run one after the
    other in the caller's thread with the models themselves. Weights must not change within the context.

    Args:
        models: Handed to every task in this order.
        tasks: How many there will be, at least.

    Attributes:
        count: Number of workers.
    """

    def __init__(self, models: Sequence[LoadedModel], tasks: int) -> None:
        self._threads = torch.get_num_threads()
        wanted = min(self._threads, tasks, _MOST) if all(_plain(m) for m in models) else 1
        self._sets = [list(models)]
        try:
            for _ in range(wanted - 1):
                twins = {key: twin(m) for key, m in {id(m): m for m in models}.items()}  # one may be given twice
                self._sets.append([twins[id(m)] for m in models])
        except (TypeError, RuntimeError):
            pass  # modules that cannot be copied are used by one worker
        self.count = len(self._sets)
        self._stopping = threading.Event()
        self._telling = threading.Lock()
        self._own = threading.local()
        self._pool: ThreadPoolExecutor | None = None

    def __enter__(self) -> Self:
        if self.count > 1:
            free = deque(self._sets)

            def begin() -> None:
                self._own.models = free.popleft()
                torch.set_num_threads(max(1, self._threads // self.count))

            self._pool = ThreadPoolExecutor(self.count, "midblock-core", initializer=begin)
        return self

    def __exit__(self, *error: object) -> None:
        if self._pool is not None:
            self._stopping.set()
            self._pool.shutdown(wait=True, cancel_futures=True)
            torch.set_num_threads(self._threads)  # the number for threads to come was changed too

    def each(self, work: Callable[[list[LoadedModel], _Task], _Found], tasks: Iterable[_Task]) -> Iterator[_Found]:
        """``work(models, task)`` of every task, in the order of the tasks; they also begin in this order.

        A task may wait for an earlier one. The grad and inference modes are a thread's own: ``work`` sets them.
        """
        if self._pool is None:
            for task in tasks:
                yield work(self._sets[0], task)
            return

        def run(task: _Task) -> _Found:
            return work(self._own.models, task)

        waiting: deque[Future[_Found]] = deque()
        for task in tasks:
            waiting.append(self._pool.submit(contextvars.copy_context().run, run, task))
            if len(waiting) > 2 * self.count:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def tell(self, say: Callable[[], None]) -> None:
        """Call ``say`` while no other worker does; long tasks call this now and then.

        Raises:
            CancelledError: the context is being left, because of an error or an interruption.
        """
        if self._stopping.is_set():
            raise CancelledError
        with self._telling:
            say()


def _plain(model: LoadedModel) -> bool:
    """Whether all weights are in a CPU's memory and no hook of accelerate's moves them."""
    return (all(p.device.type == "cpu" for p in model.model.parameters())
            and not any(hasattr(module, "_hf_hook") for module in model.model.modules()))
