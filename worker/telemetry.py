"""How much memory the device holds: read cheaply, at every token step, and remembered at its largest.

On CUDA it is what torch allocated and reserved; on a CPU, where nobody counts that, both are the resident bytes of
this process. None of torch's own statistics is reset, and a CPU's part imports no torch. This module knows no
model, no run and no store.
"""

from __future__ import annotations

import threading
from typing import NamedTuple

import psutil

from jobs.schema import Memory
from worker.devices import CPU, DeviceInfo


class Reading(NamedTuple):
    """Bytes in use at one moment."""

    allocated: int = 0
    reserved: int = 0

    def or_larger(self, other: Reading) -> Reading:
        """The larger of each."""
        return Reading(max(self.allocated, other.allocated), max(self.reserved, other.reserved))


class MemoryReader:
    """Reads the memory of one torch device: `cpu`, or `cuda:N` as this process counts."""

    def __init__(self, torch_device: str) -> None:
        self._device = torch_device
        self._process = psutil.Process()
        if torch_device != CPU:
            import torch

            self._cuda = torch.cuda

    def read(self) -> Reading:
        """What is in use now; takes a few microseconds and waits for no kernel."""
        if self._device == CPU:
            resident = self._process.memory_info().rss
            return Reading(resident, resident)
        return Reading(self._cuda.memory_allocated(self._device), self._cuda.memory_reserved(self._device))

    def available_bytes(self) -> int:
        """What could still be allocated; on a CPU that is what the machine has left."""
        if self._device == CPU:
            return int(psutil.virtual_memory().available)
        now = self.read()
        return self._cuda.mem_get_info(self._device)[0] + now.reserved - now.allocated


class MemoryMeter:
    """The largest memory since it was last asked: `observe` at every step, `take` from any thread.

    Each open run keeps the maximum of what `take` returned meanwhile, so that nothing has to be reset for one of
    them. `weights_bytes` is set once the model is loaded.
    """

    def __init__(self, device: DeviceInfo) -> None:
        self.weights_bytes = 0
        self._total_bytes = device.total_bytes
        self._reader = MemoryReader(device.torch_device)
        self._lock = threading.Lock()
        self._latest = self._largest = Reading()

    def observe(self) -> None:
        """Reads the memory now."""
        now = self._reader.read()
        with self._lock:
            self._latest = now
            self._largest = self._largest.or_larger(now)

    def take(self) -> Memory:
        """The largest bytes observed since the last call; the latest if nothing was observed since."""
        with self._lock:
            largest, self._largest = self._largest, self._latest
        return Memory(self.weights_bytes, largest.allocated, largest.reserved, self._total_bytes)
