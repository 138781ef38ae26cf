"""The engine without a model: it answers with the prompt. For tests of everything else, and for trying the queue.

Owns nothing but the requests that wait. It imports no torch, knows no device, and counts words as tokens.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from itertools import islice

from batchmill.jobs.models.engine_facts import EngineLimits
from batchmill.jobs.models.spec import ECHO
from batchmill.jobs.requests.generation import GENERATION, Choice, GenerationRequest, SamplingParams
from batchmill.jobs.requests.request import ErrorCode, Output, RequestKey
from batchmill.worker.engine import Progress, not_held
from batchmill.worker.engine.capacity import Capacity

#: Requests that a step answers by default.
ECHO_ROWS = 512
#: A slow step reports this often at least, so that draining and the watchdog stay responsive.
SLICE_SECONDS = 0.05


class EchoEngine:
    """Answers with the prompt, or with the last message of the user, cut after max_tokens words.

    Words are what whitespace separates. The text is cut before its first stop string too; temperature, seed and the
    other sampling parameters change nothing, and neither does an adapter, if it is one of `adapters`. A step takes
    `seconds_per_step` and answers at most `rows` requests.
    """

    kinds = frozenset({GENERATION.name})

    def __init__(
        self,
        *,
        rows: int = ECHO_ROWS,
        progress: Progress = lambda: False,
        seconds_per_step: float = 0.0,
        known_capacity: int | None = None,
        adapters: Collection[str] = (),
    ) -> None:
        self.limits = EngineLimits(ECHO, rows)
        self.cache_bytes = 0
        self._adapters = frozenset(adapters)
        self.capacity = Capacity(rows, found=known_capacity)
        self.defaults = SamplingParams()
        self._progress = progress
        self._seconds_per_step = seconds_per_step
        self._waiting: dict[RequestKey, GenerationRequest] = {}

    @staticmethod
    def admission_order(requests: Sequence[GenerationRequest]) -> Sequence[GenerationRequest]:
        """Keeps the order in which they came."""
        return requests

    @property
    def waiting(self) -> int:
        """Requests that were added and not answered."""
        return len(self._waiting)

    @property
    def active(self) -> int:
        """Always 0: a step runs to its end."""
        return 0

    def add(self, key: RequestKey, request: GenerationRequest) -> None:
        """Takes a request whose `sampling` has max_tokens set."""
        self._waiting[key] = request

    def cancel(self, keys: Collection[RequestKey]) -> None:
        """Forgets these requests; unknown keys are ignored."""
        for key in keys:
            self._waiting.pop(key, None)

    def tokens_so_far(self) -> Mapping[RequestKey, int]:
        """Nothing: a step runs to its end."""
        return {}

    def step(self) -> list[Output]:
        """Answers what waits, at most `rows` requests; none if progress asks to return."""
        if not self._waiting or self._interrupted():
            return []
        batch = dict(islice(self._waiting.items(), self.capacity.limit))
        outputs = self._answer(batch)
        for output in outputs:
            self._waiting.pop(output.key, None)
        self.capacity.held(len(outputs))
        return outputs

    def close(self) -> None:
        """Does nothing: nothing runs beside a step."""

    def _answer(self, batch: Mapping[RequestKey, GenerationRequest]) -> list[Output]:
        return [self._reply(key, request) for key, request in batch.items()]

    def _reply(self, key: RequestKey, request: GenerationRequest) -> Output:
        if request.adapter is not None and request.adapter not in self._adapters:
            return Output.failed(key, ErrorCode.UNSUPPORTED_BY_WORKER, not_held(request.adapter, self._adapters))
        return _echo(key, request)

    def _interrupted(self) -> bool:
        """Lets the time of a step pass; True as soon as progress asks to return."""
        end = time.monotonic() + self._seconds_per_step
        while not self._progress():
            left = end - time.monotonic()
            if left <= 0:
                return False
            time.sleep(min(left, SLICE_SECONDS))
        return True


def prompt_of(request: GenerationRequest) -> str:
    """The text to echo: the prompt, or the last message of the user."""
    if request.prompt is not None:
        return request.prompt
    messages = request.messages or ()
    return next((each["content"] for each in reversed(messages) if each["role"] == "user"), "")


def _echo(key: RequestKey, request: GenerationRequest) -> Output:
    text = prompt_of(request)
    prompt_tokens = completion_tokens = len(text.split())
    if request.messages is not None:
        prompt_tokens = sum(len((each.get("content") or "").split()) for each in request.messages)
    sampling, finish_reason = request.sampling, "stop"
    if sampling.max_tokens is not None and completion_tokens > sampling.max_tokens:
        rest = text.split(None, sampling.max_tokens)[-1]
        text = text[: len(text) - len(rest)].rstrip()
        completion_tokens, finish_reason = sampling.max_tokens, "length"
    if sampling.stop:
        ends = [end for end in map(text.find, sampling.stop) if end >= 0]
        if ends:
            text, finish_reason = text[: min(ends)], "stop"
            completion_tokens = len(text.split())
    return Output(key, (Choice(text, finish_reason),), prompt_tokens, completion_tokens)
