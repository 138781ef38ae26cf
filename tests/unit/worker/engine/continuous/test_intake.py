"""The ways of a request through the intake: an Answer at once, an Answer after its grammar, or a refusal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from batchmill.jobs.requests.generation import GenerationRequest, SamplingParams
from batchmill.jobs.requests.request import ErrorCode, RequestKey
from batchmill.worker.engine.continuous.intake import Intake
from batchmill.worker.engine.grammar.grammars import Grammars
from batchmill.worker.engine.lora import Lora
from batchmill.worker.engine.text.tokenization import Tokenization
from batchmill.worker.models.load import LoadedModel
from tests.support.models.families import load_alphabet

SECONDS = 30.0
CHOICE = {"type": "choice", "choice": ["abc"]}
UNKNOWN = (10**6,)
UNCLOSED = {"type": "regex", "regex": "("}


@pytest.fixture(scope="module")
def alphabet() -> LoadedModel:
    return load_alphabet()


@pytest.fixture
def intake(alphabet: LoadedModel) -> Iterator[Intake]:
    intake = Intake(
        Tokenization.of(alphabet, context_tokens=alphabet.context_tokens),
        Grammars(alphabet.tokenizer, vocabulary=alphabet.vocabulary, end_token_ids=alphabet.end_token_ids),
        Lora(alphabet.model, (), device=alphabet.device),
        share=True,
    )
    yield intake
    intake.close()


def key(index: int) -> RequestKey:
    return RequestKey("job", index)


def request(*, adapter: str | None = None, **sampling: Any) -> GenerationRequest:
    params = SamplingParams(max_tokens=10, temperature=0.0, **sampling)
    return GenerationRequest(0, "0", prompt="a", sampling=params, adapter=adapter)


def errors(intake: Intake) -> list[tuple[int, str]]:
    return [(output.key.index, output.error.code) for output in intake.refusals() if output.error is not None]


def test_a_plain_request_becomes_an_answer_at_once(intake: Intake) -> None:
    answer = intake.take(key(0), request(n=2))
    assert answer is not None
    assert (answer.key, len(answer.rows), len(intake)) == (key(0), 2, 0)


def test_a_request_with_a_grammar_becomes_an_answer_once_it_is_compiled(intake: Intake) -> None:
    assert intake.take(key(0), request(response_format=CHOICE)) is None
    assert len(intake) == 1
    [answer] = intake.compiled(seconds=SECONDS)
    assert answer.key == key(0)
    assert all(row.matcher is not None for row in answer.rows)
    assert len(intake) == 0


def test_refusals_wait_to_be_handed_over_once(intake: Intake) -> None:
    assert intake.take(key(0), request(stop_token_ids=UNKNOWN)) is None
    assert intake.take(key(1), request(adapter="wide")) is None
    assert intake.take(key(2), request(response_format=UNCLOSED)) is None
    assert list(intake.compiled(seconds=SECONDS)) == []
    assert len(intake) == 3
    assert errors(intake) == [
        (0, ErrorCode.UNSUPPORTED_OPTION),
        (1, ErrorCode.UNSUPPORTED_BY_WORKER),
        (2, ErrorCode.INVALID_RESPONSE_FORMAT),
    ]
    assert len(intake) == 0
    assert errors(intake) == []


def test_cancelled_requests_are_forgotten_wherever_they_are(intake: Intake) -> None:
    intake.take(key(0), request(stop_token_ids=UNKNOWN))
    intake.take(key(1), request(response_format=CHOICE))
    intake.cancel([key(0), key(1), key(99)])
    assert len(intake) == 0
    assert list(intake.compiled(seconds=0.0)) == []
    assert errors(intake) == []
