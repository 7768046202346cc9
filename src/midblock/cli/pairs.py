"""`midblock pairs`: known base and tuned checkpoints, and how each was aligned."""

from __future__ import annotations

import typer

from midblock.cli.options import Json, examples

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the command to the program."""

    @app.command(epilog=examples("midblock pairs", "midblock pairs --json"))
    def pairs(as_json: Json = False) -> None:
        """List known pairs and how each was aligned.

        Only some families publish a model that saw supervised fine-tuning and nothing else. Where
        a pair mixes stages (SFT with DPO or RLHF), what is measured on it is the sum of them.
        """
        import pandas as pd

        from midblock.cli.console import emit_json, print_table
        from midblock.models.pairs import known_pairs

        found = known_pairs()
        emit_json(found)
        print_table(pd.DataFrame(found))
