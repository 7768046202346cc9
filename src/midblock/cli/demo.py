"""`midblock demo`: the whole program on the embedded model, in a few minutes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from midblock.cli import console
from midblock.cli.options import Device, Dtype, DtypeName, Json, Quiet, Seed, examples
from midblock.segments import ZONES_TITLE

if TYPE_CHECKING:
    from midblock.data import Dataset
    from midblock.models import LoadedModel
    from midblock.progress import Progress

__all__ = ["register"]

MASKS = ("01100", "11111")


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    app.command("demo", epilog=examples(
        "midblock demo",
        "midblock demo --out runs/demo --seed 1",
        "midblock demo --scale 4      # four times the samples and steps"))(demo)


@dataclass(frozen=True)
class _Sizes:
    """How much of everything; multiplied by ``--scale``."""

    sft: int = 128
    profile: int = 48
    tokens: int = 16
    lens: int = 16
    swap: int = 12
    tune: int = 144
    evaluate: int = 40
    retention: int = 24

    def times(self, factor: float) -> _Sizes:
        return _Sizes(**{name: max(8, round(getattr(self, name) * factor)) for name in self.__dataclass_fields__})


@dataclass
class _Demo:
    base: LoadedModel
    out: Path
    sizes: _Sizes
    seed: int
    progress: Progress
    seconds: dict[str, float] = field(default_factory=dict)
    result: dict[str, Any] = field(default_factory=dict)

    @contextmanager
    def part(self, name: str, title: str) -> Iterator[None]:
        """Time a part and announce it."""
        console.say(f"\n== {title}")
        started = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - started, 1)


def demo(
    out: Annotated[Path, typer.Option(
        "--out", metavar="DIR", help="Folder for everything that the demo writes; must be empty.")] = Path("demo"),
    scale: Annotated[float, typer.Option(
        "--scale", metavar="X", min=0.05, help="Multiply samples and steps: 1 takes minutes on two cores.")] = 1.0,
    dtype: Dtype = DtypeName.auto,
    device: Device = "auto",
    seed: Seed = 0,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Run the main job on the embedded model: fine-tune, measure, tune the middle, compare.

    Fine-tunes SmolLM2-135M-Instruct on generated arithmetic (all parameters of its blocks), shows
    where that changed it (profile, weights, lens, swap), then trains LoRA on the middle blocks and
    on all blocks with equal budgets, and compares the two with the base: exact match, retention,
    speed, memory.
    """
    from midblock.data import load_data
    from midblock.models import load_model
    from midblock.provenance import RunFolder

    sizes = _Sizes().times(scale)
    settings = {"scale": scale, "dtype": dtype.value, "device": device, "seed": seed,
                **{name: getattr(sizes, name) for name in sizes.__dataclass_fields__}}
    RunFolder.check_free(out)
    started = time.perf_counter()
    console.say("Loading SmolLM2-135M-Instruct (converted once from GGUF) ...")
    base = load_model("smollm2", dtype=dtype.value, device=device)
    with RunFolder(out, command="demo", settings=settings) as run, console.progress_bar() as progress:
        train_data = load_data("arithmetic", split="train", seed=seed)
        test_data = load_data("arithmetic", split="test", seed=seed)
        run.record_inputs(models={"base": base.describe()}, data=test_data.describe())
        work = _Demo(base, run.path, sizes, seed, progress)
        with work.part("sft", f"1. Fine-tune all blocks on {sizes.sft} arithmetic problems"):
            sft = _fine_tune(work, train_data)
        with work.part("analysis", "2. Where did fine-tuning act? profile, weights, lens, swap"):
            _analyse(work, sft, test_data)
        with work.part("tune", f"3. Tune {MASKS[0]} and {MASKS[1]} with equal budgets on {sizes.tune} problems"):
            _tune_and_compare(work, train_data, test_data)
        work.seconds["all"] = round(time.perf_counter() - started, 1)
        run.update(results=work.result, parts_seconds=work.seconds)
    console.say(f"\nDone in {work.seconds['all']:.0f} s. Everything is in {run.path}/: one folder a command with "
                "run.json, table.csv, summary.txt and figures/ (SVG and PNG); sft/model and adapter-* can be "
                "loaded again.")
    console.emit_json({"run": run.run, "results": work.result})


def _fine_tune(work: _Demo, data: Dataset) -> LoadedModel:
    """Full-parameter fine-tune of all blocks; saved as a checkpoint and loaded from there."""
    from midblock.data import tokenize
    from midblock.models import load_model, save_checkpoint
    from midblock.tuning import TrainSettings, attach, make_plan, train

    base = work.base
    rows = tokenize(data.sample(work.sizes.sft, work.seed), base.tokenizer, max_length=256, supervised=True)
    plan = make_plan(base.model, mask="1", method="full", target_modules=("all",))
    with attach(base, plan, seed=work.seed) as attachment:
        trained = train(attachment, rows, tokenizer=base.tokenizer, progress=work.progress,
                        settings=TrainSettings(epochs=1, batch_size=8, learning_rate=1e-4, seed=work.seed))
        folder = save_checkpoint(attachment.base, base.tokenizer, work.out / "sft" / "model")
    # the base as it was trained from: against the float32 original, rounding would pass for change
    save_checkpoint(base.model, base.tokenizer, work.out / "base" / "model")
    console.say(f"{plan.params:,} parameters, {len(trained.steps)} steps, loss {trained.losses[0]:.3f} -> "
                f"{trained.final_loss():.3f}, {trained.tokens_per_second:,.0f} tokens/s")
    work.result["sft"] = trained.describe()
    return load_model(str(folder), dtype=str(base.dtype).removeprefix("torch."), device=str(base.device))


def _analyse(work: _Demo, sft: LoadedModel, data: Dataset) -> None:
    from midblock.analysis.lens import lens
    from midblock.analysis.profile import profile
    from midblock.analysis.swap import swap
    from midblock.analysis.weights import weights
    from midblock.provenance import RunFolder
    from midblock.report import save_result

    base, sizes, progress = work.base, work.sizes, work.progress
    calls: dict[str, Any] = {
        "profile": lambda: profile(base, sft, data=data, samples=sizes.profile, token_samples=sizes.tokens,
                                   max_length=128, seed=work.seed, progress=progress),
        "weights": lambda: weights([str(work.out / "base" / "model"), str(sft.folder)], progress=progress),
        "lens": lambda: lens(base, sft, data=data, samples=sizes.lens, max_length=128, seed=work.seed, every=2,
                             paper_code=True, progress=progress),
        "swap": lambda: swap(base, sft, data=data, samples=sizes.swap, max_length=128, segments=5, supervised=True,
                             seed=work.seed, progress=progress),
    }
    for name, call in calls.items():
        with RunFolder(work.out / name, command=name, settings={"demo": True}) as run:
            result = call()
            save_result(run, result, progress=progress)
        if name == "profile":
            console.print_table(result.regions(), title=f"\nChange by depth ({ZONES_TITLE})")
        console.say(f"\n{name}: {result.summary()}")
        work.result[name] = {"summary": result.summary()}


def _tune_and_compare(work: _Demo, train_data: Dataset, test_data: Dataset) -> None:
    import pandas as pd

    from midblock.data import tokenize
    from midblock.tuning import TrainSettings, attach, make_plan, train

    base, seed = work.base, work.seed
    rows = tokenize(train_data.sample(work.sizes.tune, seed), base.tokenizer, max_length=256, supervised=True)
    table = [{"arm": "base (00000)", **_scores(work, base, test_data)}]
    for mask in MASKS:
        plan = make_plan(base.model, mask=mask)
        with attach(base, plan, seed=seed) as attachment:
            trained = train(attachment, rows, tokenizer=base.tokenizer, progress=work.progress,
                            settings=TrainSettings(epochs=2, batch_size=8, seed=seed))
            attachment.save(work.out / f"adapter-{mask}")
            adapted: Any = attachment.model  # a PEFT model around the base
            tuned = replace(base, model=adapted, name=mask)
            table.append({"arm": mask, "parameters": plan.params, "rank": plan.rank,
                          **_scores(work, tuned, test_data),
                          "tokens/s": trained.tokens_per_second,
                          "peak MB": trained.peak_memory_bytes / 1e6, "final loss": trained.final_loss()})
    frame = pd.DataFrame(table)
    console.print_table(frame, title="\nEqual budgets, same problems and order (95% intervals)")
    work.result["comparison"] = frame
    frame.to_csv(work.out / "comparison.csv", index=False)


def _scores(work: _Demo, model: LoadedModel, data: Dataset) -> dict[str, Any]:
    from midblock.evaluation import evaluate

    exact = evaluate(model, "arithmetic", data=data, samples=work.sizes.evaluate, seed=work.seed,
                     progress=work.progress)
    kept = evaluate(model, "pydocs", samples=work.sizes.retention, max_length=128, seed=work.seed,
                    progress=work.progress)
    return {"exact match": exact.value, "low": exact.estimate.low, "high": exact.estimate.high, "items": exact.n,
            "pydocs perplexity": kept.value,
            "ppl low": kept.estimate.low, "ppl high": kept.estimate.high}
