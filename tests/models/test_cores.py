"""Tasks side by side on a CPU's cores: own modules, shared weights, order, errors and interruptions."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError
from dataclasses import replace

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module

from analysis_helpers import loaded
from families import FAMILIES, token_ids
from midblock.models import LoadedModel, find_anatomy
from midblock.models.cores import Cores, twin
from midblock.models.inference import laid_out


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def fresh(family: str = "llama") -> LoadedModel:
    model = FAMILIES[family]()
    return replace(loaded("llama"), model=model, anatomy=find_anatomy(model))


def in_new_thread() -> int:
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return found[0]


@pytest.mark.parametrize("family", ["llama", "llama_tied", "gemma3", "gpt2", "olmo2", "qwen3_moe"])
def test_a_twin_has_the_same_weights_and_modules_of_its_own(family: str) -> None:
    model = fresh(family)
    other = twin(model)
    ours, theirs = model.model, other.model
    assert [p.data_ptr() for p in ours.parameters()] == [p.data_ptr() for p in theirs.parameters()]
    assert [b.data_ptr() for b in ours.buffers()] == [b.data_ptr() for b in theirs.buffers()]
    assert not {id(m) for m in ours.modules()} & {id(m) for m in theirs.modules()}
    assert other.anatomy.tied == model.anatomy.tied
    assert other.anatomy.blocks[0] in list(theirs.modules())
    called = []
    handle = other.anatomy.blocks[0].register_forward_hook(lambda *a: called.append(1))
    ids = token_ids(2, 7)
    with torch.inference_mode():
        want = ours(ids).logits
        assert not called
        assert torch.equal(theirs(ids).logits, want)
    assert called == [1]
    handle.remove()


def test_a_twin_uses_the_weights_laid_out_for_the_model() -> None:
    model = FAMILIES["llama"]().bfloat16()
    one = replace(fresh(), model=model, anatomy=find_anatomy(model))
    with laid_out([one.anatomy], blocks=True) as layers:
        other = twin(one)
        if layers:
            assert "forward" in other.anatomy.head.__dict__
        ids = token_ids(2, 7)
        with torch.inference_mode():
            got = other.model(ids).logits
    with torch.inference_mode():
        assert torch.equal(got, model(ids).logits)


@pytest.mark.usefixtures("two_threads")
def test_results_come_in_order_from_workers_with_twins() -> None:
    model = fresh()
    seen: dict[int, tuple[LoadedModel, int]] = {}

    def work(models: list[LoadedModel], task: int) -> int:
        assert models[0] is models[1]  # given twice
        seen[threading.get_ident()] = (models[0], torch.get_num_threads())
        time.sleep(0.02 if task % 2 else 0)
        return task

    with Cores([model, model], 9) as cores:
        assert cores.count == 2
        assert list(cores.each(work, range(9))) == list(range(9))
    assert len(seen) == 2
    assert threading.get_ident() not in seen
    used = [m for m, _ in seen.values()]
    assert any(m is model for m in used)
    assert used[0].model is not used[1].model
    assert [threads for _, threads in seen.values()] == [1, 1]
    assert torch.get_num_threads() == in_new_thread() == 2


@pytest.mark.usefixtures("two_threads")
def test_an_error_stops_the_others_and_is_passed_on() -> None:
    begun: list[int] = []

    def work(models: list[LoadedModel], task: int) -> None:
        begun.append(task)
        if task == 3:
            raise KeyError(task)
        time.sleep(0.01)

    def run() -> None:
        with Cores([fresh()], 100) as cores:
            for _ in cores.each(work, range(100)):
                pass

    with pytest.raises(KeyError):
        run()
    assert len(begun) < 20
    assert torch.get_num_threads() == in_new_thread() == 2


@pytest.mark.usefixtures("two_threads")
def test_an_interruption_ends_running_tasks_where_they_tell() -> None:
    told: list[int] = []
    ended: list[str] = []
    running = threading.Event()

    def work(models: list[LoadedModel], task: int) -> int:
        if task == 0:
            return task
        running.set()
        try:
            for step in range(10_000):
                time.sleep(0.001)
                cores.tell(lambda step=step: told.append(step))
        except CancelledError:
            ended.append("cancelled")
            raise
        return task

    def run() -> None:
        with cores:
            for _ in cores.each(work, range(4)):
                assert running.wait(10)
                raise KeyboardInterrupt

    cores = Cores([fresh()], 4)
    with pytest.raises(KeyboardInterrupt):
        run()
    assert ended
    assert set(ended) == {"cancelled"}
    assert len(told) < 10_000
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("two_threads")
def test_a_task_may_wait_for_an_earlier_one() -> None:
    done = [threading.Event() for _ in range(8)]

    def work(models: list[LoadedModel], task: int) -> int:
        if task:
            assert done[task - 1].wait(10)
        done[task].set()
        return task

    with Cores([fresh()], 8) as cores:
        assert list(cores.each(work, range(8))) == list(range(8))


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("why", ["one task", "one thread", "weights that are moved", "a lock", "a result"])
def test_one_worker_is_the_caller_with_the_models_themselves(why: str) -> None:
    model = fresh()
    if why == "one thread":
        torch.set_num_threads(1)
    if why == "weights that are moved":
        add_hook_to_module(model.anatomy.blocks[0], ModelHook())
    if why == "a lock":  # neither can be copied
        model.model.lock = threading.Lock()
    if why == "a result":
        model.model.kept = next(model.model.parameters()) * 2

    def work(models: list[LoadedModel], task: int) -> tuple[int, LoadedModel]:
        return threading.get_ident(), models[0]

    with Cores([model], 1 if why == "one task" else 5) as cores:
        assert cores.count == 1
        told = []
        cores.tell(lambda: told.append(1))
        (where, used), *_ = cores.each(work, range(5))
    assert told == [1]
    assert where == threading.get_ident()
    assert used is model
