"""Which dtype to load in: the one rule behind ``--dtype auto``, for every command.

A 16-bit checkpoint is loaded in 16 bits where this device multiplies faster in them than in
float32, else in float32. That is measured, not looked up: `product_rates` times the model's own
kind of products, forward and backward, for a fraction of a second, once per machine, device and
PyTorch version; the cache folder remembers it. (On a CPU without bfloat16 instructions PyTorch's
bfloat16 is 3 to 70 times slower than float32.)
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from filelock import FileLock

from midblock import ranks
from midblock.errors import OutputError, SettingsError
from midblock.models.products import product_rate
from midblock.writing import cache_dir, sha256_of, write_json

__all__ = ["DTYPES", "DtypeChoice", "choose_dtype", "config_value", "device_name", "dtype_name", "product_rates",
           "resolve_device"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_LOG = logging.getLogger("midblock")
_ROWS = 64
_WIDTHS = (256, 1024)  # layers are timed at their own widths within these: enough to see the rate, and soon done
_SECONDS = 0.12  # of measuring one dtype
_GAIN = 1.1  # how much faster 16-bit products must be to be worth their rounding
_MEMORY_SHARE = 0.8  # of the device's memory that weights may fill


@dataclass(frozen=True)
class DtypeChoice:
    """A dtype and why it was taken."""

    dtype: torch.dtype
    reason: str
    """A clause for people and for run.json, such as ``as asked``."""

    @property
    def name(self) -> str:
        """Such as ``bfloat16``."""
        return dtype_name(self.dtype)


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype's name without the package.

    Example:
        >>> dtype_name(torch.bfloat16)
        'bfloat16'
    """
    return str(dtype).removeprefix("torch.")


def resolve_device(device: str | torch.device = "auto") -> torch.device:
    """``auto`` (CUDA, then MPS, then CPU), ``cpu``, ``cuda``, ``cuda:0``, ``mps``.

    Raises:
        SettingsError: another word, or a device that this machine does not have.
    """
    text = str(device)
    if text == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        found = torch.device(text)
    except RuntimeError:
        found = None
    if found is None or found.type not in ("cpu", "cuda", "mps"):
        raise SettingsError(f"device {text!r} is unknown; use auto, cpu, cuda, cuda:0 or mps.")
    if found.type == "cuda" and not (found.index or 0) < torch.cuda.device_count():
        raise SettingsError(f"device {text!r}: this machine shows {torch.cuda.device_count()} CUDA devices; "
                            f"use {_devices()}.")
    if found.type == "mps" and not torch.backends.mps.is_available():
        raise SettingsError(f"device {text!r} is not available on this machine; use {_devices()}.")
    return found


def _devices() -> str:
    there = ["auto", "cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count())),
             *(["mps"] if torch.backends.mps.is_available() else [])]
    return f"{', '.join(there[:-1])} or {there[-1]}"


def choose_dtype(asked: str | torch.dtype, *, stored: torch.dtype, device: torch.device, config: Any = None,
                 parameters: int = 0, models: int = 1, spread: bool = False, say: bool = True) -> DtypeChoice:
    """The dtype to load in.

    ``auto``: float32 for a checkpoint stored in float32 or wider. For one stored in 16 bits or
    fewer, 16 bits where products of the model's shapes are at least 10% faster in them on this
    device, else float32. Where weights in float32 would fill more than 80% of the device's memory, 16
    bits in any case. "16 bits" is bfloat16 on a CPU; on an accelerator the stored one of the two.

    Args:
        asked: ``auto``, ``float32``, ``bfloat16``, ``float16``, or a torch dtype of these.
        stored: Of the checkpoint; of several, one that holds each exactly.
        device: Where the model will be.
        config: The text config, whose widths are timed; None: widths of a small model.
        parameters: Of one model, for its memory; 0 leaves memory out of account.
        models: How many of them are in memory at once.
        spread: Whether all GPUs hold them together.
        say: Log what ``auto`` took and why (level info, logger ``midblock``).

    Raises:
        SettingsError: another word, or a dtype that the device cannot multiply in.

    Example:
        >>> choose_dtype("auto", stored=torch.float32, device=torch.device("cpu"))
        DtypeChoice(dtype=torch.float32, reason='as stored')
    """
    word = dtype_name(asked) if isinstance(asked, torch.dtype) else asked
    if word != "auto":
        if word not in DTYPES:
            raise SettingsError(f"dtype {word!r} is unknown; use auto, {', '.join(DTYPES)}.")
        if not _can_multiply(DTYPES[word], device):
            raise SettingsError(f"dtype {word}: PyTorch cannot multiply in it on the device {device}; use float32.")
        return DtypeChoice(DTYPES[word], "as asked")
    narrow = stored if device.type != "cpu" and stored == torch.float16 else torch.bfloat16
    can = _can_multiply(narrow, device)
    bytes_needed, memory = 4 * parameters * models, _memory_bytes(device, spread)
    if can and bytes_needed > _MEMORY_SHARE * memory:
        choice = DtypeChoice(narrow, f"{models} x {parameters / 1e9:.1f}B weights in float32 would take "
                                     f"{bytes_needed / 1e9:.0f} of {memory / 1e9:.0f} GB of memory")
    elif stored.itemsize > 2 or not stored.is_floating_point:
        return DtypeChoice(torch.float32, "as stored")
    elif not can:
        choice = DtypeChoice(torch.float32, f"the device {device} cannot multiply in {dtype_name(narrow)}")
    else:
        # measured by each process for itself, rates could fall on either side
        choice = _faster(narrow, ranks.first(lambda: product_rates(config, device, narrow)), device)
    if say:
        _LOG.info("dtype %s: %s", choice.name, choice.reason)
    return choice


def _faster(narrow: torch.dtype, rates: Mapping[str, float], device: torch.device) -> DtypeChoice:
    half, full = rates[dtype_name(narrow)], rates["float32"]
    taken = narrow if half > _GAIN * full else torch.float32
    where = f"{'a core of ' if device.type == 'cpu' else ''}{_machine(device)[0]}"
    return DtypeChoice(taken, f"matrix products on {where} reach {full / 1e9:.3g} GFLOP/s in float32 and "
                              f"{half / 1e9:.3g} in {dtype_name(narrow)}")


def _can_multiply(dtype: torch.dtype, device: torch.device) -> bool:
    if device.type == "cpu":
        return True
    try:
        one = torch.ones(2, 2, dtype=dtype, device=device)
        return bool((one @ one == 2).all())
    except (RuntimeError, TypeError):
        return False


# ---------------------------------------------------------------------------------------------
# what the device does


def config_value(config: Any, name: str) -> Any:
    """An attribute of a config; None where it has none, or one per layer rather than one for all."""
    try:
        return getattr(config, name, None)
    except Exception:  # heterogeneous configs raise an error of their own for a value that differs by layer
        return None


def _product_shapes(config: Any) -> list[tuple[int, int]]:
    """(out, in) of a block's kinds of linear layers, within the widths that are timed."""
    def width(name: str, otherwise: int) -> int:
        value = config_value(config, name)
        return min(max(value if isinstance(value, int) else otherwise, _WIDTHS[0]), _WIDTHS[1])
    hidden = width("hidden_size", _WIDTHS[0])
    inner = width("intermediate_size", 4 * hidden)
    return list(dict.fromkeys([(hidden, hidden), (inner, hidden), (hidden, inner)]))


def product_rates(config: Any, device: torch.device, narrow: torch.dtype = torch.bfloat16) -> dict[str, float]:
    """FLOP/s of a model's products (``x W'`` and the backward pass's ``g W``) in float32 and in ``narrow``.

    Of one core, on a CPU. Remembered in the cache folder by processor, its features, device and PyTorch version.
    """
    shapes = _product_shapes(config)
    key = sha256_of(*_machine(device), torch.__version__, dtype_name(narrow), json.dumps(shapes))
    file = cache_dir() / "product-rates.json"
    known = _read_rates(file)
    if key not in known:
        known[key] = _time_products(shapes, device, narrow)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(file.with_name(".product-rates.lock")):  # two processes remember both of theirs
                write_json(file, {**_read_rates(file), key: known[key]})
        except (OutputError, OSError, NotImplementedError):
            _LOG.debug("%s cannot be written; product rates are measured anew by each process", file)
    return known[key]


def _read_rates(file: Path) -> dict[str, dict[str, float]]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        return {key: {name: float(rate) for name, rate in rates.items()} for key, rates in found.items()
                if set(rates) >= {"float32"}}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}


def _time_products(shapes: list[tuple[int, int]], device: torch.device, narrow: torch.dtype) -> dict[str, float]:
    cpu = device.type == "cpu"
    with _one_thread():
        return {dtype_name(dtype): product_rate(
            dict.fromkeys(shapes, 1), device, dtype, rows=_ROWS if cpu else 16 * _ROWS, seconds=_SECONDS, own_time=cpu)
            for dtype in (torch.float32, narrow)}


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def device_name(device: torch.device) -> str:
    """Such as ``AMD EPYC (AVX512)`` or ``NVIDIA H100 80GB HBM3``; a CPU with its units for bfloat16.

    Example:
        >>> device_name(torch.device("mps"))
        'mps'
    """
    name, features = _machine(device)
    units = [word for word, flag in (("bfloat16", "avx512_bf16"), ("AMX", "amx_bf16")) if flag in features.split()]
    return f"{name.removesuffix(')')}, {', '.join(units)})" if units else name


@functools.lru_cache
def _machine(device: torch.device) -> tuple[str, str]:
    """The device's name for people, and whatever else its products depend on."""
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        return torch.cuda.get_device_name(device), f"compute capability {capability[0]}.{capability[1]}"
    if device.type != "cpu":
        return device.type, platform.platform()
    name, features = platform.processor() or platform.machine(), ""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
                     if ":" in line)
        known = {key.strip(): value.strip() for key, value in lines.items()}
        name = known.get("model name", name)
        features = known.get("flags") or known.get("Features") or ""
    except OSError:
        pass
    instructions = torch.backends.cpu.get_cpu_capability()
    limits = (os.environ.get("ONEDNN_MAX_CPU_ISA", ""), os.environ.get("MKL_ENABLE_INSTRUCTIONS", ""))
    return f"{name} ({instructions})", " ".join((features, *limits))


def _memory_bytes(device: torch.device, spread: bool = False) -> float:
    """The device's whole memory, or that of all: what fits must not depend on what else runs just now."""
    if device.type == "cuda":
        devices = range(torch.cuda.device_count()) if spread else [device]
        return float(sum(torch.cuda.get_device_properties(d).total_memory for d in devices))
    total = float(psutil.virtual_memory().total)
    try:  # a container's own limit; "max" where there is none
        return min(total, float(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii")))
    except (OSError, ValueError):
        return total
