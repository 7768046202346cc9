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
    found = metrics.token_statistics(logits, target)
    for i, row in enumerate(logits.double().numpy()):
        p = softmax(row)
        assert found.loss[i].item() == pytest.approx(-math.log(p[i]), rel=1e-5)
        assert found.probability[i].item() == pytest.approx(p[i], rel=1e-5)
        assert found.entropy[i].item() == pytest.approx(-sum(q * math.log(q) for q in p), rel=1e-5)
        assert found.rank[i].item() == sum(row > row[i])


def test_certain_prediction_has_no_loss_and_no_entropy():
    logits = torch.full((1, 9), -1e4)
    logits[0, 3] = 50.0
    found = metrics.token_statistics(logits, torch.tensor([3]))
    assert found.loss.item() == 0
    assert found.entropy.item() == pytest.approx(0, abs=1e-6)
    assert found.rank.item() == 0


def test_kl_equals_a_loop_and_is_zero_on_itself(logits):
    other = logits.flip(0) * 0.5
    found = metrics.kl_divergence(logits, other)
    for i in range(7):
        p, q = softmax(logits[i].double().numpy()), softmax(other[i].double().numpy())
        assert found[i].item() == pytest.approx(sum(p * np.log(p / q)), rel=1e-4)
    assert metrics.kl_divergence(logits, logits).abs().max().item() < 1e-5


@pytest.mark.parametrize(("vocab", "k"), [(50, 5), (5000, 10), (4999, 3), (64 * 40, 10)])
def test_top_k_is_exact(vocab, k):
    logits = torch.randn(6, vocab, generator=torch.Generator().manual_seed(vocab))
    assert torch.equal(metrics.top_k(logits, k), logits.topk(k, dim=1).indices)


def test_top_k_overlap_counts_common_tokens():
    a = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    b = torch.tensor([[4, 3, 9, 9], [8, 7, 6, 5]])
    assert metrics.top_k_overlap(a, b).tolist() == [0.5, 1.0]
