"""A device that a model is planned for: its memory, and how fast it reads and multiplies.

Owns the sources of these numbers: a GPU's rates from its maker's data sheets, by its name; a CPU's from two
measurements on the spot that take a fraction of a second. A GPU that is not in the table has no rates, rather than
invented ones. It knows no model.

Sources: NVIDIA's data sheets and architecture white papers of each product, dense products of 16 bits with 32-bit
sums, no sparsity. What a kernel reaches of them is less: 80 to 90 percent at best.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import psutil
import torch
from bitsandbytes.functional import has_avx512bf16

from batchmill.jobs.runtime.sizes import size
from batchmill.worker.devices.selection import CPU

#: Beginnings of names as torch tells them, the longer first; bytes and operations per second.
_GPUS: tuple[tuple[str, float, float], ...] = (
    ("NVIDIA B200", 8.0e12, 2250e12),
    ("NVIDIA GH200 480GB", 4.0e12, 989e12),
    ("NVIDIA H200 NVL", 4.8e12, 836e12),
    ("NVIDIA H200", 4.8e12, 989e12),
    ("NVIDIA H100 NVL", 3.9e12, 835e12),
    ("NVIDIA H100 PCIe", 2.0e12, 756e12),
    ("NVIDIA H100 80GB HBM3", 3.35e12, 989e12),
    ("NVIDIA A100-SXM4-80GB", 2.04e12, 312e12),
    ("NVIDIA A100 80GB PCIe", 1.94e12, 312e12),
    ("NVIDIA A100-SXM4-40GB", 1.56e12, 312e12),
    ("NVIDIA A100-PCIE-40GB", 1.56e12, 312e12),
    ("NVIDIA L40S", 864e9, 362e12),
    ("NVIDIA L40", 864e9, 181e12),
    ("NVIDIA L4", 300e9, 121e12),
    ("NVIDIA A40", 696e9, 150e12),
    ("NVIDIA A30", 933e9, 165e12),
    ("NVIDIA A10", 600e9, 125e12),
    ("NVIDIA RTX 6000 Ada Generation", 960e9, 364e12),
    ("NVIDIA RTX A6000", 768e9, 155e12),
    ("NVIDIA GeForce RTX 5090", 1792e9, 210e12),
    ("NVIDIA GeForce RTX 4090", 1008e9, 165e12),
    ("NVIDIA GeForce RTX 4080", 717e9, 97e12),
    ("NVIDIA GeForce RTX 3090", 936e9, 71e12),
    ("NVIDIA GeForce RTX 3080", 760e9, 60e12),
    ("Tesla V100-SXM2", 900e9, 125e12),
    ("Tesla T4", 320e9, 65e12),
)
#: Taken of a GPU's memory by the driver and the libraries' kernels before any tensor: 0.3 to 0.6 GB, by generation.
_CONTEXT_BYTES = 512 * 1024**2
_COPY_BYTES = 96 * 1024**2
_PRODUCT_ROWS, _PRODUCT_SIZE, _SMALL_PRODUCT_SIZE = 256, 1536, 256
_TRIALS = 3


@dataclass(frozen=True, slots=True)
class Rates:
    """The speed of a device."""

    #: Bytes read in a second.
    bytes_per_second: float
    #: Multiplications and additions in a second (two operations a number), by dtype, without unknown ones.
    operations_per_second: Mapping[torch.dtype, float]
    #: Origin of these numbers, for people.
    source: str


@dataclass(frozen=True, slots=True)
class Hardware:
    """One device, or several alike that a model is split over, with their memory together."""

    #: As a flag names it; a pretended device says there what it is.
    device: str
    name: str
    cuda: bool
    total_bytes: int
    #: Free now.
    free_bytes: int
    rates: Rates | None
    pretended: bool = False
    #: Devices that a model is split over.
    count: int = 1

    @property
    def torch_device(self) -> torch.device:
        """A torch device of this kind; for a pretended one, the first that there is."""
        return torch.device("cuda" if self.pretended else self.device.partition("+")[0])

    @property
    def fuses_four_bit(self) -> bool:
        """True where 4-bit weights are read packed for a few rows."""
        return self.cuda or has_avx512bf16()


def this_cpu(*, measured: bool = True) -> Hardware:
    """The processor and memory of this machine; without a measurement it has no rates."""
    memory = psutil.virtual_memory()
    return Hardware(CPU, CPU, False, memory.total, memory.available, _measured_rates() if measured else None)


def this_gpu(index: int) -> Hardware:
    """A GPU that torch sees in this process, with its memory as it is now."""
    name = torch.cuda.get_device_name(index)
    free, total = torch.cuda.mem_get_info(index)
    return Hardware(f"cuda:{index}", name, True, total, free, known_rates(name))


def pretended_gpu(total_bytes: int, *, name: str = "") -> Hardware:
    """A GPU that need not be here, with nothing on it; with the name of a known one it has its rates."""
    free = max(0, total_bytes - _CONTEXT_BYTES)
    label = name or f"a GPU of {size(total_bytes)}"
    return Hardware(label, label, True, total_bytes, free, known_rates(name), pretended=True)


def joined(devices: Sequence[Hardware]) -> Hardware:
    """Several GPUs that one model is split over: their memory together; the rates of one, since layers take turns."""
    if len(devices) == 1:
        return devices[0]
    names = sorted({each.name for each in devices})
    return Hardware(
        "+".join(each.device for each in devices),
        f"{len(devices)} x {names[0]}" if len(names) == 1 else ", ".join(names),
        True,
        sum(each.total_bytes for each in devices),
        sum(each.free_bytes for each in devices),
        devices[0].rates if len(names) == 1 else None,
        count=len(devices),
    )


def known_rates(name: str) -> Rates | None:
    """The rates in the data sheet of this GPU; None for one that is not in the table."""
    for known, reads, multiplies in _GPUS:
        if name == known or name.startswith((f"{known} ", f"{known}-")):
            halves = {torch.bfloat16: multiplies, torch.float16: multiplies}
            return Rates(reads, halves, f"data sheet of {known}")
    return None


def _measured_rates() -> Rates:
    source = torch.zeros(_COPY_BYTES, dtype=torch.uint8)
    target = torch.zeros_like(source)
    # A copy reads as many bytes as it writes.
    seconds = _fastest(lambda: target.copy_(source))
    multiplied = {dtype: _product_rate(dtype) for dtype in (torch.float32, torch.bfloat16)}
    return Rates(2 * _COPY_BYTES / seconds, multiplied, "measured here just now")


def _product_rate(dtype: torch.dtype) -> float:
    # Without instructions for it bfloat16 can be a hundred times slower, which a small product tells as well.
    width = _PRODUCT_SIZE if dtype is torch.float32 or has_avx512bf16() else _SMALL_PRODUCT_SIZE
    rows = torch.ones(_PRODUCT_ROWS, width, dtype=dtype)
    weight = torch.ones(width, width, dtype=dtype)
    return 2 * _PRODUCT_ROWS * width**2 / _fastest(lambda: torch.nn.functional.linear(rows, weight))


def _fastest(work: Callable[[], object]) -> float:
    """Seconds of the fastest of a few trials, after a warm-up."""
    work()
    seconds = []
    for _ in range(_TRIALS):
        begin = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - begin)
    return min(seconds)
