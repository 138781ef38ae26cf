"""Lines of prompt files: every form, and the request that it becomes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from batchmill.jobs.requests.generation import NO_SAMPLING, GenerationRequest, SamplingParams
from batchmill.producer.requests.messages import ROLES
from tests.support.prompt_files import CHAT, COMPLETIONS, HELLO, TOOL, openai, requests, write


@pytest.fixture
def one(tmp_path: Path) -> Callable[..., GenerationRequest]:
    """Reads a file of one line."""

    def read(line: dict[str, Any], **options: Any) -> GenerationRequest:
        [request] = requests(write(tmp_path, json.dumps(line).encode()), **options)
        return request

    return read


def test_every_form_of_line_is_read_from_one_file(tmp_path: Path) -> None:
    lines = [
        {"prompt": "one"},
        {"messages": [HELLO]},
        {"custom_id": "mine", "prompt": "", "max_tokens": 5},
        openai({"model": "m", "messages": [HELLO], "temperature": 0}, custom_id="chat"),
        openai({"prompt": "two", "seed": -1}, COMPLETIONS, custom_id="completion"),
        openai({"prompt": ["three"]}, COMPLETIONS, custom_id=None),
        {"url": CHAT, "body": {"messages": [HELLO]}},
    ]
    path = write(tmp_path, "\n".join(map(json.dumps, lines)).encode())
    assert requests(path) == [
        GenerationRequest(0, "request-0", "one"),
        GenerationRequest(1, "request-1", messages=(HELLO,)),
        GenerationRequest(2, "mine", "", sampling=SamplingParams(max_tokens=5)),
        GenerationRequest(3, "chat", messages=(HELLO,), sampling=SamplingParams(temperature=0.0)),
        GenerationRequest(4, "completion", "two", sampling=SamplingParams(seed=-1)),
        GenerationRequest(5, "request-5", "three"),
        GenerationRequest(6, "request-6", messages=(HELLO,)),
    ]


def test_every_sampling_key_arrives(one: Callable[..., GenerationRequest]) -> None:
    asked = {
        "max_tokens": 7, "temperature": 1, "top_p": 0.5, "top_k": 40, "min_p": 0, "repetition_penalty": 1.1,
        "stop": ["a", "b"], "seed": 3,
    }  # fmt: skip
    wanted = SamplingParams(
        max_tokens=7, temperature=1.0, top_p=0.5, top_k=40, min_p=0.0, repetition_penalty=1.1, stop=("a", "b"), seed=3
    )
    assert one({"prompt": "x"} | asked).sampling == wanted
    assert one({"messages": [HELLO]} | asked).sampling == wanted
    assert one(openai({"messages": [HELLO]} | asked)).sampling == wanted
    assert type(one({"prompt": "x", "temperature": 1}).sampling.temperature) is float


@pytest.mark.parametrize(
    "edge",
    [
        {"max_tokens": 1},
        {"max_tokens": 2**31 - 1},
        {"temperature": 0.0},
        {"temperature": 100.0},
        {"top_p": 1.0},
        {"top_k": 1},
        {"min_p": 1.0},
        {"repetition_penalty": 100.0},
        {"seed": 2**63 - 1},
        {"seed": -(2**63)},
        {"stop": ("a",) * 16},
    ],
    ids=str,
)
def test_the_outermost_values_are_accepted(one: Callable[..., GenerationRequest], edge: dict[str, Any]) -> None:
    assert one({"prompt": "x"} | edge).sampling == SamplingParams(**edge)


@pytest.mark.parametrize("custom_id", ["i" * 256, " ", "0", "../../x", "'; --", "\U0001f600", "e\u0301"])
def test_a_custom_id_is_kept_as_it_is(one: Callable[..., GenerationRequest], custom_id: str) -> None:
    assert one({"prompt": "x", "custom_id": custom_id}).custom_id == custom_id
    assert one(openai({"messages": [HELLO]}, custom_id=custom_id)).custom_id == custom_id


def test_max_completion_tokens_is_max_tokens(one: Callable[..., GenerationRequest]) -> None:
    assert one({"prompt": "x", "max_completion_tokens": 9}).sampling == SamplingParams(max_tokens=9)
    both = {"max_tokens": 9, "max_completion_tokens": 9}
    assert one({"prompt": "x"} | both).sampling == SamplingParams(max_tokens=9)


def test_one_stop_string_is_a_list_of_one(one: Callable[..., GenerationRequest]) -> None:
    assert one({"prompt": "x", "stop": "END"}).sampling.stop == ("END",)


def test_a_line_that_asks_for_nothing_shares_its_sampling(one: Callable[..., GenerationRequest]) -> None:
    assert one({"prompt": "x"}).sampling is NO_SAMPLING
    assert one({"prompt": "x", "max_tokens": None, "stop": "", "top_k": -1}).sampling is NO_SAMPLING


NOTHING: list[dict[str, Any]] = [
    {"best_of": 1}, {"stream": False}, {"top_logprobs": 0}, {"response_format": {"type": "text"}},
    {"stop": ""}, {"stop": []}, {"top_k": 0}, {"top_k": -1}, {"tools": []}, {"tool_choice": "none"},
    {"stream_options": None}, {"logit_bias": {}}, {"suffix": None}, {"echo": False}, {"functions": []},
    {"modalities": ["text"]}, {"parallel_tool_calls": True}, {"user": None}, {"custom_id": None},
    {"model": None}, {"chat_template_kwargs": None}, {"reasoning_effort": None},
    *({key: None} for key in SamplingParams.__dataclass_fields__),
]  # fmt: skip


@pytest.mark.parametrize("nothing", NOTHING, ids=json.dumps)
def test_what_asks_for_nothing_is_accepted(one: Callable[..., GenerationRequest], nothing: dict[str, Any]) -> None:
    assert one({"prompt": "x"} | nothing) == GenerationRequest(0, "request-0", "x")
    assert one({"messages": [HELLO]} | nothing) == GenerationRequest(0, "request-0", messages=(HELLO,))


def test_what_has_no_effect_is_kept_to_be_returned(one: Callable[..., GenerationRequest]) -> None:
    kept = {"user": "u", "metadata": {"a": [1, None]}, "store": False, "service_tier": "auto"}
    assert one(openai({"messages": [HELLO]} | kept)).passthrough == kept
    request = one({"prompt": "x", "user": "u"})
    assert (request.passthrough, request.sampling) == ({"user": "u"}, NO_SAMPLING)
    assert request.sampling is NO_SAMPLING


def test_chat_template_kwargs_go_with_messages(one: Callable[..., GenerationRequest]) -> None:
    template = {"enable_thinking": False}
    assert one({"messages": [HELLO], "chat_template_kwargs": template}).chat_template_kwargs == template
    assert one({"messages": [HELLO], "chat_template_kwargs": {}}).chat_template_kwargs is None


@pytest.mark.parametrize(("url", "body"), [(CHAT, {"messages": [HELLO]}), (COMPLETIONS, {"prompt": "x"})])
def test_urls_have_a_version_or_none_as_azures(
    one: Callable[..., GenerationRequest], url: str, body: dict[str, Any]
) -> None:
    assert one(openai(body, url.removeprefix("/v1"))) == one(openai(body, url))


def test_a_top_p_of_nothing_is_kept(one: Callable[..., GenerationRequest]) -> None:
    assert one({"prompt": "x", "top_p": 0}).sampling.top_p == 0.0


def test_text_parts_are_joined(one: Callable[..., GenerationRequest]) -> None:
    parts = [{"type": "text", "text": "a\n"}, {"type": "text", "text": "b"}]
    joined = {"role": "user", "content": "a\nb"}
    assert one({"messages": [{"role": "user", "content": parts}]}).messages == (joined,)


@pytest.mark.parametrize("role", ROLES)
def test_messages_keep_role_name_and_order(one: Callable[..., GenerationRequest], role: str) -> None:
    nothing: dict[str, Any] = {"refusal": None, "tool_calls": None, "annotations": [], "function_call": None}
    named = {"role": role, "content": "", "name": "n"}
    assert one({"messages": [HELLO, named | nothing, HELLO]}).messages == (HELLO, named, HELLO)


def test_calls_of_tools_and_their_results_are_kept_in_openais_form(one: Callable[..., GenerationRequest]) -> None:
    called = {"id": "c", "type": "function", "function": {"name": "w", "arguments": '{"city": "Köln"}'}}
    asked = {"role": "assistant", "content": None, "tool_calls": [called]}
    result = {"role": "tool", "content": "sunny", "tool_call_id": "c"}
    kept = (HELLO, {"role": "assistant", "tool_calls": [called]}, result)
    assert one({"messages": [HELLO, asked, result]}).messages == kept
    assert one(openai({"messages": [HELLO, asked, result]})).messages == kept
    given = called | {"function": {"name": "w", "arguments": {"city": "Köln"}}}
    assert one({"messages": [HELLO, asked | {"tool_calls": [given]}, result]}).messages == kept


@pytest.mark.parametrize(("choice", "calls"), [(None, True), ("auto", True), ("none", False)])
def test_tools_are_kept_with_whether_the_answer_may_call_them(
    one: Callable[..., GenerationRequest], choice: str | None, calls: bool
) -> None:
    line = {"messages": [HELLO], "tools": [TOOL], "tool_choice": choice, "parallel_tool_calls": True}
    assert (one(line).tools, one(line).calls_tools) == ((TOOL,), calls)
    assert one({"messages": [HELLO], "tools": [], "tool_choice": choice}) == one({"messages": [HELLO]})
