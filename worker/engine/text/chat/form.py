"""The forms of one conversation that chat templates disagree about."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any


@dataclass(frozen=True, slots=True)
class MessageForm:
    """A form in which messages of OpenAI's API are written for a template."""

    #: A developer's messages are those of the system.
    system: bool = False
    #: A content is a list of one text part.
    parts: bool = False
    #: A message without a content has an empty one.
    blank: bool = False
    #: Arguments of a tool call stay JSON text, as in OpenAI's API; else they are objects, as transformers documents it.
    quoted: bool = False
    #: Ids of calls are nine letters and digits, the only ones that Mistral's templates take.
    short: bool = False

    def write(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Writes the messages for a template. A tool's result gets the name of the function that was called."""
        names: dict[str, str] = {}
        written = []
        for message in messages:
            calls = message.get("tool_calls") or ()
            names.update((call["id"], call["function"]["name"]) for call in calls if "id" in call)
            form = dict(message)
            if self.system and message["role"] == "developer":
                form["role"] = "system"
            if calls:
                form["tool_calls"] = [self._called(call) for call in calls]
            if self.short and "tool_call_id" in message:
                form["tool_call_id"] = _short(message["tool_call_id"])
            if message.get("content") is None:
                form["content"] = "" if self.blank else None
            elif self.parts:
                form["content"] = [{"type": "text", "text": message["content"]}]
            if "tool_call_id" in message and "name" not in message and message["tool_call_id"] in names:
                form["name"] = names[message["tool_call_id"]]
            written.append({key: value for key, value in form.items() if value is not None})
        return written

    def _called(self, call: Mapping[str, Any]) -> dict[str, Any]:
        written = dict(call) if self.quoted else _unquoted(call)
        return written | {"id": _short(call["id"])} if self.short and "id" in call else written


def forms(messages: Sequence[Mapping[str, Any]]) -> Iterator[MessageForm]:
    """Yields every form in which these messages differ, the usual ones first."""
    differs = {
        "parts": any(each.get("content") for each in messages),
        "system": any(each["role"] == "developer" for each in messages),
        "quoted": any(each.get("tool_calls") for each in messages),
        "blank": any(each.get("content") is None for each in messages),
        "short": any("tool_call_id" in each or each.get("tool_calls") for each in messages),
    }
    for values in product(*((False, True) if differs[name] else (False,) for name in differs)):
        yield MessageForm(**dict(zip(differs, values, strict=True)))


def arguments_of(call: Mapping[str, Any]) -> dict[str, Any] | None:
    """The arguments of a tool call, None where its JSON text is of no object."""
    try:
        arguments = json.loads(call["function"]["arguments"])
    except (ValueError, RecursionError):
        return None
    return arguments if isinstance(arguments, dict) else None


def _short(known: str) -> str:
    return hashlib.sha256(known.encode()).hexdigest()[:9]


def _unquoted(call: Mapping[str, Any]) -> dict[str, Any]:
    arguments = arguments_of(call)
    if arguments is None:
        return dict(call)
    return {**call, "function": {**call["function"], "arguments": arguments}}
