"""Prompt files: what is read from them, and what is said about the lines that cannot be."""

from __future__ import annotations

import hashlib
import io
import json
import os
import socket
import sys
import threading
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchmill.jobs.errors import PromptFileError
from batchmill.jobs.requests.generation import NO_SAMPLING, GenerationRequest, SamplingParams
from batchmill.jobs.requests.request import DEFAULT_LINE_BYTES as MAX_LINE_BYTES
from batchmill.producer.files.prompt_file import PromptFile, PromptLine
from batchmill.producer.requests.messages import ROLES

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HELLO = {"role": "user", "content": "hello"}
GOOD = b'{"prompt":"fine"}\n'


def write(folder: Path, data: bytes, name: str = "prompts.jsonl") -> str:
    path = folder / name
    path.write_bytes(data)
    return str(path)


def requests(path: str, **options: Any) -> list[GenerationRequest]:
    with PromptFile(path, **options) as prompts:
        found = [line.request for line in prompts]
        prompts.raise_if_bad()
        return found


def error(path: str, **options: Any) -> PromptFileError:
    with pytest.raises(PromptFileError) as caught:
        requests(path, **options)
    return caught.value


def openai(body: dict[str, Any], url: Any = CHAT, **more: Any) -> dict[str, Any]:
    return {"custom_id": "a", "method": "POST", "url": url, "body": body} | more


@pytest.fixture
def one(tmp_path: Path) -> Callable[..., GenerationRequest]:
    """Reads a file of one line."""

    def read(line: dict[str, Any], **options: Any) -> GenerationRequest:
        [request] = requests(write(tmp_path, json.dumps(line).encode()), **options)
        return request

    return read


@pytest.fixture
def problem(tmp_path: Path) -> Callable[..., str]:
    """The message for a file of one bad line, after `file:1: `."""

    def read(line: bytes | dict[str, Any], *, name: str = "prompts.jsonl", **options: Any) -> str:
        data = line if isinstance(line, bytes) else json.dumps(line).encode()
        path = write(tmp_path, data, name)
        caught = error(path, **options)
        assert caught.count == 1
        [text] = caught.problems
        assert text.startswith(f"{path}:1: ")
        return text.removeprefix(f"{path}:1: ")

    return read


@pytest.fixture
def from_stdin(monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes], None]:
    def set_stdin(data: bytes) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))

    return set_stdin


# --- the forms of a line ----------------------------------------------------------------------------------


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


# --- bad lines ----------------------------------------------------------------------------------------------

X: dict[str, Any] = {"prompt": "SECRET"}
M: dict[str, Any] = {"messages": [{"role": "user", "content": "SECRET"}]}


def said(**message: Any) -> dict[str, Any]:
    return {"messages": [HELLO, message]}


CALL: dict[str, Any] = {"id": "c", "type": "function", "function": {"name": "w", "arguments": "{}"}}
TOOL: dict[str, Any] = {"type": "function", "function": {"name": "w", "parameters": {"type": "object"}}}
TEMPERATURES: list[Any] = [-0.1, 100.1, 10**400, "1", False, {}]
STOPS: list[Any] = [5, [""], ["a", 5], ["a"] * 17, {"SECRET": 1}, False]
#: Each with what is said of it.
BAD_JSON: list[tuple[bytes, str]] = [
    (b'{"prompt":"SECRET"', "not JSON: Expecting ',' delimiter at column 19"),
    (b"  {SECRET}", "not JSON: Expecting property name enclosed in double quotes at column 4"),
    (b'{"prompt":"SECRET\t"}', "not JSON: Invalid control character at column 18"),
    (b'{"prompt":"SECRET', "not JSON: Unterminated string starting at column 11"),
    (b'{"prompt":"\\x SECRET"}', "not JSON: Invalid \\escape at column 12"),
    (b"[SECRET", "not JSON: Expecting value at column 2"),
    (b'{"prompt":"SECRET"} {"prompt":"x"}', "not JSON: more text after the value, at column 20"),
    (b'{"prompt":"a"}\r{"prompt":"b"}', "not JSON: more text after the value, at column 15"),
    (b'[["SECRET"]]', "must be a JSON object, not a list"),
    (b'"SECRET"', "must be a JSON object, not a string"),
    (b"null", "must be a JSON object, not null"),
    (b"1", "must be a JSON object, not a number"),
    (b'{"prompt":"SECRET\xff"}', "not UTF-8: byte 17 is 0xff"),
    (b'\xef\xbb\xbf{"prompt":"\xc3("}', "not UTF-8: byte 14 is 0xc3"),
    (b'{"prompt":"\xed\xa0\x80"}', "not UTF-8: byte 11 is 0xed"),
    (b'{"prompt":"a","prompt":"b"}', "has the key 'prompt' twice in one object"),
    (b'{"prompt":"a","metadata":{"k":1,"j":2,"k":1}}', "has the key 'k' twice in one object"),
    (b'{"prompt":"a","temperature":NaN}', "not JSON: NaN is not a JSON number"),
    (b'{"prompt":"a","temperature":-Infinity}', "not JSON: -Infinity is not a JSON number"),
    (b'{"prompt":"a","metadata":[1e400]}', "holds a number that is too large for a float"),
    (b'{"prompt":"a","seed":' + b"1" * 5000 + b"}", "holds a number of more than 4300 digits"),
    (b'{"prompt":"SECRET\0"}', "holds a NUL character at column 18"),
    (b'{"prompt":"SECRET\\u0000"}', "holds a NUL character (\\u0000)"),
    (b'{"prompt":"SECRET\\ud83d"}', "holds half a surrogate pair (\\ud83d)"),
    (b'{"prompt":"a","metadata":{"\\uDE00":1}}', "holds half a surrogate pair (\\ude00)"),
    (b'{"prompt":"a","metadata":' + b'{"a":' * 64 + b"1" + b"}" * 65, "nested deeper than 64 levels"),
    (b"[" * 100_000, "nested deeper than 64 levels"),
]

BAD_LINES: list[tuple[dict[str, Any], str]] = [
    ({}, "holds no prompt, no messages, and no url and body"),
    ({"promt": "SECRET"}, "and no url and body of an OpenAI Batch line; did you mean prompt by 'promt'?"),
    ({"Messages": []}, "and no url and body of an OpenAI Batch line; did you mean messages by 'Messages'?"),
    ({"prompt": None, "promt": "SECRET"}, "holds no prompt, no messages, and no url and body of an OpenAI Batch line"),
    (X | {"temprature": 1}, "'temprature' is not supported here; did you mean temperature?"),
    (X | {"maxTokens": 1}, "'maxTokens' is not supported here; did you mean max_tokens?"),
    (M | {"tool_chioce": "none"}, "'tool_chioce' is not supported here; did you mean tool_choice?"),
    (X | {"temperature": 1, "temprature": 1}, "'temprature' is not supported here; remove it"),
    ({"custom_id": "a"}, "holds no prompt"),
    ({"messages": None}, "holds no prompt"),
    (X | M, "messages and prompt exclude each other"),
    ({"prompt": 5}, "prompt must be a string, not a number"),
    ({"prompt": ["SECRET"]}, "prompt must be a string, not a list"),
    (X | {"promt": 1}, "'promt' is not supported here; remove it"),
    (X | {"k" * 99: 1}, "'" + "k" * 36 + "... is not supported here"),
    (X | {"a\x1b[2J": None}, "'a\\x1b[2J' is not supported here"),
    (X | {"chat_template_kwargs": {"a": 1}}, "chat_template_kwargs goes with messages alone"),
    (M | {"chat_template_kwargs": []}, "chat_template_kwargs must be an object, not a list"),
    # custom_id
    (X | {"custom_id": ""}, "custom_id must be a string of 1 to 256 characters"),
    (X | {"custom_id": "i" * 257}, "custom_id must be a string of 1 to 256 characters"),
    (X | {"custom_id": 7}, "custom_id must be a string of 1 to 256 characters"),
    (X | {"custom_id": "a\nb"}, "none of them control characters; it is 'a\\nb'"),
    (X | {"custom_id": "a\x85"}, "none of them control characters"),
    (openai(M, custom_id=["SECRET"]), "none of them control characters; it is a list"),
    # OpenAI Batch lines
    (openai(M, method="GET"), "method must be one of POST; it is 'GET'"),
    (openai(M, url="/v1/embeddings"), "url must be one of /v1/chat/completions, /v1/completions, "),
    (openai(M, url=["SECRET"]), "url must be one of"),
    ({"body": M}, "url is missing or null"),
    ({"url": CHAT}, "body is missing or null"),
    (openai({}) | {"body": "SECRET"}, "body must be an object, not a string"),
    (openai(M, model="m"), "'model' is not supported here"),
    (openai(X), "body.'prompt' is not supported here"),
    (openai({"model": "m"}), "body.messages is missing or null"),
    (openai(M, COMPLETIONS), "body.'messages' is not supported here"),
    (openai({"prompt": [1, 2]}, COMPLETIONS), "body.prompt must be one string: tokens are not supported"),
    (openai({"prompt": ["SECRET", "b"]}, COMPLETIONS), "body.prompt must be one string"),
    (openai(M | {"max_tokens": 0}), "body.max_tokens must be an integer"),
    (openai(M | {"custom_id": "b"}), "body.'custom_id' is not supported here"),
    # messages
    ({"messages": []}, "messages must be a list of at least one message"),
    ({"messages": "SECRET"}, "messages must be a list of at least one message"),
    ({"messages": ["SECRET"]}, "messages[0] must be an object, not a string"),
    (said(content="SECRET"), "messages[1].role is missing or null"),
    (said(role="", content="SECRET"), "messages[1].role must be one of system, developer, user"),
    (said(role=["SECRET"], content=""), "messages[1].role must be one of"),
    (said(role="user"), "messages[1].content is missing or null"),
    (said(role="assistant", content=None), "messages[1].content is missing or null"),
    (said(role="user", content=5), "messages[1].content must be a string or a list of text parts"),
    (said(role="user", content=[]), "messages[1].content must be a string or a list of text parts"),
    (said(role="user", content=["SECRET"]), "messages[1].content[0] must be a part of type 'text'"),
    (
        said(role="user", content=[{"type": "image_url", "image_url": {"url": "SECRET"}}]),
        "messages[1].content[0] must be a part of type 'text', not 'image_url'",
    ),
    (said(role="user", content=[{"type": "text"}]), "messages[1].content[0].text is missing or null"),
    (
        said(role="user", content=[{"type": "text", "text": "SECRET", "cache_control": {}}]),
        "messages[1].content[0].'cache_control' is not supported here",
    ),
    (said(role="user", content="SECRET", tool_call_id="c"), "messages[1].'tool_call_id' is not supported"),
    (said(role="tool", content="SECRET", tool_call_id=""), "messages[1].tool_call_id must be a string that"),
    (said(role="tool", content=None, tool_call_id="c"), "messages[1].content is missing or null"),
    (said(role="assistant", content="", tool_calls=[{}]), "messages[1].tool_calls[0].type is missing or null"),
    (said(role="assistant", content=None, tool_calls=[]), "messages[1].content is missing or null"),
    (said(role="assistant", tool_calls="SECRET"), "messages[1].tool_calls must be a list of tool calls, not a string"),
    (said(role="assistant", tool_calls=[CALL | {"type": "custom"}]), "messages[1].tool_calls[0].type must be one of"),
    (said(role="assistant", tool_calls=[CALL | {"function": {"name": "w"}}]),
     "messages[1].tool_calls[0].function.arguments is missing or null"),
    (said(role="user", content="SECRET", tool_calls=[CALL]), "messages[1].tool_calls is not supported; remove"),
    (said(role="assistant", content="", refusal="SECRET"), "messages[1].refusal is not supported; remove it"),
    (said(role="user", content="", name=3), "messages[1].name must be a string, not a number"),
    # sampling
    *((X | {"max_tokens": value}, "max_tokens must be an integer from 1 to 2147483647, not ")
      for value in (0, -1, 2**31, 5.0, 1e9, True, "5", [5])),
    (X | {"max_tokens": True}, "not true"),
    (X | {"max_completion_tokens": 0}, "max_completion_tokens must be an integer"),
    (X | {"max_tokens": 1, "max_completion_tokens": 2}, "max_completion_tokens and max_tokens differ"),
    *((X | {"temperature": value}, "temperature must be a number from 0 to 100, not ")
      for value in TEMPERATURES),
    *((X | {"top_p": value}, "top_p must be a number from 0 to 1, not ")
      for value in (-0.1, 1.01, "1")),
    *((X | {"top_k": value}, "top_k must be an integer from 1 to 2147483647, or 0 or -1")
      for value in (-2, 1.0, True)),
    *((X | {"min_p": value}, "min_p must be a number from 0 to 1, not ") for value in (-0.1, 2, "0")),
    *((X | {"repetition_penalty": value}, "repetition_penalty must be a number above 0 and at most 100, not ")
      for value in (0, -1, 101, "1")),
    *((X | {"seed": value}, "seed must be an integer from -9223372036854775808 to 9223372036854775807, not ")
      for value in (2**63, -(2**63) - 1, 1.5, "1")),
    *((X | {"stop": value}, "stop must be a string or a list of at most 16 strings, none of them empty")
      for value in STOPS),
    # what is kept
    (X | {"user": 5}, "user must be a string, not a number"),
    (X | {"metadata": "SECRET"}, "metadata must be an object, not a string"),
    (X | {"store": 1}, "store must be a boolean, not a number"),
    (X | {"service_tier": {}}, "service_tier must be a string, not an object"),
    # what is not supported
    (X | {"stream": True}, "stream is not supported as true; remove it or write false"),
    (X | {"stream": 0}, "stream is not supported as 0"),
    (X | {"tools": [TOOL]}, "tools is not supported; remove it or write []"),
    (M | {"tools": [{}]}, "tools[0].type is missing or null"),
    (M | {"tools": [TOOL | {"type": "custom"}]}, "tools[0].type must be one of function; it is 'custom'"),
    (M | {"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name is missing or null"),
    (M | {"tools": [{"type": "function", "function": {"name": "w", "strict": True}}]},
     "tools[0].function.strict is not supported as true"),
    (M | {"tools": [TOOL] * 129}, "tools must be a list of at most 128 tools, not a list of 129"),
    (M | {"tool_choice": "required"}, "tool_choice 'required' is not supported, since no call can be forced"),
    (M | {"tool_choice": {"type": "function", "function": {"name": "w"}}}, "tool_choice of this form is not supported"),
    (M | {"parallel_tool_calls": 1}, "parallel_tool_calls must be a boolean, not a number"),
    (M | {"tools": [TOOL], "parallel_tool_calls": False}, "parallel_tool_calls is not supported as false beside tools"),
    (M | {"modalities": ["text", "audio"]}, "modalities is not supported"),
    (X | {"suffix": "SECRET"}, "suffix is not supported; remove it"),
    (X | {"echo": True}, "echo is not supported as true"),
    (M | {"stream_options": {"include_usage": True}}, "stream_options is not supported; remove it"),
    (M | {"reasoning_effort": "high"}, "reasoning_effort is not supported; remove it"),
    (X | {"model": ""}, "model must be the name of a model, not ''"),
    (X | {"model": 5}, "model must be the name of a model, not 5"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "said"), BAD_JSON, ids=[said for _, said in BAD_JSON])
def test_a_line_that_is_no_plain_json_is_refused(problem: Callable[..., str], line: bytes, said: str) -> None:
    assert problem(line) == said


@pytest.mark.parametrize(("line", "said"), BAD_LINES, ids=[said for _, said in BAD_LINES])
def test_a_bad_line_is_refused_by_name_and_shows_no_prompt(
    problem: Callable[..., str], line: dict[str, Any], said: str
) -> None:
    text = problem(line)
    assert said in text
    assert "SECRET" not in text
    assert len(text) < 200
    assert text.isprintable()


def test_nesting_of_64_levels_and_brackets_in_text_are_fine(tmp_path: Path) -> None:
    nested = '{"prompt":"' + '[{\\"' * 500 + '","metadata":' + '{"a":' * 62 + "{}" + "}" * 63
    [request] = requests(write(tmp_path, nested.encode()))
    assert request.prompt == '[{"' * 500


def test_a_long_unfinished_string_of_escapes_is_refused_at_once(problem: Callable[..., str]) -> None:
    line = b"[" * 65 + b'"' + b'\\"' * (MAX_LINE_BYTES // 2 - 100)
    assert problem(line) == "nested deeper than 64 levels"


def test_escaped_pairs_and_escaped_backslashes_are_text(tmp_path: Path) -> None:
    [request] = requests(write(tmp_path, b'{"prompt":"\\ud83d\\ude00 \\\\u0000 \\u4f60"}'))
    assert request.prompt == "\U0001f600 \\u0000 你"


def test_every_bad_line_is_reported_with_its_number_in_file_order(tmp_path: Path) -> None:
    path = write(tmp_path, b'{"prompt":1}\n\n' + GOOD + b'x\n{"prompt":"ok"}\r\n{}')
    caught = error(path)
    assert caught.exit_code == 2
    assert caught.count == 3
    assert [text.removeprefix(path).split(" ")[0] for text in caught.problems] == [":1:", ":4:", ":6:"]
    assert str(caught) == f"{path}: 3 bad lines"


def test_good_lines_are_yielded_though_a_bad_one_came_before(tmp_path: Path) -> None:
    path = write(tmp_path, b"\n" + GOOD + b"x\n" + GOOD)
    seen: list[PromptLine] = []
    with PromptFile(path) as prompts:
        seen.extend(prompts)
    assert [(line.number, line.request.index, line.size_bytes) for line in seen] == [(2, 0, 18), (4, 2, 18)]


def test_equal_errors_are_counted_after_the_fifth(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD + b"x\n" * 1_209 + b'{"prompt":1}\n{"prompt":[]}\n')
    caught = error(path)
    assert caught.problems == (
        *(f"{path}:{number}: not JSON: Expecting value at column 1" for number in range(2, 7)),
        "... and 1,204 more lines with this error",
        f"{path}:1211: prompt must be a string, not a number",
        f"{path}:1212: prompt must be a string, not a list",
    )
    assert (caught.count, str(caught)) == (1_211, f"{path}: 1,211 bad lines")


def test_only_the_first_hundred_bad_lines_are_named(tmp_path: Path) -> None:
    lines = [b'{"prompt":"x","%c%c":1}\n' % (97 + number // 25, 97 + number % 25) for number in range(250)]
    path = write(tmp_path, b"".join(lines))
    caught = error(path)
    assert len(caught.problems) == 100
    assert caught.problems[-1].startswith(f"{path}:100: ")
    assert str(caught) == f"{path}: 250 bad lines, of which 150 with other errors are not listed"


def test_the_caller_reports_lines_of_its_own(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD * 3)
    with PromptFile(path) as prompts:
        numbers = [line.number for line in prompts]
        prompts.raise_if_bad()
        prompts.report(numbers[2], "custom_id 'a' stands in line 2 too")
        prompts.report(numbers[0], "custom_id 'b' is taken")
        with pytest.raises(PromptFileError) as caught:
            prompts.raise_if_bad()
    assert caught.value.problems == (
        f"{path}:1: custom_id 'b' is taken",
        f"{path}:3: custom_id 'a' stands in line 2 too",
    )


# --- models -------------------------------------------------------------------------------------------------


def test_a_line_may_name_any_spelling_of_the_model(tmp_path: Path) -> None:
    lines = b'{"prompt":"a","model":"./m"}\n{"prompt":"b","model":"/real/m"}\n{"prompt":"c"}'
    with PromptFile(write(tmp_path, lines), models=["./m", "/real/m"]) as prompts:
        assert len(list(prompts)) == 3
        assert prompts.model is None


def test_another_model_is_a_bad_line_and_says_what_to_do(problem: Callable[..., str]) -> None:
    text = problem(openai({"model": "gpt", "messages": [HELLO]}), models=["m", "/real/m"])
    assert text.startswith("model is 'gpt' and not '/real/m' or 'm'")
    assert "--ignore-line-model" in text


@pytest.mark.parametrize("models", [[], ["m"]])
def test_the_models_of_lines_can_be_ignored(tmp_path: Path, models: list[str]) -> None:
    lines = b'{"prompt":"a","model":"x"}\n{"prompt":"b","model":"y"}'
    with PromptFile(write(tmp_path, lines), models=models, ignore_line_model=True) as prompts:
        assert len(list(prompts)) == 2
        assert prompts.model is None


def test_without_a_model_the_first_one_named_is_the_files(tmp_path: Path) -> None:
    lines = b'{"prompt":"a"}\n{"prompt":"b","model":"m"}\n{"prompt":"c","model":"m"}\n'
    with PromptFile(write(tmp_path, lines)) as prompts:
        assert len(list(prompts)) == 3
        assert prompts.model == "m"
    caught = error(write(tmp_path, lines + b'{"prompt":"d","model":"n"}'))
    assert [":4: model is 'n' and not 'm'" in text for text in caught.problems] == [True]


def test_a_line_names_an_adapter_by_its_key_or_by_its_models(tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = [
        {"prompt": "a", "adapter": "sql"},
        {"prompt": "b", "model": "sql"},
        {"messages": [HELLO], "adapter": "sql", "model": "m"},
        {"prompt": "d", "adapter": "x", "model": "x"},
        {"prompt": "e", "adapter": None, "model": "m"},
        openai({"model": "x", "messages": [HELLO], "max_tokens": 3}),
        openai({"prompt": "g", "adapter": "sql"}, COMPLETIONS, custom_id="g"),
    ]
    path = write(tmp_path, "\n".join(map(json.dumps, lines)).encode())
    named = [each.adapter for each in requests(path, models=["m"], adapters=["sql", "x"])]
    assert named == ["sql", "sql", "sql", "x", None, "x", "sql"]
    with PromptFile(path, adapters=["sql", "x", "unused"]) as prompts:
        assert len(list(prompts)) == 7
        assert (prompts.model, prompts.unnamed_adapters) == ("m", ["unused"])
    ignored = requests(path, models=["other"], adapters=["sql", "x"], ignore_line_model=True)
    assert [each.adapter for each in ignored] == named


@pytest.mark.parametrize(
    ("line", "adapters", "said"),
    [
        ({"adapter": "sql"}, [], "adapter is 'sql', an adapter that was not declared; --adapter NAME declares one"),
        ({"adapter": "sq"}, ["x", "sql"], "adapter is 'sq', none of the adapters 'sql', 'x'; --adapter NAME declares"),
        ({"adapter": 5}, ["x"], "adapter must be a string"),
        ({"adapter": ""}, ["x"], "adapter must be a string that is not empty"),
        ({"adapter": "x", "model": "sql"}, ["x", "sql"], "model is 'sql', and adapter is 'x'; name one of them"),
        ({"model": "sq"}, ["sql"], "model is 'sq' and not 'm' or 'sql'; -m MODEL --ignore-line-model"),
        ({"adapter": "x", "model": "n"}, ["x"], "model is 'n' and not 'm' or 'x'"),
    ],
)
def test_an_adapter_that_cannot_be_is_a_bad_line(
    problem: Callable[..., str], line: dict[str, Any], adapters: list[str], said: str
) -> None:
    assert problem({"prompt": "p"} | line, models=["m"], adapters=adapters).startswith(said)
    body = openai({"messages": [HELLO]} | line)
    assert said.split(";")[0].removeprefix("adapter ") in problem(body, models=["m"], adapters=adapters)


def test_without_any_model_the_file_has_none(tmp_path: Path) -> None:
    with PromptFile(write(tmp_path, GOOD)) as prompts:
        list(prompts)
        assert prompts.model is None


# --- bytes and lines ----------------------------------------------------------------------------------------


def test_bom_crlf_blank_lines_and_a_missing_last_newline_are_fine(tmp_path: Path) -> None:
    data = b'\xef\xbb\xbf{"prompt":"a"}\r\n\r\n \t\xe3\x80\x80\n' + b' {"prompt":"b"} \r\n\n{"prompt":"c"}'
    with PromptFile(write(tmp_path, data)) as prompts:
        assert [(line.number, line.request.index, line.request.prompt) for line in prompts] == [
            (1, 0, "a"), (4, 1, "b"), (6, 2, "c"),
        ]  # fmt: skip


def test_a_byte_order_mark_is_one_at_byte_0_alone(tmp_path: Path) -> None:
    found = requests(write(tmp_path, b"ab\n\xef\xbb\xbfc", "p.txt"))
    assert [each.prompt for each in found] == ["ab", "\ufeffc"]


@pytest.mark.parametrize("splitter", ["\u2028", "\u2029", "\x85", "\x7f"])
def test_unicode_line_ends_do_not_split_a_line(tmp_path: Path, splitter: str) -> None:
    data = json.dumps({"prompt": f"a{splitter}b"}, ensure_ascii=False).encode() + b"\n" + GOOD
    assert [each.prompt for each in requests(write(tmp_path, data))] == [f"a{splitter}b", "fine"]


def test_a_byte_offset_counts_from_the_files_first_byte(tmp_path: Path) -> None:
    overlong = b"x" * (MAX_LINE_BYTES + 99)
    caught = error(write(tmp_path, b"\xef\xbb\xbf" + GOOD + b"\r\n\xff\n" + overlong + b"\n\xfe"))
    first, _, last = caught.problems
    assert first.endswith(":3: not UTF-8: byte 23 is 0xff")
    assert last.endswith(f":5: not UTF-8: byte {25 + MAX_LINE_BYTES + 100} is 0xfe")


def test_a_txt_file_has_one_prompt_per_line_used_as_it_is(tmp_path: Path) -> None:
    data = 'one\r\n\n \u3000 \n {"prompt": "two"} \nthr\ree\u2028\x1b\n\nlast'.encode()
    found = requests(write(tmp_path, data, "Prompts.TXT"))
    assert [each.prompt for each in found] == ["one", ' {"prompt": "two"} ', "thr\ree\u2028\x1b", "last"]
    assert [each.custom_id for each in found] == [f"request-{index}" for index in range(4)]
    assert found[0] == GenerationRequest(0, "request-0", "one")


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"SECRET a\0", "holds a NUL character"),
        (b"caf\xe9", "not UTF-8: byte 3 is 0xe9"),
        (b"a" * (MAX_LINE_BYTES + 1), "longer than 16777216 bytes; raise the setting max_line_bytes to allow it"),
    ],
)
def test_a_bad_line_of_text_is_refused(problem: Callable[..., str], data: bytes, said: str) -> None:
    assert problem(data, name="p.txt") == said


@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n"])
@pytest.mark.parametrize("begin", [b"", b"\xef\xbb\xbf"])
def test_a_line_may_have_16_mebibytes_and_no_byte_more(tmp_path: Path, begin: bytes, end: bytes) -> None:
    most = b"a" * MAX_LINE_BYTES
    found = requests(write(tmp_path, begin + most + b"\r\n" + most + b"\nlast" + end, "p.txt"))
    assert [len(each.prompt or "") for each in found] == [MAX_LINE_BYTES, MAX_LINE_BYTES, 4]
    assert len(requests(write(tmp_path, begin + most + end, "p.txt"))) == 1
    for more in (1, 2, 3, 4, 7, 100):
        caught = error(write(tmp_path, begin + most + b"a" * more + end + b"\n\nlast", "p.txt"))
        (text,) = caught.problems
        assert text.endswith(":1: longer than 16777216 bytes; raise the setting max_line_bytes to allow it")


def test_an_endless_line_is_skipped_without_holding_it(tmp_path: Path) -> None:
    path = tmp_path / "endless.jsonl"
    with path.open("wb") as out:
        out.write(GOOD + b'{"prompt":"')
        out.truncate(64 << 20)
    with path.open("ab") as out:
        out.write(b'"}\nbad\n' + GOOD)
    tracemalloc.start()
    try:
        caught = error(str(path), max_line_bytes=1 << 20)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert [text.removeprefix(f"{path}:").split(" ")[0] for text in caught.problems] == ["2:", "3:"]
    assert peak < 6 << 20


def test_a_long_file_is_read_in_constant_memory(tmp_path: Path) -> None:
    path = write(tmp_path, json.dumps({"prompt": "a" * 1000}).encode().join([b"\n"] * 5_001))
    tracemalloc.start()
    try:
        with PromptFile(path) as prompts:
            assert sum(1 for _ in prompts) == 5_000
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20


def test_the_hash_is_of_the_files_bytes(tmp_path: Path) -> None:
    data = b"\xef\xbb\xbf" + GOOD + b"\r\n\n" + b"x" * (3 * MAX_LINE_BYTES) + b"\n" + GOOD
    with PromptFile(write(tmp_path, data)) as prompts:
        list(prompts)
        assert prompts.sha256 == hashlib.sha256(data).hexdigest()
        assert prompts.name == "prompts.jsonl"


# --- files, pipes and what is neither -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "holds no prompts"),
        (b"\xef\xbb\xbf", "holds no prompts"),
        (b"\n\r\n  \n", "holds no prompts"),
        ('{"prompt":"a"}'.encode("utf-16"), "is UTF-16"),
        (b"\xfe\xff" + '{"prompt":"a"}'.encode("utf-16-be"), "is UTF-16"),
        ('{"prompt":"a"}'.encode("utf-16-le"), "looks like UTF-16; text is read as UTF-8, so convert it: "),
        ('{"prompt":"a"}'.encode("utf-16-be"), "looks like UTF-16"),
        ('{"prompt":"a"}'.encode("utf-32"), "is UTF-32"),
        (b"\x1f\x8b\x08\0", "is compressed by gzip, which batchmill does not unpack; run gunzip first"),
        (b"\x28\xb5\x2f\xfd\0", "run zstd -d first"),
        (b"PK\x03\x04", "is a zip archive"),
        (b"BZh91AY&SY", "run bunzip2 first"),
        (b"\xfd7zXZ\0", "run unxz first"),
    ],
)
@pytest.mark.parametrize("name", ["p.jsonl", "p.txt"])
def test_a_file_that_is_no_prompt_file_is_refused(tmp_path: Path, name: str, data: bytes, said: str) -> None:
    path = write(tmp_path, data, name)
    caught = error(path)
    assert str(caught).startswith(f"{path}: {said}" if said.startswith(("is", "looks", "holds")) else path)
    assert said in str(caught)
    assert caught.exit_code == 2


def test_text_that_begins_like_an_archive_is_text(tmp_path: Path) -> None:
    found = requests(write(tmp_path, b"BZhang\nPKZIP", "p.txt"))
    assert [each.prompt for each in found] == ["BZhang", "PKZIP"]


def test_what_cannot_be_opened_is_refused_at_once(tmp_path: Path) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    for path, said in (
        (tmp_path / "missing.jsonl", "cannot be read: No such file or directory"),
        (loop, "cannot be read: Too many levels of symbolic links"),
        (tmp_path, "is a folder"),
        ("/dev/zero", "is neither a file nor a pipe"),
        ("/dev/null", "is neither a file nor a pipe"),
    ):
        with pytest.raises(PromptFileError, match=f"{path}: {said}"):
            PromptFile(str(path))


def test_a_socket_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("s")
        with pytest.raises(PromptFileError, match="s: is neither a file nor a pipe"):
            PromptFile("s")


@pytest.mark.parametrize("change", [GOOD, b"", b'{"prompt":"else"}\n'])
def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path, change: bytes) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(GOOD)
    os.utime(path, ns=(0, 0))
    with PromptFile(str(path)) as prompts:
        lines = iter(prompts)
        next(lines)
        path.write_bytes(change)
        with pytest.raises(PromptFileError, match="changed while it was being read"):
            list(lines)


def test_a_pipe_is_read_as_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    was_read = threading.Event()

    def write_lines() -> None:
        with path.open("wb", buffering=0) as out:
            out.write(GOOD)
            assert was_read.wait(10)
            out.write(b'{"prompt"')
            out.write(b':"last"}')

    writer = threading.Thread(target=write_lines)
    writer.start()
    with PromptFile(str(path)) as prompts:
        lines = iter(prompts)
        assert next(lines).request.prompt == "fine"
        was_read.set()
        assert [line.request.prompt for line in lines] == ["last"]
    writer.join()
    assert prompts.sha256 == hashlib.sha256(GOOD + b'{"prompt":"last"}').hexdigest()


def test_a_dash_reads_standard_input(from_stdin: Callable[[bytes], None]) -> None:
    from_stdin(GOOD + b'{"prompt":"b"}')
    with PromptFile("-") as prompts:
        assert [line.request.prompt for line in prompts] == ["fine", "b"]
        assert prompts.name == "stdin"
    assert not sys.stdin.closed
    from_stdin(b"\n{x")
    assert error("-").problems == ("stdin:2: not JSON: Expecting property name enclosed in double quotes at column 2",)
    from_stdin(b"")
    assert str(error("-")) == "stdin: holds no prompts"


def test_a_closed_standard_input_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(PromptFileError, match="stdin: is closed"):
        PromptFile("-")


def test_a_stream_that_breaks_is_an_error_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(io.RawIOBase):
        def readable(self) -> bool:
            return True

        def readinto(self, buffer: Any) -> int:
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(Broken())))
    assert str(error("-")) == "stdin: cannot be read: Input/output error"


# --- any bytes, any JSON ------------------------------------------------------------------------------------

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))
ANY_TEXT = st.text(max_size=20) | st.sampled_from([CHAT, COMPLETIONS, "POST", "user", "text", "\0", "\ud800"])
ANY_SCALAR = st.none() | st.booleans() | st.integers() | st.floats() | ANY_TEXT
LIKELY_KEYS: dict[str, st.SearchStrategy[Any]] = {
    "max_tokens": st.integers(1, 9),
    "temperature": st.floats(0, 2) | st.integers(0, 100),
    "top_k": st.integers(-1, 99),
    "stop": TEXT | st.lists(TEXT.filter(bool), max_size=16),
    "seed": st.integers(-(2**63), 2**63 - 1),
    "metadata": st.dictionaries(TEXT, st.floats(allow_nan=False, allow_infinity=False) | st.none() | TEXT),
    "user": TEXT,
    "min_tokens": st.integers(0, 9),
    "n": st.integers(1, 128),
    "logprobs": st.booleans(),
    "presence_penalty": st.floats(-2, 2),
    "logit_bias": st.dictionaries(st.integers(0, 99).map(str), st.floats(-100, 100)),
    "stop_token_ids": st.lists(st.integers(0, 99)),
    "guided_choice": st.lists(TEXT),
    "response_format": st.fixed_dictionaries(
        {"type": st.sampled_from(["text", "json_object", "json_schema", "regex"])},
        optional={"schema": st.dictionaries(TEXT, TEXT), "regex": TEXT},
    ),
}
KEYS = [
    "custom_id", "method", "url", "body", "messages", "prompt", "model", "role", "content", "type", "text",
    "chat_template_kwargs", "stream", "tools", "top_logprobs", "best_of", "structured_outputs", "other", *LIKELY_KEYS,
]  # fmt: skip
ANY_KEY = st.sampled_from(KEYS)
ANY_JSON = st.recursive(
    ANY_SCALAR, lambda child: st.lists(child) | st.dictionaries(ANY_KEY, child, max_size=5), max_leaves=20
)
ANY_OBJECT = st.dictionaries(ANY_KEY, ANY_JSON, max_size=2)
MORE = ANY_OBJECT | st.fixed_dictionaries({}, optional=LIKELY_KEYS)
ANY_LINE = st.one_of(
    ANY_OBJECT,
    MORE.map(lambda more: {"prompt": "a"} | more),
    MORE.map(lambda more: {"messages": [HELLO]} | more),
    MORE.map(lambda more: {"messages": [HELLO | more]}),
    MORE.map(lambda more: openai({"messages": [HELLO]} | more)),
    MORE.map(lambda more: openai({"prompt": "a"}, COMPLETIONS) | more),
)


def read_bytes(data: bytes, name: str) -> list[GenerationRequest] | None:
    """The requests of these bytes, or None where they are refused."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        prompts = PromptFile("-", form="text" if name.endswith(".txt") else None)
        try:
            found = [line.request for line in prompts]
            prompts.raise_if_bad()
            return found
        except PromptFileError:
            return None


def assert_storable(found: list[GenerationRequest] | None) -> None:
    for request in found or ():
        body = request.to_body()
        assert "\\u0000" not in body.replace("\\\\", "")
        assert GenerationRequest.from_body(request.index, request.custom_id, body) == request
        assert (request.custom_id + body).encode()


@given(data=st.binary(max_size=300), name=st.sampled_from(["a.jsonl", "a.txt"]))
@settings(max_examples=300)
def test_any_bytes_are_read_or_refused(data: bytes, name: str) -> None:
    assert_storable(read_bytes(data, name))


@given(line=ANY_LINE, ascii_only=st.booleans())
@settings(max_examples=500)
def test_any_json_is_read_or_refused(line: dict[str, Any], ascii_only: bool) -> None:
    text = json.dumps(line, ensure_ascii=ascii_only)
    assert_storable(read_bytes(text.encode("utf-8", "surrogatepass"), "a.jsonl"))


@given(data=st.data())
@settings(max_examples=200)
def test_a_good_file_cut_or_changed_anywhere_is_read_or_refused(data: st.DataObject) -> None:
    body = {"messages": [HELLO], "stop": ["a"], "top_p": 0.5, "metadata": {"a": 1}}
    whole = json.dumps(openai(body)).encode()
    begin = data.draw(st.integers(0, len(whole)))
    end = data.draw(st.integers(begin, len(whole)))
    assert_storable(read_bytes(whole[:begin] + data.draw(st.binary(max_size=5)) + whole[end:], "a.jsonl"))


LINE_END = st.sampled_from(["\n", "\r\n"])


@given(texts=st.lists(TEXT, min_size=1, max_size=8), ascii_only=st.booleans(), end=LINE_END)
@settings(max_examples=200)
def test_texts_come_back_exactly(texts: list[str], ascii_only: bool, end: str) -> None:
    lines: list[dict[str, Any]] = [{"prompt": text} for text in texts]
    lines += [{"messages": [{"role": "user", "content": text}]} for text in texts]
    data = end.join(json.dumps(line, ensure_ascii=ascii_only) for line in lines).encode()
    found = read_bytes(data, "a.jsonl")
    assert found is not None
    assert [each.prompt for each in found[: len(texts)]] == texts
    assert [each.messages[0]["content"] for each in found[len(texts) :] if each.messages] == texts
    assert_storable(found)
