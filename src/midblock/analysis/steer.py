"""Steering and patching: does the change that tuning made at a depth carry its behaviour?

Steering adds a direction of the paired difference sft - base to the output of chosen blocks of
the base. The direction is estimated on one half of the samples and scored on the other:

* ``mean``: the mean over samples of the difference of the pooled states at hidden b+1;
* ``pcK``: its K-th principal direction (K-th right singular vector of the (n, d) matrix of
  differences, not centred unless asked), as long as the differences' root mean square along
  it, and pointing where their mean points: strength 1 adds what tuning typically adds;
* ``random``: a seeded random direction as long as the mean shift, the control.

Patching replaces the base's hidden states by the tuned model's, sample by sample and token by
token, at chosen blocks and positions.

Sources: Turner et al., "Activation Addition: Steering Language Models Without Optimization", 2023;
Zou et al., "Representation Engineering", 2023 (directions of paired differences); Meng et al.,
"Locating and Editing Factual Associations in GPT", NeurIPS 2022 (patching).
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import pandas as pd
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from midblock import metrics, stats
from midblock.analysis.lens import exponential
from midblock.analysis.passes import feed_batches
from midblock.analysis.stages import comparisons, resolve_stages, side_of, stage_names
from midblock.capture import next_token_scores, run_blocks, sample_means, verify_resume
from midblock.capture.accumulators import PooledStates
from midblock.capture.forward import hidden_of_output
from midblock.data import Batch, Dataset, TokenRow, TokenRows, load_data, make_batches, pad_token_id, tokenize
from midblock.errors import ArchitectureError, BlockRangeError, DataError, OutputError, SettingsError
from midblock.models import Anatomy, LoadedModel
from midblock.progress import Progress, silent
from midblock.provenance import atomic_path
from midblock.results import Table
from midblock.segments import format_blocks, segment_bounds

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["POSITIONS", "Positions", "SteerResult", "SteerSettings", "direction_of", "generate", "generations",
           "load_vectors", "patch", "patched", "save_vectors", "steer", "steered"]

Positions = Literal["all", "prompt", "completion", "last-prompt"]
POSITIONS: tuple[str, ...] = get_args(Positions)


# -- changing a model's hidden states ------------------------------------------------------------


@contextlib.contextmanager
def _outputs_changed(anatomy: Anatomy, changes: Mapping[int, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """Within the context the output of each given block goes through a function; removed also after an error."""
    if wrong := [b for b in changes if not 0 <= b < anatomy.num_blocks]:
        raise BlockRangeError(f"blocks {wrong} do not fit a model of {anatomy.num_blocks} blocks "
                              f"(0-{anatomy.num_blocks - 1}).")

    def hook_of(change: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            changed = change(hidden_of_output(output))
            if isinstance(output, tuple | list):
                return type(output)([changed, *output[1:]])
            return changed
        return hook

    # prepended: whoever listens to the block's output must see it changed
    handles = [anatomy.blocks[b].register_forward_hook(hook_of(change), prepend=True)
               for b, change in changes.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def steered(anatomy: Anatomy, vectors: Mapping[int, Tensor], alpha: float = 1.0) -> Iterator[None]:
    """Within the context ``alpha * vector`` is added to the output of each given block, at every position.

    It works for scoring and, since each new token passes the same blocks, for generation with a
    key-value cache. The model is as before afterwards, also after an error.

    Args:
        anatomy: Anatomy of the model to steer.
        vectors: Block -> (d,).
        alpha: Strength; negative ones steer the other way.

    Raises:
        BlockRangeError: a block that the model does not have.
        ValueError: a vector of another width.
    """
    for block, vector in vectors.items():
        if tuple(vector.shape) != (anatomy.hidden_size,):
            raise ValueError(f"the vector of block {block} has shape {tuple(vector.shape)}; the model's hidden size is "
                             f"{anatomy.hidden_size}.")

    def adding(vector: Tensor) -> Callable[[Tensor], Tensor]:
        scaled = alpha * vector.float()
        return lambda z: z + scaled.to(z.device, z.dtype)

    with _outputs_changed(anatomy, {b: adding(v) for b, v in vectors.items()}):
        yield


@contextlib.contextmanager
def patched(anatomy: Anatomy, patches: Mapping[int, tuple[Tensor | Sequence[int] | None, Tensor]]) -> Iterator[None]:
    """Within the context hidden states at chosen places are replaced by given ones.

    Args:
        anatomy: Anatomy of the model to patch.
        patches: Block -> (positions, states): its output is replaced by ``states`` (B, T, d) at
            ``positions``: a boolean mask (B, T), token places 0..T-1 in every row, or None for all.

    Raises:
        BlockRangeError: a block that the model does not have.
        ValueError: (during the forward) states or positions of another shape than the output.
    """
    def replacing(block: int, positions: Tensor | Sequence[int] | None, states: Tensor) -> Callable[[Tensor], Tensor]:
        def change(z: Tensor) -> Tensor:
            if states.shape != z.shape:
                raise ValueError(f"the patch of block {block} has shape {tuple(states.shape)}, its output "
                                 f"{tuple(z.shape)}.")
            new = states.to(z.device, z.dtype)
            if positions is None:
                return new
            if isinstance(positions, Tensor) and positions.dtype == torch.bool:
                mask = positions.to(z.device)
                if mask.shape != z.shape[:2]:
                    raise ValueError(f"the patch of block {block} has a mask of shape {tuple(mask.shape)}, its output "
                                     f"{tuple(z.shape)}.")
            else:
                mask = torch.zeros(z.shape[:2], dtype=torch.bool, device=z.device)
                mask[:, torch.as_tensor(positions, device=z.device)] = True
            return torch.where(mask.unsqueeze(-1), new, z)
        return change

    with _outputs_changed(anatomy, {b: replacing(b, *patch) for b, patch in patches.items()}):
        yield


def generate(loaded: LoadedModel, prompt: str, *, vectors: Mapping[int, Tensor] | None = None, alpha: float = 1.0,
             max_new_tokens: int = 48, chat: bool = False) -> str:
    """Greedy continuation of a prompt by the (steered) model, with its key-value cache.

    Args:
        loaded: The model.
        prompt: Text; with ``chat`` it is put into the tokenizer's chat template as a user's message.
        vectors: Block -> (d,) added at its output; None: the model as it is.
        alpha: Their strength.
        max_new_tokens: Where to stop at the latest.
        chat: Use the chat template.

    Returns:
        The new text, without special tokens.

    Raises:
        DataError: the prompt has no token, or there is no chat template.
    """
    tokenizer = loaded.tokenizer
    if chat:
        if not tokenizer.chat_template:
            raise DataError(f"{loaded.spec}: its tokenizer has no chat template; leave --chat out.")
        text = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False,
                                             add_generation_prompt=True)
        encoded = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    else:
        encoded = tokenizer(prompt, return_tensors="pt")
    ids = encoded["input_ids"].to(loaded.device)
    if ids.numel() == 0:
        raise DataError(f"the prompt {prompt!r} has no token.")
    model: Any = loaded.model
    with torch.inference_mode(), steered(loaded.anatomy, vectors or {}, alpha):
        made = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, num_beams=1,
                              use_cache=True, max_new_tokens=max_new_tokens, pad_token_id=pad_token_id(tokenizer),
                              temperature=None, top_p=None, top_k=None)
    new = made[0] if model.config.is_encoder_decoder else made[0, ids.shape[1]:]
    decoded = tokenizer.decode(new, skip_special_tokens=True)
    return str(decoded)


def generations(stages: Sequence[LoadedModel], result: SteerResult, prompts: Sequence[str], *,
                max_new_tokens: int = 48, chat: bool = False, progress: Progress = silent) -> pd.DataFrame:
    """Greedy continuations by the unchanged models and by every steered variant of a result.

    Args:
        stages: The models that ``result`` was measured on.
        result: From `steer`, whose vectors are added.
        prompts: Texts to continue.
        max_new_tokens: Where to stop at the latest.
        chat: Use the tokenizer's chat template.
        progress: Told how many continuations are done.

    Returns:
        One row each: ``prompt``, ``stage``, ``model`` (a stage's name), ``blocks`` and ``alpha`` (empty and 0 for
        unchanged models), ``text``.
    """
    by_name = dict(zip(result.stages, stages, strict=True))
    settings = result.settings
    variants: list[tuple[str, str, tuple[int, ...], float]] = [("", name, (), 0.0) for name in result.stages]
    for pair in comparisons(result.stages):
        blocks = [b for stage, b in result.vectors if stage == side_of(pair)]
        groups = [tuple(blocks)] if settings.together else [(b,) for b in blocks]
        variants += [(side_of(pair), pair[1], g, a) for g in groups for a in dict.fromkeys(settings.alphas) if a]
    rows = []
    for prompt in prompts:
        for stage, name, group, alpha in variants:
            vectors = {b: result.vectors[stage, b] for b in group}
            text = generate(by_name[name], prompt, vectors=vectors, alpha=alpha, max_new_tokens=max_new_tokens,
                            chat=chat)
            rows.append({"prompt": prompt, "stage": stage, "model": name, "blocks": format_blocks(group),
                         "alpha": alpha, "text": text})
            progress("generate", len(rows), len(variants) * len(prompts), note=f"{name} {format_blocks(group)}")
    return pd.DataFrame(rows)


# -- directions ----------------------------------------------------------------------------------


def direction_of(base: Tensor, sft: Tensor, direction: str = "mean", *, centered: bool = False, seed: int = 0
                 ) -> tuple[Tensor, float]:
    """A direction of the paired difference of pooled states, and the share of the change it holds.

    With D = X_sft - X_base, singular values s and right singular vectors v: ``mean`` is the mean row
    m of D; ``pcK`` is (s_K / sqrt(n)) v_K, with the sign that makes its product with m positive. With
    ``centered`` v comes from D - m: the directions in which the change varies between samples.

    Args:
        base: X_base (n, d).
        sft: X_sft (n, d), the same samples.
        direction: ``mean``, ``pc1``, ``pc2`` ..., or ``random`` (norm of ``mean``).
        centered: Principal directions of the centred difference.
        seed: Seed of ``random``.

    Returns:
        The direction (d,) in float32; and the share of sum of squares of D (centred: of D - m) along it.

    Raises:
        SettingsError: an unknown direction, or K exceeds the rank of the difference.

    Example:
        >>> base = torch.zeros(3, 2)
        >>> sft = torch.tensor([[3.0, 0.0], [3.0, 0.0], [3.0, 0.0]])
        >>> direction_of(base, sft, "mean")[0].tolist(), direction_of(base, sft, "pc1")
        ([3.0, 0.0], (tensor([3., 0.]), 1.0))
    """
    number = _principal(direction)
    difference = sft.double() - base.double()
    mean = difference.mean(dim=0)
    total = float(difference.square().sum())
    if number is None:
        vector = mean
        if direction == "random":
            generator = torch.Generator().manual_seed(seed)
            drawn = torch.randn(mean.shape[0], generator=generator, dtype=torch.float64)
            vector = drawn / drawn.norm() * mean.norm()
        norm = float(vector.norm())
        along = float((difference @ (vector / norm)).square().sum()) if norm > 0 else 0.0
        return vector.float(), along / total if total > 0 else math.nan
    spectrum = metrics.gram_spectrum(difference, center=centered)
    values = spectrum.values
    # eigenvalues of a Gram matrix below this share of the largest are rounding
    rank = int((values > values[0] * 1e-12).sum()) if float(values[0]) > 0 else 0
    if number > rank:
        raise SettingsError(f"direction {direction}: the {'centred ' if centered else ''}difference of "
                            f"{difference.shape[0]} samples has only {rank} principal directions; use more samples or "
                            "a smaller number.")
    rows = difference - mean if centered else difference
    unit = rows.mT @ spectrum.vectors[:, number - 1]
    unit = unit / unit.norm()
    if float(unit @ mean) < 0:
        unit = -unit
    length = math.sqrt(float(values[number - 1]) / difference.shape[0])
    return (length * unit).float(), float(values[number - 1] / values.sum())


def _principal(direction: str) -> int | None:
    """K of ``pcK``; None for the other directions."""
    if direction in ("mean", "random"):
        return None
    found = re.fullmatch(r"pc([1-9]\d*)", direction)
    if found is None:
        raise SettingsError(f"direction {direction!r} is unknown; use mean, pc1, pc2 ..., or random.")
    return int(found.group(1))


def save_vectors(path: Path, vectors: Mapping[tuple[str, int], Tensor], **about: Any) -> Path:
    """Write steering vectors as safetensors (names ``sft-base.block.12``), atomically.

    Args:
        path: File to write.
        vectors: (comparison, block) -> (d,).
        about: What the file's metadata keeps, such as ``direction="mean"``.

    Raises:
        OutputError: the file cannot be written.
    """
    arrays = {f"{stage}.block.{block}": v.detach().float().contiguous().cpu() for (stage, block), v in vectors.items()}
    with atomic_path(path) as temporary:
        save_file(arrays, temporary, metadata={"midblock": json.dumps(about, default=str)})
    return path


def load_vectors(path: Path) -> dict[tuple[str, int], Tensor]:
    """Steering vectors that `save_vectors` wrote: (comparison, block) -> (d,).

    Raises:
        OutputError: the file is absent or holds something else.
    """
    vectors: dict[tuple[str, int], Tensor] = {}
    try:
        with safe_open(path, framework="pt") as stored:
            for name in stored.keys():  # noqa: SIM118 (not a dict)
                stage, _, block = name.rpartition(".block.")
                vectors[stage, int(block)] = stored.get_tensor(name)
    except (OSError, ValueError, SafetensorError) as error:
        raise OutputError(f"{path} holds no steering vectors: {error}.") from None
    return vectors


# -- measuring -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class SteerSettings:
    """What is added or replaced, where, and what is scored."""

    blocks: tuple[int, ...] = ()
    """Blocks at whose output states are changed. Default: the middle block of each fifth of the depth."""
    alphas: tuple[float, ...] = (0.5, 1.0)
    """Strengths; the unsteered model (0) is always scored."""
    direction: str = "mean"
    """``mean``, ``pc1``, ``pc2`` ..., or ``random`` (the control)."""
    centered: bool = False
    """Principal directions of the centred difference."""
    together: bool = False
    """Change all the blocks at once instead of one after another."""
    samples: int = 100
    """Samples: one half gives the direction, the other is scored (patching scores all)."""
    max_length: int = 256
    """Tokens per sample; longer ones are cut and counted."""
    batch_size: int = 8
    """Samples per forward pass."""
    seed: int = 0
    """Seed of the draw, the split and the random control."""
    supervised: bool = False
    """Count only completion tokens where the data has prompts and completions."""
    confidence: float = 0.95
    """Confidence of every interval."""

    def __post_init__(self) -> None:
        faults = [f"--{name.replace('_', '-')} must be at least {least}, got {getattr(self, name)}"
                  for name, least in (("samples", 4), ("max_length", 2), ("batch_size", 1))
                  if getattr(self, name) < least]
        if not all(math.isfinite(a) for a in self.alphas) or not any(self.alphas):
            faults.append(f"--alphas must be finite numbers, not all 0, such as 0.5,1; got {list(self.alphas)}")
        if faults:
            raise SettingsError("; ".join(faults) + ".")
        _principal(self.direction)

    def chosen_blocks(self, num_blocks: int) -> list[int]:
        """The blocks, or one in the middle of each fifth of the depth.

        Raises:
            BlockRangeError: a block that the model does not have.
        """
        if not self.blocks:
            bounds = segment_bounds(min(5, num_blocks), num_blocks)
            return [(low + high - 1) // 2 for low, high in bounds]
        if wrong := [b for b in self.blocks if not 0 <= b < num_blocks]:
            raise BlockRangeError(f"blocks {wrong} do not fit a model of {num_blocks} blocks (0-{num_blocks - 1}).")
        return sorted(set(self.blocks))


@dataclass
class SteerResult:
    """Scores of the changed model, paired with the unchanged one on the same samples."""

    table: Table
    stages: list[str]
    settings: SteerSettings
    what: str
    """``mean`` and the other directions, or ``patch all`` and the other positions."""
    vectors: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    """(comparison, block) -> steering vector (d,); empty after patching."""
    counts: dict[str, Any] = field(default_factory=dict)

    @property
    def frame(self) -> pd.DataFrame:
        """The tidy table; columns ``alpha``, ``direction``, ``stage``, ``data``."""
        return self.table.frame()

    def summary(self) -> str:
        """In words: where, and how strongly, the change moves the base towards the tuned model."""
        frame = self.frame
        lines = []
        for later, earlier in comparisons(self.stages):
            part = frame[frame["stage"] == side_of((later, earlier))]
            own = part[(part["kind"] == "model") & (part["metric"] == "loss")].set_index("side")["value"]
            change = part[(part["metric"] == "loss") & (part["side"] == "difference") & (part["alpha"].abs() > 0)]
            best = change.loc[change["value"].idxmin()]
            where = f"block {best['layer']}" if best["kind"] == "block" else f"blocks {best['layer']} at once"
            gap = f"{later} itself differs from {earlier} by {own[later] - own[earlier]:+.4f} nats"
            lines.append(f"{self.what} of {side_of((later, earlier))} in {earlier}: the loss falls most or rises least "
                         f"at {where} with strength {best['alpha']:g} ({best['value']:+.4f} nats [{best['low']:+.4f}, "
                         f"{best['high']:+.4f}], n = {int(best['n'])} samples); {gap}.")
        return "\n".join(lines)

    def figures(self) -> dict[str, Figure]:
        """Paired change of loss and accuracy, by block (a line per strength) or by strength."""
        from midblock.figures import lines, metric_label

        frame = self.frame
        made: dict[str, Figure] = {}
        for pair in comparisons(self.stages):
            part = frame[(frame["stage"] == side_of(pair)) & (frame["side"] == "difference")
                         & (frame["kind"] != "model")]
            suffix = f"-{side_of(pair)}" if len(self.stages) > 2 else ""
            for metric in ("loss", "accuracy"):
                rows = part[part["metric"] == metric]
                by_block = (rows["kind"] == "block").all() and rows["layer"].nunique() > 1
                drawn = rows.assign(strength=rows["alpha"].map(lambda a: f"strength {a:g}"),
                                    place=rows["layer"].map(lambda b: f"block {b}"))
                made[f"steer-{metric}{suffix}"] = lines(
                    drawn, "layer" if by_block else "alpha", hue="strength" if by_block else "place", zero=True,
                    x_label="block" if by_block else "strength", y_label=f"change of {metric_label(metric).lower()}",
                    title=f"{self.what} of {side_of(pair)} put into {pair[1]}")
        return made


class _Scores:
    """Per-sample loss and accuracy of every variant, in the order of the scored samples."""

    def __init__(self, rows: Sequence[TokenRow]) -> None:
        self.place = {row.index: i for i, row in enumerate(rows)}
        self.values: dict[tuple[Any, ...], np.ndarray[Any, Any]] = {}

    def keep(self, key: tuple[Any, ...], loaded: LoadedModel, batch: Batch, last: Tensor) -> None:
        """Score hidden L of a batch with the model's own head."""
        found = next_token_scores(loaded.anatomy.read_out, last, batch, loaded.anatomy.vocab_size)
        rows = [self.place[i] for i in batch.indices]
        for metric, value in (("loss", found.loss), ("accuracy", found.correct.float())):
            array = self.values.setdefault((*key, metric), np.full(len(self.place), np.nan))
            array[rows] = sample_means(found.row, value, len(batch.indices))[0].cpu().numpy()


class _Prepared:
    """What steering and patching both need: models, tokenised samples, blocks."""

    def __init__(self, stages: Any, sft: Any, data: Dataset | str, names: Sequence[str] | None,
                 settings: SteerSettings) -> None:
        self.models = resolve_stages(stages, sft, names)
        self.keys = stage_names(len(self.models), names)
        self.by_name = dict(zip(self.keys, self.models, strict=True))
        self.pairs = comparisons(self.keys)
        self.num_blocks = self.models[0].anatomy.num_blocks
        self.blocks = settings.chosen_blocks(self.num_blocks)
        self.groups = [tuple(self.blocks)] if settings.together else [(b,) for b in self.blocks]
        dataset = load_data(data, seed=settings.seed) if isinstance(data, str) else data
        self.dataset = dataset.sample(settings.samples, settings.seed)
        self.encoded: TokenRows = tokenize(self.dataset, self.models[0].tokenizer, max_length=settings.max_length,
                                           min_tokens=2, supervised=settings.supervised)
        self.settings = settings
        self.resumable = {key: self._resumable(model) for key, model in self.by_name.items()}

    @staticmethod
    def _resumable(model: LoadedModel) -> bool:
        try:
            verify_resume(model.model, model.anatomy)
        except ArchitectureError:
            return False  # every variant then runs from the embeddings on, with the same result
        return True

    def batches(self, rows: Sequence[TokenRow]) -> list[Batch]:
        return make_batches(rows, batch_size=self.settings.batch_size,
                            pad_id=pad_token_id(self.models[0].tokenizer))

    def start_of(self, group: Sequence[int]) -> int:
        """First block to run when the outputs of ``group`` are changed.

        Its input is handed over by the block before it, whose output hook still fires.
        """
        return min(group[0] + 1, self.num_blocks - 1)

    def own_states(self, key: str, batch: Batch, wanted: set[int]) -> tuple[Tensor, dict[int, Tensor]]:
        """Hidden L and the wanted hidden states of an unchanged model."""
        model = self.by_name[key]
        states: dict[int, Tensor] = {}

        def remember(h: int, z: Tensor) -> None:
            if h in wanted:
                states[h] = z
        return run_blocks(model.model, model.anatomy, batch, listener=remember), states

    def changed(self, key: str, batch: Batch, group: Sequence[int], states: Mapping[int, Tensor]) -> Tensor:
        """Hidden L of a model whose blocks are being changed, run from the first changed one on."""
        model, start = self.by_name[key], self.start_of(group)
        if start == 0 or not self.resumable[key]:
            return run_blocks(model.model, model.anatomy, batch)
        return run_blocks(model.model, model.anatomy, batch, start=start, hidden=states[start])

    def result(self, table: Table, what: str, scored: Sequence[TokenRow], **extra: Any) -> SteerResult:
        for row in table.rows:
            row["data"] = self.dataset.name
        counts = {"scored_samples": len(scored), **extra.pop("counts", {}), **self.encoded.describe()}
        return SteerResult(table, self.keys, self.settings, what, counts=counts, **extra)


def steer(stages: Sequence[LoadedModel | str] | LoadedModel | str, sft: LoadedModel | str | None = None, *,
          data: Dataset | str, names: Sequence[str] | None = None, progress: Progress = silent,
          settings: SteerSettings | None = None, **overrides: Any) -> SteerResult:
    """Add a direction of sft - base at blocks of the base and score it on samples it was not made from.

    Args:
        stages: The base (then give ``sft``), or a chain (each comparison of it is measured).
        sft: The tuned checkpoint, where ``stages`` is a single base.
        data: A data set or a D spec.
        names: Stage names.
        progress: Told how many forward passes are done.
        settings: Direction, blocks, strengths and samples.
        **overrides: Single fields of `SteerSettings`.

    Returns:
        Rows of kind ``block`` (or ``segment``, layer such as ``10:20``, when all at once) with columns
        ``alpha``, ``direction``, ``stage``: ``loss`` (nats), ``accuracy``, ``perplexity`` of the steered earlier
        stage and their paired ``difference`` from strength 0, t intervals over the held-out
        samples; ``direction_norm`` and ``direction_share`` (of the squared change), and
        ``direction_cosine``: the held-out samples' own change against the direction. Rows of kind
        ``model``: both unchanged models on the same samples.

    Raises:
        SettingsError: a setting out of range, or a principal direction beyond the rank.
        BlockRangeError: a block that the model does not have.
        DataError: too few usable samples.
    """
    chosen = replace(settings or SteerSettings(), **overrides)
    ready = _Prepared(stages, sft, data, names, chosen)
    rows = ready.encoded.rows
    if len(rows) < 4:
        raise DataError(f"{ready.dataset.source}: {len(rows)} usable samples, but steering needs at least 4 (one half "
                        "gives the direction, the other is scored).")
    order = np.random.default_rng(chosen.seed).permutation(len(rows))
    fitted = [rows[i] for i in order[:(len(rows) + 1) // 2]]
    scored = [rows[i] for i in order[(len(rows) + 1) // 2:]]
    pooled = PooledStates(ready.keys, ready.num_blocks + 1, [r.index for r in (*fitted, *scored)],
                          ready.models[0].anatomy.hidden_size)
    feed_batches(ready.by_name, ready.batches(rows), {"pooled": pooled}, progress=progress, what="directions")
    table = Table()
    vectors: dict[tuple[str, int], Tensor] = {}
    for later, earlier in ready.pairs:
        extra: dict[str, Any] = {"direction": chosen.direction, "stage": side_of((later, earlier))}
        for block in ready.blocks:
            x = {s: pooled.x[s][block + 1] for s in (later, earlier)}
            vector, share = direction_of(x[earlier][:len(fitted)], x[later][:len(fitted)], chosen.direction,
                                         centered=chosen.centered, seed=chosen.seed + block)
            vectors[extra["stage"], block] = vector
            table.add("block", block, "direction_norm", "pair", float(vector.norm()), n=len(fitted), **extra)
            held_out = x[later][len(fitted):] - x[earlier][len(fitted):]
            if float(vector.norm()) > 0 and bool((held_out.norm(dim=1) > 0).all()):
                table.add("block", block, "direction_share", "pair", share, n=len(fitted), **extra)
                cosines = metrics.cosine_similarity(held_out.double(), vector.double().expand_as(held_out))
                table.add("block", block, "direction_cosine", "pair",
                          stats.mean_interval(cosines.numpy(), chosen.confidence), **extra)
            else:
                for metric in ("direction_share", "direction_cosine"):
                    table.add_undefined("block", block, metric, "pair", "the stages do not differ here", **extra)
    scores = _Scores(scored)
    batches = ready.batches(scored)
    strengths = [a for a in dict.fromkeys(chosen.alphas) if a != 0]
    total = len(batches) * len(ready.pairs) * (2 + len(ready.groups) * len(strengths))
    done = 0
    with torch.inference_mode():
        for batch in batches:
            for pair in ready.pairs:
                later, earlier = pair
                model = ready.by_name[earlier]
                here = batch.to(model.device)
                last, states = ready.own_states(earlier, here, {ready.start_of(g) for g in ready.groups})
                scores.keep((pair, None, 0.0), model, here, last)
                there = batch.to(ready.by_name[later].device)
                scores.keep((pair, None, None), ready.by_name[later], there, ready.own_states(later, there, set())[0])
                done += 2
                for group in ready.groups:
                    own = {b: vectors[side_of(pair), b] for b in group}
                    for alpha in strengths:
                        with steered(model.anatomy, own, alpha):
                            last = ready.changed(earlier, here, group, states)
                        scores.keep((pair, group, alpha), model, here, last)
                        done += 1
                    progress("steer", done, total, note=f"blocks {format_blocks(group)}")
    _score_rows(table, scores, ready, [0.0, *strengths], chosen.direction)
    return ready.result(table, chosen.direction, scored, vectors=vectors, counts={"direction_samples": len(fitted)})


def patch(stages: Sequence[LoadedModel | str] | LoadedModel | str, sft: LoadedModel | str | None = None, *,
          data: Dataset | str, positions: Positions = "all", names: Sequence[str] | None = None,
          progress: Progress = silent, settings: SteerSettings | None = None, **overrides: Any) -> SteerResult:
    """Replace hidden states of the base by the tuned model's at blocks and positions, and score.

    Args:
        stages: The base (then give ``sft``), or a chain (each comparison of it is measured).
        sft: The tuned checkpoint, where ``stages`` is a single base.
        data: A data set or a D spec.
        positions: ``all``; ``prompt``, ``completion`` or ``last-prompt`` token (these need ``supervised`` and data
            with prompts and completions).
        names: Stage names.
        progress: Told how many forward passes are done.
        settings: Blocks and samples. Strength alpha puts the state alpha of the way to the other model's.
        **overrides: Single fields of `SteerSettings`.

    Returns:
        Rows as `steer` has them, ``direction`` being ``patch POSITIONS``; all samples are scored.

    Raises:
        SettingsError: unknown positions, or positions that need ``supervised``.
        BlockRangeError: a block that the model does not have.
        DataError: no usable sample.
    """
    chosen = replace(settings or SteerSettings(), **overrides)
    if positions not in POSITIONS:
        raise SettingsError(f"positions {positions!r} are unknown; use {', '.join(POSITIONS)}.")
    if positions != "all" and not chosen.supervised:
        raise SettingsError(f"patching {positions} positions needs prompts and completions; add --supervised.")
    ready = _Prepared(stages, sft, data, names, chosen)
    rows = ready.encoded.rows
    if not rows:
        raise DataError(f"{ready.dataset.source}: no sample has the 2 tokens that a next-token score needs.")
    places = {row.index: row for row in rows}
    scores, table = _Scores(rows), Table()
    batches = ready.batches(rows)
    strengths = [a for a in dict.fromkeys(chosen.alphas) if a != 0]
    total = len(batches) * len(ready.pairs) * (2 + len(ready.groups) * len(strengths))
    done = 0
    with torch.inference_mode():
        for batch in batches:
            mask = _position_mask(batch, [places[i] for i in batch.indices], positions)
            for pair in ready.pairs:
                later, earlier = pair
                model = ready.by_name[earlier]
                here, there = batch.to(model.device), batch.to(ready.by_name[later].device)
                donated, gifts = ready.own_states(later, there, {b + 1 for b in ready.blocks})
                scores.keep((pair, None, None), ready.by_name[later], there, donated)
                wanted = {ready.start_of(g) for g in ready.groups} | {b + 1 for b in ready.blocks}
                last, states = ready.own_states(earlier, here, wanted)
                scores.keep((pair, None, 0.0), model, here, last)
                done += 2
                for group in ready.groups:
                    for alpha in strengths:
                        mixed = {b: (mask, torch.lerp(states[b + 1].float(), gifts[b + 1].to(model.device).float(),
                                                      alpha)) for b in group}
                        with patched(model.anatomy, mixed):
                            last = ready.changed(earlier, here, group, states)
                        scores.keep((pair, group, alpha), model, here, last)
                        done += 1
                    progress("patch", done, total, note=f"blocks {format_blocks(group)}")
    _score_rows(table, scores, ready, [0.0, *strengths], f"patch {positions}")
    return ready.result(table, f"patch {positions}", rows)


def _position_mask(batch: Batch, rows: Sequence[TokenRow], positions: str) -> Tensor:
    """(B, T): the real tokens at the named positions (rows are padded on the right)."""
    mask = batch.attention_mask > 0
    if positions == "all":
        return mask
    chosen = torch.zeros_like(mask)
    for i, row in enumerate(rows):
        start = row.prompt_length
        if positions == "prompt":
            chosen[i, :start] = True
        elif positions == "completion":
            chosen[i, start:] = True
        elif start:
            chosen[i, start - 1] = True
    return chosen & mask


def _score_rows(table: Table, scores: _Scores, ready: _Prepared, alphas: Sequence[float], what: str) -> None:
    confidence = ready.settings.confidence
    for pair in ready.pairs:
        later, earlier = pair
        extra: dict[str, Any] = {"direction": what, "stage": side_of(pair)}

        def add(kind: Any, layer: int | str, side: str, key: tuple[Any, ...], base: tuple[Any, ...] | None,
                extra: dict[str, Any] = extra, **more: Any) -> None:
            for metric in ("loss", "accuracy"):
                values = scores.values[(*key, metric)]
                interval = stats.mean_interval(values, confidence)
                table.add(kind, layer, metric, side, interval, **extra, **more)
                if metric == "loss":
                    table.add(kind, layer, "perplexity", side, exponential(interval), **extra, **more)
                if base is None:
                    continue
                change = stats.mean_interval(values - scores.values[(*base, metric)], confidence)
                table.add(kind, layer, metric, "difference", change, **extra, **more)
                if metric == "loss":
                    table.add(kind, layer, "perplexity_ratio", "pair", exponential(change), **extra, **more)

        unchanged = (pair, None, 0.0)
        add("model", "", earlier, unchanged, None, alpha=0.0)
        add("model", "", later, (pair, None, None), unchanged)
        for group in ready.groups:
            single = len(group) == 1
            kind, layer = ("block", group[0]) if single else ("segment", format_blocks(group))
            for alpha in alphas:
                key = unchanged if alpha == 0 else (pair, group, alpha)
                add(kind, layer, earlier, key, unchanged, alpha=alpha)
