"""One line of a prompt file, decoded -> one Request: which keys a line may have, and which values.

It owns the forms of a line, its messages, and what is kept without effect. It does not know what may be asked of
the sampler (`options` does), nor files, bytes, JSON text or line numbers (`producer.files.prompt_file`), nor whether a
custom_id is unique (the store).

Whatever a line says is obeyed, kept and returned, or refused by name; a null asks for nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from batchmill.jobs.requests.generation import CUSTOM_ID_LENGTH, NO_SAMPLING, Request
from batchmill.producer.requests.checks import (
    BOOLEAN,
    OBJECT,
    STRING,
    BadLine,
    Check,
    filled_text,
    kind,
    meant_key,
    one_of,
    only,
    refused,
    shown,
    take,
    take_each,
)
from batchmill.producer.requests.options import CHAT_SAMPLING, PROMPT_SAMPLING, sampling_of
from batchmill.producer.requests.tools import tool_calls, tool_choice, tools

ROLES = ("system", "developer", "user", "assistant", "tool", "function")

#: The keys that tell the forms of a line apart.
_ESSENTIAL = frozenset({"prompt", "messages", "body", "url"})
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


def json_request(line: Any, index: int, *, adapter_of: Callable[[str | None, str | None], str | None]) -> Request:
    """The request of one decoded line of JSON; `adapter_of` is given the model and the adapter that it names.

    It returns the request's adapter, if it has one. Raises BadLine, as `adapter_of` may.
    """
    if type(line) is not dict:
        raise BadLine(f"must be a JSON object, not {kind(line)}")
    if line.get("prompt") is not None:
        taken = take(line, _SHORT_PROMPT, "prompt")
    elif line.get("messages") is not None:
        taken = take(line, _SHORT_CHAT, "messages")
    elif "body" in line or "url" in line:
        taken = _openai_batch(line)
    else:
        raise BadLine(f"holds no prompt, no messages, and no url and body of an OpenAI Batch line{_guess(line)}")
    adapter = None
    if "model" in taken or "adapter" in taken:
        adapter = adapter_of(taken.pop("model", None), taken.pop("adapter", None))
    return _request(taken, index, adapter)


def _guess(line: dict[str, Any]) -> str:
    """The key that a line lacks, where one of its keys is likely a slip of it."""
    absent = _ESSENTIAL - line.keys()
    slips = ((key, meant) for key in line if (meant := meant_key(key, absent)) is not None)
    return next((f"; did you mean {meant} by {shown(key)}?" for key, meant in slips), "")


def text_request(line: str, index: int) -> Request:
    """The request of one line of plain text; BadLine if no database can hold it."""
    if "\0" in line:
        raise BadLine("holds a NUL character")
    return Request(index, f"request-{index}", line)


def _openai_batch(line: dict[str, Any]) -> dict[str, Any]:
    envelope = take(line, _ENVELOPE, "url", "body")
    checks, content = _ENDPOINTS[envelope["url"]]
    try:
        taken = take(envelope["body"], checks, content)
    except BadLine as exc:
        raise exc.inside("body") from None
    if "custom_id" in envelope:
        taken["custom_id"] = envelope["custom_id"]
    return taken


def _request(taken: dict[str, Any], index: int, adapter: str | None) -> Request:
    custom_id = taken.pop("custom_id", None) or f"request-{index}"
    prompt, messages = taken.pop("prompt", None), taken.pop("messages", None)
    template = taken.pop("chat_template_kwargs", None) or None
    if not taken:
        return Request(index, custom_id, prompt, messages, NO_SAMPLING, template, None, adapter)
    told, calls_tools = _tools(taken)
    kept = {key: taken.pop(key) for key in _KEPT if key in taken} or None
    return Request(index, custom_id, prompt, messages, sampling_of(taken), template, kept, adapter, told, calls_tools)


def _tools(taken: dict[str, Any]) -> tuple[tuple[dict[str, Any], ...] | None, bool]:
    """The tools that a line names, and whether its answer may call them."""
    told, choice, parallel = (taken.pop(key, None) for key in _TOOLS)
    if told and parallel is False:
        raise BadLine("is not supported as false beside tools, since calls cannot be limited", "parallel_tool_calls")
    return told, not told or choice != "none"


def _custom_id(value: Any) -> str:
    if type(value) is str and 0 < len(value) <= CUSTOM_ID_LENGTH and not _CONTROL.search(value):
        return value
    wanted = f"1 to {CUSTOM_ID_LENGTH} characters, none of them control characters"
    raise BadLine(f"must be a string of {wanted}; it is {shown(value)}")


def _model(value: Any) -> str:
    if type(value) is str and value:
        return value
    raise BadLine(f"must be the name of a model, not {shown(value)}")


def _completion_prompt(value: Any) -> Any:
    if type(value) is not list:
        return STRING(value)
    if len(value) == 1 and type(value[0]) is str:
        return value[0]
    raise BadLine("must be one string: tokens are not supported, and each prompt has a line of its own")


def _content(value: Any) -> str:
    if type(value) is str:
        return value
    if type(value) is not list or not value:
        raise BadLine("must be a string or a list of text parts")
    return "".join(take_each(value, _part))


def _part(value: Any) -> Any:
    if type(value) is dict and value.get("type") == "text":
        return take(value, _PART, "text")["text"]
    given = f", not {shown(value.get('type'))}" if type(value) is dict else ""
    raise BadLine(f"must be a part of type 'text'{given}")


def _messages(value: Any) -> tuple[dict[str, Any], ...]:
    if type(value) is not list or not value:
        raise BadLine("must be a list of at least one message")
    return tuple(take_each(value, _message))


def _message(value: Any) -> dict[str, Any]:
    if type(value) is not dict:
        raise BadLine(f"must be an object, not {kind(value)}")
    role = value.get("role")
    checks = _MESSAGE | (_MESSAGE_OF.get(role, {}) if type(role) is str else {})
    return take(value, checks, "role", *(() if value.get("tool_calls") else ("content",)))


_PART: dict[str, Check] = {"type": STRING, "text": STRING}
_MESSAGE: dict[str, Check] = {
    "role": one_of(*ROLES), "content": _content, "name": STRING, "tool_calls": only([]),
    "annotations": only([]), "refusal": only(), "function_call": only(), "audio": only(),
}  # fmt: skip
_MESSAGE_OF: dict[str, dict[str, Check]] = {
    "assistant": {"tool_calls": tool_calls}, "tool": {"tool_call_id": filled_text}
}  # fmt: skip
_TOOLS: dict[str, Check] = {"tools": tools, "tool_choice": tool_choice, "parallel_tool_calls": BOOLEAN}
_KEPT: dict[str, Check] = {"user": STRING, "metadata": OBJECT, "store": BOOLEAN, "service_tier": STRING}
_ASKS_NOTHING: dict[str, Check] = {
    "suffix": only(), "stream": only(False), "stream_options": only(), "tools": only([]),
    "tool_choice": only("none", "auto"), "parallel_tool_calls": only(False, True), "functions": only([]),
    "function_call": only("none", "auto"), "modalities": only(["text"]), "audio": only(), "prediction": only(),
    "reasoning_effort": only(), "verbosity": only(), "web_search_options": only(), "prompt_cache_key": only(),
    "safety_identifier": only(),
}  # fmt: skip
_BODY = {"model": _model, "adapter": filled_text} | _KEPT | _ASKS_NOTHING
_NO_TEMPLATE, _NO_MESSAGES = refused("goes with messages alone"), refused("and prompt exclude each other")
_CHAT = _BODY | _TOOLS | CHAT_SAMPLING | {"messages": _messages, "chat_template_kwargs": OBJECT}
_COMPLETION = _BODY | PROMPT_SAMPLING | {"prompt": _completion_prompt, "chat_template_kwargs": _NO_TEMPLATE}
_SHORT_CHAT = _CHAT | {"custom_id": _custom_id, "prompt": STRING}
_SHORT_PROMPT = _COMPLETION | {"custom_id": _custom_id, "prompt": STRING, "messages": _NO_MESSAGES}
#: With and without the version, as OpenAI's files and Azure's have them.
_ENDPOINTS = {
    f"{version}{path}": form
    for version in ("/v1", "")
    for path, form in {"/chat/completions": (_CHAT, "messages"), "/completions": (_COMPLETION, "prompt")}.items()
}
_ENVELOPE = {"custom_id": _custom_id, "method": one_of("POST"), "url": one_of(*_ENDPOINTS), "body": OBJECT}
