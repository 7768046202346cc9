"""`midblock demo`: the whole program on the embedded model, in a few minutes."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from midblock.cli import console
from midblock.cli.answers import show_answer
from midblock.cli.command import command
from midblock.cli.options import RunOut
from midblock.settings.demo import DemoSettings
from midblock.settings.load import ChainLoadSettings

if TYPE_CHECKING:
    from midblock.models import LoadedModel

__all__ = ["demo"]

MASKS = ("01100", "11111")
_SECONDS = 240.0  # what the demo may take
_FIXED = 60.0  # loading, converting once, drawing
_WORK = 5.0e13  # floating-point operations at scale 1
_SHARE = 0.5  # of the product rate that training and measuring reach together


@dataclass(frozen=True)
class _Sizes:
    """How much of everything; multiplied by the scale."""

    sft: int = 128
    profile: int = 48
    tokens: int = 16
    lens: int = 16
    swap: int = 12
    tune: int = 128
    evaluate: int = 32
    retention: int = 24

    def times(self, factor: float) -> _Sizes:
        return _Sizes(**{name: max(8, round(getattr(self, name) * factor)) for name in self.__dataclass_fields__})


@command(
    "midblock demo",
    "midblock demo --out runs/demo --seed 1",
    "midblock demo --scale 4      # four times the samples and steps")
def demo(settings: DemoSettings, load: ChainLoadSettings, out: RunOut = Path("demo")) -> None:
    """Run the main job on the embedded model: fine-tune, study, tune the middle, compare, report.

    Fine-tunes SmolLM2-135M-Instruct on generated arithmetic (all parameters of its blocks), studies where that changed
    it, then sweeps LoRA on the middle blocks against all blocks with equal budgets (exact match, retention, speed,
    memory), and writes one report of everything.
    """
    from midblock.models import load_model
    from midblock.provenance import RunFolder
    from midblock.report.findings import answer_of
    from midblock.report.page import build_report
    from midblock.report.study import study
    from midblock.sweeps import parse_config, sweep

    RunFolder.check_free(out)
    started = time.perf_counter()
    console.say("Loading SmolLM2-135M-Instruct (converted once from GGUF, about half a minute) ...")
    base = load_model("smollm2", **load.placement())
    scale = settings.scale or _fitting_scale(base)
    sizes = _Sizes().times(scale)
    dtype, device = str(base.dtype).removeprefix("torch."), str(base.device)
    console.say(f"In {dtype} on {device}, at scale {scale:.2g}: about {_seconds(base, scale) / 60:.0f} minutes.")
    with RunFolder(out, command="demo", settings={"dtype": dtype, "device": device, **settings.model_dump(),
                                                  "scale": scale}) as run, console.progress_bar() as progress:
        console.say(f"\n== 1. Fine-tune all blocks on {sizes.sft} arithmetic problems")
        trained = _fine_tune(base, run.path, sizes, settings.seed, progress)
        console.say("\n== 2. Where did fine-tuning act?")
        studied = study([str(run.path / "base" / "model"), str(run.path / "sft" / "model")], data=["arithmetic"],
                        out=run.path / "study", load=load.replace(dtype=dtype), progress=progress,
                        tell=console.step, only=("weights", "profile", "lens", "swap"), samples=sizes.profile,
                        token_samples=sizes.tokens, lens_samples=sizes.lens, swap_samples=sizes.swap, max_length=128,
                        seed=settings.seed)
        console.say(studied.answer().found)
        for line in studied.details():
            console.say(line)
        console.say(f"\n== 3. Tune {MASKS[0]} and {MASKS[1]} with equal budgets on {sizes.tune} problems")
        swept = sweep(parse_config(_sweep_of(sizes, dtype, device, settings.seed)), out=run.path / "sweep", loaded=base,
                      progress=progress)
        console.print_table(swept.overview(), title="Equal budgets, same problems and order (95% intervals)")
        console.say(swept.summary())
        made = build_report([run.path / "study", run.path / "sweep"], run.path / "report.html",
                            title="midblock demo: SmolLM2-135M-Instruct tuned on arithmetic")
        seconds = round(time.perf_counter() - started, 1)
        run.update(results={"sft": trained, "findings": made["findings"], "arms": swept.overview(), "seconds": seconds})
    console.say(f"\nDone in {seconds:.0f} s. Open {run.path / 'report.html'} in a browser; everything else is beside "
                "it, one folder a command.")
    show_answer(answer_of(made["findings"]), out)
    console.emit_json({"run": run.run, "results": run.run["results"], "report": str(run.path / "report.html")})


def _rate(base: LoadedModel) -> float:
    """Floating-point operations a second that the demo can count on."""
    import torch

    from midblock.models.dtypes import dtype_name, product_rates

    rates = product_rates(base.model.config, base.device)
    cores = torch.get_num_threads() if base.device.type == "cpu" else 1
    return _SHARE * cores * rates.get(dtype_name(base.dtype), rates["float32"])


def _seconds(base: LoadedModel, scale: float) -> float:
    return _FIXED + scale * _WORK / _rate(base)


def _fitting_scale(base: LoadedModel) -> float:
    """The scale that takes about `_SECONDS`, between a tenth and one."""
    return min(1.0, max(0.1, round((_SECONDS - _FIXED) * _rate(base) / _WORK, 2)))


def _fine_tune(base: LoadedModel, out: Path, sizes: _Sizes, seed: int, progress: Any) -> dict[str, Any]:
    """Full-parameter fine-tune of all blocks; both checkpoints are saved, the base as it was trained from."""
    from midblock.data import load_data, tokenize
    from midblock.models import save_checkpoint
    from midblock.tuning import TrainSettings, attach, make_plan, train

    data = load_data("arithmetic", split="train", seed=seed).sample(sizes.sft, seed)
    rows = tokenize(data, base.tokenizer, max_length=256, supervised=True)
    # against the float32 original, rounding would pass for change
    save_checkpoint(base.model, base.tokenizer, out / "base" / "model")
    plan = make_plan(base.model, mask="1", method="full", target_modules=("all",))
    with attach(base, plan, seed=seed) as attachment:
        trained = train(attachment, rows, tokenizer=base.tokenizer, progress=progress,
                        settings=TrainSettings(epochs=1, batch_size=8, learning_rate=1e-4, seed=seed))
        save_checkpoint(attachment.base, base.tokenizer, out / "sft" / "model")
    console.say(f"{plan.params:,} parameters, {len(trained.steps)} steps, loss {trained.losses[0]:.3f} -> "
                f"{trained.final_loss():.3f}, {trained.tokens_per_second:,.0f} tokens/s")
    return trained.describe()


def _sweep_of(sizes: _Sizes, dtype: str, device: str, seed: int) -> dict[str, Any]:
    return {"name": "demo", "model": "smollm2", "dtype": dtype, "device": device, "seeds": [seed],
            "train": {"data": "arithmetic", "samples": sizes.tune, "max_length": 256, "seed": seed},
            "training": {"epochs": 2, "batch_size": 8},
            "arms": {"baseline": MASKS[1], "masks": [MASKS[0]]},
            "evaluation": [{"task": "arithmetic", "samples": sizes.evaluate, "seed": seed}],
            "retention": [{"task": "pydocs", "samples": sizes.retention, "max_length": 128, "seed": seed}]}
