"""Greedy answers by batchmill's own engine, as a worker would give them, and how fast they came.

Owns the engine of one evaluation: just large enough for its questions, so that the memory of different quantizations
can be compared. It compares no answers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from time import perf_counter

from batchmill.jobs.errors import ModelError
from batchmill.jobs.requests.generation import SamplingParams, choices_of
from batchmill.jobs.requests.request import Output, RequestKey
from batchmill.worker.engine import Engine
from batchmill.worker.engine.options import EngineOptions
from batchmill.worker.engine.transformers_kind import serve
from batchmill.worker.evaluate.data.passages import Question
from batchmill.worker.models.load import LoadedModel

#: Requests that run at once, by default.
ROWS = 64


@dataclass(frozen=True, slots=True)
class Answers:
    """The answers to all questions, in their order."""

    texts: tuple[str, ...] = field(repr=False)
    #: The same as tokens.
    tokens: tuple[tuple[int, ...], ...] = field(repr=False)
    #: The kind of the engine.
    engine: str
    completion_tokens: int
    #: The time of all tokens, prefill included.
    seconds: float


def answer(
    loaded: LoadedModel, questions: Sequence[Question], *, options: EngineOptions, step: Callable[[int], None]
) -> Answers:
    """Answers all questions, of which there is at least one; `step` is told how many answers are there.

    Raises ModelError where the device cannot hold one.
    """
    with closing(_engine(loaded, questions, options)) as engine:
        _warm_up(engine, questions[0])
        begin = perf_counter()
        outputs = _outputs(engine, questions, step)
        seconds = perf_counter() - begin
    texts = tuple(choices_of(each)[0].text for each in outputs)
    tokens = tuple(tuple(loaded.tokenizer.encode(text, add_special_tokens=False)) for text in texts)
    return Answers(texts, tokens, engine.limits.kind, sum(each.completion_tokens for each in outputs), seconds)


def _engine(loaded: LoadedModel, questions: Sequence[Question], options: EngineOptions) -> Engine:
    longest = max(each.prompt_tokens + (each.request.sampling.max_tokens or 0) for each in questions)
    rows = min(options.max_rows or ROWS, len(questions))
    context = min(longest, options.context_tokens or longest)
    return serve(loaded, options=replace(options, max_rows=rows, context_tokens=context))


def _warm_up(engine: Engine, question: Question) -> None:
    """Lets the engine do what it does once in its life, so that this is not in the answers' time."""
    engine.add(
        RequestKey("warm-up", 0), replace(question.request, sampling=SamplingParams(max_tokens=2, temperature=0))
    )
    while engine.waiting or engine.active:
        engine.step()


def _outputs(engine: Engine, questions: Sequence[Question], step: Callable[[int], None]) -> list[Output]:
    """Runs all questions, and returns their outputs in order."""
    for each in questions:
        engine.add(RequestKey("evaluation", each.request.index), each.request)
    outputs: list[Output] = []
    while engine.waiting or engine.active:
        outputs += engine.step()
        step(len(outputs))
    for output in outputs:
        if output.error is not None:
            raise ModelError(f"the engine gave no answer: {output.error.message}")
    return sorted(outputs, key=lambda each: each.key.index)
