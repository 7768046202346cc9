"""Rows of a forward as the prefix cache sees them: a key for each from its content alone, and where it lies."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from midblock.errors import CacheRefusedError
from midblock.tuning.cache_folder import row_bytes

__all__ = ["RowInputs", "row_inputs", "rows_in"]

# inputs of a body that have one row per sample
_PER_ROW = ("input_ids", "inputs_embeds", "attention_mask", "position_ids")
# inputs that change no hidden state of a forward without a key-value cache
_HARMLESS = ("labels", "num_items_in_batch", "return_dict", "use_cache", "cache_position", "logits_to_keep",
             "output_attentions", "output_hidden_states", "output_router_logits", "past_key_values")
_PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")


@dataclass
class RowInputs:
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

    def apart(self, hidden: Tensor, rows: Sequence[int]) -> list[Tensor]:
        """The states (T, d) of some rows of a forward of these rows only: (B, T, d), or (1, N, d) packed."""
        spans = [self.spans[i] for i in rows]
        if self.packed:
            return list(hidden[0].split([hi - lo for lo, hi in spans]))
        return [hidden[place, lo:hi] for place, (lo, hi) in enumerate(spans)]

    def together(self, states: list[Tensor], rows: Sequence[int], device: torch.device) -> Tensor:
        """Cached states of some rows as a batch (B, T, d), zero on padding, or (1, N, d) packed."""
        if self.packed:
            return torch.cat([state.to(device) for state in states])[None]
        hidden = torch.zeros(len(rows), self.length, states[0].shape[-1], dtype=states[0].dtype, device=device)
        for place, (i, state) in enumerate(zip(rows, states, strict=True)):
            lo, hi = self.spans[i]
            hidden[place, lo:hi].copy_(state, non_blocking=True)  # rows of a card's run are there, or pinned
        return hidden


def rows_in(call: dict[str, Any]) -> int:
    """Number of rows of a forward."""
    for name in ("input_ids", "inputs_embeds"):
        if isinstance(value := call.get(name), Tensor):
            return int(value.shape[0])
    return 0


def row_inputs(call: dict[str, Any], outer: dict[str, Tensor], config: Any, *, by_row: bool) -> RowInputs:
    """Key and place of every row of a forward.

    Args:
        call: What the body was called with.
        outer: Tensors that the model around it was called with: masks and token types before it made its own of them.
        config: Of the text model.
        by_row: Whether the attention keeps packed rows apart by their bounds.

    Raises:
        CacheRefusedError: rows cannot be told apart, or the prefix may depend on more than the rows.
    """
    bounds = _bounds(call) if by_row else None
    _require_known(call, config, packed=bounds is not None)
    content = call.get("input_ids")
    if content is None:
        content = call.get("inputs_embeds")
    if not isinstance(content, Tensor):
        raise CacheRefusedError("the model was called without input_ids or inputs_embeds.")
    rows, length = content.shape[:2]
    mask, positions = call.get("attention_mask"), call.get("position_ids")
    if bounds is not None and (mask is not None or rows != 1 or bounds[0] != 0 or bounds[-1] != length):
        raise CacheRefusedError("packed rows came with an attention mask, or with bounds that do not cover them.")
    if isinstance(mask, dict):
        mask = outer.get("attention_mask", mask)
    # such as token types, from which such a model makes its masks
    beside = [v.detach().cpu() for k, v in sorted(outer.items())
              if k not in _PER_ROW and v.shape == (rows, length)]
    if mask is not None and not (isinstance(mask, Tensor) and mask.shape == (rows, length)):
        raise CacheRefusedError("the attention mask is not one 0/1 value per token, so rows cannot be told "
                                "apart from their padding.")
    if positions is not None and not (isinstance(positions, Tensor) and positions.ndim == 2
                                      and positions.shape[-1] == length):
        raise CacheRefusedError("position_ids have a form that the cache does not know.")
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
                raise CacheRefusedError("positions restart inside a row (packing); set packing=False.")
        # padding on the left is kept too: its last state predicts the row's first token
        digest = hashlib.sha256(row_bytes(ids[row, begin:hi]))
        digest.update(f"{ids.dtype} {lo - begin} {offset} {scope}".encode())
        for tensor in beside:
            digest.update(row_bytes(tensor[row, begin:hi]))
        keys.append(digest.hexdigest())
        spans.append((begin, hi))
    return RowInputs(keys, spans, length, packed=bounds is not None)


def _require_known(call: dict[str, Any], config: Any, *, packed: bool) -> None:
    """Refuse inputs that hidden states before the first trainable block might depend on besides the rows."""
    for name, value in call.items():
        if value is None or value is False or name in _PER_ROW or (
                name in _HARMLESS and name != "output_router_logits"):
            continue
        if packed and name in _PACKED and name != "seq_idx":
            continue
        if name in _PACKED:
            raise CacheRefusedError(f"packed rows ({name} was given) cannot be cached by sample; set "
                                    "packing=False (and padding_free=False).")
        if name == "output_router_logits":
            raise CacheRefusedError("router logits of all blocks were asked for (output_router_logits), but a "
                                    "cached prefix computes none; set router_aux_loss_coef=0.0.")
        if isinstance(value, Tensor | dict | list | tuple):
            raise CacheRefusedError(f"the model was called with {name}=..., of which the cache does not know "
                                    "whether the prefix depends on it.")
    if getattr(config, "output_router_logits", False) and call.get("output_router_logits") is not False:
        raise CacheRefusedError("the config asks for router logits of all blocks (output_router_logits), but a "
                                "cached prefix computes none; set router_aux_loss_coef=0.0.")


def _bounds(call: dict[str, Any]) -> list[int] | None:
    """Where packed rows begin and end, if the model's attention is one that keeps them apart by these."""
    bounds, keys = call.get("cu_seq_lens_q"), call.get("cu_seq_lens_k")
    if not (isinstance(bounds, Tensor) and isinstance(keys, Tensor) and bounds.shape == keys.shape
            and call.get("position_ids") is not None and call.get("seq_idx") is None and len(bounds) > 1
            and bool((bounds == keys).all())):
        return None
    return [int(x) for x in bounds.tolist()]


def _span(real: Tensor) -> tuple[int, int]:
    """Half-open range of a row's real tokens; a row of padding only is kept as it is."""
    count = int(real.sum())
    if not count:
        return 0, real.shape[0]
    first = int(real.int().argmax())
    if not bool(real[first:first + count].all()):
        raise CacheRefusedError("the attention mask has a gap inside a row, so the row is more than one "
                                "sample.")
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
