"""The memory of a worker's devices: bytes of each and of all together, and the energy they took.

Two values are joined by the larger of each number. Nothing here reads a device.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """Bytes on one device. Peaks are torch's own on CUDA; on a CPU the process's resident bytes."""

    #: As the worker's user wrote it, such as cuda:1.
    device: str
    name: str
    uuid: str | None = None
    #: Of the model's tensors there.
    weights_bytes: int = 0
    #: For keys and values there, at most.
    cache_bytes: int = 0
    peak_allocated_bytes: int = 0
    peak_reserved_bytes: int = 0
    #: Before the model was loaded.
    free_at_start_bytes: int = 0
    #: Of all processes together.
    device_used_bytes: int = 0
    device_total_bytes: int = 0

    @property
    def key(self) -> tuple[str, str]:
        """The key that tells it from others: a GPU's UUID, or else `device`, and its name."""
        return self.uuid or self.device, self.name

    def or_larger(self, other: DeviceMemory) -> DeviceMemory:
        """The larger of each number."""
        return replace(self, **{name: max(getattr(self, name), getattr(other, name)) for name in _NUMBERS})


_NUMBERS = tuple(each.name for each in fields(DeviceMemory) if each.name.endswith("_bytes"))


@dataclass(frozen=True, slots=True)
class Memory:
    """The sums over a worker's devices, and each of them."""

    weights_bytes: int = 0
    peak_allocated_bytes: int = 0
    peak_reserved_bytes: int = 0
    device_total_bytes: int = 0
    devices: tuple[DeviceMemory, ...] = ()
    #: Taken by the devices meanwhile, whoever worked on them; None where nobody measures it.
    energy_joules: float | None = None

    @classmethod
    def of(cls, devices: Iterable[DeviceMemory], *, energy_joules: float | None = None) -> Memory:
        """The memory of these devices together."""
        listed = tuple(devices)
        return cls(
            sum(each.weights_bytes for each in listed),
            sum(each.peak_allocated_bytes for each in listed),
            sum(each.peak_reserved_bytes for each in listed),
            sum(each.device_total_bytes for each in listed),
            listed,
            energy_joules,
        )

    @property
    def is_known(self) -> bool:
        """False while nothing was measured."""
        return any((self.weights_bytes, self.peak_allocated_bytes, self.peak_reserved_bytes, self.device_total_bytes))

    def and_then(self, later: Memory, *, part: float = 1.0) -> Memory:
        """This period and the next as one: the larger bytes, and this energy plus `part` of the later."""
        joules = self.energy_joules
        if later.energy_joules is not None:
            joules = (joules or 0.0) + part * later.energy_joules
        return Memory(
            max(self.weights_bytes, later.weights_bytes),
            max(self.peak_allocated_bytes, later.peak_allocated_bytes),
            max(self.peak_reserved_bytes, later.peak_reserved_bytes),
            max(self.device_total_bytes, later.device_total_bytes),
            largest((*self.devices, *later.devices)),
            joules,
        )


def largest(devices: Iterable[DeviceMemory]) -> tuple[DeviceMemory, ...]:
    """Each device once, in the order in which they first appear, with the largest of its numbers."""
    by_key: dict[tuple[str, str], DeviceMemory] = {}
    for each in devices:
        known = by_key.get(each.key)
        by_key[each.key] = each if known is None else known.or_larger(each)
    return tuple(by_key.values())


def devices_json(devices: Iterable[DeviceMemory]) -> list[dict[str, Any]]:
    """Ready for json: an object for each device."""
    return [asdict(each) for each in devices]


def devices_text(devices: Sequence[DeviceMemory]) -> str | None:
    """The JSON text that the store keeps; None for no devices."""
    return json.dumps(devices_json(devices), separators=(",", ":")) if devices else None


def largest_of_texts(texts: Iterable[str]) -> tuple[DeviceMemory, ...]:
    """`largest` over many texts of the store. A job has thousands, so only the result is made into values."""
    by_key: dict[tuple[str, str], dict[str, Any]] = {}
    for text in texts:
        for each in json.loads(text):
            known = by_key.setdefault((each["uuid"] or each["device"], each["name"]), each)
            for name in _NUMBERS:
                if each[name] > known[name]:
                    known[name] = each[name]
    return tuple(DeviceMemory(**each) for each in by_key.values())


def devices_from_text(text: str | None) -> tuple[DeviceMemory, ...]:
    """The inverse of `devices_text`; an unknown key is refused."""
    return () if text is None else tuple(DeviceMemory(**each) for each in json.loads(text))
