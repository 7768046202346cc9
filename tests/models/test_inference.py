"""Heads in oneDNN's layout give the same logits and are put back."""

from __future__ import annotations

import pytest
import torch

from families import FAMILIES, token_ids
from midblock.models import find_anatomy
from midblock.models.inference import laid_out


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
