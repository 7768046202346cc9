"""lm-evaluation-harness on a model in memory and rows at hand: no hub, no files, exact and faster.

`MemoryLM` is lm-eval's own `HFLM` around a loaded model. Two things are done in another way, with
equal results (tests compare them with plain HFLM):

* Likelihood: final norm and head run only on the positions of the continuations, in float32
  softmax, instead of a (batch x length x vocabulary) tensor.
* Generation: a row stops at its own stop string (HFLM waits until every row of the batch has met
  the same one), rows that are done leave the batch, and decoding is greedy whatever the
  checkpoint's generation config asks for (a repetition penalty would change the answers).

`RowsTask` is lm-eval's `ConfigurableTask` whose documents come from memory.
"""

from __future__ import annotations

import contextlib
import copy
import json
import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import postprocess_generated_text
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from midblock import metrics, ranks
from midblock.capture.forward import run_blocks
from midblock.capture.scoring import chunks_of_logits
from midblock.data import Batch, TokenRow, make_batches, pad_token_id
from midblock.errors import SettingsError
from midblock.models.inference import one_product
from midblock.progress import Progress, silent

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

    from midblock.models import LoadedModel

__all__ = ["MemoryLM", "RowsTask", "StopRows", "run_lm_eval"]


# generation shrinks its batch when this share of the rows is done
_SHARE = 0.25


class RowsTask(ConfigurableTask):
    """A task whose documents are given, with the configuration of an lm-eval task file.

    Args:
        config: Fields of lm-eval's ``TaskConfig``; the data set fields are filled in.
        docs: The documents, in order. All must have the same fields.
        shots: Documents that few-shot examples are drawn from.
    """

    def __init__(self, config: Mapping[str, Any], docs: Sequence[dict[str, Any]],
                 shots: Sequence[dict[str, Any]] = ()) -> None:
        self._rows = {"test": list(docs), **({"shots": list(shots)} if shots else {})}
        unwanted = ("dataset_path", "dataset_name", "training_split", "validation_split",
                    "fewshot_split", "tag")
        super().__init__(config={
            **{k: copy.deepcopy(v) for k, v in config.items() if k not in unwanted}, "test_split": "test",
            **({"fewshot_split": "shots"} if shots else {})})

    def download(self, dataset_kwargs: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        """Take the rows as they are; they need no common Arrow schema."""
        self.dataset = {split: _Rows(rows) for split, rows in self._rows.items()}

    def dump_config(self) -> dict[str, Any]:
        """The configuration without functions, whose text would be of no use in a file."""
        config = {k: v for k, v in vars(self.config).items() if v is not None and not callable(v)}
        config.pop("fewshot_config", None)
        return {k: v for k, v in config.items() if not _holds_function(v)}


def _holds_function(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(map(_holds_function, value.values()))
    if isinstance(value, list | tuple):
        return any(map(_holds_function, value))
    return callable(value)


class _Rows(list[dict[str, Any]]):
    """A list with the one attribute of `datasets.Dataset` that lm-eval reads."""

    @property
    def features(self) -> dict[str, None]:
        return dict.fromkeys(self[0]) if self else {}


class StopRows(StoppingCriteria):
    """Each row by itself is done at an end token, or once its new text holds a stop string.

    Args:
        tokenizer: Decodes the new tokens.
        strings: Stop strings.
        ends: Ids of end tokens.
        prompt_width: Width of the padded prompts: what is before does not count.
        rows: Rows in the batch.
        share: End the whole generation when this share of the rows is done, so that the rest can
            go on in a smaller batch; 1 waits for all.

    Attributes:
        done: (rows,) which rows are done.
    """

    def __init__(self, tokenizer: Any, strings: Sequence[str], ends: Collection[int], prompt_width: int,
                 rows: int, share: float = 1.0) -> None:
        self._tokenizer, self._strings, self._ends = tokenizer, [s for s in strings if s], frozenset(ends)
        self._from, self._share = prompt_width, share
        # a token adds at least one byte, so a string ends within as many tokens as it has bytes;
        # one more for a token that begins before the string
        self._window = 1 + max((len(s.encode()) for s in self._strings), default=0)
        self.done = torch.zeros(rows, dtype=torch.bool)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        last = input_ids[:, -1].tolist()
        open_rows = (~self.done).nonzero()[:, 0].tolist()
        for row in open_rows:
            self.done[row] = last[row] in self._ends
        if self._strings and open_rows:
            start = max(self._from, input_ids.shape[1] - self._window)
            texts = self._tokenizer.batch_decode(input_ids[open_rows, start:].tolist())
            for row, text in zip(open_rows, texts, strict=True):
                self.done[row] |= any(s in text for s in self._strings)
        enough = self.done.float().mean() >= self._share
        return torch.full_like(self.done, True) if enough else self.done.to(input_ids.device)


class MemoryLM(HFLM):
    """lm-eval's model interface around a `LoadedModel`.

    Args:
        loaded: The model; a PEFT adapter on it stays in force.
        batch_size: Rows in a batch.
        progress: Told how many requests are done.
        what: Name of the work in progress reports.

    Attributes:
        cut_prompts: Prompts that were longer than the model's limit and lost their beginning.
        unfinished: Answers that reached the longest allowed length without stopping.
        generated_tokens: New tokens of all answers, stop tokens included.
    """

    def __init__(self, loaded: LoadedModel, *, batch_size: int, progress: Progress = silent,
                 what: str = "evaluate") -> None:
        tokenizer: Any = loaded.tokenizer
        if tokenizer.pad_token_id is None:
            tokenizer = copy.deepcopy(tokenizer)  # HFLM gives it a pad token
        self._causal: PreTrainedModel = next(
            m for m in loaded.model.modules() if isinstance(m, PreTrainedModel))
        encoder_decoder = bool(getattr(self._causal.config, "is_encoder_decoder", False))
        training = loaded.model.training
        with _quiet_lm_eval():
            super().__init__(pretrained=loaded.model, tokenizer=tokenizer, batch_size=batch_size,
                             backend="seq2seq" if encoder_decoder else "causal", softmax_dtype="float32")
        self._was_training = training
        self._loaded, self._progress, self._what = loaded, progress, what
        self.cut_prompts = self.unfinished = self.generated_tokens = 0

    # ------------------------------------------------------------ likelihood

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """lm-eval's, without a progress bar of its own."""
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return found

    def _loglikelihood_tokens(self, requests: list[tuple[Any, list[int], list[int]]],
                              disable_tqdm: bool = False, override_bs: int | None = None
                              ) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation, and whether greedy decoding would write it.

        Requests with the same tokens up to the last one (choices of one token) share a forward.
        """
        if self.backend == "seq2seq":
            found: list[tuple[float, bool]] = super()._loglikelihood_tokens(requests, disable_tqdm,
                                                                            override_bs)
            return found
        shared: dict[tuple[int, ...], list[int]] = {}
        for number, (_, context, continuation) in enumerate(requests):
            if len(continuation) > self.max_length:
                raise SettingsError(f"{self._what}: a choice has {len(continuation)} tokens, more than the "
                                    f"{self.max_length} that the model takes.")
            ids = context + continuation
            key = tuple(ids[-(self.max_length + 1):][:-1])
            self.cut_prompts += key not in shared and len(ids) > self.max_length + 1
            shared.setdefault(key, []).append(number)
        rows = [TokenRow(index, ids) for index, ids in enumerate(shared)]
        members = list(shared.values())
        answers: list[tuple[float, bool] | None] = [None] * len(requests)
        done = 0
        for batch in ranks.share(make_batches(rows, batch_size=override_bs or self.batch_size,
                                              pad_id=pad_token_id(self.tokenizer))):
            asked = [(r, n) for r, index in enumerate(batch.indices) for n in members[index]]
            scored = self._score(batch, [(r, requests[n][2]) for r, n in asked])
            for (_, n), answer in zip(asked, scored, strict=True):
                answers[n] = answer
            done += len(asked)
            self._progress(self._what, done, len(requests))
        return [next(a for a in of_all if a is not None)
                for of_all in zip(*ranks.everybody(answers), strict=True)]

    def _score(self, batch: Batch, wanted: Sequence[tuple[int, list[int]]]) -> list[tuple[float, bool]]:
        """Scores of (row, continuation) pairs: each continuation ends right after its row."""
        batch = batch.to(self.device)
        anatomy = self._loaded.anatomy
        rows: list[int] = []
        positions: list[int] = []
        targets: list[int] = []
        owner: list[int] = []
        lengths = batch.lengths.tolist()
        for number, (row, continuation) in enumerate(wanted):
            last = lengths[row]
            rows += [row] * len(continuation)
            positions += range(last - len(continuation), last)
            targets += continuation
            owner += [number] * len(continuation)
        with torch.inference_mode():
            hidden = run_blocks(self._loaded.model, anatomy, batch)
            # choices of one token look at the same position: read it out once
            places = torch.tensor([rows, positions], device=self.device)
            unique, of = places.unique(dim=1, return_inverse=True)
            target = torch.tensor(targets, device=self.device)
            score = torch.empty(len(targets), dtype=torch.float32, device=self.device)
            greedy = torch.empty(len(targets), dtype=torch.bool, device=self.device)
            for part, logits in chunks_of_logits(anatomy.unembed, hidden[unique[0], unique[1]],
                                                 anatomy.vocab_size):
                here = ((of >= part.start) & (of < part.stop)).nonzero()[:, 0]
                lines = of[here] - part.start
                found = metrics.row_sums(logits, torch.zeros_like(logits[:, 0], dtype=torch.int64))
                score[here] = logits[lines, target[here]].float() - found.log_norm[lines]
                greedy[here] = metrics.top_k(logits, found.maxima, 1)[lines, 0] == target[here]
        total = torch.zeros(len(wanted), dtype=torch.float64)
        total.index_add_(0, torch.tensor(owner), score.double().cpu())
        wrong = torch.zeros(len(wanted), dtype=torch.int64)
        wrong.index_add_(0, torch.tensor(owner), (~greedy).long().cpu())
        return [(float(s), w == 0) for s, w in zip(total.tolist(), wrong.tolist(), strict=True)]

    # ------------------------------------------------------------ generation

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Greedy continuations, each cut at its first stop string."""
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True, default=str), []).append(number)
        answers: list[str | None] = [None] * len(requests)
        before = self.generated_tokens, self.unfinished
        done = 0
        for numbers in groups.values():
            options = dict(requests[numbers[0]].args[1])
            stops = options.get("until") or []
            stops = [stops] if isinstance(stops, str) else list(stops)
            longest = int(options.get("max_gen_toks") or self.max_gen_toks or 0)
            room = self.max_length - longest if self.backend == "causal" else self.max_length
            if room < 1:
                raise SettingsError(f"{self._what}: {longest} new tokens were asked for, but the model takes "
                                    f"{self.max_length} in all, prompt included; ask for fewer with "
                                    "--max-new-tokens.")
            rows = self._prompt_rows([str(requests[n].args[0]) for n in numbers], room)
            for batch in ranks.share(make_batches(
                    rows, batch_size=self.batch_size, pad_id=pad_token_id(self.tokenizer),
                    padding_side="left" if self.backend == "causal" else "right")):
                for index, text in zip(batch.indices, self._continue(batch, stops, longest), strict=True):
                    answers[numbers[index]] = text
                done += len(batch)
                self._progress(self._what, done, len(requests))
        found = ranks.everybody((answers, self.generated_tokens - before[0], self.unfinished - before[1]))
        self.generated_tokens = before[0] + sum(generated for _, generated, _ in found)
        self.unfinished = before[1] + sum(unfinished for _, _, unfinished in found)
        return [next(a for a in of_all if a is not None) for of_all in zip(*(own for own, _, _ in found), strict=True)]

    def _prompt_rows(self, prompts: Sequence[str], room: int) -> list[TokenRow]:
        rows = []
        for index, prompt in enumerate(prompts):
            ids = list(self.tok_encode(prompt))
            # some tokenizers end every text with EOS: nothing would follow it
            if self.backend == "causal" and len(ids) > 1 and ids[-1] == self.tokenizer.eos_token_id \
                    and not prompt.endswith(str(self.tokenizer.eos_token)):
                ids.pop()
            if not ids:
                ids = [int(self.prefix_token_id)]
            self.cut_prompts += len(ids) > room
            rows.append(TokenRow(index, tuple(ids[-room:])))
        return rows

    def _continue(self, batch: Batch, stops: Sequence[str], longest: int) -> list[str]:
        batch = batch.to(self.device)
        ends = self._end_ids(stops)
        answers = []
        with torch.inference_mode(), one_product(self._loaded.anatomy.head):
            rows = self._new_tokens(batch, stops, ends, longest)
        for row in rows:
            stop = next((i for i, token in enumerate(row) if token in ends), len(row))
            text = self.tok_decode(row[:stop])
            cut = postprocess_generated_text(text, list(stops), None)
            self.generated_tokens += min(stop + 1, len(row))
            self.unfinished += stop == len(row) >= longest and cut == text
            answers.append(cut)
        return answers

    def _new_tokens(self, batch: Batch, stops: Sequence[str], ends: set[int], longest: int) -> list[list[int]]:
        """New tokens of each row, at least up to where it is done.

        Each time a quarter of the rows is done the others go on with their part of the cache, so
        that finished rows cost nothing.
        """
        model: Any = self._causal
        ids, mask = batch.input_ids, batch.attention_mask
        first = ids.shape[1] if self.backend == "causal" else 1
        cache: Any = DynamicCache(config=model.config.get_text_config(decoder=True)) \
            if self.backend == "causal" and _plain_cache(model) else None
        found: list[list[int]] = [[] for _ in range(len(batch))]
        where = list(range(len(batch)))
        made = 0
        while where and made < longest:
            criterion = StopRows(self.tokenizer, stops, ends, first, len(where), 1.0 if cache is None else _SHARE)
            with self._greedy(longest - made, ends):
                output = model.generate(
                    input_ids=ids, attention_mask=mask, stopping_criteria=StoppingCriteriaList([criterion]),
                    **({} if cache is None else {"past_key_values": cache}))
            made = output.shape[1] - first
            for row, place in enumerate(where):
                found[place] = output[row, first:].tolist()
            still = (~criterion.done).nonzero()[:, 0].to(ids.device)
            if cache is None or not len(still):
                break
            where = [where[row] for row in still.tolist()]
            ids = output[still]
            mask = torch.cat([mask, mask.new_ones(mask.shape[0], ids.shape[1] - mask.shape[1])], dim=1)[still]
            cache.batch_select_indices(still)
        return found

    def _end_ids(self, stops: Sequence[str]) -> set[int]:
        """Ids that end an answer: EOS of tokenizer and checkpoint, stop strings that are special tokens."""
        ids = {self.tokenizer.eos_token_id}
        configured = getattr(self._causal.generation_config, "eos_token_id", None)
        ids |= set(configured) if isinstance(configured, list | tuple) else {configured}
        special = dict(zip(self.tokenizer.all_special_tokens, self.tokenizer.all_special_ids, strict=True))
        ids |= {special[s] for s in stops if s in special}
        return {int(i) for i in ids if i is not None}

    @contextlib.contextmanager
    def _greedy(self, longest: int, ends: set[int]) -> Iterator[None]:
        """Within the context the model decodes greedily; its own generation config comes back after."""
        own = self._causal.generation_config
        self._causal.generation_config = GenerationConfig(
            do_sample=False, num_beams=1, max_new_tokens=longest, use_cache=True,
            pad_token_id=pad_token_id(self.tokenizer), eos_token_id=sorted(ends) or None,
            bos_token_id=own.bos_token_id, decoder_start_token_id=own.decoder_start_token_id)
        try:
            yield
        finally:
            self._causal.generation_config = own

    def close(self) -> None:
        """Put the model back into the mode that it had."""
        self._loaded.model.train(self._was_training)


@contextlib.contextmanager
def _quiet_lm_eval() -> Iterator[None]:
    """Keep lm-eval's notes about in-memory models and its progress bars off the screen."""
    from lm_eval.api import task as tasks

    logger = logging.getLogger("lm_eval")
    before, bar = logger.level, tasks.tqdm
    logger.setLevel(logging.ERROR)
    tasks.tqdm = lambda iterable, **options: iterable  # its bar cannot be turned off
    try:
        yield
    finally:
        logger.setLevel(before)
        tasks.tqdm = bar


def _plain_cache(model: PreTrainedModel) -> bool:
    """Whether the model keeps keys and values only, which a `DynamicCache` can give rows away from."""
    stateful = bool(getattr(model, "_is_stateful", False))
    return not stateful and bool(getattr(model, "_supports_default_dynamic_cache", lambda: True)())


def run_lm_eval(lm: MemoryLM, name: str, build: Callable[[], RowsTask], *, chat: bool = False,
                shots: int = 0, seed: int = 0, allow_code: bool = False) -> dict[str, Any]:
    """lm-eval's `evaluate` on one task; its results dictionary, samples included.

    Args:
        lm: The model.
        name: Name of the task in the results.
        build: Makes the task.
        chat: Apply the tokenizer's chat template.
        shots: Number of few-shot examples.
        seed: Of their choice.
        allow_code: Tasks that run code may do so.
    """
    from lm_eval.evaluator import evaluate

    with _quiet_lm_eval():
        task = build()
        task.set_config(key="num_fewshot", value=shots)
        task.set_fewshot_seed(seed=seed)
        found = evaluate(lm=lm, task_dict={"tasks": {name: task}, "groups": {}, "group_map": {}},
                         log_samples=True, apply_chat_template=chat, fewshot_as_multiturn=chat,
                         confirm_run_unsafe_code=allow_code)
    assert found is not None
    return dict(found)
