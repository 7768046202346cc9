"""`midblock tune MODEL --data D --mask 01100`: train chosen blocks, check and export them."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from midblock.cli import console
from midblock.cli.options import (
    AllowPickle,
    Data,
    Device,
    DtypeName,
    Json,
    MaxLength,
    Model,
    Quiet,
    Resume,
    Samples,
    Seed,
    TrustRemoteCode,
    examples,
)

if TYPE_CHECKING:
    from midblock.models import Anatomy
    from midblock.tuning import Plan, TrainSettings

__all__ = ["register"]


class MethodName(StrEnum):
    """How the chosen matrices are trained."""

    lora = "lora"
    dora = "dora"
    full = "full"


class ScaleName(StrEnum):
    """What is kept constant when the rank changes."""

    ratio = "fixed-ratio"
    rslora = "rslora"
    alpha = "fixed-alpha"


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    app.command("tune", epilog=examples(
        "midblock tune smollm2 --data arithmetic --samples 400 --mask 01100 --out runs/tune",
        "midblock tune smollm2 --data arithmetic --mask 01100 --dry-run",
        "midblock tune MODEL --data gsm8k --blocks 8:16 --rank 32 --merge",
        "midblock tune MODEL --data mine.jsonl --random-blocks 6 --budget match:11111@16",
        "midblock tune MODEL --data gsm8k --mask 00100 --method full --learning-rate 2e-5",
        "midblock tune MODEL --data gsm8k --plan runs/importance/plan.json",
        "midblock tune smollm2 --data arithmetic --samples 400 --mask 01100 --out runs/tune --resume"))(tune)


def tune(
    model: Model,
    data: Data,
    mask: Annotated[str | None, typer.Option(
        "--mask", metavar="01100", show_default=False,
        help="Depth segments to train, one digit each from input to output.")] = None,
    blocks: Annotated[str | None, typer.Option(
        "--blocks", metavar="8:16", show_default=False, help="Blocks to train: 8:16 (16 excluded), 3, 0:4,12:16.")
    ] = None,
    random_blocks: Annotated[int | None, typer.Option(
        "--random-blocks", metavar="N", min=1, show_default=False,
        help="Train N blocks drawn with --seed: the control for a mask of as many blocks.")] = None,
    plan_file: Annotated[Path | None, typer.Option(
        "--plan", metavar="FILE", show_default=False,
        help="Train what a plan file names (from `importance` or `tune --dry-run --json`).")] = None,
    rank: Annotated[int | None, typer.Option(
        "--rank", metavar="R", show_default=False, help="LoRA rank.")] = None,
    budget: Annotated[str | None, typer.Option(
        "--budget", metavar="PARAMS", show_default=False,
        help="Trainable parameters; the rank is solved. A number (900k, 1.5M) or match:MASK@RANK. "
             "Default: match:11111@16, what rank 16 takes on all blocks.")] = None,
    target_modules: Annotated[str, typer.Option(
        "--target-modules", metavar="NAMES",
        help="Matrices in each block: q,k,v,o,gate,up,down, module names, or attention, mlp, all-linear "
             "(with --method full also all).")] = "q,k,v,o",
    method: Annotated[MethodName, typer.Option(
        "--method", help="lora, dora, or full (train the matrices themselves).")] = MethodName.lora,
    scale: Annotated[ScaleName, typer.Option(
        "--scale", help="fixed-ratio: alpha/rank is kept; rslora: alpha/sqrt(rank); fixed-alpha: alpha 128 whatever "
                        "the rank (the paper's public code).")] = ScaleName.ratio,
    alpha_over_rank: Annotated[float, typer.Option(
        "--alpha-over-rank", metavar="X", help="Factor of the update (rslora: at rank 16).")] = 2.0,
    alpha: Annotated[float | None, typer.Option(
        "--alpha", metavar="A", show_default=False, help="Alpha itself, in place of --alpha-over-rank.")] = None,
    dropout: Annotated[float, typer.Option("--dropout", min=0.0, max=0.9, help="Of LoRA's input.")] = 0.0,
    samples: Samples = None,
    max_length: MaxLength = 512,
    chat: Annotated[bool, typer.Option("--chat", help="Write rows with the tokenizer's chat template.")] = False,
    all_tokens: Annotated[bool, typer.Option(
        "--all-tokens", help="Learn every token of a row instead of completions only (for plain text).")] = False,
    epochs: Annotated[float, typer.Option("--epochs", metavar="E", help="Passes over the rows.")] = 2.0,
    steps: Annotated[int | None, typer.Option(
        "--steps", metavar="N", show_default=False, help="Optimizer steps, in place of --epochs.")] = None,
    learning_rate: Annotated[float | None, typer.Option(
        "--learning-rate", metavar="LR", show_default=False,
        help="Peak learning rate (5e-4; 5e-5 with --method full).")] = None,
    schedule: Annotated[str, typer.Option(
        "--schedule", metavar="linear|cosine|constant", help="Of the learning rate.")] = "linear",
    warmup: Annotated[float, typer.Option("--warmup", help="Share of the steps over which it rises.")] = 0.05,
    batch_size: Annotated[int, typer.Option(
        "--batch-size", metavar="N", min=1, help="Rows in one forward.")] = 8,
    accumulate: Annotated[int, typer.Option(
        "--accumulate", metavar="N", min=1, help="Forwards in one optimizer step.")] = 1,
    order: Annotated[str, typer.Option(
        "--order", metavar="length|random", help="Rows of a batch: of like length, or drawn at random.")] = "length",
    gradient_checkpointing: Annotated[bool, typer.Option(
        "--gradient-checkpointing", help="Less memory, a second forward of the blocks that run.")] = False,
    cache: Annotated[str, typer.Option(
        "--cache", metavar="auto|none|memory|disk:DIR",
        help="Where the frozen prefix's output is kept. auto: in memory where that is exact.")] = "auto",
    cache_limit: Annotated[str | None, typer.Option(
        "--cache-limit", metavar="SIZE", show_default=False, help="Byte limit of the cache, such as 4GB.")] = None,
    eval_data: Annotated[str | None, typer.Option(
        "--eval-data", metavar="D", show_default=False,
        help="Held-out rows whose loss is compared before and after (the test split of D).")] = None,
    eval_samples: Annotated[int, typer.Option("--eval-samples", metavar="N", min=2, help="How many of them.")] = 64,
    merge: Annotated[bool, typer.Option(
        "--merge", help="Also write base + adapter as a plain checkpoint in OUT/model.")] = False,
    pad_rank: Annotated[bool, typer.Option(
        "--pad-rank", help="Write the adapter at the next rank that vLLM takes, with zeros.")] = False,
    load_4bit: Annotated[bool, typer.Option(
        "--load-4bit", help="Hold the base in 4 bit (needs bitsandbytes).")] = False,
    save_steps: Annotated[int | None, typer.Option(
        "--save-steps", metavar="N", min=1, show_default=False, help="Checkpoint every N steps (every minute).")
    ] = None,
    report_to: Annotated[str, typer.Option(
        "--report-to", metavar="NAME", help="A tracker, as for transformers (tensorboard, wandb, ...).")] = "none",
    dry_run: Annotated[bool, typer.Option(
        "--dry-run", help="Print blocks, rank, parameters, and estimates of memory and time; train nothing.")] = False,
    out: Annotated[Path, typer.Option(
        "--out", metavar="DIR", help="Folder for run.json, table.csv, figures, adapter/ and model/; must be empty "
                                     "unless --resume.")] = Path("runs/tune"),
    resume: Resume = False,
    dtype: Annotated[DtypeName, typer.Option(
        "--dtype", help="Dtype of the frozen weights; what is trained is float32. auto: 16 bits for 16-bit "
                        "checkpoints where this device multiplies faster in them (measured once and remembered) or "
                        "float32 would not fit into memory, else float32.")] = DtypeName.auto,
    device: Device = "auto",
    seed: Seed = 0,
    trust_remote_code: TrustRemoteCode = False,
    allow_pickle: AllowPickle = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train an adapter on chosen blocks at an exact budget.

    Blocks before the first trained one are computed once per sample. The loss counts what the
    completion (or the assistant) says. Afterwards a check proves that only the chosen weights moved.
    """
    from midblock.errors import SettingsError
    from midblock.tuning import TrainSettings, load_plan

    if schedule not in ("linear", "cosine", "constant"):
        raise SettingsError(f"--schedule {schedule!r} is not one of linear, cosine, constant.")
    wanted = TrainSettings(
        epochs=epochs, steps=steps, learning_rate=learning_rate, batch_size=batch_size, accumulate=accumulate,
        warmup=warmup, schedule=schedule, order=order,  # type: ignore[arg-type]
        gradient_checkpointing=gradient_checkpointing, seed=seed)
    plan_options: dict[str, Any] = {
        "mask": mask, "blocks": blocks, "random_blocks": None if random_blocks is None else (random_blocks, seed),
        "rank": rank, "budget": budget, "target_modules": [t for t in target_modules.split(",") if t],
        "method": method.value, "scale": scale.value, "alpha_over_rank": alpha_over_rank, "alpha": alpha}
    given_plan = None if plan_file is None else load_plan(plan_file)
    if given_plan is not None and (mask or blocks or random_blocks or rank or budget):
        raise SettingsError("--plan says where to train and at which rank; leave out --mask, --blocks, "
                            "--random-blocks, --rank and --budget.")
    load_options = {"dtype": dtype.value, "device": device,
                    "trust_remote_code": trust_remote_code, "allow_pickle": allow_pickle}
    data_options = {"samples": samples, "max_length": max_length, "chat": chat, "all_tokens": all_tokens}
    if dry_run:
        _dry_run(model, data, given_plan, plan_options, data_options, wanted, cache, load_options)
        return
    _run(model, data, given_plan, plan_options, data_options, wanted, load_options, out=out, resume=resume,
         quantised=load_4bit, cache=cache, cache_limit=cache_limit, more={
             "dropout": dropout, "eval_data": eval_data, "eval_samples": eval_samples, "merge": merge,
             "pad_rank": pad_rank, "save_steps": save_steps, "report_to": report_to})


def _run(model: str, data: str, plan: Plan | None, plan_options: dict[str, Any], data_options: dict[str, Any],
         wanted: TrainSettings, load_options: dict[str, Any], *, out: Path, resume: bool, quantised: bool,
         cache: str, cache_limit: str | None, more: dict[str, Any]) -> None:
    from dataclasses import asdict

    from midblock.data import load_data
    from midblock.models import load_model
    from midblock.provenance import RunFolder
    from midblock.report import save_result
    from midblock.tuning import PrefixCache, make_plan, require_plan_fits
    from midblock.tuning import tune as run_tuning
    from midblock.tuning.run import load_4bit

    store: Any = cache
    if cache_limit is not None:
        store = PrefixCache.from_spec("memory" if cache == "auto" else cache, limit_bytes=cache_limit)
    elif cache != "auto":
        PrefixCache.from_spec(cache)  # a wrong word is told before the model is loaded
    dataset = load_data(data, split="train")
    loaded = (load_4bit if quantised else load_model)(model, **load_options)
    # the plan first: it is where most mistakes are, and it costs nothing
    solved = make_plan(loaded, **plan_options) if plan is None else require_plan_fits(plan, loaded)
    settings = {"model": model, "data": data, "plan": solved.to_dict(), **data_options, **asdict(wanted),
                **load_options, "quantised": quantised, "cache": cache, **more}
    with RunFolder(out, command="tune", settings=settings, resume=resume) as run, \
            console.progress_bar() as progress:
        run.record_inputs(models={"base": loaded.describe()}, data=dataset.describe())
        result = run_tuning(loaded, dataset, plan=solved, settings=wanted, cache=store, out=run.path, resume=resume,
                            progress=progress, **data_options, **more)
        save_result(run, result, fields={"results": result.describe()}, progress=progress)
    if result.rows.truncated:
        console.warn(f"{result.rows.truncated} of {len(result.rows)} samples were longer than --max-length "
                     f"{data_options['max_length']} tokens and were cut; their ends, EOS included, were not learned.")
    console.say(result.summary())
    console.say(f"\nAdapter: {result.adapter}" if result.adapter else "")
    if result.merged:
        console.say(f"Merged checkpoint: {result.merged} (logits differ from the trained model's by up to "
                    f"{result.merge_difference:.3g}"
                    + ("" if loaded.dtype.itemsize > 2 else "; half precision rounds merged weights and sums anew")
                    + ")")
    console.say(f"Table, figures and settings: {run.path}\nScore it: midblock evaluate "
                f"{result.adapter or result.merged} --task arithmetic")
    console.emit_json({"run": run.run, "summary": result.summary(), "plan": solved.to_dict(),
                       "results": result.describe(), "table": result.frame})


def _dry_run(model: str, data: str, plan: Plan | None, plan_options: dict[str, Any], data_options: dict[str, Any],
             wanted: TrainSettings, cache: str, load_options: dict[str, Any]) -> None:
    """The plan and its estimates, from the model's config alone: no weight is read."""
    from midblock.data import load_data, tokenize
    from midblock.models import choose_dtype, find_anatomy, load_tokenizer, resolve_device, text_config
    from midblock.models.summary import model_skeleton
    from midblock.tuning import make_plan, require_plan_fits

    skeleton, stored, folder = model_skeleton(model, trust_remote_code=load_options["trust_remote_code"],
                                              allow_pickle=load_options["allow_pickle"])
    anatomy = find_anatomy(skeleton)
    solved = make_plan(anatomy, **plan_options) if plan is None else require_plan_fits(plan, anatomy)
    place = resolve_device(load_options["device"])
    number = choose_dtype(load_options["dtype"], stored=stored, device=place, config=text_config(skeleton),
                          parameters=sum(p.numel() for p in skeleton.parameters())).dtype
    dataset = load_data(data, split="train").sample(data_options["samples"], wanted.seed)
    rows = tokenize(dataset, load_tokenizer(folder), max_length=data_options["max_length"],
                    supervised=not data_options["all_tokens"], chat=data_options["chat"],
                    add_eos=True if data_options["all_tokens"] else None)
    costs = _costs(solved, anatomy, rows, wanted, cache != "none", place, number)
    console.say(f"Dry run: nothing is trained.\n\n{solved.summary()}")
    console.print_table(solved.table())
    console.say(f"Data: {rows.summary()}; {wanted.num_steps(len(rows))} steps")
    console.print_table(costs, "Estimates (measured: matrix products of this machine; not measured: the rest)")
    console.emit_json({"plan": solved.to_dict(), "data": rows.describe(), "steps": wanted.num_steps(len(rows)),
                       "estimates": costs})


def _costs(plan: Plan, anatomy: Anatomy, rows: Any, wanted: TrainSettings, cached: bool, place: Any,
           number: Any) -> Any:
    import pandas as pd

    from midblock.tuning.estimate import all_layer_plan, estimate, matmul_rate

    lengths = [len(r) for r in rows]
    supervised = sum((stop - start for r in rows for start, stop in r.supervised), 0) or rows.num_tokens
    steps_per_epoch = _steps_per_epoch(wanted, len(lengths))
    epochs = wanted.epochs if wanted.steps is None else wanted.steps / steps_per_epoch
    # matrix products are about two thirds of a step (docs/performance.md)
    rate = 0.65 * matmul_rate(place, number)
    lines = []
    everything = all_layer_plan(anatomy, plan)
    for name, one, keep in (("this plan", plan, cached), ("all-layer LoRA, rank 16", everything, False)):
        cost = estimate(one, anatomy, lengths, supervised, batch_size=wanted.batch_size, dtype=number, cached=keep,
                        checkpointing=wanted.gradient_checkpointing)
        lines.append({"": name, "trainable": one.params, "share of model": f"{one.share:.3%}",
                      "memory MiB": round(cost.memory_bytes / 2**20),
                      "of which cache": round(cost.cache_bytes / 2**20),
                      "first epoch s": round(cost.first_epoch_flops / rate, 1),
                      "later epoch s": round(cost.epoch_flops / rate, 1),
                      "training s": round(cost.total_flops(epochs) / rate, 1)})
    frame = pd.DataFrame(lines)
    frame["relative time"] = [round(v / lines[-1]["training s"], 2) if lines[-1]["training s"] else 1.0
                              for v in frame["training s"]]
    return frame


def _steps_per_epoch(wanted: TrainSettings, rows: int) -> int:
    import math

    return max(1, math.ceil(math.ceil(rows / wanted.batch_size) / wanted.accumulate))
