"""`midblock merge BASE SFT --alphas 0,.5,1,.5,0`: score and save block-wise interpolations of two checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from midblock.cli import console
from midblock.cli.analysis import Chain, Names, run_analysis, show
from midblock.cli.command import command
from midblock.cli.options import RunOut
from midblock.errors import SettingsError
from midblock.settings import ChainLoadSettings, MergeSettings
from midblock.settings.merge import parse_alphas

__all__ = ["merge"]


@command(
    "midblock merge smollm2 runs/tuned/model --alphas 0,.5,1,.5,0 --data gsm8k --out runs/merge",
    "midblock merge BASE SFT --alphas 0,1,1,1,0 --alphas 1,0,0,0,1 --data mmlu --alpha-rest 0",
    "midblock merge BASE SFT --alphas 0,0,1,1,0 --save merged-model")
def merge(models: Chain, settings: MergeSettings, load: ChainLoadSettings,
          alphas: Annotated[list[str], typer.Option(
              "--alphas", metavar="A1,..,AK", show_default=False,
              help="Share of the tuned model in each of K equal depth segments, input side first: 0 is the base, 1 the "
                   "tuned model. Repeat for more settings.")],
          data: Annotated[str | None, typer.Option(
              "--data", metavar="D", show_default=False,
              help="Score on this: a registry name, a local file, hf:NAME, arithmetic, pydocs. Unset: only --save.")
          ] = None,
          save: Annotated[Path | None, typer.Option(
              "--save", metavar="DIR", show_default=False,
              help="Write the merged checkpoint (safetensors) here; several settings get a folder each in it.")] = None,
          out: RunOut = Path("runs/merge"), names: Names = None) -> None:
    """Interpolate between a base and its tuned checkpoint block by block; score and save the result.

    W = base + a (sft - base) with a share a for each depth segment. Loss, accuracy and perplexity of
    each merged model, with the paired change from both ends. The saved checkpoint gives the
    logits that were scored.
    """
    if data is None and save is None:
        raise SettingsError("merge has nothing to do: give --data to score on, --save to write a checkpoint, or both.")
    wanted = [parse_alphas(text) for text in alphas]

    def measure(chain: Any, keys: Any, dataset: Any, run: Any, progress: Any) -> Any:
        from midblock.analysis.merge import merge

        return merge(chain, alphas=wanted, data=dataset, names=keys, save=save, progress=progress, settings=settings)

    run, result = run_analysis("merge", models, names=names, data=data, seed=settings.seed, out=out, resume=False,
                               load=load, settings={**dict(settings), "alphas": wanted,
                                                    "save": None if save is None else str(save)}, measure=measure)
    if data is not None:
        console.print_table(result.scores(), title="Merged models (loss in nats a token)")
    show(run, result)
