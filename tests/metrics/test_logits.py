"""Next-token quantities against loops in NumPy, in each of their ways: compiled (CPU) and in PyTorch."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from midblock import metrics
from midblock.metrics import _kernels, _rows
from midblock.metrics import logits as of_logits

WAYS = ["compiled", "torch"]


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    if request.param == "torch":  # as where numba is not installed
        monkeypatch.setattr(_rows, "_installed", lambda: False)
        monkeypatch.setattr(of_logits, "_CACHE", 4 * 4 * 64)  # rows in several chunks
    return request.param


def softmax(row: np.ndarray) -> np.ndarray:
    e = np.exp(row - row.max())
    return e / e.sum()


def random(n: int, vocab: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.randn(n, vocab, generator=torch.Generator().manual_seed(seed)) * 4).to(dtype)


def test_both_ways_are_tested(way):
    assert _rows.takes(torch.zeros(1, 2)) == (way == "compiled")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab", [1, 2, 50, 64, 65, 1000, 1600])
def test_token_statistics_equal_a_loop(way, vocab, dtype):
    logits = random(7, vocab, dtype=dtype)
    target = torch.arange(7) % vocab
    found = metrics.token_statistics(logits, target)
    for i, (row, t) in enumerate(zip(logits.double().numpy(), target.tolist(), strict=True)):
        p = softmax(row)
        assert found.loss[i].item() == pytest.approx(-math.log(p[t]), rel=1e-5, abs=1e-6)
        assert found.probability[i].item() == pytest.approx(p[t], rel=1e-5)
        assert found.entropy[i].item() == pytest.approx(-sum(q * math.log(q) for q in p), rel=1e-5, abs=1e-6)
        assert found.rank[i].item() == sum(row > row[t])


def rounding_of_sum(terms: np.ndarray, exponents: np.ndarray) -> float:
    """How far a float32 sum of terms w(e^x) may be from the exact one.

    Each exponential has the relative error of its rounded argument, |x| u twice, and 4 u of its own; the sum has
    4 sqrt(n) u of the terms' sizes (Higham & Mary, SIAM J. Sci. Comput. 41, 2019, lambda = 4), however it is ordered.
    """
    unit, sizes = np.finfo(np.float32).eps / 2, np.abs(terms)
    return float(unit * (sizes * (2 * np.abs(exponents) + 4 + 4 * len(terms) ** 0.5)).sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_are_what_they_say(way, dtype):
    rows = {name: random(9, 777, seed, dtype) for seed, name in enumerate("pqr")}
    target = torch.randint(777, (9,), generator=torch.Generator().manual_seed(1))
    found = metrics.row_sums(rows["p"], target, [rows["q"], rows["r"]])
    p, q, r = (x.double().numpy() for x in rows.values())
    for i, t in enumerate(target.tolist()):
        below = p[i] - p[i].max()
        weight = np.exp(below)

        def equal(value: torch.Tensor, terms: np.ndarray, below: np.ndarray = below) -> None:
            assert value.item() == pytest.approx(terms.sum(), rel=0, abs=rounding_of_sum(terms, below))
        assert found.gold[i].item() == p[i, t]
        assert found.top[i].item() == p[i].max()
        equal(found.total[i], weight)
        equal(found.weighted[i], weight * below)
        assert found.above[i].item() == (p[i] > p[i, t]).sum()
        assert found.maxima[i].tolist() == [p[i, lo:lo + 64].max() for lo in range(0, 777, 64)]
        for number, other in enumerate((q, r)):
            equal(found.apart[number, i], weight * (p[i] - other[i]))
    assert metrics.row_sums(rows["p"], target).apart.shape == (0, 9)


def test_exponentials_are_as_good_as_float32():
    """Two logits apart by x: total = 1 + e^-x."""
    apart = torch.linspace(0, 20, 20001)
    found = metrics.row_sums(torch.stack([torch.zeros_like(apart), -apart], dim=1), torch.zeros(20001).long()).total
    assert ((found.double() - 1 - (-apart.double()).exp()).abs()).max().item() < 3e-7
    assert metrics.row_sums(torch.zeros(3, 1), torch.zeros(3).long()).total.tolist() == [1, 1, 1]


def test_certain_prediction_has_no_loss_and_no_entropy(way):
    logits = torch.full((1, 9), -1e4)
    logits[0, 3] = 50.0
    found = metrics.token_statistics(logits, torch.tensor([3]))
    assert found.loss.item() == 0
    assert found.entropy.item() == pytest.approx(0, abs=1e-6)
    assert found.rank.item() == 0


def test_minus_infinity_counts_for_nothing(way):
    """Some models forbid tokens that way."""
    logits = random(2, 100)
    without = metrics.token_statistics(logits[:, :90], torch.tensor([0, 1]))
    logits[:, 90:] = -math.inf
    for found, expected in zip(metrics.token_statistics(logits, torch.tensor([0, 1])), without, strict=True):
        torch.testing.assert_close(found, expected)
    other = random(2, 100, 1)
    other[:, 90:] = -math.inf
    expected = metrics.kl_divergence(logits[:, :90], other[:, :90])
    torch.testing.assert_close(metrics.kl_divergence(logits, other), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_broken_logits_stay_broken(way, bad, dtype):
    logits = random(3, 200, dtype=dtype)
    logits[1, 130] = bad
    loss = metrics.token_statistics(logits, torch.tensor([0, 1, 2])).loss
    assert loss.isfinite().tolist() == [True, False, True]


def test_zeros_of_either_sign_are_equal(way):
    logits = torch.tensor([[-0.0, 0.0, -1.0, 0.0], [0.0, -0.0, -1.0, -0.0]])
    found = metrics.row_sums(logits, torch.tensor([0, 0]))
    assert found.above.tolist() == [0, 0]
    assert metrics.top_k(logits, found.maxima, 3).tolist() == [[0, 1, 3], [0, 1, 3]]


def test_a_target_outside_the_vocabulary_is_refused():
    for target in (-100, 9):
        with pytest.raises(IndexError, match=str(target)):
            metrics.row_sums(torch.zeros(2, 9), torch.tensor([0, target]))


def test_logits_with_gaps_between_rows(way):
    wide = random(8, 200)
    for part in (wide[:, :150], wide.T[:8], wide[::2, :150]):
        target = torch.arange(len(part)) % part.shape[1]
        together = part.clone(memory_format=torch.contiguous_format)
        for a, b in zip(metrics.row_sums(part, target), metrics.row_sums(together, target), strict=True):
            torch.testing.assert_close(a, b)


def test_no_rows(way):
    found = metrics.token_statistics(torch.zeros(0, 70), torch.zeros(0, dtype=torch.int64))
    assert [len(x) for x in found] == [0, 0, 0, 0]
    assert metrics.top_k(torch.zeros(0, 70), torch.zeros(0, 2), 3).shape == (0, 3)


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 9), vocab=st.integers(1, 700), seed=st.integers(0, 99),
       scale=st.sampled_from([0.01, 1.0, 30.0]), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_both_ways_agree(n, vocab, seed, scale, dtype):
    generator = torch.Generator().manual_seed(seed)
    logits, other = ((torch.randn(n, vocab, generator=generator) * scale).to(dtype) for _ in range(2))
    target = torch.randint(vocab, (n,), generator=generator)
    compiled, gradient = metrics.row_sums(logits, target, [other]), logits.clone()
    losses = metrics.cross_entropy_(gradient, target)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_rows, "takes", lambda *logits: False)
        plain, expected = metrics.row_sums(logits, target, [other]), logits.clone()
        torch.testing.assert_close(losses, metrics.cross_entropy_(expected, target), rtol=1e-5, atol=2e-6)
    for name in compiled._fields:
        torch.testing.assert_close(getattr(compiled, name), getattr(plain, name), rtol=2e-5, atol=2e-5 * scale)
    torch.testing.assert_close(gradient, expected, rtol=1e-5 if dtype == torch.float32 else 8e-3, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_cross_entropy_leaves_its_gradient(way, dtype):
    logits = random(6, 300, dtype=dtype)
    target = torch.tensor([0, 5, 299, 7, 64, 63])
    own = logits.double().requires_grad_()
    expected = torch.nn.functional.cross_entropy(own, target, reduction="none")
    expected.sum().backward()
    found = metrics.cross_entropy_(logits, target)
    torch.testing.assert_close(found.double(), expected.detach(), rtol=1e-5, atol=1e-6)
    near = {torch.float32: 1e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
    torch.testing.assert_close(logits.double(), own.grad, rtol=near, atol=1e-6)


def test_gradient_is_rounded_to_the_nearest():
    """As PyTorch rounds: the mean error of many numbers is near zero, not half a step."""
    logits = random(4, 5000, dtype=torch.bfloat16)
    exact = logits.double().softmax(dim=1)
    exact[torch.arange(4), 0] -= 1
    metrics.cross_entropy_(logits, torch.zeros(4, dtype=torch.int64))
    error = (logits.double() - exact) / exact.abs()
    assert error.abs().max().item() < 2.0**-8
    assert abs(error.mean().item()) < 2.0**-8 / 20


@pytest.mark.parametrize("threads", [1, 2, 3, 50])
def test_any_number_of_threads_gives_the_same(threads, monkeypatch):
    logits, target = random(37, 500), torch.arange(37)
    expected = metrics.row_sums(logits, target)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    for a, b in zip(metrics.row_sums(logits, target), expected, strict=True):
        assert torch.equal(a, b)


def test_a_part_that_fails_is_not_lost():
    def work(lo: int, hi: int) -> None:
        if hi == 20:
            raise ValueError("the last part")
    with pytest.raises(ValueError, match="the last part"):
        _kernels.in_threads(work, 20, 2)


def test_several_callers_at_once():
    rows = [random(16, 400, seed) for seed in range(6)]
    expected = [metrics.row_sums(r, torch.arange(16)).total for r in rows]
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda r: metrics.row_sums(r, torch.arange(16)).total, rows))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_process_has_its_own_threads():
    logits = random(16, 400)
    metrics.row_sums(logits, torch.arange(16))
    child = os.fork()
    if child == 0:
        ok = False
        try:  # two parts: with the parent's pool, whose threads are not here, this would wait for ever
            seen: list[int] = []
            _kernels.in_threads(lambda lo, hi: seen.append(hi - lo), 16, 2)
            ok = sorted(seen) == [8, 8]
        finally:
            os._exit(0 if ok else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


BITS = """
import hashlib
import torch
from midblock import metrics
torch.manual_seed(0)
for dtype in (torch.float32, torch.bfloat16):
    for vocab in (112, 3000):
        logits = (torch.randn(8, vocab) * 3).to(dtype)
        found = metrics.row_sums(logits, torch.arange(8), [logits.flip(0), logits.flip(1)])
        loss = metrics.cross_entropy_(logits, torch.arange(8))
        for x in (*found, loss, logits):
            print(hashlib.sha256(x.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest())
"""


def test_compiling_and_loading_give_the_same_bits(tmp_path):
    """The first process compiles, the second loads from disk: a run that is resumed must not see a difference."""
    def run() -> str:
        return subprocess.run([sys.executable, "-c", BITS], env={**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)},
                              check=True, capture_output=True, text=True).stdout
    first = run()
    assert list(tmp_path.rglob("*.nbc"))
    assert len(set(first.split())) > 20
    assert run() == first


def test_kl_equals_a_loop_and_is_zero_on_itself(way):
    logits = random(7, 50)
    other = logits.flip(0) * 0.5
    found = metrics.kl_divergence(logits, other)
    for i in range(7):
        p, q = softmax(logits[i].double().numpy()), softmax(other[i].double().numpy())
        assert found[i].item() == pytest.approx(sum(p * np.log(p / q)), rel=1e-4)
    assert metrics.kl_divergence(logits, logits).abs().max().item() < 1e-5


@pytest.mark.parametrize(("vocab", "k"), [(50, 5), (50, 1), (50, 50), (3, 3), (5000, 10), (4999, 1), (4999, 3),
                                          (64 * 40, 10), (5000, 64), (5000, 70)])
def test_top_k_is_exact(way, vocab, k):
    logits = random(6, vocab, vocab)
    maxima = metrics.row_sums(logits, torch.zeros(6).long()).maxima
    assert torch.equal(metrics.top_k(logits, maxima, k), logits.topk(k, dim=1).indices)


@pytest.mark.parametrize("vocab", [70, 5000, 64 * 40])
@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e4])
def test_of_equal_logits_the_lower_index_comes_first(way, vocab, scale):
    """Half-precision logits are full of ties; the order must not depend on how a kernel walks the row."""
    generator = torch.Generator().manual_seed(vocab)
    logits = (torch.randn(50, vocab, generator=generator) * scale).bfloat16().float()
    sorted_stably = logits.sort(dim=1, descending=True, stable=True).indices
    maxima = metrics.row_sums(logits, torch.zeros(50).long()).maxima
    assert any(len(set(row.tolist())) < 10 for row in logits.gather(1, sorted_stably[:, :10]))
    assert torch.equal(metrics.top_k(logits, maxima, 10), sorted_stably[:, :10])
    assert torch.equal(metrics.top_k(logits.bfloat16(), maxima, 10), sorted_stably[:, :10])
    assert torch.equal(metrics.top_k(logits, maxima, 1), sorted_stably[:, :1])


def test_top_k_sees_the_short_last_group_and_not_behind_it(way):
    logits = torch.full((1, 64 * 50 + 3), -math.inf)
    logits[0, -1], logits[0, 5] = 2.0, 1.0
    maxima = metrics.row_sums(logits, torch.tensor([0])).maxima
    assert metrics.top_k(logits, maxima, 2).tolist() == [[64 * 50 + 2, 5]]
    assert metrics.top_k(logits, maxima, 1).tolist() == [[64 * 50 + 2]]


def test_a_list_is_no_longer_than_the_vocabulary(way):
    logits = random(4, 5)
    maxima = metrics.row_sums(logits, torch.zeros(4).long()).maxima
    assert torch.equal(metrics.top_k(logits, maxima, 10), logits.sort(dim=1, descending=True).indices)


def test_top_k_overlap_counts_common_tokens():
    a = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    b = torch.tensor([[4, 3, 9, 9], [8, 7, 6, 5]])
    assert metrics.top_k_overlap(a, b).tolist() == [0.5, 1.0]


def test_without_numba_everything_still_works():
    code = """
import sys
sys.modules["numba"] = None
import torch
from midblock import metrics
logits = torch.randn(40, 5000, generator=torch.Generator().manual_seed(0))
found = metrics.row_sums(logits, torch.arange(40), [logits.flip(0)])
assert torch.allclose(found.log_norm, logits.logsumexp(1))
assert torch.equal(metrics.top_k(logits, found.maxima, 1)[:, 0], logits.argmax(1))
own = logits.clone()
metrics.cross_entropy_(own, torch.arange(40))
assert torch.allclose(own.sum(1), torch.zeros(40), atol=1e-5)
assert "midblock.metrics._kernels" not in sys.modules
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
