"""Swaps of models that are read block by block: every chain of blocks grows by one block at a time.

Swaps whose chains begin alike are one chain until they part. Two models' blocks are compared when both are in memory,
so that equal ones (a segment that the tuning left alone) let chains stay one, or swaps be one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from midblock import ranks
from midblock.analysis.passes import Inputs
from midblock.analysis.scores import SampleScores
from midblock.capture import HiddenStates, block_by_block, room_for_hidden_states, score_hidden
from midblock.capture.blockwise import BlockByBlock
from midblock.data import Batch
from midblock.models import LoadedModel, shared_block, shared_unembeddings
from midblock.progress import Progress

__all__ = ["swap_block_by_block"]

Swap = tuple[str, str, str]
"""Recipient, donor, mask."""


@dataclass
class _Chain:
    """Swaps that are one so far, and the number of their hidden states."""

    swaps: list[Swap]
    number: int


def swap_block_by_block(inputs: Inputs, swaps: Mapping[Swap, Sequence[int]], progress: Progress
                        ) -> dict[tuple[str, str, str, str], SampleScores]:
    """Score swaps with both heads, with two blocks of each model in memory at a time.

    Args:
        inputs: Stages, of which some are streamed, and samples.
        swaps: (recipient, donor, mask) -> blocks that are the donor's.
        progress: Told how many blocks are done.

    Returns:
        (recipient, donor, mask, head) -> scores.
    """
    batches = ranks.share(inputs.batches())
    if not batches:
        return {}
    room = room_for_hidden_states(inputs.stages, batches, states=len(swaps) + 2, heads=True,
                                  blocks_at_once=len(inputs.stages))
    with torch.inference_mode(), room as kept, block_by_block(inputs.stages) as runner:
        chains = _begin(inputs.stages, list(swaps), batches, runner, kept)
        for b in range(runner.num_blocks):
            chains = _grow(inputs.stages, chains, swaps, b, batches, runner, kept)
            progress("swap", b + 1, runner.num_blocks, note=f"{len(chains)} chains of blocks")
        with runner.heads():
            return _scores(inputs, chains, batches, kept)


def _begin(stages: Mapping[str, LoadedModel], swaps: list[Swap], batches: Sequence[Batch], runner: BlockByBlock,
           kept: HiddenStates) -> list[_Chain]:
    """One chain per different input of block 0."""
    owners: dict[str, int] = {}
    for number, (name, model) in enumerate(stages.items()):
        with runner.inputs(name):
            for i, batch in enumerate(batches):
                kept.put((number, i), runner.start(name, batch.to(model.device)))
        equal = next((n for n in dict.fromkeys(owners.values())
                      if all(torch.equal(kept.get((n, i)), kept.get((number, i))) for i in range(len(batches)))), None)
        owners[name] = number if equal is None else equal
        if equal is not None:
            for i in range(len(batches)):
                kept.drop((number, i))
    chains: dict[int, _Chain] = {}
    for swap in swaps:
        owner = owners[swap[0]]
        chains.setdefault(owner, _Chain([], owner)).swaps.append(swap)
    return list(chains.values())


def _grow(stages: Mapping[str, LoadedModel], chains: list[_Chain], swaps: Mapping[Swap, Sequence[int]], b: int,
          batches: Sequence[Batch], runner: BlockByBlock, kept: HiddenStates) -> list[_Chain]:
    """Run block b: chains part where their blocks are different ones."""
    names = list(stages)
    with runner.blocks(b):
        first = shared_block([m.anatomy for m in stages.values()], b)
        next_number = max(c.number for c in chains) + 1
        grown: list[_Chain] = []
        for chain in chains:
            by_block: dict[str, list[Swap]] = {}
            for swap in chain.swaps:
                donor = swap[1] if b in swaps[swap] else swap[0]
                by_block.setdefault(names[first[names.index(donor)]], []).append(swap)
            made = [(block, _Chain(own, next_number + i)) for i, (block, own) in enumerate(by_block.items())]
            next_number += len(made)
            for i, batch in enumerate(batches):
                before = kept.get((chain.number, i))
                for block, new in made:
                    recipient = new.swaps[0][0]
                    kept.put((new.number, i), runner.step(
                        recipient, b, batch.to(stages[recipient].device), before, donor=block))
                kept.drop((chain.number, i))
            grown += [new for _, new in made]
    return grown


def _scores(inputs: Inputs, chains: Sequence[_Chain], batches: Sequence[Batch], kept: HiddenStates
            ) -> dict[tuple[str, str, str, str], SampleScores]:
    stages = inputs.stages
    samples = [row.index for row in inputs.rows]
    owner_of = dict(zip(stages, shared_unembeddings([m.anatomy for m in stages.values()]), strict=True))
    scores: dict[tuple[str, str, str, str], SampleScores] = {}
    for chain in chains:
        for i, batch in enumerate(batches):
            hidden = kept.get((chain.number, i))
            found = {}
            for recipient, donor, mask in chain.swaps:
                for head in (recipient, donor):
                    if owner_of[head] not in found:
                        model = stages[head]
                        found[owner_of[head]] = score_hidden(model.anatomy, hidden.to(model.device),
                                                             batch.to(model.device))
                    scores.setdefault((recipient, donor, mask, head), SampleScores(samples)).put(
                        batch, found[owner_of[head]])
    return scores
