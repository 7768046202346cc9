"""Block-wise interpolation between a base and its tuned checkpoint: W = base + a (sft - base).

The merged model exists one block at a time: a block whose share a is neither 0 nor 1 gets its
interpolated weights when it is about to run and gives them back right after, into room for a
single block; shares of 0 and 1 use the base's and the tuned model's own tensors. Memory is two
models and a block, and the base is as it was afterwards, bit for bit, also after an error.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pandas as pd
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from midblock.analysis.passes import draw, encode, load_stages
from midblock.analysis.scores import SampleScores, TokenMean, add_changes, add_scores
from midblock.capture import score_batch
from midblock.data import Dataset
from midblock.data.registry import task_words
from midblock.errors import OutputError, PairMismatchError, SettingsError
from midblock.models import LoadedModel, require_full_weights, save_checkpoint
from midblock.models.chain import comparisons, side_of
from midblock.progress import Progress, silent
from midblock.quantities import label_of
from midblock.results import UNNAMED, Answer, Origin, Table, TableResult
from midblock.segments import format_blocks, segment_bounds
from midblock.settings.merge import MergeSettings
from midblock.writing import output_error, temporary_folder

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["MergeResult", "alphas_label", "block_alphas", "interpolated", "merge",
           "save_merged"]

_PIECE = 1 << 20  # entries interpolated at a time, in float32


# ---------------------------------------------------------------------------------------------
# the merged model


def alphas_label(alphas: Sequence[float]) -> str:
    """Shares as text, as they stand in tables.

    Example:
        >>> alphas_label((0.0, 0.5, 1.0))
        '0,0.5,1'
    """
    return ",".join(f"{a:g}" for a in alphas)


def block_alphas(alphas: Sequence[float], num_blocks: int) -> list[float]:
    """Share of each block: that of its depth segment.

    Raises:
        BlockRangeError: more segments than blocks.

    Example:
        >>> block_alphas((0.0, 1.0), 5)
        [0.0, 0.0, 1.0, 1.0, 1.0]
    """
    bounds = segment_bounds(len(alphas), num_blocks)
    return [a for a, (lo, hi) in zip(alphas, bounds, strict=True) for _ in range(lo, hi)]


def interpolate_(out: Tensor, base: Tensor, sft: Tensor, alpha: float) -> Tensor:
    """Write base + alpha * (sft - base) into ``out`` (which may be ``base``), rounding once.

    The arithmetic is float32 (float64 for float64 weights), a piece at a time.
    """
    wide = torch.float64 if out.dtype == torch.float64 else torch.float32
    flat_out = out.view(-1)
    flat_base, flat_sft = base.reshape(-1), sft.reshape(-1)
    for lo in range(0, flat_out.numel(), _PIECE):
        part = slice(lo, lo + _PIECE)
        # lerp is exact at both ends, which base + alpha * (sft - base) is not
        flat_out[part] = torch.lerp(flat_base[part].to(wide), flat_sft[part].to(wide), alpha)
    return out


def _pairs_of(base: nn.Module, sft: nn.Module) -> list[tuple[str, nn.Parameter, nn.Parameter]]:
    own, other = dict(base.named_parameters()), dict(sft.named_parameters())
    if {n: p.shape for n, p in own.items()} != {n: p.shape for n, p in other.items()}:
        differing = sorted(n for n in {*own, *other} if n not in own or n not in other
                           or own[n].shape != other[n].shape)
        raise PairMismatchError(f"{len(differing)} weights of the two checkpoints do not correspond "
                                f"({', '.join(differing[:3])}); they cannot be interpolated. A head that is tied in "
                                "one of them only must be untied in both, or tied in both.")
    return [(name, p, other[name]) for name, p in own.items()]


class _Weight(NamedTuple):
    """A weight that is merged, and its share."""

    name: str
    base: nn.Parameter
    sft: nn.Parameter
    alpha: float
    block: int | None
    """None outside the blocks, and where several blocks share it."""


def _weights(base: LoadedModel, sft: LoadedModel, alphas: Sequence[float], alpha_rest: float | None) -> list[_Weight]:
    """The weights whose share is not 0.

    Raises:
        PairMismatchError: weights that do not correspond.
        SettingsError: blocks that share a weight are given different shares.
    """
    anatomy = base.anatomy
    share_of = block_alphas(alphas, anatomy.num_blocks)
    rest = sum(alphas) / len(alphas) if alpha_rest is None else alpha_rest
    blocks_of: dict[int, list[int]] = {}
    for b, block in enumerate(anatomy.blocks):
        for parameter in block.parameters():
            blocks_of.setdefault(id(parameter), []).append(b)
    found = []
    for name, p, q in _pairs_of(base.model, sft.model):
        blocks = blocks_of.get(id(p), [])
        shares = {share_of[b] for b in blocks} or {rest}
        if len(shares) > 1:
            raise SettingsError(f"blocks {format_blocks(blocks)} share {name}, but their alphas differ "
                                f"({', '.join(f'{a:g}' for a in sorted(shares))}); give all of them one share.")
        if (alpha := shares.pop()) != 0:
            found.append(_Weight(name, p, q, alpha, blocks[0] if len(blocks) == 1 else None))
    return found


@contextlib.contextmanager
def interpolated(base: LoadedModel, sft: LoadedModel, alphas: Sequence[float], alpha_rest: float | None = None
                 ) -> Iterator[LoadedModel]:
    """Within the context ``base`` runs as the merged model; restored bit for bit also after an error.

    One forward at a time: the room for interpolated weights belongs to one block.

    Args:
        base: The model that is changed and given back.
        sft: The tuned model; only read.
        alphas: One share per depth segment, input side first; 0 is the base, 1 the tuned model.
            Shares outside 0..1 extrapolate.
        alpha_rest: Share of everything outside the blocks (embeddings, final norm, head); default
            the mean of ``alphas``, so that all zeros are the base and all ones the tuned model.

    Yields:
        ``base``.

    Raises:
        BlockRangeError: more segments than blocks.
        PairMismatchError: weights that do not correspond.
        SettingsError: blocks that share a weight are given different shares.
    """
    weights = _weights(base, sft, alphas, alpha_rest)
    originals = [(w.base, w.base.data) for w in weights]
    handles: list[Any] = []
    fractional: dict[tuple[int, float], list[tuple[nn.Parameter, nn.Parameter, Tensor]]] = {}
    room: dict[tuple[Any, ...], Tensor] = {}
    try:
        for name, p, q, alpha, block in weights:
            if alpha == 1:
                p.data = q.data
            elif block is None:
                p.data = interpolate_(_like(p.data), p.data, q.data, alpha)
            else:
                inside = name.rpartition(f"{base.anatomy.block_path(block)}.")[2]
                key = (inside, p.shape, p.dtype, p.device)
                if key not in room:  # blocks run one after another and share it
                    room[key] = _like(p.data)
                fractional.setdefault((block, alpha), []).append((p, q, room[key]))
        for (block, alpha), members in fractional.items():
            module = base.anatomy.blocks[block]
            fill, give_back = _hooks(members, alpha)
            handles.append(module.register_forward_pre_hook(fill))
            # prepended: other hooks end the forward at the last block by an exception
            handles.append(module.register_forward_hook(give_back, prepend=True))
        yield base
    finally:
        for handle in handles:
            handle.remove()
        for parameter, original in originals:
            parameter.data = original


def _like(data: Tensor) -> Tensor:
    return torch.empty_like(data, memory_format=torch.contiguous_format)


def _hooks(members: Sequence[tuple[nn.Parameter, nn.Parameter, Tensor]], alpha: float
           ) -> tuple[Callable[..., None], Callable[..., None]]:
    """Hooks that give a block its interpolated weights before it runs, and take them away after."""
    own = [p.data for p, _, _ in members]

    def fill(*ignored: Any) -> None:
        for (p, q, space), data in zip(members, own, strict=True):
            p.data = interpolate_(space, data, q.data, alpha)

    def give_back(*ignored: Any) -> None:
        for (p, _, _), data in zip(members, own, strict=True):
            p.data = data

    return fill, give_back


def save_merged(base: LoadedModel, sft: LoadedModel, alphas: Sequence[float], folder: Path | str,
                alpha_rest: float | None = None) -> Path:
    """Write the merged model as a checkpoint that `load_model` and transformers load.

    Its weights are those that `interpolated` runs with, so that its logits are the same. The base
    is merged in its own memory; what it was is kept in a temporary file beside ``folder`` and put
    back, so that no third model is ever in memory.

    Args:
        base: The model that is changed and given back.
        sft: The tuned model; only read.
        alphas: As for `interpolated`.
        folder: Absent or empty.
        alpha_rest: As for `interpolated`.

    Returns:
        The folder.

    Raises:
        OutputError: the folder is not empty or cannot be written (disk full).
        BlockRangeError: more segments than blocks.
        PairMismatchError: weights that do not correspond.
    """
    folder = Path(folder).expanduser()
    changed = _weights(base, sft, alphas, alpha_rest)
    try:
        with temporary_folder(beside=folder) as aside:
            kept = aside / "weights.safetensors"
            if changed:
                save_file({w.name: w.base.data.contiguous() for w in changed}, kept)
            try:
                with torch.no_grad():
                    for w in changed:
                        interpolate_(w.base.data, w.base.data, w.sft.data, w.alpha)
                return save_checkpoint(base.model, base.tokenizer, folder)
            finally:
                if changed:
                    with safe_open(kept, framework="pt") as stored, torch.no_grad():
                        for w in changed:
                            w.base.data.copy_(stored.get_tensor(w.name))
    except (SafetensorError, OSError) as error:
        raise output_error(folder, error) from error


# ---------------------------------------------------------------------------------------------
# scores


@dataclass
class MergeResult(TableResult):
    """Scores of every merged model, paired with the base and the tuned model."""

    table: Table
    """The tidy table, with the columns ``stage`` (the pair merged), ``against`` and ``alpha_rest``."""
    stages: list[str]
    settings: MergeSettings
    counts: dict[str, Any] = field(default_factory=dict)
    """Samples, tokens and rows cut; folders written."""
    origin: Origin = UNNAMED

    def scores(self) -> pd.DataFrame:
        """One row a model (base, tuned, merged ones): loss, accuracy, perplexity and change of the loss."""
        frame = self.frame
        if frame.empty:
            return frame
        rows = []
        own = frame[frame["side"] != "difference"]
        for (stage, side, layer), part in own[own["metric"].isin(["loss", "accuracy", "perplexity"])].groupby(
                ["stage", "side", "layer"], sort=False):
            row = {"pair": stage, "model": side if side != "merged" else f"merged {layer}",
                   **{r["metric"]: r["value"] for _, r in part.iterrows()}}
            changes = frame[(frame["stage"] == stage) & (frame["layer"] == layer) & (frame["side"] == "difference")
                            & (frame["metric"] == "loss")]
            for _, change in changes.iterrows():
                row[f"loss - {change['against']}'s"] = change["value"]
                row[f"interval ({change['against']})"] = f"[{change['low']:+.4f}, {change['high']:+.4f}]"
            rows.append(row)
        return pd.DataFrame(rows)

    def answer(self) -> Answer:
        """The best merged model against the tuned one."""
        written = self.counts.get("written", [])
        if self.frame.empty:
            return Answer(f"Written: {', '.join(written)}.", "Nothing was scored; give data to compare with both ends.")
        pair, frame = comparisons(self.stages)[0], self.frame
        part = frame[(frame["stage"] == side_of(pair)) & (frame["metric"] == "loss")]
        merged = part[part["side"] == "merged"]
        best = merged.loc[merged["value"].idxmin()]
        against = part[(part["layer"] == best["layer"]) & (part["against"] == pair[0])].iloc[0]
        found = (f"Shares {best['layer']} of {pair[0]} give {best['value']:.4f} nats a token, {against['value']:+.4f} "
                 f"[{against['low']:+.4f}, {against['high']:+.4f}] against {pair[0]}, n = {int(best['n'])} samples.")
        if against["high"] < 0:
            means = f"Better than {pair[0]} itself on this data: its other segments can be taken back."
        elif against["low"] > 0:
            means = f"Worse than {pair[0]}: what is taken back there is part of what tuning gained."
        else:
            means = f"Not told apart from {pair[0]} on these samples: more are needed to say whether anything is lost."
        keep = () if written else self.origin.words("merge", "--alphas", str(best["layer"]), "--save", "merged-model",
                                                    data=False)
        return Answer(found, means, keep or (("evaluate", written[0], *task_words(self.origin.data)) if written and
                                             self.origin.data else ()))

    def details(self) -> list[str]:
        """The best merged model of each pair against both ends."""
        frame = self.frame
        lines = []
        for pair in comparisons(self.stages):
            if frame.empty:
                break
            part = frame[(frame["stage"] == side_of(pair)) & (frame["metric"] == "loss")]
            merged = part[part["side"] == "merged"]
            best = merged.loc[merged["value"].idxmin()]
            words = [f"{best['value']:.4f} nats a token"]
            for end in (pair[1], pair[0]):
                row = part[(part["layer"] == best["layer"]) & (part["against"] == end)].iloc[0]
                words.append(f"{row['value']:+.4f} [{row['low']:+.4f}, {row['high']:+.4f}] against {end}")
            lines.append(f"{side_of(pair)}: of {len(merged)} merged model{'s' if len(merged) > 1 else ''}, "
                         f"{best['layer']} has the lowest loss: {', '.join(words)}; n = {int(best['n'])} samples.")
        lines += [f"Written: {folder}" for folder in self.counts.get("written", [])]
        return lines

    def figures(self) -> dict[str, Figure]:
        """Paired change of loss and accuracy of every merged model against both ends."""
        from midblock.figures import segment_bars

        frame = self.frame
        made: dict[str, Figure] = {}
        for pair in comparisons(self.stages) if len(frame) else ():
            part = frame[(frame["stage"] == side_of(pair)) & (frame["side"] == "difference")]
            for metric in ("loss", "accuracy"):
                key = f"merge-{metric}" if len(self.stages) == 2 else f"merge-{metric}-{side_of(pair)}"
                made[key] = segment_bars(
                    part.rename(columns={"layer": "alphas"}), metric=metric, label="alphas", hue="against",
                    title=f"{label_of(metric, unit='')} of merged models: {pair[0]} into {pair[1]}",
                    label_title="alpha of each segment (input side first)",
                    value_label=f"{label_of(metric)}, minus that of the model named")
        return made


def merge(stages: Sequence[LoadedModel | str] | LoadedModel | str, sft: LoadedModel | str | None = None, *,
          alphas: Sequence[float] | Sequence[Sequence[float]], data: Dataset | str | None = None,
          names: Sequence[str] | None = None, save: Path | str | None = None, progress: Progress = silent,
          settings: MergeSettings | None = None, **overrides: Any) -> MergeResult:
    """Score (and write) models that are interpolated segment by segment between base and tuned.

    Args:
        stages: The base (then give ``sft``), or a chain (each comparison of it is merged).
        sft: The tuned checkpoint, where ``stages`` is a single base.
        alphas: One setting (a share per depth segment), or several.
        data: A data set or a D spec to score on; None scores nothing (then give ``save``).
        names: Stage names.
        save: Folder for the merged checkpoint; with several settings or pairs, each gets a folder
            in it, named after its pair and alphas.
        progress: Told how many blocks have been run.
        settings: What to merge and score.
        **overrides: Single fields of `MergeSettings`.

    Returns:
        Rows of kind ``segment`` (layer = the alphas): ``loss`` (nats, mean over all tokens),
        ``accuracy`` (next token) and ``perplexity`` of the merged model (side ``merged``), and their
        paired difference from both ends (side ``difference``, column ``against``). The ends'
        own scores have kind ``model``, with their name as layer and side. Column ``stage`` names
        the pair.

    Raises:
        SettingsError: nothing to do, no alphas, or a setting out of range.
        BlockRangeError: more segments than blocks.
        PairMismatchError: weights that do not correspond.
        OutputError: the folder to save in is not empty or cannot be written.
        DataError: no usable sample.
    """
    chosen = MergeSettings.of(settings, overrides)
    wanted = _all_alphas(alphas)
    if data is None and save is None:
        raise SettingsError("merge has nothing to do: give data to score on, a folder to save in, or both.")
    by_name = load_stages(stages, sft, names)
    for loaded in by_name.values():
        require_full_weights(loaded, "merging")
    keys = list(by_name)
    pairs = comparisons(keys)
    for setting in wanted:
        for later, earlier in pairs:  # a fault must not cost the others' time
            _weights(by_name[earlier], by_name[later], setting, chosen.alpha_rest)
    folders = _folders(save, wanted, pairs)
    table, counts = Table(), dict[str, Any]()
    if data is not None:
        table, counts = _scored(by_name, pairs, wanted, data, chosen, progress)
    for (pair, setting), folder in folders.items():
        save_merged(by_name[pair[1]], by_name[pair[0]], setting, folder, chosen.alpha_rest)
        progress("save", len(counts.setdefault("written", [])) + 1, len(folders), note=folder.name)
        counts["written"].append(str(folder))
    spec = "" if data is None else data if isinstance(data, str) else data.spec
    return MergeResult(table, keys, chosen, counts, Origin(tuple(m.spec for m in by_name.values()), spec))


def _all_alphas(alphas: Any) -> list[tuple[float, ...]]:
    settings = list(alphas)
    if settings and not isinstance(settings[0], Sequence):
        settings = [settings]
    found = list(dict.fromkeys(tuple(float(a) for a in setting) for setting in settings))
    if not found or not all(setting and all(map(math.isfinite, setting)) for setting in found):
        raise SettingsError("merge needs at least one list of finite alphas, such as (0, 0.5, 1, 0.5, 0).")
    return found


def _folders(save: Path | str | None, wanted: Sequence[tuple[float, ...]], pairs: Sequence[tuple[str, str]]
             ) -> dict[tuple[tuple[str, str], tuple[float, ...]], Path]:
    if save is None:
        return {}
    root = Path(save).expanduser()
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise OutputError(f"{root} exists and is not an empty folder; name another to save in.")
    many = [(pair, setting) for pair in pairs for setting in wanted]
    if len(many) == 1:
        return {many[0]: root}
    return {(pair, setting): root / "_".join(
        [*([side_of(pair)] if len(pairs) > 1 else []), alphas_label(setting).replace(",", "_")])
        for pair, setting in many}


def _scored(by_name: dict[str, LoadedModel], pairs: Sequence[tuple[str, str]], wanted: Sequence[tuple[float, ...]],
            data: Dataset | str, settings: MergeSettings, progress: Progress) -> tuple[Table, dict[str, Any]]:
    inputs = encode(by_name, draw(data, settings), settings)
    batches, samples = inputs.batches(), [row.index for row in inputs.rows]
    passes = len(by_name) + len(pairs) * len(wanted)
    done = 0

    def score(model: LoadedModel, note: str) -> SampleScores:
        nonlocal done
        found = SampleScores(samples)
        for batch in batches:
            with torch.inference_mode():
                found.put(batch, score_batch(model.model, model.anatomy, batch.to(model.device)))
            done += 1
            progress("merge (batches)", done, passes * len(batches), note=note)
        return found

    ends = {name: score(model, name) for name, model in by_name.items()}
    table = Table()
    mean = TokenMean(per_sample=settings.per_sample_mean, confidence=settings.confidence, seed=settings.seed)
    for pair in pairs:
        later, earlier = pair
        common: dict[str, Any] = {"stage": side_of(pair), "against": None, "alpha_rest": None}
        for name in (earlier, later):
            add_scores(table, "model", name, name, ends[name], mean, **common)
        for setting in wanted:
            rest = sum(setting) / len(setting) if settings.alpha_rest is None else settings.alpha_rest
            label = alphas_label(setting)
            with interpolated(by_name[earlier], by_name[later], setting, rest) as model:
                merged = score(model, label)
            add_scores(table, "segment", label, "merged", merged, mean, **{**common, "alpha_rest": rest})
            for end in (earlier, later):
                add_changes(table, "segment", label, merged, ends[end], mean,
                            **{**common, "against": end, "alpha_rest": rest})
    return inputs.named(table), inputs.counts()
