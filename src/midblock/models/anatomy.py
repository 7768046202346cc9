"""Where a model keeps its blocks, embeddings, final norm and head, found from the module tree.

There is no table of families. The block list is the `nn.ModuleList` of the text decoder whose
length is the config's number of layers; embeddings and head come from transformers'
``get_input_embeddings`` and ``get_output_embeddings``; the final norm is the norm that stands
beside the block list. What was found is then tried on three tokens (`find_anatomy` runs the
decoder with its blocks passed over), so a family with another step between the last block and
the head is an error and not a silently different number.

Words: block b is 0..L-1; hidden h is 0..L, h=0 the embedding output, h=b+1 the output of block
b before any final norm.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPastAndCrossAttentions

from midblock.errors import ArchitectureError
from midblock.models.forwards import forwards_replaced
from midblock.models.matrices import NORM, attentions

__all__ = ["Anatomy", "check_unembed", "find_anatomy", "text_config"]


# ---------------------------------------------------------------------------------------------
# what a model is made of


@dataclass(frozen=True)
class Anatomy:
    """The parts of one causal language model (or of an encoder-decoder's decoder).

    All paths are absolute inside the module that was given to `find_anatomy`.
    """

    blocks_path: str
    """Path of the block list, such as ``model.layers``."""
    blocks: tuple[nn.Module, ...]
    """The L decoder blocks in order."""
    embeddings: nn.Module
    embeddings_path: str
    final_norm: nn.Module | None
    """The norm between the last block and the head; None where a family has none (BART)."""
    final_norm_path: str | None
    head: nn.Module
    head_path: str
    tied: bool
    """Whether head and embeddings share one weight."""
    num_blocks: int
    hidden_size: int
    vocab_size: int
    """Rows of the head's weight (padding rows included)."""
    body: nn.Module
    """The module that runs embeddings, blocks and final norm."""
    body_path: str
    causal_lm: PreTrainedModel = field(repr=False, compare=False)
    """The transformers model that owns body and head (inside a PEFT wrapper, the wrapped one)."""
    _own_forward: list[bool] = field(default_factory=list, repr=False, compare=False)

    def block_of(self, parameter_name: str) -> int | None:
        """Index of the block that a parameter or module belongs to; None outside the blocks.

        Prefixes of wrappers before ``blocks_path`` (PEFT's ``base_model.model.``, torch.compile's) are understood; any
        other is another tower's (``vision_model.model.layers.0`` is not ``model.layers.0``).

        Example:
            >>> import transformers
            >>> config = transformers.LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8,
            ...     num_hidden_layers=3, num_attention_heads=2)
            >>> anatomy = find_anatomy(transformers.LlamaForCausalLM(config))
            >>> anatomy.block_of("model.layers.2.self_attn.q_proj.weight"), anatomy.block_of("lm_head")
            (2, None)
        """
        path = re.escape(self.blocks_path.removeprefix("base_model.model."))
        match = re.match(rf"(?:(?:base_model\.model|_orig_mod|module)\.)*{path}\.(\d+)(?:\.|$)", parameter_name)
        return int(match.group(1)) if match else None

    def block_path(self, block: int) -> str:
        """Module path of a block, such as ``model.layers.3``."""
        return f"{self.blocks_path}.{range(self.num_blocks)[block]}"

    def normed(self, hidden: Tensor) -> Tensor:
        """The final norm of a hidden state (the state itself where the family has no such norm)."""
        return hidden if self.final_norm is None else self.final_norm(hidden)

    def unembed(self, hidden: Tensor) -> Tensor:
        """Logits of a hidden state: final norm, head and the family's own scaling or soft cap.

        ``unembed`` of hidden L (un-normed) is the model's logits. Gradients flow. Where the
        family does more than apply the head (Gemma's soft cap, Granite's and Cohere's scaling,
        T5's scaled tied head, BART's logit bias) the model's own forward does it, with its body
        replaced by the given state: one model, one thread at a time.

        Args:
            hidden: (..., d) un-normed states in the model's dtype and on its device.

        Returns:
            (..., V) logits, V the head's rows.

        Raises:
            ArchitectureError: the model's own forward cannot be run from a normed state.
        """
        if not self._own_forward:
            self._own_forward.append(_needs_own_forward(self, hidden))
        normed = self.normed(hidden)
        if not self._own_forward[0]:
            return self.head(normed)  # type: ignore[no-any-return]
        flat = normed.reshape(1, -1, normed.shape[-1]) if normed.ndim != 3 else normed
        logits = _logits_of_own_forward(self, flat)
        return logits.reshape(*hidden.shape[:-1], logits.shape[-1])


def text_config(model: nn.Module) -> Any:
    """The config of the text decoder (nested configs and encoder-decoders resolved)."""
    return _causal_lm(model).config.get_text_config(decoder=True)


def find_anatomy(model: nn.Module, *, verify: bool = True) -> Anatomy:
    """Find the blocks, embeddings, final norm and head of a model.

    Args:
        model: A transformers causal LM, encoder-decoder LM or multi-modal LM, or a PEFT model
            around one.
        verify: Try the parts found on three tokens (the blocks are passed over, so the cost is
            that of the head). Left out by itself for weights on the meta device.

    Raises:
        ArchitectureError: no such parts, more than one candidate, or a family that does
            something between its last block and its head that these parts do not explain.

    Example:
        >>> import transformers
        >>> config = transformers.LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8,
        ...     num_hidden_layers=3, num_attention_heads=2)
        >>> anatomy = find_anatomy(transformers.LlamaForCausalLM(config))
        >>> anatomy.blocks_path, anatomy.final_norm_path, anatomy.head_path, anatomy.num_blocks
        ('model.layers', 'model.norm', 'lm_head', 3)
    """
    lm = _causal_lm(model)
    paths = {id(module): path for path, module in model.named_modules()}
    config = lm.config.get_text_config(decoder=True)
    num_blocks = _num_layers(lm.config, config)
    hidden_size = getattr(config, "hidden_size", None)
    what = type(lm).__name__
    if num_blocks is None or not isinstance(hidden_size, int):
        raise ArchitectureError(
            f"{what}: its config names no number of layers or no hidden size, so its blocks cannot "
            "be told from other lists of modules.")
    blocks_path, block_list = _block_list(model, lm, num_blocks, hidden_size)
    body_path, body = _body(model, blocks_path)
    embeddings = _embeddings(lm, body)
    head = _head(lm, body, embeddings)
    norms = _final_norms(body, block_list, embeddings, hidden_size)
    for part, module in (("embeddings", embeddings), ("head", head)):
        if id(module) not in paths:
            raise ArchitectureError(f"{what}: its {part} are not part of its module tree.")
    embedding_weight, head_weight = _weight(embeddings), _weight(head)
    anatomy = Anatomy(
        blocks_path=blocks_path, blocks=tuple(block_list),
        embeddings=embeddings, embeddings_path=paths[id(embeddings)],
        final_norm=norms[0], final_norm_path=_path_of(paths, norms[0]),
        head=head, head_path=paths[id(head)], tied=head_weight is embedding_weight,
        num_blocks=num_blocks, hidden_size=hidden_size,
        # quantised weights are packed; PEFT can leave a tied head with wrong out_features
        vocab_size=int(head_weight.shape[0] if head_weight.is_floating_point()
                       else getattr(head, "out_features", head_weight.shape[0])),
        body=body, body_path=body_path, causal_lm=lm)
    if any(p.is_meta for p in _parameters_outside_blocks(anatomy)):
        if norms[0] is not None and norms[1] is not None:
            raise ArchitectureError(
                f"{what}: {norms.index(None)} norms stand after the block list, and without weights "
                "it cannot be tried which is the final one.")
        return anatomy
    return _verified(anatomy, [(_path_of(paths, norm), norm) for norm in norms]) if verify else anatomy


def _path_of(paths: dict[int, str], module: nn.Module | None) -> str | None:
    return None if module is None else paths[id(module)]


def _causal_lm(model: nn.Module) -> PreTrainedModel:
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            return module
    raise ArchitectureError(
        f"{type(model).__name__} is not a transformers model and holds none; "
        "load it with transformers' AutoModelForCausalLM.")


def _num_layers(whole: Any, text: Any) -> int | None:
    """Layers of the decoder. Flat encoder-decoder configs (BART, T5) state them under a name of their own, also where
    the decoder stands alone, and their text config no longer shows it; all others call them num_hidden_layers."""
    if whole.get_text_config() is whole:
        for key in ("num_decoder_layers", "decoder_layers"):
            if isinstance(value := getattr(whole, key, None), int):
                return value
    value = getattr(text, "num_hidden_layers", None)
    if isinstance(getattr(type(text), "num_hidden_layers", None), property):  # LongCat's is twice its num_layers
        value = getattr(text, "num_layers", value)
    return value if isinstance(value, int) else None


def _module_lists(model: nn.Module) -> str:
    found = [f"{path or '(root)'} ({len(m)})" for path, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    return ", ".join(found[:12]) + (" ..." if len(found) > 12 else "") if found else "none"


def _block_list(model: nn.Module, lm: PreTrainedModel, num_blocks: int, hidden_size: int
                ) -> tuple[str, nn.ModuleList]:
    decoder = lm.get_decoder()
    decoder = decoder if isinstance(decoder, PreTrainedModel) else lm  # some call their head "decoder"
    inside = {id(m) for m in decoder.modules()}
    lists = [(path, module) for path, module in model.named_modules()
             if isinstance(module, nn.ModuleList) and id(module) in inside]
    # A list inside another (experts of a block, T5's parts of a block) is never the block list.
    candidates = [(path, module) for path, module in lists if len(module) == num_blocks
                  and not any(path.startswith(f"{outer}.") for outer, _ in lists)]
    if len(candidates) > 1:
        with_attention = [c for c in candidates if any(attentions(block) for block in c[1])]
        candidates = with_attention or candidates
    if len(candidates) > 1:  # towers of other modalities have their own width, as a rule
        same_width = [c for c in candidates if _has_norm_of(c[1], hidden_size)]
        candidates = same_width or candidates
    if len(candidates) != 1:
        found = (f"{len(candidates)} fit ({', '.join(p for p, _ in candidates)})" if candidates
                 else "none fits")
        raise ArchitectureError(
            f"{type(lm).__name__}: looked in {type(decoder).__name__} for the one module list of "
            f"{num_blocks} blocks that the config names; {found}. "
            f"Module lists of the model (and their lengths): {_module_lists(model)}.")
    return candidates[0]


def _has_norm_of(blocks: nn.ModuleList, hidden_size: int) -> bool:
    return any(p.ndim == 1 and p.shape[0] == hidden_size for p in blocks.parameters())


def _body(model: nn.Module, blocks_path: str) -> tuple[str, nn.Module]:
    """The nearest transformers model around the block list."""
    path = blocks_path
    while path:
        path = path.rpartition(".")[0]
        module = model.get_submodule(path)
        if isinstance(module, PreTrainedModel):
            return path, module
    raise ArchitectureError(f"no transformers model encloses the block list {blocks_path}.")


def _embeddings(lm: PreTrainedModel, body: nn.Module) -> nn.Module:
    for owner in (body, lm):
        with contextlib.suppress(NotImplementedError, AttributeError):
            found = owner.get_input_embeddings()  # type: ignore[operator]
            if isinstance(found, nn.Module) and _matrix(found) is not None:
                return found
    raise ArchitectureError(f"{type(lm).__name__}: its token embeddings were not found "
                            "(get_input_embeddings gives no module with a weight).")


def _head(lm: PreTrainedModel, body: nn.Module, embeddings: nn.Module) -> nn.Module:
    found = lm.get_output_embeddings()
    if isinstance(found, nn.Module) and _matrix(found) is not None:
        return found
    rows = _weight(embeddings).shape[0]
    inside = {id(m) for m in body.modules()}
    linear = [m for m in lm.modules() if isinstance(m, nn.Linear) and id(m) not in inside
              and m.out_features == rows]
    if len(linear) == 1:
        return linear[0]
    raise ArchitectureError(
        f"{type(lm).__name__} has no language-model head (get_output_embeddings gives none and "
        f"{len(linear)} linear layers outside the body have {rows} outputs). "
        "Load the model with a head, such as AutoModelForCausalLM.")


def _matrix(module: nn.Module) -> Tensor | None:
    weight = getattr(module, "weight", None)
    return weight if isinstance(weight, Tensor) and weight.ndim >= 2 else None


def _weight(module: nn.Module) -> Tensor:
    weight = _matrix(module)
    assert weight is not None
    return weight


def _is_norm(path: str, module: nn.Module) -> bool:
    return not list(module.children()) and ("norm" in type(module).__name__.lower() or NORM.search(path) is not None)


def _final_norms(body: nn.Module, blocks: nn.ModuleList, embeddings: nn.Module,
                 hidden_size: int) -> list[nn.Module | None]:
    """What may be the final norm, likeliest first: later than the blocks, not of the embeddings. `_verify` decides."""
    skip = {id(m) for m in blocks.modules()} | {id(m) for m in embeddings.modules()}
    likely: list[nn.Module | None] = []
    unlikely: list[nn.Module | None] = []
    after = False
    for path, module in body.named_modules():
        after = after or module is blocks
        if id(module) in skip or not _is_norm(path, module):
            continue
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.shape != (hidden_size,):
            continue  # the norm of another quantity (per-layer inputs, a projection)
        (likely if after and "emb" not in path.lower() else unlikely).append(module)
    return [*likely, None, *unlikely]


def _parameters_outside_blocks(anatomy: Anatomy) -> Iterator[nn.Parameter]:
    inside = {id(p) for block in anatomy.blocks for p in block.parameters()}
    for module in (anatomy.body, anatomy.head):
        yield from (p for p in module.parameters() if id(p) not in inside)


# ---------------------------------------------------------------------------------------------
# logits through the model's own forward


class _Normed(BaseModelOutputWithPastAndCrossAttentions):
    """What the body is taken to have returned; fields that a family adds read as None."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return None


def _token_inputs(anatomy: Anatomy, batch: int, length: int, like: Tensor) -> dict[str, Any]:
    ids = torch.zeros(batch, length, dtype=torch.long, device=like.device)
    if not anatomy.causal_lm.config.is_encoder_decoder:
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    width = getattr(anatomy.causal_lm.config, "hidden_size", like.shape[-1])
    return {"decoder_input_ids": ids, "use_cache": False,
            "encoder_outputs": BaseModelOutput(last_hidden_state=like.new_zeros(batch, 1, width))}


def _logits_of_own_forward(anatomy: Anatomy, normed: Tensor) -> Tensor:
    """Logits (B, T, V) that the model's own forward makes of a normed state (B, T, d)."""
    inputs = _token_inputs(anatomy, normed.shape[0], normed.shape[1], normed)

    def body_forward(*_: Any, **__: Any) -> _Normed:
        return _Normed(last_hidden_state=normed)

    with forwards_replaced([anatomy.body], [body_forward]):
        return anatomy.causal_lm.forward(**inputs).logits  # type: ignore[no-any-return]


_CANNOT_RUN = (TypeError, ValueError, IndexError, AttributeError, RuntimeError, KeyError)


def _probe(anatomy: Anatomy, like: Tensor | None = None) -> Tensor:
    weight = _weight(anatomy.head) if like is None else like
    dtype = weight.dtype if weight.is_floating_point() else torch.float32
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, 3, anatomy.hidden_size, generator=generator).to(weight.device, dtype)


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = [m for m in model.modules() if m.training]
    try:
        for module in training:
            module.training = False
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def _needs_own_forward(anatomy: Anatomy, like: Tensor | None = None) -> bool:
    """Whether the model's forward does anything to the logits beyond applying the head."""
    with _evaluating(anatomy.causal_lm):
        try:
            normed = anatomy.normed(_probe(anatomy, like))
            own = _logits_of_own_forward(anatomy, normed)
            plain = anatomy.head(normed)
        except _CANNOT_RUN as error:
            raise ArchitectureError(
                f"{type(anatomy.causal_lm).__name__}: its forward cannot be run from a given final "
                f"state ({type(error).__name__}: {error}), so its logits cannot be reproduced from "
                "hidden states.") from error
    return not (plain.dtype == own.dtype and torch.equal(plain, own))


def _verified(anatomy: Anatomy, norms: list[tuple[str | None, nn.Module | None]]) -> Anatomy:
    """The anatomy with the final norm that, alone, turns the last block's output into the body's.

    Raises:
        ArchitectureError: none does.
    """
    with _evaluating(anatomy.causal_lm):
        probe = _probe(anatomy)
        result = _body_with_blocks_passed_over(anatomy, probe)
        if result is None:  # how this family calls its blocks is unknown: run it in full
            check_unembed(anatomy.causal_lm, anatomy=anatomy)
            return anatomy
        for path, norm in norms:
            expected = probe if norm is None else norm(probe)
            if result.shape == expected.shape and torch.equal(result, expected):
                anatomy = replace(anatomy, final_norm=norm, final_norm_path=path)
                break
        else:
            raise _unexplained(anatomy)
    anatomy._own_forward[:] = [_needs_own_forward(anatomy)]
    return anatomy


def _unexplained(anatomy: Anatomy) -> ArchitectureError:
    beside = [f"{name} ({type(m).__name__})" for name, m in anatomy.body.named_children()
              if m is not anatomy.embeddings and m is not anatomy.final_norm
              and not any(block is inner for block in anatomy.blocks[:1] for inner in m.modules())]
    return ArchitectureError(
        f"{type(anatomy.causal_lm).__name__}: more than the final norm "
        f"({anatomy.final_norm_path or 'none found'}) stands between its last block and its head, so "
        "logits cannot be read from hidden states exactly. Modules beside the blocks: "
        f"{', '.join(beside) or 'none'}.")


def _body_with_blocks_passed_over(anatomy: Anatomy, probe: Tensor) -> Tensor | None:
    """The body's last hidden state if every block returned ``probe``; None if it cannot be run."""
    ids = torch.zeros(probe.shape[:2], dtype=torch.long, device=probe.device)
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids),
                              "use_cache": False}
    if anatomy.causal_lm.config.is_encoder_decoder:
        inputs["encoder_hidden_states"] = probe.new_zeros(1, 1, probe.shape[-1])
    for extra in (-1, 0, 1, 2, 3):  # a tensor, or a tuple with that many values after the state
        returned = probe if extra < 0 else (probe, *([None] * extra))
        with forwards_replaced(anatomy.blocks, [lambda *_, r=returned, **__: r] * len(anatomy.blocks)):
            try:
                output = anatomy.body(**inputs)
            except _CANNOT_RUN:
                continue
        last = output[0]
        if isinstance(last, Tensor) and (last.shape == probe.shape or last.ndim == 3):
            return last
    return None


def check_unembed(model: nn.Module, input_ids: Tensor | None = None, *,
                   anatomy: Anatomy | None = None) -> float:
    """Run the whole model on a few tokens and compare its logits with `Anatomy.unembed`.

    Args:
        model: As for `find_anatomy`.
        input_ids: (B, T) token ids; default four small ids.
        anatomy: The anatomy of ``model``, if it is known.

    Returns:
        The largest absolute difference of a logit (0 where kernels are deterministic).

    Raises:
        ArchitectureError: the logits differ by more than rounding.
    """
    anatomy = anatomy if anatomy is not None else find_anatomy(model)
    lm = anatomy.causal_lm
    device = _weight(anatomy.embeddings).device
    if input_ids is None:
        input_ids = torch.tensor([[1, 2, 3, 4]], device=device) % anatomy.vocab_size
    seen: list[Tensor] = []

    def keep(_: nn.Module, __: Any, output: Any) -> None:
        seen.append(output if isinstance(output, Tensor) else output[0])

    input_ids = input_ids.to(device)
    inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids),
                              "use_cache": False}
    if lm.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = input_ids
    handle = anatomy.blocks[-1].register_forward_hook(keep)
    try:
        with _evaluating(lm):
            logits = lm(**inputs).logits
            try:
                read = anatomy.unembed(seen[-1]) if seen else None
            except _CANNOT_RUN:
                raise _unexplained(anatomy) from None
    finally:
        handle.remove()
    if read is None:
        raise ArchitectureError(f"{type(lm).__name__}: its forward never ran its last block "
                                f"{anatomy.block_path(-1)}.")
    if read.shape != logits.shape:
        raise _unexplained(anatomy)
    difference = float((read.double() - logits.double()).abs().max())
    # The same kernels on the same shapes: anything above a few units in the last place is a
    # different computation.
    if not difference <= 16 * torch.finfo(logits.dtype).eps * logits.abs().max().item():
        raise _unexplained(anatomy)
    return difference
