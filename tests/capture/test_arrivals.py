"""Results that arrive later than they were made: same values, put in place when somebody looks."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from midblock import metrics
from midblock.capture.arrivals import Arrivals, to_device
from midblock.capture.scoring import counted_positions, counted_tokens
from midblock.data import Batch
from midblock.metrics._inputs import finite_checks_together


@pytest.mark.parametrize("wait", [False, True])
@pytest.mark.parametrize("limit", [1, 1 << 20])
def test_pieces_are_where_they_belong_after_settling(wait, limit):
    arrivals, target, want = Arrivals(wait=wait, limit=limit), torch.zeros(3, 5, dtype=torch.float64), torch.zeros(3, 5)
    generator = torch.Generator().manual_seed(0)
    for h in range(3):
        rows = torch.randperm(5, generator=generator)[:2]
        values = torch.randn(2, generator=generator)
        want[h, rows] = values
        arrivals.put(target, (h, rows), values)
        values.zero_()  # they may change once handed over
    arrivals.settle()
    arrivals.settle()
    assert torch.equal(target, want.double())


def test_nothing_is_put_in_place_before_it_is_asked_for_or_too_much_is_on_the_way():
    arrivals, target = Arrivals(wait=True, limit=32), torch.zeros(8)
    arrivals.put(target, slice(0, 4), torch.ones(4))
    assert not target.any()
    arrivals.put(target, slice(4, 8), torch.ones(4))
    assert target.all()


@pytest.mark.parametrize("encoder_decoder", [False, True])
def test_counted_tokens_are_those_of_the_mask(encoder_decoder):
    anatomy = SimpleNamespace(causal_lm=SimpleNamespace(config=SimpleNamespace(is_encoder_decoder=encoder_decoder)))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 50, (4, 7), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 4:] = mask[3, 1:] = 0
    batch = Batch((0, 1, 2, 3), ids, mask)
    hidden = torch.randn(4, 7, 3, generator=generator)
    found, counts = counted_tokens(batch, hidden.device, anatomy), counted_positions(batch)
    # a decoder whose text is shifted right has read token t only in its next state
    assert torch.equal(found.of(hidden), (hidden.roll(-1, dims=1) if encoder_decoder else hidden)[counts])
    assert torch.equal(found.target, ids.roll(-1, dims=1)[counts])
    assert torch.equal(found.row, counts.nonzero()[:, 0])
    assert torch.equal(found.position, counts.nonzero()[:, 1])
    assert found.tokens.tolist() == counts.sum(1).tolist()
    assert batch.to("cpu") is batch
    assert torch.equal(to_device(ids, torch.device("cpu")), ids)


def test_checks_that_wait_find_what_single_ones_find():
    good, bad = torch.ones(2, 3, 4), torch.ones(2, 3, 4)
    bad[1, 2, 0] = float("nan")
    with finite_checks_together(everywhere=True) as checks:
        assert metrics.sparsity(good).isfinite().all()
        checks.settle()

    def two():
        with finite_checks_together(everywhere=True):
            metrics.sparsity(bad)
            metrics.sparsity(good)

    with pytest.raises(ValueError, match="holds NaN or infinity"):
        two()
    with finite_checks_together(everywhere=True) as checks:
        metrics.sparsity(bad)
        for _ in range(2):  # what is broken stays so: nothing of it may be saved
            with pytest.raises(ValueError, match="holds NaN"):
                checks.settle()
        checks._broken = None
    with pytest.raises(ValueError, match="holds NaN"), finite_checks_together():
        metrics.sparsity(bad)  # on the CPU at once
