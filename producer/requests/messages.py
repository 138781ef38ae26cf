"""The messages of a chat, as a line has them in OpenAI's form -> what a Request keeps."""

from __future__ import annotations

from typing import Any

from batchmill.producer.requests.checks import (
    STRING,
    BadLine,
    Check,
    filled_text,
    kind,
    one_of,
    only,
    shown,
    take,
    take_each,
)
from batchmill.producer.requests.tools import tool_calls

ROLES = ("system", "developer", "user", "assistant", "tool", "function")


def messages(value: Any) -> tuple[dict[str, Any], ...]:
    """At least one message."""
    if type(value) is not list or not value:
        raise BadLine("must be a list of at least one message")
    return tuple(take_each(value, _message))


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
