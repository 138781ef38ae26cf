"""The devices that a worker works on: the mask that its parent sets, and what its child finds behind it.

The parent's part imports no torch; the child sees its own devices alone, so for it the first is `cuda:0`, or `cpu`.
This module knows no model, no memory in use and no process but the one short probe.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import psutil

from batchmill.jobs.errors import ModelError, UsageError

AUTO, CPU = "auto", "cpu"
_PROBE = "import torch; print(torch.cuda.device_count())"
_UUIDS = "import torch; print(*(torch.cuda.get_device_properties(i).uuid for i in range(torch.cuda.device_count())))"
#: The longest that importing torch takes, also on a cold and slow disk.
_PROBE_SECONDS = 300
#: A GPU's UUID or the beginning of it, or that of a part of one.
_UUID = r"(?:GPU|MIG)-[\w./-]+"
_DEVICE = re.compile(rf"auto|cpu|cuda(?::\d+)?|{_UUID}")
_NO_TORCH = "torch is not installed here: pip install 'batchmill[worker]'"
_ALLOCATION_FAILURES = (
    "out of memory",
    "can't allocate memory",
    "not enough memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)
_DEVICE_FAILURES = ("CUDA error", "CUDA driver", "cuDNN error", "CUBLAS_STATUS_", "ECC error", "NVML")


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """A device that a process works on."""

    name: str
    #: Tells GPUs apart; None for a CPU.
    uuid: str | None
    #: Its memory; for a CPU, the machine's.
    total_bytes: int
    torch_device: str
    #: The user's name for it, who counts other devices than this process does; empty for torch's.
    written: str = ""


def check_device(written: str) -> None:
    """Raises UsageError for what is no spelling of a device."""
    if _DEVICE.fullmatch(written) is None:
        raise UsageError(
            f"unknown device {written!r}; use auto, cpu, cuda, cuda:N such as cuda:0, or a UUID such as GPU-5f1d9c60"
        )


def visible_devices(devices: Sequence[str], environ: Mapping[str, str]) -> str:
    """The CUDA_VISIBLE_DEVICES that shows these alone, in their order: `auto`, `cpu`, `cuda`, `cuda:N` or UUIDs.

    N counts within the mask that is set already, whose entries may be indices or UUIDs; a UUID must be among them.
    `auto` is the first device, or none if the mask shows none. Raises UsageError for another spelling, for what is
    beyond the mask and for one device that is named twice.
    """
    mask = environ.get("CUDA_VISIBLE_DEVICES")
    shown = [_entry(each, mask) for each in devices]
    if len(set(shown)) != len(shown):
        raise UsageError(f"{' and '.join(devices)} are not different devices in CUDA_VISIBLE_DEVICES={mask!r}")
    return ",".join(shown)


def _entry(device: str, mask: str | None) -> str:
    """The entry of one device in a mask of its own."""
    check_device(device)
    if device == CPU:
        return ""
    if device.startswith(("GPU-", "MIG-")):
        return device if mask is None else _of_uuid(device, mask)
    place = int(device.partition(":")[2] or 0)
    if mask is None:
        return str(place)
    shown = _entries(mask)
    if place < len(shown):
        return shown[place]
    if device == AUTO:
        return ""
    raise UsageError(
        f"device {device} is beyond CUDA_VISIBLE_DEVICES={mask!r}, which shows {len(shown)}: "
        "choose a smaller number or widen the mask"
    )


def _of_uuid(uuid: str, mask: str) -> str:
    """The entry of a mask that shows the device of this UUID; either may be only the beginning of it.

    A short process asks torch what the numbers of a mask stand for. Raises UsageError and ModelError.
    """
    shown = _entries(mask)
    matching = [each for each in shown if each.startswith(uuid) or uuid.startswith(each)]
    if not matching and any(each.isdigit() for each in shown):
        uuids = [f"GPU-{each}" for each in _probe(_UUIDS).split()]
        matching = [entry for entry, each in zip(shown, uuids, strict=False) if each.startswith(uuid)]
    if len(matching) == 1:
        return matching[0] if matching[0].isdigit() else max(matching[0], uuid, key=len)
    how = "more than one device" if matching else "no device"
    raise UsageError(f"device {uuid} is {how} of CUDA_VISIBLE_DEVICES={mask!r}; name it in full, or widen the mask")


def _entries(mask: str) -> list[str]:
    """The devices that a mask shows; CUDA ignores everything from the first invalid one on."""
    shown = []
    for entry in mask.split(","):
        if entry.strip() in ("", "-1"):
            break
        shown.append(entry.strip())
    return shown


def describe_devices(devices: Sequence[str], environ: Mapping[str, str] = os.environ) -> tuple[DeviceInfo, ...]:
    """Describes the devices of this process; its mask in `environ` is that of `visible_devices(devices)`.

    Raises ModelError if CUDA was asked for and there is none, or if torch is not installed. `cpu` imports no torch.
    """
    if tuple(devices) == (CPU,):
        return (_cpu(),)
    try:
        import torch
    except ImportError as error:
        raise ModelError(_NO_TORCH) from error
    if not torch.cuda.is_available() and tuple(devices) == (AUTO,):
        return (_cpu(),)
    visible = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if visible < len(devices):
        raise ModelError(
            f"device {'+'.join(devices)}: torch {torch.__version__} sees {visible or 'no such'} CUDA device"
            f"{'s' if visible > 1 else ''}; look at nvidia-smi and at the installed torch, or use --device cpu"
        )
    entries = _entries(environ.get("CUDA_VISIBLE_DEVICES", ""))
    return tuple(_cuda(place, written, entries) for place, written in enumerate(devices))


def _cuda(place: int, written: str, entries: Sequence[str]) -> DeviceInfo:
    """Describes one CUDA device; the mask's name of a MIG tells it from others of its GPU, as torch's UUID may not."""
    import torch

    properties = torch.cuda.get_device_properties(place)
    mig = place < len(entries) and entries[place].startswith("MIG-")
    uuid = entries[place] if mig else f"GPU-{properties.uuid}"
    device = f"cuda:{place}"
    return DeviceInfo(properties.name, uuid, properties.total_memory, device, device if written == AUTO else written)


def _cpu() -> DeviceInfo:
    return DeviceInfo(CPU, None, psutil.virtual_memory().total, CPU, CPU)


def use_all_cores() -> None:
    """Lets torch compute on every physical core that this process may use, unless OMP_NUM_THREADS says otherwise."""
    import torch

    if "OMP_NUM_THREADS" not in os.environ:
        allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(min(allowed, psutil.cpu_count(logical=False) or allowed))


def all_cuda_devices() -> list[str]:
    """`cuda:0`, `cuda:1` and so on, as many as torch sees here; counted by a short process of its own.

    Raises ModelError if that process fails.
    """
    return [f"cuda:{index}" for index in range(int(_probe(_PROBE)))]


def _probe(script: str) -> str:
    """Returns what a script prints in a short process, where it may import torch. Raises ModelError if it fails."""
    try:
        probe = subprocess.run(
            [sys.executable, "-P", "-c", script], capture_output=True, text=True, timeout=_PROBE_SECONDS, check=True
        )
    except subprocess.CalledProcessError as error:
        lines = error.stderr.strip().splitlines() or [f"exit code {error.returncode}"]
        raise ModelError(_NO_TORCH if "ModuleNotFoundError" in lines[-1] else f"torch failed: {lines[-1]}") from error
    except subprocess.TimeoutExpired as error:
        raise ModelError(f"torch did not list its CUDA devices within {_PROBE_SECONDS} seconds") from error
    return probe.stdout


def is_out_of_memory(error: BaseException) -> bool:
    """True where device work failed for lack of memory, so that a smaller piece may succeed."""
    import torch

    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _ALLOCATION_FAILURES)


def is_device_error(error: BaseException) -> bool:
    """True where something failed because the device does not work, and not for lack of memory.

    The libraries' exceptions share no type, so their messages are searched, down the chain of causes.
    """
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    messages = " ".join(map(str, chain))
    return any(words in messages for words in _DEVICE_FAILURES) and not any(
        words in messages for words in _ALLOCATION_FAILURES
    )
