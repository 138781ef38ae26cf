"""What turns Requests into Outputs on a device: the protocol, and its implementations in files of their own.

An engine knows no SQL, no Redis and no files. One thread drives it: `add` requests, `step`, take the outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, Protocol

from batchmill.jobs.requests.request import Output, RequestKey
from batchmill.worker.engine.capacity import Capacity

#: Called by an engine at least once per token step (and before each prefill). True asks it to return from
#: `step` as soon as it can, without what is unfinished.
Progress = Callable[[], bool]


def not_held(adapter: str, held: Collection[str]) -> str:
    """Why a request that names this adapter is not answered; no batch with it should have come here."""
    return (
        f"this worker does not hold the adapter {adapter!r} (it holds {', '.join(sorted(held)) or 'none'}): "
        "retry the request, so that a worker that holds it answers"
    )


def not_a_number(answered: int) -> str:
    """Why a request ends whose row has so many tokens: the logits of the next one are NaN, or infinite."""
    return (
        f"the model's logits for token {answered + 1} of the answer are not numbers (NaN or infinite): its weights are "
        "damaged, or too large for its dtype; fetch it again, or choose another quantization or dtype"
    )


class Engine(Protocol):
    """Stepped by the runner, so that one loop owns the device.

    Every request that was added and not cancelled comes back as exactly one Output of some later `step`,
    error outputs included; the engine never raises for what one request asks. What remains raises is the
    device's or the engine's fault, and ends the process.
    """

    #: The kinds of requests that it answers, by name.
    kinds: frozenset[str]
    #: How many requests the device works on at once; the runner keeps about as many again waiting.
    rows: int
    #: What the model asks for where neither request nor job does; SamplingParams, of its generation_config.
    defaults: Any
    #: What the device holds at once; kept for the next process of this device once its memory ran out.
    capacity: Capacity

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
        """What unfinished requests have been answered with between two steps, in tokens; those without need not be."""

    def step(self) -> list[Output]:
        """One bounded piece of device work: the outputs that it finished, none if there was nothing to do.

        When `progress` answered True, the unfinished requests are kept: as they are, or waiting again in their order.
        """
