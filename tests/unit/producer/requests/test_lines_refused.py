"""Bad lines of prompt files: each is refused by the name of its key, and no message shows a prompt."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.support.prompt_files import CHAT, COMPLETIONS, HELLO, TOOL, openai

X: dict[str, Any] = {"prompt": "SECRET"}
M: dict[str, Any] = {"messages": [{"role": "user", "content": "SECRET"}]}


def said(**message: Any) -> dict[str, Any]:
    return {"messages": [HELLO, message]}


CALL: dict[str, Any] = {"id": "c", "type": "function", "function": {"name": "w", "arguments": "{}"}}
TEMPERATURES: list[Any] = [-0.1, 100.1, 10**400, "1", False, {}]
STOPS: list[Any] = [5, [""], ["a", 5], ["a"] * 17, {"SECRET": 1}, False]
#: Each with a part of its message.
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


@pytest.mark.parametrize(("line", "said"), BAD_LINES, ids=[said for _, said in BAD_LINES])
def test_a_bad_line_is_refused_by_name_and_shows_no_prompt(
    problem: Callable[..., str], line: dict[str, Any], said: str
) -> None:
    text = problem(line)
    assert said in text
    assert "SECRET" not in text
    assert len(text) < 200
    assert text.isprintable()
