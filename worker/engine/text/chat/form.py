"""The ways to write one conversation that chat templates disagree about: Form."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any


@dataclass(frozen=True, slots=True)
class MessageForm:
    """How messages in OpenAI's form are written for a template.

    `system`: a developer's messages are those of the system. `parts`: a content is a list of one text part. `blank`:
    a message without a content has an empty one. `quoted`: arguments of a tool call stay JSON text, as OpenAI has
    them; otherwise they are objects, as transformers documents it. `short`: ids of calls are nine letters and digits,
    which is all that Mistral's templates take.
    """

    system: bool = False
    parts: bool = False
    blank: bool = False
    quoted: bool = False
    short: bool = False

    def write(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The messages as a template is given them. A tool's result gets the name of the function that was called."""
        names: dict[str, str] = {}
        written = []
        for each in messages:
            calls = each.get("tool_calls") or ()
            names.update((call["id"], call["function"]["name"]) for call in calls if "id" in call)
            message = dict(each)
            if self.system and each["role"] == "developer":
                message["role"] = "system"
            if calls:
                message["tool_calls"] = [self._called(call) for call in calls]
            if self.short and "tool_call_id" in each:
                message["tool_call_id"] = _short(each["tool_call_id"])
            if each.get("content") is None:
                message["content"] = "" if self.blank else None
            elif self.parts:
                message["content"] = [{"type": "text", "text": each["content"]}]
            if "tool_call_id" in each and "name" not in each and each["tool_call_id"] in names:
                message["name"] = names[each["tool_call_id"]]
            written.append({key: value for key, value in message.items() if value is not None})
        return written

    def _called(self, call: Mapping[str, Any]) -> dict[str, Any]:
        written = dict(call) if self.quoted else _unquoted(call)
        return written | {"id": _short(call["id"])} if self.short and "id" in call else written


def forms(messages: Sequence[Mapping[str, Any]]) -> Iterator[MessageForm]:
    """Every form in which these messages differ, the usual ones first."""
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
