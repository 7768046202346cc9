"""`midblock pairs`: known base and tuned checkpoints, and how each was aligned."""

from __future__ import annotations

from typing import Annotated

import typer

from midblock.cli import console
from midblock.cli.answers import show_answer
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
    from midblock.results import Answer

    found = known_pairs(family)
    if not found:
        families = sorted({p.family for p in known_pairs()})
        raise SettingsError(f"no known pair of a family {family!r}; known: {', '.join(families)}.")
    console.emit_json(found)
    frame = pd.DataFrame([{"family": p.family, "base": p.base, "tuned": p.tuned or "none published",
                           "pipeline": p.pipeline, "suitable": p.suitable} for p in found])
    for (name, pipeline), part in frame.groupby(["family", "pipeline"], sort=False):
        alone = " (supervised fine-tuning alone)" if part["suitable"].all() else ""
        console.print_table(part[["base", "tuned"]], f"{name}: {pipeline}{alone}")
    pure = [p for p in found if p.suitable]
    show_answer(Answer(
        f"{len(pure)} of {len(found)} known pairs saw supervised fine-tuning and nothing else.",
        "What is measured on the others is the sum of their stages, not supervised fine-tuning.",
        ("weights", pure[0].base, str(pure[0].tuned)) if pure else ()))
