"""`midblock importance MODEL --data D`: which matrices or blocks a fine-tune needs (ILA)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from midblock.cli import console
from midblock.cli.analysis import run_analysis, show
from midblock.cli.command import command
from midblock.cli.options import Data, Model, Resume, RunOut
from midblock.settings.importance import ImportanceSettings
from midblock.settings.load import LoadSettings

__all__ = ["importance"]


@command(
    "midblock importance smollm2 --data arithmetic --out runs/ila --apply top:0.3",
    "midblock importance smollm2 --data gsm8k --unit block --seed 1 --out runs/ila-gsm8k",
    "midblock importance smollm2 --data arithmetic --out runs/ila --resume --apply freeze-bottom:0.25",
    "midblock tune smollm2 --data arithmetic --plan runs/ila/plans/ila-top30.json")
def importance(
    model: Model, data: Data, settings: ImportanceSettings, load: LoadSettings,
    apply: Annotated[list[str] | None, typer.Option(
        "--apply", metavar="top:SHARE|freeze-bottom:SHARE", show_default=False,
        help="Write plans that tune and sweep accept: the best share of the units, or all but the worst; and the "
             "same of every control at equal parameters. Can be given again, also to a finished run with --resume.")
    ] = None,
    budget: Annotated[str | None, typer.Option(
        "--budget", metavar="PARAMS", show_default=False,
        help="Trainable parameters of the plans (900k, match:11111@16). Default: what the choice takes at --rank.")
    ] = None,
    out: RunOut = Path("runs/importance"), resume: Resume = False,
) -> None:
    """Learn which matrices or blocks a fine-tune needs (ILA), with controls.

    Trains LoRA everywhere until the loss is stable, then learns one score per unit for how much of
    its update the loss wants. --apply turns scores into plans.
    """
    from midblock.selection.choice import make_plans, parse_choice, write_plans

    choices = [parse_choice(text) for text in apply or ()]
    plans: dict[str, Any] = {}

    def work(chain: Any, keys: Any, dataset: Any, run: Any, progress: Any) -> Any:
        from midblock.selection.ila import importance as measure

        result = measure(chain[0], data=dataset, state_folder=run.path / "state", progress=progress, settings=settings)
        for choice in choices:
            made, missing = make_plans(chain[0], result, choice, budget=budget)
            for name, path in write_plans(run.path / "plans", made).items():
                plans[name] = {"file": str(path), "params": made[name].params, "rank": made[name].rank,
                               "blocks": len(made[name].blocks), "matrices": len(made[name].modules)}
            for name, reason in missing.items():
                console.warn(f"no plan {name}: {reason}")
        return result

    run, result = run_analysis("importance", [model], names=None, data=data, seed=settings.seed, out=out, resume=resume,
                               load=load, settings=settings, measure=work, least=1, may_grow=("max_steps",))
    frame = result.frame
    final = frame[frame["final"] & (frame["metric"] == "ila_score")]
    wide = final.pivot_table(index="layer", columns="matrix", values="value", sort=False)
    console.print_table(wide.reset_index().rename(columns={"layer": "block"}), title="ILA scores")
    if plans:
        import pandas as pd

        console.print_table(pd.DataFrame([{"plan": n, **p} for n, p in plans.items()]),
                            title="Plans at equal parameters, for tune --plan and arms.plans of a sweep")
    show(run, result, answer=_with_plan(result, plans), plans=plans)


def _with_plan(result: Any, plans: dict[str, Any]) -> Any:
    """The answer; where plans were written, the next command trains the first of them."""
    answer = result.answer()
    words = result.origin.words("tune", "--plan", next(iter(plans.values()))["file"], models=1) if plans else ()
    return replace(answer, next=words) if words else answer
