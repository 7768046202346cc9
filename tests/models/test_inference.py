"""Heads in oneDNN's layout give the same logits and are put back; freed memory is kept for a while."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from families import FAMILIES, token_ids
from midblock.models import find_anatomy
from midblock.models.inference import freed_memory_kept, laid_out


@pytest.mark.parametrize("family", ["llama", "llama_tied", "gemma2", "gpt_neox"])
def test_logits_are_bit_equal_and_the_head_comes_back(family: str) -> None:
    model = FAMILIES[family]().bfloat16()
    anatomy = find_anatomy(model)
    ids = token_ids(3, 20)
    with torch.inference_mode():
        want = model(ids).logits
        with laid_out([anatomy, anatomy]) as count:
            got = model(ids).logits
    assert count == (1 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else 0)
    assert torch.equal(got, want)
    assert "forward" not in anatomy.head.__dict__


def test_only_forwards_without_gradients_of_bfloat16_heads_use_it() -> None:
    anatomy = find_anatomy(FAMILIES["llama"]())
    with laid_out([anatomy]) as count:
        assert count == 0  # float32
    model = FAMILIES["llama"]().bfloat16()
    anatomy = find_anatomy(model)
    x = torch.randn(4, anatomy.hidden_size, dtype=torch.bfloat16, requires_grad=True)
    def interrupted() -> None:
        with laid_out([anatomy]):
            anatomy.head(x).float().sum().backward()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert x.grad is not None
    assert bool(x.grad.any())
    assert "forward" not in anatomy.head.__dict__


FAULTS = """
import mmap, resource
import torch
from midblock.models.inference import freed_memory_kept

def faults_of(use):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        use()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def fresh():
    with mmap.mmap(-1, 8 << 24) as memory:
        memory.write(bytes(len(memory)))

def again():
    several = [torch.ones(4 << 20) for _ in range(8)]  # 16 MiB each
    del several

with freed_memory_kept():
    again()
    print(faults_of(fresh), faults_of(again))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_memory_that_is_used_again_costs_no_page_faults() -> None:
    with freed_memory_kept() as works:
        if not works:
            pytest.skip("another allocator, or settings of its own")
    run = subprocess.run([sys.executable, "-c", FAULTS], check=True, capture_output=True, text=True)
    of_fresh_memory, of_used_memory = map(int, run.stdout.split())
    if of_fresh_memory == 0:
        pytest.skip("this system does not count page faults")
    assert of_used_memory < of_fresh_memory / 5


@pytest.mark.parametrize("name", ["MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"])
def test_settings_of_the_environment_win(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "1")
    with freed_memory_kept() as works:
        assert not works


def test_an_error_inside_is_passed_on() -> None:
    with pytest.raises(KeyError), freed_memory_kept():
        raise KeyError
