"""`midblock lens MODEL... --data D`: the logit lens, every hidden state unembedded as next-token prediction."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from midblock.cli import console
from midblock.cli.analysis import Names, OneOrMore, run_analysis, show
from midblock.cli.command import command
from midblock.cli.options import Data, Resume, RunOut
from midblock.settings import LensSettings, StreamedChainSettings

__all__ = ["lens"]


@command(
    "midblock lens smollm2 runs/tuned/model --data gsm8k --out runs/lens",
    "midblock lens smollm2 --data arithmetic --supervised --trace 2 --out runs/lens",
    "midblock lens BASE SFT --data mmlu --paper-code --json")
def lens(models: OneOrMore, data: Data, settings: LensSettings, load: StreamedChainSettings,
         out: RunOut = Path("runs/lens"), names: Names = None, resume: Resume = False) -> None:
    """Unembed every hidden state through the final norm and head (logit lens).

    Next-token accuracy, loss, perplexity, entropy, probability and rank of the gold token at
    every depth; agreement of the checkpoints (KL divergence, top-1, top-k overlap); the tokens that
    their mean difference speaks for, and those of the data at which they differ most.
    """
    def measure(chain: Any, keys: Any, dataset: Any, run: Any, progress: Any) -> Any:
        from midblock.analysis.lens import lens

        return lens(chain, data=dataset, names=keys, state_folder=run.path / "state", progress=progress,
                    settings=settings)

    run, result = run_analysis("lens", models, names=names, data=data, seed=settings.seed, out=out, resume=resume,
                               load=load, settings=settings, measure=measure, least=1)
    frame = result.frame
    wide = frame[frame["metric"].isin(["accuracy", "kl"]) & ~frame["side"].isin(["difference"])].pivot_table(
        index="layer", columns=["metric", "side"], values="value", sort=False)
    wide.columns = [f"{metric} {side}" if metric == "accuracy" else metric for metric, side in wide.columns]
    console.print_table(wide.reset_index().rename(columns={"layer": "hidden"}), title="Logit lens of each hidden state")
    show(run, result, **result.tables())
