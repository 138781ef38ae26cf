"""The terms in which every engine computes its size: the bytes of a model, and the free memory of its device.

The computation itself is each engine's own (`continuous.sizing`, `generate.sizing`). The engine calls it when it
starts, and `worker.plan` before anything of a model is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from batchmill.jobs.models.engine_facts import EngineLimits
from batchmill.worker.devices.memory import MemoryReader

if TYPE_CHECKING:
    from batchmill.worker.models.load import LoadedModel


@dataclass(frozen=True, slots=True)
class Load:
    """The bytes that a model puts on a device."""

    #: Bytes of its weights.
    weights_bytes: int
    #: Bytes of the copies of its 4-bit weights that could still be made.
    copy_bytes: int
    #: Bytes of one token in the KV cache.
    token_bytes: int
    #: The model's own limit of prompt and answer together; None for no limit.
    context_tokens: int | None
    #: Tokens that have an embedding.
    vocabulary: int

    @classmethod
    def of(cls, loaded: LoadedModel, *, token_bytes: int) -> Load:
        """Describes a model that is loaded, and whose copies are made."""
        return cls(loaded.weights_bytes, 0, token_bytes, loaded.context_tokens, loaded.vocabulary)


@dataclass(frozen=True, slots=True)
class MemoryBudget:
    """The memory that an engine finds on its device."""

    #: True for a GPU.
    cuda: bool
    #: Bytes that are free beside the weights.
    free_bytes: int
    #: Bytes of the whole GPU; 0 on a CPU.
    total_bytes: int

    @classmethod
    def of(cls, device: torch.device) -> MemoryBudget:
        """Reads the device's memory as it is now."""
        cuda = device.type == "cuda"
        total = torch.cuda.get_device_properties(device).total_memory if cuda else 0
        return cls(cuda, MemoryReader(str(device)).available_bytes(), total)


class Size(Protocol):
    """The size of an engine: the work that it takes on at once, and the memory that this takes."""

    @property
    def limits(self) -> EngineLimits:
        """The limits that the engine reports."""

    @property
    def copied_bytes(self) -> int:
        """Bytes of the copies of weights that the engine still makes."""

    @property
    def buffers_bytes(self) -> int:
        """Bytes that a step's own buffers are planned with."""

    def rows_of(self, row_tokens: int) -> int:
        """The number of rows of this context that the cache holds at once."""

    def spare_bytes(self, cache_bytes: int) -> int:
        """Bytes that must stay free on the device beside a cache of so many bytes."""
