"""`midblock profile BASE SFT --data D`: every measurement at every depth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from midblock.cli import console
from midblock.cli.analysis import Chain, Names, run_analysis, show
from midblock.cli.command import command
from midblock.cli.options import Data, Resume, RunOut
from midblock.segments import ZONES_TITLE
from midblock.settings import StabilitySettings, StreamedChainSettings

__all__ = ["profile"]


@command(
    "midblock profile allenai/OLMo-2-0425-1B allenai/OLMo-2-0425-1B-SFT --data gsm8k --out runs/olmo",
    "midblock profile smollm2 runs/tuned/model --data arithmetic --samples 100 --out runs/profile",
    "midblock profile BASE SFT DPO --names base,sft,dpo --data mmlu --paper --json",
    "midblock profile BASE SFT --data gsm8k --stream always --memory-limit 8GB")
def profile(models: Chain, data: Data, settings: StabilitySettings, load: StreamedChainSettings,
            out: RunOut = Path("runs/profile"), names: Names = None, resume: Resume = False) -> None:
    """Measure a base and its tuned checkpoint layer by layer.

    Entropies, effective rank, sparsity, curvature, norms, intrinsic dimension, CKA (plain and
    debiased), cosine similarity, mean shift: at every hidden state 0..L, for each checkpoint and
    for their difference, each with an interval.
    """
    def measure(chain: Any, keys: Any, dataset: Any, run: Any, progress: Any) -> Any:
        call = {"data": dataset, "names": keys, "state_folder": run.path / "state", "progress": progress,
                "settings": settings}
        if settings.seeds == 1:
            from midblock.analysis.profile import profile

            result: Any = profile(chain, **call)
        else:
            from midblock.analysis.stability import profile_seeds

            result = profile_seeds(chain, seeds=settings.seeds, **call)
        return result

    run, result = run_analysis("profile", models, names=names, data=data, seed=settings.seed, out=out, resume=resume,
                               load=load, settings=settings, measure=measure)
    if result.counts["pooled_samples"] < settings.samples:
        console.warn(f"only {result.counts['pooled_samples']} of the {settings.samples} samples asked for were usable.")
    console.print_table(result.regions().drop(columns="side"), title=f"Change by depth ({ZONES_TITLE})")
    show(run, result, regions=result.regions())
