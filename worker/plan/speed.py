"""The floor of a decode step: no engine computes it in less time than reading its weights and cache takes.

With the bytes R that are read of the weights, P numbers that a token is multiplied with, B rows, S tokens in the cache
of each of c bytes, and a device that reads W bytes and does F operations a second:

    seconds >= U / W + max(R / W, 2 * B * P / F) + B * S * c / W

R of 4-bit weights depends on how the engine reads them: packed for a few rows; for more, from copies of full precision
where they were made. Without copies they are unpacked at every step before they are multiplied with, which reads and
writes U bytes. On a GPU, LLM.int8() waits in every layer for its search for outliers, which makes a step about twice as
long. This module knows no memory's size and no model's name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from batchmill.worker.engine.continuous.weights.fused_matmul import CPU_COPY_ROWS
from batchmill.worker.plan.footprint import Footprint
from batchmill.worker.plan.hardware import Hardware

#: Up to about so many rows bitsandbytes 0.50 multiplies with packed weights on a GPU, by its heuristic for shapes of
#: 8 billion parameters on Hopper; it ends between 5 and 32 there, and between 8 and 128 on Ada.
CUDA_FUSED_ROWS = 32
#: Measured with and without: one copy from the device to the host in each of a model's linear layers.
OUTLIERS_FACTOR = 2.0
#: The keys of configurations for the experts of a layer, and for those that a token goes through.
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_EXPERTS_OF_A_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "moe_top_k", "moe_k")


@dataclass(frozen=True, slots=True)
class Workload:
    """A model's demands on a device in a decode step."""

    footprint: Footprint
    #: Bytes of one token in the cache.
    token_bytes: int
    #: Dtype that is multiplied in; int8 for LLM.int8(), whose rate is not known of any device here.
    dtype: torch.dtype
    #: The engine has made copies of 4-bit weights.
    copied: bool = False
    #: LLM.int8() searches for outliers.
    outliers: bool = False
    #: The part of the experts that one token goes through.
    expert_part: float = 1.0


def tokens_per_second(work: Workload, hardware: Hardware, *, rows: int, context_tokens: int) -> float | None:
    """Computes the highest tokens per second of these rows together, each with a full context; None if unknown."""
    rates = hardware.rates
    if rates is None:
        return None
    unpacked_bytes, read_bytes = _bytes(work, hardware, rows)
    unpacking, reading = unpacked_bytes / rates.bytes_per_second, read_bytes / rates.bytes_per_second
    operations = rates.operations_per_second.get(work.dtype)
    numbers = work.footprint.packed_parameters + work.footprint.plain_parameters
    numbers += int(work.footprint.expert_parameters * work.expert_part)
    multiplying = 2 * rows * numbers / operations if operations else 0.0
    cache = rows * context_tokens * work.token_bytes / rates.bytes_per_second
    waiting = OUTLIERS_FACTOR if work.outliers and hardware.cuda else 1.0
    return rows / (unpacking + waiting * max(reading, multiplying) + cache)


def expert_part(config: Any) -> float:
    """The part of a layer's experts that one token goes through; 1 for a model that has none."""
    experts = next((found for name in _EXPERTS if (found := getattr(config, name, None))), 0)
    taken = next((found for name in _EXPERTS_OF_A_TOKEN if (found := getattr(config, name, None))), 0)
    return min(1.0, taken / experts) if experts and taken else 1.0


def _bytes(work: Workload, hardware: Hardware, rows: int) -> tuple[float, float]:
    """The bytes that are read and written to unpack weights, and those that are read to multiply with them."""
    weights = work.footprint
    # The part of the experts that at least one row goes through, if all experts are equally likely.
    met = 1 - (1 - work.expert_part) ** rows
    plain = weights.head_bytes + weights.other_bytes + weights.expert_bytes * met
    few = CUDA_FUSED_ROWS + 1 if hardware.cuda else CPU_COPY_ROWS
    # A CPU's kernel for packed weights takes any number of rows, where it has one.
    packed = hardware.fuses_four_bit and (rows < few or (not hardware.cuda and not work.copied))
    if not weights.copy_bytes or packed:
        return 0, plain + weights.packed_bytes
    if work.copied:
        return 0, plain + weights.copy_bytes
    return weights.packed_bytes + weights.copy_bytes, plain + weights.copy_bytes
