"""`midblock steer BASE SFT --data D`: add or patch in what tuning changed at a depth, and score."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from midblock.cli import console
from midblock.cli.analysis import Chain, Names, changes_table, run_analysis, show
from midblock.cli.command import command
from midblock.cli.options import Data, RunOut
from midblock.errors import SettingsError
from midblock.settings import ChainLoadSettings, SteerSettings

__all__ = ["steer"]


@command(
    "midblock steer smollm2 runs/tuned/model --data gsm8k --blocks 10:20 --alphas 0.5,1",
    "midblock steer BASE SFT --data arithmetic --supervised --direction pc1 --generate 'Question: 3 + 4?'",
    "midblock steer BASE SFT --data arithmetic --supervised --patch prompt --json")
def steer(models: Chain, data: Data, settings: SteerSettings, load: ChainLoadSettings,
          generate: Annotated[list[str] | None, typer.Option(
              "--generate", metavar="PROMPT", show_default=False,
              help="Also continue this prompt, steered and unsteered (repeat for more; generations.csv).")] = None,
          out: RunOut = Path("runs/steer"), names: Names = None) -> None:
    """Put what tuning changed into the base, block by block, and score it.

    Adds a direction of the paired difference sft - base (made from one half of the samples) to
    the base's hidden states and scores the other half; or patches hidden states (--patch).
    """
    if settings.patch is not None and generate:
        raise SettingsError("--generate needs a direction to add; leave out --patch.")
    found: dict[str, Any] = {}

    def measure(chain: Any, keys: Any, dataset: Any, run: Any, progress: Any) -> Any:
        from midblock.analysis.directions import save_vectors
        from midblock.analysis.steer import generations, steer

        result = steer(chain, data=dataset, names=keys, progress=progress, settings=settings)
        if result.vectors:
            save_vectors(run.path / "vectors.safetensors", result.vectors, direction=settings.direction,
                         centered=settings.centered, data=dataset.describe(),
                         models={k: m.fingerprint for k, m in zip(keys, chain, strict=True)})
        if generate:
            found["generations"] = generations(chain, result, generate, progress=progress)
            run.write_table(found["generations"], "generations.csv")
        return result

    run, result = run_analysis("steer", models, names=names, data=data, seed=settings.seed, out=out, resume=False,
                               load=load, settings=settings, measure=measure)
    frame = result.frame
    changes = frame[(frame["side"] == "difference") & (frame["kind"] != "model") & (frame["alpha"] != 0)]
    console.print_table(changes_table(changes, {"stage": "pair", "layer": "blocks", "alpha": "strength"}),
                        title=f"Change when {result.what} is put into the base (nats a token; share of tokens)")
    if "generations" in found:
        for row in found["generations"].itertuples():
            console.say(f"{row.model} {f'+ {row.alpha:g} at blocks {row.blocks}' if row.blocks else 'unchanged'}: "
                        f"{row.text.strip()!r}")
    show(run, result, **found)
