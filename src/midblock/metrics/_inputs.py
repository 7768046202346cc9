"""Checks and padding shared by the metrics of this room."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import torch
from torch import Tensor

from midblock.errors import UndefinedMetricError

# Samples are worked on in chunks of about this many bytes: elementwise chains over a whole
# batch run at the speed of main memory, over a chunk at that of the cache (3x on a CPU).
_CHUNK_BYTES = 2 << 20


class FiniteChecks:
    """Whether what was checked on accelerators is finite: known to the device, asked by the host in `settle`."""

    def __init__(self, *, everywhere: bool) -> None:
        self._everywhere = everywhere
        self._fine: dict[tuple[str, torch.device], Tensor] = {}
        self._broken: str | None = None

    def takes(self, x: Tensor) -> bool:
        """Whether a tensor's check waits."""
        return self._everywhere or x.device.type != "cpu"

    def add(self, name: str, fine: Tensor) -> None:
        """A truth value on a device."""
        key = (name, fine.device)
        self._fine[key] = fine & self._fine[key] if key in self._fine else fine

    def settle(self) -> None:
        """Wait for the devices, and raise ValueError where something was not finite, each time anew."""
        for (name, _), value in self._fine.items():
            if self._broken is None and not bool(value):
                self._broken = name
        self._fine.clear()
        _require(self._broken is None, self._broken or "")


_together: ContextVar[FiniteChecks | None] = ContextVar("midblock_finite_checks", default=None)


@contextlib.contextmanager
def finite_checks_together(*, everywhere: bool = False) -> Iterator[FiniteChecks]:
    """Within the context tensors on accelerators are checked for NaN and infinity all at once at its end.

    A check by itself makes the host wait for the device.

    Args:
        everywhere: On the CPU too (for tests).
    """
    checks = FiniteChecks(everywhere=everywhere)
    token = _together.set(checks)
    try:
        yield checks
        checks.settle()
    finally:
        _together.reset(token)


def _require(fine: bool, name: str) -> None:
    if not fine:
        raise ValueError(f"{name} holds NaN or infinity; the states it came from are broken.")


def require_finite(x: Tensor, name: str) -> None:
    """Raise ValueError if ``x`` is empty or holds NaN or infinity; see `finite_checks_together`.

    ``aminmax`` carries NaN through and needs one read and no temporary.
    """
    if x.numel() == 0:
        raise ValueError(f"{name} is empty (shape {tuple(x.shape)}).")
    low, high = torch.aminmax(x)
    fine = torch.isfinite(low) & torch.isfinite(high)
    if (checks := _together.get()) is not None and checks.takes(x):
        checks.add(name, fine)
    else:
        _require(bool(fine), name)


def floating(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """``x`` in ``dtype``; by default float64 stays and everything else becomes float32.

    Half types are only a storage format here: sums over them would lose most digits.
    """
    if dtype is None:
        dtype = torch.float64 if x.dtype in (torch.float64, torch.int64, torch.int32) else torch.float32
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"dtype {dtype} is not supported; use torch.float32 or torch.float64.")
    if x.is_complex():
        raise ValueError("complex features are not supported.")
    return x.to(dtype)


def features(x: Tensor, name: str = "x", dtype: torch.dtype | None = torch.float64) -> Tensor:
    """Checked (*, n, d) features in the working dtype."""
    if x.ndim < 2:
        raise ValueError(f"{name} has shape {tuple(x.shape)}; features need at least two dims (n, d).")
    require_finite(x, name)
    return floating(x, dtype)


def norms(x: Tensor, *, dim: int = -1, keepdim: bool = False) -> Tensor:
    """Euclidean norms along ``dim``."""
    result: Tensor = torch.linalg.vector_norm(x, dim=dim, keepdim=keepdim)
    return result


def dots(x: Tensor, y: Tensor) -> Tensor:
    """Inner products along the last dim."""
    result: Tensor = torch.linalg.vecdot(x, y)
    return result


def symmetric_eigenvalues(x: Tensor) -> Tensor:
    """Eigenvalues of symmetric positive semidefinite matrices, ascending, rounding below 0 cut."""
    result: Tensor = torch.linalg.eigvalsh(x)
    return result.clamp_min(0)


def matching(x: Tensor, y: Tensor, what: str) -> None:
    """Raise ValueError unless two tensors have one shape."""
    if x.shape != y.shape:
        raise ValueError(f"{what} have shapes {tuple(x.shape)} and {tuple(y.shape)}; they must be equal.")


def safe_scale(x: Tensor) -> Tensor:
    """``x`` divided by the largest absolute entry of each (n, d) matrix (all-zero: unchanged).

    For scale-free quantities: squares then neither overflow nor vanish.
    """
    top = x.abs().amax(dim=(-2, -1), keepdim=True)
    return x / torch.where(top > 0, top, torch.ones_like(top))


def unit_largest_entry(x: Tensor) -> Tensor:
    """Vectors along the last dim divided by their largest absolute entry (all-zero: unchanged)."""
    top = x.abs().amax(dim=-1, keepdim=True)
    return x / torch.where(top > 0, top, torch.ones_like(top))


def in_safe_range(squares: Tensor) -> bool:
    """Whether sums of squares are far from overflow and underflow, so that no scaling is needed.

    Never known of an accelerator's without waiting for it, where scaling costs less than that.
    """
    if squares.device.type != "cpu":
        return False
    low, high = torch.aminmax(squares)
    return bool((low > 1e-25) & (high < 1e30))


def scalar_or_raise(values: Tensor, batched: bool, reason: str) -> Tensor:
    """NaN marks undefined entries of a batch; a single undefined value is an error."""
    if not batched and bool(torch.isnan(values).any()):
        raise UndefinedMetricError(reason)
    return values


def bootstrap_weights(weights: Tensor, n: int, dtype: torch.dtype) -> Tensor:
    """Checked (B, n) resampling weights, non-negative, each row with a positive sum."""
    if weights.ndim != 2 or weights.shape[1] != n:
        raise ValueError(f"weights have shape {tuple(weights.shape)}; expected (replicates, {n}).")
    require_finite(weights, "weights")
    w = weights.to(dtype)
    if bool((w < 0).any()) or bool((w.sum(1) <= 0).any()):
        raise ValueError("weights must be non-negative, and every replicate needs a positive sum.")
    return w


def lengths_and_order(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Number of valid rows per sample of (B, T, d), and for a mask with gaps a gather order."""
    batch, rows, _ = x.shape
    if mask is None:
        return torch.full((batch,), rows), None
    keep = mask.to(torch.bool)  # where it is: of a mask on the CPU nothing need be asked of a device
    lengths = keep.sum(1)
    packed = torch.arange(rows, device=keep.device) < lengths[:, None]
    if bool((keep == packed).all()):
        return lengths, None
    return lengths, torch.argsort((~keep).to(torch.uint8), dim=1, stable=True).to(x.device)


def unpadded_chunks(x: Tensor, mask: Tensor | None, dtype: torch.dtype | None, name: str,
                    others: tuple[Tensor, ...] = (),
                    ) -> Iterator[tuple[Tensor, int, tuple[Tensor, ...]]]:
    """Samples of equal length, padding removed, in chunks that fit the cache.

    Args:
        x: (B, T, d).
        mask: (B, T), true where a row is real, best on the CPU; None: all rows are. Padding may stand left,
            right or between, and may hold anything, also NaN.
        dtype: Working dtype (None: see `floating`).
        name: For error messages.
        others: Further (B, T, d) tensors, cut in the same way.

    Yields:
        Indices (g) of the samples, their length T_i (samples without any row come as 0
        with an empty tuple), and the (g, T_i, d) tensors.
    """
    lengths, order = lengths_and_order(x, mask)
    known = lengths.tolist()
    groups: dict[int, list[int]] = {}
    for sample, length in enumerate(known):
        groups.setdefault(length, []).append(sample)
    def index_of(samples: list[int]) -> Tensor:
        index = torch.tensor(samples)
        return index.pin_memory().to(x.device, non_blocking=True) if x.device.type == "cuda" else index.to(x.device)

    for length, members in groups.items():
        if length == 0:
            yield index_of(members), 0, ()
            continue
        step = max(1, _CHUNK_BYTES // max(1, length * x.shape[-1] * 4)) if x.device.type == "cpu" \
            else len(members)
        for start in range(0, len(members), step):
            chosen = members[start:start + step]
            contiguous = chosen[-1] - chosen[0] + 1 == len(chosen)
            index = index_of(chosen)
            cut: list[Tensor] = []
            for tensor in (x, *others):
                part = tensor[chosen[0]:chosen[-1] + 1] if contiguous else tensor[index]
                if order is None:
                    part = part[:, :length]
                else:
                    take = order[index, :length, None].expand(-1, -1, part.shape[-1])
                    part = part.gather(1, take)
                require_finite(part, name)
                cut.append(floating(part, dtype))
            yield index, length, tuple(cut)


def as_batch(x: Tensor, mask: Tensor | None, name: str = "x") -> tuple[Tensor, Tensor | None, torch.Size]:
    """(*, T, d) and (*, T) flattened to one batch dim, and the leading shape ``*``."""
    if x.ndim < 2:
        raise ValueError(f"{name} has shape {tuple(x.shape)}; token states need at least (tokens, d).")
    if x.numel() == 0:
        raise ValueError(f"{name} is empty (shape {tuple(x.shape)}).")
    if mask is not None and mask.shape != x.shape[:-1]:
        raise ValueError(f"mask has shape {tuple(mask.shape)}; {name} of shape {tuple(x.shape)} needs "
                         f"{tuple(x.shape[:-1])}.")
    lead = x.shape[:-2]
    flat_mask = None if mask is None else mask.reshape(-1, x.shape[-2])
    return x.reshape(-1, *x.shape[-2:]), flat_mask, lead


def mask_from_lengths(lengths: Tensor, rows: int) -> Tensor:
    """(*, T) mask of right-padded samples from their lengths (*)."""
    if bool((lengths < 0).any()) or bool((lengths > rows).any()):
        raise ValueError(f"lengths must lie in 0..{rows}.")
    return torch.arange(rows, device=lengths.device) < lengths[..., None]


def resolve_mask(x: Tensor, mask: Tensor | None, lengths: Tensor | None) -> Tensor | None:
    """The mask given, or that of ``lengths``; both at once is an error."""
    if lengths is None:
        return mask
    if mask is not None:
        raise ValueError("give a mask or lengths, not both.")
    return mask_from_lengths(torch.as_tensor(lengths, device=x.device), x.shape[-2])
