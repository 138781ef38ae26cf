"""The protocols of an engine: a kind opens its own model, and the engine then turns Requests into Outputs on a device.

The implementations are in files of their own. An engine knows no SQL, no Redis and no files. One thread drives it:
`add` requests, `step`, take the outputs, and `close` at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from batchmill.jobs.models.adapters import Adapter
from batchmill.jobs.models.digests import Digests
from batchmill.jobs.models.engine_facts import EngineFacts, EngineLimits
from batchmill.jobs.models.identity import Content
from batchmill.jobs.models.spec import ModelSpec
from batchmill.jobs.requests.request import Output, RequestKey
from batchmill.worker.devices.placement import Placement
from batchmill.worker.engine.capacity import Capacity
from batchmill.worker.engine.options import EngineOptions

if TYPE_CHECKING:
    from batchmill.worker.models.load import BeforeWeights

#: Called by an engine at least once per token step (and before each prefill). True asks it to return from
#: `step` as soon as it can, without the unfinished requests.
Progress = Callable[[], bool]


def not_held(adapter: str, held: Collection[str]) -> str:
    """Returns the error of a request whose adapter is not held; no batch with it should have come here."""
    return (
        f"this worker does not hold the adapter {adapter!r} (it holds {', '.join(sorted(held)) or 'none'}): "
        "retry the request, so that a worker that holds it answers"
    )


def not_a_number(answered: int) -> str:
    """Returns the error of a request whose logits after `answered` tokens are NaN or infinite."""
    return (
        f"the model's logits for token {answered + 1} of the answer are not numbers (NaN or infinite): its weights are "
        "damaged, or too large for its dtype; fetch it again, or choose another quantization or dtype"
    )


class Engine(Protocol):
    """Stepped by the runner, so that one loop owns the device.

    Every request that was added and not cancelled comes back as exactly one Output of some later `step`,
    error outputs included; the engine never raises over a single request. An exception is the device's or
    the engine's fault, and ends the process.
    """

    #: Limits of the work that it takes on at once; the runner keeps about as many requests waiting as there are rows.
    limits: EngineLimits
    #: Bytes that keys and values take, or may take; 0 for an engine that has no cache.
    cache_bytes: int
    #: The model's own options, where neither request nor job asks; SamplingParams, of its generation_config.
    defaults: Any
    #: The kinds of requests that it answers, by name.
    kinds: frozenset[str]
    #: The amount that the device holds at once; kept for the next process of this device once its memory ran out.
    capacity: Capacity

    @staticmethod
    def admission_order(requests: Sequence[Any]) -> Sequence[Any]:
        """Orders requests that came together as they are best added.

        It looks at these alone, so that another thread than the engine's may ask.
        """

    @property
    def waiting(self) -> int:
        """Requests that were added and not begun."""

    @property
    def active(self) -> int:
        """Requests begun and unfinished between two steps (0 for an engine whose steps run to the end)."""

    def add(self, key: RequestKey, request: Any) -> None:
        """Takes a request of one of its kinds; a generation's `sampling` has at least max_tokens and temperature."""

    def cancel(self, keys: Collection[RequestKey]) -> None:
        """Forgets these requests; keys that it does not hold are ignored. They give no output."""

    def tokens_so_far(self) -> Mapping[RequestKey, int]:
        """Counts the tokens that unfinished requests have between two steps; those without any may be left out."""

    def step(self) -> list[Output]:
        """Does one bounded piece of device work. Returns the outputs that it finished, none if there was nothing to do.

        When `progress` answered True, the unfinished requests are kept: as they are, or waiting again in their order.
        """

    def close(self) -> None:
        """Ends the threads that run beside its steps; the engine is not used afterwards."""


@dataclass(frozen=True, slots=True)
class Opening:
    """The order to an engine kind to open a model, and the means for it."""

    spec: ModelSpec
    placement: Placement
    #: The placement's devices as torch calls them, the first one first.
    devices: Sequence[str]
    adapters: Sequence[Adapter]
    options: EngineOptions
    #: The digests that are known of the model's files.
    digests: Digests
    #: Asked before weights are read onto one device; it refuses a model that does not fit there.
    before_weights: BeforeWeights
    progress: Progress
    #: The amount that the devices were found to hold, in the engine's unit; None until their memory ran out once.
    known_capacity: int | None


@dataclass(frozen=True, slots=True)
class OpenEngine:
    """An engine with its model, ready for requests."""

    engine: Engine
    facts: EngineFacts
    #: The files that model and adapters were loaded from.
    sources: tuple[Content, ...] = ()
    #: Those of the sources that are still read while the model works.
    read_at_work: tuple[Content, ...] = ()


class EngineKind(Protocol):
    """A kind of engine, which loads the models that it serves by itself."""

    def open(self, opening: Opening) -> OpenEngine:
        """Loads the model and puts it into an engine. Raises ModelError, which says what to do."""
