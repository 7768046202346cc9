"""Sums of squares and spectra of weights and of their differences, read from files by a few threads.

Files are read side by side in small pieces; a piece is widened, subtracted, squared and summed while it is
still in the processor's cache, so that memory does not grow with the model and the reading, not the
arithmetic, sets the pace. Sums within a piece of 2**17 entries are float32 (float64 where a checkpoint
is), the totals float64.

A LoRA adapter against its base is never multiplied out: ||s B A||_F^2 = s^2 tr((B'B)(AA')), and the
singular values of B A are those of an r x r matrix.
"""

from __future__ import annotations

import contextlib
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from midblock import metrics
from midblock.analysis.weight_names import Operand, Plan, Slab, Stage, Weight
from midblock.errors import CheckpointError
from midblock.progress import Progress

__all__ = ["Pair", "Summer", "Sums", "entries", "group_change", "norm_and_rank", "similar_runs", "single_threads",
           "spectra_cost"]

_PIECE = 1 << 17  # entries: two widened pieces and their difference fit a core's second-level cache
_JOB = 1 << 22  # entries handed to a thread at a time

Pair = tuple[int, int]
"""Numbers of the later and the earlier stage."""


def group_change(squares: Iterable[float], own_squares: Iterable[float]) -> tuple[float, float | None]:
    """Change of one matrix or of a group: sum of the members' norms, and the relative norm of all of it.

    The only rule for ``weight_change`` and ``weight_change_relative``, in `weights` and in `gradients --steps`.

    Args:
        squares: Sum of squares of each member's difference.
        own_squares: Sum of squares of each member before.

    Returns:
        sum_i ||dW_i||_F, and sqrt(sum_i ||dW_i||^2 / sum_i ||W_i||^2); None for the latter where all W are zero.

    Example:
        >>> group_change([9.0, 16.0], [60.0, 40.0])
        (7.0, 0.5)
    """
    changes, own = list(squares), math.fsum(own_squares)
    absolute = math.fsum(map(math.sqrt, changes))
    return absolute, math.sqrt(math.fsum(changes) / own) if own > 0 else None


@dataclass
class Sums:
    """Sums of squares of one weight: of each comparison's difference and each stage's own values.

    For a fused matrix every sum is a vector over the outputs, for a stack of experts over these.
    """

    difference: dict[Pair, Tensor]
    own: dict[int, Tensor]

    def add(self, other: Sums) -> None:
        for key, value in other.difference.items():
            self.difference[key] = self.difference[key] + value if key in self.difference else value
        for stage, value in other.own.items():
            self.own[stage] = self.own[stage] + value if stage in self.own else value


class _Reader:
    """Buffers and file handles of one thread."""

    def __init__(self) -> None:
        self._files: dict[Path, int] = {}
        self._room: dict[tuple[int, torch.dtype], Tensor] = {}
        self._views: dict[tuple[int, torch.dtype, torch.dtype, int], tuple[Tensor, Tensor, memoryview]] = {}

    def handle(self, path: Path) -> int:
        """File descriptor. Each thread has its own: the system's read-ahead then sees one stream in each."""
        if path not in self._files:
            self._files[path] = os.open(path, os.O_RDONLY)
        return self._files[path]

    def close(self) -> None:
        """Close all files."""
        for handle in self._files.values():
            os.close(handle)
        self._files.clear()

    def buffer(self, slot: int, dtype: torch.dtype, size: int) -> Tensor:
        """Room for the widened entries of one stage (slots 0..S-1) or for a difference (slot S)."""
        found = self._room.get((slot, dtype))
        if found is None or found.numel() < size:
            found = self._room[slot, dtype] = torch.empty(max(size, _PIECE), dtype=dtype)
            self._views.clear()
        return found if found.numel() == size else found[:size]

    def announce(self, slab: Slab, first: int, stop: int) -> None:
        """Ask the system to fetch entries that will be read in a moment."""
        if hasattr(os, "posix_fadvise"):
            size = slab.dtype.itemsize
            with contextlib.suppress(OSError):  # it is only a hint
                os.posix_fadvise(self.handle(slab.path), slab.offset + first * size, (stop - first) * size,
                                 os.POSIX_FADV_WILLNEED)

    def load(self, slab: Slab, first: int, size: int, slot: int, wide: torch.dtype) -> Tensor:
        """Entries ``first``..``first + size`` of a tensor, widened; good until the slot's next load."""
        key = (slot, slab.dtype, wide, size)
        if key not in self._views:  # making views costs as much as reading a small piece
            out = self.buffer(slot, wide, size)
            # stored entries get room of their own where they have to be widened
            stored = out if slab.dtype == wide else self.buffer(-1 - slot, slab.dtype, size)
            self._views[key] = (out, stored, memoryview(stored.view(torch.uint8).numpy()))  # type: ignore[arg-type]
        out, stored, view = self._views[key]
        handle, position = self.handle(slab.path), slab.offset + first * slab.dtype.itemsize
        while (count := os.preadv(handle, [view], position)) < view.nbytes:
            if count == 0:
                raise CheckpointError(f"{slab.path} ended within {slab.name}: it was cut while it was read.")
            view, position = view[count:], position + count
        return out if stored is out else out.copy_(stored)


@dataclass(frozen=True)
class _Job:
    """Entries ``start``..``stop`` of one weight."""

    index: int
    start: int
    stop: int


class Summer:
    """Sums of squares of all weights, by a few threads."""

    def __init__(self, stages: Sequence[Stage], plan: Plan, pairs: Sequence[Pair],
                 workers: int) -> None:
        self._stages, self._plan, self._pairs = list(stages), plan, list(pairs)
        self._earlier = sorted({earlier for _, earlier in pairs})
        self._workers = workers
        self._local = threading.local()
        self._readers: list[_Reader] = []

    def run(self, progress: Progress) -> list[Sums]:
        """Sums of every weight, in the plan's order."""
        weights = self._plan.weights
        jobs = []
        for index, weight in enumerate(weights):
            step = max(1, _JOB // weight.columns) * weight.columns
            jobs += [_Job(index, lo, min(lo + step, weight.numel)) for lo in range(0, weight.numel, step)]
        sums = [Sums({}, {}) for _ in weights]
        bytes_of = [sum(s.checkpoint.nbytes_of(s.own_names[w.name]) for s in self._stages
                        if s.adapter is None) for w in weights]
        total = sum(bytes_of) / 1e6
        done = 0.0
        threads = torch.get_num_threads()
        pool = ThreadPoolExecutor(self._workers, thread_name_prefix="weights")
        try:
            # in the order of the jobs, so that equal calls give equal sums to the last bit
            for job, found in zip(jobs, pool.map(self._job, jobs), strict=True):
                sums[job.index].add(found)
                weight = weights[job.index]
                done += bytes_of[job.index] * (job.stop - job.start) / weight.numel / 1e6
                progress("weights (MB)", done, total, note=weight.name)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            for reader in self._readers:
                reader.close()
            torch.set_num_threads(threads)
        for weight, found in zip(weights, sums, strict=True):
            if not all(bool(v.isfinite().all()) for v in (*found.difference.values(), *found.own.values())):
                self._explain(weight)
        return sums

    def _reader(self) -> _Reader:
        reader: _Reader | None = getattr(self._local, "reader", None)
        if reader is None:
            torch.set_num_threads(1)  # the threads are ours; torch's own would only multiply them
            reader = self._local.reader = _Reader()
            self._readers.append(reader)
        return reader

    def _job(self, job: _Job) -> Sums:
        weight = self._plan.weights[job.index]
        operands = [stage.operand(weight) for stage in self._stages]
        found = Sums({}, {})
        dense = []
        for pair in self._pairs:
            thin = _thin_difference(operands[pair[0]], operands[pair[1]])
            if thin is None:
                dense.append(pair)
            elif job.start == 0:
                found.difference[pair] = _thin_squares(thin, weight)
        needed = sorted({*self._earlier, *(stage for pair in dense for stage in pair)})
        reader = self._reader()
        for stage in needed:
            if (slab := operands[stage].slab) is not None:
                reader.announce(slab, job.start, job.stop)
        wide = torch.float64 if any(operands[s].dtype == torch.float64 for s in needed) else torch.float32
        rowwise = weight.fused is not None or any(operands[s].left is not None for s in needed)
        piece = max(1, _PIECE // weight.columns) * weight.columns if rowwise else _PIECE
        differences: dict[Pair, float | Tensor] = dict.fromkeys(dense, 0.0)
        own: dict[int, float | Tensor] = dict.fromkeys(self._earlier, 0.0)
        for lo in range(job.start, job.stop, piece):
            hi = min(lo + piece, job.stop)
            values = {i: self._values(reader, i, operands[i], weight, lo, hi, wide) for i in needed}
            scratch = reader.buffer(len(self._stages), wide, hi - lo)
            for pair in dense:
                torch.sub(values[pair[0]], values[pair[1]], out=scratch)
                differences[pair] += _squares(scratch, scratch, weight, lo)
            for stage in self._earlier:
                own[stage] += _squares(values[stage], scratch, weight, lo)
        for pair, value in differences.items():
            found.difference[pair] = torch.as_tensor(value, dtype=torch.float64)
        found.own = {stage: torch.as_tensor(value, dtype=torch.float64) for stage, value in own.items()}
        return found

    def _values(self, reader: _Reader, stage: int, operand: Operand, weight: Weight, lo: int, hi: int,
                wide: torch.dtype) -> Tensor:
        """Entries ``lo``..``hi`` of a stage's weight, widened."""
        if operand.whole is not None:
            return operand.whole.flatten()[lo:hi].to(wide)
        assert operand.slab is not None
        out = reader.load(operand.slab, lo, hi - lo, stage, wide)
        if operand.left is not None and operand.right is not None:
            rows = slice(lo // weight.columns, hi // weight.columns)
            out.view(-1, weight.columns).addmm_(operand.left[rows].to(wide), operand.right.to(wide))
        return out

    def _explain(self, weight: Weight) -> None:
        """Raise for a weight whose sums are not finite."""
        for stage in self._stages:
            sources = [(stage.checkpoint, stage.own_names[weight.name])]
            if stage.adapter is not None and weight.name in stage.changed:
                module = stage.changed[weight.name].removesuffix(".weight")
                sources += [(stage.adapter, n) for n in stage.adapter.names() if f".{module}." in f".{n}"]
            for checkpoint, name in sources:
                flat = checkpoint.read(name).reshape(-1)
                if not all(bool(part.isfinite().all()) for part in flat.split(_JOB)):
                    raise CheckpointError(f"{checkpoint.location(name)[0]}: {name} holds NaN or infinity; "
                                          "fetch or write the checkpoint again.")
        raise CheckpointError(f"{weight.name} holds values so large that their squares overflow float32; "
                              "they are not plausible weights.")


@contextlib.contextmanager
def single_threads(workers: int, name: str) -> Iterator[ThreadPoolExecutor]:
    """A pool of which each thread computes by itself; with one worker PyTorch's own threads help it.

    PyTorch's number of threads is afterwards what it was.
    """
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(workers, thread_name_prefix=name,
                                initializer=lambda: torch.set_num_threads(1 if workers > 1 else threads)) as pool:
            yield pool
    finally:
        torch.set_num_threads(threads)


def _squares(values: Tensor, scratch: Tensor, weight: Weight, first: int) -> float | Tensor:
    """Sum of squares: one number, or for a fused matrix one (float64) for each output (of a stack: each expert)."""
    if weight.fused is None:
        return torch.dot(values, values).item()
    squares = torch.mul(values, values, out=scratch).view(-1, weight.columns)
    if weight.fused == "columns":
        return squares.sum(dim=0, dtype=torch.float64)
    by_row = squares.sum(dim=1, dtype=torch.float64)
    rows_each = weight.shape[1] if weight.fused == "experts" else 1
    place = (first // weight.columns + torch.arange(by_row.numel())) // rows_each
    return torch.zeros(weight.shape[0], dtype=torch.float64).index_add_(0, place, by_row)


def _thin_difference(later: Operand, earlier: Operand) -> tuple[Tensor, Tensor] | None:
    """Thin float64 factors of later - earlier where both rest on the same stored weight; else None.

    Equal operands give factors of rank 0.
    """
    if later.slab is None or later.slab != earlier.slab:
        return None
    left = [sign * o.left for o, sign in ((later, 1), (earlier, -1)) if o.left is not None]
    right = [o.right for o in (later, earlier) if o.right is not None]
    if not left:
        return torch.zeros(1, 0), torch.zeros(0, 1)
    return torch.cat(left, dim=1).double(), torch.cat(right, dim=0).double()


def _thin_squares(thin: tuple[Tensor, Tensor], weight: Weight) -> Tensor:
    """As `_squares`, of left @ right: row i has left_i (right right') left_i'."""
    left, right = thin
    if left.shape[1] == 0:
        outputs = () if weight.fused is None else weight.shape[-1:] if weight.fused == "columns" else weight.shape[:1]
        return torch.zeros(outputs, dtype=torch.float64)
    if weight.fused == "columns":
        return (right * ((left.T @ left) @ right)).sum(dim=0).clamp(min=0)
    rows = (left * (left @ (right @ right.T))).sum(dim=1).clamp(min=0)
    return rows.sum() if weight.fused is None else rows


# ---------------------------------------------------------------------------------------------
# spectra of the difference


def _spectrum(stages: Sequence[Stage], weight: Weight, pair: Pair) -> Tensor:
    """Singular values (float64, descending) of a matrix's difference.

    From the Gram matrix of the smaller side, summed in float64 over strips of the other side, or
    from an r x r matrix where the difference has rank r. Values below sqrt(k * eps) of the
    largest, which the Gram matrix cannot tell from zero, are zero.
    """
    later, earlier = (stages[i].operand(weight) for i in pair)
    if (thin := _thin_difference(later, earlier)) is not None:
        left, right = thin
        core = torch.linalg.qr(left, mode="r").R @ torch.linalg.qr(right.T, mode="r").R.T
        values: Tensor = torch.linalg.svdvals(core)
        return values
    rows, columns = weight.shape
    smaller = min(rows, columns)
    strip = max(1, (1 << 20) // smaller)
    gram = torch.zeros(smaller, smaller, dtype=torch.float64)
    read_later, read_earlier = _strips(later), _strips(earlier)
    everything = slice(smaller)
    for lo in range(0, max(rows, columns), strip):
        part = slice(lo, min(lo + strip, max(rows, columns)))  # what is stored may have more rows (a vocabulary)
        where = (part, everything) if columns <= rows else (everything, part)
        difference = read_later(where) - read_earlier(where)
        if columns <= rows:
            difference = difference.T
        gram.addmm_(difference, difference.T)
    values = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt().flip(0)
    floor = math.sqrt(smaller * torch.finfo(torch.float64).eps)
    return torch.where(values > floor * values[0], values, 0.0)


def entries(operand: Operand, weight: Weight) -> Tensor:
    """A stage's whole matrix (rows, columns), in float64."""
    return _strips(operand)((slice(weight.shape[0]), slice(weight.shape[1])))


def _strips(operand: Operand) -> Callable[[tuple[slice, slice]], Tensor]:
    """Function from (rows, columns) to those entries of a stage's weight, in float64."""
    if operand.whole is not None:
        stored = operand.whole
        return lambda where: _wide(stored[where])
    assert operand.slab is not None
    stored = operand.slab.owner.read(operand.slab.name)
    if operand.left is None or operand.right is None:
        return lambda where: _wide(stored[where])
    left, right = operand.left.double(), operand.right.double()
    return lambda where: _wide(stored[where]) + left[where[0]] @ right[:, where[1]]


def _wide(values: Tensor) -> Tensor:
    return values.to(torch.float64)


def spectra_cost(plan: Plan, stages: Sequence[Stage], pairs: Sequence[Pair]) -> float:
    """Rough number of operations that the spectra of all matrices take; thin differences are free."""
    dense = [p for p in pairs if not any(stages[i].adapter is not None for i in p)]
    return len(dense) * sum(2.0 * w.numel * min(w.shape) + 10.0 * min(w.shape) ** 3
                            for w in plan.weights if len(w.shape) == 2)


def similar_runs(matrices: Sequence[tuple[Weight, Sums]]) -> Iterator[list[tuple[Weight, Sums]]]:
    """Runs of matrices of about 2**24 entries together."""
    group: list[tuple[Weight, Sums]] = []
    for matrix in matrices:
        group.append(matrix)
        if sum(w.numel for w, _ in group) >= 1 << 24:
            yield group
            group = []
    if group:
        yield group


def norm_and_rank(chain: Sequence[Stage], weight: Weight, pair: Pair, sums: Sums
                   ) -> tuple[float, float | None]:
    """Spectral norm and effective rank of a matrix's difference; no rank where there is none."""
    if float(sums.difference[pair].sum()) == 0:
        return 0.0, None
    values = _spectrum(chain, weight, pair)
    return float(values[0]), float(metrics.effective_rank_from_singular_values(values))
