"""Replacing a module's forward and giving it back."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn

from midblock.models.forwards import forwards_kept, forwards_replaced, replace_forward


def test_forwards_are_given_back_also_after_an_error() -> None:
    layers = [nn.Linear(2, 2), nn.Linear(2, 2)]
    x = torch.ones(1, 2)
    expected = [layer(x) for layer in layers]
    seen = []
    with contextlib.suppress(RuntimeError), forwards_replaced(layers, [lambda x: x + 1, lambda x: x + 2]):
        seen = [int(layer(x)[0, 0]) for layer in layers]
        raise RuntimeError
    assert seen == [2, 3]
    for layer, value in zip(layers, expected, strict=True):
        assert "forward" not in vars(layer)
        assert torch.equal(layer(x), value)


def test_another_replacement_on_top_stays() -> None:
    layer = nn.Identity()
    restore = replace_forward(layer, lambda x: x + 1)
    replace_forward(layer, lambda x: x + 2)
    assert not restore()
    assert layer(1) == 3


@pytest.mark.parametrize("plain", [False, True])
def test_kept_forwards_come_back_whatever_was_done(plain: bool) -> None:
    own, patched = nn.Identity(), nn.Identity()
    replace_forward(patched, theirs := lambda x: x + 1)
    within = None
    with contextlib.suppress(RuntimeError), forwards_kept([own, patched], plain=plain):
        within = patched(1)
        replace_forward(own, lambda x: x + 5)
        replace_forward(patched, lambda x: x + 5)
        raise RuntimeError
    assert within == (1 if plain else 2)
    assert "forward" not in vars(own)
    assert vars(patched)["forward"] is theirs
