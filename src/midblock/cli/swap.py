"""`midblock swap BASE SFT --data D`: segments of one checkpoint placed into the other."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from midblock.cli import console
from midblock.cli.analysis import Chain, Names, changes_table, run_analysis, show
from midblock.cli.command import command
from midblock.cli.options import Data, RunOut
from midblock.settings import StreamedChainSettings, SwapSettings

__all__ = ["swap"]


@command(
    "midblock swap smollm2 runs/tuned/model --data gsm8k --segments 5 --out runs/swap",
    "midblock swap BASE SFT --data mmlu --mask 01100 --mask 00110",
    "midblock swap BASE SFT --data arithmetic --cumulative --supervised --json")
def swap(models: Chain, data: Data, settings: SwapSettings, load: StreamedChainSettings,
         mask: Annotated[list[str] | None, typer.Option(
             "--mask", metavar="MASK", show_default=False,
             help="Swap the segments of this mask (repeat for more) instead of each single one.")] = None,
         out: RunOut = Path("runs/swap"), names: Names = None) -> None:
    """Swap depth segments between a base and its tuned checkpoint, and score what comes out.

    Both directions and both heads; loss, accuracy and perplexity per mask, with the paired
    change from the unswapped model and its interval.
    """
    chosen = settings.replace(masks=tuple(mask)) if mask else settings

    def measure(chain: Any, keys: Any, dataset: Any, run: Any, progress: Any) -> Any:
        from midblock.analysis.swap import swap

        return swap(chain, data=dataset, names=keys, progress=progress, settings=chosen)

    run, result = run_analysis("swap", models, names=names, data=data, seed=settings.seed, out=out, resume=False,
                               load=load, settings=chosen, measure=measure)
    frame = result.frame
    own = frame[(frame["side"] == "difference") & (frame["head"] == frame["recipient"])]
    console.print_table(changes_table(own.assign(swapped=own["donor"] + " in " + own["recipient"]),
                                      {"swapped": "swapped", "layer": "mask"}),
                        title="Change when segments are swapped, under the model's own head (nats a token; share of "
                              "tokens)")
    show(run, result)
