"""`midblock profile BASE SFT --data D`: every measurement at every depth."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from midblock.cli import console
from midblock.cli.analysis import Chain, Names, run_analysis, show
from midblock.cli.options import (
    AllowPickle,
    BatchSize,
    Data,
    Device,
    Dtype,
    DtypeName,
    Json,
    MaxLength,
    Quiet,
    Resume,
    Seed,
    Tokenizer,
    TokenizerOf,
    TrustRemoteCode,
    examples,
)
from midblock.segments import ZONES_TITLE

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    app.command("profile", epilog=examples(
        "midblock profile allenai/OLMo-2-0425-1B allenai/OLMo-2-0425-1B-SFT --data gsm8k --out runs/olmo",
        "midblock profile smollm2 runs/tuned/model --data arithmetic --samples 100 --out runs/profile",
        "midblock profile BASE SFT DPO --names base,sft,dpo --data mmlu --paper --json"))(profile)


def profile(
    models: Chain,
    data: Data,
    out: Annotated[Path, typer.Option(
        "--out", metavar="DIR", help="Folder for run.json, table.csv and figures; must be empty unless --resume.")
    ] = Path("runs/profile"),
    samples: Annotated[int, typer.Option("--samples", metavar="N", help="Samples of the pooled level.")] = 200,
    token_samples: Annotated[int, typer.Option(
        "--token-samples", metavar="N", help="Samples of the token level (the first of the same draw).")] = 50,
    paper: Annotated[bool, typer.Option(
        "--paper", help="The paper's sizes: 1,000 pooled and 100 token-level samples.")] = False,
    max_length: MaxLength = 512,
    batch_size: BatchSize = 8,
    names: Names = None,
    views: Annotated[int, typer.Option(
        "--views", metavar="Q", help="Augmented views per sample for InfoNCE, LiDAR, DiME; 0 leaves them out.")] = 0,
    view_samples: Annotated[int, typer.Option("--view-samples", metavar="N", help="Samples that get views.")] = 100,
    alpha: Annotated[float, typer.Option("--alpha", help="Order of the matrix entropies.")] = 1.0,
    normalize: Annotated[str, typer.Option(
        "--normalize", metavar="max|rows|dim|none", help="What entropies are divided by.")] = "max",
    sparsity_eps: Annotated[float, typer.Option("--sparsity-eps", help="Entries below this are inactive.")] = 1e-2,
    earlier_code: Annotated[bool, typer.Option(
        "--earlier-code", help="The formulas of the paper's public code where they differ: unit rows, squared "
                               "singular values, sparsity relative to the largest entry.")] = False,
    replicates: Annotated[int, typer.Option("--replicates", metavar="B", help="Bootstrap replicates.")] = 1000,
    exact_bootstrap: Annotated[bool, typer.Option(
        "--exact-bootstrap", help="Decompose every bootstrap replicate anew (slow) instead of to first order.")
    ] = False,
    seeds: Annotated[int, typer.Option(
        "--seeds", metavar="N", min=1, help="Repeat with N draws of samples and augmentations; adds a t-test "
                                            "per hidden state against no change.")] = 1,
    dtype: Dtype = DtypeName.auto,
    device: Device = "auto",
    seed: Seed = 0,
    tokenizer: Tokenizer = TokenizerOf.own,
    trust_remote_code: TrustRemoteCode = False,
    allow_pickle: AllowPickle = False,
    resume: Resume = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure a base and its tuned checkpoint layer by layer.

    Entropies, effective rank, sparsity, curvature, norms, intrinsic dimension, CKA (plain and
    debiased), cosine similarity, mean shift: at every hidden state 0..L, for each checkpoint and
    for their difference, each with an interval.
    """
    from midblock.analysis.profile import ProfileSettings
    from midblock.analysis.profile import profile as measure
    from midblock.errors import SettingsError

    if paper:
        samples, token_samples = 1000, 100
    if normalize not in ("max", "rows", "dim", "none"):
        raise SettingsError(f"--normalize {normalize!r} is not one of max, rows, dim, none.")
    wanted = ProfileSettings(
        samples=samples, token_samples=token_samples, max_length=max_length, batch_size=batch_size, seed=seed,
        alpha=alpha, normalize=normalize, unit_rows=earlier_code, energy=earlier_code,  # type: ignore[arg-type]
        sparsity_eps=sparsity_eps, sparsity_relative=earlier_code, views=views, view_samples=view_samples,
        replicates=replicates, resampling="exact" if exact_bootstrap else "first-order")

    def work(chain: Any, keys: Any, dataset: Any, run: Any, progress: Any) -> Any:
        call = {"data": dataset, "names": keys, "state_folder": run.path / "state", "progress": progress,
                "settings": wanted}
        if seeds == 1:
            return measure(chain, **call)
        from midblock.analysis.stability import profile_seeds

        return profile_seeds(chain, seeds=seeds, **call)

    run, result = run_analysis(
        "profile", models, names=names, data=data, seed=seed, out=out, resume=resume, dtype=dtype.value,
        device=device, trust_remote_code=trust_remote_code, allow_pickle=allow_pickle, tokenizer=tokenizer.value,
        settings={"seeds": seeds, **{f: getattr(wanted, f) for f in wanted.__dataclass_fields__}}, measure=work)
    if result.counts["pooled_samples"] < samples:
        console.warn(f"only {result.counts['pooled_samples']} of the {samples} samples asked for were usable.")
    console.print_table(result.regions(), title=f"Change by depth ({ZONES_TITLE})")
    show(run, result, regions=result.regions())
