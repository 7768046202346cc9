"""Where running a model from a block on is exact: decided by trial, never by the family's name.

Blocks may hand more to later ones than hidden states: a shared position bias (T5), keys and values of
earlier blocks (Gemma 3n and 4), a first value state (RWKV-7). Whatever a family does, either the
resumed pass gives the same last hidden state, bit for bit, or it is refused in words.
"""

from __future__ import annotations

from collections.abc import Iterable
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from midblock.capture.forward import run_blocks
from midblock.capture.interventions import learn_outputs
from midblock.data import Batch
from midblock.errors import ArchitectureError
from midblock.models import Anatomy
from midblock.models.placement import place_of

__all__ = ["verify_resume", "why_not_resume"]

# body -> first block -> why the model cannot be resumed there; None: it can
_verdicts: WeakKeyDictionary[nn.Module, dict[int, str | None]] = WeakKeyDictionary()


def verify_resume(model: nn.Module, anatomy: Anatomy, starts: Iterable[int] | None = None) -> None:
    """Prove on a tiny batch that resuming gives the same hidden L; remembered per model and block.

    Args:
        model: The whole model.
        anatomy: Its anatomy.
        starts: Blocks to resume from; default the second, the middle one and the last.

    Raises:
        ArchitectureError: it does not, or fails, from one of them; the reason is told.
    """
    last = anatomy.num_blocks - 1
    chosen = {1, anatomy.num_blocks // 2, last} & set(range(1, last + 1)) if starts is None else set(starts)
    for start, reason in why_not_resume(model, anatomy, chosen).items():
        if reason is not None:
            raise ArchitectureError(f"{type(model).__name__} cannot be resumed from block {start}: {reason}.")


def why_not_resume(model: nn.Module, anatomy: Anatomy, starts: Iterable[int]) -> dict[int, str | None]:
    """First block -> the reason why the model cannot be resumed from it, None where that is exact.

    Block 0 always can; at L (nothing but final norm and head are left) it is the blocks' outputs that must be known.
    """
    known = _verdicts.setdefault(anatomy.body, {})
    wanted = dict.fromkeys(starts)
    if missing := [s for s in wanted if s not in known]:
        known.update(_trial(model, anatomy, missing))
    return {s: known[s] for s in wanted}


def _trial(model: nn.Module, anatomy: Anatomy, starts: Iterable[int]) -> dict[int, str | None]:
    device = place_of(anatomy)
    ids = torch.arange(2, 12, device=device).reshape(2, 5) % anatomy.vocab_size
    batch = Batch(indices=(0, 1), input_ids=ids, attention_mask=torch.ones_like(ids))
    wanted, states = set(starts), dict[int, Tensor]()
    verdicts: dict[int, str | None] = {}

    def remember(h: int, z: Tensor) -> None:
        if h in wanted:
            states[h] = z.clone()

    training = [m for m in model.modules() if m.training]
    # prepended: the hook that ends a forward at the last block raises
    handles = [block.register_forward_hook(lambda module, args, output: learn_outputs(module, output), prepend=True)
               for block in anatomy.blocks]
    try:
        for module in training:
            module.training = False
        with torch.inference_mode():
            try:
                want = run_blocks(model, anatomy, batch, listener=remember)
            except (MemoryError, torch.OutOfMemoryError):
                raise  # says nothing about the model
            except Exception as error:
                return dict.fromkeys(wanted, f"it does not run on a trial batch ({_told(error)})")
            finally:
                for handle in handles:
                    handle.remove()
            for start in sorted(wanted):
                verdicts[start] = _compared(model, anatomy, batch, start, states[start], want)
    finally:
        for module in training:
            module.training = True
    return verdicts


def _compared(model: nn.Module, anatomy: Anatomy, batch: Batch, start: int, hidden: Tensor, want: Tensor
              ) -> str | None:
    """Why the pass resumed from a block is not the whole one's; None where it is."""
    if start in (0, anatomy.num_blocks):
        return None
    try:
        got = run_blocks(model, anatomy, batch, start=start, hidden=hidden)
    except (MemoryError, torch.OutOfMemoryError):
        raise  # says nothing about the model
    except Exception as error:
        return f"its blocks need more than hidden states of those before ({_told(error)})"
    if torch.equal(got, want):
        return None
    return (f"the last hidden state differs by {(got - want).abs().max().item():.3g}, as its blocks share more than "
            "hidden states")


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
