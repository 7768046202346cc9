"""From a device to the host without waiting: results are copied as they come and put in place when somebody looks.

A copy from an accelerator to the CPU that waits (``.cpu()``, ``.item()``) makes the device idle until the host has
given it new work. Here copies go into pinned memory behind the work that makes them, and one wait serves many.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["Arrivals", "to_device"]

_LIMIT = 256 << 20  # bytes on the way, after which they are put in place


class Arrivals:
    """Pieces of CPU tensors that come from a device.

    Args:
        wait: Whether pieces are kept until `settle` even where they are on the CPU already (for tests).
        limit: Bytes on the way before they are put in place by themselves.
    """

    def __init__(self, *, wait: bool = False, limit: int = _LIMIT) -> None:
        self._wait, self._limit, self._bytes = wait, limit, 0
        self._coming: list[tuple[Tensor, Any, Tensor]] = []
        self._devices: set[torch.device] = set()

    def put(self, target: Tensor, where: Any, values: Tensor) -> None:
        """``target[where] = values``, at the latest in `settle`.

        Args:
            target: On the CPU.
            where: An index of it.
            values: On any device, of any dtype; they may change afterwards.
        """
        if values.device.type == "cpu" and not self._wait:
            target[where] = values.to(target.dtype)
            return
        copy = values.to(target.dtype).to("cpu", non_blocking=True, copy=True)
        self._coming.append((target, where, copy))
        self._devices.add(values.device)
        self._bytes += copy.numel() * copy.element_size()
        if self._bytes >= self._limit:
            self.settle()

    def settle(self) -> None:
        """Wait for the devices once, and put in place what came."""
        for device in self._devices:
            if device.type != "cpu":
                torch.accelerator.synchronize(device)
        for target, where, values in self._coming:
            target[where] = values
        self._coming.clear()
        self._devices.clear()
        self._bytes = 0


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on a device; to a GPU through pinned memory, without waiting."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
