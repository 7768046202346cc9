"""`midblock weights BASE SFT`: which matrices changed, block by block, straight from the files."""

from __future__ import annotations

from pathlib import Path

from midblock.cli import console
from midblock.cli.analysis import Chain, Names, loading, show, split_names
from midblock.cli.command import command
from midblock.cli.options import RunOut
from midblock.segments import ZONES_TITLE
from midblock.settings import WeightsSettings

__all__ = ["weights"]


@command(
    "midblock weights allenai/OLMo-2-0425-1B allenai/OLMo-2-0425-1B-SFT --out runs/weights",
    "midblock weights smollm2 runs/tuned/adapter --json",
    "midblock weights BASE SFT DPO --names base,sft,dpo --no-spectra")
def weights(models: Chain, settings: WeightsSettings, out: RunOut = Path("runs/weights"), names: Names = None) -> None:
    """Measure how far every weight moved, straight from the safetensors files.

    No model is built: files of any size, sharded or not, are read side by side at the speed of the
    disk. Per block and matrix: Frobenius norm of the difference, absolute (the paper's equation 1
    is the column qkvo) and relative to the base; norms, MLP, embeddings and head as well. A
    tuned checkpoint may be a PEFT LoRA adapter of the base.
    """
    from midblock.errors import SettingsError
    from midblock.models.stages import comparisons, side_of, stage_names

    if len(models) < 2:
        raise SettingsError(f"weights compares at least 2 checkpoints, got only {' '.join(models)}; give a base and "
                            "a tuned one.")
    keys = stage_names(len(models), split_names(names))
    from midblock.models.checkpoints import fingerprint, is_adapter_folder
    from midblock.models.pairs import pair_warning
    from midblock.models.resolve import resolve_checkpoint
    from midblock.provenance import RunFolder
    from midblock.writing import sha256_of

    for tuned in models[1:]:
        if note := pair_warning(models[0], tuned):
            console.warn(note)
    RunFolder.check_free(out)
    folders = [resolve_checkpoint(m) for m in models]
    loading(models)
    from midblock.analysis.weights import weights as measure
    from midblock.report import save_result

    recorded = {"models": models, "names": keys, **dict(settings)}
    with RunFolder(out, command="weights", settings=recorded) as run, console.progress_bar() as progress:
        result = measure(models, names=keys, progress=progress, settings=settings)
        # hashed after the comparison, while the system still holds the files
        described = {}
        for key, spec, folder in zip(keys, models, folders, strict=True):
            own, adapter = fingerprint(folder), is_adapter_folder(folder)
            described[key] = {"spec": spec, "adapter": str(folder) if adapter else None, "blocks": result.num_blocks,
                              "fingerprint": sha256_of(fingerprint(folders[0]), own) if adapter else own}
        run.record_inputs(models=described, data={})
        save_result(run, result, fields={"counts": result.counts}, progress=progress)
    for stage in map(side_of, comparisons(keys)):
        if result.changed(stage):
            console.print_table(result.by_block(stage), title=f"{stage}: Frobenius norm of the difference")
    moved = result.regions().dropna(subset=["largest at block"])
    if len(moved):
        console.print_table(moved, title=f"Change by depth ({ZONES_TITLE}), means over the blocks that changed")
    show(run, result, regions=result.regions())
