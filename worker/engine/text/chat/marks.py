"""Marked conversations: every text is a mark of its own, so that a text that a template leaves out is missed.

Owns the parts of a conversation that a template has to write: the content of each message, the name and the arguments
of each tool call, and the name of each tool. A template may leave out other keys, such as an id.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from batchmill.worker.engine.text.chat.form import arguments_of


def shape_of(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]
) -> tuple[Any, ...]:
    """The shape of a conversation: all that a template can tell of it besides its texts.

    Conversations of equal shapes have equal marked conversations.
    """
    parameters = json.dumps([tools, variables], sort_keys=True, default=repr)
    return (*(_shape(each) for each in messages), hashlib.sha256(parameters.encode(errors="backslashreplace")).digest())


def _shape(message: Mapping[str, Any]) -> tuple[Any, ...]:
    content = message.get("content")
    calls = tuple(_arguments_kind(call) for call in message.get("tool_calls") or ())
    return (
        message["role"],
        None if content is None else bool(content),
        calls,
        "tool_call_id" in message,
        "name" in message,
    )


def _arguments_kind(call: Mapping[str, Any]) -> str:
    arguments = arguments_of(call)
    if arguments is None:
        return "text" if call["function"]["arguments"] else "nothing"
    return "object" if arguments else "empty"


class Marked:
    """The marked conversation for a request's `messages` and `tools`."""

    def __init__(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> None:
        self._places: dict[str, str] = {}
        self._objects: list[str] = []
        self._ids: dict[str, str] = {}
        self.messages = [self._message(place, each) for place, each in enumerate(messages)]
        self.tools = [self._tool(place, each) for place, each in enumerate(tools)]

    def missing(self, written: str) -> str | None:
        """Names the first part that is not in this text; None if all are there."""
        return next((place for mark, place in self._places.items() if mark not in written), None)

    def garbled(self, written: str) -> bool:
        """True where the arguments of a tool call stand there as Python writes a dict, which is no JSON."""
        return any(each in written for each in self._objects)

    def _mark(self, place: str) -> str:
        mark = f"zq{len(self._places)}qz"
        self._places[mark] = place
        return mark

    def _message(self, place: int, message: Mapping[str, Any]) -> dict[str, Any]:
        at, of_role = f"messages[{place}]", f", of role {message['role']!r}"
        marked: dict[str, Any] = {"role": message["role"]}
        if "content" in message:
            marked["content"] = self._mark(at + of_role) if message["content"] else message["content"]
        if message.get("tool_calls"):
            marked["tool_calls"] = [
                self._call(f"{at}.tool_calls[{number}]{of_role}", call)
                for number, call in enumerate(message["tool_calls"])
            ]
        if "tool_call_id" in message:
            marked["tool_call_id"] = self._id(message["tool_call_id"])
        if "name" in message:
            marked["name"] = "name"
        return marked

    def _call(self, at: str, call: Mapping[str, Any]) -> dict[str, Any]:
        kind = _arguments_kind(call)
        function = {"name": self._mark(at), "arguments": call["function"]["arguments"]}
        if kind == "text":
            function["arguments"] = self._mark(f"the arguments of {at}")
        if kind == "object":
            arguments = {self._mark(f"the arguments of {at}"): self._mark(f"the arguments of {at}")}
            self._objects.append(repr(arguments))
            function["arguments"] = json.dumps(arguments)
        return {**call, "function": function} | ({"id": self._id(call["id"])} if "id" in call else {})

    def _id(self, known: str) -> str:
        """An id as long as OpenAI's."""
        return self._ids.setdefault(known, f"call_{len(self._ids):024}")

    def _tool(self, place: int, tool: Mapping[str, Any]) -> dict[str, Any]:
        return {**tool, "function": {**tool["function"], "name": self._mark(f"tools[{place}]")}}
