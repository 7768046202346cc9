"""Watching blocks while a model is tuned: it changes nothing, and what it says is what independent sums say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from families import BLOCKS, FAMILIES
from midblock.capture import run_blocks
from midblock.data import TokenRow, make_batches
from midblock.models.adapters import base_weight, merged_weight
from midblock.tuning import TrainSettings, attach, make_plan, train
from midblock.tuning.adapter import adapted_layer
from tuning.test_training import FAST, rows

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


class Heard(TrainerCallback):
    def __init__(self) -> None:
        self.blocks: dict[str, float] = {}
        self.logs = 0

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        assert logs is not None
        self.blocks |= {f"{state.global_step}:{k}": v for k, v in logs.items() if k.startswith("blocks/")}
        self.logs += "loss" in logs


def trained(tokenizer: Any, *, plan: dict[str, Any], dropout: float = 0.0, settings: TrainSettings = FAST,
            **options: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    model = FAMILIES["llama"]()
    with attach(model, make_plan(model, **plan), dropout=dropout) as attachment:
        result = train(attachment, rows(), tokenizer=tokenizer, settings=settings, **options)
        return result, attachment.state()


@pytest.mark.parametrize(("plan", "dropout", "cache"), [
    ({"mask": "0010", "rank": 4}, 0.2, "none"), ({"mask": "0010", "rank": 4}, 0.0, "memory"),
    ({"mask": "01", "method": "full"}, 0.0, "none")])
def test_the_trainings_numbers_are_the_same_bit_by_bit(plan: dict[str, Any], dropout: float, cache: str,
                                                       tiny_tokenizer: Any) -> None:
    plain, state = trained(tiny_tokenizer, plan=plan, dropout=dropout, cache=cache)
    watched, same = trained(tiny_tokenizer, plan=plan, dropout=dropout, cache=cache, watch_blocks=True)
    assert watched.losses == plain.losses
    assert all(torch.equal(state[n], same[n]) for n in state)
    assert plain.blocks == []
    assert {s.block for s in watched.blocks} == set(range(BLOCKS))
    assert watched.prefix == plain.prefix


@pytest.mark.parametrize("plan", [{"mask": "0110", "rank": 4}, {"mask": "0110", "rank": 2, "method": "dora"},
                                  {"mask": "01", "method": "full"}])
def test_updates_and_drift_are_those_of_independent_sums(plan: dict[str, Any], tiny_tokenizer: Any) -> None:
    model = FAMILIES["llama"]()
    data = [TokenRow(r.index, r.ids, r.supervised) for r in rows()]
    with attach(model, make_plan(model, **plan)) as attachment:
        result = train(attachment, data, tokenizer=tiny_tokenizer, settings=FAST, watch_blocks=True)
        last = {s.block: s for s in result.blocks if s.step == len(result.steps)}
        squares: dict[int, float] = {}
        if attachment.is_peft:
            for module in attachment.plan.modules:
                layer = adapted_layer(attachment.base, module)
                change = merged_weight(layer) - base_weight(layer)
                squares[module.block] = squares.get(module.block, 0.0) + float(change.double().square().sum())
        else:
            for name, parameter in attachment.trainable.items():
                block = attachment.anatomy.block_of(name)
                assert block is not None
                change = parameter.detach().double() - attachment._original[name].double()
                squares[block] = squares.get(block, 0.0) + float(change.square().sum())
        for block in range(BLOCKS):
            if block in squares:
                assert last[block].update_norm == pytest.approx(squares[block] ** 0.5, rel=1e-4)
                assert last[block].gradient_norm is not None
                assert last[block].gradient_norm > 0
            else:
                assert (last[block].update_norm, last[block].gradient_norm) == (None, None)
        probe = make_batches([TokenRow(i, r.ids[:32]) for i, r in enumerate(data[:2])], batch_size=2, pad_id=0)[0]
        states: dict[str, dict[int, torch.Tensor]] = {"now": {}, "then": {}}
        anatomy = attachment.anatomy

        def keep(into: dict[int, torch.Tensor]) -> Any:
            return lambda h, z: into.__setitem__(h, z.clone())

        with torch.no_grad():
            run_blocks(attachment.base, anatomy, probe, listener=keep(states["now"]))
            with attachment.disabled():
                run_blocks(attachment.base, anatomy, probe, listener=keep(states["then"]))
        mask = probe.attention_mask > 0
        for block in range(BLOCKS):
            a, b = (states[k][block + 1][mask].double() for k in ("now", "then"))
            cosine = (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))
            assert last[block].drift == pytest.approx(1 - float(cosine.mean()), abs=1e-5)
    first = min(squares)
    assert all(last[b].drift == pytest.approx(0, abs=1e-6) for b in range(first))
    assert last[BLOCKS - 1].drift > 1e-4


def test_the_gradient_norm_is_what_the_optimizer_gets(tiny_tokenizer: Any) -> None:
    class Reader(TrainerCallback):
        norms: list[float] = []  # noqa: RUF012 (one test's)

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            square = sum(float(p.grad.double().square().sum()) for p in model.parameters() if p.grad is not None)
            self.norms.append(square ** 0.5)

    reader = Reader()
    result, _ = trained(tiny_tokenizer, plan={"mask": "0110", "rank": 4}, watch_blocks=True, callbacks=[reader])
    for step in {s.step for s in result.blocks}:
        square = sum((s.gradient_norm or 0.0) ** 2 for s in result.blocks if s.step == step)
        assert square ** 0.5 == pytest.approx(reader.norms[step - 1], rel=1e-5)


def test_trackers_hear_every_block_and_the_trainers_own_log_still_comes(tiny_tokenizer: Any) -> None:
    heard = Heard()
    settings = FAST.replace(epochs=8)
    result, _ = trained(tiny_tokenizer, plan={"mask": "0010", "rank": 4}, settings=settings, watch_blocks=True,
                        callbacks=[heard])
    assert heard.logs == len(result.steps) // 10
    measured = sorted({s.step for s in result.blocks})
    assert measured[0] == 1
    assert measured[-1] == len(result.steps)
    assert len(measured) <= 13
    last = next(s for s in result.blocks if s.step == measured[-1] and s.block == 2)
    assert heard.blocks[f"{measured[-1]}:blocks/drift/002"] == last.drift
    assert f"{measured[-1]}:blocks/gradient_norm/000" not in heard.blocks


def test_an_interrupted_run_keeps_what_was_measured(tiny_tokenizer: Any, tmp_path: Any) -> None:
    plan = {"mask": "0010", "rank": 4}
    want, _ = trained(tiny_tokenizer, plan=plan, folder=tmp_path / "whole", watch_blocks=True)

    def stop(what: str, done: float, total: float, note: str = "") -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(tiny_tokenizer, plan=plan, folder=tmp_path / "cut", save_steps=2, progress=stop, watch_blocks=True)
    found, _ = trained(tiny_tokenizer, plan=plan, folder=tmp_path / "cut", save_steps=2, resume=True,
                       watch_blocks=True)
    assert [(s.step, s.block) for s in found.blocks] == [(s.step, s.block) for s in want.blocks]
    assert [s.drift for s in found.blocks] == pytest.approx([s.drift for s in want.blocks], abs=1e-6)


def test_a_model_that_cannot_be_probed_is_trained_all_the_same(tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch,
                                                               caplog: pytest.LogCaptureFixture) -> None:
    from midblock.tuning import block_watch

    def fail(*_: Any) -> Any:
        raise TypeError("no such argument")

    monkeypatch.setattr(block_watch, "model_inputs", fail)
    result, _ = trained(tiny_tokenizer, plan={"mask": "0010", "rank": 4}, watch_blocks=True)
    assert result.blocks == []
    assert "blocks are not watched" in caplog.text
