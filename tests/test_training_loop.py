"""The training loop against plain PyTorch and against TRL's trainer, bit for bit."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from families import FAMILIES, token_ids
from midblock.data import TokenRow
from midblock.errors import TrainingError
from midblock.training import MasterAdamW, training_steps


def problem(dtype: torch.dtype = torch.float32) -> tuple[nn.Linear, list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(6, 1, bias=False)
    layer.weight.data = torch.randn(1, 6, generator=generator).to(dtype)
    return layer, [torch.randn(5, 6, generator=generator).to(dtype) for _ in range(7)]


def loss_of(layer: nn.Linear) -> Any:
    return lambda x: (layer(x).float() - 1).square().mean()


def test_it_is_the_textbook_loop() -> None:
    layer, batches = problem()
    want, _ = problem()
    optimizer = torch.optim.SGD(want.parameters(), lr=0.0)
    losses, norms = [], []
    for i, x in enumerate(batches):
        want.weight.grad = None
        loss = loss_of(want)(x)
        loss.backward()
        assert want.weight.grad is not None
        norm = float(want.weight.grad.norm())
        want.weight.grad *= min(1.0, 0.5 / norm)
        optimizer.param_groups[0]["lr"] = 0.1 / (i + 1)
        optimizer.step()
        losses.append(loss.item())
        norms.append(norm)
    seen: list[tuple[int, float]] = []
    steps = list(training_steps(batches, loss_of(layer), list(layer.parameters()), torch.optim.SGD(layer.parameters()),
                                max_grad_norm=0.5, learning_rate=lambda i: 0.1 / (i + 1),
                                on_gradients=lambda i, v: seen.append((i, v))))
    assert [s.number for s in steps] == list(range(1, 8))
    assert [s.loss for s in steps] == pytest.approx(losses)
    assert [s.gradient_norm for s in steps] == pytest.approx(norms)
    assert seen == [(i, s.loss) for i, s in enumerate(steps)]
    assert torch.allclose(layer.weight, want.weight, atol=1e-6)


def test_a_loop_that_stops_goes_on_where_it_was() -> None:
    whole, batches = problem()
    list(training_steps(batches, loss_of(whole), list(whole.parameters()), torch.optim.SGD(whole.parameters(), 0.1)))
    cut, _ = problem()
    update = torch.optim.SGD(cut.parameters(), 0.1)
    for step in training_steps(batches, loss_of(cut), list(cut.parameters()), update):
        if step.number == 3:
            break
    rest = training_steps(batches[3:], loss_of(cut), list(cut.parameters()), update, first=3)
    assert next(rest).number == 4
    list(rest)
    assert torch.equal(cut.weight, whole.weight)


@pytest.mark.parametrize("limit", [None, math.inf, 1.0])
def test_what_is_not_finite_stops_before_the_update(limit: float | None) -> None:
    layer, batches = problem()
    batches[2] = batches[2] * math.inf
    update = torch.optim.SGD(layer.parameters(), 0.1)
    steps = training_steps(batches, loss_of(layer), list(layer.parameters()), update, max_grad_norm=limit)
    next(steps), next(steps)
    before = layer.weight.detach().clone()
    with pytest.raises(TrainingError, match=r"(loss|gradient) became (nan|inf) in step 3"):
        next(steps)
    assert torch.equal(layer.weight, before)


def test_a_gradient_that_is_not_finite_stops_too() -> None:
    weight = nn.Parameter(torch.zeros(1))  # the slope of the root of 0 is infinite, its value is not
    steps = training_steps([0], lambda _: weight.sqrt().sum(), [weight], torch.optim.SGD([weight], 0.1),
                           max_grad_norm=math.inf)
    with pytest.raises(TrainingError, match="gradient became inf in step 1"):
        next(steps)
    assert weight.item() == 0


def test_small_updates_of_16_bit_weights_add_up() -> None:
    exact, batches = problem()
    exact.weight.data = exact.weight.data.bfloat16().float()
    small, _ = problem(torch.bfloat16)
    masters = MasterAdamW(small.parameters(), 1e-4)
    list(training_steps(batches * 20, loss_of(exact), list(exact.parameters()), MasterAdamW(exact.parameters(), 1e-4)))
    list(training_steps([b.bfloat16() for b in batches] * 20, loss_of(small), list(small.parameters()), masters))
    got = masters.trained()[id(small.weight)]
    assert (got - exact.weight).abs().max() < 0.2 * (exact.weight - problem()[0].weight.bfloat16().float()).abs().max()
    assert torch.equal(small.weight, got.bfloat16())


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_it_gives_the_weights_that_trl_gives(tiny_tokenizer: Any) -> None:
    """Same batches, rate, limit and optimizer: equal to the last bit."""
    from transformers import get_scheduler

    from midblock.models import find_anatomy
    from midblock.tuning import TrainSettings, attach, make_plan, train
    from midblock.tuning.kernels import supervised_loss

    rows = [TokenRow(i, tuple(token_ids(1, 8, seed=i)[0].tolist()), ((3, 8),)) for i in range(4)]
    settings = TrainSettings(steps=6, batch_size=4, learning_rate=1e-2, warmup=0.34, max_grad_norm=0.3, lean=False)
    model = FAMILIES["llama"]()
    plan = make_plan(model, mask="0110", rank=4)
    with attach(model, plan) as attachment:
        theirs = train(attachment, rows, tokenizer=tiny_tokenizer, settings=settings, cache="none",
                       optim="adamw_torch")
        want = attachment.state()
    with attach(model, plan) as attachment:
        ids = torch.tensor([list(r.ids) for r in rows])
        labels = ids.clone()
        labels[:, :3] = -100
        # rows of one length: TRL sees them in an order of its own, which no sum of equal rows depends on
        from midblock.tuning.batching import batch_plan

        order = batch_plan([8] * 4, 4, 0)[0]
        batch = {"input_ids": ids[order], "attention_mask": torch.ones_like(ids), "labels": labels[order]}
        parameters = list(attachment.trainable.values())
        optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0)
        schedule = get_scheduler("linear", optimizer, num_warmup_steps=2, num_training_steps=6)
        rates = []
        for _ in range(6):
            rates.append(schedule.get_last_lr()[0])
            schedule.step()
        anatomy = find_anatomy(model)
        attachment.model.train()
        steps = list(training_steps([batch] * 6, lambda b: supervised_loss(anatomy, b, plain=True), parameters,
                                    optimizer, max_grad_norm=0.3, learning_rate=rates.__getitem__))
        got = attachment.state()
    assert [s.loss for s in steps] == theirs.losses
    assert all(torch.equal(got[n], want[n]) for n in want)
