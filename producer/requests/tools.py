"""Tools and the calls of them, as a line has them in OpenAI's form -> what a Request keeps.

It owns what a tool, a call of one and a choice among them may be. It does not know how a model is told of them, nor
what its answer calls: both follow from the model's chat template, which the worker has.
"""

from __future__ import annotations

import json
from typing import Any

from batchmill.producer.requests.checks import (
    OBJECT,
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

MAX_TOOLS = 128


def tools(value: Any) -> tuple[dict[str, Any], ...] | None:
    """The functions that a model may call; an empty list asks for nothing."""
    if type(value) is not list or len(value) > MAX_TOOLS:
        given = f"a list of {len(value)}" if type(value) is list else kind(value)
        raise BadLine(f"must be a list of at most {MAX_TOOLS} tools, not {given}")
    return tuple(take_each(value, _tool)) or None


def tool_choice(value: Any) -> str:
    """`auto` where the model may call tools, else `none`. That it must, or which one, cannot be promised."""
    if value in ("none", "auto"):
        return str(value)
    given = repr(value) if value == "required" else "of this form" if type(value) is dict else f"as {shown(value)}"
    raise BadLine(f"{given} is not supported, since no call can be forced; remove it or write 'auto' or 'none'")


def tool_calls(value: Any) -> list[dict[str, Any]] | None:
    """The calls of an earlier answer; an empty list is none."""
    if type(value) is not list:
        raise BadLine(f"must be a list of tool calls, not {kind(value)}")
    return take_each(value, _call) or None


def _tool(value: Any) -> dict[str, Any]:
    return take(OBJECT(value), _TOOL, "type", "function")


def _function(value: Any) -> dict[str, Any]:
    return take(OBJECT(value), _FUNCTION, "name")


def _call(value: Any) -> dict[str, Any]:
    return take(OBJECT(value), _CALL, "type", "function")


def _called(value: Any) -> dict[str, Any]:
    return take(OBJECT(value), _CALLED, "name", "arguments")


def _arguments(value: Any) -> str:
    """JSON text, as OpenAI has it; an object becomes it."""
    return json.dumps(value, ensure_ascii=False) if type(value) is dict else STRING(value)


_FUNCTION: dict[str, Check] = {
    "name": filled_text, "description": STRING, "parameters": OBJECT, "strict": only(False)
}  # fmt: skip
_TOOL: dict[str, Check] = {"type": one_of("function"), "function": _function}
_CALLED: dict[str, Check] = {"name": filled_text, "arguments": _arguments}
_CALL: dict[str, Check] = {"id": filled_text, "type": one_of("function"), "function": _called}
