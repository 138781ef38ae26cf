"""The values that travel: sampling levels, and what survives its JSON."""

from __future__ import annotations

import json
import re

import pytest

from batchmill.jobs.requests.generation import (
    GENERATION,
    NO_SAMPLING,
    Choice,
    GenerationOptions,
    GenerationRequest,
    SamplingParams,
)
from batchmill.jobs.requests.ids import new_job_id
from batchmill.jobs.requests.request import ErrorCode, Output, RequestKey, Timings
from batchmill.jobs.requests.states import RequestState


def test_the_request_wins_over_the_job_over_the_model_over_the_fallback() -> None:
    line, flags = SamplingParams(temperature=0.0), SamplingParams(temperature=0.5, top_p=0.9, stop=("a",))
    model = SamplingParams(top_p=0.1, top_k=5)
    held = line.over(flags).over(model).over(SamplingParams.fallback())
    assert held == SamplingParams(max_tokens=256, temperature=0.0, top_p=0.9, top_k=5, stop=("a",))


def test_the_options_of_a_job_win_over_the_models_defaults() -> None:
    filled = GenerationOptions.filled({"temperature": 0.5}, None, SamplingParams(temperature=0.9, top_k=5))
    assert filled.sampling == SamplingParams(max_tokens=256, temperature=0.5, top_k=5)
    settled = GenerationOptions.filled({"temperature": 0.5}, {"temperature": 0.7}, SamplingParams(temperature=0.9))
    assert settled.sampling == SamplingParams(temperature=0.7)


def test_the_jobs_system_message_goes_where_there_is_none() -> None:
    options = GenerationOptions("be brief", SamplingParams(seed=1))
    own = GenerationRequest(0, "a", messages=({"role": "system", "content": "x"}, {"role": "user", "content": "y"}))
    plain = GenerationRequest(1, "b", prompt="y")
    assert own.under(options).messages == own.messages
    assert plain.under(options).messages == (
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "y"},
    )
    assert plain.under(options).prompt is None
    assert plain.under(GenerationOptions()) == plain


def test_requests_and_options_survive_their_json() -> None:
    full = GenerationRequest(
        3,
        "c",
        messages=({"role": "user", "content": "\u2028 ü"},),
        sampling=SamplingParams(max_tokens=5, stop=("a", "b"), seed=-1),
        chat_template_kwargs={"enable_thinking": False},
        passthrough={"metadata": {"k": "v"}},
        adapter="sql",
        tools=({"type": "function", "function": {"name": "w"}},),
        calls_tools=False,
    )
    bare = GenerationRequest(4, "d", prompt="")
    for request in (full, bare):
        assert GenerationRequest.from_body(request.index, request.custom_id, request.to_body()) == request
    assert GenerationRequest.from_body(4, "d", bare.to_body()).sampling is NO_SAMPLING
    options = GenerationOptions("s", full.sampling, {"enable_thinking": True}, ("a", "b"))
    assert full.under(options).adapter == "sql"
    assert GenerationOptions.from_json(options.to_json()) == options


def test_outputs_survive_their_json_and_so_do_those_of_before_timings() -> None:
    key = RequestKey("job", 3)
    logprobs = {"content": [{"token": "x", "logprob": -1.5, "bytes": [120], "top_logprobs": []}]}
    choices = (Choice("x", "stop", logprobs), Choice("y", "length"))
    full = Output(key, choices, prompt_tokens=2, completion_tokens=3, timings=Timings(0.1, 0.2, 0.3))
    failed = Output.failed(key, ErrorCode.UNSUPPORTED_OPTION, "it has no logprobs", prompt_tokens=2)
    for output in (full, failed):
        assert Output.from_json(json.loads(json.dumps(output.to_json())), GENERATION) == output
    before = {
        "key": ["job", 3],
        "choices": [{"text": "x", "finish_reason": "stop"}],
        "prompt_tokens": 2,
        "completion_tokens": 3,
        "error": None,
    }
    assert Output.from_json(before, GENERATION) == Output(key, (Choice("x", "stop"),), 2, 3)


def test_choices_are_kept_with_their_logprobs_and_nothing_where_there_are_none() -> None:
    output = Output(RequestKey("job", 0), (Choice("x", "stop"), Choice("y", "length", {"content": []})))
    assert output.payload_text() == (
        '[{"text":"x","finish_reason":"stop"},{"text":"y","finish_reason":"length","logprobs":{"content":[]}}]'
    )


@pytest.mark.parametrize("body", ['{"prompt": "x", "colour": 1}', '{"sampling": {"warmth": 1}}'])
def test_unknown_keys_of_a_stored_request_are_refused(body: str) -> None:
    with pytest.raises(TypeError):
        GenerationRequest.from_body(0, "a", body)


def test_an_outputs_state_follows_from_its_error() -> None:
    key = RequestKey("job", 0)
    assert Output(key, (Choice("x", "stop"),)).state is RequestState.SUCCEEDED
    assert Output.failed(key, ErrorCode.OUT_OF_MEMORY, "x").state is RequestState.FAILED
    assert Output.failed(key, ErrorCode.CANCELLED, "x").state is RequestState.CANCELLED


def test_job_ids_can_be_typed() -> None:
    ids = {new_job_id() for _ in range(1_000)}
    assert len(ids) == 1_000
    assert all(re.fullmatch("[a-hj-km-np-z2-9]{8}", each) for each in ids)
