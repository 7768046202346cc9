"""Importance-aware layer adaptation (ILA): which matrices or blocks does a fine-tune need?

1. LoRA on all linear layers of all blocks is trained until it is epsilon-stable.
2. A and B are frozen; each unit's update is multiplied by sigmoid(s), and the training loss is
   minimised over the scores s alone, optionally with lambda * sum sigmoid(s).
3. The units with the highest scores (or all but the lowest) are trained anew: `midblock.selection.choice`
   writes the plan.

The public abstract of ILA fixes the idea; every constant here is this program's own and is listed in
docs/selection.md with its reason. Controls are computed on the same adapter: the first-order worth of each
update, its norm, and random scores.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from midblock import stats
from midblock.analysis.gradients import supervised_batches
from midblock.data import Batch, Dataset, load_data
from midblock.errors import OutputError, SettingsError, TrainingError
from midblock.models import LoadedModel, load_model
from midblock.models.attention import dense_attention
from midblock.progress import Progress, silent
from midblock.provenance import atomic_path, sha256_of
from midblock.results import Interval, Table
from midblock.selection.gates import Gates, ScoreOptimizer, batch_loss, gated, update_norms, update_worths
from midblock.tuning.adapter import Attachment, attach
from midblock.tuning.kernels import has_plain_head, lean_lora
from midblock.tuning.plan import ModulePlan, Plan, make_plan

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["SCORES", "ImportanceResult", "ImportanceSettings", "ScoreSet", "importance", "loss_slope", "units_of"]

Unit = Literal["matrix", "block"]

SCORES = {
    "ila_score": "s of ILA: the update counts sigmoid(s)",
    "taylor": "|<gradient, update>| at the tuned weights, nats",
    "taylor_base": "|<gradient, update>| at the base weights, nats",
    "update_norm": "Frobenius norm of the update",
    "random": "seeded random numbers",
}
"""Metric -> what it is. The first is ILA's; the others are its controls."""

_CLIP = 1.0
_WARMUP_STEPS = 10


@dataclass(frozen=True, kw_only=True)
class ImportanceSettings:
    """How ILA is run. docs/selection.md gives the reason of every default."""

    samples: int | None = 400
    """Rows drawn from the data; None takes all."""
    max_length: int = 256
    """Tokens per row; longer ones are cut and counted."""
    batch_size: int = 8
    """Rows per step, in both stages."""
    seed: int = 0
    """Of the draw, the order, the adapter's start and the random control."""
    unit: Unit = "matrix"
    """What gets one score: an adapted matrix, or all matrices of a block together."""
    target_modules: tuple[str, ...] = ("all-linear",)
    """Matrices that are adapted."""
    rank: int = 16
    """LoRA rank of the first stage."""
    learning_rate: float = 5e-4
    """Of the first stage: AdamW, constant after ten steps of rise, since its length is not known."""
    max_steps: int = 300
    """Most steps of the first stage."""
    epsilon: float = 1e-3
    """The first stage stops when the smoothed loss changes by less than this, in nats per step."""
    check_every: int = 10
    """Steps between two looks at the loss of the probe batches."""
    window: int = 5
    """Looks that the slope is fitted to."""
    probe_batches: int = 4
    """Training batches, spread over all lengths, whose loss is the curve; also those of the controls."""
    score_steps: int = 100
    """Steps of the second stage."""
    score_rate: float = 0.1
    """Largest change of a score in one step."""
    score_start: float = 0.0
    """First value of every score: sigmoid(0) counts half of each update."""
    penalty: float = 0.0
    """lambda of lambda * sum sigmoid(s), in nats."""
    at_steps: tuple[int, ...] = ()
    """Steps of the first stage at which scores are learned too, to compare selections over training."""

    def __post_init__(self) -> None:
        whole = (("samples", 1), ("max_length", 2), ("batch_size", 1), ("rank", 1), ("max_steps", 1),
                 ("check_every", 1), ("window", 2), ("probe_batches", 1), ("score_steps", 1))
        faults = [f"--{name.replace('_', '-')} must be at least {least}, got {getattr(self, name)}"
                  for name, least in whole if getattr(self, name) is not None and getattr(self, name) < least]
        faults += [f"--{name.replace('_', '-')} must be above 0, got {getattr(self, name)}"
                   for name in ("learning_rate", "epsilon", "score_rate")
                   if not (getattr(self, name) > 0 and math.isfinite(getattr(self, name)))]
        if not (self.penalty >= 0 and math.isfinite(self.penalty)):
            faults.append(f"--penalty must be 0 or more, got {self.penalty}")
        if self.unit not in ("matrix", "block"):
            faults.append(f"--unit {self.unit!r} is neither matrix nor block")
        if any(not 0 < step <= self.max_steps for step in self.at_steps):
            faults.append(f"--at-steps {list(self.at_steps)} must lie between 1 and the most steps ({self.max_steps})")
        if faults:
            raise SettingsError("; ".join(faults) + ".")


@dataclass(frozen=True)
class ScoreSet:
    """All scores after a number of steps of the first stage."""

    step: int
    final: bool
    """Whether the first stage ended there."""
    scores: dict[str, list[float]]
    """Metric -> one value per unit."""
    worth_ranges: dict[str, list[tuple[float, float]]]
    """Intervals of the two Taylor scores over batches."""
    losses: list[float]
    """Loss of every step of the second stage, without the penalty."""
    batches: int = 1
    """Batches behind the Taylor scores."""


def units_of(plan: Plan, unit: Unit) -> dict[str, str]:
    """Adapted module -> its unit: the module itself, or ``block 3``."""
    return {m.name: m.name if unit == "matrix" else f"block {m.block}" for m in plan.modules}


def loss_slope(curve: Sequence[tuple[int, float]], window: int) -> float | None:
    """Slope of the least-squares line through the last ``window`` looks at the loss, in nats per step.

    Args:
        curve: (step, loss in nats), ascending.
        window: Number of looks.

    Returns:
        None while there are fewer looks than that.

    Example:
        >>> loss_slope([(0, 3.0), (10, 2.0), (20, 1.0)], 3)
        -0.1
    """
    if len(curve) < window:
        return None
    steps, losses = (np.array(column, dtype=np.float64) for column in zip(*curve[-window:], strict=True))
    centred = steps - steps.mean()
    return float(centred @ losses / (centred @ centred))


@dataclass
class ImportanceResult:
    """Scores of all units, how they were learned, and the plan they are scores of."""

    table: Table
    plan: Plan
    unit_of: dict[str, str]
    """Adapted module -> unit."""
    sets: list[ScoreSet]
    curve: list[tuple[int, float]]
    """(step, loss of the probe batches in nats) of the first stage."""
    stopped: str
    """Why the first stage ended."""
    settings: ImportanceSettings
    data: str
    counts: dict[str, Any] = field(default_factory=dict)

    @property
    def frame(self) -> pd.DataFrame:
        """The tidy table: one row per unit, metric and step."""
        return self.table.frame()

    @property
    def units(self) -> list[str]:
        """Units in the order of the model."""
        return list(dict.fromkeys(self.unit_of.values()))

    @property
    def final(self) -> ScoreSet:
        """Scores at the end of the first stage."""
        return self.sets[-1]

    def scores(self, metric: str = "ila_score") -> dict[str, float]:
        """Unit -> its score at the end of the first stage."""
        return dict(zip(self.units, self.final.scores[metric], strict=True))

    def modules(self, units: Sequence[str]) -> list[ModulePlan]:
        """The adapted matrices of some units, in the order of the model."""
        chosen = set(units)
        return [m for m in self.plan.modules if self.unit_of[m.name] in chosen]

    def summary(self) -> str:
        """In words: how training stopped, where the scores are high, and what the controls say."""
        from midblock.selection.choice import top_units

        last = self.curve[-1]
        lines = [f"Stage 1: LoRA of rank {self.plan.rank} on {len(self.plan.modules)} matrices; loss of the probe "
                 f"batches {self.curve[0][1]:.3f} -> {last[1]:.3f} nats in {last[0]} steps; {self.stopped}.",
                 f"Stage 2: {len(self.final.losses)} steps on {len(self.units)} scores (unit: {self.settings.unit}); "
                 f"mean loss of the first tenth {_tenth(self.final.losses, 0):.3f}, of the last "
                 f"{_tenth(self.final.losses, -1):.3f} nats."]
        frame = self.frame
        own = frame[(frame["metric"] == "ila_score") & frame["final"]]
        by_block = own.groupby("layer")["value"].mean()
        depth = by_block.index.to_numpy(dtype=float) / max(1, self.plan.num_blocks - 1)
        zones = [by_block[(depth >= lo) & (depth <= hi)].mean() for lo, hi in ((0, 0.2), (0.2, 0.8), (0.8, 1))]
        best = by_block.sort_values(ascending=False).index[:5]
        lines.append(f"Mean score of early, middle (depth 0.2-0.8) and late blocks: "
                     f"{zones[0]:.2f}, {zones[1]:.2f}, {zones[2]:.2f}; highest blocks: {', '.join(map(str, best))}.")
        if own["matrix"].nunique() > 1:
            kinds = own.groupby("matrix")["value"].mean().sort_values(ascending=False)
            lines.append("Mean score by matrix: " + ", ".join(f"{k} {v:.2f}" for k, v in kinds.items()) + ".")
        share = 0.3
        mine = np.isin(self.units, top_units(self.scores(), share))
        told = []
        for metric in SCORES:
            if metric != "ila_score":
                found = stats.set_overlap(mine, np.isin(self.units, top_units(self.scores(metric), share)))
                told.append(f"{metric} {found.jaccard:.2f}")
                expected = found.expected
        lines.append(f"Jaccard overlap of the top {share:.0%} with the controls' ({', '.join(told)}); two random "
                     f"choices have {expected:.2f}.")
        return "\n".join(lines)

    def figures(self) -> dict[str, Figure]:
        """Block by matrix for every score, and the two loss curves."""
        from midblock.figures import heatmap, lines

        frame = self.frame
        made: dict[str, Figure] = {}
        for metric, label in SCORES.items():
            part = frame[(frame["metric"] == metric) & frame["final"]]
            wide = part.pivot_table(index="matrix", columns="layer", values="value", sort=False)
            wide = wide[sorted(wide.columns)]
            made[f"importance-{metric}"] = heatmap(
                wide.to_numpy(), list(wide.index), list(wide.columns), title=f"Importance: {metric}, {self.data}",
                centre=0.0 if metric == "ila_score" else None, label=label, row_label="matrix", column_label="block")
        curve = pd.DataFrame(self.curve, columns=["step", "value"])
        made["importance-stage1"] = lines(curve, "step", title="Stage 1: until epsilon-stable", x_label="step",
                                          y_label="loss of the probe batches (nats)")
        second = pd.DataFrame([{"step": i + 1, "value": v, "scores at": f"step {s.step}"}
                               for s in self.sets for i, v in enumerate(s.losses)])
        made["importance-stage2"] = lines(second, "step", hue="scores at", title="Stage 2: scores alone",
                                          x_label="step of the second stage", y_label="loss (nats)")
        return made


def _tenth(values: Sequence[float], place: int) -> float:
    n = max(1, len(values) // 10)
    part = values[:n] if place == 0 else values[-n:]
    return sum(part) / len(part)


def importance(model: LoadedModel | str, *, data: Dataset | str, state_folder: Path | str | None = None,
               save_seconds: float = 60.0, progress: Progress = silent, settings: ImportanceSettings | None = None,
               **overrides: Any) -> ImportanceResult:
    """Run ILA's first two stages and the controls.

    Args:
        model: A model or a MODEL spec. Its weights are as before afterwards.
        data: A data set or a D spec; the loss counts completions where it has them.
        state_folder: Where progress is kept (``importance.safetensors``, written atomically); a run
            that finds it there goes on from it, to the result of an uninterrupted one.
        save_seconds: Time between two saves; the end of each stage is always saved.
        progress: Told how many steps of each stage are done.
        settings: See `ImportanceSettings`.
        **overrides: Single fields of them.

    Returns:
        Rows of kind ``block``: metric ``ila_score`` and its controls (`SCORES`), side ``pair`` (base
        against tuned), with columns ``matrix``, ``module``, ``unit``, ``step``, ``final``, ``data``, ``seed``.

    Raises:
        SettingsError: a setting out of range.
        DataError: no usable row.
        TrainingError: a loss became non-finite; saved progress is kept.
        OutputError: saved progress is of another run, or cannot be read.
    """
    chosen = replace(settings or ImportanceSettings(), **overrides)
    loaded = load_model(model) if isinstance(model, str) else model
    dataset = load_data(data, seed=chosen.seed) if isinstance(data, str) else data
    if chosen.samples is not None:
        dataset = dataset.sample(chosen.samples, chosen.seed)
    batches, counts = supervised_batches(loaded, dataset, max_length=chosen.max_length, batch_size=chosen.batch_size)
    plan = make_plan(loaded, blocks=range(loaded.anatomy.num_blocks), rank=chosen.rank,
                     target_modules=chosen.target_modules)
    unit_of = units_of(plan, chosen.unit)
    path = None if state_folder is None else Path(state_folder) / "importance.safetensors"
    with attach(loaded, plan, seed=chosen.seed) as attachment:
        run = _Run(attachment, Gates(list(dict.fromkeys(unit_of.values())), unit_of),
                   [b.to(loaded.device) for b in batches], chosen, path, save_seconds, progress)
        run.restore()
        run.finish()
    table = _table(plan, unit_of, run.sets, chosen, dataset.name)
    return ImportanceResult(table, plan, unit_of, run.sets, run.curve, run.stopped, chosen, dataset.name, counts)


def _table(plan: Plan, unit_of: Mapping[str, str], sets: Sequence[ScoreSet], settings: ImportanceSettings,
           data: str) -> Table:
    first: dict[str, ModulePlan] = {}
    for module in plan.modules:
        first.setdefault(unit_of[module.name], module)
    table = Table()
    for found in sets:
        for metric, values in found.scores.items():
            ranges = found.worth_ranges.get(metric)
            for i, (unit, module) in enumerate(first.items()):
                low, high = ranges[i] if ranges else (math.nan, math.nan)
                n = settings.score_steps if metric == "ila_score" else found.batches if ranges else 1
                matrix = module.kind if settings.unit == "matrix" else "all"
                table.add("block", module.block, metric, "pair", Interval(values[i], low, high, n), matrix=matrix,
                          module=module.name if settings.unit == "matrix" else "", unit=unit, step=found.step,
                          final=found.final, data=data, seed=settings.seed)
    return table


class _Run:
    """Both stages as one sequence of steps that can be saved after any of them."""

    def __init__(self, attachment: Attachment, gates: Gates, batches: list[Batch], settings: ImportanceSettings,
                 path: Path | None, save_seconds: float, progress: Progress) -> None:
        self.attachment, self.gates, self.batches, self.settings = attachment, gates, batches, settings
        self.path, self.save_seconds, self.progress = path, save_seconds, progress
        self.saved = time.monotonic()
        self.step = 0
        self.phase: Literal["train", "score", "done"] = "train"
        self.curve: list[tuple[int, float]] = []
        self.stopped = ""
        self.sets: list[ScoreSet] = []
        self.score_losses: list[float] = []
        self.scores = ScoreOptimizer(torch.full((len(gates.units),), settings.score_start, dtype=torch.float64),
                                     settings.score_rate)
        self.optimizer = torch.optim.AdamW(list(attachment.trainable.values()), lr=settings.learning_rate,
                                           weight_decay=0.0)
        self.plain = has_plain_head(attachment.anatomy)
        # evenly over batches that are sorted by length, so that no length is left out
        places = np.linspace(0, len(batches) - 1, min(settings.probe_batches, len(batches))).round().astype(int)
        self.probe = [batches[i] for i in dict.fromkeys(places.tolist())]
        self.identity = sha256_of(json.dumps(asdict(settings), sort_keys=True), json.dumps(attachment.plan.to_dict()),
                                  *(b.input_ids.cpu().numpy().tobytes() for b in batches))

    # ------------------------------------------------------------------ the sequence

    def finish(self) -> None:
        """Do what is left to do."""
        with dense_attention(self.attachment.base), lean_lora(self.attachment.base):
            while self.phase != "done":
                if self.phase == "train":
                    self._train()
                else:
                    self._learn_scores()

    def _train(self) -> None:
        """First stage, up to its end or to the next step at which scores are wanted."""
        wanted = self.settings
        if not self.curve:
            self._look()
        while not self.stopped:
            self._train_step()
            if self.step % wanted.check_every == 0 or self.step == wanted.max_steps:
                self._look()
                slope = loss_slope(self.curve, wanted.window)
                if slope is not None and abs(slope) < wanted.epsilon:
                    self.stopped = (f"epsilon-stable: {slope:+.1e} nats per step over the last {wanted.window} looks, "
                                    f"below {wanted.epsilon:g}")
                elif self.step >= wanted.max_steps:
                    self.stopped = (f"not stable after the most steps allowed: "
                                    f"{'too few looks' if slope is None else f'{slope:+.1e} nats per step'}, "
                                    f"epsilon {wanted.epsilon:g}")
            self.save()
            if self.step in wanted.at_steps and not self.stopped:
                break
        self.phase = "score"
        self.save(now=True)

    def _train_step(self) -> None:
        wanted = self.settings
        for group in self.optimizer.param_groups:
            group["lr"] = wanted.learning_rate * min(1.0, (self.step + 1) / _WARMUP_STEPS)
        self.optimizer.zero_grad(set_to_none=True)
        loss = batch_loss(self.attachment, self._batch(self.step, "train"), plain=self.plain)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.attachment.trainable.values(), _CLIP)
        if not bool(torch.isfinite(norm)):
            raise TrainingError(f"the gradient became {norm.item()} in step {self.step + 1}; use a lower "
                                "--learning-rate, or --dtype float32.")
        self.optimizer.step()
        self.step += 1
        self.progress("stage 1: LoRA on all", self.step, wanted.max_steps, f"loss {loss.item():.3f}")

    def _batch(self, step: int, what: str) -> Batch:
        epoch, place = divmod(step, len(self.batches))
        seed = int(sha256_of("ila", what, str(self.settings.seed), str(epoch))[:15], 16)
        return self.batches[int(np.random.default_rng(seed).permutation(len(self.batches))[place])]

    def _look(self) -> None:
        total = tokens = 0.0
        with torch.no_grad():
            for batch in self.probe:
                assert batch.labels is not None
                counted = int((batch.labels[:, 1:] != -100).sum())
                total += batch_loss(self.attachment, batch, plain=self.plain).item() * counted
                tokens += counted
        self.curve.append((self.step, total / tokens))

    def _learn_scores(self) -> None:
        """Second stage on the adapter as it is, then the controls."""
        wanted, own = self.settings, self.scores
        device = next(self.attachment.anatomy.embeddings.parameters()).device
        with _plain_forwards(self.attachment), gated(self.attachment, self.gates):
            while own.steps < wanted.score_steps:
                leaf = own.scores.to(device, torch.float32).requires_grad_(True)
                self.gates.values = torch.sigmoid(leaf)
                loss = batch_loss(self.attachment, self._batch(own.steps, "scores"), plain=self.plain)
                total = loss + wanted.penalty * self.gates.values.sum()
                total.backward()
                assert leaf.grad is not None
                if not bool(torch.isfinite(leaf.grad).all()):
                    raise TrainingError("a gradient of the scores is not finite; use --dtype float32.")
                self.score_losses.append(loss.item())
                own.step(leaf.grad.double().cpu())
                self.progress("stage 2: scores", own.steps, wanted.score_steps, f"loss {loss.item():.3f}")
                self.save()
        self.sets.append(self._score_set())
        self.score_losses = []
        self.scores = ScoreOptimizer(torch.full_like(own.scores, wanted.score_start), wanted.score_rate)
        self.phase = "done" if self.stopped else "train"
        self.save(now=True)

    def _score_set(self) -> ScoreSet:
        scores = {"ila_score": self.scores.scores.tolist()}
        ranges: dict[str, list[tuple[float, float]]] = {}
        for metric, at in (("taylor", 1.0), ("taylor_base", 0.0)):
            with _plain_forwards(self.attachment):
                worths = update_worths(self.attachment, self.gates, self.probe, at=at).numpy()
            means = [stats.mean_interval(column) for column in worths.T]
            scores[metric] = [abs(m.value) for m in means]
            # the interval of the signed mean, turned with it
            ranges[metric] = [(m.low, m.high) if m.value >= 0 else (-m.high, -m.low) for m in means]
        scores["update_norm"] = update_norms(self.attachment, self.gates).tolist()
        seed = int(sha256_of("ila random control", self.identity, str(self.step))[:15], 16)
        scores["random"] = np.random.default_rng(seed).random(len(self.gates.units)).tolist()
        return ScoreSet(self.step, bool(self.stopped), scores, ranges, self.score_losses, len(self.probe))

    # ------------------------------------------------------------------ progress on disk

    def save(self, *, now: bool = False) -> None:
        """Write everything, if it is time."""
        if self.path is None or not (now or time.monotonic() - self.saved >= self.save_seconds):
            return
        tensors = {f"adapter|{n}": t.contiguous() for n, t in self.attachment.state().items()}
        tensors |= {"scores": self.scores.scores, "first": self.scores.first, "second": self.scores.second}
        if self.phase != "done":
            for name, parameter in self.attachment.trainable.items():
                for key, value in self.optimizer.state.get(parameter, {}).items():
                    tensors[f"optimizer|{name}|{key}"] = value.detach().cpu().contiguous()
        state = {"identity": self.identity, "step": self.step, "phase": self.phase, "curve": self.curve,
                 "stopped": self.stopped, "sets": [asdict(s) for s in self.sets],
                 "score_steps": self.scores.steps, "score_losses": self.score_losses}
        with atomic_path(self.path) as temporary:
            save_file(tensors, temporary, metadata={"state": json.dumps(state)})
        self.saved = time.monotonic()

    def restore(self) -> None:
        """Put saved progress back, if there is any.

        Raises:
            OutputError: it cannot be read, or belongs to another run.
        """
        if self.path is None or not self.path.is_file():
            return
        try:
            with safe_open(self.path, framework="pt") as stored:
                state = json.loads(stored.metadata()["state"])
                tensors = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118 (not a dict)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise OutputError(f"cannot resume from {self.path}: {error}; name a new --out folder.") from error
        if state["identity"] != self.identity:
            raise OutputError(f"{self.path} belongs to a run with other settings or data; name a new --out folder.")
        self.attachment.load_state({k.split("|", 1)[1]: t for k, t in tensors.items() if k.startswith("adapter|")})
        for name, parameter in self.attachment.trainable.items():
            own = {k.rsplit("|", 1)[1]: t for k, t in tensors.items() if k.startswith(f"optimizer|{name}|")}
            if own:
                self.optimizer.state[parameter] = {
                    k: t if t.ndim == 0 else t.to(parameter.device) for k, t in own.items()}
        self.step, self.phase, self.stopped = state["step"], state["phase"], state["stopped"]
        self.curve = [(int(s), float(v)) for s, v in state["curve"]]
        self.sets = [ScoreSet(**{**s, "worth_ranges": {k: [(lo, hi) for lo, hi in v]
                                                       for k, v in s["worth_ranges"].items()}}) for s in state["sets"]]
        self.score_losses = state["score_losses"]
        self.scores.steps = state["score_steps"]
        self.scores.scores.copy_(tensors["scores"])
        self.scores.first.copy_(tensors["first"])
        self.scores.second.copy_(tensors["second"])


@contextlib.contextmanager
def _plain_forwards(attachment: Attachment) -> Iterator[None]:
    """Within the context adapted layers have no lean forward, which gates would otherwise take for theirs."""
    kept = {m: m.__dict__.pop("forward") for m in attachment.base.modules()
            if hasattr(m, "lora_A") and "forward" in m.__dict__}
    try:
        yield
    finally:
        for module, forward in kept.items():
            module.forward = forward
