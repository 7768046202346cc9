"""What the parts of a study are likely to cost, from configs and data alone, and how far a study is.

Operations per token, with P the parameters of a block that a token meets: a forward 2 P a block, a backward twice
that, a read-out 2 V d. The rate is that of the model's own products on this machine (`midblock.tuning.estimate`).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from midblock.errors import MidblockError
from midblock.progress import Progress
from midblock.report.parts import Sources, Task, arguments
from midblock.settings.load import ChainLoadSettings
from midblock.settings.study import StudySettings
from midblock.sizes import usable_cores

__all__ = ["Cost", "StudyProgress", "forecast_study", "worth_a_process"]

_FORWARD = 0.8
"""Share of the products' rate that forwards and read-outs reach."""
_READ = 5e8  # bytes a second, of two checkpoints from disk
_BESIDES = 3.0  # seconds of a part for its figures and intervals
_TABLES = 3 << 20  # bytes of a part's table and figures
_TOKENISED = 48  # samples that stand for the others
_WORTH = 40.0
"""Estimated seconds of a study from which on a second process, which starts in a few, is worth its start."""


@dataclass(frozen=True)
class Cost:
    """Estimates for one part; None where nothing is known, and why.

    Attributes:
        seconds: Time.
        memory_bytes: Peak of the process.
        disk_bytes: In its folder, with what an interrupted pass keeps.
        note: Why there is no estimate.
    """

    seconds: float | None = None
    memory_bytes: float | None = None
    disk_bytes: float | None = None
    note: str = ""


def forecast_study(chains: Sequence[Sequence[str]], tasks: Sequence[Task], settings: StudySettings,
                   load: ChainLoadSettings, sources: Sources) -> dict[Task, Cost]:
    """Task -> estimate. A model or a data set that cannot be read here has no estimate, with the reason."""
    found: dict[Task, Cost] = {}
    outlines: dict[int, _Outline | str] = {}
    for task in tasks:
        if task.chain is None:
            found[task] = _sweep_cost(task, load)
            continue
        if task.chain not in outlines:
            outlines[task.chain] = _outline(chains[task.chain], load)
        outline = outlines[task.chain]
        if isinstance(outline, str):
            found[task] = Cost(note=outline)
            continue
        try:
            found[task] = outline.cost(task, settings, sources)
        except MidblockError as error:
            found[task] = Cost(note=str(error))
    return found


def worth_a_process(costs: Mapping[Task, Cost]) -> bool:
    """Whether a study has a second process for what needs no models (`midblock.report.beside`): one that is long
    enough, reads models, and has another core than that which it computes on."""
    seconds = sum(c.seconds for t, c in costs.items() if c.seconds is not None and t.part != "sweep")
    return seconds >= _WORTH and any(t.needs_models for t in costs) and usable_cores() > 1


def _sweep_cost(task: Task, load: ChainLoadSettings) -> Cost:
    try:
        from midblock.sweeps import dry_run, load_config

        assert task.data is not None
        plan = dry_run(load_config(task.data, []), trust_remote_code=load.trust_remote_code,
                       allow_pickle=load.allow_pickle)
    except MidblockError as error:
        return Cost(note=str(error))
    return Cost(plan.total_seconds, float(plan.frame["peak_bytes"].max()), _TABLES * len(plan.jobs))


def _outline(specs: Sequence[str], load: ChainLoadSettings) -> _Outline | str:
    """What estimates need of a chain, from the first model's config; or why that cannot be read."""
    from midblock.models import choose_dtype, find_anatomy, load_tokenizer, resolve_device, text_config
    from midblock.models.skeleton import model_skeleton
    from midblock.tuning.estimate import EFFICIENCY, met_by_a_token, process_bytes, training_rate

    try:
        skeleton, stored, folder = model_skeleton(specs[0], trust_remote_code=load.trust_remote_code,
                                                  allow_pickle=load.allow_pickle)
        tokenizer = load_tokenizer(folder, spec=specs[0])
    except MidblockError as error:
        return str(error)
    anatomy = find_anatomy(skeleton)
    device = resolve_device(load.device)
    parameters = sum(p.numel() for p in skeleton.parameters())
    dtype = choose_dtype(load.dtype, stored=stored, device=device, config=text_config(skeleton), parameters=parameters,
                         models=len(specs)).dtype
    inside = sum(p.numel() for block in anatomy.blocks for p in block.parameters())
    met = sum(met_by_a_token(anatomy, b) for b in range(anatomy.num_blocks))
    return _Outline(stages=len(specs), blocks=anatomy.num_blocks, width=anatomy.hidden_size, vocab=anatomy.vocab_size,
                    parameters=parameters, inside=inside, met=met, size=dtype.itemsize, tokenizer=tokenizer,
                    rate=training_rate(anatomy, device, dtype) / EFFICIENCY * _FORWARD, besides=process_bytes(device))


@dataclass
class _Outline:
    stages: int
    blocks: int
    width: int
    vocab: int
    parameters: int
    inside: int
    met: float
    size: int
    tokenizer: Any
    rate: float
    besides: int

    def _tokens(self, spec: str, settings: StudySettings, sources: Sources) -> tuple[float, int, int]:
        """Mean and largest number of tokens of a sample, and how many samples there are."""
        dataset = sources(spec)
        drawn = dataset.sample(_TOKENISED, settings.seed)
        lengths = [min(settings.max_length, len(self.tokenizer(e.text)["input_ids"])) for e in drawn.examples]
        return sum(lengths) / max(1, len(lengths)), max(lengths, default=0), len(dataset.examples)

    def cost(self, task: Task, settings: StudySettings, sources: Sources) -> Cost:
        """Estimate of a part. Of parts that share a pass each has its own share, the bodies the profile's."""
        models = self.stages * self.parameters * self.size + self.besides
        if task.part == "weights":
            return Cost(_BESIDES + self.stages * self.parameters * self.size / _READ, self.besides + 256e6, _TABLES)
        if task.part == "correlate":
            return Cost(_BESIDES, self.besides, _TABLES)
        assert task.data is not None
        mean, longest, there = self._tokens(task.data, settings, sources)
        chosen = arguments(task.part, settings, task.data)
        samples = min(there, chosen["samples"])
        tokens = samples * mean
        body, head = 2 * self.met * tokens, 2 * self.vocab * self.width * tokens
        alone = "profile" not in settings.parts
        states = (self.blocks + 1) * samples * self.width * 4 * self.stages
        places = min(settings.batch_size, samples) * longest
        batch = 24 * places * self.width * self.size + 64e6
        heads = self.stages * self.vocab * self.width * self.size  # laid out for many products
        if task.part == "profile":
            return Cost(_BESIDES + self.stages * body / self.rate + 0.1 * self.blocks * self.stages,
                        models + states + batch + (0 if "lens" not in settings.parts else heads), _TABLES + states)
        if task.part == "lens":
            flops = self.stages * ((self.blocks + 1) * head + (body if alone else 0))
            return Cost(_BESIDES + flops / self.rate, models + heads + batch + 6 * (3 << 22) * self.size, _TABLES)
        if task.part == "swap":
            pairs = 2 * (2 * self.stages - 3) if self.stages > 2 else 2
            swapped = pairs * body * sum((k + 1) / settings.segments for k in range(settings.segments))
            flops = swapped + 2 * pairs * (settings.segments + 1) * head + (self.stages * body if alone else 0)
            borders = tokens * self.width * self.size * self.stages * (settings.segments + 1)
            return Cost(_BESIDES + flops / self.rate, models + heads + borders + batch, _TABLES + borders)
        from midblock.tuning.estimate import EFFICIENCY, KEPT

        backward = 3 * (body + head) * _FORWARD / EFFICIENCY
        # activations of a batch; then its logits in both precisions with their gradients, or those of the weights
        logits, gradients = places * self.vocab * (2 * self.size + 12), self.parameters * self.size
        grads = KEPT * places * self.width * self.size * self.blocks + max(logits, gradients)
        if task.part == "gradients":
            return Cost(_BESIDES + self.stages * backward / self.rate, models + grads, _TABLES)
        flops = (body if alone else 0) + (backward if "gradients" not in settings.parts else 0)
        spectra = 12 * self.inside * min(self.width, 4096)  # Gram matrices and their decompositions
        own = states if "gradients" in settings.parts else grads
        return Cost(_BESIDES + (flops + spectra) / self.rate, models + own, _TABLES)


class StudyProgress:
    """Passes on what a part tells, and tells how far the whole study is.

    Args:
        progress: Who is told; the whole is called ``study``, in estimated seconds.
        costs: Task -> estimate; a task without one counts as the mean of the others.
    """

    MAIN = ("shared pass", "forward", "swap", "backward", "sweep", "weights")
    """What parts call the work that most of their time goes into."""

    def __init__(self, progress: Progress, costs: dict[Task, Cost]) -> None:
        known = [c.seconds for c in costs.values() if c.seconds is not None]
        mean = sum(known) / len(known) if known else 1.0
        self._weights = {t: mean if c.seconds is None else c.seconds for t, c in costs.items()}
        self._progress, self._done, self._running = progress, set[Task](), list[Task]()
        self._spent = 0.0
        self._worked: set[Task] = set()
        self._started = time.perf_counter()

    def begin(self, *tasks: Task) -> None:
        """These run now."""
        self._running = list(tasks)
        self._tell()

    def passed(self, task: Task) -> None:
        """This one is over, or was finished before."""
        if task in self._running:
            self._worked.add(task)
        self._running = []
        self._done.add(task)
        self._tell()

    def __call__(self, what: str, done: float, total: float, note: str = "") -> None:
        main = what in self.MAIN and total > 0
        self._progress(what, done, total, "; ".join(x for x in (note, self.status(done / total) if main else "") if x))

    def status(self, share: float = 0.0) -> str:
        """How much of the study is done, and the time left.

        Args:
            share: Of what runs now.
        """
        whole, done, own = self._sums(share)
        if not own:
            return f"about {_clock(whole - done)} in all"
        # by how this call's parts compared with their estimates
        left = (whole - done) * (time.perf_counter() - self._started) / own
        return f"{done / max(whole, 1e-9):.0%} of the study, about {_clock(left)} left"

    def _sums(self, share: float) -> tuple[float, float, float]:
        """Estimated seconds of all, of what is done, and of what this call did."""
        now = share * sum(self._weights[t] for t in self._running if t not in self._done)
        return (sum(self._weights.values()), sum(self._weights[t] for t in self._done) + now,
                sum(self._weights[t] for t in self._worked) + now)

    def _tell(self) -> None:
        whole, done, _ = self._sums(0.0)
        self._progress("study", round(done, 1), round(whole, 1), self.status())


def _clock(seconds: float) -> str:
    from midblock.sweeps.planning import clock

    return clock(seconds)
