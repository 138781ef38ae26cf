"""The least time that a model's decoding and prefill can take on a device: worker.plan's floor, and a GPU's own rates.

Owns the two measurements of a GPU; a CPU is measured by worker.plan. It loads no weights and knows no engine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from batchmill.jobs.models.quantization import Kind, Quantization
from batchmill.jobs.models.spec import ModelSpec
from batchmill.worker.models.vetting import Refusal
from batchmill.worker.plan.hardware import Hardware, Rates, this_cpu, this_gpu
from batchmill.worker.plan.model import PlannedModel
from batchmill.worker.plan.speed import Workload, expert_part, tokens_per_second

_COPY_BYTES = 2**30
_PRODUCT_SIZE = 8192
_TRIALS = 5


@dataclass(frozen=True, slots=True)
class Floor:
    """The work that a model in one quantization asks of a device."""

    work: Workload
    #: Parameters in the blocks, without the head, that a token is multiplied with.
    block_parameters: int

    def decode(self, hardware: Hardware, *, rows: int, context_tokens: int, copied: bool) -> float | None:
        """The most tokens a second; None for a device of unknown rates. `copied`: from copies of 4-bit weights."""
        work = replace(self.work, copied=copied)
        return tokens_per_second(work, hardware, rows=rows, context_tokens=context_tokens)

    def prefill(self, hardware: Hardware) -> float | None:
        """The most prompt tokens a second, by the products alone."""
        operations = hardware.rates and hardware.rates.operations_per_second.get(self.work.dtype)
        return operations / (2 * self.block_parameters) if operations else None


def floor_of(folder: Path, quantization: Quantization, device: torch.device) -> Floor:
    """The floor of the model in a folder. Raises what worker.plan raises for what a worker would refuse."""
    model = PlannedModel(ModelSpec(str(folder), quantization=quantization), folder)
    holding = model.holding(quantization, device)
    found, part = holding.footprint, expert_part(model.config.get_text_config())
    int8 = quantization.kind is Kind.INT8
    work = Workload(
        found,
        holding.token.bytes,
        torch.int8 if int8 else holding.dtype,
        outliers=int8 and quantization.threshold > 0,
        expert_part=part,
    )
    in_blocks = found.packed_parameters + found.plain_parameters - found.head_bytes // holding.dtype.itemsize
    return Floor(work, in_blocks + int(found.expert_parameters * part))


def hardware_of(device: str) -> tuple[Hardware, Hardware]:
    """This device as its data sheet has it, and with rates that were measured now; of a CPU both are measured."""
    if device == "cpu":
        measured = this_cpu()
        return measured, measured
    known = this_gpu(torch.device(device).index or 0)
    return known, replace(known, rates=_measured(torch.device(device)))


def _measured(device: torch.device) -> Rates:
    with torch.device(device):
        source = torch.zeros(_COPY_BYTES, dtype=torch.uint8)
        target = torch.zeros_like(source)
        halves = torch.randn(_PRODUCT_SIZE, _PRODUCT_SIZE, dtype=torch.bfloat16)
        bytes_ = torch.randint(-127, 127, (_PRODUCT_SIZE, _PRODUCT_SIZE), dtype=torch.int8)
    # A copy reads as many bytes as it writes.
    copied = 2 * _COPY_BYTES / _fastest(lambda: target.copy_(source))
    operations = 2 * _PRODUCT_SIZE**3
    multiplied = {dtype: operations / _fastest(_product(halves.to(dtype))) for dtype in (torch.bfloat16, torch.float16)}
    multiplied[torch.int8] = operations / _fastest(lambda: torch._int_mm(bytes_, bytes_.t()))
    return Rates(copied, multiplied, "measured here just now")


def _product(square: torch.Tensor) -> Callable[[], object]:
    return lambda: torch.mm(square, square)


def _fastest(work: Callable[[], object]) -> float:
    """Seconds of the fastest of a few trials, by the device's clock, after one that pays for what comes first."""
    work()
    seconds: list[float] = []
    for _ in range(_TRIALS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        work()
        end.record()
        end.synchronize()
        seconds.append(begin.elapsed_time(end) / 1000)
    return min(seconds)


def rates_text(hardware: Hardware) -> str:
    """A device's rates for a heading."""
    rates = hardware.rates
    if rates is None:
        return f"{hardware.name}: rates unknown"
    by_dtype = ", ".join(
        f"{number / 1e12:,.3g} TFLOP/s in {str(dtype).removeprefix('torch.')}"
        for dtype, number in rates.operations_per_second.items()
    )
    return f"{hardware.name}, {rates.source}: {rates.bytes_per_second / 1e9:,.0f} GB/s, {by_dtype}"


def floors(folder: Path, quantizations: Sequence[Quantization], device: str) -> dict[str, Floor]:
    """By canonical spelling; without those that a worker would refuse."""
    found = {}
    for each in quantizations:
        with suppress(Refusal):
            found[str(each)] = floor_of(folder, each, torch.device(device))
    return found
