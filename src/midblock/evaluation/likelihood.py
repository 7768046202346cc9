"""Loss of every token: perplexity of texts, and the mean loss of reference answers.

lm-evaluation-harness scores one document at a time and reports per word or byte. Here texts of
like length share a batch, padding never counts, every token weighs the same, and the head runs
only on positions that count; the results come in lm-eval's shapes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from midblock import ranks
from midblock.capture import score_batches, score_hidden
from midblock.data import Batch, Dataset, make_batches, pad_token_id, tokenize
from midblock.evaluation.outcome import EvalResult, estimate_of
from midblock.evaluation.tasks import find_task, item_ids
from midblock.progress import Progress, silent
from midblock.results import json_ready
from midblock.writing import sha256_of

if TYPE_CHECKING:
    from midblock.models import LoadedModel

__all__ = ["score_tokens"]


def score_tokens(loaded: LoadedModel, task: str, dataset: Dataset, *, batch_size: int, max_length: int,
                 chat: bool = False, progress: Progress = silent,
                 hidden_of: Callable[[Batch], Tensor] | None = None) -> EvalResult:
    """Mean loss per item and in all.

    Args:
        loaded: The model.
        task: A perplexity task (all tokens count but the first, which has nothing before it) or
            ``answer_loss`` (the tokens of the completion and EOS count).
        dataset: The rows.
        batch_size: Rows in a batch.
        max_length: Rows are cut to this many tokens.
        chat: Put prompt and completion into the tokenizer's chat template.
        progress: Told how many rows are done.
        hidden_of: Gives hidden L (B, T, d) of a batch in place of a forward of all blocks, such as
            one resumed behind blocks that several models share.

    Raises:
        DataError: no row is left, or ``answer_loss`` on rows without completion.
    """
    started = time.perf_counter()
    spec = find_task(task)
    answers = spec.kind == "answer_loss"
    tokenized = tokenize(dataset, loaded.tokenizer, max_length=max_length, supervised=answers, chat=chat)
    size = len(dataset.examples)
    loss, count = np.full(size, np.nan), np.zeros(size)
    batches = ranks.share(make_batches(tokenized, batch_size=batch_size, pad_id=pad_token_id(loaded.tokenizer)))
    training = loaded.model.training
    loaded.model.eval()
    try:
        with torch.inference_mode():
            done = 0
            for batch, scores in score_batches(loaded, batches) if hidden_of is None else (
                    (here, score_hidden(loaded.anatomy, hidden_of(here), here))
                    for here in (b.to(loaded.device) for b in batches)):
                places = list(batch.indices)
                loss[places] = (scores.loss.cpu() / scores.tokens).numpy()
                count[places] = scores.tokens.numpy()
                done += len(batch)
                progress(task, done, sum(map(len, batches)))
    finally:
        loaded.model.train(training)
    for theirs, counted in ranks.everybody((loss, count)):  # each sample is some process's
        there = counted > 0
        loss[there], count[there] = theirs[there], counted[there]

    kept = [row.index for row in tokenized.rows if count[row.index] > 0]
    names = item_ids(dataset.examples)
    items = tuple(names[i] for i in kept)
    scores_of, tokens = loss[kept], count[kept]
    estimate = estimate_of(spec.metric, scores_of, tokens)
    notes = [dataset.note] if dataset.note else []
    if tokenized.truncated:
        notes.append(f"{tokenized.truncated} of {len(tokenized)} rows were cut to {max_length} tokens")
    left_out = len(tokenized.too_short) + len(tokenized.skipped)
    if left_out:
        notes.append(f"{left_out} rows were left out (too short, or no token to count)")
    samples = [_sample(dataset, i, names[i], answers, float(loss[i]), int(count[i])) for i in kept]
    spread = float(scores_of.std(ddof=1) / np.sqrt(scores_of.size)) if scores_of.size > 1 else "N/A"
    figures: dict[str, Any] = {"alias": task, "sample_len": len(items)}
    if answers:
        figures |= {"loss,none": estimate.value, "loss_stderr,none": spread}
    else:
        half = (estimate.high - estimate.low) / (2 * 1.96)
        figures |= {"perplexity,none": estimate.value,
                    "perplexity_stderr,none": half if np.isfinite(half) else "N/A",
                    "loss,none": float((scores_of * tokens).sum() / tokens.sum())}
    kind = "loglikelihood" if answers else "loglikelihood_rolling"
    return EvalResult(
        task=task, metric=spec.metric, higher_is_better=False, items=items, scores=scores_of, tokens=tokens,
        estimate=estimate, samples=samples, results={
            "results": {task: figures}, "group_subtasks": {},
            "configs": {task: {"task": task, "output_type": kind, "test_split": dataset.split,
                               "dataset_path": dataset.name, "num_fewshot": 0,
                               "metadata": {"version": 1.0, "max_length": max_length}}},
            "versions": {task: 1.0}, "n-shot": {task: 0},
            "higher_is_better": {task: {spec.metric: False}},
            "n-samples": {task: {"original": dataset.available, "effective": len(items)}}},
        data=dataset.describe(),
        settings={"batch_size": batch_size, "max_length": max_length, "chat": chat},
        notes=tuple(notes), seconds=time.perf_counter() - started)


def _sample(dataset: Dataset, place: int, item: str, answers: bool, loss: float,
            tokens: int) -> dict[str, Any]:
    example = dataset.examples[place]
    target = str(example.completion) if answers and example.completion is not None else example.text
    prompt = str(example.prompt) if answers and example.prompt is not None else ""
    total = -loss * tokens
    return {"doc_id": place, "item": item, "doc": json_ready(dict(example.row)), "target": target,
            "arguments": [(prompt, target)] if answers else [(target,)], "resps": [[total]],
            "filtered_resps": [total], "filter": "none", "metrics": ["loss"],
            "doc_hash": sha256_of(item), "prompt_hash": sha256_of(prompt),
            "target_hash": sha256_of(target), "loss": loss, "tokens": tokens}
