"""The frozen prefix: no gradient, no stored activation and, with a cache, no compute before the first
trainable block, under any trainer.

Nothing before the first trainable block needs a gradient. `FrozenPrefix` looks for that block at
every forward, runs the blocks before it without grad and cuts the graph there: also where a trainer
has called ``enable_input_require_grads`` (TRL does, with PEFT and gradient checkpointing), which
otherwise sends the backward pass through every frozen block. With a cache the output of the prefix is
computed once per sample and read in every later epoch, seed and arm with the same first block; an arm
that begins later goes on from there.

The blocks of the prefix are replaced on the instance (`midblock.models.forwards`)
while the model's own forward runs, which computes its masks and position embeddings as ever.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
import transformers
from torch import Tensor, nn

from midblock.capture import verify_resume, why_not_resume
from midblock.capture.interventions import hidden_of_output, passing_over, with_hidden
from midblock.errors import ArchitectureError, CacheRefusedError, SettingsError
from midblock.models import Anatomy, LoadedModel, find_anatomy
from midblock.models.attention import attends_by_row
from midblock.models.forwards import forwards_replaced, replace_forward
from midblock.provenance import sha256_of
from midblock.tuning.cache import PrefixCache
from midblock.tuning.cache_folder import row_bytes

__all__ = ["FrozenPrefix", "first_trainable_block", "prefix_identity"]

# inputs of a body that have one row per sample
_PER_ROW = ("input_ids", "inputs_embeds", "attention_mask", "position_ids")
# inputs that change no hidden state of a forward without a key-value cache
_HARMLESS = ("labels", "num_items_in_batch", "return_dict", "use_cache", "cache_position", "logits_to_keep",
             "output_attentions", "output_hidden_states", "output_router_logits", "past_key_values")
_PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
# entries of a config that no hidden state depends on
_NOT_IDENTITY = ("use_cache", "pad_token_id", "eos_token_id", "bos_token_id", "output_router_logits",
                 "router_aux_loss_coef", "_name_or_path", "transformers_version", "architectures",
                 "quantization_config")

_installed: WeakKeyDictionary[nn.Module, FrozenPrefix] = WeakKeyDictionary()
_digests: WeakKeyDictionary[nn.Module, dict[str, tuple[int, int, str]]] = WeakKeyDictionary()


class _PrefixDone(Exception):
    """Ends a forward after the prefix: nothing behind it is needed."""


def first_trainable_block(anatomy: Anatomy) -> int | None:
    """The first block with a parameter that requires a gradient.

    Returns:
        0..L-1; L if only final norm or head are trained; None if nothing is.

    Raises:
        CacheRefusedError: something before the blocks is trained (embeddings, an encoder), or a
            head that shares its weight with the embeddings: then nothing is a frozen prefix.
    """
    first: int | None = None
    inside = set()
    for index, block in enumerate(anatomy.blocks):
        for parameter in block.parameters():
            inside.add(id(parameter))
            if first is None and parameter.requires_grad:
                first = index
    behind = {id(p) for m in (anatomy.final_norm, anatomy.head) if m is not None for p in m.parameters()}
    before = {id(p) for p in anatomy.embeddings.parameters()}
    trained_behind = False
    for name, parameter in anatomy.causal_lm.named_parameters():
        if not parameter.requires_grad or id(parameter) in inside:
            continue
        if id(parameter) in behind and id(parameter) not in before:
            trained_behind = True
            continue
        raise CacheRefusedError(
            f"there is no frozen prefix: {name} is trained and acts before block 0"
            + (" (the head shares its weight with the embeddings)" if anatomy.tied and id(parameter) in before
               else "") + ". Freeze it, or train without FrozenPrefix.")
    if first is None and trained_behind:
        return anatomy.num_blocks
    return first


# ---------------------------------------------------------------------------------------------
# what a prefix is


def prefix_identity(anatomy: Anatomy, start: int) -> str:
    """Digest of everything but the tokens that hidden ``start`` depends on.

    Weights and buffers of embeddings and blocks before ``start``, config, state of adapters there,
    dtype, device type, autocast and library versions. Digests of tensors are remembered until they
    change.
    """
    behind = {id(t) for m in (*anatomy.blocks[start:], anatomy.final_norm) if m is not None
              for t in (*m.parameters(), *m.buffers())}
    known = _digests.setdefault(anatomy.body, {})
    parts: list[str] = []
    for name, tensor in (*anatomy.body.named_parameters(), *anatomy.body.named_buffers()):
        if id(tensor) in behind:
            continue
        stamp = (tensor._version, tensor.data_ptr())
        if name not in known or known[name][:2] != stamp:
            known[name] = (*stamp, sha256_of(str(tensor.dtype), str(tuple(tensor.shape)), row_bytes(tensor)))
        parts += [name, known[name][2]]
    for name, module in anatomy.body.named_modules():
        if hasattr(module, "merged_adapters") and _before(anatomy, name, start):
            parts += [name, str(module.active_adapters), str(module.merged_adapters),
                      str(getattr(module, "disable_adapters", "")), str(getattr(module, "scaling", ""))]
    config = anatomy.causal_lm.config.get_text_config(decoder=True)
    entries = {k: v for k, v in config.to_dict().items() if k not in _NOT_IDENTITY}
    device = next(anatomy.embeddings.parameters()).device.type
    autocast = str(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else "none"
    return sha256_of(*parts, json.dumps(entries, sort_keys=True, default=str), type(anatomy.body).__name__,
                     _attention_name(config), str(start), device, autocast,
                     torch.__version__, transformers.__version__)


def _attention_name(config: Any) -> str:
    return str(getattr(config, "_attn_implementation", ""))


def _before(anatomy: Anatomy, name: str, start: int) -> bool:
    block = anatomy.block_of(f"{anatomy.body_path}.{name}" if anatomy.body_path else name)
    return block is None or block < start


def _stamp(anatomy: Anatomy, start: int) -> tuple[Any, ...]:
    """Changes whenever the prefix's weights may have changed; cheap enough for every forward."""
    parts: list[Any] = []
    for module in (anatomy.embeddings, *anatomy.blocks[:start]):
        for tensor in (*module.parameters(), *module.buffers()):
            parts += (tensor._version, tensor.data_ptr())
        for inner in module.modules():
            if hasattr(inner, "merged_adapters"):
                parts += (str(inner.active_adapters), str(inner.merged_adapters),
                          getattr(inner, "disable_adapters", None))
    device = next(anatomy.embeddings.parameters()).device.type
    parts.append(torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None)
    parts.append(_attention_name(anatomy.causal_lm.config))
    return tuple(parts)


def _noise(anatomy: Anatomy, start: int) -> list[str]:
    """Sources of randomness in the prefix that are on in training mode."""
    found = []
    for name, module in anatomy.body.named_modules():
        if not _before(anatomy, name, start) or not module.training:
            continue
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            found.append(f"{name} (p={module.p:g})")
            continue
        for key, value in vars(module).items():
            if ("drop" in key or "jitter" in key) and isinstance(value, float) and value > 0:
                found.append(f"{name or type(module).__name__}.{key}={value:g}")
    return found


# ---------------------------------------------------------------------------------------------
# the context manager


@dataclass
class _Inputs:
    """What a forward was called with, as the cache sees it."""

    rows: list[str]
    """Key of each row."""
    spans: list[tuple[int, int]]
    """Half-open range of each row up to its last real token; of packed rows, within the one row."""
    length: int
    """Padded length T."""
    packed: bool = False
    """Whether all rows follow each other in one."""

    def shape(self, row: int, width: int) -> tuple[int, int]:
        """Shape (T, d) of the cached state of a row."""
        lo, hi = self.spans[row]
        return hi - lo, width

    def part(self, call: dict[str, Any], rows: list[int]) -> dict[str, Any]:
        """The call with some rows only."""
        if self.packed:
            return _packed_rows_of(call, [self.spans[i] for i in rows])
        return _rows_of(call, rows, len(self.rows))

    def together(self, states: list[Tensor], rows: Sequence[int], device: torch.device) -> Tensor:
        """Cached states of some rows as a batch (B, T, d), zero on padding, or (1, N, d) packed."""
        if self.packed:
            return torch.cat([state.to(device) for state in states])[None]
        hidden = torch.zeros(len(rows), self.length, states[0].shape[-1], dtype=states[0].dtype, device=device)
        for place, (i, state) in enumerate(zip(rows, states, strict=True)):
            lo, hi = self.spans[i]
            hidden[place, lo:hi] = state
        return hidden


class FrozenPrefix:
    """Within the context, training forwards of ``model`` do not differentiate, store or (with a cache)
    compute anything before the first trainable block.

    Works under transformers' Trainer, TRL's SFTTrainer and hand-written loops; forwards without
    grad (evaluation, generation) are left alone. Losses and gradients stay what they are without
    it. Leave gradient checkpointing and the trainer's own options as you like.

    Args:
        model: A transformers causal LM, a PEFT model around one, or a `LoadedModel`, before or after its adapters
            are attached.
        cache: ``"none"`` (or None), ``"memory"``, ``"disk:DIR"``, or a `PrefixCache` to share.
        limit_bytes: Byte limit of a cache made here (a number or ``"4GB"``).
        on_refusal: ``uncached``: where the cache cannot be exact, go on without it and say so in
            ``notes``.

    Raises:
        CacheRefusedError: at the first training forward, where there is no frozen prefix or the
            cache cannot be exact: random layers in the prefix, packed rows or positions that
            restart, router logits asked for, an encoder-decoder, blocks that share more than
            hidden states.
        SettingsError: another `FrozenPrefix` is active on this model.

    Example:
        ``with FrozenPrefix(trainer.model, cache="memory"): trainer.train()``
    """

    def __init__(self, model: nn.Module | LoadedModel, cache: str | PrefixCache | None = "none", *,
                 limit_bytes: int | str | None = None,
                 on_refusal: Literal["raise", "uncached"] = "raise") -> None:
        self.anatomy = model.anatomy if isinstance(model, LoadedModel) else find_anatomy(model)
        self.cache = (cache if isinstance(cache, PrefixCache) or cache is None
                      else PrefixCache.from_spec(cache, limit_bytes=limit_bytes))
        self.start: int | None = None
        """First trainable block of the last training forward."""
        self.rows_cached = self.rows_computed = self.rows_extended = self.rows_bypassed = self.rows_damaged = 0
        self._notes: list[str] = []
        self._give_up = on_refusal == "uncached"
        self._active = False
        self._checked: int | None = None
        self._probed = False
        self._namespace: tuple[tuple[Any, ...], str] | None = None
        self._labels_on_padding = False
        self._outer: dict[str, Tensor] = {}
        self._restore: list[Callable[[], bool]] = []
        self._parameters = _parameter_names(self.anatomy.body)

    def __enter__(self) -> FrozenPrefix:
        if _installed.get(self.anatomy.body) is not None:
            raise SettingsError("another FrozenPrefix is active on this model; leave its context first.")
        _installed[self.anatomy.body] = self
        self._active = True
        self._replace(self.anatomy.body, self._body_forward)
        if self.anatomy.causal_lm is not self.anatomy.body:
            self._replace(self.anatomy.causal_lm, self._lm_forward)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self._active = False
        _installed.pop(self.anatomy.body, None)
        for restore in reversed(self._restore):
            restore()  # where somebody wrapped ours, it stays below theirs and hands everything on
        self._restore.clear()

    def _replace(self, module: nn.Module, handler: Callable[..., Any]) -> None:
        original = module.forward

        @functools.wraps(original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            if not self._active or not torch.is_grad_enabled():
                return original(*args, **kwargs)
            return handler(original, args, kwargs)

        self._restore.append(replace_forward(module, forward))

    def describe(self) -> dict[str, Any]:
        """What ``run.json`` stores: first trainable block, rows read and computed, the cache."""
        return {"start": self.start, "rows_from_cache": self.rows_cached, "rows_computed": self.rows_computed,
                "rows_extended": self.rows_extended,
                "rows_bypassed": self.rows_bypassed, "rows_damaged": self.rows_damaged,
                "cache": None if self.cache is None else self.cache.describe()}

    @property
    def notes(self) -> list[str]:
        """What a user should know: why the cache is off, how many of its rows were damaged."""
        if not self.rows_damaged:
            return self._notes
        where = "" if self.cache is None or self.cache.folder is None else f" of {self.cache.folder}"
        return [*self._notes, f"{self.rows_damaged} rows of the prefix cache{where} were damaged and computed anew"]

    def prepare(self) -> int | None:
        """Run now the checks that the first training forward would run.

        Returns:
            The first trainable block (None: nothing is trainable).

        Raises:
            CacheRefusedError: as for the class, as far as it shows without a batch.
        """
        start = first_trainable_block(self.anatomy)
        if start and self.cache is not None and self._checked != start:
            try:
                self._check_cacheable(start)
            except CacheRefusedError as error:
                self._refused(error)
            self._checked = start
        return start

    def _refused(self, error: CacheRefusedError) -> None:
        if not self._give_up:
            raise error
        self.cache = None
        self._notes.append(f"prefix cache off: {error}")

    # ------------------------------------------------------------------ the two forwards

    def _lm_forward(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        labels, mask = kwargs.get("labels"), kwargs.get("attention_mask")
        # a loss on padding would read hidden states that the cache does not keep
        self._labels_on_padding = (
            isinstance(labels, Tensor) and isinstance(mask, Tensor) and labels.shape == mask.shape
            and bool(((labels != -100) & (mask == 0)).any()))
        # A model with other modalities builds masks and embeddings before its text body is called
        self._outer = {k: v for k, v in kwargs.items() if isinstance(v, Tensor) and k != "labels"}
        try:
            return original(*args, **kwargs)
        finally:
            self._labels_on_padding = False
            self._outer = {}

    def _body_forward(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        start = self.start = self.prepare()
        if not start:
            return original(*args, **kwargs)
        call = {**dict(zip(self._parameters, args, strict=False)), **kwargs}
        if call.get("past_key_values") is not None:
            return original(*args, **kwargs)  # generation with grad: the key-value cache needs every block
        config = self.anatomy.causal_lm.config.get_text_config(decoder=True)
        if call.get("use_cache", getattr(config, "use_cache", False)):
            call["use_cache"] = False  # nothing reads keys and values of a training forward
        watched = any(call.get(key, getattr(config, key, False)) for key in
                      ("output_hidden_states", "output_attentions"))
        if self.cache is None or self._labels_on_padding or watched:
            self.rows_bypassed += 0 if self.cache is None else _batch_size(call)
            with self._without_grad(start):
                return original(**call)
        try:
            hidden = self._prefix_of(original, call, start, config)
        except CacheRefusedError as error:
            self._refused(error)
            with self._without_grad(start):
                return original(**call)
        with forwards_replaced(self.anatomy.blocks[:start], self._passing_over(start, hidden)):
            return original(**call)

    # ------------------------------------------------------------------ without a cache

    def _without_grad(self, start: int) -> Any:
        """The prefix's blocks run without grad; the last one hands on a leaf."""
        blocks = self.anatomy.blocks[:start]

        def frozen(block: nn.Module, forward: Callable[..., Any], last: bool) -> Callable[..., Any]:
            def run(*args: Any, **kwargs: Any) -> Any:
                checkpointing = getattr(block, "gradient_checkpointing", False)
                if checkpointing:
                    block.gradient_checkpointing = False  # type: ignore[assignment]
                try:
                    with torch.no_grad():
                        output = forward(*args, **kwargs)
                finally:
                    if checkpointing:
                        block.gradient_checkpointing = checkpointing  # type: ignore[assignment]
                return self._with_leaf(output, start) if last else output
            return run

        return forwards_replaced(blocks, [frozen(b, b.forward, i == start - 1) for i, b in enumerate(blocks)])

    def _with_leaf(self, output: Any, start: int) -> Any:
        if not self._needs_leaf(start):
            return output
        return with_hidden(output, hidden_of_output(output).detach().requires_grad_(True))

    def _needs_leaf(self, start: int) -> bool:
        """Reentrant checkpointing only differentiates blocks whose input requires a gradient."""
        if start >= self.anatomy.num_blocks:
            return False
        block = self.anatomy.blocks[start]
        if not (getattr(block, "gradient_checkpointing", False) and block.training):
            return bool(getattr(self.anatomy.body, "gradient_checkpointing", False)) and block.training
        function = getattr(block, "_gradient_checkpointing_func", None)
        return bool(getattr(function, "keywords", {}).get("use_reentrant", True))

    # ------------------------------------------------------------------ with a cache

    def _passing_over(self, start: int, hidden: Tensor) -> list[Callable[..., Any]]:
        return passing_over(self.anatomy, start, hidden.requires_grad_(True) if self._needs_leaf(start) else hidden)

    def _check_cacheable(self, start: int) -> None:
        lm = self.anatomy.causal_lm
        if lm.config.is_encoder_decoder:
            raise CacheRefusedError(
                f"the prefix of {type(lm).__name__} cannot be cached: its decoder blocks also read an encoder's "
                "output. Use cache='none' (still no gradient before the first trainable block).")
        if noise := _noise(self.anatomy, start):
            raise CacheRefusedError(
                f"the prefix is random in training mode, so its output cannot be cached: {', '.join(noise[:3])}"
                f"{f' and {len(noise) - 3} more' if len(noise) > 3 else ''}. Set these to 0 before loading, or use "
                "cache='none'.")
        rope = str(getattr(lm.config.get_text_config(decoder=True), "rope_parameters", None) or {})
        if "'dynamic'" in rope:
            raise CacheRefusedError("the prefix cannot be cached: dynamic rotary embeddings depend on the longest "
                                    "sequence seen so far. Use cache='none'.")
        try:
            verify_resume(lm, self.anatomy, [start])
        except ArchitectureError as error:
            raise CacheRefusedError(f"the prefix cannot be cached: {error} Use cache='none'.") from error

    def _current_namespace(self, start: int) -> str:
        stamp = (start, *_stamp(self.anatomy, start))
        if self._namespace is None or self._namespace[0] != stamp:
            self._namespace = (stamp, prefix_identity(self.anatomy, start))
            if self.cache is not None:
                self.cache.starts.add(start)
        return self._namespace[1]

    def _prefix_of(self, original: Callable[..., Any], call: dict[str, Any], start: int, config: Any) -> Tensor:
        """Hidden ``start`` of a batch (B, T, d), zero on padding."""
        assert self.cache is not None
        inputs = self._keys(call, config)
        namespace = self._current_namespace(start)
        damaged = self.cache.damaged
        width = self.anatomy.hidden_size
        states = [self.cache.get(namespace, key, inputs.shape(i, width)) for i, key in enumerate(inputs.rows)]
        missing = [i for i, state in enumerate(states) if state is None]
        self.rows_cached += len(states) - len(missing)
        self.rows_computed += len(missing)
        if missing:
            if not self._probed:
                self._probe(original, inputs.part(call, missing[:1]), start)
            part = call if len(missing) == len(states) else inputs.part(call, missing)
            origin, before = self._nearest(inputs, missing, start)
            computed = self._compute(original, part, start, origin, before)
            self.rows_extended += len(missing) if origin else 0
            self.rows_damaged += self.cache.damaged - damaged
            begin = 0
            for place, i in enumerate(missing):
                lo, hi = inputs.spans[i]
                states[i] = computed[0, begin:begin + hi - lo] if inputs.packed else computed[place, lo:hi]
                self.cache.put(namespace, inputs.rows[i], states[i])  # type: ignore[arg-type]
                begin += hi - lo
        first = states[0]
        assert first is not None
        device = next(self.anatomy.blocks[min(start, self.anatomy.num_blocks - 1)].parameters()).device
        return inputs.together([s for s in states if s is not None], range(len(states)), device)

    def _probe(self, original: Callable[..., Any], call: dict[str, Any], start: int) -> None:
        """What no attribute tells (noise in a forward) shows when the same row runs twice."""
        if self.anatomy.body.training and not torch.equal(
                *(self._compute(original, call, start) for _ in range(2))):
            raise CacheRefusedError(
                f"the prefix of {type(self.anatomy.causal_lm).__name__} is not deterministic: two "
                "forwards of one row differ in training mode. Use cache='none'.")
        self._probed = True

    def _nearest(self, inputs: _Inputs, rows: list[int], start: int) -> tuple[int, Tensor | None]:
        """The deepest hidden state before ``start`` that the cache has of all these rows; 0 if none."""
        assert self.cache is not None
        for origin in sorted(self.cache.starts, reverse=True):
            if not 0 < origin < start or (namespace := prefix_identity(self.anatomy, origin)) not in self.cache:
                continue
            if why_not_resume(self.anatomy.causal_lm, self.anatomy, [origin])[origin] is not None:
                continue
            width = self.anatomy.hidden_size
            states = [self.cache.peek(namespace, inputs.rows[i], inputs.shape(i, width)) for i in rows]
            if all(state is not None for state in states):
                device = next(self.anatomy.blocks[origin].parameters()).device
                return origin, inputs.together([s for s in states if s is not None], rows, device)
        return 0, None

    def _compute(self, original: Callable[..., Any], call: dict[str, Any], start: int, origin: int = 0,
                 before: Tensor | None = None) -> Tensor:
        """Hidden ``start``, from the tokens or from hidden ``origin``."""
        reached: list[Tensor] = []
        blocks = self.anatomy.blocks[:start]
        last = blocks[-1].forward

        def stop(*args: Any, **kwargs: Any) -> Any:
            reached.append(hidden_of_output(last(*args, **kwargs)))
            raise _PrefixDone

        switched = [b for b in blocks if getattr(b, "gradient_checkpointing", False)]
        try:
            for block in switched:
                block.gradient_checkpointing = False  # type: ignore[assignment]
            passed = [] if before is None else self._passing_over(origin, before)
            with torch.no_grad(), forwards_replaced([*blocks[:origin], blocks[-1]], [*passed, stop]):
                original(**call)
        except _PrefixDone:
            pass
        finally:
            for block in switched:
                block.gradient_checkpointing = True  # type: ignore[assignment]
        if not reached:
            raise ArchitectureError(f"{type(self.anatomy.body).__name__} did not run its block {start - 1}.")
        return reached[0]

    def _keys(self, call: dict[str, Any], config: Any) -> _Inputs:
        bounds = self._bounds(call)
        for name, value in call.items():
            if value is None or value is False or name in _PER_ROW or (
                    name in _HARMLESS and name != "output_router_logits"):
                continue
            if bounds is not None and name in _PACKED and name != "seq_idx":
                continue
            if name in _PACKED:
                raise CacheRefusedError(f"packed rows ({name} was given) cannot be cached by sample; set "
                                        "packing=False (and padding_free=False), or use cache='none'.")
            if name == "output_router_logits":
                raise CacheRefusedError("router logits of all blocks were asked for (output_router_logits), but a "
                                        "cached prefix computes none; set router_aux_loss_coef=0.0, or use "
                                        "cache='none'.")
            if isinstance(value, Tensor | dict | list | tuple):
                raise CacheRefusedError(f"the model was called with {name}=..., of which the cache does not know "
                                        "whether the prefix depends on it. Use cache='none'.")
        if getattr(config, "output_router_logits", False) and call.get("output_router_logits") is not False:
            raise CacheRefusedError("the config asks for router logits of all blocks (output_router_logits), but a "
                                    "cached prefix computes none; set router_aux_loss_coef=0.0, or use "
                                    "cache='none'.")
        content = call.get("input_ids")
        if content is None:
            content = call.get("inputs_embeds")
        if not isinstance(content, Tensor):
            raise CacheRefusedError("the model was called without input_ids or inputs_embeds.")
        rows, length = content.shape[:2]
        mask, positions = call.get("attention_mask"), call.get("position_ids")
        if bounds is not None and (mask is not None or rows != 1 or bounds[0] != 0 or bounds[-1] != length):
            raise CacheRefusedError("packed rows came with an attention mask, or with bounds that do not cover them. "
                                    "Use cache='none'.")
        if isinstance(mask, dict):
            mask = self._outer.get("attention_mask", mask)
        # such as token types, from which such a model makes its masks
        beside = [v.detach().cpu() for k, v in sorted(self._outer.items())
                  if k not in _PER_ROW and v.shape == (rows, length)]
        if mask is not None and not (isinstance(mask, Tensor) and mask.shape == (rows, length)):
            raise CacheRefusedError("the attention mask is not one 0/1 value per token, so rows cannot be told "
                                    "apart from their padding. Use cache='none'.")
        if positions is not None and not (isinstance(positions, Tensor) and positions.ndim == 2
                                          and positions.shape[-1] == length):
            raise CacheRefusedError("position_ids have a form that the cache does not know. Use cache='none'.")
        # long rotary embeddings switch with the padded length
        scope = str(length) if "longrope" in str(getattr(config, "rope_parameters", "")) else ""
        ids = content.detach().cpu()
        keys, spans = [], []
        real = None if mask is None else (mask != 0).cpu()
        where = None if positions is None else positions.expand(rows, length).cpu()
        for i in range(rows) if bounds is None else range(len(bounds) - 1):
            if bounds is not None:
                row, begin, lo, hi = 0, bounds[i], bounds[i], bounds[i + 1]
            else:
                row, begin, (lo, hi) = i, 0, (0, length) if real is None else _span(real[i])
            offset = lo - begin
            if where is not None:
                own = where[row, lo:hi]
                offset = int(own[0])
                if not torch.equal(own, torch.arange(offset, offset + hi - lo, dtype=own.dtype)):
                    raise CacheRefusedError("positions restart inside a row (packing); set packing=False, or use "
                                            "cache='none'.")
            # padding on the left is kept too: its last state predicts the row's first token
            digest = hashlib.sha256(row_bytes(ids[row, begin:hi]))
            digest.update(f"{ids.dtype} {lo - begin} {offset} {scope}".encode())
            for tensor in beside:
                digest.update(row_bytes(tensor[row, begin:hi]))
            keys.append(digest.hexdigest())
            spans.append((begin, hi))
        return _Inputs(keys, spans, length, packed=bounds is not None)

    def _bounds(self, call: dict[str, Any]) -> list[int] | None:
        """Where packed rows begin and end, if the model's attention is one that keeps them apart by these."""
        bounds, keys = call.get("cu_seq_lens_q"), call.get("cu_seq_lens_k")
        if not (isinstance(bounds, Tensor) and isinstance(keys, Tensor) and bounds.shape == keys.shape
                and call.get("position_ids") is not None and call.get("seq_idx") is None and len(bounds) > 1
                and bool((bounds == keys).all())
                and attends_by_row(self.anatomy.causal_lm.config)):
            return None
        return [int(x) for x in bounds.tolist()]


def _parameter_names(body: nn.Module) -> list[str]:
    return [n for n in inspect.signature(type(body).forward).parameters if n != "self"]


def _batch_size(call: dict[str, Any]) -> int:
    for name in ("input_ids", "inputs_embeds"):
        if isinstance(value := call.get(name), Tensor):
            return int(value.shape[0])
    return 0


def _span(real: Tensor) -> tuple[int, int]:
    """Half-open range of a row's real tokens; a row of padding only is kept as it is."""
    count = int(real.sum())
    if not count:
        return 0, real.shape[0]
    first = int(real.int().argmax())
    if not bool(real[first:first + count].all()):
        raise CacheRefusedError("the attention mask has a gap inside a row, so the row is more than one "
                                "sample. Use cache='none'.")
    return first, first + count


def _rows_of(call: dict[str, Any], rows: list[int], total: int) -> dict[str, Any]:
    part = dict(call)
    for name in _PER_ROW:
        part[name] = _take(part.get(name), rows, total)
    return {k: v for k, v in part.items() if k in call}


def _packed_rows_of(call: dict[str, Any], spans: list[tuple[int, int]]) -> dict[str, Any]:
    part = dict(call)
    for name in ("input_ids", "inputs_embeds", "position_ids"):
        if isinstance(value := call.get(name), Tensor):
            part[name] = torch.cat([value[:, lo:hi] for lo, hi in spans], dim=1)
    lengths = torch.tensor([0] + [hi - lo for lo, hi in spans])
    bounds = lengths.cumsum(0).to(call["cu_seq_lens_q"])
    return part | {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": int(lengths.max()),
                   "max_length_k": int(lengths.max())}


def _take(value: Any, rows: list[int], total: int) -> Any:
    if isinstance(value, dict):
        return {k: _take(v, rows, total) for k, v in value.items()}
    if isinstance(value, Tensor) and value.shape[0] == total and total > 1:
        return value[rows]
    return value
