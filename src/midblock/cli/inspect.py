"""`midblock inspect`: what a model is made of, block by block, and its depth segments."""

from __future__ import annotations

from typing import Annotated

import typer

from midblock.cli import console
from midblock.cli.answers import show_answer
from midblock.cli.command import command
from midblock.cli.options import Model
from midblock.settings.load import TrustSettings

__all__ = ["inspect"]


@command(
    "midblock inspect smollm2",
    "midblock inspect smollm2 --segments 3",
    "midblock inspect ./my-model --json")
def inspect(
    model: Model, *,
    segments: Annotated[int | None, typer.Option(
        "--segments", metavar="K", min=1, show_default="5, or fewer in a shallow model",
        help="Number of equal depth segments: the length of a mask.")] = None,
    trust: TrustSettings,
) -> None:
    """Show a model's blocks, sizes and depth segments.

    Parameters are counted from the config; the weights are not loaded.
    """
    import pandas as pd

    from midblock.models.summary import summarize_model
    from midblock.results import Answer

    found = summarize_model(model, **trust.model_dump())
    parts = found.segments(min(5, found.num_blocks) if segments is None else segments)
    console.emit_json({**found.to_dict(), "segments": parts})
    console.say(found.text() + "\n")
    console.print_table(found.frame(), "Parameters of each block")
    console.print_table(
        pd.DataFrame([{"mask": p.mask, "blocks": f"{p.first}-{p.stop - 1}", "parameters": p.parameters,
                       "share": f"{p.share:.1%}"} for p in parts]),
        f"{len(parts)} segments (the first digit of a mask is nearest the embeddings)")
    middle = parts[len(parts) // 2]
    show_answer(Answer(
        f"{model}: {found.num_blocks} blocks, {found.parameters:,} parameters, in {len(parts)} segments.",
        f"A mask has a digit for each segment: {middle.mask} is blocks {middle.first} to {middle.stop - 1}, "
        f"{middle.share:.0%} of the blocks' parameters. Which to tune is to be measured.",
        ("tune", model, "--data", "arithmetic", "--mask", middle.mask, "--dry-run")))
