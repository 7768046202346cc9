"""`midblock sweep CONFIG.yaml`: many arms under one budget, compared with statistics that hold."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from midblock.cli import console
from midblock.cli.analysis import loading
from midblock.cli.answers import in_earnest, show_answer
from midblock.cli.command import command
from midblock.cli.options import Out, Resume
from midblock.reading import printable
from midblock.settings.load import TrustSettings

if TYPE_CHECKING:
    import pandas as pd

    from midblock.progress import Progress
    from midblock.sweeps import SweepPlan, SweepResult, SweepState

__all__ = ["sweep"]


@command(
    "midblock sweep recipes/smoke.yaml --dry-run",
    "midblock sweep recipes/smoke.yaml --out runs/smoke",
    "midblock sweep recipes/smollm2-arithmetic.yaml --out runs/arithmetic",
    "midblock sweep recipes/smollm2-arithmetic.yaml --out runs/arithmetic --resume",
    "midblock sweep recipes/smoke.yaml --set seeds=[0,1,2] --set training.epochs=1 --out runs/three")
def sweep(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", show_default=False,
                                           help="The experiment as a YAML file; see recipes/ and docs/sweeps.md.")],
    *,
    dry_run: Annotated[bool, typer.Option(
        "--dry-run", help="Print every arm with its exact parameters, the estimated time and memory, and the smallest "
                          "difference that can be detected; train nothing.")] = False,
    overrides: Annotated[list[str] | None, typer.Option(
        "--set", metavar="KEY=VALUE", show_default=False,
        help="Override one key, such as training.epochs=1 or evaluation.0.samples=20; repeat for more.")] = None,
    out: Out = None,
    resume: Resume = False,
    report_to: Annotated[str | None, typer.Option(
        "--report-to", metavar="NAME", show_default=False,
        help="A tracker of every run, as for transformers (tensorboard, trackio, wandb, ...).")] = None,
    trust: TrustSettings,
) -> None:
    """Train and score many configurations alike, and say what the data support.

    Every arm sees the same rows in the same order, the same number of steps and the same
    evaluation items, at (nearly) the same number of trainable parameters. Each run is one file in
    OUT/results as soon as it ends, so that --resume loses at most the running one; a run that
    fails is reported with its reason and does not stop the others.
    """
    from midblock.errors import SettingsError
    from midblock.sweeps.config import load_config

    loaded = load_config(config, overrides or [])
    if report_to is not None:
        loaded = loaded.replace(report_to=report_to)
    options = trust.model_dump()
    if not dry_run and out is None:
        raise SettingsError("a sweep writes every run as it ends; name a folder with --out DIR, or look at the plan "
                            "with --dry-run.")
    loading([loaded.model])
    from midblock.sweeps.run import dry_run as plan_only
    from midblock.sweeps.run import sweep as run

    if dry_run:
        _show_plan(plan_only(loaded, **options))
        return
    assert out is not None
    from midblock.report.live import LiveReport

    if loaded.report_to is not None:
        from midblock.tuning.run import require_tracker

        require_tracker(loaded.report_to)
    live = LiveReport(loaded, out)
    with _live() as (progress, listener):
        def heard(state: SweepState) -> None:
            listener(state)
            live(state)

        result = run(loaded, out=out, resume=resume, given={"config": str(config), "set": overrides or []},
                     progress=progress, listener=heard, **options)
    if live.finish():
        console.say(f"Report: {out / 'report.html'}")
    _show_result(result, out, config)


def _show_plan(plan: SweepPlan) -> None:
    from midblock.results import Answer

    # what an arm does not reach is told in words below
    shown = plan.frame.assign(GB=plan.frame["peak_bytes"] / 1e9).drop(columns=["peak_bytes", "not_reached"])
    console.print_table(shown, title="Arms (seconds: estimate for one run)")
    console.print_table(plan.detectable, title="Smallest difference of two arms that these items and seeds detect")
    found, *details = plan.summary().splitlines()
    for line in details:
        console.say(line)
    show_answer(Answer(found, "Nothing was trained. Differences smaller than those above would most likely be missed.",
                       in_earnest()))
    console.emit_json({"arms": plan.frame, "detectable": plan.detectable, "runs": [j.key for j in plan.jobs],
                       "seconds": plan.total_seconds, "comparisons": plan.comparisons})


def _show_result(result: SweepResult, out: Path, config: Path) -> None:
    for record in result.failed:
        console.warn(f"{record.key} failed: {record.reason}")
    console.print_table(result.overview(), title="Arms: means over seeds with 95% intervals"
                        if result.config.statistics.confidence == 0.95 else "Arms: means over seeds with intervals")
    answer = result.answer()
    for line in result.details():
        console.say(line)
    console.say(f"\nTable, comparisons, samples, figures and verdict: {out}")
    words = [str(config) if w == "config.yaml" else w for w in answer.next]
    if words[-2:] == ["--out", "NEW"]:  # a folder of its own is chosen here
        words = words[:-2]
    show_answer(replace(answer, next=tuple(words)), out)
    stats = result.statistics
    console.emit_json({"scores": stats.scores, "comparisons": stats.comparisons, "ranking": stats.ranking,
                       "inverted_u": stats.inverted_u, "pareto": stats.pareto,
                       "failed": {r.key: r.reason for r in result.failed}, "verdict": result.summary(),
                       "out": str(out)})


def finished_runs(state: SweepState, last: int = 20) -> pd.DataFrame:
    """The last finished runs: arm, learning rate, seed, scores, seconds."""
    import pandas as pd

    records = list(state.records.values())[-last:]
    tasks = list(dict.fromkeys(t for r in records for t in r.tasks))
    return pd.DataFrame([{
        "arm": r.arm, "lr": r.learning_rate, "seed": r.seed,
        **{t: (r.tasks[t].value if t in r.tasks else None) for t in tasks},
        "seconds": round(r.seconds, 1), "status": r.status} for r in records])


def _line(state: SweepState) -> str:
    from midblock.sweeps.planning import clock

    if not state.records:
        return f"sweep: {len(state.plan.jobs)} runs, about {clock(state.seconds_left)}"
    last = list(state.records.values())[-1]
    scores = ", ".join(f"{t} {s.value:.4g}" for t, s in last.tasks.items()) or f"failed: {last.reason}"
    seed = "" if last.seed is None else f" seed {last.seed}"
    return (f"sweep: {len(state.records)}/{len(state.plan.jobs)} {last.arm}{seed}: {scores} ({last.seconds:.0f} s); "
            f"about {clock(state.seconds_left)} left")


@contextlib.contextmanager
def _live() -> Iterator[tuple[Progress, Callable[[SweepState], None]]]:
    """A table of finished runs that grows on a terminal; one line per run elsewhere; nothing with --quiet."""
    from midblock.progress import silent

    if console.is_quiet():
        yield silent, lambda state: None
        return
    if not sys.stderr.isatty():
        yield silent, lambda state: print(printable(_line(state)), file=sys.stderr, flush=True)
        return
    from rich.console import Console
    from rich.live import Live

    live = Live(console=Console(file=sys.stderr), refresh_per_second=4, transient=True, redirect_stdout=False)
    screen = _Screen(live)
    with live:
        yield screen.progress, screen.listener


class _Screen:
    """What the terminal shows: finished runs, the running one, the time left."""

    def __init__(self, live: Any) -> None:
        self._live = live
        self._state: SweepState | None = None
        self._running = self._step = ""

    def listener(self, state: SweepState) -> None:
        self._state = state
        self._draw()

    def progress(self, what: str, done: float, total: float, note: str = "") -> None:
        if what == "sweep":
            self._running, self._step = note, ""
        else:
            self._step = f"{what} {done:.0f}/{total:.0f} {note}".strip()
        self._draw()

    def _draw(self) -> None:
        from rich import box
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        from midblock.sweeps.planning import clock

        parts: list[Any] = []
        if self._state is not None and self._state.records:
            frame = finished_runs(self._state)
            table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
            for name in frame.columns:
                table.add_column(str(name), no_wrap=True)
            for row in frame.itertuples(index=False, name=None):
                table.add_row(*(Text(console.format_figure(v)) for v in row))
            parts.append(table)
        left = "" if self._state is None else (f", {self._state.runs_left} runs to go, about "
                                               f"{clock(self._state.seconds_left)} left")
        parts.append(Text(printable(f"{self._running}: {self._step}{left}"), style="dim"))
        self._live.update(Group(*parts))
