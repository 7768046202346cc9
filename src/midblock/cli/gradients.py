"""`midblock gradients MODEL --data D`: gradients per block, without training or along a short one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from midblock.cli import console
from midblock.cli.analysis import Names, OneOrMore, run_analysis, show
from midblock.cli.command import command
from midblock.cli.options import Data, RunOut
from midblock.settings import GradientSettings
from midblock.settings.load import StreamedChainSettings

__all__ = ["gradients"]


@command(
    "midblock gradients smollm2 --data gsm8k --out runs/gradients",
    "midblock gradients smollm2 --data arithmetic --steps 20 --learning-rate 1e-4",
    "midblock correlate runs/profile runs/gradients")
def gradients(models: OneOrMore, data: Data, settings: GradientSettings, load: StreamedChainSettings,
              out: RunOut = Path("runs/gradients"), names: Names = None) -> None:
    """Measure the gradient of the loss per block and matrix, over batches.

    Its norm, the norm relative to the weights, the sum of squares (Fisher) and the first-order
    Taylor term; with --steps also the change that a short real fine-tune makes. `midblock correlate`
    sets it beside a profile.
    """
    def measure(chain: Any, keys: Any, dataset: Any, run: Any, progress: Any) -> Any:
        from midblock.analysis.gradients import gradients

        return gradients(chain, data=dataset, names=keys, progress=progress, settings=settings)

    run, result = run_analysis("gradients", models, names=names, data=data, seed=settings.seed, out=out, resume=False,
                               load=load, settings=settings, measure=measure, least=1)
    frame = result.frame
    wide = frame[frame["matrix"] == "all"].pivot_table(index="layer", columns=["metric", "side"], values="value",
                                                       sort=False)
    wide.columns = [metric if len(models) == 1 else f"{metric} {side}" for metric, side in wide.columns]
    console.print_table(wide.reset_index().rename(columns={"layer": "block"}), title="Gradients per block")
    show(run, result, losses=result.losses)
