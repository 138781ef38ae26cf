"""Requests to a continuous engine, and its outputs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from batchmill.jobs.requests.generation import GenerationRequest, SamplingParams
from batchmill.jobs.requests.request import Output, RequestKey
from batchmill.worker.engine.continuous.engine import ContinuousEngine

GREEDY = SamplingParams(max_tokens=10, temperature=0.0)
Make = Callable[..., ContinuousEngine]


def key(index: int) -> RequestKey:
    return RequestKey("job", index)


def prompt(index: int, text: str, **sampling: Any) -> GenerationRequest:
    return GenerationRequest(index, str(index), prompt=text, sampling=replace(GREEDY, **sampling))


def answers(engine: ContinuousEngine, *requests: GenerationRequest, until: int = sys.maxsize) -> list[Output]:
    """The outputs of these requests, and of those that are there, in their order; or the first of them alone."""
    for request in requests:
        engine.add(key(request.index), request)
    outputs: list[Output] = []
    while (engine.waiting or engine.active) and len(outputs) < until:
        outputs += engine.step()
    return sorted(outputs, key=lambda output: output.key.index)


def error(output: Output) -> tuple[str, str]:
    assert output.error is not None
    return output.error.code, output.error.message


def said(outputs: list[Output]) -> list[tuple[str, str, int]]:
    return [(each.payload[0].text, each.payload[0].finish_reason, each.completion_tokens) for each in outputs]
