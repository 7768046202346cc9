"""Steering and patching: does the change that tuning made at a depth carry its behaviour?

Steering adds a direction of the paired difference sft - base of the pooled states at hidden b+1
(`midblock.analysis.directions`) to the output of chosen blocks of the base. The direction is estimated
on one half of the samples and scored on the other.

Patching replaces the base's hidden states by the tuned model's, sample by sample and token by
token, at chosen blocks and positions.

Sources: Turner et al., "Activation Addition: Steering Language Models Without Optimization", 2023; Meng et al.,
"Locating and Editing Factual Associations in GPT", NeurIPS 2022 (patching).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from midblock import metrics, stats
from midblock.analysis.directions import direction_of
from midblock.analysis.lens_tokens import tokens_of_directions
from midblock.analysis.passes import Inputs, feed_batches, prepare
from midblock.analysis.scores import SampleScores, TokenMean, add_changes, add_scores
from midblock.capture import patched, run_blocks, score_hidden, steered, why_not_resume
from midblock.capture.accumulators import PooledStates
from midblock.data import Batch, Dataset, TokenRow, pad_token_id
from midblock.errors import DataError
from midblock.models import LoadedModel
from midblock.models.chain import comparisons, side_of
from midblock.progress import Progress, silent
from midblock.quantities import label_of
from midblock.results import UNNAMED, Answer, Kind, Origin, Table, TableResult
from midblock.segments import format_blocks
from midblock.settings.steer import Positions, SteerSettings

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["SteerResult", "generate", "generations", "patch", "steer"]


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
                max_new_tokens: int | None = None, chat: bool | None = None,
                progress: Progress = silent) -> pd.DataFrame:
    """Greedy continuations by the unchanged models and by every steered variant of a result.

    Args:
        stages: The models that ``result`` was measured on.
        result: From `steer`, whose vectors are added.
        prompts: Texts to continue.
        max_new_tokens: Where to stop at the latest; default as the result's settings say.
        chat: Use the tokenizer's chat template; default as the result's settings say.
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
            text = generate(by_name[name], prompt, vectors=vectors, alpha=alpha,
                            max_new_tokens=settings.max_new_tokens if max_new_tokens is None else max_new_tokens,
                            chat=settings.chat if chat is None else chat)
            rows.append({"prompt": prompt, "stage": stage, "model": name, "blocks": format_blocks(group),
                         "alpha": alpha, "text": text})
            progress("generate", len(rows), len(variants) * len(prompts), note=f"{name} {format_blocks(group)}")
    return pd.DataFrame(rows)


# -- measuring -----------------------------------------------------------------------------------


@dataclass
class SteerResult(TableResult):
    """Scores of the changed model, paired with the unchanged one on the same samples."""

    table: Table
    """The tidy table; columns ``alpha``, ``direction``, ``stage``, ``data``."""
    stages: list[str]
    settings: SteerSettings
    what: str
    """``mean`` and the other directions, or ``patch all`` and the other positions."""
    vectors: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    """(comparison, block) -> steering vector (d,); empty after patching."""
    counts: dict[str, Any] = field(default_factory=dict)
    origin: Origin = UNNAMED
    tokens: pd.DataFrame = field(default_factory=pd.DataFrame)
    """What each vector speaks for through the earlier stage's final norm and head (the activation difference lens of
    `midblock.analysis.lens_tokens`): columns ``stage``, ``block``, ``rank``, ``token``, ``id``, ``probability``."""

    def tables(self) -> dict[str, pd.DataFrame]:
        """``direction_tokens``."""
        return {"direction_tokens": self.tokens}

    def _best(self, stage: str) -> pd.Series:
        frame = self.frame
        change = frame[(frame["stage"] == stage) & (frame["metric"] == "loss") & (frame["side"] == "difference")
                       & (frame["alpha"].abs() > 0)]
        return change.loc[change["value"].idxmin()]

    def answer(self) -> Answer:
        """Where the change helps the base most, and whether beyond chance."""
        pair = comparisons(self.stages)[0]
        best, frame = self._best(side_of(pair)), self.frame
        n = int(best["n"])
        own = frame[(frame["stage"] == side_of(pair)) & (frame["kind"] == "model")
                    & (frame["metric"] == "loss")].set_index("side")["value"]
        gap = own[pair[0]] - own[pair[1]]
        where = f"block {best['layer']}" if best["kind"] == "block" else f"blocks {best['layer']} at once"
        found = (f"The {self.what} of {side_of(pair)} put into {pair[1]} at {where}, strength {best['alpha']:g}, "
                 f"changes the loss most: {best['value']:+.4f} nats a token [{best['low']:+.4f}, {best['high']:+.4f}], "
                 f"n = {n} samples ({pair[0]} itself {gap:+.4f}).")
        if best["high"] < 0:
            return Answer(found, "Part of what tuning changed can be carried there by hidden states alone; swap says "
                          "which blocks carry it in their weights.", self.origin.words("swap"))
        return Answer(found, "Nothing here lowers the loss beyond chance on so few samples; take more, or other "
                      "blocks.", self.origin.words("steer", "--samples", str(8 * n)))

    def details(self) -> list[str]:
        """Where, and how strongly, the change moves the base towards the tuned model."""
        frame = self.frame
        lines = []
        for later, earlier in comparisons(self.stages):
            part = frame[frame["stage"] == side_of((later, earlier))]
            own = part[(part["kind"] == "model") & (part["metric"] == "loss")].set_index("side")["value"]
            best = self._best(side_of((later, earlier)))
            where = f"block {best['layer']}" if best["kind"] == "block" else f"blocks {best['layer']} at once"
            gap = f"{later} itself differs from {earlier} by {own[later] - own[earlier]:+.4f} nats"
            lines.append(f"{self.what} of {side_of((later, earlier))} in {earlier}: the loss falls most or rises least "
                         f"at {where} with strength {best['alpha']:g} ({best['value']:+.4f} nats [{best['low']:+.4f}, "
                         f"{best['high']:+.4f}], n = {int(best['n'])} samples); {gap}.")
            words = self.tokens[self.tokens["stage"] == side_of((later, earlier))] if len(self.tokens) else self.tokens
            if len(words):
                at = words.loc[words["probability"].idxmax(), "block"]
                words = words[words["block"] == at]
                lines.append(f"The direction of block {at} speaks for " + ", ".join(
                    f"{t!r} ({p:.2g})" for t, p in zip(words["token"], words["probability"], strict=True)) + ".")
        return lines

    def figures(self) -> dict[str, Figure]:
        """Paired change of loss and accuracy, by block (a line per strength) or by strength."""
        from midblock.figures import lines

        frame = self.frame
        made: dict[str, Figure] = {}
        for pair in comparisons(self.stages):
            part = frame[(frame["stage"] == side_of(pair)) & (frame["side"] == "difference")
                         & (frame["kind"] != "model")]
            suffix = f"-{side_of(pair)}" if len(self.stages) > 2 else ""
            for metric in ("loss", "accuracy"):
                rows = part[(part["metric"] == metric) & (part["alpha"] != 0)]
                by_block = (rows["kind"] == "block").all() and rows["layer"].nunique() > 1
                drawn = rows.assign(strength=rows["alpha"].map(lambda a: f"strength {a:g}"),
                                    place=rows["layer"].map(lambda b: f"block {b}"))
                made[f"steer-{metric}{suffix}"] = lines(
                    drawn, "layer" if by_block else "alpha", hue="strength" if by_block else "place", zero=True,
                    x_label="block" if by_block else "strength", y_label=f"change of {label_of(metric).lower()}",
                    title=f"{self.what.capitalize()} of {side_of(pair)} put into {pair[1]}")
        return made


# (comparison, blocks changed, strength); no blocks and strength None: the later stage itself, 0: the earlier one
_Variant = tuple[tuple[str, str], tuple[int, ...] | None, float | None]


class _Variants:
    """Scores the unchanged models and every changed variant of the earlier one, batch by batch."""

    def __init__(self, inputs: Inputs, rows: Sequence[TokenRow], settings: SteerSettings) -> None:
        self.inputs, self.settings = inputs, settings
        self.num_blocks = inputs.first.anatomy.num_blocks
        self.blocks = settings.chosen_blocks(self.num_blocks)
        self.groups = [tuple(self.blocks)] if settings.together else [(b,) for b in self.blocks]
        self.strengths = [a for a in dict.fromkeys(settings.alphas) if a != 0]
        self.starts = {group: min(group[0] + 1, self.num_blocks - 1) for group in self.groups}
        """First block to run: the one before it still hands its input over, so that its output hook fires."""
        self.scores: dict[_Variant, SampleScores] = {}
        self._samples = [row.index for row in rows]

    def keep(self, variant: _Variant, model: LoadedModel, batch: Batch, last: Tensor) -> None:
        """Score hidden L of a batch with the model's own head."""
        self.scores.setdefault(variant, SampleScores(self._samples)).put(
            batch, score_hidden(model.anatomy, last, batch))

    def unchanged(self, pair: tuple[str, str], name: str, batch: Batch, wanted: set[int]
                  ) -> tuple[Batch, dict[int, Tensor]]:
        """Run and score an unchanged model of a comparison: the batch on its device, and the wanted hidden states."""
        model = self.inputs.stages[name]
        here, states = batch.to(model.device), dict[int, Tensor]()

        def remember(h: int, z: Tensor) -> None:
            if h in wanted:
                states[h] = z
        last = run_blocks(model.model, model.anatomy, here, listener=remember)
        self.keep((pair, None, 0.0 if name == pair[1] else None), model, here, last)
        return here, states

    def changed(self, variant: _Variant, batch: Batch, states: Mapping[int, Tensor]) -> None:
        """Run the earlier stage, whose blocks are being changed, from the first changed one on, and score it."""
        (_, earlier), group, _ = variant
        assert group is not None
        model, start = self.inputs.stages[earlier], self.starts[group]
        if why_not_resume(model.model, model.anatomy, [start])[start] is None:
            last = run_blocks(model.model, model.anatomy, batch, start=start, hidden=states[start])
        else:  # from the embeddings on, with the same result
            last = run_blocks(model.model, model.anatomy, batch)
        self.keep(variant, model, batch, last)

    def passes(self, batches: int) -> int:
        """Forward passes in all."""
        return batches * len(self.inputs.pairs) * (2 + len(self.groups) * len(self.strengths))

    def result(self, table: Table, what: str, rows: Sequence[TokenRow], vectors: dict[tuple[str, int], Tensor],
               **counts: Any) -> SteerResult:
        """All rows, and what they rest on."""
        mean = TokenMean(per_sample=self.settings.per_sample_mean, confidence=self.settings.confidence,
                         seed=self.settings.seed)
        for pair in self.inputs.pairs:
            later, earlier = pair
            extra: dict[str, Any] = {"direction": what, "stage": side_of(pair)}
            own, theirs = self.scores[pair, None, 0.0], self.scores[pair, None, None]
            add_scores(table, "model", "", earlier, own, mean, **extra, alpha=0.0)
            add_scores(table, "model", "", later, theirs, mean, **extra)
            add_changes(table, "model", "", theirs, own, mean, **extra)
            for group in self.groups:
                kind: Kind = "block" if len(group) == 1 else "segment"
                layer = group[0] if len(group) == 1 else format_blocks(group)
                for alpha in (0.0, *self.strengths):
                    found = self.scores[pair, group, alpha] if alpha else own
                    add_scores(table, kind, layer, earlier, found, mean, **extra, alpha=alpha)
                    add_changes(table, kind, layer, found, own, mean, **extra, alpha=alpha)
        return SteerResult(self.inputs.named(table), self.inputs.names, self.settings, what, vectors,
                           self.inputs.counts(scored_samples=len(rows), **counts), self.inputs.origin)


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
        settings: Direction, blocks, strengths and samples; with ``patch`` states are replaced instead (see `patch`).
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
    chosen = SteerSettings.of(settings, overrides)
    if chosen.patch is not None:
        return patch(stages, sft, data=data, positions=chosen.patch, names=names, progress=progress, settings=chosen)
    inputs = prepare(stages, sft, data=data, settings=chosen, names=names, min_rows=4,
                     need="steering (one half gives the direction, the other is scored)")
    rows = inputs.rows
    order = np.random.default_rng(chosen.seed).permutation(len(rows))
    fitted = [rows[i] for i in order[:(len(rows) + 1) // 2]]
    scored = [rows[i] for i in order[(len(rows) + 1) // 2:]]
    variants = _Variants(inputs, scored, chosen)
    pooled = PooledStates(inputs.names, variants.num_blocks + 1, [r.index for r in (*fitted, *scored)],
                          inputs.first.anatomy.hidden_size)
    feed_batches(inputs.stages, inputs.batches(), {"pooled": pooled}, progress=progress, what="directions")
    table = Table()
    vectors = _directions(table, pooled, variants, len(fitted))
    batches = inputs.batches(scored)
    done = 0
    with torch.inference_mode():
        for batch in batches:
            for pair in inputs.pairs:
                here, states = variants.unchanged(pair, pair[1], batch, set(variants.starts.values()))
                variants.unchanged(pair, pair[0], batch, set())
                done += 2
                for group in variants.groups:
                    own = {b: vectors[side_of(pair), b] for b in group}
                    for alpha in variants.strengths:
                        with steered(inputs.stages[pair[1]].anatomy, own, alpha):
                            variants.changed((pair, group, alpha), here, states)
                        done += 1
                    progress("steer", done, variants.passes(len(batches)), note=f"blocks {format_blocks(group)}")
    result = variants.result(table, chosen.direction, scored, vectors, direction_samples=len(fitted))
    result.tokens = _direction_tokens(inputs, vectors)
    return result


def _direction_tokens(inputs: Inputs, vectors: Mapping[tuple[str, int], Tensor], k: int = 5) -> pd.DataFrame:
    """What every vector that is not 0 speaks for."""
    rows = []
    for later, earlier in inputs.pairs:
        model, stage = inputs.stages[earlier], side_of((later, earlier))
        own = {block: v for (name, block), v in vectors.items() if name == stage and float(v.norm()) > 0}
        if own:
            ids, values = tokens_of_directions(model, torch.stack(list(own.values())), min(k, model.anatomy.vocab_size))
            rows += [{"stage": stage, "block": block, "rank": rank + 1, "token": model.tokenizer.decode([token]),
                      "id": token, "probability": probability}
                     for block, tokens, probabilities in zip(own, ids.tolist(), values.tolist(), strict=True)
                     for rank, (token, probability) in enumerate(zip(tokens, probabilities, strict=True))]
    return pd.DataFrame(rows)


def _directions(table: Table, pooled: PooledStates, variants: _Variants, fitted: int
                ) -> dict[tuple[str, int], Tensor]:
    """(comparison, block) -> direction of the first ``fitted`` samples; rows of its size and its fit to the rest."""
    settings = variants.settings
    vectors: dict[tuple[str, int], Tensor] = {}
    for later, earlier in variants.inputs.pairs:
        extra: dict[str, Any] = {"direction": settings.direction, "stage": side_of((later, earlier))}
        for block in variants.blocks:
            x = {s: pooled.x[s][block + 1] for s in (later, earlier)}
            vector, share = direction_of(x[earlier][:fitted], x[later][:fitted], settings.direction,
                                         centered=settings.centered, seed=settings.seed + block)
            vectors[extra["stage"], block] = vector
            table.add("block", block, "direction_norm", "pair", float(vector.norm()), n=fitted, **extra)
            held_out = x[later][fitted:] - x[earlier][fitted:]
            if float(vector.norm()) > 0 and bool((held_out.norm(dim=1) > 0).all()):
                table.add("block", block, "direction_share", "pair", share, n=fitted, **extra)
                cosines = metrics.cosine_similarity(held_out.double(), vector.double().expand_as(held_out))
                table.add("block", block, "direction_cosine", "pair",
                          stats.mean_interval(cosines.numpy(), settings.confidence), **extra)
            else:
                for metric in ("direction_share", "direction_cosine"):
                    table.add_undefined("block", block, metric, "pair", "the stages do not differ here", **extra)
    return vectors


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
    chosen = SteerSettings.of(settings, {**overrides, "patch": positions})
    inputs = prepare(stages, sft, data=data, settings=chosen, names=names)
    variants = _Variants(inputs, inputs.rows, chosen)
    places = {row.index: row for row in inputs.rows}
    batches = inputs.batches()
    outputs = {b + 1 for b in variants.blocks}
    done = 0
    with torch.inference_mode():
        for batch in batches:
            mask = _position_mask(batch, [places[i] for i in batch.indices], positions)
            for pair in inputs.pairs:
                _, gifts = variants.unchanged(pair, pair[0], batch, outputs)
                here, states = variants.unchanged(pair, pair[1], batch, outputs | set(variants.starts.values()))
                done += 2
                for group in variants.groups:
                    for alpha in variants.strengths:
                        mixed = {b: (mask, torch.lerp(states[b + 1].float(),
                                                      gifts[b + 1].to(here.input_ids.device).float(), alpha))
                                 for b in group}
                        with patched(inputs.stages[pair[1]].anatomy, mixed):
                            variants.changed((pair, group, alpha), here, states)
                        done += 1
                    progress("patch", done, variants.passes(len(batches)), note=f"blocks {format_blocks(group)}")
    return variants.result(Table(), f"patch {positions}", inputs.rows, {})


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
