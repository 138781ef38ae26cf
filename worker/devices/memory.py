"""The memory that a worker's devices hold, read cheaply and kept at its peak, and the energy that they take.

On CUDA it is what torch allocated and reserved; torch itself keeps the peaks, also within a step. On a CPU, where
nothing counts that, both are the resident bytes of this process, read at every token step. The CPU's part imports no
torch. This module knows no model, no run and no store.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from time import monotonic
from typing import NamedTuple

import psutil

from batchmill.jobs.models.device_memory import DeviceMemory, Memory
from batchmill.worker.devices.nvml import Nvml
from batchmill.worker.devices.selection import CPU, DeviceInfo

#: The driver is asked at most once in this time.
_DRIVER_SECONDS = 1.0


class MemoryReading(NamedTuple):
    """Bytes in use at one moment."""

    allocated: int = 0
    reserved: int = 0

    def or_larger(self, other: MemoryReading) -> MemoryReading:
        """Returns the larger of each."""
        return MemoryReading(max(self.allocated, other.allocated), max(self.reserved, other.reserved))


class MemoryReader:
    """Reads the memory of one torch device: `cpu`, or `cuda:N` as this process counts."""

    def __init__(self, torch_device: str) -> None:
        self._device = torch_device
        self._process = psutil.Process()
        if torch_device != CPU:
            import torch

            self._cuda = torch.cuda

    def read(self) -> MemoryReading:
        """Reads what is in use now; waits for no kernel."""
        if self._device == CPU:
            resident = self._process.memory_info().rss
            return MemoryReading(resident, resident)
        return MemoryReading(self._cuda.memory_allocated(self._device), self._cuda.memory_reserved(self._device))

    def take_peak(self) -> MemoryReading:
        """Returns the peak on CUDA since the last call, and begins a new one at what is in use now."""
        peak = MemoryReading(
            self._cuda.max_memory_allocated(self._device), self._cuda.max_memory_reserved(self._device)
        )
        self._cuda.reset_peak_memory_stats(self._device)
        return peak

    def available_bytes(self) -> int:
        """Bytes that could still be allocated; on a CPU, those that the machine has left."""
        if self._device == CPU:
            return int(psutil.virtual_memory().available)
        now = self.read()
        return self.free_bytes() + now.reserved - now.allocated

    def free_bytes(self) -> int:
        """Bytes that no process holds."""
        if self._device == CPU:
            return int(psutil.virtual_memory().available)
        return int(self._cuda.mem_get_info(self._device)[0])


class _Gauge:
    """One device: its peak between two calls of `take`, and the driver's figures for all of it."""

    def __init__(self, device: DeviceInfo, nvml: Nvml | None) -> None:
        self.uuid = device.uuid
        self._cuda = device.torch_device != CPU
        self._nvml = nvml if device.uuid is not None else None
        self._reader = MemoryReader(device.torch_device)
        self._latest = self._largest = MemoryReading()
        self._joules: float | None = None
        self.memory = DeviceMemory(
            device.written or device.torch_device,
            device.name,
            device.uuid,
            free_at_start_bytes=self._reader.free_bytes(),
            device_total_bytes=device.total_bytes,
        )

    def observe(self) -> None:
        """Reads a CPU's memory now; torch keeps a GPU's peaks by itself."""
        if not self._cuda:
            self._latest = self._reader.read()
            self._largest = self._largest.or_larger(self._latest)

    def take(self) -> DeviceMemory:
        """Returns the peak since the last call, the memory at that moment included."""
        if self._cuda:
            largest = self._reader.take_peak()
        else:
            largest, self._largest = self._largest, self._latest
        return replace(self.memory, peak_allocated_bytes=largest.allocated, peak_reserved_bytes=largest.reserved)

    def hold(self, weights_bytes: int, cache_bytes: int) -> None:
        """Notes the loaded model, and drops the peak of loading it, which belongs to no run."""
        self.memory = replace(self.memory, weights_bytes=weights_bytes, cache_bytes=cache_bytes)
        if self._cuda:
            self._reader.take_peak()

    def ask_driver(self) -> float | None:
        """Notes what all processes hold. Returns the joules since the last call; None where nothing counts them."""
        used = self._nvml.used_bytes(self.uuid) if self._nvml is not None and self.uuid is not None else None
        if used is None:
            used = self.memory.device_total_bytes - self._reader.free_bytes()
        self.memory = replace(self.memory, device_used_bytes=max(0, used))
        now = self._nvml.energy_joules(self.uuid) if self._nvml is not None and self.uuid is not None else None
        before, self._joules = self._joules, now
        return None if now is None else max(0.0, now - (now if before is None else before))


class MemoryMeter:
    """The peak memory of a worker's devices: `observe` at every step, `take` from any thread.

    Each open run keeps the maximum of what `take` returned meanwhile, so that nothing has to be reset for one of
    them. `loaded` is called once the model is there. What is free at the start is read when the meter is made.
    """

    def __init__(self, devices: Sequence[DeviceInfo], *, nvml: Nvml | None = None) -> None:
        self._gauges = [_Gauge(each, nvml) for each in devices]
        self._lock = threading.Lock()
        self._ask_at = 0.0

    def loaded(self, weights_bytes: Sequence[int], cache_bytes: Sequence[int]) -> None:
        """Notes the bytes that the weights take on each device, and those that the KV cache may take."""
        with self._lock:
            for gauge, weights, cache in zip(self._gauges, weights_bytes, cache_bytes, strict=True):
                gauge.hold(weights, cache)

    def observe(self) -> None:
        """Reads the memory now, in microseconds."""
        with self._lock:
            for gauge in self._gauges:
                gauge.observe()

    def take(self) -> Memory:
        """Returns the peak since the last call, the latest if nothing was observed since, and the energy since."""
        with self._lock:
            joules = self._ask_drivers()
            return Memory.of([gauge.take() for gauge in self._gauges], energy_joules=joules)

    def _ask_drivers(self) -> float | None:
        """Asks about once a second; in between a driver has nothing new."""
        if monotonic() < self._ask_at:
            return None
        self._ask_at = monotonic() + _DRIVER_SECONDS
        energies = [joules for gauge in self._gauges if (joules := gauge.ask_driver()) is not None]
        return sum(energies) if energies else None
