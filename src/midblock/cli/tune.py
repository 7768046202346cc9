"""`midblock tune MODEL --data D --mask 01100`: train chosen blocks, check and export them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from midblock import ranks
from midblock.cli import console
from midblock.cli.analysis import loading
from midblock.cli.answers import in_earnest, show_answer
from midblock.cli.command import command
from midblock.cli.options import Data, Model, Resume
from midblock.errors import SettingsError
from midblock.settings import TuneSettings
from midblock.settings.load import StreamedLoadSettings

if TYPE_CHECKING:
    from midblock.tuning import Plan

__all__ = ["tune"]


@command(
    "midblock tune smollm2 --data arithmetic --samples 400 --mask 01100 --out runs/tune",
    "midblock tune smollm2 --data arithmetic --mask 01100 --dry-run",
    "midblock tune MODEL --data gsm8k --blocks 8:16 --rank 32 --merge",
    "midblock tune MODEL --data mine.jsonl --random-blocks 6 --budget match:11111@16",
    "midblock tune MODEL --data gsm8k --mask 00100 --method full --learning-rate 2e-5",
    "midblock tune MODEL --data gsm8k --plan runs/importance/plan.json",
    "midblock tune MODEL --data gsm8k --mask 01000 --load-4bit --stream always --memory-limit 8GB",
    "midblock tune smollm2 --data arithmetic --samples 400 --mask 01100 --out runs/tune --resume")
def tune(
    model: Model,
    data: Data,
    settings: TuneSettings,
    load: StreamedLoadSettings,
    plan_file: Annotated[Path | None, typer.Option(
        "--plan", metavar="FILE", show_default=False,
        help="Train what a plan file names (from `importance` or `tune --dry-run --json`).")] = None,
    dry_run: Annotated[bool, typer.Option(
        "--dry-run", help="Print blocks, rank, parameters, and estimates of memory and time; train nothing.")] = False,
    out: Annotated[Path, typer.Option(
        "--out", metavar="DIR", help="Folder for run.json, table.csv, figures, adapter/ and model/; must be empty "
                                     "unless --resume.")] = Path("runs/tune"),
    resume: Resume = False,
) -> None:
    """Train an adapter on chosen blocks at an exact budget.

    Blocks before the first trained one are computed once per sample. The loss counts what the
    completion (or the assistant) says. Afterwards a check proves that only the chosen weights moved.
    """
    from midblock.tuning.plan import load_plan

    plan = None if plan_file is None else load_plan(plan_file)
    if plan is not None and (settings.ways or settings.rank or settings.budget or settings.ranks != "equal"):
        raise SettingsError("--plan says where to train and at which rank; leave out --mask, --blocks, "
                            "--random-blocks, --rank, --ranks and --budget.")
    from midblock.data import load_data
    from midblock.models.resolve import resolve_checkpoint

    if settings.push:
        from midblock.tuning.hub import require_hub

        require_hub()
    # where most mistakes are: told before torch is imported
    resolve_checkpoint(model, trust_remote_code=load.trust_remote_code, allow_pickle=load.allow_pickle,
                       weights=not dry_run)
    load_data(data, split="train")
    loading([model])
    from midblock.tuning.eva import require_eva
    from midblock.tuning.run import plan_of_spec, prefix_cache, refuse_quantised
    from midblock.tuning.streamed import refuse_streamed

    store = prefix_cache(settings.cache, settings.cache_limit)
    solved = plan_of_spec(model, settings, plan, trust_remote_code=load.trust_remote_code,
                          allow_pickle=load.allow_pickle)
    if settings.ranks == "eva":
        require_eva(solved)
    refuse_quantised(solved, settings, quantised=load.load_4bit or load.load_8bit)
    refuse_streamed(solved, settings, streamed=load.stream == "always")
    if dry_run:
        _dry_run(model, data, solved, settings, load)
    else:
        _run(model, data, solved, settings, load, store, out=out, resume=resume)


def _run(model: str, data: str, plan: Plan, settings: TuneSettings, load: StreamedLoadSettings, store: Any, *,
         out: Path, resume: bool) -> None:
    from midblock.data import load_data
    from midblock.extras import require
    from midblock.models import load_chain
    from midblock.provenance import RunFolder
    from midblock.report import save_result
    from midblock.settings.load import STREAM_FIELDS
    from midblock.tuning import tune as run_tuning
    from midblock.tuning.run import require_tracker

    require("trl", "midblock tune")
    require_tracker(settings.report_to)
    dataset = load_data(data, split="train")
    if not resume:
        RunFolder.check_free(out)
    loaded = load_chain([model], names=[Path(model).name or "base"], **load.model_dump())[0]
    recorded = {"model": model, "data": data, "plan": plan.to_dict(), **settings.model_dump(), **load.model_dump()}
    with (RunFolder(out, command="tune", settings=recorded, resume=resume, may_differ=STREAM_FIELDS) as run,
          console.progress_bar() as progress):
        run.record_inputs(models={"base": loaded.describe()}, data=dataset.describe())
        result = run_tuning(loaded, dataset, settings, plan=plan, cache=store, out=run.path, resume=resume,
                            progress=progress)
        if ranks.follows():
            raise typer.Exit
        save_result(run, result, fields={"results": result.describe()}, progress=progress)
    if result.rows.truncated:
        console.warn(f"{result.rows.truncated} of {len(result.rows)} samples were longer than --max-length "
                     f"{settings.max_length} tokens and were cut; their ends, EOS included, were not learned.")
    for line in result.details():
        console.say(line)
    console.say(f"\nAdapter: {result.adapter}" if result.adapter else "")
    if result.gguf:
        console.say(f"For llama.cpp: {result.gguf}\nFor Ollama: ollama create NAME -f "
                    f"{result.gguf.parent / 'Modelfile'}")
    if result.pushed:
        console.say(f"Uploaded: {result.pushed}")
    if result.merged:
        console.say(f"Merged checkpoint: {result.merged} (logits differ from the trained model's by up to "
                    f"{result.merge_difference:.3g}"
                    + ("" if loaded.dtype.itemsize > 2 else "; half precision rounds merged weights and sums anew")
                    + ")")
    console.say(f"Table, figures and settings: {run.path}")
    answer = result.answer()
    show_answer(answer, run.path)
    console.emit_json({"run": run.run, "answer": answer, "summary": result.summary(), "plan": result.plan.to_dict(),
                       "results": result.describe(), "table": result.frame})


def _dry_run(model: str, data: str, plan: Plan, settings: TuneSettings, load: StreamedLoadSettings) -> None:
    """The plan and its estimates, from the model's config alone: no weight is read."""
    from midblock.data import load_data
    from midblock.results import Answer
    from midblock.tuning.estimate import forecast

    costs, rows = forecast(model, plan, load_data(data, split="train"), settings, load)
    console.say(f"Dry run: nothing is trained.\n\n{plan.summary()}")
    console.print_table(plan.table())
    if settings.ranks == "eva":
        console.say("EVA spreads these ranks anew, at the same parameters, when the weights and rows are read.")
    steps = settings.num_steps(len(rows))
    console.say(f"Data: {rows.summary()}; {steps} steps")
    console.print_table(costs, "Estimates, from the rate of this machine's products")
    show_answer(Answer(
        f"Nothing was trained: this plan has {plan.params:,} trainable parameters ({plan.share:.3%}) and takes {steps} "
        "steps; times are estimates.",
        "The estimate for all blocks at the same budget stands beside it.",
        in_earnest()))
    console.emit_json({"plan": plan.to_dict(), "data": rows.describe(), "steps": steps, "estimates": costs})
