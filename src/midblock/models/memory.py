"""Memory that a model may still take on its device, whatever limits it."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch

__all__ = ["free_memory", "resident_memory"]

_CGROUP = Path("/sys/fs/cgroup")


def resident_memory() -> int:
    """Bytes of memory that this process has in use now."""
    return int(psutil.Process().memory_info().rss)


def free_memory(device: torch.device) -> int:
    """Bytes that can still be taken: of a GPU, or of the machine within its container and the process's own limit."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(min([psutil.virtual_memory().available, *_container(), *_own_limit()]))


def _container(folder: Path | None = None) -> list[int]:
    """What a container leaves (Linux control groups, version 2); pages of files it can give back count as free."""
    folder = _CGROUP if folder is None else folder
    try:
        limit = int((folder / "memory.max").read_text(encoding="ascii"))
        used = int((folder / "memory.current").read_text(encoding="ascii"))
        kinds = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="ascii").splitlines())
    except (OSError, ValueError):  # none, "max", or another system
        return []
    return [max(0, limit - used + int(kinds.get("inactive_file", 0)) + int(kinds.get("active_file", 0)))]


def _own_limit() -> list[int]:
    """What the limit of this process's address space leaves (``ulimit -v``)."""
    try:
        import resource
    except ImportError:  # Windows
        return []
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft == resource.RLIM_INFINITY:
        return []
    return [max(0, soft - int(psutil.Process().memory_info().vms))]
