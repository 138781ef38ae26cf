"""Which device a worker works on: the mask that its parent sets, and what its child finds behind it.

The parent's part imports no torch; the child sees one device at most, so for it the device is `cuda:0` or `cpu`.
This module knows no model, no memory in use and no process but the one short probe.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass

import psutil

from jobs.errors import ModelError, UsageError

CPU = "cpu"
_PROBE = "import torch; print(torch.cuda.device_count())"
#: Importing torch takes this long at most, on a cold and slow disk too.
_PROBE_SECONDS = 300
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
    """What a process works on. `uuid` tells GPUs apart; `total_bytes` is its memory, a CPU's the machine's."""

    name: str
    uuid: str | None
    total_bytes: int
    torch_device: str


def visible_devices(device: str, environ: Mapping[str, str]) -> str:
    """The CUDA_VISIBLE_DEVICES that shows one device alone: `auto`, `cpu`, `cuda` or `cuda:N` as written.

    N counts within the mask that is set already, whose entries may be indices or UUIDs. `auto` is the first
    device, or none if the mask shows none. Raises UsageError for another spelling and for an N beyond the mask.
    """
    written = re.fullmatch(r"auto|cpu|cuda(?::(\d+))?", device)
    if written is None:
        raise UsageError(f"unknown device {device!r}; use auto, cpu, cuda, or cuda:N such as cuda:0")
    if device == CPU:
        return ""
    place = int(written[1] or 0)
    mask = environ.get("CUDA_VISIBLE_DEVICES")
    if mask is None:
        return str(place)
    shown = _entries(mask)
    if place < len(shown):
        return shown[place]
    if device == "auto":
        return ""
    raise UsageError(
        f"device {device} is beyond CUDA_VISIBLE_DEVICES={mask!r}, which shows {len(shown)}: "
        "choose a smaller number or widen the mask"
    )


def _entries(mask: str) -> list[str]:
    """The devices that a mask shows; CUDA ignores everything from the first invalid one on."""
    shown = []
    for entry in mask.split(","):
        if entry.strip() in ("", "-1"):
            break
        shown.append(entry.strip())
    return shown


def describe_device(written: str) -> DeviceInfo:
    """The device of this process, whose mask `visible_devices` made from the same `written`.

    Raises ModelError if CUDA was asked for and there is none, or if torch is not installed. `cpu` imports no torch.
    """
    if written == CPU:
        return _cpu()
    try:
        import torch
    except ImportError as error:
        raise ModelError(_NO_TORCH) from error
    if torch.cuda.is_available():
        found = torch.cuda.get_device_properties(0)
        return DeviceInfo(found.name, f"GPU-{found.uuid}", found.total_memory, "cuda:0")
    if written == "auto":
        return _cpu()
    raise ModelError(
        f"device {written}: torch {torch.__version__} sees no such CUDA device; "
        "look at nvidia-smi and at the installed torch, or use --device cpu"
    )


def _cpu() -> DeviceInfo:
    return DeviceInfo(CPU, None, psutil.virtual_memory().total, CPU)


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
    try:
        probe = subprocess.run(
            [sys.executable, "-c", _PROBE], capture_output=True, text=True, timeout=_PROBE_SECONDS, check=True
        )
    except subprocess.CalledProcessError as error:
        lines = error.stderr.strip().splitlines() or [f"exit code {error.returncode}"]
        raise ModelError(_NO_TORCH if "ModuleNotFoundError" in lines[-1] else f"torch failed: {lines[-1]}") from error
    except subprocess.TimeoutExpired as error:
        raise ModelError(f"torch did not count its CUDA devices within {_PROBE_SECONDS} seconds") from error
    return [f"cuda:{index}" for index in range(int(probe.stdout))]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a failed piece of device work failed for lack of memory, so that a smaller one may succeed."""
    import torch

    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _ALLOCATION_FAILURES)


def is_device_error(error: BaseException) -> bool:
    """Whether something failed because the device does not work, and not for lack of memory.

    Read from what the libraries say, down the chain of causes: their exceptions share no type.
    """
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    said = " ".join(map(str, chain))
    return any(words in said for words in _DEVICE_FAILURES) and not any(words in said for words in _ALLOCATION_FAILURES)
