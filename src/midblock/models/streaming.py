"""A model without weights in memory, whose parts are read from its checkpoint when they are needed and then dropped.

The model is built on the meta device by transformers itself, and each part (a block, the embeddings, the head) is put
into it by transformers' own loader, conversions of stored names, stacked experts and quantisation included: what is
computed is what a model loaded as a whole computes, bit for bit. Weights are read into memory of their own, never
mapped, so that a part is gone when it is dropped.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from midblock.errors import CheckpointError
from midblock.models.anatomy import Anatomy, find_anatomy
from midblock.models.checkpoints import Checkpoint
from midblock.models.finite import require_finite
from midblock.models.part_loader import Found, Loader, QuantisedStates, Stored
from midblock.models.placement import in_dtype

__all__ = ["Part", "PartReader", "StreamedWeights", "build_streamed"]

Part = int | Literal["embeddings", "head", "rest"]
"""A block's number, or a part outside the blocks; ``rest`` (final norm, positions, an encoder) always stays."""


class StreamedWeights:
    """The parts of one model in its checkpoint.

    Args:
        model: On the meta device, but for its buffers.
        anatomy: Its parts, found without weights.
        checkpoint: Where the weights are.
        spec: What the model is called in errors.
        dtype: The dtype that weights are loaded in.
        device: Where to.
        check_finite: Refuse weights with NaN or infinity.
        quantiser: transformers' own, of a model whose weights it holds, or turns back; None: they are whole.

    Attributes:
        found: Names that are missing, too many, or of another shape.
        bytes_read: Of the checkpoint, so far.
        memory_limit: Bytes that a pass over the model may take; None: what is free.
        scratch: Folder for hidden states that do not fit; None: the system's for temporary files.
    """

    def __init__(self, model: nn.Module, anatomy: Anatomy, checkpoint: Checkpoint, *, spec: str, dtype: torch.dtype,
                 device: torch.device, check_finite: bool, quantiser: Any = None) -> None:
        self._model, self._checkpoint, self._spec, self._check_finite = model, checkpoint, spec, check_finite
        self._loader = Loader(model, dtype, device, quantiser)
        self._states = QuantisedStates(model)
        self._files = {path: _stamp(path) for path in checkpoint.files}
        self._held: set[Part] = set()
        self._converted: set[str] = set()
        self._users: dict[Part, int] = {}
        self.bytes_read = 0
        self.memory_limit: int | None = None
        self.scratch: Path | None = None
        self.found = Found()
        self._places: dict[Part, list[tuple[str, nn.Module, str, nn.Parameter]]] = {}
        parts = self._find_parts(anatomy)
        self._keys: dict[Part, list[str]] = {part: [] for part in self._places}
        self._find_keys(parts)
        self.num_blocks = anatomy.num_blocks

    # -- where everything is ------------------------------------------------------------------------

    def _find_parts(self, anatomy: Anatomy) -> dict[str, Part | None]:
        """Parameter or persistent buffer -> its part; one weight under several names is of one part."""
        tied: dict[int, set[Part | None]] = {}
        named = list(self._model.named_parameters(remove_duplicate=False))
        for name, parameter in named:
            tied.setdefault(id(parameter), set()).add(_part_of(name, anatomy))
        parts: dict[str, Part | None] = {name: _part_of(name, anatomy) for name, _ in self._model.named_buffers()}
        for name, parameter in named:
            owners = tied[id(parameter)]
            part = next(iter(owners)) if len(owners) == 1 else (
                "embeddings" if owners == {"embeddings", "head"} else "rest")
            parts[name] = part
            path, _, leaf = name.rpartition(".")
            if part is not None:
                self._places.setdefault(part, []).append((name, self._model.get_submodule(path), leaf, parameter))
        for b in range(anatomy.num_blocks):
            self._places.setdefault(b, [])
        return parts

    def _find_keys(self, parts: dict[str, Part | None]) -> None:
        own = self._model.state_dict()
        reached: set[str] = set()
        for key in self._checkpoint.names():
            names, converted = self._loader.targets(key, own)
            inside = [n for n in names if n in own]
            reached.update(inside)
            if not inside:
                self.found.unexpected_keys.update(names)
                continue
            if (not converted and self._checkpoint.shape(key) != tuple(own[inside[0]].shape)
                    and not self._loader.quantises(inside[0])):
                self.found.mismatched_keys.add((inside[0], self._checkpoint.shape(key), tuple(own[inside[0]].shape)))
            if (part := parts.get(inside[0])) is not None:
                self._keys[part].append(key)
            if converted and not self._loader.passes(inside[0], names):
                self._converted.add(key)
        reached_weights = {id(own_parameter) for name, own_parameter
                           in self._model.named_parameters(remove_duplicate=False) if name in reached}
        self.found.missing_keys.update(
            name for places in self._places.values() for name, _, _, parameter in places
            if id(parameter) not in reached_weights)
        self._loader.forget_ignored(self.found)

    def stored_bytes(self, part: Part) -> int:
        """Bytes that a part takes in its files."""
        return sum(self._checkpoint.nbytes_of(key) for key in self._keys.get(part, ()))

    def part_bytes(self, part: Part) -> int:
        """Bytes that a part takes in memory."""
        weights = {id(parameter): self._loader.bytes_of(name, parameter)
                   for name, _, _, parameter in self._places.get(part, ())}
        return sum(weights.values())

    @property
    def block_bytes(self) -> int:
        """Bytes of the largest block in memory, with what of it is there twice while it is read."""
        return max(self.part_bytes(b) + (self.stored_bytes(b) if self._loader.converts(self._keys[b]) else 0)
                   for b in range(self.num_blocks))

    # -- parts come and go ----------------------------------------------------------------------------

    def load(self, part: Part) -> None:
        """Read a part into the model. Safe beside a forward that does not use the part.

        Raises:
            CheckpointError: a file is gone, has changed since, or lacks weights; or weights are not finite.
        """
        if part in self._held or part not in self._places:
            return
        self._require_same(self._keys[part])
        # quantisation would hide what is not finite
        where = self._spec if self._check_finite and self._loader.quantised else None
        self._loader.fill({key: Stored(self._checkpoint, key, where) for key in self._keys[part]}, self._spec)
        self.bytes_read += self.stored_bytes(part)
        self._tie(part)
        places = self._places[part]
        for name, module, leaf, empty in places:
            weight: Any = module._parameters[leaf]
            if self._loader.turns_back and not weight.is_meta:
                weight.data = in_dtype(self._model, name, weight.data, self._loader.dtype)
            weight.requires_grad_(empty.requires_grad)  # whoever froze the empty one froze this one
        if missing := [name for name, module, leaf, _ in places if getattr(module, leaf).is_meta]:
            raise CheckpointError(f"model {self._spec!r} lacks weights that its config asks for: "
                                  f"{', '.join(missing[:4])}{' ...' if len(missing) > 4 else ''}.")
        if self._check_finite:
            require_finite([(name, getattr(module, leaf)) for name, module, leaf, _ in places], self._spec)

    def _require_same(self, keys: Iterable[str]) -> None:
        for path in {self._checkpoint.location(key)[0] for key in keys}:
            if _stamp(path) != self._files[path]:
                raise CheckpointError(f"{path} has disappeared, or is not what it was when the run began; weights of "
                                      "two checkpoints must not be mixed. Restore it, then start the run again.")

    def drop(self, part: Part) -> None:
        """Free a part's memory."""
        if part in self._held:
            return
        for _, module, leaf, empty in self._places.get(part, ()):
            module._parameters[leaf] = empty
            self._states.forget(module)

    def hold(self, part: Part) -> None:
        """Load a part for good."""
        self.load(part)
        self._held.add(part)

    def let_go(self, part: Part) -> None:
        """Drop a part that was held."""
        self._held.discard(part)
        self.drop(part)

    def is_there(self, part: Part) -> bool:
        """Whether a part is in memory now."""
        return not any(module._parameters[leaf].is_meta  # type: ignore[union-attr]
                       for _, module, leaf, _ in self._places.get(part, ()))

    def release(self, anatomy: Anatomy) -> None:
        """Drop what only hidden 0 and the logits need, where hidden states can stand in for embeddings."""
        width = getattr(anatomy.embeddings.weight, "shape", (0, 0))[-1]
        if width != anatomy.hidden_size:  # projected on their way to block 0
            self._held.add("embeddings")
        for part in ("embeddings", "head"):
            self.drop(part)

    @contextlib.contextmanager
    def part(self, part: Part) -> Iterator[None]:
        """The part is there within the context; contexts of one part may overlap."""
        if not self._users.get(part):
            self.load(part)
        self._users[part] = self._users.get(part, 0) + 1
        try:
            yield
        finally:
            self._users[part] -= 1
            if not self._users[part]:
                self.drop(part)

    @contextlib.contextmanager
    def embedding_rows(self, ids: Tensor) -> Iterator[Tensor]:
        """Embeddings of some tokens are there within the context: their rows alone, where these can be read so.

        Args:
            ids: Tokens, whole numbers.

        Yields:
            What to embed in their place: numbers of the rows that are there, or the tokens themselves.
        """
        part: Part = "embeddings"
        keys, places = self._keys[part], self._places[part]
        tokens, rows = ids.unique(return_inverse=True)
        if self.is_there(part) or not self._is_plain_table(part) or not (
                0 <= int(tokens[0]) <= int(tokens[-1]) < self._checkpoint.shape(keys[0])[0]):
            with self.part(part):
                yield ids
            return
        self._require_same(keys)
        weight = self._checkpoint.load_rows(keys[0], tokens.tolist())
        self.bytes_read += weight.nbytes
        if self._check_finite:
            require_finite([(keys[0], weight)], self._spec)
        table = nn.Parameter(weight.to(device=ids.device, dtype=self._loader.dtype), requires_grad=False)
        try:
            for _, module, leaf, _ in places:
                module._parameters[leaf] = table
            yield rows
        finally:
            self.drop(part)

    def _is_plain_table(self, part: Part) -> bool:
        """Whether a part is one matrix, which is stored as the model has it."""
        keys, empty = self._keys[part], {id(p): p for *_, p in self._places[part]}
        if len(keys) != 1 or len(empty) != 1 or self._loader.keeps_float32:
            return False
        shape, dtype = self._checkpoint.shape(keys[0]), self._checkpoint.dtype(keys[0])
        return (shape == tuple(next(iter(empty.values())).shape) and dtype.is_floating_point and dtype.itemsize > 1
                and keys[0] not in self._converted)

    def holds(self, part: Part) -> bool:
        """Whether a part stays in memory."""
        return part in self._held

    @property
    def head(self) -> Part:
        """The part that holds the head's weight: its own, or that of the embeddings."""
        return "head" if "head" in self._places else "embeddings"

    def _tie(self, part: Part) -> None:
        """Let every name of one weight show the one that was read."""
        real = {id(empty): value for _, module, leaf, empty in self._places[part]
                if not (value := module._parameters[leaf]).is_meta}  # type: ignore[union-attr]
        for _, module, leaf, empty in self._places[part]:
            if id(empty) in real:
                module._parameters[leaf] = real[id(empty)]


class PartReader:
    """Parts of a model that come one after another: one is used, and the one that is expected next is read meanwhile.

    For one thread; close it in the end.
    """

    def __init__(self, weights: StreamedWeights) -> None:
        self._weights = weights
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="midblock-weights")
        self._coming: dict[Part, Future[None]] = {}

    @contextlib.contextmanager
    def part(self, part: Part, then: Part | None = None) -> Iterator[None]:
        """A part is there within the context; another is read meanwhile, and stays.

        Args:
            part: The part.
            then: What is expected next, which may be the same; None: nothing is.

        Raises:
            CheckpointError: it cannot be read.
        """
        coming = self._coming.pop(part, None) or self._reader.submit(self._weights.load, part)
        self.settle()  # what was expected wrongly
        coming.result()
        if then is not None and then != part:
            self._coming[then] = self._reader.submit(self._weights.load, then)
        try:
            yield
        finally:
            if then == part:
                self._coming[part] = coming
            else:
                self._weights.drop(part)

    def expects(self, part: Part) -> bool:
        """Whether a part is there, or on its way, as the one that comes next."""
        return part in self._coming

    def settle(self) -> None:
        """Drop what is expected next."""
        while self._coming:
            part, future = self._coming.popitem()
            if not future.cancel():
                future.exception()
            self._weights.drop(part)

    def close(self) -> None:
        """Drop what is expected next, and end the thread."""
        self.settle()
        self._reader.shutdown(wait=True, cancel_futures=True)


def _part_of(name: str, anatomy: Anatomy) -> Part | None:
    """None: a tower of another modality, which text does not pass."""
    if (block := anatomy.block_of(name)) is not None:
        return block
    if name.startswith(f"{anatomy.embeddings_path}."):
        return "embeddings"
    if name.startswith(f"{anatomy.head_path}."):
        return "head"
    config: Any = anatomy.causal_lm.config
    whole = getattr(config, "is_encoder_decoder", False) or "." not in name
    return "rest" if whole or not anatomy.body_path or name.startswith(f"{anatomy.body_path}.") else None


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns


def build_streamed(make: Callable[[], Any], folder: Path, *, spec: str, dtype: torch.dtype, device: torch.device,
                   check_finite: bool, quantiser: Any = None) -> tuple[Any, StreamedWeights]:
    """A model of which only what stands outside its blocks is in memory.

    Args:
        make: Builds the model from its config.
        folder: Of its safetensors.
        spec: What it is called in errors.
        dtype: The dtype that weights are loaded in.
        device: Where to.
        check_finite: Refuse weights with NaN or infinity.
        quantiser: See `StreamedWeights`.

    Raises:
        ArchitectureError: its parts cannot be told without weights.
        CheckpointError: a checkpoint that does not fit it.
    """
    with torch.device("meta"):
        model = make()
    if quantiser is not None:
        quantiser.preprocess_model(model=model, dtype=dtype, device_map={"": device}, checkpoint_files=None)
    model.eval()
    _make_buffers(model, device)
    streamed = StreamedWeights(model, find_anatomy(model), Checkpoint(folder), spec=spec, dtype=dtype, device=device,
                               check_finite=check_finite, quantiser=quantiser)
    if quantiser is not None:
        model.hf_quantizer = quantiser
        quantiser.postprocess_model(model)
    return model, streamed


def _make_buffers(model: Any, device: torch.device) -> None:
    """Buffers (rotary frequencies, masks) as the model itself initialises them: no checkpoint holds them all."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                module._buffers[name] = torch.empty_like(buffer, device=device)
    for tensor in model.parameters():
        tensor._is_hf_initialized = True
    for module in model.modules():
        module._is_hf_initialized = False
    model.initialize_weights()
    for tensor in model.parameters():  # a quantiser takes a parameter's attributes for arguments of its own
        del tensor._is_hf_initialized
