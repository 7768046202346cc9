"""`midblock pairs`: known base and tuned checkpoints, and how each was aligned."""

from __future__ import annotations

from typing import Annotated

import typer

from midblock.cli import console
from midblock.cli.command import command

__all__ = ["pairs"]


@command("midblock pairs", "midblock pairs olmo", "midblock pairs --json")
def pairs(
    family: Annotated[str | None, typer.Argument(
        metavar="[FAMILY]", show_default=False, help="Only families whose name contains this.")] = None,
) -> None:
    """List known pairs and how each was aligned.

    Only some families publish a model that saw supervised fine-tuning and nothing else; they come
    first. Where a pair mixes stages (SFT with DPO or RLHF), what is measured on it is their sum.
    """
    import pandas as pd

    from midblock.errors import SettingsError
    from midblock.models.pairs import known_pairs

    found = known_pairs(family)
    if not found:
        families = sorted({p.family for p in known_pairs()})
        raise SettingsError(f"no known pair of a family {family!r}; known: {', '.join(families)}.")
    console.emit_json(found)
    console.print_table(
        pd.DataFrame([{"family": p.family, "base": p.base, "tuned": p.tuned or "none published",
                       "pipeline": p.pipeline, "SFT alone": p.suitable} for p in found]),
        "Known base and tuned checkpoints")
    console.say("A pair with `SFT alone: no` shows the sum of its stages, not supervised fine-tuning.")
