"""`midblock inspect`: what a model is made of, block by block, and its depth segments."""

from __future__ import annotations

import typer

from midblock.cli.options import AllowPickle, Json, Model, Segments, TrustRemoteCode, examples

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the command to the program."""

    @app.command(epilog=examples(
        "midblock inspect smollm2",
        "midblock inspect smollm2 --segments 3",
        "midblock inspect ./my-model --json"))
    def inspect(
        model: Model,
        segments: Segments = 5,
        trust_remote_code: TrustRemoteCode = False,
        allow_pickle: AllowPickle = False,
        as_json: Json = False,
    ) -> None:
        """Show a model's blocks, sizes and depth segments.

        Parameters are counted from the config; the weights are not loaded.
        """
        import pandas as pd

        from midblock.cli.console import emit_json, print_table, say
        from midblock.models.summary import summarize_model

        found = summarize_model(model, trust_remote_code=trust_remote_code, allow_pickle=allow_pickle)
        parts = found.segments(segments)
        emit_json({**found.to_dict(), "segments": [p.to_dict() for p in parts]})
        say(found.text())
        print_table(found.frame(), "Parameters of each block")
        print_table(pd.DataFrame([p.to_dict() for p in parts]),
                    f"{segments} segments (the mask's first digit is nearest the embeddings)")
