"""Next-token quantities against loops in NumPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from midblock import metrics


def softmax(row: np.ndarray) -> np.ndarray:
    e = np.exp(row - row.max())
    return e / e.sum()


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(7, 50, generator=torch.Generator().manual_seed(0)) * 4


def test_token_statistics_equal_a_loop(logits):
    target = torch.arange(7)
    found = metrics.token_statistics(metrics.distribution(logits), target)
    for i, row in enumerate(logits.double().numpy()):
        p = softmax(row)
        assert found.loss[i].item() == pytest.approx(-math.log(p[i]), rel=1e-5)
        assert found.probability[i].item() == pytest.approx(p[i], rel=1e-5)
        assert found.entropy[i].item() == pytest.approx(-sum(q * math.log(q) for q in p), rel=1e-5)
        assert found.rank[i].item() == sum(row > row[i])


def test_certain_prediction_has_no_loss_and_no_entropy():
    logits = torch.full((1, 9), -1e4)
    logits[0, 3] = 50.0
    found = metrics.token_statistics(metrics.distribution(logits), torch.tensor([3]))
    assert found.loss.item() == 0
    assert found.entropy.item() == pytest.approx(0, abs=1e-6)
    assert found.rank.item() == 0


def test_kl_equals_a_loop_and_is_zero_on_itself(logits):
    other = logits.flip(0) * 0.5
    found = metrics.kl_divergence(metrics.distribution(logits), metrics.distribution(other))
    for i in range(7):
        p, q = softmax(logits[i].double().numpy()), softmax(other[i].double().numpy())
        assert found[i].item() == pytest.approx(sum(p * np.log(p / q)), rel=1e-4)
    own = metrics.distribution(logits)
    assert metrics.kl_divergence(own, own).abs().max().item() < 1e-5


@pytest.mark.parametrize(("vocab", "k"), [(50, 5), (50, 1), (5000, 10), (4999, 1), (4999, 3), (64 * 40, 10)])
def test_top_k_is_exact(vocab, k):
    logits = torch.randn(6, vocab, generator=torch.Generator().manual_seed(vocab))
    assert torch.equal(metrics.top_k(logits, metrics.distribution(logits).maxima, k), logits.topk(k, dim=1).indices)


@pytest.mark.parametrize("vocab", [70, 5000, 64 * 40])
@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e4])
def test_of_equal_logits_the_lower_index_comes_first(vocab, scale):
    """Half-precision logits are full of ties; the order must not depend on how a kernel walks the row."""
    generator = torch.Generator().manual_seed(vocab)
    logits = (torch.randn(50, vocab, generator=generator) * scale).bfloat16().float()
    sorted_stably = logits.sort(dim=1, descending=True, stable=True).indices
    of = metrics.distribution(logits)
    assert any(len(set(row.tolist())) < 10 for row in logits.gather(1, sorted_stably[:, :10]))
    assert torch.equal(metrics.top_k(logits, of.maxima, 10), sorted_stably[:, :10])
    assert torch.equal(metrics.top_k(logits.bfloat16(), of.maxima, 10), sorted_stably[:, :10])
    assert torch.equal(metrics.top_k(logits, of.maxima, 1), sorted_stably[:, :1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_that_is_used_again_changes_nothing(dtype):
    generator = torch.Generator().manual_seed(5)
    scratch = metrics.Scratch()
    for n in (7, 3, 9):  # shorter and longer than what is kept
        a, b = (torch.randn(n, 300, generator=generator).mul(4).to(dtype) for _ in range(2))
        target = torch.randint(300, (n,), generator=generator)
        p, q = metrics.distribution(a, scratch, "a"), metrics.distribution(b, scratch, "b")
        plain_p, plain_q = metrics.distribution(a), metrics.distribution(b)
        assert torch.equal(metrics.kl_divergence(p, q, scratch), metrics.kl_divergence(plain_p, plain_q))
        for got, want in ((p, plain_p), (q, plain_q)):
            for mine, theirs in zip(metrics.token_statistics(got, target, scratch),
                                    metrics.token_statistics(want, target), strict=True):
                assert torch.equal(mine, theirs)
            assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))
    assert p.weights.data_ptr() == metrics.distribution(a, scratch, "a").weights.data_ptr()


def test_top_k_sees_the_short_last_group_and_not_behind_it():
    logits = torch.full((1, 64 * 50 + 3), -math.inf)
    logits[0, -1], logits[0, 5] = 2.0, 1.0
    assert metrics.top_k(logits, metrics.distribution(logits).maxima, 2).tolist() == [[64 * 50 + 2, 5]]
    assert metrics.top_k(logits, metrics.distribution(logits).maxima, 1).tolist() == [[64 * 50 + 2]]


def test_top_k_overlap_counts_common_tokens():
    a = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    b = torch.tensor([[4, 3, 9, 9], [8, 7, 6, 5]])
    assert metrics.top_k_overlap(a, b).tolist() == [0.5, 1.0]
