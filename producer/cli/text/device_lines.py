"""The memory that a job or a worker held on its devices, as lines for people."""

from __future__ import annotations

from collections.abc import Sequence

from batchmill.jobs.models.device_memory import DeviceMemory, Memory
from batchmill.jobs.runtime.sizes import size

_JOULES_PER_KWH = 3_600_000


def device_line(device: DeviceMemory, *, now: bool = False) -> str:
    """One device: the most that the worker held there, and the use by all processes, at most or when last seen."""
    name = " ".join(dict.fromkeys((device.device, device.name)))
    return (
        f"{name}: {size(device.weights_bytes)} weights, {size(device.cache_bytes)} cache,"
        f" peak {size(device.peak_allocated_bytes)} allocated, {size(device.peak_reserved_bytes)} reserved;"
        f" {'' if now else 'at most '}{size(device.device_used_bytes)} of {size(device.device_total_bytes)} in use,"
        f" {size(device.free_at_start_bytes)} free before loading"
    )


def memory_lines(memory: Memory) -> list[tuple[str, str]]:
    """A title and a line for each device of a job that ran on GPUs, and one for the energy, where it was measured."""
    gpus: Sequence[DeviceMemory] = [each for each in memory.devices if each.uuid is not None]
    lines = [("device", device_line(each)) for each in gpus]
    if memory.energy_joules is not None:
        joules = memory.energy_joules
        lines.append(("energy", f"{joules:,.0f} J ({joules / _JOULES_PER_KWH:.4f} kWh) of the whole GPU"))
    return lines
