"""The facts of an engine whose model is open: values shared by the engine, the worker's row and reports for people.

Every fact is spelled here once. Nothing here computes one.
"""

from __future__ import annotations

from dataclasses import dataclass

from batchmill.jobs.models.adapters import Adapter
from batchmill.jobs.requests.request import FIRST_KIND


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """Limits of the work that an engine takes on at once."""

    #: The engine's name, such as `continuous`.
    kind: str
    #: Requests that the device works on at once.
    rows: int
    #: Prompt and answer together; None for no limit.
    context_tokens: int | None = None
    #: Tokens of all rows that the KV cache holds at once; None for an engine that has none.
    cache_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """An engine's limits, and the model that it serves."""

    limits: EngineLimits
    #: The model's content (`jobs.models.identity`).
    identity: str
    #: The commit that the model's revision resolved to; None for a folder.
    commit: str | None = None
    #: The adapters beside the model, with their identities.
    adapters: tuple[Adapter, ...] = ()
    #: Seconds that the model took to load.
    load_seconds: float = 0.0
    #: Bytes of the weights on each device, in the placement's order.
    weights_by_device: tuple[int, ...] = (0,)
    #: Bytes that keys and values take, or may take, on each device.
    cache_by_device: tuple[int, ...] = (0,)
    #: The kinds of requests that the engine answers, by name.
    kinds: frozenset[str] = frozenset({FIRST_KIND})

    @property
    def weights_bytes(self) -> int:
        """Bytes of the weights on all devices together."""
        return sum(self.weights_by_device)
