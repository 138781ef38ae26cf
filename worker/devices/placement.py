"""The placement of a worker's model: its devices, what of their memory it may take, and what is offloaded.

Owns how that is written and what contradicts what. Names of devices are the user's, in their order; this process or its
child sees the first of them as cuda:0. It knows no model, no torch, and no free memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from batchmill.jobs.errors import UsageError
from batchmill.jobs.runtime.sizes import bytes_of
from batchmill.worker.devices.selection import AUTO, CPU, check_device

#: Between the devices of one model; a comma is between workers.
TOGETHER = "+"
#: Places other than a computing device where weights wait until their module's turn.
DISK = "disk"
OFFLOADS = (CPU, DISK)


@dataclass(frozen=True, slots=True)
class Placement:
    """The placement of one model."""

    #: One device, or several GPUs that the model is split over.
    devices: tuple[str, ...] = (AUTO,)
    #: Bytes that weights may take, by device, `cpu` among them.
    max_memory: tuple[tuple[str, int], ...] = ()
    #: Module and device, as `device_map_file` has them.
    device_map: tuple[tuple[str, str], ...] = ()
    device_map_file: Path | None = None
    #: `cpu`: what does not fit waits in the CPU's memory; `disk`: in files what does not fit there either.
    offload: str | None = None
    #: The folder of those files.
    offload_folder: Path | None = None

    @classmethod
    def parse(
        cls,
        device: str,
        *,
        max_memory: str | None = None,
        device_map: str | None = None,
        offload: str | None = None,
        offload_folder: str | None = None,
    ) -> Placement:
        """Parses the worker's flags; `device_map` is a JSON file. Raises UsageError, which names what is wrong.

        A limit of the CPU beside a GPU lets weights wait there.
        """
        devices = _devices(device)
        limits = parse_max_memory(max_memory) if max_memory is not None else ()
        if offload is None and CPU in dict(limits) and devices != (CPU,):
            offload = CPU
        placement = cls(
            devices,
            limits,
            _read_map(Path(device_map), cls(devices).names) if device_map is not None else (),
            Path(device_map).absolute() if device_map is not None else None,
            offload,
            Path(offload_folder).absolute() if offload_folder is not None else None,
        )
        placement._check()
        return placement

    @property
    def written(self) -> str:
        """The devices as they are written after --device."""
        return TOGETHER.join(self.devices)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the devices in the other flags: `auto` may turn out to be cuda:0."""
        return tuple("cuda:0" if each == AUTO else each for each in self.devices)

    @property
    def plain(self) -> bool:
        """True where the whole model goes to one device, and nothing has to be worked out."""
        return len(self.devices) == 1 and not (self.max_memory or self.device_map or self.offload)

    @property
    def offloads(self) -> bool:
        """True where weights may wait where nothing is computed with them."""
        places = {place for _, place in self.device_map}
        return self.offload is not None or DISK in places or (CPU in places and self.devices != (CPU,))

    def seen(self, device: str) -> str:
        """The name that a device has in the process that sees these alone: `cuda:1`, `cpu` or `disk`."""
        return f"cuda:{self.names.index(device)}" if device in self.names and device != CPU else device

    def command_line(self) -> list[str]:
        """The flags of `batchmill worker` for this placement."""
        words = ["--device", self.written]
        if self.max_memory:
            words += ["--max-memory", ",".join(f"{device}={count}B" for device, count in self.max_memory)]
        if self.device_map_file is not None:
            words += ["--device-map", str(self.device_map_file)]
        if self.offload is not None:
            words += ["--offload", self.offload]
        if self.offload_folder is not None:
            words += ["--offload-folder", str(self.offload_folder)]
        return words

    def to_json(self) -> str:
        """Returns the placement as JSON text."""
        return json.dumps(asdict(self), default=str)

    @classmethod
    def from_json(cls, text: str) -> Placement:
        """The inverse of `to_json`; an unknown key is refused."""
        value = json.loads(text)
        for name in ("max_memory", "device_map"):
            value[name] = tuple((key, each) for key, each in value[name])
        for name in ("device_map_file", "offload_folder"):
            value[name] = None if value[name] is None else Path(value[name])
        return cls(tuple(value.pop("devices")), **value)

    def _check(self) -> None:
        _refuse_unknown((device for device, _ in self.max_memory), self.names)
        if self.device_map and (self.max_memory or self.offload):
            raise UsageError("--device-map says where everything goes: leave out --max-memory and --offload")
        if self.offload is not None and self.offload not in OFFLOADS:
            raise UsageError(f"--offload takes {' or '.join(OFFLOADS)}, not {self.offload!r}")
        if self.offload == CPU and self.devices == (CPU,):
            raise UsageError("--offload cpu: the model is on the CPU already; use --offload disk")
        on_disk = self.offload == DISK or any(place == DISK for _, place in self.device_map)
        if on_disk and self.offload_folder is None:
            raise UsageError("weights that are offloaded to disk need a folder: name one with --offload-folder")
        if self.offload_folder is not None and not on_disk:
            raise UsageError("--offload-folder goes with --offload disk")


def parse_each(
    workers: Sequence[str], *, max_memory: str | None = None, device_map: str | None = None, **others: str | None
) -> list[Placement]:
    """Parses a placement for each worker, with the limits of its own devices and of the CPU. Raises UsageError."""
    if len(workers) > 1 and device_map is not None:
        raise UsageError("--device-map places one model: give one worker's devices, such as --device cuda:0+cuda:1")
    names = {each: Placement(_devices(each)).names for each in workers}
    limits = {part: part.partition("=")[0] for part in max_memory.split(",")} if max_memory is not None else {}
    _refuse_unknown(limits.values(), [name for each in names.values() for name in each])
    placements = []
    for each in workers:
        own = [part for part, device in limits.items() if device in (*names[each], CPU)]
        placements.append(Placement.parse(each, max_memory=",".join(own) or None, device_map=device_map, **others))
    return placements


def _refuse_unknown(named: Iterable[str], names: Sequence[str]) -> None:
    known = dict.fromkeys((*names, CPU))
    for device in named:
        if device not in known:
            raise UsageError(f"--max-memory names {device}, and there are {', '.join(known)} here")


def each_worker(written: str) -> list[str]:
    """The devices of each worker of `0,1`, `cuda:0,cpu` or `0+1,2+3`. Raises UsageError."""
    workers = [TOGETHER.join(f"cuda:{part}" if part.isdigit() else part for part in each.split(TOGETHER))
               for each in written.split(",")]  # fmt: skip
    named = [device for each in workers for device in each.split(TOGETHER)]
    if len(set(named)) != len(named) or not all(named):
        raise UsageError(f"--devices takes different devices, such as 0,1 or 0+1,2+3 or all, not {written!r}")
    return workers


def parse_max_memory(written: str) -> tuple[tuple[str, int], ...]:
    """The bytes of `cuda:0=20GiB,cpu=60GiB`, by device. Raises UsageError."""
    limits: dict[str, int] = {}
    for part in written.split(","):
        device, equals, size = part.partition("=")
        if not equals:
            raise UsageError(f"--max-memory takes DEVICE=SIZE, such as cuda:0=20GiB,cpu=60GiB, not {part!r}")
        check_device(device)
        if device in limits:
            raise UsageError(f"--max-memory names {device} twice")
        try:
            limits[device] = bytes_of(size)
        except UsageError as error:
            raise UsageError(f"--max-memory {device}: {error}") from None
    return tuple(limits.items())


def _devices(written: str) -> tuple[str, ...]:
    devices = tuple("cuda:0" if each == "cuda" else each for each in written.split(TOGETHER))
    for each in devices:
        check_device(each)
    if len(devices) > 1 and {AUTO, CPU} & set(devices):
        raise UsageError(f"a model is split over GPUs alone, such as cuda:0+cuda:1, not over {written}")
    if len(set(devices)) != len(devices):
        raise UsageError(f"a device is named twice in {written}")
    return devices


def _read_map(file: Path, devices: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """Reads a JSON object of module and device: one of `devices`, `cpu` or `disk`. Raises UsageError."""
    try:
        device_map = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"--device-map {file}: {error.strerror or error}") from error
    except ValueError as error:
        raise UsageError(f"--device-map {file} is no JSON: {error}") from error
    if not isinstance(device_map, dict) or not device_map:
        raise UsageError(f'--device-map {file} must be an object of module and device: {{"model.layers.0": "cuda:0"}}')
    allowed = dict.fromkeys((*devices, *OFFLOADS))
    for module, place in device_map.items():
        if not isinstance(place, str) or place not in allowed:
            raise UsageError(
                f"--device-map {file}: {module or 'the whole model'} is on {place!r}, which is not among "
                f"{', '.join(allowed)}"
            )
    return tuple(device_map.items())
